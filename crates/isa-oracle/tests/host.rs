//! The oracle itself: what it says of instructions whose results the SDM states outright, and that nothing gets out.

use isa_oracle::compare::{differences, end_text};
use isa_oracle::generate::{Breadth, Generator};
use isa_oracle::host::Oracle;
use isa_oracle::layout::{CODE_BASE, CODE_BYTES, DATA_BASE, DATA_END, READONLY_BASE, readonly_page};
use isa_oracle::record;
use isa_oracle::state::{Case, End, Mode, Outcome, flag};
use isa_oracle::vendor::Vendor;

fn run(case: &Case) -> Outcome {
    Oracle::new().expect("a sandboxed child").run_one(case).expect("an outcome")
}

#[test]
fn add_overflows_as_the_manual_says() {
    let mut case = Case::new(&[0x48, 0x01, 0xd8]);
    case.state.gpr[0] = i64::MAX as u64;
    case.state.gpr[3] = 1;
    let outcome = run(&case);
    assert_eq!(outcome.end, End::Done);
    assert_eq!(outcome.state.gpr[0], 1 << 63);
    assert_eq!(outcome.state.rflags & flag::STATUS, flag::OF | flag::SF | flag::AF | flag::PF);
    assert_eq!(outcome.state.rip, CODE_BASE + 3);
}

#[test]
fn exceptions_carry_error_code_and_address() {
    // bytes, rax, how it ends
    let rows: [(&[u8], u64, &str); 9] = [
        (&[0x0f, 0x0b], 0, "#UD"),
        (&[0xf0, 0x48, 0x01, 0xd8], 0, "#UD"),
        (&[0xcc], 0, "#BP"),
        (&[0xf4], 0, "#GP(0)"),
        (&[0x48, 0xf7, 0xf0], 0, "#DE"),
        (&[0x8b, 0x00], DATA_END, "#PF(4)@20003000"),
        (&[0x89, 0x00], READONLY_BASE, "#PF(7)@20002000"),
        (&[0x8b, 0x00], 1 << 62, "#GP(0)"),
        (&[0x0f, 0x28, 0x00], DATA_BASE + 1, "#GP(0)"),
    ];
    let mut oracle = Oracle::new().expect("a sandboxed child");
    for (bytes, rax, end) in rows {
        let mut case = Case::new(bytes);
        case.state.gpr[0] = rax;
        let outcome = oracle.run_one(&case).expect("an outcome");
        assert_eq!(end_text(outcome.end), end, "{bytes:02x?}");
    }
}

#[test]
fn every_register_goes_in_and_comes_out() {
    let mut case = Case::new(&[0x90]);
    case.state.gpr = std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1));
    case.state.gpr[4] = DATA_BASE + 0x40;
    case.state.rflags |= flag::STATUS | flag::DF | flag::NT | flag::ID;
    case.state.ymm = std::array::from_fn(|i| [u128::MAX / (i as u128 + 1), u128::MAX / (i as u128 + 40)]);
    case.state.x87.st = std::array::from_fn(|i| (0x3fff << 64) | (1 << 63) | i as u128);
    case.state.x87.fsw = 3 << 11;
    case.state.x87.ftw = 0xff;
    case.state.x87.fcw = 0x27f;
    case.state.mxcsr = 0x7fbf;
    case.state.fs_base = 0x1234_5678_9abc;
    case.state.gs_base = 0x7fff_ffff_0000;
    case.state.memory.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8 ^ 0x5a);
    let outcome = run(&case);
    let mut expected = Outcome { end: End::Done, state: case.state.clone() };
    expected.state.rip += 1;
    assert_eq!(differences(Vendor::host(), &case, &expected, &outcome), []);
}

#[test]
fn repeated_string_instruction_runs_to_its_end() {
    let mut case = Case::new(&[0xf3, 0xa4]);
    case.state.gpr[1] = 100;
    case.state.gpr[6] = READONLY_BASE;
    case.state.gpr[7] = DATA_BASE;
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.state.gpr[1], outcome.state.rip), (End::Done, 0, CODE_BASE + 2));
    assert_eq!(outcome.state.memory[..100], readonly_page()[..100]);
}

#[test]
fn branches_stop_at_their_target() {
    let mut case = Case::new(&[0xff, 0xe0]);
    case.state.gpr[0] = 0x7777_0000_1234;
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.state.rip), (End::Done, 0x7777_0000_1234));
    let mut at_end = Case::new(&[0xeb, 0xfe]);
    at_end.state.rip = CODE_BASE + CODE_BYTES as u64 - 2;
    let outcome = run(&at_end);
    assert_eq!((outcome.end, outcome.state.rip), (End::Done, at_end.state.rip));
}

#[test]
fn compatibility_mode_has_its_own_instructions() {
    let mut case = Case::in_mode(Mode::Bits32, &[0x27]); // DAA
    case.state.gpr[0] = 0x9a;
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.state.gpr[0]), (End::Done, 0));
    assert_eq!(outcome.state.rip, CODE_BASE + 1);
}

#[test]
fn sixteen_bit_segments_have_bases_and_limits() {
    let mut case = Case::in_mode(Mode::Bits16, &[0x8b, 0x07]); // MOV AX, [BX]
    case.state.gpr[3] = 0xffff_0010;
    case.state.memory[0x10..0x12].copy_from_slice(&[0x34, 0x12]);
    let outcome = run(&case);
    assert_eq!((outcome.end, outcome.state.gpr[0], outcome.state.rip), (End::Done, 0x1234, 2));
    case.state.gpr[3] = 0xffff;
    assert_eq!(end_text(run(&case).end), "#GP(0)");
}

#[test]
fn system_calls_do_not_get_out() {
    let mut oracle = Oracle::new().expect("a sandboxed child");
    // Every number that the sandbox itself uses, and exit_group and kill.
    for number in [15u64, 202, 231, 62, 9] {
        for bytes in [&[0x0f, 0x05][..], &[0xcd, 0x80]] {
            let mut case = Case::new(bytes);
            case.state.gpr[0] = number;
            let outcome = oracle.run_one(&case).expect("an outcome");
            assert_eq!(outcome.end, End::Lost("made a system call"));
        }
    }
    assert_eq!(oracle.run_one(&Case::new(&[0x90])).expect("an outcome").end, End::Done);
}

#[test]
fn a_lost_child_is_replaced() {
    let mut oracle = Oracle::new().expect("a sandboxed child");
    let mut fatal = Case::new(&[0x90]);
    fatal.state.seg[3] = 0x1234; // no such selector: the child's own load of DS faults, which kills it
    let fine = Case::new(&[0x90]);
    let outcomes = oracle.run(&[fine.clone(), fatal, fine]).expect("outcomes");
    let ends: Vec<End> = outcomes.iter().map(|outcome| outcome.end).collect();
    assert_eq!(ends, [End::Done, End::Lost("killed"), End::Done]);
}

#[test]
fn the_same_seed_gives_the_same_cases() {
    let forms: Vec<_> = record::mnemonics().into_values().flatten().step_by(37).collect();
    let cases = |seed| {
        let mut generator = Generator::new(seed, Breadth::Everything);
        forms.iter().filter_map(|(code, mode)| generator.case(*code, *mode)).collect::<Vec<_>>()
    };
    let (first, second) = (cases(7), cases(7));
    assert!(first.len() > 20);
    assert!(first.iter().zip(&second).all(|(a, b)| a.bytes == b.bytes && a.state == b.state));
}
