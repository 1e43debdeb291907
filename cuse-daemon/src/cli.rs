//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::claim::Claim;
use crate::exit;

/// A working /dev/kvm on hosts without VT-x or SVM: every KVM ioctl answered by a daemon, the guest run by an interpreter.
#[derive(Debug, Parser)]
#[command(name = "softkvm", version, max_term_width = 100)]
#[command(after_help = LOGGING)]
#[command(after_long_help = long_help())]
pub struct Cli {
    /// Say more; twice: everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const LOGGING: &str = "RUST_LOG sets what is logged in detail, for example RUST_LOG=cuse_daemon=debug,kvm=trace.";

fn long_help() -> String {
    format!("{}\n{LOGGING}", exit::help())
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command for which /dev/kvm is softkvm's, and nothing else on the host changes
    ///
    /// The command runs in a mount namespace of its own. Its exit status is softkvm's, 128 + N if signal N ended it. The
    /// device goes when the command ends, also for what the command left in the background.
    Run {
        /// What both kinds of service have in common
        #[command(flatten)]
        service: ServiceArgs,
        /// Whether the command's CPUID is to say that the CPU has VMX or SVM
        ///
        /// Some VMMs look for themselves, and do not even try to open the device. The command's own code is changed for
        /// that, before it begins; libraries and other programs that it starts are not.
        #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
        claim_virtualization: Claim,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Serve /dev/kvm to the whole host, until SIGINT or SIGTERM
    ///
    /// Where the kernel has CUSE (/dev/cuse) and no /dev/kvm of its own, /dev/kvm becomes a character device. Otherwise
    /// a FUSE file is bound over it, which whoever could open the device before may open, or everybody if there was none;
    /// a /dev/kvm of the host's own is back when softkvm ends. A second softkvm for the same device is refused.
    Serve {
        /// What both kinds of service have in common
        #[command(flatten)]
        service: ServiceArgs,
        /// Let root and the members of GROUP open the device, and nobody else
        ///
        /// A name or a number. Without it a character device is what udev's rules make of it, root's alone if there are
        /// none.
        #[arg(long, value_name = "GROUP")]
        group: Option<String>,
    },
    /// Tell of the VMs of running softkvm daemons: owners, memory, vCPUs, exits
    ///
    /// If /dev/kvm is softkvm's, only of the daemon behind it. Needs root.
    Status {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Show where guests spend their time: the hottest code, and what is slow
    ///
    /// Looks at running VMs for a while, without stopping them, and prints of each: how fast its vCPUs were, what the
    /// interpreter had to do beside running instructions, why they left the guest, the traces of code that took most of the
    /// time, and the instructions. If /dev/kvm is softkvm's, only VMs of the daemon behind it. Needs root.
    ///
    /// A trace is what the interpreter decodes and runs at a stretch: up to 32 instructions with one entry. Each vCPU is asked
    /// some 250 times a second, at irregular intervals, what trace it runs; the first column is that trace's part of the answers.
    /// What walks, decoding and delivering events cost is part of the trace behind which they happen. An answer does not tell
    /// where in the trace the vCPU was: it counts evenly for the trace's instructions up to the branch by which it was left. So the
    /// shares of single instructions and mnemonics say how often they ran in hot code, not how slow each is. A single
    /// instruction that is listed as "alone" was run outside of traces: device accesses, page ends, single steps.
    ///
    /// Names of counts: data_walks and fetch_walks are translations that the TLB did not have; jump_cache_misses are looks for
    /// a trace that the cache of jump targets did not have; traces_dropped are those whose code has changed, code_writes the
    /// guest's own stores that changed it; arena_resets are when room for traces ran out, and all are decoded anew.
    Profile(ProfileArgs),
    /// Write manual pages and shell completions to DIR/share, for whoever installs softkvm
    #[command(hide = true)]
    Documents {
        /// The prefix of the installation
        #[arg(value_name = "DIR")]
        prefix: PathBuf,
    },
    /// Serve `softkvm run`
    #[command(hide = true)]
    Daemon {
        /// As `run` got them
        #[command(flatten)]
        service: ServiceArgs,
    },
}

/// Options of `softkvm profile`.
#[derive(Args, Clone, Copy, Debug)]
pub struct ProfileArgs {
    /// How long to look
    #[arg(long, value_name = "N", default_value = "10", value_parser = seconds)]
    pub seconds: Duration,
    /// Only the VM with this number, as softkvm status shows it
    #[arg(long, value_name = "ID")]
    pub vm: Option<u64>,
    /// How many traces and mnemonics to list of each VM
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub top: usize,
    /// For programs
    ///
    /// One object: seconds; vms, each with id, owner_pid, daemon_pid, samples (all answers), lost (answers of more places than
    /// are kept), vcpus, traces, mnemonics. A vCPU has id, asked (how often), samples (its answers), in_guest (their part of
    /// that), mips, counts, vmx_exits (by exit reason of the SDM), kvm_exits (by kvm_run.exit_reason). Counts are
    /// instructions, single_instructions, data_walks, fetch_walks, tlb_flushes, page_flushes, jump_cache_misses,
    /// traces_decoded, traces_dropped, code_writes, arena_resets, interrupts, nmis, exceptions. A trace has share (0 to 1),
    /// samples, address (linear), ip, bitness, cpl, cr3 (a list), alone, instructions (how many; 0 if the code is gone), code
    /// (lines of ip, bytes, text, share); a mnemonic has mnemonic, share. Addresses are texts, in hexadecimal.
    #[arg(long)]
    pub json: bool,
}

/// A day is more than anybody needs.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.01..=86400.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("not 0.01 to 86400".into())
    }
}

/// Options of the daemon.
#[derive(Args, Clone, Debug)]
pub struct ServiceArgs {
    /// Do without FUSE passthrough, as on kernels before 6.9
    #[arg(long)]
    pub no_passthrough: bool,
    /// Leave all threads to the scheduler
    #[arg(long, hide = true)]
    pub no_placement: bool,
    /// The path to put the device at
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm", hide = true)]
    pub device: PathBuf,
    /// At the end, write instruction and exit counts of all VMs to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
}

impl ServiceArgs {
    /// The same, as arguments.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--device".into(), self.device.clone().into()];
        if self.no_passthrough {
            args.push("--no-passthrough".into());
        }
        if self.no_placement {
            args.push("--no-placement".into());
        }
        if let Some(summary) = &self.summary {
            args.extend(["--summary".into(), summary.clone().into()]);
        }
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_behind_the_dashes_is_the_command() {
        let cli = Cli::parse_from(["softkvm", "run", "--no-passthrough", "--", "qemu", "-v", "--summary", "x"]);
        let Command::Run { service, command, .. } = cli.command else { panic!() };
        assert!(service.no_passthrough && service.summary.is_none());
        assert_eq!(command, ["qemu", "-v", "--summary", "x"]);
    }

    #[test]
    fn service_arguments_survive_the_way_to_the_daemon() {
        let cli = Cli::parse_from(["softkvm", "run", "--no-passthrough", "--no-placement", "--summary", "a b", "true"]);
        let Command::Run { service, .. } = cli.command else { panic!() };
        let args = ["softkvm".into(), "daemon".into()].into_iter().chain(service.to_args());
        let Command::Daemon { service: again } = Cli::parse_from(args).command else { panic!() };
        assert_eq!(format!("{service:?}"), format!("{again:?}"));
    }
}
