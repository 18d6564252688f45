//! The demo model's tokenizer and chat template against transformers' answers
//! (`scripts/make_golden.py demo`).

#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use common::{demo_model, golden};
use inkling::model::Model;
use inkling::request::Request;
use serde_json::Value;

/// Ids below it are special tokens, which `decode` omits.
const FIRST_ORDINARY: u32 = 17;

fn fixture() -> Value {
    let text = fs_err::read_to_string(golden("smollm2_tokens.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(line: &Value) -> Vec<u32> {
    line["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn texts_become_the_same_tokens_and_come_back() {
    let model = Model::open(&demo_model()).unwrap();
    let tokenizer = model.tokenizer.as_ref().unwrap();
    let texts = fixture()["texts"].as_array().unwrap().clone();
    assert!(texts.len() > 150);
    for line in &texts {
        let (text, want) = (line["text"].as_str().unwrap(), ids(line));
        let encoding = tokenizer.encode(text, true).unwrap();
        assert_eq!(encoding.tokens, want, "{text:?}");
        if want.iter().all(|id| *id >= FIRST_ORDINARY) {
            assert_eq!(tokenizer.decode(&want), text);
        }
        let mut covered = 0;
        for span in &encoding.spans {
            assert!(span.start <= covered, "{text:?}: a gap before byte {}", span.start);
            covered = covered.max(span.end);
        }
        assert_eq!(covered, text.len(), "{text:?}: spans do not reach the end");
    }
}

#[test]
fn chats_are_rendered_alike() {
    let model = Model::open(&demo_model()).unwrap();
    let chats = fixture()["chats"].as_array().unwrap().clone();
    assert!(chats.len() >= 15);
    for line in &chats {
        let mut request = line["request"].clone();
        request["id"] = "chat".into();
        let request: Request = serde_json::from_value(request).unwrap();
        let prompt = model.render(&request).unwrap();
        assert_eq!(prompt.text, line["text"].as_str().unwrap());
        assert_eq!(prompt.tokens, ids(line), "{:?}", prompt.text);
    }
}
