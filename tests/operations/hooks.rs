//! Operations on the stream and on what is added to it: random mixtures of every kind, window and
//! condition, each row against the operations applied one by one in f64.

use inkling::{
    device::{Buffer, Device},
    ops::{
        hooks::{CapturePlan, GATES, HookOp, Hooks, tap_count},
        residual_norm::{Receipt, ResidualNorm, residual_norm},
        rows::{NONE, RowList, Rows},
    },
};

use super::{
    reference::ops::{add, dot, norm},
    tools::{
        Numbers, U, close, nan_activations, nans, on_every_device, read, read_u32, upload, widen,
    },
};

const LAYERS: usize = 2;
const SLOTS: usize = 4;
const VECTORS: usize = 5;
const OPS: usize = 12;
/// The sites that are run, one after the other: what the first decides holds at the second.
const SITES: [usize; 2] = [1, 2];

/// Rows of four sequences, some at once, in no order; the last slot has no operations.
const ROWS: usize = 17;

struct Case {
    dim: usize,
    slot: Vec<u32>,
    position: Vec<u32>,
    resid: Vec<f32>,
    branch: Vec<f32>,
    /// (VECTORS, dim)
    vectors: Vec<f32>,
    /// By slot, by tap.
    ops: Vec<Vec<(usize, HookOp)>>,
}

/// A row as it should be: h, ‖h‖² and ‖change‖² of each operation that acts (value and outcome of a
/// condition), and how much was ever in it.
struct Row {
    h: Vec<f64>,
    receipts: Vec<Option<[f64; 2]>>,
    size: f64,
}

impl Case {
    fn new(dim: usize, seed: u64) -> Self {
        let mut numbers = Numbers::new(seed * 1000 + dim as u64);
        let mut pick = |below: usize| (numbers.draw().abs() * 977.0) as usize % below;
        let slot: Vec<u32> = (0..ROWS).map(|row| (row % SLOTS) as u32).collect();
        // A sequence's positions follow each other in another order than its rows.
        let position = (0..ROWS).map(|row| (row / SLOTS * 3 % 5 + 2) as u32).collect();
        let mut ops = Vec::new();
        for slot in 0..SLOTS {
            let gates = [0, 1, 2][pick(3)];
            let mut all: Vec<(usize, HookOp)> = Vec::new();
            for gate in 0..gates {
                let (low, high) = [(-0.1, f32::INFINITY), (f32::NEG_INFINITY, 0.05)][pick(2)];
                let decides = HookOp {
                    kind: HookOp::GATE,
                    flags: [0, HookOp::RELATIVE][pick(2)],
                    gate: gate as u32,
                    low,
                    high,
                    to: [4, u32::MAX][pick(2)],
                    ..HookOp::add(pick(VECTORS) as u32, 0, 0.0)
                };
                // What is decided first can hold at both sites.
                all.push((2 * SITES[0] + pick(2), decides));
            }
            for _ in 0..if slot + 1 == SLOTS { 0 } else { OPS - gates } {
                let kind =
                    [HookOp::ADD, HookOp::COORDINATE, HookOp::REPLACE, HookOp::SCALE][pick(4)];
                let mut flags = [0, HookOp::RELATIVE][pick(2)] | [0, HookOp::KEEP_NORM][pick(2)];
                if kind == HookOp::SCALE {
                    flags &= !HookOp::RELATIVE;
                }
                let tap = 2 * SITES[pick(2)] + pick(2);
                // At the site of the conditions a row's own outcome is known once they are decided,
                // the sequence's at later sites.
                let is_later = tap / 2 == SITES[1];
                let gate =
                    if gates > 0 && is_later && pick(2) == 0 { pick(gates) as u32 } else { NONE };
                flags |= if gate != NONE && pick(2) == 0 { HookOp::LATCHED } else { 0 };
                let low = [-0.3, 0.0, f32::NEG_INFINITY][pick(3)];
                let op = HookOp {
                    kind,
                    flags,
                    gate,
                    to: [4, 5, u32::MAX][pick(3)],
                    every: [1, 1, 2, 3][pick(4)],
                    low,
                    high: [low.max(0.0), 0.25, f32::INFINITY][pick(3)],
                    ..HookOp::add(pick(VECTORS) as u32, pick(4) as u32, [0.5, -1.5, 0.1][pick(3)])
                };
                all.push((tap, op));
            }
            all.sort_by_key(|(tap, _)| *tap);
            ops.push(all);
        }
        let vectors = numbers.list(VECTORS * dim);
        for (_, op) in ops.iter_mut().flatten() {
            op.unit = (1.0 / norm(&widen(&vectors[op.vector as usize * dim..][..dim]))) as f32;
        }
        let (resid, branch) = (numbers.list(ROWS * dim), numbers.list(ROWS * dim));
        Self { dim, slot, position, resid, branch, vectors, ops }
    }

    /// resid, captured branches of the last site, receipts, conditions met, latched positions.
    fn run(&self, device: &Device) -> Vec<Vec<f32>> {
        let dim = self.dim;
        let mut hooks = Hooks::new(device, (LAYERS, dim), SLOTS, OPS, VECTORS).unwrap();
        hooks.vectors.write(0, &self.vectors).unwrap();
        for (slot, ops) in self.ops.iter().enumerate() {
            hooks.set(slot, ops, &[NONE; GATES]).unwrap();
        }
        let receipt = self.slot.iter().enumerate().map(|(row, &slot)| {
            let any = !self.ops[slot as usize].is_empty();
            if any { (row * OPS) as i32 } else { -1 }
        });
        let list = RowList {
            slot: self.slot.clone(),
            position: self.position.clone(),
            receipt: receipt.collect(),
        };
        let at = Rows::upload(device, &list).unwrap();
        let mut captures = CapturePlan::new(device, tap_count(LAYERS), ROWS).unwrap();
        let branches = (0..ROWS as u32).map(|row| (2 * SITES[1] as u32 + 1, row, row));
        captures.set(&branches.collect::<Vec<_>>()).unwrap();
        let mut captured: Buffer<f32> = nans(device, ROWS * dim);
        let mut resid = upload::<f32>(device, &self.resid, 0);
        let branch = upload::<f32>(device, &self.branch, 0);
        let gain = upload::<f32>(device, &vec![1.0; dim], 0);
        let mut norms: Buffer<f32> = nans(device, 2 * ROWS);
        let unset: Vec<Receipt> = vec![[f32::NAN; 2]; ROWS * OPS];
        let mut receipts = Buffer::upload(device, &unset).unwrap();
        // What rows of the step before have met.
        let mut met = Buffer::upload(device, &[u32::MAX; ROWS]).unwrap();
        let mut x = nan_activations(device, ROWS, dim);
        for (at_norms, site) in SITES.into_iter().enumerate() {
            let operands = ResidualNorm::<half::bf16> {
                rows: ROWS,
                branch_rows: ROWS,
                resid: &mut resid,
                branch: &branch,
                hooks: &mut hooks,
                met: &mut met,
                at: &at,
                site,
                captures: &captures,
                captured: &mut captured,
                norms: &mut norms,
                norms_at: at_norms * ROWS,
                receipts: &mut receipts,
                branch_gain: None,
                branch_scale: 1.0,
                gain: Some(&gain),
                eps: 1e-5,
                is_final: false,
                x: &mut x,
            };
            residual_norm(device, operands).unwrap();
        }
        let mut read_receipts = unset;
        receipts.read(0, &mut read_receipts).unwrap();
        let met: Vec<f32> = read_u32(&met).into_iter().map(|bits| bits as f32).collect();
        vec![read(&resid), read(&captured), read_receipts.concat(), met, read(&norms)]
    }

    fn vector(&self, op: &HookOp) -> Vec<f64> {
        widen(&self.vectors[op.vector as usize * self.dim..][..self.dim])
    }

    /// The rows by definition; `None` where a condition's value is so near to its bounds that it may go
    /// either way, or rounding would be scaled up.
    fn want(&self, near: f64) -> Option<Vec<(Row, Vec<f64>)>> {
        let mut latched = [[NONE; GATES]; SLOTS];
        let part = |values: &[f32], row: usize| widen(&values[row * self.dim..][..self.dim]);
        let row = |row| Row { h: part(&self.resid, row), receipts: vec![None; OPS], size: 0.0 };
        let mut rows: Vec<(Row, Vec<f64>)> = (0..ROWS).map(|at| (row(at), Vec::new())).collect();
        let mut met = [[false; GATES]; ROWS];
        for site in SITES {
            let mut now = latched;
            for at in 0..ROWS {
                let (slot, position) = (self.slot[at] as usize, self.position[at]);
                let mut branch = Row { h: part(&self.branch, at), ..row(at) };
                branch.receipts.clone_from(&rows[at].0.receipts);
                for of_branch in [true, false] {
                    let state = if of_branch { &mut branch } else { &mut rows[at].0 };
                    for (ordinal, (tap, op)) in self.ops[slot].iter().enumerate() {
                        if *tap != 2 * site + usize::from(of_branch) {
                            continue;
                        }
                        let met = &mut met[at];
                        if op.kind == HookOp::GATE {
                            let gate = op.gate as usize;
                            met[gate] = false;
                            if op.holds(position) {
                                let value = self.value(op, &state.h);
                                let margin = (value - f64::from(op.low)).abs();
                                if margin.min((value - f64::from(op.high)).abs()) < near {
                                    return None;
                                }
                                met[gate] = f64::from(op.low) < value && value < f64::from(op.high);
                                if met[gate] {
                                    now[slot][gate] = now[slot][gate].min(position);
                                }
                                state.receipts[ordinal] =
                                    Some([value, f64::from(u8::from(met[gate]))]);
                            }
                            continue;
                        }
                        let is_met = op.gate == NONE
                            || if op.flags & HookOp::LATCHED == 0 {
                                met[op.gate as usize]
                            } else {
                                latched[slot][op.gate as usize] <= position
                            };
                        if op.holds(position) && is_met {
                            let receipt = self.apply(op, &mut state.h)?;
                            state.receipts[ordinal] = Some(receipt);
                        }
                        state.size = state.size.max(norm(&state.h));
                    }
                    if of_branch {
                        rows[at].0.receipts.clone_from(&branch.receipts);
                        add(&mut rows[at].0.h, &branch.h);
                        let size = branch.size + norm(&branch.h) + norm(&rows[at].0.h);
                        rows[at].0.size = rows[at].0.size.max(size);
                        rows[at].1.clone_from(&branch.h);
                    }
                }
            }
            latched = now;
        }
        Some(rows)
    }

    fn value(&self, op: &HookOp, h: &[f64]) -> f64 {
        let v = self.vector(op);
        let coordinate = dot(h, &v) / norm(&v);
        if op.flags & HookOp::RELATIVE != 0 { coordinate / norm(h) } else { coordinate }
    }

    /// The documentation of [`HookOp`].
    fn apply(&self, op: &HookOp, h: &mut [f64]) -> Option<[f64; 2]> {
        let (v, before) = (self.vector(op), h.to_vec());
        let length = norm(&before);
        let r = if op.flags & HookOp::RELATIVE != 0 { length } else { 1.0 };
        let scale = f64::from(op.scale);
        let moved = |h: &mut [f64], by: f64| h.iter_mut().zip(&v).for_each(|(h, v)| *h += by * v);
        match op.kind {
            HookOp::ADD => moved(h, scale * r),
            HookOp::COORDINATE => {
                let c = dot(h, &v) / norm(&v);
                let to = c.max(f64::from(op.low) * r).min(f64::from(op.high) * r);
                moved(h, (to - c) / norm(&v));
            }
            HookOp::REPLACE => h.iter_mut().zip(&v).for_each(|(h, v)| *h = scale * r * v),
            _ => h.iter_mut().for_each(|h| *h *= scale),
        }
        if op.flags & HookOp::KEEP_NORM != 0 {
            if norm(h) < 0.01 * length {
                return None;
            }
            let factor = length / norm(h);
            h.iter_mut().for_each(|h| *h *= factor);
        }
        let change: Vec<f64> = h.iter().zip(&before).map(|(h, before)| h - before).collect();
        Some([length * length, norm(&change).powi(2)])
    }

    /// Gives whether the case says anything.
    fn check(&self) -> bool {
        // Each operation rounds sums of `dim` products and their roots, and applies them; errors of
        // one are carried through the others.
        let unit = 4.0 * (OPS * (self.dim + 16)) as f64 * U;
        let Some(want) = self.want(unit) else { return false };
        for (device, outputs) in on_every_device::<half::bf16>(0, |device| self.run(device)) {
            let [resid, branches, receipts, _, norms] = &outputs[..] else { panic!("outputs") };
            for (at, (row, branch)) in want.iter().enumerate() {
                let what = format!("{device} dim {} row {at}", self.dim);
                let tolerance = unit * (1.0 + row.size);
                let part = |values: &[f32]| values[at * self.dim..][..self.dim].to_vec();
                for (got, want) in part(resid).into_iter().zip(&row.h) {
                    close(&what, got, *want, tolerance);
                }
                for (got, want) in part(branches).into_iter().zip(branch) {
                    close(&format!("{what} branch"), got, *want, tolerance);
                }
                close(&format!("{what} norm"), norms[ROWS + at], norm(&row.h), tolerance);
                for (ordinal, want) in row.receipts.iter().enumerate() {
                    let got = &receipts[2 * (at * OPS + ordinal)..][..2];
                    let Some(want) = want else {
                        assert!(got[0].is_nan() && got[1].is_nan(), "{what} operation {ordinal}");
                        continue;
                    };
                    let tolerance = tolerance * (2.0 + 2.0 * row.size);
                    close(&format!("{what} operation {ordinal}"), got[0], want[0], tolerance);
                    close(&format!("{what} operation {ordinal}"), got[1], want[1], tolerance);
                }
            }
        }
        true
    }
}

#[test]
fn mixtures_of_operations_are_applied_one_by_one() {
    for dim in [16, 264, 1032, 2056] {
        let cases = if dim == 16 { 60 } else { 4 };
        let said = (0..cases).filter(|&seed| Case::new(dim, seed).check()).count();
        assert!(2 * said >= cases as usize, "dim {dim}: {said} of {cases} are not near a bound");
    }
}
