//! `inkling forward`: requests in, captured tensors out. Nothing is drawn.

use std::{path::PathBuf, process::ExitCode};

use super::{
    args::{EngineArgs, ModelArgs},
    generate::nothing_captured,
    progress::Bar,
    requests::RequestArgs,
    tensors::TensorFile,
};
use crate::{
    error::Context,
    request::{Request, Sampling},
};

/// Run prompts and write what their requests capture to a safetensors file
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Requests, one JSON object a line; - is standard input
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where the tensors go
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let source = RequestArgs {
        input: Some(args.input.clone()),
        prompt: None,
        system: None,
        inject: Vec::new(),
    };
    let mut requests = source.load()?;
    requests.list.iter_mut().for_each(without_generation);
    if let Some(index) = requests.list.iter().position(|request| request.capture.is_empty()) {
        return Err(nothing_captured().at("capture").at(requests.place(index)).into());
    }
    let model = args.model.open()?;
    let checked = requests.resolve(&model)?;
    let mut file = TensorFile::create(&args.out, checked.named(), &model.config)?;
    let engine = args.engine.start(&model)?;
    let jobs = checked.jobs(&engine)?;
    let mut bar = Bar::default();
    let (mut done, total) = (0, jobs.len() as u64);
    engine.run_all(jobs, |index, finished| {
        let finished = finished.at(|| requests.place(index))?;
        done += 1;
        bar.show("requests", done, total, 0);
        file.write(index, &finished.captures)
    })?;
    file.commit()?;
    Ok(ExitCode::SUCCESS)
}

/// What says how the prompt is continued has no part in a forward pass.
fn without_generation(request: &mut Request) {
    request.sampling = Sampling { max_tokens: 0, ..Sampling::default() };
    request.n = 1;
    request.stop.clear();
    request.logprobs = None;
    request.score.clear();
}
