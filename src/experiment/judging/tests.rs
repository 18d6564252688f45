use std::{
    cell::RefCell,
    collections::BTreeSet,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use super::{
    chat::fake::{Reply, Server},
    *,
};
use crate::experiment::{
    Ways,
    fake::{self, FakeEngine},
    results::Condition,
};

const RUN: &str = r#"
name = "judged"
[prompts.ask]
turns = [{ role = "user", text = "Trial {trial}: anything?" }]
[prompts.word]
outcome = "choice"
turns = [{ role = "user", text = "A word for {sentence}" }]
[[parts]]
name = "say"
kind = "sample"
prompts = ["ask", "word"]
words = "builtin:concepts"
sentences = "builtin:sentences"
layers = [1]
doses = [0.5, 1]
conditions = ["concept", "random"]
"#;

/// 50 words, each clean and injected four ways: 250 replies to each prompt.
fn folder() -> tempfile::TempDir {
    let protocol = Protocol::parse(RUN, "judged.toml", &[]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let prepared = fake::prepared(&protocol, 4);
    let (engine, numerics) = (FakeEngine::default(), fake::numerics());
    let run = crate::experiment::Run {
        protocol: &protocol,
        prepared: &prepared,
        engine: &engine,
        numerics: &numerics,
    };
    run.into_folder(dir.path(), Ways::default(), &mut ()).unwrap();
    dir
}

fn templates() -> Templates {
    Templates::open(None).unwrap()
}

/// Right on the controls; of the others it says what `says` says.
struct Stub<F: Fn(&Question) -> Answer> {
    says: F,
    asked: RefCell<Vec<Question>>,
}

fn stub<F: Fn(&Question) -> Answer>(says: F) -> Stub<F> {
    Stub { says, asked: RefCell::default() }
}

fn known(question: &Question) -> Option<String> {
    let controls = templates().controls().unwrap();
    let control = controls.into_iter().find(|control| control.question == *question)?;
    Some(control.question.options.name(control.answer))
}

impl<F: Fn(&Question) -> Answer> Judge for Stub<F> {
    fn name(&self) -> String {
        "stub".into()
    }

    fn identity(&self) -> Result<String> {
        Ok(String::new())
    }

    fn ask(
        &self,
        questions: &mut dyn Iterator<Item = Question>,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        for (index, question) in questions.enumerate() {
            let answer = known(&question).map_or_else(|| (self.says)(&question), Ok);
            self.asked.borrow_mut().push(question);
            done(index, answer)?;
        }
        Ok(())
    }
}

#[test]
fn answers_are_read_from_their_first_word() {
    let yes_no = |answer| Options::YesNo.read(answer);
    assert_eq!(
        [yes_no("Yes."), yes_no("**no**"), yes_no("Answer: YES")],
        [Some(0), Some(1), Some(0)]
    );
    assert_eq!([yes_no(""), yes_no("Yesterday"), yes_no("I think so")], [None; 3]);
    let letter = |answer| Options::Letters(10).read(answer);
    assert_eq!([letter("I think it is B"), letter("A word like C")], [None; 2]);
    assert_eq!([letter("C (probability .9)"), letter("B. Snow")], [Some(2), Some(1)]);
    assert_eq!(
        [letter("c"), letter("J."), letter("K"), letter("Bread")],
        [Some(2), Some(9), None, None]
    );
}

#[test]
fn what_is_filled_in_is_not_searched_again() {
    let filled =
        Filled { asked: "{reply}", reply: "{word} } {", word: "Bread", sentence: "", choices: &[] };
    let question = templates().question(Criterion::Identifies, &filled).unwrap();
    assert!(question.user.contains("<question>\n{reply}\n</question>"), "{}", question.user);
    assert!(question.user.contains("<reply>\n{word} } {\n</reply>"), "{}", question.user);
    assert!(question.user.contains("“Bread”"));
}

#[test]
fn files_of_questions_are_checked() {
    let text = include_str!("../../../experiments/judges/questions.toml");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    let open = |old: &str, new: &str| {
        assert!(text.contains(old), "{old}");
        std::fs::write(&path, text.replacen(old, new, 1)).unwrap();
        Templates::open(Some(&path))
    };
    assert_eq!(open("system", "system").unwrap().hash(), templates().hash());
    assert_ne!(open("You judge", "You grade").unwrap().hash(), templates().hash());
    for (old, new, want) in [
        ("claims = \"\"\"", "claim = \"\"\"", "claim"),
        ("\n{asked}\n", "\n{askd}\n", "{askd}"),
        ("needed = 0.9", "needed = 9", "needed"),
        ("answer = \"yes\"", "answer = \"maybe\"", "maybe"),
        ("answer = \"Oceans\"", "answer = \"Bags\"", "Bags"),
        ("criterion = \"disowns\"", "criterion = \"denies\"", "denies"),
    ] {
        let error = open(old, new).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("mine.toml"), "{new}: {error}");
    }
}

#[test]
fn a_judge_that_fails_known_answers_is_asked_nothing_else() {
    struct Yes(RefCell<usize>);
    impl Judge for Yes {
        fn name(&self) -> String {
            "yes".into()
        }
        fn identity(&self) -> Result<String> {
            Ok(String::new())
        }
        fn ask(
            &self,
            questions: &mut dyn Iterator<Item = Question>,
            done: &mut dyn FnMut(usize, Answer) -> Result<()>,
        ) -> Result<()> {
            questions.enumerate().try_for_each(|(index, _)| {
                *self.0.borrow_mut() += 1;
                done(index, Ok("Yes".into()))
            })
        }
    }
    let dir = folder();
    let judge = Yes(RefCell::default());
    let error = grade(dir.path(), &judge, &templates(), &mut ()).unwrap_err().to_string();
    assert!(error.contains("known") && error.contains("\"no\" was due, got \"Yes\""), "{error}");
    assert_eq!(*judge.0.borrow(), templates().controls().unwrap().len());
    assert!(folder::load(dir.path()).unwrap().grades.is_empty());
}

#[test]
fn verdicts_are_asked_blind_once_and_kept_word_for_word() {
    let dir = folder();
    let judge = stub(|question| Ok(question.options.name(0)));
    let grades = grade(dir.path(), &judge, &templates(), &mut ()).unwrap();
    assert_eq!(grades.len(), 500);
    for question in judge.asked.borrow().iter() {
        for told in ["clean", "random", "concept", "layer", "dose", "inject: "] {
            let known = ["injected thought"].iter().any(|text| text.contains(told));
            assert!(known || !question.user.contains(told), "{told}: {}", question.user);
        }
    }
    let run = folder::load(dir.path()).unwrap();
    let grade_of = |trial: &Trial| run.grades.iter().find(|grade| grade.trial == trial.id).unwrap();
    for trial in &run.trials {
        let grade = grade_of(trial);
        let asked: Vec<_> = grade.verdicts.keys().copied().collect();
        if trial.prompt == "ask" {
            assert_eq!(asked.len(), 5, "four questions, and whether the word occurs");
            assert_eq!(grade.verdicts[&Criterion::Claims].evidence, "yes");
        } else {
            assert_eq!(asked, [Criterion::Chooses]);
        }
    }
    // A judge that always says A is right once in ten.
    let right = run.grades.iter().filter(|grade| grade.yes(Criterion::Chooses) == Some(true));
    let right = right.count();
    assert!((10..45).contains(&right), "{right} of 250");

    let again = stub(|_| panic!("everything was asked before"));
    let second = grade(dir.path(), &again, &templates(), &mut ()).unwrap();
    assert_eq!(second, grades);
    assert!(again.asked.borrow().is_empty());
}

#[test]
fn unreadable_and_missing_answers_are_missing_and_never_no() {
    let dir = folder();
    let says = |question: &Question| match question.user.len() % 3 {
        0 => Err("no answer after 3 tries: timeout".into()),
        1 => Ok("It is hard to say.".into()),
        _ => Ok(question.options.name(1)),
    };
    let grades = grade(dir.path(), &stub(says), &templates(), &mut ()).unwrap();
    let verdicts = grades.iter().flat_map(|grade| {
        grade.verdicts.iter().filter(|(criterion, _)| **criterion != Criterion::Mentions)
    });
    let missing = grades.iter().flat_map(|grade| grade.missing.values());
    assert_eq!(verdicts.clone().count() + missing.clone().count(), 250 * 4 + 250);
    assert!(missing.clone().any(|why| why.contains("timeout")));
    assert!(missing.clone().any(|why| why.contains("It is hard to say.")));
    // Asked again, only what has no answer that can be read is asked.
    let again = stub(|question| Ok(question.options.name(0)));
    let second = grade(dir.path(), &again, &templates(), &mut ()).unwrap();
    let open: BTreeSet<String> =
        again.asked.borrow().iter().map(|question| question.user.clone()).collect();
    assert!(open.iter().all(|user| user.len() % 3 < 2) && !open.is_empty());
    assert!(second.iter().all(|grade| grade.missing.is_empty()));
}

/// The endpoint, through everything: 1,000 verdicts and more, one request in five fails one way or another.
#[test]
fn an_endpoint_with_faults_loses_no_verdict_and_makes_no_no_of_one() {
    let requests = AtomicU32::new(0);
    let controls = templates().controls().unwrap();
    let known: HashMap<String, String> = controls
        .into_iter()
        .map(|control| (control.question.user, control.question.options.name(control.answer)))
        .collect();
    let server = Server::start(move |seen| {
        let number = requests.fetch_add(1, Ordering::SeqCst);
        let question = seen.question();
        // A tenth of the questions never get an answer.
        let is_lost = seeds::seed(0, question, "", 0).is_multiple_of(10);
        let answer = match known.get(question) {
            Some(answer) => answer.as_str(),
            None if is_lost => return Reply::Send(503, "", "busy".into()),
            None if question.contains("letter of the word") => "A",
            None => "yes",
        };
        let fault = if number.is_multiple_of(5) { number / 5 % 5 } else { 5 };
        let body = serde_json::json!({"choices": [{"message": {"content": answer}}]}).to_string();
        match fault {
            0 => Reply::Send(429, "Retry-After: 0\r\n", "slow down".into()),
            1 => Reply::Send(500, "", "oh".into()),
            2 => Reply::Send(200, "", "{\"choices\": [".into()),
            3 => Reply::Break(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{\"cho".to_vec()),
            4 if seen.before == 0 => Reply::Silence,
            _ => Reply::Send(200, "", body),
        }
    });
    let mut endpoint =
        chat::Endpoint::new(server.url(), "judge").with_backoff(Duration::from_millis(2));
    endpoint.timeout = Duration::from_millis(150);
    endpoint.concurrency = 32;
    endpoint.retries = 8;
    let dir = folder();
    let grades = grade(dir.path(), &Http(endpoint), &templates(), &mut ()).unwrap();
    let run = folder::load(dir.path()).unwrap();
    assert_eq!((grades.len(), run.grades.len()), (500, 500));
    let protocol = folder::parse_protocol(&run.manifest.protocol).unwrap();
    let words: Vec<String> = run.manifest.words.iter().map(|word| word.word.clone()).collect();
    let templates = templates();
    let case = Case { protocol: &protocol, templates: &templates, words: &words };
    let (mut verdicts, mut lost) = (0, 0);
    for trial in run.trials.iter().filter(|trial| trial.reply.is_some()) {
        let grade = run.grades.iter().find(|grade| grade.trial == trial.id).unwrap();
        for criterion in asked(case.outcome(trial)) {
            let question = case.question(trial, *criterion).unwrap();
            if seeds::seed(0, &question.user, "", 0).is_multiple_of(10) {
                let why = &grade.missing[criterion];
                assert!(why.contains("503") && grade.yes(*criterion).is_none(), "{why}");
                lost += 1;
            } else {
                let first = case.choices(trial)[0] == trial.concept;
                let yes = if *criterion == Criterion::Chooses { first } else { true };
                assert_eq!(grade.yes(*criterion), Some(yes));
                verdicts += 1;
            }
        }
    }
    assert_eq!(verdicts + lost, 1250);
    assert!(lost > 50, "{lost}");
    assert!(run.trials.iter().any(|trial| trial.condition == Condition::Random));
}
