//! The other experiments in sentences.

use crate::{
    experiment::{
        results::Condition,
        stats::{Rate, smallest_effect},
    },
    report::{
        format::{decimal, depth, percent, points, rate, signed},
        tables::{IntentTable, OutcomeTable, ProbePoint, ProbeTable, Scope, Tables, TextTable},
    },
};

pub(super) fn sentences(tables: &Tables) -> Vec<String> {
    let mut all = Vec::new();
    tables.outcomes.iter().for_each(|table| outcome(table, &mut all));
    tables.texts.iter().for_each(|table| texts(table, &mut all));
    tables.intents.iter().for_each(|table| intents(table, &mut all));
    tables.probes.iter().for_each(|table| probes(table, &mut all));
    all
}

fn outcome(table: &OutcomeTable, all: &mut Vec<String>) {
    let of = |condition| {
        table.rows.iter().find(|row| (row.condition, row.scope) == (condition, Scope::All))
    };
    let Some(concept) = of(Condition::Concept) else { return };
    let others = [("random vectors", Condition::Random), ("clean", Condition::Clean)];
    let others = others.into_iter().filter_map(|(name, condition)| {
        Some(format!("{name} {}", percent(of(condition)?.success.share)))
    });
    let net = concept.net.map_or(String::new(), |net| {
        format!(
            "; less random, in percentage points, {} {}",
            signed(net.value),
            points(net.interval)
        )
    });
    all.push(format!(
        "Replies to {} succeed in {} under concept vectors ({}){net}.{}",
        table.prompt,
        rate(&concept.success),
        others.collect::<Vec<_>>().join(", "),
        smallest(&concept.success, of(Condition::Random).map(|row| &row.success))
    ));
}

/// What a comparison with random vectors could have seen.
fn smallest(own: &Rate, random: Option<&Rate>) -> String {
    let effect =
        random.and_then(|random| smallest_effect(random.share, own.effective, random.effective));
    effect.map_or(String::new(), |effect| {
        format!(
            " The smallest difference from random vectors that it could have seen is {} percentage points.",
            signed(effect)
        )
    })
}

fn texts(table: &TextTable, all: &mut Vec<String>) {
    let of = |condition| {
        table.rows.iter().find(|row| (row.condition, row.scope) == (condition, Scope::All))
    };
    let Some(concept) = of(Condition::Concept) else { return };
    let clean = |pick: fn(&crate::report::TextRow) -> Rate| {
        of(Condition::Clean)
            .map_or(String::new(), |row| format!(" (clean: {})", percent(pick(row).share)))
    };
    all.push(format!(
        "With the thought injected over a line of text, the model thinks of it in {}{} and repeats the line \
         in {}{}, over all cells.{}",
        rate(&concept.thinks),
        clean(|row| row.thinks),
        rate(&concept.repeats),
        clean(|row| row.repeats),
        smallest(&concept.both, of(Condition::Random).map(|row| &row.both))
    ));
    let Some(chosen) = table.chosen else { return };
    let random = table
        .rows
        .iter()
        .find(|row| (row.condition, row.scope) == (Condition::Random, Scope::Cell(chosen.cell)));
    let random = random.map_or(String::new(), |row| {
        format!("; with random vectors {} of {}", row.both.count.k, row.both.count.n)
    });
    all.push(format!(
        "It does both in {} of {} held-out pairs at depth {}, dose {}, the cell that is best on the other \
         pairs{random}.",
        chosen.held_out.k,
        chosen.held_out.n,
        depth(&chosen.cell),
        chosen.cell.dose
    ));
}

fn intents(table: &IntentTable, all: &mut Vec<String>) {
    let of = |condition| {
        table.rows.iter().find(|row| (row.condition, row.scope) == (condition, Scope::All))
    };
    let Some(concept) = of(Condition::Concept) else { return };
    let named = [
        ("without a vector", Condition::Clean),
        ("with another word's", Condition::Other),
        ("with the same vector on the question", Condition::After),
    ];
    let others: Vec<String> = named
        .into_iter()
        .filter_map(|(name, condition)| {
            Some(format!("{} {name}", percent(of(condition)?.apologises.share)))
        })
        .collect();
    all.push(format!(
        "For a word that was put in its mouth the model apologises in {} of the trials with the word's own \
         vector before it ({}).",
        rate(&concept.apologises),
        others.join(", ")
    ));
    if let Some(score) = table.score {
        all.push(format!(
            "At the cell chosen on one half of the words (depth {}, dose {}) the score is {} points on the \
             other half's {} words: apologies without the word's vector or with another's, whichever are fewer, less \
             those with its own.",
            depth(&score.cell),
            score.cell.dose,
            signed(score.held_out.value)
                + &score.held_out.interval.map_or(String::new(), |i| format!(" {}", points(i))),
            score.held_out.words
        ));
    }
    let guard = concept.guard.and_then(crate::experiment::stats::Count::share);
    if let Some(share) = guard.filter(|share| *share < 0.5) {
        all.push(format!(
            "Only {} of the lines are repeated under the same injections: this model reads too badly, or \
             is too disturbed, for its answers to mean much.",
            percent(share)
        ));
    }
}

fn probes(table: &ProbeTable, all: &mut Vec<String>) {
    let shown = |point: &ProbePoint| {
        let interval = point
            .interval
            .map_or(String::new(), |i| format!(" [{}, {}]", decimal(i.low, 4), decimal(i.high, 4)));
        format!("{}{interval}", decimal(point.mean, 4))
    };
    for (at, contrast) in table.contrasts.iter().enumerate() {
        let (first, second) = (&contrast.first, &contrast.second);
        if at == 0 {
            let says = match contrast.overall.interval {
                Some(interval) if interval.low > 0.0 => "more where it is told to than where not",
                Some(_) => "no more where it is told to than where not",
                None => "too few words to say",
            };
            all.push(format!(
                "While the line is written, the stream's cosine with the word's vector differs by {} between \
                 {first} and {second}, mean over all layers: {says}.",
                shown(&contrast.overall)
            ));
        } else {
            all.push(format!("{first} less {second}: {}.", shown(&contrast.overall)));
        }
    }
}
