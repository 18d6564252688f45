//! Copies pages of the KV cache, when a sequence is forked inside a page.

use super::{Float, attention::Cache};
use crate::device::Device;

/// Copies page `from` to page `to`, for each pair.
pub fn copy_pages<T: Float>(device: &Device, pairs: &[(u32, u32)], cache: &mut Cache<T>) {
    let Device::Cpu(_) = device;
    let len = cache.shape.page_len();
    let (_, pages) = cache.split_mut();
    for &(from, to) in pairs {
        let from = from as usize * len;
        pages.copy_within(from..from + len, to as usize * len);
    }
}
