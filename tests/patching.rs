//! Rows of one request in another one's place, in files of requests and as a sweep.

#[path = "common/mod.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use std::{
    path::Path,
    process::{Command, Output},
};

use common::{demo_model, golden, read_tensors};
use serde_json::{Value, json};

fn run(arguments: &[&str], model: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inkling"));
    command.args(arguments).arg("--model").arg(model).output().unwrap()
}

fn forward(
    requests: &[Value],
) -> Result<std::collections::BTreeMap<String, common::Tensor>, String> {
    let folder = tempfile::tempdir().unwrap();
    let (input, out) = (folder.path().join("r.jsonl"), folder.path().join("out.safetensors"));
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    fs_err::write(&input, lines.join("\n")).unwrap();
    let (input, path) = (input.to_str().unwrap(), out.to_str().unwrap());
    let arguments = ["forward", "--dtype", "f32", "--input", input, "--out", path];
    let output = run(&arguments, &golden("plain"));
    if output.status.success() {
        return Ok(read_tensors(&out));
    }
    assert_eq!(output.status.code(), Some(2));
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn request(id: &str, tokens: &[u32], inject: &Value) -> Value {
    let capture =
        json!([{"site": "resid_post", "layers": "all"}, {"site": "logits", "positions": "last"}]);
    json!({"id": id, "tokens": tokens, "inject": inject, "capture": capture})
}

const CLEAN: [u32; 6] = [5, 9, 14, 3, 77, 20];
const OTHER: [u32; 6] = [5, 9, 80, 3, 77, 20];

/// The whole stream of another prompt at one layer is that prompt from there on, whichever of the two stands
/// first in the file, and with what is injected into it.
#[test]
fn all_rows_of_a_layer_are_the_other_prompt_from_there_on() {
    let steering = json!([{"vector": vec![0.5; 48], "layer": 0, "strength": 2, "from": 3}]);
    let patch =
        json!([{"op": "replace", "layer": 1, "source": {"request": "clean"}, "window": "prompt"}]);
    let requests = [request("patched", &OTHER, &patch), request("clean", &CLEAN, &steering)];
    let found = forward(&requests).unwrap();
    for layer in [1, 2] {
        let (patched, clean) =
            (format!("patched/resid_post.{layer}"), format!("clean/resid_post.{layer}"));
        assert!(found[&patched] == found[&clean], "block {layer}");
    }
    assert!(found["patched/logits"] == found["clean/logits"]);
    assert!(found["patched/resid_post.0"] != found["clean/resid_post.0"]);
}

/// What is injected into the other request's generated tokens is none of its prompt's business.
#[test]
fn the_other_request_may_be_steered_where_it_generates() {
    let steering =
        json!([{"vector": vec![0.5; 48], "layer": 0, "strength": 2, "window": "generated"}]);
    let source =
        json!([{"op": "replace", "layer": 1, "source": {"request": "clean"}, "window": "last"}]);
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("r.jsonl");
    let line = |id: &str, tokens: &[u32], inject: &Value| {
        let sampling = json!({"max_tokens": 4, "temperature": 0, "ignore_eos": true});
        json!({"id": id, "tokens": tokens, "inject": inject, "sampling": sampling}).to_string()
    };
    let lines = [line("clean", &CLEAN, &steering), line("patched", &OTHER, &source)];
    fs_err::write(&input, lines.join("\n")).unwrap();
    let output = run(&["generate", "--input", input.to_str().unwrap()], &golden("plain"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(answers[1]["receipts"][0]["rows_touched"], 1);
}

/// Rows of other positions, of another layer, and a single one everywhere.
#[test]
fn rows_go_where_they_are_wanted() {
    let source = |window: Value| json!({"request": "clean", "layer": 0, "window": window});
    let patch = |window: Value, to: Value| json!([{"op": "replace", "layer": 2, "source": source(window), "window": to, "strength": 0.5}]);
    let shifted = patch(json!({"from": 1, "to": 3}), json!({"from": 3, "to": 5}));
    let single = patch(json!({"at": -1}), json!({"from": 1}));
    let requests = [
        request("clean", &CLEAN, &json!([])),
        request("shifted", &OTHER, &shifted),
        request("single", &OTHER, &single),
        request("other", &OTHER, &json!([])),
    ];
    let found = forward(&requests).unwrap();
    let row = |id: &str, layer: usize, at: usize| {
        found[&format!("{id}/resid_post.{layer}")].rows().nth(at).unwrap().to_vec()
    };
    let half = |row: Vec<f32>| row.into_iter().map(|v| v * 0.5).collect::<Vec<f32>>();
    for (at, from) in [(3, 1), (4, 2)] {
        assert_eq!(row("shifted", 2, at), half(row("clean", 0, from)));
    }
    assert_eq!(row("shifted", 2, 5), row("other", 2, 5), "behind the window");
    for at in 1..6 {
        assert_eq!(row("single", 2, at), half(row("clean", 0, 5)));
    }
}

#[test]
fn sources_that_do_not_fit_are_refused() {
    let refused = |inject: Value, want: &[&str]| {
        let clean = request("clean", &CLEAN[..4], &json!([]));
        let error = forward(&[clean, request("a", &OTHER, &inject)]).unwrap_err();
        for want in want {
            assert!(error.contains(want), "{want:?} not in {error}");
        }
    };
    let patch = |source: Value, more: Value| {
        let mut patch = json!({"op": "replace", "layer": 1, "source": source});
        patch.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([patch])
    };
    let of = |request: &str| json!({"request": request});
    let at = |field: &str, value: Value| json!({"request": "clean", field: value});
    refused(patch(of("none"), json!({"window": "last"})), &["no request of this id", "\"none\""]);
    refused(patch(of("a"), json!({"window": "last"})), &["takes rows from others itself"]);
    refused(
        patch(of("clean"), json!({"window": "prompt"})),
        &["behind the other prompt", "below 4"],
    );
    let three = at("window", json!({"from": 0, "to": 3}));
    refused(
        patch(three.clone(), json!({"window": "prompt"})),
        &["another number of positions", "6"],
    );
    refused(patch(three, json!({"from": 1})), &["the window has no end"]);
    refused(patch(of("clean"), json!({})), &["injection's window has no end"]);
    let far = json!({"window": {"from": 0, "to": 1_000_000_000_000_i64}});
    refused(patch(of("clean"), far), &["behind the other prompt"]);
    refused(
        patch(at("layer", json!(3)), json!({"window": "last"})),
        &["layer out of range", "source"],
    );
    refused(patch(at("site", json!("head_out")), json!({"window": "last"})), &["another width"]);
    refused(patch(at("head", json!(1)), json!({"window": "last"})), &["no such head"]);
    let unit = json!({"from": 0, "to": 2, "strength_mode": "unit"});
    refused(patch(of("clean"), unit), &["as it is", "strength_mode raw"]);
    let set = json!({"from": 0, "to": 2, "op": "set"});
    refused(patch(of("clean"), set), &["as it is", "op add or replace"]);
}

const JOHN: &str = "When John and Mary went to the store, John gave a drink to";
const MARY: &str = "When John and Mary went to the store, Mary gave a drink to";

fn patch(more: &[&str]) -> Output {
    let clean = ["patch", "--clean", JOHN, "--corrupted", MARY, "--answer", " Mary"];
    run(&[&clean[..], more].concat(), &demo_model())
}

/// Who is named twice decides: all of it is where the two prompts differ at first, and at the last token in
/// the end (Wang et al. 2022).
#[test]
fn a_sweep_finds_where_two_prompts_differ() {
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("effects.csv");
    let path = table.to_str().unwrap();
    let output = patch(&["--wrong", " John", "--layers", "0,15,29", "--json", "--out", path]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let places = report["places"].as_array().unwrap();
    let differs = |place: &Value| place["position"]["clean"] != place["position"]["corrupted"];
    let second = places.iter().position(differs).unwrap();
    assert_eq!(places.iter().filter(|place| differs(place)).count(), 1);
    let effect = |layer: usize, place: usize| report["effects"][layer][place].as_f64().unwrap();
    let last = places.len() - 1;
    assert!((effect(0, second) - 1.0).abs() < 1e-3, "{}", effect(0, second));
    assert!((0..places.len()).all(|at| at == second || effect(0, at).abs() < 1e-3));
    assert!(effect(1, second) > 0.8 && effect(2, last) > 0.8, "{report}");
    assert!(report["clean"].as_f64().unwrap() > 0.0 && report["corrupted"].as_f64().unwrap() < 0.0);
    let table = fs_err::read_to_string(table).unwrap();
    assert_eq!(table.lines().count(), 1 + 3 * places.len());
    assert!(table.starts_with("layer,position,clean_token,corrupted_token,value,effect\n0,0,"));
}

#[test]
fn heads_are_swept_one_by_one_and_shown() {
    let output =
        patch(&["--wrong", " John", "--site", "head_out", "--positions=-1", "--layers", "20,23"]);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.len(), 2 + 9, "nine heads: {shown}");
    assert!(lines[0].starts_with("logit(\" Mary\") - logit(\" John\"): clean "), "{shown}");
    assert!(lines[1].contains("patching head_out at layers 20..23"), "{shown}");
}

#[test]
fn a_sweep_that_says_nothing_is_refused() {
    let refused = |arguments: &[&str], want: &str| {
        let output = run(arguments, &demo_model());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(want), "{want:?} not in {said}");
    };
    let with = |corrupted, more: &[&'static str]| {
        let all =
            ["patch", "--clean", "One two three", "--corrupted", corrupted, "--answer", " four"];
        [&all[..], more].concat()
    };
    refused(&with("One two", &[]), "different lengths");
    refused(&with("One two three", &[]), "same answer");
    refused(&with("One two four", &["--layers", "30"]), "layer out of range");
    refused(&with("One two four", &["--positions", "7"]), "position outside the prompts");
    refused(&with("One two four", &["--site", "q"]), "one of resid_pre");
}
