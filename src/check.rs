//! Compares a device with the processor's own code, which the tests hold to definitions in f64:
//! every operation, a small model with injections, and whether a row depends on its batch.

mod heads;
mod mixture;
mod stream;

use half::bf16;
use serde::Serialize;

use crate::{
    bench::Workload,
    device::{Buffer, Cpu, Device, DeviceKind, cpu::Isa},
    engine::{Dtype, Engine, Finished, Job, Options},
    error::Result,
    model::{ModelConfig, Rope, forward::workspace},
    ops::{
        Float,
        activations::Activations,
        attention::{
            Attention, AttentionPlan, Cache, CacheShape, Items, PAGE, SharedPrefix, attention,
            kernel_head_dim,
        },
        cap_logits::cap_logits,
        copy_pages::copy_pages,
        enter::{Enter, enter},
        matmul::{Activation, Weight, gated_matmul, matmul},
        rope_append::{QueryNorms, RopeAppend, RopeTable, rope_append},
        rows::{NONE, RowList, Rows, Source, Sources},
        sample::{Draw, Draws, sample},
        summarize::{Id, Summaries, Wanted, summarize},
    },
};

/// Unit roundoff of f32 and of bf16.
const U: f64 = 1.0 / 16_777_216.0;
const BF16: f64 = 1.0 / 256.0;

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What was compared.
    pub name: String,
    /// The largest difference, in the unit of the tolerance.
    pub error: f64,
    /// The most that the arithmetic explains.
    pub tolerance: f64,
    /// Whether the error is within it.
    pub ok: bool,
}

impl Comparison {
    fn new(name: impl Into<String>, error: f64, tolerance: f64) -> Self {
        Self { name: name.into(), error, tolerance, ok: error <= tolerance }
    }
}

/// Numbers that look random, between -1 and 1, with an outlier now and then.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len)
        .map(|_| {
            let word = next();
            let scale = if word.is_multiple_of(97) { 30.0 } else { 1.0 };
            scale * ((word >> 40) as f32 / 8_388_608.0 - 1.0)
        })
        .collect()
}

fn rounded(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&v| <bf16 as Float>::from_f32(v)).collect()
}

fn read(buffer: &Buffer<f32>) -> Result<Vec<f32>> {
    let mut values = vec![0.0; buffer.len()];
    buffer.read(0, &mut values)?;
    Ok(values)
}

fn read_rows(rows: &Activations<bf16>) -> Result<Vec<f32>> {
    Ok(rows.read()?.into_iter().map(Float::to_f32).collect())
}

/// max |got − want| / max |want|; infinite where one is a number and the other is not.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    let largest = want.iter().fold(0.0f64, |most, v| most.max(f64::from(v.abs())));
    let off = got.iter().zip(want).map(|(got, want)| match (got.is_nan(), want.is_nan()) {
        (true, true) => 0.0,
        (false, false) => f64::from((got - want).abs()),
        _ => f64::INFINITY,
    });
    off.fold(0.0, f64::max) / largest.max(f64::MIN_POSITIVE)
}

/// How many differ in a bit.
fn different(got: &[f32], want: &[f32]) -> f64 {
    let pairs = got.iter().zip(want);
    pairs.filter(|(got, want)| got.to_bits() != want.to_bits()).count() as f64
}

/// Compares `device` with the processor. `quick` leaves the larger shapes out.
///
/// # Errors
/// The device cannot be opened, or has failed.
pub fn check(kind: DeviceKind, device: &Device, quick: bool) -> Result<Vec<Comparison>> {
    let config = ModelConfig::of_shape("tiny", 256)?;
    let cpu = Device::Cpu(Cpu::new(Isa::detect(), 1, workspace(&config, 4096))?);
    let mut all = weights(&cpu, device)?;
    let rows: &[usize] = if quick { &[1, 40] } else { &[1, 8, 9, 33, 65, 130, 300] };
    for &rows in rows {
        all.extend(matmuls(&cpu, device, rows)?);
        all.push(mixture::mixture(&cpu, device, rows)?);
    }
    let dims: &[usize] = if quick { &[128] } else { &[128, 576, 2048, 4096, 8192] };
    for &dim in dims {
        for norms in stream::Norms::ALL {
            all.extend(stream::stream(&cpu, device, dim, norms)?);
        }
    }
    let heads: &[(usize, usize, usize)] = match quick {
        true => &[(1, 3, 64)],
        false => &[(1, 3, 64), (2, 4, 128), (1, 1, 80), (1, 8, 96), (1, 2, 256), (1, 20, 32)],
    };
    for &(kv_heads, group, head_dim) in heads {
        all.extend(heads_of(&cpu, device, kv_heads, group, head_dim)?);
        all.extend(heads::operated(&cpu, device, [kv_heads * group, kv_heads, head_dim])?);
    }
    all.extend(logits(&cpu, device, if quick { 1000 } else { 49_152 })?);
    all.extend(model(kind, &config)?);
    Ok(all)
}

fn weights(cpu: &Device, device: &Device) -> Result<Vec<Comparison>> {
    let (vocab, dim) = (200, 136);
    let embedding = |device: &Device| -> Result<Vec<f32>> {
        let weight = Weight::random(device, Dtype::Bf16, (vocab, dim), 3, 0.5, false)?;
        let cached = Buffer::upload(device, &numbers(4 * dim, 1))?;
        let last = Buffer::upload(device, &[7, NONE])?;
        let list: Vec<Source> = (0..vocab as u32)
            .map(|at| match at % 4 {
                0 => Source::Cached(at / 4 % 4),
                1 => Source::Drawn(at / 4 % 2),
                _ => Source::Token(at),
            })
            .collect();
        let mut sources = Sources::new(device, vocab)?;
        sources.set(&list)?;
        let mut resid = Buffer::zeroed(device, vocab * dim)?;
        let operands = Enter {
            first: 0,
            count: vocab,
            sources: &sources,
            embedding: &weight,
            scale: 1.5,
            cached: &cached,
            last: &last,
            resid: &mut resid,
        };
        enter(device, operands)?;
        read(&resid)
    };
    let off = different(&embedding(device)?, &embedding(cpu)?);
    Ok(vec![Comparison::new("fill_weight, enter: other bits", off, 0.0)])
}

fn matmuls(cpu: &Device, device: &Device, rows: usize) -> Result<Vec<Comparison>> {
    let (n, k) = (352, 328);
    let values = rounded(&numbers(rows * k, rows as u64));
    let bias = numbers(n, 5);
    let product = |device: &Device| -> Result<Vec<f32>> {
        let weight = Weight::random(device, Dtype::Bf16, (n, k), 1, 1.0, false)?;
        let weight = weight.with_bias(device, &bias)?;
        let mut out = Buffer::zeroed(device, rows * n)?;
        matmul(device, rows, &Activations::upload(device, k, &values)?, &weight, &mut out)?;
        read(&out)
    };
    let gate = |device: &Device, activation: Activation| -> Result<Vec<f32>> {
        let weight = Weight::random(device, Dtype::Bf16, (n, k), 2, 0.05, true)?;
        let mut out = Activations::zeroed(device, rows, n / 2)?;
        let x = Activations::upload(device, k, &values)?;
        gated_matmul(device, rows, &x, &weight, activation, &mut out)?;
        read_rows(&out)
    };
    // A sum of k products is off by no more than 2k · 2⁻²⁴ of the sum of their sizes, which is
    // below √k times the largest sum here.
    let sums = 2.0 * k as f64 * U * (k as f64).sqrt();
    let mut all = vec![Comparison::new(
        format!("matmul, {rows} rows"),
        distance(&product(device)?, &product(cpu)?),
        sums,
    )];
    for activation in [Activation::Silu, Activation::GeluTanh] {
        // A sum at the edge may round to the next bf16.
        let off = distance(&gate(device, activation)?, &gate(cpu, activation)?);
        all.push(Comparison::new(
            format!("gated_matmul, {activation:?}, {rows} rows"),
            off,
            2.0 * BF16 + 4.0 * sums,
        ));
    }
    Ok(all)
}

fn heads_of(
    cpu: &Device,
    device: &Device,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
) -> Result<Vec<Comparison>> {
    let (heads, positions) = (kv_heads * group, 150);
    let width = (heads + 2 * kv_heads) * head_dim;
    let blocks = (positions as usize).div_ceil(PAGE);
    // Scores of about one: what rounding a query does to a score is then small, too.
    let turned = (heads + kv_heads) * head_dim;
    let mut values = numbers(positions as usize * width, 4);
    for row in values.chunks_exact_mut(width) {
        row[..turned].iter_mut().for_each(|v| *v = v.clamp(-1.0, 1.0));
    }
    let run = |device: &Device, is_shared: bool| -> Result<[Vec<f32>; 2]> {
        let shape =
            CacheShape { layers: 1, kv_heads, head_dim, pages: 2 * blocks, slots: 6, blocks };
        let mut cache: Cache<bf16> = Cache::new(device, shape)?;
        let (first, second): (Vec<u32>, Vec<u32>) =
            (0..blocks as u32).map(|block| (2 * block, 2 * block + 1)).unzip();
        cache.set_tables(0, std::slice::from_ref(&first))?;
        let frequencies = Rope::plain(head_dim, 10_000.0).frequencies;
        let rope = RopeTable::new(device, positions as usize, head_dim, &frequencies, 1.0)?;
        let list = RowList {
            slot: vec![0; positions as usize],
            position: (0..positions).collect(),
            receipt: vec![-1; positions as usize],
        };
        let at = Rows::upload(device, &list)?;
        let mut qkv = Buffer::upload(device, &values)?;
        let rows = positions as usize;
        // With two key heads, queries and keys are normalised together, to scores that stay small.
        let gain = |heads: usize| Buffer::upload(device, &vec![0.25; heads * head_dim]);
        let (q, k) = (gain(heads)?, gain(kv_heads)?);
        let norms = QueryNorms { q, k, eps: 1e-5, whole: true };
        let operands = RopeAppend {
            rows,
            heads,
            qkv: &mut qkv,
            at: &at,
            norms: Some(&norms).filter(|_| kv_heads == 2),
            rope: Some(&rope),
            layer: 0,
            cache: &mut cache,
        };
        rope_append(device, operands)?;
        // The other sequences read copies.
        let pairs: Vec<[u32; 2]> = first.iter().zip(&second).map(|(&a, &b)| [a, b]).collect();
        copy_pages(device, &pairs, &mut cache)?;
        (1..6).try_for_each(|slot| cache.set_tables(slot, std::slice::from_ref(&second)))?;
        let all = rows_of(device, &cache, &qkv, heads, &list, |_| SharedPrefix::default())?;
        let last = RowList {
            slot: vec![1, 2, 3, 4, 5],
            position: vec![positions - 1; 5],
            receipt: vec![-1; 5],
        };
        let rotated = read(&qkv)?;
        let query = Buffer::upload(device, &rotated[rotated.len() - width..].repeat(5))?;
        let prefix = SharedPrefix { group: 1, tiles_below: 2, tiles_above: 2, cut: 0 };
        let shared = |_| if is_shared { prefix } else { SharedPrefix::default() };
        Ok([all, rows_of(device, &cache, &query, heads, &last, shared)?])
    };
    let ([got, shared], [_, alone]) = (run(device, true)?, run(device, false)?);
    let [want, _] = run(cpu, false)?;
    let shape = format!("{heads} heads of {head_dim}, {kv_heads} for keys");
    // Queries, weights (twice) and results are rounded to bf16; scores here are of a few units.
    Ok(vec![
        Comparison::new(
            format!("rope_append, attention: {shape}"),
            distance(&got, &want),
            8.0 * BF16,
        ),
        Comparison::new(
            format!("attention, shared or alone: {shape}: other bits"),
            different(&shared, &alone),
            0.0,
        ),
        Comparison::new(
            format!("copy_pages, attention: {shape}: other bits than the original's"),
            different(&alone[..heads * head_dim], &got[got.len() - heads * head_dim..]),
            0.0,
        ),
    ])
}

fn rows_of(
    device: &Device,
    cache: &Cache<bf16>,
    qkv: &Buffer<f32>,
    heads: usize,
    list: &RowList,
    shared: impl Fn(u32) -> SharedPrefix,
) -> Result<Vec<f32>> {
    let (rows, shape) = (list.slot.len(), cache.shape);
    let state = heads * (kernel_head_dim(shape.head_dim) + 2);
    let mut plan = AttentionPlan::new(device, (rows, rows), state, false)?;
    plan.set(&Items::build(list, heads / shape.kv_heads, plan.capacity(), shared))?;
    let mut out = Activations::zeroed(device, rows, heads * shape.head_dim)?;
    let operands = Attention {
        rows,
        heads,
        qkv,
        at: &Rows::upload(device, list)?,
        plan: &mut plan,
        layer: 0,
        cache,
        scale: 1.0 / (shape.head_dim as f32).sqrt(),
        soft_cap: None,
        window: None,
        out: &mut out,
    };
    attention(device, operands)?;
    read_rows(&out)
}

fn logits(cpu: &Device, device: &Device, vocab: usize) -> Result<Vec<Comparison>> {
    let rows = 4;
    let values: Vec<f32> = numbers(rows * vocab, 11).iter().map(|v| v * 4.0).collect();
    let draw = |at: u32| Draw {
        row: at % rows as u32,
        slot: NONE,
        seed: u64::from(at) << 20 | 3,
        index: at,
        temperature: [1.0, 0.0, 0.7, 1.0, 1.3][at as usize % 5],
        top_k: [0, 0, 50, 0, 7][at as usize % 5],
        top_p: [1.0, 1.0, 1.0, 0.9, 0.8][at as usize % 5],
        min_p: [0.0, 0.0, 0.0, 0.0, 0.05][at as usize % 5],
    };
    let list: Vec<Draw> = (0..40).map(draw).collect();
    let run = |device: &Device| -> Result<[Vec<f32>; 3]> {
        let mut capped = Buffer::upload(device, &values)?;
        cap_logits(device, values.len(), 0.5, Some(3.0), &mut capped)?;
        let logits = Buffer::upload(device, &values)?;
        let mut draws = Draws::new(device, list.len(), 1)?;
        draws.set(&list)?;
        sample(device, vocab, &logits, &mut draws)?;
        let ids = vec![Id::Token(3), Id::Drawn(2), Id::Token(vocab as u32 - 1)];
        let wanted: Vec<Wanted> =
            (0..rows).map(|row| Wanted { row, ids: ids.clone(), top: 10 }).collect();
        let mut summaries = Summaries::new(device, rows, 3 * rows, 10 * rows)?;
        summarize(device, vocab, &logits, &draws.tokens, &wanted, &mut summaries)?;
        let mut staging = summaries.staging(device)?;
        summaries.fetch(&mut staging)?;
        let mut tokens = vec![0; list.len()];
        draws.tokens.read(0, &mut tokens)?;
        let words = staging.get().into_iter().flat_map(|summary| {
            let top = summary.top.into_iter().flat_map(|(id, logprob)| [id as f32, logprob]);
            let first = [summary.logsumexp, summary.entropy].into_iter().chain(summary.logits);
            first.chain(top).collect::<Vec<_>>()
        });
        let tokens = tokens.iter().map(|&token| token as f32).collect();
        Ok([tokens, words.collect(), read(&capped)?])
    };
    let ([tokens, words, capped], [want_tokens, want_words, want_capped]) =
        (run(device)?, run(cpu)?);
    Ok(vec![
        Comparison::new("cap_logits", distance(&capped, &want_capped), 8.0 * U),
        Comparison::new("sample: other tokens", different(&tokens, &want_tokens), 0.0),
        Comparison::new("summarize", distance(&words, &want_words), 64.0 * U),
    ])
}

/// A small model of random weights with injections: its stream against the processor's, and
/// whether its replies depend on what else runs.
fn model(kind: DeviceKind, config: &ModelConfig) -> Result<Vec<Comparison>> {
    let options = |device, dtype, max_batch, share| Options {
        device,
        dtype,
        threads: Some(1),
        max_batch,
        share,
        ..Options::default()
    };
    let workload = Workload {
        prompt_tokens: 90,
        start: 70,
        layer: 1,
        all_layers: false,
        new_tokens: 12,
        trials: 7,
        vectors: 3,
        capture: (0..config.layers).collect(),
    };
    let jobs: Vec<Job> = workload.jobs(config).collect();
    let run = |options: &Options| -> Result<Vec<Finished>> {
        let engine = Engine::start_random(config, options)?;
        let mut results = vec![Finished::default(); jobs.len()];
        engine.run_all(jobs.clone(), |at, finished| {
            results[at] = finished?;
            Ok(())
        })?;
        Ok(results)
    };
    let exact = run(&options(DeviceKind::Cpu, Dtype::F32, 8, true))?;
    let processor = run(&options(DeviceKind::Cpu, Dtype::Bf16, 8, true))?;
    let batch = run(&options(kind, Dtype::Bf16, 8, true))?;
    let alone = run(&options(kind, Dtype::Bf16, 1, false))?;
    let worst_row = |results: &[Finished]| {
        let captures = |results: &[Finished]| -> Vec<f32> {
            results.iter().flat_map(|result| result.captures.concat()).collect()
        };
        let (got, want) = (captures(results), captures(&exact));
        let rows = got.chunks(config.dim).zip(want.chunks(config.dim));
        let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|v| v * v).sum::<f64>().sqrt();
        let error = |(got, want): (&[f32], &[f32])| {
            let off = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
            off / norm(&mut want.iter().map(|&v| f64::from(v)))
        };
        rows.map(error).fold(0.0, f64::max)
    };
    let other = batch.iter().zip(&alone).filter(|(batch, alone)| {
        let tokens = |finished: &Finished| finished.outcome.samples[0].tokens.clone();
        tokens(batch) != tokens(alone) || batch.captures != alone.captures
    });
    let touched = |finished: &Finished| {
        finished.outcome.receipts.iter().all(|r| r.rows_touched == r.rows_expected)
    };
    Ok(vec![
        // The kernels also round queries and attention's weights.
        Comparison::new(
            "model: worst row of the stream, against f32",
            worst_row(&batch),
            2.0 * worst_row(&processor),
        ),
        Comparison::new("model: trials that depend on their batch", other.count() as f64, 0.0),
        Comparison::new(
            "model: trials without proof of their injection",
            batch.iter().filter(|finished| !touched(finished)).count() as f64,
            0.0,
        ),
    ])
}
