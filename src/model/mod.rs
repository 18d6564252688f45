//! A model on disk: its configuration and its weights. Nothing is computed here.

mod checkpoint;
mod config;
mod format;
pub mod forward;
mod gguf;
mod shards;
pub mod weights;

use std::path::{Path, PathBuf};

use fs_err as fs;
use serde_json::Value;

use self::gguf::Gguf;
pub use self::{
    checkpoint::{Checkpoint, Tensor},
    config::{ARCHITECTURES, ModelConfig},
};
use crate::{
    device::MappedFile,
    error::{Context, Error, Result},
};

/// A model's metadata; its weights stay in the memory-mapped files.
#[derive(Debug)]
pub struct Model {
    /// Name of its file or folder.
    pub name: String,
    /// Sizes and constants.
    pub config: ModelConfig,
    /// The weights.
    pub checkpoint: Checkpoint,
}

impl Model {
    /// Opens a GGUF file, or a folder with a Hugging Face model or with exactly one GGUF file.
    ///
    /// # Errors
    ///
    /// A file is missing, damaged, or says something that this crate does not compute.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::open_gguf(path);
        }
        if path.join("config.json").is_file() {
            return Self::open_folder(path);
        }
        let files = gguf_files(path)?;
        match &files[..] {
            [file] => Self::open_gguf(file),
            _ => Err(Error::new("not a model's folder")
                .at(path.display().to_string())
                .expected("a config.json, or exactly one .gguf file")
                .got(format!("no config.json and {} .gguf files", files.len()))),
        }
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let file = MappedFile::open(path)?;
        let gguf = Gguf::parse(file.bytes()).at(place)?;
        let config = ModelConfig::from_gguf(&gguf).at(place)?;
        let checkpoint = Checkpoint::from_gguf(file, gguf, &config)?;
        Ok(Self { name: name_of(path), config, checkpoint })
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let config = read_json(&config_path)?;
        let generation = path.join("generation_config.json");
        let generation = generation.is_file().then(|| read_json(&generation)).transpose()?;
        let config = ModelConfig::from_json(&config, generation.as_ref())
            .at(|| config_path.display().to_string())?;
        let checkpoint = Checkpoint::from_folder(path, &config)?;
        Ok(Self { name: name_of(path), config, checkpoint })
    }
}

fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            files.push(path);
        }
    }
    Ok(files)
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path)?;
    serde_json::from_str(&text)
        .map_err(|error| Error::new(format!("not JSON: {error}")))
        .at(|| path.display().to_string())
}

fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
