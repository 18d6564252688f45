//! GGUF files.

use std::{fs, path::Path};

use inkling::{error::Result, model::Model};
use tempfile::TempDir;

use crate::{DIM, FFN, KV, VOCAB, assert_refused, load};

const F32: u32 = 0;

/// A GGUF file in parts, so that a test can change one.
pub struct GgufFile {
    pub magic: &'static [u8],
    pub version: u32,
    /// Added to the true counts.
    more_tensors: u64,
    more_entries: u64,
    pub metadata: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<GgufTensor>,
    /// Cut from the end.
    cut: usize,
}

#[derive(Clone)]
pub struct GgufTensor {
    pub name: String,
    pub dimensions: Vec<u64>,
    kind: u32,
    /// Instead of the next free one.
    offset: Option<u64>,
    pub data: Vec<u8>,
}

pub fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

pub fn typed(kind: u32, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], bytes].concat()
}

pub fn entry_text(key: &str, value: &str) -> (String, Vec<u8>) {
    (key.into(), typed(8, &text(value)))
}

pub fn entry_u32(key: &str, value: u64) -> (String, Vec<u8>) {
    (key.into(), typed(4, &(value as u32).to_le_bytes()))
}

pub fn tensor(name: &str, dimensions: &[u64]) -> GgufTensor {
    let count: u64 = dimensions.iter().product();
    let data = (0..count).flat_map(|n| (n as f32).to_le_bytes()).collect();
    let dimensions = dimensions.to_vec();
    GgufTensor { name: name.into(), dimensions, kind: F32, offset: None, data }
}

impl GgufFile {
    pub fn good() -> Self {
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

    pub fn set(&mut self, key: &str, value: Vec<u8>) {
        self.metadata.retain(|(name, _)| name != key);
        self.metadata.push((key.into(), value));
    }

    pub fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
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

pub fn load_gguf(bytes: &[u8]) -> Result<Model> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tiny.gguf");
    fs::write(&path, bytes).unwrap();
    load(&path)
}

/// The good file with one change is refused, and the message says why.
pub fn refused_gguf(cause: &str, change: impl FnOnce(&mut GgufFile)) {
    let mut file = GgufFile::good();
    change(&mut file);
    assert_refused(load_gguf(&file.bytes()), "tiny.gguf", cause);
}

#[test]
fn a_good_gguf_file_loads() {
    let model = load_gguf(&GgufFile::good().bytes()).unwrap();
    assert_eq!((model.name.as_str(), model.config.head_dim), ("tiny.gguf", 4));
    assert!(model.config.tied_embeddings && model.tokenizer.is_none());

    // Version 2 is laid out alike.
    let mut old = GgufFile::good();
    old.version = 2;
    assert!(load_gguf(&old.bytes()).is_ok());

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
    refused_gguf("got:      1", |file| file.version = 1);
    refused_gguf("got:      4", |file| file.version = 4);
    refused_gguf("big-endian", |file| file.version = 3u32.swap_bytes());
    assert_refused(load_gguf(b""), "tiny.gguf", "not a GGUF file");
    assert_refused(load(Path::new("no/such.gguf")), "no/such.gguf", "No such file");
}

#[test]
fn lying_gguf_counts_and_lengths_are_refused() {
    refused_gguf("too short for its tensor records", |file| file.more_tensors = 1 << 40);
    refused_gguf("too short for its metadata entries", |file| file.more_entries = u64::MAX / 2);
    refused_gguf("tensor record 11", |file| file.more_tensors = 3);
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
    // Rows of 8 are no whole blocks of 32 or 256.
    for kind in [8, 6, 14] {
        refused_gguf("a tensor's shape cannot be", |file| file.tensor(q).kind = kind);
    }
}

#[test]
fn unsupported_gguf_models_are_refused_by_name() {
    let q = "blk.0.attn_q.weight";
    let architecture = "general.architecture";
    refused_gguf("got:      IQ4_XS", |file| file.tensor(q).kind = 23);
    refused_gguf("Q5_K, Q6_K", |file| file.tensor(q).kind = 23);
    refused_gguf("type 99", |file| file.tensor(q).kind = 99);
    refused_gguf("falcon", |file| file.set(architecture, entry_text("", "falcon").1));
    refused_gguf("got:      none", |file| file.metadata.retain(|(key, _)| key != architecture));
    refused_gguf("rope_freqs.weight", |file| file.tensors.push(tensor("rope_freqs.weight", &[3])));
    // Factors of zero.
    refused_gguf("rope frequency", |file| file.tensors.push(tensor("rope_freqs.weight", &[2])));
    for key in ["attn_logit_softcapping", "rope.freq_base_swa"] {
        let key = format!("llama.{key}");
        refused_gguf(&key, |file| file.set(&key, typed(6, &9f32.to_le_bytes())));
    }
    refused_gguf("beside the file's own factors", |file| {
        file.tensors.push(tensor("rope_freqs.weight", &[2]));
        file.set("llama.rope.scaling.type", entry_text("", "linear").1);
    });
    let texts = [("llama.rope.scaling.type", "mrope"), ("llama.attention.head_count", "two")];
    for (key, value) in texts {
        refused_gguf(key, |file| file.set(key, entry_text("", value).1));
    }
    let numbers = [
        ("llama.attention.sliding_window_pattern", 1 << 30),
        ("llama.block_count", 1 << 20),
        ("llama.attention.value_length", 8),
    ];
    for (key, value) in numbers {
        refused_gguf(key, |file| file.set(key, entry_u32("", value).1));
    }
    refused_gguf("llama.expert_used_count", |file| {
        file.set("llama.expert_count", entry_u32("", 8).1);
    });
    refused_gguf("turned part of a head", |file| {
        file.set("llama.rope.dimension_count", entry_u32("", 3).1);
    });
    refused_gguf("llama.block_count", |file| {
        file.metadata.retain(|(key, _)| key != "llama.block_count");
    });
    refused_gguf("llama.attention.head_count", |file| {
        file.set("llama.attention.head_count", entry_u32("", 0).1);
    });
}

#[test]
fn missing_extra_and_misshapen_gguf_tensors_are_refused_by_name() {
    refused_gguf("model.layers.0.mlp.up_proj.weight", |file| {
        file.tensors.retain(|tensor| tensor.name != "blk.0.ffn_up.weight");
    });
    refused_gguf("self_attn.q_proj.bias", |file| {
        file.tensors.push(tensor("blk.0.attn_q.bias", &[8]));
    });
    refused_gguf("blk.1.attn_norm", |file| {
        // A block more than the metadata says keeps its canonical name.
        file.tensors.push(tensor("blk.1.attn_norm_2.weight", &[8]));
    });
    refused_gguf("model.layers.1.input_layernorm.weight", |file| {
        file.tensors.push(tensor("blk.1.attn_norm.weight", &[8]));
    });
    refused_gguf("[10, 8]", |file| {
        *file.tensor("token_embd.weight") = tensor("token_embd.weight", &[8, 9]);
    });
    refused_gguf("a multiple of 4 rows", |file| {
        *file.tensor("blk.0.attn_q.weight") = tensor("blk.0.attn_q.weight", &[8, 7]);
    });
    refused_gguf("stands twice under two names", |file| {
        file.tensors.push(tensor("model.norm.weight", &[8]));
    });
}

#[test]
fn a_factor_without_a_type_is_linear() {
    let mut file = GgufFile::good();
    let plain = load_gguf(&file.bytes()).unwrap().config.rope;
    file.set("llama.rope.scaling.factor", typed(6, &4f32.to_le_bytes()));
    let scaled = load_gguf(&file.bytes()).unwrap().config.rope;
    assert_eq!(scaled.frequencies[0], plain.frequencies[0] / 4.0);
}
