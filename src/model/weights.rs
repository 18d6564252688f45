//! A checkpoint's tensors, packed for the device.

use super::{Checkpoint, ModelConfig};
use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::matmul::{Dtype, PANEL, Weight, gate_turn, interleave},
};

/// All weights of a model.
pub struct Weights {
    /// (vocab, dim)
    pub embedding: Weight,
    /// One a block.
    pub layers: Vec<LayerWeights>,
    /// (dim,)
    pub final_norm: Buffer<f32>,
    /// (vocab, dim); `None`: the embedding.
    head: Option<Weight>,
}

/// The weights of a block.
pub struct LayerWeights {
    /// (dim,)
    pub attn_norm: Buffer<f32>,
    /// ((heads + 2 · `kv_heads`) · `head_dim`, dim)
    pub qkv: Weight,
    /// (dim, heads · `head_dim`)
    pub out: Weight,
    /// (dim,)
    pub mlp_norm: Buffer<f32>,
    /// (2 · `ffn_dim`, dim), gate and up in turns; `ffn_dim` rounded up to whole panels.
    pub gate_up: Weight,
    /// (dim, `ffn_dim` rounded up)
    pub down: Weight,
}

/// `ffn_dim` rounded up to whole panels; the rows and columns beyond it are zero.
pub fn padded_ffn(config: &ModelConfig) -> usize {
    config.ffn_dim.next_multiple_of(PANEL)
}

impl Weights {
    /// Reads and packs every tensor of the checkpoint; one that is missing, misshapen or left
    /// over is an error.
    pub fn load(
        device: &Device,
        dtype: Dtype,
        config: &ModelConfig,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let load = Loader { device, dtype, config, checkpoint };
        let (vocab, dim) = (config.vocab, config.dim);
        let embedding = load.weight("model.embed_tokens.weight", (vocab, dim))?;
        let layers = (0..config.layers).map(|layer| load.layer(layer)).collect::<Result<_>>()?;
        let final_norm = load.vector("model.norm.weight", dim)?;
        let head = match config.tied_embeddings {
            true => None,
            false => Some(load.weight("lm_head.weight", (vocab, dim))?),
        };
        checkpoint.finish()?;
        Ok(Self { embedding, layers, final_norm, head })
    }

    /// Weights that look random, for measurements: the stream stays of order one through all
    /// layers, and logits too. The same on every device.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn random(device: &Device, dtype: Dtype, config: &ModelConfig) -> Result<Self> {
        let c = config;
        let seed = std::cell::Cell::new(0);
        let weight = |n: usize, k: usize, gated: bool| {
            seed.set(seed.get() + 1);
            Weight::random(device, dtype, (n, k), seed.get(), 1.0 / (k as f32).sqrt(), gated)
        };
        let (attn, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let ones = || Buffer::upload(device, &vec![1.0; c.dim]);
        let layer = |_| -> Result<LayerWeights> {
            Ok(LayerWeights {
                attn_norm: ones()?,
                qkv: weight(attn + 2 * kv, c.dim, false)?,
                out: weight(c.dim, attn, false)?,
                mlp_norm: ones()?,
                gate_up: weight(2 * padded_ffn(c), c.dim, true)?,
                down: weight(c.dim, padded_ffn(c), false)?,
            })
        };
        let layers = (0..c.layers).map(layer).collect::<Result<_>>()?;
        let embedding = weight(c.vocab, c.dim, false)?;
        let head = if c.tied_embeddings { None } else { Some(weight(c.vocab, c.dim, false)?) };
        Ok(Self { embedding, layers, final_norm: ones()?, head })
    }

    /// The output head, (vocab, dim).
    pub fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let layer =
            |l: &LayerWeights| l.qkv.bytes() + l.out.bytes() + l.gate_up.bytes() + l.down.bytes();
        self.embedding.bytes()
            + self.layers.iter().map(layer).sum::<usize>()
            + self.head.as_ref().map_or(0, Weight::bytes)
    }
}

struct Loader<'a> {
    device: &'a Device,
    dtype: Dtype,
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
}

impl Loader<'_> {
    fn vector(&self, name: &str, len: usize) -> Result<Buffer<f32>> {
        let mut values = vec![0.0; len];
        self.checkpoint.tensor(name, &[len])?.read_row(0, &mut values);
        Buffer::upload(self.device, &values)
    }

    fn weight(&self, name: &str, (n, k): (usize, usize)) -> Result<Weight> {
        let tensor = self.checkpoint.tensor(name, &[n, k])?;
        Weight::pack(self.device, self.dtype, (n, k), |row, out| tensor.read_row(row, out))
    }

    fn layer(&self, layer: usize) -> Result<LayerWeights> {
        let c = self.config;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        Ok(LayerWeights {
            attn_norm: self.vector(&name("input_layernorm"), c.dim)?,
            qkv: self.qkv(&name)?,
            out: self.weight(&name("self_attn.o_proj"), (c.dim, c.heads * c.head_dim))?,
            mlp_norm: self.vector(&name("post_attention_layernorm"), c.dim)?,
            gate_up: self.gate_up(&name)?,
            down: self.down(&name)?,
        })
    }

    fn qkv(&self, name: &impl Fn(&str) -> String) -> Result<Weight> {
        let c = self.config;
        let (q_rows, kv_rows) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let tensor = |part, rows| self.checkpoint.tensor(&name(part), &[rows, c.dim]);
        let q = tensor("self_attn.q_proj", q_rows)?;
        let k = tensor("self_attn.k_proj", kv_rows)?;
        let v = tensor("self_attn.v_proj", kv_rows)?;
        let shape = (q_rows + 2 * kv_rows, c.dim);
        Weight::pack(self.device, self.dtype, shape, |row, out| {
            if row < q_rows {
                q.read_row(row, out);
            } else if row < q_rows + kv_rows {
                k.read_row(row - q_rows, out);
            } else {
                v.read_row(row - q_rows - kv_rows, out);
            }
        })
    }

    fn gate_up(&self, name: &impl Fn(&str) -> String) -> Result<Weight> {
        let c = self.config;
        let gate = self.checkpoint.tensor(&name("mlp.gate_proj"), &[c.ffn_dim, c.dim])?;
        let up = self.checkpoint.tensor(&name("mlp.up_proj"), &[c.ffn_dim, c.dim])?;
        let (shape, turn) = ((2 * padded_ffn(c), c.dim), gate_turn(self.device));
        Weight::pack(self.device, self.dtype, shape, |row, out| {
            let (is_up, row) = interleave(turn, row);
            if row < c.ffn_dim {
                if is_up { up.read_row(row, out) } else { gate.read_row(row, out) }
            } else {
                out.fill(0.0);
            }
        })
    }

    fn down(&self, name: &impl Fn(&str) -> String) -> Result<Weight> {
        let c = self.config;
        let tensor = self.checkpoint.tensor(&name("mlp.down_proj"), &[c.dim, c.ffn_dim])?;
        let shape = (c.dim, padded_ffn(c));
        Weight::pack(self.device, self.dtype, shape, |row, out| {
            let (values, padding) = out.split_at_mut(c.ffn_dim);
            tensor.read_row(row, values);
            padding.fill(0.0);
        })
    }
}
