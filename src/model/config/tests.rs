use serde_json::{Value, json};

use super::*;
use crate::model::gguf::parts::Parts;

fn base() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96,
        "vocab_size": 100, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "rope_theta": 5000.0, "tie_word_embeddings": true, "eos_token_id": 7
    })
}

fn with(key: &str, value: Value) -> Result<ModelConfig> {
    let mut config = base();
    config[key] = value;
    ModelConfig::from_json(&config, None)
}

#[test]
fn reads_sizes_and_counts_parameters() {
    let generation = json!({"eos_token_id": [7, 2], "temperature": 0.2});
    let config = ModelConfig::from_json(&base(), Some(&generation)).unwrap();
    assert_eq!((config.layers, config.dim, config.heads, config.kv_heads), (3, 64, 4, 2));
    assert_eq!((config.head_dim, config.ffn_dim, config.vocab), (16, 96, 100));
    assert_eq!((config.norm_eps, config.context), (1e-5, 128));
    assert_eq!(config.stop_tokens, [2, 7]);
    let block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64;
    assert_eq!(config.parameters(), 3 * block + 100 * 64 + 64);
}

#[test]
fn accepts_the_new_spelling_of_plain_rope() {
    let rope = json!({"rope_type": "default", "rope_theta": 5000.0});
    assert_eq!(with("rope_parameters", rope).unwrap().rope, Rope::plain(16, 5000.0));
    assert!(with("rope_scaling", json!({"rope_type": "default"})).is_ok());
    assert!(with("rope_scaling", Value::Null).is_ok());
}

#[test]
fn refuses_what_changes_the_forward_pass() {
    let cases = [
        ("model_type", json!("falcon"), "unsupported architecture"),
        ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
        ("rope_scaling", json!({"rope_type": "mrope"}), "default, linear"),
        (
            "rope_scaling",
            json!({"rope_type": "linear", "factor": 2, "x": 1}),
            "of rope_type linear",
        ),
        ("rope_parameters", json!({"rope_type": "yarn"}), "rope_parameters"),
        ("rope_parameters", json!({"rope_theta": 1.0}), "as in rope_parameters"),
        ("partial_rotary_factor", json!(0.2), "turned part"),
        ("head_dim", json!(512), "at most 256"),
        ("mlp_bias", json!(true), "mlp_bias"),
        ("hidden_act", json!("gelu"), "hidden_act"),
        ("quantization_config", json!({"bits": 4}), "quantization_config"),
        ("num_key_value_heads", json!(3), "divisor"),
        ("head_dim", json!(15), "even"),
        ("hidden_size", json!(0), "hidden_size"),
        ("hidden_size", json!(-64), "hidden_size"),
        ("num_hidden_layers", json!(1u64 << 60), "num_hidden_layers"),
        ("rms_norm_eps", json!(0.0), "epsilon"),
        ("vocab_size", Value::Null, "vocab_size"),
        ("eos_token_id", json!(100), "below 100"),
        ("eos_token_id", json!("x"), "eos_token_id"),
    ];
    for (key, value, cause) in cases {
        let error = with(key, value).unwrap_err().to_string();
        assert!(error.contains(cause), "{key}: {error}");
    }
}

/// What differs from Llama 2, and the parameters that the models are known to have.
#[test]
fn published_configurations_are_read() {
    let cases = [
        (LLAMA_3_1, 8_030_261_248u64),
        (MISTRAL_SMALL_3, 23_572_403_200),
        (MIXTRAL, 46_702_792_704),
        (QWEN_2_5, 7_615_616_512),
        (QWEN_3_MOE, 30_532_122_624),
        (GEMMA_2, 2_614_341_888),
        (GEMMA_3, 3_880_263_168),
        (PHI_3_LONG, 3_821_079_552),
        (PHI_4_MINI, 3_836_021_760),
        (OLMO_2, 7_298_617_344),
        (GRANITE, 8_170_848_256),
        (SMOLLM_3, 3_075_098_624),
    ];
    for (text, parameters) in cases {
        let json: Value = serde_json::from_str(text).unwrap();
        let config = ModelConfig::from_json(&json, None).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(config.parameters(), parameters, "{}", config.architecture);
    }
}

fn published(text: &str) -> ModelConfig {
    ModelConfig::from_json(&serde_json::from_str(text).unwrap(), None).unwrap()
}

/// llama.cpp has local blocks only where a file names a window.
#[test]
fn a_gguf_file_without_a_window_has_no_local_angles() {
    let mut bytes = include_bytes!("../../../tests/golden/gguf/olmo3.gguf").to_vec();
    let folder = tempfile::tempdir().unwrap();
    let mut blocks = || {
        let path = folder.path().join("m.gguf");
        std::fs::write(&path, &bytes).unwrap();
        let config = ModelConfig::from_gguf(&Parts::open(&path).unwrap()).unwrap();
        let key = b"olmo2.attention.sliding_window\x04\0\0\0";
        let at = bytes.windows(key.len()).position(|part| part == key).unwrap() + key.len();
        bytes[at..at + 4].fill(0);
        config.blocks.iter().map(|block| (block.window, block.angles)).collect::<Vec<_>>()
    };
    let (local, global) = ((Some(30), Angles::Local), (None, Angles::Global));
    assert_eq!(blocks(), [local, global, local]);
    assert_eq!(blocks(), [global; 3]);
}

#[test]
fn windows_and_angles_follow_the_family() {
    let windows = |config: &ModelConfig| -> Vec<bool> {
        config.blocks.iter().map(|block| block.window.is_some()).collect()
    };
    let gemma = published(GEMMA_3);
    assert_eq!(windows(&gemma)[..7], [true, true, true, true, true, false, true]);
    assert_eq!(gemma.blocks[0].window, Some(1024));
    assert_eq!(gemma.local_rope, Rope::plain(256, 10_000.0));
    assert_eq!(gemma.rope.frequencies[0], 1.0 / 8.0);
    assert_eq!((gemma.context, gemma.vocab, gemma.gain_offset), (131_072, 262_208, 1.0));
    assert_eq!(gemma.stop_tokens, [1, 106]);
    assert_eq!(windows(&published(GEMMA_2))[..3], [true, false, true]);
    assert!(!windows(&published(MISTRAL_SMALL_3)).contains(&true));
    assert!(!windows(&published(QWEN_2_5)).contains(&true));
    let smollm = published(SMOLLM_3);
    let unturned: Vec<bool> =
        smollm.blocks.iter().map(|block| block.angles == Angles::None).collect();
    assert_eq!(unturned[..8], [false, false, false, true, false, false, false, true]);
    assert!(!windows(&smollm).contains(&true));
    let phi = published(PHI_4_MINI);
    assert_eq!((phi.rotary_dim, phi.head_dim, phi.rope.frequencies.len()), (96, 128, 48));
    let phi = published(PHI_3_LONG);
    assert_eq!(phi.context, 4096);
    assert!((f64::from(phi.rope.scale) - 1.190_238).abs() < 1e-6, "{}", phi.rope.scale);
    let granite = published(GRANITE);
    assert_eq!((granite.embedding_scale, granite.logit_scale), (12.0, 1.0 / 16.0));
    let experts = published(QWEN_3_MOE).experts.unwrap();
    assert_eq!((experts.count, experts.used, experts.normalise), (128, 8, true));
}

const LLAMA_3_1: &str = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "max_position_embeddings": 131072, "pretraining_tp": 1,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "tie_word_embeddings": false,
    "attention_bias": false, "mlp_bias": false, "hidden_act": "silu",
    "eos_token_id": [128001, 128008, 128009]}"#;
const MISTRAL_SMALL_3: &str = r#"{"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 40, "vocab_size": 131072,
    "head_dim": 128, "rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "max_position_embeddings": 32768,
    "sliding_window": null, "hidden_act": "silu", "tie_word_embeddings": false, "eos_token_id": 2}"#;
const MIXTRAL: &str = r#"{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 32000,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
    "num_experts_per_tok": 2, "num_local_experts": 8, "sliding_window": null, "output_router_logits": false,
    "tie_word_embeddings": false, "eos_token_id": 2}"#;
const QWEN_2_5: &str = r#"{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
    "sliding_window": 131072, "use_sliding_window": false, "max_window_layers": 28,
    "tie_word_embeddings": false, "eos_token_id": 151645}"#;
const QWEN_3_MOE: &str = r#"{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "vocab_size": 151936,
    "head_dim": 128, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 40960,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_scaling": null, "sliding_window": null,
    "use_sliding_window": false, "max_window_layers": 48, "attention_bias": false, "hidden_act": "silu",
    "tie_word_embeddings": false, "eos_token_id": 151645}"#;
const GEMMA_2: &str = r#"{"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 26, "vocab_size": 256000,
    "head_dim": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    "cache_implementation": "hybrid", "eos_token_id": [1, 107]}"#;
/// Nested in a multimodal one, which leaves most to transformers' defaults.
const GEMMA_3: &str = r#"{"model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {},
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024}}"#;
const PHI_3_LONG: &str = r#"{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 32064,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "sliding_window": 262144, "hidden_act": "silu",
    "rope_scaling": {"type": "longrope",
    "short_factor": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],
    "long_factor": [2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2]},
    "tie_word_embeddings": false, "eos_token_id": 32000}"#;
const PHI_4_MINI: &str = r#"{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
    "num_attention_heads": 24, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 200064,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262144,
    "rope_scaling": {"type": "longrope",
    "short_factor": [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],
    "long_factor": [2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2,2]},
    "tie_word_embeddings": true, "eos_token_id": 199999}"#;
const OLMO_2: &str = r#"{"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32, "vocab_size": 100352,
    "rms_norm_eps": 1e-06, "rope_theta": 500000, "max_position_embeddings": 4096, "hidden_act": "silu",
    "rope_scaling": null, "attention_bias": false, "tie_word_embeddings": false, "eos_token_id": 100257}"#;
const GRANITE: &str = r#"{"model_type": "granite", "hidden_size": 4096, "intermediate_size": 12800,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 40, "vocab_size": 49155,
    "rms_norm_eps": 1e-05, "rope_theta": 10000000.0, "max_position_embeddings": 131072,
    "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0,
    "residual_multiplier": 0.22, "hidden_act": "silu", "rope_scaling": null, "attention_bias": false,
    "mlp_bias": false, "tie_word_embeddings": true, "eos_token_id": 0}"#;
const SMOLLM_3: &str = r#"{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008,
    "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 36, "vocab_size": 128256,
    "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "max_position_embeddings": 65536, "hidden_act": "silu",
    "no_rope_layer_interval": 4, "use_sliding_window": false, "sliding_window": null,
    "max_window_layers": 28, "rope_scaling": null, "attention_bias": false, "mlp_bias": false,
    "eos_token_id": 128012}"#;

/// What is said twice, or in a place where it does not act.
#[test]
fn contradictions_are_refused_and_old_spellings_are_read() {
    let changed = |text: &str, change: fn(&mut Value)| {
        let mut json: Value = serde_json::from_str(text).unwrap();
        change(&mut json);
        ModelConfig::from_json(&json, None)
    };
    let refused = |text, cause: &str, change: fn(&mut Value)| {
        let error = changed(text, change).unwrap_err().to_string();
        assert!(error.contains(cause), "{cause}: {error}");
    };
    refused(LLAMA_3_1, "beside rope_parameters", |json| {
        json["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
    });
    refused(GEMMA_2, "silu or gelu_pytorch_tanh", |json| json["hidden_activation"] = Value::Null);
    refused(GEMMA_3, "F32, F16 or BF16", |json| json["quantization_config"] = json!({"bits": 8}));
    refused(GEMMA_3, "layer_types", |json| {
        json["text_config"]["layer_types"] = json!(["full_attention"]);
    });
    refused(QWEN_3_MOE, "at most 32", |json| json["num_experts_per_tok"] = json!(64));
    refused(LLAMA_3_1, "above 0", |json| {
        json["rope_scaling"] = json!({"rope_type": "linear", "factor": -8.0});
    });
    let smollm = changed(SMOLLM_3, |json| {
        (json["use_sliding_window"], json["sliding_window"]) = (json!(true), json!(64));
    });
    assert_eq!(smollm.unwrap().blocks[3].window, Some(64));
    let qwen = changed(QWEN_2_5, |json| {
        (json["use_sliding_window"], json["max_window_layers"]) = (json!(true), json!(0));
    });
    assert_eq!(qwen.unwrap().blocks[0].window, Some(131_072));
    let phi = changed(PHI_4_MINI, |json| {
        json["partial_rotary_factor"] = Value::Null;
        json["rope_scaling"]["partial_rotary_factor"] = json!(0.75);
    });
    assert_eq!(phi.unwrap().rotary_dim, 96);
}
