//! Judge models: each verdict is a question of its own, answered by a model that does not know what was
//! injected.
//!
//! Answers are kept word for word in the run's `judgements.jsonl`, under a hash of judge and question, so
//! that nothing is asked twice. A question without a usable answer leaves its verdict missing: it is counted
//! as missing, and never as a no. Questions whose answer is known come first; a judge that fails them is
//! asked nothing else.

pub mod chat;
mod http;
mod local;
mod templates;

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    path::Path,
};

use serde::{Deserialize, Serialize};

use self::templates::{Filled, Options};
pub use self::{http::Http, local::Local, templates::Templates};
use crate::{
    error::{Error, Result},
    experiment::{
        Progress,
        folder::{self, Folder},
        grading::{self, Relations, choices},
        prepare::fill,
        protocol::Protocol,
        results::{Criterion, Grade, Outcome, Run, Trial, Verdict},
        seeds,
    },
};

/// A question as a judge gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The system message.
    pub system: String,
    /// The user's turn.
    pub user: String,
    /// What can be answered.
    pub options: Options,
}

/// The judge's own words, or why there are none.
pub type Answer = std::result::Result<String, String>;

/// Who answers questions.
pub trait Judge {
    /// Kind and model, to be read.
    fn name(&self) -> String;

    /// What else makes its answers its own: the model's hash, or where it is asked.
    fn identity(&self) -> Result<String>;

    /// Asks the questions, taken as they can be asked, and hands out each one's index and answer, in any
    /// order. An error where none can be answered; what was handed out before holds.
    fn ask(
        &self,
        questions: &mut dyn Iterator<Item = Question>,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()>;
}

/// One line of `judgements.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judgement {
    /// Hash of judge and question.
    pub key: String,
    /// The judge, with the hash of its templates.
    pub judge: String,
    /// What was asked about.
    pub criterion: Criterion,
    /// Its words.
    pub answer: String,
}

/// All that a judge model is asked.
const ASKED: [Criterion; 7] = [
    Criterion::Coherent,
    Criterion::Claims,
    Criterion::Identifies,
    Criterion::ClaimsThenNames,
    Criterion::Chooses,
    Criterion::Intends,
    Criterion::Disowns,
];

/// What a judge model is asked on an outcome. Rules answer what needs no opinion: whether a word occurs,
/// whether a sentence is repeated.
fn asked(outcome: Outcome) -> &'static [Criterion] {
    match outcome {
        Outcome::Detection => &[
            Criterion::Coherent,
            Criterion::Claims,
            Criterion::Identifies,
            Criterion::ClaimsThenNames,
        ],
        Outcome::Choice => &[Criterion::Chooses],
        Outcome::Repeat => &[],
        Outcome::Intent => &[Criterion::Intends, Criterion::Disowns],
    }
}

/// Grades all replies of a folder with a judge model and stores the verdicts.
///
/// # Errors
/// The judge can't be asked at all, or fails its controls: no verdict is stored then, but answers are kept.
pub fn grade(
    dir: &Path,
    judge: &dyn Judge,
    templates: &Templates,
    progress: &mut dyn Progress,
) -> Result<Vec<Grade>> {
    let run = folder::load(dir)?;
    let protocol = folder::parse_protocol(&run.manifest.protocol)?;
    let asked_how = seeds::content_hash(&(templates.hash(), judge.identity()?));
    let name = format!("{}/{:.8}", judge.name(), asked_how);
    let folder = Folder::open(dir)?;
    let mut answers = HashMap::new();
    let mut lines = folder.judgements(|line: Judgement| {
        if line.judge == name {
            answers.insert(line.key, line.answer);
        }
        Ok(())
    })?;
    let key = |question: &Question| {
        seeds::content_hash(&(&name, &question.system, &question.user))[..32].to_owned()
    };
    let mut record = |criterion, key: &str, answer: &str| {
        lines.append(&Judgement {
            key: key.to_owned(),
            judge: name.clone(),
            criterion,
            answer: answer.to_owned(),
        })
    };

    let controls = templates.controls()?;
    let mut pending: Vec<(Criterion, String, Question)> = Vec::new();
    for control in &controls {
        let key = key(&control.question);
        if !is_answered(&answers, &key, &control.question) {
            pending.push((control.criterion, key, control.question.clone()));
        }
    }
    let mut failures = HashMap::new();
    ask(judge, &pending, &mut answers, &mut failures, &mut record, progress)?;
    let said = controls.iter().map(|control| {
        let key = key(&control.question);
        (control, read(&control.question, &key, &answers, &failures))
    });
    templates::check_controls(said, templates.needed()).map_err(|error| error.at(name.clone()))?;

    let words: Vec<String> = run.manifest.words.iter().map(|word| word.word.clone()).collect();
    let case = Case { protocol: &protocol, templates, words: &words };
    let replies = run.trials.iter().filter(|trial| trial.reply.is_some());
    // By key: a judge that slows down, fails or learns does so without regard to conditions.
    let mut open: BTreeMap<String, (Criterion, usize)> = BTreeMap::new();
    for (at, trial) in run.trials.iter().enumerate().filter(|(_, trial)| trial.reply.is_some()) {
        for criterion in asked(case.outcome(trial)) {
            let question = case.question(trial, *criterion)?;
            let key = key(&question);
            if !is_answered(&answers, &key, &question) {
                open.insert(key, (*criterion, at));
            }
        }
    }
    let trials = &run.trials;
    let mut failures = HashMap::new();
    let open: Vec<(String, (Criterion, usize))> = open.into_iter().collect();
    let stop = Cell::new(progress.stops());
    let mut questions = open
        .iter()
        .take_while(|_| !stop.get())
        .map_while(|(_, (criterion, at))| case.question(&trials[*at], *criterion).ok());
    let mut done = 0;
    judge.ask(&mut questions, &mut |index, answer| {
        let (key, (criterion, _)) = &open[index];
        match answer {
            Ok(answer) => {
                record(*criterion, key, &answer)?;
                answers.insert(key.clone(), answer);
            }
            Err(why) => {
                failures.insert(key.clone(), why);
            }
        }
        done += 1;
        progress.advance("judging", done, open.len() as u64, 0);
        stop.set(progress.stops());
        Ok(())
    })?;
    lines.sync()?;
    drop(folder);

    let rules = rule_grades(&run, &protocol)?;
    let mut grades = Vec::new();
    for (trial, rules) in replies.zip(rules) {
        let mut grade = Grade {
            trial: trial.id.clone(),
            judge: name.clone(),
            verdicts: BTreeMap::new(),
            missing: BTreeMap::new(),
            mentioned: rules.mentioned,
        };
        for by_rule in [Criterion::Mentions, Criterion::Repeats] {
            if let Some(verdict) = rules.verdicts.get(&by_rule) {
                grade.verdicts.insert(by_rule, verdict.clone());
            }
        }
        for criterion in asked(case.outcome(trial)) {
            let question = case.question(trial, *criterion)?;
            match read(&question, &key(&question), &answers, &failures) {
                Ok(said) => {
                    let yes = case.is_yes(trial, *criterion, &said);
                    let verdict = Verdict { yes, evidence: said.evidence };
                    grade.verdicts.insert(*criterion, verdict);
                }
                Err(why) => {
                    grade.missing.insert(*criterion, why);
                }
            }
        }
        grades.push(grade);
    }
    folder::append_grades(dir, &grades)?;
    Ok(grades)
}

/// The rules' grades of a run's replies.
pub fn rule_grades(run: &Run, protocol: &Protocol) -> Result<Vec<Grade>> {
    let words: Vec<&str> = run.manifest.words.iter().map(|word| word.word.as_str()).collect();
    let outcome =
        |prompt: &str| protocol.prompts.get(prompt).map(|plan| plan.outcome).unwrap_or_default();
    Ok(grading::grade(&run.trials, &Relations::for_words(&words)?, &outcome))
}

/// Asks what is pending and records the answers.
fn ask(
    judge: &dyn Judge,
    pending: &[(Criterion, String, Question)],
    answers: &mut HashMap<String, String>,
    failures: &mut HashMap<String, String>,
    record: &mut dyn FnMut(Criterion, &str, &str) -> Result<()>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let mut done = 0;
    let mut questions = pending.iter().map(|(.., question)| question.clone());
    judge.ask(&mut questions, &mut |index, answer| {
        let (criterion, key, _) = &pending[index];
        match answer {
            Ok(answer) => {
                record(*criterion, key, &answer)?;
                answers.insert(key.clone(), answer);
            }
            Err(why) => {
                failures.insert(key.clone(), why);
            }
        }
        done += 1;
        progress.advance("controls", done, pending.len() as u64, 0);
        Ok(())
    })
}

/// Whether there is an answer that can be read; one that can't is asked for again.
fn is_answered(answers: &HashMap<String, String>, key: &str, question: &Question) -> bool {
    answers.get(key).is_some_and(|answer| question.options.read(answer).is_some())
}

/// What an answer says.
struct Said {
    /// Index into the question's options.
    option: usize,
    evidence: String,
}

fn read(
    question: &Question,
    key: &str,
    answers: &HashMap<String, String>,
    failures: &HashMap<String, String>,
) -> std::result::Result<Said, String> {
    match answers.get(key) {
        Some(answer) => {
            let option = question.options.read(answer).ok_or_else(|| {
                format!("unreadable answer: {:?}", answer.chars().take(80).collect::<String>())
            })?;
            Ok(Said { option, evidence: answer.trim().to_owned() })
        }
        None => Err(failures.get(key).cloned().unwrap_or_else(|| "not asked".into())),
    }
}

/// What questions about a run's trials are made from.
struct Case<'a> {
    protocol: &'a Protocol,
    templates: &'a Templates,
    words: &'a [String],
}

impl Case<'_> {
    fn outcome(&self, trial: &Trial) -> Outcome {
        self.protocol.prompts.get(&trial.prompt).map(|plan| plan.outcome).unwrap_or_default()
    }

    fn choices<'a>(&'a self, trial: &'a Trial) -> Vec<&'a str> {
        choices(self.words.iter().map(String::as_str), &trial.concept, trial.seed)
    }

    /// Nothing in it tells what was injected.
    fn question(&self, trial: &Trial, criterion: Criterion) -> Result<Question> {
        let plan = self.protocol.prompts.get(&trial.prompt).ok_or_else(|| {
            Error::new("a trial's prompt is not in the run's protocol").got(&trial.prompt)
        })?;
        let sentence = trial.sentence.as_deref().unwrap_or_default();
        let fill = |text: &str| fill(text, plan.trial, &trial.concept, sentence);
        let turn = plan.turns.iter().rev().find(|turn| turn.role == "user");
        let prefill = plan.prefill.as_deref().map(fill).unwrap_or_default();
        let reply = trial.reply.as_ref().map_or("", |reply| reply.text.as_str());
        self.templates.question(
            criterion,
            &Filled {
                asked: &turn.map(|turn| fill(&turn.content)).unwrap_or_default(),
                reply: (prefill + reply).trim(),
                word: &trial.concept,
                sentence,
                choices: &self.choices(trial),
            },
        )
    }

    fn is_yes(&self, trial: &Trial, criterion: Criterion, said: &Said) -> bool {
        match criterion {
            Criterion::Chooses => self.choices(trial).get(said.option) == Some(&&*trial.concept),
            _ => said.option == 0,
        }
    }
}

#[cfg(test)]
#[path = "judging/tests.rs"]
mod tests;
