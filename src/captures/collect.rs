//! Runs requests and hands out what they capture, a bounded number of bytes at a time.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
    sync::Arc,
};

use super::tensors::{Item, Values, read_off};
use crate::{
    engine::{Engine, Finished, Injection, Job, Outcome, Reading, capture_bytes},
    error::{Error, Result},
    request::{Op, Sampling, Site},
};

/// A finished request.
pub struct Collected {
    /// Which of the items it is.
    pub item: usize,
    /// Its tensors, as [`Item::specs`](super::Item::specs) gives them.
    pub tensors: Vec<Values>,
    /// What it reports beside them.
    pub outcome: Outcome,
}

/// What is run for an item.
enum Task {
    Request(usize),
    /// The logit lens of a row of one of its captures.
    Lens {
        item: usize,
        capture: usize,
        row: usize,
    },
}

/// An item whose rows the lens still looks at.
struct Unfinished {
    finished: Finished,
    /// By capture: token ids and log-probabilities of each row.
    lenses: HashMap<usize, Lens>,
    rows_left: usize,
}

#[derive(Default)]
struct Lens {
    tokens: Vec<i32>,
    logprobs: Vec<f32>,
}

/// Runs items and hands out each when it is finished, in any order. New ones are begun only while the captures
/// of those that are not handed out take at most [`Options::capture_bytes`](crate::engine::Options), and as much
/// again, and one more request, for rows that a lens still looks at: `done` may be as slow as it likes.
///
/// # Errors
/// What `done` returns, at once; an item that fails, with its id.
pub fn collect(
    engine: &Engine,
    items: &[(usize, &Item)],
    mut done: impl FnMut(Collected) -> Result<()>,
) -> Result<()> {
    let all: HashMap<usize, &Item> = items.iter().copied().collect();
    // Asked again after each call below: the lens makes new jobs.
    let more: Rc<RefCell<VecDeque<(Task, Job)>>> = Rc::default();
    let tasks: Rc<RefCell<Vec<Task>>> = Rc::default();
    let looked_at: Rc<Cell<u64>> = Rc::default();
    let mut next = items.iter();
    let jobs = std::iter::from_fn(|| {
        let lens = more.borrow_mut().pop_front();
        let (task, job) = lens.or_else(|| {
            if looked_at.get() > 0 && looked_at.get() >= engine.capture_bytes() {
                return None; // asked again when a row is done
            }
            let (at, item) = next.next()?;
            Some((Task::Request(*at), item.job.clone()))
        })?;
        tasks.borrow_mut().push(task);
        Some(job)
    });
    let mut unfinished: HashMap<usize, Unfinished> = HashMap::new();
    engine.run_all(jobs, |index, finished| {
        let (item, lens) = match tasks.borrow()[index] {
            Task::Request(item) => (item, None),
            Task::Lens { item, capture, row } => (item, Some((capture, row))),
        };
        let of = all[&item];
        let named = |error: Error| error.at(format!("request {:?}", of.id));
        let finished = finished.map_err(named)?;
        let complete = match lens {
            None => begin(engine, (item, of), finished, &mut more.borrow_mut()),
            Some(place) => {
                let waiting = unfinished.get_mut(&item).expect("its rows are looked at");
                waiting.take(place, &finished.outcome).map_err(named)?;
                if waiting.rows_left > 0 {
                    return Ok(());
                }
                looked_at.set(looked_at.get() - capture_bytes(&of.job, engine.config()));
                unfinished.remove(&item).expect("it was just there")
            }
        };
        if complete.rows_left > 0 {
            looked_at.set(looked_at.get() + capture_bytes(&of.job, engine.config()));
            unfinished.insert(item, complete);
            return Ok(());
        }
        done(complete.collected(item, of))
    })
}

/// An item that was run: what is left to be looked at by the lens is queued.
fn begin(
    engine: &Engine,
    (at, item): (usize, &Item),
    finished: Finished,
    more: &mut VecDeque<(Task, Job)>,
) -> Unfinished {
    let mut unfinished = Unfinished { finished, lenses: HashMap::new(), rows_left: 0 };
    for (capture, reading) in item.readings.iter().enumerate() {
        let Reading::Lens(top) = reading else { continue };
        let rows = item.job.capture[capture].positions.len();
        let lens = Lens { tokens: vec![0; rows * top], logprobs: vec![0.0; rows * top] };
        unfinished.lenses.insert(capture, lens);
        unfinished.rows_left += rows;
        let data = &unfinished.finished.captures[capture];
        for (row, values) in data.chunks_exact(engine.config().dim).enumerate() {
            let task = Task::Lens { item: at, capture, row };
            more.push_back((task, lens_job(engine, item.job.tokens[0], values.into(), *top)));
        }
    }
    unfinished
}

/// The likeliest next tokens where the stream after the last block is this row: what the last norm and the
/// output matrix make of it (nostalgebraist 2020).
fn lens_job(engine: &Engine, token: u32, row: Arc<[f32]>, top: usize) -> Job {
    Job {
        tokens: vec![token],
        inject: vec![Injection {
            vector: row,
            site: Site::ResidPost,
            layer: engine.config().layers - 1,
            op: Op::Replace,
            strength: 1.0,
            from: 0,
            to: Some(1),
            ..Injection::default()
        }],
        sampling: Sampling { temperature: 0.0, max_tokens: 1, ..Sampling::default() },
        n: 1,
        logprobs: Some(top as u32),
        ..Job::default()
    }
}

impl Unfinished {
    fn take(&mut self, (capture, row): (usize, usize), outcome: &Outcome) -> Result<()> {
        let first = outcome.samples.first().and_then(|sample| sample.logprobs.first());
        let top = &first.ok_or_else(|| Error::new("the engine left the logits out"))?.top;
        let lens = self.lenses.get_mut(&capture).expect("a capture that the lens looks at");
        for (at, (token, logprob)) in top.iter().enumerate() {
            lens.tokens[row * top.len() + at] = *token as i32;
            lens.logprobs[row * top.len() + at] = *logprob;
        }
        self.rows_left -= 1;
        Ok(())
    }

    fn collected(self, item: usize, of: &Item) -> Collected {
        let Self { finished, mut lenses, .. } = self;
        let mut tensors = Vec::new();
        for (capture, data) in finished.captures.into_iter().enumerate() {
            match lenses.remove(&capture) {
                Some(Lens { tokens, logprobs }) => {
                    tensors.extend([Values::Token(tokens), Values::Float(logprobs)]);
                }
                None => tensors.push(read_off(&of.readings[capture], data)),
            }
        }
        Collected { item, tensors, outcome: finished.outcome }
    }
}
