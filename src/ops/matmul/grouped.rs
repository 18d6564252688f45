//! Products of several weights of one shape, of which every row has one: rows of the same weight stand
//! side by side, on the kernels in blocks of a tile's tokens, on the processor as they are.

use super::{
    Activation, PANEL, Weight, cpu,
    kernels::{self, Factor, Shape},
};
use crate::{
    device::{Buffer, Cuda, Device},
    error::Result,
    ops::{Float, activations::Activations},
};

/// Weights of one shape (n, k).
pub struct WeightSet {
    weights: Vec<Weight>,
    /// Of each one's tiles, for the kernels.
    addresses: Buffer<u64>,
}

impl WeightSet {
    /// At least one weight, none with a bias.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, weights: Vec<Weight>) -> Result<Self> {
        let like_first = |weight: &Weight| {
            (weight.n, weight.k) == (weights[0].n, weights[0].k) && weight.bias.is_none()
        };
        assert!(!weights.is_empty() && weights.iter().all(like_first), "weights of one shape");
        let addresses: Vec<u64> = match device {
            Device::Cpu(_) => Vec::new(),
            Device::Cuda(_) => weights.iter().map(|weight| weight.tiles().address()).collect(),
        };
        Ok(Self { addresses: Buffer::upload(device, &addresses)?, weights })
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.weights.len()
    }

    /// Output features of each.
    pub fn n(&self) -> usize {
        self.weights[0].n
    }

    /// Input features of each.
    pub fn k(&self) -> usize {
        self.weights[0].k
    }

    /// Bytes in memory, of all.
    pub fn bytes(&self) -> usize {
        self.weights.iter().map(Weight::bytes).sum()
    }

    pub(super) fn addresses(&self) -> &Buffer<u64> {
        &self.addresses
    }
}

/// How much room the rows of grouped products take.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Layout {
    /// The kernel; `None` on the processor.
    shape: Option<&'static Shape>,
    /// Every weight's rows start at a multiple of this.
    pub tokens: usize,
    /// Rows that all weights' can take, a multiple of `tokens`.
    pub rows: usize,
}

impl Layout {
    /// Of `rows` rows, each of which goes to `used` of `count` weights (n, k).
    pub(in crate::ops) fn new(
        device: &Device,
        (rows, used): (usize, usize),
        count: usize,
        (n, k): (usize, usize),
    ) -> Self {
        let pairs = rows * used;
        match device {
            Device::Cpu(_) => Self { shape: None, tokens: 1, rows: pairs },
            Device::Cuda(cuda) => {
                let shape = grouped_shape(cuda, (rows, pairs), count.min(pairs), (n, k));
                let tokens = shape.tokens;
                // A weight that is used wastes at most tokens - 1 rows.
                let blocks = (pairs + count.min(pairs) * (tokens - 1)) / tokens;
                Self { shape: Some(shape), tokens, rows: blocks * tokens }
            }
        }
    }

    /// The most rows that a step of at most `rows` rows takes, and the most blocks of tokens.
    pub(in crate::ops) fn most(
        device: &Device,
        (rows, used): (usize, usize),
        count: usize,
        shape: (usize, usize),
    ) -> (usize, usize) {
        // Fewer rows may have another tile, and with that more padding.
        let of = |rows| Self::new(device, (rows, used), count, shape);
        let most = |(rows, blocks): (usize, usize), of: Self| {
            (rows.max(of.rows), blocks.max(of.rows / of.tokens))
        };
        (1..=rows).map(of).fold((0, 0), most)
    }
}

/// The kernel for `pairs` rows that `weights` weights share, none of which has more than `rows`. Most
/// weights have no more than twice their share.
fn grouped_shape(
    cuda: &Cuda,
    (rows, pairs): (usize, usize),
    weights: usize,
    (n, k): (usize, usize),
) -> &'static Shape {
    let share = pairs.div_ceil(weights.max(1));
    // A weight's last block is half empty, and each has one.
    let blocks = |tokens: usize| (pairs / tokens + weights / 2).max(weights);
    kernels::shape(cuda, rows.min(2 * share), (n, k), blocks)
}

/// Which rows have which weight.
pub(in crate::ops) struct Groups {
    /// (weights + 1): where each weight's rows start; for the processor.
    pub starts: Vec<usize>,
    /// How many blocks of `Layout::tokens` rows there are, no more than `Layout::rows` has room for; then
    /// the weight of each. Written by the kernel that lays the rows out.
    pub blocks: Buffer<u32>,
}

impl Groups {
    /// Room for so many weights and blocks; no rows.
    pub(in crate::ops) fn new(device: &Device, weights: usize, blocks: usize) -> Result<Self> {
        let blocks = if matches!(device, Device::Cpu(_)) { 0 } else { 1 + blocks };
        Ok(Self { starts: vec![0; weights + 1], blocks: Buffer::zeroed(device, blocks)? })
    }

    /// Of each weight that has any: the weight, its first row, and how many.
    fn each<'a>(
        &'a self,
        set: &'a WeightSet,
    ) -> impl Iterator<Item = (&'a Weight, usize, usize)> + 'a {
        assert_eq!(self.starts.len(), set.weights.len() + 1, "groups of other weights");
        let rows = self.starts.windows(2).map(|ends| (ends[0], ends[1] - ends[0]));
        let all = set.weights.iter().zip(rows);
        all.map(|(weight, (first, rows))| (weight, first, rows)).filter(|(.., rows)| *rows > 0)
    }

    fn factor<'a>(&'a self, set: &'a WeightSet, layout: Layout) -> Factor<'a> {
        assert!(self.blocks.len() > layout.rows / layout.tokens, "room for blocks");
        Factor::Each(set, self, layout.shape.expect("a layout for kernels"))
    }
}

/// `out[i, :] = x[i, :] · Wᵀ` for all rows, each with its group's weight; out: (≥ rows, n).
pub(in crate::ops) fn matmul_each<T: Float>(
    device: &Device,
    (layout, groups): (Layout, &Groups),
    x: &Activations<T>,
    set: &WeightSet,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let (n, k) = (set.n(), set.k());
    assert!(x.rows() >= layout.rows && x.dim() == k, "matmul_each: x");
    assert!(out.len() >= layout.rows * n, "matmul_each: out");
    match device {
        Device::Cpu(cpu) => {
            for (weight, first, rows) in groups.each(set) {
                let (x, out) = (&x.host()[first * k..], &mut out.host_mut()[first * n..]);
                cpu::matmul(cpu, rows, x, weight, out);
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            kernels::matmul(cuda, layout.rows, x, &groups.factor(set, layout), out)
        }
    }
}

/// As [`super::gated_matmul`], each row with its group's weight; out: (≥ rows, n / 2).
pub(in crate::ops) fn gated_matmul_each<T: Float>(
    device: &Device,
    (layout, groups): (Layout, &Groups),
    x: &Activations<T>,
    set: &WeightSet,
    activation: Activation,
    out: &mut Activations<T>,
) -> Result<()> {
    let (n, k) = (set.n() / 2, set.k());
    assert!(set.n().is_multiple_of(2 * PANEL), "gate and up in whole panels");
    assert!(x.rows() >= layout.rows && x.dim() == k, "gated_matmul_each: x");
    assert!(out.rows() >= layout.rows && out.dim() == n, "gated_matmul_each: out");
    match device {
        Device::Cpu(cpu) => {
            for (weight, first, rows) in groups.each(set) {
                let (x, out) = (&x.host()[first * k..], &mut out.host_mut()[first * n..]);
                cpu::gated_matmul(cpu, rows, x, weight, activation, out);
            }
            Ok(())
        }
        Device::Cuda(cuda) => {
            let factor = groups.factor(set, layout);
            kernels::gated_matmul(cuda, layout.rows, x, &factor, activation, out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::MatrixPath;

    /// However the rows are spread over the weights.
    #[test]
    #[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels")]
    fn a_layout_has_room_for_every_spread() {
        for path in [MatrixPath::Wgmma, MatrixPath::Mma] {
            let device = Device::Cuda(Cuda::host(path).unwrap());
            for (rows, used, count) in
                [(1, 1, 1), (1, 8, 128), (9, 2, 5), (64, 8, 128), (777, 3, 7)]
            {
                let layout = Layout::new(&device, (rows, used), count, (1536, 2048));
                let pairs = rows * used;
                // Each weight takes `most` rows, as long as every later one gets one; the last all.
                let blocks_of = |most: usize| {
                    let (mut left, mut blocks) = (pairs, 0);
                    for later in (0..count).rev() {
                        let most = if later == 0 { pairs } else { most };
                        let take = most.min(left.saturating_sub(later).max(1)).min(left);
                        (left, blocks) = (left - take, blocks + take.div_ceil(layout.tokens));
                    }
                    assert_eq!(left, 0);
                    blocks
                };
                for most in [1, layout.tokens, layout.tokens + 1, 2 * layout.tokens + 1, pairs] {
                    let taken = blocks_of(most) * layout.tokens;
                    assert!(
                        taken <= layout.rows,
                        "{rows} {used} {count}: {taken} > {}",
                        layout.rows
                    );
                }
                let (room, blocks) = Layout::most(&device, (rows, used), count, (1536, 2048));
                assert!(room >= layout.rows && blocks >= layout.rows / layout.tokens);
            }
        }
    }
}
