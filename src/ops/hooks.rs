//! The tables that `residual_norm` reads: which operations act on a sequence at a site, and which
//! rows of this step are copied out where. Filled by `engine`, read by kernels.

use crate::{
    device::{Buffer, Device, Element},
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

/// One `add` of one sequence at one site. The kernels read it as it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct HookOp {
    /// Row of the vector bank.
    pub vector: u32,
    /// First position of the window.
    pub from: u32,
    /// End of the window (not in it).
    pub to: u32,
    /// h += scale · v, or with `relative` h += scale · ‖h‖ · v.
    pub scale: f32,
    /// 1: the row's own norm is a factor. Else 0.
    pub relative: u32,
}
// SAFETY: plain numbers without padding.
unsafe impl Element for HookOp {}

/// What stays on the device while sequences run.
pub struct Hooks {
    pub(super) sites: usize,
    pub(super) ops_per_slot: usize,
    /// (slots, sites + 1): operations of slot s at site i are `first[s, i]..first[s, i + 1]`.
    pub(super) first: Buffer<u32>,
    /// (slots, `ops_per_slot`), by site.
    pub(super) ops: Buffer<HookOp>,
    /// (vectors, dim), the bank.
    pub vectors: Buffer<f32>,
}

impl Hooks {
    /// Tables for `slots` sequences of at most `ops_per_slot` operations, and a bank of `vectors`
    /// vectors.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(
        device: &Device,
        (layers, dim): (usize, usize),
        slots: usize,
        ops_per_slot: usize,
        vectors: usize,
    ) -> Result<Self> {
        let sites = site_count(layers);
        Ok(Self {
            sites,
            ops_per_slot,
            first: Buffer::zeroed(device, slots * (sites + 1))?,
            ops: Buffer::zeroed(device, slots * ops_per_slot)?,
            vectors: Buffer::zeroed(device, vectors * dim)?,
        })
    }

    /// The most operations a sequence may have.
    pub fn ops_per_slot(&self) -> usize {
        self.ops_per_slot
    }

    /// Writes the operations of a slot: (site, operation), sorted by site.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, slot: usize, ops: &[(usize, HookOp)]) -> Result<()> {
        assert!(ops.len() <= self.ops_per_slot, "{} operations in a slot", ops.len());
        assert!(ops.is_sorted_by_key(|(site, _)| *site), "operations are sorted by site");
        let first = |site| ops.partition_point(|(at, _)| *at < site) as u32;
        let first: Vec<u32> = (0..=self.sites).map(first).collect();
        self.first.write(slot * (self.sites + 1), &first)?;
        let ops: Vec<HookOp> = ops.iter().map(|(_, op)| *op).collect();
        self.ops.write(slot * self.ops_per_slot, &ops)
    }

    /// Operations of a slot at a site, with the ordinal of the first among all of the slot's.
    #[inline]
    pub(super) fn at(&self, slot: usize, site: usize) -> (usize, &[HookOp]) {
        let first = &self.first.host()[slot * (self.sites + 1) + site..][..2];
        let ops = &self.ops.host()[slot * self.ops_per_slot..][..self.ops_per_slot];
        (first[0] as usize, &ops[first[0] as usize..first[1] as usize])
    }
}

/// Rows of a step that are copied out, by tap and row.
pub struct CapturePlan {
    taps: usize,
    /// Whether there is any.
    pub(super) any: bool,
    /// (taps + 1): entries of tap t are `first[t]..first[t + 1]`.
    pub(super) first: Buffer<u32>,
    /// (row, row of the destination), by tap, then row.
    pub(super) entries: Buffer<[u32; 2]>,
}

impl CapturePlan {
    /// Room for `capacity` entries.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, taps: usize, capacity: usize) -> Result<Self> {
        let first = Buffer::zeroed(device, taps + 1)?;
        Ok(Self { taps, any: false, first, entries: Buffer::zeroed(device, capacity)? })
    }

    /// Writes a step's captures: (tap, row, destination row) in any order.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, wanted: &[(u32, u32, u32)]) -> Result<()> {
        self.any = !wanted.is_empty();
        if !self.any {
            return Ok(()); // nobody reads the tables then
        }
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        let first = |tap| wanted.partition_point(|w| (w.0 as usize) < tap) as u32;
        let first: Vec<u32> = (0..=self.taps).map(first).collect();
        self.first.write(0, &first)?;
        let entries: Vec<[u32; 2]> = wanted.iter().map(|&(_, row, to)| [row, to]).collect();
        self.entries.write(0, &entries)
    }

    /// The entries of a tap.
    #[inline]
    pub(super) fn tap(&self, tap: usize) -> &[[u32; 2]] {
        if !self.any {
            return &[];
        }
        let first = &self.first.host()[tap..][..2];
        &self.entries.host()[first[0] as usize..first[1] as usize]
    }
}

/// Destinations of a row among a tap's entries.
#[inline]
pub(super) fn destinations(entries: &[[u32; 2]], row: usize) -> impl Iterator<Item = usize> {
    let start = entries.partition_point(|e| (e[0] as usize) < row);
    entries[start..].iter().take_while(move |e| e[0] as usize == row).map(|e| e[1] as usize)
}
