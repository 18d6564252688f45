//! The one place where the residual stream is written. For every row, in this order:
//!
//! ```text
//! branch captured                     h += branch        (rows that have a branch)
//! h += scale · v, for each operation of the row's sequence at this site whose window holds it
//! h captured; ‖h‖ stored              x = h / sqrt(mean(h²) + eps) · gain
//! ```

use super::{
    Float,
    hooks::{CapturePlan, HookOp, Hooks, destinations},
    math::sum_of_squares,
};
use crate::device::{
    Buffer, Device,
    cpu::{Kernel, Shared},
};

/// Receives what an injection did to a row: (‖h‖ before, ‖h after − h before‖).
pub type Receipt = [f32; 2];

/// Where rows are, for the whole step: flat arrays of one entry a row.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Slot of the row's sequence.
    pub slot: Vec<u32>,
    /// Absolute position in its sequence.
    pub position: Vec<u32>,
    /// First of the row's receipts; -1: its sequence has no operations.
    pub receipt: Vec<i32>,
}

/// Operands of [`residual_norm`].
pub struct ResidualNorm<'a, T> {
    /// Rows `0..rows` are active.
    pub rows: usize,
    /// Rows `0..branch_rows` have a branch to add.
    pub branch_rows: usize,
    /// (≥ rows, dim).
    pub resid: &'a mut Buffer<f32>,
    /// (≥ `branch_rows`, dim).
    pub branch: &'a Buffer<f32>,
    /// What acts on sequences.
    pub hooks: &'a Hooks,
    /// Which rows these are.
    pub at: &'a Rows,
    /// The site, see [`super::hooks::site_count`].
    pub site: usize,
    /// What is copied out in this step.
    pub captures: &'a CapturePlan,
    /// Its destination, (rows, dim).
    pub captured: &'a mut Buffer<f32>,
    /// (≥ rows) ‖h‖ of the stream after the operations.
    pub norms: &'a mut [f32],
    /// One for each operation of each row that has any.
    pub receipts: &'a mut [Receipt],
    /// (dim,).
    pub gain: &'a Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether x is the final norm, which can be captured too.
    pub is_final: bool,
    /// (≥ rows, dim).
    pub x: &'a mut Buffer<T>,
}

/// See the module.
pub fn residual_norm<T: Float>(device: &Device, p: ResidualNorm<'_, T>) {
    let Device::Cpu(cpu) = device;
    let (rows, dim) = (p.rows, p.gain.len());
    assert!(p.branch_rows <= rows, "branch rows");
    assert!(p.resid.len() >= rows * dim && p.x.len() >= rows * dim, "resid, x");
    assert!(p.branch.len() >= p.branch_rows * dim, "branch");
    assert!(p.at.slot.len() >= rows && p.at.position.len() >= rows, "rows");
    assert!(p.at.receipt.len() >= rows && p.norms.len() >= rows, "receipt, norms");
    let resid = Shared::new(p.resid.host_mut());
    let captured = Shared::new(p.captured.host_mut());
    let norms = Shared::new(p.norms);
    let receipts = Shared::new(p.receipts);
    let x = Shared::new(p.x.host_mut());
    let branch = &p.branch.host()[..p.branch_rows * dim];
    let (streams, branches) = (p.captures.tap(2 * p.site), p.captures.tap(2 * p.site + 1));
    let normed = if p.is_final { p.captures.tap(2 * p.site + 2) } else { &[] };
    let capture = |entries, row, values: &[f32]| {
        for to in destinations(entries, row) {
            // SAFETY: the planner gives each captured row its own destination.
            unsafe { captured.range(to * dim, dim) }.copy_from_slice(values);
        }
    };
    let work = |row: usize| {
        // SAFETY: each task has its own rows of resid, x and norms.
        let (h, x, norm) =
            unsafe { (resid.range(row * dim, dim), x.range(row * dim, dim), norms.range(row, 1)) };
        if let Some(branch) = branch.get(row * dim..(row + 1) * dim) {
            capture(branches, row, branch);
            cpu.isa().run(Add { h, scale: 1.0, v: branch });
        }
        if p.at.receipt[row] >= 0 {
            let (ordinal, ops) = p.hooks.at(p.at.slot[row] as usize, p.site);
            let first = p.at.receipt[row] as usize + ordinal;
            // SAFETY: each row has its own receipts.
            let receipts = unsafe { receipts.range(first, ops.len()) };
            for (op, receipt) in ops.iter().zip(receipts) {
                if (op.from..op.to).contains(&p.at.position[row]) {
                    let v = &p.hooks.vectors.host()[op.vector as usize * dim..][..dim];
                    *receipt = cpu.isa().run(Inject { h, v, op });
                }
            }
        }
        capture(streams, row, h);
        norm[0] = cpu.isa().run(Norm { h, gain: p.gain.host(), eps: p.eps, x });
        if !normed.is_empty() {
            for to in destinations(normed, row) {
                // SAFETY: as for `capture`.
                let out = unsafe { captured.range(to * dim, dim) };
                cpu.isa().run(Norm { h, gain: p.gain.host(), eps: p.eps, x: out });
            }
        }
    };
    cpu.parallel_chunks(rows, 8, |range| range.for_each(work));
}

/// h += scale · v.
struct Add<'a> {
    h: &'a mut [f32],
    scale: f32,
    v: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (h, &v) in self.h.iter_mut().zip(self.v) {
            *h = self.scale.mul_add(v, *h);
        }
    }
}

/// One operation on one row.
struct Inject<'a> {
    h: &'a mut [f32],
    v: &'a [f32],
    op: &'a HookOp,
}

impl Kernel for Inject<'_> {
    type Output = Receipt;
    #[inline(always)]
    fn run(self) -> Receipt {
        let before = sum_of_squares(self.h).sqrt();
        let scale = if self.op.relative { self.op.scale * before } else { self.op.scale };
        let mut change = 0.0f64;
        for (h, &v) in self.h.iter_mut().zip(self.v) {
            let after = scale.mul_add(v, *h);
            let delta = f64::from(after - *h);
            change += delta * delta;
            *h = after;
        }
        [before, change.sqrt() as f32]
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019, eq. 4); gives ‖h‖.
struct Norm<'a, T> {
    h: &'a [f32],
    gain: &'a [f32],
    eps: f32,
    x: &'a mut [T],
}

impl<T: Float> Kernel for Norm<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        let squares = sum_of_squares(self.h);
        // A stream too large for f32 must not pass for one of zeros.
        let mean = if squares.is_finite() { squares / self.h.len() as f32 } else { f32::NAN };
        let inverse = 1.0 / (mean + self.eps).sqrt();
        for ((x, &h), &gain) in self.x.iter_mut().zip(self.h).zip(self.gain) {
            *x = T::from_f32(h * inverse * gain);
        }
        squares.sqrt()
    }
}
