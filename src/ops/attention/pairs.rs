//! The fold's products in pairs of k, where pages are laid out for them: a tile of up to 16 queries
//! against four pages at a time. Queries and weights are rounded to bfloat16, as the kernels do.

use half::bf16;

use super::{PAGE, TILE, cpu::Block};
use crate::{
    device::cpu::{
        Aligned, Grown,
        pairs::{
            DEPTH, HalfTile, LINE, OfPages, PAGES, SIDE, Tile, add_pages, fetch, multiply_pages,
        },
    },
    ops::Float,
};

const _: () = assert!(PAGES * PAGE == TILE, "the pages of a tile are multiplied together");

/// The most queries of a block.
pub(super) const QUERIES: usize = SIDE;

/// What a block's products work in.
pub(super) struct Scratch {
    queries: Grown<bf16>,
    weights: Aligned<OfPages<bf16>>,
    seen: Grown<bf16>,
}

impl Scratch {
    pub(super) const fn new() -> Self {
        let weights = Aligned([[bf16::ZERO; PAGES * SIDE]; SIDE]);
        Self { queries: Grown::new(), weights, seen: Grown::new() }
    }
}

/// The products of a block.
pub(super) struct Pairs<'a> {
    pages: &'a [bf16],
    /// `[head_dim / 32]`, zero-padded.
    queries: &'a [Tile],
    /// Rounded.
    weights: &'a mut OfPages<bf16>,
    /// Values of a page that are seen, zeros in place of the others.
    seen: &'a mut [HalfTile],
    /// The values of a tile that are wanted next: those of a group of rows at its first.
    wanted: [[&'a [HalfTile]; PAGES]; QUERIES],
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

    /// Whether one's pages begin with the other's.
    fn agrees(&self, other: &Self) -> bool {
        self.positions > 0
            && other.positions > 0
            && self.pages().iter().zip(other.pages()).all(|(a, b)| a == b)
    }
}

impl<'a> Pairs<'a> {
    #[inline(always)]
    pub(super) fn new<T: Float>(
        pages: &'a [bf16],
        block: &Block<'_, T>,
        scratch: &'a mut Scratch,
    ) -> Self {
        let head_dim = block.head_dim();
        let Scratch { queries: tiles, weights, seen } = scratch;
        let tiles = tiles.of(head_dim.next_multiple_of(DEPTH) * SIDE).as_chunks_mut().0;
        if !head_dim.is_multiple_of(DEPTH) {
            tiles.fill([bf16::ZERO; SIDE * DEPTH]);
        }
        for row in 0..block.rows.len() {
            let queries = block.queries(row).chunks_exact(head_dim);
            for (at, query) in (row * block.heads..).zip(queries) {
                for (tile, query) in tiles.iter_mut().zip(query.chunks(DEPTH)) {
                    for (to, &value) in tile[at * DEPTH..].iter_mut().zip(query) {
                        *to = Float::from_f32(value);
                    }
                }
            }
        }
        let seen = seen.of(head_dim.next_multiple_of(SIDE) * PAGE).as_chunks_mut().0;
        let wanted = [[&[][..]; PAGES]; QUERIES];
        Self { pages, queries: tiles, weights: &mut weights.0, seen, wanted }
    }

    /// Fetches the part of a row's values that is one head's, of so many: while weights are computed,
    /// memory would be idle.
    #[inline(always)]
    pub(super) fn fetch(&self, row: usize, head: usize, heads: usize) {
        let [first, ..] = self.wanted[row];
        let lines = size_of_val(first) / LINE;
        let lines = lines * head / heads..lines * (head + 1) / heads;
        for values in self.wanted[row].into_iter().take_while(|values| !values.is_empty()) {
            for line in lines.clone() {
                fetch(values.as_ptr().wrapping_byte_add(line * LINE));
            }
        }
    }

    /// Scores of a tile, neither scaled nor masked, of rows that see it. scores: (queries, TILE).
    #[inline(always)]
    pub(super) fn scores<T: Float>(
        &mut self,
        block: &Block<'_, T>,
        tile: usize,
        scores: &mut OfPages<f32>,
    ) {
        self.wanted = [[&[]; PAGES]; QUERIES];
        let mut groups = Groups::new(block, tile);
        while let Some((first, rows)) = groups.next() {
            // Pages that only some rows see are multiplied for all, and so are those beyond the last;
            // the mask takes care of it.
            let pages = longest(rows).pages();
            let mut keys: [&[Tile]; PAGES] = [&[]; PAGES];
            for (at, keys) in keys.iter_mut().enumerate() {
                let page = pages[at.min(pages.len() - 1)];
                *keys = tiles(block.cache.page.keys(self.pages, page, block.kv_head));
            }
            for (to, &page) in self.wanted[first].iter_mut().zip(pages) {
                *to = half_tiles(block.cache.page.values(self.pages, page, block.kv_head));
            }
            let queries = first * block.heads..(first + rows.len()) * block.heads;
            multiply_pages(block.isa, queries, self.queries, keys, scores);
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
        let weights = weights.as_flattened();
        for (to, &weight) in self.weights.as_flattened_mut().iter_mut().zip(weights) {
            *to = Float::from_f32(weight);
        }
        let mut groups = Groups::new(block, tile);
        while let Some((first, rows)) = groups.next() {
            let all = Rows { first, count: rows.len(), seen: *longest(rows), common: common(rows) };
            if all.add(block, self.pages, self.weights, self.seen, out) {
                continue;
            }
            for (first, row) in (first..).zip(rows) {
                let alone = Rows { first, count: 1, seen: *row, common: row.positions };
                alone.add(block, self.pages, self.weights, self.seen, out);
            }
        }
    }
}

/// Rows whose values are added together.
struct Rows {
    first: usize,
    count: usize,
    /// By the one that reaches farthest.
    seen: Seen,
    /// Positions that all of them see.
    common: usize,
}

impl Rows {
    /// Whether it was done: a row's weights are zero where it sees nothing, but do not undo what is not a
    /// number there, or infinite.
    #[inline(always)]
    fn add<T: Float>(
        &self,
        block: &Block<'_, T>,
        pages: &[bf16],
        weights: &OfPages<bf16>,
        copy: &mut [HalfTile],
        out: &mut [f32],
    ) -> bool {
        let seen = self.seen.pages();
        let mut list: [&[HalfTile]; PAGES] = [&[]; PAGES];
        for (to, page) in list.iter_mut().zip(seen) {
            *to = half_tiles(block.cache.page.values(pages, *page, block.kv_head));
        }
        let list = &mut list[..seen.len()];
        let last = self.seen.positions % PAGE;
        if last > 0 {
            // Beyond what is seen the page may hold anything.
            copy_positions(list[seen.len() - 1], last, copy);
            list[seen.len() - 1] = copy;
        }
        if self.common < self.seen.positions {
            for values in &list[self.common / PAGE..] {
                if !are_finite(values.as_flattened()) {
                    return false;
                }
            }
        }
        let queries = self.first * block.heads..(self.first + self.count) * block.heads;
        add_pages(block.isa, queries, 0, weights, list, out);
        true
    }
}

/// What the row sees that sees most.
#[inline(always)]
fn longest(rows: &[Seen]) -> &Seen {
    let mut longest = &rows[0];
    for row in rows {
        longest = if row.positions > longest.positions { row } else { longest };
    }
    longest
}

/// Positions that all rows see.
#[inline(always)]
fn common(rows: &[Seen]) -> usize {
    let mut common = TILE;
    for row in rows {
        common = common.min(row.positions);
    }
    common
}

#[inline(always)]
fn are_finite(values: &[bf16]) -> bool {
    const EXPONENT: u16 = 0x7f80;
    let mut found = 0;
    for value in values {
        found |= u16::from(value.to_bits() & EXPONENT == EXPONENT);
    }
    found == 0
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
fn tiles(keys: &[bf16]) -> &[Tile] {
    keys.as_chunks().0
}

#[inline(always)]
fn half_tiles(values: &[bf16]) -> &[HalfTile] {
    values.as_chunks().0
}

/// Copies the first positions of a page's values; zeros take the place of the others.
#[inline(always)]
fn copy_positions(values: &[HalfTile], positions: usize, to: &mut [HalfTile]) {
    for (values, to) in values.iter().zip(to) {
        let pairs = values.as_chunks::<DEPTH>().0.iter().zip(to.as_chunks_mut::<DEPTH>().0);
        for (pair, (values, to)) in pairs.enumerate() {
            if 2 * pair + 1 < positions {
                *to = *values;
            } else if 2 * pair < positions {
                for at in 0..DEPTH {
                    to[at] = bf16::from_bits(values[at].to_bits() & FIRST[at]);
                }
            } else {
                *to = [bf16::ZERO; DEPTH];
            }
        }
    }
}

/// Of each pair only the first.
const FIRST: [u16; DEPTH] = {
    let mut mask = [0; DEPTH];
    let mut at = 0;
    while at < DEPTH {
        mask[at] = u16::MAX;
        at += 2;
    }
    mask
};
