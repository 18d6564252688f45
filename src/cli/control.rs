//! llama.cpp's flags for control vectors.

use std::path::PathBuf;

use crate::{
    engine::vectors::VectorSet,
    error::{Context, Error, Result},
    request::{Injection, OneOrMany, VectorRef},
};

/// Vectors that are added to the outputs of blocks in every request, one row a block.
#[derive(clap::Args)]
#[expect(clippy::struct_field_names, reason = "options are named after them")]
pub struct ControlArgs {
    /// Add a control vector (GGUF, or FILE#NAME of a vector set) to the outputs of its blocks, in every
    /// request; may be repeated
    #[arg(long, value_name = "FILE")]
    control_vector: Vec<String>,
    /// Likewise, S times as strong
    #[arg(long, value_name = "FILE:S", value_parser = scaled)]
    control_vector_scaled: Vec<(String, f32)>,
    /// Only at these blocks, counted from 0; the last is among them
    #[arg(long, num_args = 2, value_names = ["FIRST", "LAST"])]
    control_vector_layer_range: Vec<usize>,
}

fn scaled(text: &str) -> std::result::Result<(String, f32), String> {
    let parts = text.rsplit_once(':').and_then(|(file, s)| Some((file, s.parse().ok()?)));
    let (file, strength) = parts.filter(|(file, _)| !file.is_empty()).ok_or("expected FILE:S")?;
    Ok((file.to_owned(), strength))
}

impl ControlArgs {
    /// What every request gets beside its own injections.
    pub fn injections(&self) -> Result<Vec<Injection>> {
        let plain = self.control_vector.iter().map(|file| (file.as_str(), 1.0));
        let scaled = self.control_vector_scaled.iter().map(|(file, s)| (file.as_str(), *s));
        let all: Vec<(&str, f32)> = plain.chain(scaled).collect();
        if all.is_empty() && !self.control_vector_layer_range.is_empty() {
            return Err(Error::new("a range of layers without a control vector")
                .at("--control-vector-layer-range")
                .hint("name one with --control-vector"));
        }
        all.into_iter().map(|(file, s)| self.injection(file, s).at(|| file.to_owned())).collect()
    }

    fn injection(&self, file: &str, strength: f32) -> Result<Injection> {
        let (file, name) = match file.rsplit_once('#') {
            Some((file, name)) => (file, Some(name)),
            None => (file, None),
        };
        // Vectors are named from the folder of the requests.
        let path: PathBuf = std::path::absolute(file)?;
        let set = VectorSet::load(&path)?;
        let names: Vec<&str> = set.names().collect();
        let name = match (name, &names[..]) {
            (Some(name), _) => name,
            (None, [only]) => only,
            (None, _) => {
                return Err(Error::new("the file has several vectors")
                    .expected(format!("{file}#NAME, one of {}", names.join(", "))));
            }
        };
        let mut layers = match set.unnamed_layers(name)? {
            Some(rows) => (0..rows).collect(),
            None => set.header.layers.clone(),
        };
        if layers.is_empty() {
            return Err(Error::new("the file does not say of which blocks its vector is")
                .hint("inkling vectors --import FILE --layers ... makes a set that does"));
        }
        if let [first, last] = self.control_vector_layer_range[..] {
            let all = layers.clone();
            layers.retain(|layer| (first..=last).contains(layer));
            if layers.is_empty() {
                return Err(Error::new("the vector has no block in the range")
                    .at("--control-vector-layer-range")
                    .expected(format!("some of {all:?}"))
                    .got(format!("{first} to {last}")));
            }
        }
        let vector = VectorRef::Named(format!("{}#{name}", path.display()));
        Ok(Injection {
            layer: Some(OneOrMany::Many(layers)),
            ..Injection::add(vector, 0, strength)
        })
    }
}
