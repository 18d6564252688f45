//! Judges against each other and against a reader's labels, and what the labels say of a judge's rates.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Serialize;

use crate::{
    error::{Context, Error, Result},
    experiment::{
        results::{Criterion, Grade, Verdict},
        stats::{Corrected, Count, Pairs, rogan_gladen},
    },
};

/// Verdicts by trial and criterion; what is missing was not judged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdicts(BTreeMap<(String, Criterion), bool>);

impl Verdicts {
    /// One judge's.
    pub fn of_judge(grades: &[Grade], judge: &str) -> Self {
        let grades = grades.iter().filter(|grade| grade.judge == judge);
        let verdicts = grades.flat_map(|grade| {
            let of = |(criterion, verdict): (&Criterion, &Verdict)| {
                ((grade.trial.clone(), *criterion), verdict.yes)
            };
            grade.verdicts.iter().map(of)
        });
        Self(verdicts.collect())
    }

    /// A reader's, from a CSV file: a column `trial` (or `id`) with trials' ids and one or more named as
    /// criteria with yes or no (true or false, 1 or 0); an empty cell is no verdict.
    ///
    /// # Errors
    /// No such columns, another word in a cell, or a trial twice, with its line.
    pub fn read_labels(path: &Path) -> Result<Self> {
        let text = fs_err::read_to_string(path)?;
        Self::parse_labels(&text).at(|| path.display().to_string())
    }

    fn parse_labels(text: &str) -> Result<Self> {
        let mut lines = csv::Reader::from_reader(text.as_bytes());
        let broken = |error: csv::Error| Error::new("not a CSV table").got(error);
        let head = lines.headers().map_err(broken)?.clone();
        let find = |name: &str| head.iter().position(|column| column.trim() == name);
        let columns: Vec<(Criterion, usize)> = Criterion::ALL
            .into_iter()
            .filter_map(|criterion| Some((criterion, find(criterion.name())?)))
            .collect();
        let id = find("trial").or(find("id")).filter(|_| !columns.is_empty()).ok_or_else(|| {
            Error::new("the labels lack a column")
                .expected(format!(
                    "trial, and some of {}",
                    Criterion::ALL.map(Criterion::name).join(", ")
                ))
                .got(head.iter().collect::<Vec<_>>().join(", "))
        })?;
        let mut verdicts = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (number, line) in lines.records().enumerate() {
            let line = line.map_err(broken)?;
            let place = || format!("line {}", number + 2);
            let trial = line.get(id).unwrap_or_default().trim().to_owned();
            if !seen.insert(trial.clone()) {
                return Err(Error::new("a trial has two lines").at(place()).got(trial));
            }
            for (criterion, column) in &columns {
                let cell = line.get(*column).unwrap_or_default().trim();
                let yes = match cell.to_lowercase().as_str() {
                    "" => continue,
                    "yes" | "true" | "1" => true,
                    "no" | "false" | "0" => false,
                    _ => {
                        return Err(Error::new("not a verdict")
                            .at(format!("{}, {}", place(), criterion.name()))
                            .expected("yes, no or nothing")
                            .got(format!("{cell:?}")));
                    }
                };
                verdicts.insert((trial.clone(), *criterion), yes);
            }
        }
        Ok(Self(verdicts))
    }

    /// The trials that have a verdict.
    pub fn trials(&self) -> BTreeSet<&str> {
        self.0.keys().map(|(trial, _)| trial.as_str()).collect()
    }

    fn count(&self, criterion: Criterion) -> Count {
        let mut count = Count::default();
        self.0.iter().filter(|((_, of), _)| *of == criterion).for_each(|(_, yes)| count.add(*yes));
        count
    }
}

/// Two judges on one criterion.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// What they judged.
    pub criterion: Criterion,
    /// Trials that both judged.
    pub counts: Pairs,
    /// Share of equal verdicts.
    pub agreement: Option<f64>,
    /// Cohen's.
    pub kappa: Option<f64>,
    /// Gwet's.
    pub ac1: Option<f64>,
}

/// The criteria on which both have verdicts of the same trials.
pub fn compare(first: &Verdicts, second: &Verdicts) -> Vec<Comparison> {
    let comparison = |criterion| {
        let mut counts = Pairs::default();
        for (key, verdict) in second.0.iter().filter(|((_, of), _)| *of == criterion) {
            if let Some(other) = first.0.get(key) {
                counts.add(*other, *verdict);
            }
        }
        let (agreement, kappa, ac1) = (counts.accuracy(), counts.kappa(), counts.ac1());
        (counts.total() > 0).then_some(Comparison { criterion, counts, agreement, kappa, ac1 })
    };
    Criterion::ALL.into_iter().filter_map(comparison).collect()
}

/// A judge's rate over all its trials, corrected by how often it errs on labelled ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CorrectedRate {
    /// What was judged.
    pub criterion: Criterion,
    /// Yes, of all verdicts of the judge.
    pub apparent: Count,
    /// Yes of the judge, of the labels' yes: its sensitivity.
    pub found: Count,
    /// No of the judge, of the labels' no: its specificity.
    pub spared: Count,
    /// The corrected rate; none where the judge is no better than chance, or labels lack yes or no.
    pub corrected: Option<Corrected>,
}

/// For every criterion with labels.
pub fn corrected(judge: &Verdicts, labels: &Verdicts) -> Vec<CorrectedRate> {
    let rate = |comparison: Comparison| {
        let counts = comparison.counts;
        let apparent = judge.count(comparison.criterion);
        let count = |k, n| Count { k, n };
        let found = count(counts.both, counts.both + counts.second);
        let spared = count(counts.neither, counts.neither + counts.first);
        let corrected = rogan_gladen(apparent, found, spared);
        CorrectedRate { criterion: comparison.criterion, apparent, found, spared, corrected }
    };
    compare(judge, labels).into_iter().map(rate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> Result<Verdicts> {
        Verdicts::parse_labels(text)
    }

    #[test]
    fn labels_are_read_and_mistakes_named() {
        let read = labels("text,id,claims,coherent\n\"a, b\",x,yes,1\nc,y,no,\n").unwrap();
        assert_eq!(read.trials().into_iter().collect::<Vec<_>>(), ["x", "y"]);
        let marked = labels("\u{feff}trial,claims\nx,YES\n").unwrap();
        assert_eq!(marked.trials().len(), 1, "a byte order mark, as spreadsheets write it");
        assert_eq!(read.count(Criterion::Claims), Count { k: 1, n: 2 });
        assert_eq!(read.count(Criterion::Coherent), Count { k: 1, n: 1 });
        assert_eq!(read.count(Criterion::Mentions), Count::default());
        let mistakes = [
            ("trial,claim\nx,yes\n", "claims"),
            ("claims\nyes\n", "trial"),
            ("trial,claims\nx,yes\ny,perhaps\n", "line 3"),
            ("trial,claims\nx,yes\nx,no\n", "two lines"),
            ("trial,claims\nx,yes,no\n", "CSV"),
        ];
        for (text, want) in mistakes {
            let error = labels(text).unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn only_trials_that_both_judged_count() {
        let first = labels("trial,claims\na,1\nb,1\nc,0\nd,0\ne,1\n").unwrap();
        let second = labels("trial,claims,coherent\na,1,1\nb,0,1\nc,1,1\nd,0,1\nf,1,1\n").unwrap();
        let compared = compare(&first, &second);
        let [claims] = &compared[..] else { panic!("one criterion in common") };
        assert_eq!(claims.counts, Pairs { both: 1, first: 1, second: 1, neither: 1 });
        assert_eq!((claims.agreement, claims.kappa, claims.ac1), (Some(0.5), Some(0.0), Some(0.0)));
        let rates = corrected(&first, &second);
        assert_eq!(rates[0].apparent, Count { k: 3, n: 5 });
        assert_eq!((rates[0].found, rates[0].spared), (Count { k: 1, n: 2 }, Count { k: 1, n: 2 }));
        assert_eq!(rates[0].corrected, None, "no better than chance");
    }

    #[test]
    fn kappa_collapses_where_an_answer_is_rare_and_ac1_does_not() {
        // Gwet's own example of the paradox: 118 of 125 verdicts are equal.
        let counts = Pairs { both: 118, first: 5, second: 2, neither: 0 };
        assert!((counts.kappa().unwrap() + 0.0234).abs() < 1e-3, "{:?}", counts.kappa());
        assert!((counts.ac1().unwrap() - 0.9408).abs() < 1e-3, "{:?}", counts.ac1());
    }
}
