//! The library tests of kvm-ioctls 0.25.1, unmodified, as clients.

use std::collections::BTreeMap;
use std::time::Duration;

use softkvm_tests::console::Console;
use softkvm_tests::foreign::{expected_failures, results, surprises, test_program};
use softkvm_tests::softkvm;

/// Generous: a loaded machine must not fail a test.
const WITHIN: Duration = Duration::from_secs(180);
/// One test of the suite, when the whole did not come to its end.
const ALONE: Duration = Duration::from_secs(60);
const VERSION: &str = "0.25.1";

/// What a VMM cannot do without: these must pass, whatever the table of expected failures says.
const CORE: &[&str] = &[
    "ioctls::vcpu::tests::test_run_code",
    "ioctls::vcpu::tests::test_fpu",
    "ioctls::vcpu::tests::msrs_test",
    "ioctls::vcpu::tests::test_set_cpuid",
    "ioctls::vcpu::tests::xcrs_test",
    "ioctls::vcpu::tests::debugregs_test",
    "ioctls::vcpu::tests::vcpu_events_test",
    "ioctls::vcpu::tests::xsave_test",
];

/// Runs the suite's program with `args` under `softkvm run OPTIONS`: what it says about each test, and its last lines. Tests behind one that hangs or
/// ends the process are not among the results.
fn suite(options: &[&str], args: &[&str], within: Duration) -> (BTreeMap<String, String>, String) {
    let program = test_program("kvm-ioctls", VERSION).expect("the suite builds");
    let mut line = vec![program.as_os_str()];
    line.extend(args.iter().map(std::ffi::OsStr::new));
    let mut command = softkvm::client(options, &line).expect("softkvm runs here");
    // One thread: then the last line names the test that did not come back.
    let mut console =
        Console::start(command.env("RUST_TEST_THREADS", "1").env("RUST_BACKTRACE", "0")).expect("the suite starts");
    let ended = console.finish(within);
    let tail = format!("{ended:?}\n{}", console.tail());
    (results(&console.text()), tail)
}

fn core_passes(options: &[&str]) {
    let mut args = vec!["--exact"];
    args.extend(CORE);
    let (results, tail) = suite(options, &args, WITHIN);
    for name in CORE {
        assert_eq!(results.get(*name).map(String::as_str), Some("ok"), "{name}\n{tail}");
    }
}

#[test]
fn the_core_tests_pass() {
    core_passes(&[]);
}

/// Kernels before 6.9 have no FUSE passthrough; `kvm_run` is shared in another way there.
#[test]
fn the_core_tests_pass_without_passthrough() {
    core_passes(&["--no-passthrough"]);
}

#[test]
fn the_whole_suite_is_as_expected() {
    let program = test_program("kvm-ioctls", VERSION).expect("the suite builds");
    let list = std::process::Command::new(program).args(["--list", "--format=terse"]).output().expect("the suite runs");
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let (mut all, tail) = suite(&[], &[], WITHIN);
    for name in names.filter(|name| !all.contains_key(*name)).collect::<Vec<_>>() {
        let result = suite(&[], &["--exact", name], ALONE).0.remove(name);
        all.insert(name.to_owned(), result.unwrap_or_else(|| "did not come back".to_owned()));
    }
    let expected = expected_failures(include_str!("expected-failures.txt"));
    let surprises = surprises(&all, &expected);
    assert!(surprises.is_empty(), "{}\n{tail}", surprises.join("\n"));
}
