//! inkling plants thoughts in language models and measures whether they notice.
//!
//! # As a library
//!
//! An [`Engine`] runs [`Job`](engine::Job)s: prompts with what is injected into them, what is captured, and how they
//! are continued. A job is made by hand, of numbers, or of a [`Request`] as files have them, by
//! [`resolve`](engine::resolve::resolve), which renders chats, finds windows, reads [`VectorSet`]s and checks
//! everything against the model.
//!
//! ```
//! use inkling::{Engine, engine::{Capture, Injection, Job, Options}, model::ModelConfig};
//! use inkling::request::{CaptureSite, Sampling};
//!
//! // A small model of random weights; `Engine::start` takes a `Model` that was opened.
//! let config = ModelConfig::of_shape("tiny", 64)?;
//! let engine = Engine::start_random(&config, &Options { max_batch: 4, ..Options::default() })?;
//! let thought = Injection {
//!     vector: vec![0.1; config.dim].into(),
//!     layer: 1,
//!     strength: 4.0,
//!     from: 2, // from the third token on, and through all that is generated
//!     ..Injection::default()
//! };
//! let job = Job {
//!     tokens: vec![1, 5, 9, 2],
//!     inject: vec![thought],
//!     capture: vec![Capture::rows(CaptureSite::ResidPost, Some(1), vec![1, 2, 3])],
//!     sampling: Sampling { seed: 7, max_tokens: 5, ignore_eos: true, ..Sampling::default() },
//!     n: 1,
//!     ..Job::default()
//! };
//! let finished = engine.run(job)?;
//! assert_eq!(finished.outcome.samples[0].tokens.len(), 5);
//! assert_eq!(finished.captures[0].len(), 3 * config.dim);
//! // Two rows of the prompt, four of the five drawn tokens: the last one is never fed back.
//! assert_eq!(finished.outcome.receipts[0].rows_touched, 6);
//! # Ok::<(), inkling::Error>(())
//! ```
//!
//! [`Engine::run_all`] streams many jobs through, [`Engine::submit`] gives tokens as they are drawn, and
//! [`Engine::cancel`] ends what nobody wants any more. [`captures`] writes what is captured to files. Every error is an
//! [`Error`]: what, where, expected, got, and a hint. `examples/` has three whole programs.
//!
//! What may be relied upon: this page's names, [`engine`], [`request`], [`captures`], [`model::Model`] and
//! [`model::ModelConfig`], [`error`]. Enums there may get more variants and structs more fields, which are filled by
//! `..Default::default()`. Everything below them (`ops`, `device`) and beside them (`cli`, `report`, `experiment`)
//! serves the program and changes as it does.
//!
//! # Inside
//!
//! The crate in layers, each of which may name only those below it:
//! `cli -> report, experiment -> engine -> model -> ops -> device`, with [`mod@bench`], [`captures`] and [`check`] beside
//! `experiment`, [`hub`] beside `engine`, and [`error`], [`files`] and [`request`] as leaves that every
//! layer may name.
#![deny(missing_docs)]

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

pub use crate::{
    engine::{Engine, vectors::VectorSet},
    error::{Error, Result},
    model::Model,
    request::{Capture, Injection, Request},
};
