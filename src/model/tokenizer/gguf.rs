//! The vocabulary inside a GGUF file, as a `tokenizer.json`.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::{Tokenizer, rules, sentencepiece};
use crate::{
    error::{Error, Result},
    model::gguf::Gguf,
};

/// Builds a `tokenizer.json`; the inner error says why this cannot be.
type Builder = fn(&Gguf) -> Result<std::result::Result<Value, String>>;

/// The values of `tokenizer.ggml.model` that can be used.
const KINDS: [(&str, &str, Builder); 2] = [
    ("gpt2", "byte-level BPE", byte_level),
    ("llama", "SentencePiece BPE", sentencepiece::tokenizer),
];

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// ggml's token types.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file; the inner error says why there is none.
    pub(in crate::model) fn from_gguf(gguf: &Gguf) -> Result<std::result::Result<Self, String>> {
        let Some(model) = gguf.text("tokenizer.ggml.model")? else {
            return Ok(Err("the GGUF file has no vocabulary".into()));
        };
        let Some((.., build)) = KINDS.iter().find(|(name, ..)| *name == model) else {
            let known = KINDS.map(|(name, what, _)| format!("{name} ({what})"));
            return Ok(Err(format!(
                "its GGUF tokenizer is of kind `{model}`; known are {}",
                known.join(" and ")
            )));
        };
        match build(gguf)? {
            Ok(json) => Self::from_json(json).map(Ok),
            Err(reason) => Ok(Err(reason)),
        }
    }
}

fn byte_level(gguf: &Gguf) -> Result<std::result::Result<Value, String>> {
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or("none");
    let Some(rules) = rules::find(pre) else {
        return Ok(Err(format!(
            "its GGUF tokenizer splits text by the rules `{pre}`; known are {}",
            rules::names()
        )));
    };
    let vocabulary = Vocabulary::read(gguf)?;
    let merges = listed(merges(gguf)?, MERGES)?;
    // Phi-4's control tokens take the blanks on both sides; no GGUF file says so.
    let trims = pre == "dbrx" && gguf.text("general.architecture")? == Some("phi3");
    Ok(Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added(|_| Trims { left: trims, right: trims }),
        "normalizer": rules.normalizer(),
        "pre_tokenizer": rules.pre_tokenizer(),
        "post_processor": post_processor(gguf, &vocabulary, rules.add_bos)?,
        "decoder": rules::byte_level(false),
        "model": {
            "type": "BPE",
            "vocab": vocabulary.ids()?,
            "merges": merges,
            "ignore_merges": rules.ignore_merges,
        },
    })))
}

/// The tokens of a GGUF file, by id.
pub(super) struct Vocabulary<'a> {
    pub tokens: Vec<Cow<'a, str>>,
    types: Vec<u64>,
}

/// Whether an added token takes the blanks before and after it.
pub(super) struct Trims {
    pub left: bool,
    pub right: bool,
}

impl<'a> Vocabulary<'a> {
    pub fn read(gguf: &'a Gguf) -> Result<Self> {
        let tokens = listed(gguf.texts(TOKENS)?, TOKENS)?;
        let types = listed(gguf.unsigneds(TYPES)?, TYPES)?;
        check_length(TYPES, types.len(), tokens.len())?;
        Ok(Self { tokens: tokens.into_iter().map(Cow::Borrowed).collect(), types })
    }

    /// Writes the user-defined tokens anew.
    pub fn respell(&mut self, spelling: impl Fn(&str) -> Option<String>) {
        for (token, kind) in self.tokens.iter_mut().zip(&self.types) {
            if let Some(spelt) = spelling(token).filter(|_| *kind == USER_DEFINED) {
                *token = Cow::Owned(spelt);
            }
        }
    }

    /// Token to id.
    pub fn ids(&self) -> Result<Value> {
        let mut ids = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.clone().into_owned(), id.into()) {
                return Err(Error::new("a token stands twice in the GGUF vocabulary")
                    .at(TOKENS)
                    .got(format!("{token:?} at {first} and {id}")));
            }
        }
        Ok(Value::Object(ids))
    }

    /// Control tokens and the unknown one are special; user-defined ones are found in text before
    /// it is split, but are text.
    pub fn added(&self, trims: impl Fn(&str) -> Trims) -> Vec<Value> {
        let mut added = Vec::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.types).enumerate() {
            let special = matches!(*kind, CONTROL | UNKNOWN);
            if !special && *kind != USER_DEFINED {
                continue;
            }
            let trims = trims(token);
            added.push(json!({
                "id": id, "content": token, "single_word": false, "lstrip": trims.left,
                "rstrip": trims.right, "normalized": false, "special": special
            }));
        }
        added
    }
}

/// A list's values are one a token.
pub(super) fn check_length(key: &str, length: usize, tokens: usize) -> Result<()> {
    if length == tokens {
        return Ok(());
    }
    Err(Error::new("the GGUF vocabulary contradicts itself")
        .at(key)
        .expected(format!("{tokens} values, one a token"))
        .got(length))
}

fn listed<T>(list: Option<Vec<T>>, key: &str) -> Result<Vec<T>> {
    list.ok_or_else(|| Error::new("the GGUF vocabulary is incomplete").at(key).got("no such key"))
}

/// The file's merges, `"a b"` as `["a", "b"]`.
pub(super) fn merges(gguf: &Gguf) -> Result<Option<Vec<Value>>> {
    let Some(merges) = gguf.texts(MERGES)? else { return Ok(None) };
    let pair = |merge: &&str| {
        let (left, right) =
            merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty())?;
        Some(json!([left, right]))
    };
    let bad = |merge: &&str| {
        Error::new("bad merge in the GGUF vocabulary")
            .at(MERGES)
            .expected("two tokens with a blank between them")
            .got(format!("{merge:?}"))
    };
    let pairs = merges.iter().map(|merge| pair(merge).ok_or_else(|| bad(merge)));
    pairs.collect::<Result<_>>().map(Some)
}

/// Adds BOS and EOS where the file says so, a BOS also where it says nothing and the vocabulary has
/// one by default.
pub(super) fn post_processor(
    gguf: &Gguf,
    vocabulary: &Vocabulary,
    bos_by_default: bool,
) -> Result<Value> {
    let wanted = [
        ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", bos_by_default),
        ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_eos_token", false),
    ];
    let mut single = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut special = Map::new();
    for (index, (id_key, add_key, default)) in wanted.into_iter().enumerate() {
        if !gguf.boolean(add_key)?.unwrap_or(default) {
            continue;
        }
        let Some((id, token)) = special_token(gguf, id_key, &vocabulary.tokens)? else {
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
pub(in crate::model) fn special_token<'a>(
    gguf: &Gguf,
    key: &str,
    tokens: &'a [impl AsRef<str>],
) -> Result<Option<(u64, &'a str)>> {
    let Some(id) = gguf.unsigned(key)? else { return Ok(None) };
    let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
    token.map(|token| Some((id, token.as_ref()))).ok_or_else(|| {
        Error::new("a special token is not in the vocabulary")
            .at(key)
            .expected(format!("an id below {}", tokens.len()))
            .got(id)
    })
}
