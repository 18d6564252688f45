//! The residual stream: `enter`, `residual_norm` and `select_rows`.

use half::bf16;
use inkling::{
    device::{Buffer, Device},
    ops::{
        enter::{Enter, enter},
        hooks::{CapturePlan, GATES, HookOp, Hooks, tap_count},
        matmul::Weight,
        residual_norm::{Receipt, ResidualNorm, residual_norm},
        rows::{NONE, RowList, Rows, Source, Sources},
        select_rows::select_rows,
    },
};

use crate::{
    reference::ops::{Change, Mode, add, norm, rms_norm},
    tools::{Numbers, Stored, U, activations, all_nan, close, first_difference, nan_activations},
    tools::{nans, on_every_device, on_every_isa, read, read_rows, sizes, upload, widen},
};

#[test]
fn enter_copies_embeddings_and_cached_rows() {
    check_enter::<f32>(19);
    check_enter::<bf16>(19);
    check_enter::<bf16>(72);
}

/// Of embeddings.
const SCALE: f32 = 1.7;

fn check_enter<T: Stored>(dim: usize) {
    let (vocab, first) = (75, 2);
    let mut numbers = Numbers::new(1);
    let embedding = numbers.with_outliers(vocab * dim, 1000.0);
    let cached = numbers.with_outliers(4 * dim, 1000.0);
    // Slot 2 could draw nothing.
    let last = [70, 3, NONE];
    // More than one task of 16 rows.
    let sources: Vec<Source> = (0..20)
        .map(|i| match i % 4 {
            2 => Source::Cached(i / 4 % 4),
            3 => Source::Drawn(i % 3),
            _ if i == 8 => Source::Nothing,
            _ => Source::Token(i * 7 % vocab as u32),
        })
        .collect();
    let rows = first + sources.len();
    let run = |device: &Device| {
        let read_row = |row: usize, out: &mut [f32]| {
            out.copy_from_slice(&embedding[row * dim..][..dim]);
        };
        let weight = Weight::pack(device, T::DTYPE, (vocab, dim), read_row).unwrap();
        let cached = upload::<f32>(device, &cached, 0);
        let mut resid = nans(device, (rows + 1) * dim);
        let mut all = Sources::new(device, rows).unwrap();
        all.set(&[&[Source::Token(0); 2][..], &sources].concat()).unwrap();
        let last = Buffer::upload(device, &last).unwrap();
        let (count, embedding, resid_mut) = (sources.len(), &weight, &mut resid);
        let (sources, cached, last) = (&all, &cached, &last);
        let (scale, resid) = (SCALE, resid_mut);
        let operands = Enter { first, count, sources, embedding, scale, cached, last, resid };
        enter(device, operands).unwrap();
        vec![read(resid)]
    };
    let outputs = match dim % 8 {
        0 => on_every_device::<T>(0, run),
        _ => vec![("cpu".into(), on_every_isa(0, run))],
    };
    for (device, outputs) in outputs {
        let resid: Vec<&[f32]> = outputs[0].chunks_exact(dim).collect();
        assert!(all_nan(resid[0]) && all_nan(resid[1]) && all_nan(resid[rows]), "{device}");
        for (row, source) in resid[first..rows].iter().zip(&sources) {
            let embed = |id: u32| -> Vec<f64> {
                let id = (id as usize).min(vocab - 1);
                let stored = embedding[id * dim..][..dim].iter().map(|&v| T::nearest(v));
                // The product of two f32s is exact in f64, and rounded once.
                stored.map(|v| f64::from((v * f64::from(SCALE)) as f32)).collect()
            };
            let want: Vec<f64> = match *source {
                Source::Token(id) => embed(id),
                Source::Drawn(slot) => embed(last[slot as usize]),
                Source::Cached(from) => widen(&cached[from as usize * dim..][..dim]),
                Source::Nothing => {
                    assert!(all_nan(row), "{device}: a row of nothing");
                    continue;
                }
            };
            assert_eq!(widen(row), want, "{device}: {source:?}");
        }
    }
}

#[test]
fn select_rows_copies_rows() {
    for dim in [24, 136] {
        let x = Numbers::new(2).with_outliers(20 * dim, 1000.0);
        let rows = [6, 0, NONE, 3, 3, 19, 8, 17, 16, 9];
        let outputs = on_every_device::<bf16>(0, |device| {
            let mut out = nan_activations::<bf16>(device, 11, dim);
            let rows = Buffer::upload(device, &rows).unwrap();
            select_rows(device, 10, &rows, &activations::<bf16>(device, dim, &x), &mut out)
                .unwrap();
            vec![read_rows(&out)]
        });
        for (device, outputs) in outputs {
            for (row, from) in outputs[0].chunks_exact(dim).zip(rows) {
                if from == NONE {
                    assert!(all_nan(row), "{device}");
                    continue;
                }
                let from = &x[from as usize * dim..][..dim];
                let want: Vec<f64> = from.iter().map(|&v| bf16::nearest(v)).collect();
                assert_eq!(widen(row), want, "{device}");
            }
            assert!(all_nan(&outputs[0][10 * dim..]), "{device}");
        }
    }
}

/// Two blocks: sites 0..=4, of which 3 is in the middle of block 1 and 4 after it.
const LAYERS: usize = 2;
const ROWS: usize = 7;
const EPS: f32 = 1e-5;
const SLOT: [u32; ROWS] = [0, 0, 0, 0, 1, 1, 2];
const POSITION: [u32; ROWS] = [3, 4, 5, 9, 0, 7, 2];
/// Slot 0 has five operations, slot 1 two, slot 2 none.
const RECEIPT: [i32; ROWS] = [0, 5, 10, 15, 20, 22, -1];
const RECEIPTS: usize = 24;
/// Of the row that does nothing.
const UNTOUCHED: f32 = 7.0;
/// Rows of the captures' destination.
const CAPTURED: usize = 9;

/// The operations of a slot: overlapping windows, two and three at a site, an unbounded one, one of
/// a single position, and one at a site that is not run.
fn ops(slot: u32) -> Vec<(usize, HookOp)> {
    let add = |vector, from, to, scale| HookOp { to, ..HookOp::add(vector, from, scale) };
    let relative = |vector, from, scale| HookOp {
        flags: HookOp::RELATIVE,
        ..add(vector, from, u32::MAX, scale)
    };
    match slot {
        0 => vec![
            (0, add(0, 0, 100, 1.0)),
            (3, add(0, 3, 5, 2.0)),
            (3, add(1, 4, 10, -0.5)),
            (3, relative(2, 5, 0.25)),
            (4, add(1, 4, 5, 3.0)),
        ],
        1 => vec![(3, relative(2, 0, 0.5)), (4, add(0, 7, 8, 1.0))],
        _ => Vec::new(),
    }
}

/// (tap, row, destination): at each site rows 0, 2 (twice) and 6 of the stream and rows 1 and 2 of
/// the branch, and after the last site rows 3 and 6 of the final norm. Row 8 is another site's.
fn captures(site: usize) -> Vec<(u32, u32, u32)> {
    let tap = 2 * site as u32;
    let mut wanted = vec![(0, 1, 8), (tap + 1, 1, 4), (tap, 2, 1), (tap, 0, 0)];
    wanted.extend([(tap, 2, 2), (tap, 6, 3), (tap + 1, 2, 5)]);
    wanted.extend([(tap + 2, 3, 6), (tap + 2, 6, 7)]);
    wanted
}

/// One call.
struct Case {
    dim: usize,
    site: usize,
    branch_rows: usize,
    resid: Vec<f32>,
    branch: Vec<f32>,
    /// (3, dim)
    vectors: Vec<f32>,
    gain: Vec<f32>,
    norms: Norms,
    /// Of the branch's norm.
    branch_gain: Vec<f32>,
    branch_scale: f32,
}

/// What is normalised beside nothing else: x, what is added, or both.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Norms {
    Before,
    After,
    Around,
}

/// A row by its definition, and how far f32 may be from it.
struct Want {
    h: Vec<f64>,
    /// Of each element of h.
    error: Vec<f64>,
    /// Of each operation that acts: its ordinal, ‖h‖ before and its tolerance, ‖change‖ and its.
    receipts: Vec<(usize, [f64; 4])>,
}

impl Case {
    fn new(dim: usize, site: usize, branch_rows: usize) -> Self {
        let mut numbers = Numbers::new((dim * 100 + site * 10 + branch_rows) as u64);
        Self {
            dim,
            site,
            branch_rows,
            resid: numbers.with_outliers(ROWS * dim, 1000.0),
            branch: numbers.with_outliers(ROWS * dim, 1000.0),
            vectors: numbers.with_outliers(3 * dim, 1000.0),
            gain: numbers.with_outliers(dim, 1000.0),
            norms: Norms::Before,
            branch_gain: numbers.with_outliers(dim, 1000.0),
            branch_scale: 1.0,
        }
    }

    fn with(self, norms: Norms, branch_scale: f32) -> Self {
        Self { norms, branch_scale, ..self }
    }

    /// What is added to a row by its branch, and how far f32 may be from it, relatively.
    fn added(&self, row: usize) -> (Vec<f64>, f64) {
        let mut branch = widen(&self.branch[row * self.dim..][..self.dim]);
        let mut relative = if self.branch_scale == 1.0 { 0.0 } else { U };
        if self.norms != Norms::Before {
            branch = rms_norm(&branch, &widen(&self.branch_gain), f64::from(EPS));
            // A sum of `dim` squares, a root, a quotient, and three products.
            relative = (self.dim + 8) as f64 * U;
        }
        branch.iter_mut().for_each(|v| *v *= f64::from(self.branch_scale));
        (branch, relative)
    }

    fn is_final(&self) -> bool {
        self.site == 2 * LAYERS
    }

    /// resid, x, captured rows, norms, receipts.
    fn run<T: Stored>(&self, device: &Device) -> Vec<Vec<f32>> {
        let dim = self.dim;
        let mut hooks = Hooks::new(device, (LAYERS, dim), 3, 5, 3).unwrap();
        hooks.vectors.write(0, &self.vectors).unwrap();
        for slot in 0..3 {
            let ops: Vec<_> = ops(slot).into_iter().map(|(site, op)| (2 * site, op)).collect();
            hooks.set(slot as usize, &ops, &[NONE; GATES]).unwrap();
        }
        let mut met = Buffer::upload(device, &[0; ROWS + 1]).unwrap();
        let mut plan = CapturePlan::new(device, tap_count(LAYERS), 16).unwrap();
        plan.set(&captures(self.site)).unwrap();
        // A row that does nothing stands behind the others.
        let slot = [&SLOT[..], &[NONE]].concat();
        let position = [&POSITION[..], &[0]].concat();
        let receipt = [&RECEIPT[..], &[-1]].concat();
        let at = Rows::upload(device, &RowList { slot, position, receipt }).unwrap();
        let mut branch = self.branch.clone();
        branch[self.branch_rows * dim..].fill(f32::NAN);
        // The row that does nothing would show it if it did something.
        branch.extend(vec![1.0; dim]);
        let branch = upload::<f32>(device, &branch, 0);
        let gain = upload::<f32>(device, &self.gain, 0);
        let branch_gain = upload::<f32>(device, &self.branch_gain, 0);
        let stream = [&self.resid[..], &vec![UNTOUCHED; dim]].concat();
        let mut resid = upload::<f32>(device, &stream, 0);
        let mut captured: Buffer<f32> = nans(device, CAPTURED * dim);
        let mut norms: Buffer<f32> = nans(device, ROWS + 4);
        let unset: Vec<Receipt> = vec![[f32::NAN; 2]; RECEIPTS];
        let mut receipts = Buffer::upload(device, &unset).unwrap();
        let mut x = nan_activations::<T>(device, ROWS + 1, dim);
        let all_branches = self.branch_rows == ROWS;
        let operands = ResidualNorm {
            rows: ROWS + 1,
            branch_rows: self.branch_rows + usize::from(all_branches),
            resid: &mut resid,
            branch: &branch,
            hooks: &mut hooks,
            met: &mut met,
            at: &at,
            site: self.site,
            captures: &plan,
            captured: &mut captured,
            norms: &mut norms,
            norms_at: 3,
            receipts: &mut receipts,
            branch_gain: (self.norms != Norms::Before).then_some(&branch_gain),
            branch_scale: self.branch_scale,
            gain: (self.norms != Norms::After).then_some(&gain),
            eps: EPS,
            is_final: self.is_final(),
            x: &mut x,
        };
        residual_norm(device, operands).unwrap();
        let mut read_receipts = unset;
        receipts.read(0, &mut read_receipts).unwrap();
        let norms = read(&norms);
        assert!(all_nan(&norms[..3]), "norms of another site");
        let outputs = [read(&resid), read_rows(&x), read(&captured), norms[3..].to_vec()];
        outputs.into_iter().chain([read_receipts.concat()]).collect()
    }

    fn want(&self, row: usize) -> Want {
        let part = |values: &[f32], row: usize| widen(&values[row * self.dim..][..self.dim]);
        // Norms: a sum of `dim` squares, a root, and their use.
        let norm_error = (self.dim + 8) as f64 * U;
        let mut h = part(&self.resid, row);
        let mut size = sizes(&h);
        let mut error = vec![0.0; self.dim];
        let mut grow = |change: &[f64], relative: f64| {
            for ((error, size), change) in error.iter_mut().zip(&mut size).zip(change) {
                *size += change.abs();
                *error += U * *size + relative * change.abs();
            }
            error.clone()
        };
        let mut errors = grow(&vec![0.0; self.dim], 0.0);
        if row < self.branch_rows {
            let (branch, relative) = self.added(row);
            add(&mut h, &branch);
            errors = grow(&branch, relative);
        }
        let mut receipts = Vec::new();
        for (ordinal, (site, op)) in ops(SLOT[row]).into_iter().enumerate() {
            if site != self.site || !(op.from..op.to).contains(&POSITION[row]) {
                continue;
            }
            let vector = part(&self.vectors, op.vector as usize);
            let scale = f64::from(op.scale);
            let (strength, mode, relative) = if op.flags == HookOp::RELATIVE {
                let inherited = norm(&errors) / norm(&h);
                (scale * norm(&vector), Mode::Row, norm_error + inherited)
            } else {
                (scale, Mode::Raw, 0.0)
            };
            let before = h.clone();
            Change { vector, strength, mode }.apply(&mut h);
            let change: Vec<f64> = h.iter().zip(&before).map(|(h, before)| h - before).collect();
            let before_error = norm(&errors) + norm_error * norm(&before);
            errors = grow(&change, relative);
            let change_error = norm(&errors) + 4.0 * U * norm(&change);
            receipts.push((ordinal, [norm(&before), before_error, norm(&change), change_error]));
        }
        Want { h, error: errors, receipts }
    }

    fn check<T: Stored>(&self) {
        let dim = self.dim;
        let run = |device: &Device| self.run::<T>(device);
        let outputs = match dim % 8 {
            0 => on_every_device::<T>(0, run),
            _ => vec![("cpu".into(), on_every_isa(0, run))],
        };
        outputs.iter().for_each(|(device, outputs)| self.check_outputs::<T>(device, outputs));
    }

    fn check_outputs<T: Stored>(&self, device: &str, outputs: &[Vec<f32>]) {
        let dim = self.dim;
        let [resid, x, captured, norms, receipts] = outputs else { panic!("five outputs") };
        let (site, around, branches) = (self.site, self.norms, self.branch_rows);
        let case = format!("{device} dim {dim} site {site} branches {branches} {around:?}");
        let captured: Vec<&[f32]> = captured.chunks_exact(dim).collect();
        let mut seen = vec![false; RECEIPTS];
        for (row, &got) in norms[..ROWS].iter().enumerate() {
            let what = format!("{case} row {row}");
            let want = self.want(row);
            let h = &resid[row * dim..][..dim];
            for ((&h, &want), error) in h.iter().zip(&want.h).zip(&want.error) {
                close(&what, h, want, 1.01 * error);
            }
            let length = norm(&want.h);
            let inherited = norm(&want.error);
            let norm_error = inherited + (dim + 8) as f64 * U * length;
            close(&what, got, length, 1.01 * norm_error);
            self.check_norm(&what, &want, &x[row * dim..][..dim], T::ROUNDOFF);
            for (ordinal, [before, before_error, change, change_error]) in &want.receipts {
                let at = RECEIPT[row] as usize + ordinal;
                close(&what, receipts[2 * at].sqrt(), *before, 1.01 * before_error);
                close(&what, receipts[2 * at + 1].sqrt(), *change, 1.01 * change_error);
                seen[at] = true;
            }
        }
        for (receipt, seen) in receipts.chunks_exact(2).zip(&seen) {
            assert!(*seen || all_nan(receipt), "{case}: an operation that does not act here");
        }
        assert!(resid[ROWS * dim..].iter().all(|v| *v == UNTOUCHED), "{case}: beyond");
        assert!(all_nan(&x[ROWS * dim..]), "{case}: beyond");
        assert!(norms[ROWS].is_nan(), "{case}: beyond");
        self.check_captures(&case, resid, &captured);
    }

    /// x = h / √(mean h² + eps) · gain.
    fn check_norm(&self, what: &str, want: &Want, x: &[f32], roundoff: f64) {
        if self.norms == Norms::After {
            for ((&x, &h), error) in x.iter().zip(&want.h).zip(&want.error) {
                close(&what, x, h, 1.01 * error + roundoff * (h.abs() + error));
            }
            return;
        }
        let (dim, length) = (self.dim as f64, norm(&want.h));
        let inverse = 1.0 / (length * length / dim + f64::from(EPS)).sqrt();
        let relative = norm(&want.error) / length + (dim + 8.0) * U + roundoff;
        let gain = widen(&self.gain);
        let normed = rms_norm(&want.h, &gain, f64::from(EPS));
        for (((&x, &normed), gain), error) in x.iter().zip(&normed).zip(&gain).zip(&want.error) {
            let tolerance = inverse * gain.abs() * error + relative * normed.abs();
            close(&what, x, normed, 1.01 * tolerance);
        }
    }

    /// What is copied out is what is there, bit for bit; the final norm is not rounded.
    fn check_captures(&self, case: &str, resid: &[f32], captured: &[&[f32]]) {
        let dim = self.dim;
        for (to, row) in [(0, 0), (1, 2), (2, 2), (3, 6)] {
            let stream = &resid[row * dim..][..dim];
            assert_eq!(first_difference(captured[to], stream), None, "{case}: stream row {row}");
        }
        for (to, row) in [(4, 1), (5, 2)] {
            let (want, relative) = self.added(row);
            for (&got, want) in captured[to].iter().zip(want) {
                let what = format!("{case}: branch row {row}");
                close(&what, got, want, 1.01 * relative * want.abs());
            }
        }
        for (to, row) in [(6, 3), (7, 6)] {
            if self.is_final() {
                let what = format!("{case} final norm of row {row}");
                self.check_norm(&what, &self.want(row), captured[to], 0.0);
            } else {
                assert!(all_nan(captured[to]), "{case}: another site's capture");
            }
        }
        assert!(all_nan(captured[8]), "{case}: another site's capture");
    }
}

#[test]
fn residual_norm_adds_injects_copies_and_normalises() {
    // The kernels take multiples of 8, with other threads from 264, 1032, 2056 and so on.
    for dim in [1, 15, 16, 17, 80, 100, 264, 576, 1032, 2056, 4104, 8200] {
        // Site 1 has no operations; rows without a branch are those that enter here.
        for (site, branch_rows) in [(1, ROWS), (3, ROWS), (3, 5), (4, ROWS), (4, 3)] {
            let case = Case::new(dim, site, branch_rows);
            case.check::<f32>();
            case.check::<bf16>();
        }
    }
}

/// Norms of what is added, beside or instead of x's, and a scale.
#[test]
fn residual_norm_normalises_and_scales_branches() {
    for dim in [16, 80, 100, 264, 1032, 2056, 4104, 8200] {
        for (site, branch_rows) in [(3, ROWS), (3, 5), (4, 3)] {
            for (norms, scale) in
                [(Norms::Around, 1.0), (Norms::After, 0.22), (Norms::Before, 0.22)]
            {
                let case = Case::new(dim, site, branch_rows).with(norms, scale);
                case.check::<f32>();
                case.check::<bf16>();
            }
        }
    }
}

/// An injection of strength s moves a row by exactly fl(h + s·v), whatever else is in the batch.
#[test]
fn a_row_of_residual_norm_is_one_rounding_from_exact() {
    let case = Case::new(80, 4, 0);
    // Row 1 is at position 4, where vector 1 acts with scale 3; row 0 is left alone.
    let (h, v) = (&case.resid[80..160], &case.vectors[80..160]);
    let want: Vec<f32> = h.iter().zip(v).map(|(h, v)| 3.0f32.mul_add(*v, *h)).collect();
    for (device, outputs) in on_every_device::<bf16>(0, |device| case.run::<bf16>(device)) {
        assert_eq!(first_difference(&outputs[0][80..160], &want), None, "{device}");
        assert_eq!(first_difference(&outputs[0][..80], &case.resid[..80]), None, "{device}");
    }
}
