//! One step of the engine: plan the rows of all sequences, run them, hand out what they gave.

use super::{
    batch::{PlannedRow, bucket, build, fill_up},
    captures::{Captures, Take},
    core::Core,
    hooks::{latched, tally_row},
    logits::HeadChunk,
    sequence::{Child, Role, Sequence, samples},
    types::{Event, Finish, Sample, Score},
};
use crate::{
    device::{Cuda, Device, cuda::Mark},
    error::{Error, Result},
    model::forward::{Step, forward, head},
    ops::{
        Float,
        attention::{Items, SharedPrefix},
        hooks::site_count,
        rows::{NONE, Source},
        sample::{Draw, NO_TOKEN, sample},
        summarize::summarize,
    },
};

/// What a step will do.
#[derive(Default)]
pub(super) struct Plan {
    /// Which of the two outputs it writes.
    pub turn: usize,
    rows: Vec<PlannedRow>,
    pub captures: Captures,
    receipts: usize,
    /// Rows whose logits are wanted.
    heads: Vec<u32>,
}

/// Where the rows of a chunk stand.
fn places(chunk: &HeadChunk, place: &[u32]) -> Vec<u32> {
    chunk.rows.iter().map(|head| place[head.row.index as usize]).collect()
}

/// A step that was queued, and what its results are for.
pub(super) struct InFlight {
    rows: Vec<PlannedRow>,
    takes: Vec<Take>,
    /// By place: the row's first receipt.
    receipts: Vec<i32>,
    /// Where each planned row stands.
    place: Vec<u32>,
    chunks: Vec<HeadChunk>,
    /// Which of the two outputs it writes.
    turn: usize,
    /// Whether it has rows of drawn tokens only.
    is_decoding: bool,
    /// Copies of pages before it.
    copies: Vec<[Mark; 2]>,
    /// Its begin on the device.
    begin: Mark,
    /// Its ends, of its work and of its captures' copies.
    ends: [Mark; 2],
}

impl<T: Float> Core<T> {
    /// Plans and queues one step, and collects the results of the one before (of this one where the
    /// device does not queue); gives whether there was anything to do.
    pub(super) fn step(&mut self) -> Result<bool> {
        let plan = self.plan_rows();
        let done = if plan.rows.is_empty() {
            match self.in_flight.take() {
                Some(last) => Some(last),
                None => return Ok(false),
            }
        } else {
            let queued = self.queue_step(plan)?;
            if self.device.is_asynchronous() || self.limits.behind {
                self.in_flight.replace(queued)
            } else {
                Some(queued)
            }
        };
        if let Some(done) = done {
            self.collect(done)?;
        }
        Ok(true)
    }

    fn queue_step(&mut self, plan: Plan) -> Result<InFlight> {
        let layers = self.config.layers;
        let (mut step, place) = build(layers, &plan.rows, &plan.captures.rows);
        self.stats.steps += 1;
        self.stats.rows += plan.rows.len() as u64;
        self.stats.layer_rows += step.active[..layers].iter().sum::<usize>() as u64;
        let of_prompts = plan.rows.iter().filter(|row| self.is_prompt(row));
        self.stats.prompt_layer_rows +=
            of_prompts.map(|row| (layers - row.entry as usize) as u64).sum::<u64>();
        let turn = plan.turn;
        let chunks = self.plan_heads(&plan.rows, &plan.heads);
        self.stats.head_rows += plan.heads.len() as u64;
        let receipts = step.rows.receipt.clone();
        self.is_decoding = plan.rows.iter().all(|row| self.is_sample(row));
        let acts_on_heads = |row: &PlannedRow| self.hooks.acts_on_heads(row.slot as usize);
        step.has_heads |= plan.rows.iter().any(acts_on_heads);
        let is_recorded = self.is_recorded(&plan, &chunks);
        if is_recorded {
            fill_up(&mut step, bucket(plan.rows.len()));
        }
        let group = self.config.heads / self.config.kv_heads;
        let shared = |slot: u32| {
            self.slots[slot as usize].as_ref().map_or(SharedPrefix::default(), |s| s.shared)
        };
        step.items = Items::build(&step.rows, group, self.limits.rows, shared);
        if is_recorded {
            step.items.fill_up(step.rows.slot.len(), group);
        }
        let begin = self.device.mark()?;
        self.state.set(&step)?;
        if is_recorded {
            self.run_recorded(&step, &chunks[0], &place, turn)?;
        } else {
            let cache = &mut self.cache;
            let (hooks, last) = (&mut self.hooks, &self.draws.last);
            let (device, weights) = (&self.device, &self.weights);
            forward(
                device,
                &self.config,
                weights,
                (hooks, last),
                &step.active,
                cache,
                &mut self.state,
            )?;
            for (at, chunk) in chunks.iter().enumerate() {
                self.run_head(chunk, &place)?;
                self.finish_head(at, chunk, turn)?;
            }
        }
        let outputs = &mut self.outputs[turn];
        let dim = self.config.dim;
        let is_clean = |row: &PlannedRow| {
            let sequence = self.slots[row.slot as usize].as_ref();
            sequence.is_some_and(|s| matches!(s.role, Role::Clean(..)))
        };
        if plan.rows.iter().any(is_clean) {
            let norms = &self.state.norms;
            norms.fetch(0, norms.len(), &mut outputs.norms, 0)?;
        }
        self.state.receipts.fetch(0, step.receipts, &mut outputs.receipts, 0)?;
        let captured = (self.limits.capture_row(turn, 0) * dim, plan.captures.captured * dim);
        let drained = self.state.captured.drain(&self.device, captured, &mut outputs.captured)?;
        self.queue_probes(turn, &plan.captures)?;
        let ends = [self.device.mark()?, drained];
        let (rows, takes, is_decoding) = (plan.rows, plan.captures.takes, self.is_decoding);
        let copies = std::mem::take(&mut self.copies);
        Ok(InFlight {
            rows,
            takes,
            receipts,
            place,
            chunks,
            turn,
            is_decoding,
            copies,
            begin,
            ends,
        })
    }

    /// Whether a step is only drawn tokens' rows, so that its launches can be recorded.
    fn is_recorded(&self, plan: &Plan, chunks: &[HeadChunk]) -> bool {
        let fits = bucket(plan.rows.len()) <= self.limits.rows.min(self.limits.head_rows);
        matches!(self.device, Device::Cuda(_)) && chunks.len() == 1 && fits && self.is_decoding
    }

    fn is_prompt(&self, row: &PlannedRow) -> bool {
        let sequence = self.slots[row.slot as usize].as_ref();
        sequence.is_some_and(|s| matches!(s.role, Role::Clean(_) | Role::Trunk(_)))
    }

    fn is_sample(&self, row: &PlannedRow) -> bool {
        let sequence = self.slots[row.slot as usize].as_ref();
        sequence.is_some_and(|s| matches!(s.role, Role::Sample(_)))
    }

    /// A step of drawn tokens' rows: the same launches for every step of as many rows.
    fn run_recorded(
        &mut self,
        step: &Step,
        chunk: &HeadChunk,
        place: &[u32],
        turn: usize,
    ) -> Result<()> {
        let rows = step.rows.slot.len();
        let mut chosen: Vec<u32> = places(chunk, place);
        chosen.resize(rows, NONE);
        self.state.choose(&chosen)?;
        let mut draws = chunk.draws.clone();
        let dead = Draw { row: NONE, slot: NONE, ..draws[0] };
        draws.resize(rows, dead);
        self.draws.set(&draws)?;
        let key =
            (rows as u64) << 2 | u64::from(step.has_heads) << 1 | u64::from(step.items.shares());
        let vocab = self.config.vocab;
        let (device, config, weights) = (&self.device, &self.config, &self.weights);
        let (hooks, state) = (&mut self.hooks, &mut self.state);
        let (cache, draws) = (&mut self.cache, &mut self.draws);
        let mut work = || {
            let inputs = (&mut *hooks, &draws.last);
            forward(device, config, weights, inputs, &step.active, cache, state)?;
            head(device, config, weights, rows, state)?;
            sample(device, vocab, &state.logits, draws)
        };
        match device {
            Device::Cuda(cuda) => Cuda::replay(cuda, key, work)?,
            Device::Cpu(_) => work()?,
        }
        self.finish_head(0, chunk, turn)
    }

    /// Logits and tokens of a chunk of rows.
    fn run_head(&mut self, chunk: &HeadChunk, place: &[u32]) -> Result<()> {
        let chosen = places(chunk, place);
        self.state.choose(&chosen)?;
        head(&self.device, &self.config, &self.weights, chosen.len(), &mut self.state)?;
        self.draws.set(&chunk.draws)?;
        sample(&self.device, self.config.vocab, &self.state.logits, &mut self.draws)
    }

    /// Summaries of a chunk, and copies of all it gave.
    fn finish_head(&mut self, at: usize, chunk: &HeadChunk, turn: usize) -> Result<()> {
        let (logits, tokens) = (&self.state.logits, &self.draws.tokens);
        let (vocab, summaries) = (self.config.vocab, &mut self.summaries);
        let is_wanted = !chunk.wanted.is_empty();
        if is_wanted {
            summarize(&self.device, vocab, logits, tokens, &chunk.wanted, summaries)?;
        }
        let draws = (&self.draws, chunk.draws.len());
        self.outputs[turn].fetch(&self.device, at, draws, &self.summaries, is_wanted)?;
        self.capture_logits(&chunk.rows)
    }

    /// Waits for a step, and hands out what it gave.
    fn collect(&mut self, step: InFlight) -> Result<()> {
        step.ends.iter().try_for_each(Mark::wait)?;
        let seconds = step.begin.seconds_to(&step.ends[0])?;
        self.stats.device_seconds += seconds;
        for [begin, end] in &step.copies {
            self.stats.device_seconds += begin.seconds_to(end)?;
        }
        self.stats.decode_device_seconds += if step.is_decoding { seconds } else { 0.0 };
        self.collect_rows(&step);
        self.collect_captures(step.turn, &step.takes);
        for (at, chunk) in step.chunks.iter().enumerate() {
            let tokens = self.outputs[step.turn].tokens(at).to_vec();
            let summaries = match chunk.wanted.is_empty() {
                true => Vec::new(),
                false => self.outputs[step.turn].summaries(at),
            };
            for head in &chunk.rows {
                self.collect_head(head, &tokens, &summaries);
            }
        }
        for job in std::mem::take(&mut self.broken) {
            let error = Error::new("the model's logits are not numbers")
                .hint("an injection may be far too strong for the model's arithmetic");
            self.drop_job(job, &error);
        }
        self.finish_sequences(&step.rows);
        Ok(())
    }

    /// One row of every sample, then as many rows of the others as fit.
    fn plan_rows(&mut self) -> Plan {
        let mut plan = Plan { turn: (self.stats.steps + 1) as usize % 2, ..Plan::default() };
        for decode in [true, false] {
            for slot in 0..self.slots.len() {
                let Some(sequence) = &self.slots[slot] else { continue };
                if matches!(sequence.role, Role::Sample(_)) == decode {
                    let end = self.plannable(sequence);
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

    /// The end of the rows of a sequence that can be computed now: those of known tokens, and of
    /// a token that is being drawn unless it is the last one.
    fn plannable(&self, sequence: &Sequence) -> usize {
        let known = sequence.tokens.len();
        let Role::Sample(child) = &sequence.role else { return known };
        let most = self.jobs[&child.job].job().sampling.max_tokens as usize;
        let drawn = child.tokens.len() + sequence.queued;
        known + if drawn < most { sequence.queued } else { 0 }
    }

    /// Adds a row to the plan, unless the step is full.
    fn plan_row(&self, plan: &mut Plan, slot: usize, position: usize) -> bool {
        let Some(sequence) = &self.slots[slot] else { return false };
        let ops = sequence.tally.len();
        if plan.rows.len() == self.limits.rows || plan.receipts + ops > self.limits.receipts {
            return false;
        }
        let row = plan.rows.len() as u32;
        let drawn = Source::Drawn(slot as u32);
        let known = |token: &u32| Source::Token(*token);
        let (mut entry, mut source) = (0, sequence.tokens.get(position).map_or(drawn, known));
        let mut wants_logits = !matches!(sequence.role, Role::Clean(..));
        match &sequence.role {
            Role::Clean(key) => {
                if !self.plan_clean(plan, key, position, row) {
                    return false;
                }
            }
            Role::Trunk(id) => {
                let trunk = &self.trunks[id];
                let own = trunk.own;
                if own.cut > 0 {
                    let clean = self.prompts.get(&trunk.key);
                    let kept = clean.and_then(|clean| clean.residual_row(own.cut, position));
                    let kept = kept.expect("a job starts when its residual rows are cached");
                    entry = own.cut;
                    source = Source::Cached(self.limits.residual_row(kept) as u32);
                }
                let Some(wants) = self.plan_captures(plan, *id, position, row) else {
                    return false;
                };
                let is_last = position + 1 == sequence.tokens.len();
                let follows = |job: &usize| {
                    let active = &self.jobs[job];
                    active.unfinished > 0 || !active.job().watch.is_empty()
                };
                wants_logits = wants || is_last && trunk.jobs.iter().any(follows);
            }
            Role::Sample(_) | Role::Score(_) => {}
        }
        plan.heads.extend(wants_logits.then_some(row));
        plan.receipts += ops;
        plan.rows.push(PlannedRow {
            index: row,
            slot: slot as u32,
            sequence: sequence.id,
            position: position as u32,
            entry: entry as u32,
            source,
            ops: ops as u32,
        });
        true
    }

    /// Norms of clean runs, and what operations did.
    fn collect_rows(&mut self, step: &InFlight) {
        let (outputs, stride) = (&self.outputs[step.turn], self.state.rows());
        for (row, &place) in step.rows.iter().zip(&step.place) {
            let sequence = self.slots[row.slot as usize].as_mut();
            let Some(sequence) = sequence.filter(|s| s.id == row.sequence) else { continue };
            let (place, position) = (place as usize, row.position as usize);
            if let Role::Clean(key) = &sequence.role {
                let Some(clean) = self.prompts.touch(key) else { continue };
                for site in 0..site_count(self.config.layers) {
                    clean.norms[site * key.len() + position] =
                        outputs.norms.get()[site * stride + place];
                }
            }
            if step.receipts[place] < 0 {
                continue;
            }
            let trunk = match &sequence.role {
                Role::Clean(_) => continue,
                Role::Trunk(trunk) => *trunk,
                Role::Sample(child) | Role::Score(child) => self.jobs[&child.job].trunk,
            };
            let planned = &self.trunks[&trunk].planned;
            let receipts = &outputs.receipts.get()[step.receipts[place] as usize..];
            tally_row(&mut sequence.tally, planned, row.position, receipts);
        }
    }

    pub(super) fn report_token(&mut self, child: &Child, token: u32) {
        self.stats.tokens += 1;
        if token == NO_TOKEN {
            self.broken.push(child.job);
        }
        let sample = child.index as u32;
        self.jobs[&child.job].tell(|_| Event::Token { sample, token });
    }

    /// A continuation that waits for a slot, unless its first token was its last.
    pub(super) fn continue_or_finish(&mut self, child: Child) {
        let done = match self.jobs.get(&child.job) {
            Some(active) if child.index >= samples(active.job()) => child.tokens.len() == 1,
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
        let job = self.jobs[&child.job].job();
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
        let count = samples(active.job());
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

    /// Takes sequences that these rows finished out of their slots, and reports finished jobs.
    fn finish_sequences(&mut self, rows: &[PlannedRow]) {
        for row in rows {
            let slot = row.slot as usize;
            let Some(sequence) = self.sequence_of(row) else { continue };
            let done = match &sequence.role {
                Role::Sample(child) => self.finish_of(child).is_some(),
                _ => row.position as usize + 1 == sequence.tokens.len(),
            };
            if !done {
                continue;
            }
            let Some(Sequence { role, pages, tally, .. }) = self.slots[slot].take() else {
                continue;
            };
            match role {
                // The pages stay with the entry.
                Role::Clean(key) => {
                    let run = self.prompts.touch(&key).and_then(|clean| clean.running.take());
                    if let Some(run) = run {
                        self.release_probes(&run.probes);
                    }
                }
                Role::Trunk(trunk) => {
                    self.trunk_done(trunk);
                    self.finish_trunk(trunk, pages, tally);
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
        id: u64,
        pages: super::kv::PageTable,
        tally: Vec<super::hooks::Tally>,
    ) {
        let Some(trunk) = self.trunks.get_mut(&id) else { return };
        trunk.latched = latched(&trunk.planned, &tally);
        trunk.tally = tally;
        trunk.pages = Some(pages);
        let jobs = trunk.jobs.clone();
        for (capture, captured) in std::mem::take(&mut trunk.captures).into_iter().enumerate() {
            let data = captured.finish();
            for job in &jobs {
                self.jobs[job].tell(|_| Event::Capture { capture, data: data.clone() });
            }
        }
        self.settle_trunk(id);
        jobs.into_iter().for_each(|job| self.finish_job(job));
    }

    fn finish_job(&mut self, job: usize) {
        if self.jobs.get(&job).is_some_and(|active| active.unfinished == 0) {
            self.end(job, Event::Done);
        }
    }
}
