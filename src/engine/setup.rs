//! How an engine is set up: its options, the device they ask for, and the memory that is taken.

use super::{
    batch::bucket,
    sequence::{continuations, rows_of},
    sites::{row_shape, tap_width},
    types::{Job, Reduce},
};
use crate::{
    device::{
        Cpu, Cuda, Device, DeviceKind,
        cpu::{Isa, MachineMemory},
        cuda::MatrixPath,
    },
    error::{Error, Result},
    model::{
        ModelConfig,
        forward::{Sizes, workspace},
    },
    ops::{
        attention::{MAX_HEAD_DIM, PAGE},
        experts::MAX_KERNEL_EXPERTS,
        hooks::tap_count,
        matmul::Dtype,
        residual_norm::MAX_KERNEL_DIM,
        sample::MAX_KERNEL_VOCAB,
    },
    request::CaptureSite,
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
    /// The most positions of a sequence; `None`: 8,192, or as many as the model was made for.
    pub context: Option<usize>,
    /// Bytes for keys and values; `None`: 2 GiB or what is free, on a GPU all that is free; never
    /// more than [`Options::max_batch`] sequences of the model's context need.
    pub kv_bytes: Option<u64>,
    /// Whether jobs share what is clean. Tokens, logits and captures are the same, bit for bit;
    /// only a receipt's reference norm is unknown where no clean run was needed.
    pub share: bool,
    /// Bytes of captures that [`run_all`](super::Engine::run_all) has in flight, and at most of clean runs'
    /// captured rows that are kept while nobody uses them; `None`: a quarter of what is free, at least 1 GiB.
    pub capture_bytes: Option<u64>,
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
            max_batch: 256,
            context: None,
            kv_bytes: None,
            share: true,
            capture_bytes: None,
            isa: None,
            matrix_path: None,
            behind: false,
            fail_after: None,
            hooks: true,
        }
    }
}

/// Positions of a sequence where no more are asked for: what is taken at start grows with them.
const DEFAULT_CONTEXT: usize = 8192;

impl Options {
    /// The model with as many positions as are computed.
    pub(super) fn limited(&self, config: &ModelConfig) -> ModelConfig {
        let context = config.context.min(self.context.unwrap_or(DEFAULT_CONTEXT));
        ModelConfig { context, ..config.clone() }
    }
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
    /// Products and norms of probed rows a step.
    pub probed: usize,
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
    /// See [`Options::capture_bytes`].
    pub capture_bytes: u64,
    /// See [`Options::behind`].
    pub behind: bool,
    /// See [`Options::hooks`].
    pub hooks: bool,
}

/// Rows of a step, and of logits made at a time: enough to read weights seldom.
const CPU_ROWS: (usize, usize) = (1024, 128);
/// Likewise; a GPU computes a hundred rows in the time it reads the weights.
const GPU_ROWS: (usize, usize) = (4096, 1024);
/// Likewise, for tests.
const HOST_KERNEL_ROWS: (usize, usize) = (128, 32);
const CAPTURE_BYTES: usize = 64 << 20;
/// Bytes of captured rows that clean runs keep, at most, while nobody uses them.
pub(super) const KEPT_CAPTURE_BYTES: u64 = 1 << 30;
/// Rows of the vector bank: enough to put every row of a long prompt in another's place, or to probe every
/// layer along a hundred words.
const LEAST_VECTORS: usize = 4096;
/// Receipts of a row, where all rows of a step have so many operations.
const RECEIPTS_PER_ROW: usize = 64;
/// Products and norms of probed rows a step.
const PROBED: usize = 1 << 21;

impl Limits {
    /// With `kv_bytes` for pages of `page_bytes` each.
    pub(super) fn new(
        config: &ModelConfig,
        options: &Options,
        page_bytes: u64,
        kv_bytes: u64,
    ) -> Self {
        let c = config;
        let blocks = c.context.div_ceil(PAGE);
        // Every sequence's own pages and its prompt's clean ones, at full length.
        let most = (2 * options.max_batch + 1) * c.layers * blocks;
        let pages = ((kv_bytes / page_bytes) as usize).min(most);
        let sites = 2 * c.layers + 1;
        // All that a row can show.
        let captured = |tap| tap_width(tap, config).div_ceil(c.dim);
        let most_captured: usize = (0..tap_count(c.layers)).map(captured).sum();
        let ops = 4 * sites;
        let (rows, head_rows) = step_rows(options);
        Self {
            slots: options.max_batch,
            rows,
            positions: c.context,
            pages,
            capture_rows: (CAPTURE_BYTES / (4 * c.dim)).max(most_captured),
            residual_pages: (((c.layers + 1) * 512).max(c.context)).div_ceil(PAGE),
            ops,
            vectors: (4 * options.max_batch).max(ops).max(LEAST_VECTORS),
            receipts: RECEIPTS_PER_ROW * rows + ops,
            probed: PROBED,
            head_rows,
            draws: 1 << 16,
            ids: 1 << 17,
            top: 1 << 16,
            share: options.share,
            capture_bytes: options.capture_bytes.unwrap_or_else(default_capture_bytes),
            behind: options.behind,
            hooks: options.hooks,
        }
    }

    /// Where a step's captured rows go: two parts take turns, so that one is copied to the host
    /// while the next step writes the other.
    pub(super) fn capture_row(&self, turn: usize, row: usize) -> usize {
        turn * self.capture_rows + row
    }

    /// Where the cached residual rows of clean runs are: behind the captured ones.
    pub(super) fn residual_row(&self, row: usize) -> usize {
        2 * self.capture_rows + row
    }

    /// The sizes of what a step reads and writes.
    pub(super) fn sizes(&self, layers: usize) -> Sizes {
        Sizes {
            rows: self.rows,
            slots: self.slots,
            positions: self.positions,
            captured: self.residual_row(self.residual_pages * PAGE),
            entries: self.capture_rows + self.rows * (layers + 1),
            receipts: self.receipts,
            head_rows: self.head_rows,
        }
    }

    /// Refuses a job that could never get its memory.
    pub(super) fn check(&self, job: &Job, config: &ModelConfig) -> Result<()> {
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
        let ids = job.watch.len() + job.score.len() + job.n as usize;
        let top = job.logprobs.unwrap_or(0) as usize;
        if job.n as usize > self.draws || ids > self.ids || top > self.top {
            return Err(Error::new("too many samples, scores or log-probabilities in one request")
                .expected(format!("at most {} samples and {} ids in all", self.draws, self.ids))
                .got(format!("{} samples and {ids} ids", job.n)));
        }
        let operations = super::hooks::operations(job);
        if operations > self.ops {
            return Err(Error::new("too many injections and conditions in one request")
                .expected(format!("at most {}", self.ops))
                .got(operations));
        }
        let rows = super::hooks::bank_rows(job, config.dim);
        if rows > self.vectors {
            return Err(Error::new("too many vectors in one request")
                .expected(format!("at most {}", self.vectors))
                .got(rows)
                .hint("a larger --max-batch makes room for more"));
        }
        // All that one row shows must fit into one step.
        let probed = job.capture.iter().map(|capture| match &capture.reduce {
            Reduce::Probe(vectors) => vectors.len() / config.dim + 1,
            Reduce::Rows | Reduce::Mean => 0,
        });
        let rows = job.capture.iter().filter(|capture| capture.site != CaptureSite::Logits);
        let rows: usize = rows
            .map(|capture| row_shape(capture.site, config).iter().product::<usize>())
            .map(|width| width.div_ceil(config.dim))
            .sum();
        if rows > self.capture_rows || probed.sum::<usize>() > self.probed {
            return Err(Error::new("too many captures in one request")
                .expected(format!(
                    "at most {} rows of a token, and {} numbers of probes",
                    self.capture_rows, self.probed
                ))
                .got(format!("{rows} rows")));
        }
        Ok(())
    }
}

fn default_capture_bytes() -> u64 {
    let quarter = MachineMemory::read().map_or(0, |memory| memory.available / 4);
    quarter.max(KEPT_CAPTURE_BYTES)
}

/// The device that the options ask for.
pub(super) fn open(config: &ModelConfig, options: &Options, threads: usize) -> Result<Device> {
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
    if let Some(experts) = config.experts.filter(|experts| experts.count > MAX_KERNEL_EXPERTS) {
        let expected = format!("at most {MAX_KERNEL_EXPERTS}");
        return refuse("number of experts", expected, experts.count);
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
