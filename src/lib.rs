//! inkling plants thoughts in language models and measures whether they notice.
//!
//! The crate in layers, each of which may name only those below it:
//! `cli -> report, experiment -> engine -> model -> ops -> device`, with [`bench`], [`captures`] and [`check`] beside
//! `experiment`, [`hub`] beside `engine`, and [`error`], [`files`] and [`request`] as leaves that every
//! layer may name.
pub mod bench;
pub mod captures;
pub mod check;
pub mod cli;
pub mod device;
pub mod engine;
pub mod error;
pub mod experiment;
pub mod files;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod hub;
pub mod model;
pub mod ops;
pub mod report;
pub mod request;
