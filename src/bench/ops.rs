//! Single operations at a model's shapes: bytes and products per second, and their share of the
//! ceilings that were measured in the same call.

mod heads;

use half::bf16;
use serde::Serialize;

use super::{Bench, Timing};
use crate::{
    device::{Buffer, Device},
    error::Result,
    model::{ModelConfig, weights::padded_ffn},
    ops::{
        activations::Activations,
        attention::{
            Attention, AttentionPlan, Cache, CacheShape, Items, PAGE, SharedPrefix, TILE,
            attention, kernel_head_dim,
        },
        experts::{Experts, Routed, experts},
        hooks::{CapturePlan, GATES, HookOp, Hooks, tap_count},
        matmul::{Activation, Dtype, PANEL, Weight, WeightSet, gated_matmul, matmul},
        residual_norm::{ResidualNorm, residual_norm},
        rope_append::{RopeAppend, RopeTable, rope_append},
        rows::{NONE, RowList, Rows},
        sample::{Draw, Draws, sample},
    },
};

/// What bounds operations on this device.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Bytes read and written by a copy, in a second.
    pub copy_bytes_per_s: f64,
    /// Of the fastest matmul of this run.
    pub matmul_flops_per_s: f64,
}

/// One operation at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The operation.
    pub op: &'static str,
    /// What it is used for.
    pub shape: String,
    /// Rows.
    pub rows: usize,
    /// Output features of a product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<usize>,
    /// Input features of a product.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// Median.
    pub seconds: f64,
    /// (90th − 10th percentile) / median.
    pub spread: f64,
    /// That must be moved.
    pub bytes: f64,
    /// Multiplications and additions of products.
    pub flops: f64,
    /// Of the ceiling that binds.
    pub share: f64,
}

/// All of them.
#[derive(Clone, Debug, Serialize)]
pub struct OpsReport {
    /// As it was asked for.
    pub device: String,
    /// The arithmetic's name.
    pub arithmetic: String,
    /// The model's sizes.
    pub model: String,
    /// Measured in the same call.
    pub ceilings: Ceilings,
    /// In the order they were run.
    pub results: Vec<Measured>,
}

/// How much is measured.
struct Plan {
    /// Rows of matmuls.
    matmul_rows: Vec<usize>,
    /// Rows of operations on the stream.
    stream_rows: usize,
    /// Sequences that draw a token each.
    batch: usize,
    /// Positions that they share, and that each has beyond.
    positions: (usize, usize),
}

struct Run<'a> {
    device: &'a Device,
    config: &'a ModelConfig,
    plan: Plan,
    bench: Bench<'a>,
    results: Vec<Measured>,
}

/// Measures the operations of a model on a device.
///
/// # Errors
/// There is not enough memory, or the device has failed.
pub fn ops(
    (name, device): (&str, &Device),
    (model, config): (&str, &ModelConfig),
) -> Result<OpsReport> {
    let plan = if device.is_asynchronous() {
        Plan {
            matmul_rows: vec![1, 8, 32, 64, 256, 512, 1024, 2048],
            stream_rows: 16_384,
            batch: 1024,
            positions: (300, 50),
        }
    } else {
        Plan {
            matmul_rows: vec![1, 8, 32, 64, 128, 512],
            stream_rows: 512,
            batch: 64,
            positions: (300, 50),
        }
    };
    let mut run = Run { device, config, plan, bench: Bench::new(device)?, results: Vec::new() };
    let copy_bytes_per_s = run.copy()?;
    run.matmuls()?;
    let flops = run.results.iter().map(|result| result.flops / result.seconds);
    let matmul_flops_per_s = flops.fold(0.0, f64::max);
    run.experts()?;
    run.residual_norm()?;
    run.heads()?;
    run.rope()?;
    run.attention(false)?;
    run.attention(true)?;
    run.sample()?;
    let ceilings = Ceilings { copy_bytes_per_s, matmul_flops_per_s };
    for result in &mut run.results {
        let limit = (result.bytes / copy_bytes_per_s).max(result.flops / matmul_flops_per_s);
        result.share = limit / result.seconds;
    }
    let arithmetic = match device {
        Device::Cpu(cpu) => cpu.isa().to_string(),
        Device::Cuda(cuda) => cuda.arithmetic(),
    };
    let (device, model) = (name.to_owned(), model.to_owned());
    Ok(OpsReport { device, arithmetic, model, ceilings, results: run.results })
}

/// Multiplications and additions in a second of the model's widest product, with many rows.
///
/// # Errors
/// There is not enough memory, or the device has failed.
pub fn matmul_ceiling(device: &Device, config: &ModelConfig) -> Result<f64> {
    let rows = if device.is_asynchronous() { 4096 } else { 512 };
    let (n, k) = (2 * padded_ffn(config), config.dim);
    let weight = Weight::random(device, Dtype::Bf16, (n, k), 1, 1.0 / (k as f32).sqrt(), true)?;
    let x: Activations<bf16> = Activations::zeroed(device, rows, k)?;
    let mut out: Activations<bf16> = Activations::zeroed(device, rows, n / 2)?;
    let timing = Bench::new(device)?
        .time(|| gated_matmul(device, rows, &x, &weight, Activation::Silu, &mut out))?;
    Ok((2 * rows * n * k) as f64 / timing.median)
}

impl Run<'_> {
    fn add(
        &mut self,
        op: &'static str,
        shape: impl Into<String>,
        rows: usize,
        timing: Timing,
        (bytes, flops): (usize, usize),
    ) -> &mut Measured {
        self.results.push(Measured {
            op,
            shape: shape.into(),
            rows,
            n: None,
            k: None,
            seconds: timing.median,
            spread: timing.spread,
            bytes: bytes as f64,
            flops: flops as f64,
            share: 0.0,
        });
        self.results.last_mut().expect("just pushed")
    }

    /// Bytes read and written by copies, in a second.
    fn copy(&mut self) -> Result<f64> {
        let len = 128 << 20;
        let from: Buffer<f32> = Buffer::zeroed(self.device, len / 4)?;
        let mut to: Buffer<f32> = Buffer::zeroed(self.device, len / 4)?;
        let timing = self.bench.time(|| to.copy_from(self.device, &from))?;
        Ok(2.0 * len as f64 / timing.median)
    }

    fn weight(&self, n: usize, k: usize, gated: bool) -> Result<Weight> {
        Weight::random(self.device, Dtype::Bf16, (n, k), 1, 1.0 / (k as f32).sqrt(), gated)
    }

    fn activations(&self, rows: usize, dim: usize) -> Result<Activations<bf16>> {
        let numbers: Vec<bf16> =
            (0..rows * dim).map(|at| bf16::from_f32((at * 7 % 13) as f32 * 0.1 - 0.6)).collect();
        Activations::upload(self.device, dim, &numbers)
    }

    fn matmuls(&mut self) -> Result<()> {
        let c = self.config;
        let (attn, kv, ffn) = (c.heads * c.head_dim, c.kv_heads * c.head_dim, padded_ffn(c));
        let shapes = [
            ("qkv", attn + 2 * kv, c.dim),
            ("out", c.dim, attn),
            ("gate_up", 2 * ffn, c.dim),
            ("down", c.dim, ffn),
            ("head", c.vocab, c.dim),
        ];
        let most = *self.plan.matmul_rows.iter().max().expect("rows");
        for (name, n, k) in shapes {
            let gated = name == "gate_up";
            let weight = self.weight(n, k, gated)?;
            let x = self.activations(most, k)?;
            // The head's rows are few, and wide.
            let most = if name == "head" { most.min(1024) } else { most };
            let mut out = Buffer::zeroed(self.device, if gated { 0 } else { most * n })?;
            let mut gates: Activations<bf16> =
                Activations::zeroed(self.device, if gated { most } else { 0 }, n / 2)?;
            for rows in self.plan.matmul_rows.clone().into_iter().filter(|rows| *rows <= most) {
                let device = self.device;
                let timing = self.bench.time(|| match gated {
                    true => gated_matmul(device, rows, &x, &weight, Activation::Silu, &mut gates),
                    false => matmul(device, rows, &x, &weight, &mut out),
                })?;
                let written = if gated { rows * n } else { rows * n * 4 };
                let work = (2 * n * k + 2 * rows * k + written, 2 * rows * n * k);
                let op = if gated { "gated_matmul" } else { "matmul" };
                let result = self.add(op, name, rows, timing, work);
                (result.n, result.k) = (Some(n), Some(k));
            }
        }
        Ok(())
    }

    /// A mixture of 16 experts of an eighth of the MLP's width each, of which a row has 4. Of the
    /// weights only those count that some row has.
    fn experts(&mut self) -> Result<()> {
        const COUNT: usize = 16;
        const USED: usize = 4;
        let (device, dim) = (self.device, self.config.dim);
        let ffn = (self.config.ffn_dim / 8).next_multiple_of(PANEL);
        let set = |n: usize, k: usize, gated: bool| {
            let weights = (0..COUNT).map(|_| self.weight(n, k, gated)).collect::<Result<_>>()?;
            WeightSet::new(device, weights)
        };
        let of = Experts {
            router: self.weight(COUNT, dim, false)?,
            gate_up: set(2 * ffn, dim, true)?,
            down: set(dim, ffn, false)?,
            used: USED,
            normalise: true,
            activation: Activation::Silu,
        };
        let most = *self.plan.matmul_rows.iter().max().expect("rows");
        // Multiples of the golden ratio, so that rows have different experts.
        let number = |at: usize| (at as f64 * 0.618_033_988_749_895).fract() as f32 - 0.5;
        let x: Vec<bf16> = (0..most * dim).map(|at| bf16::from_f32(number(at))).collect();
        let x = Activations::upload(device, dim, &x)?;
        let mut routed = Routed::new(device, most, of.sizes())?;
        let mut out = Buffer::zeroed(device, most * dim)?;
        for rows in self.plan.matmul_rows.clone() {
            let timing =
                self.bench.time(|| experts(device, rows, &x, &of, &mut routed, &mut out))?;
            let mut chosen = vec![0; rows * USED];
            routed.chosen().read(0, &mut chosen)?;
            let read = (0..COUNT as u32).filter(|id| chosen.contains(id)).count();
            let bytes = 6 * read * ffn * dim + 6 * rows * dim;
            let shape = format!("{USED} of {COUNT}, {read} read");
            let flops = 2 * rows * dim * (COUNT + 3 * USED * ffn);
            self.add("experts", shape, rows, timing, (bytes, flops));
        }
        Ok(())
    }

    /// Every row injected and captured; then none.
    fn residual_norm(&mut self) -> Result<()> {
        let (dim, rows) = (self.config.dim, self.plan.stream_rows);
        let device = self.device;
        let slots = 256.min(rows);
        let mut hooks = Hooks::new(device, (1, dim), slots, 1, slots)?;
        let list = RowList {
            slot: (0..rows).map(|row| (row % slots) as u32).collect(),
            position: vec![0; rows],
            receipt: (0..rows as i32).collect(),
        };
        let at = Rows::upload(device, &list)?;
        let mut captures = CapturePlan::new(device, tap_count(1), rows)?;
        let mut resid = Buffer::zeroed(device, rows * dim)?;
        let branch = Buffer::zeroed(device, rows * dim)?;
        let mut captured = Buffer::zeroed(device, rows * dim)?;
        let mut norms = Buffer::zeroed(device, rows)?;
        let mut receipts = Buffer::zeroed(device, rows)?;
        let mut met = Buffer::zeroed(device, rows)?;
        let gain = Buffer::upload(device, &vec![1.0; dim])?;
        let mut x: Activations<bf16> = Activations::zeroed(device, rows, dim)?;
        for hooked in [false, true] {
            if hooked {
                let op = |slot: usize| (2, HookOp::add(slot as u32, 0, 0.5));
                (0..slots).try_for_each(|slot| hooks.set(slot, &[op(slot)], &[NONE; GATES]))?;
                captures.set(&(0..rows as u32).map(|row| (2, row, row)).collect::<Vec<_>>())?;
            }
            let timing = self.bench.time(|| {
                residual_norm(
                    device,
                    ResidualNorm {
                        rows,
                        branch_rows: rows,
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
                        branch_gain: None,
                        branch_scale: 1.0,
                        gain: Some(&gain),
                        eps: 1e-5,
                        is_final: false,
                        x: &mut x,
                    },
                )
            })?;
            let captured = if hooked { 4 } else { 0 };
            let shape = if hooked { "all injected and captured" } else { "plain" };
            self.add("residual_norm", shape, rows, timing, (rows * dim * (14 + captured), 0));
        }
        Ok(())
    }

    /// A cache of `batch` sequences: the first `shared` positions are the same pages.
    fn cache(&self, shared: usize) -> Result<Cache<bf16>> {
        let c = self.config;
        let (all, own) = self.plan.positions;
        let (batch, blocks) = (self.plan.batch, (all + own).div_ceil(PAGE));
        let common = shared / PAGE;
        let shape = CacheShape {
            layers: 1,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            pages: common + batch * (blocks - common),
            slots: batch,
            blocks,
        };
        let mut cache = Cache::new(self.device, shape)?;
        for slot in 0..batch {
            let own = |block: usize| common + slot * (blocks - common) + block - common;
            let page = |block| if block < common { block } else { own(block) } as u32;
            cache.set_tables(slot, &[(0..blocks).map(page).collect()])?;
        }
        Ok(cache)
    }

    fn rows(&self) -> RowList {
        let (shared, own) = self.plan.positions;
        RowList {
            slot: (0..self.plan.batch as u32).collect(),
            position: vec![(shared + own - 1) as u32; self.plan.batch],
            receipt: vec![-1; self.plan.batch],
        }
    }

    fn rope(&mut self) -> Result<()> {
        let (c, device, rows) = (self.config, self.device, self.plan.batch);
        let width = (c.heads + 2 * c.kv_heads) * c.head_dim;
        let mut qkv = Buffer::zeroed(device, rows * width)?;
        let (shared, own) = self.plan.positions;
        let rope = RopeTable::new(device, shared + own, c.head_dim, &c.rope.frequencies, 1.0)?;
        let (at, mut cache) = (Rows::upload(device, &self.rows())?, self.cache(0)?);
        let timing = self.bench.time(|| {
            let (qkv, cache) = (&mut qkv, &mut cache);
            let heads = c.heads;
            rope_append(
                device,
                RopeAppend {
                    rows,
                    heads,
                    qkv,
                    at: &at,
                    norms: None,
                    rope: Some(&rope),
                    layer: 0,
                    cache,
                },
            )
        })?;
        let bytes = rows * (8 * width + 4 * c.kv_heads * c.head_dim);
        self.add("rope_append", "one token a sequence", rows, timing, (bytes, 0));
        Ok(())
    }

    /// One token a sequence; with nothing shared, or all but a few positions.
    fn attention(&mut self, is_shared: bool) -> Result<()> {
        let (c, device, batch) = (self.config, self.device, self.plan.batch);
        let (shared, own) = self.plan.positions;
        let shared_tiles = if is_shared { shared / TILE } else { 0 };
        let mut cache = self.cache(if is_shared { shared } else { 0 })?;
        self.fill(&mut cache)?;
        let (list, group) = (self.rows(), c.heads / c.kv_heads);
        let at = Rows::upload(device, &list)?;
        let state = c.heads * (kernel_head_dim(c.head_dim) + 2);
        let mut plan = AttentionPlan::new(device, (batch, batch), state, false)?;
        let tiles = shared_tiles as u32;
        let prefix = SharedPrefix {
            group: u64::from(is_shared),
            tiles_below: tiles,
            tiles_above: tiles,
            cut: 0,
        };
        plan.set(&Items::build(&list, group, plan.capacity(), |_| prefix))?;
        let qkv = Buffer::zeroed(device, batch * (c.heads + 2 * c.kv_heads) * c.head_dim)?;
        let mut out: Activations<bf16> = Activations::zeroed(device, batch, c.heads * c.head_dim)?;
        let timing = self.bench.time(|| {
            let operands = Attention {
                rows: batch,
                heads: c.heads,
                qkv: &qkv,
                at: &at,
                plan: &mut plan,
                layer: 0,
                cache: &cache,
                scale: c.attention_scale,
                soft_cap: None,
                window: None,
                out: &mut out,
            };
            attention(device, operands)
        })?;
        let position_bytes = 4 * c.kv_heads * c.head_dim;
        let positions = match is_shared {
            true => shared_tiles * TILE + batch * (shared + own - shared_tiles * TILE),
            false => batch * (shared + own),
        };
        let flops = 4 * batch * (shared + own) * c.heads * c.head_dim;
        let op = if is_shared { "attention_prefix" } else { "attention_decode" };
        let shape = format!("{shared} + {own} positions");
        self.add(op, shape, batch, timing, (positions * position_bytes, flops));
        Ok(())
    }

    /// Keys and values of every position.
    fn fill(&self, cache: &mut Cache<bf16>) -> Result<()> {
        let (c, device) = (self.config, self.device);
        let (shared, own) = self.plan.positions;
        let rope = RopeTable::new(device, shared + own, c.head_dim, &c.rope.frequencies, 1.0)?;
        let rows = shared + own;
        let mut qkv = Buffer::zeroed(device, rows * 2 * c.kv_heads * c.head_dim)?;
        for slot in 0..self.plan.batch as u32 {
            let (position, receipt) = ((0..rows as u32).collect(), vec![-1; rows]);
            let list = RowList { slot: vec![slot; rows], position, receipt };
            let at = Rows::upload(device, &list)?;
            let (qkv, cache) = (&mut qkv, &mut *cache);
            let operands = RopeAppend {
                rows,
                heads: 0,
                qkv,
                at: &at,
                norms: None,
                rope: Some(&rope),
                layer: 0,
                cache,
            };
            rope_append(device, operands)?;
            device.synchronize()?;
        }
        Ok(())
    }

    /// Drawing by itself, and behind the output head.
    fn sample(&mut self) -> Result<()> {
        let (c, device, rows) = (self.config, self.device, self.plan.batch);
        let mut logits = Buffer::zeroed(device, rows * c.vocab)?;
        let head = self.weight(c.vocab, c.dim, false)?;
        let x = self.activations(rows, c.dim)?;
        let draw = |row: u32| Draw {
            row,
            slot: NONE,
            seed: u64::from(row),
            index: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
        };
        let mut draws = Draws::new(device, rows, 1)?;
        draws.set(&(0..rows as u32).map(draw).collect::<Vec<_>>())?;
        let head_work = (2 * c.vocab * c.dim + 4 * rows * c.vocab, 2 * rows * c.vocab * c.dim);
        let timing = self.bench.time(|| matmul(device, rows, &x, &head, &mut logits))?;
        self.add("head", "alone", rows, timing, head_work);
        let timing = self.bench.time(|| {
            matmul(device, rows, &x, &head, &mut logits)?;
            sample(device, c.vocab, &logits, &mut draws)
        })?;
        self.add("head_sample", "temperature 1", rows, timing, head_work);
        let bytes = 4 * rows * c.vocab;
        let timing = self.bench.time(|| sample(device, c.vocab, &logits, &mut draws))?;
        self.add("sample", "temperature 1", rows, timing, (bytes, 0));
        let filtered = |row| Draw { top_k: 50, top_p: 0.9, ..draw(row) };
        draws.set(&(0..rows as u32).map(filtered).collect::<Vec<_>>())?;
        let timing = self.bench.time(|| sample(device, c.vocab, &logits, &mut draws))?;
        self.add("sample", "top-k 50, top-p 0.9", rows, timing, (bytes, 0));
        Ok(())
    }
}
