//! What every target holds its reader to.

use inkling::fuzzing::{Reader, most_bytes};

/// Reads bytes, which must end in `Ok` or an error, with memory as it befits them.
///
/// # Panics
///
/// More memory was taken at a time.
pub fn bounded(reader: Reader, bytes: &[u8]) {
    let taken = allocation_counter::measure(|| drop(reader(bytes)));
    let most = most_bytes(bytes.len());
    assert!(
        taken.bytes_max <= most,
        "{} bytes of memory for {} of input",
        taken.bytes_max,
        bytes.len()
    );
}
