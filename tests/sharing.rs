//! What jobs share changes nothing: random jobs in random batches, each against itself alone with
//! nothing shared, bit for bit.

#[path = "common/mod.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod common;

use std::sync::Arc;

use common::golden;
use inkling::{
    device::{DeviceKind, cuda::has_host_kernels},
    engine::{Capture, Condition, Dtype, Engine, Finished, Injection, Job, Options, Reduce},
    model::{Model, ModelConfig},
    request::{CaptureSite, Measure, Op, Sampling, Site, StrengthMode},
};

/// Several, each (dim,), or of several rows.
type Vectors = [Arc<[f32]>];

/// A stream of random choices.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len())]
    }

    fn happens(&mut self, percent: usize) -> bool {
        self.roll(100) < percent
    }
}

/// Prompts of which many have a beginning in common; some are the whole of another's beginning.
fn prompts(dice: &mut Dice, vocab: usize) -> Vec<Vec<u32>> {
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for at in 0..7 {
        let mut prompt = match at {
            0 | 1 => Vec::new(),
            _ => {
                let parent = &prompts[dice.roll(prompts.len())];
                parent[..=dice.roll(parent.len())].to_vec()
            }
        };
        let more = if at < 2 { 30 + dice.roll(40) } else { dice.roll(25) };
        prompt.extend((0..more).map(|_| dice.roll(vocab) as u32));
        prompts.push(prompt);
    }
    prompts
}

fn vectors(dice: &mut Dice, dim: usize) -> Vec<Arc<[f32]>> {
    let mut vector = || (0..dim).map(|_| dice.roll(2001) as f32 / 1000.0 - 1.0).collect();
    (0..4).map(|_| vector()).collect()
}

fn injection(
    dice: &mut Dice,
    prompt: usize,
    config: &ModelConfig,
    vectors: &[Arc<[f32]>],
) -> Injection {
    let layers = config.layers;
    let from = dice.roll(prompt + 1);
    let to = from + 1 + dice.roll(prompt);
    let modes = [StrengthMode::Raw, StrengthMode::Unit, StrengthMode::Raw, StrengthMode::Reference];
    // A reference needs a position of the prompt other than the first.
    let mode =
        if from < prompt && to > 1 && prompt > 1 { dice.pick(&modes) } else { StrengthMode::Raw };
    let stream = [Site::ResidPre, Site::ResidMid, Site::ResidPost];
    let (branch, layer) = ([Site::AttnOut, Site::MlpOut, Site::HeadOut], dice.roll(layers));
    let site = if mode == StrengthMode::Reference || dice.happens(70) {
        dice.pick(&stream)
    } else {
        dice.pick(&branch)
    };
    let op = match dice.happens(50) {
        true => Op::Add,
        false => dice.pick(&[Op::ProjectOut, Op::Set, Op::Clamp, Op::Replace, Op::Scale]),
    };
    let is_head = site == Site::HeadOut;
    let width = if is_head { config.head_dim } else { config.dim };
    let to = dice.happens(60).then_some(to);
    let every = dice.pick(&[1, 1, 1, 3]);
    // Each position its own vector, where they are used as they are.
    let own = matches!(op, Op::Add | Op::Replace) && mode == StrengthMode::Raw && dice.happens(30);
    let positions = to.filter(|_| own).map(|to| (to - from).div_ceil(every));
    let vector = &vectors[dice.roll(vectors.len())];
    let vector = match (op, positions) {
        (Op::Scale, _) => Arc::default(),
        (_, None) if is_head => Arc::from(&vector[..width]),
        (_, None) => Arc::clone(vector),
        (_, Some(count)) => {
            (0..count * width).map(|at| vector[(at * 7 + at / width) % width]).collect()
        }
    };
    let latch = layer > 0 && dice.happens(50);
    let when = (site != Site::ResidPre && dice.happens(25)).then(|| {
        Arc::new(Condition {
            vector: Arc::clone(&vectors[dice.roll(vectors.len())]),
            site: Site::ResidPre,
            layer: if latch { dice.roll(layer) } else { layer },
            measure: dice.pick(&[Measure::Cosine, Measure::Coordinate]),
            above: dice.pick(&[0.0, -0.1]),
            below: f32::INFINITY,
            latch,
        })
    });
    Injection {
        vector,
        by_position: positions.is_some() && op != Op::Scale,
        site,
        layer,
        head: is_head.then(|| dice.roll(config.heads)),
        op,
        strength: dice.pick(&[0.0, 0.5, 1.0, -2.0]),
        mode,
        bounds: (-0.5, dice.pick(&[-0.5, 0.25, f32::INFINITY])),
        keep_norm: op != Op::Scale && dice.happens(20),
        from,
        to,
        every,
        when,
    }
}

fn capture(dice: &mut Dice, prompt: usize, config: &ModelConfig, probes: &[Arc<[f32]>]) -> Capture {
    let site = dice.pick(&[
        CaptureSite::ResidPre,
        CaptureSite::ResidMid,
        CaptureSite::ResidPost,
        CaptureSite::AttnOut,
        CaptureSite::MlpOut,
        CaptureSite::HeadOut,
        CaptureSite::Q,
        CaptureSite::K,
        CaptureSite::V,
        CaptureSite::FinalNorm,
        CaptureSite::Logits,
    ]);
    let mut positions: Vec<usize> = (0..prompt).filter(|_| dice.happens(20)).collect();
    if positions.is_empty() {
        positions.push(dice.roll(prompt));
    }
    let is_wide = matches!(
        site,
        CaptureSite::Logits
            | CaptureSite::HeadOut
            | CaptureSite::Q
            | CaptureSite::K
            | CaptureSite::V
    );
    let reduce = match dice.roll(4) {
        0 => Reduce::Mean,
        1 if !is_wide => Reduce::Probe(Arc::clone(&probes[dice.roll(probes.len())])),
        _ => Reduce::Rows,
    };
    Capture { site, layer: site.has_layer().then(|| dice.roll(config.layers)), positions, reduce }
}

fn job(
    dice: &mut Dice,
    config: &ModelConfig,
    tokens: Vec<u32>,
    (vectors, probes): (&Vectors, &Vectors),
) -> Job {
    let prompt = tokens.len();
    let injections = dice.pick(&[0, 1, 1, 1, 2, 3]);
    let captures = dice.pick(&[0, 0, 1, 3]);
    let room = config.context - prompt;
    let max_tokens = dice.roll(9).min(room) as u32;
    Job {
        inject: (0..injections).map(|_| injection(dice, prompt, config, vectors)).collect(),
        capture: (0..captures).map(|_| capture(dice, prompt, config, probes)).collect(),
        sampling: Sampling {
            seed: dice.roll(3) as u64,
            max_tokens,
            temperature: dice.pick(&[0.0, 1.0, 1.0]),
            top_k: dice.pick(&[0, 0, 20]),
            ignore_eos: dice.happens(50),
            ..Sampling::default()
        },
        n: dice.pick(&[1, 1, 1, 3]),
        logprobs: dice.pick(&[None, None, Some(0), Some(2)]),
        score: if dice.happens(15) { vec![vec![3, 1, 4], vec![9]] } else { Vec::new() },
        watch: if dice.happens(30) { vec![2, 7] } else { Vec::new() },
        stop: Vec::new(),
        tokens,
    }
}

/// Random jobs. Every third one is an earlier one again, with another seed or another end, or with
/// an injection of strength zero, or just the same.
fn jobs(dice: &mut Dice, config: &ModelConfig, count: usize) -> Vec<Job> {
    let (prompts, vectors) = (prompts(dice, config.vocab), vectors(dice, config.dim));
    // Of several vectors, one, and none: the norm alone.
    let probes = [3, 1, 0].map(|count| -> Arc<[f32]> {
        (0..count * config.dim).map(|_| dice.roll(2001) as f32 / 1000.0 - 1.0).collect()
    });
    let mut jobs: Vec<Job> = Vec::new();
    while jobs.len() < count {
        if jobs.len() % 3 < 2 {
            let tokens = prompts[dice.roll(prompts.len())].clone();
            let job = job(dice, config, tokens, (&vectors, &probes));
            // A window behind the last row is refused, here as elsewhere.
            let rows = job.tokens.len() + (job.sampling.max_tokens as usize).saturating_sub(1);
            if job.inject.iter().all(|injection| injection.from < rows) {
                jobs.push(job);
            }
            continue;
        }
        let mut again = jobs[dice.roll(jobs.len())].clone();
        match dice.roll(4) {
            0 => again.sampling.seed += 10,
            1 => again.sampling.ignore_eos = !again.sampling.ignore_eos,
            2 => {
                let idle = injection(dice, again.tokens.len(), config, &vectors);
                let from = idle.from.min(again.tokens.len() - 1);
                let mode = StrengthMode::Raw;
                let is_head = idle.site == Site::HeadOut;
                let width = if is_head { config.head_dim } else { config.dim };
                let (vector, by_position) = (Arc::from(&vectors[0][..width]), false);
                let idle = Injection { vector, by_position, op: Op::Add, ..idle };
                let idle = Injection { keep_norm: false, when: None, ..idle };
                again.inject.insert(0, Injection { strength: 0.0, from, to: None, mode, ..idle });
            }
            _ => {}
        }
        jobs.push(again);
    }
    jobs
}

fn run(model: &Model, options: &Options, jobs: &[Job]) -> (Vec<Finished>, u64) {
    let engine = Engine::start(model, options).unwrap();
    let mut results = vec![None; jobs.len()];
    let store = |at: usize, result: inkling::error::Result<Finished>| {
        results[at] = Some(result?);
        Ok(())
    };
    engine.run_all(jobs.to_vec(), store).unwrap();
    let results = results.into_iter().map(Option::unwrap).collect();
    (results, engine.stats().layer_rows_saved())
}

/// What is compared: all but the reference norms of receipts, which only clean runs know. Every row that
/// was to be changed was, also where conditions decided.
fn comparable(mut finished: Finished) -> Finished {
    for receipt in &mut finished.outcome.receipts {
        let is_idle = receipt.op == Op::Add && receipt.strength == 0.0;
        let expected = if is_idle { 0 } else { receipt.rows_expected };
        assert_eq!(receipt.rows_touched, expected, "{receipt:?}");
        receipt.reference_norm = None;
    }
    finished
}

fn check(name: &str, options: &Options, seeds: std::ops::Range<u64>, count: usize) {
    let model = Model::open(&golden(name)).unwrap();
    for seed in seeds {
        let mut dice = Dice(seed);
        let jobs = jobs(&mut dice, &model.config, count);
        let alone = Engine::start(&model, &Options { share: false, ..options.clone() }).unwrap();
        let want = jobs.iter().map(|job| comparable(alone.run(job.clone()).unwrap()));
        let want: Vec<Finished> = want.collect();
        let max_batch = dice.pick(&[1, 4, 16, 64]);
        let (got, saved) = run(&model, &Options { max_batch, ..options.clone() }, &jobs);
        assert!(saved > 0, "nothing was shared");
        for (at, (got, want)) in got.into_iter().zip(&want).enumerate() {
            let (got, job) = (comparable(got), &jobs[at]);
            let what = format!("{name}, {options:?}, seed {seed}, batch {max_batch}, job {at}");
            assert_eq!(got.outcome, want.outcome, "{what}: {job:?}");
            assert!(got.captures == want.captures, "{what}, captures: {job:?}");
        }
    }
}

#[test]
fn sharing_changes_nothing_in_bf16() {
    let options = Options { threads: Some(2), ..Options::default() };
    check("plain", &options, 0..12, 60);
    check("mqa", &options, 12..18, 60);
}

#[test]
fn sharing_changes_nothing_in_f32() {
    let options = Options { threads: Some(2), dtype: Dtype::F32, ..Options::default() };
    check("plain", &options, 20..28, 60);
    check("sharded", &Options { behind: true, ..options }, 28..32, 60);
}

/// Windows, norms of what is added, blocks without rope, mixtures of experts.
#[test]
fn sharing_changes_nothing_in_any_family() {
    let options = Options { threads: Some(2), ..Options::default() };
    let families = ["gemma2", "gemma3", "granite", "mistral", "mixtral", "olmo3", "phi3_longrope"];
    let families = families.into_iter().chain(["qwen2_window", "qwen3_moe_mixed", "smollm3"]);
    for (seed, name) in (50..).zip(families) {
        check(&format!("families/{name}"), &options, seed..seed + 2, 40);
    }
}

#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels")]
fn sharing_changes_nothing_by_kernels() {
    assert!(has_host_kernels());
    let options =
        Options { device: DeviceKind::HostKernels, threads: Some(2), ..Options::default() };
    check("plain", &options, 40..42, 18);
    for (seed, name) in (70..).zip(["gemma3", "olmo3", "qwen3_moe"]) {
        check(&format!("families/{name}"), &options, seed..seed + 1, 24);
    }
}

/// Several seeds of one injected prompt are one pass over it, and equal jobs are one job.
#[test]
fn equal_prompts_are_computed_once() {
    let model = Model::open(&golden("plain")).unwrap();
    let (mut dice, config) = (Dice(7), &model.config);
    let vectors = vectors(&mut dice, config.dim);
    let tokens: Vec<u32> = (0..40).map(|at| at * 3 % 131).collect();
    let inject = Injection {
        vector: Arc::clone(&vectors[0]),
        layer: 1,
        strength: 1.0,
        from: 20,
        ..Injection::default()
    };
    let sampling = Sampling { max_tokens: 5, ignore_eos: true, ..Sampling::default() };
    let one = Job { tokens, inject: vec![inject], sampling, n: 1, ..Job::default() };
    let seeded = |seed| Job { sampling: Sampling { seed, ..sampling }, ..one.clone() };
    let seeds: Vec<Job> = (0..6).map(seeded).collect();
    let engine =
        Engine::start(&model, &Options { threads: Some(1), ..Options::default() }).unwrap();
    let stats_of = |jobs: &[Job]| {
        let before = engine.stats();
        engine.run_all(jobs.to_vec(), |_, finished| finished.map(|_| ())).unwrap();
        let after = engine.stats();
        let rows = after.prompt_layer_rows - before.prompt_layer_rows;
        (rows, after.tokens - before.tokens)
    };
    let layers = config.layers as u64;
    // The clean run, and 20 rows above block 1.
    assert_eq!(stats_of(&seeds), (40 * layers + 20 * (layers - 2), 6 * 5));
    // The clean run is known now.
    assert_eq!(stats_of(&[seeded(9), seeded(9), seeded(9)]), (20 * (layers - 2), 5));
}

/// Jobs of one prompt whose probes do not fit into the bank together, and whose norms are all one.
#[test]
fn probes_that_do_not_fit_together_come_one_after_the_other() {
    let model = Model::open(&golden("plain")).unwrap();
    let (mut dice, config) = (Dice(9), &model.config);
    let tokens: Vec<u32> = (0..30).map(|at| at * 5 % 131).collect();
    let steering = Injection {
        vector: vectors(&mut dice, config.dim)[0].clone(),
        layer: 2,
        strength: 1.0,
        from: 20,
        ..Injection::default()
    };
    let job = |at: usize| {
        let probe = |count: usize| -> Arc<[f32]> {
            (0..count * config.dim).map(|i| ((at + i) % 11) as f32 - 5.0).collect()
        };
        let capture = |layer, probe| Capture {
            reduce: Reduce::Probe(probe),
            ..Capture::rows(CaptureSite::ResidPost, Some(layer), vec![3, 12, 25])
        };
        Job {
            tokens: tokens.clone(),
            inject: vec![steering.clone()],
            capture: vec![capture(0, probe(300)), capture(1, probe(0)), capture(2, probe(1))],
            sampling: Sampling { max_tokens: 0, ..Sampling::default() },
            n: 1,
            ..Job::default()
        }
    };
    let jobs: Vec<Job> = (0..20).map(job).collect();
    let options = Options { threads: Some(1), capture_bytes: Some(100_000), ..Options::default() };
    let alone = Engine::start(&model, &Options { share: false, ..options.clone() }).unwrap();
    let (got, _) = run(&model, &options, &jobs);
    for (at, got) in got.into_iter().enumerate() {
        assert!(got.captures == alone.run(jobs[at].clone()).unwrap().captures, "job {at}");
    }
}

/// Jobs of one prompt that together want more logits of its last row than are read at once.
#[test]
fn more_watched_tokens_than_fit_are_more_passes() {
    let model = Model::open(&golden("plain")).unwrap();
    let watch: Vec<u32> = (0..10_000).map(|at| at % model.config.vocab as u32).collect();
    let job = |at: usize| Job {
        tokens: vec![1, 2, 3],
        watch: watch[at..].to_vec(),
        sampling: Sampling { max_tokens: 0, ..Sampling::default() },
        n: 1,
        ..Job::default()
    };
    let jobs: Vec<Job> = (0..20).map(job).collect();
    let (got, _) = run(&model, &Options { threads: Some(1), ..Options::default() }, &jobs);
    let first = got[0].outcome.first.clone().unwrap();
    for (at, got) in got.iter().enumerate() {
        let got = got.outcome.first.as_ref().unwrap();
        assert!(got.watch == first.watch[at..], "job {at}");
    }
}
