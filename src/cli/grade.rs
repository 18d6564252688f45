//! `inkling grade`: verdicts on a run's stored replies. No model is needed.

use std::{
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
#[derive(Default, Serialize)]
pub struct Counts {
    judge: &'static str,
    replies: usize,
    coherent: usize,
    claims: usize,
    mentions: usize,
    claims_then_names: usize,
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
    let words: Vec<&str> = run.manifest.words.iter().map(|word| word.word.as_str()).collect();
    let grades = grading::grade(&run.trials, &Relations::for_words(&words)?);
    folder::append_grades(dir, &grades)?;
    let mut counts = Counts { judge: grading::JUDGE, replies: grades.len(), ..Counts::default() };
    for grade in &grades {
        counts.coherent += usize::from(grade.coherent.yes);
        counts.claims += usize::from(grade.claims.yes);
        counts.mentions += usize::from(grade.mentions.yes);
        counts.claims_then_names += usize::from(grade.claims_then_names.yes);
    }
    Ok(counts)
}

impl Counts {
    /// For people, in one line.
    fn line(&self) -> String {
        format!(
            "{} replies graded by {}: {} coherent, {} claim an injected thought, {} mention their \
             word, {} claim and then name it",
            self.replies,
            self.judge,
            self.coherent,
            self.claims,
            self.mentions,
            self.claims_then_names
        )
    }
}
