//! Reads a Hugging Face folder and a request's injections for the reference.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::ops::{Change, Matrix, Mode};
use super::{Block, Config, Injection, Transformer};
use crate::common::{Tensor, read_tensors};

/// A folder of a small Llama model, in one file or in shards.
pub fn model(folder: &Path) -> Transformer {
    let text = fs_err::read_to_string(folder.join("config.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let config = config(&json);
    let mut weights = Weights(all_weights(folder));
    let blocks = (0..config.layers).map(|layer| block(&mut weights, layer)).collect();
    let embed = weights.matrix("model.embed_tokens");
    let tied = json["tie_word_embeddings"].as_bool().unwrap();
    let head = if tied { embed.clone() } else { weights.matrix("lm_head") };
    let final_norm = weights.gain("model.norm");
    assert!(weights.0.is_empty(), "unused weights: {:?}", weights.0.keys());
    Transformer { config, embed, blocks, final_norm, head }
}

fn config(json: &Value) -> Config {
    let size = |key: &str| json[key].as_u64().map(|n| n as usize);
    let heads = size("num_attention_heads").unwrap();
    let theta = json["rope_theta"].as_f64().or(json["rope_parameters"]["rope_theta"].as_f64());
    Config {
        layers: size("num_hidden_layers").unwrap(),
        heads,
        kv_heads: size("num_key_value_heads").unwrap(),
        head_dim: size("head_dim").unwrap_or_else(|| size("hidden_size").unwrap() / heads),
        eps: json["rms_norm_eps"].as_f64().unwrap(),
        theta: theta.unwrap() as f32,
    }
}

/// The tensors of every `model*.safetensors`.
fn all_weights(folder: &Path) -> BTreeMap<String, Tensor> {
    let mut weights = BTreeMap::new();
    for entry in fs_err::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if name.starts_with("model") && path.extension().is_some_and(|e| e == "safetensors") {
            weights.extend(read_tensors(&path));
        }
    }
    weights
}

/// Tensors not taken yet.
struct Weights(BTreeMap<String, Tensor>);

impl Weights {
    fn take(&mut self, name: &str) -> Tensor {
        let name = format!("{name}.weight");
        self.0.remove(&name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn matrix(&mut self, name: &str) -> Matrix {
        let tensor = self.take(name);
        let [rows, cols] = tensor.shape[..] else { panic!("{name} is {:?}", tensor.shape) };
        Matrix { rows, cols, data: widen(&tensor.data) }
    }

    fn gain(&mut self, name: &str) -> Vec<f64> {
        widen(&self.take(name).data)
    }
}

fn block(weights: &mut Weights, layer: usize) -> Block {
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    Block {
        attn_norm: weights.gain(&name("input_layernorm")),
        q: weights.matrix(&name("self_attn.q_proj")),
        k: weights.matrix(&name("self_attn.k_proj")),
        v: weights.matrix(&name("self_attn.v_proj")),
        o: weights.matrix(&name("self_attn.o_proj")),
        mlp_norm: weights.gain(&name("post_attention_layernorm")),
        gate: weights.matrix(&name("mlp.gate_proj")),
        up: weights.matrix(&name("mlp.up_proj")),
        down: weights.matrix(&name("mlp.down_proj")),
    }
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// The token ids of a request with `tokens`.
pub fn tokens(request: &Value) -> Vec<u32> {
    let ids = request["tokens"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A request's injections; vector files are looked up in `folder`. `Mode::Reference` still wants
/// its norm.
pub fn injections(request: &Value, folder: &Path) -> Vec<Injection> {
    let length = tokens(request).len();
    let parts = request["inject"].as_array().unwrap();
    parts.iter().map(|part| injection(part, length, folder)).collect()
}

fn injection(part: &Value, length: usize, folder: &Path) -> Injection {
    let edge = |key: &str, absent: usize| match part[key].as_i64() {
        None => absent,
        Some(at) if at < 0 => length - at.unsigned_abs() as usize,
        Some(at) => at as usize,
    };
    let layer = part["layer"].as_u64().unwrap() as usize;
    let (file, name) = part["vector"].as_str().unwrap().split_once('#').unwrap();
    let tensor = &read_tensors(&folder.join(file))[name];
    let own_row = if tensor.shape.len() == 1 { 0 } else { layer };
    Injection {
        site: format!("{}.{layer}", part["site"].as_str().unwrap()),
        change: Change {
            vector: widen(tensor.rows().nth(own_row).unwrap()),
            strength: part["strength"].as_f64().unwrap(),
            mode: match part["strength_mode"].as_str().unwrap() {
                "raw" => Mode::Raw,
                "unit" => Mode::Unit,
                "reference" => Mode::Reference(f64::NAN),
                "row" => Mode::Row,
                other => panic!("strength_mode {other}"),
            },
        },
        from: edge("from", 0),
        to: edge("to", usize::MAX),
    }
}
