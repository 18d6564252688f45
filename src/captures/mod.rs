//! What requests capture, from the engine into files: which tensors a request gives, in which files they
//! stand, and a store that can be stopped at any moment and gone on with.

pub mod collect;
pub mod layout;
pub mod store;
mod tensors;

pub use tensors::{Item, Kind, Precision, Spec, Values};
