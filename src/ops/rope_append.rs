//! Normalises queries and keys (where a model does), rotates them (Su et al. 2021, eq. 34, halves as
//! Hugging Face lays them out) and appends keys and values to the cache.

use super::{
    Float,
    attention::Cache,
    math::{inverse_norm, sum_of_squares},
    matmul::Dtype,
    rows::{NONE, Rows},
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Kernel, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Cosines and sines, (positions, `head_dim` / 2) each.
pub struct RopeTable {
    half: usize,
    cos: Buffer<f32>,
    sin: Buffer<f32>,
}

impl RopeTable {
    /// Of angle = position · frequency, rounded to f32 as transformers does, times `scale`. The
    /// pairs of a head of `head_dim` beyond those that have a frequency are not turned.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(
        device: &Device,
        positions: usize,
        head_dim: usize,
        frequencies: &[f32],
        scale: f32,
    ) -> Result<Self> {
        let half = head_dim / 2;
        assert!(frequencies.len() <= half, "frequencies");
        let (mut cos, mut sin) = (vec![1.0; positions * half], vec![0.0; positions * half]);
        let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
        for (position, (cos, sin)) in rows.enumerate() {
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
                let angle = f64::from(position as f32 * frequency);
                (*cos, *sin) = (angle.cos() as f32 * scale, angle.sin() as f32 * scale);
            }
        }
        Ok(Self { half, cos: Buffer::upload(device, &cos)?, sin: Buffer::upload(device, &sin)? })
    }

    /// (cosines, sines) of a position.
    fn angles(&self, position: usize) -> (&[f32], &[f32]) {
        let at = position * self.half;
        (&self.cos.host()[at..][..self.half], &self.sin.host()[at..][..self.half])
    }
}

/// Turns heads of one position.
struct Rotate<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for (((low, high), &cos), &sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin)
            {
                let (a, b) = (*low, *high);
                *low = a * cos - b * sin;
                *high = b * cos + a * sin;
            }
        }
    }
}

/// Root-mean-square norms of queries and keys, before they are turned.
pub struct QueryNorms {
    /// (`head_dim`,) for every head by itself (Qwen 3, Gemma 3), (heads · `head_dim`,) for all
    /// together (`OLMo` 2).
    pub q: Buffer<f32>,
    /// Likewise.
    pub k: Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether all heads are normalised together.
    pub whole: bool,
}

/// Operands of [`rope_append`].
pub struct RopeAppend<'a, T> {
    /// Rows `0..rows` are active.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// (rows, (heads + 2 · `kv_heads`) · `head_dim`).
    pub qkv: &'a mut Buffer<f32>,
    /// Which rows these are.
    pub at: &'a Rows,
    /// Norms of queries and keys.
    pub norms: Option<&'a QueryNorms>,
    /// The angles; absent: nothing is turned.
    pub rope: Option<&'a RopeTable>,
    /// The block whose keys and values they are.
    pub layer: usize,
    /// Where they go.
    pub cache: &'a mut Cache<T>,
}

/// Rotates q and k in place and writes rotated k, and v, to the row's place in the cache of
/// `layer`.
///
/// # Errors
/// The device has failed.
pub fn rope_append<T: Float>(device: &Device, p: RopeAppend<'_, T>) -> Result<()> {
    let shape = p.cache.shape;
    let width = (p.heads + 2 * shape.kv_heads) * shape.head_dim;
    assert!(p.qkv.len() >= p.rows * width, "qkv");
    assert!(p.rope.is_none_or(|rope| 2 * rope.half == shape.head_dim), "rope");
    assert!(p.at.len() >= p.rows && p.layer < shape.layers, "rows, layer");
    let heads = |norms: &QueryNorms| if norms.whole { [p.heads, shape.kv_heads] } else { [1; 2] };
    let fits = |norms: &QueryNorms| {
        [norms.q.len(), norms.k.len()] == heads(norms).map(|heads| heads * shape.head_dim)
    };
    assert!(p.norms.is_none_or(fits), "norms");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, p),
        Device::Cuda(cuda) => return launch(cuda, p),
    }
    Ok(())
}

fn on_cpu<T: Float>(cpu: &Cpu, p: RopeAppend<'_, T>) {
    let RopeAppend { rows, heads, qkv, at, norms, rope, layer, cache } = p;
    let (head_dim, kv_heads) = (cache.shape.head_dim, cache.shape.kv_heads);
    let page_shape = cache.page;
    let width = (heads + 2 * kv_heads) * head_dim;
    let qkv = Shared::new(qkv.host_mut());
    let (tables, pages) = cache.split_mut();
    let pages = Shared::new(pages);
    cpu.parallel_chunks(rows, 8, |range| {
        for row in range {
            let slot = at.slot.host()[row];
            if slot == NONE {
                continue;
            }
            // SAFETY: each task has its own rows.
            let values = unsafe { qkv.range(row * width, width) };
            let position = at.position.host()[row] as usize;
            let (q, kv) = values.split_at_mut(heads * head_dim);
            let (k, v) = kv.split_at_mut(kv_heads * head_dim);
            if let Some(norms) = norms {
                for (heads, gain) in [(&mut *q, &norms.q), (&mut *k, &norms.k)] {
                    for values in heads.chunks_exact_mut(gain.len()) {
                        cpu.isa().run(Normalise { values, gain: gain.host(), eps: norms.eps });
                    }
                }
            }
            if let Some((cos, sin)) = rope.map(|rope| rope.angles(position)) {
                cpu.isa().run(Rotate { heads: &mut *q, cos, sin });
                cpu.isa().run(Rotate { heads: &mut *k, cos, sin });
            }
            let page = tables.page(slot as usize, layer, position / super::attention::PAGE);
            let lane = position % super::attention::PAGE;
            let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
            for (head, (key, value)) in heads.enumerate() {
                let place = (page, head, lane);
                // SAFETY: no two rows of a step have the same sequence and position, and a page that
                // is written belongs to one sequence.
                unsafe { page_shape.write(cpu, &pages, place, key, value) };
            }
        }
    });
}

struct Normalise<'a> {
    values: &'a mut [f32],
    gain: &'a [f32],
    eps: f32,
}

impl Kernel for Normalise<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let squares = sum_of_squares(self.values);
        let inverse = inverse_norm(squares, self.values.len(), self.eps);
        for (v, gain) in self.values.iter_mut().zip(self.gain) {
            *v = *v * inverse * gain;
        }
    }
}

/// Mirror of `RopeAppendParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RopeAppendParams {
    qkv: u64,
    cos: u64,
    sin: u64,
    slot: u64,
    position: u64,
    tables: u64,
    pages: u64,
    q_norm: u64,
    k_norm: u64,
    rows: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    layer: i32,
    layers: i32,
    blocks: i32,
    eps: f32,
}
const _: () = assert!(size_of::<RopeAppendParams>() == 104, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/rope_append.cu.
unsafe impl Params for RopeAppendParams {}

fn launch<T: Float>(cuda: &Cuda, mut p: RopeAppend<'_, T>) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels write bf16");
    let shape = p.cache.shape;
    if let Some(norms) = p.norms.filter(|norms| norms.whole) {
        normalise_whole(cuda, &mut p, norms)?;
    }
    let norms = p.norms.filter(|norms| !norms.whole);
    let params = RopeAppendParams {
        qkv: p.qkv.address_mut(),
        cos: p.rope.map_or(0, |rope| rope.cos.address()),
        sin: p.rope.map_or(0, |rope| rope.sin.address()),
        slot: p.at.slot.address(),
        position: p.at.position.address(),
        tables: p.cache.tables_address(),
        pages: p.cache.address_mut(),
        q_norm: norms.map_or(0, |norms| norms.q.address()),
        k_norm: norms.map_or(0, |norms| norms.k.address()),
        rows: p.rows as i32,
        heads: p.heads as i32,
        kv_heads: shape.kv_heads as i32,
        head_dim: shape.head_dim as i32,
        layer: p.layer as i32,
        layers: shape.layers as i32,
        blocks: shape.blocks as i32,
        eps: norms.map_or(0.0, |norms| norms.eps),
    };
    let lanes = (shape.head_dim / 8).next_power_of_two();
    let heads = p.heads + 2 * shape.kv_heads;
    let grid = [p.rows as u32, (heads * lanes).div_ceil(128) as u32, 1];
    let launch = Launch { grid, block: 128, shared: 0 };
    // SAFETY: the lengths were checked; the planner keeps slots and positions inside the tables
    // and the angles, and `Cache::set_tables` keeps pages inside the cache.
    unsafe { cuda.launch("rope_append", launch, &params) }
}

/// Mirror of `NormaliseWholeParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NormaliseWholeParams {
    qkv: u64,
    q_norm: u64,
    k_norm: u64,
    q_width: i32,
    k_width: i32,
    width: i32,
    eps: f32,
}
const _: () = assert!(size_of::<NormaliseWholeParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/rope_append.cu.
unsafe impl Params for NormaliseWholeParams {}

/// Norms over all heads, which the blocks of `rope_append` do not see together.
fn normalise_whole<T: Float>(
    cuda: &Cuda,
    p: &mut RopeAppend<'_, T>,
    norms: &QueryNorms,
) -> Result<()> {
    let shape = p.cache.shape;
    let (q_width, k_width) = (p.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let params = NormaliseWholeParams {
        qkv: p.qkv.address_mut(),
        q_norm: norms.q.address(),
        k_norm: norms.k.address(),
        q_width: q_width as i32,
        k_width: k_width as i32,
        width: (q_width + 2 * k_width) as i32,
        eps: norms.eps,
    };
    let launch = Launch { grid: [p.rows as u32, 2, 1], block: 256, shared: 0 };
    // SAFETY: the lengths of qkv and of the norms were checked.
    unsafe { cuda.launch("normalise_whole", launch, &params) }
}
