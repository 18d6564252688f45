//! The kernels of the product: which is launched for how many rows.

use half::bf16;

use super::{Activation, Dtype, Groups, TILE, Weight, WeightSet};
use crate::{
    device::{
        Buffer, Cuda,
        cuda::{Launch, MatrixPath, Params},
    },
    error::Result,
    ops::{
        Float,
        activations::{ATOM, Activations},
    },
};

/// Mirror of `FillWeightParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct FillWeightParams {
    weight: u64,
    seed: u64,
    n: i32,
    k: i32,
    k_tiles: i32,
    n_tiles: i32,
    scale: f32,
    padding: i32,
}
const _: () = assert!(size_of::<FillWeightParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/fill_weight.cu.
unsafe impl Params for FillWeightParams {}

/// Writes values that look random to the tiles of a weight.
pub(super) fn fill(
    cuda: &Cuda,
    (n, k): (usize, usize),
    seed: u64,
    deviation: f32,
    tiles: &mut Buffer<bf16>,
) -> Result<()> {
    let (n_tiles, k_tiles) = (n.div_ceil(ATOM), k.div_ceil(ATOM));
    assert_eq!(tiles.len(), n_tiles * k_tiles * TILE, "tiles");
    let params = FillWeightParams {
        weight: tiles.address_mut(),
        seed,
        n: n as i32,
        k: k as i32,
        k_tiles: k_tiles as i32,
        n_tiles: n_tiles as i32,
        scale: deviation,
        padding: 0,
    };
    let blocks = (n_tiles * k_tiles * 2).min(8 * cuda.multiprocessors());
    // SAFETY: the length was checked.
    unsafe { cuda.launch("fill_weight", Launch::new(blocks, 256), &params) }
}

/// Mirror of `MatmulParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MatmulParams {
    weight: u64,
    x: u64,
    bias: u64,
    out: u64,
    weights: u64,
    blocks: u64,
    rows: i32,
    n: i32,
    k_tiles: i32,
    row_groups: i32,
    out_row_groups: i32,
    activation: i32,
}
const _: () = assert!(size_of::<MatmulParams>() == 72, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/matmul_epilogue.cuh.
unsafe impl Params for MatmulParams {}

/// A kernel of matmul: its tile of tokens and features, and what a block takes.
pub(super) struct Shape {
    pub(super) tokens: usize,
    features: usize,
    threads: u32,
    shared: u32,
    /// Blocks that a multiprocessor holds.
    resident: usize,
    matmul: &'static str,
    gated: &'static str,
}

macro_rules! shape {
    ($path:literal, $features:literal, $tokens:literal, $threads:literal, $shared:literal, $resident:literal) => {
        Shape {
            tokens: $tokens,
            features: $features,
            threads: $threads,
            shared: $shared,
            resident: $resident,
            matmul: concat!("matmul_", $path, "_", $features, "x", $tokens),
            gated: concat!("gated_", $path, "_", $features, "x", $tokens),
        }
    };
}

/// As in the table of kernels/matmul.cu.
const WGMMA: [Shape; 8] = [
    shape!("wgmma", 64, 8, 160, 111_296, 2),
    shape!("wgmma", 64, 16, 160, 113_840, 2),
    shape!("wgmma", 64, 32, 160, 112_784, 2),
    shape!("wgmma", 64, 64, 160, 102_496, 2),
    shape!("wgmma", 64, 128, 160, 204_928, 1),
    shape!("wgmma", 128, 128, 288, 213_088, 1),
    shape!("wgmma", 192, 128, 416, 229_456, 1),
    shape!("wgmma", 128, 256, 288, 229_440, 1),
];
const MMA: [Shape; 3] = [
    shape!("mma", 64, 16, 128, 81_920, 2),
    shape!("mma", 64, 64, 128, 65_536, 2),
    shape!("mma", 128, 128, 256, 98_304, 1),
];

/// The kernel for products of `rows` rows a weight, (n, k), in as many blocks of tokens as `blocks`
/// says. Few rows: the narrowest tile that holds them, since weights are then all that is read. Many:
/// the tile whose last wave of blocks wastes least. All give a row the same bits.
pub(super) fn shape(
    cuda: &Cuda,
    rows: usize,
    (n, k): (usize, usize),
    blocks: impl Fn(usize) -> usize,
) -> &'static Shape {
    let shapes: &[Shape] = if cuda.path() == MatrixPath::Wgmma { &WGMMA } else { &MMA };
    let narrow = shapes.iter().find(|shape| shape.tokens >= rows && shape.tokens <= 64);
    narrow.unwrap_or_else(|| {
        let wide = shapes.iter().filter(|shape| shape.tokens >= 64);
        let cycles = |shape: &&Shape| shape.cycles(cuda, blocks(shape.tokens), (n, k));
        wide.min_by_key(cycles).expect("a wide tile")
    })
}

/// Cycles of a block beside its products: its start, its last stores.
const BLOCK_CYCLES: usize = 4000;
/// Bytes a cycle that a multiprocessor gets from the L2 cache.
const L2_BYTES: usize = 40;

impl Shape {
    /// An estimate of the time: waves of blocks, each bound by its products or by what it loads.
    fn cycles(&self, cuda: &Cuda, token_blocks: usize, (n, k): (usize, usize)) -> usize {
        let tiles = token_blocks * n.div_ceil(self.features);
        let waves = tiles.div_ceil(self.resident * cuda.multiprocessors());
        // A step of 64 k: Hopper's tensor cores do 2048 products and sums a cycle and multiprocessor.
        let products = self.features * self.tokens * ATOM / 2048;
        let loads = (self.features + self.tokens) * ATOM * 2 / L2_BYTES;
        let step = products.max(loads) * self.resident;
        waves * (k.div_ceil(ATOM) * step + BLOCK_CYCLES)
    }

    fn launch(&self, cuda: &Cuda, rows: usize, n: usize) -> Launch {
        let tiles = rows.div_ceil(self.tokens) * n.div_ceil(self.features);
        let blocks = tiles.min(self.resident * cuda.multiprocessors());
        Launch { grid: [blocks as u32, 1, 1], block: self.threads, shared: self.shared }
    }
}

/// What a product is multiplied by.
pub(super) enum Factor<'a> {
    One(&'a Weight),
    /// Each block of rows, in blocks of the shape's tokens, by one of them.
    Each(&'a WeightSet, &'a Groups, &'static Shape),
}

impl Factor<'_> {
    fn shape(&self, cuda: &Cuda, rows: usize) -> &'static Shape {
        match *self {
            Self::One(weight) => {
                shape(cuda, rows, (weight.n, weight.k), |tokens| rows.div_ceil(tokens))
            }
            Self::Each(_, _, shape) => shape,
        }
    }

    /// All but `out`.
    fn params<T: Float>(&self, rows: usize, x: &Activations<T>) -> MatmulParams {
        assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels read and write bf16");
        let (n, k) = match self {
            Self::One(weight) => (weight.n, weight.k),
            Self::Each(set, ..) => (set.n(), set.k()),
        };
        let mut params = MatmulParams {
            weight: 0,
            x: x.address(),
            bias: 0,
            out: 0,
            weights: 0,
            blocks: 0,
            rows: rows as i32,
            n: n as i32,
            k_tiles: k.div_ceil(ATOM) as i32,
            row_groups: x.row_groups() as i32,
            out_row_groups: 0,
            activation: 0,
        };
        match self {
            Self::One(weight) => {
                params.weight = weight.tiles().address();
                params.bias = weight.bias.as_ref().map_or(0, Buffer::address);
            }
            Self::Each(set, groups, _) => {
                params.weights = set.addresses().address();
                params.blocks = groups.blocks.address();
            }
        }
        params
    }
}

pub(super) fn matmul<T: Float>(
    cuda: &Cuda,
    rows: usize,
    x: &Activations<T>,
    factor: &Factor,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let params = MatmulParams { out: out.address_mut(), ..factor.params(rows, x) };
    let shape = factor.shape(cuda, rows);
    // SAFETY: rows and widths were checked; the tiles are as large as n and k say. The blocks of a
    // factor of several weights are as `Groups` says.
    unsafe { cuda.launch(shape.matmul, shape.launch(cuda, rows, params.n as usize), &params) }
}

pub(super) fn gated_matmul<T: Float>(
    cuda: &Cuda,
    rows: usize,
    x: &Activations<T>,
    factor: &Factor,
    activation: Activation,
    out: &mut Activations<T>,
) -> Result<()> {
    let params = MatmulParams {
        out: out.address_mut(),
        out_row_groups: out.row_groups() as i32,
        activation: i32::from(activation != Activation::Silu),
        ..factor.params(rows, x)
    };
    let shape = factor.shape(cuda, rows);
    // SAFETY: likewise.
    unsafe { cuda.launch(shape.gated, shape.launch(cuda, rows, params.n as usize), &params) }
}
