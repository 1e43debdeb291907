//! `softkvm run` as a command among others: its device, its exit status, its output.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use softkvm_tests::console::Console;
use softkvm_tests::softkvm;

/// Generous: a loaded machine must not fail a test.
const WITHIN: Duration = Duration::from_secs(120);

fn run(line: &[&str]) -> (Option<i32>, String) {
    run_with(&[], line)
}

fn run_with(options: &[&str], line: &[&str]) -> (Option<i32>, String) {
    let mut console = Console::start(&mut softkvm::run(options, line).expect("softkvm")).expect("it starts");
    let status = console.finish(WITHIN).expect("it ends");
    (status.code(), console.text())
}

#[test]
fn the_exit_status_is_the_commands() {
    assert_eq!(run(&["sh", "-c", "exit 7"]).0, Some(7));
    assert_eq!(run(&["sh", "-c", "kill -9 $$"]).0, Some(128 + 9));
    assert_eq!(run(&["/nonexistent/program"]).0, Some(127));
}

#[test]
fn output_is_the_commands_alone() {
    assert_eq!(run(&["echo", "one line"]), (Some(0), "one line\n".to_owned()));
}

#[test]
fn the_hosts_device_is_left_alone() {
    use std::os::unix::fs::MetadataExt;
    let before = std::fs::metadata("/dev/kvm").map(|m| (m.dev(), m.ino())).ok();
    let (code, inside) = run(&["stat", "--format=%d %i", "/dev/kvm"]);
    assert_eq!(code, Some(0));
    let after = std::fs::metadata("/dev/kvm").map(|m| (m.dev(), m.ino())).ok();
    assert_eq!(before, after);
    assert_ne!(before.map(|(dev, ino)| format!("{dev} {ino}\n")), Some(inside));
}

/// softkvm blocks the signals that it waits for; a VMM that kicks its vCPUs by one of them must not inherit that.
#[test]
fn the_command_blocks_no_signals() {
    let (code, status) = run(&["grep", "SigBlk", "/proc/self/status"]);
    assert_eq!((code, status.as_str()), (Some(0), "SigBlk:\t0000000000000000\n"));
}

/// A folder that goes when this does.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A program that refuses to go on without VMX or SVM finds it, if it is one of those that are known to or if asked for, and
/// everything else that CPUID says is as it was; others are left as they are, those that it starts too. It is found however
/// the program was compiled, and the daemon reaches into it nevertheless.
#[test]
fn who_looks_for_vmx_or_svm_finds_it() {
    let flags = std::fs::read_to_string("/proc/cpuinfo").expect("cpuinfo");
    if flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        println!("skipped: this CPU has it");
        return;
    }
    let folder = Folder(std::env::temp_dir().join(format!("softkvm-looks-{}", std::process::id())));
    std::fs::create_dir_all(&folder.0).expect("a temporary folder");
    let source = folder.0.join("looks.c");
    std::fs::write(&source, include_str!("looks.c")).expect("the source");
    let (known, other) = (folder.0.join("lkvm"), folder.0.join("another-vmm"));
    let [known_name, other_name] = [&known, &other].map(|path| path.to_str().expect("the folder's name is plain"));
    let kinds: [&[&str]; 4] = [
        &["-O2", "-pie", "-fPIE"],
        &["-O0", "-no-pie", "-fno-pie"],
        &["-O3", "-static"],
        &["-Os", "-static-pie", "-fPIE"],
    ];
    for options in kinds {
        let cc = Command::new("cc").args(options).arg(&source).arg("-o").arg(&known).status().expect("cc");
        assert!(cc.success(), "{options:?}");
        std::fs::copy(&known, &other).expect("a copy");
        assert_eq!(run(&[known_name]), (Some(0), "goes on\n".to_owned()), "{options:?}");
        assert_eq!(run(&[other_name]).0, Some(1), "{options:?}: nobody asked for it");
        assert_eq!(run(&["sh", "-c", &format!("{known_name}; true $?")]).1, run(&[other_name]).1, "started by another");
        let always = run_with(&["--claim-virtualization", "always"], &[other_name]);
        assert_eq!(always, (Some(0), "goes on\n".to_owned()), "{options:?}");
        assert_eq!(run_with(&["--claim-virtualization", "never"], &[known_name]).0, Some(1), "{options:?}");

        let (changed, own) = (run(&[known_name, "all"]).1, run(&[other_name, "all"]).1);
        let differ: Vec<_> = changed.lines().zip(own.lines()).filter(|(changed, own)| changed != own).collect();
        let [(changed, own)] = differ[..] else { panic!("{options:?}: {differ:?}") };
        let words = |line: &str| -> Vec<u32> {
            line.replace(':', "").split_whitespace().map(|word| u32::from_str_radix(word, 16).expect("hex")).collect()
        };
        let (changed, own) = (words(changed), words(own));
        // SDM Vol. 2 "CPUID", leaf 1; APM Vol. 3, "CPUID Fn8000_0001_ECX".
        let bit = if own[0] == 1 { 1 << 5 } else { 1 << 2 };
        assert_eq!(changed, [own[0], own[1], own[2], own[3] | bit, own[4]], "{options:?}");
    }
}

/// Where the command has no CPUID instruction, or cannot be read, it runs as it is.
#[test]
fn who_cannot_look_runs_as_it_is() {
    let always = &["--claim-virtualization", "always"];
    assert_eq!(run_with(always, &["echo", "as it is"]), (Some(0), "as it is\n".to_owned()));
    assert_eq!(run_with(always, &["sh", "-c", "kill -9 $$"]).0, Some(128 + 9));
    assert_eq!(run_with(always, &["/nonexistent/program"]).0, Some(127));
}
