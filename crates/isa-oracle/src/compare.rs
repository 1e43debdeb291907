//! Compares two outcomes of one case. What the architecture leaves open is masked here, and nothing else is.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use crate::decode;
use crate::generate::open_flags;
use crate::layout::DATA_BASE;
use crate::state::{CS, Case, End, GPR_NAMES, Mode, Outcome, SEG_NAMES, flag};
use crate::stop;
use crate::vendor::{self, Vendor};

/// One piece of state in which two outcomes differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Name of the piece, as vectors spell it.
    pub what: String,
    /// What the oracle says.
    pub expected: String,
    /// What the other side says.
    pub actual: String,
}

/// State that an instruction leaves undefined, or that vendors define differently.
#[derive(Clone, Debug, Default)]
pub struct Mask {
    /// RFLAGS bits.
    pub rflags: u64,
    /// x87 status word bits.
    pub fsw: u16,
    /// MXCSR bits.
    pub mxcsr: u32,
    /// TOP, tags and registers of the x87.
    pub x87: bool,
    /// General-purpose registers (by number) of which nothing is known.
    pub gpr: Vec<usize>,
    /// Byte ranges of memory, by address.
    pub memory: Vec<(u64, u64)>,
}

impl Mask {
    /// What `case` leaves open on a CPU of `vendor` when it completes, or (not `done`) when it faults.
    pub fn of(vendor: Vendor, case: &Case, instruction: &Instruction, done: bool) -> Self {
        if instruction.len() < case.bytes.len() && !instruction.is_invalid() {
            return Self { rflags: open_flags(case, done).unwrap_or(flag::STATUS), ..Self::default() };
        }
        let mut mask = Self::default();
        if done || is_partial(instruction) {
            mask.rflags = undefined_flags(instruction);
        }
        vendor::widen(vendor, &mut mask, case, instruction, done);
        mask
    }
}

/// RFLAGS bits that the decoder's tables call undefined after `instruction`.
pub fn undefined_flags(instruction: &Instruction) -> u64 {
    from_iced(instruction.rflags_undefined())
}

/// RFLAGS bits that `instruction` looks at.
pub(crate) fn flags_read(instruction: &Instruction) -> u64 {
    from_iced(instruction.rflags_read())
}

/// RFLAGS bits that `instruction` writes to a defined value.
pub fn defined_flags(instruction: &Instruction) -> u64 {
    from_iced(instruction.rflags_modified() & !instruction.rflags_undefined())
}

fn from_iced(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    const BITS: [(u32, u64); 8] = [
        (B::OF, flag::OF),
        (B::SF, flag::SF),
        (B::ZF, flag::ZF),
        (B::AF, flag::AF),
        (B::CF, flag::CF),
        (B::PF, flag::PF),
        (B::DF, flag::DF),
        (B::AC, flag::AC),
    ];
    BITS.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum()
}

/// The instruction that ended the case: of several, the first that faulted on either side.
fn responsible(case: &Case, expected: &Outcome, actual: &Outcome) -> Instruction {
    let faulted = |outcome: &&Outcome| outcome.end != End::Done;
    let first = [expected, actual].into_iter().filter(faulted).map(|outcome| outcome.state.rip).min();
    stop::instructions(case).find(|instruction| Some(instruction.ip()) == first).unwrap_or_else(|| decode(case))
}

/// Where `actual` differs from `expected`, which a CPU of `vendor` gave; empty where they agree.
pub fn differences(vendor: Vendor, case: &Case, expected: &Outcome, actual: &Outcome) -> Vec<Difference> {
    let instruction = responsible(case, expected, actual);
    let mut found = Vec::new();
    if vendor::is_open(vendor, case, &instruction, expected, actual.end) {
        return found;
    }
    let mut report = |what: &str, expected: String, actual: String| {
        if expected != actual {
            found.push(Difference { what: what.to_owned(), expected, actual });
        }
    };
    if !vendor::is_same_end(vendor, case.mode, &instruction, expected.end, actual.end) {
        report("end", end_text(expected.end), end_text(actual.end));
    }
    let (e, a) = (&expected.state, &actual.state);
    let done = expected.end == End::Done && actual.end == End::Done;
    // Between two iterations the flags are those of a fault.
    let between = e.rip == case.state.rip && instruction.is_string_instruction();
    let mut mask = Mask::of(vendor, case, &instruction, done && !between);
    mask.mxcsr = vendor::open_mxcsr(vendor, &instruction, expected);
    // Outside 64-bit mode the upper halves are undefined (SDM Vol. 1 "General-Purpose Registers in 64-Bit Mode"), and so for
    // what has just left it.
    let stays = case.mode == Mode::Bits64 && e.seg[CS] == case.state.seg[CS];
    let width = if stays { u64::MAX } else { u64::from(u32::MAX) };
    for (at, name) in GPR_NAMES.iter().enumerate().filter(|(at, _)| !mask.gpr.contains(at)) {
        let string = matches!(at, 1 | 6 | 7) && vendor::has_narrow_string(vendor, &instruction);
        let width = if string { u64::from(u32::MAX) } else { width };
        report(name, hex(e.gpr[at] & width), hex(a.gpr[at] & width));
    }
    report("rip", hex(e.rip), hex(a.rip));
    let open = mask.rflags | flag::TF | flag::RF | flag::IF | 2;
    for (name, bit) in flag::NAMES.iter().filter(|(_, bit)| open & bit == 0) {
        report(name, u64::from(e.rflags & bit != 0).to_string(), u64::from(a.rflags & bit != 0).to_string());
    }
    // The kernel's IRET into the handler makes 0 of a null selector's RPL (SDM Vol. 2 "IRET", return to outer level).
    let selector = |selector: u16| hex(if selector < 4 { 0 } else { selector.into() });
    for (at, name) in SEG_NAMES.iter().enumerate() {
        report(name, selector(e.seg[at]), selector(a.seg[at]));
    }
    report("fsbase", hex(e.fs_base), hex(a.fs_base));
    report("gsbase", hex(e.gs_base), hex(a.gs_base));
    report("fcw", hex(e.x87.fcw.into()), hex(a.x87.fcw.into()));
    if !mask.x87 {
        report("fsw", hex((e.x87.fsw & !mask.fsw).into()), hex((a.x87.fsw & !mask.fsw).into()));
        report("ftw", hex(e.x87.ftw.into()), hex(a.x87.ftw.into()));
        for at in 0..8 {
            report(&format!("st{at}"), format!("{:020x}", e.x87.st[at]), format!("{:020x}", a.x87.st[at]));
        }
    }
    report("mxcsr", hex((e.mxcsr & !mask.mxcsr).into()), hex((a.mxcsr & !mask.mxcsr).into()));
    let mut vectors = [(e.ymm, e.avx512), (a.ymm, a.avx512)];
    if !done {
        vectors.iter_mut().for_each(|vectors| vendor::settle_gather(vendor, &instruction, vectors));
    }
    let [(e_ymm, e_512), (a_ymm, a_512)] = &vectors;
    for (at, (e, a)) in e_ymm.iter().zip(a_ymm).enumerate() {
        report(&format!("xmm{at}"), format!("{:032x}", e[0]), format!("{:032x}", a[0]));
        report(&format!("ymmh{at}"), format!("{:032x}", e[1]), format!("{:032x}", a[1]));
    }
    if e_512 != a_512 {
        let (e, a) = (e_512, a_512);
        for (at, (e, a)) in e.upper.iter().flatten().zip(a.upper.iter().flatten()).enumerate() {
            report(&format!("zmm{}.{}", at / 2, at % 2 + 2), format!("{e:032x}"), format!("{a:032x}"));
        }
        for (at, (e, a)) in e.high.iter().flatten().zip(a.high.iter().flatten()).enumerate() {
            report(&format!("zmm{}.{}", at / 4 + 16, at % 4), format!("{e:032x}"), format!("{a:032x}"));
        }
        for (at, (e, a)) in e.k.iter().zip(&a.k).enumerate() {
            report(&format!("k{at}"), hex(*e), hex(*a));
        }
    }
    if e.memory != a.memory {
        for (at, (e, a)) in e.memory.iter().zip(a.memory.iter()).enumerate() {
            let address = DATA_BASE + at as u64;
            if e != a && !mask.memory.iter().any(|(start, end)| (*start..*end).contains(&address)) {
                report(&format!("[{address:x}]"), format!("{e:02x}"), format!("{a:02x}"));
            }
        }
    }
    found
}

/// Instructions that may have written results when they fault.
fn is_partial(instruction: &Instruction) -> bool {
    let features = instruction.cpuid_features();
    instruction.is_string_instruction()
        || matches!(instruction.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
        || features.contains(&CpuidFeature::FPU)
}

fn hex(value: u64) -> String {
    format!("{value:x}")
}

/// An ending as vectors spell it.
pub fn end_text(end: End) -> String {
    match end {
        End::Done => "done".to_owned(),
        End::Lost(how) => format!("lost: {how}"),
        End::Exception(exception) => exception_text(&exception),
    }
}

/// End of user addresses with 4-level paging (arch/x86 `TASK_SIZE_MAX`).
const TASK_END: u64 = 0x7fff_ffff_f000;

const EXCEPTION_NAMES: [&str; 22] = [
    "#DE", "#DB", "#NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "#9", "#TS", "#NP", "#SS", "#GP", "#PF", "#15",
    "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
];

/// `#UD`, `#GP(0)`, `#PF(6)@20003000`.
fn exception_text(exception: &crate::state::Exception) -> String {
    let name = EXCEPTION_NAMES.get(usize::from(exception.vector)).copied().unwrap_or("#?");
    match exception.vector {
        // For an address of its own half Linux tells the user only "present" (fault.c, `sanitize_error_code`).
        14 if exception.cr2 >= TASK_END => format!("{name}({:x})@{:x}", exception.error | 1, exception.cr2),
        14 => format!("{name}({:x})@{:x}", exception.error, exception.cr2),
        8 | 10..=13 | 17 | 21 => format!("{name}({:x})", exception.error),
        _ => name.to_owned(),
    }
}

/// The exception that `exception_text` spells so.
pub(crate) fn parse_exception(text: &str) -> Option<crate::state::Exception> {
    let name_end = text.find('(').unwrap_or(text.len());
    let vector = EXCEPTION_NAMES.iter().position(|name| *name == &text[..name_end])? as u8;
    let (error, cr2) = match text[name_end..].strip_prefix('(') {
        None => (0, 0),
        Some(rest) => {
            let (error, rest) = rest.split_once(')')?;
            let cr2 = match rest.strip_prefix('@') {
                Some(cr2) => u64::from_str_radix(cr2, 16).ok()?,
                None => 0,
            };
            (u32::from_str_radix(error, 16).ok()?, cr2)
        }
    };
    Some(crate::state::Exception { vector, error, cr2 })
}
