//! Aligned arrays that the operating system fills with zeros as they are touched, in large pages
//! where they are large: weights are read from memory at every step, and the addresses of small pages
//! would have to be looked up at every 4 KiB.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::Arc,
};

use memmap2::MmapMut;

use crate::{
    device::Element,
    error::{Error, Result},
};

/// Bytes; a cache line, and the widest vector.
const ALIGNMENT: usize = 64;
/// What every allocator aligns to. Asking for more would make it write the zeros itself, and
/// touch gigabytes that are never used.
const NATURAL: usize = 16;
/// Bytes from which an array has pages of its own, what products of hundreds of rows read and write
/// included.
const LARGE: usize = 256 << 10;
/// Bytes of a large page.
const PAGE: usize = 2 << 20;
/// Bytes that an arena takes at a time.
const CHUNK: usize = 32 << 20;

/// A boxed slice aligned to a cache line.
pub(crate) struct Memory<T> {
    /// Holds the elements, and frees them.
    _region: Arc<Region>,
    start: NonNull<T>,
    len: usize,
}

// SAFETY: its elements, plain numbers, are its own.
unsafe impl<T: Element> Send for Memory<T> {}
// SAFETY: likewise; shared access only reads.
unsafe impl<T: Element> Sync for Memory<T> {}

/// Zeros from the operating system.
struct Region {
    start: NonNull<u8>,
    source: Source,
}

enum Source {
    Heap(Layout),
    /// Unmapped when it is dropped.
    Pages(#[expect(dead_code, reason = "held, not read")] MmapMut),
}

// SAFETY: it owns its bytes, and hands out only where they are.
unsafe impl Send for Region {}
// SAFETY: likewise.
unsafe impl Sync for Region {}

impl Region {
    /// `bytes` zeros behind an aligned start.
    fn zeroed(bytes: usize) -> Result<Self> {
        let error = || Error::new("not enough memory").expected(format!("{bytes} bytes"));
        if bytes < LARGE {
            let layout = bytes.checked_add(ALIGNMENT);
            let layout = layout.and_then(|size| Layout::from_size_align(size, NATURAL).ok());
            let layout = layout.ok_or_else(error)?;
            // SAFETY: the size is not zero.
            let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(error)?;
            return Ok(Self { start, source: Source::Heap(layout) });
        }
        // Whole pages behind the start, wherever it falls.
        let size = bytes.checked_next_multiple_of(PAGE).and_then(|size| size.checked_add(PAGE));
        let size = size.ok_or_else(error)?;
        let mut pages = MmapMut::map_anon(size).map_err(|_| error())?;
        // Without large pages it is only slower.
        #[cfg(target_os = "linux")]
        drop(pages.advise(memmap2::Advice::HugePage));
        let start = NonNull::new(pages.as_mut_ptr()).ok_or_else(error)?;
        Ok(Self { start, source: Source::Pages(pages) })
    }

    /// The aligned start.
    fn start(&self) -> NonNull<u8> {
        let alignment = match self.source {
            Source::Heap(_) => ALIGNMENT,
            Source::Pages(_) => PAGE,
        };
        let offset = self.start.as_ptr().align_offset(alignment);
        // SAFETY: `zeroed` has taken as many bytes as the alignment skips at most.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Source::Heap(layout) = self.source {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

/// Bytes of `len` elements.
fn bytes_of<T>(len: usize) -> Result<usize> {
    let error = || Error::new("not enough memory").expected(format!("{len} numbers"));
    len.checked_mul(size_of::<T>()).ok_or_else(error)
}

impl<T: Element> Memory<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Result<Self> {
        let region = Region::zeroed(bytes_of::<T>(len)?)?;
        let start = region.start().cast();
        Ok(Self { _region: Arc::new(region), start, len })
    }
}

impl<T> Deref for Memory<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements from `start` are this array's, and initialised (zero is a value).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// What a thread works in: at the start of a cache line, so that no vector and no row of a tile lies in
/// two.
#[repr(C, align(64))]
pub(crate) struct Aligned<T>(pub(crate) T);

/// Likewise an array that grows as it is asked for.
pub(crate) struct Grown<T>(Vec<T>);

impl<T: Element + Default> Grown<T> {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// `len` elements; what they hold is open.
    pub(crate) fn of(&mut self, len: usize) -> &mut [T] {
        let room = len + ALIGNMENT / size_of::<T>();
        if self.0.len() < room {
            self.0.resize(room, T::default());
        }
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..][..len]
    }
}

/// Puts arrays side by side in large pages, for those that live about as long as each other: memory
/// is given back when all of a chunk are gone.
#[derive(Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<Region>>,
    used: usize,
}

impl Arena {
    /// `len` zeros.
    pub(crate) fn zeroed<T: Element>(&mut self, len: usize) -> Result<Memory<T>> {
        let bytes = bytes_of::<T>(len)?;
        if bytes >= CHUNK / 2 {
            return Memory::zeroed(len);
        }
        let chunk = match &self.chunk {
            Some(chunk) if self.used + bytes <= CHUNK => chunk,
            _ => {
                self.used = 0;
                self.chunk.insert(Arc::new(Region::zeroed(CHUNK)?))
            }
        };
        // SAFETY: `used + bytes` bytes of the chunk's `CHUNK` have been taken.
        let start = unsafe { chunk.start().add(self.used) }.cast();
        let memory = Memory { _region: Arc::clone(chunk), start, len };
        self.used = (self.used + bytes).next_multiple_of(ALIGNMENT);
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mut memory: Memory<f32>, len: usize) -> Memory<f32> {
        assert_eq!(memory.len(), len);
        assert_eq!(memory.as_ptr() as usize % ALIGNMENT, 0);
        assert!(memory.iter().all(|&v| v == 0.0), "not zero");
        memory.fill(len as f32);
        memory
    }

    #[test]
    fn arrays_are_aligned_zeros() {
        for len in [0, 1, 15, 1000, LARGE / 4 - 1, LARGE / 4, LARGE / 4 + 1] {
            check(Memory::zeroed(len).unwrap(), len);
        }
        assert!(Memory::<f32>::zeroed(usize::MAX / 2).is_err());
        assert!(Memory::<f32>::zeroed(usize::MAX / 8).is_err());
    }

    #[test]
    fn arrays_of_an_arena_do_not_overlap() {
        let mut arena = Arena::default();
        let lengths = [1, 0, 17, 3 << 20, 100, 2 << 20, 2 << 20, 1 << 20, 5 << 20, 3, CHUNK / 8];
        let arrays = lengths.map(|len| check(arena.zeroed(len).unwrap(), len));
        drop(arena);
        for (array, len) in arrays.iter().zip(lengths) {
            assert!(array.iter().all(|&v| v == len as f32), "{len} elements were overwritten");
        }
    }
}
