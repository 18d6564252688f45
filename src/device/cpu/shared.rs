//! An array whose disjoint parts are written by several threads.

use std::{marker::PhantomData, ops::Range};

/// A mutable slice that threads may cut disjoint ranges from.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out ranges only through `range`, whose caller promises that they are disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: likewise.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows the whole slice.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// No other range that overlaps this one is alive.
    #[inline(always)]
    pub(crate) unsafe fn range(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "range outside the array");
        // SAFETY: inside the slice (checked), and unique (promised).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Writes arrays of `N` elements from `start` on, `apart` elements from one's start to the next's.
    ///
    /// # Safety
    /// Nobody else reads or writes these elements meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn scatter<const N: usize>(
        &self,
        start: usize,
        apart: usize,
        values: &[[T; N]],
    ) where
        T: Copy,
    {
        let Some(last) = values.len().checked_sub(1) else { return };
        let end = last.checked_mul(apart).and_then(|end| end.checked_add(start + N));
        assert!(end.is_some_and(|end| end <= self.len), "elements outside the array");
        for (at, values) in values.iter().enumerate() {
            // SAFETY: inside the slice (checked for the last one), and nobody else's (promised).
            unsafe { self.start.add(start + at * apart).cast::<[T; N]>().write_unaligned(*values) };
        }
    }

    /// Where these columns of these rows start in an array of rows of `n`.
    ///
    /// # Safety
    /// No range of it that overlaps them is alive while the pointer is used.
    #[inline(always)]
    pub(crate) unsafe fn columns(
        &self,
        rows: Range<usize>,
        n: usize,
        columns: Range<usize>,
    ) -> *mut T {
        assert!(columns.end <= n && rows.end * n <= self.len, "columns outside the array");
        self.start.wrapping_add(rows.start * n + columns.start)
    }
}
