//! What the replies say.

use std::collections::BTreeMap;

use super::{
    Contrast, Entry, Group, Index, ReplyArm, ReplyTable, Scope, clusters, concepts, scopes,
};
use crate::experiment::{
    results::{Condition, Criterion, Grade},
    stats::{self, Arms, Count, Pairs},
};

pub(super) fn table(group: &Group, index: &Index) -> ReplyTable {
    let concepts = concepts(group);
    let of = |condition, scope: Option<Scope>| -> Vec<Entry> {
        let inside = |e: &&Entry| match scope {
            Some(scope) => e.cell().is_some_and(|cell| scope.holds(cell)),
            None => true,
        };
        let graded = |e: &&Entry| e.trial.condition == condition && e.grade.is_some();
        group.entries.iter().filter(graded).filter(inside).copied().collect()
    };
    let clean = of(Condition::Clean, None);
    let mut arms = Vec::new();
    arms.extend(reply_arm(group, Condition::Clean, Scope::All, &concepts, &clean));
    let mut rows = Vec::new();
    for scope in scopes(group.cells()) {
        let concept = of(Condition::Concept, Some(scope));
        let random = of(Condition::Random, Some(scope));
        for condition in Condition::injected() {
            let entries = of(condition, Some(scope));
            arms.extend(reply_arm(group, condition, scope, &concepts, &entries));
        }
        rows.push(ContrastArms::new(group, scope, &concepts, &concept, &random, &clean));
    }
    let seed = index.seed(&format!("replies {} {}", group.part, group.prompt));
    let (chance, chance_words) = chance(group, index, &clean);
    ReplyTable {
        part: group.part.into(),
        prompt: group.prompt.into(),
        mode: group.mode(),
        arms,
        contrasts: contrasts(&rows, seed),
        chance,
        chance_words,
    }
}

fn claims(entry: &Entry) -> Option<bool> {
    entry.grade?.yes(Criterion::Claims)
}

fn reply_arm(
    group: &Group,
    condition: Condition,
    scope: Scope,
    concepts: &[&str],
    entries: &[Entry],
) -> Option<ReplyArm> {
    let claims = |g: &Grade| g.yes(Criterion::Claims);
    let rate = |hit: &dyn Fn(&Grade) -> Option<bool>| {
        stats::rate(&clusters(concepts, entries, |e| e.grade.and_then(hit)))
    };
    Some(ReplyArm {
        condition,
        scope,
        coherent: rate(&|g| g.yes(Criterion::Coherent))?,
        claims: rate(&claims)?,
        claims_if_coherent: rate(&|g| {
            g.yes(Criterion::Coherent).filter(|coherent| *coherent).and_then(|_| claims(g))
        }),
        mentions: rate(&|g| g.yes(Criterion::Mentions))?,
        identified: rate(&|g| group.succeeds(g))?,
    })
}

/// How often clean replies mention the words that other trials inject.
fn chance(group: &Group, index: &Index, clean: &[Entry]) -> (Count, Vec<(String, Count)>) {
    let injected = group.entries.iter().filter(|e| e.trial.condition == Condition::Concept);
    let mut words: Vec<_> = injected.map(|e| e.trial.concept.as_str()).collect();
    words.sort_unstable();
    words.dedup();
    words.sort_by_key(|word| index.word(word));
    let of = |word: &str| {
        let mut count = Count::default();
        for grade in clean.iter().filter_map(|e| e.grade) {
            count.add(grade.mentioned.iter().any(|mentioned| mentioned == word));
        }
        (word.to_owned(), count)
    };
    let counts: Vec<_> = words.into_iter().map(of).collect();
    let total = counts.iter().map(|(_, count)| *count).sum();
    (total, counts.into_iter().filter(|(_, count)| count.k > 0).collect())
}

/// The counts a [`Contrast`] is made from, by concept.
struct ContrastArms {
    scope: Scope,
    hits: Vec<Count>,
    random: Vec<Count>,
    clean: Vec<Count>,
    identified: Vec<Count>,
    claimed: Pairs,
    named: Pairs,
}

impl ContrastArms {
    fn new(
        group: &Group,
        scope: Scope,
        concepts: &[&str],
        concept: &[Entry],
        random: &[Entry],
        clean: &[Entry],
    ) -> Self {
        let count =
            |arm: &[Entry], hit: &dyn Fn(&Entry) -> Option<bool>| clusters(concepts, arm, hit);
        let name = |e: &Entry| group.succeeds(e.grade?);
        let key = |e: &Entry<'_>| {
            let cell = e.cell().map(|c| (c.layer, c.depth.to_bits(), c.dose.to_bits()));
            (e.trial.concept.clone(), e.trial.repeat, cell)
        };
        let partners: BTreeMap<_, _> = random.iter().map(|e| (key(e), e)).collect();
        let (mut claimed, mut named) = (Pairs::default(), Pairs::default());
        for entry in concept {
            let alarm = partners.get(&key(entry)).and_then(|e| claims(e));
            if let (Some(hit), Some(name), Some(alarm)) = (claims(entry), name(entry), alarm) {
                claimed.add(hit, alarm);
                named.add(name, alarm);
            }
        }
        Self {
            scope,
            hits: count(concept, &claims),
            random: count(random, &claims),
            clean: count(clean, &claims),
            identified: count(concept, &name),
            claimed,
            named,
        }
    }

    /// H − F(random), H − F(clean), I − F, F(random) − F(clean).
    fn comparisons(&self) -> [Arms; 4] {
        let has_random = self.random.iter().any(|c| c.n > 0);
        let (alarms, pairs) =
            if has_random { (&self.random, Some(self.named)) } else { (&self.clean, None) };
        let arms = |first: &[Count], second: &[Count], pairs| Arms {
            first: first.to_vec(),
            second: second.to_vec(),
            pairs,
        };
        [
            arms(&self.hits, &self.random, Some(self.claimed)),
            arms(&self.hits, &self.clean, None),
            arms(&self.identified, alarms, pairs),
            arms(&self.random, &self.clean, None),
        ]
    }
}

fn contrasts(rows: &[ContrastArms], seed: u64) -> Vec<Contrast> {
    let comparisons: Vec<_> = rows.iter().flat_map(ContrastArms::comparisons).collect();
    let differences = stats::differences(&comparisons, seed);
    let rows = rows.iter().zip(differences.chunks_exact(4)).filter_map(|(row, nets)| {
        let (hits, random) = (stats::rate(&row.hits)?, stats::rate(&row.random));
        Some(Contrast {
            scope: row.scope,
            hits,
            random,
            clean: stats::rate(&row.clean),
            identified: stats::rate(&row.identified)?,
            net_random: nets[0],
            net_clean: nets[1],
            net_identified: nets[2],
            pushed: nets[3],
            p: random.map(|_| row.claimed.mcnemar()),
            detection: random.and_then(|alarms| stats::detection(&hits, &alarms)),
        })
    });
    rows.collect()
}
