//! Text to token ids and back: a `tokenizer.json`, or the vocabulary inside a GGUF file.

mod checks;
mod gguf;
mod rules;
mod sentencepiece;

use std::{
    ops::Range,
    panic::{self, AssertUnwindSafe},
};

use serde_json::Value;

pub(super) use self::gguf::special_token;
use crate::error::{Error, Result};

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens are written in the 256 printable stand-ins for bytes.
    byte_level: bool,
    /// Or in characters, with ▁ for a blank, and characters without a token as `<0xE2>`.
    byte_fallback: bool,
}

/// A text's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Their ids.
    pub tokens: Vec<u32>,
    /// The byte range of the text that each stands for, blanks included: together they cover it.
    /// Tokens that share a character each have all of it; one that stands for no text (a BOS added,
    /// a blank put before the text) has an empty range.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Spans are made to include blanks; ids are unaffected by that.
    pub(super) fn from_json(mut json: Value) -> Result<Self> {
        if let Some(post) = json.get_mut("post_processor") {
            keep_blanks(post);
        }
        // Files from before models had a type: merges are BPE's alone.
        if let Some(model) = json.get_mut("model").and_then(Value::as_object_mut)
            && model.get("merges").is_some_and(Value::is_array)
        {
            model.entry("type").or_insert_with(|| "BPE".into());
        }
        checks::check(&json)?;
        let decodes = |kind| json.get("decoder").is_some_and(|decoder| has_decoder(decoder, kind));
        let (byte_level, byte_fallback) = (decodes("ByteLevel"), decodes("ByteFallback"));
        let json = json.to_string();
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json))?
            .map_err(|error| Error::new(format!("not a tokenizer: {error}")))?;
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|error| Error::new(format!("tokenizer: {error}")))?;
        Ok(Self { inner, byte_level, byte_fallback })
    }

    /// The tokens of a text. `special`: with those that the tokenizer adds by itself, such as a
    /// BOS. Special tokens written out in the text are always recognised.
    ///
    /// # Errors
    ///
    /// The tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Encoding> {
        let encoding = guarded(|| self.inner.encode(text, special))?
            .map_err(|error| Error::new(format!("the text cannot be tokenised: {error}")))?;
        let tokens = encoding.get_ids().to_vec();
        let mut spans: Vec<Range<usize>> =
            encoding.get_offsets().iter().map(|(from, to)| *from..*to).collect();
        if !self.byte_level {
            self.empty_prefixes(&tokens, &mut spans);
        }
        cover(text.len(), &mut spans);
        Ok(Encoding { tokens, spans })
    }

    /// A ▁ that the tokenizer put before a text has its first character's span, as the token after
    /// it: it stands for nothing.
    fn empty_prefixes(&self, tokens: &[u32], spans: &mut [Range<usize>]) {
        for at in 1..spans.len() {
            let (start, next) = (spans[at - 1].start, &spans[at]);
            let shared = start == next.start && !next.is_empty();
            if shared && self.inner.id_to_token(tokens[at - 1]).is_some_and(|name| name == "▁") {
                spans[at - 1].end = start;
            }
        }
    }

    /// The text of tokens, without special ones; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        // Fails for no decoder of a byte-level tokenizer.
        let decoded = guarded(|| self.inner.decode(tokens, true).ok()).ok().flatten();
        decoded.unwrap_or_else(|| tokens.iter().map(|token| self.piece(*token)).collect())
    }

    /// One token for display: special ones by name, parts of characters as `\xf0\x9f`.
    pub fn piece(&self, token: u32) -> String {
        let Some(name) = self.inner.id_to_token(token) else { return format!("<{token}>") };
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&token);
        if added.is_some_and(|added| added.special || self.byte_level) {
            return name;
        }
        if !self.byte_level {
            let byte = Some(&name).filter(|_| self.byte_fallback).and_then(|name| named_byte(name));
            return byte.map_or_else(|| name.replace('▁', " "), |byte| shown(vec![byte]));
        }
        name.chars().map(byte_of).collect::<Option<Vec<u8>>>().map_or(name, shown)
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// What the library does, where `checks` may have missed what it does not survive: a panic, whose
/// message is printed, becomes an error.
fn guarded<T>(job: impl FnOnce() -> T) -> Result<T> {
    panic::catch_unwind(AssertUnwindSafe(job)).map_err(|_| {
        Error::new("the tokenizer library failed")
            .hint("tokenizer.json is damaged, or of a kind that is not supported")
    })
}

/// Post-processors that trim spans to the visible characters are told not to.
fn keep_blanks(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, field) in fields {
                if key == "trim_offsets" {
                    *field = Value::Bool(false);
                } else {
                    keep_blanks(field);
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(keep_blanks),
        _ => {}
    }
}

/// Whether a decoder, or one of a sequence of decoders, is of a kind.
fn has_decoder(decoder: &Value, kind: &str) -> bool {
    let nested = decoder.get("decoders").and_then(Value::as_array);
    decoder.get("type").is_some_and(|own| own == kind)
        || nested.is_some_and(|decoders| decoders.iter().any(|one| has_decoder(one, kind)))
}

/// Text that a normalizer dropped belongs to the token after it, at the end to the last one.
fn cover(length: usize, spans: &mut [Range<usize>]) {
    let mut covered = 0;
    for span in spans.iter_mut().filter(|span| span.start < span.end) {
        span.start = span.start.min(covered);
        covered = covered.max(span.end);
    }
    if let Some(last) = spans.iter_mut().rev().find(|span| span.start < span.end) {
        last.end = last.end.max(length);
    }
}

/// The byte that a token such as `<0xE2>` is named after.
fn named_byte(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| hex)
}

/// A part of a character as `\xe2`.
fn shown(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| error.as_bytes().escape_ascii().to_string())
}

/// The byte that a character of a byte-level token stands for. Printable Latin-1 stands for itself,
/// the other 68 bytes, in order, are the characters from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let n = c as u32;
    let byte = match n {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => n,
        0x100..=0x120 => n - 0x100,
        0x121..=0x142 => n - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    Some(byte as u8)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn byte_level() -> Value {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": true
        })
    }

    /// A byte-level tokenizer with the 256 bytes, a few merges and `ChatML`'s special tokens.
    pub fn small() -> Tokenizer {
        let mut tokens: Vec<String> =
            ["<|bos|>", "<|im_start|>", "<|im_end|>"].map(Into::into).into();
        tokens.extend(
            (0..0x144)
                .filter_map(char::from_u32)
                .filter(|c| byte_of(*c).is_some())
                .map(String::from),
        );
        let merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ã", "©")];
        tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        let vocab: Map<String, Value> =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
        let added: Vec<Value> = (0..3)
            .map(|id| {
                json!({
                    "id": id, "content": tokens[id], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true
                })
            })
            .collect();
        Tokenizer::from_json(json!({
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": byte_level(),
            "post_processor": {
                "type": "Sequence", "processors": [
                    {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
                    {
                        "type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}}
                    }
                ]
            },
            "decoder": byte_level(),
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}
        }))
        .unwrap()
    }

    #[test]
    fn a_model_without_a_type_but_with_merges_is_bpe() {
        let model = json!({"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
        let tokenizer = Tokenizer::from_json(json!({"version": "1.0", "model": model})).unwrap();
        assert_eq!(tokenizer.encode("ab", false).unwrap().tokens, [2]);
    }

    #[test]
    fn spans_cover_every_byte_blanks_included() {
        let tokenizer = small();
        for text in
            ["a the  b", " lead\n\n\ttrail  ", "<|im_start|>user\nthe<|im_end|>\n", "naïve é"]
        {
            let encoding = tokenizer.encode(text, false).unwrap();
            let mut at = 0;
            for span in &encoding.spans {
                assert!(span.start <= at && span.end > span.start, "{text:?} {span:?} at {at}");
                at = span.end;
            }
            assert_eq!(at, text.len(), "{text:?}");
        }
    }

    #[test]
    fn tokens_that_share_a_character_each_have_all_of_it() {
        let encoding = small().encode("a😀é", false).unwrap();
        assert_eq!(encoding.spans, [0..1, 1..5, 1..5, 1..5, 1..5, 5..7]);
    }

    #[test]
    fn specials_are_added_only_when_asked_for() {
        let tokenizer = small();
        let with = tokenizer.encode("the", true).unwrap();
        let without = tokenizer.encode("the", false).unwrap();
        assert_eq!(with.tokens[0], 0);
        assert_eq!(with.tokens[1..], without.tokens);
        assert_eq!(with.spans[0], 0..0);
    }

    #[test]
    fn decodes_without_specials_and_names_pieces() {
        let tokenizer = small();
        let tokens = tokenizer.encode("<|im_start|> the é😀", false).unwrap().tokens;
        assert_eq!(tokenizer.decode(&tokens), " the é😀");
        let pieces: Vec<String> = tokens.iter().map(|token| tokenizer.piece(*token)).collect();
        let want = ["<|im_start|>", " the", " ", "é", r"\xf0", r"\x9f", r"\x98", r"\x80"];
        assert_eq!(pieces, want);
        assert_eq!(tokenizer.piece(9999), "<9999>");
    }

    #[test]
    fn every_byte_has_its_own_character() {
        let bytes: Vec<u8> = (0..=0x143).filter_map(char::from_u32).filter_map(byte_of).collect();
        let mut sorted = bytes.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..=255).collect::<Vec<u8>>());
        assert_eq!(
            (byte_of('Ġ'), byte_of('Ċ'), byte_of('a')),
            (Some(b' '), Some(b'\n'), Some(b'a'))
        );
    }

    /// Each token for display, with the text that it stands for.
    fn shown_spans(tokenizer: &Tokenizer, text: &str) -> Vec<(String, String)> {
        let encoding = tokenizer.encode(text, false).unwrap();
        let piece = |(token, span): (&u32, &Range<usize>)| {
            (tokenizer.piece(*token), text[span.clone()].to_owned())
        };
        encoding.tokens.iter().zip(&encoding.spans).map(piece).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn a_normalizer_s_blank_stands_for_nothing_and_bytes_for_their_character() {
        // As Llama 2's: every stretch between special tokens gets a blank.
        let mut vocab: Map<String, Value> = ["<unk>", "<s>", "▁", "a", "b", "▁a", "▁▁"]
            .iter()
            .zip(0..)
            .map(|(t, id)| ((*t).into(), id.into()))
            .collect();
        for byte in 0..=255u8 {
            vocab.insert(format!("<0x{byte:02X}>"), (7 + u32::from(byte)).into());
        }
        let tokenizer = Tokenizer::from_json(json!({
            "version": "1.0",
            "added_tokens": [{
                "id": 1, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true
            }],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            ]},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}
            ]},
            "model": {
                "type": "BPE", "vocab": vocab, "merges": [["▁", "▁"], ["▁", "a"]],
                "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true
            }
        }))
        .unwrap();
        let text = "é a<s>b<s> a";
        assert_eq!(
            shown_spans(&tokenizer, text),
            pairs(&[
                (" ", ""),
                (r"\xc3", "é"),
                (r"\xa9", "é"),
                (" a", " a"),
                ("<s>", "<s>"),
                (" ", ""),
                ("b", "b"),
                ("<s>", "<s>"),
                ("  ", " "),
                ("a", "a")
            ])
        );
        let tokens = tokenizer.encode(text, false).unwrap().tokens;
        assert_eq!(tokenizer.decode(&tokens), "é a b  a");
        assert_eq!(tokenizer.decode(&tokens[1..2]), "\u{fffd}");
    }

    #[test]
    fn unigram_tokenizers_work_and_dropped_text_has_a_token() {
        let vocab =
            [("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", -3.0), ("▁ab", -1.5), ("c", -4.0)];
        let tokenizer = Tokenizer::from_json(json!({
            "version": "1.0",
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFKC"}, {"type": "Strip", "strip_left": true, "strip_right": true},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
            ]},
            "pre_tokenizer": {
                "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true
            },
            "decoder": {
                "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true
            },
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}
        }))
        .unwrap();
        assert_eq!(
            shown_spans(&tokenizer, "  ab   Ω\u{ff43} "),
            pairs(&[(" ab", "  ab"), (" ", "   "), ("<unk>", "Ω"), ("c", "\u{ff43} ")])
        );
        let tokens = tokenizer.encode("ab b", false).unwrap().tokens;
        assert_eq!(tokenizer.decode(&tokens), "ab b");
    }

    #[test]
    fn spans_are_stretched_over_dropped_text() {
        let mut spans = [0..0, 2..3, 3..3, 4..6, 4..6];
        cover(9, &mut spans);
        assert_eq!(spans, [0..0, 0..3, 3..3, 3..6, 4..9]);
    }

    #[test]
    fn byte_tokens_have_two_digits() {
        assert_eq!(named_byte("<0xE2>"), Some(0xe2));
        for name in ["<0xE>", "<0x+1>", "<0xE2", "0xE2", "<0x0E2>"] {
            assert_eq!(named_byte(name), None, "{name}");
        }
    }
}
