//! Every line of the header of 2007 stands in `kvm::header`, with tests that exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use kvm::header::{LINES, Part};
use kvm_abi::legacy::{EXIT_REASONS, REQUESTS};
use kvm_abi::request::NAMES;

/// `struct kvm_run` of `include/linux/kvm.h` of Linux 2.6.22, without padding.
const RUN: &[&str] = &[
    "request_interrupt_window",
    "exit_reason",
    "ready_for_interrupt_injection",
    "if_flag",
    "cr8",
    "apic_base",
    "hw.hardware_exit_reason",
    "fail_entry.hardware_entry_failure_reason",
    "ex.exception",
    "ex.error_code",
    "io.direction",
    "io.size",
    "io.port",
    "io.count",
    "io.data_offset",
    "debug",
    "mmio.phys_addr",
    "mmio.data",
    "mmio.len",
    "mmio.is_write",
    "hypercall.args",
    "hypercall.ret",
    "hypercall.longmode",
];

/// Its other structures and constants.
const TYPES: &[&str] = &[
    "KVM_API_VERSION",
    "KVM_NR_INTERRUPTS",
    "KVM_IRQ_BITMAP_SIZE",
    "KVM_MEM_LOG_DIRTY_PAGES",
    "KVM_EXIT_IO_IN",
    "KVM_EXIT_IO_OUT",
    "struct kvm_memory_region",
    "struct kvm_memory_alias",
    "struct kvm_run",
    "struct kvm_regs",
    "struct kvm_fpu",
    "struct kvm_segment",
    "struct kvm_dtable",
    "struct kvm_sregs",
    "struct kvm_msr_entry",
    "struct kvm_msrs",
    "struct kvm_msr_list",
    "struct kvm_translation",
    "struct kvm_interrupt",
    "struct kvm_breakpoint",
    "struct kvm_debug_guest",
    "struct kvm_dirty_log",
    "struct kvm_cpuid_entry",
    "struct kvm_cpuid",
    "struct kvm_signal_mask",
];

fn listed(part: Part) -> Vec<&'static str> {
    LINES.iter().filter(|line| line.part == part).map(|line| line.name).collect()
}

#[test]
fn every_line_of_the_header_is_listed() {
    let name = |request: &u32| NAMES.iter().find(|named| named.0 == *request).expect("a name").1;
    let requests: Vec<_> = REQUESTS.iter().flat_map(|(_, requests)| *requests).map(name).collect();
    assert_eq!(listed(Part::Ioctl), requests);
    assert_eq!(listed(Part::Exit), EXIT_REASONS.map(|reason| format!("KVM_EXIT_{reason}")));
    assert_eq!(listed(Part::Run), RUN);
    assert_eq!(listed(Part::Type), TYPES);
}

/// Every `.rs` below a folder.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of this workspace") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The functions behind `#[test]`.
fn tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    for folder in ["tests", "../kvm-abi/tests"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut files);
    }
    let mut names = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a source");
        let behind = text.split("#[test]\nfn ").skip(1);
        names.extend(behind.filter_map(|rest| rest.split_once("()")).map(|(name, _)| name.to_owned()));
    }
    names
}

#[test]
fn every_line_names_tests_that_exist() {
    let tests = tests();
    for line in LINES {
        assert!(!line.shown_by.is_empty(), "{} needs a test", line.name);
        for test in line.shown_by {
            assert!(tests.contains(*test), "{}: there is no test {test}", line.name);
        }
    }
}

/// The other way round: what stands in `tests/legacy` shows some line, or one of the rules that no line has.
#[test]
fn every_test_of_2007_is_named() {
    const RULES: &[&str] = &[
        "a_closed_vcpu_keeps_its_slot_and_the_vm_lives_with_the_last_file",
        "a_fresh_counter_starts_at_0",
        "a_fresh_vcpu_has_dr7_400_and_mxcsr_1f80",
        "a_fresh_vcpu_starts_in_the_first_mebibyte",
        "a_vector_under_way_shows_in_the_bitmap_once",
        "any_guest_exits_as_the_header_says",
        "arguments_that_should_be_0_are_einval",
        "bad_control_registers_are_the_guests_fault",
        "bad_pointers_are_efault_and_change_nothing",
        "entries_behind_a_readable_header_are_efault_too",
        "memory_comes_from_the_kernel_and_shows_in_the_vm_file",
        "requests_of_today_that_replaced_those_of_2007_are_einval",
        "requests_to_the_wrong_file_are_einval",
        "the_mapping_of_the_vm_file_reaches_over_holes",
        "unknown_requests_are_einval_on_every_file",
        "vcpu_files_stay_open_over_exec",
    ];
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/legacy"), &mut files);
    for file in files {
        let text = fs::read_to_string(&file).expect("a source");
        for rest in text.split("#[test]\nfn ").skip(1) {
            let name = rest.split_once("()").expect("a test takes nothing").0;
            let named = LINES.iter().any(|line| line.shown_by.contains(&name)) || RULES.contains(&name);
            assert!(named, "{name} in {} shows no line of the header", file.display());
        }
    }
}
