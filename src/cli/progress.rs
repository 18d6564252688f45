//! Progress bars, drawn on standard error where it is a terminal.

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::experiment::Progress;

/// One bar at a time: a new kind of work gets a new bar.
#[derive(Default)]
pub struct Bar {
    current: Option<(String, ProgressBar)>,
}

impl Bar {
    /// `done` of `total` pieces of `what` are done (0: how many is not known), and `tokens` were
    /// drawn for them.
    pub fn show(&mut self, what: &str, done: u64, total: u64, tokens: u64) {
        if !matches!(&self.current, Some((kind, _)) if kind == what) {
            self.clear();
            self.current = Some((what.to_owned(), new_bar(what, total)));
        }
        if let Some((_, bar)) = &self.current {
            bar.set_position(done);
            let seconds = bar.elapsed().as_secs_f64();
            let left = bar.eta();
            let mut message = String::new();
            if done > 0 && seconds > 0.5 {
                message = format!("{:.1} a second", done as f64 / seconds);
            }
            if tokens > 0 && seconds > 0.5 {
                message = format!("{message}, {:.0} tokens/s", tokens as f64 / seconds);
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

impl Progress for Bar {
    fn advance(&mut self, stage: &str, done: u64, total: u64, tokens: u64) {
        self.show(stage, done, total, tokens);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

fn new_bar(what: &str, total: u64) -> ProgressBar {
    let bar = if total == 0 { ProgressBar::no_length() } else { ProgressBar::new(total) };
    let counts = if total == 0 { "{pos}" } else { "{bar:30} {pos}/{len}" };
    let style = ProgressStyle::with_template(&format!("{{prefix}} {counts} {{msg}}"));
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(what.to_owned());
    bar
}
