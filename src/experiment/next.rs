//! The distribution of the next token: what is likeliest, and how far an injection moved it.

use crate::{
    device::cpu::{Isa, Kernel},
    ops::math::{LANES, exp, sum_lanes},
};

/// Tokens that are kept.
pub const TOP: usize = 5;

/// KL(p ‖ q) in nats of p = softmax(logits) from q = softmax(clean), given the natural logs of their sums of
/// exponentials. Sums are in f32, in an order that depends on the length alone.
pub fn divergence(logits: &[f32], logsumexp: f32, clean: &[f32], clean_logsumexp: f32) -> f64 {
    let sum = Isa::detect().run(Weighted { logits, logsumexp, clean });
    // Below zero it is rounding.
    (f64::from(sum) - (f64::from(logsumexp) - f64::from(clean_logsumexp))).max(0.0)
}

/// Σ p (l − m) over all tokens, p = exp(l − logsumexp).
struct Weighted<'a> {
    logits: &'a [f32],
    logsumexp: f32,
    clean: &'a [f32],
}

impl Kernel for Weighted<'_> {
    type Output = f32;
    #[inline(always)]
    fn run(self) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (a, a_rest) = self.logits.as_chunks::<LANES>();
        let (b, b_rest) = self.clean.as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                let weight = exp(a[lane] - self.logsumexp);
                lanes[lane] = weight.mul_add(a[lane] - b[lane], lanes[lane]);
            }
        }
        for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
            lanes[lane] = exp(a - self.logsumexp).mul_add(a - b, lanes[lane]);
        }
        sum_lanes(lanes)
    }
}

/// The likeliest tokens with their natural log-probabilities, best first; of equals the lower id.
pub fn top(logits: &[f32], logsumexp: f32) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(TOP + 1);
    for (token, &logit) in logits.iter().enumerate() {
        if best.len() < TOP || logit > best[TOP - 1].1 {
            let at = best.partition_point(|(_, other)| *other >= logit);
            best.insert(at, (token as u32, logit));
            best.truncate(TOP);
        }
    }
    best.into_iter().map(|(token, logit)| (token, logit - logsumexp)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logsumexp(logits: &[f32]) -> f32 {
        logits.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln() as f32
    }

    /// The definition, in f64.
    fn definition(a: &[f32], b: &[f32]) -> f64 {
        let p = |logits: &[f32]| -> Vec<f64> {
            let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
            logits.iter().map(|l| f64::from(*l).exp() / sum).collect()
        };
        p(a).iter().zip(p(b)).map(|(p, q)| p * (p / q).ln()).sum()
    }

    #[test]
    fn divergences_are_those_of_the_definition() {
        for n in [2, 16, 37, 1000] {
            let a: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32) / 12.0 - 3.0).collect();
            let b: Vec<f32> = (0..n).map(|i| ((i * 53 % 89) as f32) / 15.0 - 2.0).collect();
            let got = divergence(&a, logsumexp(&a), &b, logsumexp(&b));
            let want = definition(&a, &b);
            // n sums of f32 terms and two logarithms of a few units in their last place.
            assert!((got - want).abs() < 1e-5 * (1.0 + want), "{n}: {got} instead of {want}");
            assert!(divergence(&a, logsumexp(&a), &a, logsumexp(&a)) < 1e-6);
        }
    }

    #[test]
    fn the_best_tokens_in_order() {
        let mut logits = vec![0.0; 40];
        (logits[3], logits[7], logits[30], logits[31]) = (5.0, 9.0, 5.0, 8.0);
        let best = top(&logits, 10.0);
        assert_eq!(best, [(7, -1.0), (31, -2.0), (3, -5.0), (30, -5.0), (0, -10.0)]);
        assert_eq!(top(&[1.0, 2.0], 0.0), [(1, 2.0), (0, 1.0)]);
    }
}
