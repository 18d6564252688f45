//! The product on the processor: a register tile over packed panels.

use std::sync::PoisonError;

use super::{Activation, PANEL, Storage, Weight, pairs};
use crate::{
    device::{
        Buffer,
        cpu::{Cpu, Isa, Kernel, Shared},
    },
    ops::{
        Float,
        math::exp,
        tile::{Left, Right, tile},
    },
};

/// Length of one accumulation in registers.
const K_BLOCK: usize = 256;

/// How far ahead weights are fetched: a panel is read once, and what follows it is read next. Where
/// they come from memory, one row at a time is read a third faster than without (on a Zen 1), and
/// nothing else is slower.
const AHEAD: usize = 1024;

/// Rows of a register tile: 6 × 16 f32 fill 12 of AVX2's 16 registers; with AVX-512 the 8 sums of a
/// column are as many as two units of latency 4 work on at a time.
fn tile_rows(isa: Isa) -> usize {
    if isa.vectors() == Isa::Avx512 { 8 } else { 6 }
}

/// x and out: rows of k and of n, no fewer than `rows`.
pub(super) fn matmul<T: Float>(cpu: &Cpu, rows: usize, x: &[T], weight: &Weight, out: &mut [f32]) {
    let n = weight.n;
    let bias = weight.bias.as_ref().map(Buffer::host);
    let shared = Shared::new(&mut out[..rows * n]);
    let plain = bias.is_none().then_some((&shared, n));
    let epilogue = |first_row, tile_rows, panel, tile: &[[f32; PANEL]]| {
        let column = panel * PANEL;
        let width = PANEL.min(n - column);
        for (row, values) in tile.iter().take(tile_rows).enumerate() {
            // SAFETY: each task writes the columns of its own panels.
            let out = unsafe { shared.range((first_row + row) * n + column, width) };
            match out.first_chunk_mut() {
                Some(out) => *out = *values,
                None => out.copy_from_slice(&values[..width]),
            }
            if let Some(bias) = bias {
                out.iter_mut().zip(&bias[column..]).for_each(|(out, bias)| *out += bias);
            }
        }
    };
    run(cpu, rows, x, weight, 1, &epilogue, plain);
}

/// Likewise; out: rows of n / 2.
pub(super) fn gated_matmul<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &[T],
    weight: &Weight,
    activation: Activation,
    out: &mut [T],
) {
    let n = weight.n / 2;
    let shared = Shared::new(&mut out[..rows * n]);
    let epilogue = |first_row, tile_rows, panel, tile: &[[f32; PANEL]]| {
        let (gate, up) = tile.split_at(tile.len() / 2);
        let (linear, up) = (&gate[..tile_rows], &up[..tile_rows]);
        // SAFETY: each task writes the columns of its own panels.
        let out = |row| unsafe { shared.range((first_row + row) * n + panel / 2 * PANEL, PANEL) };
        cpu.isa().run(Gate { linear, up, activation, out });
    };
    run(cpu, rows, x, weight, 2, &epilogue, None);
}

/// A tile's gate and up, row by row.
struct Gate<'a, O> {
    linear: &'a [[f32; PANEL]],
    up: &'a [[f32; PANEL]],
    activation: Activation,
    /// Where a row goes.
    out: O,
}

impl<'a, T: Float, O: Fn(usize) -> &'a mut [T]> Kernel for Gate<'_, O> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (row, (linear, up)) in self.linear.iter().zip(self.up).enumerate() {
            let Some(out) = (self.out)(row).first_chunk_mut::<PANEL>() else { continue };
            // A copy, of which the compiler sees that it is not written to.
            let (linear, up) = (*linear, *up);
            for lane in 0..PANEL {
                let gate = match self.activation {
                    Activation::Silu => silu(linear[lane]),
                    Activation::GeluTanh => gelu_tanh(linear[lane]),
                };
                out[lane] = T::from_f32(gate * up[lane]);
            }
        }
    }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    // 1 + tanh(y) = 2 / (1 + e⁻²ʸ).
    let y = 0.797_884_6 * (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-2.0 * y))
}

/// Receives finished tiles: (first row, rows, first panel, (group · rows) × PANEL values).
pub(super) type Epilogue<'a> = dyn Fn(usize, usize, usize, &[[f32; PANEL]]) + Sync + 'a;

/// Where finished rows go as they are, and their length.
pub(super) type Plain<'a> = (&'a Shared<'a, f32>, usize);

/// Computes all tiles of `group` panels side by side and hands them to `epilogue`; whole ones may go
/// straight to `plain`.
fn run<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &[T],
    weight: &Weight,
    group: usize,
    epilogue: &Epilogue,
    plain: Option<Plain>,
) {
    if rows == 0 {
        return;
    }
    if let Storage::Pairs(tiles) = &weight.storage {
        return pairs::run(cpu, rows, x, (weight, tiles.host()), group, epilogue, plain);
    }
    let k = weight.k;
    let mut workspace = cpu.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(workspace.len() >= rows * k, "matmul: workspace too small");
    pack_rows(cpu, rows, k, x, &mut workspace);
    let product = Product { isa: cpu.isa(), rows, k, packed: &workspace[..rows * k], group };
    let groups = weight.n.div_ceil(PANEL) / group;
    // A few tasks a thread, so that a slow thread is helped out; at least one group each.
    let chunk = groups.div_ceil(cpu.threads() * 4).max(1);
    cpu.parallel_chunks(groups, chunk, |range| match &weight.storage {
        Storage::F32(w) => range.for_each(|at| product.group(w.host(), at * group, epilogue)),
        Storage::Bf16(w) => range.for_each(|at| product.group(w.host(), at * group, epilogue)),
        Storage::Pairs(_) | Storage::Tiles(_) => unreachable!("a weight and its device"),
    });
}

/// Packs x into `[rows / h][k][h]` of f32, h rows of a tile; the last tile has what rows are left.
fn pack_rows<T: Float>(cpu: &Cpu, rows: usize, k: usize, x: &[T], packed: &mut [f32]) {
    let packed = Shared::new(packed);
    let tile_rows = tile_rows(cpu.isa());
    let blocks = rows.div_ceil(tile_rows);
    let pack = |block: usize| {
        let first = block * tile_rows;
        let height = tile_rows.min(rows - first);
        // SAFETY: each task has its own rows.
        let out = unsafe { packed.range(first * k, height * k) };
        for row in 0..height {
            for (column, &v) in x[(first + row) * k..][..k].iter().enumerate() {
                out[column * height + row] = v.to_f32();
            }
        }
    };
    if blocks < 16 {
        (0..blocks).for_each(pack);
    } else {
        cpu.parallel(blocks, pack);
    }
}

/// Rows that one pass over a panel covers, whole tiles: their sums stay in the L1 cache.
const ROW_GROUP: usize = 96;

/// x against groups of panels.
struct Product<'a> {
    isa: Isa,
    rows: usize,
    k: usize,
    /// As [`pack_rows`] makes it.
    packed: &'a [f32],
    /// Panels side by side, one or two.
    group: usize,
}

impl Product<'_> {
    fn group<W: Float>(&self, weight: &[W], first_panel: usize, epilogue: &Epilogue) {
        let (k, group, tile_rows) = (self.k, self.group, tile_rows(self.isa));
        let mut sums = [[0.0f32; PANEL]; 2 * ROW_GROUP];
        for first_row in (0..self.rows).step_by(ROW_GROUP) {
            let rows = (self.rows - first_row).min(ROW_GROUP);
            sums[..rows * group].fill([0.0; PANEL]);
            for member in 0..group {
                let panel = &weight[(first_panel + member) * k * PANEL..][..k * PANEL];
                for start in (0..k).step_by(K_BLOCK) {
                    let len = K_BLOCK.min(k - start);
                    self.isa.run(Block {
                        isa: self.isa,
                        weight: &panel[start * PANEL..][..len * PANEL],
                        rows: &self.packed[first_row * k..][..rows * k],
                        tile_rows,
                        start,
                        k,
                        sums: &mut sums[..rows * group],
                        group,
                        member,
                    });
                }
            }
            for (at, tile) in sums[..rows * group].chunks(tile_rows * group).enumerate() {
                epilogue(first_row + at * tile_rows, tile.len() / group, first_panel, tile);
            }
        }
    }
}

/// One block of k of one panel against all rows: `sums[tile] += x · W`.
struct Block<'a, W> {
    isa: Isa,
    /// (len, PANEL).
    weight: &'a [W],
    rows: &'a [f32],
    tile_rows: usize,
    /// Where the block is in k.
    start: usize,
    k: usize,
    /// By tile, then by member of the group, then by row.
    sums: &'a mut [[f32; PANEL]],
    group: usize,
    member: usize,
}

impl<W: Float> Kernel for Block<'_, W> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let Self { isa, tile_rows, .. } = self;
        let w = Right { values: self.weight, stride: PANEL, ahead: AHEAD };
        let len = self.weight.len() / PANEL;
        let tiles = self.rows.chunks(tile_rows * self.k);
        for (rows, sums) in tiles.zip(self.sums.chunks_mut(tile_rows * self.group)) {
            let height = sums.len() / self.group;
            let values = &rows[self.start * height..][..len * height];
            let x = Left { values, row_stride: 1, k_stride: height };
            let sums = &mut sums[self.member * height..][..height];
            match height {
                1 => add_tile::<1, W>(isa, len, x, w, sums),
                2 => add_tile::<2, W>(isa, len, x, w, sums),
                3 => add_tile::<3, W>(isa, len, x, w, sums),
                4 => add_tile::<4, W>(isa, len, x, w, sums),
                5 => add_tile::<5, W>(isa, len, x, w, sums),
                6 => add_tile::<6, W>(isa, len, x, w, sums),
                7 => add_tile::<7, W>(isa, len, x, w, sums),
                _ => add_tile::<8, W>(isa, len, x, w, sums),
            }
        }
    }
}

/// Adds the sum of one block of k, made from zero.
#[inline(always)]
fn add_tile<const R: usize, W: Float>(
    isa: Isa,
    k: usize,
    x: Left,
    w: Right<W>,
    sums: &mut [[f32; PANEL]],
) {
    let mut block = [[0.0; PANEL]; R];
    tile(isa, k, x, w, &mut block);
    for (sum, value) in sums[..R].as_flattened_mut().iter_mut().zip(block.as_flattened()) {
        *sum += value;
    }
}
