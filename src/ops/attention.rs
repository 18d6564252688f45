//! Causal attention over the paged cache, as one left fold: over tiles of [`TILE`] absolute
//! positions in order, carrying (max, sum, output) in f32, restarted every [`CHUNK`] positions,
//! chunk results merged in ascending order. Forks, chunked prefills and shared pages therefore
//! cannot change a bit.

mod cpu;
mod page;
mod pairs;
mod plan;

pub use page::PageShape;
pub use plan::{AttentionPlan, Items, SharedPrefix};

use self::plan::Item;
use super::{Float, activations::Activations, matmul::Dtype, rows::Rows};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Positions of a page.
pub const PAGE: usize = 16;
/// Positions that the fold takes at a time.
pub const TILE: usize = 64;
/// Positions after which the fold is restarted.
pub const CHUNK: usize = 1024;
/// Up to so many blocks a layer, a slot's table is written in one piece.
const FEW_BLOCKS: usize = 64;
/// The widest head.
pub const MAX_HEAD_DIM: usize = 256;

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

/// Pages of keys and values, and which of them are whose.
pub struct Cache<T> {
    /// Sizes.
    pub shape: CacheShape,
    /// Sizes of a page.
    pub(super) page: PageShape,
    /// (slots, layers, blocks): the page of each block of positions.
    tables: Buffer<u32>,
    pages: Buffer<T>,
    /// Pairs of pages on their way to [`super::copy_pages`].
    pub(super) copies: Buffer<[u32; 2]>,
}

/// The tables as the processor reads them.
#[derive(Clone, Copy)]
pub(super) struct Tables<'a> {
    layers: usize,
    blocks: usize,
    pages: &'a [u32],
}

impl Tables<'_> {
    #[inline]
    pub(super) fn page(&self, slot: usize, layer: usize, block: usize) -> usize {
        assert!(layer < self.layers && block < self.blocks, "block {block} of layer {layer}");
        self.pages[(slot * self.layers + layer) * self.blocks + block] as usize
    }
}

impl<T: Float> Cache<T> {
    /// Takes the memory.
    ///
    /// # Errors
    /// There is not enough.
    pub fn new(device: &Device, shape: CacheShape) -> Result<Self> {
        let page = PageShape::new(device, T::DTYPE, shape.kv_heads, shape.head_dim);
        Ok(Self {
            shape,
            page,
            tables: Buffer::zeroed(device, shape.slots * shape.layers * shape.blocks)?,
            pages: Buffer::zeroed(device, shape.pages * page.elements())?,
            copies: Buffer::zeroed(device, 4096)?,
        })
    }

    /// Sets the pages of a slot, one list a layer.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set_tables(&mut self, slot: usize, lists: &[Vec<u32>]) -> Result<()> {
        let CacheShape { layers, blocks, .. } = self.shape;
        assert!(lists.len() == layers && slot < self.shape.slots, "{} layers", lists.len());
        let pages = self.shape.pages as u32;
        for list in lists {
            assert!(list.len() <= blocks, "{} pages", list.len());
            assert!(list.iter().all(|&page| page < pages), "page");
        }
        let first = slot * layers * blocks;
        if blocks > FEW_BLOCKS {
            let mut lists = lists.iter().enumerate();
            return lists.try_for_each(|(l, list)| self.tables.write(first + l * blocks, list));
        }
        let mut table = vec![0; layers * blocks];
        for (list, to) in lists.iter().zip(table.chunks_exact_mut(blocks)) {
            to[..list.len()].copy_from_slice(list);
        }
        self.tables.write(first, &table)
    }

    pub(super) fn tables(&self) -> Tables<'_> {
        let CacheShape { layers, blocks, .. } = self.shape;
        Tables { layers, blocks, pages: self.tables.host() }
    }

    pub(super) fn split_mut(&mut self) -> (Tables<'_>, &mut [T]) {
        let CacheShape { layers, blocks, .. } = self.shape;
        (Tables { layers, blocks, pages: self.tables.host() }, self.pages.host_mut())
    }

    pub(super) fn tables_address(&self) -> u64 {
        self.tables.address()
    }

    pub(super) fn address_mut(&mut self) -> u64 {
        self.pages.address_mut()
    }
}

/// Operands of [`attention`].
pub struct Attention<'a, T> {
    /// Rows `0..rows` are active.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// (rows, (heads + 2 · `kv_heads`) · `head_dim`), rotated.
    pub qkv: &'a Buffer<f32>,
    /// Which rows these are.
    pub at: &'a Rows,
    /// How the kernels divide the step's rows; the processor does not read it.
    pub plan: &'a mut AttentionPlan,
    /// The block.
    pub layer: usize,
    /// Keys and values.
    pub cache: &'a Cache<T>,
    /// What products of queries and keys are multiplied by, usually 1 / √`head_dim`.
    pub scale: f32,
    /// s = cap · tanh(s / cap) of every score (Gemma 2).
    pub soft_cap: Option<f32>,
    /// Only this many positions are seen, the row's own among them.
    pub window: Option<usize>,
    /// (rows, heads · `head_dim`).
    pub out: &'a mut Activations<T>,
}

/// Attention of each row's queries over the positions of its sequence up to its own.
///
/// # Errors
/// The device has failed.
pub fn attention<T: Float>(device: &Device, p: Attention<'_, T>) -> Result<()> {
    let shape = p.cache.shape;
    let (head_dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    assert!(p.qkv.len() >= p.rows * (p.heads + 2 * kv_heads) * head_dim, "qkv");
    assert!(p.out.rows() >= p.rows && p.out.dim() == p.heads * head_dim, "out");
    assert!(head_dim <= MAX_HEAD_DIM && p.heads.is_multiple_of(kv_heads), "heads");
    assert!(p.layer < shape.layers && p.at.len() >= p.rows, "layer, rows");
    match device {
        Device::Cpu(cpu) => cpu::attention(cpu, p),
        Device::Cuda(cuda) => return launch(cuda, p),
    }
    Ok(())
}

/// Mirror of `AttentionParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionParams {
    qkv: u64,
    position: u64,
    pages: u64,
    tables: u64,
    list: u64,
    items: u64,
    out: u64,
    total: u64,
    open: u64,
    rows: i32,
    width: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    layer: i32,
    layers: i32,
    blocks: i32,
    out_row_groups: i32,
    window: i32,
    scale: f32,
    soft_cap: f32,
}
const _: () = assert!(size_of::<AttentionParams>() == 120, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/attention.cu.
unsafe impl Params for AttentionParams {}

/// The kernels of each width of heads: (widest head, one warp, four warps).
const KERNELS: [(usize, &str, &str); 6] = [
    (32, "attention_narrow_32", "attention_wide_32"),
    (64, "attention_narrow_64", "attention_wide_64"),
    (80, "attention_narrow_80", "attention_wide_80"),
    (96, "attention_narrow_96", "attention_wide_96"),
    (128, "attention_narrow_128", "attention_wide_128"),
    (256, "attention_narrow_256", "attention_wide_256"),
];

/// The width of heads that the kernels compute with.
pub fn kernel_head_dim(head_dim: usize) -> usize {
    KERNELS.iter().map(|kernel| kernel.0).find(|&width| width >= head_dim).unwrap_or(MAX_HEAD_DIM)
}

fn launch<T: Float>(cuda: &Cuda, p: Attention<'_, T>) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels read and write bf16");
    let shape = p.cache.shape;
    let width = kernel_head_dim(shape.head_dim);
    let (_, narrow, wide) = KERNELS.into_iter().find(|kernel| kernel.0 == width).expect("a width");
    let group = p.heads / shape.kv_heads;
    let params =
        |items: &Buffer<Item>, plan: &AttentionPlan, out: &mut Activations<T>| AttentionParams {
            qkv: p.qkv.address(),
            position: p.at.position.address(),
            pages: p.cache.pages.address(),
            tables: p.cache.tables.address(),
            list: plan.list.address(),
            items: items.address(),
            out: out.address_mut(),
            total: plan.total.address(),
            open: plan.open.address(),
            rows: p.rows as i32,
            width: ((p.heads + 2 * shape.kv_heads) * shape.head_dim) as i32,
            heads: p.heads as i32,
            kv_heads: shape.kv_heads as i32,
            head_dim: shape.head_dim as i32,
            layer: p.layer as i32,
            layers: shape.layers as i32,
            blocks: shape.blocks as i32,
            out_row_groups: out.row_groups() as i32,
            window: p.window.map_or(0, |window| window as i32),
            scale: p.scale,
            soft_cap: p.soft_cap.unwrap_or(0.0),
        };
    let [narrow_items, wide_items] = p.plan.active(p.rows);
    // The shared parts first: items of their rows go on from there.
    for (kernel, (warps, tiles), items, count) in [
        (wide, (4, 2), &p.plan.prefix, p.plan.prefixes),
        (wide, (4, 2), &p.plan.wide, wide_items),
        (narrow, (1, 1), &p.plan.narrow, narrow_items),
    ] {
        let launch = Launch {
            grid: [count as u32, (shape.kv_heads * group.div_ceil(16)) as u32, 1],
            block: 32 * warps,
            shared: (64 * tiles + 16 * warps) * 2 * (width as u32 + 8),
        };
        // SAFETY: the lengths were checked; items name rows of the step, whose slots and
        // positions lie inside the tables, and `Cache::set_tables` keeps pages inside the cache.
        unsafe { cuda.launch(kernel, launch, &params(items, p.plan, p.out))? };
    }
    Ok(())
}
