//! The built-in protocols' prompts in five kinds of chat template: the tokens, and which of them injections
//! and probes cover. `INKLING_WRITE_PROMPTS=1` writes the files; `scripts/check_prompts.py` compares them with
//! transformers. And awkward chats in every kind of template, as transformers renders them
//! (`scripts/make_golden.py templates`).

#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use std::fmt::Write;

use common::{demo_model, golden, read_lines};
use inkling::{
    experiment::{prepare::prepare, protocol::Protocol},
    model::Model,
    request::Request,
};
use serde_json::json;

const TEMPLATES: [&str; 5] = ["chatml", "llama3", "gemma", "mistral", "qwen3"];

fn folder(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// One line for each protocol and prompt, with its first word and sentence.
fn lines(model: &Model) -> String {
    let mut out = String::new();
    for name in Protocol::builtins() {
        let prepared = prepare(model, &Protocol::builtin(name).unwrap()).unwrap();
        let mut last = "";
        for ((prompt, word, sentence), record) in &prepared.prompts {
            if prompt == last {
                continue;
            }
            last = prompt;
            let end = record.to.unwrap_or(record.pieces.len());
            let line = json!({
                "protocol": name, "prompt": prompt, "word": word, "sentence": sentence,
                "tokens": record.tokens, "window": [record.from, record.to],
                "inside": record.pieces[record.from..end].concat(),
                "after": record.after, "probe": record.probe,
            });
            writeln!(out, "{line}").unwrap();
        }
    }
    out
}

#[test]
fn prompts_and_windows_in_five_templates() {
    for name in TEMPLATES {
        let template =
            fs_err::read_to_string(folder("templates").join(format!("{name}.jinja"))).unwrap();
        let model = Model::open(&demo_model()).unwrap().with_template(&template).unwrap();
        let got = lines(&model);
        let path = folder("golden/prompts").join(format!("{name}.jsonl"));
        if std::env::var_os("INKLING_WRITE_PROMPTS").is_some() {
            fs_err::write(&path, &got).unwrap();
        }
        let want = fs_err::read_to_string(&path).unwrap();
        for (got, want) in got.lines().zip(want.lines()) {
            assert_eq!(got, want, "{name}");
        }
        assert_eq!(got.lines().count(), want.lines().count(), "{name}");
        assert!(want.lines().count() > 40, "{name}");
    }
}

#[test]
fn chats_are_rendered_as_transformers_does() {
    let lines = read_lines(&golden("templates.jsonl"));
    let mut model = Model::open(&demo_model()).unwrap();
    let (mut current, mut refused) = (String::new(), 0);
    for line in &lines {
        let name = line["template"].as_str().unwrap();
        if name != current {
            let path = folder("templates").join(format!("{name}.jinja"));
            model = model.with_template(&fs_err::read_to_string(path).unwrap()).unwrap();
            current = name.to_owned();
        }
        let request: Request = serde_json::from_value(line["request"].clone()).unwrap();
        let got = model.render(&request);
        match line["text"].as_str() {
            Some(want) => assert_eq!(got.unwrap().text, want, "{line}"),
            None => {
                let error = got.err().unwrap_or_else(|| panic!("accepted: {line}")).to_string();
                assert!(error.contains("cannot render these messages"), "{line}: {error}");
                refused += 1;
            }
        }
    }
    let templates = fs_err::read_dir(folder("templates")).unwrap().count();
    assert!(
        lines.len() > 12 * templates && refused > 5,
        "{} chats, {refused} refused",
        lines.len()
    );
}
