//! The step loop behind a `Send` handle: jobs in, events out. Nothing here knows what a trial is.

mod types;

pub use types::*;
