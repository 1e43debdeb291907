//! `softkvm run` as a command among others: its device, its exit status, its output.

use std::time::Duration;

use softkvm_tests::console::Console;
use softkvm_tests::softkvm;

/// Generous: a loaded machine must not fail a test.
const WITHIN: Duration = Duration::from_secs(120);

fn run(line: &[&str]) -> (Option<i32>, String) {
    let mut console = Console::start(&mut softkvm::run::<&str, _>(&[], line).expect("softkvm")).expect("it starts");
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
