//! Copies chosen rows side by side: so that the output head runs only where it is needed, and each
//! expert of a mixture only on its rows.

use super::{
    Float,
    activations::{ATOM, Activations, CHUNK},
    rows::NONE,
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::Shared,
        cuda::{Launch, Params},
    },
    error::Result,
};

/// `out[i, :] = x[rows[i], :]` for the first `count` of `rows`; nothing where that is [`NONE`].
///
/// # Errors
/// The device has failed.
pub fn select_rows<T: Float>(
    device: &Device,
    count: usize,
    rows: &Buffer<u32>,
    x: &Activations<T>,
    out: &mut Activations<T>,
) -> Result<()> {
    assert!(out.rows() >= count && rows.len() >= count && out.dim() == x.dim(), "out");
    match device {
        Device::Cpu(cpu) => {
            let dim = x.dim();
            let out = Shared::new(out.host_mut());
            cpu.parallel(count, |to| {
                let from = rows.host()[to];
                if from != NONE {
                    // SAFETY: each task has its own row.
                    let out = unsafe { out.range(to * dim, dim) };
                    out.copy_from_slice(&x.host()[from as usize * dim..][..dim]);
                }
            });
            Ok(())
        }
        Device::Cuda(cuda) => launch(cuda, count, rows, x, out),
    }
}

/// Mirror of `SelectRowsParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SelectRowsParams {
    x: u64,
    out: u64,
    rows: u64,
    count: i32,
    chunks: i32,
    x_row_groups: i32,
    out_row_groups: i32,
}
const _: () = assert!(size_of::<SelectRowsParams>() == 40, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/select_rows.cu.
unsafe impl Params for SelectRowsParams {}

fn launch<T: Float>(
    cuda: &Cuda,
    count: usize,
    rows: &Buffer<u32>,
    x: &Activations<T>,
    out: &mut Activations<T>,
) -> Result<()> {
    let params = SelectRowsParams {
        x: x.address(),
        out: out.address_mut(),
        rows: rows.address(),
        count: count as i32,
        chunks: (x.atoms() * (ATOM / CHUNK)) as i32,
        x_row_groups: x.row_groups() as i32,
        out_row_groups: out.row_groups() as i32,
    };
    // SAFETY: the rows of `out` were checked; who fills `rows`, the planner or another
    // kernel, chooses rows of x.
    unsafe { cuda.launch("select_rows", Launch::new(count, 128), &params) }
}
