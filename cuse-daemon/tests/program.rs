//! The program `softkvm` from the outside. Needs root and `/dev/fuse`; skips without.
#![expect(unsafe_code, reason = "memory protections can only be tried with raw mappings")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const SOFTKVM: &str = env!("CARGO_BIN_EXE_softkvm");
const ROLE: &str = "SOFTKVM_PROGRAM_ROLE";

fn can_run() -> bool {
    let can = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    can
}

/// A directory of this test's own, with a device path that does not exist yet.
fn directory(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("softkvm-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn run(options: &[&str], line: &[&str]) -> Output {
    Command::new(SOFTKVM).arg("run").args(options).arg("--").args(line).output().unwrap()
}

/// The words that a child prints when it is ready.
fn start(options: &[&str], script: &str) -> (Child, String) {
    let mut command = Command::new(SOFTKVM);
    command.arg("run").args(options).args(["--", "sh", "-c", script]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
    (child, line)
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn stand_in_comes_and_goes() {
    if !can_run() {
        return;
    }
    let dir = directory("stand-in");
    let device = dir.join("kvm");
    let options = ["--device", device.to_str().unwrap()];
    let script = format!("stat -f -c %T {0}; test -e {0}", device.display());
    let output = run(&options, &["sh", "-c", &script]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "fuseblk\n", "{output:?}");
    assert!(!device.exists(), "the stand-in is removed");

    // Two at once share it, and the one that ends first leaves it to the other.
    let (mut long, _) = start(&options, "echo up; exec sleep 100");
    assert!(run(&options, &["true"]).status.success());
    assert!(device.exists());
    kill(Pid::from_raw(long.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(long.wait().unwrap().code(), Some(128 + 15), "SIGTERM reaches the command");
    assert!(!device.exists());
    std::fs::remove_dir(dir).unwrap();
}

/// Daemon and supervisor of a `softkvm run`, from the status of the daemon that serves its namespace.
fn daemon_of(pid: u32) -> Value {
    let mut nsenter = Command::new("nsenter");
    // Its root as well: in a chroot that is not the namespace's.
    nsenter.args([format!("--mount=/proc/{pid}/ns/mnt"), format!("--root=/proc/{pid}/root")]);
    let output = nsenter.args(["--", SOFTKVM, "status", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["daemons"].as_array().unwrap().len(), 1, "only the one that serves this namespace");
    status["daemons"][0].clone()
}

#[test]
fn the_command_ends_with_its_daemon() {
    if !can_run() {
        return;
    }
    let (mut softkvm, line) = start(&[], "echo $$; exec sleep 100");
    let command: i32 = line.trim().parse().unwrap();
    let daemon = daemon_of(softkvm.id())["pid"].as_i64().unwrap() as i32;
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    assert_eq!(softkvm.wait().unwrap().code(), Some(125));
    assert!(!is_alive(command));
}

#[test]
fn nothing_outlives_the_supervisor() {
    if !can_run() {
        return;
    }
    let (mut softkvm, line) = start(&[], "echo $$; exec sleep 100");
    let command: i32 = line.trim().parse().unwrap();
    let daemon = daemon_of(softkvm.id())["pid"].as_i64().unwrap() as i32;
    softkvm.kill().unwrap();
    softkvm.wait().unwrap();
    eventually("command and daemon end", || !is_alive(command) && !is_alive(daemon));
    assert!(!Path::new(&format!("/run/softkvm/{daemon}.sock")).exists(), "the daemon cleaned up");
}

#[test]
fn status_tells_of_the_daemon() {
    if !can_run() {
        return;
    }
    let (mut softkvm, _) = start(&["--no-passthrough"], "exec 3</dev/kvm; echo open; exec sleep 100");
    let daemon = daemon_of(softkvm.id());
    assert_eq!(
        (&daemon["front"], &daemon["passthrough"], &daemon["open_files"]),
        (&"fuse".into(), &false.into(), &1.into())
    );
    let output = Command::new(SOFTKVM).arg("status").output().unwrap();
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("serves /dev/kvm by FUSE"));
    kill(Pid::from_raw(softkvm.id().cast_signed()), Signal::SIGTERM).unwrap();
    softkvm.wait().unwrap();
}

#[test]
fn a_summary_is_written_at_the_end() {
    if !can_run() {
        return;
    }
    let path = directory("summary").join("summary.json");
    let output = run(&["--verbose", "--summary", path.to_str().unwrap()], &["true"]);
    assert!(output.status.success(), "{output:?}");
    let summary = std::fs::read_to_string(&path).unwrap_or_else(|err| panic!("{err}: {output:?}"));
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["instructions"], 0);
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

#[test]
fn what_a_killed_daemon_leaves_is_cleared_away() {
    if !can_run() {
        return;
    }
    let dir = directory("dead");
    let device = dir.join("kvm");
    std::fs::write(&device, "").unwrap();
    // In a namespace of its own, lest a failure leaves the host with a dead file.
    let script = format!(
        "{SOFTKVM} serve --device {0} & for i in $(seq 100); do test -s /run/softkvm/$!.sock -o -S /run/softkvm/$!.sock && break; sleep 0.1; done
         kill -9 $!; wait $!; stat {0} && exit 1
         {SOFTKVM} serve --device {0} & for i in $(seq 100); do test -S /run/softkvm/$!.sock && break; sleep 0.1; done
         stat {0} || exit 2
         kill $!; wait $! || exit 3
         stat {0} && exit 4; exit 0",
        device.display()
    );
    let output =
        Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("is a FUSE file"), "it says how it serves: {output:?}");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn the_command_starts_with_no_signal_blocked() {
    if !can_run() {
        return;
    }
    let output = run(&[], &["grep", "SigBlk", "/proc/self/status"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "SigBlk:\t0000000000000000\n");
}

#[test]
fn who_could_open_the_device_before_may_open_ours() {
    if !can_run() {
        return;
    }
    let dir = directory("access");
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let device = dir.join("kvm");
    let script = format!(
        "mknod -m 0660 {0} c 1 3; chgrp 65533 {0}
         {SOFTKVM} serve --device {0} & for i in $(seq 100); do test -S /run/softkvm/$!.sock && break; sleep 0.1; done
         stat -c '%a %u %g %F' {0}
         setpriv --reuid=65534 --regid=65533 --clear-groups -- sh -c ': < {0}' || exit 1
         setpriv --reuid=65534 --regid=65532 --clear-groups -- sh -c ': < {0}' && exit 2
         kill $!; wait $!; rm {0}",
        device.display()
    );
    let output =
        Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "660 0 65533 regular empty file\n");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_group_may_open_the_device_and_others_may_not() {
    if !can_run() {
        return;
    }
    let dir = directory("group");
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let device = dir.join("kvm");
    let script = format!(
        "{SOFTKVM} serve --device {0} --group no-such-group; test $? = 78 || exit 4
         {SOFTKVM} serve --device {0} --group 65533 & for i in $(seq 100); do test -S /run/softkvm/$!.sock && break; sleep 0.1; done
         stat -c '%a %u %g' {0}
         setpriv --reuid=65534 --regid=65534 --groups=65533 -- sh -c ': <> {0}' || exit 1
         setpriv --reuid=65534 --regid=65534 --clear-groups -- sh -c ': <> {0}' && exit 2
         kill $!; wait $!",
        device.display()
    );
    let output =
        Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "660 0 65533\n");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("there is no group no-such-group. Next step: groupadd"), "{said}");
    std::fs::remove_dir_all(dir).unwrap();
}

/// The other side of the tests below: tries to make code. Exits with 0 if that works, with 3 if it is forbidden.
#[test]
fn make_code() {
    let Ok(role) = std::env::var(ROLE) else { return };
    if role == "forbidden" {
        cuse_daemon::sys::deny_write_exec().unwrap();
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
    // SAFETY: the mapping made above, which nobody uses.
    let made = unsafe { libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_EXEC) };
    std::process::exit(if made == 0 { 0 } else { 3 });
}

fn make_code_line() -> [String; 4] {
    let own = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    [own, "--exact".into(), "make_code".into(), "--nocapture".into()]
}

#[test]
fn the_daemons_way_to_forbid_code_works() {
    let line = make_code_line();
    let status = Command::new(&line[0]).args(&line[1..]).env(ROLE, "forbidden").stdout(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(3));
}

#[test]
fn the_command_may_make_code() {
    if !can_run() {
        return;
    }
    let line = make_code_line();
    let mut command = Command::new(SOFTKVM);
    let status = command.args(["run", "--"]).args(line).env(ROLE, "allowed").stdout(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn without_root_the_next_step_is_named() {
    if !can_run() {
        return;
    }
    let line = [SOFTKVM, "serve"];
    let output =
        Command::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).args(line).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    // The program file may lie where nobody but root may look; then it is not even started.
    let refused = output.status.code() == Some(77) && said.contains("Next step: sudo");
    assert!(refused || said.contains("Permission denied"), "{output:?}");
}

#[test]
fn without_cap_sys_admin_the_next_step_is_named() {
    if !can_run() {
        return;
    }
    let dir = directory("capability");
    let line = ["--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--", SOFTKVM, "serve", "--device"];
    let output = Command::new("setpriv").args(line).arg(dir.join("kvm")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(77), "{output:?}");
    assert!(said.contains("Next step: run softkvm as root with CAP_SYS_ADMIN"), "{said}");
    // Nothing stays, the folder for the mount least of all.
    std::fs::remove_dir(dir).unwrap();
    let left = std::fs::read_dir("/run/softkvm").unwrap().flatten().map(|entry| entry.path());
    let dead = left.filter(|path| {
        let pid = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        path.extension().is_some_and(|ext| ext == "mnt") && !Path::new("/proc").join(pid).exists()
    });
    assert_eq!(dead.collect::<Vec<_>>(), Vec::<PathBuf>::new());
}

#[test]
fn a_second_daemon_for_the_device_is_refused() {
    if !can_run() {
        return;
    }
    let dir = directory("second");
    let device = dir.join("kvm");
    let script = format!(
        "{SOFTKVM} serve --device {0} & for i in $(seq 100); do test -S /run/softkvm/$!.sock && break; sleep 0.1; done
         {SOFTKVM} serve --device {0}; test $? = 75 || exit 1
         echo first $!; stat -f -c %T {0}
         {SOFTKVM} run --device {0} -- true || exit 2
         kill $!; wait $!; test -e {0} && exit 3; exit 0",
        device.display()
    );
    let output =
        Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let (out, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let first = out.lines().find_map(|line| line.strip_prefix("first ")).unwrap();
    assert!(out.ends_with("fuseblk\n"), "the first one serves on: {out}");
    assert!(said.contains(&format!("is softkvm's already, by process {first}. Next step: ")), "{said}");
    std::fs::remove_dir(dir).unwrap();
}

#[test]
fn softkvm_run_tells_its_own_failure_from_the_commands() {
    if !can_run() {
        return;
    }
    assert_eq!(run(&["--device", "/nonexistent/folder/kvm"], &["true"]).status.code(), Some(125));
    assert_eq!(run(&[], &["/nonexistent/command"]).status.code(), Some(127));
}
