//! A rendered prompt, and positions in it.

use std::ops::Range;

use serde::Serialize;

use super::tokenizer::Encoding;
use crate::{
    error::{Context, Error, Result},
    request::{
        self, Marker, NamedPosition, NamedWindow, Position, RangeWindow, RoleWindow, Span, Turn,
        Window, Windows,
    },
};

/// A prompt as the model sees it.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// The rendered text; empty for a prompt of token ids.
    pub text: String,
    /// Its tokens, at least one.
    pub tokens: Vec<u32>,
    /// Each token for display.
    pub pieces: Vec<String>,
    /// The byte range of `text` that each token stands for; none for a prompt of token ids.
    spans: Vec<Range<usize>>,
    /// The chat's turns; a prefill is one of the assistant's.
    turns: Vec<PlacedTurn>,
}

/// A turn of the chat as rendered.
#[derive(Clone, Debug)]
pub(super) struct PlacedTurn {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Where its content stands in the text; `None` where that cannot be told.
    pub range: Option<Range<usize>>,
}

impl Prompt {
    /// A prompt of text; `pieces` as long as the encoding.
    pub(super) fn new(
        text: String,
        encoding: Encoding,
        pieces: Vec<String>,
        turns: Vec<PlacedTurn>,
    ) -> Self {
        Self { text, tokens: encoding.tokens, pieces, spans: encoding.spans, turns }
    }

    /// A prompt of token ids.
    pub(super) fn of_tokens(tokens: Vec<u32>, pieces: Vec<String>) -> Self {
        Self { tokens, pieces, ..Self::default() }
    }

    /// The token index of a position; from `tokens.len()` on it is a generated token's.
    ///
    /// # Errors
    ///
    /// An index out of range; a text that is not there, or several times without `nth`; a turn that
    /// is not there or cannot be located.
    pub fn position(&self, position: &Position) -> Result<usize> {
        let n = self.tokens.len();
        match position {
            Position::Named(NamedPosition::PromptEnd) => Ok(n),
            Position::Index(index) => from_end(*index, usize::MAX, n).ok_or_else(|| {
                Error::new("position before the prompt")
                    .expected(format!("-{n} or more (the prompt has {n} tokens)"))
                    .got(index)
            }),
            Position::Marker(Marker::StartOf(span)) => Ok(self.tokens_of(span)?.start),
            Position::Marker(Marker::EndOf(span)) => Ok(self.tokens_of(span)?.end),
            Position::Marker(Marker::Generated(index)) => Ok(n.saturating_add(*index)),
        }
    }

    /// The windows of an injection, in order; without any the whole sequence.
    ///
    /// # Errors
    ///
    /// Those of [`Self::position`]; a window that is empty or reversed; windows that overlap; `from` or
    /// `to` beside `window`.
    pub fn windows(&self, injection: &request::Injection) -> Result<Vec<TokenWindow>> {
        let Some(windows) = &injection.window else {
            return Ok(vec![self.range(injection.from.as_ref(), injection.to.as_ref())?]);
        };
        if injection.from.is_some() || injection.to.is_some() {
            return Err(
                Error::new("a window in two ways").expected("either `window`, or `from` and `to`")
            );
        }
        let (windows, is_list) = match windows {
            Windows::One(window) => (std::slice::from_ref(window), false),
            Windows::Many(windows) => (windows.as_slice(), true),
        };
        let mut found = Vec::new();
        for (i, window) in windows.iter().enumerate() {
            let at = || if is_list { format!("window[{i}]") } else { "window".into() };
            found.extend(self.window(window).at(at)?);
        }
        found.sort_by_key(|window| window.from);
        let overlap = |pair: &&[TokenWindow]| pair[0].to.is_none_or(|to| to > pair[1].from);
        if let Some([one, other]) = found.windows(2).find(overlap) {
            return Err(Error::new("windows that overlap: an injection would act twice")
                .at("window")
                .expected("windows without a token in common")
                .got(format!("{one} and {other}")));
        }
        match found.is_empty() {
            true => Err(Error::new("no windows").at("window").expected("at least one")),
            false => Ok(found),
        }
    }

    /// The windows that one stands for, as in [`Self::windows`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn window(&self, window: &Window) -> Result<Vec<TokenWindow>> {
        let n = self.tokens.len();
        let one = |from, to| Ok(vec![TokenWindow { from, to, every: 1 }]);
        match window {
            Window::Named(NamedWindow::All) => one(0, None),
            Window::Named(NamedWindow::Prompt) => one(0, Some(n)),
            Window::Named(NamedWindow::Generated) => one(n, None),
            Window::Named(NamedWindow::Last) => one(n - 1, Some(n)),
            Window::Role(RoleWindow { role }) => {
                let turns = self.turns.iter().enumerate().filter(|(_, turn)| turn.role == *role);
                let turns: Vec<i64> = turns.map(|(index, _)| index as i64).collect();
                if turns.is_empty() {
                    let roles: Vec<&str> = self.turns.iter().map(|t| t.role.as_str()).collect();
                    return Err(Error::new("no turn of this role")
                        .at("role")
                        .expected(format!("one of: {}", roles.join(", ")))
                        .got(role));
                }
                turns.into_iter().map(|index| self.turn_tokens(&Turn::Index(index))).collect()
            }
            Window::Range(range) => {
                let RangeWindow { from, to, at, turn, every } = &**range;
                let is_range = from.is_some() || to.is_some();
                if usize::from(is_range) + usize::from(at.is_some()) + usize::from(turn.is_some())
                    > 1
                    || every.is_some() && at.is_some()
                {
                    return Err(Error::new("a window in two ways").expected(
                        "`at` alone, or `turn`, or `from` and `to`; the last two with or without \
                         `every`",
                    ));
                }
                let every = every.unwrap_or(1);
                if every == 0 {
                    return Err(Error::new("every 0th token").at("every").expected("1 or more"));
                }
                let window = match (at, turn) {
                    (Some(at), _) => {
                        let position = self.position(at).at(|| "at".into())?;
                        TokenWindow { from: position, to: Some(position + 1), every: 1 }
                    }
                    (_, Some(turn)) => self.turn_tokens(turn)?,
                    _ => self.range(from.as_ref(), to.as_ref())?,
                };
                Ok(vec![TokenWindow { every, ..window }])
            }
        }
    }

    fn turn_tokens(&self, turn: &Turn) -> Result<TokenWindow> {
        let tokens = self.overlapping(&self.turn(turn)?).ok_or_else(|| {
            Error::new("no token stands for this turn").at("turn").got(format!("{turn:?}"))
        })?;
        Ok(TokenWindow { from: tokens.start, to: Some(tokens.end), every: 1 })
    }

    /// From 0 where `from` is absent, through every generated token where `to` is. A window from the
    /// prompt's end touches generated tokens only.
    ///
    /// # Errors
    ///
    /// Those of [`Self::position`]; a window that is empty or reversed.
    pub fn range(&self, from: Option<&Position>, to: Option<&Position>) -> Result<TokenWindow> {
        let at = |name: &'static str| move |error: Error| error.at(name);
        let start = from.map_or(Ok(0), |from| self.position(from)).map_err(at("from"))?;
        let end = to.map(|to| self.position(to)).transpose().map_err(at("to"))?;
        match end {
            Some(end) if end <= start => {
                Err(Error::new(if end == start { "an empty window" } else { "a reversed window" })
                    .expected("from < to")
                    .got(format!("{start}..{end} of the prompt's {} tokens", self.tokens.len()))
                    .hint("an absent `to` means: through every generated token"))
            }
            to => Ok(TokenWindow { from: start, to, every: 1 }),
        }
    }

    fn overlapping(&self, bytes: &Range<usize>) -> Option<Range<usize>> {
        let overlaps = |token: &Range<usize>| token.start < bytes.end && token.end > bytes.start;
        let first = self.spans.iter().position(overlaps)?;
        Some(first..self.spans.iter().rposition(overlaps)? + 1)
    }

    /// The tokens that overlap a text.
    fn tokens_of(&self, span: &Span) -> Result<Range<usize>> {
        self.overlapping(&self.bytes_of(span)?).ok_or_else(|| {
            Error::new("no token stands for this text").at("text").got(format!("{:?}", span.text))
        })
    }

    /// Where a text stands in the rendered one.
    fn bytes_of(&self, span: &Span) -> Result<Range<usize>> {
        if self.spans.is_empty() {
            return Err(Error::new("a prompt of token ids has no text to search")
                .at("text")
                .expected("a token index or prompt_end"));
        }
        if span.text.is_empty() {
            return Err(Error::new("an empty text has no position").at("text"));
        }
        let within = match &span.turn {
            None => 0..self.text.len(),
            Some(turn) => self.turn(turn)?,
        };
        let place = if span.turn.is_some() { "the turn" } else { "the prompt" };
        let searched = &self.text[within.clone()];
        let found: Vec<usize> = searched.match_indices(&span.text).map(|(at, _)| at).collect();
        let nth = match (span.nth, found.len()) {
            (None, 1) => Some(0),
            (Some(nth), _) => nth.checked_sub(1),
            (None, _) => None,
        };
        if let Some(at) = nth.and_then(|nth| found.get(nth)) {
            let start = within.start + at;
            return Ok(start..start + span.text.len());
        }
        let error = Error::new(match (found.len(), span.nth) {
            (0, _) => format!("the text is not in {place}"),
            (n, Some(_)) => format!("the text stands only {n} times in {place}"),
            (n, None) => format!("the text stands {n} times in {place}"),
        });
        let wanted = match span.nth {
            Some(nth) => format!("{:?}, nth {nth} (counted from 1)", span.text),
            None => format!("{:?}, once", span.text),
        };
        let error = error.at("text").expected(wanted).got(shortened(searched));
        Err(if found.is_empty() { error } else { error.hint("choose one with `nth`, from 1") })
    }

    /// Where a turn's content stands in the text.
    fn turn(&self, turn: &Turn) -> Result<Range<usize>> {
        if self.turns.is_empty() {
            return Err(Error::new("only a chat has turns").at("turn").hint("leave `turn` out"));
        }
        let index = match turn {
            Turn::Index(index) => from_end(*index, self.turns.len(), self.turns.len()),
            Turn::Role(name) => self.named_turn(name)?,
        };
        let index = index.ok_or_else(|| {
            let roles: Vec<&str> = self.turns.iter().map(|turn| turn.role.as_str()).collect();
            Error::new("no such turn")
                .at("turn")
                .expected(format!("one of the {} turns: {}", roles.len(), roles.join(", ")))
                .got(match turn {
                    Turn::Index(index) => index.to_string(),
                    Turn::Role(name) => name.clone(),
                })
        })?;
        self.turns[index].range.clone().ok_or_else(|| {
            Error::new("the turn cannot be located: the chat template changes its text")
                .at("turn")
                .got(format!("turn {index}, {}", self.turns[index].role))
                .hint("leave `turn` out, with a text that stands once in the prompt")
        })
    }

    /// The index of `role.first`, `role.last` or `role.N`.
    fn named_turn(&self, name: &str) -> Result<Option<usize>> {
        let malformed = || {
            Error::new("not a turn")
                .at("turn")
                .expected("an index, or `user.first`, `assistant.last`, `user.2` and the like")
                .got(format!("{name:?}"))
        };
        let (role, which) = name.split_once('.').ok_or_else(malformed)?;
        let mut of_role = (0..self.turns.len()).filter(|index| self.turns[*index].role == role);
        Ok(match which {
            "first" => of_role.next(),
            "last" => of_role.next_back(),
            number => {
                let number: usize = number.parse().map_err(|_| malformed())?;
                of_role.nth(number.checked_sub(1).ok_or_else(malformed)?)
            }
        })
    }
}

/// Tokens that an injection acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TokenWindow {
    /// The first.
    pub from: usize,
    /// The end (not in it); `None`: through every generated token.
    pub to: Option<usize>,
    /// Every so many of them, from the first on.
    #[serde(skip_serializing_if = "is_one")]
    pub every: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(every: &usize) -> bool {
    *every == 1
}

impl TokenWindow {
    /// Whether a token is in it.
    pub fn holds(&self, position: usize) -> bool {
        position >= self.from
            && self.to.is_none_or(|to| position < to)
            && (position - self.from).is_multiple_of(self.every)
    }
}

impl std::fmt::Display for TokenWindow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..", self.from)?;
        self.to.map_or(Ok(()), |to| write!(f, "{to}"))?;
        if self.every > 1 { write!(f, " every {}", self.every) } else { Ok(()) }
    }
}

/// An index below `limit`, negative ones counted from `end`.
fn from_end(index: i64, limit: usize, end: usize) -> Option<usize> {
    let index = if index < 0 { index.checked_add_unsigned(end as u64)? } else { index };
    usize::try_from(index).ok().filter(|index| *index < limit)
}

/// A text in quotes, its middle left out where it is long.
fn shortened(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= 160 {
        return format!("{text:?}");
    }
    let head: String = chars[..80].iter().collect();
    let tail: String = chars[chars.len() - 60..].iter().collect();
    format!("{head:?} … {tail:?} ({} characters)", chars.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token a word with the blank before it.
    fn prompt() -> Prompt {
        let text = "sys one two two three".to_owned();
        let spans = vec![0..0, 0..3, 3..7, 7..11, 11..15, 15..21];
        let turn = |role: &str, range| PlacedTurn { role: role.into(), range };
        let turns = vec![
            turn("system", Some(0..3)),
            turn("user", Some(4..11)),
            turn("user", Some(12..15)),
            turn("assistant", None),
        ];
        let encoding = Encoding { tokens: vec![9, 1, 2, 3, 4, 5], spans };
        Prompt::new(text, encoding, vec![String::new(); 6], turns)
    }

    fn position(json: &str) -> Result<usize> {
        prompt().position(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn indices_count_from_both_ends() {
        let cases = [("0", 0), ("6", 6), ("-1", 5), ("-6", 0), ("\"prompt_end\"", 6)];
        for (json, want) in cases {
            assert_eq!(position(json).unwrap(), want, "{json}");
        }
        assert_eq!(position("7").unwrap(), 7, "a generated token");
        for json in ["-7", "-9223372036854775808"] {
            let error = position(json).unwrap_err().to_string();
            assert!(error.contains("the prompt has 6 tokens"), "{error}");
        }
    }

    #[test]
    fn every_token_that_overlaps_the_text_counts() {
        let cases = [
            (r#"{"start_of": {"text": "one two"}}"#, 2),
            (r#"{"end_of": {"text": "one two"}}"#, 4),
            (r#"{"start_of": {"text": "e t"}}"#, 2),
            (r#"{"end_of": {"text": "e t"}}"#, 4),
            // The blank after the word belongs to the next token.
            (r#"{"end_of": {"text": "two ", "nth": 1}}"#, 5),
            (r#"{"end_of": {"text": "two ", "nth": 2}}"#, 6),
            (r#"{"start_of": {"text": "two", "nth": 2}}"#, 4),
            (r#"{"start_of": {"text": "two", "turn": "user.last"}}"#, 4),
            (r#"{"end_of": {"text": "two", "turn": "user.first"}}"#, 4),
            (r#"{"end_of": {"text": "two", "turn": "user.2"}}"#, 5),
            (r#"{"end_of": {"text": "two", "turn": -3}}"#, 4),
            (r#"{"start_of": {"text": "sys", "turn": 0}}"#, 1),
        ];
        for (json, want) in cases {
            assert_eq!(position(json).unwrap(), want, "{json}");
        }
    }

    #[test]
    fn missing_and_ambiguous_texts_are_errors_that_show_the_turn() {
        let cases = [
            (r#"{"start_of": {"text": "two"}}"#, "stands 2 times"),
            (r#"{"start_of": {"text": "two", "nth": 3}}"#, "only 2 times"),
            (r#"{"start_of": {"text": "two", "nth": 0}}"#, "counted from 1"),
            (r#"{"start_of": {"text": "four", "turn": 1}}"#, "\"one two\""),
            (r#"{"start_of": {"text": ""}}"#, "empty text"),
            (r#"{"start_of": {"text": "x", "turn": 4}}"#, "no such turn"),
            (r#"{"start_of": {"text": "x", "turn": "user.3"}}"#, "no such turn"),
            (r#"{"start_of": {"text": "x", "turn": "user.0"}}"#, "not a turn"),
            (r#"{"start_of": {"text": "x", "turn": "last"}}"#, "not a turn"),
            (r#"{"start_of": {"text": "three", "turn": "assistant.last"}}"#, "cannot be located"),
        ];
        for (json, cause) in cases {
            let error = position(json).unwrap_err().to_string();
            assert!(error.contains(cause), "{json}: {error}");
        }
        let tokens = Prompt::of_tokens(vec![1], vec!["a".into()]);
        let marker = serde_json::from_str(r#"{"start_of": {"text": "a"}}"#).unwrap();
        assert!(tokens.position(&marker).unwrap_err().to_string().contains("no text to search"));
    }

    #[test]
    fn windows_have_names_roles_turns_and_steps() {
        let prompt = prompt();
        let of = |window: &str| {
            let text =
                format!(r#"{{"vector": [1], "layer": 0, "strength": 1, "window": {window}}}"#);
            let found = prompt.windows(&serde_json::from_str(&text).unwrap())?;
            Ok(found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let good = [
            (r#""all""#, "0.."),
            (r#""prompt""#, "0..6"),
            (r#""generated""#, "6.."),
            (r#""last""#, "5..6"),
            (r#"{"at": -2}"#, "4..5"),
            (r#"{"at": {"generated": 2}}"#, "8..9"),
            (r#"{"from": 1, "every": 2}"#, "1.. every 2"),
            (r#"{"from": "prompt_end", "to": {"generated": 3}}"#, "6..9"),
            (r#"[{"at": 4}, {"from": 0, "to": 2}, "generated"]"#, "0..2 4..5 6.."),
        ];
        for (window, want) in good {
            assert_eq!(of(window).unwrap(), want, "{window}");
        }
        let bad = [
            (r#"["prompt", "last"]"#, "overlap"),
            (r#"["all", "generated"]"#, "overlap"),
            ("[]", "no windows"),
            (r#"{"at": 1, "from": 0}"#, "two ways"),
            (r#"{"at": 1, "every": 2}"#, "two ways"),
            (r#"{"from": 1, "every": 0}"#, "every 0th"),
            (r#"{"role": "nobody"}"#, "no turn of this role"),
            (r#"[{"at": 1}, {"at": -9}]"#, "window[1]"),
        ];
        for (window, want) in bad {
            let error: Error = of(window).unwrap_err();
            assert!(error.to_string().contains(want), "{window}: {error}");
        }
        let turn = |which| of(&format!(r#"{{"turn": "user.{which}"}}"#)).unwrap();
        let both = of(r#"{"role": "user"}"#).unwrap();
        assert_eq!(both, format!("{} {}", turn("first"), turn("last")));
    }

    #[test]
    fn windows_are_neither_empty_nor_reversed() {
        let at = |index| Position::Index(index);
        let end = Position::Named(NamedPosition::PromptEnd);
        let prompt = prompt();
        let range = |from: Option<&Position>, to: Option<&Position>| {
            prompt.range(from, to).map(|window| (window.from, window.to))
        };
        assert_eq!(range(None, None).unwrap(), (0, None));
        assert_eq!(range(Some(&at(2)), Some(&at(-1))).unwrap(), (2, Some(5)));
        assert_eq!(range(Some(&end), None).unwrap(), (6, None));
        assert_eq!(range(Some(&at(7)), Some(&at(9))).unwrap(), (7, Some(9)));
        let cases = [
            (Some(&end), Some(&end), "an empty window"),
            (Some(&at(3)), Some(&at(2)), "a reversed window"),
            (None, Some(&at(0)), "an empty window"),
            (Some(&at(-7)), None, "from"),
            (None, Some(&at(-7)), "to"),
        ];
        for (from, to, cause) in cases {
            let error = range(from, to).unwrap_err().to_string();
            assert!(error.contains(cause), "{error}");
        }
    }
}
