//! Copies pages of the KV cache, when a sequence is forked inside a page.

use super::{Float, attention::Cache};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Copies page `from` to page `to`, for each pair. No page is both, and none is written twice.
///
/// # Errors
/// The device has failed.
pub fn copy_pages<T: Float>(
    device: &Device,
    pairs: &[[u32; 2]],
    cache: &mut Cache<T>,
) -> Result<()> {
    let pages = cache.shape.pages as u32;
    assert!(pairs.iter().flatten().all(|&page| page < pages), "a page beyond the cache");
    match device {
        Device::Cpu(_) => {
            let len = cache.page.elements();
            let (_, pages) = cache.split_mut();
            for &[from, to] in pairs {
                let from = from as usize * len;
                pages.copy_within(from..from + len, to as usize * len);
            }
        }
        Device::Cuda(cuda) => {
            for some in pairs.chunks(cache.copies.len()) {
                cache.copies.write(0, some)?;
                launch(cuda, some.len(), cache)?;
            }
        }
    }
    Ok(())
}

/// Mirror of `CopyPagesParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct CopyPagesParams {
    pages: u64,
    pairs: u64,
    count: i32,
    page_len: i32,
}
const _: () = assert!(size_of::<CopyPagesParams>() == 24, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/copy_pages.cu.
unsafe impl Params for CopyPagesParams {}

fn launch<T: Float>(cuda: &Cuda, count: usize, cache: &mut Cache<T>) -> Result<()> {
    let params = CopyPagesParams {
        pages: cache.address_mut(),
        pairs: Buffer::address(&cache.copies),
        count: count as i32,
        page_len: cache.page.elements() as i32,
    };
    let grid = [count as u32, cache.page.elements().div_ceil(8192) as u32, 1];
    let launch = Launch { grid, block: 256, shared: 0 };
    // SAFETY: every page was checked, and `count` pairs were written.
    unsafe { cuda.launch("copy_pages", launch, &params) }
}
