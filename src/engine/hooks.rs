//! A job's injections and captures -> rows of the device's tables, and receipts back. Pure
//! functions over plain data.

use std::sync::Arc;

use super::{
    prompts::{RowKey, VectorId},
    sites::{cut, is_below, site_index, site_name, tap, tap_index},
    types::{Condition, Injection, Job, Receipt, Reduce},
};
use crate::{
    error::{Error, Result},
    ops::{
        hooks::{GATES, HookOp},
        rows::NONE,
    },
    request::{Measure, Op, StrengthMode},
};

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
    injection.op != Op::Add || injection.strength != 0.0
}

/// The injections that change something, in their order.
pub fn live(job: &Job) -> impl Iterator<Item = &Injection> {
    job.inject.iter().filter(|injection| is_live(injection))
}

fn is_same_injection(a: &Injection, b: &Injection) -> bool {
    let what = |i: &Injection| {
        let numbers = [i.strength, i.bounds.0, i.bounds.1].map(f32::to_bits);
        (
            (i.site, i.layer, i.head),
            (i.op, i.mode, i.keep_norm, i.by_position),
            (i.from, i.to, i.every),
            numbers,
        )
    };
    let bits = |v: &f32| v.to_bits();
    what(a) == what(b)
        && a.when == b.when
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
pub fn is_clean(tap: usize, position: usize, own: Own, layers: usize) -> bool {
    position < own.start || is_below(tap, own.cut, layers)
}

/// A captured row that is a clean run's: which of the job's captures, and which of its positions.
#[derive(Clone, Debug)]
pub struct CleanRow {
    /// Index into `Job::capture`.
    pub capture: usize,
    /// Index into `Capture::positions`.
    pub index: usize,
    /// The row.
    pub at: RowKey,
}

/// The captured rows that a job takes from its prompt's clean run.
pub fn clean_rows(job: &Job, own: Own, layers: usize) -> impl Iterator<Item = CleanRow> {
    job.capture.iter().enumerate().flat_map(move |(capture, wanted)| {
        let tap = tap_index(wanted, layers);
        let positions = wanted.positions.iter().enumerate();
        positions.filter_map(move |(index, &position)| {
            let tap = tap.filter(|&tap| is_clean(tap, position, own, layers))?;
            let probe = match &wanted.reduce {
                Reduce::Probe(vectors) => Some(VectorId(Arc::clone(vectors))),
                Reduce::Rows | Reduce::Mean => None,
            };
            let at = RowKey { position: position as u32, tap: tap as u32, probe };
            Some(CleanRow { capture, index, at })
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
        own.cut = own.cut.min(cut(injection.site, injection.layer));
        // The rows that a condition looks at are computed, not read.
        let when = injection.when.as_ref().map_or(layers, |when| cut(when.site, when.layer));
        own.cut = own.cut.min(when);
    }
    // Clean runs keep rows of the stream, not what the head makes of them.
    let ends = job.capture.iter().filter(|capture| !capture.site.has_layer());
    let first = ends.filter_map(|capture| capture.positions.first()).min();
    own.start = first.map_or(own.start, |&first| own.start.min(first));
    own
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
        if !injection.site.is_stream() {
            return None;
        }
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

/// What a strength of 1 is: a factor, and whether the row's own norm is one too.
fn size_of(injection: &Injection, clean: Option<CleanNorms>) -> Result<(f64, bool)> {
    Ok(match injection.mode {
        StrengthMode::Raw | StrengthMode::Unit => (1.0, false),
        StrengthMode::Row => {
            let clean = clean.filter(|_| injection.site.is_stream());
            clean.map_or(Ok(()), |clean| clean.check_rows(injection))?;
            (1.0, true)
        }
        StrengthMode::Reference => {
            let n = clean.and_then(|clean| clean.reference(injection)).ok_or_else(|| {
                Error::new("strength_mode reference needs prompt positions in the window")
                    .expected("a window that holds a prompt position other than 0")
                    .got(format!("from {}, to {:?}", injection.from, injection.to))
                    .hint("use strength_mode raw or row for generated tokens only")
            })?;
            (n, false)
        }
    })
}

/// An injection as the device does it.
fn operation(injection: &Injection, clean: Option<CleanNorms>) -> Result<HookOp> {
    let (size, relative) = size_of(injection, clean)?;
    let unit = match norm(&injection.vector) {
        0.0 => 1.0,
        length => 1.0 / length,
    };
    let strength = f64::from(injection.strength);
    let direction = if injection.mode == StrengthMode::Raw { 1.0 } else { unit };
    let bounds = |low: f64, high: f64| ((low * size) as f32, (high * size) as f32);
    let (kind, scale, (low, high)) = match injection.op {
        Op::Add => (HookOp::ADD, strength * size * direction, (0.0, 0.0)),
        Op::Replace => (HookOp::REPLACE, strength * size * direction, (0.0, 0.0)),
        Op::Scale => (HookOp::SCALE, strength, (0.0, 0.0)),
        Op::ProjectOut => (HookOp::COORDINATE, 0.0, (0.0, 0.0)),
        Op::Set => (HookOp::COORDINATE, 0.0, bounds(strength, strength)),
        Op::Clamp => {
            let (low, high) = injection.bounds;
            (HookOp::COORDINATE, 0.0, bounds(f64::from(low), f64::from(high)))
        }
    };
    let mut flags = if relative { HookOp::RELATIVE } else { 0 };
    flags |= if injection.by_position { HookOp::BY_POSITION } else { 0 };
    flags |= if injection.keep_norm { HookOp::KEEP_NORM } else { 0 };
    Ok(HookOp {
        to: end(injection),
        every: injection.every as u32,
        kind,
        flags,
        head: injection.head.unwrap_or(0) as u32,
        low,
        high,
        unit: unit as f32,
        ..HookOp::add(0, injection.from as u32, scale as f32)
    })
}

fn end(injection: &Injection) -> u32 {
    injection.to.map_or(u32::MAX, |to| u32::try_from(to).unwrap_or(u32::MAX))
}

/// What decides a condition, for the rows of an injection's window.
fn gate_of(when: &Condition, injection: &Injection, gate: u32) -> HookOp {
    let is_cosine = when.measure == Measure::Cosine;
    HookOp {
        to: end(injection),
        kind: HookOp::GATE,
        flags: if is_cosine { HookOp::RELATIVE } else { 0 },
        gate,
        low: when.above,
        high: when.below,
        unit: (1.0 / norm(&when.vector)) as f32,
        ..HookOp::add(0, injection.from as u32, 0.0)
    }
}

/// An operation with what the device does not need.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The tap it acts on.
    pub tap: usize,
    /// Which of the job's live injections it comes from.
    pub injection: usize,
    /// Its vector, if it has one: in the bank while the operation may act.
    pub vector: Option<Arc<[f32]>>,
    /// Rows of the bank that it takes.
    pub rows: usize,
    /// For the device, but for the vector's row.
    pub op: HookOp,
}

/// The operations of a job by tap: at each, conditions first, then injections in their order.
pub fn plan(job: &Job, layers: usize, clean: Option<CleanNorms>) -> Result<Vec<Planned>> {
    let (mut gates, mut planned): (Vec<Planned>, Vec<Planned>) = (Vec::new(), Vec::new());
    let injections = job.inject.iter().enumerate().filter(|(_, injection)| is_live(injection));
    for (number, (at, injection)) in injections.enumerate() {
        let mut op = operation(injection, clean).map_err(|e| e.at(format!("inject[{at}]")))?;
        if let Some(when) = &injection.when {
            let gate = Planned {
                tap: tap(when.site, when.layer, layers),
                injection: number,
                vector: Some(Arc::clone(&when.vector)),
                rows: 1,
                op: gate_of(when, injection, gates.len() as u32),
            };
            let same = |other: &&Planned| {
                let vector = other.vector.as_ref().is_some_and(|v| Arc::ptr_eq(v, &when.vector));
                vector
                    && other.tap == gate.tap
                    && HookOp { gate: gate.op.gate, ..other.op } == gate.op
            };
            op.gate = gates.iter().find(same).map_or(gate.op.gate, |other| other.op.gate);
            op.flags |= if when.latch { HookOp::LATCHED } else { 0 };
            if op.gate == gate.op.gate {
                gates.push(gate);
            }
        }
        let vector = (injection.op != Op::Scale).then(|| Arc::clone(&injection.vector));
        planned.push(Planned {
            tap: tap(injection.site, injection.layer, layers),
            injection: number,
            vector,
            rows: vector_rows(injection),
            op,
        });
    }
    if gates.len() > GATES {
        return Err(Error::new("too many conditions in one request")
            .expected(format!("at most {GATES} with their windows"))
            .got(gates.len()));
    }
    gates.append(&mut planned);
    gates.sort_by_key(|p| p.tap);
    Ok(gates)
}

/// The most operations that a job takes.
pub fn operations(job: &Job) -> usize {
    live(job).map(|injection| 1 + usize::from(injection.when.is_some())).sum()
}

/// The most rows of the vector bank that a job takes, in a model of a width.
pub fn bank_rows(job: &Job, dim: usize) -> usize {
    let of = |injection| vector_rows(injection) + usize::from(injection.when.is_some());
    let probes = probes(job).map(|vectors| vectors.len() / dim);
    live(job).map(of).chain(probes).sum()
}

/// The vectors that a job's captured rows are multiplied with, each once.
pub fn probes(job: &Job) -> impl Iterator<Item = &Arc<[f32]>> {
    let of = |at: usize| match &job.capture[at].reduce {
        Reduce::Probe(vectors) if !vectors.is_empty() => Some(vectors),
        _ => None,
    };
    (0..job.capture.len()).filter_map(move |at| {
        let vectors = of(at)?;
        let known = (0..at).filter_map(of).any(|other| Arc::ptr_eq(other, vectors));
        (!known).then_some(vectors)
    })
}

/// Positions of an injection's window, where it has an end.
pub fn window_positions(injection: &Injection) -> Option<usize> {
    let len = injection.to?.saturating_sub(injection.from);
    Some(len.div_ceil(injection.every.max(1)))
}

/// Rows of an injection's vector: one, or one for each position of the window.
fn vector_rows(injection: &Injection) -> usize {
    if injection.by_position { window_positions(injection).unwrap_or(1) } else { 1 }
}

/// ‖v‖, or the mean over the window's.
fn mean_norm(injection: &Injection) -> f64 {
    let rows = vector_rows(injection);
    let width = (injection.vector.len() / rows).max(1);
    injection.vector.chunks_exact(width).map(norm).sum::<f64>() / rows as f64
}

/// What a sequence's operations have seen before its first row, where its conditions were met already.
pub fn tallies(planned: &[Planned], latched: &[u32; GATES]) -> Vec<Tally> {
    let tally = |planned: &Planned| {
        let is_gate = planned.op.kind == HookOp::GATE;
        let first_met = if is_gate { latched[planned.op.gate as usize] } else { NONE };
        Tally { first_met, ..Tally::default() }
    };
    planned.iter().map(tally).collect()
}

/// Where a prompt's rows first met each condition, for its continuations.
pub fn latched(planned: &[Planned], tallies: &[Tally]) -> [u32; GATES] {
    let mut latched = [NONE; GATES];
    for (planned, tally) in planned.iter().zip(tallies) {
        if planned.op.kind == HookOp::GATE {
            latched[planned.op.gate as usize] = tally.first_met;
        }
    }
    latched
}

/// What one sequence saw of one operation, added up in the order of positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tally {
    /// Rows in the window that met the condition, if there is one.
    pub expected: u64,
    /// Rows changed.
    pub touched: u64,
    /// Sum of ‖h‖ before.
    pub before: f64,
    /// Sum of ‖h after − h before‖.
    pub change: f64,
    /// The first position that met a condition, or [`NONE`].
    pub first_met: u32,
}

impl Default for Tally {
    fn default() -> Self {
        Self { expected: 0, touched: 0, before: 0.0, change: 0.0, first_met: NONE }
    }
}

impl Tally {
    /// Adds another sequence's.
    pub fn add(&mut self, other: &Self) {
        self.expected += other.expected;
        self.touched += other.touched;
        self.before += other.before;
        self.change += other.change;
        self.first_met = self.first_met.min(other.first_met);
    }
}

/// Adds what the operations of a row did, `receipts` one each: rows of a sequence in their order.
pub fn tally_row(tallies: &mut [Tally], planned: &[Planned], position: u32, receipts: &[[f32; 2]]) {
    let (mut met, mut first_met) = ([false; GATES], [NONE; GATES]);
    let of = || planned.iter().zip(receipts);
    for ((Planned { op, .. }, receipt), tally) in of().zip(&mut *tallies) {
        if op.kind == HookOp::GATE {
            let gate = op.gate as usize;
            met[gate] = receipt[1] > 0.0; // NaN where the row is not in its window
            if met[gate] {
                tally.first_met = tally.first_met.min(position);
            }
            first_met[gate] = tally.first_met;
        }
    }
    for ((Planned { op, .. }, &[before, change]), tally) in of().zip(tallies) {
        if op.kind == HookOp::GATE {
            continue;
        }
        let is_met = match op.gate {
            NONE => true,
            gate if op.flags & HookOp::LATCHED != 0 => first_met[gate as usize] <= position,
            gate => met[gate as usize],
        };
        tally.expected += u64::from(op.holds(position) && is_met);
        if !before.is_nan() {
            tally.touched += 1;
            tally.before += f64::from(before).sqrt();
            tally.change += f64::from(change).sqrt();
        }
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
        let is_own = |p: &Planned| p.injection == number && p.op.kind != HookOp::GATE;
        let at_tap = planned.iter().position(|p| is_own(p) && is_live(injection));
        let tally = at_tap.map(|p| tallies[p]).unwrap_or_default();
        let mean = |sum: f64| (tally.touched > 0).then(|| (sum / tally.touched as f64) as f32);
        let (s, length) = (f64::from(injection.strength.abs()), mean_norm(injection));
        let reference = references[at];
        let before = mean(tally.before);
        let change = match injection.mode {
            _ if injection.op != Op::Add || injection.keep_norm => None,
            StrengthMode::Raw => Some((s * length) as f32),
            StrengthMode::Unit => Some(s as f32),
            StrengthMode::Reference => reference.map(|n| (s * n) as f32),
            StrengthMode::Row => before.map(|before| (s * f64::from(before)) as f32),
        };
        Receipt {
            site: site_name(injection),
            op: injection.op,
            strength: injection.strength,
            mode: injection.mode,
            from: injection.from,
            to: injection.to,
            every: injection.every,
            vector_norm: length as f32,
            reference_norm: reference.map(|n| n as f32),
            norm_before: before,
            planned: if is_live(injection) { change } else { Some(0.0) },
            measured: if is_live(injection) { mean(tally.change) } else { Some(0.0) },
            rows_expected: tally.expected,
            rows_touched: tally.touched,
        }
    };
    job.inject.iter().enumerate().map(receipt).collect()
}
