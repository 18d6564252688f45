//! Captures in files: the same numbers in every layout, reductions of what the rows are, and nothing lost that
//! was reported done, whatever happens on the way.

#[path = "common/mod.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use std::{
    cell::Cell,
    collections::BTreeMap,
    path::Path,
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use common::{Tensor, golden, read_lines, read_tensors};
use inkling::{
    engine::{Capture, Engine, Job, Options, Reduce, capture_bytes},
    model::Model,
    request::{CaptureSite, Sampling},
};
use serde_json::{Value, json};

const LAYERS: usize = 3;

/// Prompts of different lengths, as token ids of the model without a tokenizer.
fn prompts(count: usize) -> Vec<Vec<u32>> {
    let tokens = |at: usize| (0..5 + at % 17).map(|i| ((at * 31 + i * 7) % 131) as u32).collect();
    (0..count).map(tokens).collect()
}

fn write_requests(path: &Path, capture: &Value, count: usize) {
    let line = |(at, tokens): (usize, &Vec<u32>)| {
        json!({"id": format!("r{at}"), "tokens": tokens, "capture": capture}).to_string()
    };
    let lines: Vec<String> = prompts(count).iter().enumerate().map(line).collect();
    fs_err::write(path, lines.join("\n")).unwrap();
}

fn inkling() -> Command {
    Command::new(env!("CARGO_BIN_EXE_inkling"))
}

fn capture(input: &Path, out: &Path, options: &[&str]) -> Output {
    let mut command = inkling();
    command.args(["capture", "--dtype", "f32", "--model"]).arg(golden("plain"));
    command.arg("--input").arg(input).arg("--out").arg(out).args(options).output().unwrap()
}

fn captured(input: &Path, out: &Path, options: &[&str]) -> String {
    let output = capture(input, out, options);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// What `forward` gives of the same requests.
fn forward(input: &Path, scratch: &Path) -> BTreeMap<String, Tensor> {
    let out = scratch.join("forward.safetensors");
    let mut command = inkling();
    command.args(["forward", "--dtype", "f32", "--model"]).arg(golden("plain"));
    let output = command.arg("--input").arg(input).arg("--out").arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    read_tensors(&out)
}

/// Shape and numbers of an `.npy` file of f4.
fn read_npy(path: &Path) -> (String, Vec<f32>) {
    let bytes = fs_err::read(path).unwrap();
    let end = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!(end % 64, 0, "NumPy wants its data aligned");
    let header = String::from_utf8(bytes[10..end].to_vec()).unwrap();
    assert!(header.contains("'<f4'"), "{header}");
    let shape = header.split("'shape': ").nth(1).unwrap().split('}').next().unwrap();
    let numbers = bytes[end..].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (shape.trim().trim_end_matches(',').to_owned(), numbers)
}

#[test]
fn every_layout_has_the_same_numbers() {
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("requests.jsonl");
    write_requests(&input, &json!([{"site": "resid_post", "layers": "all"}]), 9);
    let want = forward(&input, scratch.path());

    let shards = scratch.path().join("shards");
    captured(&input, &shards, &[]);
    let index: Value = serde_json::from_str(
        &fs_err::read_to_string(shards.join("captures.safetensors.index.json")).unwrap(),
    )
    .unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert!(map.keys().eq(want.keys()));
    let got = read_tensors(&shards.join(map["r0/resid_post.0"].as_str().unwrap()));
    assert!(got == want);

    let npy = scratch.path().join("npy");
    captured(&input, &npy, &["--layout", "npy"]);
    let requests = scratch.path().join("requests");
    captured(&input, &requests, &["--layout", "requests"]);
    for line in read_lines(&npy.join("captures.jsonl")) {
        let id = line["id"].as_str().unwrap();
        let tokens: Vec<u64> =
            line["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        let own = read_tensors(&requests.join(format!("{id}.safetensors")));
        let states = &own["hidden_states"];
        assert_eq!(states.shape, [tokens.len(), LAYERS, 48]);
        let rows: Vec<f32> = states.rows().flatten().copied().collect();
        for tensor in line["tensors"].as_array().unwrap() {
            let (point, first) =
                (tensor["point"].as_str().unwrap(), tensor["first_row"].as_u64().unwrap());
            let layer: usize = point.rsplit('.').next().unwrap().parse().unwrap();
            let want: Vec<f32> = want[&format!("{id}/{point}")].rows().flatten().copied().collect();
            let (_, all) = read_npy(&npy.join(tensor["file"].as_str().unwrap()));
            assert_eq!(all[first as usize * 48..][..want.len()], want[..], "{id} {point}");
            let of_layer = |at: usize| rows[(at * LAYERS + layer) * 48..][..48].to_vec();
            let interleaved: Vec<f32> = (0..tokens.len()).flat_map(of_layer).collect();
            assert_eq!(interleaved, want, "{id} {point}");
            let positions = tensor["positions"].as_array().unwrap();
            assert_eq!(positions.len(), tokens.len(), "every row says which token it is of");
        }
    }
    let total: usize = prompts(9).iter().map(Vec::len).sum();
    let (shape, _) = read_npy(&npy.join("resid_post.1.npy"));
    assert_eq!(shape, format!("({total}, 48)"));
}

/// Reductions against the rows that the same requests capture, in f64.
#[test]
fn reductions_are_of_the_rows() {
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("requests.jsonl");
    fs_err::copy(golden("plain").join("vectors.safetensors"), scratch.path().join("v.safetensors"))
        .unwrap();
    let vectors = read_tensors(&golden("plain").join("vectors.safetensors"));
    let positions = json!([0, 2, -1]);
    let with = |reduce: Value| json!({"site": "resid_post", "layers": [1, 2], "positions": positions, "reduce": reduce});
    let cosine = json!({"cosine": "v.safetensors"});
    let ones = vec![1.0; 48];
    let coordinate = json!({"coordinate": ["v.safetensors#dust", ones]});
    let reductions = [json!("mean"), json!("norm"), cosine, coordinate, json!({"lens": 4})];
    let mut all: Vec<Value> = reductions.into_iter().map(with).collect();
    all.push(json!({"site": "resid_post", "layers": [1, 2], "positions": positions}));
    all.push(json!({"site": "final_norm", "positions": positions, "reduce": "norm"}));
    all.push(json!({"site": "final_norm", "positions": positions}));
    all.push(json!({"site": "logits", "positions": positions}));
    write_requests(&input, &json!(all), 5);
    let got = forward(&input, scratch.path());
    let numbers =
        |name: &str| -> Vec<f64> { got[name].rows().flatten().map(|&v| f64::from(v)).collect() };
    let close = |got: f64, want: f64, what: &str| {
        assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{what}: {got}, not {want}");
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for id in 0..5 {
        for layer in [1, 2] {
            let name = format!("r{id}/resid_post.{layer}");
            let rows: Vec<Vec<f64>> =
                got[&name].rows().map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect();
            let mean = numbers(&format!("{name}.mean"));
            for (at, mean) in mean.iter().enumerate() {
                close(*mean, rows.iter().map(|row| row[at]).sum::<f64>() / 3.0, "mean");
            }
            let norms = numbers(&format!("{name}.norm"));
            let cosines = numbers(&format!("{name}.cosine"));
            let coordinates = numbers(&format!("{name}.coordinate"));
            assert_eq!(cosines.len(), 3 * vectors.len());
            for (at, row) in rows.iter().enumerate() {
                let norm = dot(row, row).sqrt();
                close(norms[at], norm, "norm");
                for (i, tensor) in vectors.values().enumerate() {
                    let of_layer = if tensor.shape.len() == 1 { 0 } else { layer };
                    let v: Vec<f64> = tensor
                        .rows()
                        .nth(of_layer)
                        .unwrap()
                        .iter()
                        .map(|&v| f64::from(v))
                        .collect();
                    let want = dot(row, &v) / norm / dot(&v, &v).sqrt();
                    close(cosines[at * vectors.len() + i], want, "cosine");
                }
                let ones = row.iter().sum::<f64>() / 48.0_f64.sqrt();
                close(coordinates[2 * at + 1], ones, "coordinate");
            }
        }
        let normed = &got[&format!("r{id}/final_norm")];
        for (row, norm) in normed.rows().zip(numbers(&format!("r{id}/final_norm.norm"))) {
            let row: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            close(norm, dot(&row, &row).sqrt(), "norm of the final norm");
        }
        // After the last block the lens is the model's own answer.
        let last = format!("r{id}/resid_post.2");
        let logprobs = numbers(&format!("{last}.lens_logprobs"));
        for (at, logits) in got[&format!("r{id}/logits")].rows().enumerate() {
            let logits: Vec<f64> = logits.iter().map(|&v| f64::from(v)).collect();
            let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = most + logits.iter().map(|l| (l - most).exp()).sum::<f64>().ln();
            let mut best = logits.clone();
            best.sort_by(|a, b| b.total_cmp(a));
            for (i, logit) in best[..4].iter().enumerate() {
                close(logprobs[4 * at + i], logit - sum, "lens");
            }
        }
    }
}

/// A folder's files and lines, those of its lock aside.
fn contents(folder: &Path) -> (BTreeMap<String, Vec<u8>>, Vec<String>) {
    let mut files = BTreeMap::new();
    let mut lines = Vec::new();
    for entry in fs_err::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let bytes = fs_err::read(entry.path()).unwrap();
        match &name[..] {
            ".lock" => {}
            "captures.jsonl" => {
                lines = String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect();
                lines.sort();
            }
            _ => drop(files.insert(name, bytes)),
        }
    }
    (files, lines)
}

/// Every tensor that the lines of a folder name is in its file, as `forward` gives it.
fn check_reported(folder: &Path, want: &BTreeMap<String, Tensor>) -> usize {
    let lines = read_lines(&folder.join("captures.jsonl"));
    for line in &lines {
        for tensor in line["tensors"].as_array().unwrap() {
            let file = folder.join(tensor["file"].as_str().unwrap());
            let part = folder.join(format!("{}.part", tensor["file"].as_str().unwrap()));
            let name =
                format!("{}/{}", line["id"].as_str().unwrap(), tensor["point"].as_str().unwrap());
            let bytes = if file.exists() { file } else { part };
            assert!(read_tensors(&bytes)[&name] == want[&name], "{name} was reported");
        }
    }
    lines.len()
}

const MANY: usize = 2500;
const SMALL_SHARDS: [&str; 2] = ["--shard-mib", "1"];

/// Killed at some moment, the same command goes on, and ends as if nothing had happened.
#[test]
fn a_killed_capture_goes_on() {
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("requests.jsonl");
    write_requests(&input, &json!([{"site": "resid_post", "layers": "all"}]), MANY);
    let (whole, cut) = (scratch.path().join("whole"), scratch.path().join("cut"));
    captured(&input, &whole, &SMALL_SHARDS);
    let want = forward(&input, scratch.path());
    let mut command = inkling();
    command.args(["capture", "--dtype", "f32", "--threads", "1", "--model"]).arg(golden("plain"));
    command.arg("--input").arg(&input).arg("--out").arg(&cut).args(SMALL_SHARDS);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let lines = cut.join("captures.jsonl");
    while fs_err::metadata(&lines).map_or(0, |file| file.len()) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let reported = check_reported(&cut, &want);
    assert!(reported > 0 && reported < MANY, "{reported} of {MANY}");
    let said = captured(&input, &cut, &SMALL_SHARDS);
    assert!(said.contains(&format!("({reported} written before)")), "{said}");
    assert!(contents(&cut) == contents(&whole), "other content than undisturbed");
    let again = captured(&input, &cut, &SMALL_SHARDS);
    assert!(again.contains(&format!("({MANY} written before)")), "{again}");
}

/// A disk that takes no more: what was reported is there, the error says what to do, and with room it goes on.
#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing_that_was_reported() {
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("requests.jsonl");
    write_requests(&input, &json!([{"site": "resid_post", "layers": "all"}]), 200);
    let (whole, cut) = (scratch.path().join("whole"), scratch.path().join("cut"));
    let npy = ["--layout", "npy"];
    captured(&input, &whole, &npy);
    // Files that may not grow beyond 300 KiB, as if the disk were full there.
    let script = "trap '' XFSZ; ulimit -f 300; exec \"$@\"";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash", env!("CARGO_BIN_EXE_inkling")]);
    command.args(["capture", "--dtype", "f32", "--model"]).arg(golden("plain"));
    let output =
        command.arg("--input").arg(&input).arg("--out").arg(&cut).args(npy).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("resid_post.") && said.contains("same command"), "{said}");
    captured(&input, &cut, &npy);
    assert!(contents(&cut) == contents(&whole), "other content than undisturbed");
}

/// A reader of standard output that has seen enough ends it, without an error.
#[cfg(unix)]
#[test]
fn a_reader_that_has_gone_ends_it() {
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("requests.jsonl");
    write_requests(
        &input,
        &json!([{"site": "resid_post", "layers": "all", "reduce": "norm"}]),
        MANY,
    );
    let script = "\"$@\" | head -n 3; exit ${PIPESTATUS[0]}";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash", env!("CARGO_BIN_EXE_inkling"), "capture", "--model"]);
    let output = command.arg(golden("plain")).arg("--input").arg(&input).args(["--out", "-"]);
    let output = output.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["tensors"].as_object().unwrap().len(), LAYERS);
}

/// However slowly what is captured is taken, no more of it waits than was said.
#[test]
fn a_slow_disk_is_waited_for() {
    let model = Model::open(&golden("plain")).unwrap();
    let job = |tokens: Vec<u32>| Job {
        capture: (0..LAYERS)
            .map(|layer| {
                Capture::rows(CaptureSite::ResidPost, Some(layer), (0..tokens.len()).collect())
            })
            .collect(),
        sampling: Sampling { max_tokens: 0, ..Sampling::default() },
        tokens,
        n: 1,
        ..Job::default()
    };
    let jobs: Vec<Job> = prompts(60).into_iter().map(job).collect();
    let bytes: Vec<u64> = jobs.iter().map(|job| capture_bytes(job, &model.config)).collect();
    let largest = *bytes.iter().max().unwrap();
    let most = 3 * largest;
    let options = Options { threads: Some(1), capture_bytes: Some(most), ..Options::default() };
    let engine = Engine::start(&model, &options).unwrap();
    let (asked, taken) = (Cell::new(0), Cell::new(0));
    let asking = jobs.into_iter().zip(&bytes).map(|(job, bytes)| {
        asked.set(asked.get() + bytes);
        job
    });
    let mut done = 0;
    engine
        .run_all(asking, |at, finished| {
            std::thread::sleep(Duration::from_millis(2));
            // The next one may have been asked for, and waits.
            let waiting = asked.get() - taken.get();
            assert!(waiting <= most + largest, "{waiting} bytes wait, not {most}");
            taken.set(taken.get() + bytes[at]);
            done += 1;
            finished.map(|_| ())
        })
        .unwrap();
    assert_eq!(done, 60);
}

/// One that has much to hand out does not keep the others from being begun, nor wait for ever.
#[test]
fn one_larger_than_the_memory_runs_alone() {
    let model = Model::open(&golden("plain")).unwrap();
    let options = Options { threads: Some(1), capture_bytes: Some(1), ..Options::default() };
    let engine = Engine::start(&model, &options).unwrap();
    let job = |tokens: Vec<u32>| Job {
        capture: vec![Capture {
            site: CaptureSite::MlpOut,
            layer: Some(1),
            positions: vec![0, 1],
            reduce: Reduce::Probe(Arc::from(vec![1.0; 48])),
        }],
        sampling: Sampling { max_tokens: 0, ..Sampling::default() },
        tokens,
        n: 1,
        ..Job::default()
    };
    let mut done = 0;
    engine
        .run_all(prompts(20).into_iter().map(job), |_, finished| {
            assert_eq!(finished?.captures[0].len(), 4, "two rows of a product and a norm");
            done += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(done, 20);
}

#[test]
fn what_cannot_be_written_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let input = scratch.path().join("requests.jsonl");
    let refused = |capture: Value, options: &[&str], want: &[&str]| {
        write_requests(&input, &capture, 3);
        let out = scratch.path().join("out");
        let output = refused_capture(&input, &out, options);
        for want in want {
            assert!(output.contains(want), "{want:?} not in {output}");
        }
        assert!(!out.exists(), "{output}: nothing is begun");
    };
    let post = || json!([{"site": "resid_post", "layers": "all"}]);
    refused(post(), &["--layout", "npy", "--as", "bf16"], &["NumPy has no bf16", "f16"]);
    let two = json!([{"site": "resid_post", "layers": [0]}, {"site": "attn_out", "layers": [0]}]);
    refused(two, &["--layout", "requests"], &["one site a request", "r0", "shards"]);
    let mean = json!([{"site": "resid_post", "layers": [0], "reduce": "mean"}]);
    refused(mean, &["--layout", "requests"], &["holds rows"]);
    let lens = |site: &str| json!([{"site": site, "layers": [0], "reduce": {"lens": 2}}]);
    refused(lens("head_out"), &[], &["a logit lens of head_out", "capture[0]"]);
    refused(lens("resid_post"), &["--at", "resid_post.1"], &["in two ways"]);
    let wide = json!([{"site": "q", "layers": [0], "reduce": "norm"}]);
    refused(wide, &[], &["a probe of q"]);
    let none = json!([{"site": "resid_post", "layers": [0], "reduce": {"cosine": []}}]);
    refused(none, &[], &["no vectors", "reduce"]);
    let long = json!([{"site": "resid_post", "layers": [0], "reduce": {"cosine": [[1.0, 2.0]]}}]);
    refused(long, &[], &["vector of the wrong length", "48"]);

    // Two names of one point.
    write_requests(&input, &json!([{"hook": "resid_post.1"}, {"hook": "model.layers.1"}]), 2);
    for layout in ["npy", "shards", "requests"] {
        let said = refused_capture(&input, &scratch.path().join("two"), &["--layout", layout]);
        assert!(said.contains("one name") && said.contains("resid_post.1"), "{said}");
    }

    // A folder of something else is left as it is.
    let out = scratch.path().join("other");
    write_requests(&input, &post(), 3);
    fs_err::create_dir(&out).unwrap();
    fs_err::write(out.join("thesis.tex"), "x").unwrap();
    assert!(refused_capture(&input, &out, &[]).contains("holds something else"));
    let out = scratch.path().join("captures");
    captured(&input, &out, &[]);
    write_requests(&input, &post(), 4);
    assert!(refused_capture(&input, &out, &[]).contains("other requests or vectors"));
    write_requests(&input, &post(), 3);
    assert!(refused_capture(&input, &out, &["--as", "f16"]).contains("other precision"));
    captured(&input, &out, &[]);
    // A file that is gone is missed; a first start that was killed is no hindrance.
    fs_err::remove_file(out.join("captures-00001-of-00001.safetensors")).unwrap();
    assert!(refused_capture(&input, &out, &[]).contains("is gone"));
    let out = scratch.path().join("killed");
    fs_err::create_dir(&out).unwrap();
    fs_err::write(out.join("manifest.json.tmp"), "{").unwrap();
    captured(&input, &out, &[]);
}

fn refused_capture(input: &Path, out: &Path, options: &[&str]) -> String {
    let output = capture(input, out, options);
    assert_eq!(output.status.code(), Some(2));
    String::from_utf8_lossy(&output.stderr).into_owned()
}
