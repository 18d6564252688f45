//! A thought injected over a sentence, and the sentence itself.

use super::heat::{Field, map};
use crate::{
    experiment::{results::Condition, stats::Rate},
    report::{
        format::{cells, condition, count, depth, percent, percents, points, signed, unit},
        html::{Table, details, escape, paragraph, stacked},
        svg::Panel,
        tables::{Cell, Scope, Tables, TextRow, TextTable},
    },
};

pub(super) fn html(tables: &Tables) -> String {
    let parts: String = tables.texts.iter().map(part).collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "The concept is added only where a sentence is read. Asked what it thinks of, a model that \
                 keeps its thoughts should name the concept; asked to repeat the line, it should still \
                 have the text. <b>Thinks</b>: of ten words the reply is nearest to the trial’s own (one \
                 in ten by chance; the clean row is the chance that was measured). <b>Repeats</b>: the \
                 sentence stands in the reply. <b>Both</b>: in the two trials of the same word, sentence \
                 and cell.";
    paragraph(intro) + &parts
}

fn part(table: &TextTable) -> String {
    let title = format!(
        "<h3>{}: {} and {} <small>doses {}</small></h3>\n",
        escape(&table.part),
        escape(&table.prompts.0),
        escape(&table.prompts.1),
        unit(table.mode)
    );
    let chosen = table.chosen.map_or(String::new(), |chosen| {
        paragraph(&format!(
            "The best cell on one half of the words, depth {}, dose {}, has both in {} of the other \
             half’s trials ({} of all).",
            depth(&chosen.cell),
            chosen.cell.dose,
            count(chosen.held_out),
            count(chosen.all)
        ))
    });
    let by_cell = |row: &&TextRow| matches!(row.scope, Scope::Cell(_));
    let (cells, others): (Vec<_>, Vec<_>) = table.rows.iter().partition(by_cell);
    title
        + &chosen
        + &rows("All cells, and by dose", &others)
        + &panels(&others)
        + &maps(&cells)
        + &details("Every cell", &rows("By cell", &cells))
}

fn rows(caption: &str, rows: &[&TextRow]) -> String {
    let head = ["condition", "cells", "thinks", "repeats", "both", "both, less random"];
    let mut out = Table::new(caption, &head);
    let cell = |rate: &Rate| {
        let note = format!("{} {}", count(rate.count), percents(rate.interval));
        stacked(&percent(rate.share), &note)
    };
    let mut last = None;
    for row in rows {
        let name = condition(row.condition);
        let class = if last == Some(row.scope) { name.into() } else { format!("{name} first") };
        last = Some(row.scope);
        let net =
            row.net.map_or("–".into(), |net| stacked(&signed(net.value), &points(net.interval)));
        let cells = cells(row.condition, &row.scope);
        let rates = [&row.thinks, &row.repeats, &row.both].map(cell);
        let [thinks, repeats, both] = rates;
        out.row(&class, &[name.into(), cells, thinks, repeats, both, net]);
    }
    out.html()
}

/// What a row's rate is drawn of.
type Pick = fn(&TextRow) -> Rate;

const MEASURES: [(&str, Pick); 3] = [
    ("thinks of the concept", |row| row.thinks),
    ("repeats the sentence", |row| row.repeats),
    ("both", |row| row.both),
];

fn panels(rows: &[&TextRow]) -> String {
    let dose = |row: &&TextRow| match row.scope {
        Scope::Dose(dose) => Some(dose),
        _ => None,
    };
    let mut doses: Vec<f64> = rows.iter().filter_map(dose).collect();
    doses.sort_by(f64::total_cmp);
    doses.dedup();
    if doses.is_empty() {
        return String::new();
    }
    let panel = |(title, pick): (&str, Pick)| {
        let line = |condition| {
            let at = |wanted: &f64| {
                let is = |row: &&&TextRow| row.condition == condition && dose(row) == Some(*wanted);
                rows.iter().find(is).map(|row| pick(row))
            };
            doses.iter().map(at).collect()
        };
        let lines =
            vec![("concept", line(Condition::Concept)), ("random", line(Condition::Random))];
        let clean = rows.iter().find(|row| row.condition == Condition::Clean);
        Panel { title, doses: &doses, lines, band: clean.map(|row| pick(row)) }.svg()
    };
    format!("<div class=\"panels\">\n{}</div>\n", MEASURES.map(panel).concat())
}

fn maps(rows: &[&TextRow]) -> String {
    let fields = |pick: Pick| -> Vec<(Cell, Option<Field>)> {
        let of = rows.iter().filter(|row| row.condition == Condition::Concept);
        of.filter_map(|row| match row.scope {
            Scope::Cell(cell) => Some((cell, pick(row))),
            _ => None,
        })
        .map(|(cell, rate)| {
            let (text, note) = (percent(rate.share), count(rate.count));
            (cell, Some(Field { value: rate.share, text, note, class: "" }))
        })
        .collect()
    };
    let maps =
        MEASURES.map(|(title, pick)| map(&format!("Concept vectors: {title}"), &fields(pick)));
    format!("<div class=\"maps\">{}</div>\n", maps.concat())
}
