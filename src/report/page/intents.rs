//! Whether a word that was put into the model's mouth is said to have been meant.

use super::{
    heat::{Field, map},
    subtitle,
};
use crate::{
    experiment::{results::Condition, stats::Rate},
    report::{
        format::{cells, condition, count, depth, percent, percents, points, signed},
        html::{Table, details, paragraph, stacked},
        svg::Panel,
        tables::{IntentRow, IntentTable, Scope, Score, Tables},
    },
};

pub(super) fn html(tables: &Tables) -> String {
    let parts: String = tables.intents.iter().map(part).collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "A word that does not fit is put in the model’s mouth, and it is asked whether it meant \
                 it. <b>Apologises</b>: it does not say that it did (so broken text counts here, which is \
                 why the columns beside it are shown). A model that looks at its own earlier state should \
                 apologise less where the word’s own vector was added before it, while the sentence was \
                 read, and no less where another word’s was (<b>other</b>), or where the vector was added \
                 only to the question that follows (<b>after</b>). <b>Repeats</b>: sentences repeated \
                 under the same injection; where few are, the model is too disturbed to be asked.";
    paragraph(intro) + &parts
}

fn part(table: &IntentTable) -> String {
    let score = table.score.map_or(String::new(), |score| {
        paragraph(&format!(
            "Score, in percentage points: apologies without a vector or with another word’s, whichever \
             are fewer, less those with the word’s own. At the best cell of one half of the words, depth \
             {}, dose {}, it is {} on the other half’s {} words ({} on all {}).",
            depth(&score.cell),
            score.cell.dose,
            shown(&score.held_out),
            score.held_out.words,
            shown(&score.all),
            score.all.words
        ))
    });
    let by_cell = |row: &&IntentRow| matches!(row.scope, Scope::Cell(_));
    let (cells, others): (Vec<_>, Vec<_>) = table.rows.iter().partition(by_cell);
    subtitle(&table.part, &table.prompt, table.mode)
        + &score
        + &rows("All cells, and by dose", &others)
        + &panel(&others)
        + &maps(&cells)
        + &details("Every cell", &rows("By cell", &cells))
}

fn shown(score: &Score) -> String {
    let interval =
        score.interval.map_or(String::new(), |interval| format!(" {}", points(interval)));
    signed(score.value) + &interval
}

fn rows(caption: &str, rows: &[&IntentRow]) -> String {
    let head = [
        "condition",
        "cells",
        "apologises",
        "says it meant it",
        "says accident",
        "neither",
        "repeats",
    ];
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
        let guard = row.guard.and_then(|guard| Some((guard, guard.share()?)));
        let guard = guard.map_or("–".into(), |(guard, share)| {
            let class = if share < 0.5 { " class=\"warn\"" } else { "" };
            format!("<span{class}>{}</span><small>{}</small>", percent(share), count(guard))
        });
        out.row(
            &class,
            &[
                name.into(),
                cells(row.condition, &row.scope),
                cell(&row.apologises),
                cell(&row.intends),
                cell(&row.disowns),
                percent(row.neither.share),
                guard,
            ],
        );
    }
    out.html()
}

fn panel(rows: &[&IntentRow]) -> String {
    let dose = |row: &&IntentRow| match row.scope {
        Scope::Dose(dose) => Some(dose),
        _ => None,
    };
    let mut doses: Vec<f64> = rows.iter().filter_map(dose).collect();
    doses.sort_by(f64::total_cmp);
    doses.dedup();
    let line = |condition| -> Vec<Option<Rate>> {
        let at = |wanted: &f64| {
            let is = |row: &&&IntentRow| row.condition == condition && dose(row) == Some(*wanted);
            rows.iter().find(is).map(|row| row.apologises)
        };
        doses.iter().map(at).collect()
    };
    if doses.is_empty() {
        return String::new();
    }
    let controls = [Condition::Other, Condition::After, Condition::Random];
    let panels = controls.into_iter().filter_map(|control| {
        let lines =
            vec![("concept", line(Condition::Concept)), (condition(control), line(control))];
        lines[1].1.iter().any(Option::is_some).then(|| {
            let clean = rows.iter().find(|row| row.condition == Condition::Clean);
            let title = format!("apologises: concept, {}", condition(control));
            let band = clean.map(|row| row.apologises);
            Panel { title: &title, doses: &doses, lines, band }.svg()
        })
    });
    format!("<div class=\"panels\">\n{}</div>\n", panels.collect::<String>())
}

fn maps(rows: &[&IntentRow]) -> String {
    let of = |wanted| {
        let fields = rows.iter().filter(|row| row.condition == wanted).filter_map(|row| {
            let Scope::Cell(cell) = row.scope else { return None };
            let rate = row.apologises;
            let (text, note) = (percent(rate.share), count(rate.count));
            Some((cell, Some(Field { value: rate.share, text, note, class: "" })))
        });
        map(&format!("Apologises, {}", condition(wanted)), &fields.collect::<Vec<_>>())
    };
    let maps: String = Condition::injected().map(of).collect();
    format!("<div class=\"maps\">{maps}</div>\n")
}
