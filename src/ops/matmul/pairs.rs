//! The product in pairs of k, for AMX's tiles and AVX-512's dot products: bf16 weights and inputs
//! packed into tiles, 32 rows × 32 columns at a time.

use std::{cell::RefCell, ops::Range, sync::PoisonError};

use half::bf16;

use super::{
    PANEL, Weight,
    cpu::{Epilogue, Plain},
};
use crate::{
    device::cpu::{
        Aligned, Cpu, Isa, Shared,
        pairs::{
            Ahead, DEPTH, FEW, Left, SIDE, STEPS, Sums, Tile, is_few, multiply, multiply_few,
            multiply_into, reads_rows,
        },
    },
    ops::Float,
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

/// Computes all tiles of `group` panels side by side and hands them to `epilogue`, or writes them to
/// `plain` itself.
pub(super) fn run<T: Float>(
    cpu: &Cpu,
    rows: usize,
    x: &[T],
    (weight, tiles): (&Weight, &[bf16]),
    group: usize,
    epilogue: &Epilogue,
    plain: Option<Plain>,
) {
    let mut workspace = cpu.workspace.lock().unwrap_or_else(PoisonError::into_inner);
    let steps = weight.k.div_ceil(DEPTH);
    let (isa, blocks) = (cpu.isa(), rows.div_ceil(SIDE));
    let room = as_bf16(&mut workspace).as_chunks_mut::<TILE>().0;
    // A last block's rows beyond the product's are multiplied too, if they are there.
    let as_it_is = T::as_bf16(x).filter(|x| {
        reads_rows(isa) && weight.k.is_multiple_of(DEPTH) && x.len() >= blocks * SIDE * weight.k
    });
    let x = as_it_is.map_or_else(
        || {
            assert!(room.len() >= blocks * steps, "matmul: workspace too small");
            let packed = &mut room[..blocks * steps];
            pack_rows(cpu, rows, weight.k, x, packed.as_flattened_mut());
            Left::Tiles(packed)
        },
        Left::Rows,
    );
    let weight_tiles = tiles.as_chunks::<TILE>().0;
    let plain = plain.filter(|_| reads_rows(isa));
    let product = Product { isa, rows, steps, x, weight: weight_tiles, group, epilogue, plain };
    let panels = weight.n.div_ceil(SIDE);
    if let (Left::Tiles(x), true) = (x, is_few(isa, rows)) {
        let chunk = panels_of_a_task(panels, cpu.threads());
        return cpu.parallel_chunks(panels, chunk, |panels| {
            SUMS.with_borrow_mut(|sums| product.few(x, panels, sums.0.as_flattened_mut()));
        });
    }
    let pairs = panels.div_ceil(2);
    // Many tasks a thread, so that all end at about the same time.
    let chunk = (pairs / (cpu.threads() * 16)).max(1);
    let len = rows_of_a_part(cpu.threads(), rows, (weight.n, weight.k));
    let of_part = pairs.div_ceil(chunk);
    cpu.parallel(rows.div_ceil(len) * of_part, |task| {
        let (first, chunk_at) = (task / of_part * len, task % of_part * chunk);
        let rows = first..rows.min(first + len);
        let pairs = chunk_at..pairs.min(chunk_at + chunk);
        SUMS.with_borrow_mut(|sums| {
            pairs.for_each(|pair| product.pair(rows.clone(), pair, &mut sums.0));
        });
    });
}

/// Rows that all weights pass by before the next, a multiple of 32: so many that their x stays in the
/// L2 cache. (With k of 1,536 and of 4,096, 512 rows: 3.4 instead of 2.3 and 2.2 instead of 1.4 TFLOP/s on
/// two cores of a Xeon.) Where the weights stay there too, each thread has rows of its own, which
/// it made before and will read next.
fn rows_of_a_part(threads: usize, rows: usize, (n, k): (usize, usize)) -> usize {
    /// Bytes of x that stay beside what passes.
    const STAYS: usize = 800 << 10;
    /// Bytes of the cache.
    const CACHE: usize = 2 << 20;
    /// Fewer rows would wait for weights.
    const LEAST: usize = 128;
    let row = k * size_of::<bf16>();
    let fits = rows * row <= CACHE / 2 || LEAST * row > CACHE;
    let most = if fits { rows } else { (STAYS / row).max(LEAST) };
    let parts = rows.div_ceil(most);
    let parts = if n * row <= CACHE { parts.max(threads.min(rows / LEAST)) } else { parts };
    rows.div_ceil(parts).next_multiple_of(2 * SIDE)
}

/// Panels of a task of few rows: an even number with which all threads end at about the same time.
fn panels_of_a_task(panels: usize, threads: usize) -> usize {
    let longest = |size: usize| panels.div_ceil(size).div_ceil(threads) * size;
    let sizes = (1..=FEW.1 / 2).rev().map(|pairs| 2 * pairs);
    sizes.min_by_key(|&size| longest(size)).unwrap_or(FEW.1)
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
        if !k.is_multiple_of(DEPTH) || (block + 1) * SIDE > rows {
            out.fill(bf16::ZERO);
        }
        for row in block * SIDE..rows.min(block * SIDE + SIDE) {
            for (step, values) in x[row * k..][..k].chunks(DEPTH).enumerate() {
                let out = &mut out[step * TILE + row % SIDE * DEPTH..];
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = value.to_bf16();
                }
            }
        }
    };
    cpu.parallel(blocks, pack);
}

/// x against pairs of panels.
struct Product<'a> {
    isa: Isa,
    rows: usize,
    /// Tiles of k.
    steps: usize,
    x: Left<'a>,
    /// `[n / 16][steps]`.
    weight: &'a [Tile],
    /// Panels that the epilogue takes at a time, one or two.
    group: usize,
    epilogue: &'a Epilogue<'a>,
    /// Takes whole blocks instead, where it can.
    plain: Option<Plain<'a>>,
}

/// The most blocks of 16 rows that one pass over a pair of panels covers.
const BLOCKS: usize = 16;

/// Blocks of a pass. AMX reads x anew for every pair of panels anyway: where all of k goes through at
/// once, the sums of two blocks are handed on while they are in the L1 cache. Without it so many that
/// their sums stay there beside the weights.
fn blocks_of_a_pass(isa: Isa, rows: usize, steps: usize) -> usize {
    match reads_rows(isa) {
        true if rows > 128 && steps <= STEPS => 2,
        true => BLOCKS,
        false => 6,
    }
}

thread_local! {
    /// The sums of a pass.
    static SUMS: RefCell<Aligned<[[Sums; 2]; BLOCKS]>> =
        const { RefCell::new(Aligned([[[[0.0; SIDE]; SIDE]; 2]; BLOCKS])) };
}

impl Product<'_> {
    fn few(&self, x: &[Tile], panels: Range<usize>, sums: &mut [Sums]) {
        let sums = &mut sums[..panels.len()];
        let w = &self.weight[panels.start * self.steps..panels.end * self.steps];
        multiply_few(self.isa, self.rows, x, w, sums);
        if self.group == 2 {
            for (sums, panel) in sums.as_chunks::<2>().0.iter().zip(panels.step_by(2)) {
                (self.epilogue)(0, self.rows, panel, sums.as_flattened());
            }
        } else {
            for (sums, panel) in sums.iter().zip(panels) {
                (self.epilogue)(0, self.rows, panel, sums);
            }
        }
    }

    /// These rows, from a multiple of 16 on, against a pair of panels.
    fn pair(&self, of: Range<usize>, pair: usize, sums: &mut [[Sums; 2]; BLOCKS]) {
        let panels = self.weight.len() / self.steps;
        // An odd last panel is its own neighbour; nobody reads the second sums.
        let w = [2 * pair, (panels - 1).min(2 * pair + 1)];
        let w = w.map(|panel| &self.weight[panel * self.steps..][..self.steps]);
        // This thread will probably take the next pair after it.
        let next = self.weight.as_ptr().wrapping_add(2 * (pair + 1) * self.steps);
        let mut ahead = Ahead::new(next, of.len());
        let plain = self.plain.filter(|(_, n)| (pair + 1) * 2 * SIDE <= *n);
        let pass = blocks_of_a_pass(self.isa, of.len(), self.steps) * SIDE;
        for first in of.clone().step_by(pass) {
            let rows = (of.end - first).min(pass);
            let sums = &mut sums[..rows.div_ceil(SIDE)];
            let x = self.x.behind(first / SIDE, self.steps);
            if let (Some((out, n)), true) = (plain, rows.is_multiple_of(SIDE)) {
                // SAFETY: each task writes the columns of its own panels.
                unsafe {
                    let to =
                        out.columns(first..first + rows, n, pair * 2 * SIDE..(pair + 1) * 2 * SIDE);
                    multiply_into(self.isa, x, w, &mut ahead, sums, (to, n));
                }
                continue;
            }
            multiply(self.isa, rows, x, w, &mut ahead, sums);
            for (block, sums) in sums.iter().enumerate() {
                let (row, rows) = (first + block * SIDE, SIDE.min(rows - block * SIDE));
                if self.group == 2 {
                    (self.epilogue)(row, rows, 2 * pair, sums.as_flattened());
                } else {
                    for (panel, sums) in (2 * pair..panels).zip(sums) {
                        (self.epilogue)(row, rows, panel, sums);
                    }
                }
            }
        }
    }
}
