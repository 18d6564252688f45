//! `inkling capture`: what requests capture, into a folder of few large files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use fs_err as fs;
use indicatif::{BinaryBytes, DecimalBytes};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{
    args::{EngineArgs, ModelArgs},
    generate::nothing_captured,
    output::{Output, note},
    progress::Bar,
    requests::{RequestArgs, Requests, without_generation},
};
use crate::{
    captures::{
        Item, Precision, Values,
        collect::{Collected, collect},
        layout::{Files, Layout},
        store::{Manifest, Store},
    },
    engine::{Engine, Reading, capture_bytes},
    error::{Error, Result},
    files::{self, hex},
    model::{Model, ModelConfig},
    request::{Capture, NamedPositions, Positions, Probes, Reduction, Request},
};

/// Write what prompts show inside the model to a folder of few large files
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Requests, one JSON object a line, that say what they capture; - is standard input
    #[arg(long, value_name = "FILE", required_unless_present = "texts", conflicts_with = "texts")]
    input: Option<PathBuf>,
    /// Texts, one a line, tokenised as they are
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// Capture this point of every request: `resid_post.20`, or without a layer those of all blocks, or another
    /// program's name; may be repeated
    #[arg(long, value_name = "POINT")]
    at: Vec<String>,
    /// With --at: `all` tokens or only the `last` one
    #[arg(long, value_name = "all|last", default_value = "all", requires = "at", value_parser = positions)]
    positions: Positions,
    /// With --at: mean, norm, lens:K, cosine:FILE or coordinate:FILE of the rows instead of the rows
    #[arg(long, value_name = "WHAT", requires = "at", value_parser = reduction)]
    reduce: Option<Reduction>,
    /// The folder, a new one or one that this command was writing; - prints a JSON line a request
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// shards (safetensors of many requests and an index), requests (a safetensors file each, with
    /// `hidden_states` and `token_ids`) or npy (an array for each point, of all requests)
    #[arg(long, value_name = "LAYOUT", default_value = "shards")]
    layout: Layout,
    /// f32, f16 or bf16
    #[arg(long = "as", value_name = "TYPE", default_value = "f32")]
    precision: Precision,
    /// About how large a shard is
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    shard_mib: u64,
    /// What captures may take in memory until they are written
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory_mib: u64,
}

fn positions(text: &str) -> std::result::Result<Positions, String> {
    match text {
        "all" => Ok(Positions::Named(NamedPositions::All)),
        "last" => Ok(Positions::Named(NamedPositions::Last)),
        _ => Err("all or last".into()),
    }
}

fn reduction(text: &str) -> std::result::Result<Reduction, String> {
    match text.split_once(':') {
        None if text == "mean" => Ok(Reduction::Mean),
        None if text == "norm" => Ok(Reduction::Norm),
        Some(("lens", top)) => {
            top.parse().map(Reduction::Lens).map_err(|_| "lens:K, e.g. lens:5".into())
        }
        Some(("cosine", file)) => Ok(Reduction::Cosine(Probes::One(file.into()))),
        Some(("coordinate", file)) => Ok(Reduction::Coordinate(Probes::One(file.into()))),
        _ => Err("mean, norm, lens:K, cosine:FILE or coordinate:FILE".into()),
    }
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.open()?;
    let requests = args.requests(&model.config)?;
    let checked = requests.resolve(&model)?;
    let mut options = args.engine.options()?;
    // In flight, and kept by clean runs; once more where a lens looks at rows.
    let mut readings = checked.list.iter().flat_map(|one| &one.readings);
    let parts = if readings.any(|reading| matches!(reading, Reading::Lens(_))) { 3 } else { 2 };
    options.capture_bytes = Some((args.memory_mib << 20) / parts);
    // What the layout cannot hold is said before anything is loaded.
    let shard_bytes = args.shard_mib << 20;
    let files = args.layout.plan(&checked.items(), &model.config, args.precision, shard_bytes)?;
    if args.precision != Precision::F32 && args.out == Path::new("-") {
        note("--as is of files: a line's numbers are f32");
    }
    note(format!("loading {} ({}, {})", model.name, options.device, options.dtype));
    let engine = Engine::start(&model, &options)?;
    let items = checked.fill(&engine)?;
    if args.out == Path::new("-") {
        print(&engine, &items)?;
    } else {
        store(args, (&engine, parts), &model, (&items, files))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn requests(&self, config: &ModelConfig) -> Result<Requests> {
        let mut requests = match (&self.texts, &self.input) {
            (Some(file), _) => texts(file)?,
            (None, input) => RequestArgs::of_file(input.clone()).load()?,
        };
        let captures = self.captures(config);
        for index in 0..requests.list.len() {
            let place = requests.place(index);
            let request = &mut requests.list[index];
            without_generation(request);
            match (request.capture.is_empty(), captures.is_empty()) {
                (false, false) => {
                    return Err(Error::new("what to capture is said in two ways")
                        .at(place)
                        .expected("either --at, or \"capture\" in the request"));
                }
                (true, false) => request.capture.clone_from(&captures),
                (true, true) => {
                    return Err(nothing_captured()
                        .expected("--at POINT, or requests with a \"capture\"")
                        .at(place));
                }
                (false, true) => {}
            }
        }
        Ok(requests)
    }

    /// Of `--at`: a site alone stands for every block.
    fn captures(&self, config: &ModelConfig) -> Vec<Capture> {
        let names = self.at.iter().flat_map(|name| {
            let is_site =
                !name.contains('.') && !matches!(&name[..], "final_norm" | "logits" | "lm_head");
            let is_all = is_site && !name.contains('[');
            match is_all {
                true => (0..config.layers).map(|layer| format!("{name}.{layer}")).collect(),
                false => vec![name.clone()],
            }
        });
        names
            .map(|name| Capture {
                site: None,
                hook: Some(name),
                layers: None,
                positions: self.positions.clone(),
                reduce: self.reduce.clone(),
            })
            .collect()
    }
}

/// A request for each line that is not blank, named by its number.
fn texts(file: &Path) -> Result<Requests> {
    let text = fs::read_to_string(file)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let (mut list, mut places) = (Vec::new(), Vec::new());
    for (index, line) in lines {
        let id = (index + 1).to_string();
        list.push(Request { id, text: Some(line.to_owned()), n: 1, ..Request::default() });
        places.push(format!("{}, line {}", file.display(), index + 1));
    }
    if list.is_empty() {
        return Err(Error::new("no texts").at(file.display().to_string()));
    }
    Ok(Requests::of(list, places, PathBuf::new()))
}

/// Writes a folder, or goes on with it.
/// `parts`: how many times the engine's bytes for captures may be in use.
fn store(
    args: &Args,
    (engine, parts): (&Engine, u64),
    model: &Model,
    (items, files): (&[Item], Files),
) -> Result<()> {
    let config = &model.config;
    let manifest = Manifest {
        format: 1,
        inkling: env!("CARGO_PKG_VERSION").into(),
        model: model.hash()?,
        fingerprint: engine.fingerprint().clone(),
        layout: args.layout,
        precision: args.precision,
        shard_bytes: args.shard_mib << 20,
        requests: hash(items),
    };
    let count = files.files.len();
    let mut store = Store::open(&args.out, &manifest, files, items)?;
    let before = store.finished();
    let left: Vec<(usize, &Item)> =
        items.iter().enumerate().filter(|(at, _)| !store.has(*at)).collect();
    let bytes = store.bytes_left();
    let free = files::free_bytes(&args.out);
    check_room(&args.out, bytes, free)?;
    let largest = left.iter().map(|(_, item)| capture_bytes(&item.job, config)).max();
    let memory = parts * engine.capture_bytes().max(largest.unwrap_or(0));
    note(format!(
        "{} requests ({before} written before), {} in {count} files{}; at most {} of captures in memory",
        items.len(),
        DecimalBytes(bytes),
        free.map_or_else(String::new, |free| format!(" ({} free)", DecimalBytes(free))),
        BinaryBytes(memory)
    ));
    let (mut bar, start) = (Bar::default(), Instant::now());
    let (mut done, total) = (before as u64, items.len() as u64);
    collect(engine, &left, |Collected { item, tensors, .. }| {
        store.write(item, &items[item], &tensors, config)?;
        done += 1;
        bar.show("requests", done, total, 0);
        Ok(())
    })
    .map_err(|error| {
        error.hint("what is in captures.jsonl is kept: start the same command again")
    })?;
    store.finish(items, config)?;
    drop(bar);
    let seconds = start.elapsed().as_secs_f64();
    note(format!(
        "{} requests in {}: {:.1} a second, {}/s",
        items.len(),
        args.out.display(),
        left.len() as f64 / seconds,
        DecimalBytes((bytes as f64 / seconds) as u64)
    ));
    Ok(())
}

fn check_room(dir: &Path, bytes: u64, free: Option<u64>) -> Result<()> {
    match free {
        Some(free) if free < bytes => Err(Error::new("the captures do not fit onto the disk")
            .at(dir.display().to_string())
            .expected(format!("at most the {free} bytes that are free"))
            .got(format!("{bytes} bytes"))
            .hint("--as bf16 halves them; --reduce, fewer layers or positions give less")),
        _ => Ok(()),
    }
}

/// Of all that the numbers follow from, beside the model.
fn hash(items: &[Item]) -> String {
    let mut hasher = Sha256::new();
    for item in items {
        let mut job = item.job.clone();
        for injection in &mut job.inject {
            let vector = std::mem::take(&mut injection.vector);
            vector.iter().for_each(|v| hasher.update(v.to_le_bytes()));
        }
        hasher.update(format!("{:?} {job:?} {:?}", item.id, item.readings));
    }
    hex(&hasher.finalize())
}

/// A request as a line.
#[derive(Serialize)]
struct Line<'a> {
    id: &'a str,
    tokens: &'a [u32],
    tensors: BTreeMap<String, Shown>,
}

#[derive(Serialize)]
struct Shown {
    shape: Vec<usize>,
    positions: Vec<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    columns: Vec<String>,
    /// Row by row.
    values: Numbers,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers {
    Floats(Vec<f32>),
    Tokens(Vec<i32>),
}

/// A line a request, as they finish.
fn print(engine: &Engine, items: &[Item]) -> anyhow::Result<()> {
    let mut output = Output::new();
    let mut stopped = None;
    let all: Vec<_> = items.iter().enumerate().collect();
    let result = collect(engine, &all, |Collected { item, tensors, .. }| {
        let item = &items[item];
        let specs = item.specs(engine.config());
        let shown = specs.into_iter().zip(tensors).map(|(spec, values)| {
            let values = match values {
                Values::Float(values) => Numbers::Floats(values),
                Values::Token(ids) => Numbers::Tokens(ids),
            };
            let (shape, positions, columns) = (spec.shape, spec.positions, spec.columns);
            (spec.point, Shown { shape, positions, columns, values })
        });
        let line = Line { id: &item.id, tokens: &item.job.tokens, tensors: shown.collect() };
        let text = serde_json::to_string(&line)
            .map_err(|error| Error::new("can't write the line").got(error))?;
        output.line(text).map_err(|error| {
            stopped = Some(error);
            Error::new("stopped")
        })
    });
    match stopped {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}
