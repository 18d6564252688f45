//! Standard output, where a result or a stream of lines goes.

use std::io::{self, StdoutLock, Write};

use serde::Serialize;

/// The locked standard output. Its errors stay `io::Error`s, so that a closed pipe can be told
/// from a failure.
pub struct Output(StdoutLock<'static>);

impl Output {
    /// Locks standard output.
    pub fn new() -> Self {
        Self(io::stdout().lock())
    }

    /// One line, written at once.
    pub fn line(&mut self, text: impl AsRef<str>) -> anyhow::Result<()> {
        self.0.write_all(text.as_ref().as_bytes())?;
        self.0.write_all(b"\n")?;
        Ok(self.0.flush()?)
    }

    /// A result as indented JSON.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(value)?;
        self.line(text)
    }
}

/// A message for the person at the terminal, on standard error.
pub fn note(text: impl AsRef<str>) {
    // Nobody is left to be told that it can't be told.
    let _ = writeln!(io::stderr(), "{}", text.as_ref());
}

/// Columns of text, padded to their widest cell; `right` says which are right-aligned.
pub fn columns(rows: &[Vec<String>], right: &[bool]) -> Vec<String> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..right.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).zip(right).map(|((cell, width), right)| {
            if *right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows = [row(["word", "norm", ""]), row(["é", "10.25", "x"])];
        assert_eq!(columns(&rows, &[false, true, false]), ["word   norm", "é     10.25  x"]);
    }
}
