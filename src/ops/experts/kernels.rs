//! The kernels of the mixture, but for its products.

use super::Routed;
use crate::{
    device::{
        Buffer, Cuda,
        cuda::{Launch, Params},
    },
    error::Result,
    ops::{Float, matmul::Layout},
};

/// Mirror of `RouteExpertsParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RouteExpertsParams {
    logits: u64,
    chosen: u64,
    weights: u64,
    rows: i32,
    experts: i32,
    used: i32,
    normalise: i32,
}
const _: () = assert!(size_of::<RouteExpertsParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/experts.cu.
unsafe impl Params for RouteExpertsParams {}

/// Mirror of `PlaceExpertsParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct PlaceExpertsParams {
    chosen: u64,
    place: u64,
    from: u64,
    blocks: u64,
    pairs: i32,
    used: i32,
    experts: i32,
    tokens: i32,
    capacity: i32,
    unused: i32,
}
const _: () = assert!(size_of::<PlaceExpertsParams>() == 56, "the kernel asserts the same");
// SAFETY: likewise.
unsafe impl Params for PlaceExpertsParams {}

/// Mirror of `CombineExpertsParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct CombineExpertsParams {
    products: u64,
    place: u64,
    weights: u64,
    out: u64,
    rows: i32,
    used: i32,
    dim: i32,
    unused: i32,
}
const _: () = assert!(size_of::<CombineExpertsParams>() == 48, "the kernel asserts the same");
// SAFETY: likewise.
unsafe impl Params for CombineExpertsParams {}

/// Rows that a block of `route_experts` has, one a warp.
const ROUTE_ROWS: usize = 4;
/// Threads of a block of `place_experts`, and its warps.
const PLACE: (u32, usize) = (512, 16);

/// Chooses experts and weights of each row.
pub(super) fn route<T: Float>(
    cuda: &Cuda,
    rows: usize,
    normalise: bool,
    routed: &mut Routed<T>,
) -> Result<()> {
    let params = RouteExpertsParams {
        logits: routed.logits.address(),
        chosen: routed.chosen.address_mut(),
        weights: routed.weights.address_mut(),
        rows: rows as i32,
        experts: routed.sizes.experts as i32,
        used: routed.sizes.used as i32,
        normalise: i32::from(normalise),
    };
    let launch = Launch::new(rows.div_ceil(ROUTE_ROWS), 32 * ROUTE_ROWS as u32);
    // SAFETY: `Routed::new` took room for the rows, which `experts` checked.
    unsafe { cuda.launch("route_experts", launch, &params) }
}

/// Lays the rows' copies out by expert.
pub(super) fn place<T: Float>(
    cuda: &Cuda,
    rows: usize,
    layout: Layout,
    routed: &mut Routed<T>,
) -> Result<()> {
    let (experts, used) = (routed.sizes.experts, routed.sizes.used);
    assert!(routed.from.len() >= layout.rows, "experts: copies");
    assert!(routed.groups.blocks.len() > layout.rows / layout.tokens, "experts: blocks");
    let params = PlaceExpertsParams {
        chosen: routed.chosen.address(),
        place: routed.place.address_mut(),
        from: routed.from.address_mut(),
        blocks: routed.groups.blocks.address_mut(),
        pairs: (rows * used) as i32,
        used: used as i32,
        experts: experts as i32,
        tokens: layout.tokens as i32,
        capacity: layout.rows as i32,
        unused: 0,
    };
    let (block, warps) = PLACE;
    let shared = ((experts + warps) * size_of::<i32>()) as u32;
    let launch = Launch { grid: [experts as u32, 1, 1], block, shared };
    // SAFETY: the lengths were checked; `route_experts` has written ids below `experts`, and as many
    // pairs as these never take more than a layout's rows.
    unsafe { cuda.launch("place_experts", launch, &params) }
}

/// Sums the products of each row's experts.
pub(super) fn combine<T: Float>(
    cuda: &Cuda,
    rows: usize,
    routed: &Routed<T>,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let params = CombineExpertsParams {
        products: routed.products.address(),
        place: routed.place.address(),
        weights: routed.weights.address(),
        out: out.address_mut(),
        rows: rows as i32,
        used: routed.sizes.used as i32,
        dim: routed.sizes.dim as i32,
        unused: 0,
    };
    // SAFETY: `experts` checked `out`; `place_experts` has written places of the layout's rows, which
    // `matmul_each` checked that `products` has.
    unsafe { cuda.launch("combine_experts", Launch::new(rows, 128), &params) }
}
