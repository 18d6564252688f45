//! `summarize` and `cap_logits`.

use std::cell::RefCell;

use half::bf16;

use inkling::{
    device::Buffer,
    ops::{
        cap_logits::cap_logits,
        summarize::{Id, Summaries, Summary, Wanted, summarize},
    },
};

use crate::{
    reference::ops::softmax,
    tools::{Numbers, U, close, on_every_device, read, upload, widen},
};

/// ln Σ eˣ.
fn logsumexp(row: &[f64]) -> f64 {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln()
}

/// −Σ p ln p.
fn entropy(row: &[f64]) -> f64 {
    softmax(row).iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

/// (of logsumexp, of entropy): a weight eˣ⁻ᵐ is off by two ulp of the exponential and by the
/// rounding of x − m, both relative; sums are in f64.
fn errors(row: &[f64]) -> (f64, f64) {
    let (total, spread) = (logsumexp(row), entropy(row));
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut of_sum, mut of_entropy) = (0.0, 0.0);
    for (x, p) in row.iter().zip(softmax(row)) {
        let off = U * (8.0 + (x - most).abs()) * p;
        of_sum += off;
        of_entropy += off * (2.0 + (x - most).abs() + spread);
    }
    (of_sum + 2.0 * U * total.abs(), of_entropy + 2.0 * U * spread)
}

/// Rows of logits: several spreads, outliers, ties, and a row of equal values.
fn rows(vocab: usize) -> Vec<Vec<f32>> {
    let mut numbers = Numbers::new(vocab as u64);
    let mut rows: Vec<Vec<f32>> = [0.01f32, 1.0, 10.0, 60.0]
        .iter()
        .map(|scale| numbers.list(vocab).iter().map(|v| v * scale).collect())
        .collect();
    rows.push(numbers.with_outliers(vocab, 1000.0));
    rows.push(numbers.list(vocab).iter().map(|v| (v * 4.0).round() + 0.0).collect());
    rows.push(vec![-3.25; vocab]);
    rows
}

/// The most likely ids, best first, ties to the lower id: a stable sort.
fn best(row: &[f32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
    ids.truncate(count);
    ids
}

fn check(vocab: usize, row: &[f32], ids: &[u32], got: &Summary) {
    let wide = widen(row);
    let (of_sum, of_entropy) = errors(&wide);
    let what = format!("vocabulary {vocab}");
    close(&what, got.logsumexp, logsumexp(&wide), of_sum);
    close(&what, got.entropy, entropy(&wide), of_entropy);
    let logits: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
    assert_eq!(got.logits, logits, "{what}");
    let top: Vec<u32> = got.top.iter().map(|(id, _)| *id).collect();
    assert_eq!(top, best(row, 20), "{what}");
    for &(id, logprob) in &got.top {
        let want = wide[id as usize] - logsumexp(&wide);
        close(&what, logprob, want, of_sum + U * (wide[id as usize].abs() + want.abs()));
    }
}

#[test]
fn summarize_is_softmax_in_words() {
    for vocab in [1, 15, 16, 17, 1000, 49_152] {
        let rows = rows(vocab);
        let ids = [0, vocab as u32 / 2, vocab as u32 - 1];
        let seen = RefCell::new(Vec::new());
        let outputs = |summary: &Summary| {
            let mut numbers = vec![summary.logsumexp, summary.entropy];
            numbers.extend(&summary.logits);
            numbers.extend(summary.top.iter().flat_map(|(id, logprob)| [*id as f32, *logprob]));
            numbers
        };
        on_every_device::<bf16>(0, |device| {
            let logits = upload::<f32>(device, &rows.concat(), 0);
            // The second id is the token of a draw.
            let tokens = Buffer::upload(device, &[7, ids[1], 7]).unwrap();
            let wanted_ids = vec![Id::Token(ids[0]), Id::Drawn(1), Id::Token(ids[2])];
            // Backwards, and one row twice: a summary belongs to what was wanted.
            let order: Vec<usize> = (0..rows.len()).rev().chain([0]).collect();
            let wanted = |&row: &usize| Wanted { row, ids: wanted_ids.clone(), top: 20 };
            let wanted: Vec<Wanted> = order.iter().map(wanted).collect();
            let mut out = Summaries::new(device, 8, 24, 160).unwrap();
            summarize(device, vocab, &logits, &tokens, &wanted, &mut out).unwrap();
            let mut staging = out.staging(device).unwrap();
            out.fetch(&mut staging).unwrap();
            device.synchronize().unwrap();
            let got = staging.get();
            let numbers: Vec<Vec<f32>> = got.iter().map(outputs).collect();
            seen.borrow_mut().extend(order.into_iter().zip(got));
            numbers
        });
        let summaries: Vec<(usize, Summary)> = seen.into_inner();
        assert!(!summaries.is_empty() && summaries.len().is_multiple_of(rows.len() + 1));
        for (row, summary) in &summaries {
            check(vocab, &rows[*row], &ids, summary);
        }
    }
}

/// cap · tanh(scale · l / cap), the signs of zeros and the largest logits included.
#[test]
fn logits_are_scaled_and_capped() {
    let mut logits = Numbers::new(5).with_outliers(5000, 1000.0);
    logits.extend([0.0, -0.0, 1e-20, -3e4, f32::MAX, f32::MIN]);
    let count = logits.len() - 1; // the last one is left alone
    for (scale, cap) in [(1.0f32, Some(30.0f32)), (0.125, None), (0.5, Some(3.0))] {
        let outputs = on_every_device::<bf16>(0, |device| {
            let mut buffer = upload::<f32>(device, &logits, 0);
            cap_logits(device, count, scale, cap, &mut buffer).unwrap();
            vec![read(&buffer)]
        });
        for (device, outputs) in outputs {
            assert_eq!(outputs[0][count], f32::MIN, "{device}");
            for (&got, &logit) in outputs[0][..count].iter().zip(&logits) {
                let l = f64::from(logit) * f64::from(scale);
                let want = cap.map_or(l, |cap| f64::from(cap) * (l / f64::from(cap)).tanh());
                // tanh by 1 - e: off by an ulp of 1 where it is small; rounded a few times.
                let tolerance = cap.map_or(U * l.abs(), |cap| 6.0 * U * f64::from(cap));
                close(&format_args!("{device} {logit} {scale} {cap:?}"), got, want, tolerance);
            }
        }
    }
}
