//! `cargo xtask`: what a checkout can do with itself. `demo` shows it, `test` proves it, `bench` measures it, `isa` says what
//! it executes, `fuzz` looks for what it gets wrong, `install` puts it on this host.

mod bench;
mod cargo;
mod console;
mod demo;
mod fuzz;
mod install;
mod isa;
mod layout;
mod record;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, show, test and measure softkvm.
///
/// Every command sets up what it needs by itself: tools come from Debian's archive, a guest kernel is downloaded and
/// unpacked into a cache (never installed on this machine), and a second run starts at once from that cache.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Test(test::Args),
    Bench(bench::Args),
    Record(record::Args),
    Install(install::Args),
    Isa(isa::Args),
    Layout(layout::Args),
    Fuzz(fuzz::Args),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let done = assets::host::make_root_a_mount().and_then(|()| match command {
        Command::Demo(args) => demo::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Record(args) => record::run(&args),
        Command::Install(args) => install::run(&args),
        Command::Isa(args) => isa::run(&args),
        Command::Layout(args) => layout::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
