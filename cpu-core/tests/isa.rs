//! Every vector in `tests/isa/`, recorded on a host CPU by `cargo xtask record isa`, on the interpreter.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use isa_oracle::compare::differences;
use isa_oracle::fuzz::Failure;
use isa_oracle::interpreter::Interpreter;
use isa_oracle::state::End;
use isa_oracle::{decode, generate, record, vector, vendor};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/isa")
}

#[test]
fn instructions_do_what_the_host_cpu_did() {
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory())
        .expect("the vectors are in the repository")
        .map(|entry| entry.expect("a readable directory").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "vec"))
        .collect();
    files.sort();
    assert!(files.len() > 500, "vectors of every mnemonic");
    let mut interpreter = Interpreter::new();
    let mut failures = Vec::new();
    let mut missing = BTreeSet::new();
    for path in files {
        let text = std::fs::read_to_string(&path).expect("a readable file");
        let vectors = vector::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let recorded_here = text.lines().next().is_some_and(|head| head.contains(&record::host_cpu()));
        for vector in vectors {
            let instruction = decode(&vector.case);
            let mnemonic = instruction.mnemonic();
            let up_to_the_cpu =
                vendor::is_approximate(mnemonic) || vendor::is_either_nan(&instruction, &vector.expected);
            if up_to_the_cpu && !recorded_here || !generate::is_executed_here(instruction.code()) {
                continue;
            }
            let actual = interpreter.run(&vector.case);
            if actual.end == End::Lost("not implemented") {
                missing.insert(format!("{mnemonic:?}"));
                continue;
            }
            let differences = differences(vector.vendor, &vector.case, &vector.expected, &actual);
            if !differences.is_empty() {
                failures.push(Failure { vector, differences }.text());
            }
        }
    }
    let shown = failures.iter().take(40).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} vectors fail:\n{shown}", failures.len());
    assert!(missing.is_empty(), "not implemented: {missing:?}");
}

#[test]
fn every_mnemonic_that_can_be_recorded_has_vectors() {
    let without: Vec<String> =
        record::mnemonics().into_keys().filter(|stem| !directory().join(format!("{stem}.vec")).is_file()).collect();
    assert!(without.is_empty(), "no vectors for {without:?}: cargo xtask record isa");
}
