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
        attention::{Cache, attention},
        enter::{Source, enter},
        hooks::{CapturePlan, Hooks, site_count},
        matmul::{gated_matmul, matmul},
        residual_norm::{Receipt, ResidualNorm, Rows, residual_norm},
        rope_append::{RopeTable, rope_append},
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
    pub rows: Rows,
    /// What each row starts from.
    pub sources: Vec<Source>,
    /// Rows that are copied out.
    pub captures: CapturePlan,
    /// Receipts of all rows.
    pub receipts: usize,
}

/// Everything that a step reads and writes beside weights and cache; taken once.
pub struct State<T> {
    max_rows: usize,
    /// (rows, dim), the residual stream.
    resid: Buffer<f32>,
    /// (rows, dim), what attention or MLP adds to it.
    branch: Buffer<f32>,
    /// (rows, dim), the normalised stream.
    x: Buffer<T>,
    /// (rows, (heads + 2 · `kv_heads`) · `head_dim`)
    qkv: Buffer<f32>,
    /// (rows, heads · `head_dim`)
    attn: Buffer<T>,
    /// (rows, `ffn_dim` padded)
    gated: Buffer<T>,
    /// (head rows, dim)
    selected: Buffer<T>,
    /// (head rows, vocab)
    pub logits: Buffer<f32>,
    /// (capture rows, dim): captured rows, and the cached residuals of clean runs.
    pub captured: Buffer<f32>,
    /// (sites, rows): ‖h‖ of every row at every site.
    pub norms: Vec<f32>,
    /// One for each operation of each row.
    pub receipts: Vec<Receipt>,
    rope: RopeTable,
}

/// Rows of logits made at a time.
pub const HEAD_ROWS: usize = 64;

impl<T: Float> State<T> {
    /// Takes the memory: `max_rows` rows a step, `positions` a sequence, `captured` rows of
    /// captures and cached residuals, `receipts` receipts a step.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        max_rows: usize,
        positions: usize,
        captured: usize,
        receipts: usize,
    ) -> Result<Self> {
        let c = config;
        let width = (c.heads + 2 * c.kv_heads) * c.head_dim;
        Ok(Self {
            max_rows,
            resid: Buffer::zeroed(device, max_rows * c.dim)?,
            branch: Buffer::zeroed(device, max_rows * c.dim)?,
            x: Buffer::zeroed(device, max_rows * c.dim)?,
            qkv: Buffer::zeroed(device, max_rows * width)?,
            attn: Buffer::zeroed(device, max_rows * c.heads * c.head_dim)?,
            gated: Buffer::zeroed(device, max_rows * padded_ffn(c))?,
            selected: Buffer::zeroed(device, HEAD_ROWS * c.dim)?,
            logits: Buffer::zeroed(device, HEAD_ROWS * c.vocab)?,
            captured: Buffer::zeroed(device, captured * c.dim)?,
            norms: vec![0.0; site_count(c.layers) * max_rows],
            receipts: vec![[f32::NAN; 2]; receipts],
            rope: RopeTable::new(positions, c.head_dim, c.rope_theta),
        })
    }

    /// ‖h‖ of a row at a site in the last step.
    pub fn norm(&self, site: usize, row: usize) -> f32 {
        self.norms[site * self.max_rows + row]
    }
}

/// f32s of matmul workspace that a step of `max_rows` rows needs.
pub fn workspace(config: &ModelConfig, max_rows: usize) -> usize {
    let widest = config.dim.max(config.heads * config.head_dim).max(padded_ffn(config));
    (max_rows.max(HEAD_ROWS) + 8) * widest
}

/// Runs a step up to the final norm, which stays in `state` for [`head`].
pub fn forward<T: Float>(
    device: &Device,
    config: &ModelConfig,
    weights: &Weights,
    hooks: &Hooks,
    step: &Step,
    cache: &mut Cache<T>,
    state: &mut State<T>,
) {
    let s = state;
    s.receipts[..step.receipts].fill([f32::NAN; 2]);
    let mut entered = 0;
    for (l, w) in weights.layers.iter().enumerate() {
        let n = step.active[l]; // rows that have entered by layer l
        if n == 0 {
            continue;
        }
        let sources = &step.sources[entered..n];
        enter(device, entered, sources, &weights.embedding, &s.captured, &mut s.resid);
        write_stream(device, config, hooks, step, s, 2 * l, (n, entered), &w.attn_norm);
        matmul(device, n, &s.x, &w.qkv, &mut s.qkv);
        rope_append(device, n, config.heads, &mut s.qkv, &step.rows, &s.rope, l, cache);
        attention(device, n, config.heads, &s.qkv, &step.rows, l, cache, &mut s.attn);
        matmul(device, n, &s.attn, &w.out, &mut s.branch);
        write_stream(device, config, hooks, step, s, 2 * l + 1, (n, n), &w.mlp_norm);
        gated_matmul(device, n, &s.x, &w.gate_up, &mut s.gated);
        matmul(device, n, &s.gated, &w.down, &mut s.branch);
        entered = n;
    }
    let (l, n) = (config.layers, step.active[config.layers]);
    let sources = &step.sources[entered..n];
    enter(device, entered, sources, &weights.embedding, &s.captured, &mut s.resid);
    write_stream(device, config, hooks, step, s, 2 * l, (n, entered), &weights.final_norm);
}

#[expect(clippy::too_many_arguments, reason = "one call of `forward`, which names them")]
fn write_stream<T: Float>(
    device: &Device,
    config: &ModelConfig,
    hooks: &Hooks,
    step: &Step,
    s: &mut State<T>,
    site: usize,
    (rows, branch_rows): (usize, usize),
    gain: &Buffer<f32>,
) {
    residual_norm(
        device,
        ResidualNorm {
            rows,
            branch_rows,
            resid: &mut s.resid,
            branch: &s.branch,
            hooks,
            at: &step.rows,
            site,
            captures: &step.captures,
            captured: &mut s.captured,
            norms: &mut s.norms[site * s.max_rows..][..s.max_rows],
            receipts: &mut s.receipts,
            gain,
            eps: config.norm_eps,
            is_final: site == 2 * config.layers,
            x: &mut s.x,
        },
    );
}

/// Logits of up to [`HEAD_ROWS`] rows of the step just run, to `state.logits`.
pub fn head<T: Float>(
    device: &Device,
    config: &ModelConfig,
    weights: &Weights,
    rows: &[u32],
    state: &mut State<T>,
) {
    select_rows(device, config.dim, rows, &state.x, &mut state.selected);
    matmul(device, rows.len(), &state.selected, weights.head(), &mut state.logits);
}
