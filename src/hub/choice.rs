//! Which files of a repository a model needs.

use std::path::Path;

use super::name::{Name, is_gguf};
use crate::{
    error::{Error, Result},
    model::{files, gguf::parts::PartName},
};

/// Files that an error lists at most.
const LISTED: usize = 20;

/// What is fetched of a repository; paths in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A folder with configuration, tokenizer and weights.
    Folder {
        /// All but the weights.
        side: Vec<String>,
        /// None: the index, which is among the others, names them.
        weights: Option<String>,
    },
    /// A GGUF file, in all its parts.
    Gguf(Vec<String>),
}

impl Choice {
    /// Of the repository's files.
    ///
    /// # Errors
    ///
    /// None is a model, or several GGUF files are and the name says not which.
    pub fn new(listed: &[String], name: &Name) -> Result<Self> {
        let has = |file: &str| listed.iter().any(|listed| listed == file);
        if let Some(file) = &name.file {
            return gguf(listed, file);
        }
        let (single, index) = (has(files::SINGLE), has(files::INDEX));
        if single || index {
            if !has(files::CONFIG) {
                return Err(Error::new("safetensors weights without a configuration")
                    .expected(files::CONFIG));
            }
            let mut side: Vec<String> =
                files::side().filter(|file| has(file)).map(str::to_owned).collect();
            if !single {
                side.push(files::INDEX.to_owned());
            }
            let weights = single.then(|| files::SINGLE.to_owned());
            return Ok(Self::Folder { side, weights });
        }
        let first = |file: &&String| is_gguf(file) && part(file).is_none_or(|it| it.number == 1);
        let ggufs: Vec<&String> = listed.iter().filter(first).collect();
        match ggufs[..] {
            [file] => gguf(listed, file),
            [] => Err(Error::new("no weights that can be read")
                .expected(format!("{}, {} or a .gguf file", files::SINGLE, files::INDEX))
                .got(some_of(listed.iter()))),
            _ => Err(Error::new("several GGUF files, and none named")
                .expected(format!("one of {}", some_of(ggufs.iter().copied())))
                .hint(format!("name it: {name}:{}", ggufs[0]))),
        }
    }
}

/// A GGUF file with all its parts.
fn gguf(listed: &[String], file: &str) -> Result<Choice> {
    let parts = match part(file) {
        None => vec![file.to_owned()],
        Some(name) => {
            (0..name.count).map(|index| name.path(index).to_string_lossy().into_owned()).collect()
        }
    };
    match parts.iter().find(|part| !listed.contains(part)) {
        None => Ok(Choice::Gguf(parts)),
        Some(missing) => Err(Error::new("no such file in the repository")
            .expected(format!("one of {}", some_of(listed.iter().filter(|file| is_gguf(file)))))
            .got(missing)),
    }
}

fn part(file: &str) -> Option<PartName> {
    PartName::of(Path::new(file))
}

fn some_of<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let mut names: Vec<&str> = names.map(String::as_str).collect();
    let more = names.len().saturating_sub(LISTED);
    names.truncate(LISTED);
    match (names.is_empty(), more) {
        (true, _) => "nothing".to_owned(),
        (_, 0) => names.join(", "),
        _ => format!("{} and {more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(listed: &[&str], name: &str) -> Result<Choice> {
        let listed: Vec<String> = listed.iter().map(|file| (*file).to_owned()).collect();
        Choice::new(&listed, &Name::parse(name).unwrap().unwrap())
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn only_what_is_read_is_chosen() {
        let listed = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "generation_config.json",
            "model.safetensors",
            "original/params.json",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer.model",
            "x.gguf",
        ];
        let side = owned(&["config.json", "generation_config.json", "tokenizer.json"]);
        let weights = Some("model.safetensors".to_owned());
        assert_eq!(choice(&listed, "o/n").unwrap(), Choice::Folder { side, weights });
        assert_eq!(choice(&listed, "o/n:x.gguf").unwrap(), Choice::Gguf(owned(&["x.gguf"])));
        let sharded = ["config.json", "a.safetensors", "model.safetensors.index.json"];
        let side = owned(&["config.json", "model.safetensors.index.json"]);
        assert_eq!(choice(&sharded, "o/n").unwrap(), Choice::Folder { side, weights: None });
    }

    #[test]
    fn gguf_files_are_chosen_by_name_and_in_all_parts() {
        let parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
        assert_eq!(choice(&parts, "o/n").unwrap(), Choice::Gguf(owned(&parts)));
        assert_eq!(
            choice(&parts, &format!("o/n:{}", parts[1])).unwrap(),
            Choice::Gguf(owned(&parts))
        );
        let error = choice(&parts[..1], "o/n").unwrap_err().to_string();
        assert!(error.contains("q/m-00002-of-00002.gguf"), "{error}");
        let error = choice(&["a.gguf", "b.gguf"], "o/n").unwrap_err().to_string();
        assert!(error.contains("a.gguf, b.gguf") && error.contains("o/n:a.gguf"), "{error}");
        let error = choice(&["a.gguf", "b.gguf"], "o/n:c.gguf").unwrap_err().to_string();
        assert!(error.contains("a.gguf, b.gguf") && error.contains("c.gguf"), "{error}");
    }

    #[test]
    fn repositories_without_a_model_are_refused() {
        let error = choice(&["config.json", "pytorch_model.bin"], "o/n").unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin"), "{error}");
        assert!(choice(&["model.safetensors"], "o/n").unwrap_err().to_string().contains("config"));
        assert!(choice(&[], "o/n").is_err());
    }
}
