//! Inputs of matmul, (rows, dim). The processor keeps them row by row; the CUDA kernels in atoms of
//! 8 rows × 64 elements, as tensor cores read them from shared memory: element (row, k) stands in
//! atom (k / 64) · (rows / 8) + row / 8, in it at row % 8 · 64 + ((k % 64 / 8) ^ (row % 8)) · 8 + k % 8. The
//! 16-byte chunks of 8 elements stay whole; what pads the last atom of a row is zero.

use super::Float;
use crate::{
    device::{Buffer, Device},
    error::Result,
};

/// Elements of a chunk, which the layout keeps together.
pub(super) const CHUNK: usize = 8;
/// Width of an atom in elements.
pub(super) const ATOM: usize = 64;
/// Rows of an atom.
pub(super) const ATOM_ROWS: usize = 8;

/// Rows of matmul input in the device's layout.
pub struct Activations<T> {
    rows: usize,
    dim: usize,
    tiled: bool,
    data: Buffer<T>,
}

impl<T: Float> Activations<T> {
    /// Zeros, (rows, dim).
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn zeroed(device: &Device, rows: usize, dim: usize) -> Result<Self> {
        let tiled = matches!(device, Device::Cuda(_));
        assert!(!tiled || dim.is_multiple_of(CHUNK), "activations of width {dim}");
        let len = match tiled {
            true => rows.next_multiple_of(ATOM_ROWS) * dim.next_multiple_of(ATOM),
            false => rows * dim,
        };
        Ok(Self { rows, dim, tiled, data: Buffer::zeroed(device, len)? })
    }

    /// A copy of `values`, (rows, dim).
    ///
    /// # Errors
    /// There is not enough memory, or the device has failed.
    pub fn upload(device: &Device, dim: usize, values: &[T]) -> Result<Self> {
        let mut this = Self::zeroed(device, values.len() / dim, dim)?;
        let mut data = vec![T::default(); this.data.len()];
        for (row, values) in values.chunks_exact(dim).enumerate() {
            for (k, &value) in values.iter().enumerate() {
                data[this.place(row, k)] = value;
            }
        }
        this.data.write(0, &data)?;
        Ok(this)
    }

    /// All rows, (rows, dim).
    ///
    /// # Errors
    /// The device has failed.
    pub fn read(&self) -> Result<Vec<T>> {
        let mut data = vec![T::default(); self.data.len()];
        self.data.read(0, &mut data)?;
        let element = |at: usize| data[self.place(at / self.dim, at % self.dim)];
        Ok((0..self.rows * self.dim).map(element).collect())
    }

    /// Rows that there is room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    fn place(&self, row: usize, k: usize) -> usize {
        if !self.tiled {
            return row * self.dim + k;
        }
        let atom = k / ATOM * self.row_groups() + row / ATOM_ROWS;
        let lane = row % ATOM_ROWS;
        let chunk = (k % ATOM / CHUNK) ^ lane;
        atom * ATOM_ROWS * ATOM + lane * ATOM + chunk * CHUNK + k % CHUNK
    }

    /// Atoms side by side that hold all rows of the same 64 elements.
    pub(super) fn row_groups(&self) -> usize {
        self.rows.div_ceil(ATOM_ROWS)
    }

    /// Atoms of a row.
    pub(super) fn atoms(&self) -> usize {
        self.dim.div_ceil(ATOM)
    }

    pub(super) fn address(&self) -> u64 {
        self.data.address()
    }

    pub(super) fn address_mut(&mut self) -> u64 {
        self.data.address_mut()
    }

    /// Row by row, for the processor.
    pub(super) fn host(&self) -> &[T] {
        self.data.host()
    }

    /// Likewise, to be written.
    pub(super) fn host_mut(&mut self) -> &mut [T] {
        self.data.host_mut()
    }
}
