//! What `--model` names: a path, or a model of the hub, which is fetched.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

use super::{
    output::note,
    progress::{Bar, Unit},
};
use crate::{
    error::Result,
    hub::{Hub, Name, Settings, Watch},
};

/// The model's file or folder. What exists is a path, whatever it is called.
pub fn model_path(argument: &Path) -> Result<PathBuf> {
    let name = argument.to_str().filter(|_| !argument.exists()).and_then(Name::parse);
    let Some(name) = name else { return Ok(argument.to_owned()) };
    let name = name?;
    let mut shown = Shown { name: name.to_string(), bar: None, told: String::new() };
    if io::stderr().is_terminal() {
        shown.bar = Some(Bar::default());
    }
    Hub::new(Settings::from_env()?)?.fetch(&name, &mut shown)
}

/// A bar where there is a terminal, else a line a file.
struct Shown {
    name: String,
    bar: Option<Bar>,
    /// The last file that had its line.
    told: String,
}

impl Watch for Shown {
    fn note(&mut self, text: &str) {
        self.bar.as_mut().map(Bar::clear);
        note(text);
    }

    fn weights(&mut self, files: usize, bytes: u64) {
        let files = if files == 1 { "one file".to_owned() } else { format!("{files} files") };
        self.note(&format!("fetching {}: {} of weights in {files}", self.name, size(bytes)));
    }

    fn bytes(&mut self, file: &str, done: u64, total: u64) {
        match &mut self.bar {
            Some(bar) => bar.show_in(Unit::Bytes, file, done, total, 0),
            None if self.told != file => {
                file.clone_into(&mut self.told);
                note(format!("fetching {file} ({})", size(total)));
            }
            None => {}
        }
    }

    fn checked(&mut self, file: &str, done: u64, total: u64) {
        if let Some(bar) = &mut self.bar {
            bar.show_in(Unit::Bytes, &format!("checking {file}"), done, total, 0);
        }
    }
}

/// In the unit that a reader would choose.
fn size(bytes: u64) -> String {
    match bytes as f64 {
        n if n < 1e3 => format!("{n} bytes"),
        n if n < 1e6 => format!("{:.1} kB", n / 1e3),
        n if n < 1e9 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.2} GB", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_or_looks_like_a_path_is_one() {
        for path in ["src/cli", "./src/none", "/org/name", "none.gguf", "models/none.gguf"] {
            assert_eq!(model_path(Path::new(path)).unwrap(), Path::new(path));
        }
        assert!(model_path(Path::new("org/name@")).is_err());
    }

    #[test]
    fn sizes_have_a_unit() {
        let sizes = [999, 1500, 308_160, 2_500_000, 16_060_000_000].map(size);
        assert_eq!(sizes, ["999 bytes", "1.5 kB", "308.2 kB", "2.5 MB", "16.06 GB"]);
    }
}
