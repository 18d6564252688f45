//! What the forward pass needs to know about a model, from GGUF metadata or a `config.json`.
//! A value that would change the computation and is not known here is refused.

mod gguf;
mod json;
mod rope;
#[cfg(test)]
mod tests;

use std::fmt::Display;

pub(super) use self::gguf::FACTORS;
pub use self::{gguf::check_gguf_architecture, rope::Rope};
use crate::{
    error::{Error, Result},
    ops::{attention::MAX_HEAD_DIM, experts::MOST_USED, matmul::Activation},
};

/// A decoder: sizes, constants, and how its blocks differ from Llama's.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Its family, by the name it has in `config.json` or in GGUF metadata.
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
    /// The most positions that can be computed.
    pub context: usize,
    /// Whether the output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Tokens that end generation, ascending.
    pub stop_tokens: Vec<u32>,

    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    /// Added to every stored gain of a norm: 1 where gains are stored as differences from it.
    pub gain_offset: f32,
    /// Which norms a block has.
    pub norms: Norms,
    /// What is done to queries and keys before they are turned.
    pub query_norm: QueryNorm,
    /// Which of attention's products have a bias.
    pub attention_bias: AttentionBias,
    /// What a gate goes through.
    pub activation: Activation,
    /// Scores are queries times keys times this.
    pub attention_scale: f32,
    /// A score s becomes cap · tanh(s / cap).
    pub attention_soft_cap: Option<f32>,
    /// A token's embedding times this enters the stream.
    pub embedding_scale: f32,
    /// A branch times this is added to the stream.
    pub residual_scale: f32,
    /// Logits are the head's product times this.
    pub logit_scale: f32,
    /// A logit l becomes cap · tanh(l / cap).
    pub logit_soft_cap: Option<f32>,
    /// Components of a head that are turned; those behind them are kept as they are.
    pub rotary_dim: usize,
    /// Angles of blocks that see every position.
    pub rope: Rope,
    /// Angles of blocks that are made for a window.
    pub local_rope: Rope,
    /// One a block.
    pub blocks: Vec<Block>,
    /// The experts of the blocks that have them.
    pub experts: Option<Mixture>,
}

/// What differs between the blocks of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Only this many positions are seen, the row's own among them.
    pub window: Option<usize>,
    /// By which angles queries and keys are turned.
    pub angles: Angles,
    /// Whether its MLP is a mixture of experts.
    pub experts: bool,
}

/// Which angles a block turns by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Angles {
    /// None: it does not turn.
    None,
    /// [`ModelConfig::rope`].
    Global,
    /// [`ModelConfig::local_rope`].
    Local,
}

/// Which norms a block has around attention and MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// Of what they read (Llama).
    Before,
    /// Of what they add (`OLMo` 2); they read the stream itself.
    After,
    /// Both (Gemma 2).
    Around,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryNorm {
    /// There are none.
    None,
    /// Each head's own, with one gain for all (Qwen 3, Gemma 3).
    Heads,
    /// Of all heads together (`OLMo` 2).
    Whole,
}

/// Which of attention's products have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionBias {
    /// None.
    None,
    /// Queries, keys and values (Qwen 2).
    Inputs,
    /// The output projection too.
    All,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Experts of a block.
    pub count: usize,
    /// Experts that a row goes through.
    pub used: usize,
    /// Width inside an expert.
    pub ffn_dim: usize,
    /// Whether the weights of those used are scaled to a sum of one.
    pub normalise: bool,
}

/// The sizes of a decoder.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub ffn_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
}

/// The families that can be run, by their `model_type` in `config.json`. GGUF files name them
/// without the underscore, and Llama, Mistral and Mixtral all `llama`.
pub const ARCHITECTURES: [&str; 15] = [
    "llama",
    "mistral",
    "mistral3",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "phi3",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
];

const DEFAULT_THETA: f64 = 10_000.0;
/// No model's width is near it; products of four such numbers fit into 128 bits.
const MAX_SIZE: usize = 1 << 24;
/// No model's depth is near it.
const MAX_LAYERS: usize = 1 << 12;

impl ModelConfig {
    /// A Llama of these sizes: no biases, norms before attention and MLP, plain rope.
    pub fn llama(shape: Shape, context: usize, theta: f32) -> Self {
        let Shape { layers, dim, heads, kv_heads, head_dim, ffn_dim, vocab } = shape;
        let rope = Rope::plain(head_dim, theta);
        Self {
            architecture: "llama".into(),
            layers,
            dim,
            heads,
            kv_heads,
            head_dim,
            ffn_dim,
            vocab,
            context,
            tied_embeddings: true,
            stop_tokens: Vec::new(),
            norm_eps: 1e-5,
            gain_offset: 0.0,
            norms: Norms::Before,
            query_norm: QueryNorm::None,
            attention_bias: AttentionBias::None,
            activation: Activation::Silu,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_soft_cap: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_soft_cap: None,
            rotary_dim: head_dim,
            local_rope: rope.clone(),
            rope,
            blocks: vec![Block { window: None, angles: Angles::Global, experts: false }; layers],
            experts: None,
        }
    }

    /// Numbers in all tensors; a tied output matrix counts once.
    pub fn parameters(&self) -> u64 {
        let n = |n: usize| n as u128;
        let (q, kv) = (n(self.heads) * n(self.head_dim), n(self.kv_heads) * n(self.head_dim));
        let bias = match self.attention_bias {
            AttentionBias::None => 0,
            AttentionBias::Inputs => q + 2 * kv,
            AttentionBias::All => q + 2 * kv + n(self.dim),
        };
        let query_norms = match self.query_norm {
            QueryNorm::None => 0,
            QueryNorm::Heads => 2 * n(self.head_dim),
            QueryNorm::Whole => q + kv,
        };
        let attention = n(self.dim) * 2 * (q + kv) + bias + query_norms;
        let norms = if self.norms == Norms::Around { 4 } else { 2 };
        let dense = 3 * n(self.dim) * n(self.ffn_dim);
        let sparse = self
            .experts
            .map_or(0, |experts| n(experts.count) * n(self.dim) * (3 * n(experts.ffn_dim) + 1));
        let mlp = |block: &Block| if block.experts { sparse } else { dense };
        let blocks: u128 =
            self.blocks.iter().map(|block| attention + mlp(block) + norms * n(self.dim)).sum();
        let embedding = n(self.vocab) * n(self.dim);
        let output = if self.tied_embeddings { 0 } else { embedding };
        u64::try_from(blocks + embedding + output + n(self.dim)).unwrap_or(u64::MAX)
    }

    fn checked(mut self, stop_tokens: &[(&str, u64)]) -> Result<Self> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} query heads", self.heads);
            return Err(refused("key/value heads", expected, self.kv_heads));
        }
        let scales = [
            ("norm epsilon", Some(self.norm_eps)),
            ("attention scale", Some(self.attention_scale)),
            ("attention soft cap", self.attention_soft_cap),
            ("embedding scale", Some(self.embedding_scale)),
            ("residual scale", Some(self.residual_scale)),
            ("logit scale", Some(self.logit_scale)),
            ("logit soft cap", self.logit_soft_cap),
            ("rope scale", Some(self.rope.scale)),
            ("rope scale of windows", Some(self.local_rope.scale)),
        ];
        for (name, x) in scales.into_iter().filter_map(|(name, x)| Some((name, x?))) {
            if !(x.is_finite() && x > 0.0) {
                return Err(refused(name, "a finite number above 0", x));
            }
        }
        for rope in [&self.rope, &self.local_rope] {
            if let Some(f) = rope.frequencies.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
                let hint = "a factor of rope scaling is zero, negative or too large";
                return Err(refused("rope frequency", "a finite number above 0", f).hint(hint));
            }
        }
        if let Some(Mixture { count, used, .. }) = self.experts
            && used > count.min(MOST_USED)
        {
            let expected = format!("at most {MOST_USED}, and the {count} there are");
            return Err(refused("experts used", expected, used));
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

/// Refuses head widths that rope could not turn, before frequencies are made of them.
fn check_widths(head_dim: usize, rotary_dim: usize) -> Result<()> {
    let even = "an even number above 0 (rope turns pairs)";
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        return Err(refused("head width", format!("{even}, at most {MAX_HEAD_DIM}"), head_dim));
    }
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
        return Err(refused(
            "turned part of a head",
            format!("{even}, at most {head_dim}"),
            rotary_dim,
        ));
    }
    Ok(())
}

/// A base of rotary angles.
fn checked_theta(theta: f64) -> Result<f32> {
    let narrow = theta as f32;
    if narrow.is_finite() && narrow > 0.0 {
        return Ok(narrow);
    }
    Err(refused("rope base", "a finite number above 0", theta))
}

fn unsupported(key: &str, known: &[&str], name: &str) -> Error {
    Error::new("unsupported architecture")
        .at(key)
        .expected(known.join(", "))
        .got(if name.is_empty() { "none" } else { name })
}

fn refused(key: &str, expected: impl Display, got: impl Display) -> Error {
    Error::new("unsupported model configuration").at(key).expected(expected).got(got)
}

fn missing(key: &str) -> Error {
    Error::new("missing in the model's configuration").at(key)
}

fn checked_layers(key: &str, layers: usize) -> Result<usize> {
    if layers <= MAX_LAYERS {
        return Ok(layers);
    }
    Err(refused(key, format!("at most {MAX_LAYERS}"), layers))
}

fn in_range(key: &str, n: u64) -> Result<usize> {
    usize::try_from(n)
        .ok()
        .filter(|n| (1..=MAX_SIZE).contains(n))
        .ok_or_else(|| refused(key, format!("1..={MAX_SIZE}"), n))
}
