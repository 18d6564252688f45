//! A model's files as bytes that may be anything, read as far as a model's loading reads them.

use std::path::Path;

use serde_json::Value;

use super::{
    Model, ModelConfig,
    chat::{ChatTemplate, Settings},
    checkpoint::Checkpoint,
    date::Date,
    gguf::{Gguf, parts::Parts},
    parse_json, shards,
    text::{listed_template, special_tokens},
    tokenizer::Tokenizer,
};
use crate::{
    device::MappedFile,
    error::Result,
    request::{Message, Thinking},
};

/// Beyond it a file's data is rows and nothing else.
const MOST_ROWS_READ: usize = 4;
const TEXTS: [&str; 4] =
    ["The 12 ships\n\n  don't é東😀\u{301} sail.", "", " ", "<s>[INST]<|im_end|><unk>\u{0}\t▁x"];

/// A model in one GGUF file.
pub fn gguf(bytes: &[u8]) -> Result<Model> {
    let gguf = Gguf::parse(bytes)?;
    let file = MappedFile::of_bytes(Path::new("model.gguf"), bytes)?;
    let model = Model::from_parts(Parts(vec![(file, gguf)]))?;
    read_rows(&model.checkpoint)?;
    let _ = (model.embedding(), model.output(), model.final_gain());
    if let Some(tokenizer) = &model.tokenizer {
        use_tokenizer(tokenizer)?;
    }
    if let Some(template) = &model.template {
        use_template(template);
    }
    Ok(model)
}

/// The first and the last rows of every tensor.
fn read_rows(checkpoint: &Checkpoint) -> Result<()> {
    for (name, shape) in checkpoint.shapes() {
        let tensor = checkpoint.look_at(&name, &shape)?;
        let mut row = vec![0.0; tensor.cols()];
        for at in 0..tensor.rows().min(MOST_ROWS_READ) {
            tensor.read_row(at, &mut row);
            tensor.read_row(tensor.rows() - 1 - at, &mut row);
        }
        if tensor.rows() == 1 {
            tensor.read_vector(&mut row);
        }
    }
    Ok(())
}

/// A file of weights, or the index of several.
pub fn safetensors(bytes: &[u8]) -> Result<()> {
    if let Ok(map) = shards::parse_index(bytes) {
        return shards::names(&map).map(drop);
    }
    let tensors = shards::parse(bytes)?;
    let file = MappedFile::of_bytes(Path::new("model.safetensors"), bytes)?;
    for family in ["llama", "gemma3", "mixtral"] {
        let config = ModelConfig {
            architecture: family.into(),
            tied_embeddings: family == "gemma3",
            ..ModelConfig::of_shape("tiny", 64)?
        };
        let file = MappedFile::of_bytes(file.path(), bytes)?;
        let shards = vec![(file, tensors.clone())];
        read_rows(&Checkpoint::from_shards(Path::new("model"), shards, &config)?)?;
    }
    Ok(())
}

/// `config.json`, and after a zero byte `generation_config.json`.
pub fn config(bytes: &[u8]) -> Result<()> {
    let mut files = bytes.split(|byte| *byte == 0);
    let config = parse_json(files.next().unwrap_or_default())?;
    let generation = files.next().map(parse_json).transpose()?;
    let config = ModelConfig::from_json(&config, generation.as_ref())?;
    config.parameters();
    Ok(())
}

/// `tokenizer.json`, and after zero bytes `tokenizer_config.json` and `chat_template.jinja`; an empty
/// one is none.
pub fn tokenizer(bytes: &[u8]) -> Result<()> {
    let mut files = bytes.split(|byte| *byte == 0);
    let tokenizer = files.next().unwrap_or_default();
    let config = files.next().map_or(Ok(Value::Null), parse_json)?;
    let source = match files.next() {
        Some(source) => Some(String::from_utf8_lossy(source).into_owned()),
        None => listed_template(&config["chat_template"])?,
    };
    let special = special_tokens(&config, &Value::Null);
    if let Some(template) = source.and_then(|source| ChatTemplate::new(&source, special).ok()) {
        use_template(&template);
    }
    if tokenizer.is_empty() {
        return Ok(());
    }
    use_tokenizer(&Tokenizer::from_json(parse_json(tokenizer)?)?)
}

fn use_tokenizer(tokenizer: &Tokenizer) -> Result<()> {
    for text in TEXTS {
        for special in [false, true] {
            let encoding = tokenizer.encode(text, special)?;
            assert_eq!(encoding.tokens.len(), encoding.spans.len());
            for span in &encoding.spans {
                assert!(span.start <= span.end && span.end <= text.len(), "{span:?} of {text:?}");
            }
            tokenizer.decode(&encoding.tokens);
        }
    }
    for token in [0, 1, tokenizer.vocab() as u32, u32::MAX] {
        tokenizer.piece(token);
        tokenizer.decode(&[token, 0]);
    }
    Ok(())
}

fn use_template(template: &ChatTemplate) {
    let message =
        |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let messages =
        [message("system", "Be kind."), message("user", " hi\n"), message("assistant", "Ok é ")];
    let date = Date::parse("2025-01-31").ok();
    for thinking in [Thinking::Template, Thinking::On] {
        for count in [2, 3] {
            let settings = Settings { thinking, date };
            let Ok(rendered) = template.render(&messages[..count], &settings) else { continue };
            for turn in rendered.turns.into_iter().flatten() {
                assert!(rendered.text.get(turn).is_some());
            }
        }
    }
}
