//! Counts and rates of every part: what the pages and the text are written from.

mod bias;
mod intents;
mod outcomes;
mod probes;
mod read;
mod receipts;
mod replies;
mod texts;

use std::cmp::Ordering;

use serde::Serialize;

pub(super) use self::probes::BINS;
use super::index::{Entry, Group, Index, Kind};
use crate::{
    experiment::{
        results::{Condition, Outcome},
        stats::{Count, Detection, Difference, Interval, Rate},
    },
    request::StrengthMode,
};

/// Where and how strongly something was injected.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Block.
    pub layer: usize,
    /// The depth asked for, 0..1.
    pub depth: f64,
    /// The strength asked for, in the group's unit.
    pub dose: f64,
}

impl Cell {
    /// By layer, depth and dose.
    pub fn order(&self, other: &Self) -> Ordering {
        self.layer
            .cmp(&other.layer)
            .then(self.depth.total_cmp(&other.depth))
            .then(self.dose.total_cmp(&other.dose))
    }
}

/// Which cells a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All of them.
    All,
    /// Those of this dose, at every depth.
    Dose(f64),
    /// One.
    Cell(Cell),
}

impl Scope {
    fn holds(&self, cell: Cell) -> bool {
        match self {
            Self::All => true,
            Self::Dose(dose) => *dose == cell.dose,
            Self::Cell(own) => *own == cell,
        }
    }
}

/// How far the run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Trials stored.
    pub done: u64,
    /// Trials planned.
    pub planned: u64,
    /// Of those stored, the ones with a reply.
    pub replies: u64,
    /// Replies that the judge has not graded. They are left out, never counted as "no".
    pub ungraded: u64,
    /// Verdicts that the judge was asked for and did not give. They are left out likewise.
    pub missing: u64,
}

/// All tables of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tables {
    /// How far the run is.
    pub progress: Progress,
    /// What was changed in the stream, by part and cell.
    pub receipts: Vec<ReceiptRow>,
    /// One for each prompt of a readout part, but for questions with a right answer.
    pub reads: Vec<ReadTable>,
    /// One for each part that asks such questions beside others.
    pub biases: Vec<BiasTable>,
    /// One for each prompt of a sampled part.
    pub replies: Vec<ReplyTable>,
    /// One for each prompt that asks for a thought or for a sentence, in parts that do not ask for both.
    pub outcomes: Vec<OutcomeTable>,
    /// One for each part that asks for a thought and for a sentence.
    pub texts: Vec<TextTable>,
    /// One for each prompt that asks whether a word was meant.
    pub intents: Vec<IntentTable>,
    /// One for each part of kind probe.
    pub probes: Vec<ProbeTable>,
}

/// The receipts of one cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReceiptRow {
    /// The part.
    pub part: String,
    /// The prompt.
    pub prompt: String,
    /// The cell.
    pub cell: Cell,
    /// Receipts.
    pub receipts: u64,
    /// Mean ‖change‖ as planned.
    pub planned: Option<f64>,
    /// Mean ‖change‖ as measured.
    pub measured: Option<f64>,
    /// Mean of measured ‖change‖ over mean ‖h‖ before.
    pub ratio: Option<f64>,
    /// Rows changed.
    pub rows_touched: u64,
    /// Rows in the window.
    pub rows_expected: u64,
    /// Ids of the trials whose measured change differs from the planned one by more than 1 %, or
    /// with rows missed.
    pub flagged: Vec<String>,
}

/// What the logits say, by cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReadTable {
    /// The part.
    pub part: String,
    /// The prompt.
    pub prompt: String,
    /// The doses' unit.
    pub mode: Option<StrengthMode>,
    /// How many words were compared: chance is one in so many.
    pub words: usize,
    /// By cell, ascending.
    pub cells: Vec<ReadoutCell>,
    /// Of all cells together: concept trials whose yes/no margin exceeds all but one in a hundred of the
    /// random ones; none below 300 of these.
    pub sensitivity: Option<f64>,
}

/// One cell of a readout.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReadoutCell {
    /// The cell.
    pub cell: Cell,
    /// Trials whose own concept ranks first under its vector.
    pub concept: Option<Rate>,
    /// The same under a random vector.
    pub random: Option<Rate>,
    /// The yes/no question, where it was asked.
    pub margin: Option<MarginCell>,
    /// Mean KL divergence of the next token from the clean prompt's, nats: under concept and random
    /// vectors.
    pub kl: (Option<f64>, Option<f64>),
}

/// Whether the yes/no margin at the first token tells concept vectors from random ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MarginCell {
    /// How often a concept's margin exceeds a random vector's; ½ is chance.
    pub auroc: f64,
    /// By resampling concepts; `None` below 20.
    pub interval: Option<Interval>,
    /// Concept trials and random trials.
    pub trials: (usize, usize),
    /// Mean probability of yes and no together.
    pub mass: f64,
    /// Median margin under concept and random vectors.
    pub medians: (f64, f64),
}

/// What vectors do to the first token of an answer, where the question is about injected thoughts and
/// where it is not and the answer is no.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BiasTable {
    /// The part.
    pub part: String,
    /// The doses' unit.
    pub mode: Option<StrengthMode>,
    /// Prompts without a right answer.
    pub asked: Vec<String>,
    /// Unrelated questions whose answer is no.
    pub unrelated: Vec<String>,
    /// Questions with a right answer that the clean model gets right.
    pub right: Count,
    /// Clean prompts that are answered yes: asked, unrelated.
    pub clean: (Count, Count),
    /// Condition by scope: all, each dose, each cell.
    pub rows: Vec<BiasRow>,
}

/// One condition's pushes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BiasRow {
    /// What was injected.
    pub condition: Condition,
    /// Which cells.
    pub scope: Scope,
    /// On the questions about thoughts.
    pub asked: Push,
    /// On the unrelated ones.
    pub unrelated: Push,
    /// Shift where asked minus shift where unrelated, nats.
    pub net_shift: f64,
    /// Of `net_shift`, by resampling concepts; `None` below 20.
    pub interval: Option<Interval>,
}

/// What a vector does to the answer's first token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Push {
    /// Trials in which yes is more likely than no.
    pub yes: Rate,
    /// Mean of the yes/no margin minus that of the clean partner, nats.
    pub shift: f64,
    /// Mean probability of yes and no together.
    pub mass: f64,
}

/// What the replies say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplyTable {
    /// The part.
    pub part: String,
    /// The prompt.
    pub prompt: String,
    /// The doses' unit.
    pub mode: Option<StrengthMode>,
    /// Condition by scope: all, each dose, each cell; clean once.
    pub arms: Vec<ReplyArm>,
    /// Hits against false alarms, by the same scopes.
    pub contrasts: Vec<Contrast>,
    /// Of every clean reply and every injected word: how often the reply mentions the word.
    pub chance: Count,
    /// The same by word, for those ever mentioned, in the list's order.
    pub chance_words: Vec<(String, Count)>,
}

/// Rates of one condition. Each is over the graded replies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplyArm {
    /// What was injected.
    pub condition: Condition,
    /// Which cells.
    pub scope: Scope,
    /// Neither garbled nor looping.
    pub coherent: Rate,
    /// Says that it detects a thought.
    pub claims: Rate,
    /// The same among coherent replies only.
    pub claims_if_coherent: Option<Rate>,
    /// The trial's concept stands in the reply.
    pub mentions: Rate,
    /// Coherent, and the claim comes before the first mention.
    pub identified: Rate,
}

/// Concept vectors against the controls.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contrast {
    /// Which cells.
    pub scope: Scope,
    /// H: claims under concept vectors.
    pub hits: Rate,
    /// F: claims under random vectors of the same norm, in the same cells.
    pub random: Option<Rate>,
    /// F: claims without injection.
    pub clean: Option<Rate>,
    /// I: coherent, claimed and then named.
    pub identified: Rate,
    /// H − F against random vectors, paired by seed and cell.
    pub net_random: Option<Difference>,
    /// H − F against clean replies.
    pub net_clean: Option<Difference>,
    /// F under random vectors − F without injection: what any vector does.
    pub pushed: Option<Difference>,
    /// I − F against random vectors (against clean replies where the run has no random ones).
    pub net_identified: Option<Difference>,
    /// Exact p of concept against random vectors, pair by pair
    /// ([`Pairs::mcnemar`](crate::experiment::stats::Pairs::mcnemar)).
    pub p: Option<f64>,
    /// d′ of concept against random vectors.
    pub detection: Option<Detection>,
}

/// How often a prompt's replies are successes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OutcomeTable {
    /// The part.
    pub part: String,
    /// The prompt.
    pub prompt: String,
    /// What the replies are judged on.
    pub outcome: Outcome,
    /// The doses' unit.
    pub mode: Option<StrengthMode>,
    /// Condition by scope: all, each dose, each cell; clean once.
    pub rows: Vec<OutcomeRow>,
}

/// One condition's successes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OutcomeRow {
    /// What was injected.
    pub condition: Condition,
    /// Which cells.
    pub scope: Scope,
    /// All the prompt's verdicts hold.
    pub success: Rate,
    /// Of concept vectors: less the same under random vectors, in pairs.
    pub net: Option<Difference>,
}

/// A thought that is injected over a sentence, and the sentence itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextTable {
    /// The part.
    pub part: String,
    /// The prompts that ask for a thought and for the sentence.
    pub prompts: (String, String),
    /// The doses' unit.
    pub mode: Option<StrengthMode>,
    /// Condition by scope: all, each dose, each cell; clean once.
    pub rows: Vec<TextRow>,
    /// The best cell of concept vectors by both at once.
    pub chosen: Option<Chosen<Count>>,
}

/// Rates of one condition.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TextRow {
    /// What was injected.
    pub condition: Condition,
    /// Which cells.
    pub scope: Scope,
    /// The thought is nearest to the trial's word.
    pub thinks: Rate,
    /// The sentence is repeated.
    pub repeats: Rate,
    /// Both, in the two trials of the same word, repeat and cell.
    pub both: Rate,
    /// Of concept vectors: both, less the same under random vectors, in pairs.
    pub net: Option<Difference>,
}

/// A cell that was chosen on the words at even places of the run's list (of equals the smallest dose, then
/// the lowest layer).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Chosen<T> {
    /// The cell.
    pub cell: Cell,
    /// There, the words that did not choose it.
    pub held_out: T,
    /// There, all words.
    pub all: T,
}

/// Whether a word that was put into the model's mouth is said to have been meant.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IntentTable {
    /// The part.
    pub part: String,
    /// The prompt.
    pub prompt: String,
    /// The doses' unit.
    pub mode: Option<StrengthMode>,
    /// Condition by scope: all, each dose, each cell; clean once.
    pub rows: Vec<IntentRow>,
    /// min(apologies without a vector, with another word's) − apologies with the word's own vector.
    pub score: Option<IntentScore>,
}

/// The score with the cell it was chosen at.
pub type IntentScore = Chosen<Score>;

/// min(apologies without a vector, with another word's) − apologies with the word's own vector.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// The score.
    pub value: f64,
    /// By resampling words; `None` below 20.
    pub interval: Option<Interval>,
    /// Words that it is of.
    pub words: usize,
}

/// Rates of one condition.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct IntentRow {
    /// What was injected.
    pub condition: Condition,
    /// Which cells.
    pub scope: Scope,
    /// Says that it meant the word.
    pub intends: Rate,
    /// Says that it was an accident.
    pub disowns: Rate,
    /// Does not say that it meant it: the paper's apology rate.
    pub apologises: Rate,
    /// Says neither.
    pub neither: Rate,
    /// Sentences that are repeated under the same injection: text that can still be read.
    pub guard: Option<Count>,
}

/// Cosines of the stream with words' vectors, by layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeTable {
    /// The part.
    pub part: String,
    /// Blocks.
    pub layers: Vec<usize>,
    /// One for each prompt.
    pub curves: Vec<ProbeCurve>,
    /// Differences of two prompts.
    pub contrasts: Vec<ProbeContrast>,
}

/// One prompt's cosines.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeCurve {
    /// The prompt.
    pub prompt: String,
    /// Trials.
    pub trials: u64,
    /// (layers): mean over words of the mean over tokens.
    pub points: Vec<ProbePoint>,
    /// (layers): mean over trials of the control words' 95 % range.
    pub bands: Vec<Option<Interval>>,
    /// (layers): trials above their control words' range.
    pub above: Vec<u64>,
    /// (layers, parts of the sentence): mean cosine.
    pub map: Vec<Vec<Option<f64>>>,
}

/// A mean over words.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ProbePoint {
    /// The mean.
    pub mean: f64,
    /// By resampling words; `None` below 20.
    pub interval: Option<Interval>,
}

/// First minus second, in pairs of the same word and sentence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeContrast {
    /// A prompt.
    pub first: String,
    /// Another.
    pub second: String,
    /// (layers).
    pub points: Vec<ProbePoint>,
    /// The mean over the layers.
    pub overall: ProbePoint,
}

pub(super) fn build(index: &Index) -> Tables {
    let replies = index.entries.iter().filter(|e| e.trial.reply.is_some());
    let texts = texts::tables(index);
    Tables {
        progress: Progress {
            done: index.entries.len() as u64,
            planned: index.manifest.trials,
            replies: replies.clone().count() as u64,
            missing: index.entries.iter().filter_map(|e| Some(e.grade?.missing.len() as u64)).sum(),
            ungraded: replies.filter(|e| e.grade.is_none()).count() as u64,
        },
        receipts: index.groups.iter().flat_map(receipts::rows).collect(),
        reads: index
            .of_kind(Kind::Readout)
            .filter(|group| index.answer(group.prompt).is_none())
            .map(|group| read::table(group, index))
            .collect(),
        biases: bias::tables(index),
        replies: index.of_kind(Kind::Sampled).map(|g| replies::table(g, index)).collect(),
        outcomes: outcomes::tables(index, &texts),
        texts,
        intents: intents::tables(index),
        probes: probes::tables(index),
    }
}

/// All cells, each dose, each cell.
fn scopes(cells: Vec<Cell>) -> Vec<Scope> {
    let mut doses: Vec<_> = cells.iter().map(|cell| cell.dose).collect();
    doses.sort_by(f64::total_cmp);
    doses.dedup();
    let mut scopes = vec![Scope::All];
    scopes.extend(doses.into_iter().map(Scope::Dose));
    scopes.extend(cells.into_iter().map(Scope::Cell));
    scopes
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0_u64), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / n as f64)
}

/// The words that a group's trials are about, sorted: the clusters of every statistic.
fn concepts<'a>(group: &Group<'a>) -> Vec<&'a str> {
    // A readout's clean trial is about no word.
    let counts = |e: &&Entry| e.trial.condition != Condition::Clean || e.trial.reply.is_some();
    let mut words: Vec<_> =
        group.entries.iter().filter(counts).map(|e| e.trial.concept.as_str()).collect();
    words.sort_unstable();
    words.dedup();
    words
}

fn place(concepts: &[&str], word: &str) -> Option<usize> {
    concepts.binary_search(&word).ok()
}

/// One count for each concept of the entries for which `hit` knows an answer.
fn clusters(
    concepts: &[&str],
    entries: &[Entry],
    hit: impl Fn(&Entry) -> Option<bool>,
) -> Vec<Count> {
    let mut counts = vec![Count::default(); concepts.len()];
    for entry in entries {
        if let (Some(hit), Some(at)) = (hit(entry), place(concepts, &entry.trial.concept)) {
            counts[at].add(hit);
        }
    }
    counts
}
