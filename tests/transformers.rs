//! The f64 reference against Hugging Face transformers' answers (`scripts/make_golden.py`): what
//! the other tests measure the crate with is itself right.

#[allow(dead_code, reason = "shared by several test binaries")]
mod common;
#[allow(dead_code, reason = "shared by several test binaries")]
mod reference;

use std::collections::BTreeMap;

use common::{golden, read_lines, read_tensors, worst_row};
use reference::sampling::{Filter, gumbel, philox, probabilities, word};
use reference::{Rows, Transformer, load};
use serde_json::Value;

/// f32's rounding through three blocks; measured: 2.6e-6.
const WORST_ROW: f64 = 2e-5;
/// Below this lead in logits two right answers may differ in the next token.
const MARGIN: f64 = 1e-3;

#[test]
fn captures_of_plain() {
    check_captures("plain");
}

#[test]
fn captures_of_mqa() {
    check_captures("mqa");
}

#[test]
fn captures_of_sharded() {
    check_captures("sharded");
}

#[test]
fn continuations_of_plain() {
    check_continuations("plain");
}

#[test]
fn continuations_of_mqa() {
    check_continuations("mqa");
}

#[test]
fn continuations_of_sharded() {
    check_continuations("sharded");
}

/// Every captured row of every request.
fn check_captures(name: &str) {
    let folder = golden(name);
    let model = load::model(&folder);
    let expected = read_tensors(&folder.join("expected.safetensors"));
    let mut errors = BTreeMap::new();
    for request in read_lines(&folder.join("requests.jsonl")) {
        let tokens = load::tokens(&request);
        let mut injections = load::injections(&request, &folder);
        model.measure(&tokens, &mut injections);
        let seen = model.forward(&tokens, &injections);
        for (site, positions) in captures(&request, &model) {
            let key = format!("{}/{site}", request["id"].as_str().unwrap());
            let got = narrow(&pick(&seen[&site], &positions));
            let want = &expected[&key];
            assert_eq!(got.len(), want.shape[0], "{key}");
            errors.insert(key, worst_row(got.iter().map(Vec::as_slice), want.rows()));
        }
    }
    assert!(errors.keys().eq(expected.keys()), "not every expected tensor was checked");
    let (worst, error) = errors.iter().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    eprintln!("{name}: {} tensors, worst row {error:.2e} in {worst}", errors.len());
    assert!(*error <= WORST_ROW, "{worst}: {error:.2e}");
}

/// Site names and positions of a request's captures.
fn captures(request: &Value, model: &Transformer) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for capture in request["capture"].as_array().unwrap() {
        let site = capture["site"].as_str().unwrap();
        let layers: Vec<usize> = match &capture["layers"] {
            Value::String(_) => (0..model.config.layers).collect(),
            Value::Array(list) => list.iter().map(|l| l.as_u64().unwrap() as usize).collect(),
            _ => {
                all.push((site.to_owned(), capture["positions"].clone()));
                continue;
            }
        };
        let named = layers.iter().map(|l| (format!("{site}.{l}"), capture["positions"].clone()));
        all.extend(named);
    }
    all
}

fn pick(rows: &Rows, positions: &Value) -> Rows {
    match positions {
        Value::String(_) => rows.clone(),
        list => list
            .as_array()
            .unwrap()
            .iter()
            .map(|p| rows[p.as_u64().unwrap() as usize].clone())
            .collect(),
    }
}

fn narrow(rows: &Rows) -> Vec<Vec<f32>> {
    rows.iter().map(|row| row.iter().map(|&x| x as f32).collect()).collect()
}

/// Each generated token is the most likely one after all tokens before it, unless it was close.
fn check_continuations(name: &str) {
    let folder = golden(name);
    let model = load::model(&folder);
    let requests = read_lines(&folder.join("generate.jsonl"));
    let answers = read_lines(&folder.join("generated.jsonl"));
    assert_eq!(requests.len(), answers.len());
    for (request, answer) in requests.iter().zip(&answers) {
        assert_eq!(request["id"], answer["id"]);
        let prompt = load::tokens(request);
        let generated = load::tokens(answer);
        assert_eq!(generated.len(), 64);
        let mut injections = load::injections(request, &folder);
        model.measure(&prompt, &mut injections);
        let tokens = [&prompt[..], &generated[..generated.len() - 1]].concat();
        let logits = &model.forward(&tokens, &injections)["logits"];
        for (step, &token) in generated.iter().enumerate() {
            let row = &logits[prompt.len() - 1 + step];
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let behind = most - row[token as usize];
            assert!(behind < MARGIN, "{name} {} step {step}: behind by {behind}", request["id"]);
        }
    }
}

#[test]
fn filters_in_transformers_order() {
    for case in read_lines(&golden("sampling.jsonl")) {
        let numbers = |key: &str| -> Vec<f64> {
            case[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let filter = Filter {
            temperature: case["temperature"].as_f64().unwrap(),
            top_k: case["top_k"].as_u64().unwrap() as usize,
            top_p: case["top_p"].as_f64().unwrap(),
            min_p: case["min_p"].as_f64().unwrap(),
        };
        let got = probabilities(&numbers("logits"), &filter);
        for (id, (got, want)) in got.iter().zip(numbers("probabilities")).enumerate() {
            assert!((got - want).abs() <= 1e-12, "{filter:?} entry {id}: {got} not {want}");
        }
    }
}

/// Known answers published with the Random123 library.
#[test]
fn philox_known_answers() {
    let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    let cases = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
    ];
    for (counter, key, want) in cases {
        assert_eq!(philox(counter, key), want);
    }
    assert_eq!(word(0x299f_31d0_a409_3822, 7, 3, 0), philox([1, 3, 0, 0], cases[2].1)[3]);
}

/// The mean of Gumbel draws is Euler's constant, their variance π²/6; the edges are not +∞.
#[test]
fn gumbel_moments() {
    let draws: Vec<f64> = (0..200_000).map(|token| gumbel(word(1, token, 0, 0))).collect();
    let count = draws.len() as f64;
    let mean = draws.iter().sum::<f64>() / count;
    let variance = draws.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / count;
    assert!((mean - 0.577_215_664_9).abs() < 0.015, "{mean}");
    assert!((variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.04, "{variance}");
    assert_eq!(gumbel(u32::MAX), f64::NEG_INFINITY);
    assert!((gumbel(0) - 22.87).abs() < 0.01);
}
