//! One small line chart: a share against the dose.

use std::fmt::Write;

use super::{
    format::{count, percent, percents, scope},
    html::escape,
    tables::Contrast,
};
use crate::experiment::stats::Rate;

const WIDTH: f64 = 260.0;
const HEIGHT: f64 = 170.0;
const LEFT: f64 = 36.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 30.0;

/// What one panel shows.
pub(super) struct Panel<'a> {
    /// Above it.
    pub title: &'a str,
    /// The dose axis, evenly spaced.
    pub doses: &'a [f64],
    /// Name (also the CSS class) and one rate a dose.
    pub lines: Vec<(&'static str, Vec<Option<Rate>>)>,
    /// The clean replies' rate: a horizontal band over its interval.
    pub band: Option<Rate>,
}

impl Panel<'_> {
    /// As an `<svg>` for an HTML page; every point has its numbers as a tooltip.
    pub fn svg(&self) -> String {
        let title = escape(self.title);
        let mut out = format!(
            "<svg class=\"panel\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{title} by dose\">\n<text class=\"title\" x=\"{LEFT}\" y=\"14\">{title}\
             </text>\n"
        );
        self.axes(&mut out);
        if let Some(band) = &self.band {
            let (high, low) = (y(band.interval.high), y(band.interval.low));
            let (right, at) = (WIDTH - RIGHT, y(band.share));
            let _ = writeln!(
                out,
                "<g class=\"clean\"><title>clean: {} {} {}</title><rect x=\"{LEFT}\" \
                 y=\"{high:.1}\" width=\"{:.1}\" height=\"{:.1}\"/><line x1=\"{LEFT}\" \
                 x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/></g>",
                count(band.count),
                percent(band.share),
                percents(band.interval),
                right - LEFT,
                (low - high).max(1.0)
            );
        }
        for (number, (name, rates)) in self.lines.iter().enumerate() {
            self.line(&mut out, number, name, rates);
        }
        out + "</svg>\n"
    }

    /// Lines keep a little apart sideways, or equal values would hide each other.
    fn x(&self, at: usize, line: usize) -> f64 {
        let step = (WIDTH - LEFT - RIGHT) / self.doses.len().max(1) as f64;
        let apart = if line == 0 { -3.0 } else { 3.0 };
        LEFT + step * (at as f64 + 0.5) + apart
    }

    fn axes(&self, out: &mut String) {
        for share in [0.0, 0.5, 1.0] {
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/><text \
                 class=\"tick end\" x=\"{2}\" y=\"{3:.1}\">{4}</text>",
                WIDTH - RIGHT,
                y(share),
                LEFT - 5.0,
                y(share) + 3.5,
                percent(share)
            );
        }
        for (at, dose) in self.doses.iter().enumerate() {
            let _ = writeln!(
                out,
                "<text class=\"tick middle\" x=\"{:.1}\" y=\"{:.1}\">{dose}</text>",
                f64::midpoint(self.x(at, 0), self.x(at, 1)),
                HEIGHT - BOTTOM + 15.0
            );
        }
        let _ = writeln!(
            out,
            "<text class=\"tick middle\" x=\"{:.1}\" y=\"{}\">dose</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 3.0
        );
    }

    fn line(&self, out: &mut String, number: usize, name: &str, rates: &[Option<Rate>]) {
        let _ = writeln!(out, "<g class=\"{name}\">");
        let points: Vec<_> = rates
            .iter()
            .enumerate()
            .filter_map(|(at, rate)| rate.map(|rate| (at, self.x(at, number), rate)))
            .collect();
        let path: Vec<_> =
            points.iter().map(|(_, x, rate)| format!("{x:.1},{:.1}", y(rate.share))).collect();
        let _ = writeln!(out, "<polyline points=\"{}\"/>", path.join(" "));
        for (at, x, rate) in points {
            let (low, high, middle) = (y(rate.interval.low), y(rate.interval.high), y(rate.share));
            // Shapes differ, not only colours.
            let marker = if number == 0 {
                format!("<circle cx=\"{x:.1}\" cy=\"{middle:.1}\" r=\"3.5\"/>")
            } else {
                let (x, y) = (x - 3.0, middle - 3.0);
                format!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"6\" height=\"6\"/>")
            };
            let _ = writeln!(
                out,
                "<g><title>{name}, dose {}: {} {} {}</title><line x1=\"{x:.1}\" x2=\"{x:.1}\" \
                 y1=\"{low:.1}\" y2=\"{high:.1}\"/>{marker}</g>",
                self.doses[at],
                count(rate.count),
                percent(rate.share),
                percents(rate.interval)
            );
        }
        *out += "</g>\n";
    }
}

/// Hits against false alarms under random vectors, one point a cell; on the line both are equal.
pub(super) fn scatter(rows: &[&Contrast]) -> String {
    const SIDE: f64 = 260.0;
    let x = |share: f64| LEFT + (SIDE - LEFT - RIGHT) * share;
    let y = |share: f64| TOP + (SIDE - TOP - BOTTOM) * (1.0 - share);
    let points: String = rows
        .iter()
        .filter_map(|row| {
            let random = row.random?;
            Some(format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\"><title>{}: H {} {}, F {} {}</title>\
                 </circle>\n",
                x(random.share),
                y(row.hits.share),
                scope(&row.scope),
                percent(row.hits.share),
                count(row.hits.count),
                percent(random.share),
                count(random.count)
            ))
        })
        .collect();
    if points.is_empty() {
        return String::new();
    }
    let mut grid = String::new();
    for share in [0.0, 0.5, 1.0] {
        let _ = writeln!(
            grid,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{0}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/><text \
             class=\"tick end\" x=\"{2}\" y=\"{3:.1}\">{4}</text><text class=\"tick middle\" \
             x=\"{5:.1}\" y=\"{6}\">{4}</text>",
            SIDE - RIGHT,
            y(share),
            LEFT - 5.0,
            y(share) + 3.5,
            percent(share),
            x(share),
            SIDE - BOTTOM + 15.0
        );
    }
    format!(
        "<div class=\"panels\"><svg class=\"panel\" viewBox=\"0 0 {SIDE} {SIDE}\" role=\"img\" \
         aria-label=\"hits against false alarms by cell\">\n<text class=\"title\" x=\"{LEFT}\" \
         y=\"14\">H against F, by cell</text>\n{grid}<line class=\"grid\" x1=\"{}\" y1=\"{}\" \
         x2=\"{}\" y2=\"{}\"/>\n<text class=\"tick middle\" x=\"{}\" y=\"{}\">F, random \
         vectors</text>\n<g class=\"concept\">\n{points}</g></svg></div>\n",
        x(0.0),
        y(0.0),
        x(1.0),
        y(1.0),
        f64::midpoint(LEFT, SIDE - RIGHT),
        SIDE - 3.0
    )
}

fn y(share: f64) -> f64 {
    TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - share)
}
