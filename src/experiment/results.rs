//! The lines of a run folder's files: plain data, strict. See `docs/results.md`.

use serde::{Deserialize, Serialize};

pub use crate::engine::Fingerprint;
use crate::{
    engine::{Finish, Receipt},
    request::StrengthMode,
};

/// One line of `trials.jsonl`: complete and self-contained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// Hash of all that the result depends on.
    pub id: String,
    /// The protocol's part it belongs to, e.g. `readout`, `sampled`, `ramp`.
    pub part: String,
    /// The prompt's name in the protocol, e.g. `cued`, `open`.
    pub prompt: String,
    /// The word (for a clean trial: the word whose seeds it shares; "" where no word has part).
    pub concept: String,
    /// What was injected.
    pub condition: Condition,
    /// Block of the injection; none for clean trials.
    pub layer: Option<usize>,
    /// The depth asked for, 0..1; none for clean trials.
    pub depth: Option<f64>,
    /// The strength asked for, in units of `mode`; none for clean trials.
    pub dose: Option<f64>,
    /// The unit of the dose.
    pub mode: Option<StrengthMode>,
    /// 0-based repeat.
    pub repeat: u32,
    /// Seed of the sampling, the same for every condition, layer and dose.
    pub seed: u64,
    /// Id of the clean trial with the same prompt, concept and repeat; none for a clean trial.
    pub clean: Option<String>,
    /// One for each injection.
    pub receipts: Vec<Receipt>,
    /// The yes/no question at the first generated token.
    pub first: Option<FirstAnswer>,
    /// What can be read out of the next-token logits (parts of kind readout).
    pub read: Option<Readout>,
    /// The sampled reply (parts of kind sample).
    pub reply: Option<Reply>,
}

/// What was injected into a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// Nothing.
    Clean,
    /// The concept's vector.
    Concept,
    /// A random vector of the concept vector's norm.
    Random,
    /// The concept's vector with its sign turned.
    Negated,
    /// The concept's vector with its coordinates in another order: the same norm and the same outliers.
    Shuffled,
}

impl Condition {
    /// In canonical order.
    pub const ALL: [Self; 5] =
        [Self::Clean, Self::Concept, Self::Random, Self::Negated, Self::Shuffled];

    /// Those that inject something, in the same order.
    pub fn injected() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|condition| *condition != Self::Clean)
    }
}

/// The first generated token as an answer to a yes/no question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstAnswer {
    /// logsumexp(yes variants) − logsumexp(no variants).
    pub margin: f64,
    /// p(yes variants) / (p(yes variants) + p(no variants)).
    pub p_yes: f64,
    /// p(yes variants) + p(no variants).
    pub mass: f64,
    /// Entropy of the whole distribution, nats.
    pub entropy: f64,
}

/// Which of the part's words the logits point at: argmax and rank over the words' first tokens of
/// (logit − clean logit).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Readout {
    /// The word with the largest difference.
    pub word: String,
    /// Rank of the trial's own concept, 1 is best.
    pub rank: usize,
    /// How many words were compared.
    pub words: usize,
}

/// A sampled reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// Without special tokens.
    pub text: String,
    /// The stop token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Mean negative log-likelihood per token under the uninjected model at temperature 1, nats.
    pub nll: f64,
}

/// One line of `grades.jsonl`: one judge's verdicts on one trial, each with its evidence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grade {
    /// The trial's id.
    pub trial: String,
    /// The judge's name and version, e.g. `rules-1`.
    pub judge: String,
    /// Neither garbled nor looping.
    pub coherent: Verdict,
    /// Says that it detects an injected thought.
    pub claims: Verdict,
    /// The concept word, a form or a relation of it stands in the reply.
    pub mentions: Verdict,
    /// The claim comes before the first mention.
    pub claims_then_names: Verdict,
    /// All the words (of the run's list) that the reply mentions.
    pub mentioned: Vec<String>,
}

/// An answer with what it rests on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdict {
    /// Yes or no.
    pub yes: bool,
    /// The matched text, or the numbers and thresholds.
    pub evidence: String,
}

/// `manifest.json`: what was run, on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of these files' layout.
    pub schema: u32,
    /// Hash of the protocol, model, words and numerics: a folder holds one run.
    pub run: String,
    /// The resolved protocol, every default written out.
    pub protocol: serde_json::Value,
    /// The model.
    pub model: ModelRecord,
    /// How the numbers were made: a resume on another fingerprint is refused.
    pub numerics: Fingerprint,
    /// inkling's version.
    pub version: String,
    /// One for each prompt of the protocol.
    pub prompts: Vec<PromptRecord>,
    /// The words, as used.
    pub words: Vec<WordRecord>,
    /// What was left out to stay in the time asked for, in the reader's words; empty: nothing.
    pub cuts: Vec<String>,
    /// Trials planned.
    pub trials: u64,
}

/// The model of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    /// File or folder name, without its path.
    pub name: String,
    /// SHA-256 over the weights' file(s) and configuration.
    pub hash: String,
    /// e.g. `llama`.
    pub architecture: String,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Parameters.
    pub parameters: u64,
}

/// A prompt as the model sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptRecord {
    /// Its name in the protocol.
    pub name: String,
    /// As rendered.
    pub text: String,
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The tokens' texts, one each.
    pub pieces: Vec<String>,
    /// First injected position.
    pub from: usize,
    /// End of the injected window; `None`: through every generated token.
    pub to: Option<usize>,
}

/// A word of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WordRecord {
    /// As in the list.
    pub word: String,
    /// How many tokens " word" is.
    pub tokens: usize,
    /// The text of its first token.
    pub first_piece: String,
    /// ‖v‖ at each injected layer: (layer, norm).
    pub norms: Vec<(usize, f32)>,
}

/// A run as read from its folder, finished or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// What was run, on what.
    pub manifest: Manifest,
    /// In the order in which they finished.
    pub trials: Vec<Trial>,
    /// The last verdicts of each judge on each trial.
    pub grades: Vec<Grade>,
}
