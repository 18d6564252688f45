//! What single heads of attention give and get. For every row, between attention and the output projection:
//!
//! ```text
//! operations on the outputs of heads, those that name the head      (HookOp)
//! queries and keys after rope, values and outputs captured
//! ```
//!
//! Outputs are changed in f32 and rounded to the type of matmul inputs once, after the last operation.

use super::{
    Float,
    activations::Activations,
    hooks::{CapturePlan, GATES, HeadTap, HookTables, Hooks, destinations, head_tap},
    matmul::Dtype,
    residual_norm::{Conditions, Operate, Receipt, atomics},
    rows::{NONE, Rows},
};
use crate::{
    device::{
        Buffer, Cuda, Device,
        cpu::{Cpu, Shared},
        cuda::{Launch, Params},
    },
    error::Result,
};

/// Operands of [`heads`].
pub struct Heads<'a, T> {
    /// Rows `0..rows` are active.
    pub rows: usize,
    /// Query heads, heads of keys and values, elements of each.
    pub shape: [usize; 3],
    /// Blocks of the model, and which one it is.
    pub layers: usize,
    /// See `layers`.
    pub layer: usize,
    /// Width of the stream, and so of captured rows and of the bank's.
    pub dim: usize,
    /// (≥ rows, (heads + 2 · `kv_heads`) · `head_dim`), after rope.
    pub qkv: &'a Buffer<f32>,
    /// (≥ rows, heads · `head_dim`), what attention gave.
    pub attn: &'a mut Activations<T>,
    /// What acts on sequences.
    pub hooks: &'a mut Hooks,
    /// (≥ rows,): the conditions that a row has met so far.
    pub met: &'a mut Buffer<u32>,
    /// Which rows these are.
    pub at: &'a Rows,
    /// What is copied out in this step.
    pub captures: &'a CapturePlan,
    /// Its destination, (rows, dim): each captured row of heads begins one and takes as many numbers
    /// as it has.
    pub captured: &'a mut Buffer<f32>,
    /// One for each operation of each row that has any.
    pub receipts: &'a mut Buffer<Receipt>,
}

/// See the module.
///
/// # Errors
/// The device has failed.
pub fn heads<T: Float>(device: &Device, p: Heads<'_, T>) -> Result<()> {
    let [heads, kv_heads, head_dim] = p.shape;
    assert!(p.layer < p.layers && head_dim <= p.dim, "heads: layer, width");
    assert!(p.qkv.len() >= p.rows * (heads + 2 * kv_heads) * head_dim, "heads: qkv");
    assert!(p.attn.rows() >= p.rows && p.attn.dim() == heads * head_dim, "heads: attn");
    assert!(p.at.len() >= p.rows && p.met.len() >= p.rows, "heads: rows, conditions");
    match device {
        Device::Cpu(cpu) => on_cpu(cpu, p),
        Device::Cuda(cuda) => return launch(cuda, p),
    }
    Ok(())
}

fn on_cpu<T: Float>(cpu: &Cpu, p: Heads<'_, T>) {
    let [heads, kv_heads, head_dim] = p.shape;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let (slots, positions) = (p.at.slot.host(), p.at.position.host());
    let first_receipts = p.at.receipt.host();
    let captured = Shared::new(p.captured.host_mut());
    let receipts = Shared::new(p.receipts.host_mut());
    let attn = Shared::new(p.attn.host_mut());
    let met = Shared::new(p.met.host_mut());
    let Hooks { table, latched, vectors } = p.hooks;
    let (latched, vectors) = (atomics(latched.host_mut()), vectors.host());
    let tap = |of| head_tap(p.layers, p.layer, of);
    let capture = |of: HeadTap, row: usize, values: &[f32]| {
        for to in destinations(p.captures.tap(tap(of)), row) {
            // SAFETY: the planner gives each captured row its own destinations.
            unsafe { captured.range(to * p.dim, values.len()) }.copy_from_slice(values);
        }
    };
    let outputs = !p.captures.tap(tap(HeadTap::Output)).is_empty();
    let work = |row: usize| {
        if slots[row] == NONE {
            return;
        }
        let qkv = &p.qkv.host()[row * (q + 2 * kv)..][..q + 2 * kv];
        capture(HeadTap::Query, row, &qkv[..q]);
        capture(HeadTap::Key, row, &qkv[q..q + kv]);
        capture(HeadTap::Value, row, &qkv[q + kv..]);
        let (slot, first) = (slots[row] as usize, first_receipts[row]);
        let (ordinal, ops) =
            if first < 0 { (0, &[][..]) } else { table.at(slot, tap(HeadTap::Output)) };
        if ops.is_empty() && !outputs {
            return;
        }
        // SAFETY: each task has its own rows of attn and met, and its own receipts.
        let (attn, met) = unsafe { (attn.range(row * q, q), met.range(row, 1)) };
        let mut values: Vec<f32> = attn.iter().map(|v| v.to_f32()).collect();
        for (at, op) in ops.iter().enumerate() {
            // SAFETY: as above.
            let receipts = unsafe { receipts.range(first as usize + ordinal + at, 1) };
            let conditions = Conditions { met: &mut met[0], latched: &latched[slot * GATES..] };
            let of = Operate {
                h: &mut values[op.head as usize * head_dim..][..head_dim],
                vectors,
                stride: p.dim,
                position: positions[row],
                ops: std::slice::from_ref(op),
                receipts,
                conditions,
            };
            of.run(cpu.isa());
        }
        if !ops.is_empty() {
            attn.iter_mut().zip(&values).for_each(|(to, &v)| *to = T::from_f32(v));
        }
        capture(HeadTap::Output, row, &values);
    };
    cpu.parallel_chunks(p.rows, 8, |range| range.for_each(work));
}

/// Mirror of `HeadsParams`.
#[derive(Clone, Copy)]
#[repr(C)]
struct HeadsParams {
    tables: HookTables,
    qkv: u64,
    attn: u64,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    model_dim: i32,
    tap: i32,
    attn_row_groups: i32,
}
const _: () = assert!(size_of::<HeadsParams>() == 152, "the kernel asserts the same");
// SAFETY: field for field the struct in kernels/heads.cu.
unsafe impl Params for HeadsParams {}

fn launch<T: Float>(cuda: &Cuda, p: Heads<'_, T>) -> Result<()> {
    assert_eq!(T::DTYPE, Dtype::Bf16, "the kernels write bf16");
    let [heads, kv_heads, head_dim] = p.shape;
    let params = HeadsParams {
        tables: HookTables::new(p.at, p.hooks, (p.captures, p.captured), (p.receipts, p.met)),
        qkv: p.qkv.address(),
        attn: p.attn.address_mut(),
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        dim: head_dim as i32,
        model_dim: p.dim as i32,
        tap: head_tap(p.layers, p.layer, HeadTap::Query) as i32,
        attn_row_groups: p.attn.row_groups() as i32,
    };
    let inputs = if p.captures.any { heads + 2 * kv_heads } else { 0 };
    let grid = [p.rows as u32, (inputs + heads).div_ceil(4) as u32, 1];
    // SAFETY: every length was checked; the planner keeps slots, operations, heads, receipts and
    // destinations inside their tables, which were sized for it.
    unsafe { cuda.launch("heads", Launch { grid, block: 128, shared: 0 }, &params) }
}
