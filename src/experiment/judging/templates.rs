//! What judges are asked, word for word, and how their answers are read.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use super::{Question, Said};
use crate::{
    error::{Context, Error, Result},
    experiment::{results::Criterion, seeds},
};

const BUILT_IN: &str = include_str!("../../../experiments/judges/questions.toml");
/// What a question's text may hold.
const PLACEHOLDERS: [&str; 5] = ["{asked}", "{reply}", "{word}", "{sentence}", "{choices}"];

/// What can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Options {
    /// Yes (0) or no (1).
    YesNo,
    /// So many letters, from A.
    Letters(usize),
}

impl Options {
    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Self::YesNo => 2,
            Self::Letters(count) => count,
        }
    }

    /// The option's name.
    pub fn name(self, option: usize) -> String {
        match self {
            Self::YesNo => if option == 0 { "yes" } else { "no" }.to_owned(),
            Self::Letters(_) => char::from(b'A' + option as u8).to_string(),
        }
    }

    /// The option that an answer begins with ("Yes.", "**no**", "Answer: B", "C (probability ...)"); none where
    /// it begins with something else. A letter that a word follows is that word's article or subject ("A
    /// word", "I think") and no answer.
    pub fn read(self, answer: &str) -> Option<usize> {
        let mut words =
            answer.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        let mut word = words.next()?;
        if word.eq_ignore_ascii_case("answer") {
            word = words.next()?;
        }
        let is_letter = matches!(self, Self::Letters(_));
        let end = word.as_ptr() as usize - answer.as_ptr() as usize + word.len();
        let goes_on = answer[end..].trim_start().starts_with(char::is_alphanumeric);
        if is_letter && goes_on {
            return None;
        }
        (0..self.count()).find(|option| self.name(*option).eq_ignore_ascii_case(word))
    }
}

/// The file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Templates {
    system: String,
    needed: f64,
    questions: BTreeMap<Criterion, String>,
    controls: Vec<ControlTable>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ControlTable {
    criterion: Criterion,
    #[serde(default)]
    asked: String,
    reply: String,
    #[serde(default)]
    word: String,
    #[serde(default)]
    sentence: String,
    #[serde(default)]
    choices: Vec<String>,
    answer: String,
}

/// A question whose answer is known.
#[derive(Clone, Debug)]
pub(super) struct Control {
    pub criterion: Criterion,
    pub question: Question,
    /// Index into the question's options.
    pub answer: usize,
}

/// What a question is filled with.
pub(super) struct Filled<'a> {
    pub asked: &'a str,
    pub reply: &'a str,
    pub word: &'a str,
    pub sentence: &'a str,
    pub choices: &'a [&'a str],
}

impl Templates {
    /// Those that come with the program, or a file's.
    ///
    /// # Errors
    /// It can't be read, lacks a question or its controls, or a control's answer can't be given.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        match path {
            None => Self::parse(BUILT_IN).at(|| "builtin questions".into()),
            Some(path) => {
                Self::parse(&fs_err::read_to_string(path)?).at(|| path.display().to_string())
            }
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let templates: Self = toml::from_str(text).map_err(|error| {
            Error::new("not a file of questions").got(error.to_string().trim_end())
        })?;
        if !(0.0..=1.0).contains(&templates.needed) {
            return Err(Error::new("not a share").at("needed").expected("0 to 1"));
        }
        for criterion in super::ASKED {
            let text = templates.questions.get(&criterion).ok_or_else(|| {
                Error::new("a question is missing").at(format!("questions.{}", criterion.name()))
            })?;
            let unknown = text.split('{').skip(1).find_map(|rest| {
                let name = format!("{{{}}}", rest.split_once('}')?.0);
                (!PLACEHOLDERS.contains(&name.as_str())).then_some(name)
            });
            if let Some(unknown) = unknown {
                return Err(Error::new("unknown placeholder")
                    .at(format!("questions.{}", criterion.name()))
                    .expected(PLACEHOLDERS.join(" "))
                    .got(unknown));
            }
            if !templates.controls.iter().any(|control| control.criterion == criterion) {
                return Err(Error::new("a question has no controls with a known answer")
                    .at("controls")
                    .expected(criterion.name()));
            }
        }
        templates.controls()?;
        Ok(templates)
    }

    /// Of all of it.
    pub fn hash(&self) -> String {
        seeds::content_hash(self)
    }

    /// The share of a criterion's controls that a judge must get right.
    pub(super) fn needed(&self) -> f64 {
        self.needed
    }

    pub(super) fn controls(&self) -> Result<Vec<Control>> {
        let control = |(at, table): (usize, &ControlTable)| -> Result<Control> {
            let choices: Vec<&str> = table.choices.iter().map(String::as_str).collect();
            let filled = Filled {
                asked: &table.asked,
                reply: &table.reply,
                word: &table.word,
                sentence: &table.sentence,
                choices: &choices,
            };
            let question =
                self.question(table.criterion, &filled).at(|| format!("controls[{at}]"))?;
            let answer = match question.options {
                Options::YesNo => question.options.read(&table.answer),
                Options::Letters(_) => choices.iter().position(|choice| *choice == table.answer),
            };
            let answer = answer.ok_or_else(|| {
                Error::new("not an answer to the question")
                    .at(format!("controls[{at}].answer"))
                    .got(&table.answer)
            })?;
            Ok(Control { criterion: table.criterion, question, answer })
        };
        self.controls.iter().enumerate().map(control).collect()
    }

    /// A criterion's question. What is filled in is not searched for placeholders again.
    pub(super) fn question(&self, criterion: Criterion, filled: &Filled) -> Result<Question> {
        let text = self.questions.get(&criterion).ok_or_else(|| {
            Error::new("there is no question for this verdict").got(criterion.name())
        })?;
        let options = match criterion {
            Criterion::Chooses => Options::Letters(filled.choices.len()),
            _ => Options::YesNo,
        };
        let choices = filled.choices.iter().enumerate();
        let choices: Vec<String> =
            choices.map(|(at, word)| format!("{}. {word}", options.name(at))).collect();
        let choices = choices.join("\n");
        let mut user = String::new();
        let mut rest = text.as_str();
        while let Some(start) = rest.find('{') {
            user.push_str(&rest[..start]);
            rest = &rest[start..];
            let found = PLACEHOLDERS.iter().find(|name| rest.starts_with(**name));
            let (value, skip) = match found.copied() {
                Some(name @ "{asked}") => (filled.asked, name.len()),
                Some(name @ "{reply}") => (filled.reply, name.len()),
                Some(name @ "{word}") => (filled.word, name.len()),
                Some(name @ "{sentence}") => (filled.sentence, name.len()),
                Some(name) => (choices.as_str(), name.len()),
                None => ("{", 1),
            };
            user.push_str(value);
            rest = &rest[skip..];
        }
        user.push_str(rest);
        Ok(Question { system: self.system.clone(), user: user.trim().to_owned(), options })
    }
}

/// An error that names the first control that a judge failed, where it failed too many of a kind.
pub(super) fn check_controls<'a>(
    said: impl Iterator<Item = (&'a Control, std::result::Result<Said, String>)>,
    needed: f64,
) -> Result<()> {
    let mut kinds: BTreeMap<Criterion, (usize, usize, Option<String>)> = BTreeMap::new();
    for (control, said) in said {
        let (right, all, first) = kinds.entry(control.criterion).or_default();
        *all += 1;
        match said {
            Ok(said) if said.option == control.answer => *right += 1,
            other => {
                let got = other.map_or_else(|why| why, |said| said.evidence);
                let wanted = control.question.options.name(control.answer);
                first.get_or_insert(format!("{wanted:?} was due, got {got:?}"));
            }
        }
    }
    for (criterion, (right, all, first)) in kinds {
        if (right as f64) < needed * all as f64 {
            return Err(Error::new("the judge fails questions whose answer is known")
                .at(criterion.name())
                .expected(format!("{:.0} % of {all} right", 100.0 * needed))
                .got(format!("{right}: {}", first.unwrap_or_default()))
                .hint("take another judge; or, if its answers are right and the questions are not, --questions with your own"));
        }
    }
    Ok(())
}
