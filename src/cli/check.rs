//! `inkling check`: a device against the processor's own code.

use std::process::ExitCode;

use serde::Serialize;

use super::{
    FAILED_CHECK,
    args::DeviceArgs,
    output::{Output, note},
};
use crate::check::{Comparison, check};

/// Compare a device with this processor: every operation, and a small model with injections
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    on: DeviceArgs,
    /// Leave the larger shapes out
    #[arg(long)]
    quick: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    device: String,
    ok: bool,
    results: Vec<Comparison>,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let results = check(args.on.device, &args.on.open()?, args.quick)?;
    let mut output = Output::new();
    let ok = results.iter().all(|comparison| comparison.ok);
    if args.json {
        output.json(&Report { device: args.on.device.to_string(), ok, results })?;
    } else {
        for c in &results {
            let verdict = if c.ok { "ok" } else { "FAILED" };
            let numbers = format!("{:>9.2e} of {:>9.2e}", c.error, c.tolerance);
            output.line(format!("{verdict:<6} {numbers}  {}", c.name))?;
        }
        let failed = results.iter().filter(|comparison| !comparison.ok).count();
        note(format!("{} comparisons, {failed} failed", results.len()));
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::from(FAILED_CHECK) })
}
