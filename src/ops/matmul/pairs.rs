//! The product in pairs of k, for AMX's tiles and AVX-512's dot products: bf16 weights and inputs
//! packed into tiles, 32 rows × 32 columns at a time.

use std::sync::PoisonError;

use half::bf16;

use super::{PANEL, Weight, cpu::Epilogue};
use crate::{
    device::cpu::{
        Cpu, Isa, Shared,
        pairs::{DEPTH, SIDE, Sums, Tile, multiply},
    },
    ops::{Float, activations::Activations},
};

const _: () = assert!(PANEL == SIDE, "a panel is the columns of a tile");
const TILE: usize = size_of::<Tile>() / size_of::<bf16>();

/// Elements of a weight (n, k) in tiles.
pub(super) fn packed_len(n: usize, k: usize) -> usize {
    n.div_ceil(SIDE) * k.div_ceil(DEPTH) * TILE
}

/// Where in a panel's tiles element k of a row is.
fn place(row: usize, k: usize) -> usize {
    k / DEPTH * TILE + k % DEPTH / 2 * DEPTH + row % SIDE * 2 + k % 2
}

/// Packs a weight into `[n / 16][k / 32]` tiles; `packed` is zero before.
pub(super) fn pack(
    cpu: &Cpu,
    (n, k): (usize, usize),
    read_row: impl Fn(usize, &mut [f32]) + Sync + Send,
    packed: &mut [bf16],
) {
    let packed = Shared::new(packed);
    let len = k.div_ceil(DEPTH) * TILE;
    cpu.parallel(n.div_ceil(SIDE), |panel| {
        // SAFETY: each task has its own panel.
        let out = unsafe { packed.range(panel * len, len) };
        let mut values = vec![0.0; k];
        for row in panel * SIDE..n.min(panel * SIDE + SIDE) {
            read_row(row, &mut values);
            for (at, &value) in values.iter().enumerate() {
                out[place(row, at)] = Float::from_f32(value);
            }
        }
    });
}

/// Row `row` in f32.
pub(super) fn read_row(packed: &[bf16], row: usize, out: &mut [f32]) {
    let panel = &packed[row / SIDE * out.len().div_ceil(DEPTH) * TILE..];
    for (at, out) in out.iter_mut().enumerate() {
        *out = Float::to_f32(panel[place(row, at)]);
    }
}

/// Computes all tiles of `group` panels side by side and hands them to `epilogue`.
pub(super) fn run<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &Activations<T>,
    weight: &Weight,
    tiles: &[bf16],
    group: usize,
    epilogue: &Epilogue,
) {
    let mut workspace = cpu.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    let steps = weight.k.div_ceil(DEPTH);
    let room = as_bf16(&mut workspace).as_chunks_mut::<TILE>().0;
    assert!(room.len() >= rows.div_ceil(SIDE) * steps, "matmul: workspace too small");
    let packed = &mut room[..rows.div_ceil(SIDE) * steps];
    pack_rows(cpu, rows, weight.k, x.host(), packed.as_flattened_mut());
    let product = Product {
        isa: cpu.isa(),
        rows,
        steps,
        x: packed,
        weight: tiles.as_chunks::<TILE>().0,
        group,
        epilogue,
    };
    let pairs = weight.n.div_ceil(SIDE).div_ceil(2);
    // A few tasks a thread, so that a slow thread is helped out; at least one pair each.
    let chunk = pairs.div_ceil(cpu.threads() * 4).max(1);
    cpu.parallel_chunks(pairs, chunk, |range| range.for_each(|pair| product.pair(pair)));
}

/// Twice as many bf16 in the same memory.
fn as_bf16(workspace: &mut [f32]) -> &mut [bf16] {
    let len = workspace.len() * 2;
    // SAFETY: the same bytes, borrowed as long; a bf16 is aligned to less, and any bits are one.
    unsafe { std::slice::from_raw_parts_mut(workspace.as_mut_ptr().cast(), len) }
}

/// Packs x into `[rows / 16][k / 32]` tiles, zero-padded.
fn pack_rows<T: Float>(cpu: &Cpu, rows: usize, k: usize, x: &[T], packed: &mut [bf16]) {
    let len = k.div_ceil(DEPTH) * TILE;
    let packed = Shared::new(packed);
    let blocks = rows.div_ceil(SIDE);
    let pack = |block: usize| {
        // SAFETY: each task has its own block.
        let out = unsafe { packed.range(block * len, len) };
        out.fill(bf16::ZERO);
        for row in block * SIDE..rows.min(block * SIDE + SIDE) {
            for (step, values) in x[row * k..][..k].chunks(DEPTH).enumerate() {
                let out = &mut out[step * TILE + row % SIDE * DEPTH..];
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = Float::from_f32(value.to_f32());
                }
            }
        }
    };
    if blocks < 8 {
        (0..blocks).for_each(pack);
    } else {
        cpu.parallel(blocks, pack);
    }
}

/// x against pairs of panels.
struct Product<'a> {
    isa: Isa,
    rows: usize,
    /// Tiles of k.
    steps: usize,
    /// `[rows / 16][steps]`.
    x: &'a [Tile],
    /// `[n / 16][steps]`.
    weight: &'a [Tile],
    /// Panels that the epilogue takes at a time, one or two.
    group: usize,
    epilogue: &'a Epilogue<'a>,
}

impl Product<'_> {
    fn pair(&self, pair: usize) {
        let last = self.weight.len() / self.steps - 1;
        // An odd last panel is its own neighbour; nobody reads the second sums.
        let w = [2 * pair, last.min(2 * pair + 1)].map(|panel| self.list(self.weight, panel));
        let x = |block: usize| self.list(self.x, block);
        let blocks = self.rows.div_ceil(SIDE);
        let mut sums = [[[[0.0; SIDE]; SIDE]; 2]; 2];
        let (twos, one) = (blocks / 2, blocks % 2);
        for block in (0..2 * twos).step_by(2) {
            let live = (self.rows - block * SIDE).min(2 * SIDE);
            multiply(self.isa, live, [x(block), x(block + 1)], w, &mut sums);
            self.hand_out(block, pair, &sums[0]);
            self.hand_out(block + 1, pair, &sums[1]);
        }
        if one == 1 {
            let live = self.rows - (blocks - 1) * SIDE;
            let mut sums = [[[[0.0; SIDE]; SIDE]; 2]; 1];
            multiply(self.isa, live, [x(blocks - 1)], w, &mut sums);
            self.hand_out(blocks - 1, pair, &sums[0]);
        }
    }

    fn list<'a>(&self, tiles: &'a [Tile], at: usize) -> &'a [Tile] {
        &tiles[at * self.steps..][..self.steps]
    }

    fn hand_out(&self, block: usize, pair: usize, sums: &[Sums; 2]) {
        let row = block * SIDE;
        let rows = SIDE.min(self.rows - row);
        if self.group == 2 {
            return (self.epilogue)(row, rows, 2 * pair, sums.as_flattened());
        }
        let panels = self.weight.len() / self.steps;
        for (panel, sums) in (2 * pair..panels).zip(sums) {
            (self.epilogue)(row, rows, panel, sums);
        }
    }
}
