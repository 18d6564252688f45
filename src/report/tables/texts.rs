//! Does the model keep an injected thought apart from the text that it reads?

use std::collections::BTreeMap;

use super::{
    Cell, Chosen, Entry, Group, Index, Scope, TextRow, TextTable, concepts, place, scopes,
};
use crate::experiment::{
    results::{Condition, Outcome},
    stats::{self, Arms, Count, Pairs},
};

/// One for each part that asks both for a thought and for the sentence; of several prompts the first.
pub(super) fn tables(index: &Index) -> Vec<TextTable> {
    let mut parts: BTreeMap<&str, [Option<&Group>; 2]> = BTreeMap::new();
    for group in &index.groups {
        let at = match group.outcome {
            Outcome::Choice => 0,
            Outcome::Repeat => 1,
            _ => continue,
        };
        parts.entry(group.part).or_default()[at].get_or_insert(group);
    }
    let both = parts.into_values().filter_map(|[thinks, repeats]| Some((thinks?, repeats?)));
    both.map(|(thinks, repeats)| table(index, thinks, repeats)).collect()
}

/// What makes two trials of different prompts one: word, repeat, condition and cell.
type Key<'a> = (&'a str, u32, Condition, Option<(usize, u64)>);

fn key<'a>(entry: &Entry<'a>) -> Key<'a> {
    let cell = entry.cell().map(|cell| (cell.layer, cell.dose.to_bits()));
    (&entry.trial.concept, entry.trial.repeat, entry.trial.condition, cell)
}

/// What a pair of trials came to.
#[derive(Clone, Copy)]
struct Both<'a> {
    entry: Entry<'a>,
    thinks: bool,
    repeats: bool,
}

fn table(index: &Index, thinks: &Group, repeats: &Group) -> TextTable {
    let said: BTreeMap<Key, bool> = repeats
        .entries
        .iter()
        .filter_map(|entry| Some((key(entry), repeats.succeeds(entry.grade?)?)))
        .collect();
    let both: Vec<Both> = thinks
        .entries
        .iter()
        .filter_map(|entry| {
            let repeats = *said.get(&key(entry))?;
            Some(Both { entry: *entry, thinks: thinks.succeeds(entry.grade?)?, repeats })
        })
        .collect();
    let concepts = concepts(thinks);
    let arm = |condition, scope: Option<Scope>| -> Vec<Both> {
        let inside = |both: &&Both| {
            both.entry.trial.condition == condition
                && scope.is_none_or(|scope| both.entry.cell().is_some_and(|c| scope.holds(c)))
        };
        both.iter().filter(inside).copied().collect()
    };
    let count = |arm: &[Both], hit: &dyn Fn(&Both) -> bool| {
        let mut counts = vec![Count::default(); concepts.len()];
        for both in arm {
            if let Some(at) = place(&concepts, &both.entry.trial.concept) {
                counts[at].add(hit(both));
            }
        }
        counts
    };
    let is_both = |both: &Both| both.thinks && both.repeats;
    let mut rows = Vec::new();
    let mut comparisons = Vec::new();
    let mut add = |condition, scope: Option<Scope>| {
        let of = arm(condition, scope);
        let rate = |hit: &dyn Fn(&Both) -> bool| stats::rate(&count(&of, hit));
        let (Some(thinks), Some(repeats), Some(success)) =
            (rate(&|b| b.thinks), rate(&|b| b.repeats), rate(&is_both))
        else {
            return;
        };
        let random = arm(Condition::Random, scope);
        let is_concept = condition == Condition::Concept;
        comparisons.push(Arms {
            first: if is_concept { count(&of, &is_both) } else { Vec::new() },
            second: if is_concept { count(&random, &is_both) } else { Vec::new() },
            pairs: Some(pairs(&of, &random)),
        });
        let scope = scope.unwrap_or(Scope::All);
        rows.push(TextRow { condition, scope, thinks, repeats, both: success, net: None });
    };
    add(Condition::Clean, None);
    for scope in scopes(thinks.cells()) {
        Condition::injected().for_each(|condition| add(condition, Some(scope)));
    }
    let seed = index.seed(&format!("texts {}", thinks.part));
    for (row, net) in rows.iter_mut().zip(stats::differences(&comparisons, seed)) {
        row.net = net;
    }
    let chosen = choose(&thinks.cells(), &|cell, half| {
        let scope = Some(Scope::Cell(cell));
        let of = arm(Condition::Concept, scope).into_iter();
        let of = of.filter(|both| half.is_none_or(|half| is_in(index, &both.entry, half)));
        let mut count = Count::default();
        of.for_each(|both| count.add(is_both(&both)));
        count.share().map(|share| (share, count))
    });
    TextTable {
        part: thinks.part.into(),
        prompts: (thinks.prompt.into(), repeats.prompt.into()),
        mode: thinks.mode(),
        rows,
        chosen: chosen.map(|(cell, held_out, all)| Chosen { cell, held_out, all }),
    }
}

/// Trials of the same word, repeat and cell under concept and random vectors.
fn pairs(concept: &[Both], random: &[Both]) -> Pairs {
    let key = |both: &Both| {
        let (word, repeat, _, cell) = key(&both.entry);
        (word.to_owned(), repeat, cell)
    };
    let others: BTreeMap<_, _> =
        random.iter().map(|both| (key(both), both.thinks && both.repeats)).collect();
    let mut pairs = Pairs::default();
    for both in concept {
        if let Some(other) = others.get(&key(both)) {
            pairs.add(both.thinks && both.repeats, *other);
        }
    }
    pairs
}

/// Whether a trial's word stands at an even (0) or odd (1) place of the run's list.
pub(super) fn is_in(index: &Index, entry: &Entry, half: usize) -> bool {
    index.word(&entry.trial.concept).is_some_and(|place| place % 2 == half)
}

/// The cell with the best score on the words at even places (of equals the smallest dose, then the lowest
/// layer), with what it comes to on the others and on all. `score` of a cell and half: a number to be
/// compared by, and what is reported.
pub(super) fn choose<T>(
    cells: &[Cell],
    score: &dyn Fn(Cell, Option<usize>) -> Option<(f64, T)>,
) -> Option<(Cell, T, T)> {
    let scored = cells.iter().filter_map(|cell| Some((*cell, score(*cell, Some(0))?.0)));
    let best = scored.max_by(|(a, x), (b, y)| {
        x.total_cmp(y).then(b.dose.total_cmp(&a.dose)).then(b.layer.cmp(&a.layer))
    });
    let (cell, _) = best?;
    Some((cell, score(cell, Some(1))?.1, score(cell, None)?.1))
}
