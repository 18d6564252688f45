//! The one place where the residual stream is written. For every row, in this order:
//!
//! ```text
//! branch captured                     h += branch        (rows that have a branch)
//! h += scale · v, for each operation of the row's sequence at this site whose window holds it
//! h captured; ‖h‖ stored              x = h / sqrt(mean(h²) + eps) · gain
//! ```

use super::{
    Float,
    activations::Activations,
    hooks::{CapturePlan, HookOp, Hooks, destinations},
    math::sum_of_squares,
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
    /// (dim,).
    pub gain: &'a Buffer<f32>,
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
    let (rows, dim) = (p.rows, p.gain.len());
    assert!(p.branch_rows <= rows, "branch rows");
    assert!(p.resid.len() >= rows * dim, "resid");
    assert!(p.x.rows() >= rows && p.x.dim() == dim, "x");
    assert!(p.branch.len() >= p.branch_rows * dim, "branch");
    assert!(p.at.len() >= rows && p.norms.len() >= p.norms_at + rows, "rows, norms");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, p),
        Device::Cuda(cuda) => return launch(cuda, p),
    }
    Ok(())
}

fn on_cpu<T: Float>(cpu: &Cpu, p: ResidualNorm<'_, T>) {
    let (rows, dim) = (p.rows, p.gain.len());
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
            capture(branches, row, branch);
            cpu.isa().run(Add { h, scale: 1.0, v: branch });
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

/// Mirror of `ResidualNormParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ResidualNormParams {
    resid: u64,
    branch: u64,
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
}
const _: () = assert!(size_of::<ResidualNormParams>() == 160, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/residual_norm.cu.
unsafe impl Params for ResidualNormParams {}

/// (widest stream, kernel, threads of a row): chosen by the width alone, as the order of sums is.
const KERNELS: [(usize, &str, u32); 6] = [
    (256, "residual_norm_32_2", 32),
    (1024, "residual_norm_32_8", 32),
    (2048, "residual_norm_128_4", 128),
    (4096, "residual_norm_256_4", 256),
    (8192, "residual_norm_512_4", 512),
    (MAX_KERNEL_DIM, "residual_norm_1024_4", 1024),
];
/// The widest stream that the kernels take.
pub const MAX_KERNEL_DIM: usize = 16_384;

fn launch<T: Float>(cuda: &Cuda, p: ResidualNorm<'_, T>) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels write bf16");
    let dim = p.gain.len();
    let params = ResidualNormParams {
        resid: p.resid.address_mut(),
        branch: p.branch.address(),
        gain: p.gain.address(),
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
    };
    let &(_, kernel, row_threads) =
        KERNELS.iter().find(|kernel| kernel.0 >= dim).expect("a kernel for every width");
    let block = row_threads.max(128);
    let rows_per_block = (block / row_threads) as usize;
    // SAFETY: every length was checked; the planner keeps slots, operations, receipts and
    // destinations inside their tables, which were sized for it.
    unsafe { cuda.launch(kernel, Launch::new(p.rows.div_ceil(rows_per_block), block), &params) }
}
