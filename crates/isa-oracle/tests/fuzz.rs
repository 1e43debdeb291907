//! A short deterministic run of the fuzzer: the interpreter against the CPU this test runs on.

use std::time::Duration;

use isa_oracle::compare::differences;
use isa_oracle::fuzz::{Plan, run};
use isa_oracle::host::Oracle;
use isa_oracle::interpreter::Interpreter;
use isa_oracle::state::{Case, End};
use isa_oracle::vendor::Vendor;

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

/// "#UD if any of the operands match the destination" (SDM Vol. 2 "VFMADDCPH" and the like): the decoder's affair, of whose
/// invalid bytes the fuzzer makes nothing.
#[test]
fn complex_numbers_go_where_no_source_is() {
    if !std::arch::is_x86_feature_detected!("avx512fp16") {
        return;
    }
    let mut oracle = Oracle::new().expect("a sandboxed child");
    let mut interpreter = Interpreter::new();
    for opcode in [0x56, 0x57, 0xd6, 0xd7] {
        // F3 or F2; the destination and the first source; the second source, or memory at [RSP].
        for (prefix, places) in [2u8, 3].into_iter().flat_map(|prefix| (0..36u8).map(move |places| (prefix, places))) {
            let (to, a, b) = (places % 3, places / 3 % 3, places / 9);
            let p1 = (!a & 15) << 3 | 4 | prefix;
            let modrm = if b == 3 { to << 3 | 4 } else { 0xc0 | to << 3 | b };
            let mut bytes = vec![0x62, 0xf6, p1, 8, opcode, modrm];
            if b == 3 {
                bytes.push(0x24);
            }
            let case = Case::new(&bytes);
            let expected = oracle.run_one(&case).expect("an outcome");
            assert_eq!(expected.end == End::Done, to != a && to != b, "{bytes:02x?}");
            let found = differences(Vendor::host(), &case, &expected, &interpreter.run(&case));
            assert_eq!(found, [], "{bytes:02x?}");
        }
    }
}
