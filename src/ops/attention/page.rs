//! How a page of the cache is laid out: first its keys, then its values.

use super::{MAX_HEAD_DIM, PAGE};
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
        let mut rounded = [[T::default(); MAX_HEAD_DIM]; 2];
        cpu.isa().run(Round(key, &mut rounded[0]));
        cpu.isa().run(Round(value, &mut rounded[1]));
        let [key, value] = rounded;
        let (key, value) = (&key[..self.head_dim], &value[..self.head_dim]);
        let (keys, values) = (self.keys_start(page, head), self.values_start(page, head));
        // SAFETY: promised by the caller; every place is of this position alone.
        let put =
            |at: usize, part: &[T]| unsafe { pages.range(at, part.len()) }.copy_from_slice(part);
        match self.layout {
            Layout::Columns => {
                key.iter().enumerate().for_each(|(d, &k)| put(keys + d * PAGE + lane, &[k]));
                put(values + lane * self.head_dim, value);
            }
            Layout::Pairs => {
                for (pair, key) in key.chunks(2).enumerate() {
                    put(keys + pair * DEPTH + 2 * lane, key);
                }
                for (block, value) in value.chunks(SIDE).enumerate() {
                    let start = values + block * SIDE * PAGE + lane / 2 * DEPTH + lane % 2;
                    value.iter().enumerate().for_each(|(d, &v)| put(start + 2 * d, &[v]));
                }
            }
            Layout::Rows => unreachable!("the kernels write their pages"),
        }
    }
}
