//! The fold's products in pairs of k, where pages are laid out for them: a tile of up to 16 queries
//! against four pages at a time. Queries and weights are rounded to bfloat16, as the kernels do.

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

/// What a row sees of a tile: its pages, and how many positions from the tile's first to its own.
#[derive(Clone, Copy, Default)]
struct Seen {
    pages: [usize; PAGES],
    positions: usize,
}

impl Seen {
    fn pages(&self) -> &[usize] {
        &self.pages[..self.positions.div_ceil(PAGE)]
    }

    /// Pages all of which is seen.
    fn whole(&self) -> usize {
        self.positions / PAGE
    }

    /// Whether one's pages begin with the other's.
    fn agrees(&self, other: &Self) -> bool {
        self.positions > 0
            && other.positions > 0
            && self.pages().iter().zip(other.pages()).all(|(a, b)| a == b)
    }
}

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
        for_each_group(block, tile, |first, rows| {
            // Pages that only some rows see are multiplied for all, and so are those beyond the last;
            // the mask takes care of it.
            let longest = rows.iter().max_by_key(|row| row.positions);
            let pages = longest.map_or(&[][..], |row| row.pages());
            let keys = |page| block.cache.page.keys(self.pages, page, block.kv_head);
            let keys = std::array::from_fn(|at| tiles(keys(pages[at.min(pages.len() - 1)])));
            let queries = first * block.heads..(first + rows.len()) * block.heads;
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
        let values = |page| half_tiles(block.cache.page.values(self.pages, page, block.kv_head));
        for_each_group(block, tile, |first, rows| {
            // What all rows see whole is added for all; the rest of each row's pages row by row.
            let common = rows.iter().map(Seen::whole).min().unwrap_or(0);
            let list = rows[0].pages.map(values);
            if common > 0 {
                let queries = first * block.heads..(first + rows.len()) * block.heads;
                add_pages(block.isa, queries, 0, rounded, &list[..common], out);
            }
            for (row, of_row) in (first..).zip(rows) {
                let pages = of_row.pages();
                let mut list = of_row.pages.map(values);
                let last = of_row.positions % PAGE;
                if last > 0 {
                    // Beyond what is seen the page may hold anything.
                    copy_positions(list[pages.len() - 1], last, seen);
                    list[pages.len() - 1] = seen;
                }
                if pages.len() > common {
                    let queries = row * block.heads..(row + 1) * block.heads;
                    let list = &list[common..pages.len()];
                    add_pages(block.isa, queries, common, rounded, list, out);
                }
            }
        });
    }
}

/// Calls `multiply` with each group of neighbouring rows whose pages of a tile agree: the first's
/// number, and what they see.
#[inline(always)]
fn for_each_group<T: Float>(
    block: &Block<'_, T>,
    tile: usize,
    mut multiply: impl FnMut(usize, &[Seen]),
) {
    let mut seen = [Seen::default(); QUERIES];
    for (seen, row) in seen.iter_mut().zip(block.rows) {
        if row.sees(tile) {
            seen.positions = (row.positions - tile).min(TILE);
            for at in 0..seen.positions.div_ceil(PAGE) {
                seen.pages[at] = block.cache.tables().page(row.slot, block.layer, tile / PAGE + at);
            }
        }
    }
    let mut first = 0;
    while first < block.rows.len() {
        // As long as each row agrees with the longest before it.
        let (mut end, mut longest) = (first + 1, seen[first]);
        while end < block.rows.len() && longest.agrees(&seen[end]) {
            if seen[end].positions > longest.positions {
                longest = seen[end];
            }
            end += 1;
        }
        if seen[first].positions > 0 {
            multiply(first, &seen[first..end]);
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
