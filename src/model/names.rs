//! Names of tensors: those of GGUF files and of some Hugging Face folders, as the canonical ones.

use super::{
    checkpoint::{EMBEDDING, OUTPUT},
    config::{ModelConfig, Norms},
};

/// llama.cpp's and our names of a block's tensors.
const BLOCK_NAMES: [(&str, &str); 18] = [
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.gate_proj"),
    ("ffn_up_exps", "mlp.experts.up_proj"),
    ("ffn_down_exps", "mlp.experts.down_proj"),
    ("ffn_norm", "post_attention_layernorm"),
];

/// Our name of a GGUF tensor; `None` for one that has none.
pub fn of_gguf(source: &str, config: &ModelConfig) -> Option<String> {
    match source {
        "token_embd.weight" => return Some(EMBEDDING.to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some(OUTPUT.to_owned()),
        _ => {}
    }
    let (layer, rest) = source.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) =
        rest.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let ours = match part {
        "ffn_norm" if config.norms == Norms::Around => "pre_feedforward_layernorm",
        // Gate and up in one.
        "ffn_up" if config.architecture == "phi3" => "mlp.gate_up_proj",
        _ => BLOCK_NAMES.iter().find(|(theirs, _)| part == *theirs)?.1,
    };
    Some(format!("model.layers.{layer}.{ours}.{kind}"))
}

/// Parts of a model that a text model has no use for.
const OTHER_PARTS: [&str; 2] = ["vision_tower.", "multi_modal_projector."];
/// Of the experts in Mixtral's folders.
const MIXTRAL: [(&str, &str); 3] = [
    ("w1.weight", "gate_proj.weight"),
    ("w2.weight", "down_proj.weight"),
    ("w3.weight", "up_proj.weight"),
];

/// Our name of a folder's tensor; `None` for one that is not needed.
pub fn of_folder(source: &str, config: &ModelConfig) -> Option<String> {
    // Older folders hold the frequencies of rope, which the configuration gives.
    if source.ends_with(".rotary_emb.inv_freq") {
        return None;
    }
    match config.architecture.as_str() {
        "gemma3" | "mistral3" => {
            let inner = source.strip_prefix("model.").unwrap_or(source);
            if OTHER_PARTS.iter().any(|part| inner.starts_with(part)) {
                return None;
            }
            let Some(text) = inner.strip_prefix("language_model.") else {
                return Some(source.to_owned());
            };
            let is_whole = text.starts_with("model.") || text == OUTPUT;
            Some(if is_whole { text.to_owned() } else { format!("model.{text}") })
        }
        "mixtral" => {
            let name = source.replace(".block_sparse_moe.", ".mlp.");
            for (theirs, ours) in MIXTRAL {
                if let Some(start) = name.strip_suffix(theirs) {
                    return Some(format!("{start}{ours}"));
                }
            }
            Some(name)
        }
        _ => Some(source.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gguf_names_have_canonical_ones() {
        let llama = ModelConfig::of_shape("tiny", 64).unwrap();
        let cases = [
            ("token_embd.weight", Some("model.embed_tokens.weight")),
            ("output.weight", Some("lm_head.weight")),
            ("blk.12.attn_k.weight", Some("model.layers.12.self_attn.k_proj.weight")),
            ("blk.0.ffn_norm.weight", Some("model.layers.0.post_attention_layernorm.weight")),
            ("blk.0.attn_q.bias", Some("model.layers.0.self_attn.q_proj.bias")),
            ("blk.0.ffn_gate_exps.weight", Some("model.layers.0.mlp.experts.gate_proj.weight")),
            ("blk.0.attn_q.scale", None),
            ("blk.0.ssm_conv1d.weight", None),
        ];
        for (theirs, ours) in cases {
            assert_eq!(of_gguf(theirs, &llama).as_deref(), ours);
        }
        let gemma = ModelConfig { norms: Norms::Around, ..llama };
        let want = Some("model.layers.0.pre_feedforward_layernorm.weight");
        assert_eq!(of_gguf("blk.0.ffn_norm.weight", &gemma).as_deref(), want);
    }

    #[test]
    fn folders_of_larger_models_hold_a_text_model() {
        let config = |architecture: &str| ModelConfig {
            architecture: architecture.into(),
            ..ModelConfig::of_shape("tiny", 64).unwrap()
        };
        let cases = [
            ("gemma3", "language_model.model.norm.weight", Some("model.norm.weight")),
            ("gemma3", "model.language_model.norm.weight", Some("model.norm.weight")),
            ("mistral3", "language_model.lm_head.weight", Some("lm_head.weight")),
            ("mistral3", "vision_tower.patch_conv.weight", None),
            ("gemma3", "model.multi_modal_projector.mm_soft_emb_norm.weight", None),
            ("gemma3", "model.norm.weight", Some("model.norm.weight")),
            ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
            ("llama", "vision_tower.x", Some("vision_tower.x")),
            (
                "mixtral",
                "model.layers.1.block_sparse_moe.experts.7.w2.weight",
                Some("model.layers.1.mlp.experts.7.down_proj.weight"),
            ),
            (
                "mixtral",
                "model.layers.1.block_sparse_moe.gate.weight",
                Some("model.layers.1.mlp.gate.weight"),
            ),
        ];
        for (architecture, theirs, ours) in cases {
            assert_eq!(of_folder(theirs, &config(architecture)).as_deref(), ours);
        }
    }
}
