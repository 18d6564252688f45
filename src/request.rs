//! The request types: one JSON object a line in files, and the same object in the library.
//!
//! Serde types only, strict (unknown fields are errors), with no logic beyond their defaults:
//! `engine::resolve` checks them against a model.

mod captures;
mod windows;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use captures::*;
pub use windows::*;

/// One prompt, what is injected into it, what is captured, and how it is continued.
/// Exactly one of `messages`, `text` and `tokens` is given.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Names the request in answers and in tensor names; unique in a file.
    pub id: String,
    /// A chat, rendered with the model's template and its generation prompt. A final assistant
    /// message is continued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<Vec<Message>>,
    /// Plain text, tokenised as the tokenizer does by default (its own BOS included).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Token ids, used as they are; they need no tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<u32>>,
    /// The system message; absent: the template's own default; "": an empty one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Text the answer starts with. A trailing space is an error: it would split a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<String>,
    /// The thinking switch of reasoning models' templates.
    #[serde(default, skip_serializing_if = "is_default")]
    pub thinking: Thinking,
    /// `YYYY-MM-DD` for templates that print today's date; such a template without it is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// What is planted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inject: Vec<Injection>,
    /// What is copied out (`forward`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capture: Vec<Capture>,
    /// How it is continued (`generate`).
    #[serde(default, skip_serializing_if = "is_default")]
    pub sampling: Sampling,
    /// Samples drawn from one prefill; sample i has the seed of `Sampling::seed` and i.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub n: u32,
    /// Generation ends before the first of these texts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// Log-probabilities of each generated token and of this many top tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// Given continuations whose log-probability is wanted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub score: Vec<Continuation>,
}

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

/// Whether a reasoning model's template opens with thinking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// `enable_thinking = false`.
    Off,
    /// `enable_thinking = true`.
    On,
    /// The variable is left undefined: the template decides.
    #[default]
    Template,
}

/// Vector, site, operation, strength and window.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Injection {
    /// The direction; none for `scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector: Option<VectorRef>,
    /// Instead of `vector`: what another request of the same file shows (activation patching).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Blocks, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<OneOrMany>,
    /// Which point of the block; absent: `resid_post`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<Site>,
    /// Of `head_out`: which heads of attention, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<OneOrMany>,
    /// Instead of `layer`, `site` and a `head`: the point by a name of this or another program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
    /// What is done with the vector.
    #[serde(default)]
    pub op: Op,
    /// s, in units of `strength_mode`; none for `project_out` and `clamp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f32>,
    /// The unit of the strength and the bounds.
    #[serde(default)]
    pub strength_mode: StrengthMode,
    /// Of `clamp`: the least coordinate; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f32>,
    /// Of `clamp`: the greatest coordinate; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f32>,
    /// Scale the row back to the norm it had.
    #[serde(default, skip_serializing_if = "is_default")]
    pub keep_norm: bool,
    /// First token of the window; absent: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Position>,
    /// End of the window (not in it); absent: through every generated token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Position>,
    /// Instead of `from` and `to`: one window or several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Windows>,
    /// Act only on rows that meet a condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<Condition>,
    /// Use a vector that its file's header says is of another layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector_layer: Option<usize>,
}

impl Injection {
    /// strength · vector is added to the output of a block, everywhere.
    pub fn add(vector: VectorRef, layer: usize, strength: f32) -> Self {
        Self {
            vector: Some(vector),
            source: None,
            layer: Some(OneOrMany::One(layer)),
            site: None,
            head: None,
            hook: None,
            op: Op::default(),
            strength: Some(strength),
            strength_mode: StrengthMode::default(),
            min: None,
            max: None,
            keep_norm: false,
            from: None,
            to: None,
            window: None,
            when: None,
            vector_layer: None,
        }
    }
}

/// Where a vector comes from.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum VectorRef {
    /// `FILE#NAME`.
    Named(String),
    /// Weighted sum of `FILE#NAME`s.
    Sum(BTreeMap<String, f32>),
    /// The numbers themselves, (dim,).
    Values(Vec<f32>),
}

/// Rows of another request, each put at one position of an injection's window, or a single one at all.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The other request's id.
    pub request: String,
    /// Which point of the block; absent: the injection's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<Site>,
    /// Block, counted from 0; absent: the injection's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Of `head_out`: which head; absent: the injection's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<usize>,
    /// Which positions of its prompt; absent: those of the injection's window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
}

/// A layer, a list of layers, a range of them, or all; of heads likewise.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One layer.
    One(usize),
    /// Several.
    Many(Vec<usize>),
    /// From the first to the last.
    Range(LayerRange),
    /// `"all"`.
    All(All),
}

/// Blocks that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRange {
    /// The first.
    pub first: usize,
    /// The last, in the range.
    pub last: usize,
}

/// What a row must show at a site.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// The direction that is looked for.
    pub vector: VectorRef,
    /// Block, counted from 0.
    pub layer: usize,
    /// Which point of the block.
    #[serde(default)]
    pub site: Site,
    /// What is compared.
    #[serde(default)]
    pub measure: Measure,
    /// It must be greater than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above: Option<f32>,
    /// It must be less than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<f32>,
    /// Once met, it holds for the rest of the sequence.
    #[serde(default, skip_serializing_if = "is_default")]
    pub latch: bool,
    /// As of an injection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector_layer: Option<usize>,
}

/// What a condition compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// h·v / (‖h‖ ‖v‖).
    #[default]
    Cosine,
    /// h·v / ‖v‖.
    Coordinate,
}

/// Points of a block that can be injected at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Site {
    /// The block's input (`resid_pre.0` is the embedding).
    ResidPre,
    /// After attention is added.
    ResidMid,
    /// The block's output; `resid_post.L` is `resid_pre.L+1`.
    #[default]
    ResidPost,
    /// What attention adds to the stream.
    AttnOut,
    /// What the MLP adds to the stream.
    MlpOut,
    /// What a head of attention gives to the output projection.
    HeadOut,
}

impl Site {
    /// Whether it is the stream, not what is added to it or made on the way.
    pub fn is_stream(self) -> bool {
        matches!(self, Self::ResidPre | Self::ResidMid | Self::ResidPost)
    }
}

/// What is done to a row h with a vector v.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Op {
    /// h += change.
    #[default]
    Add,
    /// h −= (h·v̂) v̂.
    ProjectOut,
    /// The coordinate h·v̂ becomes s.
    Set,
    /// The coordinate h·v̂ is moved to the nearest value from `min` to `max`.
    Clamp,
    /// h = s·v.
    Replace,
    /// h = s·h.
    Scale,
}

impl Op {
    /// The name used in requests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::ProjectOut => "project_out",
            Self::Set => "set",
            Self::Clamp => "clamp",
            Self::Replace => "replace",
            Self::Scale => "scale",
        }
    }
}

/// The unit of a strength s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StrengthMode {
    /// h += s·v.
    #[default]
    Raw,
    /// h += s·v/‖v‖.
    Unit,
    /// h += s·N·v/‖v‖, N the mean clean ‖h‖ at the site over the window's prompt positions,
    /// position 0 excluded.
    Reference,
    /// h += s·‖h‖·v/‖v‖, each row's own norm.
    Row,
}

/// The word `"all"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum All {
    /// Every one.
    All,
}

/// A continuation to be scored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Continuation {
    /// Text, tokenised on its own without special tokens.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// How tokens are drawn. The model's own generation defaults are never applied.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the most likely tokens up to this total probability; 1: all.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0: all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0: all.
    pub min_p: f32,
    /// The trial's seed.
    pub seed: u64,
    /// The most tokens generated.
    pub max_tokens: u32,
    /// Generate on past the model's stop tokens.
    pub ignore_eos: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            max_tokens: 100,
            ignore_eos: false,
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(n: &u32) -> bool {
    *n == 1
}
