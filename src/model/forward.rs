//! THE forward pass: one for all models and devices, over a ragged batch of rows.

use super::{
    ModelConfig,
    weights::{Weights, padded_ffn},
};
use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::{
        Float,
        activations::Activations,
        attention::{Attention, AttentionPlan, CHUNK, Cache, Items, attention, kernel_head_dim},
        enter::{Enter, enter},
        hooks::{CapturePlan, Hooks, site_count, tap_count},
        matmul::{Activation, gated_matmul, matmul},
        residual_norm::{Receipt, ResidualNorm, residual_norm},
        rope_append::{RopeAppend, RopeTable, rope_append},
        rows::{RowList, Rows, Source, Sources},
        select_rows::select_rows,
    },
};

/// One step, planned: flat arrays. Rows are sorted by entry layer, so that at every layer the
/// active ones are a prefix.
#[derive(Debug, Default)]
pub struct Step {
    /// (layers + 1): rows that have entered by layer l; those of the last entry enter only for
    /// the final norm.
    pub active: Vec<usize>,
    /// Slot, position and receipts of each row.
    pub rows: RowList,
    /// What each row starts from.
    pub sources: Vec<Source>,
    /// Rows that are copied out: (tap, row, destination).
    pub captures: Vec<(u32, u32, u32)>,
    /// Receipts of all rows.
    pub receipts: usize,
    /// How attention divides the rows.
    pub items: Items,
}

/// What is taken at start for [`State`].
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Rows a step.
    pub rows: usize,
    /// Sequences at a time, so single rows a step.
    pub slots: usize,
    /// Positions of a sequence.
    pub positions: usize,
    /// Rows of captures and cached residuals.
    pub captured: usize,
    /// Captured rows a step, those of cached residuals included.
    pub entries: usize,
    /// Receipts a step.
    pub receipts: usize,
    /// Rows of logits made at a time.
    pub head_rows: usize,
}

/// Everything that a step reads and writes beside weights and cache; taken once.
pub struct State<T> {
    sizes: Sizes,
    at: Rows,
    sources: Sources,
    captures: CapturePlan,
    plan: AttentionPlan,
    /// (head rows,)
    chosen: Buffer<u32>,
    /// (rows, dim), the residual stream.
    resid: Buffer<f32>,
    /// (rows, dim), what attention or MLP adds to it.
    branch: Buffer<f32>,
    /// (rows, dim), the normalised stream.
    x: Activations<T>,
    /// (rows, (heads + 2 · `kv_heads`) · `head_dim`)
    qkv: Buffer<f32>,
    /// (rows, heads · `head_dim`)
    attn: Activations<T>,
    /// (rows, `ffn_dim` padded)
    gated: Activations<T>,
    /// (head rows, dim)
    selected: Activations<T>,
    /// (head rows, vocab)
    pub logits: Buffer<f32>,
    /// (capture rows, dim): captured rows of two steps, and the cached residuals of clean runs.
    pub captured: Buffer<f32>,
    /// (sites, rows): ‖h‖ of every row at every site.
    pub norms: Buffer<f32>,
    /// One for each operation of each row.
    pub receipts: Buffer<Receipt>,
    rope: RopeTable,
}

impl<T: Float> State<T> {
    /// Takes the memory.
    ///
    /// # Errors
    /// There is not enough.
    pub fn new(device: &Device, config: &ModelConfig, sizes: Sizes) -> Result<Self> {
        let c = config;
        let rows = sizes.rows;
        let width = (c.heads + 2 * c.kv_heads) * c.head_dim;
        let state = c.heads * (kernel_head_dim(c.head_dim) + 2);
        let long = sizes.positions > CHUNK;
        Ok(Self {
            sizes,
            at: Rows::new(device, rows)?,
            sources: Sources::new(device, rows)?,
            captures: CapturePlan::new(device, tap_count(c.layers), sizes.entries)?,
            plan: AttentionPlan::new(device, (rows, sizes.slots), state, long)?,
            chosen: Buffer::zeroed(device, sizes.head_rows)?,
            resid: Buffer::zeroed(device, rows * c.dim)?,
            branch: Buffer::zeroed(device, rows * c.dim)?,
            x: Activations::zeroed(device, rows, c.dim)?,
            qkv: Buffer::zeroed(device, rows * width)?,
            attn: Activations::zeroed(device, rows, c.heads * c.head_dim)?,
            gated: Activations::zeroed(device, rows, padded_ffn(c))?,
            selected: Activations::zeroed(device, sizes.head_rows, c.dim)?,
            logits: Buffer::zeroed(device, sizes.head_rows * c.vocab)?,
            captured: Buffer::zeroed(device, sizes.captured * c.dim)?,
            norms: Buffer::zeroed(device, site_count(c.layers) * rows)?,
            receipts: Buffer::zeroed(device, sizes.receipts)?,
            rope: RopeTable::new(device, sizes.positions, c.head_dim, c.rope_theta)?,
        })
    }

    /// Rows that a step has room for; the stride of `norms`.
    pub fn rows(&self) -> usize {
        self.sizes.rows
    }

    /// Writes a step's plan to the device.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, step: &Step) -> Result<()> {
        self.at.set(&step.rows)?;
        self.sources.set(&step.sources)?;
        self.captures.set(&step.captures)?;
        self.plan.set(&step.items)?;
        self.receipts.write(0, &vec![[f32::NAN; 2]; step.receipts])
    }

    /// Writes which rows [`head`] makes logits of.
    ///
    /// # Errors
    /// The device has failed.
    pub fn choose(&mut self, rows: &[u32]) -> Result<()> {
        self.chosen.write(0, rows)
    }
}

/// f32s of matmul workspace that products of `rows` rows need on the processor.
pub fn workspace(config: &ModelConfig, rows: usize) -> usize {
    let widest = config.dim.max(config.heads * config.head_dim).max(padded_ffn(config));
    (rows + 8) * widest
}

/// Runs the step that was [set](State::set) up to the final norm, which stays in `state` for
/// [`head`]. `active`: as in [`Step`].
///
/// # Errors
/// The device has failed.
pub fn forward<T: Float>(
    device: &Device,
    config: &ModelConfig,
    weights: &Weights,
    (hooks, last): (&Hooks, &Buffer<u32>),
    active: &[usize],
    cache: &mut Cache<T>,
    state: &mut State<T>,
) -> Result<()> {
    let s = state;
    let heads = config.heads;
    let mut entered = 0;
    for (l, w) in weights.layers.iter().enumerate() {
        let n = active[l]; // rows that have entered by layer l
        if n == 0 {
            continue;
        }
        s.enter(device, weights, last, entered..n)?;
        s.write_stream(device, config, hooks, 2 * l, (n, entered), &w.attn_norm)?;
        matmul(device, n, &s.x, &w.qkv, &mut s.qkv)?;
        let (qkv, at, rope) = (&mut s.qkv, &s.at, &s.rope);
        let norms = None;
        rope_append(device, RopeAppend { rows: n, heads, qkv, at, norms, rope, layer: l, cache })?;
        let (qkv, plan, out) = (&s.qkv, &mut s.plan, &mut s.attn);
        let (soft_cap, window) = (None, None);
        let of =
            Attention { rows: n, heads, qkv, at, plan, layer: l, cache, soft_cap, window, out };
        attention(device, of)?;
        matmul(device, n, &s.attn, &w.out, &mut s.branch)?;
        s.write_stream(device, config, hooks, 2 * l + 1, (n, n), &w.mlp_norm)?;
        gated_matmul(device, n, &s.x, &w.gate_up, Activation::Silu, &mut s.gated)?;
        matmul(device, n, &s.gated, &w.down, &mut s.branch)?;
        entered = n;
    }
    let (l, n) = (config.layers, active[config.layers]);
    s.enter(device, weights, last, entered..n)?;
    s.write_stream(device, config, hooks, 2 * l, (n, entered), &weights.final_norm)
}

impl<T: Float> State<T> {
    fn enter(
        &mut self,
        device: &Device,
        weights: &Weights,
        last: &Buffer<u32>,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let enters = Enter {
            first: rows.start,
            count: rows.len(),
            sources: &self.sources,
            embedding: &weights.embedding,
            cached: &self.captured,
            last,
            resid: &mut self.resid,
        };
        enter(device, enters)
    }

    fn write_stream(
        &mut self,
        device: &Device,
        config: &ModelConfig,
        hooks: &Hooks,
        site: usize,
        (rows, branch_rows): (usize, usize),
        gain: &Buffer<f32>,
    ) -> Result<()> {
        residual_norm(
            device,
            ResidualNorm {
                rows,
                branch_rows,
                resid: &mut self.resid,
                branch: &self.branch,
                hooks,
                at: &self.at,
                site,
                captures: &self.captures,
                captured: &mut self.captured,
                norms: &mut self.norms,
                norms_at: site * self.sizes.rows,
                receipts: &mut self.receipts,
                gain,
                eps: config.norm_eps,
                is_final: site == 2 * config.layers,
                x: &mut self.x,
            },
        )
    }
}

/// Logits of the first `count` rows that were [chosen](State::choose) of the step just run, to
/// `state.logits`.
///
/// # Errors
/// The device has failed.
pub fn head<T: Float>(
    device: &Device,
    weights: &Weights,
    count: usize,
    state: &mut State<T>,
) -> Result<()> {
    select_rows(device, count, &state.chosen, &state.x, &mut state.selected)?;
    matmul(device, count, &state.selected, weights.head(), &mut state.logits)
}
