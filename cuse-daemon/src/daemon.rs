//! The daemon: from nothing to a served device, and back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Group};
use serde_json::Value;

use crate::cli::ServiceArgs;
use crate::client::guard;
use crate::exit::{self, Status};
use crate::front::{Access, Front, OpenSystem, cuse, fuse};
use crate::{place, profile, status, sys};

/// What the daemon serves.
pub struct Objects {
    /// Makes what open("/dev/kvm") gives.
    pub system: Box<OpenSystem>,
    /// The VMs that there are, and the last that ended: `vms` and `ended`.
    pub status: Box<dyn Fn() -> Value + Send + Sync>,
    /// Begins a profile.
    pub profiler: Box<profile::Begin>,
}

/// For whom the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// One command, in a mount namespace of its own, in which nobody is to be kept out.
    Command,
    /// The whole host; CUSE is wanted if possible. `group`: who may open the device, beside root; `None`: what else decides.
    Host {
        /// As `--group` says.
        group: Option<Gid>,
    },
}

impl Audience {
    /// The host, with the group of that name or number.
    pub fn host(group: Option<&str>) -> Result<Self> {
        let find = |name: &str| match name.parse() {
            Ok(number) => Ok(Gid::from_raw(number)),
            Err(_) => match Group::from_name(name).with_context(|| format!("cannot look for the group {name}"))? {
                Some(group) => Ok(group.gid),
                None => Err(exit::refuse(
                    Status::Configuration,
                    format_args!("there is no group {name}. Next step: groupadd --system {name}"),
                )),
            },
        };
        Ok(Self::Host { group: group.map(find).transpose()? })
    }

    /// What was asked for.
    fn access(self) -> Option<Access> {
        match self {
            Self::Command => Some(Access::ALL),
            Self::Host { group } => group.map(|group| Access { mode: 0o660, uid: 0, gid: group.as_raw() }),
        }
    }
}

/// The whole life of a daemon. `ready` is called with a line for the user once clients may come.
pub fn serve(args: &ServiceArgs, objects: Objects, audience: Audience, ready: impl FnOnce(&str)) -> Result<()> {
    // Before any device is opened, and before there is a second thread.
    prove_jitless()?;
    require_root()?;
    let host_wide = audience != Audience::Command;
    if host_wide {
        require_free(&args.device)?;
    }
    let signals = block_signals().context("cannot block signals")?;
    if args.no_placement {
        place::turn_off();
    }
    place::wake_early();
    guard::start().context("cannot start the guard")?;
    raise_descriptor_limit();

    let runtime = runtime_directory()?;
    let front = Front::new(objects.system);
    let mount = runtime.join(format!("{}.mnt", std::process::id()));
    let channel = if host_wide { Some(cuse::channel(&args.device)) } else { None };
    let by_cuse = matches!(channel, Some(Ok(_)));
    let over = (!by_cuse).then_some(args.device.as_path());
    let access = audience.access().unwrap_or_else(|| Access::as_before(&args.device));
    let bound = fuse::start(&front, &mount, fuse::Options { passthrough: !args.no_passthrough, over, access })?;
    guard::serves(front.connection());
    let sharing = if front.has_passthrough() { "with passthrough" } else { "without passthrough" };
    let mode = match channel {
        Some(Ok(device)) => {
            cuse::start(&front, device, audience.access())?;
            format!("a CUSE character device, {sharing}")
        }
        Some(Err(why)) => format!("a FUSE file, {sharing} ({why})"),
        None => format!("a FUSE file, {sharing}"),
    };
    let report = {
        let (front, device, started) = (Arc::clone(&front), args.device.clone(), std::time::Instant::now());
        let objects = objects.status;
        move || {
            let mut report = objects();
            report["daemon"] = status::of_daemon(&front, &device, by_cuse, started);
            report
        }
    };
    let report = Arc::new(report);
    let sockets = [status::bind(&runtime, Arc::clone(&report) as _)?, profile::bind(&runtime, objects.profiler)?];

    ready(&format!("{} is {mode}", args.device.display()));
    let signal = signals.wait().context("cannot wait for signals")?;
    tracing::info!(%signal, "ending");

    drop(sockets);
    guard::serves(0);
    drop(bound);
    let open = front.open_files();
    if host_wide && open > 0 {
        tracing::warn!(open, "files of clients are still open and fail from now on");
    }
    if let Some(path) = &args.summary {
        let text = serde_json::to_string_pretty(&status::summary(&report())).context("the summary is no JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write the summary to {}", path.display()))?;
    }
    Ok(())
}

/// From here on the kernel refuses every attempt to make code at run time: nothing below this line is a JIT.
fn prove_jitless() -> Result<()> {
    match sys::deny_write_exec() {
        Ok(()) => Ok(()),
        Err(Errno::EINVAL) => {
            tracing::debug!("the kernel is older than PR_SET_MDWE (6.3), which would prove that there is no JIT");
            Ok(())
        }
        Err(errno) => bail!("the kernel refuses PR_SET_MDWE, which proves that there is no JIT: {}", errno.desc()),
    }
}

fn require_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        let message =
            "softkvm mounts a file system and reaches into its clients, which takes root. Next step: sudo softkvm …";
        return Err(exit::refuse(Status::NoPermission, message));
    }
    Ok(())
}

/// One daemon for a host: a second one would take the device from the first one's clients to come.
fn require_free(device: &Path) -> Result<()> {
    match status::daemon_behind(device)? {
        Some(pid) => Err(exit::refuse(
            Status::Taken,
            format_args!(
                "{} is softkvm's already, by process {pid}. Next step: use it (softkvm status tells of it), or end it \
                 first: systemctl stop softkvm, or kill {pid}",
                device.display()
            ),
        )),
        None => Ok(()),
    }
}

/// The signals that end the daemon, blocked in this thread and those that it starts.
fn block_signals() -> nix::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.extend([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    Ok(signals)
}

/// Every VM, vCPU and memory slot costs a descriptor or two.
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        tracing::debug!(%errno, "the limit of open files stays");
    }
}

/// Where status sockets are, and mount points for a moment.
fn runtime_directory() -> Result<PathBuf> {
    let dir = Path::new(status::DIRECTORY);
    fs::create_dir_all(dir)
        .with_context(|| format!("cannot make {}. Next step: make /run writable, a tmpfs will do", dir.display()))?;
    Ok(dir.to_owned())
}
