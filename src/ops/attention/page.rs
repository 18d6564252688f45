//! How a page of the cache is laid out.

use super::PAGE;
use crate::{
    device::{
        Device,
        cpu::{
            Cpu, Products, Shared,
            pairs::{DEPTH, SIDE},
        },
    },
    ops::{Float, Round, matmul::Dtype},
};

const _: () = assert!(PAGE == SIDE, "a page's positions are the columns of a tile");

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// On the processor, for each key head: keys `[head_dim][PAGE]`, then values `[PAGE][head_dim]`.
    Columns,
    /// On the processor, for products of pairs (see [`Products`]), for each key head: keys `[head_dim / 32]`
    /// tiles of `[16][PAGE][2]`, then values `[head_dim / 16]` half tiles of `[PAGE / 2][16][2]`; zero where a
    /// head ends inside of one.
    Pairs,
    /// For the kernels: keys, then values, both `[kv_heads][PAGE][head_dim]`.
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
    pub fn elements(&self) -> usize {
        self.kv_heads * self.head_len().iter().sum::<usize>()
    }

    /// Where a head's keys start in the cache.
    #[inline(always)]
    fn keys_start(&self, page: usize, head: usize) -> usize {
        let [keys, values] = self.head_len();
        page * self.elements() + head * (keys + values)
    }

    /// Where its values start.
    #[inline(always)]
    fn values_start(&self, page: usize, head: usize) -> usize {
        self.keys_start(page, head) + self.head_len()[0]
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
        cpu: &Cpu,
        pages: &Shared<'_, T>,
        (page, head, lane): (usize, usize, usize),
        key: &[f32],
        value: &[f32],
    ) {
        /// Elements rounded at a time, even.
        const PART: usize = 64;
        let (keys, values) = (self.keys_start(page, head), self.values_start(page, head));
        for (first, (key, value)) in
            (0..).step_by(PART).zip(key.chunks(PART).zip(value.chunks(PART)))
        {
            let mut rounded = [[T::default(); PART]; 2];
            cpu.isa().run(Round(key, &mut rounded[0]));
            cpu.isa().run(Round(value, &mut rounded[1]));
            let [key, value] = rounded.each_ref().map(|rounded| &rounded[..key.len()]);
            // SAFETY: promised by the caller; every place is of this position alone.
            unsafe {
                match self.layout {
                    Layout::Columns => {
                        let start = keys + first * PAGE + lane;
                        pages.scatter::<1>(start, PAGE, key.as_chunks().0);
                        let start = values + lane * self.head_dim + first;
                        pages.scatter::<1>(start, 1, value.as_chunks().0);
                    }
                    Layout::Pairs => {
                        let start = keys + first / 2 * DEPTH + 2 * lane;
                        let (pairs, last) = key.as_chunks::<2>();
                        pages.scatter(start, DEPTH, pairs);
                        pages.scatter::<1>(start + pairs.len() * DEPTH, 1, last.as_chunks().0);
                        let start = values + lane / 2 * DEPTH + lane % 2;
                        for (block, value) in (first / SIDE..).zip(value.chunks(SIDE)) {
                            let start = start + block * SIDE * PAGE;
                            pages.scatter::<1>(start, 2, value.as_chunks().0);
                        }
                    }
                    Layout::Rows => unreachable!("the kernels write their pages"),
                }
            }
        }
    }
}
