//! What becomes of a step's logits: tokens drawn, continuations scored, rows captured. Planned
//! before the step runs, collected after it.

use std::sync::Arc;

use super::{
    batch::PlannedRow,
    core::Core,
    outputs::HeadRow,
    sequence::{Child, Role, Sequence, samples},
    types::{FirstToken, TokenLogprob},
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
            let draws = self.plan_draws(&row);
            let wanted = self.plan_summary(&row, draws.len());
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
            chunk.rows.push(HeadRow { row, draws: (first, draws.len()), summary });
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

    /// The draws of a row; their `row` is not known yet.
    fn plan_draws(&mut self, row: &PlannedRow) -> Vec<Draw> {
        let Some(sequence) = &mut self.slots[row.slot as usize] else { return Vec::new() };
        match &sequence.role {
            Role::Trunk(job) => {
                let job = &self.jobs[job].pending.job;
                if row.position as usize + 1 < job.tokens.len() {
                    return Vec::new();
                }
                let count = samples(job) as u32;
                (0..count).map(|i| draw(&job.sampling, NONE, i, 0)).collect()
            }
            Role::Sample(child) => {
                let sampling = &self.jobs[&child.job].pending.job.sampling;
                let drawn = child.tokens.len() + sequence.queued;
                sequence.queued += 1;
                vec![draw(sampling, row.slot, child.index as u32, drawn as u32)]
            }
            Role::Clean(..) | Role::Score(_) => Vec::new(),
        }
    }

    /// What is wanted of a row's logits, counting its draws from 0.
    fn plan_summary(&self, row: &PlannedRow, draws: usize) -> Option<Wanted> {
        let sequence = self.sequence_of(row)?;
        let drawn = (0..draws as u32).map(Id::Drawn);
        let (ids, top) = match &sequence.role {
            Role::Clean(..) => return None,
            Role::Trunk(job) => {
                let job = &self.jobs[job].pending.job;
                if row.position as usize + 1 < job.tokens.len() {
                    return None;
                }
                let given = job.score.iter().map(|tokens| tokens[0]);
                let mut ids: Vec<Id> =
                    job.watch.iter().copied().chain(given).map(Id::Token).collect();
                if job.logprobs.is_some() {
                    ids.extend(drawn);
                }
                if ids.is_empty() {
                    return None;
                }
                (ids, job.logprobs.unwrap_or(0))
            }
            Role::Sample(child) => {
                let top = self.jobs[&child.job].pending.job.logprobs?;
                (drawn.collect(), top)
            }
            Role::Score(child) => {
                let next = child.tokens[row.position as usize + 1 - self.prompt_of(child)];
                (vec![Id::Token(next)], 0)
            }
        };
        Some(Wanted { row: 0, ids, top: top as usize })
    }

    fn prompt_of(&self, child: &Child) -> usize {
        self.jobs[&child.job].pending.job.tokens.len()
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
            Role::Clean(..) => {}
            Role::Trunk(job) => {
                let job = *job;
                if row.position as usize + 1 == self.jobs[&job].pending.job.tokens.len() {
                    self.first_tokens(job, tokens, summary);
                }
            }
            Role::Sample(child) => {
                let token = tokens[0];
                child.logprobs.extend(summary.map(|s| chosen(s, s.logits[0])));
                child.tokens.push(token);
                self.report_token(child, token);
                sequence.tokens.push(token);
                sequence.queued -= 1;
            }
            Role::Score(child) => {
                if summary.is_some_and(|s| !s.logsumexp.is_finite()) {
                    self.broken.push(child.job);
                }
                child.logprobs.extend(summary.map(|s| chosen(s, s.logits[0])));
            }
        }
        self.slots[row.slot as usize] = Some(sequence);
    }

    /// Copies the logits of a chunk that jobs capture. Such steps wait for the device.
    pub(super) fn capture_logits(&mut self, heads: &[HeadRow]) -> Result<()> {
        let vocab = self.config.vocab;
        for (at, head) in heads.iter().enumerate() {
            let position = head.row.position as usize;
            let job = match self.sequence_of(&head.row).map(|s| &s.role) {
                Some(Role::Trunk(job)) => *job,
                _ => continue,
            };
            let Some(active) = self.jobs.get_mut(&job) else { continue };
            for (capture, out) in active.pending.job.capture.iter().zip(&mut active.captures) {
                if capture.site == CaptureSite::Logits
                    && let Ok(index) = capture.positions.binary_search(&position)
                {
                    let out = &mut out[index * vocab..][..vocab];
                    self.state.logits.read(at * vocab, out)?;
                }
            }
        }
        Ok(())
    }

    /// The prompt's last row: the first token of every continuation.
    fn first_tokens(&mut self, id: usize, tokens: &[u32], summary: Option<&Summary>) {
        let Some(active) = self.jobs.get_mut(&id) else { return };
        let job = Arc::clone(&active.pending.job);
        let count = samples(&job);
        if summary.is_some_and(|summary| !summary.logsumexp.is_finite()) {
            self.broken.push(id);
        }
        let summary = summary.cloned().unwrap_or_default();
        let (watch, rest) = summary.logits.split_at(job.watch.len().min(summary.logits.len()));
        if !job.watch.is_empty() {
            active.first = Some(FirstToken {
                watch: watch.to_vec(),
                logsumexp: summary.logsumexp,
                entropy: summary.entropy,
            });
        }
        let (scored, drawn) = rest.split_at(job.score.len().min(rest.len()));
        for (index, &token) in tokens.iter().enumerate() {
            let logprobs = drawn.get(index).map(|&logit| chosen(&summary, logit));
            let logprobs = logprobs.into_iter().collect();
            let child = Child { job: id, index, tokens: vec![token], logprobs };
            self.report_token(&child, token);
            self.continue_or_finish(child);
        }
        for (at, given) in job.score.iter().enumerate() {
            let logprobs = vec![chosen(&summary, scored[at])];
            let child = Child { job: id, index: count + at, tokens: given.clone(), logprobs };
            self.continue_or_finish(child);
        }
    }
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

fn chosen(summary: &Summary, logit: f32) -> TokenLogprob {
    TokenLogprob { logprob: logit - summary.logsumexp, top: summary.top.clone() }
}
