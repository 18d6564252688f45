//! THE forward pass: one for all models and devices, over a ragged batch of rows.

use super::{
    Angles, ModelConfig, Rope,
    weights::{Mlp, Weights, experts_sizes, padded_ffn},
};
use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::{
        Float,
        activations::Activations,
        attention::{Attention, AttentionPlan, CHUNK, Cache, Items, attention, kernel_head_dim},
        cap_logits::cap_logits,
        enter::{Enter, enter},
        experts::{Routed, experts},
        heads::{Heads, heads},
        hooks::{CapturePlan, Hooks, site_count, tap_count},
        matmul::{gated_matmul, matmul},
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
    /// Whether anything is done with single heads of attention, or copied out of them.
    pub has_heads: bool,
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
    /// What mixtures of experts work in.
    routed: Option<Routed<T>>,
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
    /// (rows,), the conditions that rows have met.
    met: Buffer<u32>,
    /// See [`Step::has_heads`].
    has_heads: bool,
    rope: RopeTable,
    /// Of blocks that are made for a window, where their angles are others.
    local_rope: Option<RopeTable>,
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
        let rope = |rope: &Rope| {
            RopeTable::new(device, sizes.positions, c.head_dim, &rope.frequencies, rope.scale)
        };
        let is_local = c.blocks.iter().any(|block| block.angles == Angles::Local);
        let has_local = is_local && c.local_rope != c.rope;
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
            routed: experts_sizes(c).map(|of| Routed::new(device, rows, of)).transpose()?,
            selected: Activations::zeroed(device, sizes.head_rows, c.dim)?,
            logits: Buffer::zeroed(device, sizes.head_rows * c.vocab)?,
            captured: Buffer::zeroed(device, sizes.captured * c.dim)?,
            norms: Buffer::zeroed(device, site_count(c.layers) * rows)?,
            receipts: Buffer::zeroed(device, sizes.receipts)?,
            met: Buffer::zeroed(device, rows)?,
            has_heads: false,
            rope: rope(&c.rope)?,
            local_rope: has_local.then(|| rope(&c.local_rope)).transpose()?,
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
        self.has_heads = step.has_heads;
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
    let expert = experts_sizes(config).map_or(0, |experts| experts.ffn);
    let attn = config.heads * config.head_dim;
    (rows + 8) * config.dim.max(attn).max(padded_ffn(config)).max(expert)
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
    (hooks, last): (&mut Hooks, &Buffer<u32>),
    active: &[usize],
    cache: &mut Cache<T>,
    state: &mut State<T>,
) -> Result<()> {
    let s = state;
    let c = config;
    let mut entered = 0;
    let mut branch_gain = None; // of the block before
    for (l, (w, block)) in weights.layers.iter().zip(&c.blocks).enumerate() {
        let n = active[l]; // rows that have entered by layer l
        if n == 0 {
            continue;
        }
        s.enter(device, (c, weights), last, entered..n)?;
        let norms = (branch_gain, w.attn_norm.as_ref());
        s.write_stream(device, c, hooks, 2 * l, (n, entered), norms)?;
        matmul(device, n, &s.x, &w.qkv, &mut s.qkv)?;
        let rope = match block.angles {
            Angles::None => None,
            Angles::Global => Some(&s.rope),
            Angles::Local => Some(s.local_rope.as_ref().unwrap_or(&s.rope)),
        };
        let (qkv, at, norms) = (&mut s.qkv, &s.at, w.query_norms.as_ref());
        rope_append(
            device,
            RopeAppend { rows: n, heads: c.heads, qkv, at, norms, rope, layer: l, cache },
        )?;
        let of = Attention {
            rows: n,
            heads: c.heads,
            qkv: &s.qkv,
            at: &s.at,
            plan: &mut s.plan,
            layer: l,
            cache,
            scale: c.attention_scale,
            soft_cap: c.attention_soft_cap,
            window: block.window,
            out: &mut s.attn,
        };
        attention(device, of)?;
        if s.has_heads {
            heads(
                device,
                Heads {
                    rows: n,
                    shape: [c.heads, c.kv_heads, c.head_dim],
                    layers: c.layers,
                    layer: l,
                    dim: c.dim,
                    qkv: &s.qkv,
                    attn: &mut s.attn,
                    hooks,
                    met: &mut s.met,
                    at: &s.at,
                    captures: &s.captures,
                    captured: &mut s.captured,
                    receipts: &mut s.receipts,
                },
            )?;
        }
        matmul(device, n, &s.attn, &w.out, &mut s.branch)?;
        let norms = (w.attn_post_norm.as_ref(), w.mlp_norm.as_ref());
        s.write_stream(device, c, hooks, 2 * l + 1, (n, n), norms)?;
        match (&w.mlp, &mut s.routed) {
            (Mlp::Experts(of), Some(routed)) => {
                experts(device, n, &s.x, of, routed, &mut s.branch)?;
            }
            (Mlp::Experts(_), None) => unreachable!("a model with experts has room for them"),
            (Mlp::Dense { gate_up, down }, _) => {
                gated_matmul(device, n, &s.x, gate_up, c.activation, &mut s.gated)?;
                matmul(device, n, &s.gated, down, &mut s.branch)?;
            }
        }
        branch_gain = w.mlp_post_norm.as_ref();
        entered = n;
    }
    let (l, n) = (c.layers, active[c.layers]);
    s.enter(device, (c, weights), last, entered..n)?;
    let norms = (branch_gain, Some(&weights.final_norm));
    s.write_stream(device, c, hooks, 2 * l, (n, entered), norms)
}

impl<T: Float> State<T> {
    fn enter(
        &mut self,
        device: &Device,
        (config, weights): (&ModelConfig, &Weights),
        last: &Buffer<u32>,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let enters = Enter {
            first: rows.start,
            count: rows.len(),
            sources: &self.sources,
            embedding: &weights.embedding,
            scale: config.embedding_scale,
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
        hooks: &mut Hooks,
        site: usize,
        (rows, branch_rows): (usize, usize),
        (branch_gain, gain): (Option<&Buffer<f32>>, Option<&Buffer<f32>>),
    ) -> Result<()> {
        residual_norm(
            device,
            ResidualNorm {
                rows,
                branch_rows,
                resid: &mut self.resid,
                branch: &self.branch,
                branch_gain,
                branch_scale: config.residual_scale,
                hooks,
                met: &mut self.met,
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
    config: &ModelConfig,
    weights: &Weights,
    count: usize,
    state: &mut State<T>,
) -> Result<()> {
    select_rows(device, count, &state.chosen, &state.x, &mut state.selected)?;
    matmul(device, count, &state.selected, weights.head(), &mut state.logits)?;
    let (scale, cap) = (config.logit_scale, config.logit_soft_cap);
    if scale == 1.0 && cap.is_none() {
        return Ok(());
    }
    cap_logits(device, count * config.vocab, scale, cap, &mut state.logits)
}
