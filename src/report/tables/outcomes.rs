//! How often the replies of a prompt are successes, where no other table says so.

use std::collections::BTreeMap;

use super::{
    Entry, Group, Index, OutcomeRow, OutcomeTable, Scope, TextTable, clusters, concepts, scopes,
};
use crate::{
    experiment::{
        results::{Condition, Outcome},
        stats::{self, Arms, Pairs},
    },
    report::index::Kind,
};

/// One for each prompt that asks for a thought or a sentence and is in none of the tables of both.
pub(super) fn tables(index: &Index, texts: &[TextTable]) -> Vec<OutcomeTable> {
    let is_shown = |group: &Group| {
        texts.iter().any(|table| {
            table.part == group.part
                && (table.prompts.0 == group.prompt || table.prompts.1 == group.prompt)
        })
    };
    let wanted = |group: &&Group| group.outcome != Outcome::Intent && !is_shown(group);
    index.of_kind(Kind::Judged).filter(wanted).map(|group| table(index, group)).collect()
}

fn table(index: &Index, group: &Group) -> OutcomeTable {
    let concepts = concepts(group);
    let of = |condition, scope: Option<Scope>| -> Vec<Entry> {
        let inside = |e: &&Entry| {
            e.trial.condition == condition
                && scope.is_none_or(|scope| e.cell().is_some_and(|cell| scope.holds(cell)))
        };
        group.entries.iter().filter(inside).copied().collect()
    };
    let hit = |e: &Entry| group.succeeds(e.grade?);
    let mut rows = Vec::new();
    let mut comparisons = Vec::new();
    let mut add = |condition, scope: Option<Scope>| {
        let entries = of(condition, scope);
        let counts = clusters(&concepts, &entries, hit);
        let Some(success) = stats::rate(&counts) else { return };
        let random = of(Condition::Random, scope);
        comparisons.push(match condition {
            Condition::Concept => Arms {
                first: counts,
                second: clusters(&concepts, &random, hit),
                pairs: Some(pairs(&entries, &random, &hit)),
            },
            _ => Arms::default(),
        });
        let scope = scope.unwrap_or(Scope::All);
        rows.push(OutcomeRow { condition, scope, success, net: None });
    };
    add(Condition::Clean, None);
    for scope in scopes(group.cells()) {
        Condition::injected().for_each(|condition| add(condition, Some(scope)));
    }
    let seed = index.seed(&format!("outcomes {} {}", group.part, group.prompt));
    for (row, net) in rows.iter_mut().zip(stats::differences(&comparisons, seed)) {
        row.net = net;
    }
    OutcomeTable {
        part: group.part.into(),
        prompt: group.prompt.into(),
        outcome: group.outcome,
        mode: group.mode(),
        rows,
    }
}

/// Trials of the same word, repeat and cell.
fn pairs(first: &[Entry], second: &[Entry], hit: &dyn Fn(&Entry) -> Option<bool>) -> Pairs {
    let key = |e: &Entry| {
        let cell = e.cell().map(|cell| (cell.layer, cell.dose.to_bits()));
        (e.trial.concept.clone(), e.trial.repeat, cell)
    };
    let others: BTreeMap<_, _> = second.iter().filter_map(|e| Some((key(e), hit(e)?))).collect();
    let mut pairs = Pairs::default();
    for entry in first {
        if let (Some(own), Some(other)) = (hit(entry), others.get(&key(entry))) {
            pairs.add(own, *other);
        }
    }
    pairs
}
