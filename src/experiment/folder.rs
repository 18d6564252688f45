//! The run folder: `manifest.json`, `trials.jsonl`, `vectors.safetensors`, `grades.jsonl`.
//!
//! Lines are appended whole, so that a kill at any moment loses at most the line being written,
//! which the next start drops. One process writes a folder at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, ErrorKind},
    path::{Path, PathBuf},
};

use fs_err as fs;
use safetensors::{Dtype, tensor::TensorView};
use serde::de::DeserializeOwned;

use crate::{
    engine::Capture,
    error::{Context, Error, Result},
    experiment::{
        protocol::Protocol,
        results::{Fingerprint, Grade, Manifest, Run, Trial},
    },
    files::{self, Lines, for_each_line},
};

const MANIFEST: &str = "manifest.json";
const TRIALS: &str = "trials.jsonl";
const GRADES: &str = "grades.jsonl";
const JUDGEMENTS: &str = "judgements.jsonl";
const CAPTURES: &str = "captures";
const VECTORS: &str = "vectors.safetensors";

/// A run folder that this process alone writes to.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    /// Held until the process ends, however it ends.
    _lock: fs::File,
    stored: Option<Manifest>,
}

impl Folder {
    /// Opens or makes the folder. An error when it can't be written to, another process is writing
    /// it, or it holds trials without a manifest.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let lock = files::lock(dir)?;
        let stored = read_manifest(dir)?;
        if stored.is_none() && dir.join(TRIALS).exists() {
            return Err(Error::new("the folder has trials but no manifest")
                .at(dir.display().to_string())
                .hint("choose another folder"));
        }
        Ok(Self { dir: dir.to_owned(), _lock: lock, stored })
    }

    /// The manifest of the run that the folder holds already.
    pub fn stored(&self) -> Option<&Manifest> {
        self.stored.as_ref()
    }

    /// Where the run's concept vectors are kept.
    pub fn vectors_path(&self) -> PathBuf {
        self.dir.join(VECTORS)
    }

    /// Writes the manifest, whole or not at all.
    pub fn write_manifest(&mut self, manifest: &Manifest) -> Result<()> {
        let mut json = serde_json::to_vec_pretty(manifest)
            .map_err(|error| Error::new("can't write the manifest").got(error))?;
        json.push(b'\n');
        files::write_atomically(&self.dir.join(MANIFEST), &json)?;
        self.stored = Some(manifest.clone());
        Ok(())
    }

    /// Hands out the finished trials, and gives the file to which more are appended. A half-written
    /// last line is dropped from the file.
    pub fn trials(&self, each: impl FnMut(Trial) -> Result<()>) -> Result<Lines> {
        Lines::open(&self.dir.join(TRIALS), each)
    }

    /// Writes a trial's captures, whole or not at all: `captures/ID.safetensors` with f32 tensors
    /// `SITE.LAYER` (positions, width).
    pub fn keep_captures(&self, id: &str, captures: &[(Capture, Vec<f32>)]) -> Result<()> {
        let folder = self.dir.join(CAPTURES);
        fs::create_dir_all(&folder)?;
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let data: Vec<Vec<u8>> = captures.iter().map(|(_, values)| bytes(values)).collect();
        let mut views = Vec::new();
        for ((capture, values), bytes) in captures.iter().zip(&data) {
            let layer = capture.layer.map_or(String::new(), |layer| format!(".{layer}"));
            let name = format!("{}{layer}", capture.site.name());
            let rows = capture.positions.len();
            let shape = vec![rows, values.len() / rows.max(1)];
            let view = TensorView::new(Dtype::F32, shape, bytes)
                .map_err(|error| Error::new("can't write the captures").at(id).got(error))?;
            views.push((name, view));
        }
        let bytes = safetensors::serialize(views, None)
            .map_err(|error| Error::new("can't write the captures").at(id).got(error))?;
        files::write_atomically(&folder.join(format!("{id}.safetensors")), &bytes)
    }

    /// Likewise the answers of judge models.
    pub fn judgements<T: DeserializeOwned>(
        &self,
        each: impl FnMut(T) -> Result<()>,
    ) -> Result<Lines> {
        Lines::open(&self.dir.join(JUDGEMENTS), each)
    }
}

fn read_manifest(dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join(MANIFEST);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        Error::new("not a manifest that this version of inkling reads")
            .at(path.display().to_string())
            .got(error)
    })
}

fn check_once(trials: &[Trial]) -> Result<()> {
    let mut seen = BTreeSet::new();
    match trials.iter().find(|trial| !seen.insert(&trial.id)) {
        None => Ok(()),
        Some(twice) => Err(Error::new("a trial stands twice in the file").got(&twice.id)),
    }
}

/// Reads a run, finished or not, without changing it. Of a judge's verdicts on a trial the last
/// counts.
pub fn load(dir: &Path) -> Result<Run> {
    let manifest = read_manifest(dir)?.ok_or_else(|| {
        Error::new("not a run folder").at(dir.display().to_string()).expected(MANIFEST)
    })?;
    let trials: Vec<Trial> = read_lines(&dir.join(TRIALS))?;
    check_once(&trials).at(|| dir.join(TRIALS).display().to_string())?;
    let mut grades: BTreeMap<(String, String), Grade> = BTreeMap::new();
    for grade in read_lines::<Grade>(&dir.join(GRADES))? {
        grades.insert((grade.trial.clone(), grade.judge.clone()), grade);
    }
    Ok(Run { manifest, trials, grades: grades.into_values().collect() })
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = match fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut lines = Vec::new();
    let keep = |line| {
        lines.push(line);
        Ok(())
    };
    for_each_line(&mut BufReader::new(file), keep).at(|| path.display().to_string())?;
    Ok(lines)
}

/// Appends the verdicts that the folder does not have yet, word for word.
pub fn append_grades(dir: &Path, grades: &[Grade]) -> Result<()> {
    let _folder = Folder::open(dir)?;
    let mut last: BTreeMap<(String, String), Grade> = BTreeMap::new();
    let mut lines = Lines::open(&dir.join(GRADES), |grade: Grade| {
        last.insert((grade.trial.clone(), grade.judge.clone()), grade);
        Ok(())
    })?;
    for grade in grades {
        if last.get(&(grade.trial.clone(), grade.judge.clone())) != Some(grade) {
            lines.append(grade)?;
        }
    }
    lines.sync()
}

/// Refuses a folder that holds another run. With `allow_other_numerics` another device, instruction
/// set or precision may finish it; the answer is then the manifest that says so.
pub fn check_same_run(
    stored: &Manifest,
    new: &Manifest,
    allow_other_numerics: bool,
) -> Result<Option<Manifest>> {
    let refuse = |what: &str, expected: String, got: String| {
        Err(Error::new(what)
            .expected(expected)
            .got(got)
            .hint("choose another folder for another run"))
    };
    if stored.schema != new.schema {
        let (old, new) = (stored.schema.to_string(), new.schema.to_string());
        return refuse("the folder's run is of another version of inkling", old, new);
    }
    if stored.model.hash != new.model.hash {
        let show = |run: &Manifest| format!("{} ({:.12})", run.model.name, run.model.hash);
        return refuse("the folder holds a run of another model", show(stored), show(new));
    }
    let (before, now) = (identity(&stored.protocol)?, identity(&new.protocol)?);
    if let Some(path) = difference(&before, &now, String::new()) {
        let name = |run: &Manifest| run.protocol["name"].to_string();
        let got = format!("{}, which differs in {path}", name(new));
        return refuse("the folder holds a run of another protocol", name(stored), got);
    }
    if stored.prompts != new.prompts {
        let what = "the prompts are rendered differently than in the folder's run";
        return refuse(what, stored.version.clone(), new.version.clone());
    }
    if stored.numerics == new.numerics {
        return Ok(None);
    }
    if !allow_other_numerics {
        return Err(Error::new("the folder's run was made with other numerics")
            .expected(show(&stored.numerics))
            .got(show(&new.numerics))
            .hint("finish it on the same kind of machine, or allow other numerics"));
    }
    Ok(Some(Manifest { numerics: mixed(&stored.numerics, &new.numerics), ..stored.clone() }))
}

fn show(numerics: &Fingerprint) -> String {
    let Fingerprint { device, dtype, isa, kernels } = numerics;
    format!("{device}, {dtype}, {isa}, kernels {kernels}")
}

/// Both, where they differ.
fn mixed(a: &Fingerprint, b: &Fingerprint) -> Fingerprint {
    let both = |a: &str, b: &str| {
        if a.split(" + ").any(|one| one == b) { a.to_owned() } else { format!("{a} + {b}") }
    };
    Fingerprint {
        device: both(&a.device, &b.device),
        dtype: both(&a.dtype, &b.dtype),
        isa: both(&a.isa, &b.isa),
        kernels: both(&a.kernels, &b.kernels),
    }
}

/// See [`Protocol::identity`].
fn identity(protocol: &serde_json::Value) -> Result<serde_json::Value> {
    let parsed = parse_protocol(protocol)?.identity();
    serde_json::to_value(parsed).map_err(|error| Error::new("can't write the protocol").got(error))
}

/// The protocol of a manifest, its cuts included.
pub fn parse_protocol(protocol: &serde_json::Value) -> Result<Protocol> {
    serde_json::from_value(protocol.clone()).map_err(|error| {
        Error::new("not a protocol that this version of inkling reads")
            .at(format!("{MANIFEST}: protocol"))
            .got(error)
    })
}

/// The path of the first field that differs.
fn difference(a: &serde_json::Value, b: &serde_json::Value, path: String) -> Option<String> {
    use serde_json::Value::{Array, Object};
    match (a, b) {
        (Object(a_map), Object(b_map)) => {
            let keys: BTreeSet<&String> = a_map.keys().chain(b_map.keys()).collect();
            keys.into_iter().find_map(|key| {
                let dot = if path.is_empty() { "" } else { "." };
                difference(&a[key], &b[key], format!("{path}{dot}{key}"))
            })
        }
        (Array(a_list), Array(b_list)) if a_list.len() == b_list.len() => a_list
            .iter()
            .zip(b_list)
            .enumerate()
            .find_map(|(index, (a, b))| difference(a, b, format!("{path}[{index}]"))),
        _ => (a != b).then_some(path),
    }
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
