//! The processor as a device: memory, threads and instruction sets.

mod memory;
mod shared;

use std::{fmt, str::FromStr, sync::Mutex};

use rayon::prelude::*;

pub(crate) use memory::Memory;
pub(crate) use shared::Shared;

use crate::error::{Error, Result};

/// The instruction set the vectorised loops are compiled for. All of them give the same bits:
/// sums are written as fixed lanes, products as fused multiply-adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// Whatever the target has. Without a fused multiply-add in hardware it is slow.
    Portable,
}

impl Isa {
    /// The best this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
        {
            return Self::Avx2;
        }
        Self::Portable
    }

    /// Refuses what this machine does not have.
    pub fn check(self) -> Result<Self> {
        if self == Self::Avx2 && Self::detect() != self {
            return Err(Error::new("this processor has no AVX2 and FMA").hint("use portable"));
        }
        Ok(self)
    }

    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a `Cpu` is made only with an instruction set that `Isa::check` found here.
            Self::Avx2 => unsafe { run_avx2(kernel) },
            _ => kernel.run(),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

impl FromStr for Isa {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let isa = match text {
            "avx2" => Self::Avx2,
            "portable" => Self::Portable,
            _ => {
                return Err(Error::new("unknown instruction set")
                    .expected("avx2 or portable")
                    .got(format!("{text:?}")));
            }
        };
        isa.check()
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
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Threads and scratch memory of the processor.
pub struct Cpu {
    isa: Isa,
    threads: usize,
    /// Packed matmul inputs; taken at start, used by one operation at a time.
    pub(crate) workspace: Mutex<Memory<f32>>,
}

impl Cpu {
    /// A device for the current thread, which must be a worker of a pool of `threads` threads
    /// (see [`thread_pool`]), with room for `workspace` f32s of packed matmul input.
    pub fn new(isa: Isa, threads: usize, workspace: usize) -> Result<Self> {
        let isa = isa.check()?;
        Ok(Self { isa, threads, workspace: Mutex::new(Memory::zeroed(workspace)?) })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share the work.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `work` for `0..tasks`, in any order, on all threads.
    pub(crate) fn parallel(&self, tasks: usize, work: impl Fn(usize) + Sync + Send) {
        if self.threads == 1 || tasks <= 1 {
            (0..tasks).for_each(work);
        } else {
            (0..tasks).into_par_iter().with_max_len(1).for_each(work);
        }
    }

    /// Calls `work` for chunks of `0..items` of at most `chunk` each.
    pub(crate) fn parallel_chunks(
        &self,
        items: usize,
        chunk: usize,
        work: impl Fn(std::ops::Range<usize>) + Sync + Send,
    ) {
        self.parallel(items.div_ceil(chunk), |task| {
            work(task * chunk..(task * chunk + chunk).min(items));
        });
    }
}

/// The threads that an engine runs on.
pub fn thread_pool(threads: usize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("inkling-{index}"))
        .build()
        .map_err(|error| Error::new(format!("cannot start {threads} threads: {error}")))
}
