//! Fills the residual rows that enter the forward pass: from a token's embedding (`resid_pre.0`)
//! or from a cached row of a clean run.

use super::matmul::Weight;
use crate::device::{Buffer, Device, cpu::Shared};

/// What an entering row starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// This token's embedding.
    Token(u32),
    /// This row of the cache.
    Cached(u32),
}

/// `resid[first + i, :]` = source i. resid: (rows, dim); embedding: (vocab, dim); cached: (rows, dim).
pub fn enter(
    device: &Device,
    first: usize,
    sources: &[Source],
    embedding: &Weight,
    cached: &Buffer<f32>,
    resid: &mut Buffer<f32>,
) {
    let Device::Cpu(cpu) = device;
    let dim = embedding.k();
    assert!(resid.len() >= (first + sources.len()) * dim, "resid");
    let resid = Shared::new(resid.host_mut());
    cpu.parallel_chunks(sources.len(), 16, |range| {
        for at in range {
            // SAFETY: each task has its own rows.
            let row = unsafe { resid.range((first + at) * dim, dim) };
            match sources[at] {
                Source::Token(token) => embedding.row(token as usize, row),
                Source::Cached(from) => {
                    row.copy_from_slice(&cached.host()[from as usize * dim..][..dim]);
                }
            }
        }
    });
}
