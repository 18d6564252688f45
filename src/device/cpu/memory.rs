//! Aligned arrays that the operating system fills with zeros as they are touched.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

use crate::{
    device::Element,
    error::{Error, Result},
};

/// Bytes; a cache line, and the widest vector.
const ALIGNMENT: usize = 64;
/// What every allocator aligns to. Asking for more would make it write the zeros itself, and
/// touch gigabytes that are never used.
const NATURAL: usize = 16;

/// A boxed slice aligned to a cache line.
pub(crate) struct Memory<T> {
    allocation: NonNull<u8>,
    start: NonNull<T>,
    len: usize,
}

// SAFETY: it owns its elements, which are plain numbers.
unsafe impl<T: Element> Send for Memory<T> {}
// SAFETY: likewise; shared access only reads.
unsafe impl<T: Element> Sync for Memory<T> {}

/// Room for `len` elements behind any start that is aligned to [`NATURAL`].
fn layout<T>(len: usize) -> Option<Layout> {
    let bytes = len.checked_mul(size_of::<T>())?.checked_add(ALIGNMENT)?;
    Layout::from_size_align(bytes, NATURAL).ok()
}

impl<T: Element> Memory<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Result<Self> {
        let bytes = || len.saturating_mul(size_of::<T>()).to_string() + " bytes";
        let too_much = || Error::new("not enough memory").expected(bytes());
        let layout = layout::<T>(len).ok_or_else(too_much)?;
        // SAFETY: the size is not zero.
        let allocation = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_much)?;
        let offset = allocation.as_ptr().align_offset(ALIGNMENT);
        // SAFETY: fewer than `ALIGNMENT` bytes are skipped, which the layout has to spare.
        let start = unsafe { allocation.add(offset) }.cast();
        Ok(Self { allocation, start, len })
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        if let Some(layout) = layout::<T>(self.len) {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.allocation.as_ptr(), layout) };
        }
    }
}

impl<T> Deref for Memory<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements from `start` are owned and initialised (zero is a value).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Memory<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
