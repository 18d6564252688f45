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
        let mut groups = Groups::new(block, tile);
        while let Some((first, rows)) = groups.next() {
            // Pages that only some rows see are multiplied for all, and so are those beyond the last;
            // the mask takes care of it.
            let mut longest = &rows[0];
            for row in rows {
                longest = if row.positions > longest.positions { row } else { longest };
            }
            let pages = longest.pages();
            let mut keys: [&[Tile]; PAGES] = [&[]; PAGES];
            for (at, keys) in keys.iter_mut().enumerate() {
                let page = pages[at.min(pages.len() - 1)];
                *keys = tiles(block.cache.page.keys(self.pages, page, block.kv_head));
            }
            let queries = first * block.heads..(first + rows.len()) * block.heads;
            multiply_pages(block.isa, queries, &self.scratch.queries, keys, scores);
        }
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
        let mut groups = Groups::new(block, tile);
        while let Some((first, rows)) = groups.next() {
            // What all rows see whole is added for all; the rest of each row's pages row by row.
            let mut common = PAGES;
            for row in rows {
                common = common.min(row.whole());
            }
            if common > 0 {
                let mut list: [&[HalfTile]; PAGES] = [&[]; PAGES];
                for (to, page) in list.iter_mut().zip(&rows[0].pages[..common]) {
                    *to = half_tiles(block.cache.page.values(self.pages, *page, block.kv_head));
                }
                let queries = first * block.heads..(first + rows.len()) * block.heads;
                add_pages(block.isa, queries, 0, rounded, &list[..common], out);
            }
            for (row, of_row) in (first..).zip(rows) {
                let pages = of_row.pages();
                if pages.len() == common {
                    continue;
                }
                let mut list: [&[HalfTile]; PAGES] = [&[]; PAGES];
                for (to, page) in list.iter_mut().zip(pages).skip(common) {
                    *to = half_tiles(block.cache.page.values(self.pages, *page, block.kv_head));
                }
                let last = of_row.positions % PAGE;
                if last > 0 {
                    // Beyond what is seen the page may hold anything.
                    copy_positions(list[pages.len() - 1], last, seen);
                    list[pages.len() - 1] = seen;
                }
                let queries = row * block.heads..(row + 1) * block.heads;
                let list = &list[common..pages.len()];
                add_pages(block.isa, queries, common, rounded, list, out);
            }
        }
    }
}

/// Groups of neighbouring rows whose pages of a tile agree. (Written as loops: what a closure does is
/// not compiled for the instruction set that runs it.)
struct Groups {
    seen: [Seen; QUERIES],
    rows: usize,
    next: usize,
}

impl Groups {
    #[inline(always)]
    fn new<T: Float>(block: &Block<'_, T>, tile: usize) -> Self {
        let mut seen = [Seen::default(); QUERIES];
        for (seen, row) in seen.iter_mut().zip(block.rows) {
            if row.sees(tile) {
                seen.positions = (row.positions - tile).min(TILE);
                for at in 0..seen.positions.div_ceil(PAGE) {
                    seen.pages[at] =
                        block.cache.tables().page(row.slot, block.layer, tile / PAGE + at);
                }
            }
        }
        Self { seen, rows: block.rows.len(), next: 0 }
    }

    /// The next group's first row, and what its rows see.
    #[inline(always)]
    fn next(&mut self) -> Option<(usize, &[Seen])> {
        while self.next < self.rows && self.seen[self.next].positions == 0 {
            self.next += 1;
        }
        let first = self.next;
        if first == self.rows {
            return None;
        }
        // As long as each row agrees with the longest before it.
        let mut longest = self.seen[first];
        self.next += 1;
        while self.next < self.rows && longest.agrees(&self.seen[self.next]) {
            if self.seen[self.next].positions > longest.positions {
                longest = self.seen[self.next];
            }
            self.next += 1;
        }
        Some((first, &self.seen[first..self.next]))
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
