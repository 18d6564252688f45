//! Copies chosen rows side by side, so that the output head runs only where it is needed.

use super::Float;
use crate::device::{Buffer, Device};

/// `out[i, :] = x[rows[i], :]`, both (.., dim).
pub fn select_rows<T: Float>(
    device: &Device,
    dim: usize,
    rows: &[u32],
    x: &Buffer<T>,
    out: &mut Buffer<T>,
) {
    let Device::Cpu(_) = device;
    assert!(out.len() >= rows.len() * dim, "out");
    for (to, &from) in out.host_mut().chunks_exact_mut(dim).zip(rows) {
        to.copy_from_slice(&x.host()[from as usize * dim..][..dim]);
    }
}
