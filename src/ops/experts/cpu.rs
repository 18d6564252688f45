//! The mixture on the processor, but for its products.

use super::{MOST_USED, Routed};
use crate::{
    device::{
        Buffer,
        cpu::{Cpu, Isa, Kernel, Shared},
    },
    ops::math::{LANES, exp, max, sum_lanes},
};

/// The lanes of a warp, in whose order the kernel sums.
const WARP: usize = 2 * LANES;
const _: () = assert!(MOST_USED <= WARP);

/// Chooses experts and weights of each row.
pub(super) fn route<T>(cpu: &Cpu, rows: usize, normalise: bool, routed: &mut Routed<T>) {
    let (experts, used) = (routed.sizes.experts, routed.sizes.used);
    let chosen = Shared::new(routed.chosen.host_mut());
    let weights = Shared::new(routed.weights.host_mut());
    let logits = routed.logits.host();
    cpu.parallel(rows, |row| {
        let logits = &logits[row * experts..][..experts];
        // SAFETY: each task has its own row.
        let (chosen, weights) =
            unsafe { (chosen.range(row * used, used), weights.range(row * used, used)) };
        cpu.isa().run(Route { isa: cpu.isa(), logits, normalise, chosen, weights });
    });
}

/// One row.
struct Route<'a> {
    isa: Isa,
    /// (experts,)
    logits: &'a [f32],
    normalise: bool,
    /// (used,)
    chosen: &'a mut [u32],
    /// (used,)
    weights: &'a mut [f32],
}

impl Kernel for Route<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let max = max(self.isa, self.logits);
        let mut last = None;
        for (chosen, weight) in self.chosen.iter_mut().zip(self.weights.iter_mut()) {
            // Ranks are distinct: the next one is the largest below the last.
            let ranks = self.logits.iter().zip(0..).map(|(&logit, id)| rank(logit, id));
            let below = |rank: &u64| last.is_none_or(|last| *rank < last);
            let best = ranks.filter(below).max().expect("no more than there are");
            last = Some(best);
            *chosen = !(best as u32);
            *weight = exp(self.logits[*chosen as usize] - max);
        }
        let total = match self.normalise {
            true => sum(self.weights.iter().copied()),
            false => sum(self.logits.iter().map(|logit| exp(logit - max))),
        };
        self.weights.iter_mut().for_each(|weight| *weight /= total);
    }
}

/// A logit and its expert as one number: larger is better, the larger logit first, of equal ones the lower
/// id. Numbers are in order, and what is no number has a place too.
#[inline(always)]
fn rank(logit: f32, id: u32) -> u64 {
    let bits = (logit + 0.0).to_bits(); // zeros of both signs are a tie
    let key = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(key) << 32 | u64::from(!id)
}

/// In the order of a warp's lanes.
#[inline(always)]
fn sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0; WARP];
    for (at, value) in values.enumerate() {
        lanes[at % WARP] += value;
    }
    sum_lanes(std::array::from_fn(|lane| lanes[lane] + lanes[lane + LANES]))
}

/// Sorts the rows' copies by expert, in the order of rows.
pub(super) fn place<T>(rows: usize, routed: &mut Routed<T>) {
    let used = routed.sizes.used;
    let chosen = &routed.chosen.host()[..rows * used];
    let (place, from) = (routed.place.host_mut(), routed.from.host_mut());
    let starts = &mut routed.groups.starts;
    starts.fill(0);
    for &id in chosen {
        starts[id as usize + 1] += 1;
    }
    for id in 1..starts.len() {
        starts[id] += starts[id - 1];
    }
    for (pair, &id) in chosen.iter().enumerate() {
        let at = &mut starts[id as usize];
        place[pair] = *at as u32;
        from[*at] = (pair / used) as u32;
        *at += 1;
    }
    // Each has come to where the next one starts.
    starts.rotate_right(1);
    starts[0] = 0;
}

/// Sums the products of each row's experts.
pub(super) fn combine<T>(cpu: &Cpu, rows: usize, routed: &Routed<T>, out: &mut Buffer<f32>) {
    let (used, dim) = (routed.sizes.used, routed.sizes.dim);
    let (place, weights) = (routed.place.host(), routed.weights.host());
    let products = routed.products.host();
    let out = Shared::new(&mut out.host_mut()[..rows * dim]);
    cpu.parallel(rows, |row| {
        // SAFETY: each task has its own row.
        let out = unsafe { out.range(row * dim, dim) };
        let place = &place[row * used..][..used];
        cpu.isa().run(Combine { products, place, weights: &weights[row * used..], out });
    });
}

/// One row.
struct Combine<'a> {
    /// (.., dim)
    products: &'a [f32],
    /// (used,)
    place: &'a [u32],
    /// (≥ used,)
    weights: &'a [f32],
    /// (dim,)
    out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let dim = self.out.len();
        self.out.fill(0.0);
        for (&place, &weight) in self.place.iter().zip(self.weights) {
            let product = &self.products[place as usize * dim..][..dim];
            for (out, &value) in self.out.iter_mut().zip(product) {
                *out = weight.mul_add(value, *out);
            }
        }
    }
}
