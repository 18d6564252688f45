//! `out = x · Wᵀ`: weights packed once, on the processor into panels for the micro-kernel, for the
//! CUDA kernels into tiles as tensor cores read them.
//!
//! On the processor every output element is a chain of fused multiply-adds in the order of k, cut
//! into blocks of 256 whose sums are added in order; with bf16 weights and instructions for them a
//! chain of steps of 2 or 32 (see [`Products`]); on a GPU one of 16-wide steps. Nothing depends on
//! the number of rows, on the tile or on the threads, so a row's bits do not depend on its batch.

mod cpu;
mod grouped;
mod kernels;
mod pairs;

pub use grouped::WeightSet;
pub(super) use grouped::{Groups, Layout, gated_matmul_each, matmul_each};

use half::bf16;
use rayon::prelude::*;

use kernels::Factor;

use super::{
    Float,
    activations::{ATOM, Activations, CHUNK},
    tile::WIDTH,
};
use crate::{
    device::{
        Buffer, Device,
        cpu::{Cpu, Products, Shared},
    },
    error::{Error, Result},
};

/// Columns of a weight panel: output features side by side in the lanes.
pub const PANEL: usize = WIDTH;

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
    /// `[n / 16][k / 32]` tiles of 16 pairs of k × 16 features × 2, as AMX and `vdpbf16ps` read them, zero-padded.
    Pairs(Buffer<bf16>),
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
                let mut packed = Buffer::lasting(device, len)?;
                pack_panels(cpu, (n, k), read_row, packed.host_mut());
                Storage::F32(packed)
            }
            (Device::Cpu(cpu), Dtype::Bf16) if cpu.isa().products() != Products::Chains => {
                let mut packed = Buffer::lasting(device, pairs::packed_len(n, k))?;
                pairs::pack(cpu, (n, k), read_row, packed.host_mut());
                Storage::Pairs(packed)
            }
            (Device::Cpu(cpu), Dtype::Bf16) => {
                let mut packed = Buffer::lasting(device, len)?;
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
        let mut tiles = Buffer::zeroed(device, n.div_ceil(ATOM) * k.div_ceil(ATOM) * TILE)?;
        kernels::fill(cuda, (n, k), seed, deviation, &mut tiles)?;
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
            Storage::Bf16(packed) | Storage::Pairs(packed) | Storage::Tiles(packed) => {
                packed.len() * 2
            }
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
            Storage::Pairs(packed) => pairs::read_row(packed.host(), row, out),
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
                let chunk = (at % ATOM / CHUNK) ^ (lane % 8);
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
    match device {
        Device::Cpu(cpu) => cpu::matmul(cpu, rows, x.host(), weight, out.host_mut()),
        Device::Cuda(cuda) => return kernels::matmul(cuda, rows, x, &Factor::One(weight), out),
    }
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
    match device {
        Device::Cpu(cpu) => {
            cpu::gated_matmul(cpu, rows, x.host(), weight, activation, out.host_mut());
        }
        Device::Cuda(cuda) => {
            let factor = Factor::One(weight);
            return kernels::gated_matmul(cuda, rows, x, &factor, activation, out);
        }
    }
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
