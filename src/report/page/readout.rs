//! The readout: heat maps, the words at the chosen cell, and the yes/no margins.

use super::{
    heat::{Field, map},
    subtitle,
};
use crate::{
    experiment::{results::Condition, stats::Rate},
    report::{
        format::{count, decimal, decimals, percent},
        headline::Headline,
        html::{escape, paragraph},
        index::{Index, Kind},
        tables::{Cell, MarginCell, ReadTable, Tables},
    },
};

/// Yes and no with less probability than this together are no answer.
const LITTLE_MASS: f64 = 0.05;

pub(super) fn html(index: &Index, tables: &Tables, headline: &Headline) -> String {
    let chosen = headline.read.as_ref().map(|read| read.cell);
    let tables = tables.reads.iter().filter(|table| table.words > 0);
    let parts: String = tables
        .enumerate()
        .map(|(at, table)| {
            let chosen = chosen.filter(|_| at == 0);
            let maps = maps(table, chosen);
            let words = chosen.map_or(String::new(), |cell| words(index, table, cell));
            subtitle(&table.part, &table.prompt, table.mode) + &maps + &words
        })
        .collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "Nothing is sampled here: of all the words' first tokens, is the injected concept's \
                 the one whose logit rose most against the clean prompt's? The outlined cell was \
                 chosen on every other word of the list.";
    paragraph(intro) + &parts
}

fn maps(table: &ReadTable, chosen: Option<Cell>) -> String {
    let fields = |pick: &dyn Fn(usize) -> Option<Rate>| -> Vec<_> {
        let field = |(at, cell): (usize, Cell)| {
            let field = pick(at).map(|rate| Field {
                value: rate.share,
                text: percent(rate.share),
                note: count(rate.count),
                class: if chosen == Some(cell) { "chosen" } else { "" },
            });
            (cell, field)
        };
        table.cells.iter().map(|row| row.cell).enumerate().map(field).collect()
    };
    let chance = percent(1.0 / table.words.max(1) as f64);
    let largest = table.cells.iter().filter_map(|row| row.kl.0).fold(0.0, f64::max);
    let kl = table.cells.iter().map(|row| {
        let field = row.kl.0.map(|kl| Field {
            value: if largest > 0.0 { kl / largest } else { 0.0 },
            text: decimal(kl, 2),
            note: format!("random {}", row.kl.1.map_or("–".into(), |kl| decimal(kl, 2))),
            class: "",
        });
        (row.cell, field)
    });
    format!(
        "<div class=\"maps\">{}{}{}</div>\n",
        map("Concept read first, concept vectors", &fields(&|at| table.cells[at].concept)),
        map(
            &format!("The same, random vectors (chance {chance})"),
            &fields(&|at| table.cells[at].random)
        ),
        map("How far the next token moved: KL from clean, nats", &kl.collect::<Vec<_>>())
    )
}

/// What each word's trial reads as, at one cell.
fn words(index: &Index, table: &ReadTable, cell: Cell) -> String {
    let groups = index.of_kind(Kind::Readout);
    let entries = groups
        .filter(|g| (g.part, g.prompt) == (table.part.as_str(), table.prompt.as_str()))
        .flat_map(|group| &group.entries)
        .filter(|e| e.trial.condition == Condition::Concept && e.cell() == Some(cell));
    let items: String = entries
        .filter_map(|e| Some((e.trial, e.trial.read.as_ref()?)))
        .map(|(trial, read)| {
            let concept = escape(&trial.concept);
            if read.rank == 1 {
                format!("<li class=\"yes\">✓ {concept}</li>\n")
            } else {
                format!("<li>{concept} → {} (its rank {})</li>\n", escape(&read.word), read.rank)
            }
        })
        .collect();
    let depth = cell.depth;
    let caption =
        format!("What each word's vector reads as at depth {depth:.2}, dose {}:", cell.dose);
    paragraph(&caption) + &format!("<ul class=\"words\">\n{items}</ul>\n")
}

pub(super) fn margins(tables: &Tables) -> String {
    let parts: String = tables
        .reads
        .iter()
        .filter(|table| table.cells.iter().any(|row| row.margin.is_some()))
        .map(|table| {
            let all = table.sensitivity.map_or(String::new(), |share| {
                paragraph(&format!(
                    "All cells together: with one false alarm in a hundred random vectors, {} of the \
                     concept trials are found.",
                    percent(share)
                ))
            });
            subtitle(&table.part, &table.prompt, table.mode) + &all + &margin_maps(table)
        })
        .collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "At the first token of the answer: margin = log-probability of yes minus that of \
                 no. AUROC is how often a concept's vector has a higher margin than a random one \
                 (0.5: they can't be told apart). Hatched: yes and no together have less than 5% of \
                 the probability.";
    paragraph(intro) + &parts
}

fn margin_maps(table: &ReadTable) -> String {
    let fields = |field: &dyn Fn(&MarginCell) -> Field| -> Vec<_> {
        table.cells.iter().map(|row| (row.cell, row.margin.as_ref().map(field))).collect()
    };
    let class = |margin: &MarginCell| if margin.mass < LITTLE_MASS { "grey" } else { "" };
    let auroc = fields(&|margin| Field {
        value: 2.0 * margin.auroc - 1.0,
        text: decimal(margin.auroc, 2),
        note: margin.interval.map_or_else(|| "no interval".into(), decimals),
        class: class(margin),
    });
    let mass = fields(&|margin| Field {
        value: margin.mass,
        text: percent(margin.mass),
        note: format!("{} | {}", decimal(margin.medians.0, 1), decimal(margin.medians.1, 1)),
        class: class(margin),
    });
    format!(
        "<div class=\"maps\">{}{}</div>\n",
        map("AUROC, concept against random", &auroc),
        map("Probability of yes and no; median margins, concept | random", &mass)
    )
}
