//! Sizes of well-known models, for measurements with random weights. Biases and norms of queries and
//! keys, which some of them have, are left out: they change no time that can be measured.

use super::{ModelConfig, config::Shape};
use crate::error::{Error, Result};

/// (name, layers, dim, heads, kv heads, head dim, ffn dim, vocab, tied embeddings).
type Row = (&'static str, usize, usize, usize, usize, usize, usize, usize, bool);
const SHAPES: [Row; 6] = [
    ("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256, false),
    ("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256, true),
    ("qwen2.5-7b", 28, 3584, 28, 4, 128, 18_944, 152_064, false),
    ("qwen3-8b", 36, 4096, 32, 8, 128, 12_288, 151_936, false),
    ("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49_152, true),
    ("tiny", 4, 128, 6, 2, 64, 256, 512, true),
];

impl ModelConfig {
    /// The sizes of a model by its name, with room for `context` positions.
    ///
    /// # Errors
    /// The name is not known.
    pub fn of_shape(name: &str, context: usize) -> Result<Self> {
        let Some(&(_, layers, dim, heads, kv_heads, head_dim, ffn_dim, vocab, tied_embeddings)) =
            SHAPES.iter().find(|shape| shape.0 == name)
        else {
            let names: Vec<&str> = SHAPES.iter().map(|shape| shape.0).collect();
            return Err(Error::new("unknown shape").expected(names.join(", ")).got(name));
        };
        let shape = Shape { layers, dim, heads, kv_heads, head_dim, ffn_dim, vocab };
        Ok(Self { tied_embeddings, ..Self::llama(shape, context, 500_000.0) })
    }
}
