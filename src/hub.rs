//! Models of the Hugging Face hub, fetched into the cache that Hugging Face's programs share.
//!
//! Small files come first, so that a model that can't be run is refused before its weights are
//! fetched; a revision's commit is noted last. Every file is checked against the content that the
//! hub names it by.

mod cache;
mod choice;
mod client;
mod download;
mod name;
mod settings;

use std::path::PathBuf;

use self::{
    cache::Folder,
    choice::Choice,
    client::{Client, Failure, Listing, Remote, TRIES, with_tries},
    download::Download,
};
pub use self::{
    name::Name,
    settings::{Settings, Token},
};
use crate::{
    error::{Context, Error, Result},
    model::{Model, check_gguf_architecture, files, shards},
};

/// Is told what is done, for whoever waits.
pub trait Watch {
    /// Something that a person should know.
    fn note(&mut self, text: &str);
    /// `bytes` of weights in so many files are fetched next.
    fn weights(&mut self, files: usize, bytes: u64);
    /// `done` of a file's `total` bytes are here.
    fn bytes(&mut self, file: &str, done: u64, total: u64);
    /// `done` of them have been checked.
    fn checked(&mut self, file: &str, done: u64, total: u64);
}

/// The hub and its cache.
#[derive(Debug)]
pub struct Hub {
    settings: Settings,
    client: Client,
}

impl Hub {
    /// The hub that the settings say.
    ///
    /// # Errors
    ///
    /// The token can't be sent.
    pub fn new(settings: Settings) -> Result<Self> {
        Ok(Self { client: Client::new(&settings)?, settings })
    }

    /// The model's folder, or its GGUF file, in the cache; what is not there yet is fetched. Which
    /// commit a revision is gets asked every time, unless offline; where the hub can't be reached the
    /// cache answers if it has the model.
    ///
    /// # Errors
    ///
    /// There is no such model, it can't be run, or it can't be fetched whole.
    pub fn fetch(&self, name: &Name, watch: &mut dyn Watch) -> Result<PathBuf> {
        let folder = Folder::new(&self.settings.cache, &name.repository);
        let kept = kept(&folder, name);
        if self.settings.offline {
            return kept.map_err(|error| {
                error
                    .at("HF_HUB_OFFLINE is set, and the cache does not hold the model")
                    .at(name.to_string())
                    .hint("fetch it once without HF_HUB_OFFLINE")
            });
        }
        // With a model at hand nobody has to wait for a hub that is away.
        let tries = if kept.is_ok() { 1 } else { TRIES };
        match (with_tries(tries, || self.client.list(name)), kept) {
            (Ok(listing), _) => self.fetch_listed(name, &folder, &listing, watch),
            (Err(Failure::Passing { reason, .. }), Ok(path)) => {
                watch.note(&format!("the hub can't be reached ({reason}): {name} is the cache's"));
                Ok(path)
            }
            (Err(failure), _) => Err(failure.into_error()),
        }
        .at(|| name.to_string())
    }

    fn fetch_listed(
        &self,
        name: &Name,
        folder: &Folder,
        listing: &Listing,
        watch: &mut dyn Watch,
    ) -> Result<PathBuf> {
        let commit = &listing.commit;
        let snapshot = folder.snapshot(commit);
        let choice = Choice::new(&listing.files, name)?;
        let mut download = Download { client: &self.client, folder, name, commit, watch };
        let (weights, path) = match choice {
            Choice::Gguf(parts) => {
                // Absent where the hub has not read the file; of one file, which need not be this one.
                let said = listing.gguf_architecture.as_ref();
                if let Some(architecture) = said.filter(|_| name.file.is_none()) {
                    check_gguf_architecture("general.architecture", architecture)?;
                }
                let path = snapshot.join(&parts[0]);
                (parts, path)
            }
            Choice::Folder { side, weights } => {
                let side = describe(&download, &side)?;
                download.all(&side)?;
                Model::folder_config(&snapshot)?;
                let weights = match weights {
                    Some(file) => vec![file],
                    None => shards::named(&snapshot.join(files::INDEX))?,
                };
                (weights, snapshot)
            }
        };
        let missing = describe(&download, &weights)?;
        if !missing.is_empty() {
            let bytes = missing.iter().map(|remote| remote.size).sum();
            download.watch.weights(missing.len(), bytes);
        }
        download.all(&missing)?;
        folder.set_commit(&name.revision, commit)?;
        Ok(path)
    }
}

/// What the files are that the snapshot lacks.
fn describe(download: &Download, files: &[String]) -> Result<Vec<Remote>> {
    let Download { client, folder, name, commit, .. } = download;
    let here = |file: &&String| folder.snapshot(commit).join(file).is_file();
    let describe = |file: &String| {
        with_tries(TRIES, || client.describe(name, commit, file))
            .map_err(Failure::into_error)
            .at(|| file.clone())
    };
    files.iter().filter(|file| !here(file)).map(describe).collect()
}

/// The model as the cache has it.
fn kept(folder: &Folder, name: &Name) -> Result<PathBuf> {
    let commit = folder
        .commit(&name.revision)
        .ok_or_else(|| Error::new("the revision is not there").got(&name.revision))?;
    let snapshot = folder.snapshot(&commit);
    let here = folder.files(&commit);
    let place = || snapshot.display().to_string();
    let shards = match Choice::new(&here, name).at(place)? {
        Choice::Gguf(parts) => return Ok(snapshot.join(&parts[0])),
        Choice::Folder { weights: Some(_), .. } => Vec::new(),
        Choice::Folder { weights: None, .. } => shards::named(&snapshot.join(files::INDEX))?,
    };
    match shards.iter().find(|shard| !here.contains(shard)) {
        Some(missing) => Err(Error::new("a file is not there").at(place()).expected(missing)),
        None => Ok(snapshot),
    }
}
