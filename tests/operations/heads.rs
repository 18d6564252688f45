//! Operations on outputs of heads, and captures of queries, keys, values and outputs, each against what
//! was put in and the operations applied one by one in f64.

use half::bf16;
use inkling::{
    device::{Buffer, Device},
    ops::{
        Float,
        activations::Activations,
        heads::{Heads, heads},
        hooks::{CapturePlan, GATES, HeadTap, HookOp, Hooks, head_tap, tap_count},
        residual_norm::Receipt,
        rows::{NONE, RowList, Rows},
    },
};

use super::{
    reference::ops::{dot, norm},
    tools::{Numbers, U, close, on_every_device, read, upload, widen},
};

const LAYERS: usize = 3;
const LAYER: usize = 1;
const SLOTS: usize = 3;
const ROWS: usize = 11;
const OPS: usize = 8;
const BANK: usize = 9;

struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dim: usize,
    slot: Vec<u32>,
    qkv: Vec<f32>,
    attn: Vec<f32>,
    vectors: Vec<f32>,
    ops: Vec<Vec<HookOp>>,
}

/// Where a row's head is captured: the tap, the row, the destination's first row.
fn captures(dim: usize, widths: [usize; 4]) -> Vec<(u32, u32, u32)> {
    let taps = [HeadTap::Query, HeadTap::Key, HeadTap::Value, HeadTap::Output];
    let mut all = Vec::new();
    let mut to = 0;
    for row in [2, 3, 9, 10] {
        for (tap, width) in taps.into_iter().zip(widths) {
            all.push((head_tap(LAYERS, LAYER, tap) as u32, row, to as u32));
            to += width.div_ceil(dim);
        }
    }
    all
}

impl Case {
    fn new(shape: [usize; 4], seed: u64) -> Self {
        let [heads, kv_heads, head_dim, dim] = shape;
        let mut numbers = Numbers::new(seed);
        let mut pick = |below: usize| (numbers.draw().abs() * 977.0) as usize % below;
        let mut ops = Vec::new();
        for slot in 0..SLOTS {
            let one = |pick: &mut dyn FnMut(usize) -> usize| {
                let kinds = [HookOp::ADD, HookOp::COORDINATE, HookOp::REPLACE, HookOp::SCALE];
                let kind = kinds[pick(4)];
                let by_position = if pick(3) == 0 { HookOp::BY_POSITION } else { 0 };
                let keeps = [0, HookOp::KEEP_NORM][pick(2)];
                HookOp {
                    kind,
                    flags: by_position | if kind == HookOp::SCALE { 0 } else { keeps },
                    head: pick(heads) as u32,
                    to: [4, u32::MAX][pick(2)],
                    every: [1, 2][pick(2)],
                    low: -0.3,
                    high: 0.25,
                    ..HookOp::add(pick(3) as u32, pick(2) as u32, [0.5, -1.5, 0.0][pick(3)])
                }
            };
            let count = if slot + 1 == SLOTS { 0 } else { OPS };
            ops.push((0..count).map(|_| one(&mut pick)).collect::<Vec<_>>());
        }
        // Rows of the bank that begin with a head's vector, each as long as the first: an operation by
        // position then has the length that is said.
        let mut vectors = numbers.list(BANK * dim);
        for row in vectors.chunks_exact_mut(dim) {
            let length = norm(&widen(&row[..head_dim])) as f32;
            row[..head_dim].iter_mut().for_each(|v| *v /= length);
        }
        let qkv = numbers.list(ROWS * (heads + 2 * kv_heads) * head_dim);
        let attn = numbers.list(ROWS * heads * head_dim);
        // As matmul reads it.
        let attn = attn.into_iter().map(|v| <bf16 as Float>::from_f32(v).to_f32()).collect();
        let slot = (0..ROWS).map(|row| if row == 4 { NONE } else { (row % SLOTS) as u32 });
        Self { heads, kv_heads, head_dim, dim, slot: slot.collect(), qkv, attn, vectors, ops }
    }

    fn widths(&self) -> [usize; 4] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [q, kv, kv, q]
    }

    fn position(row: usize) -> u32 {
        (row / SLOTS) as u32
    }

    /// What attention gave, as changed, the captured rows, and receipts.
    fn run<T: Float>(&self, device: &Device) -> Vec<Vec<f32>> {
        let mut hooks = Hooks::new(device, (LAYERS, self.dim), SLOTS, OPS, BANK).unwrap();
        hooks.vectors.write(0, &self.vectors).unwrap();
        let tap = head_tap(LAYERS, LAYER, HeadTap::Output);
        for (slot, ops) in self.ops.iter().enumerate() {
            let ops: Vec<_> = ops.iter().map(|op| (tap, *op)).collect();
            hooks.set(slot, &ops, &[NONE; GATES]).unwrap();
            assert_eq!(hooks.acts_on_heads(slot), !ops.is_empty());
        }
        let receipt = self.slot.iter().enumerate().map(|(row, &slot)| {
            let any = slot != NONE && !self.ops[slot as usize].is_empty();
            if any { (row * OPS) as i32 } else { -1 }
        });
        let list = RowList {
            slot: self.slot.clone(),
            position: (0..ROWS).map(Self::position).collect(),
            receipt: receipt.collect(),
        };
        let at = Rows::upload(device, &list).unwrap();
        let wanted = captures(self.dim, self.widths());
        let mut plan = CapturePlan::new(device, tap_count(LAYERS), wanted.len()).unwrap();
        plan.set(&wanted).unwrap();
        let rows: usize = 4 * self.widths().iter().map(|w| w.div_ceil(self.dim)).sum::<usize>();
        let mut captured = Buffer::upload(device, &vec![f32::NAN; rows * self.dim]).unwrap();
        let unset: Vec<Receipt> = vec![[f32::NAN; 2]; ROWS * OPS];
        let mut receipts = Buffer::upload(device, &unset).unwrap();
        let mut met = Buffer::upload(device, &[0; ROWS]).unwrap();
        let attn: Vec<T> = self.attn.iter().map(|&v| T::from_f32(v)).collect();
        let mut attn = Activations::upload(device, self.heads * self.head_dim, &attn).unwrap();
        let qkv = upload::<f32>(device, &self.qkv, 0);
        let operands = Heads::<T> {
            rows: ROWS,
            shape: [self.heads, self.kv_heads, self.head_dim],
            layers: LAYERS,
            layer: LAYER,
            dim: self.dim,
            qkv: &qkv,
            attn: &mut attn,
            hooks: &mut hooks,
            met: &mut met,
            at: &at,
            captures: &plan,
            captured: &mut captured,
            receipts: &mut receipts,
        };
        heads(device, operands).unwrap();
        let mut seen = unset;
        receipts.read(0, &mut seen).unwrap();
        let attn = attn.read().unwrap().into_iter().map(Float::to_f32).collect();
        vec![attn, read(&captured), seen.concat()]
    }

    /// A row's outputs in f64, and ‖h‖², ‖change‖² of what acted.
    fn want(&self, row: usize) -> (Vec<f64>, Vec<Option<[f64; 2]>>) {
        let width = self.heads * self.head_dim;
        let mut out = widen(&self.attn[row * width..][..width]);
        let mut receipts = vec![None; OPS];
        if self.slot[row] == NONE {
            return (out, receipts);
        }
        let position = Self::position(row);
        for (at, op) in self.ops[self.slot[row] as usize].iter().enumerate() {
            if position < op.from
                || position >= op.to
                || !(position - op.from).is_multiple_of(op.every)
            {
                continue;
            }
            let behind = (position - op.from) / op.every;
            let vector = op.vector + if op.flags & HookOp::BY_POSITION != 0 { behind } else { 0 };
            let v = widen(&self.vectors[vector as usize * self.dim..][..self.head_dim]);
            let h = &mut out[op.head as usize * self.head_dim..][..self.head_dim];
            let before = h.to_vec();
            let scale = f64::from(op.scale);
            let c = dot(h, &v);
            for (h, v) in h.iter_mut().zip(&v) {
                *h = match op.kind {
                    HookOp::ADD => *h + scale * v,
                    HookOp::COORDINATE => {
                        *h + (c.clamp(f64::from(op.low), f64::from(op.high)) - c) * v
                    }
                    HookOp::REPLACE => scale * v,
                    _ => scale * *h,
                };
            }
            if op.flags & HookOp::KEEP_NORM != 0 && norm(h) > 1e-4 * norm(&before) {
                let factor = norm(&before) / norm(h);
                h.iter_mut().for_each(|h| *h *= factor);
            }
            let change: Vec<f64> = h.iter().zip(&before).map(|(h, before)| h - before).collect();
            receipts[at] = Some([norm(&before).powi(2), norm(&change).powi(2)]);
        }
        (out, receipts)
    }

    fn check<T: Float>(&self, rounding: f64) {
        for (device, outputs) in on_every_device::<T>(0, |device| self.run::<T>(device)) {
            let [attn, captured, receipts] = &outputs[..] else { panic!("outputs") };
            let width = self.heads * self.head_dim;
            let mut changed = Vec::new();
            for row in 0..ROWS {
                let (want, seen) = self.want(row);
                let size = norm(&want) + norm(&widen(&self.attn[row * width..][..width]));
                // Sums of a head's products and their roots, OPS times over.
                let unit = 8.0 * (OPS * (self.head_dim + 16)) as f64 * U * (1.0 + size);
                for (at, want) in want.iter().enumerate() {
                    let what = format!("{device}, row {row}, element {at}");
                    let tolerance = unit + rounding * want.abs();
                    close(&what, attn[row * width + at], *want, tolerance);
                }
                for (at, want) in seen.iter().enumerate() {
                    let got = &receipts[2 * (row * OPS + at)..][..2];
                    let what = format!("{device}, row {row}, operation {at}");
                    match want {
                        None => assert!(got[0].is_nan() && got[1].is_nan(), "{what}"),
                        Some(want) => {
                            for (got, want) in got.iter().zip(want) {
                                close(&what, *got, *want, unit * (2.0 + 2.0 * size));
                            }
                        }
                    }
                }
                changed.push(want);
            }
            let (q, kv) = (width, self.kv_heads * self.head_dim);
            for (tap, row, to) in captures(self.dim, self.widths()) {
                let row = row as usize;
                let qkv = &self.qkv[row * (q + 2 * kv)..][..q + 2 * kv];
                let (got, what) =
                    (&captured[to as usize * self.dim..], format!("{device}, row {row}"));
                let exact = match tap as usize - head_tap(LAYERS, LAYER, HeadTap::Query) {
                    0 => &qkv[..q],
                    1 => &qkv[q..q + kv],
                    2 => &qkv[q + kv..],
                    _ => {
                        let size = norm(&changed[row]) + 1.0;
                        let unit = 8.0 * (OPS * (self.head_dim + 16)) as f64 * U * (1.0 + size);
                        for (got, want) in got.iter().zip(&changed[row]) {
                            close(&format!("{what}, captured"), *got, *want, unit);
                        }
                        continue;
                    }
                };
                assert_eq!(got[..exact.len()], *exact, "{what}: copies");
            }
        }
    }
}

#[test]
fn heads_are_changed_one_by_one_and_copied_whole() {
    for shape in [[4, 2, 16, 32], [9, 3, 64, 576], [3, 1, 40, 72], [2, 2, 256, 264], [8, 2, 24, 64]]
    {
        for seed in 0..6 {
            let case = Case::new(shape, seed);
            case.check::<bf16>(1.0 / 256.0);
            case.check::<f32>(0.0);
        }
    }
}
