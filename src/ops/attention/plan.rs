//! How the attention kernels divide a step: items of rows of one sequence, and groups of rows of
//! several sequences that share their first pages, whose shared part is folded once for all.

use crate::{
    device::{Buffer, Device, Element},
    error::Result,
    ops::rows::{NONE, RowList},
};

/// What a row's sequence shares with others: rows of equal values read the same pages in the first
/// tiles of 64 positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SharedPrefix {
    /// Names the sequences that share; 0: none.
    pub group: u64,
    /// Tiles that are wholly shared at layers below `cut`.
    pub tiles_below: u32,
    /// Tiles that are wholly shared at `cut` and above.
    pub tiles_above: u32,
    /// The layer from which on less is shared.
    pub cut: u32,
}

/// Work of one block of threads and one key head. The kernels read it as it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Item {
    /// Its rows stand at `first..first + count` of the list; none: nothing to do.
    pub first: u32,
    pub count: u32,
    /// The sequence whose tables are read.
    pub slot: u32,
    /// Tiles that the shared fold takes (or took, for an item that goes on from it).
    pub tiles_below: u32,
    pub tiles_above: u32,
    pub cut: u32,
    /// 1: fold only these tiles, for other items to go on.
    pub prefix: u32,
    /// Lowest and highest position of its rows; of no meaning where only shared tiles are folded.
    pub from: u32,
    pub last: u32,
}
// SAFETY: plain numbers without padding.
unsafe impl Element for Item {}

/// Rows whose shared part is folded together at least: for fewer, storing the state costs more
/// than it saves.
const LEAST_SHARERS: usize = 4;
/// Warps of a wide item.
const WARPS: usize = 4;

/// A step's items, by kernel, each in the order of its rows.
#[derive(Clone, Debug, Default)]
pub struct Items {
    /// Rows of one sequence that one warp folds.
    pub(super) narrow: Vec<Item>,
    /// Rows of one sequence that four warps fold.
    pub(super) wide: Vec<Item>,
    /// Rows of several sequences, up to the end of what they share.
    pub(super) prefix: Vec<Item>,
    /// Rows of the prefix items.
    pub(super) sharers: Vec<u32>,
}

/// Rows of a warp whose heads fill its 16 matrix rows.
pub(super) fn rows_per_warp(group: usize) -> usize {
    (16 / group).max(1)
}

impl Items {
    /// Divides rows of which `group` query heads share a key head. `shared` is asked for the
    /// slots of single rows. `capacity` is where the sharers' part of the list begins.
    pub fn build(
        rows: &RowList,
        group: usize,
        capacity: usize,
        shared: impl Fn(u32) -> SharedPrefix,
    ) -> Self {
        let (mut items, per_warp) = (Self::default(), rows_per_warp(group));
        let mut sharers: Vec<(SharedPrefix, u32)> = Vec::new();
        let mut first = 0;
        while first < rows.slot.len() {
            let slot = rows.slot[first];
            let follows = |&at: &usize| {
                rows.slot[at] == slot
                    && rows.position[at] as usize == rows.position[first] as usize + (at - first)
            };
            let count = 1 + (first + 1..rows.slot.len()).take_while(follows).count();
            let run = |start: usize, count: usize| Item {
                first: (first + start) as u32,
                count: count as u32,
                slot,
                from: rows.position[first + start],
                last: rows.position[first + start + count.max(1) - 1],
                ..Item::default()
            };
            if slot == NONE {
                items.narrow.push(Item { count: 0, ..run(0, 0) });
                first += 1;
                continue;
            }
            if count <= per_warp {
                if count == 1 {
                    let prefix = shared(slot);
                    if prefix.group != 0 && prefix.tiles_below.max(prefix.tiles_above) > 0 {
                        sharers.push((prefix, first as u32));
                    }
                }
                items.narrow.push(run(0, count));
            } else {
                let most = WARPS * per_warp;
                let parts = (0..count).step_by(most);
                items.wide.extend(parts.map(|start| run(start, most.min(count - start))));
            }
            first += count;
        }
        items.share(rows, sharers, WARPS * per_warp, capacity);
        items
    }

    /// Makes prefix items of rows that share, and notes in their own items where to go on.
    fn share(
        &mut self,
        rows: &RowList,
        mut sharers: Vec<(SharedPrefix, u32)>,
        most: usize,
        capacity: usize,
    ) {
        sharers.sort_unstable();
        for group in sharers.chunk_by(|a, b| a.0 == b.0) {
            if group.len() < LEAST_SHARERS {
                continue;
            }
            for some in group.chunks(most) {
                let (SharedPrefix { tiles_below, tiles_above, cut, .. }, representative) = some[0];
                self.prefix.push(Item {
                    first: (capacity + self.sharers.len()) as u32,
                    count: some.len() as u32,
                    slot: rows.slot[representative as usize],
                    tiles_below,
                    tiles_above,
                    cut,
                    prefix: 1,
                    ..Item::default()
                });
                for &(_, row) in some {
                    self.sharers.push(row);
                    let at = self.narrow.partition_point(|item| item.first < row);
                    let own = self.narrow[at];
                    self.narrow[at] = Item { tiles_below, tiles_above, cut, ..own };
                }
            }
        }
    }

    /// Idle prefix items up to the most that a step of `rows` single rows can have, so that every
    /// such step launches the same.
    pub fn fill_up(&mut self, rows: usize, group: usize) {
        if !self.prefix.is_empty() {
            let most = rows / (WARPS * rows_per_warp(group)) + rows / LEAST_SHARERS + 1;
            self.prefix.resize(most, Item::default());
        }
    }

    /// Whether anything is shared.
    pub fn shares(&self) -> bool {
        !self.prefix.is_empty()
    }
}

/// [`Items`] in the device's memory, and what the fold stores between kernels.
pub struct AttentionPlan {
    capacity: usize,
    /// 0..capacity, then the sharers.
    pub(super) list: Buffer<u32>,
    pub(super) narrow: Buffer<Item>,
    pub(super) wide: Buffer<Item>,
    pub(super) prefix: Buffer<Item>,
    /// First rows of the narrow and wide items, in order.
    firsts: [Vec<u32>; 2],
    pub(super) prefixes: usize,
    /// (rows, heads, `head_dim` + 2): the merged chunks of rows with more than one.
    pub(super) total: Buffer<f32>,
    /// Likewise the open chunk of rows that share.
    pub(super) open: Buffer<f32>,
}

impl AttentionPlan {
    /// Room for `rows` rows, of which up to `single` are of sequences that have no other in the
    /// step; `state` floats a row, `long` whether rows may have more positions than a chunk. The
    /// processor needs none of it.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(
        device: &Device,
        (rows, single): (usize, usize),
        state: usize,
        long: bool,
    ) -> Result<Self> {
        let used = |len| if matches!(device, Device::Cpu(_)) { 0 } else { len };
        let mut list = Buffer::zeroed(device, used(rows + single))?;
        list.write(0, &(0..used(rows) as u32).collect::<Vec<_>>())?;
        Ok(Self {
            capacity: rows,
            list,
            narrow: Buffer::zeroed(device, used(rows))?,
            wide: Buffer::zeroed(device, used(rows))?,
            prefix: Buffer::zeroed(device, used(2 * single + 1))?,
            firsts: [Vec::new(), Vec::new()],
            prefixes: 0,
            total: Buffer::zeroed(device, used(if long { rows * state } else { 0 }))?,
            open: Buffer::zeroed(device, used(rows * state))?,
        })
    }

    /// Rows that there is room for, where the sharers' part of the list begins.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Writes a step's items.
    ///
    /// # Errors
    /// The device has failed.
    pub fn set(&mut self, items: &Items) -> Result<()> {
        if self.list.is_empty() {
            return Ok(()); // the processor goes row by row
        }
        self.narrow.write(0, &items.narrow)?;
        self.wide.write(0, &items.wide)?;
        self.prefix.write(0, &items.prefix)?;
        self.list.write(self.capacity, &items.sharers)?;
        for (firsts, list) in self.firsts.iter_mut().zip([&items.narrow, &items.wide]) {
            firsts.clear();
            firsts.extend(list.iter().map(|item| item.first));
        }
        self.prefixes = items.prefix.len();
        Ok(())
    }

    /// How many narrow and wide items hold the first `rows` rows. An item's rows enter together.
    pub(super) fn active(&self, rows: usize) -> [usize; 2] {
        [0, 1].map(|kind| self.firsts[kind].partition_point(|&first| (first as usize) < rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(rows: &[(u32, u32)]) -> RowList {
        RowList {
            slot: rows.iter().map(|row| row.0).collect(),
            position: rows.iter().map(|row| row.1).collect(),
            receipt: vec![-1; rows.len()],
        }
    }

    #[test]
    fn runs_of_a_sequence_are_items_and_single_rows_share() {
        // Five single rows of which four share, a dead row, and 22 rows of one sequence.
        let mut rows = vec![(0, 70), (1, 80), (2, 90), (3, 71), (4, 75), (NONE, 0)];
        rows.extend((10..32).map(|position| (9, position)));
        let prefix = SharedPrefix { group: 7, tiles_below: 1, tiles_above: 0, cut: 3 };
        let shared = |slot| if slot == 2 { SharedPrefix::default() } else { prefix };
        // Three heads a key head: five rows a warp, twenty a wide item.
        let items = Items::build(&list(&rows), 3, 100, shared);
        let of = |items: &[Item]| -> Vec<(u32, u32, u32, u32)> {
            items.iter().map(|i| (i.first, i.count, i.slot, i.tiles_below)).collect()
        };
        let narrow = [(0, 1, 0, 1), (1, 1, 1, 1), (2, 1, 2, 0), (3, 1, 3, 1), (4, 1, 4, 1)];
        assert_eq!(of(&items.narrow), [&narrow[..], &[(5, 0, NONE, 0)]].concat());
        assert_eq!(of(&items.wide), [(6, 20, 9, 0), (26, 2, 9, 0)]);
        assert_eq!(of(&items.prefix), [(100, 4, 0, 1)]);
        assert_eq!(items.sharers, [0, 1, 3, 4]);
    }

    #[test]
    fn fewer_sharers_than_it_takes_share_nothing() {
        let rows = list(&[(0, 70), (1, 80), (2, 90)]);
        let prefix = SharedPrefix { group: 7, tiles_below: 1, tiles_above: 1, cut: 0 };
        let items = Items::build(&rows, 3, 100, |_| prefix);
        assert!(!items.shares() && items.narrow.iter().all(|item| item.tiles_below == 0));
    }
}
