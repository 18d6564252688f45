//! Models whose weights are written by hand, so that what they do about an injected thought is known.
//!
//! The stream has a dimension for each token (where it stands), one for each word that can be thought of,
//! one that says "something is odd", and many that nothing reads. Block 0's attention looks at all positions
//! alike and writes the words that it sees into the thoughts' dimensions; block 1's MLP measures what is
//! there beside tokens. The output matrix is a table of which token follows which, and what thoughts add.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, Value, json};

/// Width of the stream.
const DIM: usize = 512;
const HEAD_DIM: usize = 32;
/// Logit of what follows a token.
const NEXT: f32 = 14.0;
/// What a thought of a word adds to the word's logit.
const NAMES: f32 = 6.0;

/// The words that can be thought of.
pub const WORDS: [&str; 20] = [
    "bread",
    "snow",
    "dust",
    "milk",
    "sugar",
    "poetry",
    "silver",
    "rubber",
    "plastic",
    "memories",
    "oceans",
    "deserts",
    "mirrors",
    "cameras",
    "trumpets",
    "fountains",
    "lightning",
    "algorithms",
    "quarries",
    "origami",
];
const SPECIAL: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
const TALK: [&str; 14] = [
    "[UNK]",
    "Yes",
    "No",
    "I",
    "detect",
    "an",
    "injected",
    "thought",
    "about",
    ".",
    "am",
    "thinking",
    "assistant",
    "user",
];

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Says yes where it thinks of a word, and names it.
    Detector,
    /// Says yes where anything is odd, and names any word.
    YesBiased,
    /// Says no, and writes the word that it thinks of.
    Namer,
    /// Says yes as often as no, and names any word.
    Null,
}

fn token(word: &str) -> usize {
    let all = SPECIAL.iter().chain(&TALK).chain(&WORDS);
    all.into_iter().position(|known| *known == word).expect("a token")
}

fn vocab() -> usize {
    SPECIAL.len() + TALK.len() + WORDS.len()
}

/// The dimension of a thought.
fn thought(word: usize) -> usize {
    vocab() + word
}

fn odd() -> usize {
    vocab() + WORDS.len()
}

/// A matrix of (rows, columns).
struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self { columns, values: vec![0.0; rows * columns] }
    }

    fn set(&mut self, row: usize, column: usize, value: f32) {
        self.values[row * self.columns + column] = value;
    }
}

/// Writes the model's folder.
pub fn write(folder: &Path, kind: Kind) {
    let dim = DIM;
    let vocab = vocab();
    let ffn = DIM - vocab;
    let root = (dim as f32).sqrt();
    let mut tensors: HashMap<String, Matrix> = HashMap::new();
    // A token's row has norm 1, so that its normalised row has √DIM where it stands.
    let mut embedding = Matrix::zeros(vocab, dim);
    (0..vocab).for_each(|id| embedding.set(id, id, 1.0));
    tensors.insert("model.embed_tokens.weight".into(), embedding);
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let mut insert = |part: &str, matrix| tensors.insert(name(part), matrix);
        insert("self_attn.q_proj", Matrix::zeros(HEAD_DIM, dim));
        insert("self_attn.k_proj", Matrix::zeros(HEAD_DIM, dim));
        let (mut values, mut out) = (Matrix::zeros(HEAD_DIM, dim), Matrix::zeros(dim, HEAD_DIM));
        if layer == 0 {
            for (at, word) in WORDS.iter().enumerate() {
                values.set(at, token(word), 1.0 / root);
                out.set(thought(at), at, 1.0);
            }
        }
        insert("self_attn.v_proj", values);
        insert("self_attn.o_proj", out);
        let (mut read, mut down) = (Matrix::zeros(ffn, dim), Matrix::zeros(dim, ffn));
        if layer == 1 && kind == Kind::YesBiased {
            // silu(x)·x of each: half of x² for either sign, all of it for a large positive one.
            for unit in 0..ffn {
                read.set(unit, vocab + unit, 1.0);
                down.set(odd(), unit, 2.0 / dim as f32);
            }
        }
        insert("mlp.up_proj", Matrix { columns: dim, values: read.values.clone() });
        insert("mlp.gate_proj", read);
        insert("mlp.down_proj", down);
    }
    tensors.insert("lm_head.weight".into(), head(kind, root));
    let mut data: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, matrix)| {
            let shape = vec![matrix.values.len() / matrix.columns, matrix.columns];
            (name, shape, matrix.values.iter().flat_map(|value| value.to_le_bytes()).collect())
        })
        .collect();
    let ones: Vec<u8> = vec![1.0_f32; dim].iter().flat_map(|value| value.to_le_bytes()).collect();
    let norms = (0..2).flat_map(|layer| {
        ["input_layernorm", "post_attention_layernorm"]
            .map(|part| format!("model.layers.{layer}.{part}.weight"))
    });
    for name in norms.chain(["model.norm.weight".to_owned()]) {
        data.push((name, vec![dim], ones.clone()));
    }
    let views = data.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs_err::write(folder.join("model.safetensors"), bytes).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": dim, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": HEAD_DIM, "num_hidden_layers": 2,
        "intermediate_size": ffn, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": false,
        "hidden_act": "silu", "eos_token_id": token("<|im_end|>"),
    });
    fs_err::write(folder.join("config.json"), config.to_string()).unwrap();
    fs_err::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let template = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let config = json!({"chat_template": template, "eos_token": "<|im_end|>"});
    fs_err::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// (vocab, DIM): what follows what.
fn head(kind: Kind, root: f32) -> Matrix {
    let mut head = Matrix::zeros(vocab(), DIM);
    let mut follows = |from: &str, to: &str, logit: f32| {
        head.set(token(to), token(from), logit / root);
    };
    for pair in ["detect", "an", "injected", "thought", "about"].windows(2) {
        follows(pair[0], pair[1], NEXT);
    }
    follows("Yes", "I", NEXT);
    follows("am", "thinking", NEXT);
    follows("thinking", "about", NEXT);
    follows("I", if kind == Kind::Namer { "am" } else { "detect" }, NEXT);
    follows("No", if kind == Kind::Namer { "I" } else { "." }, NEXT);
    follows(".", "<|im_end|>", NEXT);
    for word in WORDS {
        follows("about", word, NEXT);
        follows(word, ".", NEXT);
    }
    // The answer's first token.
    follows("assistant", "No", NEXT);
    let yes = match kind {
        Kind::Null => NEXT,
        // Some clean replies say yes: what is likely without an injection is what they set.
        Kind::Detector => NEXT - 2.0,
        Kind::YesBiased => NEXT - 4.0,
        Kind::Namer => NEXT - 7.0,
    };
    follows("assistant", "Yes", yes);
    for (at, word) in WORDS.iter().enumerate() {
        if matches!(kind, Kind::Detector | Kind::Namer) {
            head.set(token(word), thought(at), NAMES / root);
        }
        if kind == Kind::Detector {
            head.set(token("Yes"), thought(at), 10.0 / root);
        }
    }
    if kind == Kind::YesBiased {
        head.set(token("Yes"), odd(), 20.0 / root);
    }
    head
}

/// Words and signs are tokens; what it doesn't know is one.
fn tokenizer() -> Value {
    let all = SPECIAL.iter().chain(&TALK).chain(&WORDS);
    let vocab: Map<String, Value> =
        all.into_iter().enumerate().map(|(id, word)| ((*word).to_owned(), json!(id))).collect();
    let added = SPECIAL.iter().map(|content| {
        json!({
            "id": token(content), "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        })
    });
    json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    })
}
