//! The handle: starts the engine's thread, submits jobs, collects what they report.

use std::{
    collections::HashMap,
    num::NonZero,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    checks,
    core::{Command, Core, Submission},
    memory,
    setup::{Limits, Options, open},
    sites::row_shape,
    types::{Capture, Event, Job, Outcome},
};
use crate::{
    device::{
        Device, DeviceKind,
        cpu::{MachineMemory, Products},
    },
    error::{Error, Result},
    model::{Model, ModelConfig, Tokenizer, weights::Weights},
    ops::{Float, attention::PageShape, matmul::Dtype},
};

/// What the bits of results depend on beside the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// `cpu`.
    pub device: String,
    /// `bf16` or `f32`.
    pub dtype: String,
    /// Instruction set family whose results are the same bits.
    pub isa: String,
    /// Version of the arithmetic.
    pub kernels: String,
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Steps run.
    pub steps: u64,
    /// Rows computed.
    pub rows: u64,
    /// Rows × layers computed.
    pub layer_rows: u64,
    /// Rows × layers of prompts among them.
    pub prompt_layer_rows: u64,
    /// Rows × layers that the same prompts would be, each computed by itself.
    pub unshared_prompt_layer_rows: u64,
    /// Tokens drawn.
    pub tokens: u64,
    /// Rows of which logits were made.
    pub head_rows: u64,
    /// Time spent on steps with rows of prompts.
    pub prompt_seconds: f64,
    /// Time spent on steps of drawn tokens only.
    pub decode_seconds: f64,
    /// Time that the device spent on steps and on copies of pages before them, of all that was spent;
    /// the rest is planning, handing out and waiting.
    pub device_seconds: f64,
    /// Time that the device spent on steps of drawn tokens only.
    pub decode_device_seconds: f64,
}

impl Stats {
    /// Rows × layers that sharing has saved.
    pub fn layer_rows_saved(&self) -> u64 {
        self.unshared_prompt_layer_rows.saturating_sub(self.prompt_layer_rows)
    }
}

/// A finished job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finished {
    /// What it reports.
    pub outcome: Outcome,
    /// (positions, width) of each of its captures.
    pub captures: Vec<Vec<f32>>,
}

/// A running engine: a thread of its own that owns the device, the weights and the cache. Several may run side by
/// side, and a handle may be shared between threads. Dropping it ends its thread; jobs still running are dropped.
///
/// Jobs that are in flight together share what they have in common, and none's result depends on the others: the same
/// job gives the same bits whatever runs beside it.
pub struct Engine {
    commands: Mutex<Option<mpsc::Sender<Command>>>,
    thread: Option<JoinHandle<()>>,
    config: Arc<ModelConfig>,
    fingerprint: Fingerprint,
    limits: Limits,
    /// Tags of `run_all`, in the upper half: the caller's own are in the lower.
    next_tag: AtomicU64,
}

impl Engine {
    /// Loads the weights, takes all memory and starts the thread.
    ///
    /// # Errors
    /// A tensor is missing, misshapen or left over; memory does not suffice.
    pub fn start(model: &Model, options: &Options) -> Result<Self> {
        let load = |device: &Device| {
            Weights::load(device, options.dtype, &model.config, &model.checkpoint)
        };
        Self::start_with(&model.config, model.tokenizer.clone(), options, load)
    }

    /// Starts with random weights of these sizes, for measurements.
    ///
    /// # Errors
    /// Memory does not suffice.
    pub fn start_random(config: &ModelConfig, options: &Options) -> Result<Self> {
        let load = |device: &Device| Weights::random(device, options.dtype, config);
        Self::start_with(config, None, options, load)
    }

    fn start_with(
        config: &ModelConfig,
        tokenizer: Option<Arc<Tokenizer>>,
        options: &Options,
        load: impl FnOnce(&Device) -> Result<Weights> + Send,
    ) -> Result<Self> {
        match options.dtype {
            Dtype::Bf16 => Self::start_as::<half::bf16>(config, tokenizer, options, load),
            Dtype::F32 => Self::start_as::<f32>(config, tokenizer, options, load),
        }
    }

    fn start_as<T: Float>(
        config: &ModelConfig,
        tokenizer: Option<Arc<Tokenizer>>,
        options: &Options,
        load: impl FnOnce(&Device) -> Result<Weights> + Send,
    ) -> Result<Self> {
        if options.max_batch == 0 || options.threads == Some(0) {
            return Err(Error::new("--max-batch and --threads must be at least 1"));
        }
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = options.threads.unwrap_or(cores);
        let config = Arc::new(options.limited(config));
        let (device, kv_bytes) = if matches!(options.device, DeviceKind::Cuda(_)) {
            let device = open(&config, options, threads)?;
            let free = device.free_memory()?;
            (device, memory::kv_bytes(&config, options, free)?)
        } else {
            let free = MachineMemory::read().map(|memory| memory.available);
            let kv_bytes = memory::kv_bytes(&config, options, free)?;
            (open(&config, options, threads)?, kv_bytes)
        };
        let weights = load(&device)?;
        let page = PageShape::new(&device, options.dtype, config.kv_heads, config.head_dim);
        let page_bytes = (page.elements() * size_of::<T>()) as u64;
        let limits = Limits::new(&config, options, page_bytes, kv_bytes);
        let core = Core::<T>::new(device, Arc::clone(&config), tokenizer, weights, limits)?;
        let arithmetic = match &core.device {
            Device::Cpu(cpu) if options.dtype == Dtype::Bf16 => cpu.isa().products().to_string(),
            Device::Cpu(_) => Products::Chains.to_string(),
            Device::Cuda(cuda) => cuda.arithmetic(),
        };
        let limits = core.limits;
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("inkling-engine".into())
            .spawn(move || core.run(&receiver))?;
        let fingerprint = Fingerprint {
            device: options.device.to_string(),
            dtype: options.dtype.to_string(),
            isa: arithmetic,
            kernels: "3".into(),
        };
        let commands = Mutex::new(Some(sender));
        let next_tag = AtomicU64::new(1 << 63);
        Ok(Self { commands, thread: Some(thread), config, fingerprint, limits, next_tag })
    }

    /// The model's sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The most sequences in a step.
    pub fn slots(&self) -> usize {
        self.limits.slots
    }

    /// See [`Options::capture_bytes`].
    pub fn capture_bytes(&self) -> u64 {
        self.limits.capture_bytes
    }

    /// What the bits of results depend on beside the job.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Submits a job; its events go to `events` with the tag, below 2⁶³ and unique among the jobs
    /// that are not done. Tokens come as they are drawn, captures once the prompt is done, then [`Event::Done`]
    /// or [`Event::Failed`]. Events that nobody receives are lost, and the job runs on: see [`Engine::cancel`].
    ///
    /// ```
    /// use std::sync::mpsc;
    /// use inkling::{Engine, engine::{Event, Job, Options}, model::ModelConfig, request::Sampling};
    ///
    /// let config = ModelConfig::of_shape("tiny", 64)?;
    /// let engine = Engine::start_random(&config, &Options { max_batch: 4, ..Options::default() })?;
    /// let sampling = Sampling { max_tokens: 40, ignore_eos: true, ..Sampling::default() };
    /// let job = Job { tokens: vec![3, 1, 4], sampling, n: 1, ..Job::default() };
    /// let (sender, events) = mpsc::channel();
    /// engine.submit(job, 7, &sender)?;
    /// let mut tokens = Vec::new();
    /// for (tag, event) in events {
    ///     assert_eq!(tag, 7);
    ///     match event {
    ///         Event::Token { token, .. } => tokens.push(token),
    ///         Event::Failed(error) => {
    ///             assert!(error.to_string().contains("cancelled"));
    ///             break;
    ///         }
    ///         Event::Done(_) => break, // it was faster
    ///         _ => {}
    ///     }
    ///     if tokens.len() == 3 {
    ///         engine.cancel(7); // enough was seen
    ///     }
    /// }
    /// assert!(tokens.len() >= 3);
    /// # Ok::<(), inkling::Error>(())
    /// ```
    ///
    /// # Errors
    /// The job does not fit the model, or would change nothing it promises to change.
    pub fn submit(&self, job: Job, tag: u64, events: &mpsc::Sender<(u64, Event)>) -> Result<()> {
        self.check(&job)?;
        self.send(Command::Submit(vec![Submission { tag, job, events: events.clone() }]))
    }

    fn check(&self, job: &Job) -> Result<()> {
        checks::check(job, &self.config)?;
        self.limits.check(job, &self.config)
    }

    /// Drops a job, waiting or running; it reports [`Event::Failed`]. Others that asked for the same go on.
    pub fn cancel(&self, tag: u64) {
        drop(self.send(Command::Cancel(tag)));
    }

    /// The counters.
    pub fn stats(&self) -> Stats {
        let (sender, receiver) = mpsc::channel();
        match self.send(Command::Stats(sender)) {
            Ok(()) => receiver.recv().unwrap_or_default(),
            Err(_) => Stats::default(),
        }
    }

    fn send(&self, command: Command) -> Result<()> {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = commands.as_ref().is_some_and(|sender| sender.send(command).is_ok());
        if sent { Ok(()) } else { Err(stopped()) }
    }

    /// Runs one job to its end.
    ///
    /// # Errors
    /// As for [`Engine::submit`], and what the job itself fails with.
    pub fn run(&self, job: Job) -> Result<Finished> {
        let mut result = Err(stopped());
        self.run_all([job], |_, finished| {
            result = finished;
            Ok(())
        })?;
        result
    }

    /// Streams jobs through and calls `done` with each one's index as it finishes, in any order. A bounded
    /// number is in flight, and of their captures at most [`Options::capture_bytes`], or one job's: a
    /// slow `done` is waited for. `jobs` is asked for more after each call of `done`, even where it had none
    /// before.
    ///
    /// ```
    /// use inkling::{Engine, engine::{Injection, Job, Options}, model::ModelConfig, request::Sampling};
    ///
    /// let config = ModelConfig::of_shape("tiny", 64)?;
    /// let engine = Engine::start_random(&config, &Options { max_batch: 8, ..Options::default() })?;
    /// // Every layer against three strengths: what does the likeliest of two tokens gain?
    /// let cell = |at: usize| Job {
    ///     tokens: vec![3, 1, 4, 1, 5],
    ///     inject: vec![Injection {
    ///         vector: vec![0.5; config.dim].into(),
    ///         layer: at / 3,
    ///         strength: (at % 3) as f32,
    ///         from: 2,
    ///         ..Injection::default()
    ///     }],
    ///     watch: vec![9, 2],
    ///     sampling: Sampling { max_tokens: 0, ..Sampling::default() },
    ///     n: 1,
    ///     ..Job::default()
    /// };
    /// let mut gains = vec![0.0; 3 * config.layers];
    /// engine.run_all((0..gains.len()).map(cell), |at, finished| {
    ///     let first = finished?.outcome.first.expect("tokens are watched");
    ///     gains[at] = first.watch[0] - first.watch[1];
    ///     Ok(())
    /// })?;
    /// assert_eq!(gains[0], gains[3], "strength 0 is the clean prompt, at any layer");
    /// assert!(engine.stats().layer_rows_saved() > 0);
    /// # Ok::<(), inkling::Error>(())
    /// ```
    ///
    /// # Errors
    /// What `done` returns, at once; a job's own failure goes to `done`.
    pub fn run_all(
        &self,
        jobs: impl IntoIterator<Item = Job>,
        mut done: impl FnMut(usize, Result<Finished>) -> Result<()>,
    ) -> Result<()> {
        let in_flight = 4 * self.limits.slots + 8;
        let (sender, events) = mpsc::channel();
        let mut jobs = jobs.into_iter();
        let mut next = 0;
        let mut running: HashMap<u64, Running> = HashMap::new();
        // The next one, where its captures must wait for others' to be handed out.
        let mut held: Option<Job> = None;
        let mut captured = 0;
        let result = loop {
            let mut submissions = Vec::new();
            let mut refused = None;
            while running.len() < in_flight && refused.is_none() {
                // Asked again after its end: what `done` learns may make new jobs.
                let Some(job) = held.take().or_else(|| jobs.next()) else { break };
                let bytes = capture_bytes(&job, &self.config);
                if bytes > 0 && captured > 0 && captured + bytes > self.limits.capture_bytes {
                    held = Some(job);
                    break;
                }
                let index = next;
                next += 1;
                if let Err(error) = self.check(&job) {
                    refused = done(index, Err(error)).err();
                    continue;
                }
                captured += bytes;
                let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
                running.insert(
                    tag,
                    Running { index, bytes, captures: vec![Vec::new(); job.capture.len()] },
                );
                submissions.push(Submission { tag, job, events: sender.clone() });
            }
            if !submissions.is_empty() {
                self.send(Command::Submit(submissions))?;
            }
            if let Some(error) = refused {
                break Err(error);
            }
            if running.is_empty() && held.is_none() {
                break Ok(());
            }
            let (tag, event) = match events.recv_timeout(Duration::from_secs(1)) {
                Ok(event) => event,
                Err(_) if self.thread.as_ref().is_some_and(|t| !t.is_finished()) => continue,
                Err(_) => break Err(stopped()),
            };
            let result = match event {
                Event::Token { .. } => continue,
                Event::Capture { capture, data } => {
                    if let Some(running) = running.get_mut(&tag) {
                        running.captures[capture] = data;
                    }
                    continue;
                }
                Event::Done(outcome) => Ok(outcome),
                Event::Failed(error) => Err(error),
            };
            let Some(Running { index, bytes, captures }) = running.remove(&tag) else { continue };
            if let Err(error) = done(index, result.map(|outcome| Finished { outcome, captures })) {
                break Err(error);
            }
            captured -= bytes;
        };
        running.into_keys().for_each(|tag| self.cancel(tag));
        result
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A job in flight.
struct Running {
    index: usize,
    /// Of its captures.
    bytes: u64,
    captures: Vec<Vec<f32>>,
}

/// Bytes of a job's captures while they are collected: as they come, and as a clean run keeps them.
pub fn capture_bytes(job: &Job, config: &ModelConfig) -> u64 {
    let of = |capture: &Capture| {
        let width = row_shape(capture.site, config).iter().product::<usize>();
        let (rows, columns) = capture.reduce.shape(capture.positions.len(), width);
        let kept = capture.positions.len() * capture.reduce.row_of(width);
        4 * (rows * columns + kept) as u64
    };
    job.capture.iter().map(of).sum()
}

fn stopped() -> Error {
    Error::new("the engine has stopped")
}
