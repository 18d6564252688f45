//! A GGUF model in one file, or in several: `name-00001-of-00003.gguf` and so on.
//!
//! Each part is a GGUF file whose metadata says which it is (`split.no`, from 0), of how many
//! (`split.count`), and how many tensors all have (`split.tensors.count`). The first has the model's
//! own metadata.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::Gguf;
use crate::{
    device::MappedFile,
    error::{Context, Error, Result},
};

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";
/// What parts that name them have in common.
const SHARED: [&str; 2] = ["general.architecture", "general.name"];

/// The files of a model in order, at least one.
pub struct Parts(pub Vec<(MappedFile, Gguf)>);

impl Parts {
    /// Opens a model by any of its files.
    ///
    /// # Errors
    ///
    /// A file is missing or damaged, or the files are not the parts of one model.
    pub fn open(path: &Path) -> Result<Self> {
        open(path).map(Self)
    }

    /// The one that has the model's metadata.
    pub fn first(&self) -> &(MappedFile, Gguf) {
        &self.0[0]
    }

    /// Whether a part has this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.0.iter().any(|(_, gguf)| gguf.tensors.contains_key(tensor))
    }

    /// The numbers of a tensor of this length; `None` where there is none.
    ///
    /// # Errors
    ///
    /// It has another shape.
    pub fn numbers(&self, tensor: &str, count: usize) -> Result<Option<Vec<f32>>> {
        let found = self.0.iter().find(|(_, gguf)| gguf.tensors.contains_key(tensor));
        let numbers = found.map(|(file, gguf)| gguf.numbers(file.bytes(), tensor, count));
        Ok(numbers.transpose()?.flatten())
    }
}

fn open(path: &Path) -> Result<Vec<(MappedFile, Gguf)>> {
    let place = || path.display().to_string();
    let opened = open_file(path)?;
    let count = opened.1.unsigned(COUNT).at(place)?.unwrap_or(1);
    let number = opened.1.unsigned(NUMBER).at(place)?.unwrap_or(0);
    if number >= count.max(1) {
        return Err(Error::new("a part's number is not one of the model's parts")
            .at(NUMBER)
            .at(place())
            .expected(format!("below {COUNT}, {count}"))
            .got(number));
    }
    if count <= 1 {
        return Ok(vec![opened]);
    }
    let name = PartName::of(path)
        .filter(|name| (name.number, name.count) == (number + 1, count))
        .ok_or_else(|| {
        Error::new("a part's name does not fit its metadata")
            .at(place())
            .expected(format!("a name that ends in -{:05}-of-{count:05}.gguf", number + 1))
            .hint("the parts of a model must keep the names that they were made with")
    })?;
    let mut opened = Some(opened);
    let mut parts = Vec::new();
    for index in 0..count {
        let own = opened.take_if(|_| index == number);
        parts.push(own.map_or_else(|| open_sibling(path, &name, index), Ok)?);
    }
    check_parts(&parts)?;
    Ok(parts)
}

/// Whether all files are named as parts of one model.
pub fn are_of_one_model(files: &[PathBuf]) -> bool {
    let mut names = files.iter().map(|path| PartName::of(path));
    let Some(Some(first)) = names.next() else { return false };
    names.all(|name| name.is_some_and(|name| name.same_model(&first)))
}

/// `folder/prefix-00001-of-00003.gguf`.
#[derive(Debug, PartialEq, Eq)]
pub struct PartName {
    folder: PathBuf,
    prefix: String,
    /// From 1 to `count`.
    pub number: u64,
    /// Parts of the model.
    pub count: u64,
    extension: String,
}

impl PartName {
    /// Of a file that is named as a part.
    pub fn of(path: &Path) -> Option<Self> {
        let (rest, count) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| {
            let plain = digits.len() == 5 && digits.bytes().all(|digit| digit.is_ascii_digit());
            digits.parse().ok().filter(|_| plain)
        };
        let (number, count) = (parse(number)?, parse(count)?);
        (1..=count).contains(&number).then_some(())?;
        Some(Self {
            folder: path.parent()?.to_owned(),
            prefix: prefix.to_owned(),
            number,
            count,
            extension: path.extension()?.to_str()?.to_owned(),
        })
    }

    fn same_model(&self, other: &Self) -> bool {
        (&self.folder, &self.prefix, self.count) == (&other.folder, &other.prefix, other.count)
    }

    /// The file of a part, counted from 0.
    pub fn path(&self, index: u64) -> PathBuf {
        let Self { prefix, count, extension, .. } = self;
        self.folder.join(format!("{prefix}-{:05}-of-{count:05}.{extension}", index + 1))
    }
}

fn open_file(path: &Path) -> Result<(MappedFile, Gguf)> {
    let file = MappedFile::open(path)?;
    let gguf = Gguf::parse(file.bytes()).at(|| path.display().to_string())?;
    Ok((file, gguf))
}

fn open_sibling(path: &Path, name: &PartName, index: u64) -> Result<(MappedFile, Gguf)> {
    let sibling = name.path(index);
    if !sibling.is_file() {
        return Err(Error::new("a part of the model is missing")
            .at(sibling.display().to_string())
            .expected(format!("{} parts, in the folder of {}", name.count, path.display())));
    }
    open_file(&sibling)
}

/// Each part must say that it is the one that its name says, of the model of the first.
fn check_parts(parts: &[(MappedFile, Gguf)]) -> Result<()> {
    let Some((_, first)) = parts.first() else { return Ok(()) };
    let total = first.unsigned(TENSORS)?;
    let mut seen: BTreeMap<&str, &Path> = BTreeMap::new();
    for (index, (file, part)) in parts.iter().enumerate() {
        let place = || file.path().display().to_string();
        let wanted =
            [(NUMBER, Some(index as u64)), (COUNT, Some(parts.len() as u64)), (TENSORS, total)];
        for (key, wanted) in wanted {
            let got = part.unsigned(key).at(place)?;
            check_same(key, wanted, got).at(place)?;
        }
        for key in SHARED {
            let (wanted, got) = (first.text(key)?, part.text(key).at(place)?);
            check_same(key, wanted, got.or(wanted)).at(place)?;
        }
        for tensor in part.tensors.keys() {
            if let Some(other) = seen.insert(tensor, file.path()) {
                return Err(Error::new("a tensor stands in two parts of the model")
                    .at(tensor)
                    .got(format!("{} and {}", other.display(), place())));
            }
        }
    }
    if total.is_some_and(|total| total != seen.len() as u64) {
        return Err(Error::new("the parts' tensors are not all that the model has")
            .at(TENSORS)
            .at(parts[0].0.path().display().to_string())
            .expected(total.unwrap_or_default())
            .got(seen.len())
            .hint("a part is damaged, or of another version of the model"));
    }
    Ok(())
}

fn check_same<T: PartialEq + ToString>(key: &str, wanted: Option<T>, got: Option<T>) -> Result<()> {
    if wanted == got {
        return Ok(());
    }
    let shown = |value: Option<T>| value.map_or_else(|| "no such key".into(), |v| v.to_string());
    Err(Error::new("a file is not the part of the model that its name says")
        .at(key)
        .expected(shown(wanted))
        .got(shown(got))
        .hint("it belongs to another model, or to another version of this one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_by_number_and_count() {
        let path = Path::new("models/m-of-9-Q4_K-00002-of-00011.gguf");
        let name = PartName::of(path).unwrap();
        assert_eq!((name.prefix.as_str(), name.number, name.count), ("m-of-9-Q4_K", 2, 11));
        assert_eq!(name.path(1), path);
        assert_eq!(name.path(10), Path::new("models/m-of-9-Q4_K-00011-of-00011.gguf"));
        for other in [
            "m.gguf",
            "m-1-of-3.gguf",
            "m-00001-of-+0003.gguf",
            "m-00001-of-00003",
            "m-00000-of-00000.gguf",
            "m-00000-of-00003.gguf",
            "m-00004-of-00003.gguf",
        ] {
            assert_eq!(PartName::of(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn parts_of_several_models_are_told_apart() {
        let files = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert!(are_of_one_model(&files(&["a-00002-of-00002.gguf", "a-00001-of-00002.gguf"])));
        assert!(!are_of_one_model(&files(&["a-00001-of-00002.gguf", "b-00002-of-00002.gguf"])));
        assert!(!are_of_one_model(&files(&["a-00001-of-00002.gguf", "a-00002-of-00003.gguf"])));
        assert!(!are_of_one_model(&files(&["a-00001-of-00002.gguf", "mmproj.gguf"])));
        assert!(!are_of_one_model(&[]));
    }
}
