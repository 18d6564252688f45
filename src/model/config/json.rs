//! A Hugging Face `config.json`.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{
    ARCHITECTURES, AttentionBias, Block, DEFAULT_THETA, ExpertSizes, ModelConfig, Norms, QueryNorm,
    Rope, Shape, check_widths, checked_layers, checked_theta, in_range, missing, refused,
    rope::{Scaling, Yarn},
    unsupported,
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
            Json::of_text(fields, name).at(place)?.config().at(place)?
        } else {
            Json::new(outer, name).config()?
        };
        parsed.architecture = name.to_owned();
        let stops: Vec<(&str, u64)> = stops.into_iter().map(|id| ("eos_token_id", id)).collect();
        parsed.checked(&stops)
    }
}

/// What transformers takes for a key that is absent, where that is not what Llama has.
fn defaults(family: &str) -> Value {
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
        "olmo3" => json!({"rope_theta": 5e5, "sliding_window": 4096}),
        "smollm3" => json!({
            "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": true,
            "no_rope_layer_interval": 4
        }),
        _ => json!({}),
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
    family: &'a str,
    fields: &'a Map<String, Value>,
    defaults: Value,
}

impl<'a> Json<'a> {
    fn new(fields: &'a Map<String, Value>, family: &'a str) -> Self {
        Self { family, fields, defaults: defaults(family) }
    }

    /// The text model inside another.
    fn of_text(fields: &'a Map<String, Value>, outer: &str) -> Result<Self> {
        let expected = if outer == "gemma3" { "gemma3_text" } else { "mistral" };
        match fields.get("model_type") {
            None => {}
            Some(Value::String(name)) if name == expected => {}
            Some(other) => return Err(refused("model_type", expected, short(other))),
        }
        Ok(Self::new(fields, if outer == "gemma3" { "gemma3_text" } else { "mistral" }))
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

    fn is_gemma(&self) -> bool {
        self.family.starts_with("gemma")
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
        config.attention_bias = match self.family {
            "qwen2" => AttentionBias::Inputs,
            _ if self.flag("attention_bias")? => AttentionBias::All,
            _ => AttentionBias::None,
        };
        config.blocks = self.blocks(shape.layers)?;
        config.experts = self.experts()?;
        self.differences(&mut config)?;
        Ok(config)
    }

    /// What the family does otherwise than Llama.
    fn differences(&self, config: &mut ModelConfig) -> Result<()> {
        match self.family {
            "gemma2" | "gemma3_text" => {
                let inverse = self.needed_float("query_pre_attn_scalar")? as f32;
                config.gain_offset = 1.0;
                config.norms = Norms::Around;
                config.attention_scale = 1.0 / inverse.sqrt();
                config.embedding_scale = (config.dim as f32).sqrt();
                config.attention_soft_cap =
                    self.float("attn_logit_softcapping")?.map(|cap| cap as f32);
                config.logit_soft_cap =
                    self.float("final_logit_softcapping")?.map(|cap| cap as f32);
            }
            "olmo2" | "olmo3" => {
                config.norms = Norms::After;
                config.query_norm = QueryNorm::Whole;
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
        if ["qwen3", "qwen3_moe", "gemma3_text"].contains(&self.family) {
            config.query_norm = QueryNorm::Heads;
        }
        Ok(())
    }

    fn activation(&self) -> Result<Activation> {
        let key = if self.is_gemma() { "hidden_activation" } else { "hidden_act" };
        let name = self.typed(key, "a text", |value| value.as_str().map(str::to_owned))?;
        match name.as_deref() {
            None | Some("silu") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(refused(key, "silu or gelu_pytorch_tanh", other)),
        }
    }

    /// Windows, rope and experts of every block.
    fn blocks(&self, layers: usize) -> Result<Vec<Block>> {
        let windows = self.windows(layers)?;
        let ropes = self.rope_layers(layers)?;
        let experts = self.expert_layers(layers)?;
        let parts = windows.into_iter().zip(ropes).zip(experts);
        Ok(parts.map(|((window, rope), experts)| Block { window, rope, experts }).collect())
    }

    fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>> {
        let optional = ["qwen2", "qwen3", "qwen3_moe", "smollm3"].contains(&self.family);
        let window = self.size("sliding_window")?;
        let window =
            window.filter(|_| !optional || matches!(self.flag("use_sliding_window"), Ok(true)));
        let kinds =
            self.list("layer_types", "a list of texts", |kind| kind.as_str().map(str::to_owned))?;
        if let Some(kinds) = kinds.filter(|_| self.has_layer_types()) {
            return kinds_to_windows(&kinds, layers, window);
        }
        let pattern = self.size("sliding_window_pattern")?.unwrap_or(4);
        let first = self.size("max_window_layers")?.unwrap_or(0);
        let is_local = |layer: usize| match self.family {
            "mistral" | "mixtral" | "phi3" | "qwen3_moe" => true,
            "qwen2" | "qwen3" => layer >= first,
            "gemma2" => layer.is_multiple_of(2),
            "gemma3_text" | "olmo3" => !(layer + 1).is_multiple_of(pattern),
            _ => false,
        };
        Ok((0..layers).map(|layer| window.filter(|_| is_local(layer))).collect())
    }

    fn has_layer_types(&self) -> bool {
        ["qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3"].contains(&self.family)
    }

    fn rope_layers(&self, layers: usize) -> Result<Vec<bool>> {
        if self.family != "smollm3" {
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
        match self.family {
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

    fn experts(&self) -> Result<Option<ExpertSizes>> {
        let used = || self.needed("num_experts_per_tok");
        Ok(match self.family {
            "mixtral" => Some(ExpertSizes {
                count: self.needed("num_local_experts")?,
                used: used()?,
                ffn_dim: self.needed("intermediate_size")?,
                normalise: true,
            }),
            "qwen3_moe" => Some(ExpertSizes {
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

    fn rotary_dim(&self, head_dim: usize) -> Result<usize> {
        let key = "partial_rotary_factor";
        let nested = self.get("rope_parameters").and_then(|value| value.get(key));
        let part = match nested.filter(|value| !value.is_null()) {
            Some(value) => value.as_f64().ok_or_else(|| refused(key, "a number", short(value)))?,
            None => self.float(key)?.unwrap_or(1.0),
        };
        if (0.0..=1.0).contains(&part) {
            return Ok((head_dim as f64 * part) as usize);
        }
        Err(refused(key, "a number from 0 to 1", part))
    }

    /// The angles of blocks without and with a window, and the most positions that they are for.
    fn ropes(&self, width: usize) -> Result<([Rope; 2], Option<usize>)> {
        let parameters = self.get("rope_parameters");
        let is_nested = ["full_attention", "sliding_attention"]
            .iter()
            .any(|kind| parameters.is_some_and(|value| value.get(kind).is_some()));
        let theta = self.float("rope_theta")?.unwrap_or(DEFAULT_THETA);
        let nested = |kind: &str| parameters.and_then(|value| value.get(kind));
        let place = |kind: &str| format!("rope_parameters.{kind}");
        if is_nested {
            let local = self.float("rope_local_base_freq")?.unwrap_or(theta);
            let (full, most) =
                self.rope(nested("full_attention"), theta, width).at(|| place("full_attention"))?;
            let (local, _) = self
                .rope(nested("sliding_attention"), local, width)
                .at(|| place("sliding_attention"))?;
            return Ok(([full, local], most));
        }
        let key = if parameters.is_some() { "rope_parameters" } else { "rope_scaling" };
        let value = self.get(key);
        let inner = value.and_then(|value| value.get("rope_theta")).and_then(Value::as_f64);
        let outer = self.fields.get("rope_theta").and_then(Value::as_f64);
        if let (Some(inner), Some(outer)) = (inner, outer)
            && inner != outer
        {
            return Err(refused("rope_theta", format!("{inner}, as in {key}"), outer));
        }
        let (full, most) = self.rope(value, theta, width).at(|| key.to_owned())?;
        // Windowed blocks of these are never scaled.
        let local = match self.family {
            "gemma3_text" => self.needed_float("rope_local_base_freq")?,
            "olmo3" => inner.unwrap_or(theta),
            _ => return Ok(([full.clone(), full], most)),
        };
        Ok(([full, Rope::plain(width, checked_theta(local)?)], most))
    }

    /// One set of angles from its parameters.
    fn rope(
        &self,
        value: Option<&Value>,
        theta: f64,
        width: usize,
    ) -> Result<(Rope, Option<usize>)> {
        let Some(value) = value.filter(|value| !value.is_null()) else {
            return Ok((Rope::plain(width, checked_theta(theta)?), None));
        };
        let fields = value.as_object().ok_or_else(|| refused("", "an object", short(value)))?;
        let inner = Json { family: self.family, fields, defaults: Value::Null };
        let theta = checked_theta(inner.float("rope_theta")?.unwrap_or(theta))?;
        let kind = match inner.text("rope_type")? {
            Some(kind) => kind,
            None => inner.text("type")?.unwrap_or("default"),
        };
        let kind =
            if self.family == "phi3" && ["su", "yarn"].contains(&kind) { "longrope" } else { kind };
        inner.only_known(kind)?;
        let original = || match self.size("original_max_position_embeddings")? {
            Some(original) => Ok(original),
            None => match inner.size("original_max_position_embeddings")? {
                Some(original) => Ok(original),
                None => self.needed("max_position_embeddings"),
            },
        };
        let mut most = None;
        let scaling = match kind {
            // Up to the positions that the model was made for, dynamic scaling does nothing; more are
            // not computed.
            "default" | "dynamic" => None,
            "linear" => Some(Scaling::Linear(inner.needed_float("factor")?)),
            "llama3" => Some(Scaling::Llama3 {
                factor: inner.needed_float("factor")?,
                low: inner.needed_float("low_freq_factor")?,
                high: inner.needed_float("high_freq_factor")?,
                original: original()? as f64,
            }),
            "yarn" => Some(Scaling::Yarn(self.yarn(&inner, original()?)?)),
            // Sequences that may become longer have other frequencies from their first position on.
            "longrope" => {
                most = Some(original()?);
                Some(self.longrope(&inner, original()?, width)?)
            }
            other => {
                let known = "default, linear, dynamic, yarn, longrope or llama3";
                return Err(refused("rope_type", known, other));
            }
        };
        Ok((Rope::scaled(width, theta, scaling.as_ref()), most))
    }

    /// Refuses parameters of a kind of rope that are not known.
    fn only_known(&self, kind: &str) -> Result<()> {
        const EVERYWHERE: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        let known: &[&str] = match kind {
            "linear" | "dynamic" => &["factor", "original_max_position_embeddings"],
            "llama3" => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            "yarn" => &[
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ],
            "longrope" => &[
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "short_factor",
                "long_factor",
            ],
            _ => &[],
        };
        for (key, value) in self.fields {
            if !value.is_null() && !EVERYWHERE.contains(&&**key) && !known.contains(&&**key) {
                let expected = format!("parameters of rope_type {kind}");
                return Err(refused(key, expected, short(value)));
            }
        }
        Ok(())
    }

    fn yarn(&self, inner: &Json<'_>, original: usize) -> Result<Yarn> {
        let factor = self.factor(inner, original)?;
        let magnitudes = (inner.float("mscale")?, inner.float("mscale_all_dim")?);
        let scale = match (inner.float("attention_factor")?, magnitudes) {
            (Some(scale), _) => scale,
            (None, (Some(one), Some(all))) if one != 0.0 && all != 0.0 => {
                Yarn::magnitude(factor, one) / Yarn::magnitude(factor, all)
            }
            _ => Yarn::magnitude(factor, 1.0),
        };
        let turns = |key, default| {
            Ok::<_, Error>(inner.float(key)?.filter(|turns| *turns != 0.0).unwrap_or(default))
        };
        let truncate = inner.typed("truncate", "true or false", Value::as_bool)?.unwrap_or(true);
        Ok(Yarn {
            factor,
            original: original as f64,
            beta_fast: turns("beta_fast", 32.0)?,
            beta_slow: turns("beta_slow", 1.0)?,
            truncate,
            scale,
        })
    }

    /// By how much more positions than `original` there can be.
    fn factor(&self, inner: &Json<'_>, original: usize) -> Result<f64> {
        match inner.float("factor")? {
            Some(factor) => Ok(factor),
            None => match self.needed("max_position_embeddings")? {
                most if most == original => Err(missing("factor")),
                most => Ok(most as f64 / original as f64),
            },
        }
    }

    fn longrope(&self, inner: &Json<'_>, original: usize, width: usize) -> Result<Scaling> {
        let factors = |key: &str| {
            let expected = format!("{} numbers, one a pair", width / 2);
            let list = inner.list(key, &expected, Value::as_f64)?.ok_or_else(|| missing(key))?;
            if list.len() != width / 2 {
                return Err(refused(key, expected, list.len()));
            }
            Ok(list)
        };
        factors("long_factor")?;
        let factor = self.factor(inner, original)?;
        let usual = longrope_scale(factor, original as f64);
        let factors = factors("short_factor")?.into_iter().map(|factor| factor as f32).collect();
        Ok(Scaling::Each { factors, scale: inner.float("attention_factor")?.unwrap_or(usual) })
    }
}

/// Of the cosines and sines (Ding et al. 2024, section 3.2).
pub(super) fn longrope_scale(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}

fn kinds_to_windows(
    kinds: &[String],
    layers: usize,
    window: Option<usize>,
) -> Result<Vec<Option<usize>>> {
    let key = "layer_types";
    if kinds.len() != layers {
        return Err(refused(key, format!("one for each of {layers} layers"), kinds.len()));
    }
    let of = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(None),
        "sliding_attention" => window.map(Some).ok_or_else(|| missing("sliding_window")),
        other => Err(refused(key, "full_attention or sliding_attention", other)),
    };
    kinds.iter().map(of).collect()
}
