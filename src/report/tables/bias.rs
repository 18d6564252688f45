//! Whether vectors push "yes" up whatever is asked.

use std::collections::{BTreeMap, HashMap};

use super::{
    BiasRow, BiasTable, Entry, Group, Index, Push, Scope, clusters, concepts, mean, place, scopes,
};
use crate::experiment::{
    results::Condition,
    stats::{self, Count},
};

pub(super) fn tables(index: &Index) -> Vec<BiasTable> {
    let mut parts: BTreeMap<&str, Vec<&Group>> = BTreeMap::new();
    for group in &index.groups {
        if group.entries.iter().any(|entry| entry.trial.first.is_some()) {
            parts.entry(group.part).or_default().push(group);
        }
    }
    let margins: HashMap<&str, f64> = index
        .entries
        .iter()
        .filter_map(|e| Some((e.trial.id.as_str(), e.trial.first.as_ref()?.margin)))
        .collect();
    parts.into_iter().filter_map(|(part, groups)| table(index, part, &groups, &margins)).collect()
}

fn table(
    index: &Index,
    part: &str,
    groups: &[&Group],
    margins: &HashMap<&str, f64>,
) -> Option<BiasTable> {
    let with = |answer: Option<&str>| -> Vec<&Group> {
        groups.iter().copied().filter(|group| index.answer(group.prompt) == answer).collect()
    };
    let (asked, unrelated) = (with(None), with(Some("no")));
    let any = asked.first().filter(|_| !unrelated.is_empty())?;
    let names = |groups: &[&Group]| groups.iter().map(|group| group.prompt.to_owned()).collect();
    let clean = |groups: &[&Group]| {
        let entries = groups.iter().flat_map(|group| &group.entries);
        count(entries.filter(|e| e.trial.condition == Condition::Clean).filter_map(says_yes))
    };
    let right = ["yes", "no"].map(|answer| {
        let said = clean(&with(Some(answer)));
        Count { k: if answer == "yes" { said.k } else { said.n - said.k }, ..said }
    });
    let concepts = concepts(any);
    let mut rows = Vec::new();
    for scope in scopes(any.cells()) {
        for condition in Condition::injected() {
            let arm = |groups| Arm::new(groups, (condition, scope), &concepts, margins);
            if let (Some(asked), Some(unrelated)) = (arm(&asked), arm(&unrelated)) {
                rows.push((condition, scope, asked, unrelated));
            }
        }
    }
    let seed = index.seed(&format!("bias {part}"));
    let intervals = stats::bootstrap(concepts.len(), rows.len(), seed, |weights| {
        rows.iter().map(|row| Some(row.2.shift(weights)? - row.3.shift(weights)?)).collect()
    });
    let rows = rows.iter().zip(intervals);
    let rows = rows.filter_map(|((condition, scope, asked, unrelated), interval)| {
        let (asked, unrelated) = (asked.push()?, unrelated.push()?);
        let net_shift = asked.shift - unrelated.shift;
        Some(BiasRow {
            condition: *condition,
            scope: *scope,
            asked,
            unrelated,
            net_shift,
            interval,
        })
    });
    Some(BiasTable {
        part: part.into(),
        mode: any.mode(),
        asked: names(&asked),
        unrelated: names(&unrelated),
        right: right.into_iter().sum(),
        clean: (clean(&asked), clean(&unrelated)),
        rows: rows.collect(),
    })
}

fn says_yes(entry: &Entry) -> Option<bool> {
    Some(entry.trial.first.as_ref()?.margin > 0.0)
}

fn count(answers: impl Iterator<Item = bool>) -> Count {
    let mut count = Count::default();
    answers.for_each(|yes| count.add(yes));
    count
}

/// Trials of one condition and scope, by concept.
struct Arm {
    yes: Vec<Count>,
    /// Sum and number of the margins' shifts.
    shifts: Vec<(f64, u32)>,
    mass: f64,
}

impl Arm {
    /// `None` without trials whose clean partner is known.
    fn new(
        groups: &[&Group],
        (condition, scope): (Condition, Scope),
        concepts: &[&str],
        margins: &HashMap<&str, f64>,
    ) -> Option<Self> {
        let clean = |e: &Entry| Some(*margins.get(e.trial.clean.as_deref()?)?);
        let inside = |e: &&Entry| {
            e.trial.condition == condition
                && e.cell().is_some_and(|cell| scope.holds(cell))
                && clean(e).is_some()
        };
        let entries = groups.iter().flat_map(|group| &group.entries).filter(inside);
        let entries: Vec<Entry> = entries.copied().collect();
        let mut shifts = vec![(0.0, 0); concepts.len()];
        for entry in &entries {
            if let (Some(first), Some(clean), Some(at)) =
                (&entry.trial.first, clean(entry), place(concepts, &entry.trial.concept))
            {
                shifts[at].0 += first.margin - clean;
                shifts[at].1 += 1;
            }
        }
        Some(Self {
            yes: clusters(concepts, &entries, says_yes),
            shifts,
            mass: mean(entries.iter().filter_map(|e| Some(e.trial.first.as_ref()?.mass)))?,
        })
    }

    /// The mean shift, each concept as often as its weight.
    fn shift(&self, weights: &[u32]) -> Option<f64> {
        let of = self.shifts.iter().zip(weights).map(|((sum, n), weight)| {
            (sum * f64::from(*weight), f64::from(*n) * f64::from(*weight))
        });
        let (sum, n) = of.fold((0.0, 0.0), |(a, b), (sum, n)| (a + sum, b + n));
        (n > 0.0).then(|| sum / n)
    }

    fn push(&self) -> Option<Push> {
        let shift = self.shift(&vec![1; self.shifts.len()])?;
        Some(Push { yes: stats::rate(&self.yes)?, shift, mass: self.mass })
    }
}
