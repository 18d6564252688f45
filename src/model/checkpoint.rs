//! A model's weights in its memory-mapped files, by their canonical (Hugging Face Llama) names.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{
    config::{FACTORS, ModelConfig},
    format::Format,
    gguf::Gguf,
    names, shards,
};
use crate::{
    device::MappedFile,
    error::{Error, Result},
};

/// The tensors of a model. Each is taken once; [`Checkpoint::finish`] tells whether all were.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Stored>,
    taken: Mutex<BTreeSet<String>>,
}

/// Where a tensor is and how to read it.
#[derive(Debug)]
struct Stored {
    file: usize,
    bytes: Range<usize>,
    format: Format,
    shape: Vec<usize>,
    /// Width of the heads whose rows stand interleaved for llama.cpp's rope.
    interleaved: Option<usize>,
}

/// One tensor, to be read row by row from any number of threads.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    data: &'a [u8],
    format: Format,
    rows: usize,
    cols: usize,
    interleaved: Option<usize>,
}

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const OUTPUT: &str = "lm_head.weight";

impl Checkpoint {
    /// Names the tensors of a GGUF model's files, of which there is at least one.
    pub(super) fn from_gguf(parts: Vec<(MappedFile, Gguf)>, config: &ModelConfig) -> Result<Self> {
        let (files, parts): (Vec<MappedFile>, Vec<Gguf>) = parts.into_iter().unzip();
        let mut tensors = BTreeMap::new();
        let records = parts.into_iter().enumerate().flat_map(|(index, part)| {
            part.tensors.into_iter().map(move |(source, record)| (index, source, record))
        });
        for (index, source, record) in records {
            let file = &files[index];
            if FACTORS.contains(&&*source) {
                continue;
            }
            // llama.cpp turns neighbouring pairs, Hugging Face halves: the converter interleaved
            // the rows of this architecture's q and k.
            let turned = source.contains(".attn_q.") || source.contains(".attn_k.");
            let interleaved = (turned && config.architecture == "llama").then_some(config.head_dim);
            if let Some(head_dim) = interleaved
                && !record.shape[0].is_multiple_of(head_dim)
            {
                return Err(Error::new("wrong tensor shape")
                    .at(source)
                    .at(file.path().display().to_string())
                    .expected(format!("a multiple of {head_dim} rows"))
                    .got(format!("{:?}", record.shape)));
            }
            let name = names::of_gguf(&source, config).unwrap_or(source);
            let stored = Stored {
                file: index,
                bytes: record.bytes,
                format: record.format,
                shape: record.shape,
                interleaved,
            };
            if tensors.insert(name.clone(), stored).is_some() {
                return Err(Error::new("a tensor stands twice under two names")
                    .at(name)
                    .at(file.path().display().to_string()));
            }
        }
        Ok(Self::new(files[0].path().to_owned(), files, tensors))
    }

    /// Names the tensors of a Hugging Face folder. A tied model may store its output matrix, if it
    /// is the embedding's bytes again.
    pub(super) fn from_folder(folder: &Path, config: &ModelConfig) -> Result<Self> {
        Self::from_shards(folder, shards::open(folder)?, config)
    }

    /// Likewise, of files that are opened.
    pub(super) fn from_shards(
        folder: &Path,
        shards: Vec<shards::Opened>,
        config: &ModelConfig,
    ) -> Result<Self> {
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for (index, (file, records)) in shards.into_iter().enumerate() {
            for (name, record) in records {
                let Some(name) = names::of_folder(&name, config) else { continue };
                let shards::TensorRecord { shape, format, bytes } = record;
                let stored = Stored { file: index, bytes, format, shape, interleaved: None };
                if tensors.insert(name.clone(), stored).is_some() {
                    return Err(Error::new("a tensor stands twice under two names")
                        .at(name)
                        .at(folder.display().to_string()));
                }
            }
            files.push(file);
        }
        let mut checkpoint = Self::new(folder.to_owned(), files, tensors);
        if config.tied_embeddings {
            checkpoint.drop_copied_output()?;
        }
        Ok(checkpoint)
    }

    fn new(path: PathBuf, files: Vec<MappedFile>, tensors: BTreeMap<String, Stored>) -> Self {
        Self { path, files, tensors, taken: Mutex::default() }
    }

    fn drop_copied_output(&mut self) -> Result<()> {
        let Some(output) = self.tensors.remove(OUTPUT) else { return Ok(()) };
        let same = self.tensors.get(EMBEDDING).is_some_and(|embedding| {
            embedding.shape == output.shape
                && embedding.format == output.format
                && self.bytes(embedding) == self.bytes(&output)
        });
        if same {
            return Ok(());
        }
        Err(self
            .error("a tied model stores an output matrix of its own", OUTPUT)
            .expected(format!("no such tensor, or the same bytes as {EMBEDDING}"))
            .hint("if it is not tied, say tie_word_embeddings false in config.json"))
    }

    /// Whether there is a tensor of this canonical name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor by its canonical name, the one that Hugging Face folders of its family have: of
    /// Llama `model.embed_tokens.weight`, `model.norm.weight`, `lm_head.weight`, and in
    /// `model.layers.{i}.`: `input_layernorm.weight`, `post_attention_layernorm.weight`,
    /// `self_attn.{q,k,v,o}_proj.weight`, `mlp.{gate,up,down}_proj.weight`.
    ///
    /// # Errors
    ///
    /// It is not there, has another shape, or was taken before.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let tensor = self.look_at(name, shape)?;
        if !self.taken().insert(name.to_owned()) {
            return Err(self.error("a tensor is used twice", name));
        }
        Ok(tensor)
    }

    /// Likewise, without taking it.
    ///
    /// # Errors
    ///
    /// It is not there, or has another shape.
    pub fn look_at(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let Some(stored) = self.tensors.get(name) else {
            return Err(self.error("a tensor is missing", name).expected(format!("{shape:?}")));
        };
        if stored.shape != shape {
            return Err(self
                .error("wrong tensor shape", name)
                .expected(format!("{shape:?}"))
                .got(format!("{:?}", stored.shape)));
        }
        let cols = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().rev().skip(1).product();
        let Stored { format, interleaved, .. } = *stored;
        Ok(Tensor { data: self.bytes(stored), format, rows, cols, interleaved })
    }

    /// Checks that every tensor was taken; the checkpoint can then be read again.
    ///
    /// # Errors
    ///
    /// Names those that were not.
    pub fn finish(&self) -> Result<()> {
        let mut taken = self.taken();
        let left: Vec<&str> =
            self.tensors.keys().map(String::as_str).filter(|name| !taken.contains(*name)).collect();
        if left.is_empty() {
            taken.clear();
            return Ok(());
        }
        let shown = left.iter().take(8).copied().collect::<Vec<_>>().join(", ");
        let more = if left.len() > 8 { ", …" } else { "" };
        Err(Error::new("the model has tensors that its architecture does not use")
            .at(self.path.display().to_string())
            .got(format!("{}: {shown}{more}", left.len())))
    }

    /// All names and shapes.
    #[cfg(any(test, fuzzing))]
    pub(super) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors.iter().map(|(name, stored)| (name.clone(), stored.shape.clone())).collect()
    }

    /// The weight files.
    pub(super) fn files(&self) -> &[MappedFile] {
        &self.files
    }

    fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.files[stored.file].bytes()[stored.bytes.clone()]
    }

    /// A thread that died while it took a tensor left nothing half done.
    fn taken(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.taken.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn error(&self, what: &str, name: &str) -> Error {
        Error::new(what).at(name).at(self.path.display().to_string())
    }
}

impl Tensor<'_> {
    /// Rows; a (dim,) tensor is one.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Reads a tensor of one row, such as a bias or a gain, in Hugging Face's order.
    ///
    /// # Panics
    ///
    /// Where `out` is not as long as the tensor.
    pub fn read_vector(&self, out: &mut [f32]) {
        assert!(self.rows == 1 && out.len() == self.cols, "a vector of {} numbers", out.len());
        self.format.dequantise(self.data, out);
        if let Some(head_dim) = self.interleaved {
            let stored = out.to_vec();
            for (at, value) in out.iter_mut().enumerate() {
                *value = stored[interleaved_row(at, head_dim)];
            }
        }
    }

    /// Reads a row, exactly dequantised, in Hugging Face's order of rows.
    ///
    /// # Panics
    ///
    /// Where there is no such row or `out` is not `cols` long.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} numbers", out.len());
        let row = self.interleaved.map_or(row, |head_dim| interleaved_row(row, head_dim));
        let size = self.data.len() / self.rows;
        self.format.dequantise(&self.data[row * size..][..size], out);
    }
}

/// Where the row of a q or k projection stands in a GGUF file: there a head's rows are
/// 0, d/2, 1, d/2 + 1, …, so that the pairs that rope turns are neighbours.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, place) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + if place < half { 2 * place } else { 2 * (place - half) + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_are_read_in_halves() {
        // Two heads of width 6, stored 0 3 1 4 2 5.
        let stored: Vec<usize> = vec![0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
        let data: Vec<u8> = stored.iter().flat_map(|n| (*n as f32).to_le_bytes()).collect();
        let tensor =
            Tensor { data: &data, format: Format::F32, rows: 12, cols: 1, interleaved: Some(6) };
        for row in 0..12 {
            let mut out = [f32::NAN];
            tensor.read_row(row, &mut out);
            assert_eq!(out, [row as f32]);
        }
    }
}
