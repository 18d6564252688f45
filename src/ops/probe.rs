//! What chosen rows of the stream hold of given directions, without copying the rows out:
//!
//! ```text
//! out[c, i]      = Σ resid[rows[c], d] · vectors[i, d]     dot product with probe vector i
//! out[c, probes] = √ Σ resid[rows[c], d]²                  the row's norm
//! ```
//!
//! Sums are in f32, in an order that depends on dim alone; nothing is written for a row [`NONE`].

use super::{
    math::{dot, sum_of_squares},
    rows::NONE,
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Operands of [`probe`].
pub struct Probe<'a> {
    /// How many of `rows` are probed.
    pub count: usize,
    /// (≥ count,), rows of `resid`; [`NONE`]: nothing is written.
    pub rows: &'a Buffer<u32>,
    /// (rows, dim).
    pub resid: &'a Buffer<f32>,
    /// (≥ probes, dim).
    pub vectors: &'a Buffer<f32>,
    /// How many of `vectors` a row is multiplied with; may be 0.
    pub probes: usize,
    /// Width of the stream; the kernels take multiples of 4.
    pub dim: usize,
    /// (≥ count, probes + 1): the dot products, then the norm.
    pub out: &'a mut Buffer<f32>,
}

/// See the module.
///
/// # Errors
/// The device has failed.
pub fn probe(device: &Device, p: Probe<'_>) -> Result<()> {
    assert!(p.rows.len() >= p.count && p.out.len() >= p.count * (p.probes + 1), "probe: rows, out");
    assert!(p.vectors.len() >= p.probes * p.dim, "probe: vectors");
    match device {
        Device::Cpu(cpu) => {
            on_cpu(cpu, p);
            Ok(())
        }
        Device::Cuda(cuda) => launch(cuda, p),
    }
}

fn on_cpu(cpu: &Cpu, p: Probe<'_>) {
    let width = p.probes + 1;
    let (rows, resid, vectors) = (p.rows.host(), p.resid.host(), p.vectors.host());
    let out = Shared::new(p.out.host_mut());
    cpu.parallel_chunks(p.count * width, 64, |items| {
        // SAFETY: each task has its own range of out.
        let out = unsafe { out.range(items.start, items.len()) };
        for (item, out) in items.zip(out) {
            let (row, i) = (rows[item / width], item % width);
            if row == NONE {
                continue;
            }
            let row = &resid[row as usize * p.dim..][..p.dim];
            *out = match i < p.probes {
                true => cpu.isa().run(Dot { a: row, b: &vectors[i * p.dim..][..p.dim] }),
                false => cpu.isa().run(Norm(row)),
            };
        }
    });
}

/// Σ a · b, of equal lengths.
struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl Kernel for Dot<'_> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        dot(self.a, self.b)
    }
}

/// ‖row‖.
struct Norm<'a>(&'a [f32]);

impl Kernel for Norm<'_> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        sum_of_squares(self.0).sqrt()
    }
}

/// Mirror of `ProbeParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProbeParams {
    resid: u64,
    vectors: u64,
    rows: u64,
    out: u64,
    dim: i32,
    probes: i32,
}
const _: () = assert!(size_of::<ProbeParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/probe.cu.
unsafe impl Params for ProbeParams {}

fn launch(cuda: &Cuda, p: Probe<'_>) -> Result<()> {
    assert!(p.dim.is_multiple_of(4), "probe: the kernel reads four elements at a time");
    let params = ProbeParams {
        resid: p.resid.address(),
        vectors: p.vectors.address(),
        rows: p.rows.address(),
        out: p.out.address_mut(),
        dim: p.dim as i32,
        probes: p.probes as i32,
    };
    // A warp takes a probe at a time.
    let block = 32 * (p.probes + 1).min(8) as u32;
    // SAFETY: every length was checked; the planner chooses rows of the step.
    unsafe { cuda.launch("probe", Launch::new(p.count, block), &params) }
}
