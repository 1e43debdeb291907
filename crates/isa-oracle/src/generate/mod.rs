//! Random cases: an encoding of iced-x86's tables, and a state in which it does something worth comparing.

mod address;
mod forms;
mod rng;
mod selectors;
mod sequence;
mod values;

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic, OpKind,
    Register,
};

pub use rng::Rng;

pub(crate) use address::operand_address;
pub use forms::is_executed_here;
pub(crate) use forms::{EXCLUDED, all, host_has, is_tested};
pub(crate) use sequence::open_flags;

use crate::layout::CODE_BYTES;
use crate::state::{Case, Mode, State, flag};
use crate::{decode, vendor};

/// How much of the state is made interesting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breadth {
    /// Only what the instruction uses: short vectors that a person can read. Faults are rare.
    Used,
    /// Everything: registers that it must leave alone, prefixes that it ignores, pages that it may not touch.
    Everything,
}

/// Makes cases.
pub struct Generator {
    rng: Rng,
    info: InstructionInfoFactory,
    breadth: Breadth,
}

impl Generator {
    /// Cases drawn from `seed`.
    pub fn new(seed: u64, breadth: Breadth) -> Self {
        Self { rng: Rng::new(seed), info: InstructionInfoFactory::new(), breadth }
    }

    /// The generator's source of randomness.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// A case of `code`, or of what its bytes became under random prefixes and ModRM. None where nothing testable came out.
    pub fn case(&mut self, code: Code, mode: Mode) -> Option<Case> {
        let mut bytes = forms::bytes(&mut self.rng, code, mode)?;
        let mut case = Case::in_mode(mode, &bytes);
        let everything = self.breadth == Breadth::Everything;
        if everything && self.rng.one_in(16) {
            let prefix = self.rng.pick(&[0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x64, 0x65, 0x48, 0x40]);
            bytes.insert(self.rng.below(3) as usize, prefix);
        }
        bytes.truncate(15);
        case.bytes = bytes;
        let instruction = decode(&case);
        if instruction.is_invalid() {
            return self.undecoded(case);
        }
        if !is_tested(instruction.code(), mode) || (!everything && instruction.code() != code) {
            return None;
        }
        case.bytes.truncate(instruction.len());
        if let (Mnemonic::Enter, [.., high, _]) = (instruction.mnemonic(), &mut case.bytes[..])
            && !self.rng.one_in(8)
        {
            *high = 0; // a frame that fits the data pages
        }
        if everything && self.rng.one_in(16) {
            // Across the two code pages, or up to the very end of the second and over it.
            let (start, length) = (mode.start(), instruction.len() as u64);
            // At the very end there is no room for an INT3, and the case is single-stepped.
            let end = start + CODE_BYTES as u64 - length;
            // Or with its last bytes where nothing is mapped.
            let cut = end + self.rng.below(length);
            case.state.rip = self.rng.pick(&[end, cut, start + 0xffd, start + 0x1000 - length]);
        }
        self.fill(&mut case);
        (!vendor::is_unpredictable(&case, &instruction)).then_some(case)
    }

    /// Bytes of which the decoder makes nothing: the CPU's answer should be #UD. Not where a prefix or extension that only
    /// the host has may be what they are.
    fn undecoded(&mut self, mut case: Case) -> Option<Case> {
        if self.breadth == Breadth::Used || case.bytes.iter().any(|byte| matches!(byte, 0xc4 | 0xc5 | 0x62 | 0x8f)) {
            return None;
        }
        // Only LOCK where it may not be: everything else depends on which opcodes a vendor knows.
        let unlocked: Vec<u8> = case.bytes.iter().copied().filter(|byte| *byte != 0xf0).collect();
        let plain = decode(&Case { bytes: unlocked.clone(), ..case.clone() });
        let group_6 = matches!(plain.mnemonic(), Mnemonic::Verr | Mnemonic::Verw); // AMD's CPUs take LOCK there
        if unlocked.len() == case.bytes.len() || plain.is_invalid() || group_6 || !is_tested(plain.code(), case.mode) {
            return None;
        }
        case.bytes.truncate(plain.len() + case.bytes.len() - unlocked.len());
        self.fill(&mut case);
        Some(case)
    }

    /// Gives `case` a state that suits its instruction.
    fn fill(&mut self, case: &mut Case) {
        let instruction = decode(case);
        let info = self.info.info_options(&instruction, InstructionInfoOptions::NONE);
        let used: Vec<Register> = info.used_registers().iter().map(|used| used.register()).collect();
        let memory = info.used_memory().to_vec();
        let everything = self.breadth == Breadth::Everything;
        let rng = &mut self.rng;
        let wanted = |register: Register| everything || used.iter().any(|used| overlaps(*used, register));
        let general = [
            Register::RAX,
            Register::RCX,
            Register::RDX,
            Register::RBX,
            Register::RSP,
            Register::RBP,
            Register::RSI,
            Register::RDI,
            Register::R8,
            Register::R9,
            Register::R10,
            Register::R11,
            Register::R12,
            Register::R13,
            Register::R14,
            Register::R15,
        ];
        let limit = if case.mode == Mode::Bits64 { u64::MAX } else { u64::from(u32::MAX) };
        let state = &mut case.state;
        for (at, register) in general.into_iter().enumerate() {
            let is_stack = register == Register::RSP;
            if wanted(register) && !is_stack && (case.mode == Mode::Bits64 || at < 8) {
                state.gpr[at] = values::integer(rng) & limit;
            }
        }
        if wanted(Register::RSP) && rng.one_in(3) {
            state.gpr[4] += rng.below(64);
        }
        let reads_flags = instruction.rflags_read() != 0;
        if everything || reads_flags || instruction.rflags_modified() != 0 {
            state.rflags |= rng.bits() & flag::STATUS;
            let sticky = everything && rng.one_in(8) || instruction.rflags_read() & iced_x86::RflagsBits::DF != 0;
            if sticky && rng.one_in(2) {
                state.rflags |= flag::DF;
            }
            if everything && rng.one_in(64) {
                state.rflags |= rng.pick(&[flag::AC, flag::NT, flag::ID]);
            }
        }
        let features = instruction.cpuid_features();
        let of_halves = has_halves(&instruction);
        let is_x87 = features.iter().any(|f| {
            matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
                || matches!(f, CpuidFeature::FXSR | CpuidFeature::CMOV) && instruction.cpuid_features().len() > 1
        }) || features.contains(&CpuidFeature::FXSR)
            || instruction.mnemonic() == Mnemonic::Fisttp;
        let is_mmx = used.iter().any(|r| r.is_mm()) || features.contains(&CpuidFeature::MMX);
        if is_x87 || is_mmx || everything && rng.one_in(8) {
            x87(rng, state, is_mmx && !everything);
            if !everything {
                keep_used_stack(state, &used);
            }
        }
        let is_vector = |r: &Register| r.is_xmm() || r.is_ymm() || r.is_zmm();
        let encoding = instruction.code().op_code().encoding();
        let is_evex = encoding == EncodingKind::EVEX;
        // VEX encodings change the registers that EVEX has beyond theirs, where the host has such.
        let beyond = everything && encoding == EncodingKind::VEX && rng.one_in(2);
        if cpu_core::host_has_avx512() && (is_evex || used.iter().any(|r| r.is_k()) || beyond) {
            avx512(rng, state, case.mode, of_halves, |r| everything || used.iter().any(|used| overlaps(*used, r)));
        }
        let is_sse = used.iter().any(is_vector) || features.contains(&CpuidFeature::SSE);
        if is_sse || everything && rng.one_in(4) {
            if is_sse && rng.one_in(2) {
                state.mxcsr = mxcsr(rng);
            }
            let count = if case.mode == Mode::Bits64 { 16 } else { 8 };
            for (at, ymm) in state.ymm.iter_mut().take(count).enumerate() {
                if everything || used.iter().any(|r| is_vector(r) && r.number() == at) {
                    let is_long = |r: &Register| (r.is_ymm() || r.is_zmm()) && r.number() == at;
                    let upper = everything || used.iter().any(is_long) || rng.one_in(4);
                    let low = values::vector(rng, of_halves);
                    *ymm = [low, if upper { values::vector(rng, of_halves) } else { 0 }];
                }
            }
        }
        if everything && case.mode == Mode::Bits64 {
            state.fs_base = address::segment_base(rng);
            state.gs_base = address::segment_base(rng);
        }
        if instruction.is_vsib() {
            if is_evex {
                evex_gather(rng, &instruction, state);
            } else {
                gather(rng, &instruction, state);
            }
        }
        shape(rng, &instruction, case.mode, state, everything);
        address::place(rng, case, &instruction, &memory, everything);
        selectors::place(rng, case, &instruction);
    }
}

/// Whether the instruction computes with halves.
fn has_halves(instruction: &Instruction) -> bool {
    instruction.cpuid_features().contains(&CpuidFeature::AVX512_FP16)
}

/// Whether writing one of the registers changes the other (EAX and RAX, XMM0 and YMM0).
fn overlaps(a: Register, b: Register) -> bool {
    a.full_register() == b.full_register()
}

/// MXCSR: any rounding, DAZ and FZ; mostly masked; some flags already set.
fn mxcsr(rng: &mut Rng) -> u32 {
    let mut value = (rng.bits() as u32) & 0xe040; // FZ, RC, DAZ
    if rng.one_in(2) {
        value &= 0x6000;
    }
    value |= if rng.one_in(4) { rng.bits() as u32 & 0x1f80 } else { 0x1f80 };
    if rng.one_in(4) {
        value |= rng.bits() as u32 & 0x3f;
    }
    value
}

/// x87 state: any rounding and precision, any TOP, mostly masked and mostly full. For MMX only the registers.
fn x87(rng: &mut Rng, state: &mut State, only_registers: bool) {
    let x87 = &mut state.x87;
    for st in &mut x87.st {
        *st = if rng.one_in(3) { values::vector(rng, false) & ((1 << 80) - 1) } else { values::f80_bits(rng) };
    }
    x87.ftw = match rng.below(6) {
        0 => 0,
        1 => rng.bits() as u8,
        _ => 0xff,
    };
    if only_registers {
        x87.ftw = 0xff;
        return;
    }
    if rng.one_in(2) {
        x87.fcw = 0x37f & !0x300 | (rng.pick(&[0, 2, 3, 3, 3]) << 8) | (rng.below(4) as u16) << 10;
    }
    if rng.one_in(6) {
        x87.fcw &= !(rng.bits() as u16 & 0x3f);
    }
    x87.fsw = (rng.below(8) as u16) << 11;
    if rng.one_in(3) {
        x87.fsw |= rng.bits() as u16 & 0x4700;
    }
    if rng.one_in(4) {
        x87.fsw |= rng.bits() as u16 & 0x7f;
        if rng.one_in(8) {
            x87.fsw &= !0x3f;
        }
    }
    // ES and B summarise the unmasked flags; hardware never shows anything else.
    let pending = x87.fsw & !x87.fcw & 0x3f != 0;
    x87.fsw = x87.fsw & !0x8080 | if pending { 0x8080 } else { 0 };
}

/// Zeroes the x87 registers that the instruction does not name, so that vectors stay short.
fn keep_used_stack(state: &mut State, used: &[Register]) {
    let number = |register: &Register| match register {
        r if r.is_st() || r.is_mm() => Some(r.number()),
        _ => None,
    };
    let named: Vec<usize> = used.iter().filter_map(number).collect();
    for (at, st) in state.x87.st.iter_mut().enumerate() {
        if at > 1 && !named.contains(&at) {
            *st = 0;
        }
    }
}

/// Indices near the base, and a mask of some elements. Now and then what chance put there stays.
fn gather(rng: &mut Rng, instruction: &Instruction, state: &mut State) {
    let narrow = instruction.is_vsib32();
    let index = instruction.memory_index().number();
    for half in &mut state.ymm[index] {
        let distance = |rng: &mut Rng| rng.below(32).wrapping_sub(16);
        let [low, high] = match narrow {
            true => [(); 2].map(|()| distance(rng) & 0xffff_ffff | distance(rng) << 32),
            false => [(); 2].map(|()| distance(rng)),
        };
        if !rng.one_in(12) {
            *half = u128::from(low) | u128::from(high) << 64;
        }
    }
    let mask = instruction.op2_register().number();
    for half in &mut state.ymm[mask] {
        if rng.one_in(2) {
            *half = u128::MAX;
        }
    }
}

/// Registers that EVEX reaches alone, and masks.
fn avx512(rng: &mut Rng, state: &mut State, mode: Mode, of_halves: bool, wanted: impl Fn(Register) -> bool) {
    let count = if mode == Mode::Bits64 { 16 } else { 8 };
    for at in 0..count {
        if wanted(Register::ZMM0 + at as u32) {
            state.avx512.upper[at] = [(); 2].map(|()| values::vector(rng, of_halves));
        }
    }
    for at in 0..16 {
        if mode == Mode::Bits64 && wanted(Register::ZMM16 + at as u32) {
            state.avx512.high[at] = std::array::from_fn(|_| values::vector(rng, of_halves));
        }
    }
    for at in 0..8 {
        if wanted(Register::K0 + at as u32) {
            state.avx512.k[at] = match rng.below(6) {
                0 => 0,
                1 => u64::MAX,
                2 => values::integer(rng),
                _ => rng.bits(),
            };
        }
    }
}

/// As [`gather`], for the index register of an EVEX encoding; its mask is random as it is.
fn evex_gather(rng: &mut Rng, instruction: &Instruction, state: &mut State) {
    let narrow = instruction.is_vsib32();
    let index = instruction.memory_index().number();
    for lane in 0..4 {
        if rng.one_in(12) {
            continue;
        }
        let distance = |rng: &mut Rng| rng.below(32).wrapping_sub(16);
        let [low, high] = match narrow {
            true => [(); 2].map(|()| distance(rng) & 0xffff_ffff | distance(rng) << 32),
            false => [(); 2].map(|()| distance(rng)),
        };
        let avx512 = &mut state.avx512;
        let place = match (index, lane) {
            (16.., _) => &mut avx512.high[index - 16][lane],
            (_, 0 | 1) => &mut state.ymm[index][lane],
            _ => &mut avx512.upper[index][lane - 2],
        };
        *place = u128::from(low) | u128::from(high) << 64;
    }
}

/// Values that only some instructions care for.
fn shape(rng: &mut Rng, instruction: &Instruction, mode: Mode, state: &mut State, everything: bool) {
    use Mnemonic as M;
    match instruction.mnemonic() {
        // Repetition counts that stay within the pages, most of the time.
        _ if instruction.is_string_instruction()
            && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) =>
        {
            let count = if everything && rng.one_in(16) { rng.below(5000) } else { rng.below(24) };
            let high = if rng.one_in(4) { rng.bits() << 32 } else { 0 };
            let by_rcx = instruction.op_kinds().any(|kind| matches!(kind, OpKind::MemoryESRDI | OpKind::MemorySegRSI));
            state.gpr[1] = if by_rcx && !(everything && rng.one_in(32)) { count } else { count | high };
        }
        // Quotients that fit, half of the time.
        M::Div | M::Idiv if rng.one_in(2) => {
            state.gpr[2] = if rng.one_in(2) { 0 } else { rng.below(3).wrapping_sub(1) };
        }
        M::Bt | M::Bts | M::Btr | M::Btc if rng.one_in(2) => {
            let bit = rng.below(4096).wrapping_sub(2048);
            let register = instruction.op1_register();
            if register != Register::None && register.is_gpr() && register.size() > 1 {
                state.gpr[register.full_register().number()] = bit;
            }
        }
        M::Loop | M::Loope | M::Loopne if rng.one_in(2) => state.gpr[1] = rng.below(3),
        M::Cmpxchg8b | M::Cmpxchg16b | M::Cmpxchg => {}
        _ => {}
    }
    if let (M::Jmp | M::Call, true) = (instruction.mnemonic(), instruction.op0_register() != Register::None) {
        let at = instruction.op0_register().full_register().number();
        if rng.one_in(2) {
            state.gpr[at] = mode.start() + rng.below(CODE_BYTES as u64);
        }
    }
}
