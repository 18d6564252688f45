//! The fold's products in pairs of k, where pages are laid out for them: a tile of up to 16 queries
//! against four pages at a time. Queries and weights are rounded to bfloat16, as the kernels do.

use std::ops::Range;

use half::bf16;

use super::{PAGE, TILE, cpu::Block};
use crate::{
    device::cpu::pairs::{DEPTH, HalfTile, OfPages, PAGES, SIDE, Tile, add_pages, multiply_pages},
    ops::Float,
};

const _: () = assert!(PAGES * PAGE == TILE, "the pages of a tile are multiplied together");

/// The most queries of a block.
pub(super) const QUERIES: usize = SIDE;

/// What a block's products work in.
pub(super) struct Scratch {
    /// `[head_dim / 32]`, zero-padded.
    queries: Vec<Tile>,
    weights: OfPages<bf16>,
    /// Values of a page that are seen, zeros in place of the others.
    seen: Vec<HalfTile>,
}

impl Scratch {
    pub(super) const fn new() -> Self {
        let weights = [[bf16::ZERO; PAGES * SIDE]; SIDE];
        Self { queries: Vec::new(), weights, seen: Vec::new() }
    }
}

/// The products of a block.
pub(super) struct Pairs<'a> {
    pages: &'a [bf16],
    scratch: &'a mut Scratch,
}

/// What a row sees of a tile: its pages, and positions from the tile's first to the row's own.
type Seen = ([usize; PAGES], usize);

impl<'a> Pairs<'a> {
    /// queries: (queries, `head_dim`).
    #[inline(always)]
    pub(super) fn new(
        pages: &'a [bf16],
        queries: &[f32],
        head_dim: usize,
        scratch: &'a mut Scratch,
    ) -> Self {
        scratch.queries.clear();
        scratch.queries.resize(head_dim.div_ceil(DEPTH), [bf16::ZERO; SIDE * DEPTH]);
        for (row, query) in queries.chunks_exact(head_dim).enumerate() {
            for (tile, query) in scratch.queries.iter_mut().zip(query.chunks(DEPTH)) {
                round(query, &mut tile[row * DEPTH..]);
            }
        }
        Self { pages, scratch }
    }

    /// Scores of a tile, neither scaled nor masked, of rows that see it. scores: (queries, TILE).
    #[inline(always)]
    pub(super) fn scores<T: Float>(
        &self,
        block: &Block<'_, T>,
        tile: usize,
        scores: &mut OfPages<f32>,
    ) {
        for_each_group(block, tile, |queries, (pages, positions)| {
            let keys = |page| block.cache.page.keys(self.pages, page, block.kv_head);
            // Those beyond the last are multiplied too, and masked with it.
            let seen = positions.div_ceil(PAGE);
            let keys = std::array::from_fn(|at| tiles(keys(pages[at.min(seen - 1)])));
            multiply_pages(block.isa, queries, &self.scratch.queries, keys, scores);
        });
    }

    /// Adds the weighted values of a tile. weights: (queries, TILE); out: (16, values).
    #[inline(always)]
    pub(super) fn values<T: Float>(
        &mut self,
        block: &Block<'_, T>,
        tile: usize,
        weights: &OfPages<f32>,
        out: &mut [f32],
    ) {
        let Scratch { weights: rounded, seen, .. } = &mut *self.scratch;
        for (weights, rounded) in weights.iter().zip(&mut *rounded) {
            round(weights, rounded);
        }
        for_each_group(block, tile, |queries, (pages, positions)| {
            let values =
                |page| half_tiles(block.cache.page.values(self.pages, page, block.kv_head));
            let mut list = pages.map(values);
            let count = positions.div_ceil(PAGE);
            let last = positions % PAGE;
            if last > 0 {
                // Beyond what is seen the page may hold anything.
                copy_positions(list[count - 1], last, seen);
                list[count - 1] = seen;
            }
            add_pages(block.isa, queries, rounded, &list[..count], out);
        });
    }
}

/// Calls `multiply` with the queries of each group of neighbouring rows that see the same of a tile.
#[inline(always)]
fn for_each_group<T: Float>(
    block: &Block<'_, T>,
    tile: usize,
    mut multiply: impl FnMut(Range<usize>, Seen),
) {
    let mut first = 0;
    while first < block.rows.len() {
        let (end, seen) = block.alike(first, |row| {
            let mut pages = [0; PAGES];
            let positions = if row.sees(tile) { (row.positions - tile).min(TILE) } else { 0 };
            for (at, page) in pages[..positions.div_ceil(PAGE)].iter_mut().enumerate() {
                *page = block.cache.tables().page(row.slot, block.layer, tile / PAGE + at);
            }
            (pages, positions)
        });
        if seen.1 > 0 {
            multiply(first * block.heads..end * block.heads, seen);
        }
        first = end;
    }
}

#[inline(always)]
fn round(values: &[f32], to: &mut [bf16]) {
    for (to, &value) in to.iter_mut().zip(values) {
        *to = Float::from_f32(value);
    }
}

#[inline(always)]
fn tiles(keys: &[bf16]) -> &[Tile] {
    keys.as_chunks().0
}

#[inline(always)]
fn half_tiles(values: &[bf16]) -> &[HalfTile] {
    values.as_chunks().0
}

/// Copies the first positions of a page's values; zeros take the place of the others.
#[inline(always)]
fn copy_positions(values: &[HalfTile], positions: usize, to: &mut Vec<HalfTile>) {
    to.clear();
    to.resize(values.len(), [bf16::ZERO; SIDE * SIDE]);
    let whole = positions / 2 * DEPTH;
    for (values, to) in values.iter().zip(to) {
        to[..whole].copy_from_slice(&values[..whole]);
        if positions % 2 == 1 {
            for column in 0..SIDE {
                to[whole + 2 * column] = values[whole + 2 * column];
            }
        }
    }
}
