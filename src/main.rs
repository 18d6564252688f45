//! The `inkling` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    inkling::cli::main()
}
