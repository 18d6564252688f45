//! How much memory an engine takes, told before anything is loaded.

use super::{Limits, Options};
use crate::{
    device::DeviceKind,
    error::{Error, Result},
    model::{ModelConfig, weights},
    ops::{
        attention::PAGE,
        hooks::{site_count, tap_count},
        matmul::Dtype,
    },
};

/// Bytes for keys and values where none are asked for and there is room.
const DEFAULT_KV_BYTES: u64 = 2 << 30;

/// Bytes that an engine takes, within a few per cent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Weights, packed.
    pub weights: u64,
    /// What a step reads and writes beside them and the cache.
    pub work: u64,
    /// Keys and values of one position, in all blocks.
    pub kv_per_token: u64,
}

impl Need {
    /// For a model and options, whose cache and device do not matter.
    pub fn new(config: &ModelConfig, options: &Options) -> Self {
        let element = bytes_of(options.dtype);
        let heads = n(config.layers) * n(config.kv_heads) * n(config.head_dim);
        let kv_per_token = narrow(2 * heads * element);
        let config = &options.limited(config);
        let limits = Limits::new(config, options, PAGE as u64 * kv_per_token, 0);
        Self {
            weights: narrow(weights::packed_elements(config) * element),
            work: narrow(work(config, &limits, element)),
            kv_per_token,
        }
    }

    /// With this many sequences of this many positions that share nothing.
    pub fn total(&self, sequences: usize, positions: usize) -> u64 {
        let kv = u128::from(self.kv_per_token) * n(sequences) * n(positions);
        narrow(u128::from(self.weights) + u128::from(self.work) + kv)
    }
}

fn n(n: usize) -> u128 {
    n as u128
}

fn narrow(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Bytes for keys and values of an engine that is about to be loaded, where so many are free.
///
/// # Errors
/// They are too few for the model.
pub(super) fn kv_bytes(config: &ModelConfig, options: &Options, free: Option<u64>) -> Result<u64> {
    let need = Need::new(config, options);
    let Some(free) = free else {
        return Ok(options.kv_bytes.unwrap_or(DEFAULT_KV_BYTES));
    };
    // The least that one sequence of a few hundred positions takes.
    let least = options.kv_bytes.unwrap_or(need.kv_per_token.saturating_mul(512));
    let fixed = need.weights.saturating_add(need.work);
    if fixed.saturating_add(least) > free {
        let Need { weights, work, .. } = need;
        return Err(Error::new("the model does not fit into memory")
            .expected(format!("at most the {free} bytes that are free"))
            .got(format!(
                "{} bytes: {weights} of weights ({}), {work} to work in, {least} of keys and values",
                fixed.saturating_add(least),
                options.dtype
            ))
            .hint(match options.dtype {
                Dtype::F32 => "--dtype bf16 halves the weights",
                Dtype::Bf16 => "smaller --max-batch and --context need less to work in",
            }));
    }
    // On a GPU nothing else wants the rest.
    let left = (free - fixed) / 10 * 9;
    let is_gpu = matches!(options.device, DeviceKind::Cuda(_));
    let default = if is_gpu { left } else { left.min(DEFAULT_KV_BYTES) };
    Ok(options.kv_bytes.unwrap_or(default))
}

fn bytes_of(dtype: Dtype) -> u128 {
    if dtype == Dtype::Bf16 { 2 } else { 4 }
}

/// What [`crate::model::forward::State`], the hooks, the captures and their copies take.
fn work(config: &ModelConfig, limits: &Limits, element: u128) -> u128 {
    let c = config;
    let sizes = limits.sizes(c.layers);
    let (heads, dim) = (n(c.heads * c.head_dim), n(c.dim));
    let qkv = heads + 2 * n(c.kv_heads * c.head_dim);
    // Of a mixture: the copies of a row, what they become, and their products.
    let copies = weights::experts_sizes(c).map_or(0, |of| {
        n(of.used) * ((element + 4) * dim + element * n(of.ffn)) + 4 * n(of.experts)
    });
    let row = 4 * (2 * dim + qkv) + element * (dim + heads + n(weights::padded_ffn(c))) + copies;
    let head_row = element * dim + 4 * n(c.vocab);
    let norms = 4 * n(site_count(c.layers)) * n(sizes.rows);
    let outputs = 2 * (norms + 4 * n(limits.capture_rows) * dim + 8 * n(limits.receipts))
        + 12 * n(limits.probed);
    let tables = 4 * n(tap_count(c.layers)) + 8 * n(sizes.entries);
    n(sizes.rows) * row
        + n(sizes.head_rows) * head_row
        + 4 * (n(sizes.captured) + n(limits.vectors)) * dim
        + norms
        + outputs
        + tables
        + 8 * n(sizes.positions) * n(c.head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Cpu, Device, cpu::Isa},
        engine::Engine,
        model::weights::Weights,
    };

    #[test]
    fn weights_are_as_large_as_was_said() {
        for name in ["tiny", "smollm2-135m"] {
            let config = ModelConfig::of_shape(name, 64).unwrap();
            let device = Device::Cpu(Cpu::new(Isa::detect(), 1, 1 << 20).unwrap());
            let weights = Weights::random(&device, Dtype::Bf16, &config).unwrap().bytes() as u64;
            let told = Need::new(&config, &Options::default()).weights;
            let off = told.abs_diff(weights) as f64 / weights as f64;
            assert!(off < 0.05, "{name}: {told} told, {weights} taken");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_before_it_is_loaded() {
        let mut config = ModelConfig::of_shape("llama-3.1-8b", 64).unwrap();
        config.vocab = 1 << 24;
        config.dim = 1 << 20;
        let error = Engine::start_random(&config, &Options::default()).err().unwrap().to_string();
        let need = Need::new(&config, &Options::default());
        assert!(error.contains("does not fit into memory"), "{error}");
        assert!(error.contains(&format!("{} of weights", need.weights)), "{error}");
    }
}
