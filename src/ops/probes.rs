//! Launches the kernels of kernels/probes.cu, each of which runs one family of instructions, so that
//! tests can hold every one against its definition on every device. For nothing else: what is here
//! may change at any time.

use half::bf16;

use super::math;
use crate::{
    device::{
        Buffer, Cuda, Device,
        cuda::{Launch, Params},
    },
    error::Result,
};

/// The widths of [`wgmma`].
pub const WGMMA_WIDTHS: [usize; 6] = [8, 16, 32, 64, 128, 256];
/// Rows of what [`warp`] writes.
pub const WARP_ROWS: usize = 17;

/// The crate's own eˣ.
pub fn exp(x: f32) -> f32 {
    math::exp(x)
}

/// The crate's own natural logarithm, of a normal positive number.
pub fn ln(x: f32) -> f32 {
    math::ln(x)
}

fn kernels(device: &Device) -> &Cuda {
    match device {
        Device::Cuda(cuda) => cuda,
        Device::Cpu(_) => panic!("the processor's own code has no probes"),
    }
}

/// Mirror of `ProbeMmaParams`, and of `ProbeWgmmaParams`, whose last fields have other names.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProductParams {
    a: u64,
    b: u64,
    c: u64,
    steps: u32,
    unused: u32,
}
const _: () = assert!(size_of::<ProductParams>() == 32, "the kernels assert the same");
// SAFETY: field for field the structs in kernels/probes.cu.
unsafe impl Params for ProductParams {}

/// c += a bᵀ by `mma_m16n8k16`; a: (16, 16 `steps`), b: (8, 16 `steps`), c: (16, 8).
///
/// # Errors
/// The device has failed.
pub fn mma(
    device: &Device,
    steps: usize,
    a: &Buffer<bf16>,
    b: &Buffer<bf16>,
    c: &mut Buffer<f32>,
) -> Result<()> {
    assert!(a.len() >= 256 * steps && b.len() >= 128 * steps && c.len() >= 128, "mma: buffers");
    let (steps, unused) = (steps as u32, 0);
    let params =
        ProductParams { a: a.address(), b: b.address(), c: c.address_mut(), steps, unused };
    // SAFETY: every length was checked.
    unsafe { kernels(device).launch("probe_mma", Launch::new(1, 32), &params) }
}

/// c += a bᵀ by `wgmma_m64k16` of one of [`WGMMA_WIDTHS`]; a: two halves of (`k_tiles`, 64, 64), b:
/// (`k_tiles`, width, 64), both swizzled as weights are, c: (128, width). A GPU below compute
/// capability 9.0 does nothing.
///
/// # Errors
/// The device has failed.
pub fn wgmma(
    device: &Device,
    (width, k_tiles): (usize, usize),
    a: &Buffer<bf16>,
    b: &Buffer<bf16>,
    c: &mut Buffer<f32>,
) -> Result<()> {
    let kernel = match width {
        8 => "probe_wgmma_8",
        16 => "probe_wgmma_16",
        32 => "probe_wgmma_32",
        64 => "probe_wgmma_64",
        128 => "probe_wgmma_128",
        256 => "probe_wgmma_256",
        _ => panic!("no wgmma of width {width}"),
    };
    assert!(a.len() >= 2 * k_tiles * 4096 && b.len() >= k_tiles * width * 64, "wgmma: operands");
    assert!(c.len() >= 128 * width, "wgmma: c");
    let (steps, unused) = (k_tiles as u32, 0);
    let params =
        ProductParams { a: a.address(), b: b.address(), c: c.address_mut(), steps, unused };
    let shared = 2 * (16_384 + 128 * width as u32) + 32;
    let launch = Launch { grid: [1; 3], block: 384, shared };
    // SAFETY: every length was checked.
    unsafe { kernels(device).launch(kernel, launch, &params) }
}

/// Mirror of `ProbeLdmatrixParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProbeLdmatrixParams {
    input: u64,
    out: u64,
}
const _: () = assert!(size_of::<ProbeLdmatrixParams>() == 16, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/probes.cu.
unsafe impl Params for ProbeLdmatrixParams {}

/// The four kinds of ldmatrix; input: (4, 8, 8) of 16 bits, out: (4 kinds, 32 lanes, 4 registers).
///
/// # Errors
/// The device has failed.
pub fn ldmatrix(device: &Device, input: &Buffer<u32>, out: &mut Buffer<u32>) -> Result<()> {
    assert!(input.len() >= 128 && out.len() >= 512, "ldmatrix: buffers");
    let params = ProbeLdmatrixParams { input: input.address(), out: out.address_mut() };
    let launch = Launch { grid: [1; 3], block: 32, shared: 512 };
    // SAFETY: both lengths were checked.
    unsafe { kernels(device).launch("probe_ldmatrix", launch, &params) }
}

/// Mirror of `ProbeCpAsyncParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProbeCpAsyncParams {
    input: u64,
    out: u64,
    tiles: u32,
    valid: u32,
}
const _: () = assert!(size_of::<ProbeCpAsyncParams>() == 24, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/probes.cu.
unsafe impl Params for ProbeCpAsyncParams {}

/// The first `valid` of 128 · `tiles` chunks of 16 bytes by `cp_async_16`, zeros for the others.
///
/// # Errors
/// The device has failed.
pub fn cp_async(
    device: &Device,
    (tiles, valid): (usize, usize),
    input: &Buffer<u32>,
    out: &mut Buffer<u32>,
) -> Result<()> {
    assert!(input.len() >= 4 * valid && out.len() >= 512 * tiles, "cp_async: buffers");
    let params = ProbeCpAsyncParams {
        input: input.address(),
        out: out.address_mut(),
        tiles: tiles as u32,
        valid: valid as u32,
    };
    let launch = Launch { grid: [1; 3], block: 128, shared: 6144 };
    // SAFETY: both lengths were checked.
    unsafe { kernels(device).launch("probe_cp_async", launch, &params) }
}

/// Mirror of `ProbeMathParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProbeMathParams {
    x: u64,
    exp: u64,
    ln: u64,
    rounded: u64,
    count: u32,
    unused: u32,
}
const _: () = assert!(size_of::<ProbeMathParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/probes.cu.
unsafe impl Params for ProbeMathParams {}

/// eˣ, ln x, and the bf16 pair (x, -x) of each x.
///
/// # Errors
/// The device has failed.
pub fn math(
    device: &Device,
    x: &Buffer<f32>,
    exp: &mut Buffer<f32>,
    ln: &mut Buffer<f32>,
    rounded: &mut Buffer<u32>,
) -> Result<()> {
    let count = x.len();
    assert!([exp.len(), ln.len(), rounded.len()].iter().all(|&len| len >= count), "math: buffers");
    let params = ProbeMathParams {
        x: x.address(),
        exp: exp.address_mut(),
        ln: ln.address_mut(),
        rounded: rounded.address_mut(),
        count: count as u32,
        unused: 0,
    };
    // SAFETY: every length was checked.
    unsafe { kernels(device).launch("probe_math", Launch::new(4, 128), &params) }
}

/// Mirror of `ProbeWarpParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProbeWarpParams {
    x: u64,
    out: u64,
    sum: u64,
    max: u64,
}
const _: () = assert!(size_of::<ProbeWarpParams>() == 32, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/probes.cu.
unsafe impl Params for ProbeWarpParams {}

/// Warp and block operations; x: (128,), out: ([`WARP_ROWS`], 128), sum: (1,), max: one number of 64
/// bits, the low half first.
///
/// # Errors
/// The device has failed.
pub fn warp(
    device: &Device,
    x: &Buffer<u32>,
    out: &mut Buffer<u32>,
    sum: &mut Buffer<u32>,
    max: &mut Buffer<u32>,
) -> Result<()> {
    assert!(x.len() >= 128 && out.len() >= 128 * WARP_ROWS, "warp: buffers");
    assert!(!sum.is_empty() && max.len() >= 2, "warp: sum and maximum");
    let params = ProbeWarpParams {
        x: x.address(),
        out: out.address_mut(),
        sum: sum.address_mut(),
        max: max.address_mut(),
    };
    // SAFETY: every length was checked.
    unsafe { kernels(device).launch("probe_warp", Launch::new(1, 128), &params) }
}
