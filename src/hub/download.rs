//! A blob: fetched on from where it ended, checked, and then given its name.

use std::{
    io::{self, Read, Write},
    path::Path,
};

use fs_err as fs;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::{
    Body,
    http::{Response, header},
};

use super::{
    Watch,
    cache::Folder,
    client::{Client, Failure, Remote, TRIES, pause},
    name::Name,
};
use crate::{
    error::{Context, Error, Result},
    files::hex,
};

const CHUNK: usize = 1 << 18;

/// Fetches files of one commit.
pub(super) struct Download<'a> {
    pub client: &'a Client,
    pub folder: &'a Folder,
    pub name: &'a Name,
    pub commit: &'a str,
    pub watch: &'a mut dyn Watch,
}

impl Download<'_> {
    /// Puts files into the snapshot.
    ///
    /// # Errors
    ///
    /// The hub does not send it whole, or it can't be stored. What was stored is kept for the next
    /// time, unless it is wrong.
    pub fn all(&mut self, files: &[Remote]) -> Result<()> {
        files.iter().try_for_each(|remote| self.file(remote).at(|| remote.name.clone()))
    }

    fn file(&mut self, remote: &Remote) -> Result<()> {
        let waits = || self.watch.note(&format!("another process fetches {}", remote.name));
        let lock = self.folder.lock(&remote.etag, waits)?;
        if !self.folder.blob(&remote.etag).is_file() {
            let path = self.folder.incomplete(&remote.etag);
            self.fill(remote, &path)?;
            self.check(remote, &path)?;
            fs::rename(&path, self.folder.blob(&remote.etag))?;
        }
        drop(lock);
        self.folder.link(self.commit, &remote.name, &remote.etag)
    }

    /// Fetches what the file lacks.
    fn fill(&mut self, remote: &Remote, path: &Path) -> Result<()> {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        let mut tried = 0;
        loop {
            let before = file.metadata()?.len();
            if before == remote.size {
                return Ok(file.sync_all()?);
            }
            if before > remote.size {
                file.set_len(0)?;
                continue;
            }
            let outcome = self.fetch(remote, before, &mut file);
            let here = file.metadata()?.len();
            let failure = match outcome {
                Ok(()) if here == remote.size => continue,
                Ok(()) => Failure::passing("the connection ended early"),
                Err(failure) => failure,
            };
            let Failure::Passing { wait, .. } = &failure else { return Err(failure.into_error()) };
            tried = if here > before { 1 } else { tried + 1 };
            if tried == TRIES {
                return Err(failure.into_error());
            }
            pause(tried, *wait);
        }
    }

    /// One request's bytes, to the end of the file.
    fn fetch(
        &mut self,
        remote: &Remote,
        from: u64,
        file: &mut fs::File,
    ) -> std::result::Result<(), Failure> {
        self.watch.bytes(&remote.name, from, remote.size);
        let mut response = self.client.open(self.name, self.commit, &remote.name, from)?;
        let mut here = from;
        if from > 0 && !goes_on(&response, from) {
            // Sent from its beginning, or what is here does not fit to what is there.
            file.set_len(0).map_err(|error| full(error, remote))?;
            here = 0;
        }
        if response.status() == 416 {
            return Err(Failure::passing("the file can't be fetched from where it ended"));
        }
        let mut body = response.body_mut().as_reader().take(remote.size - here);
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = match body.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Failure::passing(error)),
            };
            file.write_all(&chunk[..n]).map_err(|error| full(error, remote))?;
            here += n as u64;
            self.watch.bytes(&remote.name, here, remote.size);
        }
    }

    /// Whether the file is what the hub's name for it says; a wrong one is removed.
    fn check(&mut self, remote: &Remote, path: &Path) -> Result<()> {
        let got = if remote.etag.len() == 64 {
            self.digest(Sha256::new(), remote, path)?
        } else {
            // As git names a blob.
            let head = format!("blob {}\0", remote.size);
            self.digest(Sha1::new_with_prefix(head), remote, path)?
        };
        if got == remote.etag {
            return Ok(());
        }
        fs::remove_file(path)?;
        let sum = if remote.etag.len() == 64 { "SHA-256" } else { "git SHA-1" };
        Err(Error::new(format!("the downloaded file has the wrong {sum}"))
            .expected(&remote.etag)
            .got(got)
            .hint("it was removed: try again"))
    }

    fn digest(&mut self, mut hash: impl Digest, remote: &Remote, path: &Path) -> Result<String> {
        let mut file = fs::File::open(path)?;
        let mut done = 0;
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = file.read(&mut chunk)?;
            if n == 0 {
                return Ok(hex(&hash.finalize()));
            }
            hash.update(&chunk[..n]);
            done += n as u64;
            self.watch.checked(&remote.name, done, remote.size);
        }
    }
}

/// Whether the response's first byte is the file's byte `from`.
fn goes_on(response: &Response<Body>, from: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE);
    let range = range.and_then(|range| range.to_str().ok()).unwrap_or_default();
    response.status() == 206 && range.starts_with(&format!("bytes {from}-"))
}

fn full(error: io::Error, remote: &Remote) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::new("the disk is full")
            .expected(format!("room for {} bytes", remote.size))
            .got(error)
            .hint("make room, or set HF_HUB_CACHE; what has been fetched is kept"),
        _ => error.into(),
    }
}
