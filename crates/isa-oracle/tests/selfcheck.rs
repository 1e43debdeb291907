//! The host against itself: a case must not depend on what ran before it.

use std::time::Duration;

use isa_oracle::fuzz::{Plan, run};
use isa_oracle::host::Oracle;
use isa_oracle::state::Case;

#[test]
fn cases_do_not_depend_on_each_other() {
    let mut oracle = Oracle::new().expect("a sandboxed child");
    let mut other = Oracle::new().expect("another child");
    let mut again = |case: &Case| other.run_one(case).expect("an outcome");
    let plan = Plan { seed: 1, filter: Vec::new(), cases: 6000, time: Duration::from_secs(60), keep: 1 };
    let report = run(&mut oracle, &mut again, &plan, &mut |_| ()).expect("a report");
    let failures: Vec<String> =
        report.tallies.values().flat_map(|tally| &tally.failures).map(|failure| failure.text()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
