//! The run's result in a few sentences, computed only from stored trials and grades.

mod others;
mod words;

use serde::Serialize;

use super::{
    format::unit,
    index::{Entry, Index, Kind},
    tables::{Cell, Contrast, MarginCell, Progress, ReadTable, ReplyTable, Scope, Tables},
};
use crate::experiment::{
    results::Condition,
    stats::{Count, Difference, Rate, smallest_effect},
};

/// What the run says, in numbers and in words (displayed: one paragraph).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Headline {
    /// How far the run is.
    pub progress: Progress,
    /// What the logits show; of the first readout that has both halves of its words.
    pub read: Option<ReadHeadline>,
    /// What the replies show; of the part `sampled`, or else the first sampled part.
    pub replies: Option<ReplyHeadline>,
    /// What the other experiments show, in sentences.
    pub others: Vec<String>,
    /// What follows.
    pub meaning: Meaning,
}

/// For how many words the injected concept can be read out of the logits.
///
/// The cell is chosen on the words at even places of the run's list (the most words read; of equal
/// cells the smallest dose, then the lowest layer) and reported on those at odd places.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReadHeadline {
    /// The chosen cell.
    pub cell: Cell,
    /// At that cell, the words that did not choose it.
    pub held_out: Count,
    /// At that cell, all words.
    pub all: Count,
    /// At that cell, under random vectors.
    pub random: Count,
    /// How many words were compared: chance is one in so many.
    pub words: usize,
    /// The grid's best, chosen and reported on the same words.
    pub best: (Cell, Count),
    /// At the chosen cell: does the yes/no margin tell concept from random?
    pub margin: Option<MarginCell>,
    /// The dose with its unit.
    dose: String,
}

/// Whether the replies mention, claim and name, over all cells.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplyHeadline {
    /// The part.
    pub part: String,
    /// The prompt.
    pub prompt: String,
    /// Replies that mention their concept.
    pub mentions: Rate,
    /// The cell with the most mentions, chosen and reported on the same replies.
    pub mentions_best: Option<(Cell, Rate)>,
    /// How often clean replies mention the same words.
    pub mentions_chance: Option<f64>,
    /// Coherent replies under concept vectors, random vectors, and none.
    pub coherent: [Option<Rate>; 3],
    /// H, F, I and their differences.
    pub contrast: Contrast,
    /// I of the controls, random and clean together: its chance.
    pub identified_chance: Option<f64>,
    /// Replies under random vectors that mention the trial's word.
    pub mentions_random: Option<Rate>,
    /// The smallest H − F that the run could have seen (80 % power).
    pub smallest_effect: Option<f64>,
}

/// What follows from the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Meaning {
    /// There are no graded replies, or no controls to hold them against.
    Open,
    /// H − F includes 0 against random vectors or clean replies, or I is at most chance.
    NoEvidence,
    /// Claims exceed those of clean replies under random vectors too, and those of random vectors no
    /// more: yes is pushed up by anything.
    YesBias,
    /// Mentions exceed those under random vectors and chance, claims do not exceed every control.
    NamesOnly,
    /// H − F exceeds 0 against every control there is, and I exceeds chance.
    Evidence,
}

pub(super) fn build(index: &Index, tables: &Tables) -> Headline {
    // Of several prompts the one that the protocol names first.
    let place = |table: &&ReplyTable| {
        let prompts = index.prompts(&table.part);
        let place = prompts.iter().position(|name| *name == table.prompt);
        (table.part != "sampled", place.unwrap_or(prompts.len()))
    };
    let replies = tables.replies.iter().min_by_key(place).and_then(replies);
    Headline {
        progress: tables.progress,
        read: tables.reads.iter().find_map(|table| read(index, table)),
        others: others::sentences(tables),
        meaning: replies.as_ref().map_or(Meaning::Open, meaning),
        replies,
    }
}

fn read(index: &Index, table: &ReadTable) -> Option<ReadHeadline> {
    let group = index
        .of_kind(Kind::Readout)
        .find(|g| (g.part, g.prompt) == (table.part.as_str(), table.prompt.as_str()))?;
    let count = |cell: Cell, condition, wanted: &dyn Fn(usize) -> bool| {
        let mut count = Count::default();
        for Entry { trial, .. } in group.entries.iter().filter(|e| e.cell() == Some(cell)) {
            if let (true, Some(read), Some(place)) =
                (trial.condition == condition, &trial.read, index.word(&trial.concept))
                && wanted(place)
            {
                count.add(read.rank == 1);
            }
        }
        count
    };
    let best = |wanted: &dyn Fn(usize) -> bool| {
        let cells = table.cells.iter().map(|row| row.cell);
        let scored = cells.map(|cell| (cell, count(cell, Condition::Concept, wanted)));
        let filled = scored.filter(|(_, count)| count.n > 0);
        filled.max_by(|(a, x), (b, y)| {
            let share = |c: &Count| c.share().unwrap_or(0.0);
            // `max_by` keeps the last of equals: the smaller cell must count as the greater.
            share(x)
                .total_cmp(&share(y))
                .then(b.dose.total_cmp(&a.dose))
                .then(b.layer.cmp(&a.layer))
        })
    };
    let (cell, _) = best(&|place| place % 2 == 0)?;
    let held_out = count(cell, Condition::Concept, &|place| place % 2 == 1);
    (held_out.n > 0).then_some(())?;
    let everything = |_| true;
    Some(ReadHeadline {
        cell,
        held_out,
        all: count(cell, Condition::Concept, &everything),
        random: count(cell, Condition::Random, &everything),
        words: table.words,
        best: best(&everything)?,
        margin: table.cells.iter().find(|row| row.cell == cell)?.margin,
        dose: format!("{} {}", cell.dose, unit(table.mode)),
    })
}

fn replies(table: &ReplyTable) -> Option<ReplyHeadline> {
    let arm = |condition| {
        table.arms.iter().find(|arm| arm.condition == condition && arm.scope == Scope::All)
    };
    let [concept, random, clean] =
        [Condition::Concept, Condition::Random, Condition::Clean].map(arm);
    let cells = table.arms.iter().filter(|arm| arm.condition == Condition::Concept);
    let best = cells
        .filter_map(|arm| match arm.scope {
            Scope::Cell(cell) => Some((cell, arm.mentions)),
            _ => None,
        })
        .max_by(|a, b| a.1.share.total_cmp(&b.1.share).then(b.0.order(&a.0)));
    let controls: Count =
        [random, clean].into_iter().flatten().map(|arm| arm.identified.count).sum();
    let contrast = table.contrasts.iter().find(|row| row.scope == Scope::All)?.clone();
    let alarms = contrast.random.or(contrast.clean);
    Some(ReplyHeadline {
        part: table.part.clone(),
        prompt: table.prompt.clone(),
        mentions: concept?.mentions,
        mentions_best: best,
        mentions_random: random.map(|arm| arm.mentions),
        mentions_chance: table.chance.share(),
        coherent: [concept, random, clean].map(|arm| Some(arm?.coherent)),
        identified_chance: controls.share(),
        smallest_effect: alarms
            .and_then(|f| smallest_effect(f.share, contrast.hits.effective, f.effective)),
        contrast,
    })
}

fn meaning(replies: &ReplyHeadline) -> Meaning {
    let nets: Vec<_> =
        [replies.contrast.net_random, replies.contrast.net_clean].into_iter().flatten().collect();
    let Some(chance) = replies.identified_chance.filter(|_| !nets.is_empty()) else {
        return Meaning::Open;
    };
    let claims = nets.iter().all(|net| net.interval.low > 0.0);
    let above = |net: Option<Difference>| net.is_some_and(|net| net.interval.low > 0.0);
    let Contrast { net_random, net_clean, pushed, .. } = &replies.contrast;
    let mentions = replies.mentions.interval.low;
    let named = replies.mentions_random.is_some_and(|random| mentions > random.interval.high)
        && replies.mentions_chance.is_some_and(|chance| mentions > chance);
    if claims && replies.contrast.identified.interval.low > chance {
        Meaning::Evidence
    } else if above(*net_clean) && above(*pushed) && !above(*net_random) {
        Meaning::YesBias
    } else if named {
        Meaning::NamesOnly
    } else {
        Meaning::NoEvidence
    }
}
