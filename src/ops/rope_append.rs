//! Rotates queries and keys (Su et al. 2021, eq. 34, halves as Hugging Face lays them out) and
//! appends keys and values to the cache.

use super::{Float, attention::Cache, residual_norm::Rows};
use crate::device::{Buffer, Device, cpu::Shared};

/// Cosines and sines, (positions, `head_dim` / 2) each.
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Frequency i is theta^(-2i / `head_dim`), angle = position · frequency, all rounded to f32 as
    /// transformers does.
    pub fn new(positions: usize, head_dim: usize, theta: f32) -> Self {
        let half = head_dim / 2;
        let frequency = |i: usize| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / (f64::from(theta).powf(f64::from(exponent)) as f32)
        };
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles = (0..positions)
            .flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)));
        let (cos, sin) = angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip();
        Self { half, cos, sin }
    }

    fn rotate(&self, position: usize, head: &mut [f32]) {
        let at = position * self.half;
        let (cos, sin) = (&self.cos[at..][..self.half], &self.sin[at..][..self.half]);
        let (low, high) = head.split_at_mut(self.half);
        for i in 0..self.half {
            let (a, b) = (low[i], high[i]);
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[i] + a * sin[i];
        }
    }
}

/// For rows `0..rows` of qkv, (rows, (heads + 2 · `kv_heads`) · `head_dim`): rotates q and k in place
/// and writes rotated k, and v, to the row's place in the cache of `layer`.
#[expect(clippy::too_many_arguments, reason = "operands, in the formula's order")]
pub fn rope_append<T: Float>(
    device: &Device,
    rows: usize,
    heads: usize,
    qkv: &mut Buffer<f32>,
    at: &Rows,
    rope: &RopeTable,
    layer: usize,
    cache: &mut Cache<T>,
) {
    let Device::Cpu(cpu) = device;
    let shape = cache.shape;
    let (head_dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    let width = (heads + 2 * kv_heads) * head_dim;
    assert!(qkv.len() >= rows * width && 2 * rope.half == head_dim, "qkv, rope");
    let qkv = Shared::new(qkv.host_mut());
    let (tables, pages) = cache.split_mut();
    let pages = Shared::new(pages);
    cpu.parallel_chunks(rows, 8, |range| {
        for row in range {
            // SAFETY: each task has its own rows.
            let values = unsafe { qkv.range(row * width, width) };
            let position = at.position[row] as usize;
            let (q, kv) = values.split_at_mut(heads * head_dim);
            let (k, v) = kv.split_at_mut(kv_heads * head_dim);
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                rope.rotate(position, head);
            }
            let page = tables.page(at.slot[row] as usize, layer, position / super::attention::PAGE);
            let lane = position % super::attention::PAGE;
            for head in 0..kv_heads {
                let source = head * head_dim..(head + 1) * head_dim;
                for (d, &k) in k[source.clone()].iter().enumerate() {
                    // SAFETY: no two rows of a step have the same sequence and position, and a
                    // page that is written belongs to one sequence.
                    let to = unsafe { pages.range(shape.key(page, head, d) + lane, 1) };
                    to[0] = T::from_f32(k);
                }
                // SAFETY: likewise.
                let to = unsafe { pages.range(shape.value(page, head, lane), head_dim) };
                for (to, &v) in to.iter_mut().zip(&v[source]) {
                    *to = T::from_f32(v);
                }
            }
        }
    });
}
