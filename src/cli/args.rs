//! Options that several subcommands share.

use std::{path::PathBuf, thread};

use clap::Args;

use super::{fetch, hub, output::note};
use crate::{
    device::{Cpu, Cuda, Device, DeviceKind, cpu::Isa, cuda::MatrixPath},
    engine::{Engine, Options},
    error::{Error, Result},
    model::Model,
    ops::matmul::Dtype,
    request::Site,
};

/// Sequences that fill a GPU.
const GPU_BATCH: usize = 1024;
/// f32s for matmuls of up to 2,048 rows of 8,192.
const CPU_WORKSPACE: usize = (2048 + 8) * 8192;

/// Which model.
#[derive(Args)]
pub struct ModelArgs {
    /// GGUF file, folder with a Hugging Face model, or a model of the hub, ORG/NAME[@REVISION][:FILE.gguf],
    /// which is fetched
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens the model; an error without `--model`.
    pub fn open(&self) -> Result<Model> {
        let path = self.model.as_ref().ok_or_else(|| {
            Error::new("no model")
                .at("--model")
                .expected("a GGUF file, a folder with a Hugging Face model, or ORG/NAME of the hub")
                .hint("`inkling doctor` says where the demo model is")
        })?;
        Model::open(&hub::model_path(path)?)
    }

    /// Opens the model; without `--model` the demo model, fetched where it is not there yet.
    pub fn open_or_demo(&self) -> Result<Model> {
        match &self.model {
            Some(_) => self.open(),
            None => Model::open(&fetch::demo_model()?),
        }
    }
}

/// Where operations run, and on what of the processor.
#[derive(Args)]
pub struct DeviceArgs {
    /// Where to run: cpu, cuda, cuda:N or host-kernels
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: DeviceKind,
    /// What the processor's code is compiled for: amx, avx512-bf16, avx512, avx2 or portable, or, for
    /// tests, amx-emulated or avx512-bf16-emulated [default: the best this machine has]
    #[arg(long, value_name = "SET")]
    isa: Option<Isa>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,
}

impl DeviceArgs {
    /// The instruction set that was asked for.
    ///
    /// # Errors
    /// The device has none.
    fn isa(&self) -> Result<Option<Isa>> {
        match self.isa {
            Some(isa) if self.device != DeviceKind::Cpu => {
                Err(Error::new("only the processor's code has instruction sets")
                    .at("--isa")
                    .expected("none, or --device cpu")
                    .got(format!("{isa} with --device {}", self.device)))
            }
            isa => Ok(isa),
        }
    }

    /// A device that is not an engine's.
    ///
    /// # Errors
    /// It is not there, or has no instruction sets.
    pub fn open(&self) -> Result<Device> {
        let isa = self.isa()?.unwrap_or_else(Isa::detect);
        let cores = || thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.unwrap_or_else(cores);
        Ok(match self.device {
            DeviceKind::Cpu => Device::Cpu(Cpu::new(isa, threads, CPU_WORKSPACE)?),
            DeviceKind::Cuda(ordinal) => Device::Cuda(Cuda::gpu(ordinal)?),
            DeviceKind::HostKernels => Device::Cuda(Cuda::host(MatrixPath::Wgmma)?),
        })
    }
}

/// How the model is run.
#[derive(Args)]
pub struct EngineArgs {
    #[command(flatten)]
    pub on: DeviceArgs,
    /// Type of the weights and the KV cache: bf16 or f32
    #[arg(long, value_name = "TYPE", default_value_t = Dtype::Bf16)]
    pub dtype: Dtype,
    /// The most sequences in one step [default: 256; 1024 on a GPU]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub max_batch: Option<usize>,
    /// The most tokens of a sequence, prompt and reply [default: 8192, or the model's own limit]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,
}

impl EngineArgs {
    /// As the engine takes them.
    ///
    /// # Errors
    /// An instruction set for a device that has none.
    pub fn options(&self) -> Result<Options> {
        let default = match self.on.device {
            DeviceKind::Cuda(_) => GPU_BATCH,
            DeviceKind::Cpu | DeviceKind::HostKernels => Options::default().max_batch,
        };
        Ok(Options {
            device: self.on.device,
            dtype: self.dtype,
            isa: self.on.isa()?,
            threads: self.on.threads,
            max_batch: self.max_batch.unwrap_or(default),
            context: self.context,
            ..Options::default()
        })
    }

    /// Loads the weights and starts the engine.
    pub fn start(&self, model: &Model) -> Result<Engine> {
        note(format!("loading {} ({}, {})", model.name, self.on.device, self.dtype));
        Engine::start(model, &self.options()?)
    }
}

/// A site by its name in requests.
pub fn site(text: &str) -> std::result::Result<Site, String> {
    let value = serde_json::Value::String(text.to_owned());
    serde_json::from_value(value).map_err(|_| {
        "one of resid_pre, resid_mid, resid_post, attn_out, mlp_out, head_out".to_owned()
    })
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be 1 or more".into()),
        Ok(n) => Ok(n),
        Err(error) => Err(format!("{error}")),
    }
}
