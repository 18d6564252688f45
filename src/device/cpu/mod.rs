//! The processor as a device: memory, threads and instruction sets.

mod isa;
mod memory;
pub(crate) mod pairs;
mod shared;

use std::sync::Mutex;

use rayon::prelude::*;

pub(crate) use isa::Kernel;
pub use isa::{Isa, Products};
pub(crate) use memory::Memory;
pub(crate) use shared::Shared;

use crate::error::{Error, Result};

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
