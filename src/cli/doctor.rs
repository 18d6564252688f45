//! `inkling doctor`: what this build and this machine have.

use std::{env::consts, process::ExitCode, thread};

use fs_err as fs;
use serde::Serialize;

use super::{args::ModelArgs, fetch, output::Output};
use crate::{
    device::{
        Cuda,
        cpu::{Isa, MachineMemory},
        cuda::{gpu_kernels, has_host_kernels},
    },
    engine::{Need, Options},
    error::Result,
    model::{Model, ModelConfig},
    ops::matmul::Dtype,
};

/// Say what this build and this machine have, and what a model needs
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Findings {
    version: &'static str,
    system: String,
    cpu: Cpu,
    memory: Option<MachineMemory>,
    devices: Vec<DeviceSupport>,
    demo_model: DemoModel,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<ModelFindings>,
}

#[derive(Serialize)]
struct Cpu {
    name: Option<String>,
    /// Threads that can run at once.
    cores: usize,
    /// Those that matter here.
    features: Vec<String>,
    /// What the operations are run with.
    instruction_set: String,
}

#[derive(Serialize)]
struct DeviceSupport {
    name: String,
    available: bool,
    note: String,
}

#[derive(Serialize)]
struct DemoModel {
    path: Option<String>,
    present: bool,
}

#[derive(Serialize)]
struct ModelFindings {
    name: String,
    architecture: String,
    parameters: u64,
    layers: usize,
    dim: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn_dim: usize,
    vocab: usize,
    context: usize,
    tied_embeddings: bool,
    tokenizer: bool,
    chat_template: bool,
    sha256: String,
    memory: Vec<Needed>,
}

/// What a model takes, in bytes.
#[derive(Serialize)]
struct Needed {
    dtype: &'static str,
    weights: u64,
    kv_per_token: u64,
    /// (sequences at a time, all that is taken for them).
    in_all: Vec<(usize, u64)>,
}

/// Batches whose memory is told, and the length of their sequences.
const BATCHES: [usize; 4] = [1, 16, 64, 256];
const POSITIONS: usize = 1024;

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.model.is_some().then(|| args.model.open()).transpose()?;
    let demo = fetch::demo_path().ok();
    let findings = Findings {
        version: env!("CARGO_PKG_VERSION"),
        system: format!("{} {}", consts::OS, consts::ARCH),
        cpu: cpu(),
        memory: MachineMemory::read(),
        devices: vec![
            DeviceSupport { name: "cpu".into(), available: true, note: String::new() },
            cuda_support(),
            DeviceSupport {
                name: "host-kernels".into(),
                available: has_host_kernels(),
                note: "not in this build (--features host-kernels)".into(),
            },
        ],
        demo_model: DemoModel {
            present: demo.as_ref().is_some_and(|path| path.is_file()),
            path: demo.map(|path| path.display().to_string()),
        },
        model: model.as_ref().map(model_findings).transpose()?,
    };
    let mut output = Output::new();
    if args.json {
        output.json(&findings)?;
    } else {
        lines(&findings).iter().try_for_each(|line| output.line(line))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a GPU can be used, and which, or why not.
fn cuda_support() -> DeviceSupport {
    let facts = Cuda::gpu(0).and_then(|cuda| cuda.facts());
    let (available, note) = match facts {
        Ok(Some(facts)) => {
            let (major, minor) = facts.capability;
            let (free, total) = facts.memory;
            let memory = format!("{} of {} free", gigabytes(free as u64), gigabytes(total as u64));
            (true, format!("{}, compute capability {major}.{minor}, {memory}", facts.name))
        }
        Ok(None) => (false, "no GPU".into()),
        Err(error) => {
            let lines = error.to_string();
            let words =
                lines.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
            (false, words.collect::<Vec<_>>().join("; "))
        }
    };
    let note = match gpu_kernels() {
        0 => note,
        kernels => format!("{note} ({kernels} kernels in this build)"),
    };
    DeviceSupport { name: "cuda".into(), available, note }
}

fn cpu() -> Cpu {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = field(&info, "model name").map(str::to_owned);
    let flags = field(&info, "flags").or_else(|| field(&info, "Features")).unwrap_or_default();
    let known = [
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512_bf16",
        "amx_tile",
        "amx_bf16",
        "asimd",
        "bf16",
    ];
    let has = |feature: &&str| flags.split_whitespace().any(|flag| flag == *feature);
    Cpu {
        name,
        cores: thread::available_parallelism().map_or(1, usize::from),
        features: known.iter().filter(|feature| has(feature)).map(ToString::to_string).collect(),
        instruction_set: Isa::detect().to_string(),
    }
}

/// The value of a `key : value` line of a file in /proc.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then_some(value.trim())
    })
}

fn model_findings(model: &Model) -> Result<ModelFindings> {
    let config = &model.config;
    // Sizes that contradict the weights show here first.
    model.embedding()?;
    Ok(ModelFindings {
        name: model.name.clone(),
        architecture: config.architecture.clone(),
        parameters: config.parameters(),
        layers: config.layers,
        dim: config.dim,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        ffn_dim: config.ffn_dim,
        vocab: config.vocab,
        context: config.context,
        tied_embeddings: config.tied_embeddings,
        tokenizer: model.tokenizer.is_some(),
        chat_template: model.template.is_some(),
        sha256: model.hash()?,
        memory: vec![need("bf16", Dtype::Bf16, config), need("f32", Dtype::F32, config)],
    })
}

fn need(name: &'static str, dtype: Dtype, config: &ModelConfig) -> Needed {
    let of = |max_batch| Need::new(config, &Options { dtype, max_batch, ..Options::default() });
    let positions = POSITIONS.min(config.context);
    Needed {
        dtype: name,
        weights: of(1).weights,
        kv_per_token: of(1).kv_per_token,
        in_all: BATCHES.map(|batch| (batch, of(batch).total(batch, positions))).into(),
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

fn lines(findings: &Findings) -> Vec<String> {
    let Findings { version, system, cpu, memory, devices, demo_model, model } = findings;
    let name = cpu.name.as_deref().unwrap_or("unknown");
    let mut lines = vec![
        format!("inkling {version}, {system}"),
        format!("cpu         {name}, {} threads", cpu.cores),
        format!("features    {} (used: {})", cpu.features.join(" "), cpu.instruction_set),
    ];
    if let Some(memory) = memory {
        let (total, available) = (gigabytes(memory.total), gigabytes(memory.available));
        lines.push(format!("memory      {total}, {available} available"));
    }
    for device in devices {
        let state = match (device.available, device.note.as_str()) {
            (true, note) if device.name == "cuda" => note,
            (true, _) => "yes",
            (false, note) => note,
        };
        lines.push(format!("device      {}: {state}", device.name));
    }
    let state = if demo_model.present { "present" } else { "not there yet" };
    let path = demo_model.path.as_deref().unwrap_or("no cache folder");
    lines.push(format!("demo model  {state}: {path}"));
    if let Some(model) = model {
        lines.extend(model_lines(model));
    }
    lines
}

fn model_lines(model: &ModelFindings) -> Vec<String> {
    let yes = |has| if has { "yes" } else { "no" };
    let tied = if model.tied_embeddings { ", tied embeddings" } else { "" };
    let mut lines = vec![
        format!("model       {}", model.name),
        format!("            {}, {} parameters{tied}", model.architecture, model.parameters),
        format!(
            "            {} blocks of width {}, MLP {}, {} heads of {} ({} for keys and values)",
            model.layers, model.dim, model.ffn_dim, model.heads, model.head_dim, model.kv_heads
        ),
        format!("            {} tokens, context {}", model.vocab, model.context),
        format!(
            "            tokenizer: {}, chat template: {}",
            yes(model.tokenizer),
            yes(model.chat_template)
        ),
        format!("            SHA-256 {}", model.sha256),
    ];
    for need in &model.memory {
        lines.push(format!(
            "            {:<4} {} of weights, {:.1} kB of KV cache a token",
            need.dtype,
            gigabytes(need.weights),
            need.kv_per_token as f64 / 1e3
        ));
        let batches = need.in_all.iter();
        let batches = batches.map(|(batch, bytes)| format!("{batch}: {}", gigabytes(*bytes)));
        lines.push(format!(
            "                 in all, by sequences of {} tokens that share nothing: {}",
            POSITIONS.min(model.context),
            batches.collect::<Vec<_>>().join(", ")
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read() {
        assert_eq!(field("model name\t: A CPU\nflags\t: avx2 fma\n", "flags"), Some("avx2 fma"));
        assert_eq!(field("flags", "flags"), None);
    }
}
