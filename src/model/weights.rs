//! A checkpoint's tensors, packed for the device.

use super::{AttentionBias, Block, Checkpoint, Mixture, ModelConfig, Norms, QueryNorm, Tensor};
use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::{
        experts::{Experts, ExpertsSizes},
        matmul::{Dtype, PANEL, Weight, WeightSet, gate_turn, interleave},
        rope_append::QueryNorms,
    },
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
    /// (dim,), of what attention reads, where it is normalised.
    pub attn_norm: Option<Buffer<f32>>,
    /// ((heads + 2 · `kv_heads`) · `head_dim`, dim)
    pub qkv: Weight,
    /// Of queries and keys.
    pub query_norms: Option<QueryNorms>,
    /// (dim, heads · `head_dim`)
    pub out: Weight,
    /// (dim,), of what attention adds, where it is normalised.
    pub attn_post_norm: Option<Buffer<f32>>,
    /// (dim,), of what the MLP reads.
    pub mlp_norm: Option<Buffer<f32>>,
    /// What stands between these norms.
    pub mlp: Mlp,
    /// (dim,), of what the MLP adds.
    pub mlp_post_norm: Option<Buffer<f32>>,
}

/// A block's MLP, or the mixture in its place.
pub enum Mlp {
    /// One for all rows.
    Dense {
        /// (2 · `ffn_dim`, dim), gate and up in turns; `ffn_dim` rounded up to whole panels.
        gate_up: Weight,
        /// (dim, `ffn_dim` rounded up)
        down: Weight,
    },
    /// A few of many for each row.
    Experts(Experts),
}

impl Mlp {
    fn bytes(&self) -> usize {
        match self {
            Self::Dense { gate_up, down } => gate_up.bytes() + down.bytes(),
            Self::Experts(experts) => experts.bytes(),
        }
    }
}

/// `ffn_dim` rounded up to whole panels; the rows and columns beyond it are zero.
pub fn padded_ffn(config: &ModelConfig) -> usize {
    config.ffn_dim.next_multiple_of(PANEL)
}

/// The sizes of a model's mixtures.
pub fn experts_sizes(config: &ModelConfig) -> Option<ExpertsSizes> {
    config.experts.map(|experts| ExpertsSizes {
        experts: experts.count,
        used: experts.used,
        dim: config.dim,
        ffn: experts.ffn_dim.next_multiple_of(PANEL),
    })
}

/// Numbers in all packed matrices.
pub(crate) fn packed_elements(config: &ModelConfig) -> u128 {
    let c = config;
    let matrix = |n: usize, k: usize| n.next_multiple_of(PANEL) as u128 * k as u128;
    let (attn, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let mlp = |ffn: usize| 3 * matrix(ffn.next_multiple_of(PANEL), c.dim);
    let sparse = |e: Mixture| e.count as u128 * mlp(e.ffn_dim) + matrix(e.count, c.dim);
    let block = |block: &Block| {
        let mlp = match c.experts.filter(|_| block.experts) {
            Some(experts) => sparse(experts),
            None => mlp(c.ffn_dim),
        };
        matrix(attn + 2 * kv, c.dim) + matrix(c.dim, attn) + mlp
    };
    let heads = if c.tied_embeddings { 1 } else { 2 };
    c.blocks.iter().map(block).sum::<u128>() + heads * matrix(c.vocab, c.dim)
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
        let final_norm = Buffer::upload(device, &load.gain("model.norm.weight", dim)?)?;
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
        assert!(c.experts.is_none(), "random weights of dense models");
        let seed = std::cell::Cell::new(0);
        let weight = |n: usize, k: usize, gated: bool| {
            seed.set(seed.get() + 1);
            Weight::random(device, dtype, (n, k), seed.get(), 1.0 / (k as f32).sqrt(), gated)
        };
        let (attn, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let ones = || Buffer::upload(device, &vec![1.0; c.dim]);
        let layer = |_| -> Result<LayerWeights> {
            Ok(LayerWeights {
                attn_norm: Some(ones()?),
                qkv: weight(attn + 2 * kv, c.dim, false)?,
                query_norms: None,
                out: weight(c.dim, attn, false)?,
                attn_post_norm: None,
                mlp_norm: Some(ones()?),
                mlp: Mlp::Dense {
                    gate_up: weight(2 * padded_ffn(c), c.dim, true)?,
                    down: weight(c.dim, padded_ffn(c), false)?,
                },
                mlp_post_norm: None,
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
        let layer = |l: &LayerWeights| l.qkv.bytes() + l.out.bytes() + l.mlp.bytes();
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

/// Rows of a tensor from `first` on: one matrix of several that are stored as one.
#[derive(Clone, Copy)]
struct Part<'a> {
    tensor: Tensor<'a>,
    first: usize,
}

impl Part<'_> {
    fn read_row(&self, row: usize, out: &mut [f32]) {
        self.tensor.read_row(self.first + row, out);
    }
}

/// Names of a block's norms: of what attention and MLP read, and of what they add.
fn norm_names(norms: Norms) -> [Option<&'static str>; 4] {
    let input = Some("input_layernorm");
    let (middle, post) = (Some("post_attention_layernorm"), Some("post_feedforward_layernorm"));
    match norms {
        Norms::Before => [input, middle, None, None],
        Norms::After => [None, None, middle, post],
        Norms::Around => [input, Some("pre_feedforward_layernorm"), middle, post],
    }
}

/// Which stored row of queries or keys stands at a row of ours: in a head, components that are turned
/// stand half a head from each other, also where not all are.
fn turned_row(config: &ModelConfig, row: usize) -> usize {
    let (half, turned) = (config.head_dim / 2, config.rotary_dim / 2);
    let (head, place) = (row / config.head_dim * config.head_dim, row % config.head_dim);
    let (is_high, at) = (place >= half, place % half);
    head + match (is_high, at < turned) {
        (false, true) => at,
        (true, false) => half + at,
        (true, true) | (false, false) => turned + at,
    }
}

impl<'a> Loader<'a> {
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut values = vec![0.0; len];
        self.checkpoint.tensor(name, &[len])?.read_vector(&mut values);
        Ok(values)
    }

    /// A norm's gain, whole.
    fn gain(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut gain = self.vector(name, len)?;
        gain.iter_mut().for_each(|gain| *gain += self.config.gain_offset);
        Ok(gain)
    }

    fn weight(&self, name: &str, (n, k): (usize, usize)) -> Result<Weight> {
        let tensor = self.checkpoint.tensor(name, &[n, k])?;
        Weight::pack(self.device, self.dtype, (n, k), |row, out| tensor.read_row(row, out))
    }

    fn layer(&self, layer: usize) -> Result<LayerWeights> {
        let c = self.config;
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let [attn_norm, mlp_norm, attn_post_norm, mlp_post_norm] =
            norm_names(c.norms).map(|part| {
                let gain = part.map(|part| self.gain(&name(&format!("{part}.weight")), c.dim));
                gain.transpose()?.map(|gain| Buffer::upload(self.device, &gain)).transpose()
            });
        Ok(LayerWeights {
            attn_norm: attn_norm?,
            qkv: self.qkv(&name)?,
            query_norms: self.query_norms(&name)?,
            out: self.out(&name)?,
            attn_post_norm: attn_post_norm?,
            mlp_norm: mlp_norm?,
            mlp: match c.experts.filter(|_| c.blocks[layer].experts) {
                Some(sizes) => Mlp::Experts(self.experts(sizes, &name)?),
                None => self.dense(&name)?,
            },
            mlp_post_norm: mlp_post_norm?,
        })
    }

    /// Matrices (rows, dim) by their own names, or stored one below the other under one.
    fn parts<const N: usize>(
        &self,
        whole: &str,
        parts: [(&str, usize); N],
        name: &impl Fn(&str) -> String,
    ) -> Result<[Part<'a>; N]> {
        let weight = |part: &str| name(&format!("{part}.weight"));
        let mut found = Vec::with_capacity(N);
        if self.checkpoint.has(&weight(whole)) {
            let all = parts.iter().map(|part| part.1).sum();
            let tensor = self.checkpoint.tensor(&weight(whole), &[all, self.config.dim])?;
            let mut first = 0;
            for (_, rows) in parts {
                found.push(Part { tensor, first });
                first += rows;
            }
        } else {
            for (part, rows) in parts {
                let tensor = self.checkpoint.tensor(&weight(part), &[rows, self.config.dim])?;
                found.push(Part { tensor, first: 0 });
            }
        }
        Ok(found.try_into().unwrap_or_else(|_| unreachable!("one a part")))
    }

    fn qkv(&self, name: &impl Fn(&str) -> String) -> Result<Weight> {
        let c = self.config;
        let (q_rows, kv_rows) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let parts = [
            ("self_attn.q_proj", q_rows),
            ("self_attn.k_proj", kv_rows),
            ("self_attn.v_proj", kv_rows),
        ];
        let [q, k, v] = self.parts("self_attn.qkv_proj", parts, name)?;
        let stored = |row: usize| turned_row(c, row);
        let shape = (q_rows + 2 * kv_rows, c.dim);
        let weight = Weight::pack(self.device, self.dtype, shape, |row, out| {
            if row < q_rows {
                q.read_row(stored(row), out);
            } else if row < q_rows + kv_rows {
                k.read_row(stored(row - q_rows), out);
            } else {
                v.read_row(row - q_rows - kv_rows, out);
            }
        })?;
        if c.attention_bias == AttentionBias::None {
            return Ok(weight);
        }
        let mut bias = Vec::with_capacity(shape.0);
        for (index, (part, rows)) in parts.into_iter().enumerate() {
            let values = self.vector(&name(&format!("{part}.bias")), rows)?;
            let turned = |row| if index < 2 { values[stored(row)] } else { values[row] };
            bias.extend((0..rows).map(turned));
        }
        weight.with_bias(self.device, &bias)
    }

    fn query_norms(&self, name: &impl Fn(&str) -> String) -> Result<Option<QueryNorms>> {
        let c = self.config;
        let widths = match c.query_norm {
            QueryNorm::None => return Ok(None),
            QueryNorm::Heads => [c.head_dim; 2],
            QueryNorm::Whole => [c.heads * c.head_dim, c.kv_heads * c.head_dim],
        };
        let gain = |part: &str, width| {
            let gain = self.gain(&name(&format!("self_attn.{part}.weight")), width)?;
            let gain: Vec<f32> = (0..width).map(|at| gain[turned_row(c, at)]).collect();
            Buffer::upload(self.device, &gain)
        };
        let [q, k] = [gain("q_norm", widths[0])?, gain("k_norm", widths[1])?];
        Ok(Some(QueryNorms { q, k, eps: c.norm_eps, whole: c.query_norm == QueryNorm::Whole }))
    }

    fn out(&self, name: &impl Fn(&str) -> String) -> Result<Weight> {
        let c = self.config;
        let weight =
            self.weight(&name("self_attn.o_proj.weight"), (c.dim, c.heads * c.head_dim))?;
        if c.attention_bias != AttentionBias::All {
            return Ok(weight);
        }
        weight.with_bias(self.device, &self.vector(&name("self_attn.o_proj.bias"), c.dim)?)
    }

    fn dense(&self, name: &impl Fn(&str) -> String) -> Result<Mlp> {
        let c = self.config;
        let parts = [("mlp.gate_proj", c.ffn_dim), ("mlp.up_proj", c.ffn_dim)];
        let halves = self.parts("mlp.gate_up_proj", parts, name)?;
        let down = self.checkpoint.tensor(&name("mlp.down_proj.weight"), &[c.dim, c.ffn_dim])?;
        Ok(Mlp::Dense {
            gate_up: self.gate_up(halves, c.ffn_dim)?,
            down: self.down(Part { tensor: down, first: 0 }, c.ffn_dim)?,
        })
    }

    fn experts(&self, sizes: Mixture, name: &impl Fn(&str) -> String) -> Result<Experts> {
        let (dim, ffn) = (self.config.dim, sizes.ffn_dim);
        let gate = self.expert_parts("gate_proj", sizes.count, (ffn, dim), name)?;
        let up = self.expert_parts("up_proj", sizes.count, (ffn, dim), name)?;
        let down = self.expert_parts("down_proj", sizes.count, (dim, ffn), name)?;
        let halves = gate.into_iter().zip(up);
        let gate_up =
            halves.map(|(gate, up)| self.gate_up([gate, up], ffn)).collect::<Result<_>>()?;
        let down = down.into_iter().map(|down| self.down(down, ffn)).collect::<Result<_>>()?;
        Ok(Experts {
            router: self.weight(&name("mlp.gate.weight"), (sizes.count, dim))?,
            gate_up: WeightSet::new(self.device, gate_up)?,
            down: WeightSet::new(self.device, down)?,
            used: sizes.used,
            normalise: sizes.normalise,
            activation: self.config.activation,
        })
    }

    /// A matrix (n, k) of every expert: under a name each, or all in one tensor.
    fn expert_parts(
        &self,
        part: &str,
        count: usize,
        (n, k): (usize, usize),
        name: &impl Fn(&str) -> String,
    ) -> Result<Vec<Part<'a>>> {
        let whole = name(&format!("mlp.experts.{part}.weight"));
        if self.checkpoint.has(&whole) {
            let tensor = self.checkpoint.tensor(&whole, &[count, n, k])?;
            return Ok((0..count).map(|expert| Part { tensor, first: expert * n }).collect());
        }
        let one = |expert: usize| {
            let name = name(&format!("mlp.experts.{expert}.{part}.weight"));
            Ok(Part { tensor: self.checkpoint.tensor(&name, &[n, k])?, first: 0 })
        };
        (0..count).map(one).collect()
    }

    fn gate_up(&self, [gate, up]: [Part<'a>; 2], ffn: usize) -> Result<Weight> {
        let shape = (2 * ffn.next_multiple_of(PANEL), self.config.dim);
        let turn = gate_turn(self.device);
        Weight::pack(self.device, self.dtype, shape, |row, out| {
            let (is_up, row) = interleave(turn, row);
            if row < ffn {
                if is_up { up.read_row(row, out) } else { gate.read_row(row, out) }
            } else {
                out.fill(0.0);
            }
        })
    }

    fn down(&self, down: Part<'a>, ffn: usize) -> Result<Weight> {
        let shape = (self.config.dim, ffn.next_multiple_of(PANEL));
        Weight::pack(self.device, self.dtype, shape, |row, out| {
            let (values, padding) = out.split_at_mut(ffn);
            down.read_row(row, values);
            padding.fill(0.0);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turned_components_stand_half_a_head_apart() {
        let config = ModelConfig { rotary_dim: 4, ..ModelConfig::of_shape("tiny", 64).unwrap() };
        let config = ModelConfig { head_dim: 8, ..config };
        let rows: Vec<usize> = (8..16).map(|row| turned_row(&config, row)).collect();
        assert_eq!(rows, [8, 9, 12, 13, 10, 11, 14, 15]);
        let all = ModelConfig { rotary_dim: 8, ..config };
        assert!((0..16).all(|row| turned_row(&all, row) == row));
    }
}
