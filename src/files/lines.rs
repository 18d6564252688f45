//! Files of JSON lines to which whole lines are appended, so that a kill at any moment loses at most the line
//! being written.

use std::{
    io::{BufRead, BufReader, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use fs_err as fs;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{Context, Error, Result};

/// A file of JSON lines to which whole lines are appended.
#[derive(Debug)]
pub struct Lines {
    file: fs::File,
    path: PathBuf,
    length: u64,
}

impl Lines {
    /// Hands out the lines and drops a half-written last one from the file.
    ///
    /// # Errors
    /// The file cannot be read or written, or a whole line is none of these.
    pub fn open<T: DeserializeOwned>(
        path: &Path,
        each: impl FnMut(T) -> Result<()>,
    ) -> Result<Self> {
        let mut file = fs::OpenOptions::new().create(true).read(true).append(true).open(path)?;
        let length = for_each_line(&mut BufReader::new(&mut file), each)
            .at(|| path.display().to_string())?;
        if length != file.metadata()?.len() {
            file.set_len(length)?;
            file.seek(SeekFrom::End(0))?;
        }
        Ok(Self { file, path: path.to_owned(), length })
    }

    /// Appends one line with one write. When that fails (a full disk), what was written of it is
    /// taken back and the finished lines stay.
    pub fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut bytes = serde_json::to_vec(line)
            .map_err(|error| Error::new("can't write the line").got(error))?;
        bytes.push(b'\n');
        if let Err(error) = self.file.write_all(&bytes) {
            let kept = match self.file.set_len(self.length) {
                Ok(()) => "the finished lines are kept: make room and start the same command again",
                Err(_) => "start the same command again: it drops the half-written line",
            };
            return Err(Error::new("can't append to the file")
                .at(self.path.display().to_string())
                .got(error)
                .hint(kept));
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Waits until the disk has everything.
    pub fn sync(&self) -> Result<()> {
        Ok(self.file.sync_data()?)
    }
}

/// Hands out the complete lines one by one and gives their length in bytes; what follows the last
/// line break is half a line.
pub(crate) fn for_each_line<T: DeserializeOwned>(
    reader: &mut impl BufRead,
    mut each: impl FnMut(T) -> Result<()>,
) -> Result<u64> {
    let (mut line, mut length) = (Vec::new(), 0);
    for number in 1.. {
        line.clear();
        reader.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            break;
        }
        let parsed = serde_json::from_slice(&line).map_err(|error| {
            Error::new("not a line that this version of inkling reads")
                .at(format!("line {number}"))
                .got(error)
        })?;
        each(parsed)?;
        length += line.len() as u64;
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_lines_are_dropped_and_broken_ones_named() {
        let parse = |text: &str| {
            let mut lines = Vec::new();
            let keep = |line: u32| {
                lines.push(line);
                Ok(())
            };
            let length = for_each_line(&mut text.as_bytes(), keep)?;
            Ok::<_, Error>((lines, length))
        };
        assert_eq!(parse("").unwrap(), (vec![], 0));
        assert_eq!(parse("1\n2\n").unwrap(), (vec![1, 2], 4));
        assert_eq!(parse("1\n2").unwrap(), (vec![1], 2), "2 may be the start of 23");
        assert_eq!(parse("1").unwrap(), (vec![], 0));
        let error = parse("1\nx\n3\n").unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn appending_goes_on_where_the_whole_lines_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines.jsonl");
        std::fs::write(&path, "1\n2\n3").unwrap();
        let mut lines = Vec::new();
        let keep = |line: u32| {
            lines.push(line);
            Ok(())
        };
        let mut file = Lines::open(&path, keep).unwrap();
        assert_eq!(lines, [1, 2]);
        file.append(&44).unwrap();
        file.append(&5).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n44\n5\n");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named() {
        let path = PathBuf::from("/dev/full");
        let file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        let error = Lines { file, path, length: 0 }.append(&1).unwrap_err().to_string();
        assert!(error.contains("/dev/full") && error.contains("same command"), "{error}");
    }
}
