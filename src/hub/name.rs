//! What a model of the hub is called: `ORG/NAME[@REVISION][:FILE.gguf]`.

use std::{
    fmt,
    path::{Component, Path},
};

use crate::error::{Error, Result};

/// The revision that is meant where none is named.
const MAIN: &str = "main";
/// Characters of a repository's name at most.
const LONGEST: usize = 96;
const SYNTAX: &str =
    "ORG/NAME, ORG/NAME@REVISION, ORG/NAME:FILE.gguf or ORG/NAME@REVISION:FILE.gguf";

/// A repository of the hub, a revision of it and, where it holds several, one GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `ORG/NAME`.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// Its path in the repository.
    pub file: Option<String>,
}

impl Name {
    /// Reads a name; none where the text is not of a name's form and so must be a path. A first
    /// part that ends in `.gguf` is a path too.
    ///
    /// # Errors
    ///
    /// It begins as a name and goes on as no revision or file does.
    pub fn parse(text: &str) -> Option<Result<Self>> {
        let (repository, rest) = text.split_at(text.find(['@', ':']).unwrap_or(text.len()));
        if !is_repository(repository) {
            return None;
        }
        let (revision, file) = match rest.split_once(':') {
            Some((revision, file)) => (revision, Some(file)),
            None => (rest, None),
        };
        let revision = revision.strip_prefix('@').unwrap_or(MAIN);
        let wrong = |part: &str| Error::new(format!("not a {part}")).at(text).expected(SYNTAX);
        Some(if !is_revision(revision) {
            Err(wrong("revision").got(revision))
        } else if let Some(file) = file.filter(|file| !is_gguf(file) || !is_inside(file)) {
            Err(wrong("GGUF file of a repository").got(file))
        } else {
            let file = file.map(str::to_owned);
            Ok(Self { repository: repository.to_owned(), revision: revision.to_owned(), file })
        })
    }

    /// The revision as it stands in an address.
    pub(super) fn escaped_revision(&self) -> String {
        self.revision.replace('/', "%2F")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

/// Whether these are all 40 digits of a commit.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && is_hex(revision)
}

pub(super) fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

pub(super) fn is_gguf(file: &str) -> bool {
    Path::new(file).extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"))
}

/// Whether a path stays below the folder that it is joined to.
pub(super) fn is_inside(file: &str) -> bool {
    let normal = |part: Component| matches!(part, Component::Normal(_));
    let parts: Vec<Component> = Path::new(file).components().collect();
    // Written as it is read: neither `a//b` nor `a/./b`, whose links would be one folder off.
    let written = parts.len() == file.split('/').count();
    !file.is_empty() && !file.contains('\\') && written && parts.into_iter().all(normal)
}

fn is_repository(text: &str) -> bool {
    let word = |word: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        !word.is_empty() && !word.starts_with(['.', '-']) && word.bytes().all(plain)
    };
    // `--` stands for the slash in the cache's folder names.
    let once = |text: &str| !text.contains("--") && !text.contains("..");
    let two = text.split_once('/').is_some_and(|(org, name)| word(org) && word(name));
    two && once(text) && text.len() <= LONGEST && !is_gguf(text)
}

fn is_revision(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+/".contains(&byte);
    let whole = |part: &str| !part.is_empty() && !part.starts_with('.');
    text.bytes().all(plain) && text.split('/').all(whole) && !is_gguf(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (String, String, Option<String>) {
        let name = Name::parse(text).unwrap().unwrap();
        (name.repository, name.revision, name.file)
    }

    #[test]
    fn names_have_three_parts() {
        let want = |repository: &str, revision: &str, file: Option<&str>| {
            (repository.to_owned(), revision.to_owned(), file.map(str::to_owned))
        };
        assert_eq!(parse("org/name"), want("org/name", "main", None));
        assert_eq!(parse("a-b/C.1_x@v1.0"), want("a-b/C.1_x", "v1.0", None));
        assert_eq!(parse("o/n@refs/pr/1"), want("o/n", "refs/pr/1", None));
        assert_eq!(parse("o/n:q8.gguf"), want("o/n", "main", Some("q8.gguf")));
        assert_eq!(parse("o/n@v1:sub/q8.gguf"), want("o/n", "v1", Some("sub/q8.gguf")));
        for text in ["org/name", "o/n@v1", "o/n:q8.gguf", "o/n@v1:sub/q8.gguf"] {
            assert_eq!(Name::parse(text).unwrap().unwrap().to_string(), text);
        }
    }

    #[test]
    fn paths_are_no_names() {
        for text in [
            "",
            "name",
            "./a/b",
            "/a/b",
            "../a",
            "./b",
            "a/b/c",
            "a/",
            "/a",
            "~/a",
            "a/..",
            "-a/b",
            "a/b--c",
            "a b/c",
            "models/tiny.gguf",
            "C:/a/b",
            "a\\b",
            "a/é",
            "@a/b",
        ] {
            assert!(Name::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn wrong_revisions_and_files_are_refused() {
        for text in [
            "o/n@",
            "o/n@..",
            "o/n@a//b",
            "o/n@a/../b",
            "o/n@a b",
            "o/n:",
            "o/n:model.bin",
            "o/n:../x.gguf",
            "o/n:/x.gguf",
            "o/n@v1:",
            "o/n@v1/x.gguf",
            "o/n@a?b",
        ] {
            let error = Name::parse(text).unwrap().unwrap_err().to_string();
            assert!(error.contains("ORG/NAME@REVISION"), "{error}");
        }
    }
}
