//! Text to token ids and back: a `tokenizer.json`, or the vocabulary inside a GGUF file.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::gguf::Gguf;
use crate::error::{Error, Result};

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Tokens are written in the 256 printable stand-ins for bytes.
    byte_level: bool,
}

/// A text's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Their ids.
    pub tokens: Vec<u32>,
    /// The byte range of the text that each stands for, blanks included; tokens that share a
    /// character each have all of it; one that stands for no text (a BOS added) has an empty range.
    pub spans: Vec<Range<usize>>,
}

/// How Llama 3 and Qwen 2 cut text before merging.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// ggml's token types.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

impl Tokenizer {
    /// Reads a `tokenizer.json`. Spans are made to include blanks; ids are unaffected by that.
    pub(super) fn from_json(mut json: Value) -> Result<Self> {
        if let Some(post) = json.get_mut("post_processor") {
            keep_blanks(post);
        }
        let byte_level = json.get("decoder").is_some_and(is_byte_level);
        let mut inner = tokenizers::Tokenizer::from_bytes(json.to_string())
            .map_err(|error| Error::new(format!("not a tokenizer: {error}")))?;
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|error| Error::new(format!("tokenizer: {error}")))?;
        Ok(Self { inner, byte_level })
    }

    /// Builds the tokenizer of a GGUF file; the inner error says why there is none.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<std::result::Result<Self, String>> {
        let Some(model) = gguf.text("tokenizer.ggml.model")? else {
            return Ok(Err("the GGUF file has no vocabulary".into()));
        };
        if model != "gpt2" {
            return Ok(Err(format!(
                "its GGUF tokenizer is of kind `{model}`; only `gpt2` (byte-level BPE) can be used"
            )));
        }
        let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("none");
        let Some(pre_tokenizer) = pre_tokenizer(pre) else {
            return Ok(Err(format!(
                "its GGUF tokenizer splits text by the rules `{pre}`; known are smollm, gpt-2, \
                 llama-bpe, llama3 and qwen2"
            )));
        };
        let tokens = listed(gguf.texts("tokenizer.ggml.tokens")?, "tokenizer.ggml.tokens")?;
        let merges = listed(gguf.texts("tokenizer.ggml.merges")?, "tokenizer.ggml.merges")?;
        let normalizer = (pre == "qwen2").then(|| json!({"type": "NFC"}));
        let llama3 = matches!(pre, "llama-bpe" | "llama3");
        Self::from_json(json!({
            "version": "1.0",
            "added_tokens": added_tokens(gguf, &tokens)?,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": post_processor(gguf, &tokens, llama3)?,
            "decoder": byte_level(false),
            "model": {
                "type": "BPE",
                "vocab": vocabulary(&tokens)?,
                "merges": merge_pairs(&merges)?,
                "ignore_merges": llama3,
            },
        }))
        .map(Ok)
    }

    /// The tokens of a text. `special`: with those that the tokenizer adds by itself, such as a
    /// BOS. Special tokens written out in the text are always recognised.
    ///
    /// # Errors
    ///
    /// The tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Encoding> {
        let encoding = self
            .inner
            .encode(text, special)
            .map_err(|error| Error::new(format!("the text cannot be tokenised: {error}")))?;
        let spans = encoding.get_offsets().iter().map(|(from, to)| *from..*to).collect();
        Ok(Encoding { tokens: encoding.get_ids().to_vec(), spans })
    }

    /// The text of tokens, without special ones; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> String {
        // Fails for no decoder of a byte-level tokenizer.
        self.inner
            .decode(tokens, true)
            .unwrap_or_else(|_| tokens.iter().map(|token| self.piece(*token)).collect())
    }

    /// One token for display: special ones by name, parts of characters as `\xf0\x9f`.
    pub fn piece(&self, token: u32) -> String {
        let Some(name) = self.inner.id_to_token(token) else { return format!("<{token}>") };
        if self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&token) {
            return name;
        }
        if !self.byte_level {
            return name.replace('▁', " ");
        }
        let Some(bytes) = name.chars().map(byte_of).collect::<Option<Vec<u8>>>() else {
            return name;
        };
        String::from_utf8(bytes).unwrap_or_else(|error| error.as_bytes().escape_ascii().to_string())
    }

    /// Entries of the vocabulary, added tokens included.
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
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

/// Whether a decoder, or one of a sequence of decoders, is the byte-level one.
fn is_byte_level(decoder: &Value) -> bool {
    let nested = decoder.get("decoders").and_then(Value::as_array);
    decoder.get("type").is_some_and(|kind| kind == "ByteLevel")
        || nested.is_some_and(|decoders| decoders.iter().any(is_byte_level))
}

fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": use_regex
    })
}

/// The pre-tokenizer that llama.cpp's name stands for.
fn pre_tokenizer(name: &str) -> Option<Value> {
    let sequence =
        |first: Value, second: Value| json!({"type": "Sequence", "pretokenizers": [first, second]});
    let split = |pattern: &str| {
        json!({
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": false
        })
    };
    Some(match name {
        "gpt-2" => byte_level(true),
        "smollm" => {
            sequence(json!({"type": "Digits", "individual_digits": true}), byte_level(true))
        }
        "llama-bpe" | "llama3" => sequence(split(LLAMA3_SPLIT), byte_level(false)),
        "qwen2" => sequence(split(QWEN2_SPLIT), byte_level(false)),
        _ => return None,
    })
}

fn listed<T>(list: Option<Vec<T>>, key: &str) -> Result<Vec<T>> {
    list.ok_or_else(|| Error::new("the GGUF vocabulary is incomplete").at(key).got("no such key"))
}

/// Token to id.
fn vocabulary(tokens: &[&str]) -> Result<Value> {
    let mut vocab = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocab.insert((*token).to_owned(), id.into()) {
            return Err(Error::new("a token stands twice in the GGUF vocabulary")
                .at("tokenizer.ggml.tokens")
                .got(format!("{token:?} at {first} and {id}")));
        }
    }
    Ok(Value::Object(vocab))
}

/// `"a b"` to `["a", "b"]`.
fn merge_pairs(merges: &[&str]) -> Result<Vec<Value>> {
    let pair = |merge: &&str| {
        let (left, right) =
            merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty())?;
        Some(json!([left, right]))
    };
    let bad = |merge: &&str| {
        Error::new("bad merge in the GGUF vocabulary")
            .at("tokenizer.ggml.merges")
            .expected("two tokens with a blank between them")
            .got(format!("{merge:?}"))
    };
    merges.iter().map(|merge| pair(merge).ok_or_else(|| bad(merge))).collect()
}

/// Control tokens are special; user-defined ones are found in text before it is split, but are text.
fn added_tokens(gguf: &Gguf, tokens: &[&str]) -> Result<Vec<Value>> {
    let key = "tokenizer.ggml.token_type";
    let types = listed(gguf.unsigneds(key)?, key)?;
    if types.len() != tokens.len() {
        return Err(Error::new("the GGUF vocabulary contradicts itself")
            .at(key)
            .expected(format!("{} types, one a token", tokens.len()))
            .got(types.len()));
    }
    let added = types.iter().zip(tokens).enumerate();
    let added = added.filter(|(_, (kind, _))| matches!(**kind, CONTROL | USER_DEFINED));
    Ok(added
        .map(|(id, (kind, token))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": *kind == CONTROL
            })
        })
        .collect())
}

/// Adds BOS and EOS where the file says so; Llama 3's vocabulary has a BOS by default.
fn post_processor(gguf: &Gguf, tokens: &[&str], llama3: bool) -> Result<Value> {
    let wanted = [
        ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", llama3),
        ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_eos_token", false),
    ];
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut special = Map::new();
    for (index, (id_key, add_key, default)) in wanted.into_iter().enumerate() {
        if !gguf.boolean(add_key)?.unwrap_or(default) {
            continue;
        }
        let Some((id, token)) = special_token(gguf, id_key, tokens)? else {
            return Err(Error::new("the GGUF vocabulary is incomplete")
                .at(id_key)
                .got("no such key"));
        };
        special.insert(token.into(), json!({"id": token, "ids": [id], "tokens": [token]}));
        let item = json!({"SpecialToken": {"id": token, "type_id": 0}});
        single.insert(if index == 0 { 0 } else { single.len() }, item);
    }
    let mut pair = single.clone();
    pair.push(json!({"Sequence": {"id": "B", "type_id": 1}}));
    Ok(json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special
    }))
}

/// The id under a metadata key, and its token.
pub(super) fn special_token<'a>(
    gguf: &Gguf,
    key: &str,
    tokens: &[&'a str],
) -> Result<Option<(u64, &'a str)>> {
    let Some(id) = gguf.unsigned(key)? else { return Ok(None) };
    let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
    token.map(|token| Some((id, *token))).ok_or_else(|| {
        Error::new("a special token is not in the vocabulary")
            .at(key)
            .expected(format!("an id below {}", tokens.len()))
            .got(id)
    })
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
    use super::*;

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
            "pre_tokenizer": byte_level(true),
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
            "decoder": byte_level(true),
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}
        }))
        .unwrap()
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

    #[test]
    fn text_is_cut_by_the_rules_of_its_name() {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let text = "I'm 1234\n\n  x";
        let cases: [(&str, &[&str]); 4] = [
            ("gpt-2", &["I", "'m", " 1234", "\n\n ", " x"]),
            ("smollm", &["I", "'m", " ", "1", "2", "3", "4", "\n\n ", " x"]),
            ("llama-bpe", &["I", "'m", " ", "123", "4", "\n\n", " ", " x"]),
            ("qwen2", &["I", "'m", " ", "1", "2", "3", "4", "\n\n", " ", " x"]),
        ];
        for (name, want) in cases {
            let json = pre_tokenizer(name).unwrap();
            let cut: tokenizers::PreTokenizerWrapper = serde_json::from_value(json).unwrap();
            let mut pieces = PreTokenizedString::from(text);
            cut.pre_tokenize(&mut pieces).unwrap();
            let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let got: Vec<&str> =
                splits.iter().map(|(_, (from, to), _)| &text[*from..*to]).collect();
            assert_eq!(got, want, "{name}");
        }
        assert!(pre_tokenizer("viking").is_none());
    }
}
