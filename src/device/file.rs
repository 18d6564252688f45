//! Memory-mapped files.

use std::path::{Path, PathBuf};

use fs_err as fs;
use memmap2::Mmap;

use crate::error::{Context, Result};

/// A whole file, mapped read-only: pages are read when they are first touched, and shared with
/// every other process that maps the same file.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps a file. Errors name its path.
    pub fn open(path: &Path) -> Result<Self> {
        let file = fs::File::open(path)?;
        // SAFETY: the map is read-only and every read of it is of plain bytes. Whoever truncates
        // the file meanwhile ends this process (SIGBUS); whoever writes to it changes weights:
        // model files are not written to while they are in use.
        let map = unsafe { Mmap::map(file.file()) }.at(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// Bytes in place of a file's.
    #[cfg(any(test, fuzzing))]
    pub fn of_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut map = memmap2::MmapMut::map_anon(bytes.len())?;
        map.copy_from_slice(bytes);
        Ok(Self { path: path.to_owned(), map: map.make_read_only()? })
    }

    /// The file's content.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
