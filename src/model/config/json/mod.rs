//! A Hugging Face `config.json`.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

mod families;
mod rope;

use families::{Family, Local};

use super::{
    ARCHITECTURES, Angles, AttentionBias, Block, DEFAULT_THETA, Mixture, ModelConfig, Shape,
    check_widths, checked_layers, in_range, missing, refused, unsupported,
};
use crate::{
    error::{Context, Error, Result},
    ops::matmul::Activation,
};

/// Models whose `config.json` holds a text model's among others.
const NESTING: [&str; 2] = ["gemma3", "mistral3"];

impl ModelConfig {
    /// Reads a Hugging Face `config.json` and, for its stop tokens only, `generation_config.json`.
    ///
    /// # Errors
    ///
    /// A value is missing, malformed, or calls for something that is not computed.
    pub fn from_json(config: &Value, generation: Option<&Value>) -> Result<Self> {
        let outer = config.as_object().ok_or_else(|| Error::new("not a JSON object"))?;
        let name = Json::new(outer, "").text("model_type")?.unwrap_or_default();
        if !ARCHITECTURES.contains(&name) {
            return Err(unsupported("model_type", &ARCHITECTURES, name));
        }
        let mut stops = stop_tokens(config)?;
        stops.extend(generation.map(stop_tokens).transpose()?.into_iter().flatten());
        let mut parsed = if NESTING.contains(&name) {
            let place = || "text_config".to_owned();
            let inner = outer.get("text_config").ok_or_else(|| missing("text_config"))?;
            stops.extend(stop_tokens(inner).at(place)?);
            let fields = inner
                .as_object()
                .ok_or_else(|| refused("text_config", "an object", short(inner)))?;
            let mut text = Json::of_text(fields, name).at(place)?.config().at(place)?;
            let outer = Json::new(outer, name);
            outer.refuse_unknown_computation()?;
            if outer.get("tie_word_embeddings").is_some() {
                text.tied_embeddings = outer.flag("tie_word_embeddings")?;
            }
            text
        } else {
            Json::new(outer, name).config()?
        };
        name.clone_into(&mut parsed.architecture);
        let stops: Vec<(&str, u64)> = stops.into_iter().map(|id| ("eos_token_id", id)).collect();
        parsed.checked(&stops)
    }
}

/// A token id, or a list of them.
fn stop_tokens(config: &Value) -> Result<Vec<u64>> {
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

/// Typed access to the fields of an object; null is absent.
struct Json<'a> {
    family: &'static Family,
    fields: &'a Map<String, Value>,
    defaults: Value,
}

impl<'a> Json<'a> {
    fn new(fields: &'a Map<String, Value>, family: &str) -> Self {
        Self { family: Family::of(family), fields, defaults: families::defaults(family) }
    }

    /// The text model inside another.
    fn of_text(fields: &'a Map<String, Value>, outer: &str) -> Result<Self> {
        let expected = if outer == "gemma3" { "gemma3_text" } else { "mistral" };
        match fields.get("model_type") {
            None => {}
            Some(Value::String(name)) if name == expected => {}
            Some(other) => return Err(refused("model_type", expected, short(other))),
        }
        Ok(Self::new(fields, expected))
    }

    /// The field, or its default where it is not even null.
    fn get(&self, key: &str) -> Option<&Value> {
        let value = self.fields.get(key).or_else(|| self.defaults.get(key));
        value.filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| refused(key, expected, short(value)))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.fields.get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        value.as_str().map(Some).ok_or_else(|| refused(key, "a text", short(value)))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "an integer above 0", Value::as_u64)?.map(|n| in_range(key, n)).transpose()
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<bool> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn needed(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| missing(key))
    }

    fn needed_float(&self, key: &str) -> Result<f64> {
        self.float(key)?.ok_or_else(|| missing(key))
    }

    fn list<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.typed(key, expected, |value| value.as_array()?.iter().map(convert).collect())
    }

    fn config(&self) -> Result<ModelConfig> {
        self.refuse_unknown_computation()?;
        let (dim, heads) = (self.needed("hidden_size")?, self.needed("num_attention_heads")?);
        let layers = "num_hidden_layers";
        let head_dim = self.size("head_dim")?.unwrap_or(dim / heads);
        let rotary_dim = self.rotary_dim(head_dim)?;
        check_widths(head_dim, rotary_dim)?;
        let shape = Shape {
            layers: checked_layers(layers, self.needed(layers)?)?,
            dim,
            heads,
            kv_heads: self.size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            ffn_dim: self.needed("intermediate_size")?,
            vocab: self.needed("vocab_size")?,
        };
        let (ropes, most) = self.ropes(rotary_dim)?;
        let context = self.needed("max_position_embeddings")?;
        let mut config =
            ModelConfig::llama(shape, most.unwrap_or(context).min(context), DEFAULT_THETA as f32);
        [config.rope, config.local_rope] = ropes;
        config.rotary_dim = rotary_dim;
        config.tied_embeddings = self.flag("tie_word_embeddings")?;
        config.norm_eps = self.needed_float("rms_norm_eps")? as f32;
        config.activation = self.activation()?;
        config.attention_bias = match self.family.name {
            "qwen2" => AttentionBias::Inputs,
            _ if self.flag("attention_bias")? => AttentionBias::All,
            _ => AttentionBias::None,
        };
        (config.norms, config.query_norm) = (self.family.norms, self.family.query_norm);
        config.blocks = self.blocks(shape.layers)?;
        config.experts = self.experts()?;
        self.differences(&mut config)?;
        Ok(config)
    }

    /// What the family does otherwise than Llama.
    fn differences(&self, config: &mut ModelConfig) -> Result<()> {
        match self.family.name {
            "gemma2" | "gemma3_text" => {
                let inverse = self.needed_float("query_pre_attn_scalar")? as f32;
                config.gain_offset = 1.0;
                config.attention_scale = 1.0 / inverse.sqrt();
                config.embedding_scale = (config.dim as f32).sqrt();
                config.attention_soft_cap =
                    self.float("attn_logit_softcapping")?.map(|cap| cap as f32);
                config.logit_soft_cap =
                    self.float("final_logit_softcapping")?.map(|cap| cap as f32);
            }
            "granite" => {
                let scale = |key| Ok::<_, Error>(self.float(key)?.unwrap_or(1.0));
                config.attention_scale = scale("attention_multiplier")? as f32;
                config.embedding_scale = scale("embedding_multiplier")? as f32;
                config.residual_scale = scale("residual_multiplier")? as f32;
                config.logit_scale = (1.0 / scale("logits_scaling")?) as f32;
            }
            _ => {}
        }
        Ok(())
    }

    fn activation(&self) -> Result<Activation> {
        let key = if self.family.is_gemma() { "hidden_activation" } else { "hidden_act" };
        let value = self.fields.get(key).or_else(|| self.defaults.get(key));
        match value.map(Value::as_str) {
            None | Some(Some("silu")) => Ok(Activation::Silu),
            Some(Some("gelu_pytorch_tanh")) => Ok(Activation::GeluTanh),
            Some(_) => {
                let got = value.map(short).unwrap_or_default();
                Err(refused(key, "silu or gelu_pytorch_tanh", got))
            }
        }
    }

    /// Windows, rope and experts of every block.
    fn blocks(&self, layers: usize) -> Result<Vec<Block>> {
        let turned = self.rope_layers(layers)?;
        let local = self.local(&turned)?;
        let experts = self.expert_layers(layers)?;
        let window = self.window()?;
        let block = |layer: usize| Block {
            window: window.filter(|_| local[layer]),
            angles: match (turned[layer], local[layer]) {
                (false, _) => Angles::None,
                (true, false) => Angles::Global,
                (true, true) => Angles::Local,
            },
            experts: experts[layer],
        };
        Ok((0..layers).map(block).collect())
    }

    /// How many positions the blocks with a window see.
    fn window(&self) -> Result<Option<usize>> {
        if self.family.local == Local::Never
            || self.family.optional_window && !self.flag("use_sliding_window")?
        {
            return Ok(None);
        }
        self.size("sliding_window")
    }

    /// Which blocks have the window, where there is one.
    fn local(&self, turned: &[bool]) -> Result<Vec<bool>> {
        let layers = turned.len();
        if self.family.has_layer_types()
            && let Some(kinds) = self
                .list("layer_types", "a list of texts", |kind| kind.as_str().map(str::to_owned))?
        {
            return kinds_to_local(&kinds, layers);
        }
        let is_local: Vec<bool> = match self.family.local {
            Local::Never => vec![false; layers],
            Local::Always => vec![true; layers],
            Local::Upper => {
                let first = self.typed("max_window_layers", "a number of blocks", Value::as_u64)?;
                (0..layers as u64).map(|layer| layer >= first.unwrap_or(0)).collect()
            }
            Local::Even => (0..layers).map(|layer| layer.is_multiple_of(2)).collect(),
            Local::ButEach => {
                let each = self.needed("sliding_window_pattern")?;
                (1..=layers).map(|layer| !layer.is_multiple_of(each)).collect()
            }
            Local::Unturned => turned.iter().map(|turned| !turned).collect(),
        };
        Ok(is_local)
    }

    fn rope_layers(&self, layers: usize) -> Result<Vec<bool>> {
        if self.family.name != "smollm3" {
            return Ok(vec![true; layers]);
        }
        let key = "no_rope_layers";
        let expected = format!("a list of 0 and 1, one for each of {layers} layers");
        let listed = self.list(key, &expected, |flag| match flag.as_u64() {
            Some(flag @ (0 | 1)) => Some(flag == 1),
            _ => None,
        })?;
        match listed {
            Some(listed) if listed.len() >= layers => Ok(listed[..layers].to_vec()),
            Some(listed) => Err(refused(key, expected, listed.len())),
            None => {
                let interval = self.needed("no_rope_layer_interval")?;
                Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect())
            }
        }
    }

    fn expert_layers(&self, layers: usize) -> Result<Vec<bool>> {
        match self.family.name {
            "mixtral" => Ok(vec![true; layers]),
            "qwen3_moe" => {
                let step = self.size("decoder_sparse_step")?.unwrap_or(1);
                let dense = self.list("mlp_only_layers", "a list of layers", Value::as_u64)?;
                let dense: BTreeSet<u64> = dense.into_iter().flatten().collect();
                let has = |layer: usize| !dense.contains(&(layer as u64 - 1));
                Ok((1..=layers).map(|layer| has(layer) && layer.is_multiple_of(step)).collect())
            }
            _ => Ok(vec![false; layers]),
        }
    }

    fn experts(&self) -> Result<Option<Mixture>> {
        let used = || self.needed("num_experts_per_tok");
        Ok(match self.family.name {
            "mixtral" => Some(Mixture {
                count: self.needed("num_local_experts")?,
                used: used()?,
                ffn_dim: self.needed("intermediate_size")?,
                normalise: true,
            }),
            "qwen3_moe" => Some(Mixture {
                count: self
                    .size("num_experts")?
                    .map_or_else(|| self.needed("num_local_experts"), Ok)?,
                used: used()?,
                ffn_dim: self.needed("moe_intermediate_size")?,
                normalise: self.flag("norm_topk_prob")?,
            }),
            _ => None,
        })
    }

    /// Keys that change the forward pass have a value that is implemented.
    fn refuse_unknown_computation(&self) -> Result<()> {
        for key in ["mlp_bias", "rope_interleaved", "use_bidirectional_attention"] {
            if self.flag(key)? {
                return Err(refused(key, "false", "true"));
            }
        }
        if let Some(value) = self.get("clip_qkv") {
            return Err(refused("clip_qkv", "null", short(value)));
        }
        if let Some(value) = self.get("quantization_config") {
            return Err(refused("quantization_config", "F32, F16 or BF16 weights", short(value))
                .hint("take the unquantised model or a GGUF file"));
        }
        Ok(())
    }
}

fn kinds_to_local(kinds: &[String], layers: usize) -> Result<Vec<bool>> {
    let key = "layer_types";
    if kinds.len() != layers {
        return Err(refused(key, format!("one for each of {layers} layers"), kinds.len()));
    }
    let of = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(refused(key, "full_attention or sliding_attention", other)),
    };
    kinds.iter().map(of).collect()
}
