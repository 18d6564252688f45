//! The fold on the processor: query heads of one row that share a key head, side by side.

use super::{Attention, CHUNK, Cache, MAX_HEAD_DIM, PAGE, TILE};
use crate::{
    device::cpu::{Cpu, Isa, Kernel, Shared},
    ops::{
        Float,
        math::{LANES, exp, max, sum_lanes},
        rows::NONE,
        tile::{Left, Right, WIDTH, tile, widen},
    },
};

/// Query heads folded side by side.
const GROUP: usize = 4;

pub(super) fn attention<T: Float>(cpu: &Cpu, p: Attention<'_, T>) {
    let shape = p.cache.shape;
    let (head_dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    let (width, group) = ((p.heads + 2 * kv_heads) * head_dim, p.heads / kv_heads);
    let row_len = p.heads * head_dim;
    let (slots, positions) = (p.at.slot.host(), p.at.position.host());
    let out = Shared::new(p.out.host_mut());
    let work = |row: usize| {
        if slots[row] == NONE {
            return;
        }
        let queries = &p.qkv.host()[row * width..][..row_len];
        // SAFETY: each task has its own rows.
        let out = unsafe { out.range(row * row_len, row_len) };
        for first in (0..p.heads).step_by(group) {
            for start in (first..first + group).step_by(GROUP) {
                let count = GROUP.min(first + group - start);
                let fold = Fold {
                    isa: cpu.isa(),
                    q: &queries[start * head_dim..][..count * head_dim],
                    positions: positions[row] as usize + 1,
                    slot: slots[row] as usize,
                    layer: p.layer,
                    kv_head: first / group,
                    cache: p.cache,
                    soft_cap: p.soft_cap,
                    window: p.window,
                    out: &mut out[start * head_dim..][..count * head_dim],
                };
                match count {
                    1 => cpu.isa().run(Of::<1, T>(fold)),
                    2 => cpu.isa().run(Of::<2, T>(fold)),
                    3 => cpu.isa().run(Of::<3, T>(fold)),
                    _ => cpu.isa().run(Of::<4, T>(fold)),
                }
            }
        }
    };
    cpu.parallel_chunks(p.rows, 4, |range| range.for_each(work));
}

/// Query heads of one row that share a key head.
struct Fold<'a, T> {
    isa: Isa,
    q: &'a [f32],
    positions: usize,
    slot: usize,
    layer: usize,
    kv_head: usize,
    cache: &'a Cache<T>,
    soft_cap: Option<f32>,
    window: Option<usize>,
    out: &'a mut [T],
}

/// A fold of R query heads.
struct Of<'a, const R: usize, T>(Fold<'a, T>);

/// What the fold carries: max, sum and output of each head.
struct State<const R: usize> {
    max: [f32; R],
    sum: [f32; R],
    out: [[f32; MAX_HEAD_DIM]; R],
}

impl<const R: usize> State<R> {
    #[inline(always)]
    fn new() -> Self {
        Self { max: [f32::NEG_INFINITY; R], sum: [0.0; R], out: [[0.0; MAX_HEAD_DIM]; R] }
    }

    /// Folds a later chunk into this one.
    #[inline(always)]
    fn merge(&mut self, later: &Self, head_dim: usize) {
        for r in 0..R {
            let max = self.max[r].max(later.max[r]);
            let (mine, theirs) = (exp(self.max[r] - max), exp(later.max[r] - max));
            self.max[r] = max;
            self.sum[r] = self.sum[r] * mine + later.sum[r] * theirs;
            for d in 0..head_dim {
                self.out[r][d] = self.out[r][d] * mine + later.out[r][d] * theirs;
            }
        }
    }
}

impl<const R: usize, T: Float> Kernel for Of<'_, R, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let fold = self.0;
        let head_dim = fold.cache.shape.head_dim;
        let mut total = State::<R>::new();
        // Tiles that nothing is seen of change nothing.
        let seen = fold.positions - fold.window.unwrap_or(fold.positions).min(fold.positions);
        let first_chunk = seen / CHUNK * CHUNK;
        for start in (first_chunk..fold.positions).step_by(CHUNK) {
            let mut state = State::<R>::new();
            let end = fold.positions.min(start + CHUNK);
            for tile in (start.max(seen / TILE * TILE)..end).step_by(TILE) {
                fold.tile::<R>(tile, TILE.min(end - tile), seen, &mut state);
            }
            if start == first_chunk {
                total = state;
            } else {
                total.merge(&state, head_dim);
            }
        }
        for r in 0..R {
            let out = &mut fold.out[r * head_dim..][..head_dim];
            for (out, &v) in out.iter_mut().zip(&total.out[r]) {
                *out = T::from_f32(v / total.sum[r]);
            }
        }
    }
}

impl<T: Float> Fold<'_, T> {
    /// Folds those of `valid` positions from `start` on that are not before `seen`.
    #[inline(always)]
    fn tile<const R: usize>(&self, start: usize, valid: usize, seen: usize, state: &mut State<R>) {
        let head_dim = self.cache.shape.head_dim;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let isa = self.isa;
        let mut weights = [[f32::NEG_INFINITY; TILE]; R];
        let mut page = [0.0f32; (MAX_HEAD_DIM + 1) * PAGE];
        for block in 0..valid.div_ceil(PAGE) {
            widen(self.keys(start / PAGE + block), &mut page[..head_dim * PAGE]);
            let q = Left { values: self.q, row_stride: head_dim, k_stride: 1 };
            let mut scores = [[0.0f32; PAGE]; R];
            tile(isa, head_dim, q, Right { values: &page, stride: PAGE }, &mut scores);
            for r in 0..R {
                let first = seen.saturating_sub(start + block * PAGE).min(PAGE);
                for lane in first..PAGE.min(valid - block * PAGE) {
                    weights[r][block * PAGE + lane] = self.capped(scores[r][lane] * scale);
                }
            }
        }
        for r in 0..R {
            let tile_max = max(&weights[r]);
            let new_max = if tile_max > state.max[r] { tile_max } else { state.max[r] };
            let keep = exp(state.max[r] - new_max);
            let mut lanes = [0.0f32; LANES];
            for chunk in weights[r].as_chunks_mut::<LANES>().0 {
                for lane in 0..LANES {
                    chunk[lane] = exp(chunk[lane] - new_max);
                    lanes[lane] += chunk[lane];
                }
            }
            state.max[r] = new_max;
            state.sum[r] = state.sum[r] * keep + sum_lanes(lanes);
            for out in &mut state.out[r][..head_dim] {
                *out *= keep;
            }
        }
        for block in 0..valid.div_ceil(PAGE) {
            let count = PAGE.min(valid - block * PAGE);
            let values = &self.values(start / PAGE + block)[..count * head_dim];
            widen(values, &mut page[..count * head_dim]);
            let weights = &weights.as_flattened()[block * PAGE..];
            let x = Left { values: weights, row_stride: TILE, k_stride: 1 };
            for d in (0..head_dim).step_by(WIDTH) {
                // A ragged last column block reads on into the next row, and drops it.
                let w = Right { values: &page[d..], stride: head_dim };
                let mut sums = [[0.0f32; WIDTH]; R];
                let width = WIDTH.min(head_dim - d);
                for r in 0..R {
                    sums[r][..width].copy_from_slice(&state.out[r][d..d + width]);
                }
                tile(isa, count, x, w, &mut sums);
                for r in 0..R {
                    state.out[r][d..d + width].copy_from_slice(&sums[r][..width]);
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

    #[inline(always)]
    fn keys(&self, block: usize) -> &[T] {
        let page = self.cache.tables().page(self.slot, self.layer, block);
        let start = self.cache.shape.key(page, self.kv_head, 0);
        &self.cache.pages.host()[start..][..self.cache.shape.head_dim * PAGE]
    }

    #[inline(always)]
    fn values(&self, block: usize) -> &[T] {
        let page = self.cache.tables().page(self.slot, self.layer, block);
        let start = self.cache.shape.value(page, self.kv_head, 0);
        &self.cache.pages.host()[start..][..self.cache.shape.head_dim * PAGE]
    }
}
