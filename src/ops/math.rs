//! Vectorised elementary functions and reductions: the same bits on every instruction set, since
//! they are written as fixed lanes of fused multiply-adds.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_mm512_loadu_ps, _mm512_max_ps, _mm512_reduce_max_ps, _mm512_set1_ps};

use crate::device::cpu::Isa;

/// Width of the lanes that reductions are written in.
pub(crate) const LANES: usize = 16;

/// e^x to 2 ulp; 0 below -87.3 (-infinity included), 1.65e38 above 88. NaN stays NaN.
/// Cody–Waite reduction and the polynomial of Cephes `expf`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "as published")]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.3 { -87.3 } else { clamped };
    let n = clamped.mul_add(std::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = n.mul_add(-0.693_359_375, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_15e-4_f32;
    let p = p.mul_add(r, 1.398_199_950_7e-3);
    let p = p.mul_add(r, 8.333_451_907_3e-3);
    let p = p.mul_add(r, 4.166_579_589_4e-2);
    let p = p.mul_add(r, 1.666_666_545_9e-1);
    let p = p.mul_add(r, 5.000_000_120_1e-1);
    let y = p.mul_add(r * r, r) + 1.0;
    // n is in -126..=127; adding it to the exponent of `ROUND` leaves it in the low bits.
    let exponent = (n + ROUND).to_bits().wrapping_sub(ROUND.to_bits());
    let power = f32::from_bits(exponent.wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { y * power }
}

/// Natural logarithm of a normal positive number, to 2 ulp. The polynomial of Cephes `logf`.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "as published")]
pub(crate) fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    // Mantissa in [sqrt(1/2), sqrt(2)).
    let shifted = bits.wrapping_sub(0x3f35_04f3);
    let exponent = (shifted as i32) >> 23;
    let mantissa = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32));
    let e = exponent as f32;
    let x = mantissa - 1.0;
    let z = x * x;
    let p = 7.037_683_629_2e-2_f32;
    let p = p.mul_add(x, -1.151_461_031_0e-1);
    let p = p.mul_add(x, 1.167_699_874_0e-1);
    let p = p.mul_add(x, -1.242_014_084_6e-1);
    let p = p.mul_add(x, 1.424_932_278_7e-1);
    let p = p.mul_add(x, -1.666_805_766_5e-1);
    let p = p.mul_add(x, 2.000_071_476_5e-1);
    let p = p.mul_add(x, -2.499_999_399_3e-1);
    let p = p.mul_add(x, 3.333_333_117_4e-1);
    let y = p * x * z;
    let y = e.mul_add(-2.121_944_40e-4, y);
    let y = z.mul_add(-0.5, y);
    e.mul_add(0.693_359_375, x + y)
}

/// Sum of the lanes: of each and the one half of them further, and so on. (Written out, since the
/// compiler makes vectors of it so.)
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    let (mut eight, mut four) = ([0.0; LANES / 2], [0.0; LANES / 4]);
    for lane in 0..LANES / 2 {
        eight[lane] = lanes[lane] + lanes[lane + LANES / 2];
    }
    for lane in 0..LANES / 4 {
        four[lane] = eight[lane] + eight[lane + LANES / 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Σ a · b, of equal lengths.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
        }
    }
    for (lane, (a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] = a.mul_add(b, lanes[lane]);
    }
    sum_lanes(lanes)
}

/// Sum of squares.
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = chunk[lane].mul_add(chunk[lane], lanes[lane]);
        }
    }
    for (lane, &v) in rest.iter().enumerate() {
        lanes[lane] = v.mul_add(v, lanes[lane]);
    }
    sum_lanes(lanes)
}

/// 1 / sqrt(mean of squares + eps), by the sum of the squares of `width` values. Values too large
/// for f32 must not pass for zeros.
#[inline(always)]
pub(crate) fn inverse_norm(squares: f32, width: usize, eps: f32) -> f32 {
    let mean = if squares.is_finite() { squares / width as f32 } else { f32::NAN };
    1.0 / (mean + eps).sqrt()
}

/// Largest element; -infinity of nothing. NaN is passed over. (Of zeros of both signs either.)
#[inline(always)]
pub(crate) fn max(isa: Isa, x: &[f32]) -> f32 {
    match isa.vectors() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here.
        Isa::Avx512 => unsafe { max_avx512(x) },
        _ => x.iter().fold(f32::NEG_INFINITY, |max, &v| larger(max, v)),
    }
}

/// Written in vectors, since the compiler makes pairs of what is written in lanes.
///
/// # Safety
/// The processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn max_avx512(x: &[f32]) -> f32 {
    // Four at a time hide an instruction's latency. Of a number and no number `vmaxps` gives its
    // second operand.
    let mut lanes = [_mm512_set1_ps(f32::NEG_INFINITY); 4];
    let (chunks, rest) = x.as_chunks::<{ 4 * LANES }>();
    for chunk in chunks {
        for (lanes, chunk) in lanes.iter_mut().zip(chunk.as_chunks::<LANES>().0) {
            // SAFETY: a register is 16 elements.
            *lanes = _mm512_max_ps(unsafe { _mm512_loadu_ps(chunk.as_ptr()) }, *lanes);
        }
    }
    let [a, b, c, d] = lanes;
    let lanes = _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
    rest.iter().fold(_mm512_reduce_max_ps(lanes), |max, &v| larger(max, v))
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Difference in units of the last place of `want`.
    fn ulps(got: f32, want: f64) -> f64 {
        let spacing = (want as f32).abs().max(f32::MIN_POSITIVE);
        let spacing = f32::from_bits(spacing.to_bits() + 1) - spacing;
        (got as f64 - want).abs() / spacing as f64
    }

    #[test]
    fn exp_is_within_two_ulps() {
        for step in -87_299..88_000 {
            let x = step as f32 * 1e-3;
            assert!(ulps(exp(x), (x as f64).exp()) <= 2.0, "exp({x}) = {}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn ln_is_within_two_ulps() {
        for step in 0..200_000 {
            let x = f32::from_bits(0x2f00_0000 + step * 5_003);
            let want = (x as f64).ln();
            assert!(ulps(ln(x), want) <= 2.0 || want.abs() < 1e-3, "ln({x}) = {}", ln(x));
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn reductions_take_ragged_lengths() {
        for len in [0, 1, 15, 16, 17, 64, 100, 200] {
            let x: Vec<f32> = (0..len).map(|i| i as f32 - 3.0).collect();
            let want: f32 = x.iter().map(|v| v * v).sum();
            assert_eq!(sum_of_squares(&x), want);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.check().is_ok()) {
                let want = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(max(isa, &x), want, "{len} on {isa}");
                let with_nan: Vec<f32> = x.iter().flat_map(|&v| [f32::NAN, v]).collect();
                assert_eq!(max(isa, &with_nan), want, "{len} and NaN on {isa}");
            }
        }
    }
}
