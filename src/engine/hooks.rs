//! A job's injections and captures -> rows of the device's tables, and receipts back. Pure
//! functions over plain data.

use std::sync::Arc;

use super::types::{Capture, Injection, Job, Receipt};
use crate::{
    error::{Error, Result},
    model::ModelConfig,
    ops::hooks::HookOp,
    request::{CaptureSite, Site, StrengthMode},
};

/// The number of a site along the stream, see `ops::hooks::site_count`.
pub fn site_index(site: Site, layer: usize) -> usize {
    match site {
        Site::ResidPre => 2 * layer,
        Site::ResidMid => 2 * layer + 1,
        Site::ResidPost => 2 * layer + 2,
    }
}

/// `resid_post.20` and the like.
pub fn site_name(site: Site, layer: usize) -> String {
    let name = match site {
        Site::ResidPre => "resid_pre",
        Site::ResidMid => "resid_mid",
        Site::ResidPost => "resid_post",
    };
    format!("{name}.{layer}")
}

/// The tap of a capture, see `ops::hooks::tap_count`; `None` for logits.
pub fn tap_index(capture: &Capture, layers: usize) -> Option<usize> {
    let layer = capture.layer.unwrap_or(0);
    Some(match capture.site {
        CaptureSite::ResidPre => 2 * (2 * layer),
        CaptureSite::ResidMid => 2 * (2 * layer + 1),
        CaptureSite::ResidPost => 2 * (2 * layer + 2),
        CaptureSite::AttnOut => 2 * (2 * layer + 1) + 1,
        CaptureSite::MlpOut => 2 * (2 * layer + 2) + 1,
        CaptureSite::FinalNorm => 2 * (2 * layers) + 2,
        CaptureSite::Logits => return None,
    })
}

/// What of the prompt a job must compute itself: rows from `start` on, from layer `cut` up.
/// Everything before and below is the clean run's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Own {
    /// First row.
    pub start: usize,
    /// First layer whose input or inside may differ from the clean run; the number of layers
    /// where only the final norm is left.
    pub cut: usize,
}

/// Whether an injection changes anything: a zero-strength `add` does not.
pub fn is_live(injection: &Injection) -> bool {
    injection.strength != 0.0
}

/// The injections that change something, in their order.
pub fn live(job: &Job) -> impl Iterator<Item = &Injection> {
    job.inject.iter().filter(|injection| is_live(injection))
}

fn is_same_injection(a: &Injection, b: &Injection) -> bool {
    let what = |i: &Injection| (i.site, i.layer, i.op, i.mode, i.from, i.to, i.strength.to_bits());
    let bits = |v: &f32| v.to_bits();
    what(a) == what(b)
        && (Arc::ptr_eq(&a.vector, &b.vector)
            || a.vector.iter().map(bits).eq(b.vector.iter().map(bits)))
}

/// Whether two jobs' prompts, injected, are the same rows.
pub fn have_same_prompt(a: &Job, b: &Job) -> bool {
    a.tokens == b.tokens
        && a.capture == b.capture
        && live(a).count() == live(b).count()
        && live(a).zip(live(b)).all(|(a, b)| is_same_injection(a, b))
}

/// Whether two jobs of the same prompt, injected, are continued in the same way too.
pub fn are_continued_alike(a: &Job, b: &Job) -> bool {
    a.sampling == b.sampling
        && (a.n, a.logprobs) == (b.n, b.logprobs)
        && (&a.stop, &a.score, &a.watch) == (&b.stop, &b.score, &b.watch)
}

/// Whether a job takes a captured row from its prompt's clean run: one before the first row, or
/// below the first layer, that it computes itself.
pub fn is_clean(tap: usize, position: usize, own: Own) -> bool {
    let (site, is_branch) = (tap / 2, tap % 2 == 1);
    // The branch into the first site of the cut was added by the clean run.
    position < own.start || site < 2 * own.cut || site == 2 * own.cut && is_branch
}

/// A captured row that is a clean run's: which of the job's captures, which of its positions, and
/// the row's tap and position.
#[derive(Clone, Copy, Debug)]
pub struct CleanRow {
    /// Index into `Job::capture`.
    pub capture: usize,
    /// Index into `Capture::positions`.
    pub index: usize,
    /// Tap and position.
    pub at: (u32, u32),
}

/// The captured rows that a job takes from its prompt's clean run.
pub fn clean_rows(job: &Job, own: Own, layers: usize) -> impl Iterator<Item = CleanRow> {
    job.capture.iter().enumerate().flat_map(move |(capture, wanted)| {
        let tap = tap_index(wanted, layers);
        let positions = wanted.positions.iter().enumerate();
        positions.filter_map(move |(index, &position)| {
            let tap = tap.filter(|&tap| is_clean(tap, position, own))?;
            Some(CleanRow { capture, index, at: (tap as u32, position as u32) })
        })
    })
}

/// See [`Own`]. Without sharing a job computes its whole prompt.
pub fn own_part(job: &Job, layers: usize, share: bool) -> Own {
    let prompt = job.tokens.len();
    if !share {
        return Own { start: 0, cut: 0 };
    }
    let mut own = Own { start: prompt - 1, cut: layers };
    for injection in live(job).filter(|injection| injection.from < prompt) {
        own.start = own.start.min(injection.from);
        own.cut = own.cut.min(site_index(injection.site, injection.layer) / 2);
    }
    // Clean runs keep rows of the stream, not what the head makes of them.
    let ends = job.capture.iter().filter(|capture| !capture.site.has_layer());
    let first = ends.filter_map(|capture| capture.positions.first()).min();
    own.start = first.map_or(own.start, |&first| own.start.min(first));
    own
}

/// Samples of one prompt; more are more requests.
const MAX_SAMPLES: u32 = 65_536;

/// Refuses a job that the model cannot run, or whose injections would touch nothing.
pub fn check(job: &Job, config: &ModelConfig) -> Result<()> {
    let prompt = job.tokens.len();
    if prompt == 0 {
        return Err(Error::new("empty prompt").expected("at least one token"));
    }
    let longest = job.score.iter().map(Vec::len).max().unwrap_or(0);
    let total = prompt + (job.sampling.max_tokens as usize).max(longest);
    // The last token drawn is never fed back, so no row has its position.
    let rows = prompt + (total - prompt).saturating_sub(1);
    if total > config.context {
        return Err(Error::new("longer than the model's context")
            .expected(format!("at most {} tokens", config.context))
            .got(format!("{prompt} of the prompt and {} to come", total - prompt))
            .hint("--context raises the limit to what the model was made for"));
    }
    let ids = job.tokens.iter().chain(job.score.iter().flatten()).chain(&job.watch);
    if let Some(id) = ids.copied().find(|&id| id as usize >= config.vocab) {
        return Err(Error::new("token id outside the vocabulary")
            .expected(format!("0..{}", config.vocab))
            .got(id));
    }
    if !(1..=MAX_SAMPLES).contains(&job.n) {
        return Err(Error::new("too few or too many samples of one prompt")
            .at("n")
            .expected(format!("1..={MAX_SAMPLES}"))
            .got(job.n));
    }
    if job.score.iter().any(Vec::is_empty) {
        return Err(Error::new("empty continuation").at("score"));
    }
    let s = &job.sampling;
    let temperature_fits = s.temperature.is_finite() && s.temperature >= 0.0;
    let top_p_fits = s.top_p > 0.0 && s.top_p <= 1.0;
    if !(temperature_fits && top_p_fits && (0.0..1.0).contains(&s.min_p)) {
        return Err(Error::new("sampling values out of range")
            .expected("temperature 0 or more, 0 < top_p <= 1, 0 <= min_p < 1")
            .got(format!("{} / {} / {}", s.temperature, s.top_p, s.min_p)));
    }
    for (at, injection) in job.inject.iter().enumerate() {
        check_injection(injection, config, rows).map_err(|e| e.at(format!("inject[{at}]")))?;
    }
    for (at, capture) in job.capture.iter().enumerate() {
        check_capture(capture, config, prompt).map_err(|e| e.at(format!("capture[{at}]")))?;
    }
    Ok(())
}

fn check_injection(injection: &Injection, config: &ModelConfig, rows: usize) -> Result<()> {
    if injection.layer >= config.layers {
        return Err(out_of_range(injection.layer, config));
    }
    if injection.vector.len() != config.dim {
        return Err(Error::new("vector of the wrong length")
            .expected(format!("{} (the model's width)", config.dim))
            .got(injection.vector.len()));
    }
    if !injection.vector.iter().all(|v| v.is_finite()) || !injection.strength.is_finite() {
        return Err(
            Error::new("NaN or infinity in a vector or strength").expected("finite numbers")
        );
    }
    if injection.mode != StrengthMode::Raw && norm(&injection.vector) == 0.0 {
        return Err(Error::new("a vector of length 0 has no direction")
            .hint("only strength_mode raw takes it"));
    }
    if injection.from >= injection.to.unwrap_or(usize::MAX) || injection.from >= rows {
        return Err(Error::new("the window touches no token: nothing would be injected")
            .expected(format!("from < to, and from < {rows}"))
            .got(format!("from {}, to {:?}", injection.from, injection.to)));
    }
    Ok(())
}

fn check_capture(capture: &Capture, config: &ModelConfig, prompt: usize) -> Result<()> {
    if capture.site.has_layer() != capture.layer.is_some() {
        return Err(Error::new(format!("{} and its layer do not fit", capture.site.name())));
    }
    if let Some(layer) = capture.layer.filter(|&layer| layer >= config.layers) {
        return Err(out_of_range(layer, config));
    }
    let ascending = capture.positions.is_sorted_by(|a, b| a < b);
    if !ascending || capture.positions.last().is_none_or(|&last| last >= prompt) {
        return Err(Error::new("bad capture positions")
            .expected(format!("ascending, in 0..{prompt}, at least one")));
    }
    Ok(())
}

fn out_of_range(layer: usize, config: &ModelConfig) -> Error {
    Error::new("layer out of range")
        .expected(format!("0..={} (the model has {} blocks)", config.layers - 1, config.layers))
        .got(layer)
}

/// ‖v‖, summed in f64.
pub fn norm(v: &[f32]) -> f64 {
    v.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
}

/// What the clean run says about norms: (sites, positions) of a prompt.
#[derive(Clone, Copy, Debug)]
pub struct CleanNorms<'a> {
    /// ‖h‖, (sites, positions).
    pub norms: &'a [f32],
    /// Positions.
    pub prompt: usize,
}

impl CleanNorms<'_> {
    fn window(&self, injection: &Injection) -> &[f32] {
        let site = site_index(injection.site, injection.layer);
        let to = injection.to.unwrap_or(self.prompt).min(self.prompt);
        let from = injection.from.max(1).min(to); // position 0 is the attention sink
        &self.norms[site * self.prompt..][from..to]
    }

    /// N: the mean clean ‖h‖ over the window's prompt positions, position 0 excluded.
    pub fn reference(&self, injection: &Injection) -> Option<f64> {
        let window = self.window(injection);
        let sum: f64 = window.iter().map(|&norm| f64::from(norm)).sum();
        (!window.is_empty()).then(|| sum / window.len() as f64)
    }

    /// Refuses mode `row` where a row of the window is far larger than the others: the sink's
    /// norm is about 180 times its neighbours'.
    fn check_rows(&self, injection: &Injection) -> Result<()> {
        let site = site_index(injection.site, injection.layer);
        let to = injection.to.unwrap_or(self.prompt).min(self.prompt);
        let window = &self.norms[site * self.prompt..][injection.from.min(to)..to];
        let mut sorted = window.to_vec();
        sorted.sort_unstable_by(f32::total_cmp);
        let Some(median) = sorted.get(sorted.len() / 2).copied() else { return Ok(()) };
        match window.iter().position(|&norm| norm > 20.0 * median) {
            None => Ok(()),
            Some(at) => Err(Error::new("strength_mode row would blow up an outlier row")
                .at(format!("position {}", injection.from + at))
                .expected(format!("norms up to 20 times the window's median, {median}"))
                .got(window[at])
                .hint("start the window later, or use strength_mode reference")),
        }
    }
}

/// The scale s of `h += s·v` (or `h += s·‖h‖·v`), and whether it is relative to the row.
pub fn scale(injection: &Injection, clean: Option<CleanNorms>) -> Result<(f32, bool)> {
    let s = f64::from(injection.strength);
    let length = norm(&injection.vector);
    Ok(match injection.mode {
        StrengthMode::Raw => (injection.strength, false),
        StrengthMode::Unit => ((s / length) as f32, false),
        StrengthMode::Row => {
            clean.map_or(Ok(()), |clean| clean.check_rows(injection))?;
            ((s / length) as f32, true)
        }
        StrengthMode::Reference => {
            let n = clean.and_then(|clean| clean.reference(injection)).ok_or_else(|| {
                Error::new("strength_mode reference needs prompt positions in the window")
                    .expected("a window that holds a prompt position other than 0")
                    .got(format!("from {}, to {:?}", injection.from, injection.to))
                    .hint("use strength_mode raw or row for generated tokens only")
            })?;
            ((s * n / length) as f32, false)
        }
    })
}

/// An operation with what the device does not need: the injection it came from.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    /// Site along the stream.
    pub site: usize,
    /// Which of the job's live injections.
    pub injection: usize,
    /// For the device.
    pub op: HookOp,
}

/// The operations of a job by site (in the order of its injections at each), with `row(i)` the
/// bank row of the vector of live injection i.
pub fn plan(
    job: &Job,
    clean: Option<CleanNorms>,
    mut row: impl FnMut(usize) -> u32,
) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    let injections = job.inject.iter().enumerate().filter(|(_, injection)| is_live(injection));
    for (number, (at, injection)) in injections.enumerate() {
        let (scale, relative) =
            scale(injection, clean).map_err(|e| e.at(format!("inject[{at}]")))?;
        let to = injection.to.map_or(u32::MAX, |to| u32::try_from(to).unwrap_or(u32::MAX));
        let relative = u32::from(relative);
        let op = HookOp { vector: row(number), from: injection.from as u32, to, scale, relative };
        planned.push(Planned {
            site: site_index(injection.site, injection.layer),
            injection: number,
            op,
        });
    }
    planned.sort_by_key(|p| p.site);
    Ok(planned)
}

/// What one sequence saw of one operation, added up in the order of positions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Rows in the window.
    pub expected: u64,
    /// Rows changed.
    pub touched: u64,
    /// Sum of ‖h‖ before.
    pub before: f64,
    /// Sum of ‖h after − h before‖.
    pub change: f64,
}

impl Tally {
    /// Adds another sequence's.
    pub fn add(&mut self, other: &Self) {
        self.expected += other.expected;
        self.touched += other.touched;
        self.before += other.before;
        self.change += other.change;
    }
}

/// One receipt for each injection of the job; `references` holds N of each where it is known.
pub fn receipts(
    job: &Job,
    references: &[Option<f64>],
    planned: &[Planned],
    tallies: &[Tally],
) -> Vec<Receipt> {
    let receipt = |(at, injection): (usize, &Injection)| {
        let number = job.inject[..at].iter().filter(|injection| is_live(injection)).count();
        let planned = planned.iter().position(|p| p.injection == number && is_live(injection));
        let tally = planned.map(|p| tallies[p]).unwrap_or_default();
        let mean = |sum: f64| (tally.touched > 0).then(|| (sum / tally.touched as f64) as f32);
        let (s, length) = (f64::from(injection.strength.abs()), norm(&injection.vector));
        let reference = references[at];
        let before = mean(tally.before);
        let planned = match injection.mode {
            StrengthMode::Raw => Some((s * length) as f32),
            StrengthMode::Unit => Some(s as f32),
            StrengthMode::Reference => reference.map(|n| (s * n) as f32),
            StrengthMode::Row => before.map(|before| (s * f64::from(before)) as f32),
        };
        Receipt {
            site: site_name(injection.site, injection.layer),
            strength: injection.strength,
            mode: injection.mode,
            from: injection.from,
            to: injection.to,
            vector_norm: length as f32,
            reference_norm: reference.map(|n| n as f32),
            norm_before: before,
            planned: if is_live(injection) { planned } else { Some(0.0) },
            measured: if is_live(injection) { mean(tally.change) } else { Some(0.0) },
            rows_expected: tally.expected,
            rows_touched: tally.touched,
        }
    };
    job.inject.iter().enumerate().map(receipt).collect()
}
