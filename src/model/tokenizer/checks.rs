//! What a `tokenizer.json` must not say: the library that reads it does not check it, and would end
//! the process, or take time or memory without bound.

use serde_json::Value;

use crate::error::{Context, Error, Result};

/// Components in components: real files have two (a sequence of others).
const MAX_DEPTH: usize = 6;
/// How many times as long normalizers or decoders may make a text in all. Those that write a blank
/// as ▁ make it three times as long.
const MAX_GROWTH: u64 = 256;
/// Beyond any vocabulary; the ids of added tokens are counted on from there.
const MAX_ID: u64 = 1 << 30;

const COMPONENTS: [&str; 4] = ["normalizer", "pre_tokenizer", "post_processor", "decoder"];
/// The keys under which components hold others.
const NESTED: [&str; 4] = ["normalizers", "pretokenizers", "processors", "decoders"];

/// Refuses a `tokenizer.json` that the library would not survive.
pub(super) fn check(json: &Value) -> Result<()> {
    for key in COMPONENTS {
        if let Some(component) = json.get(key).filter(|component| !component.is_null()) {
            let growth = check_component(component, MAX_DEPTH).at(|| key.into())?;
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

/// How many times as long a text may become by it.
fn check_component(component: &Value, depth: usize) -> Result<u64> {
    let kind = component.get("type").and_then(Value::as_str);
    let kind = kind.ok_or_else(|| refused("a part of it has no type"))?;
    let depth = depth.checked_sub(1).ok_or_else(|| {
        refused("its parts are nested too deeply").expected(format!("at most {MAX_DEPTH} in another"))
    })?;
    let place = || kind.to_owned();
    let mut growth = 1;
    for part in NESTED.iter().filter_map(|key| component[key].as_array()).flatten() {
        growth = u64::saturating_mul(growth, check_component(part, depth).at(place)?);
    }
    match kind {
        "Precompiled" => Err(refused("its table of characters is of a kind that is not read")),
        "FixedLength" if component["length"] == 0 => Err(refused("pieces of no length")),
        "Strip" if component.get("stop").is_some_and(|stop| *stop != 0) => {
            let error = refused("its decoder takes characters off the end of tokens");
            Err(error.expected("stop 0").got(&component["stop"]))
        }
        "TemplateProcessing" => check_template(component).map(|()| growth),
        "Replace" => Ok(growth.max(replacement_growth(component))),
        "ByteLevel" => Ok(growth.max(2)),
        _ => Ok(growth),
    }
    .at(place)
}

/// A match may be empty where the pattern is an expression, or empty.
fn replacement_growth(component: &Value) -> u64 {
    let content = component["content"].as_str().map_or(0, str::len) as u64;
    match component["pattern"]["String"].as_str() {
        Some(pattern) if !pattern.is_empty() => content.div_ceil(pattern.len() as u64).max(1),
        _ => content + 1,
    }
}

/// The text stands in a template once; every special token that it names is one that it has, with
/// as many names as ids.
fn check_template(component: &Value) -> Result<()> {
    let is_text = |part: &&Value| match part {
        Value::String(text) => text.starts_with('$'),
        _ => part.get("Sequence").is_some(),
    };
    let texts = component["single"].as_array().into_iter().flatten().filter(is_text).count();
    if texts != 1 {
        let error = refused("its template does not have the text once");
        return Err(error.expected(1).got(texts));
    }
    let tokens = &component["special_tokens"];
    for part in ["single", "pair"].iter().filter_map(|key| component[key].as_array()).flatten() {
        let named = match part {
            Value::String(text) => text.split(':').next(),
            _ => part["SpecialToken"]["id"].as_str(),
        };
        let known = |name: &str| name.starts_with('$') || tokens.get(name).is_some();
        if let Some(name) = named.filter(|name| !known(name)) {
            return Err(refused("its template names a special token that it does not have").got(name));
        }
    }
    for (name, token) in tokens.as_object().into_iter().flatten() {
        let count = |key: &str| token[key].as_array().map(Vec::len);
        if count("ids") != count("tokens") {
            return Err(refused("a special token has another number of ids than of names").got(name));
        }
    }
    Ok(())
}

fn check_model(model: &Value) -> Result<()> {
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        let marks = model[key].as_str().is_some_and(|mark| !mark.is_empty());
        if marks && model["type"] != "WordPiece" {
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
