//! `softkvm status`: each daemon answers on a socket of its own with one JSON document. Only root may ask, for the
//! answer tells of processes of all users.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use crate::front::Front;
use crate::profile;

/// Where the sockets are: `PID.sock`.
pub const DIRECTORY: &str = "/run/softkvm";
/// Who does not read or write for so long is not waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// What to do then.
pub(crate) const NO_DAEMON: &str = "no softkvm daemon is running. Next step: softkvm run -- CMD, or softkvm serve";

/// Makes the document.
pub type Report = dyn Fn() -> Value + Send + Sync;

/// A daemon's socket, until dropped.
pub struct Socket(PathBuf);

impl Socket {
    /// Starts to answer, on a thread of that name.
    pub fn bind(path: PathBuf, name: &str, answer: impl Fn(UnixStream) + Send + 'static) -> Result<Self> {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot make {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).context("cannot protect a socket")?;
        let body = move || listener.incoming().flatten().for_each(answer);
        thread::Builder::new().name(name.into()).spawn(body).context("no thread for a socket")?;
        Ok(Self(path))
    }
}

/// Starts to answer `softkvm status`.
pub fn bind(directory: &Path, report: Arc<Report>) -> Result<Socket> {
    Socket::bind(directory.join(format!("{}.sock", std::process::id())), "status", move |stream| {
        if let Err(err) = answer(stream, &report()) {
            tracing::debug!(%err, "status not delivered");
        }
    })
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_file(&self.0) {
            tracing::debug!(%err, path = %self.0.display(), "socket not removed");
        }
    }
}

pub(crate) fn answer(mut stream: UnixStream, report: &Value) -> std::io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(report.to_string().as_bytes())
}

/// The part that tells of the daemon itself.
pub fn of_daemon(front: &Front, device: &Path, by_cuse: bool, started: Instant) -> Value {
    json!({
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "device": device,
        "front": if by_cuse { "cuse" } else { "fuse" },
        "passthrough": front.has_passthrough(),
        "open_files": front.open_files(),
        "uptime_ms": started.elapsed().as_millis() as u64,
        "st_dev": front.st_dev(),
    })
}

/// Counts of all VMs of a report, those that ended included.
pub fn summary(report: &Value) -> Value {
    let vcpus = || {
        let vms = ["vms", "ended"].into_iter().filter_map(|list| report[list].as_array()).flatten();
        vms.filter_map(|vm| vm["vcpus"].as_array()).flatten()
    };
    let sum = |name: &str| vcpus().filter_map(|vcpu| vcpu[name].as_u64()).sum::<u64>();
    let by_name = |name: &str| {
        let mut all = BTreeMap::<String, u64>::new();
        for (reason, count) in vcpus().filter_map(|vcpu| vcpu[name].as_object()).flatten() {
            *all.entry(reason.clone()).or_default() += count.as_u64().unwrap_or(0);
        }
        all
    };
    json!({
        "instructions": sum("instructions"),
        "run_ns": sum("run_ns"),
        "exits": { "vmx": by_name("vmx_exits"), "kvm_run": by_name("kvm_exits") },
    })
}

/// `softkvm status`.
pub fn show(as_json: bool) -> Result<()> {
    let reports = relevant()?;
    if as_json {
        println!("{}", serde_json::to_string_pretty(&merged(reports))?);
    } else {
        print!("{}", text(&reports));
    }
    Ok(())
}

/// In a namespace, or on a host, that is served: of the daemon that serves it. Otherwise of all.
pub(crate) fn relevant() -> Result<Vec<Value>> {
    let mut reports = ask_all()?;
    if let Some(at) = position_behind(Path::new("/dev/kvm"), &reports) {
        reports = vec![reports.swap_remove(at)];
    }
    Ok(reports)
}

/// The process that serves `device`, if a softkvm does.
pub fn daemon_behind(device: &Path) -> Result<Option<u64>> {
    let reports = ask_all()?;
    Ok(position_behind(device, &reports).and_then(|at| reports[at]["daemon"]["pid"].as_u64()))
}

/// The report of the daemon that serves `device`: a file of its file system, or CUSE's device, of which there is one.
fn position_behind(device: &Path, reports: &[Value]) -> Option<usize> {
    let found = fs::metadata(device).ok()?;
    let is_cuse = found.file_type().is_char_device() && {
        let (major, minor) = (major(found.rdev()), minor(found.rdev()));
        let class = fs::canonicalize(format!("/sys/dev/char/{major}:{minor}/subsystem"));
        class.is_ok_and(|class| class.ends_with("cuse"))
    };
    reports.iter().position(|report| {
        let daemon = &report["daemon"];
        daemon["st_dev"] == json!(found.dev()) || is_cuse && daemon["front"] == "cuse"
    })
}

fn ask_all() -> Result<Vec<Value>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => bail!("cannot read {DIRECTORY}: {err}"),
    };
    let mut reports = Vec::new();
    for path in
        entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == "sock"))
    {
        match ask(&path) {
            Ok(report) => reports.push(report),
            Err(err) if err.kind() == std::io::ErrorKind::PermissionDenied => {
                bail!("only root may ask softkvm daemons. Next step: the same with sudo")
            }
            // A daemon that was killed leaves its sockets.
            Err(err) if err.kind() == std::io::ErrorKind::ConnectionRefused => {
                let _ = fs::remove_file(path.with_extension(profile::EXTENSION));
                let _ = fs::remove_file(&path);
            }
            Err(err) => tracing::warn!(%err, path = %path.display(), "a daemon does not answer"),
        }
    }
    reports.sort_by_key(|report| report["daemon"]["pid"].as_u64());
    Ok(reports)
}

fn ask(path: &Path) -> std::io::Result<Value> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// One document from those of several daemons: the list of daemons, and all their VMs.
fn merged(reports: Vec<Value>) -> Value {
    let list = |name: &str| {
        let all = reports.iter().filter_map(|report| report[name].as_array()).flatten();
        all.cloned().collect::<Vec<Value>>()
    };
    let (vms, ended) = (list("vms"), list("ended"));
    let daemons: Vec<&Value> = reports.iter().map(|report| &report["daemon"]).collect();
    json!({ "daemons": daemons, "vms": vms, "ended": ended })
}

fn text(reports: &[Value]) -> String {
    let mut out = String::new();
    if reports.is_empty() {
        out.push_str(NO_DAEMON);
        out.push('\n');
    }
    for report in reports {
        let daemon = &report["daemon"];
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let _ = writeln!(
            out,
            "softkvm {} (pid {}) serves {} by {}, up {}",
            plain(&daemon["version"]),
            daemon["pid"],
            plain(&daemon["device"]),
            plain(&daemon["front"]).to_uppercase(),
            seconds(&daemon["uptime_ms"]),
        );
        let vms = report["vms"].as_array().map_or(&[][..], Vec::as_slice);
        if vms.is_empty() {
            out.push_str("  no VMs\n");
        }
        for vm in vms {
            let memory = vm["memory_bytes"].as_u64().unwrap_or(0) >> 20;
            let _ = writeln!(
                out,
                "  VM {} of pid {}: {memory} MiB in {} slots, up {}",
                vm["id"],
                vm["owner_pid"],
                vm["slots"],
                seconds(&vm["age_ms"])
            );
            for vcpu in vm["vcpus"].as_array().into_iter().flatten() {
                let exits: u64 =
                    vcpu["kvm_exits"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
                let state = if vcpu["running"] == true { "running" } else { "outside KVM_RUN" };
                let _ = writeln!(
                    out,
                    "    vCPU {}: {state}, {exits} exits, {} instructions",
                    vcpu["id"], vcpu["instructions"]
                );
            }
        }
    }
    out
}

fn seconds(milliseconds: &Value) -> String {
    format!("{:.1} s", milliseconds.as_u64().unwrap_or(0) as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Value {
        json!({
            "daemon": { "pid": 7, "version": "1", "device": "/dev/kvm", "front": "fuse", "uptime_ms": 1500 },
            "vms": [{ "id": 2, "owner_pid": 99, "memory_bytes": 134217728, "slots": 3, "age_ms": 200, "vcpus": [
                { "id": 0, "running": true, "instructions": 5, "run_ns": 10, "vmx_exits": { "HLT": 1 }, "kvm_exits": { "HLT": 1 } },
                { "id": 1, "running": false, "instructions": 6, "run_ns": 20, "vmx_exits": { "HLT": 2 }, "kvm_exits": {} },
            ]}],
            "ended": [{ "id": 1, "vcpus": [{ "id": 0, "instructions": 100, "run_ns": 1, "vmx_exits": { "CPUID": 4 } }] }],
        })
    }

    #[test]
    fn summary_adds_up_all_vcpus() {
        let summary = summary(&report());
        assert_eq!((&summary["instructions"], &summary["run_ns"]), (&json!(111), &json!(31)));
        assert_eq!(summary["exits"]["vmx"], json!({ "CPUID": 4, "HLT": 3 }));
        assert_eq!(summary["exits"]["kvm_run"], json!({ "HLT": 1 }));
    }

    #[test]
    fn text_names_owner_memory_and_vcpus() {
        let text = text(&[report()]);
        assert!(text.contains("VM 2 of pid 99: 128 MiB in 3 slots"), "{text}");
        assert!(text.contains("vCPU 0: running, 1 exits, 5 instructions"), "{text}");
    }

    #[test]
    fn documents_of_several_daemons_become_one() {
        let merged = merged(vec![report(), report()]);
        assert_eq!(merged["vms"].as_array().unwrap().len(), 2);
        assert_eq!(merged["daemons"][1]["pid"], 7);
    }
}
