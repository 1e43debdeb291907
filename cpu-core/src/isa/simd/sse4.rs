//! SSE4's instructions with results outside of XMM registers: PTEST, CRC32, string comparisons; AES and carry-less
//! multiplication. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use std::arch::is_x86_feature_detected;

use iced_x86::{Code as C, EncodingKind, Mnemonic as M};

use super::float::{Mem, Operand, Reg};
use super::shuffle::ByImm;
use super::{M128, M128Unaligned, keeps, lacking, xmm};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::flags::{CF, Flags, OF, SF, ZF};
use crate::host_simd::{V, from_u128, to_u128};
use crate::isa::{Row, codes, plain_handler, row};
use crate::op::{Exact, Op};
use crate::state::Gpr;

/// CRC32 of one operand width.
macro_rules! crc32 {
    ($W:ty, $text:literal, $class:ident) => {{
        fn update(crc: u64, data: $W) -> u64 {
            let mut crc = crc;
            // SAFETY: registers only; the selector has looked whether the host has it.
            unsafe {
                std::arch::asm!($text, crc = inout(reg) crc, data = in($class) data,
                    options(pure, nomem, nostack, preserves_flags));
            }
            crc
        }
        fn reg(cpu: &mut Cpu, op: &Op) -> Done {
            let data = cpu.get::<$W>(op.src);
            let crc = update(cpu.get::<u64>(op.dst), data);
            cpu.put(op.dst, crc as u32);
            Ok(Then::Next)
        }
        fn mem(cpu: &mut Cpu, op: &Op) -> Done {
            let data = cpu.read_operand::<$W>(op)?;
            let crc = update(cpu.get::<u64>(op.dst), data);
            cpu.put(op.dst, crc as u32);
            Ok(Then::Next)
        }
        |d: &Digest<'_>| match (is_x86_feature_detected!("sse4.2"), d.is_mem(1)) {
            (false, _) => lacking(d),
            (true, true) => keeps(d, plain_handler(mem)),
            (true, false) => keeps(d, plain_handler(reg)),
        }
    }};
}

/// What a string comparison leaves: ECX, XMM0, and the flags as LAHF and SETO give them.
type Compared = (u32, V, u32);
/// The instruction of each immediate, by its low seven bits.
type Table = [[fn(V, V, u32, u32) -> Compared; 16]; 8];

/// PCMPxSTRx, with one host instruction for each immediate: the text, whether ECX or XMM0 takes the result, whether EAX and
/// EDX hold lengths, whether they do in 64 bits.
macro_rules! compare_strings {
    ($name:literal, $index:literal, $explicit:literal, $wide:literal) => {{
        fn one<const IMM: u8>(a: V, b: V, eax: u32, edx: u32) -> Compared {
            let (ecx, xmm0, ax): (u32, V, u32);
            // SAFETY: registers only; the selector has looked whether the host has it.
            unsafe {
                std::arch::asm!(concat!($name, " {a}, {b}, {imm}"), "lahf", "seto al", a = in(xmm_reg) a,
                    b = in(xmm_reg) b, imm = const IMM, inout("eax") eax => ax, in("edx") edx,
                    out("ecx") ecx, out("xmm0") xmm0, options(pure, nomem, nostack));
            }
            (ecx, xmm0, ax)
        }
        macro_rules! sixteen {
            ($h:literal) => {
                [one::<{ $h }>, one::<{ $h + 1 }>, one::<{ $h + 2 }>, one::<{ $h + 3 }>, one::<{ $h + 4 }>,
                 one::<{ $h + 5 }>, one::<{ $h + 6 }>, one::<{ $h + 7 }>, one::<{ $h + 8 }>, one::<{ $h + 9 }>,
                 one::<{ $h + 10 }>, one::<{ $h + 11 }>, one::<{ $h + 12 }>, one::<{ $h + 13 }>,
                 one::<{ $h + 14 }>, one::<{ $h + 15 }>]
            };
        }
        static TABLE: Table = [sixteen!(0), sixteen!(16), sixteen!(32), sixteen!(48), sixteen!(64), sixteen!(80),
            sixteen!(96), sixteen!(112)];
        fn run<O: Operand<V>, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Done {
            compare_strings::<O, $index, $explicit, $wide, VEX>(cpu, op, &TABLE)
        }
        |d: &Digest<'_>| {
            if !is_x86_feature_detected!("sse4.2") {
                return lacking(d);
            }
            let handler = match (d.ins.code().op_code().encoding() == EncodingKind::VEX, d.is_mem(1)) {
                (false, false) => plain_handler(run::<Reg, false>),
                (false, true) => plain_handler(run::<Mem<M128Unaligned, Exact>, false>),
                (true, false) => plain_handler(run::<Reg, true>),
                (true, true) => plain_handler(run::<Mem<M128Unaligned, Exact>, true>),
            };
            let lowered = keeps(d, handler)?;
            Some(Lowered { flags: FlagsOut::Unknown, ..lowered })
        }
    }};
}

/// The product without carries of the quadwords that bits 0 and 4 of the immediate choose.
pub(super) struct Pclmulqdq;
impl ByImm for Pclmulqdq {
    fn eval(dst: u128, src: u128, imm: u8) -> u128 {
        let quad = |value: u128, high: u8| from_u128(if high != 0 { value >> 64 } else { value });
        let (mut a, b) = (quad(dst, imm & 1), quad(src, imm & 0x10));
        // SAFETY: registers only; the selector has looked whether the host has it.
        unsafe {
            std::arch::asm!("pclmulqdq {0}, {1}, 0", inout(xmm_reg) a, in(xmm_reg) b,
                options(pure, nomem, nostack, preserves_flags));
        }
        to_u128(a)
    }
}

fn pclmulqdq(d: &Digest<'_>) -> Option<Lowered> {
    fn run<O: Operand<V>>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let b = O::exact(cpu, op)?;
        let out = Pclmulqdq::eval(cpu.xmm(op.dst), to_u128(b), op.imm as u8);
        cpu.set_xmm(op.dst, out);
        Ok(Then::Next)
    }
    if !is_x86_feature_detected!("pclmulqdq") {
        return lacking(d);
    }
    let mem = plain_handler(run::<Mem<M128, Exact>>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(run::<Reg>) })
}

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Ptest, ptest),
    codes(&[C::Crc32_r32_rm8, C::Crc32_r64_rm8], crc32!(u8, "crc32 {crc:e}, {data}", reg_byte)),
    codes(&[C::Crc32_r32_rm16], crc32!(u16, "crc32 {crc:e}, {data:x}", reg)),
    codes(&[C::Crc32_r32_rm32], crc32!(u32, "crc32 {crc:e}, {data:e}", reg)),
    codes(&[C::Crc32_r64_rm64], crc32!(u64, "crc32 {crc}, {data}", reg)),
    codes(
        &[C::Pcmpestri_xmm_xmmm128_imm8, C::VEX_Vpcmpestri_xmm_xmmm128_imm8],
        compare_strings!("pcmpestri", true, true, false),
    ),
    codes(
        &[C::Pcmpestri64_xmm_xmmm128_imm8, C::VEX_Vpcmpestri64_xmm_xmmm128_imm8],
        compare_strings!("pcmpestri", true, true, true),
    ),
    codes(
        &[C::Pcmpestrm_xmm_xmmm128_imm8, C::VEX_Vpcmpestrm_xmm_xmmm128_imm8],
        compare_strings!("pcmpestrm", false, true, false),
    ),
    codes(
        &[C::Pcmpestrm64_xmm_xmmm128_imm8, C::VEX_Vpcmpestrm64_xmm_xmmm128_imm8],
        compare_strings!("pcmpestrm", false, true, true),
    ),
    codes(
        &[C::Pcmpistri_xmm_xmmm128_imm8, C::VEX_Vpcmpistri_xmm_xmmm128_imm8],
        compare_strings!("pcmpistri", true, false, false),
    ),
    codes(
        &[C::Pcmpistrm_xmm_xmmm128_imm8, C::VEX_Vpcmpistrm_xmm_xmmm128_imm8],
        compare_strings!("pcmpistrm", false, false, false),
    ),
    row(M::Pclmulqdq, pclmulqdq),
    row(M::Aesenc, xmm!("aesenc", "aes")),
    row(M::Aesenclast, xmm!("aesenclast", "aes")),
    row(M::Aesdec, xmm!("aesdec", "aes")),
    row(M::Aesdeclast, xmm!("aesdeclast", "aes")),
    row(M::Aesimc, xmm!("aesimc", "aes")),
    row(M::Aeskeygenassist, aeskeygenassist),
];

/// ZF: no bit of the source is set in the destination; CF: none outside of it.
fn ptest(d: &Digest<'_>) -> Option<Lowered> {
    fn run<O: Operand<V>>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let src = to_u128(O::exact(cpu, op)?);
        let dst = cpu.xmm(op.dst);
        cpu.set_flags(Flags::explicit(u64::from(src & dst == 0) * ZF | u64::from(src & !dst == 0) * CF));
        Ok(Then::Next)
    }
    let mem = plain_handler(run::<Mem<M128, Exact>>);
    let lowered = keeps(d, if d.is_mem(1) { mem } else { plain_handler(run::<Reg>) })?;
    Some(Lowered { flags: FlagsOut::Unknown, ..lowered })
}

/// A length as the instruction takes it: its absolute value, at most 16, which doublewords hold too.
fn length(value: i64) -> u32 {
    value.unsigned_abs().min(16) as u32
}

fn compare_strings<O: Operand<V>, const INDEX: bool, const EXPLICIT: bool, const WIDE: bool, const VEX: bool>(
    cpu: &mut Cpu,
    op: &Op,
    table: &Table,
) -> Done {
    if VEX { cpu.require_avx() } else { cpu.require_sse() }?;
    let b = O::exact(cpu, op)?;
    let a = from_u128(cpu.xmm(op.dst));
    let lengths = [Gpr::Rax, Gpr::Rdx].map(|register| match (EXPLICIT, WIDE) {
        (false, _) => 0,
        (true, true) => length(cpu.reg(register) as i64),
        (true, false) => length((cpu.reg(register) as i32).into()),
    });
    let imm = op.imm as u8;
    let (index, mask, ax) = table[usize::from(imm >> 4 & 7)][usize::from(imm & 15)](a, b, lengths[0], lengths[1]);
    if INDEX {
        cpu.put_gpr(Gpr::Rcx, index);
    } else {
        if VEX {
            cpu.fpu.vector[0] = crate::state::VectorRegister::default();
        }
        cpu.set_xmm(0, to_u128(mask));
    }
    let flags = u64::from(ax >> 8) & (CF | ZF | SF) | u64::from(ax & 1) * OF;
    cpu.set_flags(Flags::explicit(flags));
    Ok(Then::Next)
}

/// The host's with round constant 0; the constant is only XORed into lanes 1 and 3. SDM Vol. 2 "AESKEYGENASSIST".
pub(super) struct Aeskeygenassist;
impl ByImm for Aeskeygenassist {
    fn eval(_: u128, src: u128, imm: u8) -> u128 {
        let out: V;
        // SAFETY: registers only; the selector has looked whether the host has it.
        unsafe {
            std::arch::asm!("aeskeygenassist {0}, {1}, 0", out(xmm_reg) out, in(xmm_reg) from_u128(src),
                options(pure, nomem, nostack, preserves_flags));
        }
        let constant = u128::from(imm);
        to_u128(out) ^ constant << 32 ^ constant << 96
    }
}

fn aeskeygenassist(d: &Digest<'_>) -> Option<Lowered> {
    fn run<O: Operand<V>>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let b = O::exact(cpu, op)?;
        cpu.set_xmm(op.dst, Aeskeygenassist::eval(0, to_u128(b), op.imm as u8));
        Ok(Then::Next)
    }
    if !is_x86_feature_detected!("aes") {
        return lacking(d);
    }
    let mem = plain_handler(run::<Mem<M128, Exact>>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(run::<Reg>) })
}
