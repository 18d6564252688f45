use super::*;
use crate::experiment::{fake::FakeEngine, protocol::Recipe};

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

const BASELINE: [&[u32]; 4] = [&[1, 3], &[1, 4], &[1, 3], &[1, 9, 9]];

fn make(recipe: Recipe, prompts: &[&[&[u32]]], words: &[&str], out: usize) -> Extraction {
    let owned = |prompts: &[&[u32]]| prompts.iter().map(|tokens| tokens.to_vec()).collect();
    let baseline = if recipe == Recipe::MeanDifference { &BASELINE[..] } else { &[] };
    let inputs = Inputs {
        site: SITE,
        words: strings(words),
        projected_out: out,
        prompts: prompts.iter().map(|of| owned(of)).collect(),
        baseline: owned(baseline),
        rows: words.iter().map(|word| vec![word.len() as f32, 0.0, 1.0, 0.0]).collect(),
    };
    extract(&FakeEngine::default(), recipe, &inputs, &[2, 5], 4, &mut ()).unwrap()
}

fn small() -> Extraction {
    make(Recipe::MeanDifference, &[&[&[1, 2, 10]], &[&[1, 2, 11]]], &["sea", "air"], 0)
}

fn row(tokens: &[u32], layer: usize) -> Vec<f64> {
    FakeEngine::residual(tokens, layer, 4).into_iter().map(f64::from).collect()
}

fn near(got: &[f32], want: &[f64]) -> bool {
    got.iter().zip(want).all(|(got, want)| (f64::from(*got) - want).abs() < 1e-5)
}

#[test]
fn other_recipes_are_what_they_are_called() {
    let single = make(Recipe::Single, &[&[&[7, 8]]], &["sea"], 0);
    assert!(near(single.vectors.get("sea", 5).unwrap(), &row(&[7, 8], 5)));
    assert!(single.split_half.is_empty() && single.stream_norms.len() == 2);

    let pairs: &[&[u32]] = &[&[1, 5], &[1, 6], &[2, 5], &[2, 6], &[3, 5], &[3, 6]];
    let minus = |layer| -> Vec<Vec<f64>> {
        let pair = |p: &[&[u32]]| {
            row(p[0], layer).iter().zip(row(p[1], layer)).map(|(a, b)| a - b).collect()
        };
        pairs.chunks_exact(2).map(pair).collect()
    };
    let contrast = make(Recipe::Contrast, &[pairs], &["sea"], 0);
    let pca = make(Recipe::Pca, &[pairs], &["sea"], 0);
    for layer in [2, 5] {
        let differences = minus(layer);
        let mean: Vec<f64> =
            (0..4).map(|i| differences.iter().map(|d| d[i]).sum::<f64>() / 3.0).collect();
        assert!(near(contrast.vectors.get("sea", layer).unwrap(), &mean));
        // No direction has a larger sum of squares along it than the principal one.
        let got: Vec<f64> =
            pca.vectors.get("sea", layer).unwrap().iter().map(|v| f64::from(*v)).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let along =
            |u: &[f64]| differences.iter().map(|d| dot(d, u).powi(2)).sum::<f64>() / dot(u, u);
        let best = along(&got);
        for key in 0..200 {
            let other = random_vector(key, &[1.0; 4]);
            let other: Vec<f64> = other.iter().map(|v| f64::from(*v)).collect();
            assert!(along(&other) <= best * (1.0 + 1e-6), "{key}");
        }
        assert!(dot(&got, &mean) > 0.0, "towards the mean");
        let length = dot(&got, &got).sqrt();
        let mean_along = differences.iter().map(|d| dot(d, &got)).sum::<f64>() / length / 3.0;
        assert!((mean_along - length).abs() < 1e-4 * length);
    }

    let rows = make(Recipe::Embedding, &[&[], &[]], &["sea", "river"], 0);
    for layer in [2, 5] {
        assert_eq!(rows.vectors.get("river", layer).unwrap(), [5.0, 0.0, 1.0, 0.0]);
    }
    assert!(rows.stream_norms.is_empty(), "nothing was read");
}

#[test]
fn what_is_projected_out_is_gone() {
    let prompts: &[&[&[u32]]] = &[&[&[1, 2]], &[&[3, 4]], &[&[5, 6]], &[&[5, 6]]];
    let made = make(Recipe::Single, prompts, &["sea", "ice", "out", "again"], 2);
    assert_eq!(made.vectors.words, ["sea", "ice"], "the others are no vectors of the set");
    for layer in [2, 5] {
        let out = row(&[5, 6], layer);
        for (word, tokens) in [("sea", [1, 2]), ("ice", [3, 4])] {
            let own = row(&tokens, layer);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let part = dot(&own, &out) / dot(&out, &out);
            let want: Vec<f64> = own.iter().zip(&out).map(|(own, out)| own - part * out).collect();
            assert!(near(made.vectors.get(word, layer).unwrap(), &want), "{word}, {layer}");
        }
    }
    let inputs = Inputs {
        words: strings(&["sea", "same"]),
        projected_out: 1,
        prompts: vec![vec![vec![1, 2]], vec![vec![1, 2]]],
        ..Inputs::default()
    };
    let engine = FakeEngine::default();
    let error = extract(&engine, Recipe::Single, &inputs, &[2], 4, &mut ()).unwrap_err();
    assert!(error.to_string().contains("zero"), "nothing is left of it: {error}");
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
        ConceptVectors::load(&path, hash, SITE, words, layers, 4)
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
