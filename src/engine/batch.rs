//! The host's plan of a step: pure functions -> flat arrays.

use crate::{
    model::forward::Step,
    ops::{
        hooks::heads_of_tap,
        rows::{NONE, RowList, Source},
    },
};

/// A row that a sequence wants computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlannedRow {
    /// Its number in the plan.
    pub index: u32,
    /// Slot of its sequence.
    pub slot: u32,
    /// The sequence itself: when the row's results come, another one may have the slot.
    pub sequence: u64,
    /// Position in it.
    pub position: u32,
    /// First layer it runs through.
    pub entry: u32,
    /// What it starts from.
    pub source: Source,
    /// Operations of its sequence.
    pub ops: u32,
}

/// Rows sorted by entry layer (rows of equal entry stay in their order), as flat arrays; captures
/// are (tap, index of the row as given, destination).
pub fn build(layers: usize, rows: &[PlannedRow], captures: &[(u32, u32, u32)]) -> (Step, Vec<u32>) {
    let mut order: Vec<u32> = (0..rows.len() as u32).collect();
    order.sort_by_key(|&at| rows[at as usize].entry);
    let mut place = vec![0; rows.len()];
    order.iter().enumerate().for_each(|(to, &from)| place[from as usize] = to as u32);

    let sorted = || order.iter().map(|&at| rows[at as usize]);
    let mut receipts = 0;
    let receipt = sorted().map(|row| {
        if row.ops == 0 {
            return -1;
        }
        receipts += row.ops as usize;
        (receipts - row.ops as usize) as i32
    });
    let receipt = receipt.collect();
    let active = (0..=layers)
        .map(|layer| order.partition_point(|&at| rows[at as usize].entry as usize <= layer))
        .collect();
    let has_heads = captures.iter().any(|&(tap, ..)| heads_of_tap(layers, tap as usize).is_some());
    let captures = captures.iter().map(|&(tap, row, to)| (tap, place[row as usize], to)).collect();
    let step = Step {
        active,
        rows: RowList {
            slot: sorted().map(|row| row.slot).collect(),
            position: sorted().map(|row| row.position).collect(),
            receipt,
        },
        sources: sorted().map(|row| row.source).collect(),
        captures,
        has_heads,
        receipts,
        ..Step::default()
    };
    (step, place)
}

/// Rows that do nothing, up to `rows` in all: the kernels' launches then depend on that number
/// only, and can be recorded.
pub fn fill_up(step: &mut Step, rows: usize) {
    step.rows.slot.resize(rows, NONE);
    step.rows.position.resize(rows, 0);
    step.rows.receipt.resize(rows, -1);
    step.sources.resize(rows, Source::Nothing);
    step.active.fill(rows);
}

/// Rows of a recorded step that holds `rows`: few sizes, little waste.
pub fn bucket(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(16),
        65..=256 => rows.next_multiple_of(64),
        _ => rows.next_multiple_of(128),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_entry_and_active_ones_are_a_prefix() {
        let row = |slot, entry, ops| PlannedRow {
            index: 0,
            slot,
            sequence: 0,
            position: slot * 10,
            entry,
            source: Source::Token(slot),
            ops,
        };
        let rows = [row(0, 2, 1), row(1, 0, 0), row(2, 3, 2), row(3, 0, 3)];
        let (step, place) = build(3, &rows, &[(4, 0, 7)]);
        assert_eq!(step.rows.slot, [1, 3, 0, 2]);
        assert_eq!(step.active, [2, 2, 3, 4]);
        assert_eq!(step.rows.receipt, [-1, 0, 3, 4]);
        assert_eq!(step.receipts, 6);
        assert_eq!(place, [2, 0, 3, 1]);
        assert_eq!(step.captures, [(4, 2, 7)]);
    }

    #[test]
    fn a_bucket_holds_its_rows() {
        for rows in 1..3000 {
            assert!(bucket(rows) >= rows && bucket(rows) < 2 * rows + 8);
            assert_eq!(bucket(bucket(rows)), bucket(rows));
        }
    }
}
