//! A folder of captures that is written in pieces: a file carries `.part` behind its name until all its
//! requests are in it, and a request counts as done once its line stands in `captures.jsonl`, which is
//! written after its numbers have reached the disk. So it can be stopped at any moment, and gone on with.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use fs_err as fs;
use serde::{Deserialize, Serialize};

use super::{
    layout::{Extent, Files, INDEX, Layout, PlannedFile},
    tensors::{Item, Precision, Spec, Values},
};
use crate::{
    engine::Fingerprint,
    error::{Context, Error, Result},
    files::{self, Lines},
    model::ModelConfig,
};

/// Lines of finished requests.
pub const DONE: &str = "captures.jsonl";
const MANIFEST: &str = "manifest.json";
/// Bytes, and time, that are between two waits for the disk.
const SYNC_BYTES: u64 = 64 << 20;
const SYNC_TIME: Duration = Duration::from_secs(5);
/// Files that are open at a time.
const OPEN_FILES: usize = 32;

/// What a folder's captures are of: another run of the same may go on with them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this layout of the folder.
    pub format: u32,
    /// The program's version.
    pub inkling: String,
    /// The model's hash.
    pub model: String,
    /// What the numbers' bits depend on.
    pub fingerprint: Fingerprint,
    /// How tensors are divided among files.
    pub layout: Layout,
    /// How floats are written.
    pub precision: Precision,
    /// About how many bytes a shard has.
    pub shard_bytes: u64,
    /// Of all that is asked for: SHA-256 of requests and vectors.
    pub requests: String,
}

/// A finished request: where its rows are, and what they are of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// The request's.
    pub id: String,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// In its order.
    pub tensors: Vec<DoneTensor>,
}

/// A tensor of a finished request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DoneTensor {
    /// `resid_post.20` and the like.
    pub point: String,
    /// The file that has it.
    pub file: String,
    /// Of an `.npy`: its first row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_row: Option<u64>,
    /// Rows first.
    pub shape: Vec<usize>,
    /// The prompt's positions that the rows are of, or their mean is.
    pub positions: Vec<usize>,
    /// What the columns are, where they have names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
}

/// A folder that is being written.
pub struct Store {
    dir: PathBuf,
    layout: Layout,
    precision: Precision,
    files: Files,
    /// By file: requests that it still lacks.
    missing: Vec<usize>,
    open: Vec<(usize, fs::File)>,
    lines: Lines,
    done: HashSet<usize>,
    /// Lines of requests whose numbers may not have reached the disk, the files those are in, and their
    /// bytes.
    waiting: Vec<Done>,
    dirty: HashSet<usize>,
    unsynced: u64,
    /// Bytes on their way into a file.
    scratch: Vec<u8>,
    synced: Instant,
    /// Files that were opened before, by this process.
    begun: HashSet<usize>,
    _lock: fs::File,
}

impl Store {
    /// Opens or makes a folder for requests; one that was begun with the same is gone on with.
    ///
    /// # Errors
    /// It holds something else, another process writes it, or it cannot be written.
    pub fn open(dir: &Path, manifest: &Manifest, files: Files, items: &[Item]) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let lock = files::lock(dir)?;
        check_manifest(dir, manifest)?;
        let by_id: HashMap<&str, usize> =
            items.iter().enumerate().map(|(at, item)| (item.id.as_str(), at)).collect();
        let mut done: HashSet<usize> = HashSet::new();
        let lines = Lines::open(&dir.join(DONE), |line: Done| {
            done.extend(by_id.get(line.id.as_str()));
            Ok(())
        })?;
        let mut missing: Vec<usize> = files.files.iter().map(|file| file.requests).collect();
        for &request in &done {
            let own: HashSet<usize> =
                files.extents[request].iter().map(|extent: &Extent| extent.file).collect();
            own.into_iter().for_each(|file| missing[file] -= 1);
        }
        let store = Self {
            dir: dir.to_owned(),
            layout: manifest.layout,
            precision: manifest.precision,
            missing,
            files,
            open: Vec::new(),
            lines,
            done,
            waiting: Vec::new(),
            dirty: HashSet::new(),
            unsynced: 0,
            scratch: Vec::new(),
            synced: Instant::now(),
            begun: HashSet::new(),
            _lock: lock,
        };
        store.check_files()?;
        // Files that were complete when the last run was stopped.
        for file in (0..store.missing.len()).filter(|&file| store.missing[file] == 0) {
            let part = store.part(file);
            if part.exists() {
                fs::rename(part, store.path(file))?;
            }
        }
        Ok(store)
    }

    /// Refuses to go on where a file is gone that has finished requests.
    fn check_files(&self) -> Result<()> {
        for (file, planned) in self.files.files.iter().enumerate() {
            let is_there =
                |path: PathBuf| fs::metadata(path).is_ok_and(|of| of.len() == planned.bytes);
            let is_begun = self.missing[file] < planned.requests;
            if is_begun && !is_there(self.path(file)) && !is_there(self.part(file)) {
                return Err(Error::new(
                    "a file of finished requests is gone, or has another length",
                )
                .at(self.path(file).display().to_string())
                .expected(format!("{} bytes", planned.bytes))
                .hint("begin again in another folder"));
            }
        }
        Ok(())
    }

    /// Whether a request was finished before.
    pub fn has(&self, request: usize) -> bool {
        self.done.contains(&request)
    }

    /// How many were.
    pub fn finished(&self) -> usize {
        self.done.len()
    }

    /// Bytes that are still to be written.
    pub fn bytes_left(&self) -> u64 {
        let file = |(at, file): (usize, &PlannedFile)| {
            let have = fs::metadata(self.part(at)).map_or(0, |_| self.written(at));
            if self.missing[at] == 0 { 0 } else { file.bytes - have.min(file.bytes) }
        };
        self.files.files.iter().enumerate().map(file).sum()
    }

    /// About how many bytes of a file are there.
    fn written(&self, file: usize) -> u64 {
        let planned = &self.files.files[file];
        let done = planned.requests - self.missing[file];
        planned.bytes / planned.requests.max(1) as u64 * done as u64
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.join(&self.files.files[file].name)
    }

    fn part(&self, file: usize) -> PathBuf {
        self.dir.join(format!("{}.part", self.files.files[file].name))
    }

    /// Writes a request's tensors, in the order of its specs.
    ///
    /// # Errors
    /// The disk is full, or fails. What was finished before stays.
    pub fn write(
        &mut self,
        request: usize,
        item: &Item,
        values: &[Values],
        config: &ModelConfig,
    ) -> Result<()> {
        let specs = item.specs(config);
        let extents = self.files.extents[request].clone();
        if specs.len() != values.len() || extents.len() != values.len() {
            return Err(Error::new("the engine captured another number of tensors")
                .at(format!("request {:?}", item.id))
                .expected(specs.len())
                .got(values.len()));
        }
        for ((spec, values), extent) in specs.iter().zip(values).zip(&extents) {
            let expected = spec.shape.iter().product::<usize>();
            if values.len() != expected {
                return Err(Error::new("the engine captured another number of values")
                    .at(format!("request {:?}: {}", item.id, spec.point))
                    .expected(expected)
                    .got(values.len()));
            }
            if extent.stride == 0 {
                let mut bytes = std::mem::take(&mut self.scratch);
                values.encode(self.precision, &mut bytes);
                self.put(*extent, &bytes)?;
                self.scratch = bytes;
            }
        }
        self.put_interleaved(&extents, values)?;
        for (extent, bytes) in std::mem::take(&mut self.files.extra[request]) {
            self.put(extent, &bytes)?;
        }
        let tensors = specs.iter().zip(&extents).map(|(spec, extent)| self.tensor(spec, *extent));
        let (id, tokens) = (item.id.clone(), item.job.tokens.clone());
        self.waiting.push(Done { id, tokens, tensors: tensors.collect() });
        self.done.insert(request);
        let own: HashSet<usize> = extents.iter().map(|extent| extent.file).collect();
        let mut is_complete = false;
        for file in own {
            self.missing[file] -= 1;
            is_complete |= self.missing[file] == 0;
        }
        let is_due = self.unsynced >= SYNC_BYTES || self.synced.elapsed() >= SYNC_TIME;
        if is_complete || is_due { self.sync() } else { Ok(()) }
    }

    fn tensor(&self, spec: &Spec, extent: Extent) -> DoneTensor {
        let file = &self.files.files[extent.file];
        let row: usize = spec.shape[1..].iter().product();
        let row = (row * spec.kind.bytes(self.precision)) as u64;
        let is_array = self.layout == Layout::Npy && row > 0;
        let first = is_array.then(|| (extent.offset - file.header.len() as u64) / row);
        DoneTensor {
            point: spec.point.clone(),
            file: file.name.clone(),
            first_row: first,
            shape: spec.shape.clone(),
            positions: spec.positions.clone(),
            columns: spec.columns.clone(),
        }
    }

    fn put(&mut self, extent: Extent, bytes: &[u8]) -> Result<()> {
        let file = self.file(extent.file)?;
        file.seek(SeekFrom::Start(extent.offset))?;
        file.write_all(bytes)?;
        self.dirty.insert(extent.file);
        self.unsynced += bytes.len() as u64;
        Ok(())
    }

    /// Tensors whose rows stand between each other's, in one write.
    fn put_interleaved(&mut self, extents: &[Extent], values: &[Values]) -> Result<()> {
        let Some(&first) = extents.iter().find(|extent| extent.stride > 0) else { return Ok(()) };
        let (mut all, mut bytes) = (std::mem::take(&mut self.scratch), Vec::new());
        for (extent, values) in extents.iter().zip(values).filter(|(e, _)| e.stride > 0) {
            values.encode(self.precision, &mut bytes);
            let (row, stride) = (extent.row_bytes as usize, extent.stride as usize);
            all.resize(bytes.len() / row * stride, 0);
            let at = (extent.offset - first.offset) as usize;
            for (to, from) in all.chunks_exact_mut(stride).zip(bytes.chunks_exact(row)) {
                to[at..at + row].copy_from_slice(from);
            }
        }
        self.put(Extent { stride: 0, ..first }, &all)?;
        self.scratch = all;
        Ok(())
    }

    /// A file to be written to, which begins with its header and has its length.
    fn file(&mut self, file: usize) -> Result<&mut fs::File> {
        if let Some(at) = self.open.iter().position(|(other, _)| *other == file) {
            let last = self.open.len() - 1;
            self.open.swap(at, last);
        } else {
            if self.open.len() == OPEN_FILES {
                self.open.remove(0); // synced with the others, when they are
            }
            let mut handle = open(&self.part(file))?;
            if self.begun.insert(file) {
                // Also where it was begun before: whether its header has reached the disk is not known.
                let planned = &self.files.files[file];
                handle.write_all(&planned.header)?;
                handle.set_len(planned.bytes)?;
            }
            self.open.push((file, handle));
        }
        Ok(&mut self.open.last_mut().expect("it was just put there").1)
    }

    /// Waits until all that was written is on the disk; then says so.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn sync(&mut self) -> Result<()> {
        for file in &self.dirty {
            match self.open.iter().find(|(other, _)| other == file) {
                Some((_, handle)) => handle.sync_all()?,
                None => open(&self.part(*file))?.sync_all()?,
            }
        }
        sync_folder(&self.dir)?;
        for line in &self.waiting {
            self.lines.append(line)?;
        }
        self.lines.sync()?;
        let complete: Vec<usize> =
            self.dirty.drain().filter(|&file| self.missing[file] == 0).collect();
        self.open.retain(|(file, _)| !complete.contains(file));
        for file in complete {
            fs::rename(self.part(file), self.path(file))?;
        }
        self.waiting.clear();
        (self.unsynced, self.synced) = (0, Instant::now());
        Ok(())
    }

    /// Writes what is left to be written: the index of shards.
    ///
    /// # Errors
    /// A request was never written; the disk is full, or fails.
    pub fn finish(mut self, items: &[Item], config: &ModelConfig) -> Result<()> {
        self.sync()?;
        if let Some(request) = (0..items.len()).find(|request| !self.has(*request)) {
            return Err(Error::new("the engine left a request's captures out")
                .at(format!("request {:?}", items[request].id)));
        }
        if self.layout != Layout::Shards {
            return Ok(());
        }
        let mut weight_map = BTreeMap::new();
        for (item, extents) in items.iter().zip(&self.files.extents) {
            for (spec, extent) in item.specs(config).iter().zip(extents) {
                let file = self.files.files[extent.file].name.clone();
                weight_map.insert(format!("{}/{}", item.id, spec.point), file);
            }
        }
        let total: u64 =
            self.files.files.iter().map(|file| file.bytes - file.header.len() as u64).sum();
        let index = serde_json::json!({
            "metadata": { "total_size": total },
            "weight_map": weight_map,
        });
        files::write_atomically(&self.dir.join(INDEX), format!("{index:#}\n").as_bytes())
    }
}

/// A file that is written to where it belongs.
fn open(path: &Path) -> Result<fs::File> {
    Ok(fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?)
}

/// Waits until the names of new files are on the disk.
#[cfg(unix)]
fn sync_folder(dir: &Path) -> Result<()> {
    match fs::File::open(dir)?.sync_all() {
        // Not every file system can.
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Likewise: other systems do it by themselves.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> Result<()> {
    Ok(())
}

fn check_manifest(dir: &Path, manifest: &Manifest) -> Result<()> {
    let path = dir.join(MANIFEST);
    let place = || path.display().to_string();
    if !path.exists() {
        let names =
            fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        // Of a first start that was killed.
        let own = [".lock", "manifest.json.tmp"];
        if let Some(other) = names.iter().find(|name| own.iter().all(|own| *name != own)) {
            return Err(Error::new("the folder holds something else")
                .at(dir.display().to_string())
                .expected("a new folder, an empty one, or one of captures")
                .got(other.to_string_lossy()));
        }
        let text = serde_json::to_string_pretty(manifest)
            .map_err(|error| Error::new("can't write the manifest").got(error))?;
        return files::write_atomically(&path, format!("{text}\n").as_bytes());
    }
    let stored: Manifest = serde_json::from_str(&fs::read_to_string(&path)?)
        .map_err(|error| Error::new("not a manifest of captures").at(place()).got(error))?;
    // Another version of the program may go on where the numbers are the same.
    if (Manifest { inkling: manifest.inkling.clone(), ..stored.clone() }) == *manifest {
        return Ok(());
    }
    let differs = [
        ("model", stored.model != manifest.model),
        ("requests or vectors", stored.requests != manifest.requests),
        ("numerics", stored.fingerprint != manifest.fingerprint),
        ("layout", stored.layout != manifest.layout || stored.shard_bytes != manifest.shard_bytes),
        ("precision", stored.precision != manifest.precision),
    ];
    let differs: Vec<&str> =
        differs.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
    Err(Error::new("the folder holds captures of something else")
        .at(place())
        .got(format!("other {}", differs.join(", ")))
        .hint("choose another folder"))
    .at(|| "--out".into())
}
