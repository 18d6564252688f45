//! Does the model own a word that was put in its mouth, and does an injected thought make it do so?

use super::{
    Cell, Entry, Group, Index, IntentRow, IntentScore, IntentTable, Scope, Score, clusters,
    concepts, scopes,
    texts::{choose, is_in},
};
use crate::{
    experiment::{
        results::{Condition, Criterion, Outcome},
        stats::{self, Count},
    },
    report::index::Kind,
};

pub(super) fn tables(index: &Index) -> Vec<IntentTable> {
    let groups = index.of_kind(Kind::Judged).filter(|group| group.outcome == Outcome::Intent);
    groups.map(|group| table(index, group)).collect()
}

fn table(index: &Index, group: &Group) -> IntentTable {
    let guards: Vec<&Group> =
        index.groups.iter().filter(|group| group.outcome == Outcome::Repeat).collect();
    let concepts = concepts(group);
    let of = |condition, scope: Option<Scope>| -> Vec<Entry> {
        let inside = |e: &&Entry| {
            e.trial.condition == condition
                && scope.is_none_or(|scope| e.cell().is_some_and(|cell| scope.holds(cell)))
        };
        group.entries.iter().filter(inside).copied().collect()
    };
    // The guard's cells are those of another part: its depth may be named otherwise.
    let guard = |condition, scope: Option<Scope>| {
        let same = |cell: Cell| match scope {
            Some(Scope::Cell(own)) => (own.layer, own.dose) == (cell.layer, cell.dose),
            Some(other) => other.holds(cell),
            None => true,
        };
        let entries = guards.iter().flat_map(|g| g.entries.iter().map(move |e| (g, e)));
        let mut count = Count::default();
        for (guard, entry) in entries {
            let inside = match scope {
                None => true,
                Some(_) => entry.cell().is_some_and(same),
            };
            let hit = entry.grade.and_then(|grade| guard.succeeds(grade));
            if let Some(hit) = hit.filter(|_| entry.trial.condition == condition && inside) {
                count.add(hit);
            }
        }
        (count.n > 0).then_some(count)
    };
    let mut rows = Vec::new();
    let mut add = |condition, scope: Option<Scope>| {
        let entries = of(condition, scope);
        let rate =
            |hit: &dyn Fn(&Entry) -> Option<bool>| stats::rate(&clusters(&concepts, &entries, hit));
        let disowns = |e: &Entry| e.grade?.yes(Criterion::Disowns);
        let (Some(intends), Some(disowns), Some(apologises), Some(neither)) = (
            rate(&|e| intends(e)),
            rate(&disowns),
            rate(&|e| intends(e).map(|yes| !yes)),
            rate(&|e| Some(!intends(e)? && !disowns(e)?)),
        ) else {
            return;
        };
        let guard = guard(condition, scope);
        let scope = scope.unwrap_or(Scope::All);
        rows.push(IntentRow { condition, scope, intends, disowns, apologises, neither, guard });
    };
    add(Condition::Clean, None);
    for scope in scopes(group.cells()) {
        Condition::injected().for_each(|condition| add(condition, Some(scope)));
    }
    let seed = index.seed(&format!("intents {} {}", group.part, group.prompt));
    let score = |cell: Cell, half: Option<usize>| {
        let is_wanted = |e: &Entry| half.is_none_or(|half| is_in(index, e, half));
        let arm = |condition, scope| {
            let entries: Vec<Entry> = of(condition, scope).into_iter().filter(is_wanted).collect();
            clusters(&concepts, &entries, |e| intends(e).map(|yes| !yes))
        };
        let here = Some(Scope::Cell(cell));
        let arms = [
            arm(Condition::Clean, None),
            arm(Condition::Other, here),
            arm(Condition::Concept, here),
        ];
        // Only words of this half, so that each resample has as many of them.
        let words: Vec<usize> = (0..concepts.len()).filter(|at| arms[2][*at].n > 0).collect();
        let value = |weights: &[u32]| {
            let share = |arm: &[Count]| {
                let weighted = words.iter().zip(weights).map(|(at, weight)| {
                    let weight = u64::from(*weight);
                    Count { k: arm[*at].k * weight, n: arm[*at].n * weight }
                });
                weighted.sum::<Count>().share()
            };
            let [none, other, own] = [&arms[0], &arms[1], &arms[2]].map(|arm| share(arm));
            Some(none?.min(other?) - own?)
        };
        let of_all = value(&vec![1; words.len()])?;
        let interval = stats::bootstrap(words.len(), 1, seed, |weights| vec![value(weights)])[0];
        Some((of_all, Score { value: of_all, interval, words: words.len() }))
    };
    let chosen = choose(&group.cells(), &score);
    IntentTable {
        part: group.part.into(),
        prompt: group.prompt.into(),
        mode: group.mode(),
        rows,
        score: chosen.map(|(cell, held_out, all)| IntentScore { cell, held_out, all }),
    }
}

fn intends(entry: &Entry) -> Option<bool> {
    entry.grade?.yes(Criterion::Intends)
}
