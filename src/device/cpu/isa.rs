//! Instruction sets: what this machine has, and loops compiled for each.

use std::{fmt, str::FromStr};

use crate::error::{Error, Result};

/// The instruction set the loops are compiled for. The vectorised loops give the same bits on all:
/// sums are written as fixed lanes, products as fused multiply-adds. Only products with bf16
/// weights have other bits where the processor has instructions for them (see [`Products`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512, and AMX tiles for products with bf16 weights.
    Amx,
    /// The same bits as [`Isa::Amx`] without its hardware: slow, for tests.
    AmxEmulated,
    /// AVX-512, and its dot products for products with bf16 weights.
    Avx512Bf16,
    /// The same bits as [`Isa::Avx512Bf16`] without its hardware: slow, for tests.
    Avx512Bf16Emulated,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// Whatever the target has. Without a fused multiply-add in hardware it is slow.
    Portable,
}

/// What products with bf16 weights are made of, and with that their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Chains of fused multiply-adds in f32, as all other products.
    Chains,
    /// Pairs of k, `vdpbf16ps`.
    Pairs,
    /// Tiles of 32 of k, `tdpbf16ps`.
    Tiles,
}

impl fmt::Display for Products {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chains => "fma",
            Self::Pairs => "avx512-bf16",
            Self::Tiles => "amx",
        })
    }
}

impl Isa {
    /// All of them, the best first.
    pub const ALL: [Self; 7] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512,
        Self::Avx2,
        Self::Portable,
        Self::AmxEmulated,
        Self::Avx512Bf16Emulated,
    ];

    /// The best this machine has.
    pub fn detect() -> Self {
        let best = Self::ALL.into_iter().find(|isa| isa.is_here());
        best.unwrap_or(Self::Portable)
    }

    /// Refuses what this machine does not have.
    pub fn check(self) -> Result<Self> {
        if self.is_here() {
            return Ok(self);
        }
        let needs = match self {
            Self::Amx => "AMX with bfloat16, or the system does not grant its tiles",
            Self::Avx512Bf16 => "AVX-512 with bfloat16",
            Self::Avx512 => "AVX-512 F, BW, VL and DQ",
            _ => "AVX2 and FMA",
        };
        let best = Self::detect();
        Err(Error::new(format!("this processor has no {needs}")).hint(format!("use {best}")))
    }

    #[cfg(target_arch = "x86_64")]
    fn is_here(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        match self {
            Self::Amx => Self::Avx512.is_here() && super::pairs::amx_is_granted(),
            Self::Avx512Bf16 => Self::Avx512.is_here() && has!("avx512bf16"),
            Self::Avx512 => {
                has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512vl")
                    && has!("avx512dq")
                    && Self::Avx2.is_here()
            }
            Self::Avx2 => has!("avx2") && has!("fma"),
            Self::Portable | Self::AmxEmulated | Self::Avx512Bf16Emulated => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_here(self) -> bool {
        matches!(self, Self::Portable | Self::AmxEmulated | Self::Avx512Bf16Emulated)
    }

    /// What products with bf16 weights are made of.
    pub fn products(self) -> Products {
        match self {
            Self::Amx | Self::AmxEmulated => Products::Tiles,
            Self::Avx512Bf16 | Self::Avx512Bf16Emulated => Products::Pairs,
            Self::Avx512 | Self::Avx2 | Self::Portable => Products::Chains,
        }
    }

    /// What gives the same bits without hardware for it.
    #[must_use]
    pub fn emulated(self) -> Self {
        match self.products() {
            Products::Tiles => Self::AmxEmulated,
            Products::Pairs => Self::Avx512Bf16Emulated,
            Products::Chains => Self::Portable,
        }
    }

    /// What vectorised loops run with.
    #[inline]
    pub(crate) fn vectors(self) -> Self {
        match self {
            Self::Amx | Self::Avx512Bf16 => Self::Avx512,
            Self::AmxEmulated | Self::Avx512Bf16Emulated => {
                let vectors = [Self::Avx512, Self::Avx2].into_iter().find(|isa| isa.is_here());
                vectors.unwrap_or(Self::Portable)
            }
            other => other,
        }
    }

    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.vectors() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here.
            Self::Avx512 => unsafe { run_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: likewise.
            Self::Avx2 => unsafe { run_avx2(kernel) },
            _ => kernel.run(),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amx => "amx",
            Self::AmxEmulated => "amx-emulated",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512Bf16Emulated => "avx512-bf16-emulated",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

impl FromStr for Isa {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let isa = Self::ALL.into_iter().find(|isa| isa.to_string() == text);
        let unknown = || {
            Error::new("unknown instruction set")
                .expected(Self::ALL.map(|isa| isa.to_string()).join(", "))
                .got(format!("{text:?}"))
        };
        isa.ok_or_else(unknown)?.check()
    }
}

/// A loop compiled once per instruction set. `run` and all it calls are `#[inline(always)]`, so
/// that they are compiled with the features of the function they are inlined into.
pub(crate) trait Kernel {
    /// What it gives back.
    type Output;
    /// The loop.
    fn run(self) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}
