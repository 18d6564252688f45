//! `inkling demo`: the small sweep on this machine, from model to report.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs},
    grade::grade,
    output::Output,
    report,
    run::{exit_code, kept_vectors, prompt_lines, run},
};
use crate::{
    experiment::{
        Ways, folder,
        protocol::Protocol,
        results::{Run, Trial},
    },
    report::{self as pages, Headline, headline},
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
    let ways = Ways { vectors: kept_vectors(), ..Ways::default() };
    let summary = run(&protocol, &model, &args.engine, &args.out, ways)?;
    grade(&args.out)?;
    let stored = folder::load(&args.out)?;
    let page = report::write(&stored, &args.out)?;
    let mut output = Output::new();
    if args.json {
        let headline = headline(&stored);
        output.json(&Shown { headline, report: page.display().to_string() })?;
        return Ok(exit_code(&summary));
    }
    for prompt in &stored.manifest.prompts {
        prompt_lines(prompt).iter().try_for_each(|line| output.line(line))?;
        output.line("")?;
    }
    ramp_lines(&stored).iter().try_for_each(|line| output.line(line))?;
    output.line(pages::text(&stored).trim_end())?;
    output.line("")?;
    output.line(format!("report: {}", page.display()))?;
    Ok(exit_code(&summary))
}

/// The replies of the part `ramp`, by prompt and dose.
fn ramp_lines(run: &Run) -> Vec<String> {
    let mut ramp: Vec<_> = run.trials.iter().filter(|trial| trial.part == "ramp").collect();
    let dose = |trial: &Trial| trial.dose.unwrap_or(0.0);
    ramp.sort_by(|a, b| a.prompt.cmp(&b.prompt).then(dose(a).total_cmp(&dose(b))));
    let lines = ramp.iter().filter_map(|trial| {
        let reply = trial.reply.as_ref()?;
        let head = format!("── {}, {}, dose {} ──", trial.prompt, trial.concept, dose(trial));
        Some(format!("{head}\n{}\n", reply.text.trim()))
    });
    lines.collect()
}
