//! A model: its files (configuration, weights, tokenizer, chat template), prompts as it sees them,
//! and its forward pass.

mod chat;
mod checkpoint;
mod config;
mod date;
pub mod files;
mod format;
pub mod forward;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod gguf;
mod names;
mod origin;
mod prompt;
mod render;
mod shapes;
pub(crate) mod shards;
mod text;
mod tokenizer;
pub mod weights;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use fs_err as fs;
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use self::{
    chat::ChatTemplate,
    checkpoint::{Checkpoint, Tensor},
    config::{
        ARCHITECTURES, Angles, AttentionBias, Block, Mixture, ModelConfig, Norms, QueryNorm, Rope,
        Shape, check_gguf_architecture,
    },
    prompt::{Prompt, TokenWindow},
    tokenizer::{Encoding, Tokenizer},
};
use self::{gguf::parts::Parts, origin::Origin, text::TextSide};
use crate::{
    error::{Context, Error, Result},
    files::hex,
};

/// A model's metadata; its weights stay in the memory-mapped files.
#[derive(Debug)]
pub struct Model {
    /// Name of its file or folder; of the hub's cache `ORG/NAME@COMMIT`, the commit shortened.
    pub name: String,
    /// The commit of its repository, if it lies in the hub's cache.
    pub commit: Option<String>,
    /// Sizes and constants.
    pub config: ModelConfig,
    /// Absent where the model has none that can be used: it then takes prompts of token ids only.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Absent where the model has none that can be used: it then takes no messages.
    pub template: Option<ChatTemplate>,
    /// The weights.
    pub checkpoint: Checkpoint,
    no_tokenizer: Option<String>,
    no_template: Option<String>,
    /// Files besides the weights that results depend on.
    side_files: Vec<PathBuf>,
    hash: OnceLock<String>,
}

impl Model {
    /// Opens a GGUF file, or a folder with a Hugging Face model or with exactly one GGUF file. A
    /// GGUF model in several parts is opened by any of them, or by a folder with no other.
    ///
    /// # Errors
    ///
    /// A file is missing, damaged, or says something that this crate does not compute.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::open_gguf(path);
        }
        if path.join(files::CONFIG).is_file() {
            return Self::open_folder(path);
        }
        let files = gguf_files(path)?;
        match &files[..] {
            [file] => Self::open_gguf(file),
            [part, ..] if gguf::parts::are_of_one_model(&files) => Self::open_gguf(part),
            _ => Err(Error::new("not a model's folder")
                .at(path.display().to_string())
                .expected("a config.json, or exactly one .gguf file, or the parts of one model")
                .got(format!("no config.json and {} .gguf files", files.len()))),
        }
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        Self::from_parts(Parts::open(path)?)
    }

    fn from_parts(parts: Parts) -> Result<Self> {
        let (first, gguf) = parts.first();
        let path = first.path().to_owned();
        let place = || path.display().to_string();
        let config = ModelConfig::from_gguf(&parts).at(place)?;
        let text = TextSide::from_gguf(gguf).at(place)?;
        let checkpoint = Checkpoint::from_gguf(parts.0, &config)?;
        Ok(Self::new(&path, config, checkpoint, text, Vec::new()))
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let config = Self::folder_config(path)?;
        let checkpoint = Checkpoint::from_folder(path, &config)?;
        let text = TextSide::from_folder(path)?;
        let side_files = files::side().map(|name| path.join(name));
        let side_files = side_files.filter(|path| path.is_file()).collect();
        Ok(Self::new(path, config, checkpoint, text, side_files))
    }

    /// Reads the configuration of a Hugging Face folder, whose weights need not be there yet.
    ///
    /// # Errors
    ///
    /// It is missing, damaged, or says something that this crate does not compute.
    pub fn folder_config(path: &Path) -> Result<ModelConfig> {
        let config_path = path.join(files::CONFIG);
        let config = read_json(&config_path)?;
        let generation = path.join(files::GENERATION);
        let generation = generation.is_file().then(|| read_json(&generation)).transpose()?;
        ModelConfig::from_json(&config, generation.as_ref())
            .at(|| config_path.display().to_string())
    }

    fn new(
        path: &Path,
        config: ModelConfig,
        checkpoint: Checkpoint,
        text: TextSide,
        side_files: Vec<PathBuf>,
    ) -> Self {
        let Origin { name, commit } = Origin::of(path);
        Self {
            name,
            commit,
            config,
            no_tokenizer: text.tokenizer.as_ref().err().cloned(),
            no_template: text.template.as_ref().err().cloned(),
            tokenizer: text.tokenizer.ok(),
            template: text.template.ok(),
            checkpoint,
            side_files,
            hash: OnceLock::new(),
        }
    }

    /// With another chat template in place of its own, whose special tokens it takes over.
    ///
    /// # Errors
    ///
    /// The model has no template, or the new one can't be parsed.
    pub fn with_template(mut self, source: &str) -> Result<Self> {
        let own = self.template.as_ref().ok_or_else(|| {
            Error::new("the model has no chat template to take special tokens from")
                .at(self.name.clone())
        })?;
        self.template = Some(own.with_source(source)?);
        Ok(self)
    }

    /// The embedding, (vocab, dim), as it is stored.
    ///
    /// # Errors
    ///
    /// It is not there, or has another shape.
    pub fn embedding(&self) -> Result<Tensor<'_>> {
        self.checkpoint.look_at(checkpoint::EMBEDDING, &[self.config.vocab, self.config.dim])
    }

    /// The output matrix, (vocab, dim): the embedding where they are tied.
    ///
    /// # Errors
    ///
    /// It is not there, or has another shape.
    pub fn output(&self) -> Result<Tensor<'_>> {
        if self.config.tied_embeddings {
            return self.embedding();
        }
        self.checkpoint.look_at(checkpoint::OUTPUT, &[self.config.vocab, self.config.dim])
    }

    /// The last norm's gain, (dim,), whole.
    ///
    /// # Errors
    ///
    /// It is not there, or has another shape.
    pub fn final_gain(&self) -> Result<Vec<f32>> {
        let stored = self.checkpoint.look_at("model.norm.weight", &[self.config.dim])?;
        let mut gain = vec![0.0; self.config.dim];
        stored.read_vector(&mut gain);
        gain.iter_mut().for_each(|gain| *gain += self.config.gain_offset);
        Ok(gain)
    }

    /// SHA-256 (hex) of all that the model's results depend on, computed once. Of a GGUF file: the
    /// file's own; of one in parts, or of a folder: of its weights, configuration, tokenizer and
    /// template files, each with its name and length before it.
    ///
    /// # Errors
    ///
    /// A file cannot be read.
    pub fn hash(&self) -> Result<String> {
        if let Some(hash) = self.hash.get() {
            return Ok(hash.clone());
        }
        let weights = self.checkpoint.files();
        let mut sha = Sha256::new();
        if let ([file], []) = (weights, &self.side_files[..]) {
            sha.update(file.bytes());
        } else {
            for path in &self.side_files {
                hash_file(&mut sha, path, &fs::read(path)?);
            }
            for file in weights {
                hash_file(&mut sha, file.path(), file.bytes());
            }
        }
        let hash = hex(&sha.finalize());
        Ok(self.hash.get_or_init(|| hash).clone())
    }
}

fn hash_file(sha: &mut Sha256, path: &Path, bytes: &[u8]) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    sha.update(format!("{name}\0{}\0", bytes.len()));
    sha.update(bytes);
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
    parse_json(&fs::read(path)?).at(|| path.display().to_string())
}

fn parse_json(bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|error| Error::new(format!("not JSON: {error}")))
}
