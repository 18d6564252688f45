//! What becomes of a step's logits: tokens drawn, continuations scored, rows captured. Planned
//! before the step runs, collected after it.

use std::sync::Arc;

use super::{
    batch::PlannedRow,
    core::Core,
    outputs::HeadRow,
    sequence::{Child, Role, Sequence, samples},
    types::{FirstToken, Job, TokenLogprob},
};
use crate::{
    error::Result,
    ops::{
        Float,
        philox::{Purpose, philox},
        rows::NONE,
        sample::Draw,
        summarize::{Id, Summary, Wanted},
    },
    request::{CaptureSite, Sampling},
};

/// Rows of logits that are made together.
#[derive(Default)]
pub(super) struct HeadChunk {
    pub rows: Vec<HeadRow>,
    pub draws: Vec<Draw>,
    pub wanted: Vec<Wanted>,
    /// Ids and most likely tokens that are wanted in all.
    ids: usize,
    top: usize,
}

impl<T: Float> Core<T> {
    /// The sequence of a row, unless it has ended since the row was planned.
    pub(super) fn sequence_of(&self, row: &PlannedRow) -> Option<&Sequence> {
        self.slots[row.slot as usize].as_ref().filter(|sequence| sequence.id == row.sequence)
    }

    /// Plans the logits of a step's rows, in chunks that fit the memory for them.
    pub(super) fn plan_heads(&mut self, rows: &[PlannedRow], heads: &[u32]) -> Vec<HeadChunk> {
        let mut chunks: Vec<HeadChunk> = Vec::new();
        for &row in heads {
            let row = rows[row as usize];
            let jobs = self.first_of(&row);
            let draws = self.plan_draws(&row, &jobs);
            let wanted = self.plan_summary(&row, &jobs);
            let (ids, top) = wanted.as_ref().map_or((0, 0), |w| (w.ids.len(), w.top));
            let fits = chunks.last().is_some_and(|chunk| {
                let rows = chunk.wanted.len() + usize::from(wanted.is_some());
                chunk.rows.len() < self.limits.head_rows
                    && chunk.draws.len() + draws.len() <= self.draws.capacity()
                    && self.summaries.fits(rows, chunk.ids + ids, chunk.top + top)
            });
            if !fits {
                chunks.push(HeadChunk::default());
            }
            let Some(chunk) = chunks.last_mut() else { continue };
            (chunk.ids, chunk.top) = (chunk.ids + ids, chunk.top + top);
            let (at, first) = (chunk.rows.len(), chunk.draws.len());
            let summary = wanted.is_some().then_some(chunk.wanted.len());
            chunk.rows.push(HeadRow { row, jobs, draws: (first, draws.len()), summary });
            chunk.draws.extend(draws.into_iter().map(|draw| Draw { row: at as u32, ..draw }));
            chunk.wanted.extend(wanted.map(|mut wanted| {
                wanted.row = at;
                for id in &mut wanted.ids {
                    if let Id::Drawn(draw) = id {
                        *draw += first as u32;
                    }
                }
                wanted
            }));
        }
        chunks
    }

    /// The jobs that a row is the last prompt row of.
    fn first_of(&self, row: &PlannedRow) -> Vec<(usize, Arc<Job>)> {
        let trunk = match self.sequence_of(row).map(|sequence| &sequence.role) {
            Some(Role::Trunk(trunk)) => &self.trunks[trunk],
            _ => return Vec::new(),
        };
        if row.position as usize + 1 < trunk.key.len() {
            return Vec::new();
        }
        trunk.jobs.iter().map(|&job| (job, Arc::clone(self.jobs[&job].job()))).collect()
    }

    /// The draws of a row; their `row` is not known yet.
    fn plan_draws(&mut self, row: &PlannedRow, jobs: &[(usize, Arc<Job>)]) -> Vec<Draw> {
        let Some(sequence) = &mut self.slots[row.slot as usize] else { return Vec::new() };
        match &sequence.role {
            Role::Trunk(_) => {
                let jobs = jobs.iter().map(|(_, job)| job);
                let draws = |job: &Arc<Job>| {
                    let sampling = job.sampling;
                    (0..samples(job) as u32).map(move |i| draw(&sampling, NONE, i, 0))
                };
                jobs.flat_map(draws).collect()
            }
            Role::Sample(child) => {
                let sampling = &self.jobs[&child.job].job().sampling;
                let drawn = child.tokens.len() + sequence.queued;
                sequence.queued += 1;
                vec![draw(sampling, row.slot, child.index as u32, drawn as u32)]
            }
            Role::Clean(_) | Role::Score(_) => Vec::new(),
        }
    }

    /// What is wanted of a row's logits, counting its draws from 0.
    fn plan_summary(&self, row: &PlannedRow, jobs: &[(usize, Arc<Job>)]) -> Option<Wanted> {
        let sequence = self.sequence_of(row)?;
        let (ids, top) = match &sequence.role {
            Role::Clean(_) => return None,
            Role::Trunk(_) => {
                let (mut ids, mut draws) = (Vec::new(), 0);
                for (_, job) in jobs {
                    let count = samples(job) as u32;
                    let given = job.score.iter().map(|tokens| tokens[0]);
                    ids.extend(job.watch.iter().copied().chain(given).map(Id::Token));
                    if job.logprobs.is_some() {
                        ids.extend((draws..draws + count).map(Id::Drawn));
                    }
                    draws += count;
                }
                if ids.is_empty() {
                    return None;
                }
                (ids, jobs.iter().filter_map(|(_, job)| job.logprobs).max().unwrap_or(0))
            }
            Role::Sample(child) => {
                let top = self.jobs[&child.job].job().logprobs?;
                (vec![Id::Drawn(0)], top)
            }
            Role::Score(child) => {
                let next = child.tokens[row.position as usize + 1 - self.prompt_of(child)];
                (vec![Id::Token(next)], 0)
            }
        };
        Some(Wanted { row: 0, ids, top: top as usize })
    }

    fn prompt_of(&self, child: &Child) -> usize {
        self.jobs[&child.job].job().tokens.len()
    }

    /// Hands out what a row's logits gave.
    pub(super) fn collect_head(&mut self, head: &HeadRow, tokens: &[u32], summaries: &[Summary]) {
        let row = &head.row;
        if self.sequence_of(row).is_none() {
            return; // it ended while the row was under way
        }
        let Some(mut sequence) = self.slots[row.slot as usize].take() else { return };
        let tokens = &tokens[head.draws.0..][..head.draws.1];
        let summary = head.summary.map(|at| &summaries[at]);
        match &mut sequence.role {
            Role::Clean(_) => {}
            Role::Trunk(_) => self.first_tokens(&head.jobs, tokens, summary),
            Role::Sample(child) => {
                let token = tokens[0];
                child.logprobs.extend(summary.map(|s| chosen(s, s.logits[0], s.top.len())));
                child.tokens.push(token);
                self.report_token(child, token);
                sequence.tokens.push(token);
                sequence.queued -= 1;
            }
            Role::Score(child) => {
                if summary.is_some_and(|s| !s.logsumexp.is_finite()) {
                    self.broken.push(child.job);
                }
                child.logprobs.extend(summary.map(|s| chosen(s, s.logits[0], s.top.len())));
            }
        }
        self.slots[row.slot as usize] = Some(sequence);
    }

    /// Copies the logits of a chunk that jobs capture. Such steps wait for the device.
    pub(super) fn capture_logits(&mut self, heads: &[HeadRow]) -> Result<()> {
        let vocab = self.config.vocab;
        for (at, head) in heads.iter().enumerate() {
            let position = head.row.position as usize;
            let trunk = match self.sequence_of(&head.row).map(|s| &s.role) {
                Some(Role::Trunk(trunk)) => *trunk,
                _ => continue,
            };
            let Some(trunk) = self.trunks.get_mut(&trunk) else { continue };
            for (capture, out) in trunk.job.capture.iter().zip(&mut trunk.captures) {
                if capture.site == CaptureSite::Logits
                    && let Ok(index) = capture.positions.binary_search(&position)
                {
                    let mut logits = vec![0.0; vocab];
                    self.state.logits.read(at * vocab, &mut logits)?;
                    out.take(index, &logits);
                }
            }
        }
        Ok(())
    }

    /// The prompt's last row: the first token of every continuation of its jobs.
    fn first_tokens(
        &mut self,
        jobs: &[(usize, Arc<Job>)],
        mut tokens: &[u32],
        summary: Option<&Summary>,
    ) {
        let summary = summary.cloned().unwrap_or_default();
        let mut logits = &summary.logits[..];
        for (id, job) in jobs {
            let drawn_logits = if job.logprobs.is_some() { samples(job) } else { 0 };
            let watched = logits.split_off(..job.watch.len()).unwrap_or_default();
            let scored = logits.split_off(..job.score.len()).unwrap_or_default();
            let drawn = logits.split_off(..drawn_logits).unwrap_or_default();
            let tokens = tokens.split_off(..samples(job)).unwrap_or_default();
            if self.jobs.contains_key(id) {
                let first = First { watched, scored, drawn };
                self.start_continuations(*id, job, tokens, &first, &summary);
            }
        }
    }

    /// Hands a job what its prompt's last row gave.
    fn start_continuations(
        &mut self,
        id: usize,
        job: &Job,
        tokens: &[u32],
        first: &First,
        summary: &Summary,
    ) {
        let is_read =
            !(first.watched.is_empty() && first.scored.is_empty() && first.drawn.is_empty());
        if is_read && !summary.logsumexp.is_finite() {
            self.broken.push(id);
        }
        let top = job.logprobs.unwrap_or(0) as usize;
        let of = |logit: f32| chosen(summary, logit, top);
        if let Some(active) = self.jobs.get_mut(&id).filter(|_| !job.watch.is_empty()) {
            active.first = Some(FirstToken {
                watch: first.watched.to_vec(),
                logsumexp: summary.logsumexp,
                entropy: summary.entropy,
            });
        }
        for (index, &token) in tokens.iter().enumerate() {
            let logprobs = first.drawn.get(index).map(|&logit| of(logit)).into_iter().collect();
            let child = Child { job: id, index, tokens: vec![token], logprobs };
            self.report_token(&child, token);
            self.continue_or_finish(child);
        }
        for (at, given) in job.score.iter().enumerate() {
            let logprobs = vec![of(first.scored[at])];
            let index = tokens.len() + at;
            self.continue_or_finish(Child { job: id, index, tokens: given.clone(), logprobs });
        }
    }
}

/// Logits of a prompt's last row that a job wants.
struct First<'a> {
    watched: &'a [f32],
    scored: &'a [f32],
    drawn: &'a [f32],
}

/// Sample i of a job draws with its own seed; the first with the job's.
fn draw(sampling: &Sampling, slot: u32, sample: u32, index: u32) -> Draw {
    let seed = match sample {
        0 => sampling.seed,
        _ => {
            let words = philox(sampling.seed, [sample, 0, Purpose::Host as u32, 0]);
            u64::from(words[0]) << 32 | u64::from(words[1])
        }
    };
    Draw {
        row: NONE,
        slot,
        seed,
        index,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    }
}

fn chosen(summary: &Summary, logit: f32, top: usize) -> TokenLogprob {
    let top = summary.top.iter().take(top).copied().collect();
    TokenLogprob { logprob: logit - summary.logsumexp, top }
}
