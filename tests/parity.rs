//! The binary against Hugging Face transformers, in f32: captured rows, logits and greedy
//! continuations of three tiny models, of one of every family and of the demo model
//! (`scripts/make_golden.py`).

#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use common::{demo_model, golden, read_lines, read_tensors, worst_row};
use inkling::model::ARCHITECTURES;
use serde_json::{Value, json};

/// ‖got − want‖ / ‖want‖ of the worst row of a stream site, a branch or the final norm.
const WORST_ROW: f64 = 5e-5;
/// The same of the logits.
const WORST_LOGITS: f64 = 1e-4;
const EXACT: [&str; 2] = ["--dtype", "f32"];
/// Below this lead in logits two right answers may differ in the next token.
const MARGIN: f64 = 1e-3;

#[test]
fn forward_plain() {
    check_forward(&golden("plain"), "plain");
}

#[test]
fn forward_mqa_bf16_tied() {
    check_forward(&golden("mqa"), "mqa");
}

#[test]
fn forward_sharded() {
    check_forward(&golden("sharded"), "sharded");
}

/// Folders of tiny models, one or more of every family.
fn families() -> Vec<String> {
    let folder = golden("families");
    let entries = fs_err::read_dir(&folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| format!("families/{}", entry.unwrap().file_name().to_string_lossy()))
        .collect();
    names.sort_unstable();
    let of = |name: &str| {
        let config = fs_err::read_to_string(golden(name).join("config.json")).unwrap();
        serde_json::from_str::<Value>(&config).unwrap()["model_type"].as_str().unwrap().to_owned()
    };
    let shown: Vec<String> = names.iter().map(|name| of(name)).collect();
    let missing = ARCHITECTURES.into_iter();
    let missing: Vec<&str> = missing.filter(|family| !shown.iter().any(|s| s == family)).collect();
    assert!(missing.is_empty(), "families without a fixture: {missing:?}");
    names
}

#[test]
fn forward_every_family() {
    families().iter().for_each(|name| check_forward(&golden(name), name));
}

#[test]
fn generate_every_family() {
    families().iter().for_each(|name| check_generate(&golden(name), name, "generate.jsonl"));
}

/// Files that llama.cpp made of the families' folders (`scripts/golden_gguf.py`).
#[test]
fn forward_every_gguf_architecture() {
    let mut files: Vec<_> = fs_err::read_dir(golden("gguf"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .collect();
    files.sort_unstable();
    assert!(files.len() > 10, "{files:?}");
    for path in files {
        let name = path.file_stem().unwrap().to_string_lossy();
        check_forward(&path, &format!("families/{name}"));
    }
}

/// Random mixtures of operations, windows and conditions at all sites, on models that add what they
/// compute in different ways.
#[test]
fn operations_are_transformers_with_hooks() {
    for name in
        ["plain", "families/gemma2", "families/granite", "families/olmo2", "families/mixtral"]
    {
        check_captures(&golden(name), name, "operations.jsonl", "operations.safetensors");
        let folder = golden(name);
        check_continuations(&folder, name, "operations.jsonl", "operations-generated.jsonl");
    }
}

/// Operations on heads of attention, what other requests show put in place, and captures of heads.
#[test]
fn heads_and_patches_are_transformers_with_hooks() {
    for name in
        ["plain", "families/gemma2", "families/granite", "families/olmo2", "families/mixtral"]
    {
        check_captures(&golden(name), name, "patches.jsonl", "patches.safetensors");
        check_continuations(&golden(name), name, "patches.jsonl", "patches-generated.jsonl");
    }
}

/// A control vector that gguf-py wrote, at ranges of blocks, as llama.cpp continues under it
/// (`scripts/golden_control.py`), and the same after this program has written it.
#[test]
fn control_vectors_are_llama_cpps() {
    let (folder, scratch) = (golden("control"), tempfile::tempdir().unwrap());
    let model = golden("gguf").join("llama_linear.gguf");
    let own = scratch.path().join("own.gguf");
    let word = OsStr::new;
    let file = folder.join("control.gguf");
    let import = [word("vectors"), word("--import"), file.as_os_str(), word("--model")];
    inkling(&[&import[..], &[model.as_os_str(), word("--out"), own.as_os_str()]].concat());
    for want in read_lines(&folder.join("llama.jsonl")) {
        let sampling = json!({"temperature": 0, "ignore_eos": true, "max_tokens": 24});
        let request = json!({"id": "a", "tokens": want["prompt"], "sampling": sampling});
        let input = scratch.path().join("r.jsonl");
        fs_err::write(&input, request.to_string()).unwrap();
        let out = scratch.path().join("out.jsonl");
        for vector in [&file, &own] {
            let scaled =
                format!("--control-vector-scaled={}:{}", vector.display(), want["strength"]);
            let (first, last) = (want["first"].to_string(), want["last"].to_string());
            let range = ["--control-vector-layer-range", &first, &last];
            let options = [&EXACT[..], &[scaled.as_str()][..], &range[..]].concat();
            answer("generate", &model, &input, &out, &options);
            assert_eq!(read_lines(&out)[0]["tokens"], want["tokens"], "{scaled} {range:?}");
        }
    }
}

#[test]
fn forward_demo_model() {
    check_forward(&demo_model(), "smollm2");
}

#[test]
fn generate_plain() {
    check_generate(&golden("plain"), "plain", "generate.jsonl");
}

#[test]
fn generate_mqa_bf16_tied() {
    check_generate(&golden("mqa"), "mqa", "generate.jsonl");
}

#[test]
fn generate_sharded() {
    check_generate(&golden("sharded"), "sharded", "generate.jsonl");
}

#[test]
fn generate_demo_model() {
    check_generate(&demo_model(), "smollm2", "requests.jsonl");
}

/// The CUDA kernels, on the processor: in bf16 they are no further from transformers' f32 than the
/// processor's own code, but for the rounding of queries and of attention's weights.
#[cfg(feature = "host-kernels")]
#[test]
fn kernels_are_as_close_as_the_processor() {
    let families = families();
    for name in ["plain", "mqa"].into_iter().chain(families.iter().map(String::as_str)) {
        let mean = |device: &str| {
            let folder = golden(name);
            let scratch = tempfile::tempdir().unwrap();
            let out = scratch.path().join("captures.safetensors");
            let options = ["--dtype", "bf16", "--device", device];
            answer("forward", &folder, &folder.join("requests.jsonl"), &out, &options);
            let got = read_tensors(&out);
            let want = read_tensors(&folder.join("expected.safetensors"));
            assert!(got.keys().eq(want.keys()));
            let errors: Vec<f64> =
                want.iter().map(|(key, want)| worst_row(got[key].rows(), want.rows())).collect();
            errors.iter().sum::<f64>() / errors.len() as f64
        };
        let (processor, kernels) = (mean("cpu"), mean("host-kernels"));
        eprintln!(
            "{name}: mean worst row {processor:.2e} by the processor, {kernels:.2e} by kernels"
        );
        assert!(kernels < 1.5 * processor, "{name}: {kernels:.2e} against {processor:.2e}");
    }
}

/// Each of a list of stop tokens ends a continuation, which keeps it; nothing else does.
#[test]
fn stop_tokens_end_a_continuation() {
    let folder = golden("sharded");
    let stops = [json!(49), json!(127)]; // eos_token_id in its config.json
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("generate.jsonl");
    fs_err::copy(folder.join("vectors.safetensors"), scratch.path().join("vectors.safetensors"))
        .unwrap();
    let mut requests = read_lines(&folder.join("generate.jsonl"));
    for request in &mut requests {
        request["sampling"]["ignore_eos"] = json!(false);
    }
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    fs_err::write(&input, lines.join("\n") + "\n").unwrap();

    let answers = generate(&folder, &input);
    let mut stopped = 0;
    for (answer, want) in answers.iter().zip(read_lines(&folder.join("generated.jsonl"))) {
        let all = want["tokens"].as_array().unwrap();
        let stop = all.iter().position(|token| stops.contains(token));
        let kept = stop.map_or(all.len(), |at| at + 1);
        stopped += usize::from(stop.is_some());
        assert_eq!(answer["tokens"].as_array().unwrap()[..], all[..kept], "{}", want["id"]);
        assert_eq!(answer["finish"], if stop.is_some() { "stop" } else { "length" });
    }
    assert!(stopped > 0 && stopped < answers.len(), "the fixture no longer shows both endings");
}

/// Runs the binary; its stderr is shown where it fails.
fn inkling(arguments: &[&OsStr]) {
    let output = Command::new(env!("CARGO_BIN_EXE_inkling")).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "inkling {arguments:?}: {}\n{stderr}", output.status);
}

/// Runs `inkling COMMAND` on a file of requests.
fn answer(command: &str, model: &Path, input: &Path, out: &Path, options: &[&str]) {
    let word = OsStr::new;
    let fixed = [
        word(command),
        word("--model"),
        model.as_os_str(),
        word("--input"),
        input.as_os_str(),
        word("--out"),
        out.as_os_str(),
    ];
    let options = options.iter().copied().map(word);
    inkling(&fixed.into_iter().chain(options).collect::<Vec<_>>());
}

fn generate(model: &Path, input: &Path) -> Vec<Value> {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("generated.jsonl");
    answer("generate", model, input, &out, &EXACT);
    read_lines(&out)
}

fn check_forward(model: &Path, name: &str) {
    check_captures(model, name, "requests.jsonl", "expected.safetensors");
}

fn check_captures(model: &Path, name: &str, requests: &str, expected: &str) {
    let folder = golden(name);
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("captures.safetensors");
    answer("forward", model, &folder.join(requests), &out, &EXACT);

    let got = read_tensors(&out);
    let want = read_tensors(&folder.join(expected));
    assert!(got.keys().eq(want.keys()), "got {:?}\nwant {:?}", got.keys(), want.keys());
    let (mut failures, mut worst) = (Vec::new(), 0.0f64);
    for (key, want) in &want {
        assert_eq!(got[key].shape, want.shape, "{key}");
        let error = worst_row(got[key].rows(), want.rows());
        let limit = if key.ends_with("/logits") { WORST_LOGITS } else { WORST_ROW };
        worst = worst.max(error);
        if error > limit {
            failures.push(format!("{key}: {error:.2e}"));
        }
    }
    eprintln!("{name}: {} tensors, worst row {worst:.2e}", want.len());
    assert!(failures.is_empty(), "over their limit:\n{}", failures.join("\n"));
}

fn check_generate(model: &Path, name: &str, requests: &str) {
    check_continuations(model, name, requests, "generated.jsonl");
}

/// Token by token; after a token that was too close to call, the rest of that request is its own.
fn check_continuations(model: &Path, name: &str, requests: &str, expected: &str) {
    let folder = golden(name);
    let answers = generate(model, &folder.join(requests));
    let wanted = read_lines(&folder.join(expected));
    assert_eq!(answers.len(), wanted.len());
    for (answer, want) in answers.iter().zip(&wanted) {
        assert_eq!(answer["id"], want["id"]);
        assert_eq!(answer["prompt_tokens"], want["prompt_tokens"], "{}", want["id"]);
        assert_eq!(answer["finish"], "length", "{}", want["id"]);
        let tokens = |line: &Value| line["tokens"].as_array().unwrap().clone();
        let (got, expected) = (tokens(answer), tokens(want));
        assert_eq!(got.len(), expected.len(), "{}", want["id"]);
        if let Some(step) = (0..got.len()).find(|&step| got[step] != expected[step]) {
            let margin = want["margins"][step].as_f64().unwrap();
            assert!(
                margin < MARGIN,
                "{name} {} step {step}: {} instead of {}, which led by {margin}",
                want["id"],
                got[step],
                expected[step]
            );
            eprintln!("{name} {} step {step}: excused, margin {margin:.1e}", want["id"]);
        }
    }
}
