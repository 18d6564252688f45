//! What every target holds its reader to.

use std::{panic, path::Path, sync::Once};

use inkling::fuzzing::{Reader, most_bytes};

/// The fuzzer ends at every panic, even at those of libraries that inkling turns into errors: only
/// our own code's shall do so. What nobody catches ends it still.
fn let_caught_panics_pass() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let fuzzer = panic::take_hook();
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("fuzz lies in a folder");
        panic::set_hook(Box::new(move |info| {
            if info.location().is_some_and(|at| Path::new(at.file()).starts_with(root)) {
                fuzzer(info);
            }
        }));
    });
}

/// Reads bytes, which must end in `Ok` or an error, with memory as it befits them.
///
/// # Panics
///
/// More memory was taken at a time.
pub fn bounded(reader: Reader, bytes: &[u8]) {
    let_caught_panics_pass();
    let taken = allocation_counter::measure(|| drop(reader(bytes)));
    let most = most_bytes(bytes.len());
    assert!(
        taken.bytes_max <= most,
        "{} bytes of memory for {} of input",
        taken.bytes_max,
        bytes.len()
    );
}
