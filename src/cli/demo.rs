//! `inkling demo`: the small sweep on this machine, from model to report.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs},
    grade::grade,
    output::Output,
    report,
    run::{exit_code, run},
};
use crate::{
    experiment::{Ways, folder, protocol::Protocol},
    report::{Headline, headline},
};

/// Run a small injected-thoughts sweep here and now: model, trials, grades and report
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// The run folder
    #[arg(long, value_name = "DIR", default_value = "runs/demo")]
    out: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown {
    headline: Headline,
    report: String,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let protocol = Protocol::builtin("demo")?;
    let model = args.model.open_or_demo()?;
    let summary = run(&protocol, &model, &args.engine, &args.out, Ways::default())?;
    grade(&args.out)?;
    let stored = folder::load(&args.out)?;
    let page = report::write(&stored, &args.out)?;
    let headline = headline(&stored);
    let mut output = Output::new();
    if args.json {
        output.json(&Shown { headline, report: page.display().to_string() })?;
    } else {
        output.line(headline.to_string())?;
        output.line("")?;
        output.line(format!("report: {}", page.display()))?;
    }
    Ok(exit_code(&summary))
}
