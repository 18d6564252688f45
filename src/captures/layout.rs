//! In which files tensors stand, and where: known before anything runs, so that they can be written in any
//! order and in pieces.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::tensors::{Item, Precision, Spec};
use crate::{
    engine::vectors::npy_header,
    error::{Error, Result},
    model::ModelConfig,
};

/// How tensors are divided among files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// `captures-00001-of-00003.safetensors` and so on, with tensors `{id}/{point}`, and an index.
    #[default]
    Shards,
    /// `{id}.safetensors` with `hidden_states` (tokens, layers, dim) and `token_ids` (tokens,).
    Requests,
    /// `{point}.npy`: the rows of all requests, one below the other.
    Npy,
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "shards" => Ok(Self::Shards),
            "requests" => Ok(Self::Requests),
            "npy" => Ok(Self::Npy),
            other => {
                Err(Error::new("no such layout").expected("shards, requests or npy").got(other))
            }
        }
    }
}

/// A file that is planned.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedFile {
    /// In the folder.
    pub name: String,
    /// What stands before the tensors.
    pub header: Vec<u8>,
    /// In all.
    pub bytes: u64,
    /// How many requests have tensors in it.
    pub requests: usize,
}

/// Bytes that are written where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which of the files.
    pub file: usize,
    /// From its beginning.
    pub offset: u64,
    /// How many rows' parts stand this far apart, each of `row_bytes`; 0: all bytes follow each other.
    pub stride: u64,
    /// Of a row, where there is a stride.
    pub row_bytes: u64,
}

/// Where everything goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    /// All files.
    pub files: Vec<PlannedFile>,
    /// (requests, their tensors): as [`Item::specs`] gives them.
    pub extents: Vec<Vec<Extent>>,
    /// Bytes written as they are, of a request: its token ids.
    pub extra: Vec<Vec<(Extent, Vec<u8>)>>,
}

impl Layout {
    /// Plans the files of requests, whose tensors are `specs`. `shard_bytes`: about how large a shard is.
    ///
    /// # Errors
    /// The layout cannot hold such tensors; an id is no file name.
    pub fn plan(
        self,
        items: &[Item],
        config: &ModelConfig,
        precision: Precision,
        shard_bytes: u64,
    ) -> Result<Files> {
        let specs: Vec<Vec<Spec>> = items.iter().map(|item| item.specs(config)).collect();
        match self {
            Self::Shards => shards(items, &specs, precision, shard_bytes),
            Self::Requests => requests(items, &specs, precision),
            Self::Npy => arrays(&specs, precision),
        }
    }
}

fn bytes_of(spec: &Spec, precision: Precision) -> u64 {
    (spec.shape.iter().product::<usize>() * spec.kind.bytes(precision)) as u64
}

/// One safetensors file that has all tensors, `{id}/{point}`.
///
/// # Errors
/// Two have one name.
pub fn single(items: &[Item], config: &ModelConfig, precision: Precision) -> Result<Files> {
    let specs: Vec<Vec<Spec>> = items.iter().map(|item| item.specs(config)).collect();
    shards_of(vec![(0..items.len()).collect()], items, &specs, precision)
}

/// Readers of safetensors refuse headers of more than 100 MB.
const HEADER_BYTES: usize = 50_000_000;
/// Of a tensor in a header, beside its name.
const ENTRY_BYTES: usize = 128;

/// About how long a tensor's part of a header is: its name, twice where its columns are named.
fn header_bytes(id: &str, spec: &Spec) -> usize {
    let name = id.len() + spec.point.len();
    let columns: usize = spec.columns.iter().map(|column| column.len() + 1).sum();
    ENTRY_BYTES + name + if columns > 0 { name + columns + 16 } else { 0 }
}

/// The name of the index of shards.
pub const INDEX: &str = "captures.safetensors.index.json";

fn shards(
    items: &[Item],
    specs: &[Vec<Spec>],
    precision: Precision,
    shard_bytes: u64,
) -> Result<Files> {
    let size = |specs: &Vec<Spec>| specs.iter().map(|spec| bytes_of(spec, precision)).sum::<u64>();
    // Requests are not divided.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let (mut left, mut header_left) = (0, 0);
    for (request, specs) in specs.iter().enumerate() {
        let bytes = size(specs);
        let header: usize = specs.iter().map(|spec| header_bytes(&items[request].id, spec)).sum();
        if groups.is_empty() || bytes > left || header > header_left {
            groups.push(Vec::new());
            (left, header_left) = (shard_bytes, HEADER_BYTES);
        }
        left = left.saturating_sub(bytes);
        header_left = header_left.saturating_sub(header);
        if let Some(group) = groups.last_mut() {
            group.push(request);
        }
    }
    shards_of(groups, items, specs, precision)
}

/// A file for each group of requests.
fn shards_of(
    groups: Vec<Vec<usize>>,
    items: &[Item],
    specs: &[Vec<Spec>],
    precision: Precision,
) -> Result<Files> {
    let count = groups.len();
    let mut files = Vec::new();
    let mut extents = vec![Vec::new(); items.len()];
    for (file, group) in groups.iter().enumerate() {
        let named = group.iter().flat_map(|&request| {
            specs[request]
                .iter()
                .map(move |spec| (request, format!("{}/{}", items[request].id, spec.point), spec))
        });
        let tensors: Vec<(usize, String, &Spec)> = named.collect();
        let entries = tensors.iter().map(|(_, name, spec)| {
            (
                name.clone(),
                spec.kind.safetensors(precision),
                spec.shape.clone(),
                bytes_of(spec, precision),
            )
        });
        let columns = tensors.iter().filter(|(.., spec)| !spec.columns.is_empty());
        let columns: BTreeMap<String, String> = columns
            .map(|(_, name, spec)| (format!("{name}.columns"), spec.columns.join(",")))
            .collect();
        let (header, offsets) = safetensors(entries, &columns)?;
        let end = tensors.iter().map(|(.., spec)| bytes_of(spec, precision)).sum::<u64>();
        let bytes = header.len() as u64 + end;
        for ((request, ..), offset) in tensors.iter().zip(offsets) {
            extents[*request].push(Extent { file, offset, stride: 0, row_bytes: 0 });
        }
        let name = format!("captures-{:05}-of-{count:05}.safetensors", file + 1);
        files.push(PlannedFile { name, header, bytes, requests: group.len() });
    }
    Ok(Files { files, extents, extra: vec![Vec::new(); items.len()] })
}

fn requests(items: &[Item], specs: &[Vec<Spec>], precision: Precision) -> Result<Files> {
    let mut planned = Files { files: Vec::new(), extents: Vec::new(), extra: Vec::new() };
    for (file, (item, specs)) in items.iter().zip(specs).enumerate() {
        let first = check_uniform(item, specs)?;
        let (tokens, row) = (first.positions.len(), &first.shape[1..]);
        let layers = specs.len();
        let row_bytes = (row.iter().product::<usize>() * precision.bytes()) as u64;
        let states = [vec![tokens, layers], row.to_vec()].concat();
        let ids =
            |values: Vec<i64>| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let positions = first.positions.iter().map(|&position| position as i64).collect();
        let token = |&position: &usize| i64::from(item.job.tokens[position]);
        let token_ids = ids(first.positions.iter().map(token).collect());
        let mut extra = vec![("token_ids", token_ids)];
        if tokens != item.job.tokens.len() {
            extra.push(("positions", ids(positions)));
        }
        let mut entries = vec![(
            "hidden_states".to_owned(),
            first.kind.safetensors(precision),
            states,
            tokens as u64 * layers as u64 * row_bytes,
        )];
        entries.extend(
            extra
                .iter()
                .map(|(name, bytes)| ((*name).to_owned(), "I64", vec![tokens], bytes.len() as u64)),
        );
        let points: Vec<&str> = specs.iter().map(|spec| spec.point.as_str()).collect();
        let metadata = BTreeMap::from([("points".to_owned(), points.join(","))]);
        let sizes: u64 = entries.iter().map(|(.., bytes)| bytes).sum();
        let (header, offsets) = safetensors(entries.into_iter(), &metadata)?;
        let bytes = header.len() as u64 + sizes;
        planned.extents.push(
            (0..layers as u64)
                .map(|at| Extent {
                    file,
                    offset: offsets[0] + at * row_bytes,
                    stride: layers as u64 * row_bytes,
                    row_bytes,
                })
                .collect(),
        );
        let place = |offset: &u64| Extent { file, offset: *offset, stride: 0, row_bytes: 0 };
        planned.extra.push(
            offsets[1..].iter().map(place).zip(extra.into_iter().map(|(_, bytes)| bytes)).collect(),
        );
        let name = format!("{}.safetensors", file_name(&item.id)?);
        planned.files.push(PlannedFile { name, header, bytes, requests: 1 });
    }
    Ok(planned)
}

/// One site, the same positions at every layer, whole rows: what one array can hold.
fn check_uniform<'a>(item: &Item, specs: &'a [Spec]) -> Result<&'a Spec> {
    let refuse = |what: &str| {
        Err(Error::new(what.to_owned())
            .at(format!("request {:?}", item.id))
            .hint("the layouts shards and npy hold any captures"))
    };
    let Some(first) = specs.first() else { return refuse("a request without a capture") };
    let site = |spec: &Spec| spec.point.split('.').next().unwrap_or_default().to_owned();
    if item.readings.iter().any(|reading| *reading != crate::engine::Reading::Rows) {
        return refuse("the layout requests holds rows, not what is made of them");
    }
    if specs.iter().any(|spec| site(spec) != site(first)) {
        return refuse("the layout requests holds one site a request");
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = specs.iter().find(|spec| !seen.insert(&spec.point)) {
        return Err(twice_captured(&twice.point));
    }
    if specs.iter().any(|spec| spec.positions != first.positions) {
        return refuse("the layout requests holds the same positions at every layer");
    }
    Ok(first)
}

/// An id as a file's name.
fn file_name(id: &str) -> Result<&str> {
    let is_plain = |c: char| c.is_alphanumeric() || "._-+=@, ".contains(c);
    if id.len() <= 200 && !id.starts_with('.') && id.chars().all(is_plain) {
        return Ok(id);
    }
    Err(Error::new("the request's id cannot be a file's name")
        .at("id")
        .expected("letters, digits, and . _ - + = @ in it")
        .got(format!("{id:?}"))
        .hint("the layouts shards and npy take any id"))
}

fn arrays(specs: &[Vec<Spec>], precision: Precision) -> Result<Files> {
    // By point: rows so far, the shape of a row, and how many requests have it.
    let mut points: BTreeMap<&str, (usize, Vec<usize>, usize)> = BTreeMap::new();
    for own in specs {
        let mut seen = BTreeSet::new();
        if let Some(twice) = own.iter().find(|spec| !seen.insert(&spec.point)) {
            return Err(twice_captured(&twice.point));
        }
    }
    for spec in specs.iter().flatten() {
        let row = spec.shape[1..].to_vec();
        let (rows, known, requests) =
            points.entry(&spec.point).or_insert_with(|| (0, row.clone(), 0));
        if *known != row {
            return Err(Error::new("rows of different widths in one array")
                .at(&spec.point)
                .expected(format!("{known:?}"))
                .got(format!("{row:?}"))
                .hint("the layout shards holds any captures"));
        }
        *rows += spec.shape[0];
        *requests += 1;
    }
    let mut files = Vec::new();
    let mut places: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    let kinds: BTreeMap<&str, _> =
        specs.iter().flatten().map(|spec| (spec.point.as_str(), spec.kind)).collect();
    for (point, (rows, row, requests)) in &points {
        let kind = kinds[point];
        let descr = kind
            .numpy(precision)
            .ok_or_else(|| Error::new("NumPy has no bf16").at("npy").expected("f32 or f16"))?;
        let shape = [vec![*rows], row.clone()].concat();
        let header = npy_header(descr, &shape);
        let data = (shape.iter().product::<usize>() * kind.bytes(precision)) as u64;
        places.insert(point, (files.len(), header.len() as u64));
        let bytes = header.len() as u64 + data;
        files.push(PlannedFile {
            name: format!("{point}.npy"),
            header,
            bytes,
            requests: *requests,
        });
    }
    let mut extents = Vec::new();
    for specs in specs {
        let mut own = Vec::new();
        for spec in specs {
            let (file, next) =
                places.get_mut(spec.point.as_str()).expect("every point has a place");
            own.push(Extent { file: *file, offset: *next, stride: 0, row_bytes: 0 });
            *next += bytes_of(spec, precision);
        }
        extents.push(own);
    }
    let extra = vec![Vec::new(); specs.len()];
    Ok(Files { files, extents, extra })
}

/// A safetensors file's first bytes, padded to a multiple of 8, and where each tensor begins.
fn safetensors(
    entries: impl Iterator<Item = (String, &'static str, Vec<usize>, u64)>,
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<u64>)> {
    let mut json = serde_json::Map::new();
    if !metadata.is_empty() {
        json.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let (mut offsets, mut end) = (Vec::new(), 0);
    for (name, dtype, shape, bytes) in entries {
        let start = end;
        end += bytes;
        offsets.push(start);
        let entry =
            serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        if json.insert(name.clone(), entry).is_some() {
            return Err(twice_captured(&name));
        }
    }
    let mut text = serde_json::Value::Object(json).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    let start = bytes.len() as u64;
    offsets.iter_mut().for_each(|offset| *offset += start);
    Ok((bytes, offsets))
}

fn twice_captured(name: &str) -> Error {
    Error::new("two captures of one name")
        .got(name)
        .hint("a request captures a site of a layer once: put all positions into one list")
}
