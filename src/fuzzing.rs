//! Every reader of files that others wrote, one function a kind: bytes that may be anything end in
//! `Ok` or in an error. For the fuzz targets (`fuzz/`) and the replay of their corpus.

use std::{path::PathBuf, sync::OnceLock};

pub use crate::model::fuzzing::{config, safetensors, tokenizer};
use crate::{
    cli::requests::Requests,
    engine::vectors::VectorSet,
    error::{Error, Result},
    model::{self, Model},
};

#[cfg(test)]
mod replay;

/// Reads bytes as one kind of file.
pub type Reader = fn(&[u8]) -> Result<()>;

/// The kinds by their names in `fuzz/` and `tests/corpus/`.
pub const READERS: [(&str, Reader); 6] = [
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("config", config),
    ("tokenizer", tokenizer),
    ("vectors", vectors),
    ("requests", requests),
];

/// A model in one GGUF file.
pub fn gguf(bytes: &[u8]) -> Result<()> {
    model::fuzzing::gguf(bytes).map(drop)
}

/// A file of vectors of any kind.
pub fn vectors(bytes: &[u8]) -> Result<()> {
    let set = VectorSet::parse(bytes, "stem")?;
    for name in set.names() {
        for layer in [None, Some(0), Some(7), Some(usize::MAX)] {
            set.get(name, layer).ok();
        }
        set.unnamed_layers(name)?;
    }
    Ok(())
}

/// Lines of requests, resolved for a tiny model. Files of vectors that
/// they name are the corpus.
pub fn requests(bytes: &[u8]) -> Result<()> {
    static MODEL: OnceLock<Model> = OnceLock::new();
    const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/vectors");
    const FILE: &[u8] = include_bytes!("../tests/corpus/gguf/whole_model.gguf");
    let model = match MODEL.get() {
        Some(model) => model,
        None => {
            let model = model::fuzzing::gguf(FILE)?;
            MODEL.get_or_init(|| model)
        }
    };
    let text = std::str::from_utf8(bytes).map_err(|error| Error::new(error.to_string()))?;
    let requests = Requests::parse(text, "requests.jsonl", PathBuf::from(FOLDER))?;
    requests.resolve(model).map(drop)
}

/// The most memory, in bytes, that a reader may hold at a time for an input of this length.
pub fn most_bytes(length: usize) -> u64 {
    (64 << 20) + 256 * length as u64
}
