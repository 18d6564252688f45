//! The step loop behind a `Send` handle: jobs in, events out. Nothing here knows what a trial is.

mod admission;
mod bank;
mod batch;
mod captures;
mod checks;
mod core;
mod handle;
mod hooks;
mod kv;
mod logits;
mod memory;
mod outputs;
pub mod patching;
mod points;
mod prompts;
pub mod resolve;
mod sequence;
mod setup;
mod sites;
mod step;
mod types;
pub mod vectors;

pub use handle::{Engine, Fingerprint, Finished, Stats, capture_bytes};
pub use hooks::norm;
pub use memory::Need;
pub use points::{Point, point};
pub use setup::{Limits, Options};
pub use sites::row_shape;
pub use types::*;

pub use crate::{device::DeviceKind, ops::matmul::Dtype};
