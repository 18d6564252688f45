//! The register tile that matmul and attention are built from: `sums[r] += Σ x[r, k] · w[k]`, each
//! element one chain of fused multiply-adds in the order of k, the same bits on every
//! instruction set.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _MM_HINT_T0, _mm_prefetch, _mm256_broadcast_ss, _mm256_castsi256_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_permute2f128_ps,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_storeu_ps, _mm256_unpackhi_epi16,
    _mm256_unpacklo_epi16, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};

use half::bf16;

use super::Float;
use crate::device::cpu::Isa;

/// Columns of a tile: one AVX-512 register, two of AVX2.
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
pub(super) struct Right<'a, W = f32> {
    pub values: &'a [W],
    pub stride: usize,
    /// How many elements ahead of those that are loaded others are fetched to the cache, if w is
    /// bf16: what is widened as it is loaded is read once, from memory.
    pub ahead: usize,
}

/// Adds `k` products to each element of `sums`.
#[inline(always)]
pub(super) fn tile<const R: usize, W: Float>(
    isa: Isa,
    k: usize,
    x: Left,
    w: Right<W>,
    sums: &mut [[f32; WIDTH]; R],
) {
    if k == 0 {
        return;
    }
    assert!((R - 1) * x.row_stride + (k - 1) * x.k_stride < x.values.len(), "x of a tile");
    assert!((k - 1) * w.stride + WIDTH <= w.values.len(), "w of a tile");
    match isa.vectors() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here; all
        // elements that are read lie inside (asserted above).
        Isa::Avx512 => unsafe { tile_avx512(k, x, w, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: likewise.
        Isa::Avx2 => unsafe { tile_avx2(k, x, w, sums) },
        _ => tile_portable(k, x, w, sums),
    }
}

fn tile_portable<const R: usize, W: Float>(
    k: usize,
    x: Left,
    w: Right<W>,
    sums: &mut [[f32; WIDTH]; R],
) {
    for k in 0..k {
        let w = &w.values[k * w.stride..][..WIDTH];
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = x.values[r * x.row_stride + k * x.k_stride];
            for (sum, &w) in sums.iter_mut().zip(w) {
                *sum = x.mul_add(w.to_f32(), *sum);
            }
        }
    }
}

/// # Safety
/// All elements that a tile of `k` products reads lie inside x and w.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const R: usize, W: Float>(
    k: usize,
    x: Left,
    w: Right<W>,
    sums: &mut [[f32; WIDTH]; R],
) {
    let mut tile = [[_mm256_setzero_ps(); 2]; R];
    for r in 0..R {
        // SAFETY: both halves lie inside the 16 sums of a row.
        tile[r] = unsafe {
            let at = sums[r].as_ptr();
            W::reorder([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(WIDTH / 2))])
        };
    }
    let (mut x_at, mut w_at) = (x.values.as_ptr(), w.values.as_ptr());
    for _ in 0..k {
        // SAFETY: promised by the caller; the pointers after the last step are never read.
        unsafe {
            if size_of::<W>() < size_of::<f32>() {
                _mm_prefetch::<_MM_HINT_T0>(w_at.wrapping_add(w.ahead).cast());
            }
            let [low, high] = W::load_avx2(w_at);
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
            let [low, high] = W::reorder(tile[r]);
            _mm256_storeu_ps(sums[r].as_mut_ptr(), low);
            _mm256_storeu_ps(sums[r].as_mut_ptr().add(WIDTH / 2), high);
        }
    }
}

/// # Safety
/// All elements that a tile of `k` products reads lie inside x and w.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<const R: usize, W: Float>(
    k: usize,
    x: Left,
    w: Right<W>,
    sums: &mut [[f32; WIDTH]; R],
) {
    let mut tile = [_mm512_setzero_ps(); R];
    for r in 0..R {
        // SAFETY: a register is the 16 sums of a row.
        tile[r] = unsafe { _mm512_loadu_ps(sums[r].as_ptr()) };
    }
    let (mut x_at, mut w_at) = (x.values.as_ptr(), w.values.as_ptr());
    for _ in 0..k {
        // SAFETY: promised by the caller; the pointers after the last step are never read.
        unsafe {
            if size_of::<W>() < size_of::<f32>() {
                _mm_prefetch::<_MM_HINT_T0>(w_at.wrapping_add(w.ahead).cast());
            }
            let lanes = W::load_avx512(w_at);
            for r in 0..R {
                let x = _mm512_set1_ps(*x_at.add(r * x.row_stride));
                tile[r] = _mm512_fmadd_ps(x, lanes, tile[r]);
            }
        }
        x_at = x_at.wrapping_add(x.k_stride);
        w_at = w_at.wrapping_add(w.stride);
    }
    for r in 0..R {
        // SAFETY: as for the loads.
        unsafe { _mm512_storeu_ps(sums[r].as_mut_ptr(), tile[r]) };
    }
}

/// A type of w, widened to f32 in registers as it is loaded.
pub trait Wide: Sized {
    /// 16 elements in two registers, in an order that is quick to make.
    ///
    /// # Safety
    /// The 16 elements can be read.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_avx2(at: *const Self) -> [__m256; 2];

    /// From that order to the natural one, and back.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn reorder(sums: [__m256; 2]) -> [__m256; 2];

    /// 16 elements.
    ///
    /// # Safety
    /// They can be read.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_avx512(at: *const Self) -> __m512;
}

impl Wide for f32 {
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_avx2(at: *const Self) -> [__m256; 2] {
        // SAFETY: promised by the caller.
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(WIDTH / 2))] }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn reorder(sums: [__m256; 2]) -> [__m256; 2] {
        sums
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_avx512(at: *const Self) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe { _mm512_loadu_ps(at) }
    }
}

impl Wide for bf16 {
    /// A bfloat16 is the upper half of an f32: interleaving with zeros widens. It does so within
    /// each 128 bits: elements 0..4 and 8..12, then 4..8 and 12..16.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_avx2(at: *const Self) -> [__m256; 2] {
        let zero = _mm256_setzero_si256();
        // SAFETY: promised by the caller.
        let all = unsafe { _mm256_loadu_si256(at.cast()) };
        [_mm256_unpacklo_epi16(zero, all), _mm256_unpackhi_epi16(zero, all)]
            .map(|half| _mm256_castsi256_ps(half))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn reorder([low, high]: [__m256; 2]) -> [__m256; 2] {
        [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_avx512(at: *const Self) -> __m512 {
        // SAFETY: promised by the caller.
        let all = unsafe { _mm256_loadu_si256(at.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(all)))
    }
}

/// `out[i] = values[i]` in f32.
#[inline(always)]
pub(super) fn widen<T: Float>(values: &[T], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.to_f32();
    }
}
