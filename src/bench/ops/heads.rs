//! What is done with single heads.

use half::bf16;

use super::Run;
use crate::{
    device::Buffer,
    error::Result,
    ops::{
        activations::Activations,
        heads::{Heads, heads},
        hooks::{CapturePlan, GATES, HeadTap, HookOp, Hooks, head_tap, tap_count},
        rows::{NONE, RowList, Rows},
    },
};

impl Run<'_> {
    /// A head of every row removed, and all that its heads give captured.
    pub(super) fn heads(&mut self) -> Result<()> {
        let (c, device, rows) = (self.config, self.device, self.plan.batch);
        let width = c.heads * c.head_dim;
        let mut hooks = Hooks::new(device, (1, c.dim), rows, 1, 1)?;
        let output = head_tap(1, 0, HeadTap::Output);
        for slot in 0..rows {
            let head = (slot % c.heads) as u32;
            let op = HookOp { kind: HookOp::SCALE, head, ..HookOp::add(0, 0, 0.0) };
            hooks.set(slot, &[(output, op)], &[NONE; GATES])?;
        }
        let list = RowList {
            slot: (0..rows as u32).collect(),
            position: vec![0; rows],
            receipt: (0..rows as i32).collect(),
        };
        let at = Rows::upload(device, &list)?;
        let mut captures = CapturePlan::new(device, tap_count(1), rows)?;
        let stride = width.div_ceil(c.dim) as u32;
        let to = |row: u32| (output as u32, row, row * stride);
        captures.set(&(0..rows as u32).map(to).collect::<Vec<_>>())?;
        let qkv = Buffer::zeroed(device, rows * (c.heads + 2 * c.kv_heads) * c.head_dim)?;
        let mut attn: Activations<bf16> = Activations::zeroed(device, rows, width)?;
        let mut captured = Buffer::zeroed(device, rows * stride as usize * c.dim)?;
        let mut receipts = Buffer::zeroed(device, rows)?;
        let mut met = Buffer::zeroed(device, rows)?;
        let timing = self.bench.time(|| {
            heads(
                device,
                Heads {
                    rows,
                    shape: [c.heads, c.kv_heads, c.head_dim],
                    layers: 1,
                    layer: 0,
                    dim: c.dim,
                    qkv: &qkv,
                    attn: &mut attn,
                    hooks: &mut hooks,
                    met: &mut met,
                    at: &at,
                    captures: &captures,
                    captured: &mut captured,
                    receipts: &mut receipts,
                },
            )
        })?;
        // Read and written in bf16, captured in f32.
        self.add("heads", "a head removed, all captured", rows, timing, (rows * width * 8, 0));
        Ok(())
    }
}
