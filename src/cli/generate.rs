//! `inkling generate`: requests in, completions out, one JSON line each in input order.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs},
    control::ControlArgs,
    output::{Output, note},
    progress::Bar,
    requests::{RequestArgs, Requests},
    tensors::TensorFile,
};
use crate::{
    captures::collect::{Collected, collect},
    engine::{Finish, Outcome, Receipt, Sample, Score, TokenLogprob},
    error::{Error, Result},
    files::AtomicFile,
    request::Sampling,
};

/// Answer requests: JSON lines in, JSON lines out, in input order
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Where the answers go; - is standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    out: PathBuf,
    /// Also write what the requests capture to this safetensors file
    #[arg(long, value_name = "FILE")]
    captures: Option<PathBuf>,
}

/// How tokens are drawn, for `--prompt`; absent values are those of a request.
#[derive(clap::Args)]
struct SamplingArgs {
    /// With --prompt: 0 is greedy [default: 1]
    #[arg(long, value_name = "T", conflicts_with = "input")]
    temperature: Option<f32>,
    /// With --prompt: keep the most likely tokens up to this probability [default: 1]
    #[arg(long, value_name = "P", conflicts_with = "input")]
    top_p: Option<f32>,
    /// With --prompt [default: 0]
    #[arg(long, value_name = "N", conflicts_with = "input")]
    seed: Option<u64>,
    /// With --prompt: the most tokens generated [default: 100]
    #[arg(long, value_name = "N", conflicts_with = "input")]
    max_tokens: Option<u32>,
}

impl SamplingArgs {
    fn apply(&self, sampling: &mut Sampling) {
        sampling.temperature = self.temperature.unwrap_or(sampling.temperature);
        sampling.top_p = self.top_p.unwrap_or(sampling.top_p);
        sampling.seed = self.seed.unwrap_or(sampling.seed);
        sampling.max_tokens = self.max_tokens.unwrap_or(sampling.max_tokens);
    }
}

/// One line of output.
#[derive(Serialize)]
struct Answer<'a> {
    id: &'a str,
    /// Of the first sample, the stop token included.
    tokens: &'a [u32],
    text: &'a str,
    finish: Finish,
    prompt_tokens: usize,
    receipts: &'a [Receipt],
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<&'a [TokenLogprob]>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    scores: &'a [Score],
    /// All samples, where more than one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    samples: Option<&'a [Sample]>,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let mut requests = args.requests.load()?;
    if args.requests.prompt.is_some() {
        args.sampling.apply(&mut requests.list[0].sampling);
    }
    let control = args.control.injections()?;
    for request in &mut requests.list {
        request.inject.extend(control.iter().cloned());
    }
    let captured = requests.list.iter().filter(|request| !request.capture.is_empty()).count();
    if args.captures.is_some() && captured == 0 {
        return Err(nothing_captured().at("--captures").into());
    }
    let model = args.model.open()?;
    let mut checked = requests.resolve(&model)?;
    if captured > 0 && args.captures.is_none() {
        note(format!("capture is ignored in {captured} request(s): --captures FILE writes it"));
        for one in &mut checked.list {
            one.job.capture.clear();
            one.readings.clear();
        }
    }
    let tensors = args
        .captures
        .as_deref()
        .map(|path| TensorFile::create(path, &checked.items(), &model.config))
        .transpose()?;
    let sink = Sink::open(&args.out)?;
    let engine = args.engine.start(&model)?;
    let items = checked.fill(&engine)?;
    let mut answers = Answers { requests: &requests, sink, waiting: BTreeMap::new(), next: 0 };
    let mut writer = tensors;
    let mut bar = Bar::default();
    let (mut done, mut drawn, total) = (0, 0, items.len() as u64);
    let mut stopped = None;
    let all: Vec<_> = items.iter().enumerate().collect();
    let result = collect(&engine, &all, |Collected { item, tensors, outcome }| {
        if let Some(writer) = &mut writer {
            writer.write(item, &tensors)?;
        }
        let samples = &outcome.samples;
        drawn += samples.iter().map(|sample| sample.tokens.len() as u64).sum::<u64>();
        done += 1;
        bar.show("requests", done, total, drawn);
        answers.add(item, &outcome).map_err(|error| {
            stopped = Some(error);
            Error::new("stopped")
        })
    });
    if let Some(error) = stopped {
        return Err(error);
    }
    result?;
    if let Some(writer) = writer {
        writer.commit()?;
    }
    answers.sink.commit()?;
    Ok(ExitCode::SUCCESS)
}

/// The error of a capture file with nothing to put in it.
pub fn nothing_captured() -> Error {
    Error::new("nothing to capture")
        .expected("requests with a \"capture\"")
        .hint("e.g. \"capture\": [{\"site\": \"resid_post\", \"layers\": \"all\"}]")
}

/// Where answers go.
enum Sink {
    Output(Output),
    File(AtomicFile),
}

impl Sink {
    fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Output(Output::new()));
        }
        AtomicFile::create(path).map(Self::File)
    }

    fn line(&mut self, text: &str) -> anyhow::Result<()> {
        match self {
            Self::Output(output) => output.line(text),
            Self::File(file) => Ok(file.write_all(format!("{text}\n").as_bytes())?),
        }
    }

    fn commit(self) -> Result<()> {
        match self {
            Self::Output(_) => Ok(()),
            Self::File(file) => file.commit(),
        }
    }
}

/// Puts answers in input order.
struct Answers<'a> {
    requests: &'a Requests,
    sink: Sink,
    waiting: BTreeMap<usize, String>,
    next: usize,
}

impl Answers<'_> {
    fn add(&mut self, index: usize, outcome: &Outcome) -> anyhow::Result<()> {
        let request = &self.requests.list[index];
        let first = outcome.samples.first();
        let answer = Answer {
            id: &request.id,
            tokens: first.map_or(&[], |sample| &sample.tokens),
            text: first.map_or("", |sample| &sample.text),
            finish: first.map_or(Finish::Length, |sample| sample.finish),
            prompt_tokens: outcome.prompt_tokens,
            receipts: &outcome.receipts,
            logprobs: request.logprobs.and(first).map(|sample| sample.logprobs.as_slice()),
            scores: &outcome.scores,
            samples: (request.n > 1).then_some(outcome.samples.as_slice()),
        };
        self.waiting.insert(index, serde_json::to_string(&answer)?);
        while let Some(line) = self.waiting.remove(&self.next) {
            self.sink.line(&line)?;
            self.next += 1;
        }
        Ok(())
    }
}
