//! `inkling report`: tables, and one self-contained page, from a run's stored trials and grades.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use super::output::{Output, note};
use crate::{
    error::Result,
    experiment::{folder, results::Run},
    files,
    report::{self, Headline, Tables},
};

/// Write a run's report.html and print its tables
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown {
    headline: Headline,
    tables: Tables,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let run = folder::load(&args.dir)?;
    if run.grades.is_empty() && run.trials.iter().any(|trial| trial.reply.is_some()) {
        note(format!("no grades yet: `inkling grade {}` makes them", args.dir.display()));
    }
    let page = write(&run, &args.dir)?;
    let mut output = Output::new();
    if args.json {
        let shown = Shown { headline: report::headline(&run), tables: report::tables(&run) };
        output.json(&shown)?;
    } else {
        output.line(report::text(&run).trim_end())?;
    }
    note(format!("report: {}", page.display()));
    Ok(ExitCode::SUCCESS)
}

/// Writes the page and gives its path.
pub fn write(run: &Run, dir: &Path) -> Result<PathBuf> {
    let page = dir.join("report.html");
    files::write_atomically(&page, report::html(run).as_bytes())?;
    Ok(page)
}
