//! What is done with single heads on a device against the processor.

use half::bf16;

use super::{BF16, Comparison, different, distance, numbers, read, read_rows, rounded};
use crate::{
    device::{Buffer, Device},
    error::Result,
    ops::{
        activations::Activations,
        heads::{Heads, heads},
        hooks::{CapturePlan, GATES, HeadTap, HookOp, Hooks, head_tap, tap_count},
        rows::{NONE, RowList, Rows},
    },
};

pub fn operated(cpu: &Device, device: &Device, shape: [usize; 3]) -> Result<Vec<Comparison>> {
    let [of, kv_heads, head_dim] = shape;
    let (rows, width, dim) = (9, of * head_dim, of * head_dim);
    let run = |device: &Device| -> Result<[Vec<f32>; 2]> {
        let mut hooks = Hooks::new(device, (1, dim), 2, 2, 3)?;
        hooks.vectors.write(0, &numbers(3 * dim, 9))?;
        let tap = |of| head_tap(1, 0, of);
        let ablate = HookOp { kind: HookOp::SCALE, ..HookOp::add(0, 1, 0.0) };
        let head = of as u32 - 1;
        let add = HookOp { head, flags: HookOp::RELATIVE, ..HookOp::add(1, 2, 0.5) };
        hooks.set(0, &[ablate, add].map(|op| (tap(HeadTap::Output), op)), &[NONE; GATES])?;
        hooks.set(1, &[], &[NONE; GATES])?;
        let list = RowList {
            slot: (0..rows).map(|row| row % 2).collect(),
            position: (0..rows).collect(),
            receipt: (0..rows).map(|row| if row % 2 == 1 { -1 } else { 2 * row as i32 }).collect(),
        };
        let at = Rows::upload(device, &list)?;
        let mut captures = CapturePlan::new(device, tap_count(1), 4 * rows as usize)?;
        let taps = [HeadTap::Query, HeadTap::Key, HeadTap::Value].map(tap);
        let wanted = taps.iter().enumerate().flat_map(|(at, &tap)| {
            (0..rows).map(move |row| (tap as u32, row, at as u32 * rows + row))
        });
        captures.set(&wanted.collect::<Vec<_>>())?;
        let rows = rows as usize;
        let qkv = Buffer::upload(device, &numbers(rows * (of + 2 * kv_heads) * head_dim, 1))?;
        let values = rounded(&numbers(rows * width, 2));
        let mut attn = Activations::<bf16>::upload(device, width, &values)?;
        let mut captured = Buffer::zeroed(device, 3 * rows * dim)?;
        let operands = Heads {
            rows,
            shape,
            layers: 1,
            layer: 0,
            dim,
            qkv: &qkv,
            attn: &mut attn,
            hooks: &mut hooks,
            met: &mut Buffer::zeroed(device, rows)?,
            at: &at,
            captures: &captures,
            captured: &mut captured,
            receipts: &mut Buffer::zeroed(device, 2 * rows)?,
        };
        heads(device, operands)?;
        Ok([read_rows(&attn)?, read(&captured)?])
    };
    let (got, want) = (run(device)?, run(cpu)?);
    let name = format!("heads, {of} of {head_dim}");
    Ok(vec![
        Comparison::new(format!("{name}: outputs"), distance(&got[0], &want[0]), 2.0 * BF16),
        Comparison::new(format!("{name}: copies, other bits"), different(&got[1], &want[1]), 0.0),
    ])
}
