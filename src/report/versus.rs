//! Two runs side by side: what both have, with the differences of their rates.

use serde::Serialize;

use super::{
    format::{cells, condition, percent, points, signed},
    tables::{Scope, Tables},
};
use crate::experiment::{
    results::Condition,
    stats::{Interval, Rate, difference},
};

/// A rate in both runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Versus {
    /// The table.
    pub table: String,
    /// What was injected.
    pub condition: Condition,
    /// Which cells.
    pub scope: Scope,
    /// What is counted.
    pub what: &'static str,
    /// In the first run.
    pub first: Rate,
    /// In the second.
    pub second: Rate,
    /// Second minus first.
    pub value: f64,
    /// Newcombe's, for unpaired rates with effective numbers of trials.
    pub interval: Interval,
}

/// A rate of one run: table, condition, cells, name.
type Key = (String, Condition, Scope, &'static str);

fn rates(tables: &Tables) -> Vec<(Key, Rate)> {
    let mut all = Vec::new();
    for table in &tables.reads {
        let name = format!("readout {}/{}", table.part, table.prompt);
        for cell in &table.cells {
            let scope = Scope::Cell(cell.cell);
            let arms = [(Condition::Concept, cell.concept), (Condition::Random, cell.random)];
            let arms = arms.into_iter().filter_map(|(condition, rate)| Some((condition, rate?)));
            all.extend(arms.map(|(of, rate)| ((name.clone(), of, scope, "read first"), rate)));
        }
    }
    for table in &tables.replies {
        let name = format!("replies {}/{}", table.part, table.prompt);
        for arm in &table.arms {
            let rates = [
                ("coherent", arm.coherent),
                ("claims", arm.claims),
                ("mentions", arm.mentions),
                ("success", arm.identified),
            ];
            let key = |what| (name.clone(), arm.condition, arm.scope, what);
            all.extend(rates.map(|(what, rate)| (key(what), rate)));
        }
    }
    for table in &tables.outcomes {
        let name = format!("outcomes {}/{}", table.part, table.prompt);
        for row in &table.rows {
            all.push(((name.clone(), row.condition, row.scope, "success"), row.success));
        }
    }
    for table in &tables.texts {
        for row in &table.rows {
            let rates = [("thinks", row.thinks), ("repeats", row.repeats), ("both", row.both)];
            let key = |what| (format!("texts {}", table.part), row.condition, row.scope, what);
            all.extend(rates.map(|(what, rate)| (key(what), rate)));
        }
    }
    for table in &tables.intents {
        let name = format!("intents {}/{}", table.part, table.prompt);
        for row in &table.rows {
            let key = (name.clone(), row.condition, row.scope, "apologises");
            all.push((key, row.apologises));
        }
    }
    all
}

/// What both runs have.
pub(super) fn versus(first: &Tables, second: &Tables) -> Vec<Versus> {
    let others = rates(second);
    let rows = rates(first).into_iter().filter_map(|(key, first)| {
        let second = others.iter().find(|(other, _)| *other == key)?.1;
        let (value, interval) = difference(&second, &first);
        let (table, condition, scope, what) = key;
        Some(Versus { table, condition, scope, what, first, second, value, interval })
    });
    rows.collect()
}

/// For a terminal: head and rows, the single cells left out.
pub(super) fn rows(all: &[Versus]) -> Vec<Vec<String>> {
    let head = ["table", "condition", "cells", "what", "first", "second", "difference, points"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for row in all.iter().filter(|row| !matches!(row.scope, Scope::Cell(_))) {
        rows.push(vec![
            row.table.clone(),
            condition(row.condition).into(),
            cells(row.condition, &row.scope),
            row.what.into(),
            percent(row.first.share),
            percent(row.second.share),
            format!("{} {}", signed(row.value), points(row.interval)),
        ]);
    }
    rows
}
