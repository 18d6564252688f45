//! The arithmetic of concept vectors: what is asked of the model, and what is made of the answers.

use serde::Serialize;

use super::ConceptVectors;
use crate::{
    engine::{Capture, Job, norm},
    error::{Context, Error, Result},
    experiment::{
        Jobs, Progress,
        protocol::{Chat, Recipe, VectorRecipe},
    },
    model::Model,
    request::{Message, Request, Sampling, Site},
};

/// Steps of the power iteration; the ratio of the two largest values decides how many are needed.
const POWER_STEPS: usize = 500;

/// Concept vectors, and what there is to say of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Extraction {
    /// The vectors.
    pub vectors: ConceptVectors,
    /// (words, layers): cosine between the word's vector over the even and over the odd baseline words;
    /// empty where there is no baseline.
    pub split_half: Vec<f64>,
    /// (layers): mean norm of the stream's rows that the vectors are made of (the baseline's, where there
    /// is one), the stream's own scale there; empty where none was read.
    pub stream_norms: Vec<f64>,
}

/// What vectors are made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Inputs {
    /// Where the stream is read.
    pub site: Site,
    /// The words, those to be projected out last.
    pub words: Vec<String>,
    /// How many words, from the end, are projected out of the others' vectors.
    pub projected_out: usize,
    /// (words): prompts of each, as token ids; those of pairs alternate, with and without.
    pub prompts: Vec<Vec<Vec<u32>>>,
    /// The baseline words' prompts.
    pub baseline: Vec<Vec<u32>>,
    /// (words) of (dim,): rows that are the vectors themselves, at every layer.
    pub rows: Vec<Vec<f32>>,
}

impl Inputs {
    /// Renders what the recipe asks for, or reads the model's own rows.
    ///
    /// # Errors
    /// A text can't be rendered, or a word has no tokens.
    pub fn new(
        model: &Model,
        chat: &Chat,
        recipe: &VectorRecipe,
        words: &[String],
    ) -> Result<Self> {
        let out = recipe.orthogonal_to.iter();
        let all: Vec<String> = words.iter().chain(out).cloned().collect();
        let one = |word: &String, template: &str| {
            prompt(model, chat, template, word).at(|| format!("vector of {word:?}"))
        };
        let prompts = |word: &String| -> Result<Vec<Vec<u32>>> {
            match recipe.recipe {
                Recipe::MeanDifference | Recipe::Single => Ok(vec![one(word, &recipe.template)?]),
                Recipe::Contrast | Recipe::Pca => {
                    let texts = recipe.pairs.iter().flat_map(|(with, without)| [with, without]);
                    texts.map(|text| one(word, text)).collect()
                }
                Recipe::Embedding | Recipe::Unembedding | Recipe::File => Ok(Vec::new()),
            }
        };
        let row = |word: &String| match recipe.recipe {
            Recipe::Embedding => rows_of(model, word, false),
            _ => rows_of(model, word, true),
        };
        let has_rows = matches!(recipe.recipe, Recipe::Embedding | Recipe::Unembedding);
        let baseline = match recipe.recipe {
            Recipe::MeanDifference => {
                recipe.baseline.iter().map(|word| one(word, &recipe.template)).collect()
            }
            _ => Ok(Vec::new()),
        };
        Ok(Self {
            site: recipe.site,
            projected_out: recipe.orthogonal_to.len(),
            prompts: all.iter().map(prompts).collect::<Result<_>>()?,
            baseline: baseline?,
            rows: if has_rows { all.iter().map(row).collect::<Result<_>>()? } else { Vec::new() },
            words: all,
        })
    }
}

/// `template` about a word, rendered as a chat; `{word}` is the word, lower-cased.
fn prompt(model: &Model, chat: &Chat, template: &str, word: &str) -> Result<Vec<u32>> {
    let content = template.replace("{word}", &word.to_lowercase());
    let request = Request {
        messages: Some(vec![Message { role: "user".into(), content }]),
        system: chat.system.clone(),
        thinking: chat.thinking,
        date: chat.date.clone(),
        ..Request::default()
    };
    model.render(&request).map(|prompt| prompt.tokens)
}

/// Mean over the tokens of " word", lower-cased, of their rows of the embedding, as it enters the stream, or of
/// the output matrix.
fn rows_of(model: &Model, word: &str, of_output: bool) -> Result<Vec<f32>> {
    let tokenizer = model
        .tokenizer
        .as_deref()
        .ok_or_else(|| Error::new("the model has no tokenizer").at(model.name.clone()))?;
    let tokens = tokenizer.encode(&format!(" {}", word.to_lowercase()), false)?.tokens;
    if tokens.is_empty() {
        return Err(Error::new("the word has no tokens").got(format!("{word:?}")));
    }
    let matrix = if of_output { model.output()? } else { model.embedding()? };
    let scale = if of_output { 1.0 } else { f64::from(model.config.embedding_scale) };
    let mut sum = vec![0.0; model.config.dim];
    let mut row = vec![0.0; model.config.dim];
    for token in &tokens {
        matrix.read_row(*token as usize, &mut row);
        sum.iter_mut().zip(&row).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    Ok(sum.iter().map(|sum| (sum * scale / tokens.len() as f64) as f32).collect())
}

/// Vectors for all words but those that are projected out, at all layers in one pass over the prompts.
/// h is the residual at the inputs' site and a prompt's last token; sums are in f64, in the lists' order.
///
/// * `mean-difference`: h minus the mean of h over the baseline prompts (a word that stands there twice
///   counts twice): Lindsey 2025.
/// * `single`: h.
/// * `contrast`: mean over the pairs of h(with) − h(without): Turner and others 2023, Rimsky and others 2024.
/// * `pca`: the direction u that maximises Σ (u·d)² over the pairs' differences d, with Σ u·d > 0, of length
///   mean(u·d): Zou and others 2023.
/// * `embedding`, `unembedding`: the word's row of the model's own matrix, the same at every layer.
///
/// # Errors
/// A vector is zero or not finite, or the recipe lacks what it needs.
pub fn extract(
    engine: &dyn Jobs,
    recipe: Recipe,
    inputs: &Inputs,
    layers: &[usize],
    dim: usize,
    progress: &mut dyn Progress,
) -> Result<Extraction> {
    let width = layers.len() * dim;
    if layers.is_empty() || (recipe == Recipe::MeanDifference && inputs.baseline.len() < 2) {
        return Err(Error::new("concept vectors need layers and two or more baseline words"));
    }
    let prompts = inputs.prompts.iter().flatten().chain(&inputs.baseline);
    let rows = last_rows(engine, prompts, inputs.site, layers, dim, progress)?;
    let of_words: usize = inputs.prompts.iter().map(Vec::len).sum();
    let (of_words, of_baseline) = rows.split_at(of_words);
    let baseline = mean(of_baseline.iter(), width);
    let mut at = 0;
    let mut values = Vec::with_capacity(inputs.words.len() * width);
    for (index, prompts) in inputs.prompts.iter().enumerate() {
        let own = &of_words[at..at + prompts.len()];
        at += prompts.len();
        let vector: Vec<f64> = match recipe {
            Recipe::MeanDifference => minus(&own[0], &baseline),
            Recipe::Single => own[0].iter().map(|value| f64::from(*value)).collect(),
            Recipe::Contrast => {
                let differences = differences(own);
                let sum = |i: usize| differences.iter().map(|d| d[i]).sum::<f64>();
                (0..width).map(|i| sum(i) / differences.len() as f64).collect()
            }
            Recipe::Pca => {
                let differences = differences(own);
                let of_layer = |layer: usize| {
                    let of = |d: &Vec<f64>| d[layer * dim..][..dim].to_vec();
                    principal(&differences.iter().map(of).collect::<Vec<_>>())
                };
                (0..layers.len()).flat_map(of_layer).collect()
            }
            Recipe::Embedding | Recipe::Unembedding => {
                let row = inputs.rows[index].iter().map(|value| f64::from(*value));
                row.cycle().take(width).collect()
            }
            Recipe::File => return Err(Error::new("vectors of a file are not made")),
        };
        values.push(vector);
    }
    let words = inputs.words.len() - inputs.projected_out;
    let (kept, out) = values.split_at_mut(words);
    project_out(kept, out, layers.len(), dim);
    let mut flat = Vec::with_capacity(words * width);
    for (word, vector) in inputs.words.iter().zip(kept.iter()) {
        for (layer, vector) in layers.iter().zip(vector.chunks_exact(dim)) {
            if vector.iter().all(|value| *value == 0.0) || vector.iter().any(|v| !v.is_finite()) {
                return Err(Error::new("the concept vector is zero or not finite")
                    .at(format!("word {word:?}, layer {layer}")));
            }
        }
        flat.extend(vector.iter().map(|value| *value as f32));
    }
    let split_half = match recipe {
        Recipe::MeanDifference => {
            let even = mean(of_baseline.iter().step_by(2), width);
            let odd = mean(of_baseline.iter().skip(1).step_by(2), width);
            let halves = of_words[..words].iter().flat_map(|row| {
                let (even, odd) = (minus(row, &even), minus(row, &odd));
                let halves = even.chunks_exact(dim).zip(odd.chunks_exact(dim));
                halves.map(|(even, odd)| cosine(even, odd)).collect::<Vec<_>>()
            });
            halves.collect()
        }
        _ => Vec::new(),
    };
    let scale = if of_baseline.is_empty() { of_words } else { of_baseline };
    let stream_norm = |layer: usize| {
        let norms = scale.iter().map(|row| norm(&row[layer * dim..][..dim]));
        norms.sum::<f64>() / scale.len() as f64
    };
    let measured = if scale.is_empty() { 0 } else { layers.len() };
    let words = inputs.words[..words].to_vec();
    let vectors =
        ConceptVectors { words, site: inputs.site, layers: layers.to_vec(), dim, values: flat };
    Ok(Extraction { vectors, split_half, stream_norms: (0..measured).map(stream_norm).collect() })
}

fn minus(row: &[f32], mean: &[f64]) -> Vec<f64> {
    row.iter().zip(mean).map(|(value, mean)| f64::from(*value) - mean).collect()
}

/// With minus without, pair by pair.
fn differences(rows: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let pairs = rows.chunks_exact(2);
    let of = |pair: &[Vec<f32>]| {
        let both = pair[0].iter().zip(&pair[1]);
        both.map(|(with, without)| f64::from(*with) - f64::from(*without)).collect()
    };
    pairs.map(of).collect()
}

/// The first right singular vector of the differences, towards their mean, as long as the mean of what they
/// have along it. By power iteration on their products with each other, from their sum.
fn principal(differences: &[Vec<f64>]) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let products: Vec<Vec<f64>> =
        differences.iter().map(|a| differences.iter().map(|b| dot(a, b)).collect()).collect();
    let mut weights = vec![1.0; differences.len()];
    for _ in 0..POWER_STEPS {
        let next: Vec<f64> = products.iter().map(|row| dot(row, &weights)).collect();
        let norm = dot(&next, &next).sqrt();
        if norm == 0.0 {
            break;
        }
        weights = next.iter().map(|weight| weight / norm).collect();
    }
    let dim = differences.first().map_or(0, Vec::len);
    let at = |i: usize| differences.iter().zip(&weights).map(|(d, w)| d[i] * w).sum::<f64>();
    let direction: Vec<f64> = (0..dim).map(at).collect();
    let norm = dot(&direction, &direction).sqrt();
    let unit: Vec<f64> = direction.iter().map(|value| value / norm).collect();
    let along: f64 = differences.iter().map(|d| dot(d, &unit)).sum::<f64>();
    // Along it is negative where the direction points away from the mean.
    let length = along / differences.len() as f64;
    unit.iter().map(|value| value * length).collect()
}

/// Takes out of each of `kept` all that lies in the span of `out`, at each layer (modified Gram-Schmidt).
fn project_out(kept: &mut [Vec<f64>], out: &mut [Vec<f64>], layers: usize, dim: usize) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for layer in 0..layers {
        let span = layer * dim..(layer + 1) * dim;
        let mut basis: Vec<Vec<f64>> = Vec::new();
        for vector in out.iter() {
            let mut rest = vector[span.clone()].to_vec();
            let before = dot(&rest, &rest).sqrt();
            for unit in &basis {
                let along = dot(&rest, unit);
                rest.iter_mut().zip(unit).for_each(|(rest, unit)| *rest -= along * unit);
            }
            let norm = dot(&rest, &rest).sqrt();
            // What is left of a vector that lies in the span is rounding.
            if norm > 1e-9 * before {
                basis.push(rest.iter().map(|value| value / norm).collect());
            }
        }
        for vector in kept.iter_mut() {
            let vector = &mut vector[span.clone()];
            let before = dot(vector, vector).sqrt();
            for unit in &basis {
                let along = dot(vector, unit);
                vector.iter_mut().zip(unit).for_each(|(value, unit)| *value -= along * unit);
            }
            if dot(vector, vector).sqrt() <= 1e-9 * before {
                vector.fill(0.0);
            }
        }
    }
}

/// (prompts) of (layers, dim): the residual at each prompt's last token.
fn last_rows<'a>(
    engine: &dyn Jobs,
    prompts: impl Iterator<Item = &'a Vec<u32>> + Clone,
    site: Site,
    layers: &[usize],
    dim: usize,
    progress: &mut dyn Progress,
) -> Result<Vec<Vec<f32>>> {
    let total = prompts.clone().count();
    let mut rows: Vec<Vec<f32>> = vec![Vec::new(); total];
    let mut jobs = prompts.map(|tokens| {
        let last = tokens.len().saturating_sub(1);
        let capture = |layer: &usize| Capture::rows(site.into(), Some(*layer), vec![last]);
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
