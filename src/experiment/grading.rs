//! The rule judge: verdicts on sampled replies, each with what it rests on. What the rules do and
//! what they cannot see stands in `docs/grading.md`.

mod agreement;
mod choice;
mod claims;
pub mod compare;
mod intent;
mod relations;
mod text;

use std::collections::BTreeMap;

pub use agreement::{Agreement, Flaw, Half, Label, LabelSet, agreement, labels};
pub use choice::{CHOICES, choices};
pub use relations::Relations;

use self::{
    claims::Claim,
    relations::Mention,
    text::{Word, words},
};
use crate::experiment::results::{Condition, Criterion, Grade, Outcome, Trial, Verdict};

/// Name and version of the rules: a change of any verdict is a new version.
pub const JUDGE: &str = "rules-1";
/// Share of the clean replies that the likelihood limit lets through.
const CLEAN_SHARE: f64 = 0.98;
/// With fewer clean replies the limit is their largest value.
const FEW_CLEAN: usize = 20;
/// Least share of word pairs that differ.
const DISTINCT_BIGRAMS: f64 = 0.6;
/// Shorter replies (in words) are not judged by their word pairs.
const SHORT: usize = 4;

/// Grades every trial that has a reply, in the order of `trials`. The same trials in another order
/// get the same grades. The likelihood limit of a prompt comes from its clean replies among
/// `trials`, so grade a run's trials together. `outcome` says what a prompt's replies are judged on.
pub fn grade(trials: &[Trial], words: &Relations, outcome: &dyn Fn(&str) -> Outcome) -> Vec<Grade> {
    let case = |trial| Case::of(trial, outcome);
    let cases: Vec<Case> = trials.iter().filter_map(case).collect();
    grade_cases(&cases, words)
}

/// What a verdict may depend on.
struct Case<'a> {
    id: &'a str,
    prompt: &'a str,
    outcome: Outcome,
    concept: &'a str,
    sentence: &'a str,
    clean: bool,
    seed: u64,
    text: &'a str,
    /// Nats a token.
    nll: f64,
}

impl<'a> Case<'a> {
    fn of(trial: &'a Trial, outcome: &dyn Fn(&str) -> Outcome) -> Option<Self> {
        let reply = trial.reply.as_ref()?;
        Some(Self {
            id: &trial.id,
            prompt: &trial.prompt,
            outcome: outcome(&trial.prompt),
            concept: &trial.concept,
            sentence: trial.sentence.as_deref().unwrap_or_default(),
            clean: trial.condition == Condition::Clean,
            seed: trial.seed,
            text: &reply.text,
            nll: reply.nll,
        })
    }
}

fn grade_cases(cases: &[Case], words: &Relations) -> Vec<Grade> {
    let limits = limits(cases);
    cases.iter().map(|case| grade_one(case, words, limits.get(case.prompt))).collect()
}

fn grade_one(case: &Case, list: &Relations, limit: Option<&Limit>) -> Grade {
    let reply = words(case.text);
    let verdicts = match case.outcome {
        Outcome::Detection => detection(case, list, limit, &reply).into(),
        Outcome::Choice => {
            let choices = choices(list.words(), case.concept, case.seed);
            let verdict = choice::verdict(list, &choices, case.concept, &reply);
            [(Criterion::Chooses, verdict)].into()
        }
        Outcome::Repeat => [(Criterion::Repeats, choice::repeats(case.sentence, case.text))].into(),
        Outcome::Intent => intent::verdicts(&reply).into(),
    };
    Grade {
        trial: case.id.to_owned(),
        judge: JUDGE.to_owned(),
        verdicts,
        missing: BTreeMap::new(),
        mentioned: match case.outcome {
            Outcome::Detection => list.mentioned(&reply),
            _ => Vec::new(),
        },
    }
}

fn detection(
    case: &Case,
    list: &Relations,
    limit: Option<&Limit>,
    reply: &[Word],
) -> [(Criterion, Verdict); 4] {
    let claim = claims::find(case.text, reply);
    let mention =
        if case.concept.is_empty() { None } else { list.first_mention(case.concept, reply) };
    let order = order_verdict(reply, claim.as_ref(), mention.as_ref());
    [
        (Criterion::Coherent, coherent(case.nll, reply, limit)),
        (Criterion::Claims, claim_verdict(case.text, reply, claim.as_ref())),
        (Criterion::Mentions, mention_verdict(case, reply, mention.as_ref())),
        (Criterion::ClaimsThenNames, order),
    ]
}

/// The largest nll a coherent reply to a prompt may have, and the clean replies it comes from.
struct Limit {
    nll: f64,
    replies: usize,
}

/// One limit a prompt: of the n finite values in ascending order the one at rank ⌈.98·n⌉ (from 1);
/// with fewer than 20 that is always the largest.
fn limits<'a>(cases: &[Case<'a>]) -> BTreeMap<&'a str, Limit> {
    let mut clean: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for case in cases.iter().filter(|case| case.clean && case.nll.is_finite()) {
        clean.entry(case.prompt).or_default().push(case.nll);
    }
    let limit = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        let rank = (CLEAN_SHARE * values.len() as f64).ceil() as usize;
        Limit { nll: values[rank - 1], replies: values.len() }
    };
    clean.into_iter().map(|(prompt, values)| (prompt, limit(values))).collect()
}

fn coherent(nll: f64, reply: &[Word], limit: Option<&Limit>) -> Verdict {
    if reply.is_empty() {
        return Verdict { yes: false, evidence: "no words".into() };
    }
    let (likely, by_likelihood) = match limit {
        None => (true, format!("nll {nll:.3} not judged (no clean replies to this prompt)")),
        Some(Limit { nll: most, replies }) => {
            let likely = nll <= *most;
            let sign = if likely { "<=" } else { "not <=" };
            let name = if *replies < FEW_CLEAN {
                format!("the largest of only {replies} clean replies")
            } else {
                format!("98th percentile of {replies} clean replies")
            };
            (likely, format!("nll {nll:.3} {sign} {most:.3} ({name})"))
        }
    };
    let (varied, by_pairs) = if reply.len() < SHORT {
        (true, format!("word pairs not judged (under {SHORT} words)"))
    } else {
        let share = distinct_bigrams(reply);
        let sign = if share >= DISTINCT_BIGRAMS { ">=" } else { "<" };
        let text = format!("distinct word pairs {share:.3} {sign} {DISTINCT_BIGRAMS:.3}");
        (share >= DISTINCT_BIGRAMS, text)
    };
    Verdict { yes: likely && varied, evidence: format!("{by_likelihood}; {by_pairs}") }
}

/// Distinct pairs of neighbouring words by all pairs; needs two words.
fn distinct_bigrams(reply: &[Word]) -> f64 {
    let pairs: std::collections::BTreeSet<(&str, &str)> =
        reply.windows(2).map(|pair| (pair[0].text.as_str(), pair[1].text.as_str())).collect();
    pairs.len() as f64 / (reply.len() - 1) as f64
}

fn claim_verdict(text: &str, reply: &[Word], claim: Option<&Claim>) -> Verdict {
    let evidence = match claim {
        None => "no statement of detection".into(),
        Some(Claim { words, rule }) => {
            let span = reply[words.start].span.start..reply[words.end - 1].span.end;
            format!("{:?} at byte {} ({rule})", &text[span.clone()], span.start)
        }
    };
    Verdict { yes: claim.is_some(), evidence }
}

fn mention_verdict(case: &Case, reply: &[Word], mention: Option<&Mention>) -> Verdict {
    let evidence = match mention {
        None if case.concept.is_empty() => "the trial has no word".into(),
        None => format!("no form or relation of {}", case.concept),
        Some(Mention { word, matched, related }) => {
            let kind = if *related { "relation" } else { "form" };
            let at = reply[*word].span.start;
            format!("{matched:?} at byte {at} ({kind} of {})", case.concept)
        }
    };
    Verdict { yes: mention.is_some(), evidence }
}

fn order_verdict(reply: &[Word], claim: Option<&Claim>, mention: Option<&Mention>) -> Verdict {
    let (yes, evidence) = match (claim, mention) {
        (None, _) => (false, "claims nothing"),
        (_, None) => (false, "mentions nothing"),
        (Some(_), Some(mention)) if mention.word == 0 => (false, "the mention is the first word"),
        (Some(claim), Some(mention)) if mention.word < claim.words.start => {
            (false, "the mention comes before the claim")
        }
        (_, Some(mention)) if sensed(reply, mention.word) => {
            (false, "the mention is said to be sensed")
        }
        _ => (true, "the claim comes first"),
    };
    Verdict { yes, evidence: evidence.into() }
}

/// Whether the word at `at` is something tasted, smelled, seen, heard or touched ("I can smell
/// fresh bread"): a word of the senses up to five words before it in the sentence, with nothing
/// between that makes it a thought.
fn sensed(reply: &[Word], at: usize) -> bool {
    const SENSES: [&str; 27] = [
        "taste", "tastes", "tasted", "tasting", "smell", "smells", "smelled", "smelt", "smelling",
        "see", "saw", "seeing", "hear", "hears", "heard", "hearing", "touch", "touched",
        "touching", "feel", "felt", "feeling", "sounds", "scent", "sight", "sound", "odor",
    ];
    const THOUGHTS: [&str; 14] = [
        "thought",
        "thoughts",
        "idea",
        "ideas",
        "concept",
        "concepts",
        "word",
        "pattern",
        "patterns",
        "about",
        "that",
        "injected",
        "injection",
        "related",
    ];
    let before = reply[..at].iter().rev().take(5);
    before
        .take_while(|word| word.sentence == reply[at].sentence)
        .take_while(|word| !THOUGHTS.contains(&word.text.as_str()))
        .any(|word| SENSES.contains(&word.text.as_str()))
}

#[cfg(test)]
#[path = "grading/tests.rs"]
mod tests;
