//! Hugging Face folders.

use std::{fs, path::PathBuf};

use inkling::{
    error::Result,
    model::{Model, ModelConfig, Shape},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{DIM, FFN, VOCAB, assert_refused, for_each_tensor, load};

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
        let shape = Shape {
            layers: 1,
            dim: DIM as usize,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            ffn_dim: FFN as usize,
            vocab: VOCAB as usize,
        };
        let parsed = ModelConfig::llama(shape, 32, 1e4);
        let mut tensors = Vec::new();
        let push = |name: String, shape: Vec<usize>| {
            tensors.push(plain(&name, &shape));
            Ok(())
        };
        for_each_tensor(&parsed, push).unwrap();
        Self { config, tensors, header: |_| {}, file: |_| {} }
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
