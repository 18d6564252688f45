//! Fills the residual rows that enter the forward pass: from a token's embedding (`resid_pre.0`)
//! or from a cached row of a clean run.

use super::{
    activations::ATOM,
    matmul::Weight,
    rows::{Source, Sources},
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Operands of [`enter`].
pub struct Enter<'a> {
    /// The first row that enters.
    pub first: usize,
    /// How many do.
    pub count: usize,
    /// What rows start from, by row.
    pub sources: &'a Sources,
    /// (vocab, dim).
    pub embedding: &'a Weight,
    /// What embeddings are multiplied by; rows of clean runs are taken as they are.
    pub scale: f32,
    /// (.., dim), rows of clean runs.
    pub cached: &'a Buffer<f32>,
    /// (slots,), the token that was last drawn for each.
    pub last: &'a Buffer<u32>,
    /// (rows, dim).
    pub resid: &'a mut Buffer<f32>,
}

/// `resid[i, :]` = source i, for `count` rows from `first` on. A token that is not one (nothing
/// could be drawn) reads the last embedding.
///
/// # Errors
/// The device has failed.
pub fn enter(device: &Device, p: Enter<'_>) -> Result<()> {
    let end = p.first + p.count;
    assert!(p.resid.len() >= end * p.embedding.k(), "resid");
    assert!(p.sources.kind.len() >= end, "sources");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, p),
        Device::Cuda(cuda) => return launch(cuda, p),
    }
    Ok(())
}

fn on_cpu(cpu: &Cpu, p: Enter<'_>) {
    let dim = p.embedding.k();
    let resid = Shared::new(p.resid.host_mut());
    cpu.parallel_chunks(p.count, 16, |range| {
        for row in range.start + p.first..range.end + p.first {
            // SAFETY: each task has its own rows.
            let out = unsafe { resid.range(row * dim, dim) };
            let embed = |token: u32, out: &mut [f32]| {
                p.embedding.row((token as usize).min(p.embedding.n() - 1), out);
                if p.scale != 1.0 {
                    out.iter_mut().for_each(|value| *value *= p.scale);
                }
            };
            match p.sources.get(row) {
                Source::Token(token) => embed(token, out),
                Source::Drawn(slot) => embed(p.last.host()[slot as usize], out),
                Source::Cached(from) => {
                    out.copy_from_slice(&p.cached.host()[from as usize * dim..][..dim]);
                }
                Source::Nothing => {}
            }
        }
    });
}

/// Mirror of `EnterParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct EnterParams {
    resid: u64,
    embedding: u64,
    cached: u64,
    kind: u64,
    value: u64,
    last: u64,
    first: i32,
    count: i32,
    dim: i32,
    k_tiles: i32,
    vocab: i32,
    scale: f32,
}
const _: () = assert!(size_of::<EnterParams>() == 72, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/enter.cu.
unsafe impl Params for EnterParams {}

fn launch(cuda: &Cuda, p: Enter<'_>) -> Result<()> {
    let params = EnterParams {
        resid: p.resid.address_mut(),
        embedding: p.embedding.tiles().address(),
        cached: p.cached.address(),
        kind: p.sources.kind.address(),
        value: p.sources.value.address(),
        last: p.last.address(),
        first: p.first as i32,
        count: p.count as i32,
        dim: p.embedding.k() as i32,
        k_tiles: p.embedding.k().div_ceil(ATOM) as i32,
        vocab: p.embedding.n() as i32,
        scale: p.scale,
    };
    // SAFETY: the rows were checked; a source names a row of `cached` or a slot that its planner
    // knows to exist, and the kernel keeps tokens inside the vocabulary.
    unsafe { cuda.launch("enter", Launch::new(p.count, 128), &params) }
}
