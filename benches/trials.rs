//! Whole workloads at SmolLM2-135M's shape, with random weights: trials that share a prompt, with
//! and without sharing, and one trial alone. The prompt's clean run is known after the first
//! round. `inkling bench trials` and `bench single` measure more, of any model.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use inkling::{
    bench::Workload,
    engine::{Engine, Options},
    model::ModelConfig,
};

const PROMPT: usize = 180;
const NEW: usize = 20;

fn trials(criterion: &mut Criterion) {
    let config = ModelConfig::of_shape("smollm2-135m", PROMPT + NEW).unwrap();
    let mut group = criterion.benchmark_group("new tokens of trials");
    group.sample_size(10);
    for (name, share, trials) in [("shared", true, 1), ("shared", true, 16), ("alone", false, 16)] {
        let engine =
            Engine::start_random(&config, &Options { share, ..Options::default() }).unwrap();
        let workload = Workload {
            prompt_tokens: PROMPT,
            start: 140,
            layer: 20,
            all_layers: false,
            new_tokens: NEW,
            trials,
            vectors: trials,
            capture: Vec::new(),
        };
        group.throughput(Throughput::Elements((trials * NEW) as u64));
        group.bench_function(BenchmarkId::new(name, trials), |bencher| {
            bencher.iter(|| {
                let jobs = workload.jobs(&config);
                engine.run_all(jobs, |_, finished| finished.map(|_| ())).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, trials);
criterion_main!(benches);
