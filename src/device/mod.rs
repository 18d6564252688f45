//! What the machine offers: memory-mapped files.

mod file;

pub use file::MappedFile;
