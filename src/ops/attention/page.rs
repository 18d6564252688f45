//! How a page of the cache is laid out: first its keys, then its values.

use super::PAGE;
use crate::{
    device::{
        Device,
        cpu::{
            Products, Shared,
            pairs::{DEPTH, SIDE},
        },
    },
    ops::{Float, matmul::Dtype},
};

const _: () = assert!(PAGE == SIDE, "a page's positions are the columns of a tile");

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// On the processor: keys `[kv_heads][head_dim][PAGE]`, values `[kv_heads][PAGE][head_dim]`.
    Columns,
    /// On the processor, for products of pairs (see [`Products`]): keys `[kv_heads][head_dim / 32]` tiles
    /// of `[16][PAGE][2]`, values `[kv_heads][head_dim / 16]` half tiles of `[PAGE / 2][16][2]`; zero
    /// where a head ends inside of one.
    Pairs,
    /// For the kernels: both `[kv_heads][PAGE][head_dim]`.
    Rows,
}

/// Sizes of a page.
#[derive(Clone, Copy)]
pub struct PageShape {
    layout: Layout,
    kv_heads: usize,
    head_dim: usize,
}

impl PageShape {
    /// Of a cache of this type.
    pub fn new(device: &Device, dtype: Dtype, kv_heads: usize, head_dim: usize) -> Self {
        let layout = match device {
            Device::Cuda(_) => Layout::Rows,
            Device::Cpu(cpu) => match (dtype, cpu.isa().products()) {
                (Dtype::F32, _) | (_, Products::Chains) => Layout::Columns,
                (Dtype::Bf16, Products::Pairs | Products::Tiles) => Layout::Pairs,
            },
        };
        Self { layout, kv_heads, head_dim }
    }

    /// Whether it is laid out for products of pairs.
    pub(super) fn is_pairs(&self) -> bool {
        self.layout == Layout::Pairs
    }

    /// Elements of a head's keys and of its values.
    fn head_len(&self) -> [usize; 2] {
        let unit = match self.layout {
            Layout::Columns | Layout::Rows => [1, 1],
            Layout::Pairs => [DEPTH, SIDE],
        };
        unit.map(|unit| self.head_dim.next_multiple_of(unit) * PAGE)
    }

    /// Elements of a page.
    pub fn len(&self) -> usize {
        self.kv_heads * self.head_len().iter().sum::<usize>()
    }

    /// Where a head's keys start in the cache.
    #[inline(always)]
    fn keys_start(&self, page: usize, head: usize) -> usize {
        page * self.len() + head * self.head_len()[0]
    }

    /// Where its values start.
    #[inline(always)]
    fn values_start(&self, page: usize, head: usize) -> usize {
        let [keys, values] = self.head_len();
        page * self.len() + self.kv_heads * keys + head * values
    }

    /// A head's keys.
    #[inline(always)]
    pub(super) fn keys<'a, T>(&self, pages: &'a [T], page: usize, head: usize) -> &'a [T] {
        &pages[self.keys_start(page, head)..][..self.head_len()[0]]
    }

    /// A head's values.
    #[inline(always)]
    pub(super) fn values<'a, T>(&self, pages: &'a [T], page: usize, head: usize) -> &'a [T] {
        &pages[self.values_start(page, head)..][..self.head_len()[1]]
    }

    /// Elements from where a head's keys start to where its values do.
    #[inline(always)]
    pub(super) fn ahead(&self, head: usize) -> usize {
        self.values_start(0, head) - self.keys_start(0, head)
    }

    /// Writes the key and the value of a page's position `lane`, on the processor.
    ///
    /// # Safety
    /// Nobody else reads or writes this position of this page meanwhile.
    pub(in crate::ops) unsafe fn write<T: Float>(
        &self,
        pages: &Shared<'_, T>,
        (page, head, lane): (usize, usize, usize),
        key: &[f32],
        value: &[f32],
    ) {
        let (keys, values) = (self.keys_start(page, head), self.values_start(page, head));
        match self.layout {
            Layout::Columns => {
                // SAFETY: promised by the caller.
                unsafe {
                    scatter(pages, keys, key, |d| d * PAGE + lane);
                    scatter(pages, values, value, |d| lane * self.head_dim + d);
                }
            }
            Layout::Pairs => {
                let start = lane / 2 * DEPTH + lane % 2;
                // SAFETY: likewise.
                unsafe {
                    scatter(pages, keys, key, |d| d / 2 * DEPTH + 2 * lane + d % 2);
                    scatter(pages, values, value, |d| d / SIDE * SIDE * PAGE + start + d % SIDE * 2);
                }
            }
            Layout::Rows => unreachable!("the kernels write their pages"),
        }
    }
}

/// Writes each value to its place behind `start`.
///
/// # Safety
/// Nobody else reads or writes these places meanwhile.
#[inline(always)]
unsafe fn scatter<T: Float>(
    pages: &Shared<'_, T>,
    start: usize,
    values: &[f32],
    place: impl Fn(usize) -> usize,
) {
    for (d, &value) in values.iter().enumerate() {
        // SAFETY: promised by the caller.
        let to = unsafe { pages.range(start + place(d), 1) };
        to[0] = T::from_f32(value);
    }
}
