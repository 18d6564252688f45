//! Protocols, trials, concept vectors, grading, statistics and the run folder.
//!
//! [`run`] is the whole of it: a protocol, a model and a folder in, finished trials in the folder.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use crate::{
    engine::{Engine, Finished, Job},
    error::{Error, Result},
    model::Model,
};

pub mod demo;
#[cfg(test)]
pub(crate) mod fake;
pub mod folder;
pub mod grading;
pub mod grid;
pub mod judging;
pub mod lens;
mod next;
pub mod patch_sweep;
pub mod plan;
pub mod prepare;
pub mod probe;
pub mod protocol;
mod protocol_file;
pub mod results;
pub mod runner;
pub mod seeds;
pub mod stats;
pub mod vectors;
pub mod words;

use demo::measure;
use folder::Folder;
use grid::Grid;
use plan::Plan;
use prepare::{Prepared, prepare};
use protocol::{Kind, Protocol};
use results::{Fingerprint, Manifest, Trial};
use vectors::ConceptVectors;

/// What an experiment needs of the engine; tests put a stand-in in its place.
pub trait Jobs {
    /// Streams jobs through, a bounded number in flight, and calls `done` with each one's index as
    /// they finish, in any order. `jobs` is asked for more between calls of `done`.
    fn run_all(
        &self,
        jobs: &mut dyn Iterator<Item = Job>,
        done: &mut dyn FnMut(usize, Result<Finished>) -> Result<()>,
    ) -> Result<()>;
}

impl Jobs for Engine {
    fn run_all(
        &self,
        jobs: &mut dyn Iterator<Item = Job>,
        done: &mut dyn FnMut(usize, Result<Finished>) -> Result<()>,
    ) -> Result<()> {
        self.run_all(jobs, done)
    }
}

/// Hears how far a run is.
pub trait Progress {
    /// `stage` is `vectors`, `measuring` or `trials`; `total` 0: not known; `tokens`: drawn so far.
    fn advance(&mut self, stage: &str, done: u64, total: u64, tokens: u64);

    /// Of so many cells (prompt, layer, dose and condition of a part) some have a finished trial.
    fn cells(&mut self, begun: usize, total: usize) {
        let _ = (begun, total);
    }

    /// Whether nothing more is to be begun. What is under way is finished and stored.
    fn stops(&self) -> bool {
        false
    }
}

impl Progress for () {
    fn advance(&mut self, _: &str, _: u64, _: u64, _: u64) {}
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// As in the folder.
    pub manifest: Manifest,
    /// Trials that were finished when the run was started.
    pub resumed: usize,
    /// Trials run now.
    pub run: usize,
    /// Whether it was stopped before all were run.
    pub stopped: bool,
    /// Trials, of all in the folder, whose injection failed its check: id and what failed.
    pub failed: Vec<(String, String)>,
}

/// How a run is carried out.
#[derive(Clone, Debug, Default)]
pub struct Ways {
    /// Finish a folder that was begun with another device, type or instruction set.
    pub allow_other_numerics: bool,
    /// Run only this part of the trials.
    pub shard: Option<Shard>,
    /// A folder that keeps vectors by what they are made of: the model, the numerics, the recipe, the
    /// prompts' tokens and the layers.
    pub vectors: Option<PathBuf>,
}

/// One of several equal parts of a run's trials, for as many machines. Lines of all shards,
/// in one file, are the lines of the whole run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    index: usize,
    count: usize,
}

impl Shard {
    /// Whether the trial at this place of the plan belongs to it.
    fn has(self, place: usize) -> bool {
        place % self.count + 1 == self.index
    }
}

impl FromStr for Shard {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('/').and_then(|(index, count)| {
            Some(Self { index: index.parse().ok()?, count: count.parse().ok()? })
        });
        numbers.filter(|shard| (1..=shard.count).contains(&shard.index)).ok_or_else(|| {
            Error::new("not a shard").expected("i/n with 1 <= i <= n, as in 3/16").got(text)
        })
    }
}

/// Runs a protocol into a folder, or the rest of it where the folder has a part of this run. A
/// protocol with a budget is measured and cut first (once: the folder keeps the cuts).
pub fn run(
    protocol: &Protocol,
    model: &Model,
    engine: &Engine,
    dir: &Path,
    ways: Ways,
    progress: &mut dyn Progress,
) -> Result<Summary> {
    if ways.shard.is_some() && protocol.budget_seconds.is_some() {
        return Err(Error::new("a protocol with a budget can't be run in shards")
            .at("--shard")
            .hint("each machine would cut it differently: take budget_seconds out"));
    }
    let prepared = prepare(model, protocol)?;
    let run = Run { protocol, prepared: &prepared, engine, numerics: engine.fingerprint() };
    run.into_folder(dir, ways, progress)
}

/// What a run would take.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// Trials of each part.
    pub trials: Vec<usize>,
    /// Seconds of each part, from a few of its trials on this machine.
    pub seconds: Vec<f64>,
    /// Tokens of all prompts, with what trials share counted for each.
    pub prompt_tokens: u64,
    /// Tokens drawn, where no reply ends early.
    pub drawn_tokens: u64,
}

/// Measures a few trials of each part and counts the tokens of all. Only vectors are kept, in `kept`.
pub fn estimate(
    protocol: &Protocol,
    prepared: &Prepared,
    engine: &Engine,
    kept: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<Estimate> {
    let run = Run { protocol, prepared, engine, numerics: engine.fingerprint() };
    let vectors = run.extract(kept, progress)?;
    let plan = Plan::new(protocol, prepared, &vectors)?;
    let seconds = measure(&plan, protocol, engine, progress)?.seconds;
    let parts = 0..protocol.parts.len();
    let trials: Vec<usize> = parts.map(|part| plan.grid().of_part(part).len()).collect();
    let (mut prompt_tokens, mut drawn_tokens) = (0, 0);
    for place in 0..plan.grid().len() {
        let cell = plan.grid().cell(place);
        prompt_tokens += plan.prompt(&cell).tokens.len() as u64;
        if let Kind::Sample(draw) = protocol.parts[cell.part].kind {
            drawn_tokens += u64::from(draw.max_tokens);
        }
    }
    let seconds = seconds.iter().zip(&trials).map(|(of_one, n)| of_one * *n as f64).collect();
    Ok(Estimate { trials, seconds, prompt_tokens, drawn_tokens })
}

/// A protocol, concrete, and what runs it.
struct Run<'a> {
    protocol: &'a Protocol,
    prepared: &'a Prepared,
    engine: &'a dyn Jobs,
    numerics: &'a Fingerprint,
}

impl Run<'_> {
    fn into_folder(self, dir: &Path, ways: Ways, progress: &mut dyn Progress) -> Result<Summary> {
        let mut folder = Folder::open(dir)?;
        let mut protocol = self.protocol.uncut();
        let resumes = folder.stored().is_some();
        if let Some(stored) = folder.stored() {
            let new = self.manifest(&protocol, None)?;
            let mixed = folder::check_same_run(stored, &new, ways.allow_other_numerics)?;
            protocol = folder::parse_protocol(&stored.protocol)?;
            if let Some(mixed) = mixed {
                folder.write_manifest(&mixed)?;
            }
        }
        let vectors = self.vectors(&folder, resumes, ways.vectors.as_deref(), progress)?;
        let mut measured = Vec::new();
        if !resumes {
            if let Some(budget) = protocol.budget_seconds {
                let plan = Plan::new(&protocol, self.prepared, &vectors)?;
                let measurement = measure(&plan, &protocol, self.engine, progress)?;
                // Measured trials count: they are kept.
                protocol.cuts = demo::fit(&protocol, self.prepared, &measurement.seconds, budget);
                measured = measurement.trials;
            }
            folder.write_manifest(&self.manifest(&protocol, Some(&vectors))?)?;
        }
        let plan = Plan::new(&protocol, self.prepared, &vectors)?;
        self.execute(&plan, &folder, measured, ways.shard, progress)
    }

    /// The folder's own vectors when it has some, so that a run is finished with what it began
    /// with; else new ones, which are stored.
    fn vectors(
        &self,
        folder: &Folder,
        resumes: bool,
        kept: Option<&Path>,
        progress: &mut dyn Progress,
    ) -> Result<ConceptVectors> {
        let (path, prepared) = (folder.vectors_path(), self.prepared);
        let (hash, dim) = (&prepared.model.hash, prepared.model.dim);
        if resumes && path.exists() {
            let (words, layers) = (prepared.vector_words(), prepared.layers());
            let site = self.protocol.vectors.site;
            return ConceptVectors::load(&path, hash, site, &words, &layers, dim);
        }
        let vectors = self.extract(kept, progress)?;
        vectors.to_set(hash, &self.protocol.vectors.describe())?.save(&path)?;
        Ok(vectors)
    }

    /// Those that are kept, or new ones, which are then kept where that is possible.
    fn extract(&self, kept: Option<&Path>, progress: &mut dyn Progress) -> Result<ConceptVectors> {
        let (prepared, recipe) = (self.prepared, &self.protocol.vectors);
        let (layers, dim) = (prepared.layers(), prepared.model.dim);
        if let Some(file) = &recipe.file {
            let words = prepared.vector_words();
            return ConceptVectors::import(file, recipe.site, &words, &layers, dim);
        }
        let (hash, inputs) = (&prepared.model.hash, &prepared.inputs);
        let version = env!("CARGO_PKG_VERSION");
        let content = (version, hash, self.numerics, recipe.recipe, inputs, &layers);
        let name = format!("{:.32}.safetensors", seeds::content_hash(&content));
        let path = kept.map(|folder| folder.join(name));
        let words = prepared.vector_words();
        if let Some(vectors) = path.as_ref().filter(|path| path.exists()).and_then(|path| {
            // One that can't be read is made anew.
            ConceptVectors::load(path, hash, recipe.site, &words, &layers, dim).ok()
        }) {
            return Ok(vectors);
        }
        let made = vectors::extract(self.engine, recipe.recipe, inputs, &layers, dim, progress)?;
        if let Some(path) = path {
            // Vectors that can't be kept are no reason to stop.
            let folder = path.parent().unwrap_or(Path::new(""));
            let _ = fs_err::create_dir_all(folder)
                .map_err(Error::from)
                .and_then(|()| made.vectors.to_set(hash, &recipe.describe())?.save(&path));
        }
        Ok(made.vectors)
    }

    /// Runs what is not finished yet; `measured` are trials run before the cuts were known.
    fn execute(
        &self,
        plan: &Plan,
        folder: &Folder,
        measured: Vec<Trial>,
        shard: Option<Shard>,
        progress: &mut dyn Progress,
    ) -> Result<Summary> {
        let mut finished = vec![false; plan.grid().len()];
        let mut failed = Vec::new();
        let mut resumed = 0;
        let mut lines = folder.trials(|trial: Trial| {
            resumed += 1;
            failed.extend(failure(&trial));
            let place = plan.place_of(&trial).ok_or_else(|| {
                Error::new("the folder has a trial that is not in its plan").got(&trial.id).hint(
                    "the vectors were changed, or the trials are of another version of inkling",
                )
            })?;
            if std::mem::replace(&mut finished[place], true) {
                return Err(Error::new("a trial stands twice in the file").got(&trial.id));
            }
            Ok(())
        })?;
        let mut save = |trial: Trial| {
            failed.extend(failure(&trial));
            lines.append(&trial)
        };
        let mut run = 0;
        for trial in measured {
            if let Some(place) = plan.place_of(&trial) {
                finished[place] = true;
                run += 1;
                save(trial)?;
            }
        }
        let is_left = |place: usize| shard.is_none_or(|shard| shard.has(place)) && !finished[place];
        let mut keep = |id: &str, captures: &[_]| folder.keep_captures(id, captures);
        let done = runner::execute(plan, &is_left, self.engine, &mut save, &mut keep, progress)?;
        run += done.trials;
        lines.sync()?;
        let manifest = folder.stored().cloned();
        Ok(Summary {
            manifest: manifest.ok_or_else(|| Error::new("the run has no manifest"))?,
            resumed,
            run,
            stopped: done.stopped,
            failed,
        })
    }

    /// Without vectors only what identifies the run.
    fn manifest(&self, protocol: &Protocol, vectors: Option<&ConceptVectors>) -> Result<Manifest> {
        let to_value = serde_json::to_value(protocol);
        let identity = (&protocol.identity(), &self.prepared.model.hash, self.numerics);
        Ok(Manifest {
            schema: seeds::SCHEMA,
            run: seeds::content_hash(&identity),
            protocol: to_value
                .map_err(|error| Error::new("can't write the protocol").got(error))?,
            model: self.prepared.model.clone(),
            numerics: self.numerics.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            prompts: self.prepared.prompt_records(),
            words: vectors.map_or_else(Vec::new, |vectors| self.prepared.word_records(vectors)),
            cuts: protocol.cuts.iter().map(|cut| cut.text.clone()).collect(),
            trials: Grid::new(protocol, self.prepared).len() as u64,
        })
    }
}

fn failure(trial: &Trial) -> Option<(String, String)> {
    runner::failed_check(trial).map(|what| (trial.id.clone(), what))
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
