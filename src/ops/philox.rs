//! Counter-based randomness: Philox 4x32-10 (Salmon et al. 2011), and Gumbel draws from it.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m512i, _mm512_loadu_si512, _mm512_mask_blend_epi32, _mm512_mul_epu32, _mm512_set1_epi32,
    _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_si512, _mm512_ternarylogic_epi32,
};

use super::math::ln;
use crate::device::cpu::Isa;

/// What a draw is for, so that no two uses share a counter.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Purpose {
    /// The next token.
    Token = 0,
    /// A component of a random vector.
    Vector = 1,
    /// Anything else the host draws: shuffles, resamples.
    Host = 2,
}

/// Four words for a key and a counter.
#[inline(always)]
pub fn philox(seed: u64, mut counter: [u32; 4]) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Counters of a [`philox_row`].
pub(super) const ROW: usize = 16;

/// Likewise for counters whose first words follow each other; by word, then by counter.
#[inline(always)]
pub(super) fn philox_row(isa: Isa, seed: u64, counter: [u32; 4]) -> [[u32; ROW]; 4] {
    let mut counters = counter.map(|word| [word; ROW]);
    for (at, first) in counters[0].iter_mut().enumerate() {
        *first = first.wrapping_add(at as u32);
    }
    match isa.vectors() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here.
        Isa::Avx512 => unsafe { row_avx512(seed, counters) },
        _ => {
            let mut words = [[0; ROW]; 4];
            for at in 0..ROW {
                let of_counter = philox(seed, counters.map(|words| words[at]));
                words.iter_mut().zip(of_counter).for_each(|(words, word)| words[at] = word);
            }
            words
        }
    }
}

/// Written in vectors: products of the even and of the odd lanes need no lanes moved.
///
/// # Safety
/// The processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn row_avx512(seed: u64, counters: [[u32; ROW]; 4]) -> [[u32; ROW]; 4] {
    const ODD: u16 = 0xaaaa;
    /// a ^ b ^ c.
    const XOR: i32 = 0x96;
    // (low words, high words) of the products with a constant.
    let multiply = |x: __m512i, by: u32| {
        let by = _mm512_set1_epi32(by as i32);
        let even = _mm512_mul_epu32(x, by);
        let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(x), by);
        (
            _mm512_mask_blend_epi32(ODD, even, _mm512_slli_epi64::<32>(odd)),
            _mm512_mask_blend_epi32(ODD, _mm512_srli_epi64::<32>(even), odd),
        )
    };
    // SAFETY: a register is 16 words.
    let [mut c0, mut c1, mut c2, mut c3] =
        counters.map(|words| unsafe { _mm512_loadu_si512(words.as_ptr().cast()) });
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let [k0, k1] = key.map(|key| _mm512_set1_epi32(key as i32));
        let (a_low, a_high) = multiply(c0, 0xD251_1F53);
        let (b_low, b_high) = multiply(c2, 0xCD9E_8D57);
        c0 = _mm512_ternarylogic_epi32::<XOR>(b_high, c1, k0);
        c1 = b_low;
        c2 = _mm512_ternarylogic_epi32::<XOR>(a_high, c3, k1);
        c3 = a_low;
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    let mut words = [[0; ROW]; 4];
    for (words, register) in words.iter_mut().zip([c0, c1, c2, c3]) {
        // SAFETY: likewise.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), register) };
    }
    words
}

/// u = (x + 0.5) · 2⁻³² in f32: in (0, 1].
#[inline(always)]
pub fn uniform(word: u32) -> f32 {
    (word as f32 + 0.5) * 2.0f32.powi(-32)
}

/// A standard Gumbel draw, −ln(−ln1p(−u)): finite, or −∞ where u rounds to 1. (−ln(−ln u) would
/// give +∞ there: a garbage token every few hundred draws over a large vocabulary.)
#[inline(always)]
pub fn gumbel(word: u32) -> f32 {
    let u = uniform(word);
    if u >= 1.0 {
        return f32::NEG_INFINITY;
    }
    // −ln1p(−u) by Kahan's correction of the rounding of 1 − u.
    let w = 1.0 - u;
    let exponential = if w == 1.0 { u } else { -ln(w) * (u / (1.0 - w)) };
    -ln(exponential)
}

/// Standard normal draws by Box and Muller, in f64; `index` counts them.
pub fn normal(seed: u64, index: u32) -> f64 {
    let words = philox(seed, [index / 2, 0, Purpose::Vector as u32, 0]);
    let unit = |word: u32| (f64::from(word) + 0.5) * 2.0f64.powi(-32);
    let (radius, angle) = (unit(words[0]), unit(words[1]) * std::f64::consts::TAU);
    let radius = (-2.0 * radius.ln()).sqrt();
    if index.is_multiple_of(2) { radius * angle.cos() } else { radius * angle.sin() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_counters_is_each_of_them() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.check().is_ok()) {
            let row = philox_row(isa, 0x1234_5678_9abc, [u32::MAX - 1, 7, 1, 2]);
            for at in 0..ROW {
                let first = (u32::MAX - 1).wrapping_add(at as u32);
                let want = philox(0x1234_5678_9abc, [first, 7, 1, 2]);
                assert_eq!(row.map(|words| words[at]), want, "{isa}");
            }
        }
    }

    #[test]
    fn philox_gives_the_published_words() {
        // Known answers of the Random123 distribution.
        assert_eq!(philox(0, [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox(u64::MAX, [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(0x299f_31d0_a409_3822, [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn gumbel_never_overflows() {
        for word in (0..2000).chain(u32::MAX - 2000..=u32::MAX).chain((0..1000).map(|i| i << 22)) {
            let (got, u) = (gumbel(word), uniform(word));
            assert!(got < 23.0 && !got.is_nan(), "gumbel({word}) = {got}");
            if u < 1.0 {
                let want = -(-(-f64::from(u)).ln_1p()).ln();
                assert!((f64::from(got) - want).abs() <= 4e-6 * want.abs().max(1.0), "{word}");
            }
        }
        assert_eq!(gumbel(u32::MAX), f32::NEG_INFINITY);
    }

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let draws: Vec<f64> = (0..100_000).map(|index| normal(7, index)).collect();
        let mean = draws.iter().sum::<f64>() / 1e5;
        let variance = draws.iter().map(|v| v * v).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.015 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }
}
