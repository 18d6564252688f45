//! The request types: one JSON object a line in files, and the same object in the library.
//!
//! Serde types only, strict (unknown fields are errors), with no logic beyond their defaults:
//! `engine::resolve` checks them against a model.

use std::collections::BTreeMap;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

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

/// One window or several.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Windows {
    /// Several, which have no token in common; each has a receipt of its own.
    Many(Vec<Window>),
    /// One.
    One(Window),
}

/// Tokens of a sequence.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Window {
    /// One of the words.
    Named(NamedWindow),
    /// Every turn of a role.
    Role(RoleWindow),
    /// Tokens one after the other, or every so many of them.
    #[serde(deserialize_with = "from_map")]
    Range(Box<RangeWindow>),
}

/// serde takes lists for structs too: [1, 2] would be a range, whatever was meant.
fn from_map<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Box<RangeWindow>, D::Error> {
    struct OfMap;
    impl<'de> Visitor<'de> for OfMap {
        type Value = Box<RangeWindow>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(
            self,
            map: A,
        ) -> std::result::Result<Self::Value, A::Error> {
            RangeWindow::deserialize(MapAccessDeserializer::new(map)).map(Box::new)
        }
    }
    deserializer.deserialize_map(OfMap)
}

/// Windows with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NamedWindow {
    /// Every token.
    All,
    /// The prompt.
    Prompt,
    /// What follows the prompt.
    Generated,
    /// The prompt's last token.
    Last,
}

/// `{"role": "user"}`: the text of every turn of a role, as rendered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RoleWindow {
    /// `system`, `user` or `assistant`.
    pub role: String,
}

/// `{"from": .., "to": .., "every": k}`, `{"at": ..}` or `{"turn": ..}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RangeWindow {
    /// The first; absent: the first of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Position>,
    /// The end (not in it); absent: through every generated token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Position>,
    /// A single position, instead of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Position>,
    /// A turn's text, instead of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<Turn>,
    /// Every so many of them, from the first on; absent: each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<usize>,
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

/// A position in the rendered prompt.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Position {
    /// A token index; negative: from the prompt's end.
    Index(i64),
    /// `"prompt_end"`: the prompt's length.
    Named(NamedPosition),
    /// A place in the text of a turn, or a token after the prompt.
    Marker(Marker),
}

/// Positions with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum NamedPosition {
    /// The prompt's length: the position of the first generated token.
    PromptEnd,
}

/// The first token of a span, the one after its last, or a generated one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Marker {
    /// The first token that overlaps the span.
    StartOf(Span),
    /// The token after the last one that overlaps it.
    EndOf(Span),
    /// The generated token with this index, from 0.
    Generated(usize),
}

/// A text in a turn as rendered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// The text itself.
    pub text: String,
    /// The turn it stands in; absent: anywhere in the rendered prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<Turn>,
    /// Which occurrence, from 1; absent: there must be only one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nth: Option<usize>,
}

/// A turn: an index (negative: from the end) or `"role.first"`, `"role.last"`, `"role.2"`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Turn {
    /// Counted over all messages, from 0; -1 is the last.
    Index(i64),
    /// Counted over one role's messages.
    Role(String),
}

/// Rows of a site to be copied out.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// What is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<CaptureSite>,
    /// Instead of `site` and `layers`: the point by a name of this or another program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
    /// Of which blocks; sites without a layer take none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Of which prompt positions.
    #[serde(default)]
    pub positions: Positions,
    /// What is handed out of the rows; absent: the rows themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduce: Option<Reduction>,
}

impl Capture {
    /// All prompt positions of a site, in every block where there is one in each.
    pub fn all(site: CaptureSite) -> Self {
        Self {
            site: Some(site),
            hook: None,
            layers: site.has_layer().then_some(Layers::All(All::All)),
            positions: Positions::default(),
            reduce: None,
        }
    }
}

/// What is made of captured rows.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reduction {
    /// Their mean, one row.
    Mean,
    /// ‖h‖ of each row.
    Norm,
    /// h·v / (‖h‖ ‖v‖) of each row with each vector.
    Cosine(Probes),
    /// h·v / ‖v‖ of each row with each vector.
    Coordinate(Probes),
    /// The logit lens: so many likeliest tokens of each row, taken for the stream after the last block, with
    /// their log-probabilities.
    Lens(usize),
}

/// Vectors that rows are compared with.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Probes {
    /// `FILE#NAME`, or all vectors of `FILE`.
    One(String),
    /// Several.
    Many(Vec<VectorRef>),
}

/// What can be copied out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CaptureSite {
    /// The block's input, after the injections there.
    ResidPre,
    /// After attention is added, and the injections there.
    ResidMid,
    /// The block's output, after the injections there.
    ResidPost,
    /// What attention adds to the stream.
    AttnOut,
    /// What the MLP adds to the stream.
    MlpOut,
    /// What the heads of attention give to the output projection, after the injections there.
    HeadOut,
    /// Queries after rope.
    Q,
    /// Keys after rope.
    K,
    /// Values.
    V,
    /// The last norm's output.
    FinalNorm,
    /// The next-token logits.
    Logits,
}

impl From<Site> for CaptureSite {
    fn from(site: Site) -> Self {
        match site {
            Site::ResidPre => Self::ResidPre,
            Site::ResidMid => Self::ResidMid,
            Site::ResidPost => Self::ResidPost,
            Site::AttnOut => Self::AttnOut,
            Site::MlpOut => Self::MlpOut,
            Site::HeadOut => Self::HeadOut,
        }
    }
}

impl CaptureSite {
    /// Whether there is one in every block.
    pub fn has_layer(self) -> bool {
        !matches!(self, Self::FinalNorm | Self::Logits)
    }

    /// The name used in requests and tensor names.
    pub fn name(self) -> &'static str {
        match self {
            Self::ResidPre => "resid_pre",
            Self::ResidMid => "resid_mid",
            Self::ResidPost => "resid_post",
            Self::AttnOut => "attn_out",
            Self::MlpOut => "mlp_out",
            Self::HeadOut => "head_out",
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::FinalNorm => "final_norm",
            Self::Logits => "logits",
        }
    }
}

/// A list of blocks or all of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Layers {
    /// These.
    List(Vec<usize>),
    /// `"all"`.
    All(All),
}

/// Prompt positions.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Positions {
    /// These; negative: from the prompt's end.
    List(Vec<i64>),
    /// `"all"` or `"last"`.
    Named(NamedPositions),
}

impl Default for Positions {
    fn default() -> Self {
        Self::Named(NamedPositions::All)
    }
}

/// Sets of positions with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum NamedPositions {
    /// Every prompt position.
    All,
    /// The prompt's last one.
    Last,
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
