//! How often replies are successes, where no other section says so.

use super::{
    heat::{Field, map},
    subtitle,
};
use crate::{
    experiment::results::{Condition, Outcome},
    report::{
        format::{cells, condition, count, percent, percents, points, signed},
        html::{Table, details, paragraph, stacked},
        tables::{OutcomeRow, OutcomeTable, Scope, Tables},
    },
};

pub(super) fn html(tables: &Tables) -> String {
    let parts: String = tables.outcomes.iter().map(part).collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "<b>Success</b>: all the verdicts that the protocol asks of a reply. Differences are from \
                 random vectors, in pairs of the same word, cell and seed, in percentage points.";
    paragraph(intro) + &parts
}

fn part(table: &OutcomeTable) -> String {
    let by_cell = |row: &&OutcomeRow| matches!(row.scope, Scope::Cell(_));
    let (cells, others): (Vec<_>, Vec<_>) = table.rows.iter().partition(by_cell);
    let asked = match table.outcome {
        Outcome::Repeat => "The sentence stands in the reply.",
        _ => "Of ten words the reply is nearest to the trial’s own.",
    };
    subtitle(&table.part, &table.prompt, table.mode)
        + &paragraph(asked)
        + &rows("All cells, and by dose", &others)
        + &maps(&cells)
        + &details("Every cell", &rows("By cell", &cells))
}

fn rows(caption: &str, rows: &[&OutcomeRow]) -> String {
    let mut out = Table::new(caption, &["condition", "cells", "success", "less random"]);
    for row in rows {
        let name = condition(row.condition);
        let note = format!("{} {}", count(row.success.count), percents(row.success.interval));
        let net =
            row.net.map_or("–".into(), |net| stacked(&signed(net.value), &points(net.interval)));
        let success = stacked(&percent(row.success.share), &note);
        out.row(name, &[name.into(), cells(row.condition, &row.scope), success, net]);
    }
    out.html()
}

fn maps(rows: &[&OutcomeRow]) -> String {
    let of = |wanted| {
        let fields = rows.iter().filter(|row| row.condition == wanted).filter_map(|row| {
            let Scope::Cell(cell) = row.scope else { return None };
            let (text, note) = (percent(row.success.share), count(row.success.count));
            Some((cell, Some(Field { value: row.success.share, text, note, class: "" })))
        });
        map(&format!("Success, {}", condition(wanted)), &fields.collect::<Vec<_>>())
    };
    let maps = [Condition::Concept, Condition::Random].map(of).concat();
    format!("<div class=\"maps\">{maps}</div>\n")
}
