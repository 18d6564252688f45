//! Cosines of the stream with words' vectors, by layer and by token.

use std::fmt::Write;

use crate::{
    experiment::stats::Interval,
    report::{
        format::{decimal, decimals},
        html::{Table, details, escape, paragraph, stacked},
        tables::{BINS, ProbeContrast, ProbeCurve, ProbePoint, ProbeTable, Tables},
    },
};

const WIDTH: f64 = 380.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 32.0;

pub(super) fn html(tables: &Tables) -> String {
    let parts: String = tables.probes.iter().map(part).collect();
    if parts.is_empty() {
        return parts;
    }
    let intro = "Nothing is injected here. The model is told to write a sentence, and to think of a word \
                 meanwhile, or not to. Shown is how far the residual stream points along the word’s vector \
                 while the sentence stands in the answer: the cosine, mean over its tokens and over words. \
                 The grey band holds 95% of the control words’ cosines at the same tokens.";
    paragraph(intro) + &parts
}

fn part(table: &ProbeTable) -> String {
    let title = format!("<h3>{}</h3>\n", escape(&table.part));
    let contrasts: String = table.contrasts.iter().map(|c| contrast(table, c)).collect();
    let maps: String = table.curves.iter().map(|curve| map(table, curve)).collect();
    title
        + &contrasts
        + &rows(table)
        + &details(
            "By layer and by token",
            &(paragraph(&format!(
                "Mean cosine in each of {BINS} equal parts of the sentence, from its first token to \
                 its last."
            )) + &format!("<div class=\"maps\">{maps}</div>\n")),
        )
}

/// Two prompts in one picture, and their difference in another.
fn contrast(table: &ProbeTable, of: &ProbeContrast) -> String {
    let curve = |name: &str| table.curves.iter().find(|curve| curve.prompt == name);
    let (Some(first), Some(second)) = (curve(&of.first), curve(&of.second)) else {
        return String::new();
    };
    let (a, b) = (escape(&of.first), escape(&of.second));
    let legend = format!(
        "<ul class=\"legend\"><li><span class=\"key concept\"></span>{a}</li><li><span class=\"key \
         random\"></span>{b}</li><li><span class=\"key clean\"></span>control words</li></ul>\n"
    );
    let both = Chart {
        title: format!("cosine by layer: {a}, {b}"),
        layers: &table.layers,
        lines: vec![("concept", &first.points), ("random", &second.points)],
        bands: &first.bands,
    };
    let none = vec![None; table.layers.len()];
    let difference = Chart {
        title: format!("{a} less {b}"),
        layers: &table.layers,
        lines: vec![("concept", &of.points)],
        bands: &none,
    };
    format!("{legend}<div class=\"panels wide\">\n{}{}</div>\n", both.svg(), difference.svg())
}

/// The layers at which each prompt and each difference is largest.
fn rows(table: &ProbeTable) -> String {
    let largest = |points: &[ProbePoint]| {
        let size = |at: &usize| points[*at].mean.abs();
        (0..points.len()).max_by(|a, b| size(a).total_cmp(&size(b)))
    };
    let shown = |point: &ProbePoint| {
        stacked(&decimal(point.mean, 4), &point.interval.map_or("no interval".into(), fine))
    };
    let head =
        ["prompt", "trials", "largest mean cosine", "at layer", "trials above the band there"];
    let mut out = Table::new("Largest over the layers (chosen after looking)", &head);
    for curve in &table.curves {
        let Some(at) = largest(&curve.points) else { continue };
        let above = match curve.bands[at] {
            Some(_) => format!("{}/{}", curve.above[at], curve.trials),
            None => "–".into(),
        };
        let (trials, layer) = (curve.trials.to_string(), table.layers[at].to_string());
        out.row("", &[escape(&curve.prompt), trials, shown(&curve.points[at]), layer, above]);
    }
    let head = ["difference", "mean over all layers", "largest", "at layer"];
    let mut differences = Table::new("Differences, in pairs of the same word and sentence", &head);
    for of in &table.contrasts {
        let Some(at) = largest(&of.points) else { continue };
        let name = format!("{} − {}", escape(&of.first), escape(&of.second));
        let layer = table.layers[at].to_string();
        differences.row("", &[name, shown(&of.overall), shown(&of.points[at]), layer]);
    }
    differences.html() + &out.html()
}

fn fine(interval: Interval) -> String {
    format!("[{}, {}]", decimal(interval.low, 4), decimal(interval.high, 4))
}

fn map(table: &ProbeTable, curve: &ProbeCurve) -> String {
    let largest = curve.map.iter().flatten().flatten().map(|v| v.abs()).fold(0.0, f64::max);
    let head: Vec<String> = std::iter::once("layer ↓ token →".to_owned())
        .chain((1..=BINS).map(|bin| bin.to_string()))
        .collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let mut out = Table::new(&format!("Cosine, {}", escape(&curve.prompt)), &head);
    for (layer, bins) in table.layers.iter().zip(&curve.map) {
        let cells = bins.iter().map(|value| match value {
            None => ("class=\"grey\"".to_owned(), "–".to_owned()),
            Some(value) => {
                let below = if *value < 0.0 { "below" } else { "" };
                let at = if largest > 0.0 { value.abs() / largest } else { 0.0 };
                (format!("class=\"{below}\" style=\"--at:{at:.2}\""), decimal(*value, 3))
            }
        });
        out.row_with(&layer.to_string(), &cells.collect::<Vec<_>>());
    }
    format!("<div class=\"heat\">{}</div>\n", out.html())
}

/// Lines over the layers, each with the band of its interval.
struct Chart<'a> {
    title: String,
    layers: &'a [usize],
    /// CSS class and one point a layer.
    lines: Vec<(&'static str, &'a [ProbePoint])>,
    /// The control words' range.
    bands: &'a [Option<Interval>],
}

impl Chart<'_> {
    fn svg(&self) -> String {
        let (low, high) = self.range();
        let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low);
        let last = self.layers.len().saturating_sub(1).max(1) as f64;
        let x = |at: usize| LEFT + (WIDTH - LEFT - RIGHT) * at as f64 / last;
        let mut out = format!(
            "<svg class=\"panel wide\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{0}\">\n<text class=\"title\" x=\"{LEFT}\" y=\"14\">{0}</text>\n",
            self.title
        );
        for value in [low, f64::midpoint(low, high), high, 0.0] {
            if value < low || value > high {
                continue;
            }
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{1:.1}\" y2=\"{1:.1}\"/>",
                WIDTH - RIGHT,
                y(value)
            );
            if value != 0.0 || low == 0.0 || high == 0.0 {
                let (at, text) = (y(value) + 3.5, decimal(value, 3));
                let _ = writeln!(
                    out,
                    "<text class=\"tick end\" x=\"{}\" y=\"{at:.1}\">{text}</text>",
                    LEFT - 5.0
                );
            }
        }
        let step = self.layers.len().div_ceil(8).max(1);
        for (at, layer) in self.layers.iter().enumerate().step_by(step) {
            let (x, y) = (x(at), HEIGHT - BOTTOM + 15.0);
            let _ = writeln!(
                out,
                "<text class=\"tick middle\" x=\"{x:.1}\" y=\"{y:.1}\">{layer}</text>"
            );
        }
        let _ = writeln!(
            out,
            "<text class=\"tick middle\" x=\"{:.1}\" y=\"{}\">layer</text>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 3.0
        );
        let area = |ranges: Vec<(usize, Interval)>| {
            let upper = ranges.iter().map(|(at, r)| format!("{:.1},{:.1}", x(*at), y(r.high)));
            let lower = ranges.iter().rev().map(|(at, r)| format!("{:.1},{:.1}", x(*at), y(r.low)));
            upper.chain(lower).collect::<Vec<_>>().join(" ")
        };
        let band = self.bands.iter().enumerate().filter_map(|(at, band)| Some((at, (*band)?)));
        let band: Vec<_> = band.collect();
        if !band.is_empty() {
            let _ = writeln!(out, "<polygon class=\"band\" points=\"{}\"/>", area(band));
        }
        for (class, points) in &self.lines {
            let _ = writeln!(out, "<g class=\"{class}\">");
            let own = points.iter().enumerate().filter_map(|(at, p)| Some((at, p.interval?)));
            let own: Vec<_> = own.collect();
            if !own.is_empty() {
                let _ = writeln!(out, "<polygon points=\"{}\"/>", area(own));
            }
            let line = points.iter().enumerate();
            let line = line.map(|(at, p)| format!("{:.1},{:.1}", x(at), y(p.mean)));
            let _ = writeln!(out, "<polyline points=\"{}\"/>", line.collect::<Vec<_>>().join(" "));
            for (at, point) in points.iter().enumerate() {
                let interval =
                    point.interval.map_or(String::new(), |i| format!(" {}", decimals(i)));
                let _ = writeln!(
                    out,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.2\"><title>layer {}: {}{interval}</title>\
                     </circle>",
                    x(at),
                    y(point.mean),
                    self.layers[at],
                    decimal(point.mean, 4)
                );
            }
            out += "</g>\n";
        }
        out + "</svg>\n"
    }

    /// All that is drawn, and a little air.
    fn range(&self) -> (f64, f64) {
        let points = self.lines.iter().flat_map(|(_, points)| points.iter());
        let of_point = |p: &ProbePoint| {
            let interval = p.interval.unwrap_or(Interval { low: p.mean, high: p.mean });
            [p.mean, interval.low, interval.high]
        };
        let bands = self.bands.iter().flatten().flat_map(|band| [band.low, band.high]);
        let values = points.flat_map(of_point).chain(bands).chain([0.0]);
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((0.0_f64, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        let air = ((high - low) * 0.05).max(1e-6);
        (low - air, high + air)
    }
}
