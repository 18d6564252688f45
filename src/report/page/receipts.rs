//! The receipts: what was planned and what was measured.

use crate::report::{
    format::{depth, number, percent, thousands},
    html::{Table, details, escape, paragraph},
    tables::Tables,
};

/// So many ids are named; the rest are counted.
const NAMED: usize = 3;

pub(super) fn html(tables: &Tables) -> String {
    let flagged: usize = tables.receipts.iter().map(|row| row.flagged.len()).sum();
    let trials: u64 = tables.receipts.iter().map(|row| row.receipts).sum();
    let mut table = Table::new(
        "Mean change of a row of the residual stream",
        &[
            "part / prompt",
            "depth · layer",
            "dose",
            "injections",
            "planned",
            "measured",
            "change / norm before",
            "rows changed / expected",
            "not as planned",
        ],
    );
    let mut last = None;
    for row in &tables.receipts {
        let key = (&row.part, &row.prompt, row.cell.layer);
        let mut class = if last == Some(key) { "" } else { "first" };
        last = Some(key);
        let off = if row.flagged.is_empty() {
            "none".to_owned()
        } else {
            class = "warn";
            let ids: Vec<_> = row.flagged.iter().take(NAMED).map(|id| escape(id)).collect();
            let more = if row.flagged.len() > NAMED { ", …" } else { "" };
            format!("{}: {}{more}", row.flagged.len(), ids.join(", "))
        };
        table.row(
            class,
            &[
                format!("{} / {}", escape(&row.part), escape(&row.prompt)),
                depth(&row.cell),
                row.cell.dose.to_string(),
                thousands(row.receipts),
                number(row.planned),
                number(row.measured),
                row.ratio.map_or("–".into(), percent),
                format!("{} / {}", thousands(row.rows_touched), thousands(row.rows_expected)),
                off,
            ],
        );
    }
    let table = table.html();
    if table.is_empty() {
        return table;
    }
    let verdict = if flagged == 0 {
        format!(
            "All {} injections changed every row of their window, each by the planned amount \
             (within 1%).",
            thousands(trials)
        )
    } else {
        format!(
            "<b>{flagged} trials were not changed as planned</b> (more than 1% off, or rows \
             missed): don't trust their cells before you know why."
        )
    };
    // Nothing to worry about is folded away.
    paragraph(&verdict) + &if flagged == 0 { details("Every cell", &table) } else { table }
}
