//! Protocols, trials, concept vectors, grading, statistics and the run folder.

pub mod grading;
pub mod results;
pub mod stats;
