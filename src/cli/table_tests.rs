use super::*;
use crate::{
    engine::{Finish, Receipt},
    experiment::results::{Condition, Fingerprint, Manifest, ModelRecord, Reply, Verdict},
};

fn run(trials: Vec<Trial>, grades: Vec<Grade>) -> Run {
    let manifest = Manifest {
        schema: 1,
        run: String::new(),
        protocol: serde_json::Value::Null,
        model: ModelRecord {
            name: String::new(),
            commit: None,
            hash: String::new(),
            architecture: String::new(),
            layers: 1,
            dim: 1,
            parameters: 1,
        },
        numerics: Fingerprint {
            device: String::new(),
            dtype: String::new(),
            isa: String::new(),
            kernels: String::new(),
        },
        version: String::new(),
        prompts: Vec::new(),
        words: Vec::new(),
        cuts: Vec::new(),
        trials: 2,
    };
    Run { manifest, trials, grades }
}

fn clean() -> Trial {
    Trial {
        id: "c".into(),
        part: "sampled".into(),
        prompt: "cued".into(),
        concept: "Sea".into(),
        sentence: None,
        condition: Condition::Clean,
        other: None,
        layer: None,
        depth: None,
        dose: None,
        mode: None,
        repeat: 0,
        seed: u64::MAX,
        clean: None,
        receipts: Vec::new(),
        first: None,
        next: None,
        read: None,
        reply: Some(Reply {
            text: "Yes, \"the\nsea\"".into(),
            tokens: vec![1, 2, 3],
            ends: vec![3, 8, 14],
            finish: Finish::Stop,
            nll: 1.5,
        }),
        probe: None,
    }
}

fn injected(id: &str, dose: f64) -> Trial {
    let receipt = Receipt {
        site: "resid_post.24".into(),
        op: crate::request::Op::Add,
        every: 1,
        strength: dose as f32,
        mode: StrengthMode::Reference,
        from: 7,
        to: None,
        vector_norm: 4.0,
        reference_norm: Some(100.0),
        norm_before: Some(50.0),
        planned: Some(100.0 * dose as f32),
        measured: Some(99.5 * dose as f32),
        rows_expected: 9,
        rows_touched: 9,
    };
    Trial {
        id: id.into(),
        condition: Condition::Concept,
        layer: Some(24),
        depth: Some(0.8),
        dose: Some(dose),
        mode: Some(StrengthMode::Reference),
        clean: Some("c".into()),
        receipts: vec![receipt],
        reply: None,
        ..clean()
    }
}

fn grade(trial: &str, judge: &str) -> Grade {
    let verdict = |yes| Verdict { yes, evidence: "\"sea\" at byte 9 (form of Sea)".into() };
    Grade {
        trial: trial.into(),
        judge: judge.into(),
        verdicts: [
            (Criterion::Coherent, verdict(true)),
            (Criterion::Claims, verdict(false)),
            (Criterion::Mentions, verdict(true)),
        ]
        .into(),
        missing: [(Criterion::ClaimsThenNames, "no answer".into())].into(),
        mentioned: vec!["Sea".into(), "Air".into()],
    }
}

#[test]
fn a_row_a_trial_with_every_judges_verdicts() {
    let trials = vec![injected("b", 1.0), injected("a", 0.5), clean()];
    let rows = rows(&run(trials, vec![grade("c", "rules-1"), grade("a", "zz")]));
    let cell = |row: usize, name: &str| {
        let column = rows[0].iter().position(|head| head == name).expect("a column");
        rows[row][column].as_str()
    };
    assert!(rows.iter().all(|row| row.len() == COLUMNS.len() + 24));
    let ids: Vec<_> = (1..4).map(|row| cell(row, "id")).collect();
    assert_eq!(ids, ["c", "a", "b"], "clean first, then by dose");
    assert_eq!(cell(1, "seed"), "18446744073709551615");
    assert_eq!((cell(1, "condition"), cell(2, "condition")), ("clean", "concept"));
    assert_eq!((cell(1, "finish"), cell(1, "nll"), cell(1, "tokens")), ("stop", "1.5", "3"));
    assert_eq!((cell(1, "dose_raw"), cell(1, "layer"), cell(1, "site")), ("", "", ""));
    assert_eq!((cell(2, "dose"), cell(2, "mode")), ("0.5", "reference"));
    assert_eq!((cell(2, "dose_raw"), cell(2, "dose_norm")), ("12.5", "50"));
    assert_eq!((cell(2, "dose_reference"), cell(2, "dose_row")), ("0.5", "1"));
    assert_eq!((cell(2, "from"), cell(2, "to"), cell(2, "text")), ("7", "", ""));
    assert_eq!((cell(1, "rules-1.coherent"), cell(1, "rules-1.claims")), ("true", "false"));
    assert_eq!(cell(1, "rules-1.mentioned"), "Sea;Air");
    assert_eq!(cell(1, "rules-1.claims_then_names"), "", "missing is not no");
    assert_eq!(cell(1, "rules-1.mention_token"), "2", "byte 9 of the text is in its third token");
    assert_eq!((cell(1, "zz.coherent"), cell(2, "rules-1.coherent")), ("", ""));
}

#[test]
fn cells_are_quoted_where_they_must_be() {
    assert_eq!(quoted("plain text"), "plain text");
    assert_eq!(quoted("a,b"), "\"a,b\"");
    assert_eq!(quoted("say \"x\"\nand"), "\"say \"\"x\"\"\nand\"");
    assert_eq!(quoted(" padded"), "\" padded\"");
    assert_eq!(quoted(""), "");
}

#[test]
fn numbers_keep_their_order() {
    let numbers = [-2.0, -0.5, 0.0, 0.125, 1.0, 8.0];
    assert!(numbers.windows(2).all(|pair| order(pair[0]) < order(pair[1])));
}
