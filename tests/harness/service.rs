//! `softkvm serve` in a mount namespace of its own: a daemon that outlives its clients, and what it holds on to.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::console::Console;
use crate::{eventually, softkvm};

/// One host-wide daemon at a time, as on a real host.
static ONE: Mutex<()> = Mutex::new(());

/// A running daemon; killed when dropped.
pub struct Service {
    console: Console,
    _one: MutexGuard<'static, ()>,
}

/// What a daemon holds for its clients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resources {
    /// VMs by its own account.
    pub vms: usize,
    /// Open descriptors: `/proc/PID/fd`.
    pub fds: usize,
    /// Memfds among them.
    pub memfds: usize,
    /// Mappings of memfds: `/proc/PID/maps`.
    pub mappings: usize,
    /// `/proc/PID/task`
    pub threads: usize,
    /// Processes that it or one of its children started.
    pub processes: usize,
    /// Mounts that it sees: `/proc/PID/mountinfo`.
    pub mounts: usize,
    /// Its own memory that is present, in KiB: `RssAnon` and `RssShmem` of `/proc/PID/status`.
    pub memory_kib: usize,
}

impl Service {
    /// Starts the daemon and waits until it answers.
    pub fn start() -> Result<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        softkvm::require_host()?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--"]).arg(softkvm::binary()?).arg("serve");
        let service = Self { console: Console::start(&mut command)?, _one: one };
        // Until its device is in place, the answer is of whatever daemons the host runs.
        let own = |status: &Value| {
            let daemons = status["daemons"].as_array();
            daemons.is_some_and(|all| all.len() == 1 && all[0]["pid"] == service.pid().as_raw())
        };
        if !eventually(Duration::from_secs(60), || service.status().is_ok_and(|status| own(&status))) {
            bail!("softkvm serve does not answer: {:?}\n{}", service.status().err(), service.console.tail());
        }
        Ok(service)
    }

    /// The daemon's process. `unshare` has become it by exec.
    pub fn pid(&self) -> nix::unistd::Pid {
        self.console.pid()
    }

    /// `line`, run where the daemon's /dev/kvm is.
    pub fn client<L: AsRef<OsStr>>(&self, line: &[L]) -> Command {
        let mut command = Command::new("nsenter");
        // Its root as well: in a chroot that is not the namespace's.
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.pid())).arg(format!("--root=/proc/{}/root", self.pid()));
        command.arg("--").args(line);
        command
    }

    /// `softkvm status --json`
    pub fn status(&self) -> Result<Value> {
        let line = [softkvm::binary()?.as_os_str(), "status".as_ref(), "--json".as_ref()];
        let output = self.client(&line).output().context("cannot start nsenter")?;
        if !output.status.success() {
            bail!("softkvm status: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).context("softkvm status --json prints no JSON")
    }

    /// What the daemon holds now.
    pub fn resources(&self) -> Result<Resources> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        let status = self.status()?;
        let vms = status["vms"].as_array().context("the status has no list of VMs")?.len();
        let fds = fs::read_dir(proc.join("fd")).context("reading /proc/PID/fd")?;
        let fds: Vec<PathBuf> = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        let memfds = fds.iter().filter(|to| is_memfd(to)).count();
        let maps = fs::read_to_string(proc.join("maps")).context("reading /proc/PID/maps")?;
        let mappings = maps.lines().filter(|line| line.contains("/memfd:")).count();
        let threads = fs::read_dir(proc.join("task")).context("reading /proc/PID/task")?.count();
        let mounts = fs::read_to_string(proc.join("mountinfo")).context("reading /proc/PID/mountinfo")?;
        let state = fs::read_to_string(proc.join("status")).context("reading /proc/PID/status")?;
        let processes = descendants(self.pid().as_raw());
        Ok(Resources {
            vms,
            fds: fds.len(),
            memfds,
            mappings,
            threads,
            processes,
            mounts: mounts.lines().count(),
            memory_kib: kib(&state, "RssAnon") + kib(&state, "RssShmem"),
        })
    }

    /// Ends the daemon as nothing else can: SIGKILL.
    pub fn kill(&self) {
        self.console.kill();
    }

    /// What it has said.
    pub fn tail(&self) -> String {
        self.console.tail()
    }
}

fn is_memfd(link: &std::path::Path) -> bool {
    link.to_string_lossy().starts_with("/memfd:")
}

/// How many processes descend from this one: `/proc/PID/task/*/children` (proc_pid_task_children(5)).
fn descendants(pid: i32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<i32> = children.flat_map(|text| pids(&text)).collect();
    children.len() + children.into_iter().map(descendants).sum::<usize>()
}

fn pids(text: &str) -> Vec<i32> {
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// `NAME:   123 kB` in a `/proc/PID/status` (proc_pid_status(5)).
fn kib(status: &str, name: &str) -> usize {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
