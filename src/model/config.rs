//! What the forward pass needs to know about a model, from GGUF metadata or a `config.json`.
//! A value that would change the computation and is not known here is refused.

use std::fmt::Display;

use serde_json::{Map, Value};

use super::gguf::Gguf;
use crate::error::{Error, Result};

/// A decoder's sizes and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// One of [`ARCHITECTURES`].
    pub architecture: String,
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub ffn_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    /// Base of the rotary angles.
    pub rope_theta: f32,
    /// The most positions the model was made for.
    pub context: usize,
    /// Whether the output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Tokens that end generation, ascending.
    pub stop_tokens: Vec<u32>,
}

/// The architectures that can be run, by their name in GGUF and in `config.json`.
pub const ARCHITECTURES: [&str; 1] = ["llama"];

/// Metadata keys below `llama.` that are read or that change nothing.
const GGUF_KEYS: [&str; 13] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "vocab_size",
];
const STOP_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

const DEFAULT_THETA: f64 = 10_000.0;
/// No model's width or depth is near it; products of four such numbers fit into 128 bits.
const MAX_SIZE: usize = 1 << 24;

impl ModelConfig {
    /// Reads a GGUF file's metadata.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let architecture = gguf.text("general.architecture")?.unwrap_or_default();
        check_architecture("general.architecture", architecture)?;
        let prefix = format!("{architecture}.");
        for key in gguf.keys() {
            if let Some(rest) = key.strip_prefix(&prefix)
                && !GGUF_KEYS.contains(&rest)
            {
                return Err(refused(key, "only keys whose effect is implemented", "this key"));
            }
        }
        let scaling = gguf.text(&format!("{prefix}rope.scaling.type"))?.unwrap_or("none");
        if scaling != "none" {
            return Err(refused(&format!("{prefix}rope.scaling.type"), "none", scaling));
        }
        if gguf.tensors.contains_key("rope_freqs.weight") {
            return Err(refused("tensor rope_freqs.weight", "no rope scaling", "this tensor"));
        }

        let optional = |key: &str| gguf_size(gguf, &format!("{prefix}{key}"));
        let size = |key: &str| optional(key)?.ok_or_else(|| missing(&format!("{prefix}{key}")));
        let (dim, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let head_dim = optional("attention.key_length")?.unwrap_or(dim / heads);
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(n) = optional(key)?.filter(|n| *n != head_dim) {
                return Err(refused(&format!("{prefix}{key}"), head_dim, n));
            }
        }
        let vocab = if let Some(vocab) = optional("vocab_size")? {
            vocab
        } else {
            let key = "tokenizer.ggml.tokens";
            in_range(key, gguf.texts(key)?.map_or(0, |tokens| tokens.len() as u64))?
        };
        let eps_key = format!("{prefix}attention.layer_norm_rms_epsilon");
        let mut stop_tokens = Vec::new();
        for key in STOP_KEYS {
            stop_tokens.extend(gguf.unsigned(key)?.map(|id| (key, id)));
        }
        Self {
            architecture: architecture.to_owned(),
            layers: size("block_count")?,
            dim,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ffn_dim: size("feed_forward_length")?,
            vocab,
            norm_eps: gguf.float(&eps_key)?.ok_or_else(|| missing(&eps_key))? as f32,
            rope_theta: gguf.float(&format!("{prefix}rope.freq_base"))?.unwrap_or(DEFAULT_THETA)
                as f32,
            context: size("context_length")?,
            tied_embeddings: !gguf.tensors.contains_key("output.weight"),
            stop_tokens: Vec::new(),
        }
        .checked(&stop_tokens)
    }

    /// Reads a Hugging Face `config.json` and, for its stop tokens only, `generation_config.json`.
    pub fn from_json(config: &Value, generation: Option<&Value>) -> Result<Self> {
        let fields = config.as_object().ok_or_else(|| Error::new("not a JSON object"))?;
        let json = Json { fields };
        let architecture = json.text("model_type")?.unwrap_or_default();
        check_architecture("model_type", architecture)?;
        json.refuse_unknown_computation()?;

        let size = |key: &str| json.size(key)?.ok_or_else(|| missing(key));
        let (dim, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        let mut stop_tokens = Vec::new();
        for value in [Some(config), generation].into_iter().flatten() {
            stop_tokens.extend(json_stop_tokens(value)?.into_iter().map(|id| ("eos_token_id", id)));
        }
        Self {
            architecture: architecture.to_owned(),
            layers: size("num_hidden_layers")?,
            dim,
            heads,
            kv_heads: json.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: json.size("head_dim")?.unwrap_or(dim / heads),
            ffn_dim: size("intermediate_size")?,
            vocab: size("vocab_size")?,
            norm_eps: json.float("rms_norm_eps")?.ok_or_else(|| missing("rms_norm_eps"))? as f32,
            rope_theta: json.rope_theta()? as f32,
            context: size("max_position_embeddings")?,
            tied_embeddings: json.boolean("tie_word_embeddings")?.unwrap_or(false),
            stop_tokens: Vec::new(),
        }
        .checked(&stop_tokens)
    }

    /// Numbers in all weights; a tied output matrix counts once.
    pub fn parameters(&self) -> u64 {
        let n = |n: usize| n as u128;
        let attention = n(self.dim) * n(self.head_dim) * 2 * (n(self.heads) + n(self.kv_heads));
        let block = attention + 3 * n(self.dim) * n(self.ffn_dim) + 2 * n(self.dim);
        let embedding = n(self.vocab) * n(self.dim);
        let output = if self.tied_embeddings { 0 } else { embedding };
        let total = n(self.layers) * block + embedding + output + n(self.dim);
        u64::try_from(total).unwrap_or(u64::MAX)
    }

    fn checked(mut self, stop_tokens: &[(&str, u64)]) -> Result<Self> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} query heads", self.heads);
            return Err(refused("key/value heads", expected, self.kv_heads));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            let expected = "an even number above 0 (rope turns pairs)";
            return Err(refused("head width", expected, self.head_dim));
        }
        for (name, x) in [("norm epsilon", self.norm_eps), ("rope base", self.rope_theta)] {
            if !(x.is_finite() && x > 0.0) {
                return Err(refused(name, "a finite number above 0", x));
            }
        }
        for (key, id) in stop_tokens {
            if *id >= self.vocab as u64 {
                return Err(refused(key, format!("a token id below {}", self.vocab), id));
            }
            self.stop_tokens.push(*id as u32);
        }
        self.stop_tokens.sort_unstable();
        self.stop_tokens.dedup();
        Ok(self)
    }
}

/// Whether an architecture's name, found at `key`, is one of [`ARCHITECTURES`].
///
/// # Errors
///
/// It is not.
pub fn check_architecture(key: &str, name: &str) -> Result<()> {
    if ARCHITECTURES.contains(&name) {
        return Ok(());
    }
    Err(Error::new("unsupported architecture")
        .at(key)
        .expected(ARCHITECTURES.join(" or "))
        .got(if name.is_empty() { "none" } else { name }))
}

fn refused(key: &str, expected: impl Display, got: impl Display) -> Error {
    Error::new("unsupported model configuration").at(key).expected(expected).got(got)
}

fn missing(key: &str) -> Error {
    Error::new("missing in the model's configuration").at(key)
}

fn gguf_size(gguf: &Gguf, key: &str) -> Result<Option<usize>> {
    gguf.unsigned(key)?.map(|n| in_range(key, n)).transpose()
}

fn in_range(key: &str, n: u64) -> Result<usize> {
    usize::try_from(n)
        .ok()
        .filter(|n| (1..=MAX_SIZE).contains(n))
        .ok_or_else(|| refused(key, format!("1..={MAX_SIZE}"), n))
}

fn json_stop_tokens(config: &Value) -> Result<Vec<u64>> {
    let wrong =
        |value: &Value| refused("eos_token_id", "a token id, a list of them or null", short(value));
    match config.get("eos_token_id") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(|v| v.as_u64().ok_or_else(|| wrong(v))).collect(),
        Some(id) => Ok(vec![id.as_u64().ok_or_else(|| wrong(id))?]),
    }
}

/// A value for a message, cut where it is long.
fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { text.chars().take(80).chain(['…']).collect() }
}

/// Typed access to the fields of `config.json`; null is absent.
struct Json<'a> {
    fields: &'a Map<String, Value>,
}

impl<'a> Json<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| refused(key, expected, short(value)))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a text", Value::as_str)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an integer above 0", Value::as_u64)?.map(|n| in_range(key, n)).transpose()
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// Keys that change the forward pass have the one value that is implemented.
    fn refuse_unknown_computation(&self) -> Result<()> {
        for key in ["attention_bias", "mlp_bias", "rope_interleaved"] {
            if self.boolean(key)?.unwrap_or(false) {
                return Err(refused(key, "false", "true"));
            }
        }
        if let Some(act) = self.text("hidden_act")?.filter(|act| *act != "silu") {
            return Err(refused("hidden_act", "silu", act));
        }
        if let Some(part) = self.float("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return Err(refused("partial_rotary_factor", "1", part));
        }
        if let Some(value) = self.get("quantization_config") {
            return Err(refused("quantization_config", "F32, F16 or BF16 weights", short(value))
                .hint("take the unquantised model or a GGUF file"));
        }
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(value) = self.get(key) else { continue };
            let object =
                value.as_object().ok_or_else(|| refused(key, "an object", short(value)))?;
            for (name, value) in object {
                let known = match name.as_str() {
                    "rope_type" | "type" => value == "default",
                    "rope_theta" => key == "rope_parameters",
                    "partial_rotary_factor" => value.is_null() || value.as_f64() == Some(1.0),
                    _ => false,
                };
                if !known {
                    return Err(refused(
                        &format!("{key}.{name}"),
                        "no rope scaling (rope_type default)",
                        short(value),
                    ));
                }
            }
        }
        Ok(())
    }

    /// From `rope_parameters` or, as older files have it, from the top; the two must agree.
    fn rope_theta(&self) -> Result<f64> {
        let nested = self.get("rope_parameters").and_then(Value::as_object);
        let nested = nested.map(|fields| Json { fields }.float("rope_theta")).transpose()?;
        match (nested.flatten(), self.float("rope_theta")?) {
            (Some(inner), Some(outer)) if inner != outer => {
                Err(refused("rope_theta", format!("{inner}, as in rope_parameters"), outer))
            }
            (inner, outer) => Ok(inner.or(outer).unwrap_or(DEFAULT_THETA)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
        assert_eq!((config.norm_eps, config.rope_theta, config.context), (1e-5, 5000.0, 128));
        assert_eq!(config.stop_tokens, [2, 7]);
        let block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64;
        assert_eq!(config.parameters(), 3 * block + 100 * 64 + 64);
    }

    #[test]
    fn accepts_the_new_spelling_of_plain_rope() {
        let rope = json!({"rope_type": "default", "rope_theta": 5000.0});
        assert_eq!(with("rope_parameters", rope).unwrap().rope_theta, 5000.0);
        assert!(with("rope_scaling", json!({"rope_type": "default"})).is_ok());
        assert!(with("rope_scaling", Value::Null).is_ok());
    }

    #[test]
    fn refuses_what_changes_the_forward_pass() {
        let cases = [
            ("model_type", json!("falcon"), "unsupported architecture"),
            ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}), "rope_scaling"),
            ("rope_parameters", json!({"rope_type": "yarn"}), "rope_parameters.rope_type"),
            ("rope_parameters", json!({"rope_theta": 1.0}), "as in rope_parameters"),
            ("attention_bias", json!(true), "attention_bias"),
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
}
