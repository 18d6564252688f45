//! Vocabularies of GGUF files.

use serde_json::{Value, json};

use crate::{
    assert_refused,
    gguf::{GgufFile, entry_text, entry_u32, load_gguf, text, typed},
};

#[test]
fn a_gguf_tokenizer_of_another_kind_leaves_prompts_of_token_ids() {
    let mut file = GgufFile::good();
    file.set("tokenizer.ggml.model", entry_text("", "t5").1);
    let model = load_gguf(&file.bytes()).unwrap();
    let request = |json: Value| serde_json::from_value(json).unwrap();
    let prompt = model.render(&request(json!({"id": "a", "tokens": [1, 9]}))).unwrap();
    assert_eq!((prompt.tokens, prompt.pieces), (vec![1, 9], vec!["<1>".into(), "<9>".to_owned()]));
    let refused = [
        (json!({"id": "a", "text": "hi"}), "`t5`; known are gpt2"),
        (
            json!({"id": "a", "messages": [{"role": "user", "content": "x"}]}),
            "chat template cannot be used: it has none",
        ),
        (json!({"id": "a", "tokens": [1, 10]}), "tokens[1]"),
        (json!({"id": "a", "tokens": []}), "empty prompt"),
        (json!({"id": "a", "tokens": vec![1; 33]}), "at most 32 tokens"),
        (json!({"id": "a", "tokens": [1], "prefill": "x"}), "prefill"),
        (json!({"id": "a", "tokens": [1], "system": ""}), "`system` needs `messages`"),
        (json!({"id": "a", "tokens": [1], "text": "x"}), "text and tokens"),
        (json!({"id": "a"}), "none"),
    ];
    for (json, cause) in refused {
        let message = model.render(&request(json)).unwrap_err().to_string();
        assert!(message.contains(cause), "want {cause:?} in:\n{message}");
    }
    let vocabulary = |pre: &str, merge: &str| {
        let mut file = GgufFile::good();
        file.set("tokenizer.ggml.model", entry_text("", "gpt2").1);
        file.set("tokenizer.ggml.pre", entry_text("", pre).1);
        file.set("tokenizer.ggml.tokens", texts(&["a", "b"]));
        file.set("tokenizer.ggml.merges", texts(&["a b", merge]));
        load_gguf(&file.bytes())
    };
    for pre in ["viking", "default"] {
        let message =
            vocabulary(pre, "a").unwrap().render(&request(json!({"id": "a", "text": "x"})));
        let message = message.unwrap_err().to_string();
        assert!(message.contains(&format!("`{pre}`; known are gpt-2, phi-2, olmo")), "{message}");
    }
    assert_refused(vocabulary("gpt-2", "a"), "tiny.gguf", "tokenizer.ggml.token_type");
}

/// A list of a GGUF file.
fn list(kind: u32, values: &[Vec<u8>]) -> Vec<u8> {
    let count = (values.len() as u64).to_le_bytes();
    typed(9, &typed(kind, &[&count[..], &values.concat()].concat()))
}

fn texts(values: &[&str]) -> Vec<u8> {
    list(8, &values.iter().map(|value| text(value)).collect::<Vec<_>>())
}

/// A good file with a `SentencePiece` vocabulary of ten pieces.
fn sentencepiece() -> GgufFile {
    let mut file = GgufFile::good();
    file.set("tokenizer.ggml.model", entry_text("", "llama").1);
    let tokens = ["<unk>", "<s>", "<0x0A>", "▁", "a", "b", "▁a", "ab", "▁ab", "<0xC3>"];
    file.set("tokenizer.ggml.tokens", texts(&tokens));
    let scores = [0f32, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0];
    file.set("tokenizer.ggml.scores", list(6, &scores.map(|score| score.to_le_bytes().to_vec())));
    let types = [2i32, 3, 6, 1, 1, 1, 1, 1, 1, 6].map(|kind| kind.to_le_bytes().to_vec());
    file.set("tokenizer.ggml.token_type", list(5, &types));
    file.set("tokenizer.ggml.unknown_token_id", entry_u32("", 0).1);
    file.set("tokenizer.ggml.bos_token_id", entry_u32("", 1).1);
    file
}

#[test]
fn a_sentencepiece_vocabulary_becomes_a_tokenizer() {
    let render = |file: &GgufFile, text: &str| {
        let request = serde_json::from_value(json!({"id": "a", "text": text})).unwrap();
        load_gguf(&file.bytes()).unwrap().render(&request).unwrap()
    };
    let mut file = sentencepiece();
    // A BOS and a blank before the text by default, `ab` before `▁a`, a character of which one byte
    // has no token.
    let prompt = render(&file, "ab a\né");
    assert_eq!(prompt.tokens, [1, 8, 6, 2, 0]);
    assert_eq!(prompt.pieces, ["<s>", " ab", " a", "\n", "<unk>"]);
    file.set("tokenizer.ggml.add_bos_token", typed(7, &[0]));
    file.set("tokenizer.ggml.add_space_prefix", typed(7, &[0]));
    assert_eq!(render(&file, "ab<s>ab").tokens, [7, 1, 7]);
    // Merges in the file go before scores.
    file.set("tokenizer.ggml.merges", texts(&["▁ a"]));
    assert_eq!(render(&file, " ab").tokens, [6, 5]);
}

#[test]
fn lying_vocabularies_are_refused() {
    let refused = |cause: &str, key: &str, value: Vec<u8>| {
        let mut file = sentencepiece();
        file.set(key, value);
        assert_refused(load_gguf(&file.bytes()), "tiny.gguf", cause);
    };
    let float = |value: f32| value.to_le_bytes().to_vec();
    let scores = "tokenizer.ggml.scores";
    refused("10 values, one a token", scores, list(6, &[float(1.0), float(2.0)]));
    refused("a list of numbers", scores, texts(&["a"]));
    refused("10 values, one a token", "tokenizer.ggml.token_type", list(4, &[vec![1, 0, 0, 0]]));
    refused("stands twice", "tokenizer.ggml.tokens", texts(&["a"; 10]));
    refused("an id below 10", "tokenizer.ggml.unknown_token_id", entry_u32("", 10).1);
    refused("an id below 10", "tokenizer.ggml.bos_token_id", entry_u32("", 1 << 31).1);
    refused("true or false", "tokenizer.ggml.add_space_prefix", entry_u32("", 1).1);
    refused("bad merge", "tokenizer.ggml.merges", texts(&["ab"]));
    refused("not a tokenizer", "tokenizer.ggml.merges", texts(&["ab ab"]));
    // Scores that are no numbers have an order, too.
    let mut file = sentencepiece();
    file.set(scores, list(6, &[f32::NAN; 10].map(float)));
    assert!(load_gguf(&file.bytes()).unwrap().tokenizer.is_some());
}

#[test]
fn any_byte_of_a_vocabulary_may_be_wrong() {
    let bytes = sentencepiece().bytes();
    let start = bytes.windows(9).position(|window| window == b"tokenizer").unwrap();
    let end = bytes.len() - GgufFile::good().tensors.len() * 64;
    let request = serde_json::from_value(json!({"id": "a", "text": "ab é <s>\n"})).unwrap();
    for at in start..end {
        for wrong in [0x00, 0xff, bytes[at] ^ 1] {
            let mut bytes = bytes.clone();
            bytes[at] = wrong;
            // Refused, or loaded without a tokenizer or with a strange one: no panic.
            if let Ok(model) = load_gguf(&bytes) {
                let _ = model.render(&request);
            }
        }
    }
}

#[test]
fn a_gguf_vocabulary_becomes_a_tokenizer() {
    let mut file = GgufFile::good();
    file.set("tokenizer.ggml.model", entry_text("", "gpt2").1);
    file.set("tokenizer.ggml.pre", entry_text("", "smollm").1);
    file.set("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<s>", "Ġ", "Ċ"]));
    file.set("tokenizer.ggml.merges", texts(&["a b"]));
    let types = [1i32, 1, 1, 3, 1, 1].map(|kind| kind.to_le_bytes().to_vec());
    file.set("tokenizer.ggml.token_type", list(5, &types));
    file.set("tokenizer.ggml.bos_token_id", entry_u32("", 3).1);
    file.set("tokenizer.ggml.eos_token_id", entry_u32("", 3).1);
    file.set("tokenizer.ggml.add_bos_token", typed(7, &[1]));
    let template = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}\n{% endfor %}";
    file.set("tokenizer.chat_template", entry_text("", template).1);
    let model = load_gguf(&file.bytes()).unwrap();
    assert_eq!(model.config.stop_tokens, [3]);

    let render = |json: Value| model.render(&serde_json::from_value(json).unwrap());
    let prompt = render(json!({"id": "a", "text": "ab <s>ba"})).unwrap();
    assert_eq!(prompt.tokens, [3, 2, 4, 3, 1, 0]);
    assert_eq!(prompt.pieces, ["<s>", "ab", " ", "<s>", "b", "a"]);
    let user = json!([{"role": "user", "content": " ab "}]);
    let prompt = render(json!({"id": "a", "messages": user, "prefill": "b"})).unwrap();
    assert_eq!((prompt.text.as_str(), &prompt.tokens[..]), ("<s>ab\nb", &[3, 2, 5, 1][..]));
    for (turn, want) in [("user.last", 1), ("assistant.last", 3)] {
        let marker = json!({"start_of": {"text": "b", "turn": turn}});
        assert_eq!(prompt.position(&serde_json::from_value(marker).unwrap()).unwrap(), want);
    }
    let refused = [
        (json!({"id": "a", "messages": user, "prefill": "b "}), "must not end with a blank"),
        (json!({"id": "a", "messages": user, "date": "today"}), "YYYY-MM-DD"),
        (json!({"id": "a", "messages": user, "thinking": "on"}), "no thinking switch"),
        (json!({"id": "a", "messages": []}), "no messages"),
        (json!({"id": "a", "messages": [{"role": "tool", "content": ""}]}), "unknown role"),
        (
            json!({"id": "a", "system": "", "messages": [{"role": "system", "content": ""},
                {"role": "user", "content": ""}]}),
            "two system messages",
        ),
        (
            json!({"id": "a", "messages": [{"role": "assistant", "content": "a"}], "prefill": "b"}),
            "after a final assistant message",
        ),
    ];
    for (json, cause) in refused {
        let message = render(json).unwrap_err().to_string();
        assert!(message.contains(cause), "want {cause:?} in:\n{message}");
    }
}

/// Files of Gemma and Phi-3 name one stop token and mean more.
#[test]
fn tokens_that_end_a_turn_by_their_text_are_stop_tokens() {
    let mut file = sentencepiece();
    let tokens =
        ["<unk>", "<s>", "<0x0A>", "▁", "a", "<|end|>", "▁a", "<end_of_turn>", "x", "<0xC3>"];
    file.set("tokenizer.ggml.tokens", texts(&tokens));
    file.set("tokenizer.ggml.eos_token_id", entry_u32("", 8).1);
    assert_eq!(load_gguf(&file.bytes()).unwrap().config.stop_tokens, [5, 7, 8]);
}
