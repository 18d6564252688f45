//! Vector files: named vectors for one model, at one or more layers.
//!
//! A vector set is a safetensors file with one f32 tensor a vector, (dim,) or (layers, dim), and a
//! header in its metadata that says what the vectors are of. Plain safetensors files (f32, f16 or
//! bf16, no header) and GGUF control vectors are read too.

mod npy;
mod sae;

pub use npy::header as npy_header;

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

use fs_err as fs;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Context, Error, Result},
    files,
    model::gguf::{self, Gguf},
    request::{Op, Site},
};

/// The key of the header in the safetensors metadata.
const HEADER_KEY: &str = "inkling.vectors";
/// `general.architecture` of a GGUF control vector.
const CONTROL_VECTOR: &str = "controlvector";
/// Version of the header's layout.
const FORMAT: u32 = 1;
/// Norms in the header may differ from the vectors' by this part: f32 summation order.
const NORM_TOLERANCE: f32 = 1e-3;

/// What a set's vectors are of; everything empty for a file without a header.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Header {
    /// The model's [`Model::hash`](crate::model::Model::hash).
    pub model_hash: Option<String>,
    /// Where they were taken.
    pub site: Option<Site>,
    /// The block of each row, ascending; empty: not said (row i is block i where there are
    /// several rows, any block where there is one).
    pub layers: Vec<usize>,
    /// What is meant to be done with them.
    pub operation: Op,
    /// How they were made, in words.
    pub recipe: String,
}

/// How layers are counted in a header, in words: a file that says otherwise is refused.
const NUMBERING: &str = "block, from 0";

/// The header as it stands in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredHeader {
    format: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    site: Option<Site>,
    layers: Vec<usize>,
    /// See [`NUMBERING`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer_numbering: Option<String>,
    #[serde(default)]
    operation: Op,
    recipe: String,
    /// ‖v‖ of each row of each vector.
    norms: BTreeMap<String, Vec<f32>>,
}

/// Named vectors of one width.
///
/// ```
/// use inkling::{VectorSet, engine::vectors::Header, request::Site};
///
/// let header = Header { site: Some(Site::ResidPost), layers: vec![10, 11], ..Header::default() };
/// let mut set = VectorSet::new(header);
/// set.insert("ocean", vec![vec![1.0, 0.0], vec![0.0, 2.0]])?;
/// let path = std::env::temp_dir().join("inkling-doc-set.safetensors");
/// set.save(&path)?;
/// let again = VectorSet::load(&path)?;
/// assert_eq!(again, set);
/// assert_eq!(*again.get("ocean", Some(11))?, [0.0, 2.0]);
/// # std::fs::remove_file(path)?;
/// # Ok::<(), inkling::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VectorSet {
    /// What they are of.
    pub header: Header,
    vectors: BTreeMap<String, Rows>,
}

/// One vector's values at each of its layers.
#[derive(Clone, Debug, PartialEq)]
struct Rows {
    /// (layers) of (dim,).
    rows: Vec<Arc<[f32]>>,
    /// A (dim,) tensor, not a (1, dim) one.
    flat: bool,
}

impl VectorSet {
    /// A set without vectors yet.
    pub fn new(header: Header) -> Self {
        Self { header, vectors: BTreeMap::new() }
    }

    /// Adds a vector: one row of (dim,) for each of the header's layers. An error for a name taken
    /// twice, another number of rows or width than the rest, and values that are not finite.
    pub fn insert(&mut self, name: &str, rows: Vec<Vec<f32>>) -> Result<()> {
        let flat = rows.len() == 1;
        let rows = rows.into_iter().map(Arc::from).collect();
        self.insert_rows(name, Rows { rows, flat })
    }

    fn insert_rows(&mut self, name: &str, vector: Rows) -> Result<()> {
        let place = || format!("vector {name:?}");
        let Some(dim) = vector.rows.first().map(|row| row.len()).filter(|dim| *dim > 0) else {
            return Err(Error::new("empty vector").at(place()));
        };
        let layers = self.header.layers.len();
        if layers != 0 && vector.rows.len() != layers {
            return Err(Error::new(
                "the header names another number of layers than the vector has",
            )
            .at(place())
            .expected(format!("{layers} rows"))
            .got(vector.rows.len()));
        }
        if let Some(bad) = vector.rows.iter().position(|row| row.iter().any(|v| !v.is_finite())) {
            return Err(Error::new("the vector has values that are not finite")
                .at(place())
                .got(format!("row {bad}")));
        }
        let width = self.dim().unwrap_or(dim);
        if let Some(row) = vector.rows.iter().find(|row| row.len() != width) {
            return Err(Error::new("vectors of different widths in one set")
                .at(place())
                .expected(width)
                .got(row.len()));
        }
        if self.vectors.insert(name.to_owned(), vector).is_some() {
            return Err(Error::new("two vectors of one name").at(place()));
        }
        Ok(())
    }

    /// The vectors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.vectors.keys().map(String::as_str)
    }

    /// The vectors' width; `None` for an empty set.
    pub fn dim(&self) -> Option<usize> {
        self.vectors.values().next().map(|vector| vector.rows[0].len())
    }

    /// How many layers a vector has where row i is block i because no header says otherwise; `None`
    /// where the header names the layers, or the vector is one (dim,) row for any block.
    pub fn unnamed_layers(&self, name: &str) -> Result<Option<usize>> {
        let vector = self.find(name)?;
        let unnamed = self.header.layers.is_empty() && !vector.flat;
        Ok(unnamed.then_some(vector.rows.len()))
    }

    /// The vector of a block, (dim,); without `layer`, of the only one there is.
    pub fn get(&self, name: &str, layer: Option<usize>) -> Result<Arc<[f32]>> {
        let vector = self.find(name)?;
        let row = match layer {
            None if vector.rows.len() == 1 => Some(0),
            None => None,
            Some(layer) if !self.header.layers.is_empty() => {
                self.header.layers.iter().position(|known| *known == layer)
            }
            Some(_) if vector.flat => Some(0),
            Some(layer) => (layer < vector.rows.len()).then_some(layer),
        };
        row.map(|row| vector.rows[row].clone()).ok_or_else(|| {
            let layers = if self.header.layers.is_empty() {
                format!("0..={}", vector.rows.len() - 1)
            } else {
                format!("one of {:?}", self.header.layers)
            };
            Error::new("the set has no vector for this layer")
                .at(format!("vector {name:?}"))
                .expected(layers)
                .got(layer.map_or_else(|| "no layer".into(), |layer| layer.to_string()))
        })
    }

    fn find(&self, name: &str) -> Result<&Rows> {
        self.vectors.get(name).ok_or_else(|| {
            let some: Vec<&str> = self.names().take(8).collect();
            let more = if self.vectors.len() > some.len() { ", ..." } else { "" };
            Error::new("no vector of this name")
                .expected(format!("one of {}{more}", some.join(", ")))
                .got(format!("{name:?}"))
        })
    }

    /// Reads a set. An error for anything that is not one: other types or shapes, values that are
    /// not finite, a header that does not fit the tensors.
    pub fn load(path: &Path) -> Result<Self> {
        if !fs::metadata(path)?.is_file() {
            return Err(Error::new("not a file of vectors")
                .at(path.display().to_string())
                .expected("a file, not a folder or a device"));
        }
        let stem = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
        Self::parse(&fs::read(path)?, &stem).at(|| path.display().to_string())
    }

    /// `stem` names the vector of a file that names none.
    pub(crate) fn parse(bytes: &[u8], stem: &str) -> Result<Self> {
        if npy::is_npy(bytes) {
            let (shape, values) = npy::parse(bytes)?;
            let mut set = Self::default();
            set.insert_rows(stem, rows_of(stem, &shape, &values)?)?;
            return Ok(set);
        }
        if Gguf::is_gguf(bytes) {
            return Self::parse_control_vector(bytes);
        }
        let broken = |error: safetensors::SafeTensorError| {
            Error::new("not a safetensors file").got(error.to_string())
        };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let stored = metadata.metadata().as_ref().and_then(|map| map.get(HEADER_KEY));
        let stored = stored.map(|text| parse_header(text)).transpose()?;
        let header = stored.as_ref().map_or_else(Header::default, |stored| Header {
            model_hash: stored.model_hash.clone(),
            site: stored.site,
            layers: stored.layers.clone(),
            operation: stored.operation,
            recipe: stored.recipe.clone(),
        });
        let mut set = Self::new(header);
        for (name, view) in tensors.iter() {
            set.insert_rows(name, read_rows(name, &view)?)?;
        }
        if set.vectors.is_empty() {
            return Err(Error::new("no vectors in the file"));
        }
        if let Some(stored) = stored {
            check_norms(&stored.norms, &set.norms())?;
        }
        Ok(set)
    }

    /// A GGUF control vector: `direction.N` is added to the output of block N. The set's only
    /// vector is called `direction`.
    fn parse_control_vector(bytes: &[u8]) -> Result<Self> {
        let gguf = Gguf::parse(bytes)?;
        let architecture = gguf.text("general.architecture")?.unwrap_or_default();
        if architecture != CONTROL_VECTOR {
            return Err(Error::new("not a GGUF control vector")
                .at("general.architecture")
                .expected(CONTROL_VECTOR)
                .got(format!("{architecture:?}")));
        }
        let mut rows = BTreeMap::new();
        for (name, tensor) in &gguf.tensors {
            let layer = name.strip_prefix("direction.").and_then(|layer| layer.parse().ok());
            let (Some(layer), &[dim]) = (layer, &tensor.shape[..]) else {
                return Err(Error::new("not a tensor of a control vector")
                    .at(format!("tensor {name:?}"))
                    .expected("direction.LAYER of shape (dim,)")
                    .got(format!("shape {:?}", tensor.shape)));
            };
            let mut row = vec![0.0; dim];
            tensor.format.dequantise(&bytes[tensor.bytes.clone()], &mut row);
            if rows.insert(layer, row).is_some() {
                return Err(Error::new("two directions of one layer").got(name));
            }
        }
        let mut set = Self::new(Header {
            model_hash: None,
            site: Some(Site::ResidPost),
            layers: rows.keys().copied().collect(),
            operation: Op::Add,
            recipe: "GGUF control vector".into(),
        });
        set.insert("direction", rows.into_values().collect())?;
        Ok(set)
    }

    /// ‖v‖ of each row of each vector.
    fn norms(&self) -> BTreeMap<String, Vec<f32>> {
        let norms = |vector: &Rows| vector.rows.iter().map(|row| norm(row)).collect();
        self.vectors.iter().map(|(name, vector)| (name.clone(), norms(vector))).collect()
    }

    /// Writes the set's only vector as a GGUF control vector, which llama.cpp and repeng read; gives the
    /// blocks left out. A row is `direction.LAYER`; they have no `direction.0`.
    pub fn save_control_vector(&self, path: &Path, model_hint: &str) -> Result<Vec<usize>> {
        let vectors: Vec<&Rows> = self.vectors.values().collect();
        let [vector] = vectors[..] else {
            return Err(Error::new("a GGUF file has one control vector")
                .at(path.display().to_string())
                .expected("a set of one vector")
                .got(format!("{} vectors", vectors.len())));
        };
        if self.header.site.is_some_and(|site| site != Site::ResidPost) {
            return Err(Error::new("a control vector is added to the outputs of blocks")
                .at(path.display().to_string())
                .expected("vectors of resid_post"));
        }
        let rows = self.header.layers.iter().zip(&vector.rows);
        let (kept, left): (Vec<_>, Vec<_>) = rows.partition(|(layer, _)| **layer > 0);
        if kept.is_empty() {
            return Err(Error::new("no block of the vector has a place in a control vector")
                .expected("a block from 1 on"));
        }
        let texts = [
            ("general.architecture", CONTROL_VECTOR),
            ("controlvector.model_hint", model_hint),
            ("inkling.recipe", &self.header.recipe),
        ];
        let depth = kept.last().map_or(0, |(layer, _)| **layer as u32);
        let counts = [("controlvector.layer_count", depth)];
        let tensors = kept.iter().map(|(layer, row)| (format!("direction.{layer}"), &row[..]));
        files::write_atomically(path, &gguf::write(&texts, &counts, tensors))?;
        Ok(left.into_iter().map(|(layer, _)| *layer).collect())
    }

    /// Writes the set's only vector as `.npy`, (layers, dim) f32, or (dim,) of one layer. It says nothing of what it
    /// is.
    ///
    /// # Errors
    /// The set has another number of vectors; the file cannot be written.
    pub fn save_npy(&self, path: &Path) -> Result<()> {
        let vectors: Vec<&Rows> = self.vectors.values().collect();
        let [vector] = vectors[..] else {
            return Err(Error::new("an .npy file has one array")
                .at(path.display().to_string())
                .expected("a set of one vector")
                .got(format!("{} vectors", vectors.len())));
        };
        let (shape, data) = encode_rows(vector);
        files::write_atomically(path, &[npy::header("<f4", &shape), data].concat())
    }

    /// Reads decoder rows of a sparse autoencoder, a folder that `SAELens` wrote: `cfg.json` and
    /// `sae_weights.safetensors` with `W_dec` (features, dim). Gives the rows `feature_N` without a place,
    /// and the name of the point that they are of.
    ///
    /// # Errors
    /// It is no such folder; there is no such feature.
    pub fn load_sae(dir: &Path, features: &[usize]) -> Result<(Self, String)> {
        sae::load(dir, features)
    }

    /// Writes the set with its header; the file appears whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let stored = StoredHeader {
            format: FORMAT,
            model_hash: self.header.model_hash.clone(),
            site: self.header.site,
            layers: self.header.layers.clone(),
            layer_numbering: Some(NUMBERING.into()),
            operation: self.header.operation,
            recipe: self.header.recipe.clone(),
            norms: self.norms(),
        };
        let text = serde_json::to_string(&stored)
            .map_err(|error| Error::new("can't write the header").got(error))?;
        let data: Vec<(Vec<usize>, Vec<u8>)> = self.vectors.values().map(encode_rows).collect();
        let mut views = Vec::with_capacity(data.len());
        for (name, (shape, bytes)) in self.names().zip(&data) {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes)
                .map_err(|error| Error::new("can't write the vector").at(name).got(error))?;
            views.push((name, view));
        }
        let metadata = HashMap::from([(HEADER_KEY.to_owned(), text)]);
        let bytes = safetensors::serialize(views, Some(metadata))
            .map_err(|error| Error::new("can't write the vectors").got(error))?;
        files::write_atomically(path, &bytes)
    }
}

/// ‖v‖, summed in f64.
pub fn norm(vector: &[f32]) -> f32 {
    super::norm(vector) as f32
}

fn parse_header(text: &str) -> Result<StoredHeader> {
    let header: StoredHeader = serde_json::from_str(text).map_err(|error| {
        Error::new("malformed header").at(format!("metadata {HEADER_KEY:?}")).got(error)
    })?;
    if header.format != FORMAT {
        return Err(Error::new("unknown version of the vector set format")
            .expected(FORMAT)
            .got(header.format)
            .hint("the file was written by another version of inkling"));
    }
    if let Some(numbering) = header.layer_numbering.as_ref().filter(|n| *n != NUMBERING) {
        return Err(Error::new("layers are counted in an unknown way")
            .expected(NUMBERING)
            .got(format!("{numbering:?}")));
    }
    if header.layers.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(
            Error::new("the header's layers are not ascending").got(format!("{:?}", header.layers))
        );
    }
    Ok(header)
}

fn check_norms(
    stored: &BTreeMap<String, Vec<f32>>,
    actual: &BTreeMap<String, Vec<f32>>,
) -> Result<()> {
    let close = |a: &f32, b: &f32| (a - b).abs() <= NORM_TOLERANCE * b.abs().max(f32::MIN_POSITIVE);
    for (name, norms) in actual {
        let claimed = stored.get(name).map_or(&[][..], Vec::as_slice);
        if claimed.len() != norms.len() || !claimed.iter().zip(norms).all(|(a, b)| close(a, b)) {
            return Err(Error::new("the header's norms are not those of the vectors")
                .at(format!("vector {name:?}"))
                .expected(format!("{norms:?}"))
                .got(format!("{claimed:?}"))
                .hint("the file was changed after it was written: make the set again"));
        }
    }
    if let Some(name) = stored.keys().find(|name| !actual.contains_key(*name)) {
        return Err(Error::new("the header names a vector that is not there").got(name));
    }
    Ok(())
}

fn read_rows(name: &str, view: &TensorView) -> Result<Rows> {
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => to_f32(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => to_f32(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        other => {
            return Err(Error::new("not the type of a vector")
                .at(format!("tensor {name:?}"))
                .expected("F32, F16 or BF16")
                .got(format!("{other:?}")));
        }
    };
    rows_of(name, view.shape(), &values)
}

/// Rows of (dim,) or (layers, dim).
fn rows_of(name: &str, shape: &[usize], values: &[f32]) -> Result<Rows> {
    let place = || format!("tensor {name:?}");
    let (layers, dim) = match *shape {
        [dim] => (1, dim),
        [layers, dim] => (layers, dim),
        _ => {
            return Err(Error::new("not the shape of a vector")
                .at(place())
                .expected("(dim,) or (layers, dim)")
                .got(format!("{shape:?}")));
        }
    };
    if layers * dim == 0 {
        return Err(Error::new("empty vector").at(place()));
    }
    let rows = values.chunks_exact(dim).map(Arc::from).collect();
    Ok(Rows { rows, flat: shape.len() == 1 })
}

fn to_f32(bytes: &[u8], convert: impl Fn([u8; 2]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| convert(*b)).collect()
}

/// Shape and little-endian f32 bytes.
fn encode_rows(vector: &Rows) -> (Vec<usize>, Vec<u8>) {
    let dim = vector.rows[0].len();
    let shape = if vector.flat { vec![dim] } else { vec![vector.rows.len(), dim] };
    let values = vector.rows.iter().flat_map(|row| row.iter());
    (shape, values.flat_map(|v| v.to_le_bytes()).collect())
}

/// The vector files that requests name, each read once.
#[derive(Default)]
pub struct VectorFiles {
    base: PathBuf,
    sets: HashMap<PathBuf, Arc<VectorSet>>,
    /// By a hash of their bits.
    shared: HashMap<u64, Vec<Arc<[f32]>>>,
}

impl VectorFiles {
    /// Relative paths are taken from `base`: the folder of the request file.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self { base: base.into(), ..Self::default() }
    }

    /// The same numbers in the same memory, whoever asks: the engine holds each piece once.
    pub fn share(&mut self, numbers: Vec<f32>) -> Arc<[f32]> {
        let bits = |numbers: &[f32]| numbers.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        let mut hasher = DefaultHasher::new();
        bits(&numbers).hash(&mut hasher);
        let known = self.shared.entry(hasher.finish()).or_default();
        if let Some(same) = known.iter().find(|other| bits(other) == bits(&numbers)) {
            return Arc::clone(same);
        }
        known.push(numbers.into());
        Arc::clone(&known[known.len() - 1])
    }

    /// The set in a file.
    pub fn get(&mut self, file: &str) -> Result<Arc<VectorSet>> {
        let path = self.base.join(file);
        if let Some(set) = self.sets.get(&path) {
            return Ok(set.clone());
        }
        let set = Arc::new(VectorSet::load(&path)?);
        self.sets.insert(path, set.clone());
        Ok(set)
    }
}

#[cfg(test)]
#[path = "vectors_tests.rs"]
mod tests;
