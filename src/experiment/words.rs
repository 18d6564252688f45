//! Word lists: one word a line, `#` starts a comment.

use std::path::Path;

use fs_err as fs;

use crate::error::{Context, Error, Result};

/// The lists that come with the program: name after `builtin:`, text.
const BUILTIN: [(&str, &str); 4] = [
    ("concepts", include_str!("../../experiments/words/concepts.txt")),
    ("baseline", include_str!("../../experiments/words/baseline.txt")),
    ("controls", include_str!("../../experiments/words/controls.txt")),
    ("sentences", include_str!("../../experiments/words/sentences.txt")),
];

/// The words of `builtin:NAME` or of a file, in order. A relative file is taken from `base`. A word
/// that stands twice is kept twice. An error for an unknown list and for one without words.
pub fn load(list: &str, base: &Path) -> Result<Vec<String>> {
    let words = if let Some(name) = list.strip_prefix("builtin:") {
        let found = BUILTIN.iter().find(|(known, _)| *known == name);
        let (_, text) = found.ok_or_else(|| {
            let known = BUILTIN.map(|(known, _)| format!("builtin:{known}"));
            Error::new("no such word list").expected(known.join(", ")).got(list)
        })?;
        parse(text)
    } else {
        parse(&fs::read_to_string(base.join(list)).at(|| format!("word list {list:?}"))?)
    };
    if words.is_empty() {
        return Err(Error::new("the word list has no words").at(list));
    }
    Ok(words)
}

/// The words of a list's text.
pub fn parse(text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or("").trim());
    lines.filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builtin_lists_have_their_sizes() {
        let size = |list| load(list, Path::new("")).unwrap().len();
        assert_eq!(size("builtin:concepts"), 50);
        assert_eq!(size("builtin:baseline"), 100);
        assert_eq!(size("builtin:controls"), 100);
        assert_eq!(size("builtin:sentences"), 50);
        let error = load("builtin:colours", Path::new("")).unwrap_err().to_string();
        assert!(error.contains("builtin:concepts") && error.contains("colours"), "{error}");
    }

    #[test]
    fn files_are_found_beside_the_protocol() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("mine.txt"), "# mine\n\n sea \nair # and more\n")
            .unwrap();
        assert_eq!(load("mine.txt", folder.path()).unwrap(), ["sea", "air"]);
        std::fs::write(folder.path().join("none.txt"), "# nothing\n").unwrap();
        assert!(load("none.txt", folder.path()).unwrap_err().to_string().contains("no words"));
        assert!(load("gone.txt", folder.path()).unwrap_err().to_string().contains("gone.txt"));
    }
}
