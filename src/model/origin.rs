//! Where a model comes from, as far as its path tells.

use std::path::{Path, PathBuf};

/// Digits of a commit in a model's name.
const SHORT: usize = 8;

/// A model's name and, if it lies in the hub's cache (`models--ORG--NAME/snapshots/COMMIT/..`), the
/// commit of its repository.
#[derive(Debug)]
pub(super) struct Origin {
    /// `ORG/NAME@COMMIT[:FILE]`, shortened, or the name of its file or folder.
    pub name: String,
    /// All 40 digits.
    pub commit: Option<String>,
}

impl Origin {
    pub fn of(path: &Path) -> Self {
        in_cache(path).unwrap_or_else(|| Self { name: plain(path), commit: None })
    }
}

fn in_cache(path: &Path) -> Option<Origin> {
    let path = resolved(path);
    let mut parts = path.iter().map(|part| part.to_str());
    let repository = parts.find_map(|part| part?.strip_prefix("models--"))?.replacen("--", "/", 1);
    parts.next().flatten().filter(|part| *part == "snapshots")?;
    let hex = |commit: &&str| commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit());
    let commit = parts.next().flatten().filter(hex)?;
    let file = parts.collect::<Option<Vec<_>>>()?.join("/");
    let file = if file.is_empty() { file } else { format!(":{file}") };
    let name = format!("{repository}@{}{file}", &commit[..SHORT]);
    Some(Origin { name, commit: Some(commit.to_owned()) })
}

/// Without `.` and links, but for the last part: in the cache every file is a link.
fn resolved(path: &Path) -> PathBuf {
    let whole = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    match (path.is_dir(), path.parent(), path.file_name()) {
        (false, Some(folder), Some(name)) if folder != Path::new("") => whole(folder).join(name),
        (false, Some(_), Some(name)) => whole(Path::new(".")).join(name),
        _ => whole(path),
    }
}

fn plain(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_tells_repository_and_commit() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let below = |rest: &str| {
            let path = format!("/none/models--org--a-b/snapshots/{commit}{rest}");
            let origin = Origin::of(Path::new(&path));
            assert_eq!(origin.commit.as_deref(), Some(commit));
            origin.name
        };
        assert_eq!(below(""), "org/a-b@01234567");
        assert_eq!(below("/"), "org/a-b@01234567");
        assert_eq!(below("/q/m.gguf"), "org/a-b@01234567:q/m.gguf");
        for path in ["/none/models--org--a", "/none/x/m.gguf", "/none/models--o--n/snapshots/main"]
        {
            let origin = Origin::of(Path::new(path));
            assert!(origin.commit.is_none() && path.ends_with(&format!("/{}", origin.name)));
        }
    }
}
