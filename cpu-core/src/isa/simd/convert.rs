//! Conversions between floats and integers, and between widths of floats. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::{Code as C, Mnemonic as M};

use super::float::{Compute, MemGeneral, Reg, careful, float, scalar};
use super::{M32, M64, keeps, xmm};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host::HostWord;
use crate::host_simd::{Float, V, float_from_general_impl, float_to_general_impl, float_xmm_impl, from_u128, to_u128};
use crate::isa::{Row, by_form, codes, plain_handler, row};
use crate::op::{Op, handler};

macro_rules! from_general {
    ($name:literal, $W:ty, $b:literal) => {{
        struct I;
        float_from_general_impl!(I, $W, $name, $b);
        from_general::<I>
    }};
}

macro_rules! to_general {
    ($name:literal, $S:ident, $W:ty, $o:literal) => {{
        struct I;
        float_to_general_impl!(I, $W, $name, $o);
        scalar::<I, $S>
    }};
}

/// The packed form whose low half does what the MMX form does.
macro_rules! via {
    ($selector:ident, $name:literal) => {{
        struct I;
        float_xmm_impl!([] I, never, $name, "");
        $selector::<I>
    }};
}

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Cvtps2pd, float!("cvtps2pd", M64, never)),
    row(M::Cvtpd2ps, float!("cvtpd2ps", M128, ps)),
    row(M::Cvtss2sd, float!("cvtss2sd", M32, never)),
    row(M::Cvtsd2ss, float!("cvtsd2ss", M64, ss)),
    row(M::Cvtdq2ps, float!("cvtdq2ps", M128, never)),
    row(M::Cvtps2dq, float!("cvtps2dq", M128, never)),
    row(M::Cvttps2dq, float!("cvttps2dq", M128, never)),
    row(M::Cvtpd2dq, float!("cvtpd2dq", M128, never)),
    row(M::Cvttpd2dq, float!("cvttpd2dq", M128, never)),
    // Every doubleword is a double: exact, so no exceptions.
    row(M::Cvtdq2pd, xmm!("cvtdq2pd", M64)),
    codes(&[C::Cvtsi2ss_xmm_rm32], from_general!("cvtsi2ss", u32, "{b:e}")),
    codes(&[C::Cvtsi2ss_xmm_rm64], from_general!("cvtsi2ss", u64, "{b:r}")),
    codes(&[C::Cvtsi2sd_xmm_rm32], from_general!("cvtsi2sd", u32, "{b:e}")),
    codes(&[C::Cvtsi2sd_xmm_rm64], from_general!("cvtsi2sd", u64, "{b:r}")),
    codes(&[C::Cvtss2si_r32_xmmm32], to_general!("cvtss2si", M32, u32, "{o:e}")),
    codes(&[C::Cvtss2si_r64_xmmm32], to_general!("cvtss2si", M32, u64, "{o:r}")),
    codes(&[C::Cvtsd2si_r32_xmmm64], to_general!("cvtsd2si", M64, u32, "{o:e}")),
    codes(&[C::Cvtsd2si_r64_xmmm64], to_general!("cvtsd2si", M64, u64, "{o:r}")),
    codes(&[C::Cvttss2si_r32_xmmm32], to_general!("cvttss2si", M32, u32, "{o:e}")),
    codes(&[C::Cvttss2si_r64_xmmm32], to_general!("cvttss2si", M32, u64, "{o:r}")),
    codes(&[C::Cvttsd2si_r32_xmmm64], to_general!("cvttsd2si", M64, u32, "{o:e}")),
    codes(&[C::Cvttsd2si_r64_xmmm64], to_general!("cvttsd2si", M64, u64, "{o:r}")),
    row(M::Cvtpi2ps, via!(from_mm_low, "cvtdq2ps")),
    row(M::Cvtpi2pd, via!(from_mm, "cvtdq2pd")),
    row(M::Cvtps2pi, via!(to_mm, "cvtps2dq")),
    row(M::Cvttps2pi, via!(to_mm, "cvttps2dq")),
    row(M::Cvtpd2pi, via!(to_mm_wide, "cvtpd2dq")),
    row(M::Cvttpd2pi, via!(to_mm_wide, "cvttpd2dq")),
];

fn from_general<I: Float<In: HostWord, Out = V>>(d: &Digest<'_>) -> Option<Lowered>
where
    Reg: super::float::Operand<I::In>,
{
    let h = if d.is_mem(1) {
        by_form!(d, F => handler::<Compute<I, MemGeneral<F>>> as crate::op::Handler)
    } else {
        handler::<Compute<I, Reg>>
    };
    keeps(d, h)
}

/// Two integers in MMX become two floats; `LOW`: the destination's upper half stays.
fn convert_mm<I: Float<In = V, Out = V>, const LOW: bool, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_sse()?;
    let source: u64 = if MEMORY {
        cpu.read_operand(op)?
    } else {
        cpu.require_mmx()?;
        cpu.mm(op.src)
    };
    let old = cpu.xmm(op.dst);
    let out = to_u128(careful::<I>(cpu, from_u128(0), from_u128(source.into()), 0)?);
    // From memory the x87 state is left alone (SDM Vol. 2 "CVTPI2PD"; the host does so for CVTPI2PS too).
    if !MEMORY {
        cpu.enter_mmx();
    }
    cpu.set_xmm(op.dst, if LOW { old >> 64 << 64 | u128::from(out as u64) } else { out });
    Ok(Then::Next)
}

fn from_mm_low<I: Float<In = V, Out = V>>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = plain_handler(convert_mm::<I, true, true>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(convert_mm::<I, true, false>) })
}

fn from_mm<I: Float<In = V, Out = V>>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = plain_handler(convert_mm::<I, false, true>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(convert_mm::<I, false, false>) })
}

/// Two floats become two integers in MMX. `WIDE`: doubles.
fn convert_to_mm<I: Float<In = V, Out = V>, const WIDE: bool, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let source = match (MEMORY, WIDE) {
        (true, true) => {
            let la = cpu.operand_address(op, 16, false)?;
            cpu.require_aligned(la, 16)?;
            to_u128(cpu.load_16(la, op.segment())?)
        }
        (true, false) => cpu.read_operand::<u64>(op)?.into(),
        (false, true) => cpu.xmm(op.src),
        // Zeros raise nothing.
        (false, false) => u128::from(cpu.xmm(op.src) as u64),
    };
    // The host is in MMX state even where the conversion faults.
    cpu.enter_mmx();
    let out = careful::<I>(cpu, from_u128(0), from_u128(source), 0)?;
    cpu.set_mm(op.dst, to_u128(out) as u64);
    Ok(Then::Next)
}

fn to_mm<I: Float<In = V, Out = V>>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = plain_handler(convert_to_mm::<I, false, true>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(convert_to_mm::<I, false, false>) })
}

fn to_mm_wide<I: Float<In = V, Out = V>>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = plain_handler(convert_to_mm::<I, true, true>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(convert_to_mm::<I, true, false>) })
}
