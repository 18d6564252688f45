//! Memory of a GPU, and pinned memory of the host.

use std::{
    marker::PhantomData,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result};

use super::failed;
use crate::{device::Element, error::Result};

/// Pinned memory that small writes pass through, so that none waits for the GPU: two halves, each
/// used again when what was copied from it is done.
pub(super) struct Ring {
    memory: Pinned<u8>,
    half: usize,
    /// Bytes of the half that are taken.
    taken: usize,
    /// The end of what was copied from each half.
    ends: [Option<CudaEvent>; 2],
}

/// Bytes of half a ring; larger writes, all of them at start, wait for their copy.
const HALF_RING: usize = 8 << 20;

impl Ring {
    pub(super) fn new(stream: &CudaStream) -> Result<Self> {
        let memory = Pinned::new(stream.context(), 2 * HALF_RING)?;
        Ok(Self { memory, half: 0, taken: 0, ends: [None, None] })
    }

    fn write(
        &mut self,
        stream: &CudaStream,
        to: u64,
        bytes: &[u8],
    ) -> std::result::Result<(), DriverError> {
        if bytes.len() > HALF_RING {
            // SAFETY: the caller's allocation has room, and `bytes` outlives the copy.
            unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream())? };
            return stream.synchronize();
        }
        if self.taken + bytes.len() > HALF_RING {
            self.ends[self.half] = Some(stream.record_event(None)?);
            (self.half, self.taken) = (1 - self.half, 0);
            if let Some(end) = self.ends[self.half].take() {
                end.synchronize()?;
            }
        }
        let from = self.half * HALF_RING + self.taken;
        self.taken += bytes.len().next_multiple_of(64);
        // SAFETY: this part of the ring is inside it, and no copy from it is under way: its last
        // one was waited for when the half was begun.
        let part = unsafe {
            let part = std::slice::from_raw_parts_mut(self.memory.start.add(from), bytes.len());
            part.copy_from_slice(bytes);
            part
        };
        // SAFETY: the caller's allocation has room; the ring outlives the copy.
        unsafe { result::memcpy_htod_async(to, part, stream.cu_stream()) }
    }
}

/// An array in the GPU's memory.
pub(in crate::device) struct Memory<T> {
    address: u64,
    len: usize,
    stream: Arc<CudaStream>,
    ring: Arc<Mutex<Ring>>,
    element: PhantomData<T>,
}

impl<T: Element> Memory<T> {
    /// `len` zeros.
    pub(super) fn zeroed(
        stream: &Arc<CudaStream>,
        ring: &Arc<Mutex<Ring>>,
        name: &str,
        len: usize,
    ) -> Result<Self> {
        let bytes = (len * size_of::<T>()).max(1);
        let context = stream.context();
        let allocate = || {
            context.bind_to_thread()?;
            // SAFETY: the size is not zero.
            unsafe { result::malloc_sync(bytes) }
        };
        let address = allocate().map_err(|error| {
            let free = context.mem_get_info().map_or(0, |(free, _)| free);
            failed("not enough GPU memory", error)
                .at(name)
                .expected(format!("{bytes} bytes"))
                .got(format!("{free} bytes free"))
                .hint("lower --max-batch, or free memory that other programs hold")
        })?;
        let (stream, ring) = (Arc::clone(stream), Arc::clone(ring));
        let memory = Self { address, len, stream, ring, element: PhantomData };
        let stream = memory.stream.cu_stream();
        // SAFETY: `bytes` bytes were just allocated.
        memory.copy(unsafe { result::memset_d8_async(address, 0, bytes, stream) })?;
        Ok(memory)
    }

    pub(in crate::device) fn len(&self) -> usize {
        self.len
    }

    pub(in crate::device) fn address(&self) -> u64 {
        self.address
    }

    fn at(&self, start: usize) -> u64 {
        self.address + (start * size_of::<T>()) as u64
    }

    fn copy(&self, copied: std::result::Result<(), DriverError>) -> Result<()> {
        let name = || self.stream.context().name().unwrap_or_default();
        copied.map_err(|error| failed("a copy to or from the GPU has failed", error).at(name()))
    }

    pub(in crate::device) fn write(&mut self, start: usize, data: &[T]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        self.copy(self.stream.context().bind_to_thread())?;
        // SAFETY: elements have no padding, so all their bytes are initialised.
        let bytes = unsafe {
            std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), std::mem::size_of_val(data))
        };
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        self.copy(ring.write(&self.stream, self.at(start), bytes))
    }

    pub(in crate::device) fn read(&self, start: usize, out: &mut [T]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        self.copy(self.stream.context().bind_to_thread())?;
        // SAFETY: inside the allocation (asserted by the caller), and `out` outlives the copy.
        self.copy(unsafe {
            result::memcpy_dtoh_async(out, self.at(start), self.stream.cu_stream())
        })?;
        self.copy(self.stream.synchronize())
    }

    pub(in crate::device) fn copy_from(&mut self, from: &Self) -> Result<()> {
        self.copy(self.stream.context().bind_to_thread())?;
        let bytes = self.len * size_of::<T>();
        // SAFETY: both are as long (asserted by the caller).
        self.copy(unsafe {
            result::memcpy_dtod_async(self.address, from.address, bytes, self.stream.cu_stream())
        })
    }

    pub(in crate::device) fn fetch(
        &self,
        start: usize,
        len: usize,
        to: &mut Pinned<T>,
        at: usize,
    ) -> Result<()> {
        self.fetch_on(&self.stream, (start, len), (to, at))
    }

    /// As [`Memory::fetch`], in another stream's order.
    pub(super) fn fetch_on(
        &self,
        stream: &CudaStream,
        (start, len): (usize, usize),
        (to, at): (&mut Pinned<T>, usize),
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.copy(self.stream.context().bind_to_thread())?;
        // SAFETY: inside both allocations (asserted by the caller). Who reads `to` has waited.
        self.copy(unsafe {
            let out = std::slice::from_raw_parts_mut(to.start.add(at), len);
            result::memcpy_dtoh_async(out, self.at(start), stream.cu_stream())
        })
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
        // SAFETY: allocated in `zeroed`; freeing waits for what still uses it.
        context.record_err(unsafe { result::free_sync(self.address) });
    }
}

/// Pinned host memory.
pub(in crate::device) struct Pinned<T> {
    start: *mut T,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: it owns its elements, which are plain numbers.
unsafe impl<T: Element> Send for Pinned<T> {}

impl<T: Element> Pinned<T> {
    pub(super) fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        let bytes = (len * size_of::<T>()).max(1);
        let allocate = || {
            context.bind_to_thread()?;
            // SAFETY: the size is not zero; without flags the memory is cached, so quick to read.
            unsafe { result::malloc_host(bytes, 0) }
        };
        let start = allocate().map_err(|error| {
            failed("not enough host memory that the GPU can reach", error)
                .expected(format!("{bytes} bytes"))
        })?;
        // SAFETY: `bytes` bytes were just allocated.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 0, bytes) };
        Ok(Self { start: start.cast(), len, context: Arc::clone(context) })
    }

    pub(in crate::device) fn len(&self) -> usize {
        self.len
    }

    pub(in crate::device) fn get(&self) -> &[T] {
        // SAFETY: `len` elements are owned and initialised, and no copy into them is under way
        // (the caller has waited).
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // A copy into it may still be under way.
        self.context.record_err(self.context.synchronize());
        // SAFETY: allocated in `pinned`.
        self.context.record_err(unsafe { result::free_host(self.start.cast()) });
    }
}
