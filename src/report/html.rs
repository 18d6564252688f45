//! Pieces of HTML. Whatever comes from a model or a file goes through [`escape`].

use std::fmt::Write;

/// Text as HTML, in elements and in quoted attributes. Control characters (and those that reverse
/// the direction of writing) are made visible, so that a reply can't disguise itself.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(c),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => {
                let _ = write!(out, "⟨U+{:04X}⟩", c as u32);
            }
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// [`escape`], with `code` between backticks set as code.
pub(super) fn prose(text: &str) -> String {
    let pieces = text.split('`').enumerate().map(|(at, piece)| {
        let piece = escape(piece);
        if at % 2 == 1 { format!("<code>{piece}</code>") } else { piece }
    });
    pieces.collect()
}

/// A section with a heading that can be linked to; nothing where the body is empty.
pub(super) fn section(id: &str, title: &str, body: &str) -> String {
    if body.is_empty() {
        return String::new();
    }
    format!("<section id=\"{id}\"><h2>{title}</h2>\n{body}</section>\n")
}

/// A paragraph of HTML.
pub(super) fn paragraph(html: &str) -> String {
    format!("<p>{html}</p>\n")
}

/// Something to be opened with a click.
pub(super) fn details(summary: &str, body: &str) -> String {
    format!("<details><summary>{summary}</summary>\n{body}</details>\n")
}

/// A table. Cells are HTML; the first of each row is its header.
pub(super) struct Table {
    caption: String,
    head: Vec<String>,
    rows: String,
}

impl Table {
    /// With its caption (without tags) and column heads, as HTML.
    pub fn new(caption: &str, head: &[&str]) -> Self {
        Self {
            caption: caption.into(),
            head: head.iter().map(|&cell| cell.into()).collect(),
            rows: String::new(),
        }
    }

    /// Adds a row; `class` may be empty.
    pub fn row(&mut self, class: &str, cells: &[String]) {
        let attribute =
            if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        let _ = write!(self.rows, "<tr{attribute}>");
        for (at, cell) in cells.iter().enumerate() {
            let _ = match at {
                0 => write!(self.rows, "<th scope=\"row\">{cell}</th>"),
                _ => write!(self.rows, "<td>{cell}</td>"),
            };
        }
        self.rows += "</tr>\n";
    }

    /// Adds a row of cells with attributes of their own.
    pub fn row_with(&mut self, header: &str, cells: &[(String, String)]) {
        let _ = write!(self.rows, "<tr><th scope=\"row\">{header}</th>");
        for (attributes, cell) in cells {
            let _ = write!(self.rows, "<td {attributes}>{cell}</td>");
        }
        self.rows += "</tr>\n";
    }

    /// The table in a box that scrolls sideways; nothing without rows.
    pub fn html(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let head: String =
            self.head.iter().map(|cell| format!("<th scope=\"col\">{cell}</th>")).collect();
        format!(
            "<p class=\"caption\">{0}</p>\n<div class=\"scroll\" role=\"region\" tabindex=\"0\" \
             aria-label=\"{0}\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{1}</tbody>\
             </table></div>\n",
            self.caption, self.rows
        )
    }
}

/// A number over its interval or its counts, the second line small.
pub(super) fn stacked(value: &str, note: &str) -> String {
    format!("{value}<small>{note}</small>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_is_harmless() {
        let hostile = "<script>alert('1')</script> & \"quoted\"\u{1b}[31m \u{202e}abc";
        let safe = escape(hostile);
        assert!(!safe.contains(['<', '>', '"', '\'', '\u{1b}', '\u{202e}']), "{safe}");
        assert!(safe.starts_with("&lt;script&gt;alert(&#39;1&#39;)"));
        assert_eq!(prose("run `a < b` now"), "run <code>a &lt; b</code> now");
    }

    #[test]
    fn empty_tables_and_sections_vanish() {
        assert_eq!(Table::new("caption", &["a"]).html(), "");
        assert_eq!(section("id", "Title", ""), "");
    }
}
