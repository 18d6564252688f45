//! Causal attention over the paged cache, as one left fold: over tiles of [`TILE`] absolute
//! positions in order, carrying (max, sum, output) in f32, restarted every [`CHUNK`] positions,
//! chunk results merged in ascending order. Forks, chunked prefills and shared pages therefore
//! cannot change a bit.

use super::{
    Float,
    math::{LANES, exp, max, sum_lanes},
    residual_norm::Rows,
    tile::{Left, Right, WIDTH, tile, widen},
};
use crate::{
    device::{
        Buffer, Device,
        cpu::{Isa, Kernel, Shared},
    },
    error::Result,
};

/// Positions of a page.
pub const PAGE: usize = 16;
const TILE: usize = 64;
const CHUNK: usize = 1024;
/// The widest head.
pub const MAX_HEAD_DIM: usize = 256;
/// Query heads folded side by side.
const GROUP: usize = 4;

/// Sizes of the cache.
#[derive(Clone, Copy, Debug)]
pub struct CacheShape {
    /// Blocks of the model.
    pub layers: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Their width.
    pub head_dim: usize,
    /// Pages in all, each of one layer.
    pub pages: usize,
    /// Sequences at a time.
    pub slots: usize,
    /// Pages of a sequence at a layer.
    pub blocks: usize,
}

impl CacheShape {
    /// Elements of a page: keys `[kv_heads][head_dim][PAGE]`, then values `[kv_heads][PAGE][head_dim]`.
    pub fn page_len(&self) -> usize {
        2 * self.kv_heads * self.head_dim * PAGE
    }

    /// Where the keys' element `d` of a head starts, [`PAGE`] positions side by side.
    pub(super) fn key(&self, page: usize, head: usize, d: usize) -> usize {
        page * self.page_len() + (head * self.head_dim + d) * PAGE
    }

    /// Where the value of the page's position `lane` starts.
    pub(super) fn value(&self, page: usize, head: usize, lane: usize) -> usize {
        let values = self.kv_heads * self.head_dim * PAGE;
        page * self.page_len() + values + (head * PAGE + lane) * self.head_dim
    }
}

/// Pages of keys and values, and which of them are whose.
pub struct Cache<T> {
    /// Sizes.
    pub shape: CacheShape,
    tables: Tables,
    pages: Buffer<T>,
}

/// (slots, layers, blocks): the page of each block of positions.
pub(super) struct Tables {
    layers: usize,
    blocks: usize,
    pages: Vec<u32>,
}

impl Tables {
    #[inline]
    pub(super) fn page(&self, slot: usize, layer: usize, block: usize) -> usize {
        assert!(layer < self.layers && block < self.blocks, "block {block} of layer {layer}");
        self.pages[(slot * self.layers + layer) * self.blocks + block] as usize
    }
}

impl<T: Float> Cache<T> {
    /// Takes the memory.
    pub fn new(device: &Device, shape: CacheShape) -> Result<Self> {
        let pages = Buffer::zeroed(device, shape.pages * shape.page_len())?;
        let table = vec![0; shape.slots * shape.layers * shape.blocks];
        let tables = Tables { layers: shape.layers, blocks: shape.blocks, pages: table };
        Ok(Self { shape, tables, pages })
    }

    /// Sets the pages of a slot at a layer.
    pub fn set_table(&mut self, slot: usize, layer: usize, pages: &[u32]) {
        let start = (slot * self.shape.layers + layer) * self.shape.blocks;
        assert!(pages.len() <= self.shape.blocks, "{} pages", pages.len());
        assert!(pages.iter().all(|&page| (page as usize) < self.shape.pages), "page");
        self.tables.pages[start..start + pages.len()].copy_from_slice(pages);
    }

    pub(super) fn split_mut(&mut self) -> (&Tables, &mut [T]) {
        (&self.tables, self.pages.host_mut())
    }
}

/// For rows `0..rows` of rotated qkv, (rows, (heads + 2 · `kv_heads`) · `head_dim`): attention of each
/// query over the positions of its sequence up to its own, to out, (rows, heads · `head_dim`).
#[expect(clippy::too_many_arguments, reason = "operands, in the formula's order")]
pub fn attention<T: Float>(
    device: &Device,
    rows: usize,
    heads: usize,
    qkv: &Buffer<f32>,
    at: &Rows,
    layer: usize,
    cache: &Cache<T>,
    out: &mut Buffer<T>,
) {
    let Device::Cpu(cpu) = device;
    let shape = cache.shape;
    let (head_dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    let (width, group) = ((heads + 2 * kv_heads) * head_dim, heads / kv_heads);
    assert!(qkv.len() >= rows * width && out.len() >= rows * heads * head_dim, "qkv, out");
    assert!(head_dim <= MAX_HEAD_DIM && heads.is_multiple_of(kv_heads), "heads");
    let out = Shared::new(out.host_mut());
    let work = |row: usize| {
        let queries = &qkv.host()[row * width..][..heads * head_dim];
        // SAFETY: each task has its own rows.
        let out = unsafe { out.range(row * heads * head_dim, heads * head_dim) };
        for first in (0..heads).step_by(group) {
            for start in (first..first + group).step_by(GROUP) {
                let count = GROUP.min(first + group - start);
                let fold = Fold {
                    isa: cpu.isa(),
                    q: &queries[start * head_dim..][..count * head_dim],
                    positions: at.position[row] as usize + 1,
                    slot: at.slot[row] as usize,
                    layer,
                    kv_head: first / group,
                    cache,
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
    cpu.parallel_chunks(rows, 4, |range| range.for_each(work));
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
        for start in (0..fold.positions).step_by(CHUNK) {
            let mut state = State::<R>::new();
            let end = fold.positions.min(start + CHUNK);
            for tile in (start..end).step_by(TILE) {
                fold.tile::<R>(tile, TILE.min(end - tile), &mut state);
            }
            if start == 0 {
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
    /// Folds `valid` positions from `start` on.
    #[inline(always)]
    fn tile<const R: usize>(&self, start: usize, valid: usize, state: &mut State<R>) {
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
                for lane in 0..PAGE.min(valid - block * PAGE) {
                    weights[r][block * PAGE + lane] = scores[r][lane] * scale;
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
    fn keys(&self, block: usize) -> &[T] {
        let page = self.cache.tables.page(self.slot, self.layer, block);
        let start = self.cache.shape.key(page, self.kv_head, 0);
        &self.cache.pages.host()[start..][..self.cache.shape.head_dim * PAGE]
    }

    #[inline(always)]
    fn values(&self, block: usize) -> &[T] {
        let page = self.cache.tables.page(self.slot, self.layer, block);
        let start = self.cache.shape.value(page, self.kv_head, 0);
        &self.cache.pages.host()[start..][..self.cache.shape.head_dim * PAGE]
    }
}
