//! The KVM selftests of Linux 6.1 as clients: each passes, or has its line in `expected-failures.txt`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use assets::{Quiet, selftests};
use softkvm_tests::console::Console;
use softkvm_tests::foreign::expected_failures;
use softkvm_tests::{long, softkvm};

/// Those that take minutes, or want a quiet machine: they run in the long form.
const SLOW: &[&str] = &[
    "hardware_disable_test",
    "max_guest_memory_test",
    "memslot_perf_test",
    "rseq_test",
    "x86_64/hyperv_clock",
    "x86_64/tsc_scaling_sync",
];
/// Whether these run at all is the host's to say: those that are listed as skipped may pass as well.
const BY_HOST: &[&str] = &[
    "access_tracking_perf_test",
    "x86_64/mmio_warning_test",
    "x86_64/nx_huge_pages_test.sh",
    "x86_64/vmx_exception_with_invalid_guest_state",
];
/// As many pass, at the least: without [`SLOW`], and with it.
const ENOUGH: [usize; 2] = [35, 41];

/// What has not ended by then hangs. Generous: a loaded machine must not fail a test.
fn within() -> Duration {
    Duration::from_secs(if long() { 1200 } else { 300 })
}

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Pass,
    /// It asked for something that is not offered.
    Skip,
    Fail,
    /// It did not end in time.
    Hang,
}

impl Outcome {
    /// By the exit status of tools/testing/selftests/kselftest.h: `KSFT_PASS`, `KSFT_SKIP`, everything else.
    fn of(status: Option<i32>) -> Self {
        match status {
            Some(0) => Outcome::Pass,
            Some(4) => Outcome::Skip,
            _ => Outcome::Fail,
        }
    }

    /// `skip` or `fail`, the first word of a line's reason. No test is expected to hang.
    fn listed(reason: &str) -> Self {
        match reason.split_whitespace().next() {
            Some("skip") => Outcome::Skip,
            Some("fail") => Outcome::Fail,
            _ => panic!("expected-failures.txt says neither skip nor fail: {reason}"),
        }
    }
}

/// Where an outcome and the list differ.
fn surprise(name: &str, outcome: Outcome, expected: &BTreeMap<&str, &str>) -> Option<String> {
    let wanted = expected.get(name).map_or(Outcome::Pass, |reason| Outcome::listed(reason));
    let may_pass = BY_HOST.contains(&name) && outcome == Outcome::Pass;
    (outcome != wanted && !may_pass).then(|| format!("{name}: {outcome:?}, and {wanted:?} was expected"))
}

#[test]
fn each_passes_or_is_listed() {
    let tests = selftests::ensure(&Quiet).expect("the selftests are built");
    let names = tests.names().expect("the Makefile lists them");
    let expected = expected_failures(include_str!("expected-failures.txt"));
    for name in expected.keys().chain(SLOW).chain(BY_HOST) {
        assert!(names.iter().any(|n| n == name), "{name} is listed, and there is no such test");
    }
    let (mut surprises, mut passed) = (Vec::new(), 0);
    for name in names.iter().map(String::as_str).filter(|name| long() || !SLOW.contains(name)) {
        let begin = Instant::now();
        let mut command = softkvm::client(&[], &[tests.program(name)]).expect("softkvm runs here");
        let mut console = Console::start(&mut command).expect("the test starts");
        let outcome = match console.finish(within()) {
            Ok(status) => Outcome::of(status.code()),
            Err(_) => Outcome::Hang,
        };
        println!("{:>6.1} s  {:<4}  {name}", begin.elapsed().as_secs_f64(), format!("{outcome:?}"));
        passed += usize::from(outcome == Outcome::Pass);
        surprises.extend(surprise(name, outcome, &expected).map(|what| format!("{what}\n{}", console.tail())));
    }
    assert!(surprises.is_empty(), "{}", surprises.join("\n"));
    assert!(passed >= ENOUGH[usize::from(long())], "{passed} pass");
}

/// By itself it passes over what is not offered. Without passthrough the ring is mapped while the vCPU runs, and reset by an ioctl of
/// another file.
#[test]
fn dirty_log_test_has_its_rings() {
    let tests = selftests::ensure(&Quiet).expect("the selftests are built");
    let program = tests.program("dirty_log_test");
    let line = [program.as_os_str(), "-M".as_ref(), "dirty-ring".as_ref()];
    for options in [&[][..], &["--no-passthrough"]] {
        let mut command = softkvm::client(options, &line).expect("softkvm runs here");
        let mut console = Console::start(&mut command).expect("the test starts");
        let status = console.finish(within()).expect("the test ends");
        assert_eq!(Outcome::of(status.code()), Outcome::Pass, "{options:?}\n{}", console.tail());
        assert!(!console.text().contains("not supported"), "{options:?}\n{}", console.tail());
    }
}

#[test]
fn every_difference_is_a_surprise() {
    let host = BY_HOST[0];
    let table = format!("a  skip VMX\nb  fail not yet\n{host}  skip its module\n");
    let expected = expected_failures(&table);
    let found = |name: &str, outcome| surprise(name, outcome, &expected);
    let expectable = [
        ("a", Outcome::Skip),
        ("b", Outcome::Fail),
        ("c", Outcome::Pass),
        (host, Outcome::Skip),
        (host, Outcome::Pass),
    ];
    assert!(expectable.iter().all(|&(name, outcome)| found(name, outcome).is_none()));
    assert_eq!(found("a", Outcome::Pass).as_deref(), Some("a: Pass, and Skip was expected"));
    assert_eq!(found("b", Outcome::Hang).as_deref(), Some("b: Hang, and Fail was expected"));
    assert_eq!(found("c", Outcome::of(Some(254))).as_deref(), Some("c: Fail, and Pass was expected"));
    assert!(found(host, Outcome::of(None)).is_some());
}
