//! What the engine promises: a job's result never depends on its neighbours, on what is shared,
//! on threads or instruction sets; and no injection is silently lost. On the processor, and with the
//! CUDA kernels on all that runs them.

use std::path::{Path, PathBuf};

use inkling::{
    device::{
        Cuda, DeviceKind,
        cpu::Isa,
        cuda::{MatrixPath, has_host_kernels},
    },
    engine::{
        Dtype, Engine,
        Event::{Done, Failed},
        Finished, Job, Options,
        resolve::resolve,
        vectors::VectorFiles,
    },
    model::Model,
    request::{Request, Sampling},
};

const MODELS: [&str; 3] = ["plain", "mqa", "sharded"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn requests(name: &str, model: &Model) -> Vec<Job> {
    let text = std::fs::read_to_string(folder(name).join("requests.jsonl")).unwrap();
    let mut files = VectorFiles::new(folder(name));
    let job = |line| {
        let mut request: Request = serde_json::from_str(line).unwrap();
        request.sampling = Sampling { max_tokens: 0, ..Sampling::default() };
        resolve(&request, model, &mut files).unwrap().job
    };
    text.lines().map(job).collect()
}

/// Captures only, samples at several temperatures, several samples, scores, log-probabilities.
fn variety(name: &str, model: &Model) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (at, job) in requests(name, model).into_iter().enumerate() {
        let room = model.config.context - job.tokens.len();
        let sampling = Sampling {
            max_tokens: room.min(3 + at % 11) as u32,
            seed: 77 + at as u64,
            ignore_eos: true,
            ..Sampling::default()
        };
        let sampled = Job { capture: Vec::new(), sampling, n: 1, ..job.clone() };
        jobs.push(match at % 4 {
            0 => Job { n: 3, logprobs: Some(2), ..sampled },
            1 => Job { score: vec![vec![3, 1, 4, 1, 5], vec![9]], watch: vec![2, 7], ..sampled },
            2 => Job { sampling: Sampling { temperature: 0.0, ..sampling }, ..sampled },
            _ => {
                let sampling = Sampling { top_p: 0.8, top_k: 20, min_p: 0.01, ..sampling };
                Job { sampling, ..sampled }
            }
        });
        jobs.push(job);
    }
    jobs
}

fn options() -> Options {
    Options { dtype: Dtype::Bf16, threads: Some(2), ..Options::default() }
}

/// Every way to run a model: on the processor with the results read at once or a step behind, with
/// either family of matrix kernels on the processor, and on the GPU where there is one. The kernels
/// take heads of a multiple of 8, which `sharded` does not have.
fn setups(name: &str) -> Vec<(String, Options)> {
    let mut setups = vec![
        (format!("{name} on cpu"), options()),
        (format!("{name} on cpu, a step behind"), Options { behind: true, ..options() }),
    ];
    if name == "plain" {
        for isa in [Isa::AmxEmulated, Isa::Avx512Bf16Emulated] {
            setups.push((format!("{name} on {isa}"), Options { isa: Some(isa), ..options() }));
        }
    }
    if name == "sharded" {
        return setups;
    }
    if has_host_kernels() {
        let device = DeviceKind::HostKernels;
        let mma = (name == "plain").then_some((MatrixPath::Mma, false));
        for (path, behind) in [(MatrixPath::Wgmma, true)].into_iter().chain(mma) {
            let matrix_path = Some(path);
            let options = Options { device, matrix_path, behind, ..options() };
            setups.push((format!("{name} on host kernels, {path:?}"), options));
        }
    }
    match Cuda::gpu(0) {
        Ok(_) => {
            let device = DeviceKind::Cuda(0);
            setups.push((format!("{name} on the GPU"), Options { device, ..options() }));
        }
        Err(error) => assert!(std::env::var_os("REQUIRE_GPU").is_none(), "{error}"),
    }
    setups
}

fn run_on(engine: &Engine, jobs: &[Job]) -> Vec<Finished> {
    let mut results = vec![None; jobs.len()];
    let store = |at: usize, result: inkling::error::Result<Finished>| {
        results[at] = Some(result?);
        Ok(())
    };
    engine.run_all(jobs.to_vec(), store).unwrap();
    results.into_iter().map(Option::unwrap).collect()
}

fn run(model: &Model, options: &Options, jobs: &[Job]) -> Vec<Finished> {
    run_on(&Engine::start(model, options).unwrap(), jobs)
}

/// Receipts aside, whose reference norm is known only where there was a clean run.
fn numbers(mut results: Vec<Finished>) -> Vec<Finished> {
    results.iter_mut().for_each(|result| result.outcome.receipts.clear());
    results
}

fn assert_same(what: &str, got: &[Finished], want: &[Finished]) {
    assert_eq!(got.len(), want.len());
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.outcome, want.outcome, "{what}: job {at}");
        assert!(got.captures == want.captures, "{what}: captures of job {at}");
    }
}

#[test]
fn a_result_does_not_depend_on_batch_order_threads_or_instruction_set() {
    for (what, options) in MODELS.iter().flat_map(|name| setups(name)) {
        let name = what.split(' ').next().unwrap();
        let model = Model::open(&folder(name)).unwrap();
        let jobs = variety(name, &model);
        let want = run(&model, &options, &jobs);
        // On the processor the kernels take a while.
        let slow = options.device == DeviceKind::HostKernels;
        for max_batch in if slow { &[3][..] } else { &[1, 3, 17] } {
            let options = Options { max_batch: *max_batch, ..options.clone() };
            let got = run(&model, &options, &jobs);
            assert_same(&format!("{what}, batch {max_batch}"), &got, &want);
        }
        let backwards: Vec<Job> = jobs.iter().rev().cloned().collect();
        let mut got = run(&model, &options, &backwards);
        got.reverse();
        assert_same(&format!("{what}, backwards"), &got, &want);
        let engine = Engine::start(&model, &options).unwrap();
        let alone = |job: &Job| engine.run(job.clone()).unwrap();
        let alone: Vec<Finished> = jobs.iter().map(alone).collect();
        assert_same(&format!("{what}, alone"), &alone, &want);
        if options.device == DeviceKind::Cpu && options.isa.is_none() {
            // Without what this machine has over others, but with the same bits.
            let isa = Some(Isa::detect().emulated());
            let portable = Options { threads: Some(1), isa, ..options };
            assert_same(&format!("{what}, portable"), &run(&model, &portable, &jobs), &want);
        }
    }
}

/// A step's results are read while the next one runs: that changes nothing either.
#[test]
fn a_step_behind_is_the_same() {
    for name in MODELS {
        let mut model = Model::open(&folder(name)).unwrap();
        let mut jobs = variety(name, &model);
        // Stop tokens end replies while a row of theirs is under way.
        jobs.iter_mut().for_each(|job| job.sampling.ignore_eos = false);
        model.config.stop_tokens = (0..model.config.vocab as u32 / 4).collect();
        let want = run(&model, &options(), &jobs);
        let got = run(&model, &Options { behind: true, ..options() }, &jobs);
        assert_same(name, &got, &want);
        let ended = want.iter().flat_map(|result| &result.outcome.samples);
        assert!(ended.filter(|s| s.finish == inkling::engine::Finish::Stop).count() > 3);
    }
}

#[test]
fn sharing_changes_no_bit() {
    for (what, options) in MODELS.iter().flat_map(|name| setups(name)) {
        let name = what.split(' ').next().unwrap();
        let model = Model::open(&folder(name)).unwrap();
        let jobs = variety(name, &model);
        let dtypes: &[Dtype] = match options.device {
            DeviceKind::Cpu => &[Dtype::Bf16, Dtype::F32],
            _ => &[Dtype::Bf16],
        };
        for &dtype in dtypes {
            let shared = run(&model, &Options { dtype, ..options.clone() }, &jobs);
            let options = Options { dtype, share: false, ..options.clone() };
            assert_same(&what, &numbers(run(&model, &options, &jobs)), &numbers(shared));
        }
    }
}

#[test]
fn a_small_cache_only_makes_jobs_wait() {
    let model = Model::open(&folder("plain")).unwrap();
    let jobs = variety("plain", &model);
    let longest = jobs.iter().map(|job| job.tokens.len() + 20).max().unwrap();
    let c = &model.config;
    // Keys may be padded to 32.
    let page_bytes = 2 * 16 * c.kv_heads * c.head_dim.next_multiple_of(32) * 2;
    let kv_bytes = Some((3 * longest.div_ceil(16) * c.layers * page_bytes) as u64);
    for (what, options) in setups("plain") {
        let want = run(&model, &options, &jobs);
        let got = run(&model, &Options { kv_bytes, ..options }, &jobs);
        assert_same(&what, &got, &want);
    }
}

#[test]
fn zero_strength_equals_no_injection() {
    let model = Model::open(&folder("mqa")).unwrap();
    let jobs: Vec<Job> = variety("mqa", &model);
    let injected: Vec<Job> = jobs.into_iter().filter(|job| !job.inject.is_empty()).collect();
    let mut zero = injected.clone();
    for injection in zero.iter_mut().flat_map(|job| &mut job.inject) {
        injection.strength = 0.0;
    }
    let none: Vec<Job> =
        injected.iter().map(|job| Job { inject: Vec::new(), ..job.clone() }).collect();
    for (what, options) in setups("mqa") {
        let (zero, none) = (run(&model, &options, &zero), run(&model, &options, &none));
        for (result, job) in zero.iter().zip(&injected) {
            let receipts = &result.outcome.receipts;
            assert_eq!(receipts.len(), job.inject.len());
            assert!(receipts.iter().all(|r| r.rows_touched == 0 && r.planned == Some(0.0)));
        }
        assert_same(&what, &numbers(zero), &numbers(none.clone()));
        let changed = run(&model, &options, &injected);
        let both = changed.iter().zip(&none).filter(|(_, none)| !none.captures.is_empty());
        for (changed, none) in both {
            assert!(
                changed.captures != none.captures,
                "{what}: a real injection changes a capture"
            );
        }
    }
}

#[test]
fn receipts_prove_every_injection() {
    let exact = Options { dtype: Dtype::F32, ..options() };
    let in_f32 = MODELS.map(|name| (format!("{name} in f32"), exact.clone()));
    for (name, options) in in_f32.into_iter().chain(MODELS.iter().flat_map(|name| setups(name))) {
        let folder_name = name.split(' ').next().unwrap();
        let model = Model::open(&folder(folder_name)).unwrap();
        let jobs = variety(folder_name, &model);
        let results = run(&model, &options, &jobs);
        for (job, result) in jobs.iter().zip(&results) {
            assert_eq!(job.inject.len(), result.outcome.receipts.len());
            for receipt in &result.outcome.receipts {
                assert!(receipt.rows_expected > 0, "{name}: {receipt:?}");
                assert_eq!(receipt.rows_expected, receipt.rows_touched, "{name}: {receipt:?}");
                let (planned, measured) = (receipt.planned.unwrap(), receipt.measured.unwrap());
                // h + change is rounded to f32 relative to h: 2^-24 · ‖h‖ / ‖change‖.
                let error = (planned - measured).abs() / planned;
                assert!(error < 1e-3, "{name}: planned {planned}, measured {measured}");
            }
        }
    }
}

#[test]
fn cancelled_jobs_leave_nothing_behind() {
    for (what, options) in setups("plain") {
        check_cancelling(&what, &options);
    }
}

fn check_cancelling(what: &str, options: &Options) {
    let model = Model::open(&folder("plain")).unwrap();
    let jobs = variety("plain", &model);
    let want = run(&model, options, &jobs);
    let engine = Engine::start(&model, &Options { max_batch: 4, ..options.clone() }).unwrap();
    for round in 0..3 {
        let (sender, events) = std::sync::mpsc::channel();
        for (tag, job) in jobs.iter().enumerate() {
            engine.submit(job.clone(), tag as u64, &sender).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(3 * round));
        (0..jobs.len() as u64).filter(|tag| tag % 3 == 0).for_each(|tag| engine.cancel(tag));
        drop(sender);
        let ended = events.iter().filter(|(_, event)| matches!(event, Done(_) | Failed(_)));
        assert_eq!(ended.count(), jobs.len());
    }
    assert_same(what, &run_on(&engine, &jobs), &want);
}

#[test]
fn logits_that_are_not_numbers_end_the_job_alone() {
    for (what, options) in setups("plain") {
        check_numbers(&what, &options);
    }
}

fn check_numbers(what: &str, options: &Options) {
    let model = Model::open(&folder("plain")).unwrap();
    let jobs = variety("plain", &model);
    let engine = Engine::start(&model, options).unwrap();
    let mut broken = jobs[0].clone();
    broken.inject = jobs.iter().find(|job| !job.inject.is_empty()).unwrap().inject[..1].to_vec();
    broken.inject[0] = inkling::engine::Injection {
        vector: vec![f32::MAX; model.config.dim].into(),
        strength: f32::MAX,
        mode: inkling::request::StrengthMode::Raw,
        from: 0,
        to: None,
        ..broken.inject[0].clone()
    };
    let error = engine.run(broken).unwrap_err().to_string();
    assert!(error.contains("not numbers"), "{what}: {error}");
    let want = run(&model, options, &jobs);
    assert_same(what, &run_on(&engine, &jobs), &want);
}

/// A device that fails ends every job with its error, those that come later too; what was done
/// before is as it would have been.
#[cfg(feature = "host-kernels")]
#[test]
fn a_device_that_fails_ends_every_job_with_its_error() {
    let model = Model::open(&folder("plain")).unwrap();
    let jobs = variety("plain", &model);
    let healthy = Options { device: DeviceKind::HostKernels, max_batch: 4, ..options() };
    let want = run(&model, &healthy, &jobs);
    for (launches, behind) in [(30, false), (500, false), (500, true)] {
        let failing = Options { fail_after: Some(launches), behind, ..healthy.clone() };
        let engine = Engine::start(&model, &failing).unwrap();
        let (mut done, mut failed) = (0, 0);
        let check = |at: usize, result: inkling::error::Result<Finished>| {
            match result {
                Ok(finished) => {
                    assert_eq!(finished.outcome, want[at].outcome, "job {at}");
                    done += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains("made to fail"), "{error}");
                    failed += 1;
                }
            }
            Ok(())
        };
        engine.run_all(jobs.clone(), check).unwrap();
        assert!(done + failed == jobs.len() && failed > 0, "{done} done, {failed} failed");
        assert!(launches < 100 || done > 0, "the test no longer fails in the middle");
        assert!(engine.run(jobs[0].clone()).is_err());
    }
}

/// A stream beyond f32, drawn from with every filter, only scored, or only watched.
#[test]
fn a_stream_beyond_f32_is_an_error_however_it_is_read() {
    for (what, options) in setups("plain") {
        check_beyond_f32(&what, &options);
    }
}

fn check_beyond_f32(what: &str, options: &Options) {
    let model = Model::open(&folder("plain")).unwrap();
    let engine = Engine::start(&model, options).unwrap();
    let jobs = variety("plain", &model);
    let injection = jobs.iter().flat_map(|job| &job.inject).next().unwrap();
    let huge = inkling::engine::Injection {
        vector: vec![1e30; model.config.dim].into(),
        strength: 1.0,
        mode: inkling::request::StrengthMode::Raw,
        from: 0,
        to: Some(1 << 40),
        ..injection.clone()
    };
    let none = Sampling { max_tokens: 0, ..Sampling::default() };
    let filtered =
        Sampling { top_k: 5, min_p: 0.1, top_p: 0.5, max_tokens: 3, ..Sampling::default() };
    let base = Job { tokens: vec![1, 2, 3], inject: vec![huge], n: 1, ..Job::default() };
    for job in [
        Job { sampling: filtered, ..base.clone() },
        Job { sampling: none, score: vec![vec![4, 5]], ..base.clone() },
        Job { sampling: none, watch: vec![7], ..base },
    ] {
        let error = engine.run(job).unwrap_err().to_string();
        assert!(error.contains("not numbers"), "{what}: {error}");
    }
}

/// Residual rows of a sweep over all layers do not fit at once, on prompts of which one is long.
#[test]
fn a_sweep_larger_than_the_residual_cache_finishes() {
    let model = Model::open(&folder("plain")).unwrap();
    let jobs = variety("plain", &model);
    let injection = jobs.iter().flat_map(|job| &job.inject).next().unwrap();
    let long: Vec<u32> = (0..480).map(|at| at % 131).collect();
    let sweep: Vec<Job> = (0..40)
        .map(|at| {
            let mut injection = injection.clone();
            injection.site = inkling::request::Site::ResidPost;
            injection.layer = at % model.config.layers;
            injection.mode = inkling::request::StrengthMode::Raw;
            (injection.from, injection.to) = (at % 7, None);
            Job {
                tokens: long[..480 - at / 8 * 40].to_vec(),
                inject: vec![injection],
                sampling: Sampling { max_tokens: 2, seed: at as u64, ..Sampling::default() },
                n: 1,
                ..Job::default()
            }
        })
        .collect();
    for (what, options) in setups("plain") {
        // The kernels take a while for prompts of this length on the processor.
        let sweep = if options.device == DeviceKind::HostKernels { &sweep[24..] } else { &sweep };
        let want = run(&model, &Options { share: false, ..options.clone() }, sweep);
        let slow = options.device == DeviceKind::HostKernels;
        for max_batch in if slow { &[5][..] } else { &[1, 5, 64] } {
            let options = Options { max_batch: *max_batch, ..options.clone() };
            let got = run(&model, &options, sweep);
            assert_same(&what, &numbers(got), &numbers(want.clone()));
        }
    }
}
