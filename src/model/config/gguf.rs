//! GGUF metadata, by llama.cpp's names.

use super::{
    Angles, AttentionBias, Block, DEFAULT_THETA, Mixture, ModelConfig, Norms, QueryNorm, Rope,
    Shape, check_widths, checked_layers, checked_theta, in_range, missing, refused,
    rope::{Scaling, Yarn},
    unsupported,
};
use crate::{
    error::Result,
    model::gguf::{Gguf, parts::Parts},
    ops::matmul::Activation,
};

/// The architectures that GGUF files can be of.
const KNOWN: [&str; 8] =
    ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "olmo2"];

/// Metadata keys below the architecture's name that are read or that change nothing.
const KEYS: [&str; 32] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "attn_logit_softcapping",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "final_logit_softcapping",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "use_parallel_residual",
    "vocab_size",
    "tensor_data_layout",
    "expert_group_count",
    "expert_group_used_count",
];
const STOP_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Factors of frequencies that a file holds as tensors: Llama 3's, and `LongRoPE`'s two sets.
pub(in crate::model) const FACTORS: [&str; 3] =
    ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];
/// What llama.cpp takes for keys that the first files of Gemma lack.
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;
const GEMMA2_WINDOW: usize = 4096;
const GEMMA2_CAPS: [f32; 2] = [50.0, 30.0];
/// Keys that act only in these architectures.
const OWN_KEYS: [(&str, &[&str]); 4] = [
    ("attn_logit_softcapping", &["gemma2", "gemma3"]),
    ("final_logit_softcapping", &["gemma2", "gemma3"]),
    ("rope.freq_base_swa", &["gemma3", "olmo2"]),
    ("attention.sliding_window_pattern", &["gemma3", "olmo2"]),
];
/// Tokens that end a turn, whatever else the metadata says: llama.cpp knows them by these texts too.
const STOP_TEXTS: [&str; 9] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<EOT>",
];

/// Whether GGUF files of this architecture, named at `key`, can be opened.
///
/// # Errors
///
/// They cannot.
pub fn check_gguf_architecture(key: &str, name: &str) -> Result<()> {
    if KNOWN.contains(&name) { Ok(()) } else { Err(unsupported(key, &KNOWN, name)) }
}

impl ModelConfig {
    /// Reads the metadata of a GGUF model.
    ///
    /// # Errors
    ///
    /// A value is missing, malformed, or calls for something that is not computed.
    pub(in crate::model) fn from_gguf(parts: &Parts) -> Result<Self> {
        let (_, gguf) = parts.first();
        let architecture = gguf.text("general.architecture")?.unwrap_or_default();
        check_gguf_architecture("general.architecture", architecture)?;
        let mut stop_tokens = Vec::new();
        for key in STOP_KEYS {
            stop_tokens.extend(gguf.unsigned(key)?.map(|id| (key, id)));
        }
        let tokens = gguf.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let ending = tokens.iter().zip(0..).filter(|(token, _)| STOP_TEXTS.contains(token));
        stop_tokens.extend(ending.map(|(_, id)| ("tokenizer.ggml.tokens", id)));
        let metadata = Metadata { gguf, parts, architecture };
        metadata.refuse_unknown()?;
        metadata.config()?.checked(&stop_tokens)
    }
}

struct Metadata<'a> {
    gguf: &'a Gguf,
    parts: &'a Parts,
    architecture: &'a str,
}

impl Metadata<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let key = self.key(key);
        self.gguf.unsigned(&key)?.map(|n| in_range(&key, n)).transpose()
    }

    fn needed(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| missing(&self.key(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.float(&self.key(key))
    }

    fn refuse_unknown(&self) -> Result<()> {
        let prefix = self.key("");
        for key in self.gguf.keys() {
            if let Some(rest) = key.strip_prefix(&prefix)
                && !KEYS.contains(&rest)
            {
                return Err(refused(key, "only keys whose effect is implemented", "this key"));
            }
        }
        for (key, architectures) in OWN_KEYS {
            let whole = self.key(key);
            if self.gguf.keys().any(|it| it == whole) && !architectures.contains(&self.architecture)
            {
                let expected = format!("only in {}", architectures.join(" and "));
                return Err(refused(&whole, expected, self.architecture));
            }
        }
        for key in ["expert_group_count", "expert_group_used_count"] {
            if let Some(groups) = self.size(key).ok().flatten().filter(|groups| *groups > 1) {
                return Err(refused(&self.key(key), "one group of experts", groups));
            }
        }
        if self.gguf.boolean(&self.key("use_parallel_residual"))?.unwrap_or(false) {
            return Err(refused(&self.key("use_parallel_residual"), "false", "true"));
        }
        Ok(())
    }

    fn config(&self) -> Result<ModelConfig> {
        let (dim, heads) = (self.needed("embedding_length")?, self.needed("attention.head_count")?);
        let head_dim = self.size("attention.key_length")?.unwrap_or(dim / heads);
        if let Some(n) = self.size("attention.value_length")?.filter(|n| *n != head_dim) {
            return Err(refused(&self.key("attention.value_length"), head_dim, n));
        }
        let rotary_dim = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        check_widths(head_dim, rotary_dim)?;
        let experts = self.experts()?;
        let layers = checked_layers(&self.key("block_count"), self.needed("block_count")?)?;
        let shape = Shape {
            layers,
            dim,
            heads,
            kv_heads: self.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            ffn_dim: match (self.size("feed_forward_length")?, experts) {
                (Some(ffn_dim), _) => ffn_dim,
                (None, Some(experts)) => experts.ffn_dim,
                (None, None) => return Err(missing(&self.key("feed_forward_length"))),
            },
            vocab: self.vocab()?,
        };
        let (ropes, most) = self.ropes(rotary_dim)?;
        let context = self.needed("context_length")?;
        let context = most.unwrap_or(context).min(context);
        let mut config = ModelConfig::llama(shape, context, DEFAULT_THETA as f32);
        [config.rope, config.local_rope] = ropes;
        self.architecture.clone_into(&mut config.architecture);
        config.rotary_dim = rotary_dim;
        config.tied_embeddings = !self.parts.has("output.weight");
        let eps = "attention.layer_norm_rms_epsilon";
        config.norm_eps = self.float(eps)?.ok_or_else(|| missing(&self.key(eps)))? as f32;
        config.blocks = self.blocks(layers, experts.is_some())?;
        config.experts = experts;
        config.attention_bias = match self.parts.has("blk.0.attn_q.bias") {
            true if self.parts.has("blk.0.attn_output.bias") => AttentionBias::All,
            true => AttentionBias::Inputs,
            false => AttentionBias::None,
        };
        self.differences(&mut config)?;
        Ok(config)
    }

    /// What the family does otherwise than Llama. (Gains that are stored as differences from 1
    /// elsewhere are whole in GGUF files.)
    fn differences(&self, config: &mut ModelConfig) -> Result<()> {
        match self.architecture {
            "gemma2" | "gemma3" => {
                config.norms = Norms::Around;
                config.activation = Activation::GeluTanh;
                config.embedding_scale = (config.dim as f32).sqrt();
                config.attention_soft_cap =
                    self.float("attn_logit_softcapping")?.map(|cap| cap as f32);
                config.logit_soft_cap =
                    self.float("final_logit_softcapping")?.map(|cap| cap as f32);
                if self.architecture == "gemma2" {
                    let [attention, logits] = GEMMA2_CAPS;
                    config.attention_soft_cap.get_or_insert(attention);
                    config.logit_soft_cap.get_or_insert(logits);
                }
                // The 27B models scale by the width of the stream over the heads; no key says so.
                if matches!((self.architecture, config.layers), ("gemma2", 46) | ("gemma3", 62)) {
                    config.attention_scale = 1.0 / ((config.dim / config.heads) as f32).sqrt();
                }
            }
            "olmo2" => {
                config.norms = Norms::After;
                config.query_norm = QueryNorm::Whole;
            }
            _ => {}
        }
        if ["qwen3", "qwen3moe", "gemma3"].contains(&self.architecture) {
            config.query_norm = QueryNorm::Heads;
        }
        Ok(())
    }

    fn vocab(&self) -> Result<usize> {
        if let Some(vocab) = self.size("vocab_size")? {
            return Ok(vocab);
        }
        let key = "tokenizer.ggml.tokens";
        in_range(key, self.gguf.texts(key)?.map_or(0, |tokens| tokens.len() as u64))
    }

    fn experts(&self) -> Result<Option<Mixture>> {
        let Some(count) = self.gguf.unsigned(&self.key("expert_count"))?.filter(|n| *n > 0) else {
            return Ok(None);
        };
        Ok(Some(Mixture {
            count: in_range(&self.key("expert_count"), count)?,
            used: self.needed("expert_used_count")?,
            ffn_dim: match self.size("expert_feed_forward_length")? {
                Some(ffn_dim) => ffn_dim,
                None => self.needed("feed_forward_length")?,
            },
            normalise: true,
        }))
    }

    fn blocks(&self, layers: usize, experts: bool) -> Result<Vec<Block>> {
        let key = "attention.sliding_window";
        let window = self.gguf.unsigned(&self.key(key))?.filter(|window| *window > 0);
        let window = window.map(|window| in_range(&self.key(key), window)).transpose()?;
        let window = window.or((self.architecture == "gemma2").then_some(GEMMA2_WINDOW));
        let block = |local: bool| {
            let window = window.filter(|_| local);
            let angles = if window.is_some() { Angles::Local } else { Angles::Global };
            Block { window, angles, experts }
        };
        Ok(self.local(layers)?.into_iter().map(block).collect())
    }

    /// Which blocks have the window.
    fn local(&self, layers: usize) -> Result<Vec<bool>> {
        let key = self.key("attention.sliding_window_pattern");
        if let Ok(Some(listed)) = self.gguf.booleans(&key) {
            if listed.len() == layers {
                return Ok(listed);
            }
            return Err(refused(&key, format!("one for each of {layers} blocks"), listed.len()));
        }
        let pattern = self.size("attention.sliding_window_pattern")?;
        let is_local = |layer: usize| match self.architecture {
            "gemma2" => layer.is_multiple_of(2),
            "gemma3" => !(layer + 1).is_multiple_of(pattern.unwrap_or(6)),
            "olmo2" => !(layer + 1).is_multiple_of(pattern.unwrap_or(4)),
            _ => true,
        };
        Ok((0..layers).map(is_local).collect())
    }

    /// The angles of blocks without and with a window, and the most positions that they are for.
    fn ropes(&self, width: usize) -> Result<([Rope; 2], Option<usize>)> {
        let theta = self.float("rope.freq_base")?.unwrap_or(DEFAULT_THETA);
        let base = checked_theta(theta)?;
        let key = self.key("rope.scaling.type");
        // A factor without a type is linear.
        let has_factor = self.float("rope.scaling.factor")?.is_some();
        let untyped = if has_factor { "linear" } else { "none" };
        let kind = self.gguf.text(&key)?.unwrap_or(untyped);
        let factor = || {
            let key = "rope.scaling.factor";
            self.float(key)?.ok_or_else(|| missing(&self.key(key)))
        };
        let [whole, short, _] = FACTORS;
        let factors = |name| self.parts.numbers(name, width / 2);
        let [whole, short] = [factors(whole)?, factors(short)?];
        let attention = self.float("rope.scaling.attn_factor")?;
        let mut most = None;
        let scaling = match (kind, whole, short) {
            ("none", Some(factors), _) => Some(Scaling::Each { factors, scale: 1.0 }),
            // Longer sequences have other frequencies from their first position on.
            (_, None, Some(factors)) if self.architecture == "phi3" => {
                most = Some(self.needed("rope.scaling.original_context_length")?);
                Some(Scaling::Each { factors, scale: attention.unwrap_or(1.0) })
            }
            ("none", None, None) => None,
            ("linear", None, None) => Some(Scaling::Linear(factor()?)),
            ("yarn", None, None) => Some(Scaling::Yarn(self.yarn(factor()?)?)),
            (other, None, None) => return Err(refused(&key, "none, linear or yarn", other)),
            (other, ..) => {
                return Err(refused(&key, "none, beside the file's own factors", other));
            }
        };
        let rope = Rope::scaled(width, base, scaling.as_ref());
        let local = match self.architecture {
            "gemma3" => self.float("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_THETA),
            "olmo2" => self.float("rope.freq_base_swa")?.unwrap_or(theta),
            _ => return Ok(([rope.clone(), rope], most)),
        };
        Ok(([rope, Rope::plain(width, checked_theta(local)?)], most))
    }

    fn yarn(&self, factor: f64) -> Result<Yarn> {
        // The converter writes the one key as transformers means it, llama.cpp multiplies by the other.
        let scale = match self.float("rope.scaling.yarn_attn_factor")? {
            Some(scale) => scale,
            None => {
                let times = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
                Yarn::magnitude(factor, 1.0) * times
            }
        };
        let original = match self.size("rope.scaling.original_context_length")? {
            Some(original) => original,
            None => self.needed("context_length")?,
        };
        Ok(Yarn {
            factor,
            original: original as f64,
            beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            truncate: true,
            scale,
        })
    }
}
