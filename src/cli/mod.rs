//! The command line: one file a subcommand. Standard output is data, standard error everything
//! else; exit codes: 0 done, 1 finished but something failed its check, 2 usage, configuration or
//! environment, 130 interrupted.

mod agreement;
mod args;
mod bench;
mod capture;
mod check;
mod control;
mod demo;
mod doctor;
mod fetch;
mod forward;
mod generate;
mod grade;
mod hub;
mod lens;
mod output;
mod patch;
mod progress;
mod report;
pub(crate) mod requests;
mod run;
mod table;
mod tensors;
mod tokens;
mod try_word;
mod vectors;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

/// Something was run to its end but failed its check.
const FAILED_CHECK: u8 = 1;
/// Stopped by an interrupt, with everything stored that was finished.
const INTERRUPTED: u8 = 130;
/// Usage, configuration or environment.
const REFUSED: u8 = 2;

/// Plants thoughts in language models and measures whether they notice.
#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Try(try_word::Args),
    Vectors(vectors::Args),
    Lens(lens::Args),
    Tokens(tokens::Args),
    Run(run::Args),
    Grade(grade::Args),
    Agreement(agreement::Args),
    Report(report::Args),
    Table(table::Args),
    Generate(generate::Args),
    Forward(forward::Args),
    Capture(capture::Args),
    Patch(patch::Args),
    Bench(bench::Args),
    Check(check::Args),
    Doctor(doctor::Args),
}

impl Command {
    fn execute(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Demo(args) => demo::execute(&args),
            Self::Try(args) => try_word::execute(&args),
            Self::Vectors(args) => vectors::execute(&args),
            Self::Lens(args) => lens::execute(&args),
            Self::Tokens(args) => tokens::execute(&args),
            Self::Run(args) => run::execute(&args),
            Self::Grade(args) => grade::execute(&args),
            Self::Agreement(args) => agreement::execute(&args),
            Self::Report(args) => report::execute(&args),
            Self::Table(args) => table::execute(&args),
            Self::Generate(args) => generate::execute(&args),
            Self::Forward(args) => forward::execute(&args),
            Self::Capture(args) => capture::execute(&args),
            Self::Patch(args) => patch::execute(&args),
            Self::Bench(args) => bench::execute(&args),
            Self::Check(args) => check::execute(&args),
            Self::Doctor(args) => doctor::execute(&args),
        }
    }
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, on standard output; the rest are refusals.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(REFUSED) } else { ExitCode::SUCCESS };
        }
    };
    cli.command.execute().unwrap_or_else(|error| {
        if is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        let _ = writeln!(io::stderr(), "error: {error:#}");
        ExitCode::from(REFUSED)
    })
}

/// Whether the reader of standard output has gone: it has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
