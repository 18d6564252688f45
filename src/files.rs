//! Files that appear whole or not at all, or grow by whole lines.

mod lines;

use std::{
    fmt::Write as _,
    fs::TryLockError,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use fs_err as fs;

use crate::error::{Error, Result};
pub use lines::Lines;
pub(crate) use lines::for_each_line;

const LOCK: &str = ".lock";

/// A file written beside its destination (as `NAME.tmp`) and renamed onto it by
/// [`AtomicFile::commit`]; dropped before that, it leaves nothing behind.
pub struct AtomicFile {
    file: fs::File,
    temporary: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl AtomicFile {
    /// Opens the temporary file. An error when the folder is missing or can't be written to, or
    /// another process is writing the same file.
    pub fn create(path: &Path) -> Result<Self> {
        let name = path.file_name().ok_or_else(|| {
            Error::new("not a file name").at(path.display().to_string()).expected("FOLDER/FILE")
        })?;
        if path.is_dir() {
            return Err(Error::new("a folder is in the way").at(path.display().to_string()));
        }
        let mut temporary_name = name.to_os_string();
        temporary_name.push(".tmp");
        let temporary = path.with_file_name(temporary_name);
        let file =
            fs::OpenOptions::new().create(true).truncate(false).write(true).open(&temporary)?;
        if file.file().try_lock().is_err() {
            return Err(Error::new("another process is writing this file")
                .at(path.display().to_string())
                .hint("wait for it, or choose another name"));
        }
        file.set_len(0)?;
        Ok(Self { file, temporary, path: path.to_owned(), committed: false })
    }

    /// Flushes to disk and renames onto the destination, replacing what was there.
    pub fn commit(mut self) -> Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        self.committed = true;
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // The error that got us here is the one worth reporting.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole file that appears at once.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// Fails now if the file could not be written later: to be asked before long work.
pub fn check_writable(path: &Path) -> Result<()> {
    AtomicFile::create(path).map(drop)
}

/// Keeps other processes from writing a folder, until the file is closed, however the process ends.
///
/// # Errors
/// Another one writes it, or it cannot be locked.
pub fn lock(dir: &Path) -> Result<fs::File> {
    let path = dir.join(LOCK);
    let mut file =
        fs::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
    match file.file().try_lock() {
        Ok(()) => {
            file.set_len(0)?;
            writeln!(file, "{}", std::process::id())?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.read_to_string(&mut holder);
            Err(Error::new("another process is writing this folder")
                .at(dir.display().to_string())
                .got(format!("process {}", holder.trim()))
                .hint("wait for it to end, or choose another folder"))
        }
        Err(TryLockError::Error(error)) => {
            Err(Error::new("the folder can't be locked against a second writer")
                .at(dir.display().to_string())
                .got(error)
                .hint("choose a folder on a local disk"))
        }
    }
}

/// Bytes that are free where a folder is; `None` where that cannot be told.
#[cfg(unix)]
pub fn free_bytes(dir: &Path) -> Option<u64> {
    let of = rustix::fs::statvfs(dir).ok()?;
    of.f_bavail.checked_mul(of.f_frsize)
}

/// Likewise.
#[cfg(not(unix))]
pub fn free_bytes(_: &Path) -> Option<u64> {
    None
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes everything
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.json");
        {
            let mut file = AtomicFile::create(&path).unwrap();
            file.write_all(b"half").unwrap();
            assert!(!path.exists());
            assert!(AtomicFile::create(&path).is_err(), "two writers of one file");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "leftovers");
        write_atomically(&path, b"whole").unwrap();
        write_atomically(&path, b"again").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"again");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "leftovers");
        check_writable(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"again");
    }

    #[test]
    fn says_what_is_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_writable(folder.path()).unwrap_err().to_string().contains("folder"));
        let error = check_writable(&folder.path().join("none/out.json")).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }
}
