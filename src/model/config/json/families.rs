//! How families differ from Llama: what is read of their `config.json`, and what is taken where it says
//! nothing.

use serde_json::{Value, json};

use super::super::{Norms, QueryNorm};

/// Which blocks have the window, where no list of `layer_types` says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Local {
    Never,
    Always,
    /// From block `max_window_layers` on.
    Upper,
    /// Blocks 0, 2, 4 and so on.
    Even,
    /// All but each `sliding_window_pattern`th.
    ButEach,
    /// Those without rope.
    Unturned,
}

/// A family, by its `model_type`.
#[derive(Debug)]
pub(super) struct Family {
    pub name: &'static str,
    pub norms: Norms,
    pub query_norm: QueryNorm,
    pub local: Local,
    /// Whether windows act only with `use_sliding_window`.
    pub optional_window: bool,
}

const LLAMA: Family = Family {
    name: "llama",
    norms: Norms::Before,
    query_norm: QueryNorm::None,
    local: Local::Never,
    optional_window: false,
};
const FAMILIES: [Family; 13] = [
    LLAMA,
    Family { name: "mistral", local: Local::Always, ..LLAMA },
    Family { name: "mixtral", local: Local::Always, ..LLAMA },
    Family { name: "phi3", local: Local::Always, ..LLAMA },
    Family { name: "granite", ..LLAMA },
    Family { name: "qwen2", local: Local::Upper, optional_window: true, ..LLAMA },
    Family {
        name: "qwen3",
        query_norm: QueryNorm::Heads,
        local: Local::Upper,
        optional_window: true,
        ..LLAMA
    },
    Family {
        name: "qwen3_moe",
        query_norm: QueryNorm::Heads,
        local: Local::Always,
        optional_window: true,
        ..LLAMA
    },
    Family { name: "smollm3", local: Local::Unturned, optional_window: true, ..LLAMA },
    Family { name: "gemma2", norms: Norms::Around, local: Local::Even, ..LLAMA },
    Family {
        name: "gemma3_text",
        norms: Norms::Around,
        query_norm: QueryNorm::Heads,
        local: Local::ButEach,
        ..LLAMA
    },
    Family { name: "olmo2", norms: Norms::After, query_norm: QueryNorm::Whole, ..LLAMA },
    Family {
        name: "olmo3",
        norms: Norms::After,
        query_norm: QueryNorm::Whole,
        local: Local::ButEach,
        ..LLAMA
    },
];

impl Family {
    /// The family of this name.
    pub fn of(name: &str) -> &'static Self {
        FAMILIES.iter().find(|family| family.name == name).unwrap_or(&FAMILIES[0])
    }

    pub fn is_gemma(&self) -> bool {
        self.name.starts_with("gemma")
    }

    /// Whether a list may say which blocks have the window.
    pub fn has_layer_types(&self) -> bool {
        !matches!(self.local, Local::Never | Local::Always)
    }
}

/// What transformers takes for a key that is absent, where that is not what Llama has.
pub(super) fn defaults(family: &str) -> Value {
    let gemma = json!({
        "head_dim": 256, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "num_attention_heads": 8, "sliding_window": 4096
    });
    let with = |mut base: Value, more: Value| {
        if let (Value::Object(base), Value::Object(more)) = (&mut base, more) {
            base.extend(more);
        }
        base
    };
    match family {
        "gemma2" => with(
            gemma,
            json!({
                "vocab_size": 256_000, "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0
            }),
        ),
        "gemma3_text" => with(
            gemma,
            json!({
                "vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1e6,
                "rope_local_base_freq": 1e4, "sliding_window_pattern": 6
            }),
        ),
        "phi3" => json!({"original_max_position_embeddings": 4096}),
        "mistral" => json!({"num_key_value_heads": 8, "sliding_window": 4096}),
        "mixtral" => json!({
            "num_key_value_heads": 8, "rope_theta": 1e6, "num_local_experts": 8,
            "num_experts_per_tok": 2
        }),
        "qwen2" => json!({"max_window_layers": 28, "sliding_window": 4096}),
        "qwen3" => json!({"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096}),
        "qwen3_moe" => json!({
            "num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "sliding_window": 4096
        }),
        "olmo3" => json!({
            "rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4
        }),
        "smollm3" => json!({
            "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": true,
            "no_rope_layer_interval": 4
        }),
        _ => json!({}),
    }
}
