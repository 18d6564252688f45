//! The register tile that matmul and attention are built from: `sums[r] += Σ x[r, k] · w[k]`, each
//! element one chain of fused multiply-adds in the order of k, the same bits on every
//! instruction set.

use super::Float;
use crate::device::cpu::Isa;

/// Columns of a tile: two AVX2 registers.
pub(super) const WIDTH: usize = 16;

/// x of a tile: element (r, k) is `values[r · row_stride + k · k_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub values: &'a [f32],
    pub row_stride: usize,
    pub k_stride: usize,
}

/// w of a tile: the 16 elements of k start at `values[k · stride]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// Adds `k` products to each element of `sums`.
#[inline(always)]
pub(super) fn tile<const R: usize>(
    isa: Isa,
    k: usize,
    x: Left,
    w: Right,
    sums: &mut [[f32; WIDTH]; R],
) {
    if k == 0 {
        return;
    }
    assert!((R - 1) * x.row_stride + (k - 1) * x.k_stride < x.values.len(), "x of a tile");
    assert!((k - 1) * w.stride + WIDTH <= w.values.len(), "w of a tile");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::Avx2` says that the processor has AVX2 and FMA; all elements that are
        // read lie inside (asserted above).
        Isa::Avx2 => unsafe { tile_avx2(k, x, w, sums) },
        _ => tile_portable(k, x, w, sums),
    }
}

fn tile_portable<const R: usize>(k: usize, x: Left, w: Right, sums: &mut [[f32; WIDTH]; R]) {
    for k in 0..k {
        let w = &w.values[k * w.stride..][..WIDTH];
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = x.values[r * x.row_stride + k * x.k_stride];
            for (sum, &w) in sums.iter_mut().zip(w) {
                *sum = x.mul_add(w, *sum);
            }
        }
    }
}

/// # Safety
/// All elements that a tile of `k` products reads lie inside x and w.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const R: usize>(k: usize, x: Left, w: Right, sums: &mut [[f32; WIDTH]; R]) {
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    let mut tile = [[_mm256_setzero_ps(); 2]; R];
    for r in 0..R {
        // SAFETY: both halves lie inside the 16 sums of a row.
        unsafe {
            tile[r][0] = _mm256_loadu_ps(sums[r].as_ptr());
            tile[r][1] = _mm256_loadu_ps(sums[r].as_ptr().add(WIDTH / 2));
        }
    }
    let (mut x_at, mut w_at) = (x.values.as_ptr(), w.values.as_ptr());
    for _ in 0..k {
        // SAFETY: promised by the caller; the pointers after the last step are never read.
        unsafe {
            let (low, high) = (_mm256_loadu_ps(w_at), _mm256_loadu_ps(w_at.add(WIDTH / 2)));
            for r in 0..R {
                let x = _mm256_broadcast_ss(&*x_at.add(r * x.row_stride));
                tile[r][0] = _mm256_fmadd_ps(x, low, tile[r][0]);
                tile[r][1] = _mm256_fmadd_ps(x, high, tile[r][1]);
            }
        }
        x_at = x_at.wrapping_add(x.k_stride);
        w_at = w_at.wrapping_add(w.stride);
    }
    for r in 0..R {
        // SAFETY: as for the loads.
        unsafe {
            _mm256_storeu_ps(sums[r].as_mut_ptr(), tile[r][0]);
            _mm256_storeu_ps(sums[r].as_mut_ptr().add(WIDTH / 2), tile[r][1]);
        }
    }
}

/// `out[i] = values[i]` in f32.
#[inline(always)]
pub(super) fn widen<T: Float>(values: &[T], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.to_f32();
    }
}
