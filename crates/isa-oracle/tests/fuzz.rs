//! A short deterministic run of the fuzzer: the interpreter against the CPU this test runs on.

use std::time::Duration;

use isa_oracle::fuzz::{Plan, run};
use isa_oracle::host::Oracle;
use isa_oracle::interpreter::Interpreter;

#[test]
fn interpreter_agrees_with_the_host_cpu() {
    let mut oracle = Oracle::new().expect("a sandboxed child");
    let mut interpreter = Interpreter::new();
    let plan = Plan { seed: 2007, filter: Vec::new(), cases: 20_000, time: Duration::from_secs(120), keep: 2 };
    let report = run(&mut oracle, &mut interpreter, &plan, &mut |_| ()).expect("a report");
    let failures: Vec<String> =
        report.tallies.values().flat_map(|tally| &tally.failures).map(|failure| failure.text()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let missing: Vec<&String> =
        report.tallies.iter().filter(|(_, tally)| tally.missing > 0).map(|(mnemonic, _)| mnemonic).collect();
    assert!(missing.is_empty(), "not implemented: {missing:?}");
}
