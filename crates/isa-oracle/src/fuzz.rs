//! The differential fuzzer: random cases on the host CPU and on something that claims to be like it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use iced_x86::{Code, FlowControl};

use crate::compare::{Difference, differences};
use crate::generate::{self, Breadth, Generator};
use crate::host::{Error, Oracle};
use crate::record::file_stem;
use crate::state::{Case, End, Mode, Outcome, State};
use crate::vector::{self, Vector};
use crate::vendor::Vendor;
use crate::{decode, stop};

/// What is compared with the host CPU.
pub trait Subject {
    /// Runs `case`.
    fn run(&mut self, case: &Case) -> Outcome;
}

impl<F: FnMut(&Case) -> Outcome> Subject for F {
    fn run(&mut self, case: &Case) -> Outcome {
        self(case)
    }
}

/// How long and over what.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Seed of the cases.
    pub seed: u64,
    /// Mnemonics and CPUID features (`add`, `sse2`) to draw from; everything when empty.
    pub filter: Vec<String>,
    /// Stop after this many cases.
    pub cases: u64,
    /// Stop after this long.
    pub time: Duration,
    /// Failures of one mnemonic that are minimised and kept.
    pub keep: usize,
}

/// A case whose outcomes differ, made as plain as it goes.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The case, and what the host said.
    pub vector: Vector,
    /// Where the subject disagrees.
    pub differences: Vec<Difference>,
}

/// What happened to the cases of one mnemonic.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Cases compared.
    pub compared: u64,
    /// Cases that differ.
    pub different: u64,
    /// Cases that the subject does not implement.
    pub missing: u64,
    /// The first failures.
    pub failures: Vec<Failure>,
}

/// Result of a run, by mnemonic.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// By file stem of the mnemonic.
    pub tallies: BTreeMap<String, Tally>,
    /// Cases in all.
    pub cases: u64,
    /// How long it took.
    pub time: Duration,
}

/// Encodings that `filter` names and the host has.
pub fn forms(filter: &[String]) -> Vec<(Code, Mode)> {
    let wanted = |code: Code| {
        filter.is_empty()
            || filter.iter().any(|word| {
                file_stem(code.mnemonic()) == *word
                    || code.cpuid_features().iter().any(|feature| format!("{feature:?}").to_lowercase() == *word)
            })
    };
    let mut found = Vec::new();
    for mode in [Mode::Bits64, Mode::Bits32, Mode::Bits16] {
        let codes = generate::all(mode, wanted).into_iter().filter(|code| generate::host_has(*code));
        found.extend(codes.map(|code| (code, mode)));
    }
    found
}

const BATCH: usize = 256;

/// What a run tells of while it goes on.
pub enum Event<'a> {
    /// Cases so far, and how many of them differ.
    Progress(u64, u64),
    /// One of the failures that are kept, made as plain as it goes.
    Failure(&'a Failure),
}

/// Runs `plan`, and calls `tell` now and then.
pub fn run(
    oracle: &mut Oracle,
    subject: &mut dyn Subject,
    plan: &Plan,
    tell: &mut dyn FnMut(Event<'_>),
) -> Result<Report, Error> {
    let vendor = Vendor::host();
    let forms = forms(&plan.filter);
    let mut generator = Generator::new(plan.seed, Breadth::Everything);
    let mut report = Report::default();
    let start = Instant::now();
    let mut different = 0;
    while !forms.is_empty() && report.cases < plan.cases && start.elapsed() < plan.time {
        let mut cases = Vec::with_capacity(BATCH);
        while cases.len() < BATCH.min((plan.cases - report.cases) as usize) {
            let (code, mode) = generator.rng().pick(&forms);
            // One in four is a run of several instructions.
            if generator.rng().one_in(4) {
                cases.extend(generator.sequence(&forms));
            } else {
                cases.extend(generator.case(code, mode));
            }
        }
        let outcomes = oracle.run(&cases)?;
        report.cases += cases.len() as u64;
        for (case, expected) in cases.into_iter().zip(outcomes) {
            if matches!(expected.end, End::Lost(_)) {
                continue;
            }
            let actual = subject.run(&case);
            let tally = report.tallies.entry(tally_name(&case)).or_default();
            tally.compared += 1;
            if actual.end == End::Lost("not implemented") {
                tally.missing += 1;
                continue;
            }
            if differences(vendor, &case, &expected, &actual).is_empty() {
                continue;
            }
            tally.different += 1;
            different += 1;
            if tally.failures.len() < plan.keep {
                let failure = minimise(oracle, subject, Vector { case, expected, vendor })?;
                let news = |kept: &Failure| kept.vector.case.bytes != failure.vector.case.bytes;
                if tally.failures.iter().all(news) {
                    tell(Event::Failure(&failure));
                    tally.failures.push(failure);
                }
            }
        }
        tell(Event::Progress(report.cases, different));
    }
    report.time = start.elapsed();
    Ok(report)
}

/// Under what name a case is counted.
fn tally_name(case: &Case) -> String {
    let instruction = decode(case);
    let several = !instruction.is_invalid() && instruction.len() < case.bytes.len();
    if several { "several".to_owned() } else { file_stem(instruction.mnemonic()) }
}

/// Takes out of the case whatever does not matter to the first difference.
fn minimise(oracle: &mut Oracle, subject: &mut dyn Subject, vector: Vector) -> Result<Failure, Error> {
    let found = differences(vector.vendor, &vector.case, &vector.expected, &subject.run(&vector.case));
    let mut best = Failure { vector, differences: found };
    let mut left = stop::instructions(&best.vector.case).count();
    while left > 1 {
        left -= 1;
        if let Some(case) = without(&best.vector.case, left) {
            best = plainer(oracle, subject, case, best)?;
        }
    }
    let mut at = 0;
    while is_prefix(&best.vector.case, at) {
        let mut case = best.vector.case.clone();
        case.bytes.remove(at);
        let fewer = case.bytes.len();
        // What follows may have become another instruction.
        if decode(&case).mnemonic() == decode(&best.vector.case).mnemonic() {
            best = plainer(oracle, subject, case, best)?;
        }
        at += usize::from(best.vector.case.bytes.len() != fewer);
    }
    let plain = Case::in_mode(best.vector.case.mode, &[]).state;
    for simplify in simplifications() {
        let mut case = best.vector.case.clone();
        simplify(&mut case.state, &plain);
        if case.state != best.vector.case.state {
            best = plainer(oracle, subject, case, best)?;
        }
    }
    Ok(best)
}

/// Whether byte `at` of the case's only instruction is a prefix.
fn is_prefix(case: &Case, at: usize) -> bool {
    let instruction = decode(case);
    let alone = instruction.is_invalid() || instruction.len() == case.bytes.len();
    let rex = case.mode == Mode::Bits64;
    let prefix = |byte: &u8| match byte {
        0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 => true,
        0x40..=0x4f => rex,
        _ => false,
    };
    alone && at + 1 < case.bytes.len() && case.bytes[..=at].iter().all(prefix)
}

/// The case without instruction `number`; None where branches would miss their targets.
fn without(case: &Case, number: usize) -> Option<Case> {
    let mut bytes = Vec::new();
    for (at, instruction) in stop::instructions(case).enumerate() {
        if instruction.flow_control() != FlowControl::Next {
            return None;
        }
        let start = (instruction.ip() - case.state.rip) as usize;
        if at != number {
            bytes.extend_from_slice(&case.bytes[start..start + instruction.len()]);
        }
    }
    (!bytes.is_empty()).then(|| Case { bytes, ..case.clone() })
}

/// `case` if it fails as `best` does, else `best`.
fn plainer(oracle: &mut Oracle, subject: &mut dyn Subject, case: Case, best: Failure) -> Result<Failure, Error> {
    let expected = oracle.run_one(&case)?;
    let vendor = best.vector.vendor;
    let found = differences(vendor, &case, &expected, &subject.run(&case));
    let same = found.first().map(|d| &d.what) == best.differences.first().map(|d| &d.what);
    let kind = |end: End| match end {
        End::Exception(exception) => Some(exception.vector),
        _ => None,
    };
    let same_end = kind(expected.end) == kind(best.vector.expected.end);
    let better = same && same_end && !matches!(expected.end, End::Lost(_));
    Ok(if better { Failure { vector: Vector { case, expected, vendor }, differences: found } } else { best })
}

type Simplify = Box<dyn Fn(&mut State, &State)>;

/// Ways to make a state plainer, coarse ones first.
fn simplifications() -> Vec<Simplify> {
    let mut ways: Vec<Simplify> = vec![
        Box::new(|state, plain| state.ymm = plain.ymm),
        Box::new(|state, plain| state.avx512 = plain.avx512),
        Box::new(|state, plain| state.avx512.upper = plain.avx512.upper),
        Box::new(|state, plain| state.avx512.high = plain.avx512.high),
        Box::new(|state, plain| state.x87 = plain.x87),
        Box::new(|state, plain| state.memory = plain.memory.clone()),
        Box::new(|state, plain| state.rflags = plain.rflags),
        Box::new(|state, plain| state.mxcsr = plain.mxcsr),
        Box::new(|state, plain| state.rip = plain.rip),
        Box::new(|state, plain| state.fs_base = plain.fs_base),
        Box::new(|state, plain| state.gs_base = plain.gs_base),
        Box::new(|state, plain| state.x87.fcw = plain.x87.fcw),
        Box::new(|state, _| state.x87.fsw &= 0x3800),
        Box::new(|state, _| state.x87.fsw = 0),
    ];
    for at in 0..16 {
        ways.push(Box::new(move |state, plain| state.gpr[at] = plain.gpr[at]));
        ways.push(Box::new(move |state, plain| state.ymm[at] = plain.ymm[at]));
        ways.push(Box::new(move |state, _| state.ymm[at][1] = 0));
        ways.push(Box::new(move |state, _| state.avx512.upper[at] = [0; 2]));
        ways.push(Box::new(move |state, _| state.avx512.high[at] = [0; 4]));
    }
    for at in 0..8 {
        ways.push(Box::new(move |state, _| state.x87.st[at] = 0));
        ways.push(Box::new(move |state, _| state.avx512.k[at] = 0));
    }
    for bit in 0..22 {
        ways.push(Box::new(move |state, plain| state.rflags &= !(1u64 << bit) | plain.rflags));
    }
    for size in [4096, 512, 64, 16] {
        for start in (0..8192).step_by(size) {
            ways.push(Box::new(move |state, _| state.memory[start..start + size].fill(0)));
        }
    }
    ways
}

impl Failure {
    /// Under what name its vector file goes: that of its mnemonic.
    pub fn stem(&self) -> String {
        tally_name(&self.vector.case)
    }

    /// The vector line, and below it what the subject said.
    pub fn text(&self) -> String {
        let mut text = vector::line(&self.vector);
        let shown = self.differences.iter().take(6);
        for Difference { what, expected, actual } in shown {
            text.push_str(&format!("\n    {what}: host {expected}, softkvm {actual}"));
        }
        text
    }
}
