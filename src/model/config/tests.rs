use serde_json::{Value, json};

use super::*;

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
