//! A mixture of experts.

use super::{BF16, Comparison, U, distance, numbers, read, rounded};
use crate::{
    device::{Buffer, Device},
    engine::Dtype,
    error::Result,
    ops::{
        activations::Activations,
        experts::{Experts, Routed, experts},
        matmul::{Activation, Weight, WeightSet},
    },
};

/// `rows` rows, whose logits are exact so that every device chooses the same experts.
pub(super) fn mixture(cpu: &Device, device: &Device, rows: usize) -> Result<Comparison> {
    const COUNT: usize = 20;
    const USED: usize = 3;
    let (dim, ffn) = (328, 176);
    // Multiples of 1/8, no sum of which reaches 2¹².
    let exact = |len: usize, seed: u64, to: f32| -> Vec<f32> {
        numbers(len, seed).iter().map(|v| (v.clamp(-1.0, 1.0) * to).round()).collect()
    };
    let x = rounded(&exact(rows * dim, rows as u64, 3.0));
    let router = exact(COUNT * dim, 7, 3.0);
    let run = |device: &Device| -> Result<Vec<f32>> {
        let set = |(n, k), gated: bool| {
            let weight = |expert| {
                let seed = 100 + 2 * expert + u64::from(gated);
                Weight::random(device, Dtype::Bf16, (n, k), seed, 0.02, gated)
            };
            WeightSet::new(device, (0..COUNT as u64).map(weight).collect::<Result<_>>()?)
        };
        let read_row = |row: usize, out: &mut [f32]| {
            let values = router[row * dim..][..dim].iter();
            out.iter_mut().zip(values).for_each(|(out, value)| *out = value / 8.0);
        };
        let of = Experts {
            router: Weight::pack(device, Dtype::Bf16, (COUNT, dim), read_row)?,
            gate_up: set((2 * ffn, dim), true)?,
            down: set((dim, ffn), false)?,
            used: USED,
            normalise: true,
            activation: Activation::Silu,
        };
        let x = Activations::upload(device, dim, &x)?;
        let mut routed = Routed::new(device, rows, of.sizes())?;
        let mut out = Buffer::zeroed(device, rows * dim)?;
        experts(device, rows, &x, &of, &mut routed, &mut out)?;
        read(&out)
    };
    // What a gated product may be off by, as in `matmuls`; a sum of ffn such terms, whose sizes sum
    // to less than √ffn times the largest sum here.
    let sums = |k: usize| 2.0 * k as f64 * U * (k as f64).sqrt();
    let tolerance = (2.0 * BF16 + 4.0 * sums(dim)) * (ffn as f64).sqrt() + sums(ffn);
    let off = distance(&run(device)?, &run(cpu)?);
    Ok(Comparison::new(format!("experts, {rows} rows"), off, tolerance))
}
