//! Of ten words, the one that a reply is nearest to; and whether a sentence stands in a reply.

use std::collections::BTreeSet;

use super::{relations::Relations, text::Word};
use crate::experiment::{results::Verdict, seeds};

/// The trial's own word and nine others.
pub const CHOICES: usize = 10;

/// [`CHOICES`] of the run's words (all, where it has fewer): the trial's own and others that its seed
/// draws, in an order that the seed draws as well.
pub fn choices<'a>(
    words: impl Iterator<Item = &'a str>,
    concept: &'a str,
    seed: u64,
) -> Vec<&'a str> {
    let key = |of: &str, word: &str| seeds::vector_key(of, seed, word, 0, 0);
    let others = words.filter(|word| *word != concept).map(|word| (key("choice", word), word));
    let mut others: Vec<(u64, &str)> = others.collect::<BTreeSet<_>>().into_iter().collect();
    others.truncate(CHOICES - 1);
    let mut choices: Vec<&str> = others.into_iter().map(|(_, word)| word).collect();
    choices.push(concept);
    choices.sort_by_key(|word| key("order", word));
    choices
}

/// By word lists: the choice that is mentioned first.
pub(super) fn verdict(
    list: &Relations,
    choices: &[&str],
    concept: &str,
    reply: &[Word],
) -> Verdict {
    let first = |&word| Some((list.first_mention(word, reply)?, word));
    let mentioned = choices.iter().filter_map(first).min_by_key(|(mention, _)| mention.word);
    let choices = choices.len();
    let evidence = match &mentioned {
        None => format!("none of {choices} words is mentioned"),
        Some((mention, word)) => {
            format!("{:?} is nearest to {word}, of {choices} words", mention.matched)
        }
    };
    Verdict { yes: mentioned.is_some_and(|(_, word)| word == concept), evidence }
}

/// Whether the sentence stands in the reply: upper and lower case, white space and the sentence's last
/// stop do not count.
pub(super) fn repeats(sentence: &str, reply: &str) -> Verdict {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let sentence = plain(sentence);
    let sentence = sentence.trim_end_matches(['.', '!', '?']);
    match plain(reply).contains(sentence) && !sentence.is_empty() {
        true => Verdict { yes: true, evidence: "the sentence stands in it".into() },
        false => Verdict { yes: false, evidence: "the sentence does not stand in it".into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::grading::text::words;

    const WORDS: [&str; 12] = [
        "Bread",
        "Snow",
        "Dust",
        "Milk",
        "Oceans",
        "Sugar",
        "Poetry",
        "Satellites",
        "Trumpets",
        "Volcanoes",
        "Bags",
        "Mirrors",
    ];

    #[test]
    fn ten_words_with_the_own_one_among_them_in_an_order_of_the_seed() {
        let of = |seed| choices(WORDS.into_iter(), "Snow", seed);
        let first = of(1);
        assert_eq!((first.len(), first.iter().filter(|word| **word == "Snow").count()), (10, 1));
        assert_eq!(first, of(1));
        let places: BTreeSet<_> =
            (0..100).map(|seed| of(seed).iter().position(|word| *word == "Snow")).collect();
        assert_eq!(places.len(), 10, "every place occurs");
        assert_eq!(choices(["Snow", "Dust"].into_iter(), "Snow", 1).len(), 2);
    }

    #[test]
    fn the_first_of_the_ten_that_is_mentioned_is_chosen() {
        let list = Relations::for_words(&WORDS).unwrap();
        let of = |text: &str| verdict(&list, &["Snow", "Bread"], "Snow", &words(text));
        assert!(of("Snowy hills, and bread").yes);
        assert!(!of("Bread and snow").yes);
        assert!(!of("Dust").yes, "not one of the choices");
        assert_eq!(of("Toast").evidence, "\"toast\" is nearest to Bread, of 2 words");
    }

    #[test]
    fn a_repeated_sentence_is_found_whatever_its_case_and_spaces() {
        let of = |reply| repeats("The train was late again.", reply).yes;
        assert!(of("the train was  late\nagain"));
        assert!(of("Sure: \"The train was late again.\""));
        assert!(!of("The train was late."));
        assert!(!repeats("", "anything").yes);
    }
}
