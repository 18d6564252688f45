//! Counter-based randomness: Philox 4x32-10 (Salmon et al. 2011), and Gumbel draws from it.

use super::math::ln;

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

/// Likewise for `N` counters whose first words follow each other; by word, then by counter.
#[inline(always)]
pub(super) fn philox_row<const N: usize>(seed: u64, counter: [u32; 4]) -> [[u32; N]; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut counters = counter.map(|word| [word; N]);
    for (at, first) in counters[0].iter_mut().enumerate() {
        *first = first.wrapping_add(at as u32);
    }
    for _ in 0..10 {
        let [c0, c1, c2, c3] = &mut counters;
        for at in 0..N {
            let a = u64::from(c0[at]) * 0xD251_1F53;
            let b = u64::from(c2[at]) * 0xCD9E_8D57;
            c0[at] = (b >> 32) as u32 ^ c1[at] ^ key[0];
            c1[at] = b as u32;
            c2[at] = (a >> 32) as u32 ^ c3[at] ^ key[1];
            c3[at] = a as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counters
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
        let row = philox_row::<5>(0x1234_5678_9abc, [u32::MAX - 1, 7, 1, 2]);
        for at in 0..5 {
            let first = (u32::MAX - 1).wrapping_add(at as u32);
            let want = philox(0x1234_5678_9abc, [first, 7, 1, 2]);
            assert_eq!(row.map(|words| words[at]), want);
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
