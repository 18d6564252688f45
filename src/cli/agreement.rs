//! `inkling agreement`: judges against each other, or against a reader's labels.

use std::{collections::BTreeSet, path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::output::{Output, columns, note};
use crate::{
    error::{Context, Error, Result},
    experiment::{
        folder,
        grading::compare::{Comparison, CorrectedRate, Verdicts, compare, corrected},
        results::Grade,
        stats::{Count, Interval},
    },
};

/// Compare a run's judges with each other, or with a reader's labels, which also correct their rates
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// A reader's verdicts: a CSV file with a column `trial` (its id) and any of `coherent`, `claims`,
    /// `mentions`, `claims_then_names` with yes, no or nothing
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Two judges, or a judge and the labels.
#[derive(Serialize)]
struct Pair {
    first: String,
    second: String,
    criteria: Vec<Comparison>,
    /// With labels only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rates: Vec<CorrectedRate>,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let grades = folder::load(&args.dir)?.grades;
    let pairs = match &args.labels {
        Some(path) => {
            let labels = Verdicts::read_labels(path)?;
            against_labels(&grades, &labels).at(|| path.display().to_string())?
        }
        None => between_judges(&grades)?,
    };
    let mut output = Output::new();
    if args.json {
        output.json(&pairs)?;
        return Ok(ExitCode::SUCCESS);
    }
    for pair in &pairs {
        pair.lines().iter().try_for_each(|line| output.line(line))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn judges(grades: &[Grade]) -> Result<Vec<&str>> {
    let judges: BTreeSet<&str> = grades.iter().map(|grade| grade.judge.as_str()).collect();
    if judges.is_empty() {
        return Err(Error::new("the run has no verdicts").hint("inkling grade DIR"));
    }
    Ok(judges.into_iter().collect())
}

fn between_judges(grades: &[Grade]) -> Result<Vec<Pair>> {
    let judges = judges(grades)?;
    if let [only] = judges[..] {
        return Err(Error::new("only one judge has graded the run")
            .got(only)
            .hint("compare it with a reader: --labels FILE"));
    }
    let mut pairs = Vec::new();
    for (at, first) in judges.iter().enumerate() {
        for second in &judges[at + 1..] {
            let [one, other] = [first, second].map(|judge| Verdicts::of_judge(grades, judge));
            let criteria = compare(&one, &other);
            let (first, second) = ((*first).to_owned(), (*second).to_owned());
            pairs.push(Pair { first, second, criteria, rates: Vec::new() });
        }
    }
    Ok(pairs)
}

fn against_labels(grades: &[Grade], labels: &Verdicts) -> Result<Vec<Pair>> {
    let pair = |judge: &str| {
        let verdicts = Verdicts::of_judge(grades, judge);
        let (criteria, rates) = (compare(&verdicts, labels), corrected(&verdicts, labels));
        Pair { first: judge.to_owned(), second: "labels".into(), criteria, rates }
    };
    let pairs: Vec<Pair> = judges(grades)?.into_iter().map(pair).collect();
    let graded: BTreeSet<&str> = grades.iter().map(|grade| grade.trial.as_str()).collect();
    let labelled = labels.trials();
    if pairs.iter().all(|pair| pair.criteria.is_empty()) {
        return Err(Error::new("no labelled trial is one that a judge has graded")
            .expected("ids as in trials.jsonl")
            .got(format!("{} labelled trials", labelled.len())));
    }
    let strangers = labelled.difference(&graded).count();
    if strangers > 0 {
        note(format!("{strangers} labelled trials are none that a judge has graded: left out"));
    }
    Ok(pairs)
}

impl Pair {
    fn lines(&self) -> Vec<String> {
        let number = |value: Option<f64>| value.map_or("n/a".into(), |value| format!("{value:.2}"));
        let head =
            ["", "both", "first only", "second only", "neither", "agreement", "kappa", "AC1"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for of in &self.criteria {
            let counts = of.counts;
            let mut row = vec![of.criterion.name().to_owned()];
            row.extend(
                [counts.both, counts.first, counts.second, counts.neither]
                    .map(|count| count.to_string()),
            );
            row.extend([of.agreement, of.kappa, of.ac1].map(number));
            rows.push(row);
        }
        let mut lines =
            vec![format!("{} (first) and {} (second): yes of", self.first, self.second)];
        lines.extend(columns(&rows, &[false, true, true, true, true, true, true, true]));
        if self.rates.is_empty() {
            return lines;
        }
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let count = |count: Count| match count.share() {
            Some(share) => format!("{} ({}/{})", percent(share), count.k, count.n),
            None => "n/a".into(),
        };
        let range = |of: Interval| format!("[{}, {}]", percent(of.low), percent(of.high));
        let head = ["", "apparent", "sensitivity", "specificity", "corrected", "95 %"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for rate in &self.rates {
            let (share, interval) = match rate.corrected {
                Some(of) => (percent(of.share), range(of.interval)),
                None => ("n/a".into(), String::new()),
            };
            let name = rate.criterion.name().to_owned();
            rows.push(vec![
                name,
                count(rate.apparent),
                count(rate.found),
                count(rate.spared),
                share,
                interval,
            ]);
        }
        lines.push(format!(
            "rates of {}, corrected for its errors (as if they were the same on all its trials)",
            self.first
        ));
        lines.extend(columns(&rows, &[false, true, true, true, true, false]));
        lines
    }
}
