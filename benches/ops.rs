//! Single operations at SmolLM2-135M's shapes, on all cores.

use std::num::NonZero;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use inkling::{
    device::{Buffer, Cpu, Device, cpu::Isa},
    ops::{
        activations::Activations,
        matmul::{Dtype, Weight, matmul},
        rows::NONE,
        sample::{Draw, Draws, sample},
    },
};

const MAX_ROWS: usize = 512;
const WIDEST: usize = 1536;
const VOCAB: usize = 49_152;

fn on_all_cores(work: impl FnOnce(&Device)) {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let cpu = Cpu::new(Isa::detect(), threads, (MAX_ROWS + 8) * WIDEST).unwrap();
    work(&Device::Cpu(cpu));
}

/// Numbers that are not all equal.
fn filler(at: usize) -> f32 {
    (at * 7 % 13) as f32 * 0.1 - 0.6
}

fn matmuls(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul bf16, flop");
    for (name, n, k) in
        [("qkv", 960, 576), ("gate_up", 3072, 576), ("down", 576, WIDEST), ("head", VOCAB, 576)]
    {
        for rows in [1, 8, 64, MAX_ROWS].into_iter().filter(|rows| n * rows <= VOCAB * 64) {
            group.throughput(Throughput::Elements((2 * rows * n * k) as u64));
            group.bench_function(BenchmarkId::new(name, rows), |bencher| {
                on_all_cores(|device| {
                    let fill = |row: usize, out: &mut [f32]| {
                        out.iter_mut().enumerate().for_each(|(at, v)| *v = filler(row + at));
                    };
                    let weight = Weight::pack(device, Dtype::Bf16, (n, k), fill).unwrap();
                    let x: Vec<bf16> = (0..rows * k).map(|at| bf16::from_f32(filler(at))).collect();
                    let x = Activations::upload(device, k, &x).unwrap();
                    let mut out = Buffer::zeroed(device, rows * n).unwrap();
                    bencher.iter(|| matmul(device, rows, &x, &weight, &mut out).unwrap());
                });
            });
        }
    }
    group.finish();
}

fn samples(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sample, tokens");
    for rows in [1, 64] {
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            on_all_cores(|device| {
                let logits: Vec<f32> = (0..rows * VOCAB).map(|at| 10.0 * filler(at)).collect();
                let logits = Buffer::upload(device, &logits).unwrap();
                let draw = |row| Draw {
                    row,
                    slot: NONE,
                    seed: u64::from(row),
                    index: 0,
                    temperature: 1.0,
                    top_k: 0,
                    top_p: 1.0,
                    min_p: 0.0,
                };
                let list: Vec<Draw> = (0..rows as u32).map(draw).collect();
                let mut draws = Draws::new(device, rows, 1).unwrap();
                draws.set(&list).unwrap();
                bencher.iter(|| sample(device, VOCAB, &logits, &mut draws).unwrap());
            });
        });
    }
    group.finish();
}

criterion_group!(benches, matmuls, samples);
criterion_main!(benches);
