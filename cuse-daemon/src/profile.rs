//! `softkvm profile`: each daemon takes profiles by a socket of its own. The client sends a line of JSON, what it wants to see,
//! and looks away for as long as it likes; when it has no more to say, it gets one JSON document. Who goes before that ends the
//! profile as well. Only root may ask, as with `softkvm status`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use kvm::profile::Profiler;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cli::ProfileArgs;
use crate::status::{self, DIRECTORY, PATIENCE, Socket};

/// Begins a profile of the VM with that number, or of all. `None`: there is one under way.
pub type Begin = dyn Fn(Option<u64>) -> Option<Profiler> + Send + Sync;

/// Between two samples: 2 to 6 ms, so that no timer of the guest keeps step.
const SHORTEST_NS: u64 = 2_000_000;
const SPREAD_NS: u64 = 4_000_000;

/// What a client wants to see.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Request {
    vm: Option<u64>,
    top: usize,
}

/// Of a daemon's socket, whose name is its PID.
pub(crate) const EXTENSION: &str = "profile";

fn path(directory: &Path, pid: impl std::fmt::Display) -> PathBuf {
    directory.join(format!("{pid}.{EXTENSION}"))
}

/// Starts to answer `softkvm profile`.
pub fn bind(directory: &Path, begin: Box<Begin>) -> Result<Socket> {
    let begin = Arc::<Begin>::from(begin);
    Socket::bind(path(directory, std::process::id()), "profiles", move |stream| {
        let begin = begin.clone();
        let body = move || {
            if let Err(err) = serve(stream, &*begin) {
                tracing::debug!(%err, "profile not delivered");
            }
        };
        if let Err(err) = thread::Builder::new().name("profile".into()).spawn(body) {
            tracing::warn!(%err, "no thread for a profile");
        }
    })
}

fn serve(stream: UnixStream, begin: &Begin) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    // The one line is all that comes, so nothing is lost in the buffer. It is short.
    BufReader::new((&stream).take(256)).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let document = match begin(request.vm) {
        None => json!({ "error": "somebody else is taking a profile. Next step: try again when that has ended" }),
        Some(mut profiler) => {
            let mut random = u64::from(std::process::id()) | 1;
            loop {
                profiler.tick();
                // xorshift64
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                if is_over(&stream, SHORTEST_NS + random % SPREAD_NS)? {
                    break serde_json::to_value(profiler.finish(request.top))?;
                }
            }
        }
    };
    Ok(status::answer(stream, &document)?)
}

/// Waits so long. True: the client has no more to say, or is gone.
fn is_over(stream: &UnixStream, nanoseconds: u64) -> Result<bool> {
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    match ppoll(&mut polled, Some(TimeSpec::new(0, nanoseconds as i64)), None) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// `softkvm profile`.
pub fn show(args: &ProfileArgs) -> Result<()> {
    let daemons: Vec<u64> = status::relevant()?.iter().filter_map(|report| report["daemon"]["pid"].as_u64()).collect();
    if daemons.is_empty() {
        bail!(status::NO_DAEMON);
    }
    let request = serde_json::to_string(&Request { vm: args.vm, top: args.top })? + "\n";
    let mut open = Vec::new();
    for pid in daemons {
        let path = path(Path::new(DIRECTORY), pid);
        let mut stream = UnixStream::connect(&path).with_context(|| format!("cannot reach {}", path.display()))?;
        stream.write_all(request.as_bytes())?;
        open.push((pid, stream));
    }
    thread::sleep(args.seconds);
    for (_, stream) in &open {
        stream.shutdown(Shutdown::Write)?;
    }
    let (mut vms, mut seconds) = (Vec::new(), 0.0);
    for (pid, mut stream) in open {
        // It lists code and waits for vCPUs first.
        stream.set_read_timeout(Some(PATIENCE * 10))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).context("a daemon does not answer")?;
        let mut document: Value = serde_json::from_str(&text).context("a daemon does not answer")?;
        if let Some(error) = document["error"].as_str() {
            bail!("{error}");
        }
        seconds = f64::max(seconds, document["seconds"].as_f64().unwrap_or(0.0));
        for vm in document["vms"].as_array_mut().into_iter().flatten() {
            vm["daemon_pid"] = pid.into();
            vms.push(vm.take());
        }
    }
    if let (Some(id), []) = (args.vm, &vms[..]) {
        bail!("there is no VM {id}, or it has no vCPU. Next step: softkvm status");
    }
    let document = json!({ "seconds": seconds, "vms": vms });
    if args.json {
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        print!("{}", text(&document));
    }
    Ok(())
}

fn text(document: &Value) -> String {
    let mut out = String::new();
    let seconds = document["seconds"].as_f64().unwrap_or(0.0);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let vms = list(&document["vms"]);
    if vms.is_empty() {
        out.push_str("no VM has a vCPU\n");
    }
    for vm in &vms {
        let _ = writeln!(out, "VM {} of pid {}: {seconds:.1} s, {} samples", vm["id"], vm["owner_pid"], vm["samples"]);
        for vcpu in list(&vm["vcpus"]) {
            let mips = vcpu["mips"].as_f64().unwrap_or(0.0);
            let _ = writeln!(
                out,
                "\n  vCPU {}: {mips:.1} MIPS, {} of the time in the guest",
                vcpu["id"],
                percent(&vcpu["in_guest"])
            );
            let mut exits = BTreeMap::new();
            for (kind, name) in [("vmx_exits", "exit"), ("kvm_exits", "KVM_EXIT")] {
                for (reason, count) in vcpu[kind].as_object().into_iter().flatten() {
                    exits.insert(format!("{name} {reason}"), count.clone());
                }
            }
            let counts = vcpu["counts"].as_object().into_iter().flatten();
            for (name, count) in counts.map(|(name, count)| (name.clone(), count.clone())).chain(exits) {
                let count = count.as_u64().unwrap_or(0);
                if count > 0 {
                    let _ = writeln!(out, "    {name:<28} {count:>16} {:>16.1} a second", count as f64 / seconds);
                }
            }
        }
        out.push_str("\n  hottest traces\n");
        for trace in list(&vm["traces"]) {
            let spaces = list(&trace["cr3"]);
            let space = match &spaces[..] {
                [one] => format!("CR3 {}", plain(one)),
                several => format!("{} address spaces", several.len()),
            };
            let what = match (&trace["alone"], trace["instructions"].as_u64().unwrap_or(0)) {
                (Value::Bool(true), _) => "alone".to_owned(),
                (_, 0) => "gone".to_owned(),
                (_, 1) => "1 instruction".to_owned(),
                (_, n) => format!("{n} instructions"),
            };
            let _ = writeln!(
                out,
                "  {} {} {}-bit CPL {} {space}, {what}",
                percent(&trace["share"]),
                plain(&trace["address"]),
                trace["bitness"],
                trace["cpl"]
            );
            for line in list(&trace["code"]) {
                let _ = writeln!(
                    out,
                    "      {} {:<18} {}",
                    percent(&line["share"]),
                    plain(&line["ip"]),
                    plain(&line["text"])
                );
            }
        }
        out.push_str("\n  mnemonics\n");
        for hot in list(&vm["mnemonics"]) {
            let _ = writeln!(out, "  {} {}", percent(&hot["share"]), plain(&hot["mnemonic"]));
        }
    }
    out
}

fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or("")
}

fn percent(share: &Value) -> String {
    format!("{:5.1} %", share.as_f64().unwrap_or(0.0) * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_shows_speed_exits_code_and_mnemonics() {
        let document = json!({ "seconds": 2.0, "vms": [{
            "id": 3, "owner_pid": 99, "samples": 500,
            "vcpus": [{ "id": 0, "mips": 412.34, "in_guest": 0.75, "counts": { "data_walks": 50, "nmis": 0 },
                "vmx_exits": { "HLT": 8 }, "kvm_exits": { "HLT": 8 } }],
            "traces": [{ "share": 0.5, "address": "0x1000", "bitness": 64, "cpl": 0, "cr3": ["0x8000"], "alone": false,
                "instructions": 1, "code": [{ "share": 0.5, "ip": "0x1000", "text": "jmp short 1000h" }] }],
            "mnemonics": [{ "share": 0.5, "mnemonic": "jmp" }],
        }]});
        let text = text(&document);
        for part in [
            "VM 3 of pid 99: 2.0 s, 500 samples",
            "vCPU 0: 412.3 MIPS,  75.0 % of the time in the guest",
            "data_walks                                 50             25.0 a second",
            "exit HLT                                    8              4.0 a second",
            "50.0 % 0x1000 64-bit CPL 0 CR3 0x8000, 1 instruction\n",
            "50.0 % 0x1000             jmp short 1000h",
            "50.0 % jmp\n",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(!text.contains("nmis"), "{text}");
    }
}
