//! The residual stream of a device against the processor's.

use super::{BF16, Comparison, U, distance, numbers, read, read_rows};
use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::{
        activations::Activations,
        hooks::{CapturePlan, GATES, HookOp, Hooks, tap_count},
        residual_norm::{ResidualNorm, residual_norm},
        rows::{NONE, RowList, Rows},
        select_rows::select_rows,
    },
};

/// What is normalised: what is read, what is added, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    Before,
    After,
    Around,
}

impl Norms {
    pub const ALL: [Self; 3] = [Self::Before, Self::After, Self::Around];
}

pub fn stream(cpu: &Device, device: &Device, dim: usize, of: Norms) -> Result<Vec<Comparison>> {
    let rows = 20;
    let run = |device: &Device| -> Result<[Vec<f32>; 4]> {
        let mut hooks = Hooks::new(device, (1, dim), 4, 2, 3)?;
        hooks.vectors.write(0, &numbers(3 * dim, 9))?;
        let op = |vector, flags| HookOp { to: 15, flags, ..HookOp::add(vector, 2, 0.5) };
        for slot in 0..3 {
            let ops = [(2, op(0, 0)), (2, op(slot as u32, HookOp::RELATIVE))];
            hooks.set(slot, &ops, &[NONE; GATES])?;
        }
        hooks.set(3, &[], &[NONE; GATES])?;
        let list = RowList {
            slot: (0..rows).map(|row| if row == 7 { NONE } else { row % 4 }).collect(),
            position: (0..rows).collect(),
            receipt: (0..rows).map(|row| if row % 4 == 3 { -1 } else { 2 * row as i32 }).collect(),
        };
        let at = Rows::upload(device, &list)?;
        let mut captures = CapturePlan::new(device, tap_count(1), 2 * rows as usize)?;
        let taps =
            (0..rows).filter(|row| *row != 7).flat_map(|row| [(2, row, row), (3, row, 20 + row)]);
        captures.set(&taps.collect::<Vec<_>>())?;
        let rows = rows as usize;
        let mut resid = Buffer::upload(device, &numbers(rows * dim, 1))?;
        let branch = Buffer::upload(device, &numbers(rows * dim, 2))?;
        let gain = Buffer::upload(device, &numbers(dim, 3))?;
        let mut captured = Buffer::zeroed(device, 2 * rows * dim)?;
        let mut norms = Buffer::zeroed(device, rows)?;
        let mut receipts = Buffer::zeroed(device, 2 * rows)?;
        let mut met = Buffer::zeroed(device, rows)?;
        let mut x = Activations::zeroed(device, rows, dim)?;
        let operands = ResidualNorm {
            rows,
            branch_rows: 18,
            resid: &mut resid,
            branch: &branch,
            hooks: &mut hooks,
            met: &mut met,
            at: &at,
            site: 1,
            captures: &captures,
            captured: &mut captured,
            norms: &mut norms,
            norms_at: 0,
            receipts: &mut receipts,
            branch_gain: Some(&gain).filter(|_| of != Norms::Before),
            branch_scale: 0.75,
            gain: Some(&gain).filter(|_| of != Norms::After),
            eps: 1e-5,
            is_final: false,
            x: &mut x,
        };
        residual_norm(device, operands)?;
        let chosen = Buffer::upload(device, &[19, 0, 8, 8, 16])?;
        let mut some = Activations::zeroed(device, 5, dim)?;
        select_rows(device, 5, &chosen, &x, &mut some)?;
        let mut seen = vec![[0.0; 2]; 2 * rows];
        receipts.read(0, &mut seen)?;
        let sizes = [read(&norms)?, seen.concat()].concat();
        Ok([read(&resid)?, read(&captured)?, sizes, read_rows(&some)?])
    };
    let (got, want) = (run(device)?, run(cpu)?);
    // A relative operation, and a branch's norm, carry the rounding of a sum of `dim` squares.
    let norm = (dim + 16) as f64 * U;
    let names = ["the stream", "captures", "norms and receipts"];
    let mut all: Vec<Comparison> = names
        .iter()
        .zip(got.iter().zip(&want))
        .map(|(name, (got, want))| {
            Comparison::new(
                format!("residual_norm, {of:?}, dim {dim}: {name}"),
                distance(got, want),
                norm,
            )
        })
        .collect();
    let name = format!("residual_norm, {of:?}, select_rows, dim {dim}: normalised");
    all.push(Comparison::new(name, distance(&got[3], &want[3]), 2.0 * BF16));
    Ok(all)
}
