//! `inkling report`: tables, and one self-contained page, from a run's stored trials and grades.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use super::output::{Output, note};
use crate::{
    error::{Error, Result},
    experiment::{folder, results::Run},
    files,
    report::{self, Headline, Tables, Versus},
};

/// Write a run's report.html and its tables as CSV, and print them; of two runs, print how they differ
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// Another one, to be compared with the first
    other: Option<PathBuf>,
    /// Whose verdicts count, where several judges have graded [default: the one with the most]
    #[arg(long, value_name = "NAME")]
    judge: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown {
    headline: Headline,
    tables: Tables,
}

#[derive(Serialize)]
struct Compared {
    first: Headline,
    second: Headline,
    rates: Vec<Versus>,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let run = load(args, &args.dir)?;
    let mut output = Output::new();
    if let Some(other) = &args.other {
        let other = load(args, other)?;
        if args.json {
            let (first, second) = (report::headline(&run), report::headline(&other));
            output.json(&Compared { first, second, rates: report::versus(&run, &other) })?;
        } else {
            output.line(report::versus_text(&run, &other).trim_end())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let page = write(&run, &args.dir)?;
    if args.json {
        let shown = Shown { headline: report::headline(&run), tables: report::tables(&run) };
        output.json(&shown)?;
    } else {
        output.line(report::text(&run).trim_end())?;
    }
    note(format!("report: {} (tables as CSV in {TABLES})", page.display()));
    Ok(ExitCode::SUCCESS)
}

/// The run with the verdicts that count.
fn load(args: &Args, dir: &Path) -> Result<Run> {
    let mut run = folder::load(dir)?;
    if let Some(judge) = &args.judge {
        let judges: BTreeSet<String> = run.grades.iter().map(|grade| grade.judge.clone()).collect();
        if !judges.contains(judge) {
            return Err(Error::new("no verdicts of that judge")
                .at(dir.display().to_string())
                .expected(judges.into_iter().collect::<Vec<_>>().join(" or "))
                .got(judge));
        }
        run.grades.retain(|grade| grade.judge == *judge);
    }
    if run.grades.is_empty() && run.trials.iter().any(|trial| trial.reply.is_some()) {
        note(format!("no grades yet: `inkling grade {}` makes them", dir.display()));
    }
    Ok(run)
}

/// The folder of the tables, in the run's.
const TABLES: &str = "tables";

/// Writes the page and the tables and gives the page's path.
pub fn write(run: &Run, dir: &Path) -> Result<PathBuf> {
    let page = dir.join("report.html");
    files::write_atomically(&page, report::html(run).as_bytes())?;
    let tables = dir.join(TABLES);
    fs_err::create_dir_all(&tables)?;
    for (name, text) in report::csv_files(run) {
        files::write_atomically(&tables.join(name), text.as_bytes())?;
    }
    Ok(page)
}
