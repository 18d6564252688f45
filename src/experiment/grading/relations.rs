//! Which words count as a mention of a concept: forms and near relations, by list and not by
//! stemmer.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::text::{Word, starts_with};
use crate::error::{Context, Error, Result};

const BUILT_IN: &str = include_str!("../../../experiments/words/relations.toml");

/// One word's entry in the list.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// The word bent: number, adjective, verb forms.
    forms: Vec<String>,
    /// Other words so near that they count.
    #[serde(default)]
    related: Vec<String>,
}

/// The words of a run, each with what counts as a mention of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relations {
    /// In the order of the run's list.
    words: Vec<(String, Entry)>,
}

/// Where a word is mentioned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mention {
    /// Index of the first matched word of the reply.
    pub word: usize,
    /// The form or relation as listed.
    pub matched: String,
    /// Whether it is a relation and not the word itself.
    pub related: bool,
}

impl Relations {
    /// Entries for the run's words: from the list that inkling brings (found whatever the case),
    /// else the word itself with its simple plural and singular.
    ///
    /// # Errors
    /// A word that is empty or stands twice in the list.
    pub fn for_words<S: AsRef<str>>(words: &[S]) -> Result<Self> {
        let built_in = parse(BUILT_IN).at(|| "relations.toml".into())?;
        let mut seen = BTreeSet::new();
        let words = words.iter().map(|word| {
            let word = word.as_ref();
            let key = word.trim().to_lowercase();
            if key.is_empty() || !seen.insert(key.clone()) {
                return Err(
                    Error::new("a word list needs words that differ").got(format!("{word:?}"))
                );
            }
            Ok((word.to_owned(), built_in.get(&key).cloned().unwrap_or_else(|| simple(&key))))
        });
        Ok(Self { words: words.collect::<Result<_>>()? })
    }

    /// The words, in the run's order.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.words.iter().map(|(word, _)| word.as_str())
    }

    /// The earliest mention of `word` in a reply; the longest where several begin together. A
    /// word outside the list counts by itself, its plural and singular.
    pub(super) fn first_mention(&self, word: &str, reply: &[Word]) -> Option<Mention> {
        let listed = self.words.iter().find(|(name, _)| name == word);
        let other;
        let entry = if let Some((_, entry)) = listed {
            entry
        } else {
            other = simple(&word.trim().to_lowercase());
            &other
        };
        let forms = entry.forms.iter().map(|form| (form, false));
        let all: Vec<_> = forms.chain(entry.related.iter().map(|form| (form, true))).collect();
        (0..reply.len()).find_map(|at| {
            let here = all.iter().filter(|(form, _)| starts_with(&reply[at..], form));
            let &(form, related) = here.max_by_key(|(form, related)| (form.len(), !related))?;
            Some(Mention { word: at, matched: form.clone(), related })
        })
    }

    /// All the words that a reply mentions, in the run's order.
    pub(super) fn mentioned(&self, reply: &[Word]) -> Vec<String> {
        let hits = self.words().filter(|word| self.first_mention(word, reply).is_some());
        hits.map(str::to_owned).collect()
    }
}

/// Reads a list; the keys come back lower-cased.
///
/// # Errors
/// Unknown fields, an entry without forms, one that does not hold its own word, a form that is not
/// lower-case words with single spaces, or one that stands twice in its entry.
fn parse(text: &str) -> Result<BTreeMap<String, Entry>> {
    let table: BTreeMap<String, Entry> =
        toml::from_str(text).map_err(|error| Error::new(error.to_string()))?;
    let mut entries = BTreeMap::new();
    for (word, entry) in table {
        let key = word.to_lowercase();
        if !entry.forms.contains(&key) {
            return Err(Error::new("the forms lack the word itself").at(word).expected(key));
        }
        let mut seen = BTreeSet::new();
        for form in entry.forms.iter().chain(&entry.related) {
            let words: Vec<String> =
                super::text::words(form).into_iter().map(|word| word.text).collect();
            if words.join(" ") != *form || form.is_empty() || !seen.insert(form) {
                return Err(Error::new("forms are lower-case words that differ")
                    .at(word)
                    .got(format!("{form:?}")));
            }
        }
        entries.insert(key, entry);
    }
    Ok(entries)
}

/// The word itself and its regular plural and singular (all that regular spelling allows).
fn simple(word: &str) -> Entry {
    let phrase: Vec<String> = super::text::words(word).into_iter().map(|word| word.text).collect();
    let word = phrase.join(" ");
    let sibilant = |stem: &str| ["s", "x", "z", "ch", "sh", "o"].iter().any(|e| stem.ends_with(e));
    let mut forms = BTreeSet::from([format!("{word}s")]);
    if sibilant(&word) {
        forms.insert(format!("{word}es"));
    }
    if let Some(stem) = word.strip_suffix('y') {
        forms.insert(format!("{stem}ies"));
    }
    if let Some(stem) = word.strip_suffix("ies") {
        forms.insert(format!("{stem}y"));
    } else if let Some(stem) = word.strip_suffix("es").filter(|stem| sibilant(stem)) {
        forms.insert(stem.to_owned());
    }
    if let Some(stem) = word.strip_suffix('s').filter(|stem| !stem.ends_with(['s', 'u', 'i'])) {
        forms.insert(stem.to_owned());
    }
    forms.insert(word);
    Entry { forms: forms.into_iter().collect(), related: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::grading::text::words;

    fn concepts() -> Vec<&'static str> {
        include_str!("../../../experiments/words/concepts.txt")
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .collect()
    }

    #[test]
    fn every_concept_has_an_entry_and_every_entry_a_concept() {
        let listed = parse(BUILT_IN).unwrap();
        let concepts: BTreeSet<String> = concepts().iter().map(|w| w.to_lowercase()).collect();
        assert_eq!(concepts.len(), 50);
        assert_eq!(listed.keys().cloned().collect::<BTreeSet<_>>(), concepts);
    }

    #[test]
    fn no_form_belongs_to_two_concepts() {
        let listed = parse(BUILT_IN).unwrap();
        let all = listed.values().flat_map(|entry| entry.forms.iter().chain(&entry.related));
        let mut seen = BTreeSet::new();
        for form in all {
            assert!(seen.insert(form), "{form} stands under two concepts");
        }
    }

    #[test]
    fn mentions_are_whole_words_whatever_the_case() {
        let list = Relations::for_words(&concepts()).unwrap();
        let hits = |text: &str| list.mentioned(&words(text));
        assert_eq!(hits("The LAVA of a volcano's rim"), ["Volcanoes"]);
        assert_eq!(hits("Trump, snowboard, breadth, informed, lighting, treetop"), [""; 0]);
        assert_eq!(hits("Young people folding paper"), ["Origami", "Youths"]);
        let reply = words("an erupting Volcano");
        let mention = list.first_mention("Volcanoes", &reply).unwrap();
        assert_eq!(
            (mention.word, mention.matched.as_str(), mention.related),
            (1, "erupting", true)
        );
    }

    #[test]
    fn a_word_of_the_users_own_counts_with_plural_and_singular() {
        let list = Relations::for_words(&["Foxes", "Berry", "Glass", "Ice Cream", "Ähre"]).unwrap();
        let hits = |text: &str| list.mentioned(&words(text));
        assert_eq!(hits("a fox"), ["Foxes"]);
        assert_eq!(hits("berries and glasses"), ["Berry", "Glass"]);
        assert_eq!(hits("ÄHRE; ice-cream's cold"), ["Ice Cream", "Ähre"]);
        assert_eq!(hits("glas foxy"), [""; 0]);
        assert!(list.first_mention("Not listed", &words("it is not listed")).is_some());
    }

    #[test]
    fn bad_lists_are_refused() {
        for bad in [
            "[Dust]\nforms = [\"dusty\"]",
            "[Dust]\nforms = [\"dust\", \"Dusty\"]",
            "[Dust]\nforms = [\"dust\", \"dust\"]",
            "[Dust]\nforms = [\"dust\"]\nrelated = [\"dust  mite\"]",
            "[Dust]\nforms = [\"dust\"]\nother = []",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let error = Relations::for_words(&["Dust", "dust"]).unwrap_err();
        assert!(error.to_string().contains("differ"));
    }
}
