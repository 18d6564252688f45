//! One step of the engine: plan the rows of all sequences, run them, hand out what they gave.

use super::{
    batch::{PlannedRow, build},
    core::Core,
    hooks::tap_index,
    sequence::{Child, Role, Sequence, samples},
    types::{Event, Finish, Sample, Score},
};
use crate::{
    error::Error,
    model::forward::{HEAD_ROWS, forward, head},
    ops::{
        Float,
        enter::Source,
        hooks::{site_count, tap_count},
        sample::NO_TOKEN,
    },
    request::CaptureSite,
};

/// A captured row on its way to a job.
struct Take {
    job: usize,
    capture: usize,
    /// Which of the capture's positions.
    index: usize,
    /// Row of the capture buffer.
    from: usize,
}

/// What a step will do.
#[derive(Default)]
struct Plan {
    rows: Vec<PlannedRow>,
    /// (tap, row, destination).
    captures: Vec<(u32, u32, u32)>,
    takes: Vec<Take>,
    receipts: usize,
    /// Rows whose logits are wanted.
    heads: Vec<u32>,
}

impl<T: Float> Core<T> {
    /// Plans and runs one step; gives whether there was anything to do.
    pub(super) fn step(&mut self) -> bool {
        let plan = self.plan_rows();
        if plan.rows.is_empty() {
            return false;
        }
        let layers = self.config.layers;
        let (step, place) = build(layers, tap_count(layers), &plan.rows, &plan.captures);
        let (cache, state) = (&mut self.cache, &mut self.state);
        forward(&self.device, &self.config, &self.weights, &self.hooks, &step, cache, state);
        self.stats.steps += 1;
        self.stats.rows += plan.rows.len() as u64;
        self.stats.layer_rows += step.active[..layers].iter().sum::<usize>() as u64;
        self.collect_rows(&plan, &step.rows.receipt, &place);
        self.collect_captures(&plan.takes);
        for heads in plan.heads.chunks(HEAD_ROWS) {
            let places: Vec<u32> = heads.iter().map(|&row| place[row as usize]).collect();
            head(&self.device, &self.config, &self.weights, &places, &mut self.state);
            self.collect_logits(&plan.rows, heads);
        }
        for job in std::mem::take(&mut self.broken) {
            let error = Error::new("the model's logits are not numbers")
                .hint("an injection may be far too strong for the model's arithmetic");
            self.drop_job(job, error);
        }
        self.finish_sequences();
        true
    }

    /// One row of every sample, then as many rows of the others as fit.
    fn plan_rows(&mut self) -> Plan {
        let mut plan = Plan::default();
        for decode in [true, false] {
            for slot in 0..self.slots.len() {
                let Some(sequence) = &self.slots[slot] else { continue };
                if matches!(sequence.role, Role::Sample(_)) == decode {
                    let end = sequence.tokens.len();
                    let mut position = sequence.next;
                    while position < end && self.plan_row(&mut plan, slot, position) {
                        position += 1;
                    }
                    if let Some(sequence) = &mut self.slots[slot] {
                        sequence.next = position;
                    }
                }
            }
        }
        plan
    }

    /// Adds a row to the plan, unless the step is full.
    fn plan_row(&self, plan: &mut Plan, slot: usize, position: usize) -> bool {
        let Some(sequence) = &self.slots[slot] else { return false };
        let ops = sequence.tally.len();
        if plan.rows.len() == self.limits.rows || plan.receipts + ops > self.limits.receipts {
            return false;
        }
        let row = plan.rows.len() as u32;
        let (mut entry, mut source) = (0, Source::Token(sequence.tokens[position]));
        let mut wants_logits = !matches!(sequence.role, Role::Clean(..));
        match &sequence.role {
            Role::Clean(key, layers) => {
                let clean = self.prompts.get(key);
                for &layer in layers {
                    let kept = clean.and_then(|clean| clean.residual_row(layer, position));
                    let to = kept.map(|kept| (self.limits.capture_rows + kept) as u32);
                    plan.captures.extend(to.map(|to| (4 * layer as u32, row, to)));
                }
            }
            Role::Trunk(job) => {
                let active = &self.jobs[job];
                let own = active.pending.own;
                if own.cut > 0 {
                    let clean = self.prompts.get(&active.pending.key);
                    let kept = clean.and_then(|clean| clean.residual_row(own.cut, position));
                    let kept = kept.expect("a job starts when its residual rows are cached");
                    entry = own.cut;
                    source = Source::Cached((self.limits.capture_rows + kept) as u32);
                }
                let Some(wants) = self.plan_captures(plan, *job, position, row) else {
                    return false;
                };
                let is_last = position + 1 == sequence.tokens.len();
                let follows = active.unfinished > 0 || !active.pending.job.watch.is_empty();
                wants_logits = wants || is_last && follows;
            }
            Role::Sample(_) | Role::Score(_) => {}
        }
        plan.heads.extend(wants_logits.then_some(row));
        plan.receipts += ops;
        let (slot, position) = (slot as u32, position as u32);
        plan.rows.push(PlannedRow { slot, position, entry: entry as u32, source, ops: ops as u32 });
        true
    }

    /// Plans the captures of a job's prompt row; gives whether its logits are captured, or `None`
    /// where the capture buffer is full.
    fn plan_captures(
        &self,
        plan: &mut Plan,
        job: usize,
        position: usize,
        row: u32,
    ) -> Option<bool> {
        let captures = &self.jobs[&job].pending.job.capture;
        let mut logits = false;
        let hits = || {
            captures.iter().enumerate().filter_map(move |(at, capture)| {
                capture.positions.binary_search(&position).ok().map(|index| (at, capture, index))
            })
        };
        let rows = hits().filter(|(_, capture, _)| capture.site != CaptureSite::Logits).count();
        if plan.takes.len() + rows > self.limits.capture_rows {
            return None;
        }
        for (capture, wanted, index) in hits() {
            match tap_index(wanted, self.config.layers) {
                None => logits = true,
                Some(tap) => {
                    let from = plan.takes.len();
                    plan.captures.push((tap as u32, row, from as u32));
                    plan.takes.push(Take { job, capture, index, from });
                }
            }
        }
        Some(logits)
    }

    /// Norms of clean runs, and what operations did.
    fn collect_rows(&mut self, plan: &Plan, receipts: &[i32], place: &[u32]) {
        for (row, &place) in plan.rows.iter().zip(place) {
            let Some(sequence) = &mut self.slots[row.slot as usize] else { continue };
            let (place, position) = (place as usize, row.position as usize);
            if let Role::Clean(key, _) = &sequence.role {
                let Some(clean) = self.prompts.touch(key) else { continue };
                for site in 0..site_count(self.config.layers) {
                    clean.norms[site * key.len() + position] = self.state.norm(site, place);
                }
            }
            if receipts[place] < 0 {
                continue;
            }
            let job = match &sequence.role {
                Role::Clean(..) => continue,
                Role::Trunk(job) => *job,
                Role::Sample(child) | Role::Score(child) => child.job,
            };
            let planned = &self.jobs[&job].planned;
            for (at, (tally, planned)) in sequence.tally.iter_mut().zip(planned).enumerate() {
                let [before, change] = self.state.receipts[receipts[place] as usize + at];
                tally.expected +=
                    u64::from((planned.op.from..planned.op.to).contains(&row.position));
                if !before.is_nan() {
                    tally.touched += 1;
                    tally.before += f64::from(before);
                    tally.change += f64::from(change);
                }
            }
        }
    }

    fn collect_captures(&mut self, takes: &[Take]) {
        let dim = self.config.dim;
        for take in takes {
            if let Some(active) = self.jobs.get_mut(&take.job) {
                let out = &mut active.captures[take.capture][take.index * dim..][..dim];
                self.state.captured.read(take.from * dim, out);
            }
        }
    }

    pub(super) fn report_token(&mut self, child: &Child, token: u32) {
        self.stats.tokens += 1;
        if token == NO_TOKEN {
            self.broken.push(child.job);
        }
        let pending = &self.jobs[&child.job].pending;
        let event = Event::Token { sample: child.index as u32, token };
        drop(pending.events.send((pending.tag, event)));
    }

    /// A continuation that waits for a slot, unless its first token was its last.
    pub(super) fn continue_or_finish(&mut self, child: Child) {
        let done = match self.jobs.get(&child.job) {
            Some(active) if child.index >= samples(&active.pending.job) => child.tokens.len() == 1,
            _ => self.finish_of(&child).is_some(),
        };
        if !done {
            self.children.push_back(child);
            return;
        }
        if let Some(active) = self.jobs.get_mut(&child.job) {
            active.waiting -= 1;
        }
        self.finish_child(child, Vec::new());
    }

    /// Why a sample ends now, and its text where a stop text cut it.
    fn finish_of(&self, child: &Child) -> Option<(Finish, Option<String>)> {
        let job = &self.jobs[&child.job].pending.job;
        let last = *child.tokens.last()?;
        if !job.sampling.ignore_eos && self.config.stop_tokens.contains(&last) {
            return Some((Finish::Stop, None));
        }
        if let Some(tokenizer) = self.tokenizer.as_ref().filter(|_| !job.stop.is_empty()) {
            let text = tokenizer.decode(&child.tokens);
            let first = job.stop.iter().filter_map(|stop| text.find(stop.as_str())).min();
            if let Some(end) = first {
                return Some((Finish::Stop, Some(text[..end].to_string())));
            }
        }
        let full = child.tokens.len() >= job.sampling.max_tokens as usize;
        full.then_some((Finish::Length, None))
    }

    /// Stores a finished continuation with what its rows saw.
    fn finish_child(&mut self, child: Child, tally: Vec<super::hooks::Tally>) {
        let finish = self.finish_of(&child);
        let Some(active) = self.jobs.get_mut(&child.job) else { return };
        let count = samples(&active.pending.job);
        active.tallies[child.index] = tally;
        active.unfinished -= 1;
        if child.index >= count {
            let logprobs = child.logprobs.iter().map(|l| l.logprob).collect();
            active.scores[child.index - count] = Some(Score { logprobs });
            return;
        }
        let (finish, cut) = finish.unwrap_or((Finish::Length, None));
        let decode = || self.tokenizer.as_ref().map(|t| t.decode(&child.tokens));
        let text = cut.or_else(decode).unwrap_or_default();
        let Child { tokens, logprobs, .. } = child;
        active.samples[child.index] = Some(Sample { tokens, text, finish, logprobs });
    }

    /// Takes finished sequences out of their slots, and reports finished jobs.
    fn finish_sequences(&mut self) {
        for slot in 0..self.slots.len() {
            let Some(sequence) = &self.slots[slot] else { continue };
            let done = match &sequence.role {
                Role::Sample(child) => self.finish_of(child).is_some(),
                _ => sequence.next == sequence.tokens.len(),
            };
            if !done {
                continue;
            }
            let Some(Sequence { role, pages, tally, .. }) = self.slots[slot].take() else {
                continue;
            };
            match role {
                // The pages stay with the entry.
                Role::Clean(key, _) => {
                    if let Some(clean) = self.prompts.touch(&key) {
                        clean.running = false;
                    }
                }
                Role::Trunk(job) => {
                    self.trunk_done(job);
                    self.finish_trunk(job, pages, tally);
                }
                Role::Sample(child) | Role::Score(child) => {
                    let job = child.job;
                    self.finish_child(child, tally);
                    pages.release(&mut self.pool);
                    self.finish_job(job);
                }
            }
        }
    }

    fn finish_trunk(
        &mut self,
        job: usize,
        pages: super::kv::PageTable,
        tally: Vec<super::hooks::Tally>,
    ) {
        let Some(active) = self.jobs.get_mut(&job) else { return };
        active.trunk_tally = tally;
        active.trunk = Some(pages);
        let pending = &active.pending;
        for (capture, data) in active.captures.drain(..).enumerate() {
            drop(pending.events.send((pending.tag, Event::Capture { capture, data })));
        }
        self.settle_trunk(job);
        self.finish_job(job);
    }

    fn finish_job(&mut self, job: usize) {
        if self.jobs.get(&job).is_some_and(|active| active.unfinished == 0) {
            self.end(job, Event::Done);
        }
    }
}
