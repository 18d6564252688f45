//! What was changed in the stream.

use super::{Group, ReceiptRow, mean};
use crate::engine::Receipt;

pub(super) fn rows(group: &Group) -> Vec<ReceiptRow> {
    let rows = group.cells().into_iter().map(|cell| {
        let entries: Vec<_> = group.entries.iter().filter(|e| e.cell() == Some(cell)).collect();
        let all: Vec<&Receipt> = entries.iter().flat_map(|e| &e.trial.receipts).collect();
        let ratio = |r: &&Receipt| Some(f64::from(r.measured?) / f64::from(r.norm_before?));
        ReceiptRow {
            part: group.part.into(),
            prompt: group.prompt.into(),
            cell,
            receipts: all.len() as u64,
            planned: mean(all.iter().filter_map(|r| r.planned).map(f64::from)),
            measured: mean(all.iter().filter_map(|r| r.measured).map(f64::from)),
            ratio: mean(all.iter().filter_map(ratio)),
            rows_touched: all.iter().map(|r| r.rows_touched).sum(),
            rows_expected: all.iter().map(|r| r.rows_expected).sum(),
            flagged: entries
                .iter()
                .filter(|e| e.trial.receipts.is_empty() || e.trial.receipts.iter().any(is_off))
                .map(|e| e.trial.id.clone())
                .collect(),
        }
    });
    rows.collect()
}

/// Rows missed, or a change that is not the planned one.
fn is_off(receipt: &Receipt) -> bool {
    let differs = match (receipt.planned, receipt.measured) {
        (Some(planned), Some(measured)) => (measured - planned).abs() > 0.01 * planned.abs(),
        _ => receipt.strength != 0.0,
    };
    differs || receipt.rows_touched != receipt.rows_expected
}
