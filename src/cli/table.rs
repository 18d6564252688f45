//! `inkling table`: one row a trial, as CSV.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
};

use super::output::Output;
use crate::{
    experiment::{
        folder,
        results::{Criterion, Grade, Run, Trial},
    },
    files,
    request::StrengthMode,
};

/// Write a run as a table: one row a trial, with the verdicts of every judge
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// CSV file; - is standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    out: PathBuf,
}

/// The columns before the judges'.
const COLUMNS: [&str; 41] = [
    "id",
    "part",
    "prompt",
    "concept",
    "sentence",
    "condition",
    "other",
    "layer",
    "depth",
    "dose",
    "mode",
    "dose_raw",
    "dose_norm",
    "dose_reference",
    "dose_row",
    "repeat",
    "seed",
    "clean",
    "site",
    "vector_norm",
    "reference_norm",
    "norm_before",
    "change_planned",
    "change_measured",
    "rows_expected",
    "rows_touched",
    "margin",
    "p_yes",
    "mass",
    "entropy",
    "kl",
    "top",
    "read_word",
    "read_rank",
    "read_words",
    "text",
    "tokens",
    "finish",
    "nll",
    "from",
    "to",
];
pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let rows = rows(&folder::load(&args.dir)?);
    let lines = rows.iter().map(|row| row.iter().map(|cell| quoted(cell)).collect::<Vec<_>>());
    let text: String = lines.map(|cells| cells.join(",") + "\n").collect();
    if args.out == Path::new("-") {
        Output::new().line(text.trim_end_matches('\n'))?;
    } else {
        files::write_atomically(&args.out, text.as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Head and rows. The rows' order does not depend on the order in which trials finished.
fn rows(run: &Run) -> Vec<Vec<String>> {
    let judges: BTreeSet<&str> = run.grades.iter().map(|grade| grade.judge.as_str()).collect();
    let grades: BTreeMap<(&str, &str), &Grade> = run
        .grades
        .iter()
        .map(|grade| ((grade.trial.as_str(), grade.judge.as_str()), grade))
        .collect();
    let mut head: Vec<String> = COLUMNS.map(str::to_owned).to_vec();
    for judge in &judges {
        let names = Criterion::ALL.map(Criterion::name).into_iter();
        let names = names.chain(["mentioned", "claim_token", "mention_token"]);
        head.extend(names.map(|name| format!("{judge}.{name}")));
    }
    let mut trials: Vec<&Trial> = run.trials.iter().collect();
    trials.sort_by(|a, b| {
        let key = |t: &Trial| (t.part.clone(), t.prompt.clone(), t.concept.clone(), t.condition);
        let place = |t: &Trial| (t.layer, t.dose.map_or(0, order), t.repeat);
        (key(a), place(a), &a.id).cmp(&(key(b), place(b), &b.id))
    });
    let mut rows = vec![head];
    for trial in trials {
        let mut row = cells(trial);
        for judge in &judges {
            row.extend(verdicts(trial, grades.get(&(trial.id.as_str(), *judge)).copied()));
        }
        rows.push(row);
    }
    rows
}

/// Integers in the order of the numbers (IEEE 754's total order).
fn order(number: f64) -> i64 {
    let bits = number.to_bits() as i64;
    bits ^ (((bits >> 63) as u64) >> 1) as i64
}

fn cells(trial: &Trial) -> Vec<String> {
    let receipt = trial.receipts.first();
    let of_receipt =
        |value: fn(&crate::engine::Receipt) -> Option<f32>| show(receipt.and_then(value));
    let planned = receipt.and_then(|receipt| receipt.planned);
    let per = |unit: Option<f32>| show(planned.zip(unit).map(|(planned, unit)| planned / unit));
    let (first, read, reply) = (trial.first.as_ref(), trial.read.as_ref(), trial.reply.as_ref());
    vec![
        trial.id.clone(),
        trial.part.clone(),
        trial.prompt.clone(),
        trial.concept.clone(),
        trial.sentence.clone().unwrap_or_default(),
        name(&trial.condition),
        trial.other.clone().unwrap_or_default(),
        show(trial.layer),
        show(trial.depth),
        show(trial.dose),
        trial.mode.as_ref().map_or_else(String::new, |mode: &StrengthMode| name(mode)),
        per(receipt.map(|receipt| receipt.vector_norm)),
        show(planned),
        per(receipt.and_then(|receipt| receipt.reference_norm)),
        per(receipt.and_then(|receipt| receipt.norm_before)),
        trial.repeat.to_string(),
        trial.seed.to_string(),
        trial.clean.clone().unwrap_or_default(),
        receipt.map_or_else(String::new, |receipt| receipt.site.clone()),
        of_receipt(|receipt| Some(receipt.vector_norm)),
        of_receipt(|receipt| receipt.reference_norm),
        of_receipt(|receipt| receipt.norm_before),
        of_receipt(|receipt| receipt.planned),
        of_receipt(|receipt| receipt.measured),
        show(receipt.map(|receipt| receipt.rows_expected)),
        show(receipt.map(|receipt| receipt.rows_touched)),
        show(first.map(|first| first.margin)),
        show(first.map(|first| first.p_yes)),
        show(first.map(|first| first.mass)),
        show(first.map(|first| first.entropy)),
        show(trial.next.as_ref().and_then(|next| next.kl)),
        trial.next.as_ref().map_or_else(String::new, |next| {
            next.top.iter().map(|(piece, _)| piece.as_str()).collect::<Vec<_>>().join(";")
        }),
        read.map_or_else(String::new, |read| read.word.clone()),
        show(read.map(|read| read.rank)),
        show(read.map(|read| read.words)),
        reply.map_or_else(String::new, |reply| reply.text.clone()),
        show(reply.map(|reply| reply.tokens.len())),
        reply.map_or_else(String::new, |reply| name(&reply.finish)),
        show(reply.map(|reply| reply.nll)),
        show(receipt.map(|receipt| receipt.from)),
        show(receipt.and_then(|receipt| receipt.to)),
    ]
}

/// A judge's columns; empty where it has not graded the trial.
fn verdicts(trial: &Trial, grade: Option<&Grade>) -> Vec<String> {
    let Some(grade) = grade else { return vec![String::new(); Criterion::ALL.len() + 3] };
    let mut cells = Criterion::ALL.map(|criterion| show(grade.yes(criterion))).to_vec();
    cells.push(grade.mentioned.join(";"));
    // The reply's token at which the quoted evidence begins.
    for criterion in [Criterion::Claims, Criterion::Mentions] {
        let at =
            grade.quotation(criterion).and_then(|(byte, _)| trial.reply.as_ref()?.token_at(byte));
        cells.push(show(at));
    }
    cells
}

/// Empty where there is none.
fn show(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

/// A unit variant's name, as in the run's files.
fn name(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

/// RFC 4180, with \n between rows.
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) || cell.trim() != cell {
        return format!("\"{}\"", cell.replace('"', "\"\""));
    }
    cell.to_owned()
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
