//! What runs in a slot, and the jobs it runs for.

use std::sync::{Arc, mpsc};

use super::{
    bank::InBank,
    hooks::{Own, Planned, Tally},
    kv::PageTable,
    prompts::Key,
    types::{Capture, Event, FirstToken, Job, Reduce, Sample, Score, TokenLogprob},
};
use crate::ops::{attention::SharedPrefix, hooks::GATES};

/// Where a job's events go.
pub type Events = mpsc::Sender<(u64, Event)>;

/// A job that waits.
#[derive(Debug)]
pub struct Pending {
    /// The submitter's name for it.
    pub tag: u64,
    /// The prompt.
    pub key: Key,
    /// All of it.
    pub job: Arc<Job>,
    /// Where its events go.
    pub events: Events,
    /// What it must compute itself.
    pub own: Own,
    /// Whether it starts from a clean run, or needs its norms.
    pub needs_clean: bool,
    /// The clean mean norm of each injection's window, where it is known; none before it starts.
    pub references: Vec<Option<f64>>,
}

/// A prompt with its injections, computed once for all jobs that have it.
#[derive(Debug)]
pub struct Trunk {
    /// The jobs that run. When the last one ends, so does this.
    pub jobs: Vec<usize>,
    /// The first of them: its prompt, live injections and captures are those of all.
    pub job: Arc<Job>,
    /// The prompt.
    pub key: Key,
    /// What of it is computed here.
    pub own: Own,
    /// Whether it holds the prompt's clean run.
    pub holds_clean: bool,
    /// Its operations, by site.
    pub planned: Vec<Planned>,
    /// Which pages continuations share with others.
    pub shared: SharedPrefix,
    /// What its rows saw.
    pub tally: Vec<Tally>,
    /// Where its rows first met each condition.
    pub latched: [u32; GATES],
    /// One for each of the jobs' captures.
    pub captures: Vec<Captured>,
    /// Where in the bank the vectors are that captured rows are multiplied with.
    pub probes: Vec<InBank>,
    /// Pages of the prompt, from its end to the last continuation's start.
    pub pages: Option<PageTable>,
    /// Whether its one continuation takes its pages over.
    pub is_sole: bool,
    /// Pages that one of its continuations needs.
    pub child_pages: usize,
}

/// What was captured so far.
#[derive(Debug)]
pub struct Captured {
    /// As it is handed out.
    data: Vec<f32>,
    /// Of a mean: the sum, and of how many rows.
    sum: Vec<f64>,
    rows: usize,
    is_mean: bool,
}

impl Captured {
    /// Room for what a capture gives, of rows of so many numbers.
    pub fn new(capture: &Capture, width: usize) -> Self {
        let (rows, columns) = capture.reduce.shape(capture.positions.len(), width);
        let is_mean = capture.reduce == Reduce::Mean;
        let sum = if is_mean { vec![0.0; columns] } else { Vec::new() };
        Self { data: vec![0.0; rows * columns], sum, rows: 0, is_mean }
    }

    /// Takes a row, or what was made of it; of a mean in the order of positions.
    pub fn take(&mut self, index: usize, row: &[f32]) {
        if !self.is_mean {
            self.data[index * row.len()..][..row.len()].copy_from_slice(row);
            return;
        }
        self.sum.iter_mut().zip(row).for_each(|(sum, &value)| *sum += f64::from(value));
        self.rows += 1;
    }

    /// What is handed out, once all rows were taken.
    pub fn finish(mut self) -> Vec<f32> {
        let means = self.sum.iter().map(|sum| (sum / self.rows as f64) as f32);
        self.data.iter_mut().zip(means).for_each(|(to, mean)| *to = mean);
        self.data
    }
}

/// A job that runs, or several that are the same.
#[derive(Debug)]
pub struct Active {
    /// Its prompt.
    pub trunk: u64,
    /// Who asked for it, at least one.
    pub askers: Vec<Pending>,
    /// What each continuation saw: samples, then scores.
    pub tallies: Vec<Vec<Tally>>,
    /// The first token's distribution.
    pub first: Option<FirstToken>,
    /// Finished samples.
    pub samples: Vec<Option<Sample>>,
    /// Finished scores.
    pub scores: Vec<Option<Score>>,
    /// Continuations that have not started.
    pub waiting: usize,
    /// Continuations that have not finished.
    pub unfinished: usize,
}

impl Active {
    /// A job of a prompt that is about to run.
    pub fn new(trunk: u64, asker: Pending) -> Self {
        let job = Arc::clone(&asker.job);
        let count = continuations(&job);
        Self {
            trunk,
            askers: vec![asker],
            tallies: vec![Vec::new(); count],
            first: None,
            samples: vec![None; samples(&job)],
            scores: vec![None; job.score.len()],
            waiting: count,
            unfinished: count,
        }
    }

    /// What was asked for.
    pub fn job(&self) -> &Arc<Job> {
        &self.askers[0].job
    }

    /// Tells all who asked.
    pub fn tell(&self, event: impl Fn(&Pending) -> Event) {
        for asker in &self.askers {
            drop(asker.events.send((asker.tag, event(asker))));
        }
    }
}

/// Samples and scores of a job.
pub fn continuations(job: &Job) -> usize {
    samples(job) + job.score.len()
}

/// Samples of a job.
pub fn samples(job: &Job) -> usize {
    if job.sampling.max_tokens == 0 { 0 } else { job.n as usize }
}

/// Positions that a job's prompt and its longest continuation fill.
pub fn rows_of(job: &Job) -> usize {
    let longest = job.score.iter().map(Vec::len).max().unwrap_or(0);
    job.tokens.len() + longest.max(job.sampling.max_tokens as usize).saturating_sub(1)
}

/// A continuation, its first token known.
#[derive(Debug)]
pub struct Child {
    /// Its job.
    pub job: usize,
    /// 0..n samples, then scores.
    pub index: usize,
    /// Tokens that follow the prompt: drawn so far, or given.
    pub tokens: Vec<u32>,
    /// Log-probabilities: of the drawn tokens where asked for, or of the given ones so far.
    pub logprobs: Vec<TokenLogprob>,
}

/// What a sequence is for.
#[derive(Debug)]
pub enum Role {
    /// A prompt's clean run.
    Clean(Key),
    /// A prompt with its injections.
    Trunk(u64),
    /// A sample.
    Sample(Child),
    /// A given continuation.
    Score(Child),
}

/// A sequence in a slot.
#[derive(Debug)]
pub struct Sequence {
    /// Its own, for as long as the engine runs.
    pub id: u64,
    /// What it is for.
    pub role: Role,
    /// Tokens known so far, by position.
    pub tokens: Vec<u32>,
    /// Tokens that are being drawn: 0 or 1.
    pub queued: usize,
    /// Which pages it shares with other sequences.
    pub shared: SharedPrefix,
    /// The next position to compute.
    pub next: usize,
    /// Its pages.
    pub pages: PageTable,
    /// What it saw of its job's operations.
    pub tally: Vec<Tally>,
}

impl Sequence {
    /// A sequence that shares nothing, to be put into a slot.
    pub fn new(
        role: Role,
        tokens: Vec<u32>,
        next: usize,
        pages: PageTable,
        tally: Vec<Tally>,
    ) -> Self {
        let shared = SharedPrefix::default();
        Self { id: 0, role, tokens, queued: 0, shared, next, pages, tally }
    }
}
