//! `out = x · Wᵀ`: weights packed once, on the processor into panels for the micro-kernel, for the
//! CUDA kernels into tiles as tensor cores read them.
//!
//! On the processor every output element is a chain of fused multiply-adds in the order of k, cut
//! into blocks of [`K_BLOCK`] whose sums are added in order; on a GPU it is one chain of 16-wide
//! steps. Nothing depends on the number of rows, on the tile or on the threads, so a row's bits do
//! not depend on its batch.

use std::sync::PoisonError;

use half::bf16;
use rayon::prelude::*;

use super::{
    Float,
    activations::{ATOM, Activations, CHUNK},
    math::exp,
    tile::{Left, Right, WIDTH, tile, widen},
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Isa, Kernel, Shared},
        cuda::{Launch, MatrixPath, Params},
    },
    error::{Error, Result},
};

/// Columns of a weight panel: output features side by side in the lanes.
pub const PANEL: usize = WIDTH;
/// Rows of a register tile: 6 × 16 f32 fill 12 of AVX2's 16 registers.
const ROWS: usize = 6;
/// Length of one accumulation in registers; a panel's block of f32 is 16 KiB, half of an L1.
const K_BLOCK: usize = 256;

/// A weight (n, k), packed.
pub struct Weight {
    n: usize,
    k: usize,
    storage: Storage,
    /// (n,), added to every row of the product.
    bias: Option<Buffer<f32>>,
}

/// The formats a weight is stored in; only this file knows them.
enum Storage {
    /// `[n / 16][k][16]`, zero-padded to whole panels.
    F32(Buffer<f32>),
    /// Likewise.
    Bf16(Buffer<bf16>),
    /// `[n / 64][k / 64]` tiles of 64 × 64, zero-padded: in a tile, row r keeps its 8 chunks of 8
    /// elements at r · 64 + (chunk ^ (r % 8)) · 8.
    Tiles(Buffer<bf16>),
}

/// Elements of a tile.
const TILE: usize = ATOM * ATOM;

/// How a weight is to be stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    /// Weights, matmul inputs and KV cache in bfloat16, sums in f32.
    #[default]
    Bf16,
    /// Everything in f32.
    F32,
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::Bf16 { "bf16" } else { "f32" })
    }
}

impl std::str::FromStr for Dtype {
    type Err = crate::error::Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "bf16" => Ok(Self::Bf16),
            "f32" => Ok(Self::F32),
            _ => Err(crate::error::Error::new("unknown dtype")
                .expected("bf16 or f32")
                .got(format!("{text:?}"))),
        }
    }
}

impl Weight {
    /// Packs a weight of `n` rows of `k`; `read_row(row, out)` gives row `row` in f32.
    pub fn pack(
        device: &Device,
        dtype: Dtype,
        (n, k): (usize, usize),
        read_row: impl Fn(usize, &mut [f32]) + Sync + Send,
    ) -> Result<Self> {
        let len = n.div_ceil(PANEL) * PANEL * k;
        let storage = match (device, dtype) {
            (Device::Cpu(cpu), Dtype::F32) => {
                let mut packed = Buffer::zeroed(device, len)?;
                pack_panels(cpu, (n, k), read_row, packed.host_mut());
                Storage::F32(packed)
            }
            (Device::Cpu(cpu), Dtype::Bf16) => {
                let mut packed = Buffer::zeroed(device, len)?;
                pack_panels(cpu, (n, k), read_row, packed.host_mut());
                Storage::Bf16(packed)
            }
            (Device::Cuda(_), Dtype::Bf16) => {
                Storage::Tiles(Buffer::upload(device, &pack_tiles((n, k), read_row))?)
            }
            (Device::Cuda(_), Dtype::F32) => {
                return Err(Error::new("the CUDA kernels have no f32 weights")
                    .hint("use --dtype bf16, or --device cpu"));
            }
        };
        Ok(Self { n, k, storage, bias: None })
    }

    /// A weight of values that look random, with this standard deviation: for measurements. The
    /// same on every device; on a GPU they are made there. `gated`: rows are gate and up in turns,
    /// as [`gated_matmul`] takes them.
    ///
    /// # Errors
    /// As [`Weight::pack`].
    pub fn random(
        device: &Device,
        dtype: Dtype,
        (n, k): (usize, usize),
        seed: u64,
        deviation: f32,
        gated: bool,
    ) -> Result<Self> {
        let Device::Cuda(cuda) = device else {
            let key = mix(seed);
            return Self::pack(device, dtype, (n, k), |row, out| {
                // As the kernel numbers the rows of the same weight.
                let (is_up, feature) = interleave(PANEL, row);
                let turns = feature / 8 * 16 + usize::from(is_up) * 8 + feature % 8;
                let row = if gated { turns } else { row } as u64;
                for (column, out) in out.iter_mut().enumerate() {
                    let counter = row << 32 | (column & !1) as u64;
                    let word = mix(key.wrapping_add(counter.wrapping_mul(GOLDEN)));
                    let bytes = if column % 2 == 0 { word as u32 } else { (word >> 32) as u32 };
                    // The sum of four uniform bytes, scaled to variance one.
                    let sum: u32 = bytes.to_le_bytes().iter().map(|&byte| u32::from(byte)).sum();
                    *out = deviation * ((sum as f32 - 510.0) * 6.765_80e-3);
                }
            });
        };
        assert_eq!(dtype, Dtype::Bf16, "the kernels have bf16 weights");
        let (n_tiles, k_tiles) = (n.div_ceil(ATOM), k.div_ceil(ATOM));
        let mut tiles = Buffer::zeroed(device, n_tiles * k_tiles * TILE)?;
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
        // SAFETY: the tiles were just made.
        unsafe { cuda.launch("fill_weight", Launch::new(blocks, 256), &params)? };
        Ok(Self { n, k, storage: Storage::Tiles(tiles), bias: None })
    }

    /// Adds this to every row of the product, (n,).
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn with_bias(mut self, device: &Device, bias: &[f32]) -> Result<Self> {
        assert_eq!(bias.len(), self.n, "bias");
        self.bias = Some(Buffer::upload(device, bias)?);
        Ok(self)
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(packed) => packed.len() * 4,
            Storage::Bf16(packed) | Storage::Tiles(packed) => packed.len() * 2,
        }
    }

    /// The tiles, for kernels.
    pub(super) fn tiles(&self) -> &Buffer<bf16> {
        match &self.storage {
            Storage::Tiles(tiles) => tiles,
            _ => unreachable!("a weight and its device"),
        }
    }

    /// Row `row` in f32, as embedding lookup reads it.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row {row} of ({}, {})", self.n, self.k);
        let start = row / PANEL * self.k * PANEL + row % PANEL;
        match &self.storage {
            Storage::F32(packed) => read_strided(packed.host(), start, out),
            Storage::Bf16(packed) => read_strided(packed.host(), start, out),
            Storage::Tiles(_) => unreachable!("a weight and its device"),
        }
    }
}

fn read_strided<W: Float>(packed: &[W], start: usize, out: &mut [f32]) {
    for (at, v) in out.iter_mut().enumerate() {
        *v = packed[start + at * PANEL].to_f32();
    }
}

fn pack_panels<W: Float>(
    cpu: &Cpu,
    (n, k): (usize, usize),
    read_row: impl Fn(usize, &mut [f32]) + Sync + Send,
    packed: &mut [W],
) {
    let packed = Shared::new(packed);
    cpu.parallel(n.div_ceil(PANEL), |panel| {
        // SAFETY: each task has its own panel.
        let out = unsafe { packed.range(panel * k * PANEL, k * PANEL) };
        let mut row = vec![0.0; k];
        for lane in 0..PANEL.min(n - panel * PANEL) {
            read_row(panel * PANEL + lane, &mut row);
            for (at, &v) in row.iter().enumerate() {
                out[at * PANEL + lane] = W::from_f32(v);
            }
        }
    });
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of `SplitMix64` (Steele, Lea and Flood 2014).
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn pack_tiles(
    (n, k): (usize, usize),
    read_row: impl Fn(usize, &mut [f32]) + Sync + Send,
) -> Vec<bf16> {
    let k_tiles = k.div_ceil(ATOM);
    let mut packed = vec![bf16::ZERO; n.div_ceil(ATOM) * k_tiles * TILE];
    packed.par_chunks_mut(k_tiles * TILE).enumerate().for_each(|(tile, out)| {
        let mut row = vec![0.0; k];
        for lane in 0..ATOM.min(n - tile * ATOM) {
            read_row(tile * ATOM + lane, &mut row);
            for (at, &v) in row.iter().enumerate() {
                let chunk = at % ATOM / CHUNK ^ lane % 8;
                let place = at / ATOM * TILE + lane * ATOM + chunk * CHUNK + at % CHUNK;
                out[place] = <bf16 as Float>::from_f32(v);
            }
        }
    });
    packed
}

/// `out[i, :] = x[i, :] · Wᵀ + bias` for rows `0..rows`; out: (≥ rows, n).
///
/// # Errors
/// The device has failed.
pub fn matmul<T: Float>(
    device: &Device,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let n = weight.n;
    assert!(x.rows() >= rows && x.dim() == weight.k && out.len() >= rows * n, "matmul: buffers");
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return launch_matmul(cuda, rows, x, weight, out),
    };
    let bias = weight.bias.as_ref().map(Buffer::host);
    let shared = Shared::new(&mut out.host_mut()[..rows * n]);
    run(cpu, rows, x, weight, 1, &|first_row, tile_rows, panel, tile: &[[f32; PANEL]]| {
        let column = panel * PANEL;
        let width = PANEL.min(n - column);
        for (row, values) in tile.iter().take(tile_rows).enumerate() {
            // SAFETY: each task writes the columns of its own panels.
            let out = unsafe { shared.range((first_row + row) * n + column, width) };
            out.copy_from_slice(&values[..width]);
            if let Some(bias) = bias {
                out.iter_mut().zip(&bias[column..]).for_each(|(out, bias)| *out += bias);
            }
        }
    });
    Ok(())
}

/// What a gate's sum goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e⁻ˣ).
    #[default]
    Silu,
    /// x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks and Gimpel 2016).
    GeluTanh,
}

/// Gated linear unit (Shazeer 2020, eq. 6): `out = act(x · Gᵀ) * (x · Uᵀ)`, rounded to the matmul
/// type. `weight` holds the rows of G and U in turns (see [`interleave`]); out: (≥ rows, n / 2).
///
/// # Errors
/// The device has failed.
pub fn gated_matmul<T: Float>(
    device: &Device,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    activation: Activation,
    out: &mut Activations<T>,
) -> Result<()> {
    let n = weight.n / 2;
    assert!(weight.n.is_multiple_of(2 * PANEL), "gate and up in whole panels");
    assert!(x.rows() >= rows && x.dim() == weight.k, "gated: x");
    assert!(out.rows() >= rows && out.dim() == n && weight.bias.is_none(), "gated: out");
    let cpu = match device {
        Device::Cpu(cpu) => cpu,
        Device::Cuda(cuda) => return launch_gated(cuda, rows, x, weight, activation, out),
    };
    let shared = Shared::new(&mut out.host_mut()[..rows * n]);
    run(cpu, rows, x, weight, 2, &|first_row, tile_rows, panel, tile: &[[f32; PANEL]]| {
        let (gate, up) = tile.split_at(tile.len() / 2);
        for row in 0..tile_rows {
            let start = (first_row + row) * n + panel / 2 * PANEL;
            // SAFETY: each task writes the columns of its own panels.
            let out = unsafe { shared.range(start, PANEL) };
            if let Some(out) = out.first_chunk_mut() {
                cpu.isa().run(Gate { linear: &gate[row], up: &up[row], activation, out });
            }
        }
    });
    Ok(())
}

/// Rows of gate, then as many of up, stand in turns of this many: a panel on the processor; for
/// the CUDA kernels 8, so that one thread has both sums of a feature.
pub fn gate_turn(device: &Device) -> usize {
    if matches!(device, Device::Cpu(_)) { PANEL } else { 8 }
}

/// Which row of which half stands at `row` of the gate-and-up weight: of gate (`false`) or up
/// (`true`), in turns of `turn` (see [`gate_turn`]).
pub fn interleave(turn: usize, row: usize) -> (bool, usize) {
    let panel = row / turn;
    (panel % 2 == 1, panel / 2 * turn + row % turn)
}

struct Gate<'a, T> {
    linear: &'a [f32; PANEL],
    up: &'a [f32; PANEL],
    activation: Activation,
    out: &'a mut [T; PANEL],
}

impl<T: Float> Kernel for Gate<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for lane in 0..PANEL {
            let g = self.linear[lane];
            let gate = match self.activation {
                Activation::Silu => g / (1.0 + exp(-g)),
                Activation::GeluTanh => gelu_tanh(g),
            };
            self.out[lane] = T::from_f32(gate * self.up[lane]);
        }
    }
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    // 1 + tanh(y) = 2 / (1 + e⁻²ʸ).
    let y = 0.797_884_6 * (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-2.0 * y))
}

/// Receives finished tiles: (first row, rows, first panel, (group · ROWS) × PANEL values).
type Epilogue<'a> = dyn Fn(usize, usize, usize, &[[f32; PANEL]]) + Sync + 'a;

/// Computes all tiles of `group` panels side by side and hands them to `epilogue`.
fn run<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    group: usize,
    epilogue: &Epilogue,
) {
    if rows == 0 {
        return;
    }
    let k = weight.k;
    let mut workspace = cpu.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    let blocks = rows.div_ceil(ROWS);
    assert!(workspace.len() >= blocks * ROWS * k, "matmul: workspace too small");
    pack_rows(cpu, rows, k, x.host(), &mut workspace);
    let packed = &workspace[..blocks * ROWS * k];
    let groups = weight.n.div_ceil(PANEL) / group;
    // A few tasks a thread, so that a slow thread is helped out; at least one group each.
    let chunk = groups.div_ceil(cpu.threads() * 4).max(1);
    cpu.parallel_chunks(groups, chunk, |range| match &weight.storage {
        Storage::F32(w) => range.for_each(|at| {
            group_tiles(cpu, rows, k, packed, w.host(), at * group, group, epilogue);
        }),
        Storage::Bf16(w) => range.for_each(|at| {
            group_tiles(cpu, rows, k, packed, w.host(), at * group, group, epilogue);
        }),
        Storage::Tiles(_) => unreachable!("a weight and its device"),
    });
}

/// Packs x into `[rows / 6][k][6]` of f32, zero rows at the end.
fn pack_rows<T: Float>(cpu: &Cpu, rows: usize, k: usize, x: &[T], packed: &mut [f32]) {
    let packed = Shared::new(packed);
    let blocks = rows.div_ceil(ROWS);
    let pack = |block: usize| {
        // SAFETY: each task has its own block.
        let out = unsafe { packed.range(block * ROWS * k, ROWS * k) };
        for row in 0..ROWS {
            let at = block * ROWS + row;
            if at < rows {
                for (column, &v) in x[at * k..][..k].iter().enumerate() {
                    out[column * ROWS + row] = v.to_f32();
                }
            } else {
                (0..k).for_each(|column| out[column * ROWS + row] = 0.0);
            }
        }
    };
    if blocks < 16 {
        (0..blocks).for_each(pack);
    } else {
        cpu.parallel(blocks, pack);
    }
}

/// Rows that one pass over a panel covers: their tiles stay in the L1 and L2 caches.
const ROW_GROUP: usize = 16 * ROWS;

#[expect(clippy::too_many_arguments, reason = "one task of `run`, which names them")]
fn group_tiles<W: Float>(
    cpu: &Cpu,
    rows: usize,
    k: usize,
    packed: &[f32],
    weight: &[W],
    first_panel: usize,
    group: usize,
    epilogue: &Epilogue,
) {
    const TILES: usize = 2 * ROW_GROUP;
    let mut unpacked = [[0.0f32; PANEL]; K_BLOCK];
    let mut sums = [[0.0f32; PANEL]; TILES];
    for first_row in (0..rows).step_by(ROW_GROUP) {
        let blocks = (rows - first_row).min(ROW_GROUP).div_ceil(ROWS);
        sums[..blocks * ROWS * group].fill([0.0; PANEL]);
        for member in 0..group {
            let panel = &weight[(first_panel + member) * k * PANEL..][..k * PANEL];
            for start in (0..k).step_by(K_BLOCK) {
                let len = K_BLOCK.min(k - start);
                cpu.isa().run(Block {
                    isa: cpu.isa(),
                    weight: &panel[start * PANEL..][..len * PANEL],
                    unpacked: &mut unpacked[..len],
                    rows: &packed[first_row * k..][..blocks * ROWS * k],
                    count: (rows - first_row).min(ROW_GROUP),
                    offset: start,
                    k,
                    sums: &mut sums[member * ROWS..],
                    stride: group * ROWS,
                });
            }
        }
        for block in 0..blocks {
            let row = first_row + block * ROWS;
            let tile = &sums[block * ROWS * group..][..ROWS * group];
            epilogue(row, ROWS.min(rows - row), first_panel, tile);
        }
    }
}

/// One block of k of one panel against all row blocks: `sums[block] += x · W`.
struct Block<'a, W> {
    isa: Isa,
    weight: &'a [W],
    unpacked: &'a mut [[f32; PANEL]],
    rows: &'a [f32],
    count: usize,
    offset: usize,
    k: usize,
    sums: &'a mut [[f32; PANEL]],
    stride: usize,
}

impl<W: Float> Kernel for Block<'_, W> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        widen(self.weight, self.unpacked.as_flattened_mut());
        let w = Right { values: self.unpacked.as_flattened(), stride: PANEL };
        let len = self.unpacked.len();
        for (block, rows) in self.rows.chunks_exact(ROWS * self.k).enumerate() {
            let values = &rows[self.offset * ROWS..][..len * ROWS];
            let x = Left { values, row_stride: 1, k_stride: ROWS };
            let sums = &mut self.sums[block * self.stride..];
            // Rows beyond the last are zero and nobody reads their sums.
            match self.count - block * ROWS {
                1 => add_tile::<1>(self.isa, len, x, w, sums),
                2 => add_tile::<2>(self.isa, len, x, w, sums),
                3 | 4 => add_tile::<4>(self.isa, len, x, w, sums),
                _ => add_tile::<ROWS>(self.isa, len, x, w, sums),
            }
        }
    }
}

/// Adds the sum of one block of k, made from zero.
#[inline(always)]
fn add_tile<const R: usize>(isa: Isa, k: usize, x: Left, w: Right, sums: &mut [[f32; PANEL]]) {
    let mut block = [[0.0; PANEL]; R];
    tile(isa, k, x, w, &mut block);
    for (sum, value) in sums[..R].as_flattened_mut().iter_mut().zip(block.as_flattened()) {
        *sum += value;
    }
}

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

/// Mirror of `MatmulParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct MatmulParams {
    weight: u64,
    x: u64,
    bias: u64,
    out: u64,
    rows: i32,
    n: i32,
    k_tiles: i32,
    row_groups: i32,
    out_row_groups: i32,
    activation: i32,
}
const _: () = assert!(size_of::<MatmulParams>() == 56, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/matmul_epilogue.cuh.
unsafe impl Params for MatmulParams {}

/// A kernel of matmul: its tile of tokens and features, and what a block takes.
struct Shape {
    tokens: usize,
    features: usize,
    threads: u32,
    shared: u32,
    /// Blocks that a multiprocessor holds.
    resident: usize,
    matmul: &'static str,
    gated: &'static str,
}

macro_rules! shape {
    ($path:literal, $tokens:literal, $features:literal, $threads:literal, $shared:literal, $resident:literal) => {
        Shape {
            tokens: $tokens,
            features: $features,
            threads: $threads,
            shared: $shared,
            resident: $resident,
            matmul: concat!("matmul_", $path, "_", $tokens),
            gated: concat!("gated_", $path, "_", $tokens),
        }
    };
}

/// As in the table of kernels/matmul.cu.
const WGMMA: [Shape; 6] = [
    shape!("wgmma", 8, 64, 160, 111_296, 2),
    shape!("wgmma", 16, 64, 160, 113_840, 2),
    shape!("wgmma", 32, 64, 160, 112_784, 2),
    shape!("wgmma", 64, 64, 160, 102_496, 2),
    shape!("wgmma", 128, 128, 288, 213_088, 1),
    shape!("wgmma", 256, 128, 288, 229_440, 1),
];
const MMA: [Shape; 3] = [
    shape!("mma", 16, 64, 128, 81_920, 2),
    shape!("mma", 64, 64, 128, 65_536, 2),
    shape!("mma", 128, 128, 256, 98_304, 1),
];

/// The narrowest tile that holds all rows, else the widest: every weight is then read once for as
/// many rows as possible. All give a row the same bits.
fn shape(cuda: &Cuda, rows: usize) -> &'static Shape {
    let shapes: &[Shape] = if cuda.path() == MatrixPath::Wgmma { &WGMMA } else { &MMA };
    shapes.iter().find(|shape| shape.tokens >= rows).unwrap_or(&shapes[shapes.len() - 1])
}

impl Shape {
    fn launch(&self, cuda: &Cuda, rows: usize, n: usize) -> Launch {
        let tiles = rows.div_ceil(self.tokens) * n.div_ceil(self.features);
        let blocks = tiles.min(self.resident * cuda.multiprocessors());
        Launch { grid: [blocks as u32, 1, 1], block: self.threads, shared: self.shared }
    }
}

fn launch_matmul<T: Float>(
    cuda: &Cuda,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    out: &mut Buffer<f32>,
) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels read bf16");
    let params = MatmulParams {
        weight: weight.tiles().address(),
        x: x.address(),
        bias: weight.bias.as_ref().map_or(0, Buffer::address),
        out: out.address_mut(),
        rows: rows as i32,
        n: weight.n as i32,
        k_tiles: weight.k.div_ceil(ATOM) as i32,
        row_groups: x.row_groups() as i32,
        out_row_groups: 0,
        activation: 0,
    };
    let shape = shape(cuda, rows);
    // SAFETY: rows and widths were checked; the tiles are as large as n and k say.
    unsafe { cuda.launch(shape.matmul, shape.launch(cuda, rows, weight.n), &params) }
}

fn launch_gated<T: Float>(
    cuda: &Cuda,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    activation: Activation,
    out: &mut Activations<T>,
) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels read and write bf16");
    let params = MatmulParams {
        weight: weight.tiles().address(),
        x: x.address(),
        bias: 0,
        out: out.address_mut(),
        rows: rows as i32,
        n: weight.n as i32,
        k_tiles: weight.k.div_ceil(ATOM) as i32,
        row_groups: x.row_groups() as i32,
        out_row_groups: out.row_groups() as i32,
        activation: if activation == Activation::Silu { 0 } else { 1 },
    };
    let shape = shape(cuda, rows);
    // SAFETY: likewise.
    unsafe { cuda.launch(shape.gated, shape.launch(cuda, rows, weight.n), &params) }
}
