//! The lines of a run folder's files: plain data, strict. See `docs/results.md`.

use std::collections::BTreeMap;

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
    /// The sentence that goes with the word, in parts that have sentences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sentence: Option<String>,
    /// What was injected.
    pub condition: Condition,
    /// The word whose vector was injected, where it is not the trial's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<String>,
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
    /// The next token's distribution after the prompt (parts of kind readout and sample).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<NextToken>,
    /// What can be read out of the next-token logits (parts of kind readout).
    pub read: Option<Readout>,
    /// The sampled reply (parts of kind sample).
    pub reply: Option<Reply>,
    /// What the stream holds of the word (parts of kind probe).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<Probed>,
}

/// What was injected into a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
    /// Another word's vector.
    Other,
    /// The concept's vector in the prompt's other window, `after`.
    After,
}

impl Condition {
    /// In canonical order.
    pub const ALL: [Self; 7] = [
        Self::Clean,
        Self::Concept,
        Self::Random,
        Self::Negated,
        Self::Shuffled,
        Self::Other,
        Self::After,
    ];

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

/// The next token's distribution, at temperature 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextToken {
    /// KL divergence of it from the clean prompt's, nats; none for clean trials, and for samples of a part
    /// with more than 512 prompts.
    pub kl: Option<f64>,
    /// The likeliest tokens with their natural log-probabilities, best first.
    pub top: Vec<(String, f32)>,
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

/// How far the residual stream points along a word's vector, and along the control words'.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probed {
    /// The probed tokens' texts.
    pub pieces: Vec<String>,
    /// Blocks; the site is that of the run's vectors.
    pub layers: Vec<usize>,
    /// (layers, tokens): cosine of the stream with the word's vector.
    pub cosine: Vec<Vec<f32>>,
    /// (layers, tokens): the stream's component along the word's vector, h·v/‖v‖.
    pub projection: Vec<Vec<f32>>,
    /// (layers, tokens): the control words' mean cosine; empty without control words.
    pub band: Vec<Vec<f32>>,
    /// (layers): of the control words' cosines, each the mean over the tokens, the 2.5th and the 97.5th
    /// percentile (linear between values); empty without control words.
    pub range: Vec<(f32, f32)>,
}

/// A sampled reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// Without special tokens.
    pub text: String,
    /// The stop token included.
    pub tokens: Vec<u32>,
    /// Where each token's text ends in `text`, in bytes; empty where it cannot be told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ends: Vec<u32>,
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
    /// One for each criterion that was judged.
    pub verdicts: BTreeMap<Criterion, Verdict>,
    /// Criteria that were to be judged and were not, and why: never a no.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub missing: BTreeMap<Criterion, String>,
    /// All the words (of the run's list) that the reply mentions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mentioned: Vec<String>,
}

impl Reply {
    /// The token that a byte of the text belongs to.
    pub fn token_at(&self, byte: usize) -> Option<usize> {
        let at = self.ends.partition_point(|end| *end as usize <= byte);
        (at < self.ends.len()).then_some(at)
    }
}

impl Grade {
    /// Where a verdict's evidence begins in the reply, in bytes, and its text, where it is a quotation.
    pub fn quotation(&self, criterion: Criterion) -> Option<(usize, String)> {
        let (quoted, rest) = self.verdicts.get(&criterion)?.evidence.rsplit_once(" at byte ")?;
        let at = rest.split(' ').next()?.parse().ok()?;
        Some((at, serde_json::from_str(quoted).ok()?))
    }

    /// The verdict on a criterion; none where it was not judged.
    pub fn yes(&self, criterion: Criterion) -> Option<bool> {
        self.verdicts.get(&criterion).map(|verdict| verdict.yes)
    }

    /// Whether all criteria hold; none where one of them was not judged. Judges that do not tell naming
    /// from mentioning ([`Criterion::Identifies`]) are asked for the latter.
    pub fn all(&self, criteria: &[Criterion]) -> Option<bool> {
        criteria.iter().try_fold(true, |all, criterion| {
            let knows =
                self.verdicts.contains_key(criterion) || self.missing.contains_key(criterion);
            let criterion = match criterion {
                Criterion::Identifies if !knows => Criterion::Mentions,
                other => *other,
            };
            let yes = self.yes(criterion)?;
            Some(all && yes)
        })
    }
}

/// What a verdict is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// Neither garbled nor looping.
    Coherent,
    /// Says that it detects an injected thought.
    Claims,
    /// The concept word, a form or a relation of it stands in the reply.
    Mentions,
    /// Describes itself as thinking of the word or a near relation: a mere mention is none.
    Identifies,
    /// Claims before it names.
    ClaimsThenNames,
    /// Of ten words the reply is nearest to the trial's own.
    Chooses,
    /// The trial's sentence stands in the reply.
    Repeats,
    /// Says that it meant the word.
    Intends,
    /// Says that the word was an accident.
    Disowns,
}

impl Criterion {
    /// In canonical order.
    pub const ALL: [Self; 9] = [
        Self::Coherent,
        Self::Claims,
        Self::Mentions,
        Self::Identifies,
        Self::ClaimsThenNames,
        Self::Chooses,
        Self::Repeats,
        Self::Intends,
        Self::Disowns,
    ];

    /// As it is written in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coherent => "coherent",
            Self::Claims => "claims",
            Self::Mentions => "mentions",
            Self::Identifies => "identifies",
            Self::ClaimsThenNames => "claims_then_names",
            Self::Chooses => "chooses",
            Self::Repeats => "repeats",
            Self::Intends => "intends",
            Self::Disowns => "disowns",
        }
    }
}

/// What the replies to a prompt are judged on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Whether an injected thought is noticed and named.
    #[default]
    Detection,
    /// Whether a sentence makes it think of the word.
    Choice,
    /// Whether the sentence is repeated.
    Repeat,
    /// Whether it says that it meant the word.
    Intent,
}

impl Outcome {
    /// What judges may be asked.
    pub fn criteria(self) -> &'static [Criterion] {
        match self {
            Self::Detection => &[
                Criterion::Coherent,
                Criterion::Claims,
                Criterion::Mentions,
                Criterion::Identifies,
                Criterion::ClaimsThenNames,
            ],
            Self::Choice => &[Criterion::Chooses],
            Self::Repeat => &[Criterion::Repeats],
            Self::Intent => &[Criterion::Intends, Criterion::Disowns],
        }
    }

    /// What a success is where the protocol does not say.
    pub fn success(self, yes_no: bool) -> Vec<Criterion> {
        match self {
            Self::Detection if yes_no => vec![Criterion::Coherent, Criterion::ClaimsThenNames],
            Self::Detection => vec![Criterion::Coherent, Criterion::Identifies],
            Self::Choice => vec![Criterion::Chooses],
            Self::Repeat => vec![Criterion::Repeats],
            Self::Intent => vec![Criterion::Intends],
        }
    }
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
    /// File or folder name, without its path; of the hub `ORG/NAME@COMMIT`, the commit shortened.
    pub name: String,
    /// The whole commit of a model of the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
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
    /// The window of condition `after`: first position and end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<(usize, Option<usize>)>,
    /// The probed tokens: first position and end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<(usize, usize)>,
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
