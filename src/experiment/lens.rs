//! The logit lens: which tokens a vector of the stream points at.

use rayon::prelude::*;

use crate::{error::Result, model::Model};

/// Rows of the output matrix that a task reads.
const ROWS: usize = 1024;

/// The likeliest tokens of each vector (dim,) taken for the whole stream after the last block: the largest
/// entries of W (g ∘ v / rms(v)), W the output matrix, g the last norm's gain (nostalgebraist 2020), before
/// what some models do to logits (a cap, a factor), which leaves the order. Ties go to the lower id. A vector
/// of zeros has none.
///
/// # Errors
/// The model's files lack the matrix or the gain.
pub fn lens(model: &Model, vectors: &[&[f32]], top: usize) -> Result<Vec<Vec<(u32, f32)>>> {
    let (matrix, gain) = (model.output()?, model.final_gain()?);
    let scaled: Vec<Vec<f32>> = vectors
        .iter()
        .map(|vector| {
            let squares: f64 = vector.iter().map(|value| f64::from(*value).powi(2)).sum();
            let rms = (squares / vector.len() as f64).sqrt();
            let scale = if rms > 0.0 { 1.0 / rms } else { 0.0 };
            let values = vector.iter().zip(&gain);
            values.map(|(value, gain)| (f64::from(*value) * scale) as f32 * gain).collect()
        })
        .collect();
    let vocab = model.config.vocab;
    let of_rows = |start: usize| {
        let mut best = vec![Vec::new(); vectors.len()];
        let mut row = vec![0.0; model.config.dim];
        for token in start..(start + ROWS).min(vocab) {
            matrix.read_row(token, &mut row);
            for (best, vector) in best.iter_mut().zip(&scaled) {
                best.push((token as u32, dot(&row, vector)));
            }
        }
        best.iter_mut().for_each(|best| keep(best, top));
        best
    };
    let parts: Vec<Vec<Vec<(u32, f32)>>> =
        (0..vocab.div_ceil(ROWS)).into_par_iter().map(|part| of_rows(part * ROWS)).collect();
    let mut all = vec![Vec::new(); vectors.len()];
    for part in parts {
        all.iter_mut().zip(part).for_each(|(all, part)| all.extend(part));
    }
    for (best, vector) in all.iter_mut().zip(vectors) {
        keep(best, if vector.iter().all(|value| *value == 0.0) { 0 } else { top });
    }
    Ok(all)
}

/// The largest, in order.
fn keep(best: &mut Vec<(u32, f32)>, top: usize) {
    best.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    best.truncate(top);
}

/// Σ a·b in eight interleaved sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; 8];
    let (a, b) = (a.chunks(8), b.chunks(8));
    for (a, b) in a.zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}
