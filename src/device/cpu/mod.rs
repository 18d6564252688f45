//! The processor as a device: memory, threads and instruction sets.

mod isa;
mod machine;
mod memory;
pub(crate) mod pairs;
mod pool;
mod shared;

use std::sync::Mutex;

use pool::Pool;

pub(crate) use isa::Kernel;
pub use isa::{Isa, Products};
pub use machine::MachineMemory;
pub(crate) use memory::{Aligned, Arena, Grown, Memory};
pub(crate) use shared::Shared;

use crate::error::Result;

/// Threads and scratch memory of the processor.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    /// Packed matmul inputs; taken at start, used by one operation at a time.
    pub(crate) workspace: Mutex<Memory<f32>>,
    /// Where weights are.
    pub(crate) arena: Mutex<Arena>,
}

impl Cpu {
    /// A device of `threads` threads, one of which is the caller's, with room for `workspace` f32s
    /// of packed matmul input.
    pub fn new(isa: Isa, threads: usize, workspace: usize) -> Result<Self> {
        let isa = isa.check()?;
        let workspace = Mutex::new(Memory::zeroed(workspace)?);
        Ok(Self { isa, pool: Pool::new(threads)?, workspace, arena: Mutex::default() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that share the work.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `work` for `0..tasks`, in any order, on all threads.
    pub(crate) fn parallel(&self, tasks: usize, work: impl Fn(usize) + Sync) {
        self.pool.run(tasks, work);
    }

    /// Calls `work` for chunks of `0..items` of at most `chunk` each.
    pub(crate) fn parallel_chunks(
        &self,
        items: usize,
        chunk: usize,
        work: impl Fn(std::ops::Range<usize>) + Sync,
    ) {
        self.parallel(items.div_ceil(chunk), |task| {
            work(task * chunk..(task * chunk + chunk).min(items));
        });
    }
}
