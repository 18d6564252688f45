use super::*;
use crate::{
    engine::{Outcome, Receipt, Score},
    experiment::{
        fake,
        grid::Cell,
        plan::Planned,
        protocol::{Place, Protocol},
        results::Condition,
    },
    request::StrengthMode,
};

fn first(watch: &[f32]) -> FirstToken {
    let logsumexp = logsumexp(watch) as f32;
    FirstToken { watch: watch.to_vec(), logsumexp, entropy: 0.5 }
}

#[test]
fn the_answer_is_read_from_both_groups_of_variants() {
    // yes: 2/8 + 1/8, no: 1/8, something else: 4/8
    let probabilities = [0.25_f32, 0.125, 0.125, 0.5];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() + 3.0).collect();
    let answer = answer(&first(&logits), 2, 1).unwrap();
    assert!((answer.margin - 3_f64.ln()).abs() < 1e-6);
    assert!((answer.p_yes - 0.75).abs() < 1e-6);
    assert!((answer.mass - 0.5).abs() < 1e-6);
    assert!(super::answer(&first(&[f32::NAN, 0.0]), 1, 1).is_err());
}

#[test]
fn far_logits_do_not_overflow() {
    assert!((logsumexp(&[1000.0, 1000.0]) - (1000.0 + 2_f64.ln())).abs() < 1e-9);
    let answer =
        answer(&FirstToken { watch: vec![900.0, -900.0], logsumexp: 901.0, entropy: 0.0 }, 1, 1);
    assert_eq!(answer.unwrap().p_yes, 1.0);
}

fn planned(concept: &str) -> Planned<'_> {
    let at = Some((Place { layer: 3, depth: 0.8 }, 0.5));
    let cell = Cell {
        part: 0,
        prompt: "cued",
        prompt_word: "",
        sentence: "",
        concept,
        condition: Condition::Concept,
        at,
        repeat: 0,
    };
    Planned { cell, id: "id".into(), clean: None, seed: 1 }
}

#[test]
fn the_readout_is_relative_to_the_clean_logits() {
    let words = ["sea", "air", "fire"].map(str::to_owned);
    let clean = [9.0, 1.0, 5.0];
    let read = |logits: &[f32], concept| read_out(&words, logits, &clean, &planned(concept));
    let got = read(&[9.5, 3.0, 5.2], "air");
    assert_eq!((got.word.as_str(), got.rank, got.words), ("air", 1, 3));
    let got = read(&[9.5, 3.0, 5.2], "fire");
    assert_eq!((got.word.as_str(), got.rank), ("air", 3));
    let tied = read(&[10.0, 2.0, 6.0], "air");
    assert_eq!((tied.word.as_str(), tied.rank), ("sea", 2), "the earlier of equals leads");
}

#[test]
fn likelihood_is_a_mean_over_all_tokens() {
    let scored = |logprobs: Vec<f32>| Finished {
        outcome: Outcome { scores: vec![Score { logprobs }], ..Outcome::default() },
        captures: Vec::new(),
    };
    assert_eq!(mean_nll(&scored(vec![-1.0, -2.0, -6.0]), 3).unwrap(), 3.0);
    assert!(mean_nll(&scored(vec![-1.0]), 2).is_err());
    assert!(mean_nll(&scored(vec![f32::NEG_INFINITY]), 1).is_err(), "JSON has no infinity");
}

fn injected(change: impl Fn(&mut Receipt)) -> Option<String> {
    let protocol = Protocol::builtin("demo").unwrap();
    let prepared = fake::prepared(&protocol, 30);
    let vectors = fake::vectors(&prepared);
    let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
    let mut receipt = Receipt {
        site: "resid_post.3".into(),
        op: crate::request::Op::Add,
        every: 1,
        strength: 0.5,
        mode: StrengthMode::Reference,
        from: 2,
        to: None,
        vector_norm: 1.0,
        reference_norm: Some(100.0),
        norm_before: Some(100.0),
        planned: Some(50.0),
        measured: Some(50.2),
        rows_expected: 7,
        rows_touched: 7,
    };
    change(&mut receipt);
    let trial = plan.trials().find(|trial| trial.clean.is_some()).unwrap();
    failed_check(&Trial { receipts: vec![receipt], ..plan.line(&trial) })
}

#[test]
fn receipts_are_checked() {
    type Damage<'a> = &'a dyn Fn(&mut Receipt);
    assert_eq!(injected(|_| ()), None);
    let cases: [(Damage, &str); 6] = [
        (&|r| r.rows_touched = 6, "6 rows were touched, 7 were expected"),
        (&|r| (r.rows_touched, r.rows_expected) = (0, 0), "0 rows"),
        (&|r| r.measured = Some(50.6), "50 was planned, 50.6 was measured"),
        (&|r| r.measured = Some(0.0), "measured"),
        (&|r| r.measured = Some(f32::NAN), "NaN"),
        (&|r| r.planned = None, "not measured"),
    ];
    for (change, want) in cases {
        let what = injected(change).unwrap();
        assert!(what.contains(want), "{what}");
    }
    let negated = injected(|r| (r.strength, r.planned) = (-0.5, Some(-50.0)));
    assert_eq!(negated, None, "the size of the change counts");
}

#[test]
fn an_injected_trial_needs_a_receipt_and_a_clean_one_none() {
    let protocol = Protocol::builtin("demo").unwrap();
    let prepared = fake::prepared(&protocol, 30);
    let vectors = fake::vectors(&prepared);
    let plan = Plan::new(&protocol, &prepared, &vectors).unwrap();
    let find = |clean: bool| plan.trials().find(|t| t.clean.is_none() == clean).unwrap();
    assert!(failed_check(&plan.line(&find(false))).unwrap().contains("no receipt"));
    assert_eq!(failed_check(&plan.line(&find(true))), None);
}
