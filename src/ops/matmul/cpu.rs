//! The product on the processor: a register tile over packed panels.

use std::sync::PoisonError;

use super::{Activation, PANEL, Storage, Weight};
use crate::{
    device::{
        Buffer,
        cpu::{Cpu, Isa, Kernel, Shared},
    },
    ops::{
        Float,
        activations::Activations,
        math::exp,
        tile::{Left, Right, tile, widen},
    },
};

/// Rows of a register tile: 6 × 16 f32 fill 12 of AVX2's 16 registers.
const ROWS: usize = 6;
/// Length of one accumulation in registers; a panel's block of f32 is 16 KiB, half of an L1.
const K_BLOCK: usize = 256;

pub(super) fn matmul<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    out: &mut Buffer<f32>,
) {
    let n = weight.n;
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
}

pub(super) fn gated_matmul<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    activation: Activation,
    out: &mut Activations<T>,
) {
    let n = weight.n / 2;
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
