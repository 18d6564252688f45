//! The engine's state and its admission: which jobs run, in which slots, with which pages.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, mpsc},
    time::Instant,
};

use super::{
    Limits, Stats,
    bank::Bank,
    hooks::{self, Tally},
    kv::{PagePool, PageTable},
    outputs::Outputs,
    prompts::{Key, Prompts},
    sequence::{Active, Child, Events, Pending, Role, Sequence, continuations, rows_of, samples},
    step::InFlight,
    types::{Event, Job, Outcome},
};
use crate::{
    device::Device,
    error::{Error, Result},
    model::{ModelConfig, Tokenizer, forward::State, weights::Weights},
    ops::{
        Float,
        attention::{Cache, CacheShape, PAGE, SharedPrefix, TILE},
        copy_pages::copy_pages,
        hooks::{Hooks, site_count},
        sample::Draws,
        summarize::Summaries,
    },
    request::StrengthMode,
};

/// What the handle asks of the engine's thread.
pub enum Command {
    /// Run a job.
    Submit(Box<Submission>),
    /// Drop a job.
    Cancel(u64),
    /// Tell the counters.
    Stats(mpsc::Sender<Stats>),
}

/// A job and where its events go.
pub struct Submission {
    /// The submitter's name for it.
    pub tag: u64,
    /// The job.
    pub job: Job,
    /// Where its events go.
    pub events: Events,
}

/// Waiting jobs that are looked at for one that can start.
const LOOK_AHEAD: usize = 256;
/// Clean runs at a time.
const CLEAN_RUNS: usize = 8;

/// Everything the engine's thread owns.
pub struct Core<T> {
    pub(super) device: Device,
    pub(super) config: Arc<ModelConfig>,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) weights: Weights,
    pub(super) limits: Limits,
    pub(super) hooks: Hooks,
    pub(super) cache: Cache<T>,
    pub(super) state: State<T>,
    pub(super) draws: Draws,
    pub(super) summaries: Summaries,
    pub(super) outputs: [Outputs; 2],
    /// The step whose results are not collected yet.
    pub(super) in_flight: Option<InFlight>,
    pub(super) pool: PagePool,
    bank: Bank,
    pub(super) prompts: Prompts,
    pub(super) slots: Vec<Option<Sequence>>,
    pub(super) jobs: HashMap<usize, Active>,
    next_job: usize,
    next_sequence: u64,
    queue: VecDeque<Pending>,
    pub(super) children: VecDeque<Child>,
    /// Pages that running prompts' first continuations will need.
    reserved: usize,
    pub(super) stats: Stats,
    /// Jobs whose logits are not numbers.
    pub(super) broken: Vec<usize>,
    /// Whether the step that was queued last has rows of drawn tokens only.
    pub(super) is_decoding: bool,
    /// Why the device cannot be used any more.
    failed: Option<Error>,
}

impl<T: Float> Core<T> {
    /// Takes all memory.
    pub fn new(
        device: Device,
        config: Arc<ModelConfig>,
        tokenizer: Option<Arc<Tokenizer>>,
        weights: Weights,
        limits: Limits,
    ) -> Result<Self> {
        let shape = CacheShape {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            pages: limits.pages,
            slots: limits.slots,
            blocks: limits.positions.div_ceil(PAGE),
        };
        let sizes = (config.layers, config.dim);
        let outputs = || {
            let norms = site_count(config.layers) * limits.rows;
            Outputs::new(&device, norms, limits.receipts, limits.capture_rows * config.dim)
        };
        Ok(Self {
            hooks: Hooks::new(&device, sizes, limits.slots, limits.ops, limits.vectors)?,
            cache: Cache::new(&device, shape)?,
            state: State::new(&device, &config, limits.sizes(config.layers))?,
            draws: Draws::new(&device, limits.draws, limits.slots)?,
            summaries: Summaries::new(&device, limits.head_rows, limits.ids, limits.top)?,
            outputs: [outputs()?, outputs()?],
            in_flight: None,
            pool: PagePool::new(limits.pages),
            bank: Bank::new(limits.vectors),
            prompts: Prompts::new(limits.residual_pages),
            slots: (0..limits.slots).map(|_| None).collect(),
            jobs: HashMap::new(),
            next_job: 0,
            next_sequence: 0,
            queue: VecDeque::new(),
            children: VecDeque::new(),
            reserved: 0,
            stats: Stats::default(),
            broken: Vec::new(),
            is_decoding: false,
            failed: None,
            device,
            config,
            tokenizer,
            weights,
            limits,
        })
    }

    /// Serves commands until every handle is gone.
    pub fn run(mut self, commands: &mpsc::Receiver<Command>) {
        loop {
            let idle = self.queue.is_empty() && self.jobs.is_empty();
            if idle {
                match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            loop {
                match commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return,
                }
            }
            let start = Instant::now();
            match self.admit().and_then(|()| self.step()) {
                Ok(false) if self.slots.iter().all(Option::is_none) => self.refuse_first(),
                Ok(_) => {}
                Err(error) => self.fail(&error),
            }
            let seconds = match self.is_decoding {
                true => &mut self.stats.decode_seconds,
                false => &mut self.stats.prompt_seconds,
            };
            *seconds += start.elapsed().as_secs_f64();
        }
    }

    /// The device has failed: every job fails, now and from now on.
    fn fail(&mut self, error: &Error) {
        self.failed = Some(error.clone());
        self.in_flight = None;
        self.children.clear();
        let running = self.jobs.drain().map(|(_, active)| active.pending);
        for pending in running.chain(self.queue.drain(..)) {
            drop(pending.events.send((pending.tag, Event::Failed(error.clone()))));
        }
        self.slots.iter_mut().for_each(|slot| *slot = None);
    }

    /// Nothing runs and the first waiting job cannot start: it never could.
    fn refuse_first(&mut self) {
        if let Some(pending) = self.queue.pop_front() {
            let error = Error::new("not enough memory for the request")
                .hint("give the cache more memory, or inject fewer vectors at a time");
            drop(pending.events.send((pending.tag, Event::Failed(error))));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let Submission { tag, job, events } = *submission;
                if let Some(error) = &self.failed {
                    drop(events.send((tag, Event::Failed(error.clone()))));
                    return;
                }
                let own = hooks::own_part(&job, self.config.layers, self.limits.share);
                let uses_norms = job.inject.iter().any(|injection| {
                    hooks::is_live(injection)
                        && matches!(injection.mode, StrengthMode::Reference | StrengthMode::Row)
                });
                let needs_clean = uses_norms || own.start > 0 || own.cut > 0;
                let key = job.tokens.as_slice().into();
                let job = Arc::new(job);
                self.queue.push_back(Pending { tag, key, job, events, own, needs_clean });
            }
            Command::Cancel(tag) => self.cancel(tag),
            Command::Stats(reply) => drop(reply.send(self.stats)),
        }
    }

    fn cancel(&mut self, tag: u64) {
        let error = || Error::new("cancelled");
        self.queue.retain(|pending| {
            if pending.tag == tag {
                drop(pending.events.send((tag, Event::Failed(error()))));
            }
            pending.tag != tag
        });
        let running = |job: &&usize| self.jobs[job].pending.tag == tag;
        if let Some(job) = self.jobs.keys().find(running).copied() {
            self.drop_job(job, error());
        }
    }

    /// Ends a running job with an error.
    pub(super) fn drop_job(&mut self, job: usize, error: Error) {
        self.children.retain(|child| child.job != job);
        for slot in 0..self.slots.len() {
            let belongs = self.slots[slot].as_ref().is_some_and(|s| match &s.role {
                Role::Clean(..) => false,
                Role::Trunk(of) => *of == job,
                Role::Sample(child) | Role::Score(child) => child.job == job,
            });
            if belongs && let Some(sequence) = self.slots[slot].take() {
                if matches!(sequence.role, Role::Trunk(_)) {
                    self.trunk_done(job);
                }
                sequence.pages.release(&mut self.pool);
            }
        }
        self.end(job, |_| Event::Failed(error));
    }

    fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// Starts what can start: continuations first, then waiting jobs in order.
    fn admit(&mut self) -> Result<()> {
        while let Some(child) = self.children.pop_front() {
            if let Some(child) = self.start_child(child)? {
                self.children.push_front(child);
                return Ok(());
            }
        }
        let mut at = 0;
        while at < self.queue.len().min(LOOK_AHEAD) {
            let pending = &self.queue[at];
            if pending.needs_clean {
                let key = pending.key.clone();
                let own = pending.own;
                match self.prompts.get(&key) {
                    Some(clean) if clean.serves(own) => {}
                    Some(clean) if clean.running || clean.users > 0 => {
                        at += 1;
                        continue;
                    }
                    _ => {
                        if !self.start_clean(&key, own)? {
                            return Ok(());
                        }
                        at += 1;
                        continue;
                    }
                }
            }
            match self.start_job(at)? {
                true => {}
                false => return Ok(()),
            }
        }
        Ok(())
    }

    /// Starts a prompt's clean run, keeping the residual rows that waiting jobs need.
    fn start_clean(&mut self, key: &Key, own: super::hooks::Own) -> Result<bool> {
        let runs = self.slots.iter().flatten().filter(|s| matches!(s.role, Role::Clean(..)));
        let Some(slot) = self.free_slot().filter(|_| runs.count() < CLEAN_RUNS) else {
            return Ok(false);
        };
        let waiting = self.queue.iter().filter(|p| p.own.cut > 0 && p.key == *key);
        let mut layers: Vec<usize> = waiting.clone().map(|p| p.own.cut).collect();
        let from = waiting.map(|p| p.own.start).min().unwrap_or(own.start);
        layers.sort_unstable();
        layers.dedup();
        // The first job's layer first: it must have room.
        layers.sort_by_key(|&layer| layer != own.cut);
        let is_new = self.prompts.get(key).is_none();
        if is_new {
            let (depth, blocks) = (self.config.layers, key.len().div_ceil(PAGE));
            let wanted = depth * blocks + self.reserved;
            if !self.prompts.make_room(&mut self.pool, wanted, key) {
                return Ok(false);
            }
            let pages = PageTable::take(&mut self.pool, depth, blocks);
            self.prompts.insert(key.clone(), pages, site_count(depth));
        }
        let layers = self.prompts.reserve(key, &layers, from);
        if own.cut > 0 && !layers.contains(&own.cut) {
            if is_new {
                self.prompts.remove(&mut self.pool, key);
            }
            return Ok(false);
        }
        let Some(entry) = self.prompts.touch(key) else { return Ok(false) };
        entry.running = true;
        let pages = entry.pages.clone();
        let role = Role::Clean(key.clone(), layers);
        let tokens = key.to_vec();
        self.occupy(slot, Sequence::new(role, tokens, 0, pages, Vec::new()))?;
        Ok(true)
    }

    /// Starts the waiting job at `at`: `true` it is out of the queue, `false` there is no room
    /// now.
    fn start_job(&mut self, at: usize) -> Result<bool> {
        let Some(slot) = self.free_slot() else { return Ok(false) };
        let pending = &self.queue[at];
        let (job, own) = (Arc::clone(&pending.job), pending.own);
        let (prompt, layers) = (job.tokens.len(), self.config.layers);
        let children = continuations(&job);
        let end = if children == 1 { rows_of(&job) } else { prompt };
        let blocks = end.div_ceil(PAGE);
        let shared = |layer: usize| {
            let until = if layer < own.cut { prompt } else { own.start };
            (until / PAGE, until % PAGE > 0)
        };
        let forks = own.start > 0 || own.cut > 0;
        let fresh: usize = match forks {
            true => (0..layers).map(|layer| blocks - shared(layer).0).sum(),
            false => blocks * layers,
        };
        let child_pages = match children {
            0 | 1 => 0,
            _ => (rows_of(&job).div_ceil(PAGE) - prompt / PAGE) * layers,
        };
        let wanted = fresh + child_pages + self.reserved;
        let key = pending.key.clone();
        if self.bank.available() < job.inject.len()
            || !self.prompts.make_room(&mut self.pool, wanted, &key)
        {
            return Ok(false);
        }
        let planned = match self.plan(&key, &job)? {
            Ok(planned) => planned,
            Err(error) => {
                if let Some(pending) = self.queue.remove(at) {
                    drop(pending.events.send((pending.tag, Event::Failed(error))));
                }
                return Ok(true);
            }
        };
        let Some(pending) = self.queue.remove(at) else { return Ok(false) };
        let clean = self.prompts.get(&key).filter(|_| pending.needs_clean);
        let reference = |i| clean.and_then(|clean| clean.norms(prompt).reference(i));
        let references = job.inject.iter().map(reference).collect();
        let (pages, copies) = match self.prompts.touch(&key).filter(|_| forks) {
            Some(clean) => PageTable::fork(&clean.pages, &mut self.pool, blocks, shared),
            None => (PageTable::take(&mut self.pool, layers, blocks), Vec::new()),
        };
        copy_pages(&self.device, &copies, &mut self.cache)?;
        let tiles = |positions: usize| (positions / TILE) as u32;
        let shared_prefix = match self.prompts.get(&key).filter(|_| forks) {
            Some(clean) => SharedPrefix {
                group: clean.id << 1,
                tiles_below: tiles(prompt),
                tiles_above: tiles(own.start),
                cut: own.cut as u32,
            },
            None => SharedPrefix::default(),
        };
        if let Some(clean) = self.prompts.touch(&key).filter(|_| pending.needs_clean) {
            clean.users += 1;
        }
        self.reserved += child_pages;
        self.stats.layer_rows_saved +=
            (prompt * layers) as u64 - ((prompt - own.start) * (layers - own.cut)) as u64;
        let id = self.next_job;
        self.next_job += 1;
        let tally = vec![Tally::default(); planned.len()];
        let tokens = job.tokens.clone();
        let trunk = Sequence::new(Role::Trunk(id), tokens, own.start, pages, tally.clone());
        self.occupy(slot, Sequence { shared: shared_prefix, ..trunk })?;
        self.write_ops(slot, &planned)?;
        let width = |capture: &super::types::Capture| match capture.site {
            crate::request::CaptureSite::Logits => self.config.vocab,
            _ => self.config.dim,
        };
        let captures =
            job.capture.iter().map(|c| vec![0.0; c.positions.len() * width(c)]).collect();
        let active = Active {
            pending,
            planned,
            references,
            trunk_tally: tally,
            tallies: vec![Vec::new(); children],
            captures,
            first: None,
            samples: vec![None; samples(&job)],
            scores: vec![None; job.score.len()],
            trunk: None,
            shared: if children == 1 {
                shared_prefix
            } else {
                let (group, tiles) = ((id as u64) << 1 | 1, tiles(prompt));
                SharedPrefix { group, tiles_below: tiles, tiles_above: tiles, cut: 0 }
            },
            waiting: children,
            unfinished: children,
            child_pages,
        };
        self.jobs.insert(id, active);
        Ok(true)
    }

    /// Resolves a job's operations and puts their vectors into the bank.
    /// The inner error is the job's, the outer one the device's.
    fn plan(&mut self, key: &Key, job: &Job) -> Result<Result<Vec<hooks::Planned>>> {
        let clean = self.prompts.get(key).filter(|clean| !clean.running);
        let clean = clean.map(|clean| clean.norms(key.len()));
        // Refusals come before the bank is touched.
        let mut planned = match hooks::plan(job, clean, |_| 0) {
            Ok(planned) => planned,
            Err(error) => return Ok(Err(error)),
        };
        if !self.limits.hooks {
            planned.clear();
        }
        let dim = self.config.dim;
        for op in &mut planned {
            let vector = &job.inject[op.injection].vector;
            let (row, new) = self.bank.take(vector);
            if new {
                self.hooks.vectors.write(row as usize * dim, vector)?;
            }
            op.op.vector = row;
        }
        Ok(Ok(planned))
    }

    fn write_ops(&mut self, slot: usize, planned: &[hooks::Planned]) -> Result<()> {
        let ops: Vec<_> = planned.iter().map(|p| (p.site, p.op)).collect();
        self.hooks.set(slot, &ops)
    }

    fn occupy(&mut self, slot: usize, sequence: Sequence) -> Result<()> {
        self.cache.set_tables(slot, &sequence.pages.layers)?;
        self.next_sequence += 1;
        self.slots[slot] = Some(Sequence { id: self.next_sequence, ..sequence });
        Ok(())
    }

    /// Starts a continuation; gives it back where there is no room.
    fn start_child(&mut self, child: Child) -> Result<Option<Child>> {
        let Some(slot) = self.free_slot() else { return Ok(Some(child)) };
        let Some(active) = self.jobs.get_mut(&child.job) else { return Ok(None) };
        let job = Arc::clone(&active.pending.job);
        let prompt = job.tokens.len();
        let sole = active.is_sole();
        let pages = if sole {
            active.trunk.take().expect("a prompt's pages stay until its continuations start")
        } else {
            if !self.prompts.make_room(&mut self.pool, active.child_pages, &active.pending.key) {
                return Ok(Some(child));
            }
            let trunk = active.trunk.as_ref().expect("likewise");
            let blocks = rows_of(&job).div_ceil(PAGE);
            let shared = |_| (prompt / PAGE, prompt % PAGE > 0);
            let (pages, copies) = PageTable::fork(trunk, &mut self.pool, blocks, shared);
            copy_pages(&self.device, &copies, &mut self.cache)?;
            pages
        };
        active.waiting -= 1;
        let (planned, shared) = (active.planned.clone(), active.shared);
        self.settle_trunk(child.job);
        let tally = vec![Tally::default(); planned.len()];
        let mut tokens = job.tokens.clone();
        let is_score = child.index >= samples(&job);
        // The last given token needs no row: nothing follows it.
        let fed = if is_score { child.tokens.len() - 1 } else { child.tokens.len() };
        tokens.extend(&child.tokens[..fed]);
        let role = if is_score { Role::Score(child) } else { Role::Sample(child) };
        let sequence = Sequence::new(role, tokens, prompt, pages, tally);
        self.occupy(slot, Sequence { shared, ..sequence })?;
        self.write_ops(slot, &planned)?;
        Ok(None)
    }

    /// Once every continuation has started, nobody needs the prompt's own pages.
    pub(super) fn settle_trunk(&mut self, job: usize) {
        let Some(active) = self.jobs.get_mut(&job).filter(|active| active.waiting == 0) else {
            return;
        };
        if let Some(trunk) = active.trunk.take() {
            trunk.release(&mut self.pool);
        }
        self.reserved -= std::mem::take(&mut active.child_pages);
    }

    /// A job's prompt rows are done (or dropped): the clean run is no longer needed for them.
    pub(super) fn trunk_done(&mut self, job: usize) {
        let Some(active) = self.jobs.get(&job).filter(|active| active.pending.needs_clean) else {
            return;
        };
        if let Some(clean) = self.prompts.touch(&active.pending.key) {
            clean.users -= 1;
        }
    }

    /// Ends a job: gives back all it holds and reports.
    pub(super) fn end(&mut self, job: usize, event: impl FnOnce(Outcome) -> Event) {
        let Some(mut active) = self.jobs.remove(&job) else { return };
        self.reserved -= active.child_pages;
        active.trunk.take().into_iter().for_each(|trunk| trunk.release(&mut self.pool));
        let pending = &active.pending;
        for planned in &active.planned {
            self.bank.release(&pending.job.inject[planned.injection].vector);
        }
        let mut tally = active.trunk_tally.clone();
        for other in &active.tallies {
            tally.iter_mut().zip(other).for_each(|(sum, other)| sum.add(other));
        }
        let outcome = Outcome {
            prompt_tokens: pending.job.tokens.len(),
            samples: active.samples.into_iter().flatten().collect(),
            scores: active.scores.into_iter().flatten().collect(),
            first: active.first,
            receipts: hooks::receipts(&pending.job, &active.references, &active.planned, &tally),
        };
        drop(pending.events.send((pending.tag, event(outcome))));
    }
}
