//! Rates of the sampled replies: tables, maps, the dose-response, hits against false alarms.

use super::{
    heat::{Field, map},
    subtitle,
};
use crate::{
    experiment::{
        results::Condition,
        stats::{Difference, Method, Rate},
    },
    report::{
        format::{
            axes, cells, condition, count, decimal, decimals, number, percent, percents, points,
            scope, signed,
        },
        html::{Table, details, escape, paragraph, stacked},
        svg::Panel,
        tables::{Cell, Contrast, ReplyArm, ReplyTable, Scope, Tables},
    },
};

type Pick = fn(&ReplyArm) -> Rate;

const MEASURES: [(&str, Pick); 4] = [
    ("coherent", |arm| arm.coherent),
    ("claims", |arm| arm.claims),
    ("names the concept", |arm| arm.mentions),
    ("all three, claim first", |arm| arm.identified),
];

pub(super) fn html(tables: &Tables) -> String {
    let tables = tables.replies.iter().filter(|table| !table.arms.is_empty());
    tables
        .map(|table| {
            subtitle(&table.part, &table.prompt, table.mode)
                + &chance(table)
                + &rates("Rates: all cells together, and by dose", table, |scope| {
                    !matches!(scope, Scope::Cell(_))
                })
                + &details(
                    "Rates of every cell",
                    &rates("Rates, by cell", table, |scope| matches!(scope, Scope::Cell(_))),
                )
                + &chart(table)
                + &maps(table)
        })
        .collect()
}

/// A rate over its counts and interval.
fn cell(rate: &Rate) -> String {
    stacked(&percent(rate.share), &format!("{} {}", count(rate.count), percents(rate.interval)))
}

fn optional(rate: Option<&Rate>) -> String {
    rate.map_or("–".into(), cell)
}

fn rates(caption: &str, table: &ReplyTable, wanted: impl Fn(&Scope) -> bool) -> String {
    let mut out = Table::new(
        caption,
        &[
            "condition",
            "cells",
            "replies",
            "coherent",
            "claims",
            "claims if coherent",
            "mentions",
            "identified",
        ],
    );
    let mut last = None;
    for arm in table.arms.iter().filter(|arm| wanted(&arm.scope)) {
        let name = condition(arm.condition);
        let class = if last == Some(arm.scope) { name.into() } else { format!("{name} first") };
        last = Some(arm.scope);
        out.row(
            &class,
            &[
                name.into(),
                cells(arm.condition, &arm.scope),
                arm.claims.count.n.to_string(),
                cell(&arm.coherent),
                cell(&arm.claims),
                optional(arm.claims_if_coherent.as_ref()),
                cell(&arm.mentions),
                cell(&arm.identified),
            ],
        );
    }
    out.html()
}

/// How often the words come up with nothing injected.
fn chance(table: &ReplyTable) -> String {
    let Some(share) = table.chance.share() else { return String::new() };
    let words: Vec<_> = table
        .chance_words
        .iter()
        .map(|(word, hits)| format!("{} {}", escape(word), count(*hits)))
        .collect();
    let words = if words.is_empty() { String::new() } else { format!(": {}", words.join(", ")) };
    paragraph(&format!(
        "Chance: of {} pairs of a clean reply and an injected word, {} have the word in the reply \
         ({}){words}.",
        table.chance.n,
        table.chance.k,
        percent(share)
    ))
}

fn chart(table: &ReplyTable) -> String {
    let (doses, depths) = axes(table.arms.iter().filter_map(|arm| match arm.scope {
        Scope::Cell(cell) => Some(cell),
        _ => None,
    }));
    if doses.is_empty() {
        return String::new();
    }
    let legend = "<ul class=\"legend\"><li><span class=\"key concept\"></span>concept vectors</li>\
                  <li><span class=\"key random\"></span>random vectors</li><li><span class=\"key \
                  clean\"></span>clean, with its interval</li></ul>\n";
    let pooled = panels(table, &doses, &Scope::Dose);
    let by_depth: String = depths
        .iter()
        .map(|depth| {
            let title = format!("<h3>Depth {}</h3>\n", crate::report::format::depth(depth));
            title + &panels(table, &doses, &|dose| Scope::Cell(Cell { dose, ..*depth }))
        })
        .collect();
    format!(
        "<h3>By dose, all depths together</h3>\n{legend}{pooled}{}",
        details("The same at each depth", &by_depth)
    )
}

fn panels(table: &ReplyTable, doses: &[f64], scope: &dyn Fn(f64) -> Scope) -> String {
    let find = |condition, scope| {
        table.arms.iter().find(|arm| arm.condition == condition && arm.scope == scope)
    };
    let panel = |(title, pick): (&str, Pick)| {
        let line =
            |condition| doses.iter().map(|dose| find(condition, scope(*dose)).map(pick)).collect();
        let lines =
            vec![("concept", line(Condition::Concept)), ("random", line(Condition::Random))];
        Panel { title, doses, lines, band: find(Condition::Clean, Scope::All).map(pick) }.svg()
    };
    format!("<div class=\"panels\">\n{}</div>\n", MEASURES.map(panel).concat())
}

fn maps(table: &ReplyTable) -> String {
    let fields = |pick: Pick| -> Vec<_> {
        let arms = table.arms.iter().filter(|arm| arm.condition == Condition::Concept);
        arms.filter_map(|arm| match arm.scope {
            Scope::Cell(cell) => Some((cell, pick(arm))),
            _ => None,
        })
        .map(|(cell, rate)| {
            let (text, note) = (percent(rate.share), count(rate.count));
            (cell, Some(Field { value: rate.share, text, note, class: "" }))
        })
        .collect()
    };
    let nets: Vec<_> = table
        .contrasts
        .iter()
        .filter_map(|row| match row.scope {
            Scope::Cell(cell) => Some((cell, row.net_identified.map(|net| net_field(&net)))),
            _ => None,
        })
        .collect();
    format!(
        "<div class=\"maps\">{}{}{}</div>\n",
        map("Coherent, concept vectors", &fields(|arm| arm.coherent)),
        map("Concept mentioned", &fields(|arm| arm.mentions)),
        map("Net identification I − F, percentage points", &nets)
    )
}

fn net_field(net: &Difference) -> Field {
    Field { value: net.value, text: signed(net.value), note: points(net.interval), class: "" }
}

pub(super) fn detection(tables: &Tables) -> String {
    let parts: String = tables
        .replies
        .iter()
        .filter(|table| !table.contrasts.is_empty())
        .map(|table| {
            let by_cell = |row: &&Contrast| matches!(row.scope, Scope::Cell(_));
            let (cells, others): (Vec<_>, Vec<_>) = table.contrasts.iter().partition(by_cell);
            subtitle(&table.part, &table.prompt, table.mode)
                + &crate::report::svg::scatter(&cells)
                + &contrasts("All cells, and by dose", &others)
                + &details("Every cell", &contrasts("By cell", &cells))
        })
        .collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "H and F are claims, I is identification. Concept and random trials of the same \
                 word, cell and seed are pairs; differences are in percentage points, with N where \
                 the interval is Newcombe's and B where it is from resampled words. One cell in \
                 twenty has an interval without 0 by chance alone.";
    paragraph(intro) + &parts
}

fn contrasts(caption: &str, rows: &[&Contrast]) -> String {
    let mut out = Table::new(
        caption,
        &[
            "cells",
            "H concept",
            "F random",
            "F clean",
            "I",
            "H − F random",
            "McNemar p",
            "H − F clean",
            "I − F",
            "d′",
            "criterion",
        ],
    );
    let net = |net: &Option<Difference>| {
        net.as_ref().map_or("–".into(), |net| {
            let method = match net.method {
                Method::ClusterBootstrap => "B",
                Method::Newcombe => "N",
            };
            stacked(&signed(net.value), &format!("{} {method}", points(net.interval)))
        })
    };
    let share = |rate: Option<&Rate>| {
        rate.map_or("–".into(), |r| stacked(&percent(r.share), &percents(r.interval)))
    };
    for row in rows {
        let d_prime = row.detection.map(|d| stacked(&decimal(d.d_prime, 2), &decimals(d.interval)));
        out.row(
            "",
            &[
                scope(&row.scope),
                share(Some(&row.hits)),
                share(row.random.as_ref()),
                share(row.clean.as_ref()),
                share(Some(&row.identified)),
                net(&row.net_random),
                number(row.p),
                net(&row.net_clean),
                net(&row.net_identified),
                d_prime.unwrap_or("–".into()),
                row.detection.map_or("–".into(), |d| decimal(d.criterion, 2)),
            ],
        );
    }
    out.html()
}
