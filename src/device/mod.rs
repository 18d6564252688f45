//! Where memory lives and work runs. A [`Device`] owns its threads or its stream; a [`Buffer`] is
//! a fixed-length array in its memory, taken at start and never moved.

pub mod cpu;
pub mod cuda;
mod file;

use std::{fmt, str::FromStr, sync::PoisonError};

pub use cpu::Cpu;
pub use cuda::Cuda;
pub use file::MappedFile;

use crate::error::{Error, Result};

/// The devices that can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// This machine's processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by ordinal.
    Cuda(usize),
    /// The GPU's kernels, run on the processor: slow, for tests.
    HostKernels,
}

impl FromStr for DeviceKind {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        match (text, ordinal) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            ("host-kernels", _) => Ok(Self::HostKernels),
            (_, Some(ordinal)) => Ok(Self::Cuda(ordinal)),
            _ => Err(Error::new("unknown device")
                .expected("cpu, cuda, cuda:N or host-kernels")
                .got(format!("{text:?}"))),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(0) => f.write_str("cuda"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::HostKernels => f.write_str("host-kernels"),
        }
    }
}

/// One place where operations run.
pub enum Device {
    /// This machine's processor, with the processor's own code.
    Cpu(Cpu),
    /// The CUDA kernels, on a GPU or on the processor.
    Cuda(Cuda),
}

impl Device {
    /// Waits for everything that was queued.
    ///
    /// # Errors
    /// What was queued has failed.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Self::Cpu(_) => Ok(()),
            Self::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// A point in the order of work.
    ///
    /// # Errors
    /// Something queued before has failed.
    pub(crate) fn mark(&self) -> Result<cuda::Mark> {
        match self {
            Self::Cpu(_) => Ok(cuda::Mark::now()),
            Self::Cuda(cuda) => cuda.mark(),
        }
    }

    /// Bytes of a GPU's memory that are free.
    ///
    /// # Errors
    /// The device has failed.
    pub(crate) fn free_memory(&self) -> Result<Option<u64>> {
        let facts = if let Self::Cuda(cuda) = self { cuda.facts()? } else { None };
        Ok(facts.map(|facts| facts.memory.0 as u64))
    }

    /// Whether a call returns before its work is done, so that a step can be queued behind another.
    pub fn is_asynchronous(&self) -> bool {
        matches!(self, Self::Cuda(cuda) if cuda.is_gpu())
    }
}

/// A fixed-length array in a device's memory, zero at first.
pub struct Buffer<T> {
    memory: Memory<T>,
}

enum Memory<T> {
    /// The processor's memory, which host kernels use too.
    Host(cpu::Memory<T>),
    Gpu(cuda::Memory<T>),
}

impl<T: Element> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn zeroed(device: &Device, len: usize) -> Result<Self> {
        let memory = match device {
            Device::Cuda(cuda) => match cuda.zeroed(len)? {
                Some(memory) => Memory::Gpu(memory),
                None => Memory::Host(cpu::Memory::zeroed(len)?),
            },
            Device::Cpu(_) => Memory::Host(cpu::Memory::zeroed(len)?),
        };
        Ok(Self { memory })
    }

    /// `len` zeros that will stay about as long as the device: on the processor beside others of
    /// their kind.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn lasting(device: &Device, len: usize) -> Result<Self> {
        let Device::Cpu(cpu) = device else { return Self::zeroed(device, len) };
        let mut arena = cpu.arena.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Self { memory: Memory::Host(arena.zeroed(len)?) })
    }

    /// A copy of `data`.
    ///
    /// # Errors
    /// There is not enough memory, or the device has failed.
    pub fn upload(device: &Device, data: &[T]) -> Result<Self> {
        let mut buffer = Self::zeroed(device, data.len())?;
        buffer.write(0, data)?;
        Ok(buffer)
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match &self.memory {
            Memory::Host(memory) => memory.len(),
            Memory::Gpu(memory) => memory.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Overwrites `data.len()` elements from `start` on, after what was queued before.
    ///
    /// # Errors
    /// The device has failed.
    pub fn write(&mut self, start: usize, data: &[T]) -> Result<()> {
        assert!(start + data.len() <= self.len(), "write beyond a buffer's end");
        match &mut self.memory {
            Memory::Host(memory) => {
                memory[start..start + data.len()].copy_from_slice(data);
                Ok(())
            }
            Memory::Gpu(memory) => memory.write(start, data),
        }
    }

    /// Reads `out.len()` elements from `start` on, when everything queued before is done.
    ///
    /// # Errors
    /// The device, or something queued before, has failed.
    pub fn read(&self, start: usize, out: &mut [T]) -> Result<()> {
        assert!(start + out.len() <= self.len(), "read beyond a buffer's end");
        match &self.memory {
            Memory::Host(memory) => {
                out.copy_from_slice(&memory[start..start + out.len()]);
                Ok(())
            }
            Memory::Gpu(memory) => memory.read(start, out),
        }
    }

    /// Queues a copy of `len` elements from `start` on into host memory, at its `at`.
    ///
    /// # Errors
    /// The device has failed.
    pub fn fetch(&self, start: usize, len: usize, to: &mut Staging<T>, at: usize) -> Result<()> {
        assert!(start + len <= self.len() && at + len <= to.len(), "fetch beyond an end");
        match (&self.memory, &mut to.memory) {
            (Memory::Host(memory), StagingMemory::Host(to)) => {
                to[at..at + len].copy_from_slice(&memory[start..start + len]);
                Ok(())
            }
            (Memory::Gpu(memory), StagingMemory::Pinned(to)) => memory.fetch(start, len, to, at),
            _ => unreachable!("a buffer and its staging memory belong to one device"),
        }
    }

    /// Queues a copy like [`Buffer::fetch`] that runs beside the work queued after it; gives its
    /// end. Nothing may write these elements before.
    ///
    /// # Errors
    /// The device has failed.
    pub(crate) fn drain(
        &self,
        device: &Device,
        (start, len): (usize, usize),
        to: &mut Staging<T>,
    ) -> Result<cuda::Mark> {
        assert!(start + len <= self.len() && len <= to.len(), "drain beyond an end");
        match (device, &self.memory, &mut to.memory) {
            (Device::Cuda(cuda), Memory::Gpu(memory), StagingMemory::Pinned(to)) => {
                cuda.drain(memory, (start, len), to)
            }
            _ => self.fetch(start, len, to, 0).map(|()| cuda::Mark::now()),
        }
    }

    /// Overwrites all of it with another of the same length, after what was queued before.
    ///
    /// # Errors
    /// The device has failed.
    pub fn copy_from(&mut self, device: &Device, from: &Self) -> Result<()> {
        assert_eq!(self.len(), from.len(), "lengths of a copy");
        match (device, &mut self.memory, &from.memory) {
            (Device::Cpu(cpu), Memory::Host(to), Memory::Host(from)) => {
                let to = cpu::Shared::new(to);
                cpu.parallel_chunks(
                    from.len(),
                    from.len().div_ceil(cpu.threads()).max(1),
                    |range| {
                        // SAFETY: each task has its own range.
                        unsafe { to.range(range.start, range.len()) }.copy_from_slice(&from[range]);
                    },
                );
                Ok(())
            }
            (Device::Cuda(_), Memory::Gpu(to), Memory::Gpu(from)) => to.copy_from(from),
            _ => unreachable!("buffers of one device"),
        }
    }

    /// Where it is, for a kernel that reads it.
    pub(crate) fn address(&self) -> u64 {
        match &self.memory {
            Memory::Host(memory) => memory.as_ptr() as u64,
            Memory::Gpu(memory) => memory.address(),
        }
    }

    /// Where it is, for a kernel that writes it.
    pub(crate) fn address_mut(&mut self) -> u64 {
        match &mut self.memory {
            Memory::Host(memory) => memory.as_mut_ptr() as u64,
            Memory::Gpu(memory) => memory.address(),
        }
    }

    /// The elements, for operations that run on the processor.
    pub(crate) fn host(&self) -> &[T] {
        match &self.memory {
            Memory::Host(memory) => memory,
            Memory::Gpu(_) => unreachable!("the processor's code has the processor's buffers"),
        }
    }

    /// Likewise, to be written.
    pub(crate) fn host_mut(&mut self) -> &mut [T] {
        match &mut self.memory {
            Memory::Host(memory) => memory,
            Memory::Gpu(_) => unreachable!("the processor's code has the processor's buffers"),
        }
    }
}

/// Host memory that a device copies results into; on a GPU pinned, so that the copy is queued.
pub struct Staging<T> {
    memory: StagingMemory<T>,
}

enum StagingMemory<T> {
    Host(cpu::Memory<T>),
    Pinned(cuda::Pinned<T>),
}

impl<T: Element> Staging<T> {
    /// Room for `len` elements.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        let memory = match device {
            Device::Cuda(cuda) => match cuda.pinned(len)? {
                Some(memory) => StagingMemory::Pinned(memory),
                None => StagingMemory::Host(cpu::Memory::zeroed(len)?),
            },
            Device::Cpu(_) => StagingMemory::Host(cpu::Memory::zeroed(len)?),
        };
        Ok(Self { memory })
    }

    fn len(&self) -> usize {
        match &self.memory {
            StagingMemory::Host(memory) => memory.len(),
            StagingMemory::Pinned(memory) => memory.len(),
        }
    }

    /// What was copied here. The caller has waited for the copies.
    pub fn get(&self) -> &[T] {
        match &self.memory {
            StagingMemory::Host(memory) => memory,
            StagingMemory::Pinned(memory) => memory.get(),
        }
    }
}

/// Plain numbers for which all bits zero is a value.
///
/// # Safety
/// Any bit pattern is a value, zero included, there is no padding, and `T` needs no drop.
pub unsafe trait Element: Copy + Send + Sync + 'static {}
// SAFETY: plain numbers.
unsafe impl Element for f32 {}
// SAFETY: likewise.
unsafe impl Element for half::bf16 {}
// SAFETY: likewise.
unsafe impl Element for u8 {}
// SAFETY: likewise.
unsafe impl Element for u32 {}
// SAFETY: likewise.
unsafe impl Element for u64 {}
// SAFETY: likewise.
unsafe impl Element for i32 {}
// SAFETY: likewise.
unsafe impl Element for [u32; 2] {}
// SAFETY: likewise.
unsafe impl Element for [f32; 2] {}
