//! What a row of logits says: logsumexp, entropy, chosen tokens' logits and the most likely ones.

use super::math::{LANES, exp, max};
use crate::device::{Buffer, Device, cpu::Kernel};

/// What is wanted of a row.
#[derive(Clone, Debug, Default)]
pub struct Wanted<'a> {
    /// Row of the logits.
    pub row: usize,
    /// Ids whose logits are wanted.
    pub ids: &'a [u32],
    /// How many of the most likely tokens are wanted.
    pub top: usize,
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Natural log of the sum of the exponentials.
    pub logsumexp: f32,
    /// Of softmax(logits), in nats.
    pub entropy: f32,
    /// Logits of the wanted ids.
    pub logits: Vec<f32>,
    /// The most likely tokens, best first, ties to the lower id, with their log-probabilities.
    pub top: Vec<(u32, f32)>,
}

/// One summary for each row that is wanted. logits: (rows, vocab).
pub fn summarize(
    device: &Device,
    vocab: usize,
    logits: &Buffer<f32>,
    wanted: &[Wanted],
) -> Vec<Summary> {
    let Device::Cpu(cpu) = device;
    let results: Vec<_> = wanted.iter().map(|_| std::sync::OnceLock::new()).collect();
    cpu.parallel(wanted.len(), |at| {
        let want = &wanted[at];
        let row = &logits.host()[want.row * vocab..][..vocab];
        let (logsumexp, entropy) = cpu.isa().run(Softmax(row));
        let logits = want.ids.iter().map(|&id| row[id as usize]).collect();
        let top = top(row, want.top).into_iter().map(|id| (id, row[id as usize] - logsumexp));
        let top = top.collect();
        results[at].get_or_init(|| Summary { logsumexp, entropy, logits, top });
    });
    results.into_iter().map(|result| result.into_inner().unwrap_or_default()).collect()
}

/// Gives (logsumexp, entropy).
struct Softmax<'a>(&'a [f32]);

impl Kernel for Softmax<'_> {
    type Output = (f32, f32);
    #[inline(always)]
    fn run(self) -> (f32, f32) {
        let top = max(self.0);
        let (mut sums, mut products) = ([0.0f64; LANES], [0.0f64; LANES]);
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                let shifted = chunk[lane] - top;
                let weight = f64::from(exp(shifted));
                sums[lane] += weight;
                // 0 · −∞ is 0 here, as its limit is.
                products[lane] += if weight > 0.0 { weight * f64::from(shifted) } else { 0.0 };
            }
        }
        for (lane, &v) in rest.iter().enumerate() {
            let weight = f64::from(exp(v - top));
            sums[lane] += weight;
            products[lane] += if weight > 0.0 { weight * f64::from(v - top) } else { 0.0 };
        }
        let (sum, product): (f64, f64) = (sums.iter().sum(), products.iter().sum());
        ((f64::from(top) + sum.ln()) as f32, (sum.ln() - product / sum) as f32)
    }
}

fn top(row: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(row.len());
    if count == 0 {
        return Vec::new();
    }
    let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    ids.select_nth_unstable_by(count - 1, by_logit);
    ids.truncate(count);
    ids.sort_unstable_by(by_logit);
    ids
}
