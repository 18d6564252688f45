//! Damaged, lying and unsupported models are one clear error each, which names the file and the
//! cause; never a panic or a huge allocation.

use std::{
    fs,
    path::{Path, PathBuf},
};

use inkling::{
    error::Result,
    model::{Model, ModelConfig},
};
use serde_json::{Value, json};
use tempfile::TempDir;

// One block: width 8, two heads of width 4 with one key/value head, MLP width 6, 10 tokens.
const DIM: u64 = 8;
const KV: u64 = 4;
const FFN: u64 = 6;
const VOCAB: u64 = 10;
const F32: u32 = 0;

/// A GGUF file in parts, so that a test can change one.
struct GgufFile {
    magic: &'static [u8],
    version: u32,
    /// Added to the true counts.
    more_tensors: u64,
    more_entries: u64,
    metadata: Vec<(String, Vec<u8>)>,
    tensors: Vec<GgufTensor>,
    /// Cut from the end.
    cut: usize,
}

#[derive(Clone)]
struct GgufTensor {
    name: String,
    dimensions: Vec<u64>,
    kind: u32,
    /// Instead of the next free one.
    offset: Option<u64>,
    data: Vec<u8>,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

fn typed(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], bytes].concat()
}

fn entry_text(key: &str, value: &str) -> (String, Vec<u8>) {
    (key.into(), typed(8, &text(value)))
}

fn entry_u32(key: &str, value: u64) -> (String, Vec<u8>) {
    (key.into(), typed(4, &(value as u32).to_le_bytes()))
}

fn tensor(name: &str, dimensions: &[u64]) -> GgufTensor {
    let count: u64 = dimensions.iter().product();
    let data = (0..count).flat_map(|n| (n as f32).to_le_bytes()).collect();
    let dimensions = dimensions.to_vec();
    GgufTensor { name: name.into(), dimensions, kind: F32, offset: None, data }
}

impl GgufFile {
    fn good() -> Self {
        let sizes = [
            ("llama.block_count", 1),
            ("llama.embedding_length", DIM),
            ("llama.feed_forward_length", FFN),
            ("llama.attention.head_count", 2),
            ("llama.attention.head_count_kv", 1),
            ("llama.context_length", 32),
            ("llama.vocab_size", VOCAB),
            ("llama.rope.dimension_count", 4),
        ];
        let mut metadata = vec![entry_text("general.architecture", "llama")];
        metadata.extend(sizes.map(|(key, n)| entry_u32(key, n)));
        let eps = typed(6, &1e-5f32.to_le_bytes());
        metadata.push(("llama.attention.layer_norm_rms_epsilon".into(), eps));
        Self {
            magic: b"GGUF",
            version: 3,
            more_tensors: 0,
            more_entries: 0,
            metadata,
            tensors: vec![
                tensor("token_embd.weight", &[DIM, VOCAB]),
                tensor("output_norm.weight", &[DIM]),
                tensor("blk.0.attn_norm.weight", &[DIM]),
                tensor("blk.0.ffn_norm.weight", &[DIM]),
                tensor("blk.0.attn_q.weight", &[DIM, DIM]),
                tensor("blk.0.attn_k.weight", &[DIM, KV]),
                tensor("blk.0.attn_v.weight", &[DIM, KV]),
                tensor("blk.0.attn_output.weight", &[DIM, DIM]),
                tensor("blk.0.ffn_gate.weight", &[DIM, FFN]),
                tensor("blk.0.ffn_up.weight", &[DIM, FFN]),
                tensor("blk.0.ffn_down.weight", &[FFN, DIM]),
            ],
            cut: 0,
        }
    }

    fn set(&mut self, key: &str, value: Vec<u8>) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.into(), value));
    }

    fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).wrapping_add(self.more_tensors).to_le_bytes());
        out.extend((self.metadata.len() as u64).wrapping_add(self.more_entries).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(text(key));
            out.extend(value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            out.extend(text(&tensor.name));
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out.truncate(out.len() - self.cut);
        out
    }
}

/// Opens a model and takes every tensor that its configuration calls for, as the engine does.
fn load(path: &Path) -> Result<Model> {
    let model = Model::open(path)?;
    for (name, shape) in expected_tensors(&model.config) {
        let tensor = model.checkpoint.tensor(&name, &shape)?;
        let mut row = vec![0.0; tensor.cols()];
        tensor.read_row(tensor.rows() - 1, &mut row);
    }
    model.checkpoint.finish()?;
    Ok(model)
}

fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let ModelConfig { dim, ffn_dim: ffn, vocab, .. } = *config;
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, dim]),
        ("model.norm.weight".to_owned(), vec![dim]),
    ];
    if !config.tied_embeddings {
        all.push(("lm_head.weight".to_owned(), vec![vocab, dim]));
    }
    for layer in 0..config.layers {
        let block = [
            ("input_layernorm", vec![dim]),
            ("post_attention_layernorm", vec![dim]),
            ("self_attn.q_proj", vec![q, dim]),
            ("self_attn.k_proj", vec![kv, dim]),
            ("self_attn.v_proj", vec![kv, dim]),
            ("self_attn.o_proj", vec![dim, q]),
            ("mlp.gate_proj", vec![ffn, dim]),
            ("mlp.up_proj", vec![ffn, dim]),
            ("mlp.down_proj", vec![dim, ffn]),
        ];
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        all.extend(block.into_iter().map(|(part, shape)| (name(part), shape)));
    }
    all
}

fn load_gguf(bytes: &[u8]) -> Result<Model> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    load(&path)
}

fn assert_refused(result: Result<Model>, file: &str, cause: &str) {
    let message = match result {
        Ok(_) => panic!("accepted, instead of: {cause}"),
        Err(error) => error.to_string(),
    };
    assert!(message.contains(cause) && message.contains(file), "want {cause:?} in:\n{message}");
}

/// The good file with one change is refused, and the message says why.
fn refused_gguf(cause: &str, change: impl FnOnce(&mut GgufFile)) {
    let mut file = GgufFile::good();
    change(&mut file);
    assert_refused(load_gguf(&file.bytes()), "tiny.gguf", cause);
}

#[test]
fn a_good_gguf_file_loads() {
    let model = load_gguf(&GgufFile::good().bytes()).unwrap();
    assert_eq!((model.name.as_str(), model.config.head_dim), ("tiny.gguf", 4));
    assert!(model.config.tied_embeddings && model.tokenizer.is_none());

    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("one.gguf"), GgufFile::good().bytes()).unwrap();
    assert_eq!(load(folder.path()).unwrap().name, "one.gguf");
    fs::write(folder.path().join("two.GGUF"), GgufFile::good().bytes()).unwrap();
    let name = folder.path().file_name().unwrap().to_str().unwrap().to_owned();
    assert_refused(load(folder.path()), &name, "2 .gguf files");
}

#[test]
fn gguf_rows_of_q_and_k_are_put_back_in_halves() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, GgufFile::good().bytes()).unwrap();
    let model = Model::open(&path).unwrap();
    let rows = |name: &str, rows: usize| -> Vec<usize> {
        let tensor = model.checkpoint.tensor(name, &[rows, 8]).unwrap();
        let mut row = [0.0; 8];
        let mut first = |index| {
            tensor.read_row(index, &mut row);
            row[0] as usize / 8
        };
        (0..rows).map(&mut first).collect()
    };
    assert_eq!(rows("model.layers.0.self_attn.q_proj.weight", 8), [0, 2, 1, 3, 4, 6, 5, 7]);
    assert_eq!(rows("model.layers.0.self_attn.k_proj.weight", 4), [0, 2, 1, 3]);
    assert_eq!(rows("model.layers.0.self_attn.v_proj.weight", 4), [0, 1, 2, 3]);
}

#[test]
fn a_gguf_file_cut_anywhere_is_refused() {
    let bytes = GgufFile::good().bytes();
    // The last 16 bytes are padding after the last tensor's 192.
    for length in (0..bytes.len() - 32).step_by(7) {
        let message = load_gguf(&bytes[..length]).unwrap_err().to_string();
        assert!(message.contains("tiny.gguf"), "{length}: {message}");
    }
    refused_gguf("a tensor's data ends beyond the file", |file| file.cut = 64);
}

#[test]
fn any_byte_of_a_gguf_header_may_be_wrong() {
    let bytes = GgufFile::good().bytes();
    let header = bytes.len() - GgufFile::good().tensors.iter().map(|t| t.data.len()).sum::<usize>();
    for at in 0..header {
        for wrong in [0x00, 0x7f, 0xff, bytes[at] ^ 1] {
            let mut bytes = bytes.clone();
            bytes[at] = wrong;
            // Whether refused or, where the byte means little, loaded: no panic, no huge allocation.
            if let Err(error) = load_gguf(&bytes) {
                assert!(error.to_string().contains("tiny.gguf"), "{at}: {error}");
            }
        }
    }
}

#[test]
fn what_is_not_gguf_is_refused() {
    refused_gguf("not a GGUF file", |file| file.magic = b"GGML");
    refused_gguf("unsupported GGUF version", |file| file.version = 1);
    refused_gguf("big-endian", |file| file.version = 3u32.swap_bytes());
    assert_refused(load_gguf(b""), "tiny.gguf", "not a GGUF file");
    assert_refused(load(Path::new("no/such.gguf")), "no/such.gguf", "No such file");
}

#[test]
fn lying_gguf_counts_and_lengths_are_refused() {
    refused_gguf("too short for its tensor records", |file| file.more_tensors = 1 << 40);
    refused_gguf("too short for its metadata entries", |file| file.more_entries = u64::MAX / 2);
    refused_gguf("the file ends inside", |file| file.more_tensors = 3);
    let long = |n: u64| n.to_le_bytes();
    refused_gguf("the file ends inside a metadata value", |file| {
        file.set("general.name", typed(8, &long(u64::MAX)));
    });
    refused_gguf("too short for its list", |file| {
        file.set("x", typed(9, &typed(10, &long(1 << 50))));
    });
    refused_gguf("unknown metadata type", |file| file.set("x", typed(13, &[0; 8])));
    refused_gguf("unknown metadata type", |file| file.set("x", typed(9, &typed(9, &long(1)))));
    refused_gguf("bad truth value", |file| file.set("x", typed(7, &[2])));
    refused_gguf("not UTF-8", |file| file.set("x", typed(8, &[&long(2)[..], &[0xff; 2]].concat())));
    refused_gguf("a metadata key stands twice", |file| {
        file.metadata.push(entry_text("general.architecture", "llama"));
    });
    refused_gguf("bad alignment", |file| file.set("general.alignment", entry_u32("", 0).1));
    refused_gguf("bad alignment", |file| file.set("general.alignment", entry_u32("", 48).1));
}

#[test]
fn lying_gguf_tensor_records_are_refused() {
    let q = "blk.0.attn_q.weight";
    refused_gguf("is not aligned", |file| file.tensor(q).offset = Some(1));
    refused_gguf("ends beyond the file", |file| file.tensor(q).offset = Some(1 << 40));
    refused_gguf("ends beyond the file", |file| file.tensor(q).offset = Some(u64::MAX - 31));
    refused_gguf("two tensors overlap", |file| file.tensor(q).offset = Some(0));
    refused_gguf("a tensor's name stands twice", |file| {
        let copy = file.tensor(q).clone();
        file.tensors.push(copy);
    });
    refused_gguf("bad number of dimensions", |file| file.tensor(q).dimensions = vec![2; 5]);
    refused_gguf("bad number of dimensions", |file| file.tensor(q).dimensions = vec![]);
    for dimensions in [vec![8, 0], vec![1 << 40, 1 << 40], vec![u64::MAX, 2]] {
        refused_gguf("a tensor's shape cannot be", |file| file.tensor(q).dimensions = dimensions);
    }
    refused_gguf("a tensor's shape cannot be", |file| file.tensor(q).kind = 8);
}

#[test]
fn unsupported_gguf_models_are_refused_by_name() {
    let q = "blk.0.attn_q.weight";
    let architecture = "general.architecture";
    refused_gguf("Q4_K", |file| file.tensor(q).kind = 12);
    refused_gguf("type 99", |file| file.tensor(q).kind = 99);
    refused_gguf("falcon", |file| file.set(architecture, entry_text("", "falcon").1));
    refused_gguf("got:      none", |file| file.metadata.retain(|(key, _)| key != architecture));
    refused_gguf("rope_freqs.weight", |file| file.tensors.push(tensor("rope_freqs.weight", &[2])));
    let texts = [("llama.rope.scaling.type", "yarn"), ("llama.attention.head_count", "two")];
    for (key, value) in texts {
        refused_gguf(key, |file| file.set(key, entry_text("", value).1));
    }
    let numbers = [
        ("llama.rope.dimension_count", 2),
        ("llama.expert_count", 8),
        ("llama.attention.value_length", 8),
    ];
    for (key, value) in numbers {
        refused_gguf(key, |file| file.set(key, entry_u32("", value).1));
    }
    refused_gguf("llama.block_count", |file| {
        file.metadata.retain(|(key, _)| key != "llama.block_count");
    });
    refused_gguf("query heads", |file| file.set("llama.attention.head_count", entry_u32("", 0).1));
}

#[test]
fn missing_extra_and_misshapen_gguf_tensors_are_refused_by_name() {
    refused_gguf("model.layers.0.mlp.up_proj.weight", |file| {
        file.tensors.retain(|tensor| tensor.name != "blk.0.ffn_up.weight");
    });
    refused_gguf("blk.0.attn_q.bias", |file| file.tensors.push(tensor("blk.0.attn_q.bias", &[8])));
    refused_gguf("blk.1.attn_norm", |file| {
        // A block more than the metadata says keeps its canonical name.
        file.tensors.push(tensor("blk.1.attn_norm_2.weight", &[8]));
    });
    refused_gguf("model.layers.1.input_layernorm.weight", |file| {
        file.tensors.push(tensor("blk.1.attn_norm.weight", &[8]));
    });
    refused_gguf("[10, 8]", |file| {
        *file.tensor("token_embd.weight") = tensor("token_embd.weight", &[8, 9])
    });
    refused_gguf("a multiple of 4 rows", |file| {
        *file.tensor("blk.0.attn_q.weight") = tensor("blk.0.attn_q.weight", &[8, 7]);
    });
    refused_gguf("stands twice under two names", |file| {
        file.tensors.push(tensor("model.norm.weight", &[8]));
    });
}

#[test]
fn a_gguf_tokenizer_of_another_kind_leaves_prompts_of_token_ids() {
    let mut file = GgufFile::good();
    file.set("tokenizer.ggml.model", entry_text("", "llama").1);
    let model = load_gguf(&file.bytes()).unwrap();
    let request = |json: Value| serde_json::from_value(json).unwrap();
    let prompt = model.render(&request(json!({"id": "a", "tokens": [1, 9]}))).unwrap();
    assert_eq!((prompt.tokens, prompt.pieces), (vec![1, 9], vec!["<1>".into(), "<9>".to_owned()]));
    let refused = [
        (json!({"id": "a", "text": "hi"}), "only `gpt2`"),
        (json!({"id": "a", "messages": [{"role": "user", "content": "x"}]}), "no chat template"),
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
        let list = |values: &[&str]| {
            let values: Vec<u8> = values.iter().flat_map(|value| text(value)).collect();
            typed(9, &typed(8, &[&2u64.to_le_bytes()[..], &values].concat()))
        };
        file.set("tokenizer.ggml.model", entry_text("", "gpt2").1);
        file.set("tokenizer.ggml.pre", entry_text("", pre).1);
        file.set("tokenizer.ggml.tokens", list(&["a", "b"]));
        file.set("tokenizer.ggml.merges", list(&["a b", merge]));
        load_gguf(&file.bytes())
    };
    let message =
        vocabulary("viking", "a").unwrap().render(&request(json!({"id": "a", "text": "x"})));
    assert!(message.unwrap_err().to_string().contains("`viking`"));
    assert_refused(vocabulary("gpt-2", "a"), "tiny.gguf", "tokenizer.ggml.token_type");
}

/// A Hugging Face folder: `config.json` and the tensors of one safetensors file.
struct Folder {
    config: Value,
    /// Name, dtype, shape, bytes.
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
    /// Changes the header before it is written.
    header: fn(&mut Value),
    /// Changes the whole file.
    file: fn(&mut Vec<u8>),
}

impl Folder {
    fn good() -> Self {
        let config = json!({
            "model_type": "llama", "hidden_size": DIM, "num_attention_heads": 2,
            "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": FFN,
            "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "max_position_embeddings": 32,
            "tie_word_embeddings": true
        });
        let parsed = ModelConfig {
            architecture: "llama".into(),
            layers: 1,
            dim: DIM as usize,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            ffn_dim: FFN as usize,
            vocab: VOCAB as usize,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            context: 32,
            tied_embeddings: true,
            stop_tokens: Vec::new(),
        };
        let tensors =
            expected_tensors(&parsed).into_iter().map(|(name, shape)| plain(&name, &shape));
        Self { config, tensors: tensors.collect(), header: |_| {}, file: |_| {} }
    }

    fn safetensors(
        tensors: &[(String, &str, Vec<usize>, Vec<u8>)],
        change: fn(&mut Value),
    ) -> Vec<u8> {
        let mut header = json!({"__metadata__": {"format": "pt"}});
        let mut data: Vec<u8> = Vec::new();
        for (name, dtype, shape, bytes) in tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            data.extend(bytes);
        }
        change(&mut header);
        let header = header.to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
    }

    fn load(&self) -> Result<Model> {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        let mut bytes = Self::safetensors(&self.tensors, self.header);
        (self.file)(&mut bytes);
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        load(folder.path())
    }
}

fn plain(name: &str, shape: &[usize]) -> (String, &'static str, Vec<usize>, Vec<u8>) {
    let bytes = vec![0; 4 * shape.iter().product::<usize>()];
    (name.to_owned(), "F32", shape.to_vec(), bytes)
}

fn refused_folder(file: &str, cause: &str, change: impl FnOnce(&mut Folder)) {
    let mut folder = Folder::good();
    change(&mut folder);
    assert_refused(folder.load(), file, cause);
}

#[test]
fn a_good_folder_loads() {
    assert_eq!(Folder::good().load().unwrap().config.head_dim, 4);
    let mut folder = Folder::good();
    folder.tensors.push(plain("model.layers.0.self_attn.rotary_emb.inv_freq", &[2]));
    folder.load().unwrap();
}

#[test]
fn lying_safetensors_are_refused() {
    let file = "model.safetensors";
    refused_folder(file, "longer than can be", |f| f.file = |bytes| bytes[..8].fill(0xff));
    refused_folder(file, "longer than can be", |f| f.file = |bytes| bytes.truncate(20));
    refused_folder(file, "not a safetensors file", |f| f.file = |bytes| bytes.truncate(5));
    refused_folder(file, "is not JSON", |f| f.file = |bytes| bytes[8] = b'x');
    refused_folder(file, "outside the file", |f| f.file = |bytes| bytes.truncate(bytes.len() - 4));
    refused_folder(file, "does not end with its last tensor", |f| f.file = |bytes| bytes.push(0));
    refused_folder(file, "does not fit its bytes", |f| {
        f.header = |header| header["model.norm.weight"]["shape"] = json!([9]);
    });
    refused_folder(file, "does not fit its bytes", |f| {
        f.header = |header| header["model.norm.weight"]["shape"] = json!([1u64 << 62, 4]);
    });
    refused_folder(file, "outside the file", |f| {
        f.header = |header| header["model.norm.weight"]["data_offsets"] = json!([0, u64::MAX]);
    });
    refused_folder(file, "overlap or leave a gap", |f| {
        f.header = |header| header["model.norm.weight"]["data_offsets"] = json!([0, 32]);
    });
    refused_folder(file, "overlap or leave a gap", |f| {
        f.header = |header| {
            header.as_object_mut().unwrap().remove("model.norm.weight");
        };
    });
    refused_folder(file, "bad tensor record", |f| {
        f.header = |header| header["model.norm.weight"] = json!([]);
    });
    refused_folder(file, "I64", |f| {
        f.header = |header| header["model.norm.weight"]["dtype"] = json!("I64");
    });
}

#[test]
fn missing_extra_and_misshapen_tensors_are_refused_by_name() {
    refused_folder("", "model.norm.weight", |f| f.tensors.retain(|t| t.0 != "model.norm.weight"));
    refused_folder("", "model.extra.weight", |f| f.tensors.push(plain("model.extra.weight", &[3])));
    refused_folder("", "[8, 6]", |f| {
        f.tensors.retain(|t| t.0 != "model.layers.0.mlp.down_proj.weight");
        f.tensors.push(plain("model.layers.0.mlp.down_proj.weight", &[6, 8]));
    });
    refused_folder("", "lm_head.weight", |f| f.config["tie_word_embeddings"] = json!(false));
    refused_folder("config.json", "unsupported architecture", |f| {
        f.config["model_type"] = json!("mamba");
    });
    refused_folder("config.json", "missing in the model's configuration", |f| {
        f.config["hidden_size"] = Value::Null;
    });
}

#[test]
fn a_tied_output_matrix_must_be_the_embedding() {
    let mut folder = Folder::good();
    folder.tensors.push(plain("lm_head.weight", &[10, 8]));
    folder.load().unwrap();
    refused_folder("lm_head.weight", "an output matrix of its own", |f| {
        let mut output = plain("lm_head.weight", &[10, 8]);
        output.3[5] = 1;
        f.tensors.push(output);
    });
}

#[test]
fn shards_and_their_index_must_agree() {
    let good = Folder::good();
    let (first, second) = good.tensors.split_at(4);
    let load_with = |change: fn(&mut Value)| {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| -> PathBuf { folder.path().join(name) };
        let mut map = json!({});
        for (shard, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
            fs::write(path(shard), Folder::safetensors(tensors, |_| {})).unwrap();
            tensors.iter().for_each(|tensor| map[&tensor.0] = json!(shard));
        }
        change(&mut map);
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(path("model.safetensors.index.json"), index).unwrap();
        fs::write(path("config.json"), good.config.to_string()).unwrap();
        load(folder.path())
    };
    load_with(|_| {}).unwrap();
    let moved = load_with(|map| map["model.norm.weight"] = json!("b.safetensors"));
    assert_refused(moved, "a.safetensors", "does not place there");
    let lacking = load_with(|map| map["model.more.weight"] = json!("b.safetensors"));
    assert_refused(lacking, "b.safetensors", "lacks a tensor");
    let outside = load_with(|map| map["x"] = json!("../a.safetensors"));
    assert_refused(outside, "index.json", "not a plain file name");
    let absent = load_with(|map| map["x"] = json!("c.safetensors"));
    assert_refused(absent, "c.safetensors", "No such file");
}

#[test]
fn a_folder_without_a_model_is_refused() {
    let folder = TempDir::new().unwrap();
    let name = folder.path().file_name().unwrap().to_str().unwrap().to_owned();
    assert_refused(load(folder.path()), &name, "0 .gguf files");
    fs::write(folder.path().join("config.json"), "{").unwrap();
    assert_refused(load(folder.path()), "config.json", "not JSON");
    fs::write(folder.path().join("config.json"), Folder::good().config.to_string()).unwrap();
    assert_refused(load(folder.path()), &name, "no weights");
}
