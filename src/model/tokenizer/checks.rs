//! What a `tokenizer.json` must not say: the library that reads it does not check it, and would end
//! the process, or take time or memory without bound.

use serde_json::Value;
use tokenizers::utils::SysRegex;

use crate::error::{Context, Error, Result};

/// Components in components: real files have two (a sequence of others).
const MAX_DEPTH: usize = 6;
/// How many times as long normalizers or decoders may make a text in all. Those that write a blank
/// as ▁ make it three times as long.
const MAX_GROWTH: u64 = 256;
/// Of all regular expressions, in characters. The longest in use have 500; a character such as `\w`
/// can take 20 KiB once compiled.
const MAX_EXPRESSIONS: usize = 1 << 11;
/// Beyond any vocabulary; the ids of added tokens are counted on from there.
const MAX_ID: u64 = 1 << 30;

/// A component's key, the key under which its sequences hold others, and the kinds that there are:
/// the library guesses what an unknown kind could be.
type Component = (&'static str, &'static str, &'static [&'static str]);
const COMPONENTS: [Component; 4] = [
    (
        "normalizer",
        "normalizers",
        &[
            "BertNormalizer",
            "ByteLevel",
            "Lowercase",
            "NFC",
            "NFD",
            "NFKC",
            "NFKD",
            "Nmt",
            "Prepend",
            "Replace",
            "Sequence",
            "Strip",
            "StripAccents",
        ],
    ),
    (
        "pre_tokenizer",
        "pretokenizers",
        &[
            "BertPreTokenizer",
            "ByteLevel",
            "CharDelimiterSplit",
            "Digits",
            "FixedLength",
            "Metaspace",
            "Punctuation",
            "Sequence",
            "Split",
            "UnicodeScripts",
            "Whitespace",
            "WhitespaceSplit",
        ],
    ),
    (
        "post_processor",
        "processors",
        &["BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"],
    ),
    (
        "decoder",
        "decoders",
        &[
            "BPEDecoder",
            "ByteFallback",
            "ByteLevel",
            "CTC",
            "Fuse",
            "Metaspace",
            "Replace",
            "Sequence",
            "Strip",
            "WordPiece",
        ],
    ),
];
/// A text with an edge of every kind.
const PROBE: &str = "A word, 12 of them\n\n  (naïve) \u{6771}\u{4eac}_x ";
const MODELS: [&str; 4] = ["BPE", "Unigram", "WordLevel", "WordPiece"];

/// Refuses a `tokenizer.json` that the library would not survive.
pub(super) fn check(json: &Value) -> Result<()> {
    let expressions = COMPONENTS.iter().filter_map(|(key, ..)| json.get(key));
    let costs = expressions.map(|value| expressions_cost(value, false));
    let expressions = costs.fold(0, usize::saturating_add);
    if expressions > MAX_EXPRESSIONS {
        return Err(refused("its regular expressions could take too much memory")
            .expected(format!("{MAX_EXPRESSIONS} characters, {{N}} counted as N squared"))
            .got(expressions));
    }
    for component in &COMPONENTS {
        let key = component.0;
        if let Some(value) = json.get(key).filter(|value| !value.is_null()) {
            let growth = check_component(value, component, MAX_DEPTH).at(|| key.into())?;
            if growth > MAX_GROWTH {
                return Err(refused("a text could become too long")
                    .at(key)
                    .expected(format!("at most {MAX_GROWTH} times its length"))
                    .got(format!("{growth} times")));
            }
        }
    }
    check_model(&json["model"]).at(|| "model".into())
}

fn refused(what: &str) -> Error {
    Error::new(format!("the tokenizer cannot be used: {what}"))
        .hint("tokenizer.json is damaged, or of a kind that is not supported")
}

/// The kind of a component or a model.
fn kind<'a>(value: &'a Value, known: &[&str]) -> Result<&'a str> {
    let kind = value.get("type").and_then(Value::as_str);
    kind.filter(|kind| known.contains(kind)).ok_or_else(|| {
        let error = refused("a part of it is of an unknown kind").at("type");
        error.expected(known.join(", ")).got(kind.unwrap_or("none"))
    })
}

/// How many times as long a text may become by it.
fn check_component(value: &Value, component: &Component, depth: usize) -> Result<u64> {
    let (_, nested, kinds) = *component;
    let kind = kind(value, kinds)?;
    let depth = depth.checked_sub(1).ok_or_else(|| {
        let error = refused("its parts are nested too deeply");
        error.expected(format!("at most {MAX_DEPTH} in each other"))
    })?;
    let mut growth = 1;
    for part in value[nested].as_array().into_iter().flatten() {
        growth = u64::saturating_mul(growth, check_component(part, component, depth)?);
    }
    match kind {
        "FixedLength" if value["length"] == 0 => Err(refused("it cuts pieces of no length")),
        "Strip" if value.get("stop").is_some_and(|stop| *stop != 0) => {
            let error = refused("its decoder takes characters off the end of tokens");
            Err(error.at("stop").expected(0).got(&value["stop"]))
        }
        "Replace" if replaces_nothing(&value["pattern"]) => {
            Err(refused("it replaces an empty text").at("pattern"))
        }
        "Replace" => Ok(growth.max(replacement_growth(value))),
        "ByteLevel" => Ok(growth.max(2)),
        // The library goes by the fields of a post-processor, whatever it says it is.
        _ if value.get("single").is_some() => check_template(value).map(|()| growth),
        _ => Ok(growth),
    }
}

/// Characters, and the square of each count of repetitions: counts in counts multiply.
fn expressions_cost(value: &Value, expression: bool) -> usize {
    match value {
        Value::String(text) if expression => {
            let count = |rest: &str| {
                let digits = rest.split(|c: char| !c.is_ascii_digit()).take(2);
                digits.filter_map(|digits| digits.parse().ok()).max().unwrap_or(0_usize)
            };
            let counts = text.split('{').skip(1).map(count);
            let squares = counts.map(|count| count.saturating_mul(count));
            squares.fold(text.len(), usize::saturating_add)
        }
        Value::Object(fields) => {
            let costs = fields.iter().map(|(key, field)| expressions_cost(field, key == "Regex"));
            costs.fold(0, usize::saturating_add)
        }
        Value::Array(values) => {
            let costs = values.iter().map(|value| expressions_cost(value, false));
            costs.fold(0, usize::saturating_add)
        }
        _ => 0,
    }
}

/// Whether a pattern matches where there is nothing: the library then loses track of what a token
/// stands for, and fails.
fn replaces_nothing(pattern: &Value) -> bool {
    let empty = |regex: SysRegex| {
        ["", PROBE].iter().any(|text| regex.find_iter(text).any(|(from, to)| from == to))
    };
    let expression = pattern["Regex"].as_str();
    pattern["String"] == "" || expression.is_some_and(|text| SysRegex::new(text).is_ok_and(empty))
}

fn replacement_growth(component: &Value) -> u64 {
    let content = component["content"].as_str().map_or(0, str::len) as u64;
    let pattern = component["pattern"]["String"].as_str().map_or(1, str::len) as u64;
    content.div_ceil(pattern.max(1)).max(1)
}

/// The text stands in a template once; every special token that it names is one that it has, with
/// as many names as ids.
fn check_template(component: &Value) -> Result<()> {
    let tokens = &component["special_tokens"];
    for (name, token) in tokens.as_object().into_iter().flatten() {
        let count = |key: &str| token[key].as_array().map(Vec::len);
        if count("ids").is_none() || count("ids") != count("tokens") {
            let error = refused("a special token has not as many ids as names");
            return Err(error.at(name.as_str()).at("special_tokens"));
        }
    }
    // The template of pairs of texts is never used.
    let parts = component["single"].as_array().map_or(&[][..], Vec::as_slice);
    let (texts, named): (Vec<&Value>, Vec<&Value>) =
        parts.iter().partition(|part| part.get("Sequence").is_some());
    if texts.len() != 1 {
        let error = refused("its template does not have the text once").at("single");
        return Err(error.expected(1).got(texts.len()));
    }
    let known = |part: &&Value| {
        part["SpecialToken"]["id"].as_str().is_some_and(|name| tokens.get(name).is_some())
    };
    if let Some(part) = named.into_iter().find(|part| !known(part)) {
        let error = refused("its template names a special token that it does not have");
        return Err(error.at("single").got(part));
    }
    Ok(())
}

fn check_model(model: &Value) -> Result<()> {
    let kind = kind(model, &MODELS)?;
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        let marks = model[key].as_str().is_some_and(|mark| !mark.is_empty());
        if marks && kind != "WordPiece" {
            return Err(refused("its tokens are marked by their place in a word").at(key));
        }
    }
    if model["dropout"].as_f64().is_some_and(|dropout| dropout != 0.0) {
        let error = refused("it leaves out merges at random");
        return Err(error.at("dropout").expected("null or 0").got(&model["dropout"]));
    }
    let ids = model["vocab"].as_object().into_iter().flatten();
    match ids.filter_map(|(_, id)| id.as_u64()).find(|id| *id > MAX_ID) {
        Some(id) => Err(refused("a token's id cannot be").at("vocab").got(id)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template() -> Value {
        json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
        })
    }

    fn check_with(key: &str, value: Value) -> Result<()> {
        let mut json = json!({"model": {"type": "BPE", "vocab": {"a": 0}}, "normalizer": null});
        json[key] = value;
        check(&json)
    }

    #[test]
    fn what_models_have_is_accepted() {
        let marks = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        ]});
        check_with("normalizer", marks).unwrap();
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        check_with("decoder", json!({"type": "Sequence", "decoders": [strip]})).unwrap();
        check_with("post_processor", template()).unwrap();
    }

    #[test]
    fn what_the_library_would_not_survive_is_refused() {
        let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "normalizers": parts});
        let nested = (0..9).fold(json!({"type": "NFC"}), |inner, _| sequence(vec![inner]));
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let changed = |change: fn(&mut Value)| {
            let mut template = template();
            change(&mut template);
            template
        };
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}});
        for (key, value, cause) in [
            ("normalizer", json!({"type": "Precompiled"}), "unknown kind"),
            ("normalizer", json!({"normalizers": []}), "unknown kind"),
            ("normalizer", nested, "nested too deeply"),
            ("normalizer", sequence(vec![double; 9]), "512 times"),
            (
                "normalizer",
                json!({"type": "Replace", "pattern": {"String": ""}, "content": "a"}),
                "an empty text",
            ),
            (
                "normalizer",
                json!({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "a"}),
                "an empty text",
            ),
            ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "no length"),
            ("pre_tokenizer", split(r"\\w{90}"), "too much memory"),
            ("pre_tokenizer", split(&r"(?=\\w)".repeat(500)), "too much memory"),
            (
                "decoder",
                json!({"type": "Strip", "content": "a", "start": 0, "stop": 1}),
                "the end of",
            ),
            ("post_processor", changed(|t| t["type"] = "BertProcesing".into()), "unknown kind"),
            ("post_processor", changed(|t| t["special_tokens"] = json!({})), "does not have"),
            (
                "post_processor",
                changed(|t| t["single"][0]["SpecialToken"] = json!(["<s>", 0])),
                "does not have",
            ),
            (
                "post_processor",
                changed(|t| t["single"][1] = t["single"][0].clone()),
                "the text once",
            ),
            (
                "post_processor",
                changed(|t| t["special_tokens"]["<s>"]["ids"] = json!([0, 1])),
                "not as many ids",
            ),
            ("model", json!({"type": "BPE", "dropout": 0.1}), "at random"),
            ("model", json!({"type": "BPE", "continuing_subword_prefix": "##"}), "their place"),
            ("model", json!({"type": "BPE", "vocab": {"a": u32::MAX}}), "id cannot be"),
            ("model", json!({"vocab": {}}), "unknown kind"),
        ] {
            let error = check_with(key, value.clone()).unwrap_err().to_string();
            assert!(error.contains(cause), "{value}: {cause:?} not in {error}");
        }
    }
}
