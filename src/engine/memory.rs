//! How much memory an engine takes, told before anything is loaded.

use super::{Limits, Options};
use crate::{
    device::Device,
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
        let kv_per_token = 2 * (config.layers * config.kv_heads * config.head_dim) as u64 * element;
        let limits = Limits::new(config, options, PAGE as u64 * kv_per_token, 0);
        Self {
            weights: weights::packed_elements(config) * element,
            work: work(config, &limits, element),
            kv_per_token,
        }
    }

    /// With this many sequences of this many positions that share nothing.
    pub fn total(&self, sequences: usize, positions: usize) -> u64 {
        self.weights + self.work + self.kv_per_token * (sequences * positions) as u64
    }
}

/// Bytes for keys and values of an engine that is about to be loaded.
///
/// # Errors
/// The device has too little memory for the model.
pub(super) fn kv_bytes(config: &ModelConfig, options: &Options, device: &Device) -> Result<u64> {
    let need = Need::new(config, options);
    let Some(free) = device.free_memory()? else {
        return Ok(options.kv_bytes.unwrap_or(DEFAULT_KV_BYTES));
    };
    // The least that one sequence of a few hundred positions takes.
    let least = options.kv_bytes.unwrap_or(512 * need.kv_per_token);
    let fixed = need.weights + need.work;
    if fixed + least > free {
        let Need { weights, work, .. } = need;
        return Err(Error::new("the model does not fit into memory")
            .expected(format!("at most the {free} bytes that are free"))
            .got(format!(
                "{} bytes: {weights} of weights ({}), {work} to work in, {least} of keys and values",
                fixed + least,
                options.dtype
            ))
            .hint(match options.dtype {
                Dtype::F32 => "--dtype bf16 halves the weights",
                Dtype::Bf16 => "a smaller --max-batch needs less to work in",
            }));
    }
    // On a GPU nothing else wants the rest.
    let left = (free - fixed) / 10 * 9;
    let default = if device.is_asynchronous() { left } else { left.min(DEFAULT_KV_BYTES) };
    Ok(options.kv_bytes.unwrap_or(default))
}

fn bytes_of(dtype: Dtype) -> u64 {
    if dtype == Dtype::Bf16 { 2 } else { 4 }
}

/// What [`crate::model::forward::State`], the hooks, the captures and their copies take.
fn work(config: &ModelConfig, limits: &Limits, element: u64) -> u64 {
    let n = |n: usize| n as u64;
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
    let outputs = 2 * (norms + 4 * n(limits.capture_rows) * dim + 8 * n(limits.receipts));
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
        device::{Cpu, cpu::Isa},
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
