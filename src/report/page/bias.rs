//! What vectors do to the answer of questions that have nothing to do with thoughts.

use super::heat::{Field, map};
use crate::experiment::results::Condition;
use crate::report::{
    format::{cells, condition, count, decimal, decimals, percent, percents, pushed, unit},
    html::{Table, details, escape, paragraph, stacked},
    tables::{BiasRow, BiasTable, Push, Scope, Tables},
};

pub(super) fn html(tables: &Tables) -> String {
    let parts: String = tables.biases.iter().map(part).collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "The same vectors, added while the model reads unrelated yes/no questions whose answer \
                 is no. A vector that only makes “yes” likelier does so there too; one that is noticed \
                 does it where the question is about injected thoughts. Shift: log-probability of yes \
                 minus that of no at the first token, less the same without an injection (nats). Net: \
                 asked minus unrelated; intervals are over words, and hold for these questions.";
    paragraph(intro) + &parts
}

fn part(table: &BiasTable) -> String {
    let title =
        format!("<h3>{} <small>doses {}</small></h3>\n", escape(&table.part), unit(table.mode));
    let by_cell = |row: &&BiasRow| matches!(row.scope, Scope::Cell(_));
    let (cells, others): (Vec<_>, Vec<_>) = table.rows.iter().partition(by_cell);
    let names: Vec<_> = table.unrelated.iter().map(|name| escape(name)).collect();
    title
        + &paragraph(&format!(
            "Without an injection the model answers {} of the questions that have an answer right, and \
             says yes first to {} asked and {} unrelated ones ({}).",
            count(table.right),
            count(table.clean.0),
            count(table.clean.1),
            names.join(", ")
        ))
        + &pushed(table).map_or(String::new(), |sentence| paragraph(&sentence))
        + &rows("All cells, and by dose", &others)
        + &shifts(&cells)
        + &details("Every cell", &rows("By cell", &cells))
}

fn rows(caption: &str, rows: &[&BiasRow]) -> String {
    let head = [
        "condition",
        "cells",
        "yes, asked",
        "yes, unrelated",
        "shift, asked",
        "shift, unrelated",
        "net shift",
        "p(yes) + p(no)",
    ];
    let mut out = Table::new(caption, &head);
    let yes = |push: &Push| {
        let note = format!("{} {}", count(push.yes.count), percents(push.yes.interval));
        stacked(&percent(push.yes.share), &note)
    };
    let mut last = None;
    for row in rows {
        let name = condition(row.condition);
        let class = if last == Some(row.scope) { name.into() } else { format!("{name} first") };
        last = Some(row.scope);
        let interval = row.interval.map_or("no interval".into(), decimals);
        out.row(
            &class,
            &[
                name.into(),
                cells(row.condition, &row.scope),
                yes(&row.asked),
                yes(&row.unrelated),
                decimal(row.asked.shift, 2),
                decimal(row.unrelated.shift, 2),
                stacked(&decimal(row.net_shift, 2), &interval),
                format!("{} | {}", percent(row.asked.mass), percent(row.unrelated.mass)),
            ],
        );
    }
    out.html()
}

/// The net shift of each cell, concept and random vectors side by side.
fn shifts(rows: &[&BiasRow]) -> String {
    let largest = rows.iter().map(|row| row.net_shift.abs()).fold(0.0, f64::max);
    let of = |condition, title: &str| {
        let rows = rows.iter().filter(|row| row.condition == condition);
        let field = |row: &BiasRow| Field {
            value: if largest > 0.0 { row.net_shift / largest } else { 0.0 },
            text: decimal(row.net_shift, 2),
            note: row.interval.map_or_else(|| "no interval".into(), decimals),
            class: "",
        };
        let fields: Vec<_> = rows
            .filter_map(|row| match row.scope {
                Scope::Cell(cell) => Some((cell, Some(field(row)))),
                _ => None,
            })
            .collect();
        map(title, &fields)
    };
    format!(
        "<div class=\"maps\">{}{}</div>\n",
        of(Condition::Concept, "Net shift, concept vectors"),
        of(Condition::Random, "Net shift, random vectors")
    )
}
