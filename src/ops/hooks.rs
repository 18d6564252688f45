//! The tables that `residual_norm` reads: which operations act on a sequence at a site, and which
//! rows of this step are copied out where. Filled by `engine`, read by kernels.

use super::{
    residual_norm::Receipt,
    rows::{NONE, Rows},
};
use crate::{
    device::{Buffer, Device, Element},
    error::Result,
};

/// Sites of an n-layer model are numbered along the stream: `2L` is `resid_pre.L`, `2L + 1` is
/// `resid_mid.L`, and `2n` is the output of the last block.
pub fn site_count(layers: usize) -> usize {
    2 * layers + 1
}

/// What can be copied out: `2s` is the stream at site `s` after its operations, `2s + 1` the branch
/// that is added there, then the final norm's output, then [`HeadTap`]s, four a block.
pub fn tap_count(layers: usize) -> usize {
    head_tap(layers, layers, HeadTap::Query)
}

/// What the heads of attention show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadTap {
    /// Queries after rope, (heads · `head_dim`).
    Query,
    /// Keys after rope, (`kv_heads` · `head_dim`).
    Key,
    /// Values, likewise.
    Value,
    /// What each head gave, after its operations, (heads · `head_dim`).
    Output,
}

/// The tap of the heads of a block of an n-layer model.
pub fn head_tap(layers: usize, layer: usize, of: HeadTap) -> usize {
    2 * site_count(layers) + 1 + 4 * layer + of as usize
}

/// The block and what of its heads a tap shows, in an n-layer model; `None` where it shows the stream,
/// a branch or the final norm.
pub fn heads_of_tap(layers: usize, tap: usize) -> Option<(usize, HeadTap)> {
    let at = tap.checked_sub(head_tap(layers, 0, HeadTap::Query))?;
    let of = [HeadTap::Query, HeadTap::Key, HeadTap::Value, HeadTap::Output][at % 4];
    Some((at / 4, of))
}

/// Conditions that a sequence may have.
pub const GATES: usize = 8;

/// One operation of one sequence on what one tap shows, h, with the vector v. The kernels read it as
/// it stands.
///
/// With r = ‖h‖ where `flags` has [`HookOp::RELATIVE`], else 1, and c = `unit` · h·v:
///
/// ```text
/// ADD         h' = h + scale r v
/// COORDINATE  h' = h + (clamp(c, low r, high r) - c) unit v
/// REPLACE     h' = scale r v
/// SCALE       h' = scale h                                        (v is not read)
/// GATE        h' = h; condition `gate` is met if low < c / r < high
/// ```
///
/// v is row `vector` of the bank, or with [`HookOp::BY_POSITION`] the row as many behind it as the
/// position is in its window. And with [`HookOp::KEEP_NORM`] h' · ‖h‖ / ‖h'‖, where ‖h'‖ > 2⁻¹⁶ ‖h‖: less is rounding.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct HookOp {
    /// Row of the vector bank.
    pub vector: u32,
    /// First position of the window.
    pub from: u32,
    /// End of the window (not in it).
    pub to: u32,
    /// Of the window's positions every so many, from the first on.
    pub every: u32,
    /// What is done.
    pub kind: u32,
    /// Of the constants below, or 0.
    pub flags: u32,
    /// The condition under which it acts, or [`NONE`]; of a gate, the condition that it decides.
    pub gate: u32,
    /// Which head's output it acts on; read only where heads' outputs are.
    pub head: u32,
    /// A factor.
    pub scale: f32,
    /// Least coordinate.
    pub low: f32,
    /// Greatest coordinate.
    pub high: f32,
    /// 1 / ‖v‖.
    pub unit: f32,
}
// SAFETY: plain numbers without padding.
unsafe impl Element for HookOp {}

impl HookOp {
    /// Kinds, see [`HookOp`].
    pub const ADD: u32 = 0;
    /// Moves the coordinate along v into an interval.
    pub const COORDINATE: u32 = 1;
    /// Puts a multiple of v in h's place.
    pub const REPLACE: u32 = 2;
    /// Multiplies h.
    pub const SCALE: u32 = 3;
    /// Decides a condition and changes nothing.
    pub const GATE: u32 = 4;
    /// The row's own norm is a factor; of a gate: a divisor.
    pub const RELATIVE: u32 = 1;
    /// The row keeps its norm.
    pub const KEEP_NORM: u32 = 2;
    /// Acts from the first row on that met the condition.
    pub const LATCHED: u32 = 4;
    /// Each position of the window has a vector of its own.
    pub const BY_POSITION: u32 = 8;

    /// h += scale · v at every position from `from` on; other kinds start from it.
    pub fn add(vector: u32, from: u32, scale: f32) -> Self {
        Self {
            vector,
            from,
            to: u32::MAX,
            every: 1,
            kind: Self::ADD,
            flags: 0,
            gate: NONE,
            head: 0,
            scale,
            low: 0.0,
            high: 0.0,
            unit: 1.0,
        }
    }

    /// Whether a position is in its window.
    pub fn holds(&self, position: u32) -> bool {
        (self.from..self.to).contains(&position)
            && (position - self.from).is_multiple_of(self.every)
    }

    /// The row of the bank that acts at a position of its window.
    #[inline(always)]
    pub(super) fn vector_at(&self, position: u32) -> usize {
        let by_position = self.has(Self::BY_POSITION);
        (self.vector + if by_position { (position - self.from) / self.every } else { 0 }) as usize
    }

    /// Whether a flag is set.
    #[inline(always)]
    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// Mirror of `HookTables`: what kernels that change or capture rows read beside them.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct HookTables {
    slot: u64,
    position: u64,
    receipt: u64,
    first: u64,
    ops: u64,
    vectors: u64,
    tap_first: u64,
    entries: u64,
    captured: u64,
    receipts: u64,
    met: u64,
    latched: u64,
    taps: i32,
    ops_per_slot: i32,
    has_captures: i32,
    unused: i32,
}
const _: () = assert!(size_of::<HookTables>() == 112, "the kernels assert the same");

impl HookTables {
    /// Of a step's rows, where they are captured to, and what is said of their operations and conditions.
    pub fn new(
        at: &Rows,
        hooks: &mut Hooks,
        (captures, captured): (&CapturePlan, &mut Buffer<f32>),
        (receipts, met): (&mut Buffer<Receipt>, &mut Buffer<u32>),
    ) -> Self {
        Self {
            slot: at.slot.address(),
            position: at.position.address(),
            receipt: at.receipt.address(),
            first: hooks.table.first.address(),
            ops: hooks.table.ops.address(),
            vectors: hooks.vectors.address(),
            tap_first: captures.first.address(),
            entries: captures.entries.address(),
            captured: captured.address_mut(),
            receipts: receipts.address_mut(),
            met: met.address_mut(),
            latched: hooks.latched.address_mut(),
            taps: hooks.table.taps as i32,
            ops_per_slot: hooks.table.ops_per_slot as i32,
            has_captures: i32::from(captures.any),
            unused: 0,
        }
    }
}

/// What stays on the device while sequences run.
pub struct Hooks {
    pub(super) table: OpTable,
    /// (slots, [`GATES`]): the first position whose row met a condition, [`NONE`] before.
    pub(super) latched: Buffer<u32>,
    /// (vectors, dim), the bank.
    pub vectors: Buffer<f32>,
}

/// Which operations sequences have.
pub(super) struct OpTable {
    pub taps: usize,
    /// The first tap of heads, which are the last ones.
    first_of_heads: usize,
    pub ops_per_slot: usize,
    /// (slots, taps + 1): operations of slot s at tap i are `first[s, i]..first[s, i + 1]`.
    pub first: Buffer<u32>,
    /// (slots, `ops_per_slot`), by tap.
    pub ops: Buffer<HookOp>,
    /// (slots,): whether it has operations on outputs of heads.
    of_heads: Vec<bool>,
}

impl OpTable {
    /// Operations of a slot at a tap, with the ordinal of the first among all of the slot's.
    #[inline]
    pub fn at(&self, slot: usize, tap: usize) -> (usize, &[HookOp]) {
        let first = &self.first.host()[slot * (self.taps + 1) + tap..][..2];
        let ops = &self.ops.host()[slot * self.ops_per_slot..][..self.ops_per_slot];
        (first[0] as usize, &ops[first[0] as usize..first[1] as usize])
    }
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
        let taps = tap_count(layers);
        let table = OpTable {
            taps,
            first_of_heads: head_tap(layers, 0, HeadTap::Query),
            ops_per_slot,
            first: Buffer::zeroed(device, slots * (taps + 1))?,
            ops: Buffer::zeroed(device, slots * ops_per_slot)?,
            of_heads: vec![false; slots],
        };
        Ok(Self {
            table,
            latched: Buffer::zeroed(device, slots * GATES)?,
            vectors: Buffer::zeroed(device, vectors * dim)?,
        })
    }

    /// Whether the sequence in a slot has operations on outputs of heads.
    pub fn acts_on_heads(&self, slot: usize) -> bool {
        self.table.of_heads[slot]
    }

    /// Writes the operations of a slot: (tap, operation), sorted by tap, and where each condition
    /// was first met.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(
        &mut self,
        slot: usize,
        ops: &[(usize, HookOp)],
        latched: &[u32; GATES],
    ) -> Result<()> {
        let table = &mut self.table;
        assert!(ops.len() <= table.ops_per_slot, "{} operations in a slot", ops.len());
        assert!(ops.is_sorted_by_key(|(tap, _)| *tap), "operations are sorted by tap");
        let first = |tap| ops.partition_point(|(at, _)| *at < tap) as u32;
        let first: Vec<u32> = (0..=table.taps).map(first).collect();
        table.first.write(slot * (table.taps + 1), &first)?;
        table.of_heads[slot] = ops.last().is_some_and(|(tap, _)| *tap >= table.first_of_heads);
        if ops.iter().any(|(_, op)| op.gate != NONE) {
            self.latched.write(slot * GATES, latched)?;
        }
        let ops: Vec<HookOp> = ops.iter().map(|(_, op)| *op).collect();
        table.ops.write(slot * table.ops_per_slot, &ops)
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
