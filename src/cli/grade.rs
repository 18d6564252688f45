//! `inkling grade`: verdicts on a run's stored replies. No model is needed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;

use super::output::{Output, note};
use crate::{
    error::Result,
    experiment::{
        folder,
        grading::{self, Relations},
        results::{Criterion, Grade},
        stats::Count,
    },
};

/// Grade the replies of a run by rules; what was graded before is replaced where it differs
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How many replies got a yes.
#[derive(Serialize)]
pub struct Counts {
    judge: String,
    replies: usize,
    /// Of the replies that were judged on it.
    verdicts: BTreeMap<Criterion, Count>,
    /// Verdicts that could not be had.
    missing: usize,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let counts = grade(&args.dir)?;
    let mut output = Output::new();
    if args.json {
        output.json(&counts)?;
    } else {
        output.line(counts.line())?;
        note(grading::agreement(&grading::labels()?)?.to_string());
    }
    Ok(ExitCode::SUCCESS)
}

/// Grades all replies of a folder and stores the verdicts.
pub fn grade(dir: &Path) -> Result<Counts> {
    let run = folder::load(dir)?;
    let protocol = folder::parse_protocol(&run.manifest.protocol)?;
    let outcome =
        |prompt: &str| protocol.prompts.get(prompt).map(|plan| plan.outcome).unwrap_or_default();
    let words: Vec<&str> = run.manifest.words.iter().map(|word| word.word.as_str()).collect();
    let grades = grading::grade(&run.trials, &Relations::for_words(&words)?, &outcome);
    folder::append_grades(dir, &grades)?;
    Ok(Counts::of(grading::JUDGE, &grades))
}

impl Counts {
    fn of(judge: &str, grades: &[Grade]) -> Self {
        let mut counts = Self {
            judge: judge.to_owned(),
            replies: grades.len(),
            verdicts: BTreeMap::new(),
            missing: grades.iter().map(|grade| grade.missing.len()).sum(),
        };
        for (criterion, verdict) in grades.iter().flat_map(|grade| &grade.verdicts) {
            counts.verdicts.entry(*criterion).or_default().add(verdict.yes);
        }
        counts
    }

    /// For people, in one line.
    fn line(&self) -> String {
        let said = self.verdicts.iter();
        let said = said.map(|(criterion, count)| {
            format!("{} {} of {}", criterion.name().replace('_', " "), count.k, count.n)
        });
        let missing = match self.missing {
            0 => String::new(),
            some => format!("; {some} verdicts are missing"),
        };
        let said = said.collect::<Vec<_>>().join(", ");
        format!("{} replies graded by {}: {said}{missing}", self.replies, self.judge)
    }
}
