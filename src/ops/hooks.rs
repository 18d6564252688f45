//! The tables that `residual_norm` reads: which operations act on a sequence at a site, and which
//! rows of this step are copied out where. Filled by `engine`, read by kernels.

use crate::{
    device::{Buffer, Device},
    error::Result,
};

/// Sites of an n-layer model are numbered along the stream: `2L` is `resid_pre.L`, `2L + 1` is
/// `resid_mid.L`, and `2n` is the output of the last block.
pub fn site_count(layers: usize) -> usize {
    2 * layers + 1
}

/// What can be copied out, numbered along the stream: `2s` is the stream at site `s` after its
/// operations, `2s + 1` the branch that is added there, and the last one the final norm's output.
pub fn tap_count(layers: usize) -> usize {
    2 * site_count(layers) + 1
}

/// One `add` of one sequence at one site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HookOp {
    /// Row of the vector bank.
    pub vector: u32,
    /// First position of the window.
    pub from: u32,
    /// End of the window (not in it).
    pub to: u32,
    /// h += scale · v, or with `relative` h += scale · ‖h‖ · v.
    pub scale: f32,
    /// Whether the row's own norm is a factor.
    pub relative: bool,
}

/// What stays on the device while sequences run.
pub struct Hooks {
    sites: usize,
    ops_per_slot: usize,
    /// (slots, sites + 1): operations of slot s at site i are `first[s, i]..first[s, i + 1]`.
    first: Vec<u32>,
    /// (slots, `ops_per_slot`), by site.
    ops: Vec<HookOp>,
    /// (vectors, dim), the bank.
    pub vectors: Buffer<f32>,
}

impl Hooks {
    /// Tables for `slots` sequences of at most `ops_per_slot` operations, and a bank of `vectors`
    /// vectors.
    pub fn new(
        device: &Device,
        (layers, dim): (usize, usize),
        slots: usize,
        ops_per_slot: usize,
        vectors: usize,
    ) -> Result<Self> {
        let sites = site_count(layers);
        let none = HookOp { vector: 0, from: 0, to: 0, scale: 0.0, relative: false };
        Ok(Self {
            sites,
            ops_per_slot,
            first: vec![0; slots * (sites + 1)],
            ops: vec![none; slots * ops_per_slot],
            vectors: Buffer::zeroed(device, vectors * dim)?,
        })
    }

    /// The most operations a sequence may have.
    pub fn ops_per_slot(&self) -> usize {
        self.ops_per_slot
    }

    /// Writes the operations of a slot: (site, operation), sorted by site.
    pub fn set(&mut self, slot: usize, ops: &[(usize, HookOp)]) {
        assert!(ops.len() <= self.ops_per_slot, "{} operations in a slot", ops.len());
        assert!(ops.is_sorted_by_key(|(site, _)| *site), "operations are sorted by site");
        let first = &mut self.first[slot * (self.sites + 1)..][..=self.sites];
        for (site, first) in first.iter_mut().enumerate() {
            *first = ops.partition_point(|(at, _)| *at < site) as u32;
        }
        for (at, (_, op)) in ops.iter().enumerate() {
            self.ops[slot * self.ops_per_slot + at] = *op;
        }
    }

    /// Operations of a slot at a site, with the ordinal of the first among all of the slot's.
    #[inline]
    pub(super) fn at(&self, slot: usize, site: usize) -> (usize, &[HookOp]) {
        let first = &self.first[slot * (self.sites + 1) + site..][..2];
        let ops = &self.ops[slot * self.ops_per_slot..][..self.ops_per_slot];
        (first[0] as usize, &ops[first[0] as usize..first[1] as usize])
    }
}

/// Rows of a step that are copied out, by tap and row.
#[derive(Clone, Debug, Default)]
pub struct CapturePlan {
    /// (taps + 1): entries of tap t are `first[t]..first[t + 1]`.
    first: Vec<u32>,
    /// (row, row of the destination), by tap, then row.
    entries: Vec<(u32, u32)>,
}

impl CapturePlan {
    /// From (tap, row, destination row) in any order.
    pub fn build(&mut self, taps: usize, mut wanted: Vec<(u32, u32, u32)>) {
        wanted.sort_unstable();
        self.first.clear();
        let starts = (0..=taps).map(|tap| wanted.partition_point(|w| (w.0 as usize) < tap) as u32);
        self.first.extend(starts);
        self.entries.clear();
        self.entries.extend(wanted.iter().map(|&(_, row, to)| (row, to)));
    }

    /// The entries of a tap.
    #[inline]
    pub(super) fn tap(&self, tap: usize) -> &[(u32, u32)] {
        if self.entries.is_empty() {
            return &[];
        }
        &self.entries[self.first[tap] as usize..self.first[tap + 1] as usize]
    }
}

/// Destinations of a row among a tap's entries.
#[inline]
pub(super) fn destinations(entries: &[(u32, u32)], row: usize) -> impl Iterator<Item = usize> {
    let start = entries.partition_point(|e| (e.0 as usize) < row);
    entries[start..].iter().take_while(move |e| e.0 as usize == row).map(|e| e.1 as usize)
}
