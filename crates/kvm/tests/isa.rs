//! What CPUID offers, the core's rows and their vectors, held against one another.

use std::path::Path;

use isa_oracle::coverage::Report;

#[test]
fn what_is_offered_is_executed_and_what_is_executed_has_vectors() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cpu-core/tests/isa");
    let report = Report::new(kvm::OFFERED_FEATURES, &vectors).expect("the vectors are in the repository");
    let problems = report.problems();
    assert!(problems.is_empty(), "{problems:#?}");
}
