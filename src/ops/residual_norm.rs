//! The one place where the residual stream is written. For every row, in this order:
//!
//! ```text
//! branch = c · branch                 (rows that have a branch; with a norm of it:
//!                                      branch / sqrt(mean(branch²) + eps) · its gain · c)
//! branch captured                     h += branch
//! h += scale · v, for each operation of the row's sequence at this site whose window holds it
//! h captured; ‖h‖ stored              x = h / sqrt(mean(h²) + eps) · gain      (no gain: x = h)
//! ```

use super::{
    Float,
    activations::Activations,
    hooks::{CapturePlan, HookOp, Hooks, destinations},
    math::{inverse_norm, sum_of_squares},
    matmul::Dtype,
    rows::{NONE, Rows},
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Receives what an injection did to a row: (‖h‖ before, ‖h after − h before‖).
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
    pub hooks: &'a Hooks,
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
    let branch = &p.branch.host()[..p.branch_rows * dim];
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
        if let Some(branch) = branch.get(row * dim..(row + 1) * dim) {
            let gain = p.branch_gain.map(Buffer::host);
            let factor =
                p.branch_scale * gain.map_or(1.0, |_| cpu.isa().run(Inverse(branch, p.eps)));
            for to in destinations(branches, row) {
                // SAFETY: as for `capture`.
                let out = unsafe { captured.range(to * dim, dim) };
                cpu.isa().run(Scaled { v: branch, factor, gain, out });
            }
            cpu.isa().run(Add { h, factor, v: branch, gain });
        }
        if first_receipts[row] >= 0 {
            let (ordinal, ops) = p.hooks.at(slots[row] as usize, p.site);
            let first = first_receipts[row] as usize + ordinal;
            // SAFETY: each row has its own receipts.
            let receipts = unsafe { receipts.range(first, ops.len()) };
            for (op, receipt) in ops.iter().zip(receipts) {
                if (op.from..op.to).contains(&positions[row]) {
                    let v = &p.hooks.vectors.host()[op.vector as usize * dim..][..dim];
                    *receipt = cpu.isa().run(Inject { h, v, op });
                }
            }
        }
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
        let factor = if self.op.relative == 0 { 1.0 } else { before };
        let scale = self.op.scale * factor;
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
    resid: u64,
    branch: u64,
    branch_gain: u64,
    gain: u64,
    x: u64,
    slot: u64,
    position: u64,
    receipt: u64,
    first: u64,
    ops: u64,
    vectors: u64,
    tap_first: u64,
    entries: u64,
    captured: u64,
    norms: u64,
    receipts: u64,
    rows: i32,
    branch_rows: i32,
    dim: i32,
    site: i32,
    sites: i32,
    ops_per_slot: i32,
    x_row_groups: i32,
    is_final: i32,
    has_captures: i32,
    eps: f32,
    branch_scale: f32,
    unused: i32,
}
const _: () = assert!(size_of::<ResidualNormParams>() == 176, "the kernel asserts the same");
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
        resid: p.resid.address_mut(),
        branch: p.branch.address(),
        branch_gain: p.branch_gain.map_or(0, Buffer::address),
        gain: p.gain.map_or(0, Buffer::address),
        x: p.x.address_mut(),
        slot: p.at.slot.address(),
        position: p.at.position.address(),
        receipt: p.at.receipt.address(),
        first: p.hooks.first.address(),
        ops: p.hooks.ops.address(),
        vectors: p.hooks.vectors.address(),
        tap_first: p.captures.first.address(),
        entries: p.captures.entries.address(),
        captured: p.captured.address_mut(),
        norms: p.norms.address_mut() + (4 * p.norms_at) as u64,
        receipts: p.receipts.address_mut(),
        rows: p.rows as i32,
        branch_rows: p.branch_rows as i32,
        dim: dim as i32,
        site: p.site as i32,
        sites: p.hooks.sites as i32,
        ops_per_slot: p.hooks.ops_per_slot as i32,
        x_row_groups: p.x.row_groups() as i32,
        is_final: i32::from(p.is_final),
        has_captures: i32::from(p.captures.any),
        eps: p.eps,
        branch_scale: p.branch_scale,
        unused: 0,
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
