//! The randomness and the filters of sampling, by their definitions.

use super::ops::softmax;

/// Philox 4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw 2011).
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let wide0 = 0xD251_1F53_u64 * u64::from(c0);
        let wide1 = 0xCD9E_8D57_u64 * u64::from(c2);
        let (high0, low0) = ((wide0 >> 32) as u32, wide0 as u32);
        let (high1, low1) = ((wide1 >> 32) as u32, wide1 as u32);
        (c0, c1, c2, c3) = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// The word that vocabulary entry `token` draws as generated token number `index`.
pub fn word(seed: u64, token: u32, index: u32, purpose: u32) -> u32 {
    let key = [seed as u32, (seed >> 32) as u32];
    philox([token / 4, index, purpose, 0], key)[(token % 4) as usize]
}

/// −ln(−ln1p(−u)) of u = (x + 0.5)·2⁻³² rounded to f32; −∞ where u is 1.
pub fn gumbel(x: u32) -> f64 {
    let u = (x as f32 + 0.5) / 4_294_967_296.0;
    -(-(-f64::from(u)).ln_1p()).ln()
}

/// What is left to draw from.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    pub temperature: f64,
    /// 0: all.
    pub top_k: usize,
    /// 1: all.
    pub top_p: f64,
    /// 0: all.
    pub min_p: f64,
}

/// Probabilities under temperature, then top-k, top-p and min-p, each on what the one before
/// left; 0 for entries that are out. At top-k's edge equal logits all stay; at top-p's the lowest
/// ids do.
pub fn probabilities(logits: &[f64], filter: &Filter) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|x| x / filter.temperature).collect();
    if filter.top_k > 0 {
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let least = sorted[filter.top_k.min(sorted.len()) - 1];
        remove(&mut scores, |_, score| score < least);
    }
    if filter.top_p < 1.0 {
        let share = softmax(&scores);
        let mut ascending: Vec<usize> = (0..scores.len()).collect();
        ascending.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a)));
        let mut below = 0.0;
        let mut out = vec![false; scores.len()];
        for &id in &ascending[..scores.len() - 1] {
            below += share[id];
            out[id] = below <= 1.0 - filter.top_p;
        }
        remove(&mut scores, |id, _| out[id]);
    }
    if filter.min_p > 0.0 {
        let share = softmax(&scores);
        let most = share.iter().copied().fold(0.0, f64::max);
        remove(&mut scores, |id, _| share[id] < filter.min_p * most);
    }
    softmax(&scores)
}

fn remove(scores: &mut [f64], is_out: impl Fn(usize, f64) -> bool) {
    for (id, score) in scores.iter_mut().enumerate() {
        if is_out(id, *score) {
            *score = f64::NEG_INFINITY;
        }
    }
}
