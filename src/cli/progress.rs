//! Progress bars, drawn on standard error where it is a terminal.

use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{DecimalBytes, HumanDuration, ProgressBar, ProgressStyle};

use super::{INTERRUPTED, output::note};
use crate::experiment::Progress;

/// What a bar counts.
#[derive(Clone, Copy)]
pub enum Unit {
    Pieces,
    Bytes,
}

/// One bar at a time: a new kind of work gets a new bar.
#[derive(Default)]
pub struct Bar {
    current: Option<(String, ProgressBar)>,
    /// Begun, and all.
    cells: (usize, usize),
}

impl Bar {
    /// `done` of `total` pieces of `what` are done (0: how many is not known), and `tokens` were
    /// drawn for them.
    pub fn show(&mut self, what: &str, done: u64, total: u64, tokens: u64) {
        self.show_in(Unit::Pieces, what, done, total, tokens);
    }

    /// Likewise, counted in another unit.
    pub fn show_in(&mut self, unit: Unit, what: &str, done: u64, total: u64, tokens: u64) {
        if !matches!(&self.current, Some((kind, _)) if kind == what) {
            self.clear();
            self.current = Some((what.to_owned(), new_bar(unit, what, done, total)));
        }
        if let Some((_, bar)) = &self.current {
            bar.set_position(done);
            let seconds = bar.elapsed().as_secs_f64();
            let left = bar.eta();
            let mut message = String::new();
            if done > 0 && seconds > 0.5 {
                message = match unit {
                    Unit::Pieces => format!("{:.1} a second", done as f64 / seconds),
                    Unit::Bytes => format!("{}/s", DecimalBytes(bar.per_sec() as u64)),
                };
            }
            if tokens > 0 && seconds > 0.5 {
                message = format!("{message}, {:.0} tokens/s", tokens as f64 / seconds);
            }
            let (begun, cells) = self.cells;
            if begun > 0 {
                let comma = if message.is_empty() { "" } else { ", " };
                message = format!("{message}{comma}{begun} of {cells} cells");
            }
            if done < total && !left.is_zero() {
                let comma = if message.is_empty() { "" } else { ", " };
                message = format!("{message}{comma}{} left", HumanDuration(left));
            }
            bar.set_message(message);
        }
    }

    /// Takes the bar off the screen.
    pub fn clear(&mut self) {
        if let Some((_, bar)) = self.current.take() {
            bar.finish_and_clear();
        }
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// From now on an interrupt (Ctrl-C) ends what is under way in order; a second one ends it at once.
pub fn stop_in_order() {
    let handler = || {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED.into());
        }
        note("stopping when what is under way is finished and stored; once more to stop at once");
    };
    // Where no handler can be set an interrupt ends the process as ever: whole lines are safe.
    let _ = ctrlc::set_handler(handler);
}

impl Progress for Bar {
    fn cells(&mut self, begun: usize, total: usize) {
        self.cells = (begun, total);
    }

    fn stops(&self) -> bool {
        STOP.load(Ordering::SeqCst)
    }

    fn advance(&mut self, stage: &str, done: u64, total: u64, tokens: u64) {
        self.show(stage, done, total, tokens);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

fn new_bar(unit: Unit, what: &str, done: u64, total: u64) -> ProgressBar {
    let bar = if total == 0 { ProgressBar::no_length() } else { ProgressBar::new(total) };
    let counts = match unit {
        Unit::Bytes => "{bar:30} {decimal_bytes}/{decimal_total_bytes}",
        Unit::Pieces if total == 0 => "{pos}",
        Unit::Pieces => "{bar:30} {pos}/{len}",
    };
    let style = ProgressStyle::with_template(&format!("{{prefix}} {counts} {{msg}}"));
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(what.to_owned());
    // What was there before tells nothing of the speed.
    bar.set_position(done);
    bar.reset_eta();
    bar
}
