//! Runs planned trials on an engine and hands out their finished lines.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap, VecDeque},
    iter::{self, Peekable},
    rc::Rc,
};

use crate::{
    engine::{Capture, Finished, FirstToken, Job},
    error::{Context, Error, Result},
    experiment::{
        Jobs, Progress, next,
        plan::{Plan, Planned},
        probe::probe,
        protocol::Kind,
        results::{Condition, FirstAnswer, NextToken, Readout, Reply, Trial},
    },
    request::{CaptureSite, Sampling},
};

/// The largest part by which a measured change may differ from the planned one.
const CHANGE_TOLERANCE: f32 = 0.01;

/// Runs the trials at the wanted places of the plan's grid, in order, and hands each finished line
/// to `save` in the order in which they finish. A line is handed out once and
/// complete; what is lost when the process is killed is only what was in flight. Trials are made as
/// the engine asks for them.
pub fn execute(
    plan: &Plan,
    is_wanted: &dyn Fn(usize) -> bool,
    engine: &dyn Jobs,
    save: &mut dyn FnMut(Trial) -> Result<()>,
    keep: &mut Keep<'_>,
    progress: &mut dyn Progress,
) -> Result<Done> {
    let total = (0..plan.grid().len()).filter(|place| is_wanted(*place)).count();
    let stop = Rc::new(Cell::new(progress.stops()));
    let (total_cells, cells) = (plan.grid().cells(), BTreeSet::new());
    let (total_trials, tokens) = (total as u64, 0);
    let mut tally = Tally {
        keep,
        cells,
        total_cells,
        stop,
        save,
        progress,
        done: 0,
        total: total_trials,
        tokens,
    };
    for (part, kind) in plan.kinds().enumerate() {
        let wanted = plan.grid().of_part(part).filter(|place| is_wanted(*place));
        match kind {
            Kind::Readout => readouts(plan, wanted, engine, &mut tally)?,
            Kind::Sample(_) => samples(plan, part, wanted, engine, &mut tally)?,
            Kind::Probe => probes(plan, wanted, engine, &mut tally)?,
        }
    }
    let trials = tally.done as usize;
    Ok(Done { trials, stopped: trials < total })
}

/// Takes a trial's id and its captures, each with its values.
pub type Keep<'a> = dyn FnMut(&str, &[(Capture, Vec<f32>)]) -> Result<()> + 'a;

/// How far [`execute`] came.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Lines handed out.
    pub trials: usize,
    /// Whether it was stopped before all were.
    pub stopped: bool,
}

/// Counts and passes on the finished lines.
struct Tally<'a> {
    keep: &'a mut Keep<'a>,
    /// Those of the trials finished now: part, prompt, layer, dose, condition.
    cells: BTreeSet<(String, String, usize, u64, Condition)>,
    total_cells: usize,
    /// Whether nothing more is to be begun.
    stop: Rc<Cell<bool>>,
    save: &'a mut dyn FnMut(Trial) -> Result<()>,
    progress: &'a mut dyn Progress,
    done: u64,
    total: u64,
    tokens: u64,
}

impl Tally<'_> {
    /// Stores what the protocol captures of a trial and leaves the rest: before the trial's line, so that
    /// a trial with a line has its captures.
    fn keep_captures(
        &mut self,
        plan: &Plan,
        trial: &Planned,
        finished: &mut Finished,
    ) -> Result<()> {
        let wanted = plan.wanted_captures(trial);
        let own = finished.captures.len().saturating_sub(wanted.len());
        let data = finished.captures.split_off(own);
        if data.is_empty() {
            return Ok(());
        }
        let captures: Vec<(Capture, Vec<f32>)> = wanted.into_iter().zip(data).collect();
        (self.keep)(&trial.id, &captures)
    }

    fn finish(&mut self, trial: Trial) -> Result<()> {
        self.tokens += trial.reply.as_ref().map_or(0, |reply| reply.tokens.len() as u64);
        if let (Some(layer), Some(dose)) = (trial.layer, trial.dose) {
            let names = (trial.part.clone(), trial.prompt.clone());
            self.cells.insert((names.0, names.1, layer, dose.to_bits(), trial.condition));
        }
        (self.save)(trial)?;
        self.progress.cells(self.cells.len(), self.total_cells);
        self.done += 1;
        self.progress.advance("trials", self.done, self.total, self.tokens);
        self.stop.set(self.progress.stops());
        Ok(())
    }
}

/// What the engine was asked and has not answered.
struct Issued<T> {
    next: usize,
    by_index: HashMap<usize, T>,
}

impl<T> Issued<T> {
    fn new() -> Self {
        Self { next: 0, by_index: HashMap::new() }
    }

    /// Notes the engine's next job.
    fn push(&mut self, task: T) {
        self.by_index.insert(self.next, task);
        self.next += 1;
    }

    fn take(&mut self, index: usize) -> Result<T> {
        let task = self.by_index.remove(&index);
        task.ok_or_else(|| Error::new("the engine finished a job twice"))
    }

    fn check_none_is_lost(&self) -> Result<()> {
        if self.by_index.is_empty() { Ok(()) } else { Err(Error::new("the engine lost a job")) }
    }
}

/// Runs the trials at these places, one job each.
fn run_each<'a>(
    plan: &Plan<'a>,
    places: impl Iterator<Item = usize>,
    engine: &dyn Jobs,
    stop: &Cell<bool>,
    mut done: impl FnMut(usize, &Planned<'a>, Finished) -> Result<()>,
) -> Result<()> {
    let issued = RefCell::new(Issued::new());
    let mut jobs = places.take_while(|_| !stop.get()).map(|place| {
        let trial = plan.trial(place);
        let job = plan.job(&trial);
        issued.borrow_mut().push((place, trial));
        job
    });
    engine.run_all(&mut jobs, &mut |index, finished| {
        let (place, trial) = issued.borrow_mut().take(index)?;
        done(place, &trial, finished.at(|| name_of(plan, &trial))?)
    })?;
    issued.borrow().check_none_is_lost()
}

/// Clean logits first: they are kept for as long as the part runs (one row of the vocabulary for each clean
/// trial) and not stored, so a resumed run computes them again, one job a prompt.
fn readouts(
    plan: &Plan,
    wanted: impl Iterator<Item = usize> + Clone,
    engine: &dyn Jobs,
    tally: &mut Tally<'_>,
) -> Result<()> {
    let grid = plan.grid();
    let wanted_cleans: BTreeSet<usize> =
        wanted.clone().filter(|place| grid.clean_of(*place).is_none()).collect();
    let injected = wanted.filter(|place| grid.clean_of(*place).is_some());
    let partners = injected.clone().filter_map(|place| grid.clean_of(place));
    let cleans: BTreeSet<usize> = partners.chain(wanted_cleans.iter().copied()).collect();
    let stop = Rc::clone(&tally.stop);
    let mut partners: HashMap<usize, Clean> = HashMap::new();
    run_each(plan, cleans.into_iter(), engine, &stop, |place, trial, mut finished| {
        let first = first_token(plan, trial, &finished)?.clone();
        if wanted_cleans.contains(&place) {
            tally.keep_captures(plan, trial, &mut finished)?;
            let next = next_token(plan, trial, &finished, None)?;
            tally.finish(Trial { next: Some(next), ..line(plan, trial, &finished)? })?;
        }
        let logits = finished.captures.into_iter().next().unwrap_or_default();
        partners.insert(place, Clean { first, logits });
        Ok(())
    })?;
    run_each(plan, injected, engine, &stop, |place, trial, mut finished| {
        tally.keep_captures(plan, trial, &mut finished)?;
        let first = first_token(plan, trial, &finished)?;
        let clean = grid.clean_of(place).and_then(|clean| partners.get(&clean));
        let clean = clean.ok_or_else(|| {
            Error::new("the clean partner's logits are missing").at(name_of(plan, trial))
        })?;
        let (yes, no) = plan.answers(trial);
        let words = plan.words(trial);
        let before = &clean.first.watch[yes + no..];
        let read = read_out(words, &first.watch[yes + no..], before, trial);
        let next = next_token(plan, trial, &finished, Some(clean))?;
        let line = line(plan, trial, &finished)?;
        tally.finish(Trial { read: Some(read), next: Some(next), ..line })
    })
}

/// What injected trials of a readout are held against.
struct Clean {
    first: FirstToken,
    /// (vocab,)
    logits: Vec<f32>,
}

fn next_token(
    plan: &Plan,
    trial: &Planned,
    finished: &Finished,
    clean: Option<&Clean>,
) -> Result<NextToken> {
    let logsumexp = first_token(plan, trial, finished)?.logsumexp;
    let logits = finished.captures.first().filter(|logits| !logits.is_empty());
    let logits = logits.ok_or_else(|| {
        Error::new("the engine did not hand out the logits").at(name_of(plan, trial))
    })?;
    let kl = clean
        .map(|clean| next::divergence(logits, logsumexp, &clean.logits, clean.first.logsumexp));
    let top = next::top(logits, logsumexp);
    let top = top.into_iter().map(|(token, logprob)| (plan.piece(token), logprob));
    Ok(NextToken { kl, top: top.collect() })
}

/// Argmax and rank of (logit − clean logit); among equals the earlier word of the list leads.
fn read_out(words: &[String], logits: &[f32], clean: &[f32], trial: &Planned) -> Readout {
    let gains: Vec<f32> = logits.iter().zip(clean).map(|(logit, clean)| logit - clean).collect();
    let mut order: Vec<usize> = (0..words.len()).collect();
    order.sort_by(|a, b| gains[*b].total_cmp(&gains[*a]));
    let own = order.iter().position(|index| words[*index] == trial.cell.concept);
    Readout {
        word: words[order[0]].clone(),
        rank: own.map_or(words.len(), |position| position + 1),
        words: words.len(),
    }
}

fn probes(
    plan: &Plan,
    wanted: impl Iterator<Item = usize>,
    engine: &dyn Jobs,
    tally: &mut Tally<'_>,
) -> Result<()> {
    let stop = Rc::clone(&tally.stop);
    run_each(plan, wanted, engine, &stop, |_, trial, mut finished| {
        tally.keep_captures(plan, trial, &mut finished)?;
        let (layers, _) = plan.probed(trial).unwrap_or_default();
        let (pieces, band) = (plan.probed_pieces(trial), &plan.part(trial).band);
        let (rows, concepts) = (&finished.captures, plan.concepts());
        let probed = probe(rows, &layers, pieces, concepts, trial.cell.concept, band);
        let probed = probed.ok_or_else(|| {
            Error::new("a word to compare with has no vector").at(name_of(plan, trial))
        })?;
        tally.finish(Trial { probe: Some(probed), ..line(plan, trial, &finished)? })
    })
}

/// What a job of a sample part was for.
enum Task<'a> {
    /// The reply is drawn.
    Draw(Planned<'a>),
    /// The drawn reply's likelihood under the uninjected model.
    Score(Planned<'a>, Box<Trial>),
}

/// The jobs of a sample part: a drawn reply comes back as a job that scores it.
struct Queue<'a, 'b, 'c, I: Iterator<Item = usize>> {
    plan: &'b Plan<'a>,
    draws: Peekable<I>,
    scores: VecDeque<Task<'a>>,
    issued: Issued<Task<'a>>,
    tally: &'b mut Tally<'c>,
    /// By prompt.
    cleans: HashMap<Vec<u32>, Clean>,
}

/// Prompts of a part whose logits are kept, a row of the vocabulary each.
const CLEAN_PROMPTS: usize = 512;

/// The distribution after each prompt without an injection; nothing where the whole part has too many
/// prompts, whatever is left of it to run.
fn clean_prompts(
    plan: &Plan,
    part: usize,
    wanted: impl Iterator<Item = usize>,
    engine: &dyn Jobs,
) -> Result<HashMap<Vec<u32>, Clean>> {
    let grid = plan.grid();
    let injected = |place: &usize| grid.clean_of(*place).is_some();
    let first_repeat = grid.first_repeat(part).filter(injected);
    let all: BTreeSet<&[u32]> =
        first_repeat.map(|place| &plan.prompt(&grid.cell(place)).tokens[..]).collect();
    if all.len() > CLEAN_PROMPTS {
        return Ok(HashMap::new());
    }
    let wanted = wanted.filter(injected);
    let prompts: BTreeSet<&[u32]> =
        wanted.map(|place| &plan.prompt(&grid.cell(place)).tokens[..]).collect();
    let prompts: Vec<Vec<u32>> = prompts.into_iter().map(<[u32]>::to_vec).collect();
    let mut jobs = prompts.iter().map(|tokens| Job {
        tokens: tokens.clone(),
        capture: vec![Capture::rows(CaptureSite::Logits, None, vec![tokens.len() - 1])],
        watch: vec![0], // the first token is reported to jobs that watch one
        sampling: Sampling { max_tokens: 0, ..Sampling::default() },
        n: 1,
        ..Job::default()
    });
    let mut cleans = HashMap::new();
    engine.run_all(&mut jobs, &mut |index, finished| {
        let mut finished = finished?;
        let logits = finished.captures.pop().unwrap_or_default();
        let first = finished.outcome.first;
        let first = first.ok_or_else(|| Error::new("the engine gave no first token"))?;
        cleans.insert(prompts[index].clone(), Clean { first, logits });
        Ok(())
    })?;
    Ok(cleans)
}

fn samples(
    plan: &Plan,
    part: usize,
    wanted: impl Iterator<Item = usize> + Clone,
    engine: &dyn Jobs,
    tally: &mut Tally<'_>,
) -> Result<()> {
    let (scores, issued) = (VecDeque::new(), Issued::new());
    let cleans = clean_prompts(plan, part, wanted.clone(), engine)?;
    let queue = Queue { plan, draws: wanted.peekable(), scores, issued, tally, cleans };
    let queue = RefCell::new(queue);
    // The engine may find the queue empty while the last replies are still being drawn; their
    // scores are then a second, short round.
    while queue.borrow_mut().has_more() {
        queue.borrow_mut().issued = Issued::new();
        let mut jobs = iter::from_fn(|| queue.borrow_mut().next_job());
        engine.run_all(&mut jobs, &mut |index, finished| {
            queue.borrow_mut().finish(index, finished)
        })?;
        queue.borrow().issued.check_none_is_lost()?;
    }
    Ok(())
}

impl<I: Iterator<Item = usize>> Queue<'_, '_, '_, I> {
    fn has_more(&mut self) -> bool {
        !self.scores.is_empty() || (!self.tally.stop.get() && self.draws.peek().is_some())
    }

    /// Scores go first: they free their memory and finish lines early.
    fn next_job(&mut self) -> Option<Job> {
        let task = match self.scores.pop_front() {
            Some(score) => score,
            None if self.tally.stop.get() => return None,
            None => Task::Draw(self.plan.trial(self.draws.next()?)),
        };
        let job = match &task {
            Task::Draw(trial) => self.plan.job(trial),
            Task::Score(trial, line) => Job {
                tokens: self.plan.tokens(trial).to_vec(),
                score: line.reply.iter().map(|reply| reply.tokens.clone()).collect(),
                sampling: Sampling { max_tokens: 0, ..Sampling::default() },
                n: 1,
                ..Job::default()
            },
        };
        self.issued.push(task);
        Some(job)
    }

    fn finish(&mut self, index: usize, finished: Result<Finished>) -> Result<()> {
        match self.issued.take(index)? {
            Task::Draw(trial) => {
                let place = || name_of(self.plan, &trial);
                let mut finished = finished.at(place)?;
                self.tally.keep_captures(self.plan, &trial, &mut finished)?;
                let mut line = line(self.plan, &trial, &finished)?;
                let sample = finished.outcome.samples.pop().filter(|s| !s.tokens.is_empty());
                let sample = sample.ok_or_else(|| Error::new("no token was drawn").at(place()))?;
                let clean = trial.cell.at.and_then(|_| self.cleans.get(self.plan.tokens(&trial)));
                line.next = Some(next_token(self.plan, &trial, &finished, clean)?);
                line.reply = Some(Reply {
                    ends: self.plan.ends(&sample.tokens, &sample.text),
                    text: sample.text,
                    tokens: sample.tokens,
                    finish: sample.finish,
                    nll: 0.0,
                });
                self.scores.push_back(Task::Score(trial, Box::new(line)));
                Ok(())
            }
            Task::Score(trial, mut line) => {
                let place = || name_of(self.plan, &trial);
                let finished = finished.at(place)?;
                if let Some(reply) = &mut line.reply {
                    reply.nll = mean_nll(&finished, reply.tokens.len()).at(place)?;
                }
                self.tally.finish(*line)
            }
        }
    }
}

/// Nats a token, over all tokens of the reply, the stop token included.
fn mean_nll(finished: &Finished, tokens: usize) -> Result<f64> {
    let logprobs = finished.outcome.scores.first().map_or(&[][..], |score| &score.logprobs);
    if logprobs.len() != tokens {
        return Err(Error::new("the engine scored another number of tokens")
            .expected(tokens)
            .got(logprobs.len()));
    }
    let nll = -logprobs.iter().map(|p| f64::from(*p)).sum::<f64>() / tokens as f64;
    if !nll.is_finite() {
        return Err(Error::new("the reply's likelihood is not finite").got(nll));
    }
    Ok(nll)
}

/// The trial's line with receipts and the answer at the first generated token.
fn line(plan: &Plan, trial: &Planned, finished: &Finished) -> Result<Trial> {
    let mut line = plan.line(trial);
    line.receipts.clone_from(&finished.outcome.receipts);
    let (yes, no) = plan.answers(trial);
    if yes + no > 0 {
        let first = first_token(plan, trial, finished)?;
        line.first = Some(answer(first, yes, no).at(|| name_of(plan, trial))?);
    }
    Ok(line)
}

fn first_token<'a>(plan: &Plan, trial: &Planned, finished: &'a Finished) -> Result<&'a FirstToken> {
    let (yes, no) = plan.answers(trial);
    let words = if plan.part(trial).kind == Kind::Readout { plan.words(trial).len() } else { 0 };
    let first = finished.outcome.first.as_ref();
    first.filter(|first| first.watch.len() == (yes + no + words).max(1)).ok_or_else(|| {
        Error::new("the engine did not report the watched logits").at(name_of(plan, trial))
    })
}

/// Margin and mass of the first `yes` and the next `no` watched tokens.
fn answer(first: &FirstToken, yes: usize, no: usize) -> Result<FirstAnswer> {
    let log_yes = logsumexp(&first.watch[..yes]);
    let log_no = logsumexp(&first.watch[yes..yes + no]);
    let probability = |log: f64| (log - f64::from(first.logsumexp)).exp();
    let answer = FirstAnswer {
        margin: log_yes - log_no,
        p_yes: 1.0 / (1.0 + (log_no - log_yes).exp()),
        mass: probability(log_yes) + probability(log_no),
        entropy: f64::from(first.entropy),
    };
    let numbers = [answer.margin, answer.p_yes, answer.mass, answer.entropy];
    if numbers.iter().any(|number| !number.is_finite()) {
        return Err(
            Error::new("the first token's distribution is not finite").got(format!("{answer:?}"))
        );
    }
    Ok(answer)
}

fn logsumexp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|logit| (f64::from(*logit) - max).exp()).sum::<f64>().ln()
}

fn name_of(plan: &Plan, trial: &Planned) -> String {
    let cell = &trial.cell;
    let at = cell
        .at
        .map_or_else(String::new, |(place, dose)| format!(", layer {}, dose {dose}", place.layer));
    let part = &plan.part(trial).name;
    format!(
        "trial {} ({part}, {}, {:?}, {:?}{at}, repeat {})",
        trial.id, cell.prompt, cell.concept, cell.condition, cell.repeat
    )
}

/// What is wrong with a trial's injection: nothing (none), or which check failed. An injected trial
/// must have a receipt, all rows of its window touched, and the planned change measured.
pub fn failed_check(trial: &Trial) -> Option<String> {
    if trial.dose.is_none() {
        return (!trial.receipts.is_empty()).then(|| "a clean trial has a receipt".to_owned());
    }
    if trial.receipts.is_empty() {
        return Some("no receipt of the injection".into());
    }
    trial.receipts.iter().find_map(|receipt| {
        if receipt.rows_touched != receipt.rows_expected || receipt.rows_touched == 0 {
            return Some(format!(
                "{} rows were touched, {} were expected",
                receipt.rows_touched, receipt.rows_expected
            ));
        }
        let (Some(planned), Some(measured)) = (receipt.planned, receipt.measured) else {
            return Some("the change was not measured".into());
        };
        // Written so that NaN fails.
        let close = (measured - planned.abs()).abs() <= CHANGE_TOLERANCE * planned.abs();
        (!close).then(|| format!("a change of {planned} was planned, {measured} was measured"))
    })
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;
