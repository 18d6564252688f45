//! One step of the engine: plan the rows of all sequences, run them, hand out what they gave.

use super::{
    batch::{PlannedRow, build},
    core::Core,
    hooks::tap_index,
    sequence::{Child, Role, Sequence, samples},
    types::{Event, Finish, FirstToken, Sample, Score, TokenLogprob},
};
use crate::{
    error::Error,
    model::forward::{HEAD_ROWS, forward, head},
    ops::{
        Float,
        enter::Source,
        hooks::{site_count, tap_count},
        sample::{Draw, NO_TOKEN, sample},
        summarize::{Summary, Wanted, summarize},
    },
    request::{CaptureSite, Sampling},
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

    /// Draws, scores and captures from the logits of up to [`HEAD_ROWS`] rows.
    fn collect_logits(&mut self, rows: &[PlannedRow], heads: &[u32]) {
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
                child.logprobs.extend(summaries.next().map(|s| chosen(&s, s.logits[0])));
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
        let job = std::sync::Arc::clone(&active.pending.job);
        let count = samples(&job);
        let uses =
            !job.watch.is_empty() || !job.score.is_empty() || job.logprobs.is_some() && count > 0;
        let summary = if uses { summaries.next().unwrap_or_default() } else { Summary::default() };
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

    fn report_token(&mut self, child: &Child, token: u32) {
        self.stats.tokens += 1;
        if token == NO_TOKEN {
            self.broken.push(child.job);
        }
        let pending = &self.jobs[&child.job].pending;
        let event = Event::Token { sample: child.index as u32, token };
        drop(pending.events.send((pending.tag, event)));
    }

    /// A continuation that waits for a slot, unless its first token was its last.
    fn continue_or_finish(&mut self, child: Child) {
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

/// Sample i of a job draws with its own seed; the first with the job's.
fn draw(sampling: &Sampling, row: u32, sample: u32, index: u32) -> Draw {
    let seed = match sample {
        0 => sampling.seed,
        _ => {
            let words = crate::ops::philox::philox(
                sampling.seed,
                [sample, 0, crate::ops::philox::Purpose::Host as u32, 0],
            );
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
