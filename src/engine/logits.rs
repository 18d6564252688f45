//! What becomes of a step's logits: tokens drawn, continuations scored, rows captured.

use std::sync::Arc;

use super::{
    batch::PlannedRow,
    core::Core,
    sequence::{Child, Role, samples},
    types::{FirstToken, TokenLogprob},
};
use crate::{
    ops::{
        Float,
        philox::{Purpose, philox},
        sample::{Draw, sample},
        summarize::{Summary, Wanted, summarize},
    },
    request::{CaptureSite, Sampling},
};

impl<T: Float> Core<T> {
    /// Draws, scores and captures from the logits of up to [`HEAD_ROWS`] rows.
    pub(super) fn collect_logits(&mut self, rows: &[PlannedRow], heads: &[u32]) {
        let vocab = self.config.vocab;
        let mut draws = Vec::new();
        for (at, &row) in heads.iter().enumerate() {
            let row = &rows[row as usize];
            let Some(sequence) = &self.slots[row.slot as usize] else { continue };
            match &sequence.role {
                Role::Trunk(job) => {
                    let job = &self.jobs[job].pending.job;
                    if row.position as usize + 1 == job.tokens.len() {
                        let count = samples(job) as u32;
                        draws.extend((0..count).map(|i| draw(&job.sampling, at as u32, i, 0)));
                    }
                }
                Role::Sample(child) => {
                    let sampling = &self.jobs[&child.job].pending.job.sampling;
                    let (index, drawn) = (child.index as u32, child.tokens.len() as u32);
                    draws.push(draw(sampling, at as u32, index, drawn));
                }
                Role::Clean(..) | Role::Score(_) => {}
            }
        }
        let mut tokens = vec![0; draws.len()];
        sample(&self.device, vocab, &self.state.logits, &draws, &mut tokens);
        let wanted = self.wanted_summaries(rows, heads, &draws, &tokens);
        let wanted: Vec<_> =
            wanted.iter().map(|(row, ids, top)| Wanted { row: *row, ids, top: *top }).collect();
        let mut summaries = summarize(&self.device, vocab, &self.state.logits, &wanted).into_iter();
        let mut tokens = tokens.into_iter();
        for (at, &row) in heads.iter().enumerate() {
            let row = &rows[row as usize];
            self.collect_row(row, at, &mut tokens, &mut summaries);
        }
    }

    /// (row of the logits, ids, top) for each summary, in the order `collect_row` takes them.
    fn wanted_summaries(
        &self,
        rows: &[PlannedRow],
        heads: &[u32],
        draws: &[Draw],
        tokens: &[u32],
    ) -> Vec<(usize, Vec<u32>, usize)> {
        let mut wanted = Vec::new();
        for (at, &row) in heads.iter().enumerate() {
            let row = &rows[row as usize];
            let Some(sequence) = &self.slots[row.slot as usize] else { continue };
            let drawn = draws.iter().zip(tokens).filter(|(draw, _)| draw.row as usize == at);
            // Where nothing could be drawn, any id will do: the job ends with an error.
            let last = self.config.vocab as u32 - 1;
            let drawn: Vec<u32> = drawn.map(|(_, &token)| token.min(last)).collect();
            match &sequence.role {
                Role::Clean(..) => {}
                Role::Trunk(job) => {
                    let job = &self.jobs[job].pending.job;
                    if row.position as usize + 1 < job.tokens.len() {
                        continue;
                    }
                    let mut ids = job.watch.clone();
                    ids.extend(job.score.iter().map(|tokens| tokens[0]));
                    if job.logprobs.is_some() {
                        ids.extend(drawn);
                    }
                    if !ids.is_empty() {
                        wanted.push((at, ids, job.logprobs.unwrap_or(0) as usize));
                    }
                }
                Role::Sample(child) => {
                    if let Some(top) = self.jobs[&child.job].pending.job.logprobs {
                        wanted.push((at, drawn, top as usize));
                    }
                }
                Role::Score(child) => {
                    let next = child.tokens[row.position as usize + 1 - self.prompt_of(child)];
                    wanted.push((at, vec![next], 0));
                }
            }
        }
        wanted
    }

    fn prompt_of(&self, child: &Child) -> usize {
        self.jobs[&child.job].pending.job.tokens.len()
    }

    fn collect_row(
        &mut self,
        row: &PlannedRow,
        at: usize,
        tokens: &mut impl Iterator<Item = u32>,
        summaries: &mut impl Iterator<Item = Summary>,
    ) {
        let Some(mut sequence) = self.slots[row.slot as usize].take() else { return };
        match &mut sequence.role {
            Role::Clean(..) => {}
            Role::Trunk(job) => {
                let job = *job;
                self.collect_logits_capture(job, row.position as usize, at);
                if row.position as usize + 1 == self.jobs[&job].pending.job.tokens.len() {
                    self.first_tokens(job, tokens, summaries);
                }
            }
            Role::Sample(child) => {
                let token = tokens.next().unwrap_or_default();
                let wants = self.jobs[&child.job].pending.job.logprobs.is_some();
                let summary = if wants { summaries.next() } else { None };
                child.logprobs.extend(summary.map(|s| chosen(&s, s.logits[0])));
                child.tokens.push(token);
                self.report_token(child, token);
                sequence.tokens.push(token);
            }
            Role::Score(child) => {
                let summary = summaries.next();
                if summary.as_ref().is_some_and(|s| !s.logsumexp.is_finite()) {
                    self.broken.push(child.job);
                }
                child.logprobs.extend(summary.map(|s| chosen(&s, s.logits[0])));
            }
        }
        self.slots[row.slot as usize] = Some(sequence);
    }

    fn collect_logits_capture(&mut self, job: usize, position: usize, at: usize) {
        let vocab = self.config.vocab;
        let Some(active) = self.jobs.get_mut(&job) else { return };
        for (capture, out) in active.pending.job.capture.iter().zip(&mut active.captures) {
            if capture.site == CaptureSite::Logits
                && let Ok(index) = capture.positions.binary_search(&position)
            {
                self.state.logits.read(at * vocab, &mut out[index * vocab..][..vocab]);
            }
        }
    }

    /// The prompt's last row: the first token of every continuation.
    fn first_tokens(
        &mut self,
        id: usize,
        tokens: &mut impl Iterator<Item = u32>,
        summaries: &mut impl Iterator<Item = Summary>,
    ) {
        let Some(active) = self.jobs.get_mut(&id) else { return };
        let job = Arc::clone(&active.pending.job);
        let count = samples(&job);
        let uses =
            !job.watch.is_empty() || !job.score.is_empty() || job.logprobs.is_some() && count > 0;
        let summary = if uses { summaries.next().unwrap_or_default() } else { Summary::default() };
        if uses && !summary.logsumexp.is_finite() {
            self.broken.push(id);
        }
        let (watch, rest) = summary.logits.split_at(job.watch.len().min(summary.logits.len()));
        if !job.watch.is_empty() {
            active.first = Some(FirstToken {
                watch: watch.to_vec(),
                logsumexp: summary.logsumexp,
                entropy: summary.entropy,
            });
        }
        let (scored, drawn) = rest.split_at(job.score.len().min(rest.len()));
        for index in 0..count {
            let token = tokens.next().unwrap_or_default();
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
fn draw(sampling: &Sampling, row: u32, sample: u32, index: u32) -> Draw {
    let seed = match sample {
        0 => sampling.seed,
        _ => {
            let words = philox(sampling.seed, [sample, 0, Purpose::Host as u32, 0]);
            u64::from(words[0]) << 32 | u64::from(words[1])
        }
    };
    Draw {
        row,
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
