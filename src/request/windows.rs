//! Tokens of a sequence, and positions in a prompt.

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

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
