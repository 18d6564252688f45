//! Tiny models, with and without a tokenizer, jobs for them, and a small experiment.

use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use inkling::{
    engine::{Capture, Dtype, Engine, Injection, Job, Options},
    error::Result,
    experiment::{self, folder, protocol::Protocol, results::Run},
    model::Model,
    request::{CaptureSite, Op, Sampling, Site, StrengthMode},
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::common::golden;

/// A model of token ids: 3 blocks, width 48, 131 tokens.
pub fn plain() -> Model {
    Model::open(&golden("plain")).unwrap()
}

/// An engine of one thread in f32.
pub fn start(model: &Model, change: impl FnOnce(&mut Options)) -> Engine {
    let mut options =
        Options { dtype: Dtype::F32, threads: Some(1), max_batch: 8, ..Options::default() };
    change(&mut options);
    Engine::start(model, &options).unwrap()
}

/// A prompt of token ids.
pub fn prompt(len: usize, salt: usize) -> Vec<u32> {
    (0..len).map(|i| (3 + (i * i * 7 + i * 37 + salt * 11) % 120) as u32).collect()
}

/// A direction in `plain`'s stream, of a length between 1 and 3.
pub fn vector(salt: usize) -> Arc<[f32]> {
    (0..48).map(|i| ((i * 29 + salt * 17) % 23) as f32 / 23.0 - 0.5).collect()
}

/// A job that draws nothing.
pub fn job(tokens: &[u32]) -> Job {
    let sampling = Sampling { max_tokens: 0, ..Sampling::default() };
    Job { tokens: tokens.to_vec(), sampling, n: 1, ..Job::default() }
}

/// A job that draws tokens, whatever they are.
pub fn drawing(tokens: &[u32], max_tokens: u32, seed: u64) -> Job {
    let sampling = Sampling { max_tokens, seed, ignore_eos: true, ..Sampling::default() };
    Job { sampling, ..job(tokens) }
}

/// A raw `add` at `resid_post`.
pub fn inject(layer: usize, strength: f32, from: usize, to: Option<usize>) -> Injection {
    Injection {
        vector: vector(1),
        site: Site::ResidPost,
        layer,
        op: Op::Add,
        strength,
        mode: StrengthMode::Raw,
        from,
        to,
        ..Injection::default()
    }
}

/// `resid_post` of a block at all positions of a prompt.
pub fn capture(layer: usize, positions: usize) -> Capture {
    let site = CaptureSite::ResidPost;
    Capture::rows(site, Some(layer), (0..positions).collect())
}

/// The folder of `name`'s model with more files.
pub fn with_files(name: &str, files: &[(&str, &Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs_err::copy(golden(name).join(file), folder.path().join(file)).unwrap();
    }
    for (file, content) in files {
        fs_err::write(folder.path().join(file), content.to_string()).unwrap();
    }
    folder
}

/// The first token of the tiny chat model's vocabulary.
pub const BOS: u32 = 0;
/// Prints the BOS itself.
const TEMPLATE: &str = r"{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A model of 3 blocks with a chat template that prints a BOS and a byte-level tokenizer that adds
/// one too, as Llama 3's do.
pub fn chat_folder() -> TempDir {
    let config = json!({
        "chat_template": TEMPLATE, "bos_token": "<|bos|>", "eos_token": "<|im_end|>"
    });
    with_files("mqa", &[("tokenizer.json", &tokenizer()), ("tokenizer_config.json", &config)])
}

/// Three special tokens, the 256 bytes and two merges.
fn tokenizer() -> Value {
    let specials = ["<|bos|>", "<|im_start|>", "<|im_end|>"];
    // Printable Latin-1 stands for itself, the other 68 bytes are the characters from U+0100.
    let printable = ('!'..='~').chain('\u{a1}'..='\u{ac}').chain('\u{ae}'..='\u{ff}');
    let bytes = printable.chain('\u{100}'..='\u{143}').map(String::from);
    let merges = [["h", "e"], ["a", "d"]];
    let tokens = specials.map(String::from).into_iter().chain(bytes);
    let tokens = tokens.chain(merges.map(|pair| pair.concat()));
    let vocab: Map<String, Value> =
        tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    assert_eq!(vocab.len(), 3 + 256 + 2);
    let added = |(id, content): (usize, &&str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        })
    };
    let added: Vec<Value> = specials.iter().enumerate().map(added).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true
    });
    json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}
            ],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}}
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}
    })
}

const PROTOCOL: &str = r#"
name = "tiny"
seed = 3
[vectors]
template = "Say {word}"
baseline = ["chair", "cloud", "river"]
[answers]
yes = ["Y"]
no = ["N"]
[[prompts.cued.turns]]
role = "user"
text = "Trial by trial."
[[prompts.cued.turns]]
role = "assistant"
text = "Ok."
[[prompts.cued.turns]]
role = "user"
text = "Here it comes.\n\nTrial {trial}: a thought?"
[prompts.cued.window]
from = { start_of = { text = "\n\nTrial {trial}", turn = "user.last" } }
[[parts]]
name = "readout"
kind = "readout"
prompts = ["cued"]
words = WORDS
layers = LAYERS
doses = DOSES
[[parts]]
name = "sampled"
kind = "sample"
prompts = ["cued"]
words = WORDS
layers = LAYERS
doses = DOSES
repeats = 2
max_tokens = 6
"#;

/// Two words in concept and random trials, read out and sampled twice.
pub fn protocol(words: &str, layers: &str, doses: &str) -> Protocol {
    let text = PROTOCOL.replace("WORDS", words).replace("LAYERS", layers);
    Protocol::parse(&text.replace("DOSES", doses), "tiny.toml", &[]).unwrap()
}

/// Runs a protocol into a folder, or the rest of it.
pub fn run_into(dir: &Path, protocol: &Protocol, model: &Model, engine: &Engine) -> Result<()> {
    let summary =
        experiment::run(protocol, model, engine, dir, experiment::Ways::default(), &mut ())?;
    assert!(summary.failed.is_empty(), "{:?}", summary.failed);
    Ok(())
}

/// Runs a protocol on the tiny chat model, so many sequences at a time.
pub fn run(protocol: &Protocol, max_batch: usize) -> Run {
    let folder = chat_folder();
    let model = Model::open(folder.path()).unwrap();
    let engine = start(&model, |options| options.max_batch = max_batch);
    let dir: &Path = &folder.path().join("run");
    run_into(dir, protocol, &model, &engine).unwrap();
    folder::load(dir).unwrap()
}

/// The run that most tests look at.
pub static RUN: LazyLock<Run> =
    LazyLock::new(|| run(&protocol(r#"["Bread", "Snow"]"#, "[0, 2]", "[0.5, 1.0]"), 8));
