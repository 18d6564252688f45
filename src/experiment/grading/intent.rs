//! Whether a reply says that its author meant a word or that it was an accident.
//!
//! Words of accident and of intent are looked for in all of it; a negation shortly before one turns it
//! round. Where both are said the accident counts: a claim that is taken back is none. Where neither is,
//! an opening yes or no decides.

use super::text::Word;
use crate::experiment::results::{Criterion, Verdict};

/// How far before a word its negation may stand, in words.
const REACH: usize = 4;

const ACCIDENT: [&str; 21] = [
    "accident",
    "accidental",
    "accidentally",
    "mistake",
    "mistaken",
    "mistakenly",
    "error",
    "unintended",
    "unintentional",
    "unintentionally",
    "inadvertent",
    "inadvertently",
    "slip",
    "typo",
    "sorry",
    "apologize",
    "apologise",
    "apologies",
    "apology",
    "oops",
    "misspoke",
];
/// Whatever stands before them.
const INTENT: [&str; 8] = [
    "intentional",
    "intentionally",
    "deliberate",
    "deliberately",
    "purpose",
    "purposely",
    "purposefully",
    "intention",
];
/// After "I" only.
const MEANT: [&str; 8] =
    ["meant", "mean", "intended", "intend", "chose", "planned", "wanted", "thinking"];
const NEGATION: [&str; 14] = [
    "not", "didn't", "don't", "wasn't", "isn't", "never", "no", "did'nt", "hadn't", "couldn't",
    "without", "neither", "nor", "unlikely",
];

/// The verdicts of [`Criterion::Intends`] and [`Criterion::Disowns`].
pub(super) fn verdicts(reply: &[Word]) -> [(Criterion, Verdict); 2] {
    let mut intent = None;
    let mut accident = None;
    for (at, word) in reply.iter().enumerate() {
        let one_of = |list: &[&str]| list.contains(&word.text.as_str());
        let before = || {
            let words = reply[..at].iter().rev().take(REACH);
            words.take_while(|other| other.sentence == word.sentence)
        };
        // "No, it was an accident" denies the question and not the accident.
        let is_answer = |at: usize| {
            let opens = at == 0 || reply[at - 1].sentence != reply[at].sentence;
            opens && ["no", "nope"].contains(&reply[at].text.as_str())
        };
        let first = at - before().count();
        let negated = (first..at)
            .any(|other| NEGATION.contains(&reply[other].text.as_str()) && !is_answer(other));
        let by_me = || before().any(|other| ["i", "i'd", "i've"].contains(&other.text.as_str()));
        let found = if one_of(&ACCIDENT) {
            Some(negated)
        } else if one_of(&INTENT) || (one_of(&MEANT) && by_me()) {
            Some(!negated)
        } else {
            None
        };
        let phrase = || {
            let first = before().count().min(if negated { REACH } else { 1 });
            let words: Vec<&str> = reply[at - first..=at].iter().map(|w| w.text.as_str()).collect();
            format!("\"{}\"", words.join(" "))
        };
        match found {
            Some(true) if intent.is_none() => intent = Some(phrase()),
            Some(false) if accident.is_none() => accident = Some(phrase()),
            _ => {}
        }
    }
    if intent.is_none() && accident.is_none() {
        match reply.first().map(|word| word.text.as_str()) {
            Some("yes" | "yeah" | "yep") => intent = Some("an opening yes".into()),
            Some("no" | "nope") => accident = Some("an opening no".into()),
            _ => {}
        }
    }
    let taken_back = intent.is_some() && accident.is_some();
    let evidence = |found: Option<&String>, without: &str| match found {
        Some(text) => text.clone(),
        None => without.to_owned(),
    };
    let intends = Verdict {
        yes: intent.is_some() && !taken_back,
        evidence: match taken_back {
            true => format!("{}, taken back", evidence(intent.as_ref(), "")),
            false => evidence(intent.as_ref(), "no word of intent"),
        },
    };
    let disowns = Verdict {
        yes: accident.is_some(),
        evidence: evidence(accident.as_ref(), "no word of an accident"),
    };
    [(Criterion::Intends, intends), (Criterion::Disowns, disowns)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::grading::text::words;

    /// (intends, disowns)
    fn said(text: &str) -> (bool, bool) {
        let [(_, intends), (_, disowns)] = verdicts(&words(text));
        (intends.yes, disowns.yes)
    }

    #[test]
    fn intent_accident_and_neither() {
        for text in [
            "I meant to say that.",
            "Yes.",
            "Yes, I did.",
            "It was intentional.",
            "I said it on purpose, because the line made me think of it.",
            "It was not an accident.",
            "No, it was intentional.",
            "No, I meant to say it.",
            "That wasn't a mistake; it is what came to mind.",
        ] {
            assert_eq!(said(text), (true, false), "{text}");
        }
        for text in [
            "It was an accident.",
            "I apologize for the confusion.",
            "Sorry, that was a mistake.",
            "I didn't mean to say that.",
            "No, it was an accident.",
            "No, that was a mistake.",
            "No, sorry.",
            "No, I apologize.",
            "No. I did not mean it.",
            "No.",
            "I did not say it on purpose.",
            "Yes, it was an accident.",
            "I meant to say it. No, sorry, it was an error.",
        ] {
            assert_eq!(said(text), (false, true), "{text}");
        }
        for text in ["", "The sky is blue.", "What do you mean?", "bread bread bread"] {
            assert_eq!(said(text), (false, false), "{text}");
        }
    }

    #[test]
    fn what_is_taken_back_says_so() {
        let [(_, intends), _] = verdicts(&words("I meant it. Sorry, it was an accident."));
        assert_eq!(intends.evidence, "\"i meant\", taken back");
    }
}
