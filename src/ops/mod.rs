//! The operations of the forward pass, one file each: parameters, checks, launch. Nothing above
//! this layer writes `unsafe`. An operation checks every length, allocates nothing and waits for
//! nothing. On a [`crate::device::Cuda`] it queues the kernel of the same name in `kernels/`.

pub mod activations;
pub mod attention;
pub mod cap_logits;
pub mod copy_pages;
pub mod enter;
pub mod experts;
pub mod heads;
pub mod hooks;
pub(crate) mod math;
pub mod matmul;
pub mod philox;
pub mod probe;
#[doc(hidden)]
pub mod probes;
pub mod residual_norm;
pub mod rope_append;
pub mod rows;
pub mod sample;
pub mod select_rows;
pub mod summarize;
mod tile;

use half::bf16;

use crate::device::{Element, cpu::Kernel};
use tile::Wide;

/// The type of matmul inputs and of the KV cache.
pub trait Float: Element + Default + Wide {
    /// Its name among the types that a model can be run in.
    const DTYPE: matmul::Dtype;
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Likewise.
    fn to_bf16(self) -> bf16;
    /// The same values, where this is bfloat16.
    fn as_bf16(values: &[Self]) -> Option<&[bf16]>;
}

impl Float for f32 {
    const DTYPE: matmul::Dtype = matmul::Dtype::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        Float::from_f32(self)
    }
    #[inline(always)]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Float for bf16 {
    const DTYPE: matmul::Dtype = matmul::Dtype::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        // Branch-free, so that loops over it vectorise; narrowed once.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x40_0000;
        Self::from_bits(((if value.is_nan() { quiet } else { rounded }) >> 16) as u16)
    }
    #[inline(always)]
    fn to_bf16(self) -> bf16 {
        self
    }
    #[inline(always)]
    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }
}

/// Rounds to another type.
struct Round<'a, T>(&'a [f32], &'a mut [T]);

impl<T: Float> Kernel for Round<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (to, &value) in self.1.iter_mut().zip(self.0) {
            *to = T::from_f32(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for step in 0..=u32::MAX / 9973 {
            let value = f32::from_bits(step * 9973);
            let (ours, theirs) = (<bf16 as Float>::from_f32(value), bf16::from_f32(value));
            assert!(ours.to_bits() == theirs.to_bits() || value.is_nan() && ours.is_nan());
        }
    }
}
