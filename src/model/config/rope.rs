//! Rotary frequencies: of plain rope and of its scalings, in f32 as transformers computes them.

use std::f64::consts::PI;

/// How far the pairs of a head are turned a position, and what their turn is multiplied by.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// (pairs that are turned,), radians a position.
    pub frequencies: Vec<f32>,
    /// Of the cosines and sines (`YaRN`, `LongRoPE`); 1 otherwise.
    pub scale: f32,
}

/// What is done to the frequencies of plain rope.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scaling {
    /// Divided by a factor (kaiokendev 2023).
    Linear(f64),
    /// Each divided by its own (Llama 3's in GGUF files, `LongRoPE`: Ding et al. 2024, eq. 3).
    Each {
        /// One a pair.
        factors: Vec<f32>,
        /// Of the cosines and sines.
        scale: f64,
    },
    /// Long waves divided by a factor, short ones kept, those between mixed (Llama 3.1).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    Yarn(Yarn),
}

/// NTK-by-parts (Peng et al. 2023, section 3.2).
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Yarn {
    pub factor: f64,
    /// Positions that the model was first trained for.
    pub original: f64,
    /// Turns over these positions above which a pair is kept, and below which it is interpolated.
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// Whether the edges of the ramp are whole pairs.
    pub truncate: bool,
    /// Of the cosines and sines.
    pub scale: f64,
}

impl Rope {
    /// Frequency i is theta^(-2i / `width`), for `width` / 2 pairs (Su et al. 2021, section 3.2.2).
    pub fn plain(width: usize, theta: f32) -> Self {
        Self { frequencies: powers(width, theta).map(|power| 1.0 / power).collect(), scale: 1.0 }
    }

    pub(super) fn scaled(width: usize, theta: f32, scaling: Option<&Scaling>) -> Self {
        let mut rope = Self::plain(width, theta);
        match scaling {
            None => {}
            Some(Scaling::Linear(factor)) => {
                rope.frequencies.iter_mut().for_each(|f| *f /= *factor as f32);
            }
            Some(Scaling::Each { factors, scale }) => {
                let powers = powers(width, theta).zip(factors);
                rope.frequencies = powers.map(|(power, factor)| 1.0 / (factor * power)).collect();
                rope.scale = *scale as f32;
            }
            Some(Scaling::Llama3 { factor, low, high, original }) => {
                for f in &mut rope.frequencies {
                    *f = llama3(*f, *factor as f32, [*low, *high], *original);
                }
            }
            Some(Scaling::Yarn(yarn)) => {
                rope.frequencies = yarn.frequencies(width, theta);
                rope.scale = yarn.scale as f32;
            }
        }
        rope
    }
}

/// theta^(2i / `width`).
fn powers(width: usize, theta: f32) -> impl Iterator<Item = f32> {
    (0..width / 2).map(move |i| {
        let exponent = (2 * i) as f32 / width as f32;
        f64::from(theta).powf(f64::from(exponent)) as f32
    })
}

fn llama3(frequency: f32, factor: f32, [low, high]: [f64; 2], original: f64) -> f32 {
    let wave = (2.0 * PI) as f32 / frequency;
    if wave > (original / low) as f32 {
        return frequency / factor;
    }
    if wave < (original / high) as f32 {
        return frequency;
    }
    let smooth = (original as f32 / wave - low as f32) / (high - low) as f32;
    (1.0 - smooth) * frequency / factor + smooth * frequency
}

impl Yarn {
    /// The usual scale of cosines and sines: 0.1 m ln(factor) + 1 (eq. 22; m is 1 there).
    pub fn magnitude(factor: f64, m: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
    }

    fn frequencies(&self, width: usize, theta: f32) -> Vec<f32> {
        // The pair that turns so often over the positions trained for.
        let pair = |turns: f64| {
            width as f64 * (self.original / (turns * 2.0 * PI)).ln() / (2.0 * f64::from(theta).ln())
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(width as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let mixed = |(i, power): (usize, f32)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            1.0 / (self.factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        };
        powers(width, theta).enumerate().map(mixed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let plain = Rope::plain(128, 500_000.0).frequencies;
        let scaled = Rope::scaled(128, 500_000.0, Some(&scaling)).frequencies;
        assert_eq!(scaled[..29], plain[..29]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(scaled[32] < plain[32] && scaled[32] > plain[32] / 8.0);
    }

    #[test]
    fn yarn_ends_at_both_extremes() {
        let yarn = Yarn {
            factor: 4.0,
            original: 32_768.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            scale: Yarn::magnitude(4.0, 1.0),
        };
        let plain = Rope::plain(128, 1e6);
        let scaled = Rope::scaled(128, 1e6, Some(&Scaling::Yarn(yarn)));
        assert_eq!(scaled.frequencies[0], plain.frequencies[0]);
        assert!((scaled.frequencies[63] * 4.0 / plain.frequencies[63] - 1.0).abs() < 1e-6);
        assert!((f64::from(scaled.scale) - 1.138_629_436).abs() < 1e-6);
    }

    #[test]
    fn each_pair_has_its_factor() {
        let scaling = Scaling::Each { factors: vec![1.0, 2.0], scale: 1.5 };
        let rope = Rope::scaled(4, 10_000.0, Some(&scaling));
        assert_eq!((rope.frequencies, rope.scale), (vec![1.0, 0.005], 1.5));
    }
}
