//! `inkling forward`: requests in, captured tensors out. Nothing is drawn.

use std::{path::PathBuf, process::ExitCode};

use super::{
    args::{EngineArgs, ModelArgs},
    generate::nothing_captured,
    progress::Bar,
    requests::{RequestArgs, without_generation},
    tensors::TensorFile,
};
use crate::captures::collect::collect;

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
    let mut requests = RequestArgs::of_file(Some(args.input.clone())).load()?;
    requests.list.iter_mut().for_each(without_generation);
    if let Some(index) = requests.list.iter().position(|request| request.capture.is_empty()) {
        return Err(nothing_captured().at("capture").at(requests.place(index)).into());
    }
    let model = args.model.open()?;
    let checked = requests.resolve(&model)?;
    let mut file = TensorFile::create(&args.out, &checked.items(), &model.config)?;
    let engine = args.engine.start(&model)?;
    let items = checked.fill(&engine)?;
    let mut bar = Bar::default();
    let (mut done, total) = (0, items.len() as u64);
    let all: Vec<_> = items.iter().enumerate().collect();
    collect(&engine, &all, |collected| {
        done += 1;
        bar.show("requests", done, total, 0);
        file.write(collected.item, &collected.tensors)
    })?;
    file.commit()?;
    Ok(ExitCode::SUCCESS)
}
