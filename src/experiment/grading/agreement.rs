//! How well the rules agree with a reader: the labelled replies that inkling brings.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;

use super::{Case, JUDGE, Relations, grade_cases};
use crate::{
    error::{Context, Error, Result},
    experiment::{
        results::{Condition, Criterion, Outcome},
        stats::Pairs,
    },
};

const LABELS: &str = include_str!("../../../experiments/labels/smollm2.jsonl");

/// A real reply with a reader's verdicts.
#[expect(clippy::struct_excessive_bools, reason = "four separate verdicts")]
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    /// Its number in the file.
    pub id: String,
    /// Which question was asked: `cued` or `open`.
    pub prompt: String,
    /// What was injected.
    pub condition: Condition,
    /// The word (for a clean reply: an arbitrary one).
    pub concept: String,
    /// Block of the injection; none for clean replies.
    pub layer: Option<usize>,
    /// In units of the mean clean norm of the window; none for clean replies.
    pub dose: Option<f64>,
    /// Mean negative log-likelihood under the uninjected model, nats a token.
    pub nll: f64,
    /// The reply, without special tokens.
    pub text: String,
    /// How the reply was chosen.
    pub set: LabelSet,
    /// Whether the rules were tuned on it.
    pub half: Half,
    /// Neither garbled nor repetitive, and an answer of some kind to the question.
    pub coherent: bool,
    /// Why not.
    pub why: Option<Flaw>,
    /// Says that it detects an injected thought, or plainly implies it.
    pub claims: bool,
    /// The word or a near relation stands in it.
    pub mentions: bool,
    /// Claims first and then names the word.
    pub claims_then_names: bool,
}

/// How a labelled reply was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelSet {
    /// As drawn.
    Random,
    /// Among many, because it holds a word such as "yes" or "detect": shows what precision is
    /// worth where claims are rare, and says nothing about how often they occur.
    Enriched,
}

/// Two random halves of each set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Half {
    /// The rules were improved on it.
    #[serde(rename = "tuning")]
    Tuning,
    /// It was not looked at while the rules were improved.
    #[serde(rename = "held out")]
    HeldOut,
}

/// What a reader finds wrong with an incoherent reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum Flaw {
    /// Cannot be followed.
    #[serde(rename = "garbled")]
    Garbled,
    /// A loop.
    #[serde(rename = "repetitive")]
    Repetitive,
    /// Readable, but no answer to the question, or it plays an invented scene.
    #[serde(rename = "no answer")]
    NoAnswer,
}

/// The rules against a reader; printed as a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The judge's name and version.
    pub judge: &'static str,
    /// Labelled replies.
    pub replies: usize,
    /// `coherent`.
    pub coherent: Pairs,
    /// `claims`.
    pub claims: Pairs,
    /// `mentions`.
    pub mentions: Pairs,
    /// `claims_then_names`.
    pub claims_then_names: Pairs,
    /// Of the replies with each flaw: (called coherent by the rules, all).
    pub flaws: BTreeMap<Flaw, (usize, usize)>,
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} against a reader, {} labelled replies", self.judge, self.replies)?;
        let heads = ["yes", "accuracy", "precision", "recall", "kappa"];
        write!(f, "{:<18}", "")?;
        heads.iter().try_for_each(|head| write!(f, "{head:>10}"))?;
        let rows = [
            ("coherent", self.coherent),
            ("claims", self.claims),
            ("mentions", self.mentions),
            ("claims then names", self.claims_then_names),
        ];
        for (name, counts) in rows {
            write!(f, "\n{name:<18}{:>10}", counts.both + counts.second)?;
            let numbers = [counts.accuracy(), counts.precision(), counts.recall(), counts.kappa()];
            for number in numbers {
                let text = number.map_or("n/a".into(), |number| format!("{number:.2}"));
                write!(f, "{text:>10}")?;
            }
        }
        Ok(())
    }
}

/// The labelled replies that inkling brings.
///
/// # Errors
/// None in a sound build: the file is part of it.
pub fn labels() -> Result<Vec<Label>> {
    let line = |(number, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|error| Error::new(error.to_string()))
            .at(|| format!("labels/smollm2.jsonl, line {}", number + 1))
    };
    LABELS.lines().enumerate().map(line).collect()
}

/// Grades labelled replies as one run and compares the verdicts. The likelihood limit comes from
/// the clean ones among `labels`.
///
/// # Errors
/// Those of [`Relations::for_words`].
pub fn agreement(labels: &[Label]) -> Result<Agreement> {
    let all: Vec<&Label> = labels.iter().collect();
    compare(&all, &all)
}

/// Grades all `labels`, compares on `chosen` ones.
pub(super) fn compare(labels: &[&Label], chosen: &[&Label]) -> Result<Agreement> {
    let mut concepts: Vec<&str> = labels.iter().map(|label| label.concept.as_str()).collect();
    concepts.sort_unstable();
    concepts.dedup();
    let cases: Vec<Case> = labels.iter().map(|label| case(label)).collect();
    let grades = grade_cases(&cases, &Relations::for_words(&concepts)?);
    let mut result = Agreement {
        judge: JUDGE,
        replies: chosen.len(),
        coherent: Pairs::default(),
        claims: Pairs::default(),
        mentions: Pairs::default(),
        claims_then_names: Pairs::default(),
        flaws: BTreeMap::new(),
    };
    for (label, grade) in labels.iter().zip(&grades) {
        if !chosen.iter().any(|other| other.id == label.id) {
            continue;
        }
        let said = |criterion| grade.yes(criterion) == Some(true);
        result.coherent.add(said(Criterion::Coherent), label.coherent);
        result.claims.add(said(Criterion::Claims), label.claims);
        result.mentions.add(said(Criterion::Mentions), label.mentions);
        let names = said(Criterion::ClaimsThenNames);
        result.claims_then_names.add(names, label.claims_then_names);
        if let Some(flaw) = label.why {
            let (passed, all) = result.flaws.entry(flaw).or_default();
            *passed += usize::from(said(Criterion::Coherent));
            *all += 1;
        }
    }
    Ok(result)
}

fn case(label: &Label) -> Case<'_> {
    Case {
        id: &label.id,
        prompt: &label.prompt,
        outcome: Outcome::Detection,
        concept: &label.concept,
        sentence: "",
        clean: label.condition == Condition::Clean,
        seed: 0,
        text: &label.text,
        nll: label.nll,
    }
}
