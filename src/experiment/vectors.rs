//! Concept vectors by mean difference, and random vectors of the same norm.

use std::path::Path;

use crate::{
    engine::{
        Capture, Job, norm,
        vectors::{Header, VectorSet},
    },
    error::{Context, Error, Result},
    experiment::{Jobs, Progress, protocol::Chat},
    model::Model,
    ops::philox::normal,
    request::{CaptureSite, Message, Request, Sampling, Site},
};

/// The site that vectors are taken from and injected at.
pub const SITE: Site = Site::ResidPost;

/// One vector for each word and layer, not normalised.
#[derive(Clone, Debug, PartialEq)]
pub struct ConceptVectors {
    /// As in the list.
    pub words: Vec<String>,
    /// Blocks, ascending; the site is [`SITE`].
    pub layers: Vec<usize>,
    /// Width of the residual stream.
    pub dim: usize,
    /// (words, layers, dim).
    values: Vec<f32>,
}

/// Concept vectors, and how far they depend on the choice of baseline words.
#[derive(Clone, Debug, PartialEq)]
pub struct Extraction {
    /// The vectors.
    pub vectors: ConceptVectors,
    /// (words, layers): cosine between the word's vector over the even and over the odd baseline
    /// words.
    pub split_half: Vec<f64>,
    /// (layers): mean norm of the baseline's rows, the stream's own scale there.
    pub stream_norms: Vec<f64>,
}

/// The texts of `template` for each word, rendered as chats; `{word}` is the word, lower-cased.
pub fn vector_prompts(
    model: &Model,
    chat: &Chat,
    template: &str,
    words: &[String],
) -> Result<Vec<Vec<u32>>> {
    let render = |word: &String| {
        let content = template.replace("{word}", &word.to_lowercase());
        let request = Request {
            messages: Some(vec![Message { role: "user".into(), content }]),
            system: chat.system.clone(),
            thinking: chat.thinking,
            date: chat.date.clone(),
            ..Request::default()
        };
        model.render(&request).at(|| format!("vector of {word:?}")).map(|prompt| prompt.tokens)
    };
    words.iter().map(render).collect()
}

/// Renders, runs and subtracts: see [`extract`]. `layers` ascending.
#[expect(clippy::too_many_arguments, reason = "words, template and layers are independent")]
pub fn concept_vectors(
    engine: &dyn Jobs,
    model: &Model,
    chat: &Chat,
    template: &str,
    words: &[String],
    baseline: &[String],
    layers: &[usize],
    progress: &mut dyn Progress,
) -> Result<Extraction> {
    let prompts = vector_prompts(model, chat, template, words)?;
    let baseline = vector_prompts(model, chat, template, baseline)?;
    let dim = model.config.dim;
    extract(engine, words, &prompts, &baseline, layers, dim, progress)
}

/// For each word the residual ([`SITE`]) at the last token of its prompt minus the mean of the same
/// over the baseline prompts (summed in f64, in their order), at all layers in one pass over the
/// prompts. A word that stands in the baseline twice counts twice.
pub fn extract(
    engine: &dyn Jobs,
    words: &[String],
    prompts: &[Vec<u32>],
    baseline: &[Vec<u32>],
    layers: &[usize],
    dim: usize,
    progress: &mut dyn Progress,
) -> Result<Extraction> {
    if baseline.len() < 2 || layers.is_empty() {
        return Err(Error::new("concept vectors need layers and two or more baseline words"));
    }
    let rows = last_rows(engine, prompts.iter().chain(baseline), layers, dim, progress)?;
    let (of_words, of_baseline) = rows.split_at(prompts.len());
    let even = mean(of_baseline.iter().step_by(2), layers.len() * dim);
    let odd = mean(of_baseline.iter().skip(1).step_by(2), layers.len() * dim);
    let all = mean(of_baseline.iter(), layers.len() * dim);
    let stream_norm = |layer: usize| {
        let norms = of_baseline.iter().map(|row| norm(&row[layer * dim..][..dim]));
        norms.sum::<f64>() / of_baseline.len() as f64
    };
    let stream_norms = (0..layers.len()).map(stream_norm).collect();
    let mut values = Vec::with_capacity(words.len() * layers.len() * dim);
    let mut split_half = Vec::with_capacity(words.len() * layers.len());
    for (word, row) in words.iter().zip(of_words) {
        let minus = |mean: &[f64]| -> Vec<f64> {
            row.iter().zip(mean).map(|(value, mean)| f64::from(*value) - mean).collect()
        };
        let (vector, even, odd) = (minus(&all), minus(&even), minus(&odd));
        for (layer, vector) in layers.iter().zip(vector.chunks_exact(dim)) {
            if vector.iter().all(|value| *value == 0.0) || vector.iter().any(|v| !v.is_finite()) {
                return Err(Error::new("the concept vector is zero or not finite")
                    .at(format!("word {word:?}, layer {layer}")));
            }
        }
        values.extend(vector.iter().map(|value| *value as f32));
        let halves = even.chunks_exact(dim).zip(odd.chunks_exact(dim));
        split_half.extend(halves.map(|(even, odd)| cosine(even, odd)));
    }
    let vectors = ConceptVectors { words: words.to_vec(), layers: layers.to_vec(), dim, values };
    Ok(Extraction { vectors, split_half, stream_norms })
}

/// (prompts) of (layers, dim): the residual at each prompt's last token.
fn last_rows<'a>(
    engine: &dyn Jobs,
    prompts: impl Iterator<Item = &'a Vec<u32>> + Clone,
    layers: &[usize],
    dim: usize,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<f32>>> {
    let total = prompts.clone().count();
    let mut rows: Vec<Vec<f32>> = vec![Vec::new(); total];
    let mut jobs = prompts.map(|tokens| {
        let last = tokens.len().saturating_sub(1);
        let capture = |layer: &usize| Capture {
            site: CaptureSite::ResidPost,
            layer: Some(*layer),
            positions: vec![last],
        };
        Job {
            tokens: tokens.clone(),
            capture: layers.iter().map(capture).collect(),
            sampling: Sampling { max_tokens: 0, ..Sampling::default() },
            n: 1,
            ..Job::default()
        }
    });
    let mut done = 0;
    engine.run_all(&mut jobs, &mut |index, finished| {
        let row = finished?.captures.concat();
        if row.len() != layers.len() * dim {
            return Err(Error::new("the engine captured another number of values")
                .expected(layers.len() * dim)
                .got(row.len()));
        }
        rows[index] = row;
        done += 1;
        progress.advance("vectors", done, total as u64, 0);
        Ok(())
    })?;
    Ok(rows)
}

fn mean<'a>(rows: impl ExactSizeIterator<Item = &'a Vec<f32>>, width: usize) -> Vec<f64> {
    let count = rows.len() as f64;
    let mut sum = vec![0.0; width];
    for row in rows {
        for (sum, value) in sum.iter_mut().zip(row) {
            *sum += f64::from(*value);
        }
    }
    sum.into_iter().map(|sum| sum / count).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

impl ConceptVectors {
    /// From (words, layers, dim) values.
    #[cfg(test)]
    pub fn new(words: Vec<String>, layers: Vec<usize>, dim: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), words.len() * layers.len() * dim);
        Self { words, layers, dim, values }
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
            site: Some(SITE),
            layers: self.layers.clone(),
            recipe: recipe.to_owned(),
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
        words: &[String],
        layers: &[usize],
        dim: usize,
    ) -> Result<Self> {
        let set = VectorSet::load(path)?;
        let place = || path.display().to_string();
        if set.header.model_hash.as_deref() != Some(model_hash) || set.header.site != Some(SITE) {
            return Err(Error::new("the vectors are of another model or site").at(place()));
        }
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
        Ok(Self { words: words.to_vec(), layers: layers.to_vec(), dim, values })
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
mod tests {
    use super::*;
    use crate::experiment::fake::FakeEngine;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn small() -> Extraction {
        let prompts = [vec![1, 2, 10], vec![1, 2, 11]];
        let baseline = [vec![1, 3], vec![1, 4], vec![1, 3], vec![1, 9, 9]];
        let words = strings(&["sea", "air"]);
        let engine = FakeEngine::default();
        extract(&engine, &words, &prompts, &baseline, &[2, 5], 4, &mut ()).unwrap()
    }

    #[test]
    fn the_mean_of_the_baseline_is_subtracted_at_the_last_token() {
        let Extraction { vectors, split_half, .. } = small();
        let row = |tokens: &[u32], layer| FakeEngine::residual(tokens, layer, 4);
        for layer in [2, 5] {
            let base = [row(&[1, 3], layer), row(&[1, 4], layer), row(&[1, 3], layer)];
            let last = row(&[1, 9, 9], layer);
            let got = vectors.get("air", layer).unwrap();
            for (i, word) in row(&[1, 2, 11], layer).iter().enumerate() {
                let sum: f64 = base.iter().chain([&last]).map(|row| f64::from(row[i])).sum();
                assert!((f64::from(got[i]) - (f64::from(*word) - sum / 4.0)).abs() < 1e-6);
            }
        }
        assert!(vectors.get("air", 3).is_none() && vectors.get("fire", 2).is_none());
        assert_eq!(split_half.len(), 4);
        assert!(split_half.iter().all(|cosine| (-1.0..=1.0).contains(cosine)));
    }

    #[test]
    fn stored_vectors_read_back_bit_for_bit() {
        let vectors = small().vectors;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.safetensors");
        vectors.to_set("hash", "mean-difference").unwrap().save(&path).unwrap();
        let words = strings(&["sea", "air"]);
        let load = |hash, words: &[String], layers: &[usize]| {
            ConceptVectors::load(&path, hash, words, layers, 4)
        };
        assert_eq!(load("hash", &words, &[2, 5]).unwrap(), vectors);
        assert!(load("other", &words, &[2, 5]).unwrap_err().to_string().contains("another model"));
        assert!(load("hash", &words, &[3]).is_err());
        assert!(load("hash", &strings(&["fire"]), &[2]).is_err());
    }

    #[test]
    fn random_vectors_have_the_norm_and_their_own_direction() {
        let like: Vec<f32> = (0..576).map(|i| if i == 7 { 300.0 } else { 0.1 }).collect();
        let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let a = random_vector(1, &like);
        assert!((norm(&a) / norm(&like) - 1.0).abs() < 1e-6);
        assert_eq!(a, random_vector(1, &like));
        let dot = |b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        for other in [random_vector(2, &like), random_vector(3, &like), like.clone()] {
            assert!((dot(&other) / norm(&like).powi(2)).abs() < 0.2, "nearly orthogonal");
        }
    }

    #[test]
    fn shuffled_vectors_have_the_same_numbers_elsewhere() {
        let like: Vec<f32> = (0..576).map(|i| i as f32).collect();
        let a = shuffled_vector(1, &like);
        let mut sorted = a.clone();
        sorted.sort_by(f32::total_cmp);
        assert_eq!(sorted, like);
        let kept = |b: &[f32], c: &[f32]| b.iter().zip(c).filter(|(b, c)| b == c).count();
        assert_eq!(kept(&a, &shuffled_vector(1, &like)), 576);
        assert!(kept(&a, &like) < 10);
        assert!(kept(&a, &shuffled_vector(2, &like)) < 10);
    }
}
