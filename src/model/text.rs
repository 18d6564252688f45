//! The text side of a model on disk: its tokenizer and its chat template, from a folder or a GGUF
//! file.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use fs_err as fs;
use serde_json::Value;

use super::{
    chat::ChatTemplate,
    gguf::Gguf,
    read_json,
    tokenizer::{Tokenizer, special_token},
};
use crate::error::{Context, Error, Result};

/// Files of a Hugging Face folder that text depends on.
pub(super) const FILES: [&str; 4] =
    ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"];

/// Special tokens by their names in templates; GGUF's name of each.
const SPECIAL: [(&str, &str); 4] = [
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
];

/// What there is for text.
#[derive(Debug)]
pub(super) struct TextSide {
    /// Or why there is none.
    pub tokenizer: std::result::Result<Arc<Tokenizer>, String>,
    /// Or why there is none.
    pub template: std::result::Result<ChatTemplate, String>,
}

impl TextSide {
    /// Reads what a GGUF file holds.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let tokenizer = Tokenizer::from_gguf(gguf)?.map(Arc::new);
        let source = gguf.text("tokenizer.chat_template")?;
        let tokens = gguf.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let mut special = BTreeMap::new();
        for (name, key) in SPECIAL {
            if let Some((_, token)) = special_token(gguf, key, &tokens)? {
                special.insert(name.to_owned(), token.to_owned());
            }
        }
        Ok(Self { tokenizer, template: parsed(source, special) })
    }

    /// Reads a Hugging Face folder's files, none of which need be there.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let place = || path.display().to_string();
        let tokenizer = if path.is_file() {
            Ok(Arc::new(Tokenizer::from_json(read_json(&path)?).at(place)?))
        } else {
            Err("its folder has no tokenizer.json".to_owned())
        };
        let object = |name: &str| {
            let path = folder.join(name);
            if path.is_file() { read_json(&path) } else { Ok(Value::Null) }
        };
        let config = object("tokenizer_config.json")?;
        let map = object("special_tokens_map.json")?;
        let special = special_tokens(&config, &map);
        let path = folder.join("chat_template.jinja");
        let source = if path.is_file() {
            Some(fs::read_to_string(path)?)
        } else {
            listed_template(&config["chat_template"])
                .at(|| folder.join("tokenizer_config.json").display().to_string())?
        };
        Ok(Self { tokenizer, template: parsed(source.as_deref(), special) })
    }
}

/// Special tokens by their names in templates, of the first file that has each.
pub(super) fn special_tokens(config: &Value, map: &Value) -> BTreeMap<String, String> {
    let text = |name: &str| token_text(&config[name]).or_else(|| token_text(&map[name]));
    let tokens = SPECIAL.iter().filter_map(|(name, _)| Some((*name, text(name)?)));
    tokens.map(|(name, token)| (name.to_owned(), token.to_owned())).collect()
}

/// A template that cannot be parsed is none: prompts of text and token ids do without.
fn parsed(
    source: Option<&str>,
    special: BTreeMap<String, String>,
) -> std::result::Result<ChatTemplate, String> {
    let source = source.ok_or_else(|| "it has none".to_owned())?;
    ChatTemplate::new(source, special).map_err(|error| error.to_string())
}

/// A token written as a text or as an object with a `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// A template, or the one named `default` of a list.
pub(super) fn listed_template(value: &Value) -> Result<Option<String>> {
    match value {
        Value::Null => Ok(None),
        Value::String(source) => Ok(Some(source.clone())),
        Value::Array(list) => {
            let default = list.iter().find(|entry| entry["name"] == "default");
            let source = default.and_then(|entry| entry["template"].as_str());
            source.map(|source| Some(source.to_owned())).ok_or_else(|| {
                Error::new("no default chat template").expected("one named `default`")
            })
        }
        _ => Err(Error::new("bad chat template").expected("a text or a list of named ones")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_and_templates_have_two_spellings() {
        assert_eq!(token_text(&json!("<s>")), Some("<s>"));
        assert_eq!(token_text(&json!({"content": "<s>", "lstrip": false})), Some("<s>"));
        assert_eq!(token_text(&Value::Null), None);
        let list =
            json!([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]);
        assert_eq!(listed_template(&list).unwrap().as_deref(), Some("b"));
        assert_eq!(listed_template(&json!("c")).unwrap().as_deref(), Some("c"));
        assert!(listed_template(&json!([])).is_err() && listed_template(&json!(1)).is_err());
    }
}
