//! `inkling bench`: operations, the workload, a single stream.

use std::process::ExitCode;

use serde::Serialize;

use super::{
    args::{DeviceArgs, EngineArgs, ModelArgs},
    output::{Output, columns, note},
};
use crate::{
    bench::{self, Measured, Workload, WorkloadReport},
    device::DeviceKind,
    engine::{Engine, Options},
    error::{Error, Result},
    model::ModelConfig,
};

/// Measure this machine
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Single operations at a model's shapes, and their share of what the machine can do
    Ops(Ops),
    /// Trials that share a prompt and differ in what is injected
    Trials(Trials),
    /// One reply without injections
    Single(Single),
}

#[derive(clap::Args)]
struct Ops {
    #[command(flatten)]
    on: DeviceArgs,
    /// Sizes of a well-known model [default: llama-3.1-8b on a GPU, smollm2-135m elsewhere]
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A model, or the sizes of one with random weights.
#[derive(clap::Args)]
struct Subject {
    #[command(flatten)]
    model: ModelArgs,
    /// Sizes of a well-known model, with random weights made on the device
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    shape: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Trials {
    #[command(flatten)]
    subject: Subject,
    /// Tokens of the shared prompt
    #[arg(long, value_name = "N", default_value_t = 180)]
    prompt_tokens: usize,
    /// First injected position
    #[arg(long, value_name = "N", default_value_t = 140)]
    start: usize,
    /// Block whose output is injected
    #[arg(long, value_name = "L", default_value_t = 20)]
    layer: usize,
    /// `all`: the output of every block is injected, with the same vector
    #[arg(long, value_name = "one|all", default_value = "one")]
    inject: Places,
    /// Tokens that each trial draws
    #[arg(long, value_name = "N", default_value_t = 60)]
    new: usize,
    /// Trials
    #[arg(long = "trials", value_name = "N", default_value_t = 256)]
    count: usize,
    /// Distinct vectors [default: one a trial]
    #[arg(long, value_name = "K")]
    vectors: Option<usize>,
    /// `off`: the same rows and seeds, but nothing is injected
    #[arg(long, value_name = "on|off", default_value = "on")]
    hooks: Switch,
    /// Compute everything for each trial
    #[arg(long)]
    no_share: bool,
    /// Blocks whose output is captured at the injected positions of the prompt
    #[arg(long, value_name = "none|one|all", default_value = "none")]
    capture: Captures,
}

#[derive(clap::Args)]
struct Single {
    #[command(flatten)]
    subject: Subject,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 64)]
    prompt_tokens: usize,
    /// Tokens that are drawn
    #[arg(long, value_name = "N", default_value_t = 128)]
    new: usize,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Places {
    One,
    All,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Captures {
    None,
    One,
    All,
}

#[derive(Serialize)]
struct Report {
    device: String,
    arithmetic: String,
    model: String,
    max_batch: usize,
    /// Of the model's widest product, measured in the same process.
    matmul_flops_per_s: f64,
    /// Products in a second of the whole run, as a part of that.
    share_of_ceiling: f64,
    #[serde(flatten)]
    workload: WorkloadReport,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.what {
        What::Ops(args) => ops(args)?,
        What::Trials(args) => trials(args)?,
        What::Single(args) => single(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn ops(args: &Ops) -> anyhow::Result<()> {
    let default = match args.on.device {
        DeviceKind::Cuda(_) => "llama-3.1-8b",
        DeviceKind::Cpu => "smollm2-135m",
        DeviceKind::HostKernels => "tiny",
    };
    let name = args.shape.as_deref().unwrap_or(default);
    let config = ModelConfig::of_shape(name, 512)?;
    let device_name = args.on.device.to_string();
    let report = bench::ops((&device_name, &args.on.open()?), (name, &config))?;
    let mut output = Output::new();
    if args.json {
        return output.json(&report);
    }
    let (copy, matmul) = (report.ceilings.copy_bytes_per_s, report.ceilings.matmul_flops_per_s);
    output.line(format!("{device_name}, {}, shapes of {name}", report.arithmetic))?;
    output.line(format!(
        "ceilings: copy {:.1} GB/s, matmul {:.1} GFLOP/s",
        copy / 1e9,
        matmul / 1e9
    ))?;
    let row = |m: &Measured| {
        vec![
            m.op.to_owned(),
            m.shape.clone(),
            m.rows.to_string(),
            format!("{:.1} us", m.seconds * 1e6),
            format!("{:.0} %", m.spread * 100.0),
            format!("{:.1} GB/s", m.bytes / m.seconds / 1e9),
            format!("{:.1} GFLOP/s", m.flops / m.seconds / 1e9),
            format!("{:.2}", m.share),
        ]
    };
    let titles = ["operation", "shape", "rows", "median", "spread", "", "", "of the limit"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(report.results.iter().map(row));
    let right = [false, false, true, true, true, true, true, true];
    columns(&rows, &right).iter().try_for_each(|line| output.line(line))
}

/// A running engine and the model's name. Random weights get a context of `positions`.
fn start(
    subject: &Subject,
    positions: usize,
    change: impl FnOnce(&mut Options),
) -> Result<(Engine, String)> {
    let mut options = subject.engine.options()?;
    change(&mut options);
    match &subject.shape {
        Some(shape) => {
            let config = ModelConfig::of_shape(shape, positions)?;
            note(format!("making random weights of the shape of {shape} on {}", options.device));
            Ok((Engine::start_random(&config, &options)?, shape.clone()))
        }
        None if subject.model.model.is_some() => {
            let model = subject.model.open()?;
            Ok((Engine::start(&model, &options)?, model.name.clone()))
        }
        None => Err(Error::new("nothing to measure").expected("--model or --shape")),
    }
}

fn trials(args: &Trials) -> anyhow::Result<()> {
    let positions = args.prompt_tokens + args.new;
    let (engine, model) = start(&args.subject, positions, |options| {
        options.share = !args.no_share;
        options.hooks = args.hooks == Switch::On;
    })?;
    let workload = Workload {
        prompt_tokens: args.prompt_tokens,
        start: args.start,
        layer: args.layer,
        all_layers: args.inject == Places::All,
        new_tokens: args.new,
        trials: args.count,
        vectors: args.vectors.unwrap_or(args.count),
        capture: match args.capture {
            Captures::None => Vec::new(),
            Captures::One => vec![args.layer],
            Captures::All => (0..engine.config().layers).collect(),
        },
    };
    print(&args.subject, &engine, model, bench::trials(&engine, &workload)?)
}

fn single(args: &Single) -> anyhow::Result<()> {
    let positions = args.prompt_tokens + args.new;
    let (engine, model) = start(&args.subject, positions, |_| ())?;
    let workload = Workload {
        prompt_tokens: args.prompt_tokens,
        start: args.prompt_tokens - 1,
        layer: 0,
        all_layers: false,
        new_tokens: args.new,
        trials: 1,
        vectors: 1,
        capture: Vec::new(),
    };
    print(&args.subject, &engine, model, bench::single(&engine, &workload)?)
}

fn print(
    subject: &Subject,
    engine: &Engine,
    model: String,
    report: WorkloadReport,
) -> anyhow::Result<()> {
    let mut output = Output::new();
    let fingerprint = engine.fingerprint();
    let ceiling = bench::matmul_ceiling(&subject.engine.on.open()?, engine.config())?;
    let share = report.flops_per_s / ceiling;
    if subject.json {
        return output.json(&Report {
            device: fingerprint.device.clone(),
            arithmetic: fingerprint.isa.clone(),
            model,
            max_batch: engine.slots(),
            matmul_flops_per_s: ceiling,
            share_of_ceiling: share,
            workload: report,
        });
    }
    let r = &report;
    output.line(format!("{model} on {} ({})", fingerprint.device, fingerprint.isa))?;
    output.line(format!(
        "{} trials in {:.2} s: {:.2} a second",
        r.trials, r.wall_s, r.trials_per_s
    ))?;
    output.line(format!("{:.1} new tokens a second", r.new_tokens_per_s))?;
    let (prompt, decode) = (r.prompt_s, r.decode_s);
    output.line(format!("steps with prompts {prompt:.2} s, of drawn tokens only {decode:.2} s"))?;
    let host = (1.0 - r.device_s / r.wall_s) * 100.0;
    output.line(format!("planning and handing out {host:.1} % of the time"))?;
    let (flops, ceiling, share) = (r.flops_per_s / 1e9, ceiling / 1e9, share * 100.0);
    output.line(format!("matmuls {flops:.1} GFLOP/s, {share:.0} % of {ceiling:.1}"))?;
    let (rows, saved) = (r.layer_rows, r.layer_rows_saved);
    output.line(format!("{} steps, {rows} rows x blocks, {saved} more saved by sharing", r.steps))
}
