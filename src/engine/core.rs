//! The engine's state, what is asked of it, and how jobs end.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, mpsc},
    time::Instant,
};

use super::{
    Limits, Stats,
    bank::Bank,
    hooks,
    kv::PagePool,
    outputs::Outputs,
    prompts::Prompts,
    sequence::{Active, Child, Events, Pending, Role, Sequence, Trunk},
    setup::KEPT_CAPTURE_BYTES,
    step::InFlight,
    types::{Event, Job, Outcome},
};
use crate::{
    device::{Buffer, Device, cuda::Mark},
    error::{Error, Result},
    model::{ModelConfig, Tokenizer, forward::State, weights::Weights},
    ops::{
        Float,
        attention::{Cache, CacheShape, PAGE},
        hooks::{Hooks, site_count},
        probe::ProbeItem,
        sample::Draws,
        summarize::Summaries,
    },
    request::StrengthMode,
};

/// What the handle asks of the engine's thread.
pub enum Command {
    /// Run jobs, which are looked at together: what they share is computed once.
    Submit(Vec<Submission>),
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
    /// Rows of a step that are probed, and the results.
    pub(super) probe_items: Buffer<ProbeItem>,
    /// See `probe_items`.
    pub(super) probed: Buffer<f32>,
    /// The step whose results are not collected yet.
    pub(super) in_flight: Option<InFlight>,
    /// Begins and ends of copies of pages since the last step was queued.
    pub(super) copies: Vec<[Mark; 2]>,
    pub(super) pool: PagePool,
    pub(super) bank: Bank,
    pub(super) prompts: Prompts,
    pub(super) slots: Vec<Option<Sequence>>,
    pub(super) jobs: HashMap<usize, Active>,
    pub(super) next_job: usize,
    pub(super) trunks: HashMap<u64, Trunk>,
    pub(super) next_trunk: u64,
    pub(super) next_sequence: u64,
    pub(super) queue: VecDeque<Pending>,
    pub(super) children: VecDeque<Child>,
    /// Pages that running prompts' first continuations will need.
    pub(super) reserved: usize,
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
            let captured = limits.capture_rows * config.dim;
            Outputs::new(&device, norms, limits.receipts, (captured, limits.probed))
        };
        Ok(Self {
            hooks: Hooks::new(&device, sizes, limits.slots, limits.ops, limits.vectors)?,
            cache: Cache::new(&device, shape)?,
            state: State::new(&device, &config, limits.sizes(config.layers))?,
            draws: Draws::new(&device, limits.draws, limits.slots)?,
            summaries: Summaries::new(&device, limits.head_rows, limits.ids, limits.top)?,
            outputs: [outputs()?, outputs()?],
            probe_items: Buffer::zeroed(&device, limits.capture_rows)?,
            probed: Buffer::zeroed(&device, limits.probed)?,
            in_flight: None,
            copies: Vec::new(),
            pool: PagePool::new(limits.pages),
            bank: Bank::new(limits.vectors),
            prompts: Prompts::new(
                limits.residual_pages,
                limits.capture_bytes.min(KEPT_CAPTURE_BYTES) as usize,
            ),
            slots: (0..limits.slots).map(|_| None).collect(),
            jobs: HashMap::new(),
            next_job: 0,
            trunks: HashMap::new(),
            next_trunk: 0,
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
        self.trunks.clear();
        let running = self.jobs.drain().flat_map(|(_, active)| active.askers);
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

    fn accept(&mut self, submission: Submission) {
        let Submission { tag, job, events } = submission;
        if let Some(error) = &self.failed {
            drop(events.send((tag, Event::Failed(error.clone()))));
            return;
        }
        let own = hooks::own_part(&job, self.config.layers, self.limits.share);
        let uses_norms = hooks::live(&job)
            .any(|injection| matches!(injection.mode, StrengthMode::Reference | StrengthMode::Row));
        let needs_clean = uses_norms || own.start > 0 || own.cut > 0;
        let key = job.tokens.as_slice().into();
        let job = Arc::new(job);
        self.queue.push_back(Pending {
            tag,
            key,
            job,
            events,
            own,
            needs_clean,
            references: Vec::new(),
        });
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(jobs) => jobs.into_iter().for_each(|job| self.accept(job)),
            Command::Cancel(tag) => self.cancel(tag),
            Command::Stats(reply) => drop(reply.send(self.stats)),
        }
    }

    fn cancel(&mut self, tag: u64) {
        let error = Error::new("cancelled");
        self.queue.retain(|pending| {
            if pending.tag == tag {
                drop(pending.events.send((tag, Event::Failed(error.clone()))));
            }
            pending.tag != tag
        });
        let asked = |active: &Active| active.askers.iter().position(|asker| asker.tag == tag);
        let mut running = self.jobs.iter_mut();
        let found = running.find_map(|(&id, active)| Some((id, asked(active)?, active)));
        let Some((id, at, active)) = found else { return };
        if active.askers.len() > 1 {
            let asker = active.askers.remove(at);
            drop(asker.events.send((tag, Event::Failed(error))));
        } else {
            self.drop_job(id, &error);
        }
    }

    /// Ends a running job with an error.
    pub(super) fn drop_job(&mut self, job: usize, error: &Error) {
        let Some(trunk) = self.jobs.get(&job).map(|active| active.trunk) else { return };
        let is_last = self.trunks.get(&trunk).is_some_and(|trunk| trunk.jobs == [job]);
        self.children.retain(|child| child.job != job);
        for slot in 0..self.slots.len() {
            let belongs = self.slots[slot].as_ref().is_some_and(|s| match &s.role {
                Role::Clean(_) => false,
                Role::Trunk(of) => *of == trunk && is_last,
                Role::Sample(child) | Role::Score(child) => child.job == job,
            });
            if belongs && let Some(sequence) = self.slots[slot].take() {
                if matches!(sequence.role, Role::Trunk(_)) {
                    self.trunk_done(trunk);
                }
                sequence.pages.release(&mut self.pool);
            }
        }
        self.end(job, |_| Event::Failed(error.clone()));
    }

    /// Once every continuation has started, nobody needs the prompt's own pages.
    pub(super) fn settle_trunk(&mut self, id: u64) {
        let Some(trunk) = self.trunks.get_mut(&id) else { return };
        if trunk.jobs.iter().any(|job| self.jobs[job].waiting > 0) {
            return;
        }
        if let Some(pages) = trunk.pages.take() {
            pages.release(&mut self.pool);
        }
        self.reserved -= std::mem::take(&mut trunk.child_pages);
    }

    /// A prompt's rows are done (or dropped): the clean run is no longer needed for them.
    pub(super) fn trunk_done(&mut self, id: u64) {
        let Some(trunk) = self.trunks.get_mut(&id) else { return };
        if std::mem::take(&mut trunk.holds_clean)
            && let Some(clean) = self.prompts.touch(&trunk.key)
        {
            clean.users -= 1;
        }
    }

    /// Ends a job: gives back all it holds and reports.
    pub(super) fn end(&mut self, job: usize, event: impl Fn(Outcome) -> Event) {
        let Some(active) = self.jobs.remove(&job) else { return };
        let Some(trunk) = self.trunks.get_mut(&active.trunk) else { return };
        let mut tally = trunk.tally.clone();
        for other in &active.tallies {
            tally.iter_mut().zip(other).for_each(|(sum, other)| sum.add(other));
        }
        let outcome = Outcome {
            prompt_tokens: trunk.key.len(),
            samples: active.samples.iter().flatten().cloned().collect(),
            scores: active.scores.iter().flatten().cloned().collect(),
            first: active.first.clone(),
            receipts: Vec::new(),
        };
        let receipts = |asker: &Pending| {
            hooks::receipts(&asker.job, &asker.references, &trunk.planned, &tally)
        };
        active.tell(|asker| event(Outcome { receipts: receipts(asker), ..outcome.clone() }));
        trunk.jobs.retain(|other| *other != job);
        self.settle_trunk(active.trunk);
        self.end_trunk(active.trunk);
    }

    /// A prompt whose last job has ended gives its vectors back.
    fn end_trunk(&mut self, id: u64) {
        let Some(trunk) = self.trunks.get(&id).filter(|trunk| trunk.jobs.is_empty()) else {
            return;
        };
        let (planned, probes) = (trunk.planned.clone(), trunk.probes.clone());
        self.release_vectors(&planned);
        self.release_probes(&probes);
        self.trunks.remove(&id);
    }
}
