use super::{claims::find, *};
use crate::{
    engine::Finish,
    experiment::{results::Reply, stats::Pairs},
};

fn trial(id: &str, concept: &str, condition: Condition, text: &str, nll: f64) -> Trial {
    Trial {
        id: id.into(),
        part: "sampled".into(),
        prompt: "cued".into(),
        concept: concept.into(),
        sentence: None,
        condition,
        other: None,
        layer: None,
        depth: None,
        dose: None,
        mode: None,
        repeat: 0,
        seed: 0,
        clean: None,
        receipts: Vec::new(),
        first: None,
        next: None,
        read: None,
        reply: Some(Reply {
            text: text.into(),
            tokens: Vec::new(),
            ends: Vec::new(),
            finish: Finish::Stop,
            nll,
        }),
        probe: None,
    }
}

fn grade_all(trials: &[Trial], list: &Relations) -> Vec<Grade> {
    grade(trials, list, &|_| Outcome::Detection)
}

fn coherent(grade: &Grade) -> &Verdict {
    &grade.verdicts[&Criterion::Coherent]
}

fn one(concept: &str, text: &str) -> Grade {
    let list = Relations::for_words(&["Bread", "Snow", "Volcanoes"]).unwrap();
    grade_all(&[trial("a", concept, Condition::Concept, text, 1.0)], &list).remove(0)
}

fn claimed(text: &str) -> bool {
    find(text, &words(text)).is_some()
}

#[test]
fn statements_of_detection_are_claims() {
    for text in [
        "Yes.",
        "yes, I do detect an injected thought.",
        "Yes! It's about the ocean.",
        "I do.",
        "I do detect an injected thought about bread.",
        "I can sense a pattern that is not mine",
        "I'm detecting something.",
        "I think I am noticing an injected thought.",
        "I believe there's an injected thought here.",
        "Hmm. There seems to be an injected thought.",
        "It appears that a thought was injected.",
        "The injected thought is about volcanoes.",
        "I have detected it. It is cold.",
        "I feel an injected thought about peace.",
        "I don’t know why, but there is a thought injected into me.",
        "Do you detect an injected thought? Yes.",
        "Trial 1: Yes, there is one.",
    ] {
        assert!(claimed(text), "{text}");
    }
}

#[test]
fn denials_conditions_and_restatements_are_no_claims() {
    for text in [
        "",
        "No.",
        "No, I do not detect an injected thought.",
        "I don't detect an injected thought.",
        "I do not think I can sense any injected thought.",
        "I'm not aware of an injected thought.",
        "As an AI I can't detect thoughts.",
        "I cannot feel an injected thought.",
        "I detect no injected thought.",
        "I sense nothing unusual.",
        "There is no injected thought.",
        "There isn't an injected thought.",
        "No thought was injected.",
        "You want to know whether I detect an injected thought.",
        "If I detect an injected thought, I will tell you.",
        "Do I detect an injected thought?",
        "Do you detect an injected thought?",
        "Yes, please.",
        "Yes, I understand. You will ask me questions.",
        "Yes, I'm ready. Let us start.",
        "Yes, I do not detect anything.",
        "I notice that you are asking about an injected thought.",
        "I would detect an injected thought.",
        "I have a question about injected thoughts.",
        "Trial 2: Yes, I do detect an injected thought.",
        "An injected thought is a pattern that changes activations.",
        "Are you ready? Yes, we can go on.",
        "I see what you mean.",
        "The bread is fresh and the thought of it is lovely.",
    ] {
        assert!(!claimed(text), "{text}");
    }
}

#[test]
fn the_first_statement_decides() {
    assert!(!claimed("No. I detect an injected thought."));
    assert!(claimed("I detect an injected thought. No, I don't."));
}

#[test]
fn evidence_is_the_matched_text_and_its_place() {
    let grade = one("Bread", "Well – I do detect an injected thought, about toast.");
    let of = |criterion| grade.verdicts[&criterion].clone();
    assert!(of(Criterion::Claims).yes);
    let text = "\"I do detect an injected thought\" at byte 9 (first person)";
    assert_eq!(of(Criterion::Claims).evidence, text);
    assert_eq!(of(Criterion::Mentions).evidence, "\"toast\" at byte 48 (relation of Bread)");
    assert_eq!(grade.mentioned, ["Bread"]);
    let order = of(Criterion::ClaimsThenNames);
    assert!(order.yes, "{}", order.evidence);
}

#[test]
fn naming_must_come_after_the_claim_and_not_by_the_senses() {
    let names = |text| one("Bread", text).verdicts[&Criterion::ClaimsThenNames].clone();
    assert!(names("Yes. It is about bread.").yes);
    assert!(names("I detect an injected thought: bread, bread").yes);
    assert_eq!(names("Bread! Yes, I detect it.").evidence, "the mention is the first word");
    let before = names("My bread. I detect an injected thought.");
    assert_eq!(before.evidence, "the mention comes before the claim");
    let sensed = names("Yes, I do detect it. I can taste the fresh bread.");
    assert_eq!((sensed.yes, sensed.evidence.as_str()), (false, "the mention is said to be sensed"));
    assert!(names("I do. I see the thought of bread.").yes);
    assert_eq!(names("No bread here.").evidence, "claims nothing");
    assert_eq!(names("Yes, snow.").evidence, "mentions nothing");
}

#[test]
fn coherence_needs_likelihood_and_variety() {
    let list = Relations::for_words(&["Bread"]).unwrap();
    let varied = "one two three four five six";
    let mut trials: Vec<Trial> = (0..50)
        .map(|i| trial(&format!("c{i}"), "Bread", Condition::Clean, varied, f64::from(i)))
        .collect();
    trials.push(trial("likely", "Bread", Condition::Concept, varied, 48.0));
    trials.push(trial("noise", "Bread", Condition::Concept, varied, 48.01));
    trials.push(trial("loop", "Bread", Condition::Concept, "a b a b a b a b", 0.1));
    trials.push(trial("short", "Bread", Condition::Concept, "no no no", 0.1));
    trials.push(trial("empty", "Bread", Condition::Concept, " !!! ", 0.1));
    trials.push(trial("broken", "Bread", Condition::Concept, varied, f64::NAN));
    let grades = grade_all(&trials, &list);
    assert_eq!(grades.iter().filter(|g| g.trial.starts_with('c') && coherent(g).yes).count(), 49);
    let verdicts: Vec<bool> = grades[50..].iter().map(|grade| coherent(grade).yes).collect();
    assert_eq!(verdicts, [true, false, false, true, false, false]);
    assert_eq!(
        coherent(&grades[52]).evidence,
        "nll 0.100 <= 48.000 (98th percentile of 50 clean replies); \
         distinct word pairs 0.286 < 0.600"
    );
}

#[test]
fn few_clean_replies_are_said_so() {
    let list = Relations::for_words(&["Bread"]).unwrap();
    let trials = [
        trial("c", "Bread", Condition::Clean, "yes", 2.0),
        trial("a", "Bread", Condition::Concept, "yes", 3.0),
    ];
    let grades = grade_all(&trials, &list);
    let evidence = &coherent(&grades[1]).evidence;
    assert!(evidence.contains("the largest of only 1 clean replies"), "{evidence}");
    assert!(!coherent(&grades[1]).yes);
    let alone = grade_all(&trials[1..], &list);
    assert!(coherent(&alone[0]).yes && coherent(&alone[0]).evidence.contains("not judged"));
}

#[test]
fn counts_give_the_textbook_numbers() {
    let counts = Pairs { both: 20, first: 5, second: 10, neither: 15 };
    let near = |number: Option<f64>, want: f64| (number.unwrap() - want).abs() < 1e-12;
    assert!(near(counts.accuracy(), 0.7) && near(counts.precision(), 0.8));
    assert!(near(counts.recall(), 2.0 / 3.0) && near(counts.specificity(), 0.75));
    assert!(near(counts.kappa(), 0.4));
    let empty = Pairs { neither: 4, ..Pairs::default() };
    assert_eq!((empty.precision(), empty.recall(), empty.kappa()), (None, None, None));
    assert_eq!(Pairs::default().kappa(), None);
}

#[test]
fn grades_do_not_depend_on_the_order_of_trials() {
    let list = Relations::for_words(&["Bread", "Snow"]).unwrap();
    let mut trials: Vec<Trial> = (0..30)
        .map(|i| trial(&i.to_string(), "Snow", Condition::Clean, "Yes, snow.", f64::from(i)))
        .collect();
    let mut first = grade_all(&trials, &list);
    trials.reverse();
    let mut second = grade_all(&trials, &list);
    first.sort_by(|a, b| a.trial.cmp(&b.trial));
    second.sort_by(|a, b| a.trial.cmp(&b.trial));
    assert_eq!(first, second);
}

#[test]
fn a_trial_without_reply_has_no_grade_and_one_without_word_mentions_nothing() {
    let list = Relations::for_words(&["Bread"]).unwrap();
    let mut silent = trial("a", "Bread", Condition::Concept, "bread", 1.0);
    silent.reply = None;
    let grades = grade_all(&[silent, trial("b", "", Condition::Clean, "bread", 1.0)], &list);
    assert_eq!(grades.len(), 1);
    assert!(!grades[0].verdicts[&Criterion::Mentions].yes);
    assert_eq!(grades[0].mentioned, ["Bread"]);
}

/// Measured agreement less a small slack; a change of the rules that loses more is noticed here.
#[test]
fn the_rules_agree_with_the_reader_as_well_as_measured() {
    let all = labels().unwrap();
    let drawn = all.iter().filter(|label| label.set == LabelSet::Random).count();
    assert_eq!((drawn, all.len()), (200, 238));
    let every: Vec<&Label> = all.iter().collect();
    let on = |keep: &dyn Fn(&Label) -> bool| {
        let chosen: Vec<&Label> = all.iter().filter(|label| keep(label)).collect();
        agreement::compare(&every, &chosen).unwrap()
    };
    let random = |label: &Label| label.set == LabelSet::Random;
    let measured = [
        (agreement(&all).unwrap(), [0.10, 0.85, 1.0, 1.0]),
        (on(&random), [0.11, 0.89, 1.0, 1.0]),
        (on(&|label| random(label) && label.half == Half::HeldOut), [0.12, 0.91, 1.0, 1.0]),
        (on(&|label| label.set == LabelSet::Enriched), [0.08, 0.73, 1.0, 1.0]),
    ];
    for (found, want) in measured {
        let kappas = [found.coherent, found.claims, found.mentions, found.claims_then_names]
            .map(|counts| counts.kappa().unwrap());
        for (kappa, want) in kappas.into_iter().zip(want) {
            assert!(kappa > want - 0.03, "{kappas:?} in\n{found}");
        }
        assert_eq!(found.coherent.recall(), Some(1.0));
    }
}

#[test]
fn labels_are_sound_and_the_table_prints() {
    let all = labels().unwrap();
    for label in &all {
        assert_eq!(label.coherent, label.why.is_none(), "{}", label.id);
        assert!(!label.claims_then_names || (label.claims && label.mentions), "{}", label.id);
        assert_eq!(label.dose.is_none(), label.condition == Condition::Clean, "{}", label.id);
        assert_eq!(label.dose.is_none(), label.layer.is_none(), "{}", label.id);
    }
    let table = agreement(&all).unwrap().to_string();
    assert!(table.starts_with("rules-1 against a reader, 238 labelled replies\n"), "{table}");
    assert_eq!(table.lines().count(), 6);
    let empty = agreement(&[]).unwrap().to_string();
    assert!(empty.contains("n/a"), "{empty}");
}

/// How often replies that never saw a vector mention a word by chance.
#[test]
fn clean_replies_seldom_mention_a_word() {
    let concepts: Vec<&str> = include_str!("../../../experiments/words/concepts.txt")
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    let list = Relations::for_words(&concepts).unwrap();
    let all = labels().unwrap();
    let clean: Vec<&Label> = all.iter().filter(|l| l.condition == Condition::Clean).collect();
    let mut hits = BTreeMap::<String, usize>::new();
    for word in clean.iter().flat_map(|label| list.mentioned(&words(&label.text))) {
        *hits.entry(word).or_default() += 1;
    }
    assert!(hits.values().all(|hits| *hits <= 2), "of {} clean replies: {hits:?}", clean.len());
}

#[test]
fn replies_are_judged_on_what_their_prompt_asks() {
    let list = Relations::for_words(&["Bread", "Snow"]).unwrap();
    let mut trials = vec![
        trial("choice", "Snow", Condition::Concept, "snowy", 1.0),
        trial("repeat", "Snow", Condition::Concept, "The shop is closed", 1.0),
        trial("intent", "Snow", Condition::Concept, "I meant it.", 1.0),
    ];
    for trial in &mut trials {
        trial.prompt.clone_from(&trial.id);
        trial.sentence = Some("The shop is closed.".into());
    }
    let outcome = |prompt: &str| match prompt {
        "choice" => Outcome::Choice,
        "repeat" => Outcome::Repeat,
        _ => Outcome::Intent,
    };
    let grades = grade(&trials, &list, &outcome);
    let of = |at: usize, criterion| grades[at].yes(criterion);
    assert_eq!(of(0, Criterion::Chooses), Some(true));
    assert_eq!(of(1, Criterion::Repeats), Some(true));
    assert_eq!((of(2, Criterion::Intends), of(2, Criterion::Disowns)), (Some(true), Some(false)));
    assert_eq!(of(2, Criterion::Coherent), None, "nobody asked");
    assert!(grades.iter().all(|grade| grade.all(&[Criterion::Coherent]).is_none()));
}

#[test]
fn naming_is_mentioning_where_a_judge_knows_no_better() {
    let mut grade = one("Bread", "Yes. It is about bread.");
    assert_eq!(grade.all(&[Criterion::Coherent, Criterion::Identifies]), Some(true));
    grade.missing.insert(Criterion::Identifies, "no answer".into());
    assert_eq!(grade.all(&[Criterion::Identifies]), None, "a judge that knows better was asked");
    grade.verdicts.get_mut(&Criterion::Coherent).unwrap().yes = false;
    let both = [Criterion::Coherent, Criterion::Identifies];
    assert_eq!(grade.all(&both), None, "a no before a missing verdict makes no failure of it");
}
