//! What vendors do differently, and what the SDM leaves undefined beyond the flags that iced-x86 knows of.
//!
//! The interpreter follows the SDM. The host that recorded a vector may be of another vendor: what such a host does
//! differently is written here once, with the reason, is printed at the head of the vectors it touches, and is masked.

use iced_x86::{Code, CodeSize, FlowControl as Flow, Instruction, MemorySize, Mnemonic as M, OpKind, Register};

use crate::compare::Mask;
use crate::state::{Avx512, Case, End, Exception, Mode, Outcome, flag};

/// Whose CPU gave an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD, and who builds its cores.
    Amd,
    /// Intel; anybody else counts as Intel, of whose CPUs the rows expect the most.
    Intel,
}

impl Vendor {
    /// The vendor that `text` names, as CPUID spells them.
    pub fn named(text: &str) -> Option<Self> {
        const NAMES: [(&str, Vendor); 3] =
            [("AuthenticAMD", Vendor::Amd), ("HygonGenuine", Vendor::Amd), ("GenuineIntel", Vendor::Intel)];
        NAMES.iter().find(|(name, _)| text.contains(name)).map(|(_, vendor)| *vendor)
    }

    /// The vendor of this host's CPU.
    pub fn host() -> Self {
        Self::named(&crate::record::host_cpu()).unwrap_or(Self::Intel)
    }
}

/// What a row leaves open.
#[derive(Clone, Copy)]
enum Open {
    /// RFLAGS bits, always.
    Flags(u64),
    /// The bytes of a stored x87 environment that hold FOP, FIP, FCS, FDP and FDS.
    Environment,
    /// The arithmetic flags, where the instruction faults.
    FlagsAtFault,
    /// TOP, tags and registers of the x87, where the instruction faults.
    X87AtFault,
    /// The same, where the source is in memory.
    X87FromMemory,
    /// All general-purpose registers, where the instruction faults.
    Registers,
    /// The destination in memory, where the instruction faults.
    DestinationAtFault,
    /// What lies below the stack pointer, where the instruction faults.
    StackAtFault,
    /// Something that the note's own arm in `widen` decides by operand values.
    ByValue,
}

impl Open {
    fn only_at_fault(self) -> bool {
        match self {
            Self::FlagsAtFault | Self::X87AtFault | Self::Registers | Self::DestinationAtFault | Self::StackAtFault => {
                true
            }
            Self::Flags(_) | Self::Environment | Self::X87FromMemory | Self::ByValue => false,
        }
    }
}

/// A difference or an undefined result.
struct Note {
    mnemonics: &'static [M],
    /// On whose CPUs only; None: on all.
    on: Option<Vendor>,
    open: Open,
    note: &'static str,
}

const SHA: &[M] = &[M::Sha1msg1, M::Sha1msg2, M::Sha1nexte, M::Sha1rnds4, M::Sha256msg1, M::Sha256msg2, M::Sha256rnds2];

const NOTES: &[Note] = &[
    Note {
        mnemonics: &[M::Cvtpd2pi, M::Cvttpd2pi, M::Cvtps2pi, M::Cvttps2pi, M::Cvtpi2ps],
        on: None,
        open: Open::X87AtFault,
        note: "AMD's CPUs enter MMX state even where #XM is raised",
    },
    Note {
        mnemonics: &[M::Cvtpi2ps],
        on: None,
        open: Open::X87FromMemory,
        note: "a source in memory enters MMX state on Intel's CPUs (SDM Vol. 2), not on AMD's",
    },
    Note {
        mnemonics: &[M::Cmpsb, M::Cmpsw, M::Cmpsd, M::Cmpsq, M::Scasb, M::Scasw, M::Scasd, M::Scasq],
        on: None,
        open: Open::FlagsAtFault,
        note: "repeated, at a fault: Intel's CPUs restore the flags (SDM Vol. 2 \"REP\"), AMD's keep the last iteration's",
    },
    Note {
        mnemonics: &[M::Popa, M::Popad],
        on: None,
        open: Open::Registers,
        note: "registers popped before a fault keep their new values on some CPUs",
    },
    Note {
        mnemonics: &[M::Shld, M::Shrd],
        on: None,
        open: Open::ByValue,
        note: "count above the operand size: result and all flags undefined (SDM Vol. 2)",
    },
    Note {
        mnemonics: &[M::Rcl, M::Rcr],
        on: None,
        open: Open::ByValue,
        note: "OF is defined for counts of 1 only (SDM Vol. 2), also where a count of 9 or 17 leaves the operand as it was",
    },
    Note {
        mnemonics: &[M::Push],
        on: None,
        open: Open::ByValue,
        note: "a segment register: the upper bytes are zeros or are not written (SDM Vol. 2 \"PUSH\")",
    },
    Note {
        mnemonics: &[M::Call],
        on: Some(Vendor::Intel),
        open: Open::StackAtFault,
        note: "a target outside the code segment: Intel's CPUs have written the return address by then",
    },
    Note {
        mnemonics: &[M::Fstp, M::Fbstp],
        on: Some(Vendor::Intel),
        open: Open::DestinationAtFault,
        note: "across a page end: Intel's CPUs have written eight bytes when the other two fault",
    },
    Note {
        mnemonics: &[M::Movq, M::Movd, M::Movntq],
        on: Some(Vendor::Intel),
        open: Open::X87AtFault,
        note: "Intel's CPUs enter MMX state even where the store faults",
    },
    Note {
        mnemonics: &[M::Bsf, M::Bsr],
        on: None,
        open: Open::Flags(0),
        note: "source 0: destination undefined in the SDM, unchanged on AMD and on Intel's CPUs; compared as unchanged",
    },
    Note {
        mnemonics: SHA,
        on: None,
        open: Open::Flags(0),
        note: "a misaligned operand in memory is #GP(0) in the SDM (exceptions type 4); AMD's CPUs take it",
    },
    Note {
        mnemonics: &[M::Fnstenv, M::Fstenv, M::Fnsave, M::Fsave, M::Fxsave, M::Fxsave64],
        on: None,
        open: Open::Environment,
        note: "AMD keeps FOP, FIP and FDP of the last instruction that raised an exception, Intel of the last one",
    },
];

/// Whether the last bits of the result are up to the CPU's approximation: comparable on the CPU that recorded it only.
pub fn is_approximate(mnemonic: M) -> bool {
    const APPROXIMATE: [M; 28] = [
        M::Rcpps,
        M::Rcpss,
        M::Rsqrtps,
        M::Rsqrtss,
        M::Vrcpps,
        M::Vrcpss,
        M::Vrsqrtps,
        M::Vrsqrtss,
        M::F2xm1,
        M::Fcos,
        M::Fpatan,
        M::Fptan,
        M::Fsin,
        M::Fsincos,
        M::Fyl2x,
        M::Fyl2xp1,
        M::Vrcp14ps,
        M::Vrcp14pd,
        M::Vrcp14ss,
        M::Vrcp14sd,
        M::Vrsqrt14ps,
        M::Vrsqrt14pd,
        M::Vrsqrt14ss,
        M::Vrsqrt14sd,
        M::Vrcpph,
        M::Vrcpsh,
        M::Vrsqrtph,
        M::Vrsqrtsh,
    ];
    APPROXIMATE.contains(&mnemonic)
}

/// Whether the result holds a NaN whose payload is comparable on the CPU that recorded it only: of several NaNs, sums keep
/// the first operand's (SDM Vol. 1 "Rules for Handling NaNs"), and which operand of its sums is the first, DPPS does not say.
pub fn is_either_nan(instruction: &Instruction, expected: &Outcome) -> bool {
    let register = instruction.op0_register();
    matches!(instruction.mnemonic(), M::Dpps | M::Vdpps)
        && register.is_vector_register()
        && expected.state.ymm[register.number()]
            .iter()
            .any(|half| (0..4).any(|lane| f32::from_bits((half >> (32 * lane)) as u32).is_nan()))
}

/// Whether something about `mnemonic` is open beyond the flags that the decoder knows of.
pub(crate) fn has_notes(mnemonic: M) -> bool {
    const OTHERS: [M; 7] = [M::Arpl, M::Enter, M::Fxrstor, M::Fxrstor64, M::Maskmovdqu, M::Vmaskmovdqu, M::Maskmovq];
    NOTES.iter().any(|note| note.mnemonics.contains(&mnemonic)) || OTHERS.contains(&mnemonic)
}

/// The notes that `mnemonic` carries, for the head of its vectors.
pub fn notes(mnemonic: M) -> impl Iterator<Item = &'static str> {
    NOTES.iter().filter(move |note| note.mnemonics.contains(&mnemonic)).map(|note| note.note)
}

/// Encodings that no vendor promises anything about, or each something else: not generated.
pub(crate) fn is_unpredictable(case: &Case, instruction: &Instruction) -> bool {
    let bytes = &case.bytes;
    let branches = !matches!(instruction.flow_control(), Flow::Next | Flow::Interrupt | Flow::Exception);
    match instruction.mnemonic() {
        // AMD's CPUs branch to 16 bits, Intel's ignore the prefix in 64-bit mode (SDM Vol. 2 "JMP").
        _ if branches && case.mode == Mode::Bits64 && bytes.contains(&0x66) => true,
        // REP and REPNE overrule the condition in the opcode on AMD's CPUs; the manuals say nothing.
        M::Loope | M::Loopne => bytes.iter().any(|byte| matches!(byte, 0xf2 | 0xf3)),
        // F3 41 90 is XCHG R8, rAX to the CPU and PAUSE to the decoder.
        M::Pause => bytes.iter().any(|byte| matches!(byte, 0x41 | 0x43 | 0x45 | 0x47 | 0x49 | 0x4b | 0x4d | 0x4f)),
        // The vectors that Linux opens to user mode: breakpoints and system calls.
        M::Int => matches!(instruction.immediate8(), 3 | 4 | 0x80),
        // 0F 0D with a register: a reserved no-op on Intel's CPUs, #UD on AMD's (APM Vol. 3 "PREFETCH").
        M::Reservednop => matches!(
            instruction.code(),
            Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
        ),
        // AMD's CPUs read four bytes where Intel's read two.
        M::Movsxd => instruction.code() == Code::Movsxd_r16_rm16,
        // Far pointers with 64-bit offsets are Intel's alone.
        _ if instruction.memory_size() == MemorySize::SegPtr64 => true,
        // AMD's CPUs push with the width of the stack pointer in the mode that is entered, Intel's in the one that is left.
        M::Call if instruction.code().is_call_far_indirect() => {
            case.mode == Mode::Bits64 && case.state.gpr[4] >> 32 != 0
        }
        // Gathers check alignment in the SDM (exceptions type 12), not on AMD's CPUs.
        _ if case.state.rflags & flag::AC != 0 && instruction.is_vsib() => true,
        // VEX.W is ignored outside 64-bit mode (SDM Vol. 2 "PEXTRB/PEXTRD/PEXTRQ", "PINSRB/PINSRD/PINSRQ"); AMD's CPUs raise #UD.
        M::Vpextrd | M::Vpinsrd if case.mode != Mode::Bits64 => {
            bytes.iter().position(|byte| *byte == 0xc4).and_then(|at| bytes.get(at + 2)).is_some_and(|w| w & 0x80 != 0)
        }
        // Whether the final stack pointer is probed, and how wide, is up to the CPU.
        M::Enter => case.state.rflags & flag::AC != 0,
        _ => false,
    }
}

/// Whether two exceptions are equally good: the manuals rank them differently, or not at all.
pub(crate) fn is_same_end(vendor: Vendor, mode: Mode, instruction: &Instruction, expected: End, actual: End) -> bool {
    let intel = vendor == Vendor::Intel;
    let (End::Exception(expected), End::Exception(actual)) = (expected, actual) else { return false };
    // They are in one class of SDM Vol. 3 "Priority Among Concurrent Events".
    if matches!((expected.vector, actual.vector), (14, 17) | (17, 12..=14)) {
        return true;
    }
    // An access that wraps around at 4 GiB "may or may not cause the indicated exceptions" (SDM Vol. 3 "Limit Checking").
    if intel
        && mode == Mode::Bits32
        && expected.vector == 14
        && matches!(actual.vector, 12 | 13)
        && (expected.cr2 as u32).wrapping_add(WIDEST) < 2 * WIDEST
    {
        return true;
    }
    match instruction.mnemonic() {
        // The conversion's exceptions and the store's (SDM Vol. 3 "Priority Among Concurrent Events" has them in one class).
        M::Vcvtps2ph if expected.vector == 19 => matches!(actual.vector, 12..=14 | 17),
        // Intel's CPUs compare with the lower bound before they read the upper one.
        M::Bound => intel && expected.vector == 5 && matches!(actual.vector, 12..=14 | 17),
        // A bad target and a bad stack at once: Intel's CPUs look at the target first (SDM Vol. 2 "CALL"), AMD's last.
        // How much of the frame is looked at before what it holds, and in what order, is up to the CPU.
        // CMPS, both operands faulting: Zen 3 looks at ES:rDI first, Zen 5 at DS:rSI; SDM Vol. 2 "CMPS" only names the
        // order of the subtraction.
        M::Iret | M::Iretd | M::Iretq | M::Retf | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => {
            matches!(expected.vector, 12..=14 | 17) && matches!(actual.vector, 12..=14 | 17)
        }
        // Which end of a long operand, or which of two accesses, is looked at first.
        M::Arpl
        | M::Fldenv
        | M::Fnsave
        | M::Fnstenv
        | M::Frstor
        | M::Fxrstor
        | M::Fxrstor64
        | M::Fxsave
        | M::Fxsave64 => matches!(expected.vector, 12..=14 | 17) && matches!(actual.vector, 12..=14 | 17),
        M::Call => matches!(expected.vector, 12 | 14 | 17) && actual.vector == 13,
        // AMD's CPUs look at the address before they look at the mask (SDM Vol. 2 "VMASKMOV": nothing that it leaves out
        // faults).
        // Of an element across a page end, Intel's show the last byte in CR2.
        _ if is_masked(instruction) => {
            matches!(expected.vector, 12 | 13) && actual.vector == 14
                || (expected.vector, expected.error, expected.cr2 >> 12)
                    == (actual.vector, actual.error, actual.cr2 >> 12)
        }
        // Misaligned and outside the stack segment at once.
        _ if instruction.memory_size().size() >= 16 => {
            matches!((expected.vector, actual.vector), (12, 13) | (13, 12))
        }
        _ => false,
    }
}

/// Bytes of the longest operand.
const WIDEST: u32 = 64;

/// Whether a mask says which elements are accessed.
fn is_masked(instruction: &Instruction) -> bool {
    const MASKED: [M; 4] = [M::Vmaskmovps, M::Vmaskmovpd, M::Vpmaskmovd, M::Vpmaskmovq];
    instruction.has_op_mask() || MASKED.contains(&instruction.mnemonic())
}

/// Whether the operand's address has fewer bits than the segment's offsets.
fn has_short_address(instruction: &Instruction) -> bool {
    let offset = if instruction.code_size() == CodeSize::Code64 { 8 } else { 4 };
    let register = [instruction.memory_base(), instruction.memory_index()].into_iter().find(|r| r.size() > 0);
    register.map_or(instruction.memory_displ_size() as usize, |register| register.size()) < offset
}

/// Whether nothing can be said of an instruction that ends so on the host, and `actual` elsewhere.
pub(crate) fn is_open(vendor: Vendor, case: &Case, instruction: &Instruction, outcome: &Outcome, actual: End) -> bool {
    let intel = vendor == Vendor::Intel;
    let expected = outcome.end;
    let ends = |vectors: &[u8]| matches!(actual, End::Exception(e) if vectors.contains(&e.vector));
    let raised = |vectors: &[u8]| ends(vectors) && expected != actual;
    // #AC "may or may not be generated" (SDM Vol. 2 "MOVUPS"): AMD's CPUs check the alignment of vectors, Intel's do not.
    // The same of the 8 bytes of VCVTPH2PS and VCVTPS2PH, though their class of exceptions has #AC.
    let halves = matches!(instruction.mnemonic(), M::Vcvtph2ps | M::Vcvtps2ph);
    let large = instruction.memory_size().size() >= 16 || halves;
    if intel && large && raised(&[17]) {
        return true;
    }
    // Between two elements of a gather, a single-step trap may come (SDM Vol. 2 "VGATHERDPS").
    if instruction.is_vsib() && expected == End::Done && outcome.state.rip == instruction.ip() {
        return true;
    }
    // AMD's CPUs want the offset from FS or GS to be canonical as well; to the SDM the linear address is what counts (Vol. 1
    // "Canonical Addressing").
    if vendor == Vendor::Amd
        && matches!(expected, End::Exception(Exception { vector: 12 | 13, .. }))
        && expected != actual
        && matches!(instruction.memory_segment(), Register::FS | Register::GS)
        && offset(case, instruction, outcome).is_some_and(|offset| (offset as i64) << 16 >> 16 != offset as i64)
    {
        return true;
    }
    match instruction.mnemonic() {
        // Whether a segment register's stack slot is accessed as a whole (SDM Vol. 2 "PUSH").
        M::Push | M::Pop if instruction.op0_register().is_segment_register() => raised(&[12, 14, 17]),
        // An unmasked exception leaves the destination alone (SDM Vol. 1 "Floating-Point Exception Handling"); whether it is
        // looked at is up to the CPU: AMD's do, Intel's do not.
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp => {
            const ES: u16 = 1 << 7;
            let done = expected == End::Done || outcome.state.rip != instruction.ip();
            intel && done && outcome.state.x87.fsw & ES != 0 && ends(&[12, 13, 14, 17])
        }
        // The limit is that of the whole operand on CPUs of both vendors; SDM Vol. 2 "VMASKMOV" says nothing of it.
        // Where addresses are shorter than offsets, elements wrap around with them on AMD's CPUs, not on Intel's.
        _ if is_masked(instruction) => {
            matches!(expected, End::Exception(Exception { vector: 12 | 13, .. })) && expected != actual
                || vendor == Vendor::Amd
                    && has_short_address(instruction)
                    && matches!(actual, End::Exception(Exception { vector: 12..=14, .. }))
        }
        // Where a masked store faults, and on bytes that it does not store, is up to the CPU (SDM Vol. 2 "MASKMOVDQU").
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => expected != End::Done,
        sha if SHA.contains(&sha) => raised(&[13]),
        // Whether a destination that stays as it is must be writable.
        M::Arpl => expected == End::Done && actual != End::Done,
        // With a source in memory, Intel's CPUs raise a pending #MF and AMD's do not (SDM Vol. 2 "CVTPI2PS").
        M::Cvtpi2ps => raised(&[16]),
        // AMD's CPUs raise #UD without fetching what follows the opcode.
        M::Ud1 => {
            matches!((expected, actual), (End::Exception(e), End::Exception(a)) if e.vector == 6 && a.vector == 14)
        }
        // AMD's CPUs want the address before the bit offset is added to be canonical as well; SDM Vol. 2 "BT" only speaks of
        // the word that holds the bit.
        M::Bt | M::Btc | M::Btr | M::Bts => {
            instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register
                && matches!(expected, End::Exception(Exception { vector: 12 | 13, .. }))
                && expected != actual
        }
        _ => false,
    }
}

/// MXCSR flags: at #XM a dot product may have stopped behind its multiplications, or show its additions' flags too. Where
/// the store of a conversion faults, Intel's CPUs have set its flags.
pub(crate) fn open_mxcsr(vendor: Vendor, instruction: &Instruction, expected: &Outcome) -> u32 {
    const FLAGS: u32 = 0x3f;
    let End::Exception(exception) = expected.end else { return 0 };
    let open = match instruction.mnemonic() {
        M::Dpps | M::Dppd | M::Vdpps | M::Vdppd => exception.vector == 19,
        M::Vcvtps2ph => vendor == Vendor::Intel && matches!(exception.vector, 12..=14 | 17 | 19),
        _ => false,
    };
    if open { FLAGS } else { 0 }
}

/// Of one outcome: the YMM registers, and what AVX-512 has beyond them.
pub(crate) type Vectors = ([[u128; 2]; 16], Avx512);

/// Makes equal what is equally good after a gather that faulted. AMD's CPUs leave the mask's other elements and what lies
/// above them as they were, Intel's have made each element all ones or zeros, and zeros of what lies above (SDM Vol. 2
/// "VGATHERDPS", Operation).
pub(crate) fn settle_gather(vendor: Vendor, instruction: &Instruction, vectors: &mut Vectors) {
    let (ymm, avx512) = vectors;
    let (destination, mask) = (instruction.op0_register(), instruction.op2_register());
    if vendor != Vendor::Amd || !instruction.is_vsib() || !mask.is_vector_register() {
        return;
    }
    let bits = 8 * instruction.memory_size().element_size() as u32;
    let sign = (0..128 / bits).fold(0, |signs, at| signs | 1u128 << (at * bits + bits - 1));
    ymm[mask.number()].iter_mut().for_each(|half| *half &= sign);
    avx512.upper[mask.number()] = [0; 2];
    for register in [destination, mask].into_iter().filter(|register| register.is_xmm()) {
        ymm[register.number()][1] = 0;
    }
}

/// Whether string registers are compared as 32 bits: where nothing is left to do, or at a fault, Intel's CPUs have cleared the
/// upper halves of those that an address size of 32 bits names, AMD's have not.
pub(crate) fn has_narrow_string(vendor: Vendor, instruction: &Instruction) -> bool {
    let kinds = [instruction.op0_kind(), instruction.op1_kind()];
    vendor == Vendor::Intel
        && instruction.is_string_instruction()
        && kinds.iter().any(|kind| matches!(kind, OpKind::MemorySegESI | OpKind::MemoryESEDI))
}

/// MXCSR bits that AMD's CPUs have and Intel's reserve: MM.
pub(crate) const MXCSR_AMD: u32 = 1 << 17;

/// Adds to `mask` what `instruction` leaves open; `done`: it ran to its end.
pub(crate) fn widen(vendor: Vendor, mask: &mut Mask, case: &Case, instruction: &Instruction, done: bool) {
    let here = |note: &&Note| note.on.is_none_or(|on| on == vendor);
    for note in NOTES.iter().filter(here).filter(|note| note.mnemonics.contains(&instruction.mnemonic())) {
        if note.open.only_at_fault() == done {
            continue;
        }
        match note.open {
            Open::Flags(flags) => mask.rflags |= flags,
            Open::Environment => environment(mask, case, instruction),
            Open::ByValue => by_value(mask, case, instruction),
            Open::FlagsAtFault => mask.rflags |= flag::STATUS,
            Open::X87AtFault => mask.x87 = true,
            Open::X87FromMemory => mask.x87 |= instruction.op1_kind() == OpKind::Memory,
            Open::Registers => mask.gpr.extend(0..16),
            Open::DestinationAtFault => {
                if instruction.op0_kind() == OpKind::Memory {
                    open_destination(mask, case, instruction, instruction.memory_size().size() as u64);
                }
            }
            Open::StackAtFault => {
                let stack = stack_pointer(case);
                mask.memory.push((stack.wrapping_sub(8), stack));
            }
        }
    }
}

/// Linear address of the stack's top.
fn stack_pointer(case: &Case) -> u64 {
    let rsp = case.state.gpr[4];
    match case.mode {
        Mode::Bits64 => rsp,
        Mode::Bits32 => u64::from(rsp as u32),
        Mode::Bits16 => case.mode.data_base() + u64::from(rsp as u16),
    }
}

fn by_value(mask: &mut Mask, case: &Case, instruction: &Instruction) {
    match instruction.mnemonic() {
        M::Rcl | M::Rcr => {
            let count = if instruction.op1_kind() == OpKind::Register {
                case.state.gpr[1] as u8
            } else {
                instruction.immediate8()
            };
            mask.rflags |= if matches!(count & 31, 0 | 1) { 0 } else { flag::OF };
        }
        M::Push => {
            if instruction.op0_register().is_segment_register() {
                let bytes = instruction.stack_pointer_increment().unsigned_abs();
                let bottom = stack_pointer(case).wrapping_sub(u64::from(bytes));
                mask.memory.push((bottom.wrapping_add(2), bottom.wrapping_add(bytes.into())));
            }
        }
        _ => double_shift(mask, case, instruction),
    }
}

fn double_shift(mask: &mut Mask, case: &Case, instruction: &Instruction) {
    let count = match instruction.op2_kind() {
        OpKind::Register => case.state.gpr[1],
        _ => u64::from(instruction.immediate8()),
    };
    let wide = instruction.op1_register().size() == 8;
    let count = count & if wide { 63 } else { 31 };
    if count > 8 * instruction.op1_register().size() as u64 {
        mask.rflags |= flag::STATUS;
        open_destination(mask, case, instruction, instruction.op1_register().size() as u64);
    }
}

/// Leaves operand 0 open.
fn open_destination(mask: &mut Mask, case: &Case, instruction: &Instruction, size: u64) {
    match instruction.op0_kind() {
        OpKind::Register => mask.gpr.push(instruction.op0_register().full_register().number()),
        _ => {
            if let Some(address) = address(case, instruction) {
                mask.memory.push((address, address + size));
            }
        }
    }
}

/// Offset from FS or GS of the memory operand of `instruction`, with the registers that it found when it faulted as `outcome`.
fn offset(case: &Case, instruction: &Instruction, outcome: &Outcome) -> Option<u64> {
    let base = match instruction.memory_segment() {
        Register::FS => outcome.state.fs_base,
        _ => outcome.state.gs_base,
    };
    let found = Case { state: outcome.state.clone(), ..case.clone() };
    let with_segment =
        |kind| matches!(kind, OpKind::Memory | OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI);
    let operand = (0..instruction.op_count()).find(|operand| with_segment(instruction.op_kind(*operand)))?;
    Some(crate::generate::operand_address(&found, instruction, operand)?.wrapping_sub(base))
}

/// Linear address of operand 0.
fn address(case: &Case, instruction: &Instruction) -> Option<u64> {
    crate::generate::operand_address(case, instruction, 0)
}

fn environment(mask: &mut Mask, case: &Case, instruction: &Instruction) {
    let Some(start) = address(case, instruction) else { return };
    let bytes = match instruction.mnemonic() {
        // With MXCSR_MASK, where AMD's CPUs have bit 17.
        M::Fxsave | M::Fxsave64 => {
            mask.memory.push((start + 28, start + 32));
            6..24
        }
        _ if instruction.memory_size().size() == 14 || instruction.memory_size().size() == 94 => 6..14,
        _ => 12..28,
    };
    mask.memory.push((start + bytes.start, start + bytes.end));
}
