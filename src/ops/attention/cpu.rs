//! The fold on the processor: queries of rows side by side, so that a page of keys or values is read
//! once for all rows that see it, be they trials that share a prompt or the prompt's own.

use std::{cell::RefCell, ops::Range};

use half::bf16;

use super::{
    Attention, CHUNK, Cache, PAGE, TILE,
    pairs::{self, Pairs},
};
use crate::{
    device::cpu::{Cpu, Grown, Isa, Kernel, Shared, pairs::OfPages},
    ops::{
        Float, Round,
        math::{LANES, exp, max, sum_lanes},
        rows::NONE,
        tile::{Left, Right, WIDTH, tile, widen},
    },
};

/// Queries of a block: rows, times their heads that share a key head. Their states stay in the L2
/// cache.
const QUERIES: usize = 48;
/// Queries of a register tile.
const SIDE_BY_SIDE: usize = 6;
/// Pages of a tile.
const PAGES: usize = TILE / PAGE;

thread_local! {
    /// What a block works in; grown once.
    static SCRATCH: RefCell<(Grown<f32>, pairs::Scratch)> =
        const { RefCell::new((Grown::new(), pairs::Scratch::new())) };
}

pub(super) fn attention<T: Float>(cpu: &Cpu, p: Attention<'_, T>) {
    let kv_heads = p.cache.shape.kv_heads;
    let group = p.heads / kv_heads;
    let pages = T::as_bf16(p.cache.pages.host()).filter(|_| p.cache.page.is_pairs());
    let queries = if pages.is_some() { pairs::QUERIES } else { QUERIES };
    let heads = group.min(queries);
    let rows = queries / heads;
    let head_blocks = group.div_ceil(heads);
    let out = Shared::new(p.out.host_mut());
    let (slots, positions) = (p.at.slot.host(), p.at.position.host());
    let row_of = |row: usize| match slots[row] {
        NONE => Row::default(),
        slot => {
            let positions = positions[row] as usize + 1;
            let unseen = positions - p.window.unwrap_or(positions).min(positions);
            Row { slot: slot as usize, positions, unseen }
        }
    };
    let blocks = p.rows.div_ceil(rows);
    cpu.parallel(blocks * kv_heads * head_blocks, |task| {
        let (block, of_heads) = (task / (kv_heads * head_blocks), task % (kv_heads * head_blocks));
        let (kv_head, first) = (of_heads / head_blocks, of_heads % head_blocks * heads);
        let first_row = block * rows;
        let mut list = [Row::default(); QUERIES];
        let count = rows.min(p.rows - first_row);
        list.iter_mut().zip(first_row..first_row + count).for_each(|(to, row)| *to = row_of(row));
        let head_dim = p.cache.shape.head_dim;
        let (head, width) = (kv_head * group + first, (p.heads + 2 * kv_heads) * head_dim);
        let block = Block {
            isa: cpu.isa(),
            rows: &list[..count],
            heads: heads.min(group - first),
            kv_head,
            layer: p.layer,
            cache: p.cache,
            queries: &p.qkv.host()[first_row * width + head * head_dim..],
            width,
            scale: p.scale,
            soft_cap: p.soft_cap,
        };
        SCRATCH.with_borrow_mut(|(scratch, of_pairs)| {
            let mut scratch = Scratch::cut(scratch.of(Scratch::len(head_dim)), head_dim);
            cpu.isa().run(Fold(&block, &mut scratch, pages.map(|pages| (pages, of_pairs))));
            let len = block.heads * head_dim;
            for (row, _) in block.rows.iter().enumerate().filter(|(_, row)| row.positions > 0) {
                let start = ((first_row + row) * p.heads + head) * head_dim;
                // SAFETY: each task has its own rows and heads.
                let out = unsafe { out.range(start, len) };
                let queries = scratch.out.chunks_exact(block.out_width()).skip(row * block.heads);
                for (out, query) in out.chunks_exact_mut(head_dim).zip(queries) {
                    cpu.isa().run(Round(query, out));
                }
            }
        });
    });
}

/// A row of the step.
#[derive(Clone, Copy, Default)]
pub(super) struct Row {
    pub(super) slot: usize,
    /// Positions up to its own; 0: nothing is computed.
    pub(super) positions: usize,
    /// Positions before its window.
    unseen: usize,
}

impl Row {
    /// Positions of a page, from `start` on, that the row does not lie before.
    #[inline(always)]
    fn reached(&self, start: usize) -> usize {
        self.positions.saturating_sub(start).min(PAGE)
    }

    /// Whether it sees something of the tile that starts here.
    #[inline(always)]
    pub(super) fn sees(&self, tile: usize) -> bool {
        self.positions > tile && self.unseen < tile + TILE
    }

    fn first_tile(&self) -> usize {
        self.unseen / TILE * TILE
    }
}

/// Rows, and those of their heads that share a key head. Query q is head q % heads of row
/// q / heads.
pub(super) struct Block<'a, T> {
    pub(super) isa: Isa,
    pub(super) rows: &'a [Row],
    pub(super) heads: usize,
    pub(super) kv_head: usize,
    pub(super) layer: usize,
    pub(super) cache: &'a Cache<T>,
    /// From the first row's first head on, rows `width` apart.
    queries: &'a [f32],
    width: usize,
    scale: f32,
    soft_cap: Option<f32>,
}

/// What the fold carries, and works in.
struct Scratch<'a> {
    /// (queries, `head_dim`)
    queries: &'a mut [f32],
    /// (queries, TILE): scores, then their exponentials.
    weights: &'a mut [f32],
    /// (queries,)
    max: &'a mut [f32],
    /// (queries,)
    sum: &'a mut [f32],
    /// (queries, `head_dim` in whole lanes)
    out: &'a mut [f32],
    /// max, sum and out of the chunks before.
    before: [&'a mut [f32]; 3],
    /// A page of keys or values in f32, and what a ragged last column reads behind it.
    page: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn sizes(head_dim: usize) -> [usize; 9] {
        let (one, queries) = (QUERIES, QUERIES * head_dim);
        let out = QUERIES * head_dim.next_multiple_of(WIDTH);
        [queries, QUERIES * TILE, one, one, out, one, one, out, (head_dim + 1) * PAGE + WIDTH]
    }

    fn len(head_dim: usize) -> usize {
        Self::sizes(head_dim).iter().sum()
    }

    fn cut(mut all: &'a mut [f32], head_dim: usize) -> Self {
        let mut next = |len: usize| all.split_off_mut(..len).unwrap_or_default();
        let [queries, weights, max, sum, out, max_before, sum_before, out_before, page] =
            Self::sizes(head_dim).map(&mut next);
        Self { queries, weights, max, sum, out, before: [max_before, sum_before, out_before], page }
    }
}

/// Folds all queries of a block; `out` of the scratch is the result.
struct Fold<'a, 'b, T>(
    &'a Block<'a, T>,
    &'a mut Scratch<'b>,
    /// Pages laid out for products of pairs.
    Option<(&'a [bf16], &'a mut pairs::Scratch)>,
);

impl<T: Float> Kernel for Fold<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let Self(block, scratch, pages) = self;
        let live = || block.rows.iter().filter(|row| row.positions > 0);
        let end = live().map(|row| row.positions).max().unwrap_or(0);
        let first = live().map(Row::first_tile).min().unwrap_or(0);
        let queries = block.rows.len() * block.heads;
        scratch.start(0..queries, block.out_width());
        // Not in a closure, which would be compiled for every processor.
        let mut pairs = match pages {
            Some((pages, of_pairs)) => Some(Pairs::new(pages, block, of_pairs)),
            None => {
                let queries = scratch.queries.chunks_mut(block.heads * block.head_dim());
                for (row, to) in (0..block.rows.len()).zip(queries) {
                    to.copy_from_slice(block.queries(row));
                }
                None
            }
        };
        for tile in (first..end).step_by(TILE) {
            if tile.is_multiple_of(CHUNK) && tile > first {
                block.close_chunk(tile, scratch);
            }
            match &mut pairs {
                Some(pairs) => {
                    pairs.scores(block, tile, of_pages(scratch.weights));
                    block.exponentials(tile, scratch, Some(pairs));
                    let out = &mut scratch.out[..pairs::QUERIES * block.out_width()];
                    pairs.values(block, tile, of_pages(scratch.weights), out);
                }
                None => {
                    block.scores(tile, scratch);
                    block.exponentials(tile, scratch, None);
                    block.values(tile, scratch);
                }
            }
        }
        block.finish(scratch);
    }
}

impl Scratch<'_> {
    /// Begins a fold of these queries.
    #[inline(always)]
    fn start(&mut self, queries: Range<usize>, width: usize) {
        self.max[queries.clone()].fill(f32::NEG_INFINITY);
        self.sum[queries.clone()].fill(0.0);
        self.out[queries.start * width..queries.end * width].fill(0.0);
    }

    /// Puts a query's chunks so far, where there are any, before the one that has ended.
    #[inline(always)]
    fn merge(&mut self, q: usize, width: usize, is_first: bool) {
        if is_first {
            return;
        }
        let [max_before, sum_before, out_before] = &mut self.before;
        let range = q * width..(q + 1) * width;
        let (out, before) = (&mut self.out[range.clone()], &out_before[range]);
        let max = max_before[q].max(self.max[q]);
        let (earlier, later) = (exp(max_before[q] - max), exp(self.max[q] - max));
        self.max[q] = max;
        self.sum[q] = sum_before[q] * earlier + self.sum[q] * later;
        for (out, &before) in out.iter_mut().zip(before) {
            *out = before * earlier + *out * later;
        }
    }
}

impl<T: Float> Block<'_, T> {
    #[inline(always)]
    pub(super) fn head_dim(&self) -> usize {
        self.cache.shape.head_dim
    }

    /// The queries of a row: (heads, `head_dim`).
    #[inline(always)]
    pub(super) fn queries(&self, row: usize) -> &[f32] {
        &self.queries[row * self.width..][..self.heads * self.head_dim()]
    }

    /// Floats from a query's output to the next's: whole lanes.
    #[inline(always)]
    fn out_width(&self) -> usize {
        self.head_dim().next_multiple_of(WIDTH)
    }

    /// Whether the row sees nothing before the chunk that `tile` is in.
    #[inline(always)]
    fn is_first_chunk(row: &Row, tile: usize) -> bool {
        row.first_tile() / CHUNK == tile / CHUNK
    }

    /// Before the first tile of a chunk: what was folded is kept, and a new fold begun.
    #[inline(always)]
    fn close_chunk(&self, tile: usize, scratch: &mut Scratch) {
        let width = self.out_width();
        for (at, row) in self.rows.iter().enumerate() {
            if !row.sees(tile) || row.first_tile() >= tile {
                continue;
            }
            let queries = at * self.heads..(at + 1) * self.heads;
            for q in queries.clone() {
                scratch.merge(q, width, Self::is_first_chunk(row, tile - 1));
                let [max, sum, out] = &mut scratch.before;
                (max[q], sum[q]) = (scratch.max[q], scratch.sum[q]);
                let range = q * width..(q + 1) * width;
                out[range.clone()].copy_from_slice(&scratch.out[range]);
            }
            scratch.start(queries, width);
        }
    }

    /// Merges the last chunks, and divides.
    #[inline(always)]
    fn finish(&self, scratch: &mut Scratch) {
        let width = self.out_width();
        for (at, row) in self.rows.iter().enumerate().filter(|(_, row)| row.positions > 0) {
            for q in at * self.heads..(at + 1) * self.heads {
                scratch.merge(q, width, Self::is_first_chunk(row, row.positions - 1));
                let sum = scratch.sum[q];
                scratch.out[q * width..][..width].iter_mut().for_each(|v| *v /= sum);
            }
        }
    }

    /// The page of a block of positions, and how many of them the row reaches; `None` where it sees
    /// nothing of the tile or does not reach the block.
    #[inline(always)]
    fn page(&self, row: &Row, tile: usize, block: usize) -> Option<(usize, usize)> {
        let reached = row.reached(tile + block * PAGE);
        if !row.sees(tile) || reached == 0 {
            return None;
        }
        let tables = self.cache.tables();
        Some((tables.page(row.slot, self.layer, tile / PAGE + block), reached))
    }

    /// The rows from `first` on for which `what` is the same, and what it is.
    #[inline(always)]
    pub(super) fn alike<K: PartialEq>(&self, first: usize, what: impl Fn(&Row) -> K) -> (usize, K) {
        let key = what(&self.rows[first]);
        let rest = &self.rows[first + 1..];
        let same = rest.iter().take_while(|row| what(row) == key).count();
        (first + 1 + same, key)
    }

    /// Scores of a tile, neither scaled nor masked, where a row reaches a page.
    #[inline(always)]
    fn scores(&self, tile: usize, scratch: &mut Scratch) {
        for block in 0..PAGES {
            let mut first = 0;
            while first < self.rows.len() {
                let page_of = |row: &Row| self.page(row, tile, block).map(|(page, _)| page);
                let (end, page) = self.alike(first, page_of);
                if let Some(page) = page {
                    self.page_scores(block, page, first..end, scratch);
                }
                first = end;
            }
        }
    }

    #[inline(always)]
    fn page_scores(&self, block: usize, page: usize, rows: Range<usize>, scratch: &mut Scratch) {
        let head_dim = self.head_dim();
        let shape = self.cache.page;
        let keys = shape.keys(self.cache.pages.host(), page, self.kv_head);
        let mut q = rows.start * self.heads;
        let end = rows.end * self.heads;
        let few = end - q <= SIDE_BY_SIDE;
        if !few {
            widen(keys, &mut scratch.page[..head_dim * PAGE]);
        }
        while q < end {
            let count = SIDE_BY_SIDE.min(end - q);
            let values = &scratch.queries[q * head_dim..(q + count) * head_dim];
            let x = Left { values, row_stride: head_dim, k_stride: 1 };
            let mut scores = [[0.0f32; PAGE]; SIDE_BY_SIDE];
            if few {
                // The values are read next.
                let ahead = shape.ahead(self.kv_head);
                let w = Right { values: keys, stride: PAGE, ahead };
                tile_of(self.isa, count, head_dim, x, w, &mut scores);
            } else {
                let w = Right { values: &scratch.page[..head_dim * PAGE], stride: PAGE, ahead: 0 };
                tile_of(self.isa, count, head_dim, x, w, &mut scores);
            }
            for (at, scores) in (q..).zip(&scores[..count]) {
                scratch.weights[at * TILE + block * PAGE..][..PAGE].copy_from_slice(scores);
            }
            q += count;
        }
    }

    /// Scores become weights, and what was folded before is scaled to the new maximum. (One thing after
    /// another for all queries: in short loops the processor overlaps one query's chain with the next's.)
    #[inline(always)]
    fn exponentials(&self, tile: usize, scratch: &mut Scratch, pairs: Option<&Pairs>) {
        let (all, width) = (scratch.weights.as_chunks_mut::<TILE>().0, self.out_width());
        let mut keep = [1.0f32; QUERIES];
        for (at, row) in self.rows.iter().enumerate().filter(|(_, row)| row.sees(tile)) {
            let first = row.unseen.saturating_sub(tile).min(TILE);
            let last = (row.positions - tile).min(TILE);
            for q in at * self.heads..(at + 1) * self.heads {
                self.mask(&mut all[q], first..last);
                let (old, tile_max) = (scratch.max[q], max(self.isa, &all[q]));
                if tile_max > old {
                    scratch.max[q] = tile_max;
                    keep[q] = exp(old - tile_max);
                }
            }
        }
        for (at, _) in self.rows.iter().enumerate().filter(|(_, row)| row.sees(tile)) {
            for (head, q) in (at * self.heads..(at + 1) * self.heads).enumerate() {
                if let Some(pairs) = pairs {
                    pairs.fetch(at, head, self.heads);
                }
                let mut lanes = [0.0f32; LANES];
                for chunk in all[q].as_chunks_mut::<LANES>().0 {
                    for lane in 0..LANES {
                        chunk[lane] = exp(chunk[lane] - scratch.max[q]);
                        lanes[lane] += chunk[lane];
                    }
                }
                scratch.sum[q] = scratch.sum[q] * keep[q] + sum_lanes(lanes);
            }
        }
        for (q, &keep) in keep.iter().enumerate().filter(|(_, keep)| **keep != 1.0) {
            scratch.out[q * width..][..width].iter_mut().for_each(|out| *out *= keep);
        }
    }

    /// Scaled and capped scores of the positions that are seen, -infinity for the others.
    #[inline(always)]
    fn mask(&self, scores: &mut [f32; TILE], seen: Range<usize>) {
        scores.iter_mut().for_each(|score| *score *= self.scale);
        if self.soft_cap.is_some() {
            scores.iter_mut().for_each(|score| *score = self.capped(*score));
        }
        if seen != (0..TILE) {
            let (first, last) = (seen.start as u32, seen.end as u32);
            for (score, at) in scores.iter_mut().zip(0..) {
                *score = if first <= at && at < last { *score } else { f32::NEG_INFINITY };
            }
        }
    }

    /// Adds the weighted values of a tile.
    #[inline(always)]
    fn values(&self, tile: usize, scratch: &mut Scratch) {
        let len = self.head_dim() * PAGE;
        for block in 0..PAGES {
            let mut widened = None;
            let mut first = 0;
            while first < self.rows.len() {
                // Rows that reach as far: beyond, the page may hold anything.
                let (end, found) = self.alike(first, |row| self.page(row, tile, block));
                if let Some((page, reached)) = found {
                    let pages = self.cache.pages.host();
                    let values = self.cache.page.values(pages, page, self.kv_head);
                    let weights = &scratch.weights[block * PAGE..];
                    let queries = first * self.heads..end * self.heads;
                    // A ragged last column block reads on behind the page.
                    let few =
                        queries.len() <= SIDE_BY_SIDE && self.head_dim().is_multiple_of(WIDTH);
                    if few && widened != Some(page) {
                        self.page_values(values, reached, queries, weights, scratch.out);
                    } else {
                        if widened != Some(page) {
                            widen(values, &mut scratch.page[..len]);
                            widened = Some(page);
                        }
                        self.page_values(scratch.page, reached, queries, weights, scratch.out);
                    }
                }
                first = end;
            }
        }
    }

    /// weights: (queries, TILE), from the page's first position on.
    #[inline(always)]
    fn page_values<W: Float>(
        &self,
        page: &[W],
        positions: usize,
        queries: Range<usize>,
        weights: &[f32],
        out: &mut [f32],
    ) {
        let (head_dim, width) = (self.head_dim(), self.out_width());
        for first in queries.clone().step_by(SIDE_BY_SIDE) {
            let count = SIDE_BY_SIDE.min(queries.end - first);
            let x = Left { values: &weights[first * TILE..], row_stride: TILE, k_stride: 1 };
            for d in (0..head_dim).step_by(WIDTH) {
                // A ragged last column block reads on into the next row, and nobody reads the sums.
                let w = Right { values: &page[d..], stride: head_dim, ahead: 0 };
                let mut sums = [[0.0f32; WIDTH]; SIDE_BY_SIDE];
                for (sums, q) in sums[..count].iter_mut().zip(first..) {
                    sums.copy_from_slice(&out[q * width + d..][..WIDTH]);
                }
                tile_of(self.isa, count, positions, x, w, &mut sums);
                for (sums, q) in sums[..count].iter().zip(first..) {
                    out[q * width + d..][..WIDTH].copy_from_slice(sums);
                }
            }
        }
    }

    #[inline(always)]
    fn capped(&self, score: f32) -> f32 {
        let Some(cap) = self.soft_cap else { return score };
        // tanh |y| = (1 − e^(−2|y|)) / (1 + e^(−2|y|)).
        let small = exp(-2.0 * (score / cap).abs());
        (cap * ((1.0 - small) / (1.0 + small))).copysign(score)
    }
}

/// The first queries' weights.
#[inline(always)]
fn of_pages(weights: &mut [f32]) -> &mut OfPages<f32> {
    weights.as_chunks_mut().0.first_chunk_mut().expect("as many as a block has")
}

/// The register tile of the first `count` rows.
#[inline(always)]
fn tile_of<W: Float>(
    isa: Isa,
    count: usize,
    k: usize,
    x: Left,
    w: Right<W>,
    sums: &mut [[f32; WIDTH]; SIDE_BY_SIDE],
) {
    macro_rules! of {
        ($count:literal) => {
            if let Some(sums) = sums.first_chunk_mut::<$count>() {
                tile(isa, k, x, w, sums);
            }
        };
    }
    match count {
        1 => of!(1),
        2 => of!(2),
        3 => of!(3),
        4 => of!(4),
        5 => of!(5),
        _ => of!(6),
    }
}
