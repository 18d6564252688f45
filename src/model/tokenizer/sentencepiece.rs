//! `SentencePiece` BPE vocabularies (`tokenizer.ggml.model` = `llama`): Llama 2, Mistral 7B, Phi-3,
//! Gemma. ▁ is a blank; a character without a piece of its own becomes its UTF-8 bytes, `<0xE2>`.
//!
//! Such a file has scores instead of merges: of all neighbours whose concatenation is a piece, those
//! that make the one with the highest score are merged first, the leftmost if several do.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::gguf::{Trims, Vocabulary, check_length, merges, post_processor, special_token};
use crate::{
    error::{Error, Result},
    model::gguf::Gguf,
};

const SCORES: &str = "tokenizer.ggml.scores";
/// Longer pieces are not merged to: no vocabulary has them, and a file that claims to would take
/// time and memory with the square of their lengths.
const MAX_PIECE: usize = 256;
/// On average. Real vocabularies have two.
const MAX_MERGES_PER_PIECE: usize = 16;
/// Of a vocabulary of any size.
const FREE_MERGES: usize = 1 << 12;
/// Phi-3's special tokens that do not take the blanks after them, as the others do.
const PHI3_UNTRIMMED: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

pub(super) fn tokenizer(gguf: &Gguf) -> Result<std::result::Result<Value, String>> {
    let architecture = gguf.text("general.architecture")?.unwrap_or_default();
    let (gemma, phi3) = (architecture.starts_with("gemma"), architecture == "phi3");
    let prefixed = gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut vocabulary = Vocabulary::read(gguf)?;
    if gemma {
        vocabulary.respell(runs_of_blanks);
    }
    let merges = match merges(gguf)? {
        Some(merges) => merges,
        None => derived_merges(&vocabulary, &ranking(gguf, vocabulary.tokens.len(), gemma)?)?,
    };
    let trims =
        |token: &str| Trims { left: false, right: phi3 && !PHI3_UNTRIMMED.contains(&token) };
    let unknown = special_token(gguf, "tokenizer.ggml.unknown_token_id", &vocabulary.tokens)?;
    Ok(Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added(trims),
        "normalizer": if phi3 && prefixed { prefix_everywhere() } else { Value::Null },
        "pre_tokenizer": blanks_to_marks(prefixed && !phi3),
        "post_processor": post_processor(gguf, &vocabulary, true)?,
        "decoder": decoder(prefixed),
        "model": {
            "type": "BPE",
            "vocab": vocabulary.ids()?,
            "merges": merges,
            "unk_token": unknown.map(|(_, token)| token),
            "fuse_unk": true,
            "byte_fallback": true,
        },
    })))
}

/// Converters write Gemma's user-defined runs of ▁ with blanks. Its own tokenizer does not look for
/// them in text, but merges to them.
fn runs_of_blanks(token: &str) -> Option<String> {
    let blank = !token.is_empty() && token.chars().all(|c| c == ' ');
    blank.then(|| "▁".repeat(token.len()))
}

/// Ids in the order in which their pieces are merged: highest score first, equals by id. Gemma's
/// are by id, since converters overwrite the scores of its user-defined pieces.
fn ranking(gguf: &Gguf, tokens: usize, by_id: bool) -> Result<Vec<usize>> {
    let mut ids: Vec<usize> = (0..tokens).collect();
    if let Some(scores) = gguf.floats(SCORES)?.filter(|_| !by_id) {
        check_length(SCORES, scores.len(), tokens)?;
        // Stable, so that equals keep their order; −0 is made equal to 0, which it often stands by.
        let score = |id: usize| scores[id] + 0.0;
        ids.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
    }
    Ok(ids)
}

/// Every way to make a piece of two others; of one piece's, the one with the longer left part first.
fn derived_merges(vocabulary: &Vocabulary, ranking: &[usize]) -> Result<Vec<Value>> {
    let ids: HashMap<&str, usize> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (&**token, id)).collect();
    let most = MAX_MERGES_PER_PIECE * vocabulary.tokens.len() + FREE_MERGES;
    let mut merges = Vec::new();
    for id in ranking {
        let piece = &*vocabulary.tokens[*id];
        if piece.len() > MAX_PIECE {
            continue;
        }
        for (left, right) in (1..piece.len()).rev().filter_map(|at| piece.split_at_checked(at)) {
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push(json!([left, right]));
            }
        }
        if merges.len() > most {
            return Err(Error::new("the GGUF vocabulary can be merged in too many ways")
                .at("tokenizer.ggml.tokens")
                .expected(format!("at most {most}"))
                .hint("the file is damaged"));
        }
    }
    Ok(merges)
}

/// Blanks become ▁; a text that does not start with one gets one.
fn blanks_to_marks(prefixed: bool) -> Value {
    let scheme = if prefixed { "first" } else { "never" };
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false})
}

/// Phi-3 puts a blank before every stretch of text between special tokens, whatever it starts with.
fn prefix_everywhere() -> Value {
    json!({"type": "Prepend", "prepend": "▁"})
}

fn decoder(prefixed: bool) -> Value {
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefixed {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Encoding, Tokenizer},
        *,
    };

    fn golden(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/vocabularies/");
        fs_err::read(format!("{folder}{name}")).unwrap()
    }

    fn tokenizer(name: &str) -> Tokenizer {
        let gguf = Gguf::parse(&golden(&format!("{name}.gguf"))).unwrap();
        Tokenizer::from_gguf(&gguf).unwrap().unwrap()
    }

    /// Every span is inside the text, on characters' bounds, and together they are all of it.
    fn assert_covered(text: &str, encoding: &Encoding) {
        let mut covered = 0;
        for span in &encoding.spans {
            assert!(
                span.start <= covered && text.get(span.clone()).is_some(),
                "{text:?}: {span:?}"
            );
            covered = covered.max(span.end);
        }
        assert_eq!(covered, text.len(), "{text:?}: {:?}", encoding.spans);
    }

    /// `scripts/make_golden_vocabularies.py`.
    #[test]
    fn texts_become_transformers_tokens_and_come_back() {
        let golden: Value = serde_json::from_slice(&golden("tokens.json")).unwrap();
        let texts = golden["texts"].as_array().unwrap();
        assert!(texts.len() > 200);
        for (name, bos) in [("llama", Some(1)), ("phi3", None), ("gemma", Some(2))] {
            let tokenizer = tokenizer(name);
            for (at, text) in texts.iter().enumerate() {
                let text = text.as_str().unwrap();
                let encoding = tokenizer.encode(text, false).unwrap();
                assert_eq!(json!(encoding.tokens), golden[name]["tokens"][at], "{name}: {text:?}");
                assert_covered(text, &encoding);
                let decoded = tokenizer.decode(&encoding.tokens);
                assert_eq!(json!(decoded), golden[name]["decoded"][at], "{name}: {text:?}");
                let with = tokenizer.encode(text, true).unwrap().tokens;
                let want: Vec<u32> = bos.into_iter().chain(encoding.tokens).collect();
                assert_eq!(with, want, "{name}: {text:?}");
            }
        }
    }

    #[test]
    fn the_blank_put_before_a_text_stands_for_nothing() {
        let tokenizer = tokenizer("llama");
        let encoding = tokenizer.encode("\u{6771}\u{4eac}", false).unwrap();
        let pieces: Vec<String> = encoding.tokens.iter().map(|t| tokenizer.piece(*t)).collect();
        let (first, rest) = (&encoding.spans[0], &encoding.spans[1..]);
        assert_eq!((pieces[0].as_str(), first), (" ", &(0..0)));
        assert!(rest.iter().all(|span| *span == (0..3) || *span == (3..6)), "{rest:?}");
        let encoding = tokenizer.encode(" x", false).unwrap();
        assert_eq!(encoding.spans.last(), Some(&(0..2)));
    }

    #[test]
    fn pieces_show_blanks_bytes_and_special_tokens() {
        let tokenizer = tokenizer("gemma");
        let show = |text: &str| -> Vec<String> {
            let tokens = tokenizer.encode(text, false).unwrap().tokens;
            tokens.iter().map(|token| tokenizer.piece(*token)).collect()
        };
        assert_eq!(
            show("<start_of_turn>\u{0915}\t\t"),
            ["<start_of_turn>", r"\xe0", r"\xa4", r"\x95", "\t\t"]
        );
        assert_eq!(show("\u{1}   "), ["\u{1}", "   "]);
    }
}
