//! A mixture of experts in the place of an MLP (Shazeer et al. 2017; Jiang et al. 2024, Mixtral, eq. 1 and
//! 2; Qwen3-MoE likewise): every row goes through the few experts that its router's logits are largest for.
//!
//!   logits = x · Rᵀ, p = softmax(logits) over all experts, in f32
//!   the `used` largest logits, ties to the lowest id, in descending order j = 0, 1, …: expert e,
//!   weight w = p(e), or p(e) / Σ p over the chosen
//!   out = Σ w · down(act(gate(x)) · up(x)) by expert e, over j ascending
//!
//! Rows are copied side by side by expert, multiplied as [`super::matmul`] does, and their results summed in
//! the order of j: a row's bits depend on no other row. Which experts a row has is decided where it is: on
//! a GPU the host never waits for it.

mod cpu;
mod kernels;

use super::{
    Float,
    activations::Activations,
    matmul::{
        Activation, Groups, Layout, Weight, WeightSet, gated_matmul_each, matmul, matmul_each,
    },
    select_rows::select_rows,
};
use crate::{
    device::{Buffer, Device},
    error::Result,
};

/// Experts that a row can have: a lane of a warp keeps each.
pub const MOST_USED: usize = 32;
/// The most experts that the kernels take: their counts lie in 48 KiB of shared memory.
pub const MAX_KERNEL_EXPERTS: usize = 8192;

/// A mixture's weights, and how it is used.
pub struct Experts {
    /// (experts, dim)
    pub router: Weight,
    /// Each (2 · ffn, dim): gate and up in turns (see [`super::matmul::interleave`]), whole panels.
    pub gate_up: WeightSet,
    /// Each (dim, ffn).
    pub down: WeightSet,
    /// Experts that a row goes through, at most [`MOST_USED`].
    pub used: usize,
    /// Whether the weights of the chosen sum to 1.
    pub normalise: bool,
    /// Of gates.
    pub activation: Activation,
}

/// A mixture's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsSizes {
    /// How many there are.
    pub experts: usize,
    /// How many a row goes through.
    pub used: usize,
    /// Of the stream.
    pub dim: usize,
    /// Inner width of one expert, whole panels.
    pub ffn: usize,
}

impl Experts {
    /// Its sizes.
    pub fn sizes(&self) -> ExpertsSizes {
        let (experts, used) = (self.router.n(), self.used);
        ExpertsSizes { experts, used, dim: self.router.k(), ffn: self.down.k() }
    }

    /// Bytes in memory, of all experts.
    pub fn bytes(&self) -> usize {
        self.router.bytes() + self.gate_up.bytes() + self.down.bytes()
    }
}

/// What [`experts`] works in; taken once for all mixtures of the same sizes.
pub struct Routed<T> {
    sizes: ExpertsSizes,
    /// (rows, experts)
    logits: Buffer<f32>,
    /// (rows, used)
    chosen: Buffer<u32>,
    /// (rows, used)
    weights: Buffer<f32>,
    /// (rows, used): where the copy for each chosen expert stands in `gathered`.
    place: Buffer<u32>,
    /// Of which row each row of `gathered` is a copy; [`super::rows::NONE`]: of none.
    from: Buffer<u32>,
    groups: Groups,
    /// (copies, dim), by expert.
    gathered: Activations<T>,
    /// (copies, ffn)
    gated: Activations<T>,
    /// (copies, dim)
    products: Buffer<f32>,
}

impl<T: Float> Routed<T> {
    /// Room for `rows` rows.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, rows: usize, sizes: ExpertsSizes) -> Result<Self> {
        let ExpertsSizes { experts, used, dim, ffn } = sizes;
        assert!((1..=experts.min(MOST_USED)).contains(&used), "{used} of {experts} experts");
        let (copies, blocks) = Layout::most(device, (rows, used), experts, (2 * ffn, dim));
        Ok(Self {
            sizes,
            logits: Buffer::zeroed(device, rows * experts)?,
            chosen: Buffer::zeroed(device, rows * used)?,
            weights: Buffer::zeroed(device, rows * used)?,
            place: Buffer::zeroed(device, rows * used)?,
            from: Buffer::zeroed(device, copies)?,
            groups: Groups::new(device, experts, blocks)?,
            gathered: Activations::zeroed(device, copies, dim)?,
            gated: Activations::zeroed(device, copies, ffn)?,
            products: Buffer::zeroed(device, copies * dim)?,
        })
    }

    /// (rows, used): the experts of the rows of the last call, by descending weight.
    pub fn chosen(&self) -> &Buffer<u32> {
        &self.chosen
    }

    /// (rows, used): their weights.
    pub fn weights(&self) -> &Buffer<f32> {
        &self.weights
    }

    /// Rows that there is room for.
    fn rows(&self) -> usize {
        self.chosen.len() / self.sizes.used
    }
}

/// Writes the mixture's output for rows `0..rows` of x to `out`, (≥ rows, dim). A row that is not of
/// numbers gets NaN, and no other is the worse for it.
///
/// # Errors
/// The device has failed.
pub fn experts<T: Float>(
    device: &Device,
    rows: usize,
    x: &Activations<T>,
    of: &Experts,
    routed: &mut Routed<T>,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let ExpertsSizes { experts: count, used, dim, ffn } = of.sizes();
    assert_eq!(of.sizes(), routed.sizes, "room for other sizes");
    assert!(of.gate_up.count() == count && of.down.count() == count, "experts: weights");
    assert!((of.gate_up.n(), of.gate_up.k()) == (2 * ffn, dim), "experts: gate and up");
    assert!(of.down.n() == dim, "experts: down");
    assert!(x.rows() >= rows && out.len() >= rows * dim, "experts: x, out");
    assert!(routed.rows() >= rows, "experts: no room for {rows} rows");
    if rows == 0 {
        return Ok(());
    }
    let r = routed;
    let layout = Layout::new(device, (rows, used), count, (2 * ffn, dim));
    matmul(device, rows, x, &of.router, &mut r.logits)?;
    match device {
        Device::Cpu(cpu) => {
            cpu::route(cpu, rows, of.normalise, r);
            cpu::place(rows, r);
        }
        Device::Cuda(cuda) => {
            kernels::route(cuda, rows, of.normalise, r)?;
            kernels::place(cuda, rows, layout, r)?;
        }
    }
    select_rows(device, layout.rows, &r.from, x, &mut r.gathered)?;
    let grouped = (layout, &r.groups);
    let activation = of.activation;
    gated_matmul_each(device, grouped, &r.gathered, &of.gate_up, activation, &mut r.gated)?;
    matmul_each(device, grouped, &r.gated, &of.down, &mut r.products)?;
    match device {
        Device::Cpu(cpu) => cpu::combine(cpu, rows, r, out),
        Device::Cuda(cuda) => return kernels::combine(cuda, rows, r, out),
    }
    Ok(())
}
