//! Where memory lives and work runs. A [`Device`] owns its threads or its stream; a [`Buffer`] is
//! a fixed-length array in its memory, taken at start and never moved.

pub mod cpu;
mod file;

use std::{fmt, str::FromStr};

pub use cpu::Cpu;
pub use file::MappedFile;

use crate::error::{Error, Result};

/// The devices that can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceKind {
    /// This machine's processor.
    #[default]
    Cpu,
}

impl FromStr for DeviceKind {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "cpu" => Ok(Self::Cpu),
            _ => Err(Error::new("unknown device").expected("cpu").got(format!("{text:?}"))),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cpu")
    }
}

/// One place where operations run.
pub enum Device {
    /// This machine's processor.
    Cpu(Cpu),
}

/// A fixed-length array in a device's memory, zero at first.
pub struct Buffer<T> {
    memory: cpu::Memory<T>,
}

impl<T: Element> Buffer<T> {
    /// `len` zeros.
    pub fn zeroed(device: &Device, len: usize) -> Result<Self> {
        match device {
            Device::Cpu(_) => Ok(Self { memory: cpu::Memory::zeroed(len)? }),
        }
    }

    /// A copy of `data`.
    pub fn upload(device: &Device, data: &[T]) -> Result<Self> {
        let mut buffer = Self::zeroed(device, data.len())?;
        buffer.memory.copy_from_slice(data);
        Ok(buffer)
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// Overwrites `data.len()` elements from `start` on.
    pub fn write(&mut self, start: usize, data: &[T]) {
        self.memory[start..start + data.len()].copy_from_slice(data);
    }

    /// Reads `out.len()` elements from `start` on.
    pub fn read(&self, start: usize, out: &mut [T]) {
        out.copy_from_slice(&self.memory[start..start + out.len()]);
    }

    /// The elements, for operations that run on the processor.
    pub(crate) fn host(&self) -> &[T] {
        &self.memory
    }

    /// Likewise, to be written.
    pub(crate) fn host_mut(&mut self) -> &mut [T] {
        &mut self.memory
    }
}

/// Plain numbers for which all bits zero is a value.
///
/// # Safety
/// Any bit pattern is a value, zero included, and `T` needs no drop.
pub unsafe trait Element: Copy + Send + Sync + 'static {}
// SAFETY: plain numbers.
unsafe impl Element for f32 {}
// SAFETY: likewise.
unsafe impl Element for half::bf16 {}
// SAFETY: likewise.
unsafe impl Element for u32 {}
// SAFETY: likewise.
unsafe impl Element for i32 {}
