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
    batch::bucket,
    core::{Command, Core, Submission},
    hooks,
    sequence::{continuations, rows_of},
    types::{Event, Job, Outcome},
};
use crate::{
    device::{
        Cpu, Cuda, Device, DeviceKind,
        cpu::{Isa, thread_pool},
        cuda::MatrixPath,
    },
    error::{Error, Result},
    model::{
        Model, ModelConfig, Tokenizer,
        forward::{Sizes, workspace},
        weights::Weights,
    },
    ops::{
        Float,
        attention::{MAX_HEAD_DIM, PAGE},
        matmul::Dtype,
        residual_norm::MAX_KERNEL_DIM,
        sample::MAX_KERNEL_VOCAB,
    },
};

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it runs.
    pub device: DeviceKind,
    /// Type of weights, matmul inputs and cache.
    pub dtype: Dtype,
    /// Threads; `None`: one a core.
    pub threads: Option<usize>,
    /// Sequences at a time.
    pub max_batch: usize,
    /// Bytes for keys and values; `None`: 2 GiB, or what [`Options::max_batch`] sequences of the
    /// model's context need where that is less.
    pub kv_bytes: Option<u64>,
    /// Whether jobs share what is clean. Tokens, logits and captures are the same, bit for bit;
    /// only a receipt's reference norm is unknown where no clean run was needed.
    pub share: bool,
    /// `None`: the best this machine has. Results are the same, bit for bit.
    pub isa: Option<Isa>,
    /// Which matrix kernels the CUDA devices use; `None`: the GPU's best.
    pub matrix_path: Option<MatrixPath>,
    /// Whether a step is queued before the results of the one before are read also where that
    /// gains nothing. Results are the same, bit for bit.
    pub behind: bool,
    /// Launches of kernels after which the device fails, for tests.
    #[doc(hidden)]
    pub fail_after: Option<u64>,
    /// Whether injections act. Without, jobs are planned as with them, for measurements of what they
    /// cost.
    pub hooks: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: DeviceKind::Cpu,
            dtype: Dtype::Bf16,
            threads: None,
            max_batch: 64,
            kv_bytes: None,
            share: true,
            isa: None,
            matrix_path: None,
            behind: false,
            fail_after: None,
            hooks: true,
        }
    }
}

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
    /// Rows × layers that clean runs saved.
    pub layer_rows_saved: u64,
    /// Tokens drawn.
    pub tokens: u64,
    /// Rows of which logits were made.
    pub head_rows: u64,
    /// Time spent on steps with rows of prompts.
    pub prompt_seconds: f64,
    /// Time spent on steps of drawn tokens only.
    pub decode_seconds: f64,
}

/// What is taken at start.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sequences at a time.
    pub slots: usize,
    /// Rows a step.
    pub rows: usize,
    /// Positions of a sequence.
    pub positions: usize,
    /// Cache pages, each of one layer.
    pub pages: usize,
    /// Captured rows a step.
    pub capture_rows: usize,
    /// Pages of cached residual rows.
    pub residual_pages: usize,
    /// Operations of a sequence.
    pub ops: usize,
    /// Vectors in the bank.
    pub vectors: usize,
    /// Receipts a step.
    pub receipts: usize,
    /// Rows of logits made at a time.
    pub head_rows: usize,
    /// Tokens drawn at a time.
    pub draws: usize,
    /// Ids at a time whose logits are wanted.
    pub ids: usize,
    /// Most likely tokens at a time that are wanted.
    pub top: usize,
    /// Whether jobs share what is clean.
    pub share: bool,
    /// See [`Options::behind`].
    pub behind: bool,
    /// See [`Options::hooks`].
    pub hooks: bool,
}

/// Rows of a step, and of logits made at a time: enough to read weights seldom.
const CPU_ROWS: (usize, usize) = (512, 64);
/// Likewise; a GPU computes a hundred rows in the time it reads the weights.
const GPU_ROWS: (usize, usize) = (4096, 1024);
/// Likewise, for tests.
const HOST_KERNEL_ROWS: (usize, usize) = (128, 32);
const DEFAULT_KV_BYTES: u64 = 2 << 30;
const CAPTURE_BYTES: usize = 64 << 20;

impl Limits {
    fn new(config: &ModelConfig, options: &Options, device: &Device) -> Result<Self> {
        let c = config;
        let element = if options.dtype == Dtype::Bf16 { 2 } else { 4 };
        let page_bytes = 2 * PAGE * c.kv_heads * c.head_dim * element;
        let blocks = c.context.div_ceil(PAGE);
        // Every sequence's own pages and its prompt's clean ones, at full length.
        let most = (2 * options.max_batch + 1) * c.layers * blocks;
        let bytes = match options.kv_bytes {
            Some(bytes) => bytes,
            None => default_kv_bytes(device)?,
        };
        let pages = ((bytes / page_bytes as u64) as usize).min(most);
        let sites = 2 * c.layers + 1;
        // Every site and branch of a row, the final norm among them.
        let taps = 2 * sites + 1;
        let ops = 4 * sites;
        let (rows, head_rows) = step_rows(options);
        Ok(Self {
            slots: options.max_batch,
            rows,
            positions: c.context,
            pages,
            capture_rows: (CAPTURE_BYTES / (4 * c.dim)).max(2 * taps),
            residual_pages: (((c.layers + 1) * 512).max(c.context)).div_ceil(PAGE),
            ops,
            vectors: (4 * options.max_batch).max(ops),
            receipts: 8 * rows + ops,
            head_rows,
            draws: 1 << 16,
            ids: 1 << 17,
            top: 1 << 16,
            share: options.share,
            behind: options.behind,
            hooks: options.hooks,
        })
    }

    /// The sizes of what a step reads and writes.
    pub(super) fn sizes(&self, layers: usize) -> Sizes {
        Sizes {
            rows: self.rows,
            slots: self.slots,
            positions: self.positions,
            captured: self.capture_rows + self.residual_pages * PAGE,
            entries: self.capture_rows + self.rows * (layers + 1),
            receipts: self.receipts,
            head_rows: self.head_rows,
        }
    }

    /// Refuses a job that could never get its memory.
    fn check(&self, job: &Job, config: &ModelConfig) -> Result<()> {
        let blocks = rows_of(job).div_ceil(PAGE);
        let prompt = job.tokens.len().div_ceil(PAGE);
        let children = if continuations(job) > 1 { blocks } else { 0 };
        let pages = (prompt + blocks + children) * config.layers;
        if pages > self.pages {
            return Err(Error::new("a sequence does not fit into the cache")
                .expected(format!("at most {} pages of 16 positions at one layer", self.pages))
                .got(format!("{pages} for {} positions", rows_of(job)))
                .hint("give the cache more memory, or shorten the prompt or max_tokens"));
        }
        if job.capture.len() > self.capture_rows {
            return Err(Error::new("too many captures in one request")
                .expected(format!("at most {}", self.capture_rows))
                .got(job.capture.len()));
        }
        let ids = job.watch.len() + job.score.len() + job.n as usize;
        let top = job.logprobs.unwrap_or(0) as usize;
        if job.n as usize > self.draws || ids > self.ids || top > self.top {
            return Err(Error::new("too many samples, scores or log-probabilities in one request")
                .expected(format!("at most {} samples and {} ids in all", self.draws, self.ids))
                .got(format!("{} samples and {ids} ids", job.n)));
        }
        if job.inject.len() > self.ops {
            return Err(Error::new("too many injections in one request")
                .expected(format!("at most {}", self.ops))
                .got(job.inject.len()));
        }
        Ok(())
    }
}

/// The device that the options ask for.
fn open(config: &ModelConfig, options: &Options, threads: usize) -> Result<Device> {
    if options.device == DeviceKind::Cpu {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        let (rows, head_rows) = step_rows(options);
        return Ok(Device::Cpu(Cpu::new(isa, threads, workspace(config, rows.max(head_rows)))?));
    }
    if options.dtype == Dtype::F32 {
        return Err(Error::new("the CUDA kernels have no f32")
            .at("--dtype")
            .expected("bf16")
            .hint("--device cpu has f32, for exact comparisons"));
    }
    check_kernels(config)?;
    let cuda = match options.device {
        DeviceKind::Cuda(ordinal) => Cuda::gpu(ordinal)?,
        _ => Cuda::host(options.matrix_path.unwrap_or(MatrixPath::Wgmma))?,
    };
    let path = options.matrix_path.unwrap_or(cuda.path());
    Ok(Device::Cuda(cuda.with_path(path)?.failing_after(options.fail_after)))
}

/// Refuses sizes that the kernels do not take.
fn check_kernels(config: &ModelConfig) -> Result<()> {
    let refuse = |what: &str, expected: String, got: usize| {
        Err(Error::new(format!("the CUDA kernels do not take this {what}"))
            .expected(expected)
            .got(got)
            .hint("use --device cpu"))
    };
    let (dim, head_dim) = (config.dim, config.head_dim);
    if !dim.is_multiple_of(8) || dim > MAX_KERNEL_DIM {
        return refuse("width", format!("a multiple of 8 up to {MAX_KERNEL_DIM}"), dim);
    }
    if !head_dim.is_multiple_of(8) || head_dim > MAX_HEAD_DIM {
        return refuse("head size", format!("a multiple of 8 up to {MAX_HEAD_DIM}"), head_dim);
    }
    if config.vocab > MAX_KERNEL_VOCAB {
        return refuse("vocabulary", format!("at most {MAX_KERNEL_VOCAB} tokens"), config.vocab);
    }
    Ok(())
}

/// Rows of a step, and of logits made at a time.
fn step_rows(options: &Options) -> (usize, usize) {
    let (rows, head_rows) = match options.device {
        DeviceKind::Cpu => CPU_ROWS,
        DeviceKind::Cuda(_) => GPU_ROWS,
        DeviceKind::HostKernels => HOST_KERNEL_ROWS,
    };
    (rows.max(bucket(options.max_batch)), head_rows)
}

/// Bytes that a GPU keeps free beside the cache for what a step reads and writes.
const GPU_RESERVE: usize = 4 << 30;

/// Bytes for keys and values where none are asked for.
fn default_kv_bytes(device: &Device) -> Result<u64> {
    let Device::Cuda(cuda) = device else { return Ok(DEFAULT_KV_BYTES) };
    let free = cuda.facts()?.map(|facts| facts.memory.0.saturating_sub(GPU_RESERVE) as u64);
    Ok(free.map_or(DEFAULT_KV_BYTES, |free| free / 10 * 9))
}

/// A finished job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finished {
    /// What it reports.
    pub outcome: Outcome,
    /// (positions, width) of each of its captures.
    pub captures: Vec<Vec<f32>>,
}

/// A running engine. Dropping it ends its thread; jobs still running are dropped.
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
        let config = Arc::new(config.clone());
        let pool = thread_pool(threads)?;
        let core = pool.install(|| -> Result<Core<T>> {
            let device = open(&config, options, threads)?;
            let weights = load(&device)?;
            let limits = Limits::new(&config, options, &device)?;
            Core::new(device, Arc::clone(&config), tokenizer, weights, limits)
        })?;
        let arithmetic = match &core.device {
            Device::Cpu(_) => "fma".into(), // every instruction set gives the same bits
            Device::Cuda(cuda) => cuda.arithmetic(),
        };
        let limits = core.limits;
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("inkling-engine".into())
            .spawn(move || pool.install(move || core.run(&receiver)))?;
        let fingerprint = Fingerprint {
            device: options.device.to_string(),
            dtype: options.dtype.to_string(),
            isa: arithmetic,
            kernels: "1".into(),
        };
        let commands = Mutex::new(Some(sender));
        let next_tag = AtomicU64::new(1 << 63);
        Ok(Self { commands, thread: Some(thread), config, fingerprint, limits, next_tag })
    }

    /// The model's sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the bits of results depend on beside the job.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// Submits a job; its events go to `events` with the tag, below 2⁶³ and unique among the jobs
    /// that are not done.
    ///
    /// # Errors
    /// The job does not fit the model, or would change nothing it promises to change.
    pub fn submit(&self, job: Job, tag: u64, events: &mpsc::Sender<(u64, Event)>) -> Result<()> {
        hooks::check(&job, &self.config)?;
        self.limits.check(&job, &self.config)?;
        let events = events.clone();
        self.send(Command::Submit(Box::new(Submission { tag, job, events })))
    }

    /// Drops a job; it reports `Failed`.
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

    /// Streams jobs through, a bounded number in flight, and calls `done` with each one's index
    /// as it finishes, in any order. `jobs` is asked for more after each call of `done`, even
    /// where it had none before.
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
        // By tag: the job's index and its captures so far.
        let mut running: HashMap<u64, (usize, Vec<Vec<f32>>)> = HashMap::new();
        let result = loop {
            let room = in_flight.saturating_sub(running.len());
            // Asked again after its end: what `done` learns may make new jobs.
            let refused = jobs.by_ref().take(room).find_map(|job| {
                let index = next;
                next += 1;
                let captures = vec![Vec::new(); job.capture.len()];
                let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
                match self.submit(job, tag, &sender) {
                    Ok(()) => {
                        running.insert(tag, (index, captures));
                        None
                    }
                    Err(error) => done(index, Err(error)).err(),
                }
            });
            if let Some(error) = refused {
                break Err(error);
            }
            if running.is_empty() {
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
                    if let Some((_, captures)) = running.get_mut(&tag) {
                        captures[capture] = data;
                    }
                    continue;
                }
                Event::Done(outcome) => Ok(outcome),
                Event::Failed(error) => Err(error),
            };
            let Some((index, captures)) = running.remove(&tag) else { continue };
            if let Err(error) = done(index, result.map(|outcome| Finished { outcome, captures })) {
                break Err(error);
            }
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

fn stopped() -> Error {
    Error::new("the engine has stopped")
}
