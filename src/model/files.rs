//! The files of a Hugging Face model that are read.

use super::text;

/// The configuration.
pub const CONFIG: &str = "config.json";
/// More of it, which need not be there.
pub(super) const GENERATION: &str = "generation_config.json";
/// All weights.
pub const SINGLE: &str = "model.safetensors";
/// Or which shards hold which of them.
pub const INDEX: &str = "model.safetensors.index.json";

/// All but the weights and their index: configuration, tokenizer and chat template.
pub fn side() -> impl Iterator<Item = &'static str> {
    [CONFIG, GENERATION].into_iter().chain(text::FILES)
}
