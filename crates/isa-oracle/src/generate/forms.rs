//! Encodings to generate, from iced-x86's own tables.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, MandatoryPrefix, Mnemonic, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind,
};

use super::rng::Rng;
use crate::state::Mode;

/// What the generator may emit: extensions that the interpreter is to have.
pub(crate) const FEATURES: &[CpuidFeature] = {
    use CpuidFeature as F;
    &[
        F::INTEL8086,
        F::INTEL8086_ONLY,
        F::INTEL186,
        F::INTEL286,
        F::INTEL386,
        F::INTEL486,
        F::X64,
        F::CMOV,
        F::CX8,
        F::CMPXCHG16B,
        F::FPU,
        F::FPU287,
        F::FPU387,
        F::FXSR,
        F::MMX,
        F::MULTIBYTENOP,
        F::PAUSE,
        F::POPCNT,
        F::SSE,
        F::SSE2,
        F::SSE3,
        F::SSSE3,
        F::SSE4_1,
        F::SSE4_2,
        F::CLFSH,
        F::ADX,
        F::AES,
        F::AVX,
        F::AVX2,
        F::BMI1,
        F::BMI2,
        F::CET_IBT,
        F::CLDEMOTE,
        F::CLFLUSHOPT,
        F::CLWB,
        F::F16C,
        F::FMA,
        F::FSGSBASE,
        F::GFNI,
        F::LZCNT,
        F::MOVBE,
        F::MOVDIR64B,
        F::MOVDIRI,
        F::PCLMULQDQ,
        F::PREFETCHITI,
        F::PREFETCHW,
        F::PREFETCHWT1,
        F::RDPID,
        F::RDRAND,
        F::RDSEED,
        F::RDTSCP,
        F::SERIALIZE,
        F::SHA,
        F::VAES,
        F::VPCLMULQDQ,
        F::AVX512F,
        F::AVX512VL,
        F::AVX512BW,
        F::AVX512DQ,
        F::AVX512CD,
        F::AVX512_IFMA,
        F::AVX512_VBMI,
        F::AVX512_VBMI2,
        F::AVX512_VNNI,
        F::AVX512_BITALG,
        F::AVX512_VPOPCNTDQ,
        F::AVX512_BF16,
        F::AVX512_FP16,
        F::AVX_VNNI,
    ]
};

/// Left out, and why: what they do is not decided by the state of a case.
pub(crate) const EXCLUDED: &[(Mnemonic, &str)] = {
    use Mnemonic as M;
    &[
        (M::Syscall, "enters the kernel"),
        (M::Sysenter, "enters the kernel"),
        (M::Sysret, "privileged, but #UD first where SCE is off"),
        (M::Sysexit, "privileged"),
        (M::Int1, "its trap is the harness's own"),
        (M::Cpuid, "answers what softkvm offers, not what the host is"),
        (M::Rdtsc, "time"),
        (M::Rdtscp, "time"),
        (M::Rdpid, "the number of the CPU that the kernel chose"),
        (M::Rdrand, "random"),
        (M::Rdseed, "random"),
        (M::Rdpmc, "the kernel's CR4.PCE decides"),
        (M::Sgdt, "the kernel emulates it under UMIP"),
        (M::Sidt, "the kernel emulates it under UMIP"),
        (M::Sldt, "the kernel emulates it under UMIP"),
        (M::Smsw, "the kernel emulates it under UMIP"),
        (M::Str, "the kernel emulates it under UMIP"),
        (M::Loadall, "not on any CPU of this kind"),
        (M::Ud0, "length differs by vendor"),
        (M::Hlt, "privileged"),
        (M::Mwait, "privileged"),
        (M::Monitor, "privileged"),
        (M::Montmul, "not Intel's or AMD's"),
    ]
};

/// Whether the generator leaves `mnemonic` out.
pub(crate) fn is_excluded(mnemonic: Mnemonic) -> bool {
    EXCLUDED.iter().any(|(excluded, _)| *excluded == mnemonic)
}

/// Whether `code` is an instruction that tests may run in `mode`.
pub(crate) fn is_tested(code: Code, mode: Mode) -> bool {
    let info = code.op_code();
    let in_mode = match mode {
        Mode::Bits64 => info.mode64() && info.long_mode(),
        Mode::Bits32 => info.mode32() && info.compatibility_mode(),
        Mode::Bits16 => info.mode16() && info.compatibility_mode(),
    };
    let by_features = code.cpuid_features().iter().all(|feature| FEATURES.contains(feature));
    let decoded = match mode {
        Mode::Bits64 => info.intel_decoder64(),
        Mode::Bits32 => info.intel_decoder32(),
        Mode::Bits16 => info.intel_decoder16(),
    };
    info.is_instruction()
        && in_mode
        && by_features
        && decoded
        && !info.is_privileged()
        // WAIT and another instruction to the CPU and to the decoder.
        && !info.fwait()
        && !is_excluded(code.mnemonic())
}

/// Features whose instructions are reserved no-ops to a CPU without them, and hints or markers to one with.
const NO_OPS: &[CpuidFeature] =
    &[CpuidFeature::CET_IBT, CpuidFeature::CLDEMOTE, CpuidFeature::PREFETCHITI, CpuidFeature::PREFETCHWT1];

/// Whether the CPU that this runs on has every feature of `code` that CPUID tells of, or does nothing without it.
pub(crate) fn host_has(code: Code) -> bool {
    let bit = |wanted: &CpuidFeature| cpu_core::FEATURES.iter().find(|(feature, _)| feature == wanted);
    code.cpuid_features().iter().filter_map(bit).all(|(feature, bit)| {
        if NO_OPS.contains(feature) {
            return true;
        }
        let answer = std::arch::x86_64::__cpuid_count(bit.leaf, bit.subleaf);
        bit.is_in([answer.eax, answer.ebx, answer.ecx, answer.edx])
    })
}

/// Whether the core executes `code` here: AVX-512's and AVX-VNNI's instructions only where the host has them.
pub fn is_executed_here(code: Code) -> bool {
    let is_hosts = |feature: &CpuidFeature| {
        let name = format!("{feature:?}");
        name.starts_with("AVX512") || name == "AVX_VNNI"
    };
    !code.cpuid_features().iter().any(is_hosts) || host_has(code)
}

/// All encodings that tests may run in `mode` and `keep` wants.
pub(crate) fn all(mode: Mode, keep: impl Fn(Code) -> bool) -> Vec<Code> {
    Code::values().filter(|code| is_tested(*code, mode) && keep(*code)).collect()
}

/// Bytes that may well be `code`: its prefixes and opcode, then random ModRM, SIB, displacement and immediate bytes. The
/// decoder tells how many of them belong to it, and what it became where the random bytes chose something else.
pub(crate) fn bytes(rng: &mut Rng, code: Code, mode: Mode) -> Option<Vec<u8>> {
    let info = code.op_code();
    match info.encoding() {
        EncodingKind::Legacy => {}
        EncodingKind::VEX => return Some(vex_bytes(rng, info, mode)),
        EncodingKind::EVEX => return Some(evex_bytes(rng, info, mode)),
        _ => return None,
    }
    let mut out = Vec::with_capacity(15);
    if info.address_size() != 0 && info.address_size() != mode.bitness() || rng.one_in(24) {
        out.push(0x67);
    }
    let wants_66 = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => true,
        _ if mode == Mode::Bits16 => info.operand_size() == 32,
        _ => info.operand_size() == 16,
    };
    if wants_66 {
        out.push(0x66);
    }
    match info.mandatory_prefix() {
        MandatoryPrefix::PF3 => out.push(0xf3),
        MandatoryPrefix::PF2 => out.push(0xf2),
        _ => {}
    }
    if out.is_empty() || rng.one_in(2) {
        if info.can_use_lock_prefix() && rng.one_in(4) {
            out.insert(0, 0xf0);
        }
        if info.can_use_rep_prefix() && rng.one_in(2) {
            out.insert(0, 0xf3);
        } else if info.can_use_repne_prefix() && rng.one_in(2) {
            out.insert(0, 0xf2);
        }
        if rng.one_in(12) {
            out.insert(0, rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x64, 0x65]));
        }
    }
    let wide = mode == Mode::Bits64 && (info.operand_size() == 64 && !info.default_op_size64() || info.w() == 1);
    if mode == Mode::Bits64 && (wide || rng.one_in(2)) {
        out.push(0x40 | rng.below(8) as u8 | if wide { 8 } else { 0 });
    }
    match info.table() {
        OpCodeTableKind::T0F => out.push(0x0f),
        OpCodeTableKind::T0F38 => out.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => out.extend([0x0f, 0x3a]),
        _ => {}
    }
    put_opcode(rng, info, &mut out);
    Some(out)
}

/// The same for VEX encodings: of two bytes where that is possible and chance wants it, else of three.
fn vex_bytes(rng: &mut Rng, info: &OpCodeInfo, mode: Mode) -> Vec<u8> {
    use OpCodeOperandKind as K;
    let mut out = Vec::with_capacity(15);
    if rng.one_in(24) {
        out.push(0x67);
    }
    if rng.one_in(12) {
        out.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    // R, X, B and vvvv are inverted. Outside 64-bit mode R and X are 1, or the opcode is LES or LDS.
    let [r, x, b] = [(); 3].map(|()| mode == Mode::Bits64 && rng.one_in(2));
    let in_vvvv = |kind: &K| {
        matches!(kind, K::k_vvvv | K::r32_vvvv | K::r64_vvvv | K::tmm_vvvv | K::xmm_vvvv | K::ymm_vvvv | K::zmm_vvvv)
    };
    let vvvv = match info.op_kinds().iter().any(in_vvvv) {
        true => rng.below(if mode == Mode::Bits64 { 16 } else { 8 }) as u8,
        false => 0,
    };
    let w = if info.is_wig() || info.is_wig32() && mode != Mode::Bits64 { rng.one_in(4) } else { info.w() == 1 };
    let l = if info.is_lig() { rng.one_in(4) } else { info.l() == 1 };
    let (map, pp) = (
        match info.table() {
            OpCodeTableKind::T0F38 => 2,
            OpCodeTableKind::T0F3A => 3,
            _ => 1,
        },
        match info.mandatory_prefix() {
            MandatoryPrefix::P66 => 1,
            MandatoryPrefix::PF3 => 2,
            MandatoryPrefix::PF2 => 3,
            _ => 0,
        },
    );
    let low = (!vvvv & 15) << 3 | u8::from(l) << 2 | pp;
    if map == 1 && !x && !b && !w && rng.one_in(2) {
        out.extend([0xc5, u8::from(!r) << 7 | low]);
    } else {
        let high = u8::from(!r) << 7 | u8::from(!x) << 6 | u8::from(!b) << 5 | map;
        out.extend([0xc4, high, u8::from(w) << 7 | low]);
    }
    put_opcode(rng, info, &mut out);
    out
}

/// The same for EVEX encodings. Broadcast, rounding, mask and zeroing where the encoding has them.
fn evex_bytes(rng: &mut Rng, info: &OpCodeInfo, mode: Mode) -> Vec<u8> {
    use OpCodeOperandKind as K;
    let mut out = Vec::with_capacity(15);
    if rng.one_in(24) {
        out.push(0x67);
    }
    if rng.one_in(12) {
        out.push(rng.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    let long = mode == Mode::Bits64;
    // All of these are inverted. Outside 64-bit mode R and X are 1, or the opcode is BOUND.
    let [r, x, b, high_r] = [(); 4].map(|()| long && rng.one_in(2));
    let is_vsib = |kind: &K| {
        matches!(
            kind,
            K::mem_vsib32x | K::mem_vsib32y | K::mem_vsib32z | K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z
        )
    };
    let in_vvvv =
        |kind: &K| matches!(kind, K::k_vvvv | K::xmm_vvvv | K::ymm_vvvv | K::zmm_vvvv | K::xmmp3_vvvv | K::zmmp3_vvvv);
    let vvvv = match info.op_kinds().iter().any(in_vvvv) {
        true => rng.below(if long { 32 } else { 8 }) as u8,
        // The index of a gather has its fifth bit here.
        false if long && info.op_kinds().iter().any(is_vsib) => (rng.below(2) as u8) << 4,
        false => 0,
    };
    let w = if info.is_wig() || info.is_wig32() && !long { rng.one_in(4) } else { info.w() == 1 };
    let length = if info.is_lig() { rng.below(3) as u8 } else { info.l() as u8 };
    let (broadcast, rounding) = (info.can_broadcast(), info.can_use_rounding_control());
    let set_b = (broadcast || rounding || info.can_suppress_all_exceptions()) && rng.one_in(2);
    let length = if set_b && rounding && (!broadcast || rng.one_in(2)) { rng.below(4) as u8 } else { length };
    let mask = match info.can_use_op_mask_register() {
        true if info.require_op_mask_register() => 1 + rng.below(7) as u8,
        true if !rng.one_in(3) => rng.below(8) as u8,
        _ => 0,
    };
    let zeroing = mask != 0 && info.can_use_zeroing_masking() && rng.one_in(3);
    let map = match info.table() {
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        _ => 1,
    };
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    out.extend([
        0x62,
        u8::from(!r) << 7 | u8::from(!x) << 6 | u8::from(!b) << 5 | u8::from(!high_r) << 4 | map,
        u8::from(w) << 7 | (!vvvv & 15) << 3 | 4 | pp,
        u8::from(zeroing) << 7 | length << 5 | u8::from(set_b) << 4 | u8::from(vvvv & 16 == 0) << 3 | mask,
    ]);
    put_opcode(rng, info, &mut out);
    out
}

fn put_opcode(rng: &mut Rng, info: &OpCodeInfo, out: &mut Vec<u8>) {
    use OpCodeOperandKind as K;
    let in_opcode = info
        .op_kinds()
        .iter()
        .any(|kind| matches!(kind, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode));
    let mut opcode = info.op_code();
    if in_opcode {
        opcode += rng.below(8) as u32;
    }
    if info.op_code_len() == 2 {
        out.push((opcode >> 8) as u8);
    }
    out.push(opcode as u8);
    let mut modrm = rng.bits() as u8;
    if rng.one_in(4) {
        modrm |= 0xc0;
    }
    if info.is_group() {
        modrm = modrm & 0xc7 | (info.group_index() as u8) << 3;
    }
    if info.is_rm_group() {
        modrm = modrm & 0xf8 | info.rm_group_index() as u8 | 0xc0;
    }
    out.push(modrm);
    let mut rest = [0; 12];
    rng.fill(&mut rest);
    for byte in &mut rest {
        if rng.one_in(4) {
            *byte = rng.pick(&[0, 1, 0x7f, 0x80, 0xff, 0x1f, 0x20, 0x3f]);
        }
    }
    out.extend(rest);
}
