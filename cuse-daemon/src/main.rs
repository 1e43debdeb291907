//! The program `softkvm`.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use cuse_daemon::cli::{Cli, Command};
use cuse_daemon::daemon::Audience;
use cuse_daemon::exit::{self, Status};
use cuse_daemon::{daemon, documents, manager, objects, profile, run, status};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    log(&cli);
    let done = match &cli.command {
        Command::Run { service, claim_virtualization, command } => {
            run::run(service, &verbosity(&cli), *claim_virtualization, command)
        }
        Command::Serve { service, group } => {
            let audience = Audience::host(group.as_deref());
            audience
                .and_then(|to| {
                    let ready = |line: &str| {
                        eprintln!("softkvm: {line}");
                        manager::ready();
                    };
                    daemon::serve(service, objects::kvm(), to, ready)
                })
                .map(|()| 0)
        }
        Command::Daemon { service } => {
            daemon::serve(service, objects::kvm(), Audience::Command, |line| println!("{line}")).map(|()| 0)
        }
        Command::Documents { prefix } => documents::write(prefix).map(|()| 0),
        Command::Status { json } => status::show(*json).map(|()| 0),
        Command::Profile(args) => profile::show(args).map(|()| 0),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(err) => {
            eprintln!("softkvm: {err:#}");
            let is_run = matches!(cli.command, Command::Run { .. });
            ExitCode::from(if is_run { Status::RunFailed as u8 } else { exit::status_of(&err) })
        }
    }
}

/// `RUST_LOG` decides, else the options do.
fn log(cli: &Cli) {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, 0) => LevelFilter::WARN,
        (_, 1) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}

fn verbosity(cli: &Cli) -> Vec<OsString> {
    let quiet = cli.quiet.then(|| "--quiet".into());
    quiet.into_iter().chain((0..cli.verbose).map(|_| "--verbose".into())).collect()
}
