//! How far the residual stream points along vectors: cosines and projections, token by token.

use crate::experiment::{results::Probed, stats::quantile, vectors::ConceptVectors};

/// Of the control words' cosines the range from here to as far from the other end.
const TAIL: f64 = 0.025;

/// Cosine and projection of rows with a word's vectors, and the cosines of the control words.
/// `rows`: for each of the vectors' layers named in `layers`, (tokens, dim). None where a vector is missing.
///
/// cos = h·v / (‖h‖‖v‖), projection = h·v / ‖v‖, in f64. A row or a vector of zeros has cosine 0.
pub fn probe(
    rows: &[Vec<f32>],
    layers: &[usize],
    pieces: &[String],
    vectors: &ConceptVectors,
    word: &str,
    band: &[String],
) -> Option<Probed> {
    let mut probed = Probed {
        pieces: pieces.to_vec(),
        layers: layers.to_vec(),
        cosine: Vec::new(),
        projection: Vec::new(),
        band: Vec::new(),
        range: Vec::new(),
    };
    for (rows, &layer) in rows.iter().zip(layers) {
        let rows: Vec<&[f32]> = rows.chunks_exact(vectors.dim).collect();
        let norms: Vec<f64> = rows.iter().map(|row| dot(row, row).sqrt()).collect();
        let along = |word: &str| -> Option<Vec<f64>> {
            let vector = vectors.get(word, layer)?;
            let norm = dot(vector, vector).sqrt();
            Some(rows.iter().map(|row| ratio(dot(row, vector), norm)).collect())
        };
        let cosines = |along: &[f64]| -> Vec<f64> {
            along.iter().zip(&norms).map(|(value, norm)| ratio(*value, *norm)).collect()
        };
        let own = along(word)?;
        probed.cosine.push(cosines(&own).into_iter().map(|value| value as f32).collect());
        probed.projection.push(own.iter().map(|value| *value as f32).collect());
        let controls: Option<Vec<Vec<f64>>> =
            band.iter().map(|word| Some(cosines(&along(word)?))).collect();
        let controls = controls?;
        if controls.is_empty() {
            continue;
        }
        let mean_at =
            |token: usize| controls.iter().map(|of| of[token]).sum::<f64>() / controls.len() as f64;
        probed.band.push((0..rows.len()).map(|token| mean_at(token) as f32).collect());
        let mut means: Vec<f64> =
            controls.iter().map(|of| of.iter().sum::<f64>() / of.len().max(1) as f64).collect();
        means.sort_by(f64::total_cmp);
        let (low, high) = (quantile(&means, TAIL)?, quantile(&means, 1.0 - TAIL)?);
        probed.range.push((low as f32, high as f32));
    }
    Some(probed)
}

fn ratio(value: f64, by: f64) -> f64 {
    if by > 0.0 { value / by } else { 0.0 }
}

/// Σ a·b in f64, in eight interleaved sums.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f64::from(*a) * f64::from(*b);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vectors() -> ConceptVectors {
        let words = ["own", "up", "down"].map(str::to_owned).to_vec();
        ConceptVectors::new(
            words,
            vec![3],
            2,
            vec![2.0, 0.0, /* up */ 0.0, 5.0, /* down */ 0.0, -1.0],
        )
    }

    #[test]
    fn cosine_projection_and_the_control_words() {
        let rows = [vec![3.0, 4.0, 0.0, 0.0]];
        let pieces = ["a", "b"].map(str::to_owned);
        let band = ["up", "down"].map(str::to_owned);
        let probed = probe(&rows, &[3], &pieces, &vectors(), "own", &band).unwrap();
        assert_eq!(probed.cosine, [[0.6, 0.0]], "a row of zeros points nowhere");
        assert_eq!(probed.projection, [[3.0, 0.0]]);
        assert_eq!(probed.band, [[0.0, 0.0]], "one up, one down");
        let (low, high) = probed.range[0];
        assert!((low + 0.38).abs() < 1e-6 && (high - 0.38).abs() < 1e-6, "{low} {high}");
        let alone = probe(&rows, &[3], &pieces, &vectors(), "own", &[]).unwrap();
        assert!(alone.band.is_empty() && alone.range.is_empty());
        assert_eq!(probe(&rows, &[3], &pieces, &vectors(), "other", &[]), None);
    }

    #[test]
    fn sums_take_every_element() {
        let a: Vec<f32> = (0..13).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &a), 650.0);
    }
}
