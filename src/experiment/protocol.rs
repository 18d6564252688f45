//! A protocol is data: prompts, words, vectors and parts, every default written out.
//!
//! [`Protocol`] is the resolved form that a run's manifest keeps; `protocol_file` reads the TOML.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    str::FromStr,
};

use fs_err as fs;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Context, Error, Result},
    experiment::{
        demo::Cut,
        protocol_file,
        results::{Condition, Criterion, Outcome},
    },
    request::{Capture, Marker, Message, Position, Site, StrengthMode, Thinking},
};

/// The protocols that come with the program: name, text.
const BUILTIN: [(&str, &str); 8] = [
    ("injected-thoughts", include_str!("../../experiments/injected-thoughts.toml")),
    ("variants", include_str!("../../experiments/variants.toml")),
    ("thought-vs-text", include_str!("../../experiments/thought-vs-text.toml")),
    ("prefill", include_str!("../../experiments/prefill.toml")),
    ("intentional-control", include_str!("../../experiments/intentional-control.toml")),
    ("yes-bias", include_str!("../../experiments/yes-bias.toml")),
    ("dose-response", include_str!("../../experiments/dose-response.toml")),
    ("demo", include_str!("../../experiments/demo.toml")),
];

/// A field of a protocol's file and what it is set to, as `parts.sampled.count = 5` has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Keys, from the top; a number or a `name` picks one of a list.
    path: String,
    value: toml::Value,
}

impl FromStr for Setting {
    type Err = Error;
    /// `KEY=VALUE`; a value that is no TOML is a string.
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('=').filter(|(path, _)| !path.trim().is_empty());
        let (path, value) = parts.ok_or_else(|| {
            Error::new("not a setting").expected("KEY=VALUE, as in parts.sampled.count=5").got(text)
        })?;
        let (path, value) = (path.trim().to_owned(), value.trim());
        let parsed = toml::from_str::<toml::Table>(&format!("value = {value}"));
        let value = match parsed.ok().and_then(|mut table| table.remove("value")) {
            Some(value) => value,
            None => toml::Value::String(value.to_owned()),
        };
        Ok(Self { path, value })
    }
}

impl Setting {
    /// Puts it into a protocol's table.
    pub(super) fn apply(&self, table: &mut toml::Table) -> Result<()> {
        let missing = |key: &str| {
            Error::new("nothing of that name in the protocol").at(self.path.clone()).got(key)
        };
        let (parents, last) = match self.path.rsplit_once('.') {
            Some((parents, last)) => (parents.split('.').collect(), last),
            None => (Vec::new(), self.path.as_str()),
        };
        let mut table = table;
        let mut parents = parents.into_iter();
        while let Some(key) = parents.next() {
            table = match table.get_mut(key) {
                Some(toml::Value::Table(inner)) => inner,
                Some(toml::Value::Array(list)) => {
                    let key = parents.next().ok_or_else(|| missing(last))?;
                    let named = |item: &toml::Value| {
                        item.get("name").and_then(toml::Value::as_str) == Some(key)
                    };
                    let at = key.parse().ok().or(list.iter().position(named));
                    let item = at.and_then(|at: usize| list.get_mut(at));
                    item.and_then(toml::Value::as_table_mut).ok_or_else(|| missing(key))?
                }
                _ => return Err(missing(key)),
            };
        }
        table.insert(last.to_owned(), self.value.clone());
        Ok(())
    }
}

/// An experiment, resolved: word lists read in, defaults filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Protocol {
    /// Its name.
    pub name: String,
    /// What it asks, in a sentence.
    pub about: String,
    /// The run seed.
    pub seed: u64,
    /// Seconds that the trials may take; parts are cut to fit. None: everything is run.
    pub budget_seconds: Option<f64>,
    /// How chats are rendered.
    pub chat: Chat,
    /// How concept vectors are made.
    pub vectors: VectorRecipe,
    /// The yes/no question's answers.
    pub answers: Answers,
    /// By name.
    pub prompts: BTreeMap<String, PromptPlan>,
    /// In the order in which they are run.
    pub parts: Vec<Part>,
    /// Who grades the replies.
    pub judges: Vec<JudgePlan>,
    /// The sections of the report that are shown; empty: all that the run has something for.
    pub tables: Vec<Table>,
    /// What was cut of the parts to stay in the budget; never set by a protocol file.
    pub cuts: Vec<Cut>,
}

/// A judge, as `inkling grade` takes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum JudgePlan {
    /// Rules, without a model.
    Rules,
    /// A model in this engine.
    Local {
        /// GGUF file, Hugging Face folder, or a name of the hub.
        model: PathBuf,
        /// A file of questions in place of the built-in ones.
        #[serde(default)]
        questions: Option<PathBuf>,
    },
    /// A model behind a chat endpoint.
    Http {
        /// The base URL.
        url: String,
        /// The model's name there.
        name: String,
        /// The environment variable that holds the key; the key itself is never written.
        #[serde(default)]
        key_env: Option<String>,
        /// A file of questions in place of the built-in ones.
        #[serde(default)]
        questions: Option<PathBuf>,
    },
}

/// A section of the report, by the name of its anchor in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the page's own titles say what they are")]
pub enum Table {
    Receipts,
    Readout,
    Margins,
    Bias,
    Replies,
    Detection,
    Outcomes,
    Texts,
    Intents,
    Probes,
    Ramp,
    Explore,
    Transcripts,
}

/// Settings of the chat template, for all prompts and vectors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Chat {
    /// The system message; absent: the template's own default; "": an empty one.
    pub system: Option<String>,
    /// The thinking switch of reasoning models' templates.
    pub thinking: Thinking,
    /// `YYYY-MM-DD` for templates that print today's date.
    pub date: Option<String>,
}

/// How concept vectors are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorRecipe {
    /// The arithmetic.
    pub recipe: Recipe,
    /// Where vectors are taken, injected and probed.
    pub site: Site,
    /// The user's turn; `{word}` is the word, lower-cased.
    pub template: String,
    /// The words whose mean is subtracted (`mean-difference`).
    pub baseline: Vec<String>,
    /// User's turns with and without the concept (`contrast`, `pca`).
    pub pairs: Vec<(String, String)>,
    /// The vectors of these words are projected out.
    pub orthogonal_to: Vec<String>,
    /// A vector set that has the words (`file`).
    pub file: Option<PathBuf>,
}

/// The arithmetic of concept vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Recipe {
    /// `resid_post` at the last prompt token, minus its mean over the baseline words.
    #[default]
    MeanDifference,
    /// `resid_post` at the last prompt token, as it is.
    Single,
    /// Mean difference of pairs of prompts.
    Contrast,
    /// First principal direction of the pairs' differences.
    Pca,
    /// The word's row of the embedding, the same at every layer.
    Embedding,
    /// The word's row of the output matrix, the same at every layer.
    Unembedding,
    /// From a vector set.
    File,
}

impl VectorRecipe {
    /// In words, for a vector set's header.
    pub fn describe(&self) -> String {
        let VectorRecipe { template, baseline, pairs, .. } = self;
        let made = match self.recipe {
            Recipe::MeanDifference => {
                format!("mean-difference of {template:?} over {} baseline words", baseline.len())
            }
            Recipe::Single => format!("residual of {template:?}"),
            Recipe::Contrast => format!("mean difference of {} pairs", pairs.len()),
            Recipe::Pca => format!("first principal direction of {} pairs", pairs.len()),
            Recipe::Embedding => "embedding row".into(),
            Recipe::Unembedding => "output matrix row".into(),
            Recipe::File => "from a file".into(),
        };
        match self.orthogonal_to.len() {
            0 => made,
            _ => format!("{made}, orthogonal to {}", self.orthogonal_to.join(", ")),
        }
    }
}

/// Variants of the answers to a yes/no question. Those that are one token of the model count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Answers {
    /// Yes, with and without a leading space and capital.
    pub yes: Vec<String>,
    /// No, likewise.
    pub no: Vec<String>,
}

/// A prompt before it is rendered. Its texts may hold `{trial}`, `{word}` (lower-cased) and `{sentence}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptPlan {
    /// The chat.
    pub turns: Vec<Message>,
    /// Text the answer starts with.
    pub prefill: Option<String>,
    /// What `{trial}` stands for.
    pub trial: u32,
    /// Whether it is a yes/no question, whose answer is read at the first generated token.
    pub yes_no: bool,
    /// The right answer, where the question has one: it has nothing to do with injected thoughts, and
    /// shows what vectors do to any answer.
    pub answer: Option<Answer>,
    /// What replies to it are judged on.
    pub outcome: Outcome,
    /// The verdicts that make a reply a success, all together.
    pub success: Vec<Criterion>,
    /// The most tokens of its replies, instead of the part's.
    pub max_tokens: Option<u32>,
    /// Where injections act.
    pub window: Window,
    /// Where those of condition `after` act.
    pub after: Option<Window>,
    /// Which tokens parts of kind probe look at.
    pub probe: Option<Window>,
}

/// To a yes/no question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Yes.
    Yes,
    /// No.
    No,
}

/// Where injections act in a prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Window {
    /// First token; absent: 0.
    pub from: Option<Position>,
    /// End (not in it); absent: through every generated token.
    pub to: Option<Position>,
}

impl Window {
    /// With the texts of its markers changed.
    #[must_use]
    pub(super) fn map_texts(&self, change: impl Fn(&str) -> String) -> Self {
        let changed = |position: &Position| {
            let mut position = position.clone();
            if let Position::Marker(Marker::StartOf(span) | Marker::EndOf(span)) = &mut position {
                span.text = change(&span.text);
            }
            position
        };
        Self { from: self.from.as_ref().map(changed), to: self.to.as_ref().map(changed) }
    }
}

/// A grid of trials: prompts × words × layers × doses × conditions × repeats, and their clean
/// partners. A part of kind probe injects nothing: it has one trial for each prompt and word.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// What is measured.
    pub kind: Kind,
    /// Names of prompts.
    pub prompts: Vec<String>,
    /// The words to choose from, in order.
    pub words: Vec<String>,
    /// The sentences that go with the words used, one by one, from the front again where there are
    /// fewer.
    pub sentences: Vec<String>,
    /// Only words whose lower-cased form after a space is one token.
    pub single_token: bool,
    /// This many words from the front; none: all.
    pub count: Option<usize>,
    /// Where in the model.
    pub places: Places,
    /// Strengths in units of `mode`; 0 stands for the clean trial.
    pub doses: Vec<f64>,
    /// The unit of the doses.
    pub mode: StrengthMode,
    /// In canonical order, clean first; clean partners are always run.
    pub conditions: Vec<Condition>,
    /// Trials of each cell, with different seeds.
    pub repeats: u32,
    /// What is copied out of every trial's prompt, into a file of its own.
    pub capture: Vec<Capture>,
    /// Words whose vectors show how large a cosine is by chance (parts of kind probe).
    pub band: Vec<String>,
    /// Pairs of prompts to be compared (parts of kind probe).
    pub contrasts: Vec<(String, String)>,
}

/// What is measured in a trial.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The next-token logits after the prompt; nothing is drawn.
    Readout,
    /// A reply.
    Sample(Draw),
    /// How far the stream points along the word's vector at the prompt's probed tokens; nothing is
    /// injected or drawn.
    Probe,
}

/// How replies are drawn. The model's own defaults are never applied.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draw {
    /// 0 is greedy.
    pub temperature: f64,
    /// Keep the most likely tokens up to this total probability; 1: all.
    pub top_p: f64,
    /// Keep this many most likely tokens; 0: all.
    pub top_k: u32,
    /// The most tokens drawn.
    pub max_tokens: u32,
}

/// Where in the model a part injects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Places {
    /// Depths 0..1: layer min(round(d·n), n − 1) of n.
    Depths(Vec<f64>),
    /// Blocks, from 0.
    Layers(Vec<usize>),
    /// This many blocks, evenly spaced from the first to the last.
    Evenly(usize),
    /// Every block.
    All,
}

/// A block and the depth that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Block, from 0.
    pub layer: usize,
    /// As asked for, or layer / n.
    pub depth: f64,
}

/// Words of a part of [`Protocol::quick`].
const QUICK_WORDS: usize = 8;
/// Depths in place of many layers.
const QUICK_DEPTHS: [f64; 3] = [0.5, 0.67, 0.85];

impl Places {
    /// At most three of them: the first, the middle and the last of a list, or three depths.
    fn few(&self) -> Self {
        fn three<T: Copy>(list: &[T]) -> Vec<T> {
            match list {
                [first, .., last] if list.len() > 3 => vec![*first, list[list.len() / 2], *last],
                _ => list.to_vec(),
            }
        }
        match self {
            Self::Depths(depths) => Self::Depths(three(depths)),
            Self::Layers(layers) => Self::Layers(three(layers)),
            Self::Evenly(count) if *count <= 3 => self.clone(),
            Self::Evenly(_) | Self::All => Self::Depths(QUICK_DEPTHS.to_vec()),
        }
    }

    /// The blocks in a model of n, without repetitions: two depths may fall on one block, and the
    /// first of them names it. An error for a layer that the model does not have.
    pub fn resolve(&self, n: usize) -> Result<Vec<Place>> {
        let at = |layer: usize| Place { layer, depth: layer as f64 / n as f64 };
        let mut places: Vec<Place> = match self {
            Self::Depths(depths) => {
                let layer = |d: f64| ((d * n as f64).round() as usize).min(n - 1);
                depths.iter().map(|d| Place { layer: layer(*d), depth: *d }).collect()
            }
            Self::Layers(layers) => {
                if let Some(bad) = layers.iter().find(|layer| **layer >= n) {
                    return Err(Error::new("layer out of range")
                        .expected(format!("0..={} (the model has {n} blocks)", n - 1))
                        .got(bad)
                        .hint("layers are counted from 0"));
                }
                layers.iter().copied().map(at).collect()
            }
            Self::Evenly(1) => vec![at(n / 2)],
            Self::Evenly(count) if *count < n => {
                let step = (n - 1) as f64 / (count - 1) as f64;
                (0..*count).map(|i| at((i as f64 * step).round() as usize)).collect()
            }
            Self::Evenly(_) | Self::All => (0..n).map(at).collect(),
        };
        let mut seen = Vec::new();
        places.retain(|place| {
            let new = !seen.contains(&place.layer);
            seen.push(place.layer);
            new
        });
        Ok(places)
    }
}

impl PromptPlan {
    /// Whether its texts name the word.
    pub fn uses_word(&self) -> bool {
        self.has("{word}")
    }

    /// Whether its texts hold the sentence.
    pub fn uses_sentence(&self) -> bool {
        self.has("{sentence}")
    }

    fn has(&self, placeholder: &str) -> bool {
        let mut texts = self.turns.iter().map(|turn| &turn.content).chain(&self.prefill);
        texts.any(|text| text.contains(placeholder))
    }
}

impl Protocol {
    /// The names of the protocols that come with the program.
    pub fn builtins() -> impl Iterator<Item = &'static str> {
        BUILTIN.iter().map(|(name, _)| *name)
    }

    /// A protocol that comes with the program.
    pub fn builtin(name: &str) -> Result<Self> {
        Self::parse(Self::builtin_text(name)?, &format!("builtin:{name}"), &[])
    }

    /// The TOML text of a protocol that comes with the program, to start an own one from.
    pub fn builtin_text(name: &str) -> Result<&'static str> {
        let found = BUILTIN.iter().find(|(known, _)| *known == name);
        found.map(|(_, text)| *text).ok_or_else(|| {
            let known: Vec<&str> = Self::builtins().collect();
            Error::new("no such protocol")
                .expected(format!("{} or a TOML file", known.join(", ")))
                .got(format!("{name:?}"))
        })
    }

    /// A built-in protocol by its name, or a file by its path, with these fields set otherwise.
    pub fn open(name_or_path: &str, settings: &[Setting]) -> Result<Self> {
        let path = Path::new(name_or_path);
        if path.is_file() || path.extension().is_some_and(|ext| ext == "toml") {
            Self::parse(&fs::read_to_string(path)?, name_or_path, settings)
        } else {
            let text = Self::builtin_text(name_or_path)?;
            Self::parse(text, &format!("builtin:{name_or_path}"), settings)
        }
    }

    /// Reads a protocol. `place` names it in errors; word lists are looked for in its folder.
    pub fn parse(text: &str, place: &str, settings: &[Setting]) -> Result<Self> {
        let base = Path::new(place).parent().unwrap_or(Path::new(""));
        protocol_file::parse(text, base, settings).at(|| place.to_owned())
    }

    /// A version for trying things: at most 8 words, 3 layers, 2 doses and one repeat a part. Parts of kind
    /// probe keep their layers, which they read all at once.
    #[must_use]
    pub fn quick(&self) -> Self {
        let mut quick = self.clone();
        quick.name = format!("{} (quick)", self.name);
        for part in &mut quick.parts {
            part.count = match part.count {
                // How many of the list are single tokens is the model's: all of a shorter list.
                None if part.single_token => {
                    part.words.truncate(2 * QUICK_WORDS);
                    None
                }
                count => Some(count.unwrap_or(part.words.len()).min(QUICK_WORDS)),
            };
            part.repeats = 1;
            if part.kind != Kind::Probe {
                part.places = part.places.few();
                // The middle and the largest: what is read shows early, what is written late.
                part.doses = match part.doses[..] {
                    [.., last] if part.doses.len() > 2 => {
                        vec![part.doses[(part.doses.len() - 1) / 2], last]
                    }
                    _ => part.doses.clone(),
                };
            }
        }
        quick
    }

    /// The protocol as it was before anything was cut.
    #[must_use]
    pub fn uncut(&self) -> Self {
        Self { cuts: Vec::new(), ..self.clone() }
    }

    /// What makes a run the same run: not its cuts, nor who grades it, what is shown of it, or where a file of
    /// vectors lies (their content is in every trial's id).
    #[must_use]
    pub fn identity(&self) -> Self {
        let mut identity = self.uncut();
        identity.judges = Vec::new();
        identity.tables = Vec::new();
        identity.vectors.file = None;
        identity
    }

    /// The cut of a part, if there is one.
    pub fn cut(&self, part: &str) -> Option<&Cut> {
        self.cuts.iter().find(|cut| cut.part == part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_fall_on_the_known_layers() {
        let layers = |places: Places, n| -> Vec<usize> {
            places.resolve(n).unwrap().iter().map(|place| place.layer).collect()
        };
        assert_eq!(layers(Places::Depths(vec![0.4, 0.67, 0.8, 0.9]), 30), [12, 20, 24, 27]);
        assert_eq!(layers(Places::Depths(vec![0.0, 1.0]), 30), [0, 29]);
        assert_eq!(layers(Places::Depths(vec![0.4, 0.67, 0.8, 0.9]), 2), [1], "one block, once");
        let even = layers(Places::Evenly(16), 30);
        assert_eq!((even.len(), even[0], even[15]), (16, 0, 29));
        assert!(even.windows(2).all(|pair| (1..=2).contains(&(pair[1] - pair[0]))));
        assert_eq!(layers(Places::Evenly(16), 4), [0, 1, 2, 3]);
        assert_eq!(layers(Places::Evenly(1), 30), [15]);
        assert_eq!(layers(Places::All, 3), [0, 1, 2]);
        let error = Places::Layers(vec![3, 30]).resolve(30).unwrap_err().to_string();
        assert!(error.contains("0..=29") && error.contains("30"), "{error}");
    }

    #[test]
    fn builtins_resolve_and_survive_the_manifest() {
        for name in Protocol::builtins() {
            let protocol = Protocol::builtin(name).unwrap();
            assert_eq!(protocol.name, name);
            let json = serde_json::to_value(&protocol).unwrap();
            assert_eq!(serde_json::from_value::<Protocol>(json).unwrap(), protocol);
        }
        let error = Protocol::open("dmeo", &[]).unwrap_err().to_string();
        assert!(error.contains("injected-thoughts, variants, thought-vs-text"), "{error}");
    }

    #[test]
    fn the_window_of_the_cued_prompt_opens_at_the_blank_line() {
        for name in ["injected-thoughts", "variants", "yes-bias", "dose-response", "demo"] {
            let prompt = &Protocol::builtin(name).unwrap().prompts["cued"];
            let question = &prompt.turns.last().unwrap().content;
            assert!(question.contains("\n\nTrial {trial}: "), "{question}");
            let json = serde_json::to_string(&prompt.window).unwrap();
            let from = r#"{"start_of":{"text":"\n\nTrial {trial}","turn":"user.last"}}"#;
            assert_eq!(json, format!(r#"{{"from":{from},"to":null}}"#));
        }
    }
}
