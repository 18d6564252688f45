//! What a step's rows are: their sequences and positions, and what they start from. Planned on the
//! host as lists, copied to buffers of fixed address.

use crate::{
    device::{Buffer, Device},
    error::Result,
};

/// No row, no slot, no token.
pub const NONE: u32 = u32::MAX;

/// Where rows are, for a whole step: one entry a row.
#[derive(Clone, Debug, Default)]
pub struct RowList {
    /// Slot of the row's sequence; [`NONE`]: a row that only fills the step up.
    pub slot: Vec<u32>,
    /// Absolute position in its sequence.
    pub position: Vec<u32>,
    /// First of the row's receipts; -1: its sequence has no operations.
    pub receipt: Vec<i32>,
}

/// A [`RowList`] in the device's memory.
pub struct Rows {
    pub(super) slot: Buffer<u32>,
    pub(super) position: Buffer<u32>,
    pub(super) receipt: Buffer<i32>,
}

impl Rows {
    /// Room for `capacity` rows.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, capacity: usize) -> Result<Self> {
        Ok(Self {
            slot: Buffer::zeroed(device, capacity)?,
            position: Buffer::zeroed(device, capacity)?,
            receipt: Buffer::zeroed(device, capacity)?,
        })
    }

    /// Room for this list, and the list.
    ///
    /// # Errors
    /// As [`Rows::new`] and [`Rows::set`].
    pub fn upload(device: &Device, list: &RowList) -> Result<Self> {
        let mut rows = Self::new(device, list.slot.len())?;
        rows.set(list)?;
        Ok(rows)
    }

    /// Writes a step's rows.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, list: &RowList) -> Result<()> {
        let rows = list.slot.len();
        assert!(list.position.len() == rows && list.receipt.len() == rows, "a row's parts");
        self.slot.write(0, &list.slot)?;
        self.position.write(0, &list.position)?;
        self.receipt.write(0, &list.receipt)
    }

    /// Rows that there is room for.
    pub(super) fn len(&self) -> usize {
        self.slot.len()
    }
}

/// What an entering row starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// This token's embedding.
    Token(u32),
    /// This row of the cache.
    Cached(u32),
    /// The embedding of the token that was last drawn for this slot.
    Drawn(u32),
    /// Nothing: the row only fills the step up.
    Nothing,
}

/// Sources in the device's memory.
pub struct Sources {
    /// 0 token, 1 cached, 2 drawn, 3 nothing.
    pub(super) kind: Buffer<u32>,
    pub(super) value: Buffer<u32>,
    scratch: [Vec<u32>; 2],
}

impl Sources {
    /// Room for `capacity` rows.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, capacity: usize) -> Result<Self> {
        let [kind, value] = [Buffer::zeroed(device, capacity)?, Buffer::zeroed(device, capacity)?];
        Ok(Self { kind, value, scratch: [Vec::new(), Vec::new()] })
    }

    /// Writes a step's sources.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, sources: &[Source]) -> Result<()> {
        let [kind, value] = &mut self.scratch;
        kind.clear();
        value.clear();
        for source in sources {
            let (k, v) = match *source {
                Source::Token(id) => (0, id),
                Source::Cached(row) => (1, row),
                Source::Drawn(slot) => (2, slot),
                Source::Nothing => (3, 0),
            };
            kind.push(k);
            value.push(v);
        }
        self.kind.write(0, kind)?;
        self.value.write(0, value)
    }

    /// The source of a row, for the processor.
    pub(super) fn get(&self, row: usize) -> Source {
        let value = self.value.host()[row];
        match self.kind.host()[row] {
            0 => Source::Token(value),
            1 => Source::Cached(value),
            2 => Source::Drawn(value),
            _ => Source::Nothing,
        }
    }
}
