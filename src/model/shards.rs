//! Hugging Face weights: `model.safetensors`, or shards named by `model.safetensors.index.json`.
//!
//! A safetensors file is a header's length (u64, little endian), the header (JSON: name to dtype,
//! shape and byte range) and the data, which the tensors tile in full.

use std::{collections::BTreeMap, ops::Range, path::Path};

use fs_err as fs;
use serde::Deserialize;
use serde_json::Value;

use super::{
    files::{INDEX, SINGLE},
    format::Format,
};
use crate::{
    device::MappedFile,
    error::{Context, Error, Result},
};

/// The format's own limit on the header.
const MAX_HEADER: u64 = 100_000_000;
const DAMAGED: &str = "the file is truncated or its header is damaged: fetch it again";

/// One tensor of a safetensors file.
#[derive(Clone, Debug)]
pub struct TensorRecord {
    /// Row length last.
    pub shape: Vec<usize>,
    /// How its numbers are stored.
    pub format: Format,
    /// Where its bytes stand in the file.
    pub bytes: Range<usize>,
}

/// A file with its tensors by name.
pub(super) type Opened = (MappedFile, BTreeMap<String, TensorRecord>);

/// The weight files of a folder, each with its tensors by name; no name stands in two files.
pub fn open(folder: &Path) -> Result<Vec<Opened>> {
    if folder.join(SINGLE).is_file() {
        return Ok(vec![open_file(&folder.join(SINGLE))?]);
    }
    let index = folder.join(INDEX);
    if !index.is_file() {
        return Err(Error::new("no weights in the model's folder")
            .at(folder.display().to_string())
            .expected(format!("{SINGLE} or {INDEX}"))
            .hint("only safetensors and GGUF weights are read"));
    }
    let map = read_index(&index)?;
    let mut files = Vec::new();
    for name in names(&map).at(|| index.display().to_string())? {
        let (file, tensors) = open_file(&folder.join(name))?;
        for tensor in tensors.keys() {
            if map.get(tensor) != Some(name) {
                return Err(Error::new(
                    "a shard holds a tensor that the index does not place there",
                )
                .at(file.path().display().to_string())
                .got(tensor));
            }
        }
        let missing = map.iter().find(|(t, shard)| *shard == name && !tensors.contains_key(*t));
        if let Some((tensor, _)) = missing {
            return Err(Error::new("a shard lacks a tensor that the index places there")
                .at(file.path().display().to_string())
                .expected(tensor));
        }
        files.push((file, tensors));
    }
    Ok(files)
}

/// The shards that an index names, in order.
///
/// # Errors
///
/// It is no index, or names what is no plain file name.
pub fn named(index: &Path) -> Result<Vec<String>> {
    let map = read_index(index)?;
    let names = names(&map).at(|| index.display().to_string())?;
    Ok(names.into_iter().cloned().collect())
}

pub(super) fn names(map: &BTreeMap<String, String>) -> Result<Vec<&String>> {
    let mut names: Vec<&String> = map.values().collect();
    names.sort_unstable();
    names.dedup();
    let plain = |name: &str| Path::new(name).file_name().is_some_and(|file| file == name);
    match names.iter().find(|name| !plain(name)) {
        Some(name) => Err(Error::new("a shard is not a plain file name").got(name)),
        None => Ok(names),
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    parse_index(&fs::read(path)?).at(|| path.display().to_string())
}

/// Tensor to shard.
pub(super) fn parse_index(bytes: &[u8]) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes)
        .map_err(|error| Error::new(format!("not a safetensors index: {error}")))?;
    Ok(index.weight_map)
}

fn open_file(path: &Path) -> Result<Opened> {
    let file = MappedFile::open(path)?;
    let tensors = parse(file.bytes()).at(|| path.display().to_string())?;
    Ok((file, tensors))
}

/// Parses a whole file's header.
pub(super) fn parse(bytes: &[u8]) -> Result<BTreeMap<String, TensorRecord>> {
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| {
        Error::new("not a safetensors file").got(format!("{} bytes", bytes.len())).hint(DAMAGED)
    })?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        return Err(Error::new("the safetensors header is longer than can be")
            .expected(format!("at most {} bytes", MAX_HEADER.min(rest.len() as u64)))
            .got(length)
            .hint(DAMAGED));
    }
    let (header, data) = rest.split_at(length as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).map_err(|error| {
        Error::new(format!("the safetensors header is not JSON: {error}")).hint(DAMAGED)
    })?;
    let mut tensors = BTreeMap::new();
    for (name, value) in header {
        if name == "__metadata__" {
            continue;
        }
        let tensor = record(&value, bytes.len() - data.len(), data.len()).at(|| name.clone())?;
        tensors.insert(name, tensor);
    }
    check_tiling(&tensors, bytes.len() - data.len(), bytes.len())?;
    Ok(tensors)
}

/// `start` and `size`: where the data stands in the file and its bytes.
fn record(value: &Value, start: usize, size: usize) -> Result<TensorRecord> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Record {
        dtype: String,
        shape: Vec<usize>,
        data_offsets: (usize, usize),
    }
    let record = Record::deserialize(value)
        .map_err(|error| Error::new(format!("bad tensor record: {error}")).hint(DAMAGED))?;
    let format = match record.dtype.as_str() {
        "F32" => Format::F32,
        "F16" => Format::F16,
        "BF16" => Format::Bf16,
        other => {
            return Err(Error::new("unsupported tensor type")
                .expected("F32, F16 or BF16")
                .got(other));
        }
    };
    let (from, to) = record.data_offsets;
    if from > to || to > size {
        return Err(Error::new("a tensor's data is outside the file")
            .expected(format!("a range in 0..{size}"))
            .got(format!("{from}..{to}"))
            .hint(DAMAGED));
    }
    if record.shape.is_empty() || record.shape.contains(&0) {
        return Err(Error::new("a tensor has no numbers")
            .expected("dimensions above 0")
            .got(format!("{:?}", record.shape))
            .hint(DAMAGED));
    }
    let count = record.shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    let expected = count.and_then(|count| format.bytes(1, count));
    if expected != Some(to - from) {
        return Err(Error::new("a tensor's shape does not fit its bytes")
            .expected(format!("the {} bytes of {from}..{to}", to - from))
            .got(format!("{:?} of type {}", record.shape, format.name()))
            .hint(DAMAGED));
    }
    Ok(TensorRecord { shape: record.shape, format, bytes: start + from..start + to })
}

/// The data is tiled: no gap, no overlap, nothing left over.
fn check_tiling(tensors: &BTreeMap<String, TensorRecord>, start: usize, end: usize) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, tensor)| (tensor.bytes.start, tensor.bytes.end));
    let mut at = start;
    for (name, tensor) in order {
        if tensor.bytes.start != at {
            return Err(Error::new("tensors overlap or leave a gap in the file")
                .at(name)
                .expected(format!("data from byte {at}"))
                .got(tensor.bytes.start)
                .hint(DAMAGED));
        }
        at = tensor.bytes.end;
    }
    if at != end {
        return Err(Error::new("the file does not end with its last tensor")
            .expected(format!("{at} bytes"))
            .got(end)
            .hint(DAMAGED));
    }
    Ok(())
}
