//! The workload: trials that share a prompt and differ in what is injected.

use std::{sync::Arc, time::Instant};

use serde::Serialize;

use crate::{
    engine::{Capture, Engine, Finished, Injection, Job, Stats},
    error::{Error, Result},
    model::ModelConfig,
    ops::philox::{Purpose, philox},
    request::{CaptureSite, Op, Sampling, Site, StrengthMode},
};

/// What is run.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// First injected position.
    pub start: usize,
    /// Injected at the output of this block.
    pub layer: usize,
    /// Injected at the outputs of all blocks instead.
    pub all_layers: bool,
    /// Tokens that each trial draws.
    pub new_tokens: usize,
    /// Trials.
    pub trials: usize,
    /// Distinct vectors among them.
    pub vectors: usize,
    /// Layers whose output is captured, at the injected positions of the prompt.
    pub capture: Vec<usize>,
}

/// What it took.
#[derive(Clone, Debug, Serialize)]
pub struct WorkloadReport {
    /// Trials finished.
    pub trials: usize,
    /// Of all trials.
    pub trials_per_s: f64,
    /// Drawn, of all trials.
    pub new_tokens_per_s: f64,
    /// In all.
    pub wall_s: f64,
    /// Steps with rows of prompts.
    pub prompt_s: f64,
    /// Steps of drawn tokens only.
    pub decode_s: f64,
    /// That the device worked on steps; the rest is the host's planning and handing out.
    pub device_s: f64,
    /// That the device worked on steps of drawn tokens only.
    pub decode_device_s: f64,
    /// Of matmuls.
    pub flops_per_s: f64,
    /// Steps.
    pub steps: u64,
    /// Rows computed.
    pub rows: u64,
    /// Rows × layers computed.
    pub layer_rows: u64,
    /// Rows × layers that sharing saved.
    pub layer_rows_saved: u64,
}

/// Numbers of mean 0 and variance 1, cheap to make: the clock runs meanwhile.
fn vector(dim: usize, seed: u64) -> Arc<[f32]> {
    let numbers = |at| philox(seed, [at, 0, Purpose::Vector as u32, 0]);
    let words = (0..dim.div_ceil(4) as u32).flat_map(numbers).take(dim);
    let half_width = 3.0_f32.sqrt();
    words.map(|word| (word as f32 / 2.0_f32.powi(31) - 1.0) * half_width).collect()
}

impl Workload {
    /// Refuses what does not fit the model.
    fn check(&self, config: &ModelConfig) -> Result<()> {
        let fits = |what: &str, got: usize, below: usize| match got < below {
            true => Ok(()),
            false => Err(Error::new(format!("{what} does not fit"))
                .expected(format!("below {below}"))
                .got(got)),
        };
        fits("--layer", self.layer, config.layers)?;
        fits("--start", self.start, self.prompt_tokens)?;
        fits(
            "--prompt-tokens and --new",
            self.prompt_tokens + self.new_tokens,
            config.context + 1,
        )?;
        if self.trials == 0 || self.vectors == 0 || self.new_tokens == 0 {
            return Err(Error::new("--trials, --vectors and --new must be at least 1"));
        }
        Ok(())
    }

    /// The trials, made as they are asked for. Vectors that several trials share are the same
    /// memory.
    pub fn jobs(&self, config: &ModelConfig) -> impl Iterator<Item = Job> {
        let shared = if self.vectors < self.trials { self.vectors } else { 0 };
        let shared: Vec<_> = (0..shared as u64).map(|seed| vector(config.dim, seed)).collect();
        (0..self.trials).map(move |trial| {
            let vector = match shared.len() {
                0 => vector(config.dim, trial as u64),
                len => Arc::clone(&shared[trial % len]),
            };
            self.job(config, trial, Some(vector))
        })
    }

    /// What is run before the clock starts: a trial for each of the engine's `slots`, as long as the
    /// measured ones but with most of its length in a prompt, another one than theirs, so that
    /// nothing of theirs is known.
    fn warm_up(&self, config: &ModelConfig, slots: usize) -> Vec<Job> {
        let new_tokens = self.new_tokens.min(4);
        let workload = Self {
            prompt_tokens: self.prompt_tokens + self.new_tokens - new_tokens,
            new_tokens,
            trials: self.trials.min(slots),
            ..self.clone()
        };
        let mut jobs: Vec<Job> = workload.jobs(config).collect();
        for token in jobs.iter_mut().flat_map(|job| &mut job.tokens) {
            *token = (*token + 1) % config.vocab as u32;
        }
        jobs
    }

    fn job(&self, config: &ModelConfig, trial: usize, vector: Option<Arc<[f32]>>) -> Job {
        let tokens = (0..self.prompt_tokens).map(|at| ((at * 7919 + 17) % config.vocab) as u32);
        let layers = if self.all_layers { 0..config.layers } else { self.layer..self.layer + 1 };
        let injection = |(vector, layer): (&Arc<[f32]>, usize)| Injection {
            vector: Arc::clone(vector),
            site: Site::ResidPost,
            layer,
            op: Op::Add,
            strength: 0.1,
            mode: StrengthMode::Raw,
            from: self.start,
            ..Injection::default()
        };
        let inject =
            vector.iter().flat_map(|vector| layers.clone().map(move |layer| (vector, layer)));
        let positions = self.start..self.prompt_tokens;
        let capture = |&layer: &usize| {
            Capture::rows(CaptureSite::ResidPost, Some(layer), positions.clone().collect())
        };
        Job {
            tokens: tokens.collect(),
            inject: inject.map(injection).collect(),
            capture: self.capture.iter().map(capture).collect(),
            sampling: Sampling {
                seed: trial as u64,
                max_tokens: self.new_tokens as u32,
                ignore_eos: true,
                ..Sampling::default()
            },
            n: 1,
            ..Job::default()
        }
    }
}

/// Runs the workload, after a warm-up that has touched the memory it uses.
///
/// # Errors
/// It does not fit the model, or the device has failed.
pub fn trials(engine: &Engine, workload: &Workload) -> Result<WorkloadReport> {
    let config = engine.config();
    workload.check(config)?;
    let done = |_, finished: Result<Finished>| finished.map(|_| ());
    engine.run_all(workload.warm_up(config, engine.slots()), done)?;
    let (before, start) = (engine.stats(), Instant::now());
    engine.run_all(workload.jobs(config), done)?;
    Ok(report(workload, config, (before, engine.stats()), start.elapsed().as_secs_f64()))
}

/// Runs one trial without injections, three times: the fastest.
///
/// # Errors
/// It does not fit the model, or the device has failed.
pub fn single(engine: &Engine, workload: &Workload) -> Result<WorkloadReport> {
    let config = engine.config();
    let workload = Workload { trials: 1, capture: Vec::new(), ..workload.clone() };
    workload.check(config)?;
    let mut best: Option<WorkloadReport> = None;
    for _ in 0..3 {
        let (before, start) = (engine.stats(), Instant::now());
        engine.run(workload.job(config, 0, None))?;
        let wall = start.elapsed().as_secs_f64();
        let report = report(&workload, config, (before, engine.stats()), wall);
        if best.as_ref().is_none_or(|best| report.wall_s < best.wall_s) {
            best = Some(report);
        }
    }
    best.ok_or_else(|| Error::new("nothing was run"))
}

fn report(
    workload: &Workload,
    config: &ModelConfig,
    (before, after): (Stats, Stats),
    wall_s: f64,
) -> WorkloadReport {
    let c = config;
    let attention = c.dim * c.head_dim * 2 * (c.heads + c.kv_heads);
    let block = (attention + 3 * c.dim * c.ffn_dim) as f64;
    let layer_rows = after.layer_rows - before.layer_rows;
    let head_rows = (after.head_rows - before.head_rows) as f64;
    let flops = 2.0 * (layer_rows as f64 * block + head_rows * (c.vocab * c.dim) as f64);
    WorkloadReport {
        trials: workload.trials,
        trials_per_s: workload.trials as f64 / wall_s,
        new_tokens_per_s: (after.tokens - before.tokens) as f64 / wall_s,
        wall_s,
        prompt_s: after.prompt_seconds - before.prompt_seconds,
        decode_s: after.decode_seconds - before.decode_seconds,
        device_s: after.device_seconds - before.device_seconds,
        decode_device_s: after.decode_device_seconds - before.decode_device_seconds,
        flops_per_s: flops / wall_s,
        steps: after.steps - before.steps,
        rows: after.rows - before.rows,
        layer_rows,
        layer_rows_saved: after.layer_rows_saved() - before.layer_rows_saved(),
    }
}
