//! From stored trials and grades to tables, a headline and one self-contained HTML file.
//!
//! Everything here is a pure function of a [`Run`]: no clock, no file, no model. The order of the
//! trials does not matter, and a run that is unfinished or empty has a report too.
//!
//! Parts are told apart by what their trials hold: one with readouts (or first answers and no
//! replies) is a readout; one with replies is sampled; a sampled part called `ramp` is shown
//! reply by reply and counted nowhere.

#![expect(
    clippy::format_collect,
    clippy::format_push_string,
    reason = "pages are made once: reading well counts for more than an allocation"
)]

mod csv;
mod format;
mod headline;
mod html;
mod index;
mod page;
mod svg;
mod tables;
#[cfg(test)]
mod tests;
mod text;
mod versus;

pub use headline::{Headline, Meaning, ReadHeadline, ReplyHeadline};
pub use tables::{
    BiasRow, BiasTable, Cell, Chosen, Contrast, IntentRow, IntentTable, MarginCell, OutcomeRow,
    OutcomeTable, ProbeContrast, ProbeCurve, ProbePoint, ProbeTable, Progress, ReadTable,
    ReadoutCell, ReceiptRow, ReplyArm, ReplyTable, Scope, Score, Tables, TextRow, TextTable,
};

pub use self::versus::Versus;
pub use crate::experiment::results::Run;

/// Counts and rates.
pub fn tables(run: &Run) -> Tables {
    tables::build(&index::Index::new(run))
}

/// What the run says, in numbers and in words.
pub fn headline(run: &Run) -> Headline {
    let index = index::Index::new(run);
    headline::build(&index, &tables::build(&index))
}

/// One self-contained page: no network, no script, light and dark.
pub fn html(run: &Run) -> String {
    let index = index::Index::new(run);
    let tables = tables::build(&index);
    let headline = headline::build(&index, &tables);
    page::build(&index, &tables, &headline)
}

/// Every table and figure as a CSV file: name, content.
pub fn csv_files(run: &Run) -> Vec<(String, String)> {
    csv::files(&tables(run))
}

/// What two runs have in common, and how they differ.
pub fn versus(first: &Run, second: &Run) -> Vec<Versus> {
    versus::versus(&tables(first), &tables(second))
}

/// The same for the terminal.
pub fn versus_text(first: &Run, second: &Run) -> String {
    let mut out = String::new();
    for (name, run) in [("first", first), ("second", second)] {
        out += &format!("{name}: {}\n\n", headline(run));
    }
    let rows = versus::rows(&versus(first, second));
    out += &text::align(&rows);
    out.chars().filter(|c| *c == '\n' || !c.is_control()).collect()
}

/// Headline and compact tables for the terminal.
pub fn text(run: &Run) -> String {
    let index = index::Index::new(run);
    let tables = tables::build(&index);
    text::build(&index, &tables, &headline::build(&index, &tables))
}
