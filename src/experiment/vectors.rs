//! Concept vectors, and control vectors made of them.

mod recipes;

use std::path::Path;

pub use self::recipes::{Extraction, Inputs, extract};
use crate::{
    engine::vectors::{Header, VectorSet},
    error::{Context, Error, Result},
    ops::philox::normal,
    request::Site,
};

/// The site that vectors are taken from and injected at where nothing else is said.
pub const SITE: Site = Site::ResidPost;

/// One vector for each word and layer, not normalised.
#[derive(Clone, Debug, PartialEq)]
pub struct ConceptVectors {
    /// As in the list.
    pub words: Vec<String>,
    /// Where they were taken.
    pub site: Site,
    /// Blocks, ascending.
    pub layers: Vec<usize>,
    /// Width of the residual stream.
    pub dim: usize,
    /// (words, layers, dim).
    values: Vec<f32>,
}

impl ConceptVectors {
    /// From (words, layers, dim) values.
    #[cfg(test)]
    pub fn new(words: Vec<String>, layers: Vec<usize>, dim: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), words.len() * layers.len() * dim);
        Self { words, site: SITE, layers, dim, values }
    }

    /// The vector of a word at a layer, (dim,).
    pub fn get(&self, word: &str, layer: usize) -> Option<&[f32]> {
        let word = self.words.iter().position(|known| known == word)?;
        let layer = self.layers.iter().position(|known| *known == layer)?;
        let start = (word * self.layers.len() + layer) * self.dim;
        Some(&self.values[start..start + self.dim])
    }

    /// As a vector set with its header.
    pub fn to_set(&self, model_hash: &str, recipe: &str) -> Result<VectorSet> {
        let mut set = VectorSet::new(Header {
            model_hash: Some(model_hash.to_owned()),
            site: Some(self.site),
            layers: self.layers.clone(),
            recipe: recipe.to_owned(),
            ..Header::default()
        });
        for (word, rows) in self.words.iter().zip(self.rows()) {
            set.insert(word, rows)?;
        }
        Ok(set)
    }

    /// (words) of (layers) of (dim,).
    fn rows(&self) -> impl Iterator<Item = Vec<Vec<f32>>> {
        let words = self.values.chunks_exact(self.layers.len() * self.dim);
        words.map(|word| word.chunks_exact(self.dim).map(<[f32]>::to_vec).collect())
    }

    /// From a stored set: these words at these layers, of this model. An error for a set that lacks
    /// one of them or is of another model or site.
    pub fn load(
        path: &Path,
        model_hash: &str,
        site: Site,
        words: &[String],
        layers: &[usize],
        dim: usize,
    ) -> Result<Self> {
        let set = VectorSet::load(path)?;
        if set.header.model_hash.as_deref() != Some(model_hash) || set.header.site != Some(site) {
            let place = path.display().to_string();
            return Err(Error::new("the vectors are of another model or site").at(place));
        }
        Self::take(&set, path, site, words, layers, dim)
    }

    /// From a set of the user's own, which may say nothing of a model or site. An error for one that lacks a
    /// word or a layer, or has another width or site.
    pub fn import(
        path: &Path,
        site: Site,
        words: &[String],
        layers: &[usize],
        dim: usize,
    ) -> Result<Self> {
        let set = VectorSet::load(path)?;
        if set.header.site.is_some_and(|own| own != site) {
            return Err(Error::new("the vectors are of another site")
                .at(path.display().to_string())
                .expected(format!("{site:?}")));
        }
        Self::take(&set, path, site, words, layers, dim)
    }

    fn take(
        set: &VectorSet,
        path: &Path,
        site: Site,
        words: &[String],
        layers: &[usize],
        dim: usize,
    ) -> Result<Self> {
        let place = || path.display().to_string();
        let mut values = Vec::with_capacity(words.len() * layers.len() * dim);
        for word in words {
            for layer in layers {
                let row = set.get(word, Some(*layer)).at(place)?;
                if row.len() != dim {
                    let error = Error::new("the vectors are of another width").at(place());
                    return Err(error.expected(dim).got(row.len()));
                }
                values.extend_from_slice(&row);
            }
        }
        Ok(Self { words: words.to_vec(), site, layers: layers.to_vec(), dim, values })
    }
}

/// A Gaussian direction with the norm of `like`; its numbers come from the key alone. Norms are taken
/// in f64.
pub fn random_vector(key: u64, like: &[f32]) -> Vec<f32> {
    let numbers: Vec<f64> = (0..like.len() as u32).map(|index| normal(key, index)).collect();
    let norm = |squares: f64| squares.sqrt();
    let target = norm(like.iter().map(|v| f64::from(*v).powi(2)).sum());
    let scale = target / norm(numbers.iter().map(|v| v * v).sum());
    numbers.iter().map(|value| (value * scale) as f32).collect()
}

/// The numbers of `like` in another order, which comes from the key alone.
pub fn shuffled_vector(key: u64, like: &[f32]) -> Vec<f32> {
    let mut drawn: Vec<(f64, f32)> =
        (0..).zip(like).map(|(index, value)| (normal(key, index), *value)).collect();
    drawn.sort_by(|a, b| a.0.total_cmp(&b.0));
    drawn.into_iter().map(|(_, value)| value).collect()
}

#[cfg(test)]
#[path = "vectors/tests.rs"]
mod tests;
