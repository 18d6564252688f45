//! Damaged, lying and unsupported models are one clear error each, which names the file and the
//! cause; never a panic or a huge allocation.

mod folder;
mod gguf;
mod parts;
mod vocabulary;

use std::path::Path;

use inkling::{
    error::Result,
    model::{Model, ModelConfig},
};

// One block: width 8, two heads of width 4 with one key/value head, MLP width 6, 10 tokens.
const DIM: u64 = 8;
const KV: u64 = 4;
const FFN: u64 = 6;
const VOCAB: u64 = 10;

/// Opens a model and takes every tensor that its configuration calls for, as the engine does.
fn load(path: &Path) -> Result<Model> {
    let model = Model::open(path)?;
    for_each_tensor(&model.config, |name, shape| {
        let tensor = model.checkpoint.tensor(&name, &shape)?;
        let mut row = vec![0.0; tensor.cols()];
        tensor.read_row(tensor.rows() - 1, &mut row);
        Ok(())
    })?;
    model.checkpoint.finish()?;
    Ok(model)
}

/// Every tensor's name and shape, block by block.
fn for_each_tensor(
    config: &ModelConfig,
    mut each: impl FnMut(String, Vec<usize>) -> Result<()>,
) -> Result<()> {
    let ModelConfig { dim, ffn_dim: ffn, vocab, .. } = *config;
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    each("model.embed_tokens.weight".into(), vec![vocab, dim])?;
    each("model.norm.weight".into(), vec![dim])?;
    if !config.tied_embeddings {
        each("lm_head.weight".into(), vec![vocab, dim])?;
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
        for (part, shape) in block {
            each(format!("model.layers.{layer}.{part}.weight"), shape)?;
        }
    }
    Ok(())
}

fn assert_refused(result: Result<Model>, file: &str, cause: &str) {
    let message = match result {
        Ok(_) => panic!("accepted, instead of: {cause}"),
        Err(error) => error.to_string(),
    };
    assert!(message.contains(cause) && message.contains(file), "want {cause:?} in:\n{message}");
}
