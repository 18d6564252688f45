//! What chosen rows hold of given directions, without copying the rows out. Of each item:
//!
//! ```text
//! out[item.out + i]           = Σ rows[item.row, d] · vectors[item.first + i, d]     i < item.probes
//! out[item.out + item.probes] = √ Σ rows[item.row, d]²                               the row's norm
//! ```
//!
//! Sums are in f32, in an order that depends on dim alone; nothing is written for a row [`NONE`].

use super::{
    math::{dot, sum_of_squares},
    rows::NONE,
};
use crate::{
    device::{
        Buffer, Cuda, Device, Element,
        cpu::{Cpu, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// A row, what it is multiplied with, and where the results go. The kernel reads it as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ProbeItem {
    /// Which of the rows; [`NONE`]: nothing is written.
    pub row: u32,
    /// The first of its vectors.
    pub first: u32,
    /// How many they are; may be 0.
    pub probes: u32,
    /// The first of its results: `probes` dot products, then the norm.
    pub out: u32,
}
// SAFETY: plain numbers without padding.
unsafe impl Element for ProbeItem {}

/// Operands of [`probe`].
pub struct Probe<'a> {
    /// How many of `items` there are.
    pub count: usize,
    /// (≥ count,), each with results of its own.
    pub items: &'a Buffer<ProbeItem>,
    /// The most probes of an item.
    pub most: usize,
    /// (rows, dim).
    pub rows: &'a Buffer<f32>,
    /// (vectors, dim).
    pub vectors: &'a Buffer<f32>,
    /// Elements of a row; the kernels take multiples of 4.
    pub dim: usize,
    /// Where the results go.
    pub out: &'a mut Buffer<f32>,
}

/// See the module.
///
/// # Errors
/// The device has failed.
pub fn probe(device: &Device, p: Probe<'_>) -> Result<()> {
    assert!(p.items.len() >= p.count, "probe: items");
    match device {
        Device::Cpu(cpu) => {
            on_cpu(cpu, p);
            Ok(())
        }
        Device::Cuda(cuda) => launch(cuda, p),
    }
}

fn on_cpu(cpu: &Cpu, p: Probe<'_>) {
    let (rows, vectors) = (p.rows.host(), p.vectors.host());
    let out = Shared::new(p.out.host_mut());
    cpu.parallel(p.count, |at| {
        let ProbeItem { row, first, probes, out: to } = p.items.host()[at];
        if row == NONE {
            return;
        }
        let probes = probes as usize;
        // SAFETY: each item has results of its own.
        let out = unsafe { out.range(to as usize, probes + 1) };
        let row = &rows[row as usize * p.dim..][..p.dim];
        let vectors = &vectors[first as usize * p.dim..][..probes * p.dim];
        for (out, vector) in out.iter_mut().zip(vectors.chunks_exact(p.dim)) {
            *out = cpu.isa().run(Dot { a: row, b: vector });
        }
        out[probes] = cpu.isa().run(Norm(row));
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
    rows: u64,
    vectors: u64,
    items: u64,
    out: u64,
    dim: i32,
    unused: i32,
}
const _: () = assert!(size_of::<ProbeParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/probe.cu.
unsafe impl Params for ProbeParams {}

fn launch(cuda: &Cuda, p: Probe<'_>) -> Result<()> {
    assert!(p.dim.is_multiple_of(4), "probe: the kernel reads four elements at a time");
    let params = ProbeParams {
        rows: p.rows.address(),
        vectors: p.vectors.address(),
        items: p.items.address(),
        out: p.out.address_mut(),
        dim: p.dim as i32,
        unused: 0,
    };
    // A warp takes a probe at a time.
    let block = 32 * (p.most + 1).min(8) as u32;
    // SAFETY: the number of items was checked; the planner keeps rows, vectors and results inside
    // their buffers, which were sized for it.
    unsafe { cuda.launch("probe", Launch::new(p.count, block), &params) }
}
