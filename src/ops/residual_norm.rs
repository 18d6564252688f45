//! The one place where the residual stream is written. For every row, in this order:
//!
//! ```text
//! branch = c · branch                 (rows that have a branch; with a norm of it:
//!                                      branch / sqrt(mean(branch²) + eps) · its gain · c)
//! operations on the branch            branch captured      h += branch
//! operations on h                     h captured; ‖h‖ stored
//! x = h / sqrt(mean(h²) + eps) · gain                      (no gain: x = h)
//! ```
//!
//! Operations ([`HookOp`]) are those of the row's sequence whose window holds the row, in their order.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{
    Float,
    activations::Activations,
    hooks::{CapturePlan, GATES, HookOp, HookTables, Hooks, destinations},
    math::{LANES, dot, inverse_norm, sum_lanes, sum_of_squares},
    matmul::Dtype,
    rows::{NONE, Rows},
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Isa, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// What an operation did to a row: (‖h‖² before, ‖h after − h before‖²); of a gate: its value, and 1
/// where its condition was met, else 0.
pub type Receipt = [f32; 2];

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
    /// (dim,), of the branch's own norm, where it has one.
    pub branch_gain: Option<&'a Buffer<f32>>,
    /// What the branch is multiplied by at last: c.
    pub branch_scale: f32,
    /// What acts on sequences.
    pub hooks: &'a mut Hooks,
    /// (≥ rows,): the conditions that a row has met so far, a bit each.
    pub met: &'a mut Buffer<u32>,
    /// Which rows these are.
    pub at: &'a Rows,
    /// The site, see [`super::hooks::site_count`].
    pub site: usize,
    /// What is copied out in this step.
    pub captures: &'a CapturePlan,
    /// Its destination, (rows, dim).
    pub captured: &'a mut Buffer<f32>,
    /// (sites, rows): ‖h‖ of the stream after the operations, here at `norms_at..norms_at + rows`.
    pub norms: &'a mut Buffer<f32>,
    /// Where this site's are.
    pub norms_at: usize,
    /// One for each operation of each row that has any.
    pub receipts: &'a mut Buffer<Receipt>,
    /// (dim,); absent: x is the stream itself.
    pub gain: Option<&'a Buffer<f32>>,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether x is the final norm, which can be captured too.
    pub is_final: bool,
    /// (≥ rows, dim).
    pub x: &'a mut Activations<T>,
}

/// See the module.
///
/// # Errors
/// The device has failed.
pub fn residual_norm<T: Float>(device: &Device, p: ResidualNorm<'_, T>) -> Result<()> {
    let (rows, dim) = (p.rows, p.x.dim());
    assert!(p.branch_rows <= rows, "branch rows");
    let gains = [p.gain, p.branch_gain];
    assert!(gains.into_iter().flatten().all(|gain| gain.len() == dim), "gains");
    let has_norm = p.gain.is_some() || p.branch_gain.is_some() || p.branch_rows == 0;
    assert!(has_norm, "a norm of the stream or of what is added to it");
    assert!(p.resid.len() >= rows * dim, "resid");
    assert!(p.x.rows() >= rows, "x");
    assert!(p.branch.len() >= p.branch_rows * dim, "branch");
    assert!(p.at.len() >= rows && p.norms.len() >= p.norms_at + rows, "rows, norms");
    assert!(p.met.len() >= rows, "conditions");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, p),
        Device::Cuda(cuda) => return launch(cuda, p),
    }
    Ok(())
}

fn on_cpu<T: Float>(cpu: &Cpu, p: ResidualNorm<'_, T>) {
    let (rows, dim) = (p.rows, p.x.dim());
    let (slots, positions) = (p.at.slot.host(), p.at.position.host());
    let first_receipts = p.at.receipt.host();
    let resid = Shared::new(p.resid.host_mut());
    let captured = Shared::new(p.captured.host_mut());
    let norms = Shared::new(&mut p.norms.host_mut()[p.norms_at..][..rows]);
    let receipts = Shared::new(p.receipts.host_mut());
    let x = Shared::new(p.x.host_mut());
    let met = Shared::new(p.met.host_mut());
    let branch = &p.branch.host()[..p.branch_rows * dim];
    let Hooks { table, latched, vectors } = p.hooks;
    let (latched, vectors) = (atomics(latched.host_mut()), vectors.host());
    let (streams, branches) = (p.captures.tap(2 * p.site), p.captures.tap(2 * p.site + 1));
    let normed = if p.is_final { p.captures.tap(2 * p.site + 2) } else { &[] };
    let capture = |entries: &[[u32; 2]], row, values: &[f32]| {
        for to in destinations(entries, row) {
            // SAFETY: the planner gives each captured row its own destination.
            unsafe { captured.range(to * dim, dim) }.copy_from_slice(values);
        }
    };
    let work = |row: usize| {
        if slots[row] == NONE {
            return;
        }
        // SAFETY: each task has its own rows of resid, x and norms.
        let (h, x, norm) =
            unsafe { (resid.range(row * dim, dim), x.range(row * dim, dim), norms.range(row, 1)) };
        let slot = slots[row] as usize;
        let operate = |tap: usize, h: &mut [f32]| {
            if first_receipts[row] < 0 {
                return;
            }
            let (ordinal, ops) = table.at(slot, tap);
            let first = first_receipts[row] as usize + ordinal;
            // SAFETY: each row has its own receipts and conditions.
            let (receipts, met) = unsafe { (receipts.range(first, ops.len()), met.range(row, 1)) };
            let conditions = Conditions { met: &mut met[0], latched: &latched[slot * GATES..] };
            let position = positions[row];
            Operate { h, stride: dim, vectors, position, ops, receipts, conditions }.run(cpu.isa());
        };
        if let Some(branch) = branch.get(row * dim..(row + 1) * dim) {
            let gain = p.branch_gain.map(Buffer::host);
            let factor =
                p.branch_scale * gain.map_or(1.0, |_| cpu.isa().run(Inverse(branch, p.eps)));
            if first_receipts[row] >= 0 && !table.at(slot, 2 * p.site + 1).1.is_empty() {
                let mut changed = vec![0.0; dim];
                cpu.isa().run(Scaled { v: branch, factor, gain, out: &mut changed });
                operate(2 * p.site + 1, &mut changed);
                capture(branches, row, &changed);
                cpu.isa().run(Add { h, factor: 1.0, v: &changed, gain: None });
            } else {
                for to in destinations(branches, row) {
                    // SAFETY: as for `capture`.
                    let out = unsafe { captured.range(to * dim, dim) };
                    cpu.isa().run(Scaled { v: branch, factor, gain, out });
                }
                cpu.isa().run(Add { h, factor, v: branch, gain });
            }
        }
        operate(2 * p.site, h);
        capture(streams, row, h);
        let gain = p.gain.map(Buffer::host);
        norm[0] = cpu.isa().run(Norm { h, gain, eps: p.eps, x });
        if !normed.is_empty() {
            for to in destinations(normed, row) {
                // SAFETY: as for `capture`.
                let out = unsafe { captured.range(to * dim, dim) };
                cpu.isa().run(Norm { h, gain, eps: p.eps, x: out });
            }
        }
    };
    cpu.parallel_chunks(rows, 8, |range| range.for_each(work));
}

/// The same numbers, for several threads.
pub(super) fn atomics(numbers: &mut [u32]) -> &[AtomicU32] {
    let (at, len) = (numbers.as_mut_ptr(), numbers.len());
    // SAFETY: an `AtomicU32` is as large and as aligned as a `u32`, and nobody else has these.
    unsafe { std::slice::from_raw_parts(at.cast(), len) }
}

/// h += factor · v, times a gain where there is one.
struct Add<'a> {
    h: &'a mut [f32],
    factor: f32,
    v: &'a [f32],
    gain: Option<&'a [f32]>,
}

impl Kernel for Add<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let rows = self.h.iter_mut().zip(self.v);
        let Some(gain) = self.gain else {
            for (h, &v) in rows {
                *h += v * self.factor;
            }
            return;
        };
        for ((h, &v), &gain) in rows.zip(gain) {
            *h += v * self.factor * gain;
        }
    }
}

/// What [`Add`] adds.
struct Scaled<'a> {
    v: &'a [f32],
    factor: f32,
    gain: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Scaled<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        self.out.fill(0.0);
        Add { h: self.out, factor: self.factor, v: self.v, gain: self.gain }.run();
    }
}

/// 1 / sqrt(mean(v²) + eps).
struct Inverse<'a>(&'a [f32], f32);

impl Kernel for Inverse<'_> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        inverse_norm(sum_of_squares(self.0), self.0.len(), self.1)
    }
}

/// What is known of a row's conditions.
pub(super) struct Conditions<'a> {
    /// Those it has met, a bit each.
    pub met: &'a mut u32,
    /// Where its sequence first met each.
    pub latched: &'a [AtomicU32],
}

impl Conditions<'_> {
    fn holds(&self, op: &HookOp, position: u32) -> bool {
        match op.gate {
            NONE => true,
            gate if op.has(HookOp::LATCHED) => {
                self.latched[gate as usize].load(Ordering::Relaxed) <= position
            }
            gate => *self.met >> gate & 1 == 1,
        }
    }

    fn set(&mut self, gate: u32, is_met: bool, position: u32) {
        *self.met = *self.met & !(1 << gate) | u32::from(is_met) << gate;
        if is_met {
            self.latched[gate as usize].fetch_min(position, Ordering::Relaxed);
        }
    }
}

/// The operations of a tap on a row's values.
pub(super) struct Operate<'a> {
    pub h: &'a mut [f32],
    /// The bank, and how long its rows are: at least as h.
    pub vectors: &'a [f32],
    pub stride: usize,
    pub position: u32,
    pub ops: &'a [HookOp],
    pub receipts: &'a mut [Receipt],
    pub conditions: Conditions<'a>,
}

impl Operate<'_> {
    pub fn run(mut self, isa: Isa) {
        for (op, receipt) in self.ops.iter().zip(self.receipts) {
            let (is_gate, is_seen) = (op.kind == HookOp::GATE, op.holds(self.position));
            if !is_seen {
                // What the row that stood here before has met is nothing to this one.
                if is_gate {
                    self.conditions.set(op.gate, false, self.position);
                }
                continue;
            }
            let at = op.vector_at(self.position) * self.stride;
            let v = &self.vectors[at..][..self.h.len()];
            if is_gate {
                let value = isa.run(Value { h: self.h, v, op });
                let is_met = op.low < value && value < op.high;
                self.conditions.set(op.gate, is_met, self.position);
                *receipt = [value, f32::from(u8::from(is_met))];
            } else if self.conditions.holds(op, self.position) {
                *receipt = isa.run(Change { h: self.h, v, op });
            }
        }
    }
}

/// What a gate compares: the coordinate along v, or its share of the row.
struct Value<'a> {
    h: &'a [f32],
    v: &'a [f32],
    op: &'a HookOp,
}

impl Kernel for Value<'_> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        let c = self.op.unit * dot(self.h, self.v);
        if self.op.has(HookOp::RELATIVE) { c / sum_of_squares(self.h).sqrt() } else { c }
    }
}

/// ‖h'‖² / ‖h‖² from which on a norm is kept: what is smaller is rounding.
const SMALLEST: f32 = 1.0 / 4_294_967_296.0;

/// One operation on one row.
struct Change<'a> {
    h: &'a mut [f32],
    v: &'a [f32],
    op: &'a HookOp,
}

impl Kernel for Change<'_> {
    type Output = Receipt;
    #[inline(always)]
    fn run(self) -> Receipt {
        let Self { h, v, op } = self;
        let before = sum_of_squares(h);
        let size = if op.has(HookOp::RELATIVE) { before.sqrt() } else { 1.0 };
        let by = match op.kind {
            HookOp::COORDINATE => {
                let c = op.unit * dot(h, v);
                (c.max(op.low * size).min(op.high * size) - c) * op.unit
            }
            _ => op.scale * size,
        };
        let of = |h: f32, v: f32| match op.kind {
            HookOp::REPLACE => by * v,
            HookOp::SCALE => by * h,
            _ => by.mul_add(v, h),
        };
        let mut factor = 1.0;
        if op.has(HookOp::KEEP_NORM) {
            let mut lanes = [0.0f32; LANES];
            for (h, v) in h.chunks(LANES).zip(v.chunks(LANES)) {
                for (lane, (&h, &v)) in lanes.iter_mut().zip(h.iter().zip(v)) {
                    let after = of(h, v);
                    *lane = after.mul_add(after, *lane);
                }
            }
            let after = sum_lanes(lanes);
            factor = if after > before * SMALLEST { (before / after).sqrt() } else { 1.0 };
        }
        let mut change = 0.0f64;
        for (h, &v) in h.iter_mut().zip(v) {
            let after = factor * of(*h, v);
            let delta = f64::from(after - *h);
            change += delta * delta;
            *h = after;
        }
        [before, change as f32]
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019, eq. 4), or without a gain h itself; gives ‖h‖.
struct Norm<'a, T> {
    h: &'a [f32],
    gain: Option<&'a [f32]>,
    eps: f32,
    x: &'a mut [T],
}

impl<T: Float> Kernel for Norm<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        let squares = sum_of_squares(self.h);
        let rows = self.x.iter_mut().zip(self.h);
        if let Some(gain) = self.gain {
            let inverse = inverse_norm(squares, self.h.len(), self.eps);
            for ((x, &h), &gain) in rows.zip(gain) {
                *x = T::from_f32(h * inverse * gain);
            }
        } else {
            for (x, &h) in rows {
                *x = T::from_f32(h);
            }
        }
        squares.sqrt()
    }
}

/// Mirror of `ResidualNormParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ResidualNormParams {
    tables: HookTables,
    resid: u64,
    branch: u64,
    branch_gain: u64,
    gain: u64,
    x: u64,
    norms: u64,
    rows: i32,
    branch_rows: i32,
    dim: i32,
    site: i32,
    x_row_groups: i32,
    is_final: i32,
    eps: f32,
    branch_scale: f32,
}
const _: () = assert!(size_of::<ResidualNormParams>() == 192, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/residual_norm.cu.
unsafe impl Params for ResidualNormParams {}

/// (widest stream, kernels, threads of a row): by the width alone, as the order of sums is. The
/// kernels normalise x, x and the branch, or only the branch.
const KERNELS: [(usize, [&str; 3], u32); 6] = [
    (256, ["residual_norm_32_2", "residual_norm_around_32_2", "residual_norm_after_32_2"], 32),
    (1024, ["residual_norm_32_8", "residual_norm_around_32_8", "residual_norm_after_32_8"], 32),
    (2048, ["residual_norm_128_4", "residual_norm_around_128_4", "residual_norm_after_128_4"], 128),
    (4096, ["residual_norm_256_4", "residual_norm_around_256_4", "residual_norm_after_256_4"], 256),
    (8192, ["residual_norm_512_4", "residual_norm_around_512_4", "residual_norm_after_512_4"], 512),
    (
        MAX_KERNEL_DIM,
        ["residual_norm_1024_4", "residual_norm_around_1024_4", "residual_norm_after_1024_4"],
        1024,
    ),
];
/// The widest stream that the kernels take.
pub const MAX_KERNEL_DIM: usize = 16_384;

fn launch<T: Float>(cuda: &Cuda, p: ResidualNorm<'_, T>) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels write bf16");
    let dim = p.x.dim();
    let params = ResidualNormParams {
        tables: HookTables::new(p.at, p.hooks, (p.captures, p.captured), (p.receipts, p.met)),
        resid: p.resid.address_mut(),
        branch: p.branch.address(),
        branch_gain: p.branch_gain.map_or(0, Buffer::address),
        gain: p.gain.map_or(0, Buffer::address),
        x: p.x.address_mut(),
        norms: p.norms.address_mut() + (4 * p.norms_at) as u64,
        rows: p.rows as i32,
        branch_rows: p.branch_rows as i32,
        dim: dim as i32,
        site: p.site as i32,
        x_row_groups: p.x.row_groups() as i32,
        is_final: i32::from(p.is_final),
        eps: p.eps,
        branch_scale: p.branch_scale,
    };
    let &(_, [before, around, after], row_threads) =
        KERNELS.iter().find(|kernel| kernel.0 >= dim).expect("a kernel for every width");
    let block = row_threads.max(128);
    let rows_per_block = (block / row_threads) as usize;
    let kernel = match (p.gain, p.branch_gain) {
        (None, _) => after,
        (Some(_), Some(_)) => around,
        (Some(_), None) => before,
    };
    // SAFETY: every length was checked; the planner keeps slots, operations, receipts and
    // destinations inside their tables, which were sized for it.
    unsafe { cuda.launch(kernel, Launch::new(p.rows.div_ceil(rows_per_block), block), &params) }
}
