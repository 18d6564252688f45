//! The cache that Hugging Face's programs share: of each repository `blobs`, named by their content,
//! `snapshots/COMMIT` with links to them, and `refs` that say which commit a branch or tag is.

use std::{
    fs::TryLockError,
    io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use fs_err as fs;

use super::name::is_commit;
use crate::error::Result;

/// Temporary files that this process has made.
static MADE: AtomicU64 = AtomicU64::new(0);

/// A repository's folder.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    locks: PathBuf,
}

/// Held by whoever writes a blob; other processes wait for it.
pub(super) struct Lock(#[expect(dead_code, reason = "closed by its drop")] fs::File);

impl Folder {
    pub fn new(cache: &Path, repository: &str) -> Self {
        let name = format!("models--{}", repository.replace('/', "--"));
        Self { root: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// Of the files of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Where a blob grows.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that a revision was when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes which commit a revision is now.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        appear(&self.root.join("refs").join(revision), |path| fs::write(path, commit))
    }

    /// The files of a commit that are here, as paths in the repository.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let mut files = Vec::new();
        walk(&self.snapshot(commit), "", &mut files);
        files.sort();
        files
    }

    /// Gives a blob its name in a snapshot.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let up = "../".repeat(2 + file.matches('/').count());
        let to = PathBuf::from(format!("{up}blobs/{etag}"));
        appear(&self.snapshot(commit).join(file), |path| link(&to, path))
    }

    /// Waits until no other process writes the blob; `waits` is called first if one does.
    pub fn lock(&self, etag: &str, waits: impl FnOnce()) -> Result<Lock> {
        fs::create_dir_all(&self.locks)?;
        fs::create_dir_all(self.root.join("blobs"))?;
        let path = self.locks.join(format!("{etag}.lock"));
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match file.file().try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waits();
                file.file().lock()?;
            }
            // A file system without locks, as clusters have: the check of the content remains.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        Ok(Lock(file))
    }
}

/// Makes a file under another name, and renames it: it appears at once, whoever else does the same.
fn appear(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let (own, made) = (process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{own}.{made}"));
    // Of a killed process that had this one's number.
    let _ = fs::remove_file(&temporary);
    make(&temporary)?;
    Ok(fs::rename(&temporary, path)?)
}

#[cfg(unix)]
fn link(to: &Path, path: &Path) -> io::Result<()> {
    fs_err::os::unix::fs::symlink(to, path)
}

/// Links need rights there that not everybody has.
#[cfg(not(unix))]
fn link(to: &Path, path: &Path) -> io::Result<()> {
    let from = path.parent().unwrap_or(Path::new("")).join(to);
    fs::hard_link(from, path)
}

/// A folder's files and those of its folders; a link to nothing is no file.
fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        // Not through a link, which could lead in a circle.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, &format!("{name}/"), files);
        } else if path.is_file() {
            files.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_link_to_blobs() {
        let cache = tempfile::tempdir().unwrap();
        let folder = Folder::new(cache.path(), "org/name");
        let (commit, etag) = ("c".repeat(40), "e".repeat(40));
        let waits = || panic!("nobody else holds it");
        drop(folder.lock(&etag, waits).unwrap());
        fs::write(folder.blob(&etag), "content").unwrap();
        folder.link(&commit, "a.json", &etag).unwrap();
        folder.link(&commit, "q/b.gguf", &etag).unwrap();
        folder.link(&commit, "q/b.gguf", &etag).unwrap();
        folder.link(&commit, "gone", &"0".repeat(40)).unwrap();
        assert_eq!(folder.files(&commit), ["a.json", "q/b.gguf"]);
        let root = cache.path().join("models--org--name");
        let path = root.join("snapshots").join(&commit).join("q/b.gguf");
        assert_eq!(fs::read_to_string(path).unwrap(), "content");
        assert_eq!(folder.commit("refs/pr/1"), None);
        folder.set_commit("refs/pr/1", &commit).unwrap();
        assert_eq!(folder.commit("refs/pr/1"), Some(commit.clone()));
        assert_eq!(fs::read_to_string(root.join("refs/refs/pr/1")).unwrap(), commit);
        assert!(folder.files(&"d".repeat(40)).is_empty());
    }
}
