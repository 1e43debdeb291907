//! `softkvm run`: a command, and a daemon that serves it, in a mount namespace of their own.
//!
//! This process is the parent of both and does nothing else. The daemon forbids itself to make code; the command, which
//! may be a VMM with a JIT, must not inherit that, so it cannot be the daemon's child.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use crate::claim::{self, Claim};
use crate::cli::ServiceArgs;
use crate::exit::Status;
use crate::sys;

/// How long a process may take to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for the daemon, which writes its summary then.
const DAEMON_PATIENCE: Duration = Duration::from_secs(5);
/// Exit status of softkvm when it is itself that failed.
const OWN_FAILURE: u8 = Status::RunFailed as u8;

/// Runs the command; the exit status to end with.
pub fn run(args: &ServiceArgs, verbosity: &[OsString], claim: Claim, command: &[OsString]) -> Result<u8> {
    // Before the namespace is left that it was opened in: in a chroot the path is another one afterwards.
    let own = std::env::current_exe().context("cannot find my own program file")?;
    private_namespace()?;
    let mut signals = Signals::block()?;
    let mut daemon = start_daemon(&own, args, verbosity, signals.before)?;
    let (program, arguments) = command.split_first().context("no command")?;
    let mut line = Command::new(program);
    line.args(arguments);
    sys::prepare_child(&mut line, Signal::SIGTERM, signals.before);
    let claims = claim.applies_to(program);
    if claims {
        sys::trace_child(&mut line);
    }
    let started = line.spawn();
    let outcome = match started {
        Ok(mut child) => {
            if claims && let Err(err) = claim::make(pid(&child)) {
                tracing::warn!("{err:#}");
            }
            signals.attend(&mut child, &mut daemon)
        }
        Err(err) => {
            eprintln!("softkvm: cannot run {}: {err}", Path::new(program).display());
            Ok(if err.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
        }
    };
    end(&mut daemon, DAEMON_PATIENCE);
    outcome
}

/// Mounts made from here on are seen by this process and its children only.
fn private_namespace() -> Result<()> {
    let explain = |errno: Errno| {
        let next = match errno {
            Errno::EINVAL => {
                "`/` must be a mount point, which it is not in this chroot: mount --bind DIR DIR, chroot DIR"
            }
            _ => "run softkvm as root with CAP_SYS_ADMIN (docker: --privileged, or --cap-add SYS_ADMIN)",
        };
        anyhow::anyhow!("cannot make a mount namespace: {}. Next step: {next}", errno.desc())
    };
    unshare(CloneFlags::CLONE_NEWNS).map_err(explain)?;
    // Slave: what the host mounts later still shows here.
    mount(None::<&Path>, "/", None::<&Path>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&Path>).map_err(explain)
}

fn start_daemon(own: &Path, args: &ServiceArgs, verbosity: &[OsString], mask: SigSet) -> Result<Child> {
    let mut line = Command::new(own);
    line.arg("daemon").args(args.to_args()).args(verbosity).stdin(Stdio::null()).stdout(Stdio::piped());
    // Ctrl-C is for the command; the daemon ends after it.
    line.process_group(0);
    sys::prepare_child(&mut line, Signal::SIGTERM, mask);
    let mut daemon = line.spawn().context("cannot start the daemon")?;
    let mut ready = String::new();
    if let Some(stdout) = daemon.stdout.take() {
        BufReader::new(stdout).read_line(&mut ready).context("cannot hear the daemon")?;
    }
    if ready.is_empty() {
        let status = daemon.wait().context("cannot wait for the daemon")?;
        bail!("the daemon did not start ({status})");
    }
    tracing::info!("{}", ready.trim_end());
    Ok(daemon)
}

/// What this process is told while it waits.
struct Signals {
    fd: SignalFd,
    /// What was blocked before.
    before: SigSet,
}

impl Signals {
    fn block() -> Result<Self> {
        let mut set = SigSet::empty();
        set.extend([
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGQUIT,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGWINCH,
            Signal::SIGCHLD,
        ]);
        let before = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("cannot block signals")?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("cannot make a signalfd")?;
        Ok(Self { fd, before })
    }

    /// Passes signals on until the command has ended.
    fn attend(&mut self, child: &mut Child, daemon: &mut Child) -> Result<u8> {
        loop {
            if let Some(status) = child.try_wait().context("cannot wait for the command")? {
                return Ok(exit_status(status));
            }
            if let Some(status) = daemon.try_wait().context("cannot wait for the daemon")? {
                eprintln!("softkvm: the daemon ended ({status}); ending the command, whose /dev/kvm is gone");
                end(child, PATIENCE);
                return Ok(OWN_FAILURE);
            }
            let Some(info) = self.fd.read_signal().context("cannot read signals")? else { continue };
            let signal = Signal::try_from(info.ssi_signo.cast_signed()).ok();
            // What the terminal sends has reached the command already: it is in the same process group.
            let from_a_process = info.ssi_code <= 0;
            if let Some(signal) = signal.filter(|signal| *signal != Signal::SIGCHLD && from_a_process) {
                let _ = kill(pid(child), signal);
            }
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Ends a process with SIGTERM, and with SIGKILL if that takes longer than `patience`.
fn end(child: &mut Child, patience: Duration) {
    let deadline = Instant::now() + patience;
    let _ = kill(pid(child), Signal::SIGTERM);
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn exit_status(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(OWN_FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_show_in_the_exit_status() {
        assert_eq!(exit_status(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
    }
}
