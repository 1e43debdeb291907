//! Moves between vector registers, general registers and memory, and what is done to all registers or to MXCSR. SDM Vol. 2,
//! the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M};

use super::{Halves, M128Unaligned, M256, Operand, WIDE, avx, host_has, is_wide, plain, register, vex};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::flags::{CF, Flags, ZF};
use crate::host::HostWord;
use crate::host_simd::V;
use crate::host_vex;
use crate::isa::simd::moves::store_masked;
use crate::isa::simd::state::{ldmxcsr, stmxcsr};
use crate::isa::simd::{keeps, lacking};
use crate::isa::{Row, by_form, codes, plain_handler};
use crate::op::{Form, Handler, Machine, Op, Semantics, Stored, To, attempt, handler};
use crate::state::VectorRegister;

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vmovaps, whole::<true>),
    vex(M::Vmovapd, whole::<true>),
    vex(M::Vmovdqa, whole::<true>),
    vex(M::Vmovntps, whole::<true>),
    vex(M::Vmovntpd, whole::<true>),
    vex(M::Vmovntdq, whole::<true>),
    vex(M::Vmovntdqa, whole::<true>),
    vex(M::Vmovups, whole::<false>),
    vex(M::Vmovupd, whole::<false>),
    vex(M::Vmovdqu, whole::<false>),
    vex(M::Vlddqu, whole::<false>),
    vex(M::Vmovss, scalar::<u32>),
    vex(M::Vmovsd, scalar::<u64>),
    codes(&[C::VEX_Vmovd_xmm_rm32], from_general::<u32>),
    codes(&[C::VEX_Vmovq_xmm_rm64], from_general::<u64>),
    codes(&[C::VEX_Vmovd_rm32_xmm], to_general::<u32>),
    codes(&[C::VEX_Vmovq_rm64_xmm], to_general::<u64>),
    codes(&[C::VEX_Vmovq_xmm_xmmm64, C::VEX_Vmovq_xmmm64_xmm], quad),
    vex(M::Vmovlps, half::<0>),
    vex(M::Vmovlpd, half::<0>),
    vex(M::Vmovhps, half::<64>),
    vex(M::Vmovhpd, half::<64>),
    // The last operand's upper half in place of the first source's lower one, and the other way round.
    vex(M::Vmovhlps, |d| plain(d, plain_handler(|cpu, op| join(cpu, op, |a, b| b >> 64 | a >> 64 << 64)))),
    vex(M::Vmovlhps, |d| plain(d, plain_handler(|cpu, op| join(cpu, op, |a, b| u128::from(a as u64) | b << 64)))),
    vex(M::Vmovmskps, |d| plain(d, plain_handler(signs::<32>))),
    vex(M::Vmovmskpd, |d| plain(d, plain_handler(signs::<64>))),
    vex(M::Vpmovmskb, signs_of_bytes),
    vex(M::Vptest, |d| flags(d, plain_handler(test::<128>))),
    vex(M::Vtestps, |d| flags(d, plain_handler(test::<32>))),
    vex(M::Vtestpd, |d| flags(d, plain_handler(test::<64>))),
    vex(M::Vmaskmovdqu, |d| checked(d, plain_handler(maskmovdqu))),
    vex(M::Vldmxcsr, |d| checked(d, plain_handler(ldmxcsr::<true>))),
    vex(M::Vstmxcsr, |d| checked(d, plain_handler(stmxcsr::<true>))),
    vex(M::Vzeroupper, |d| checked(d, handler::<ZeroUpper>)),
    vex(M::Vzeroall, |d| checked(d, plain_handler(zero_all))),
];

/// An op with the operands where the digest puts them.
fn checked(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    if host_has(d) { keeps(d, h) } else { lacking(d) }
}

/// As [`plain`], replacing the flags.
fn flags(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    Some(Lowered { flags: FlagsOut::Unknown, ..plain(d, h)? })
}

/// A register, `S` of it; the rest becomes zero.
struct Move<S>(PhantomData<S>);
struct Load<S, F, const ALIGNED: bool>(PhantomData<(S, F)>);
struct Store<S, F, const ALIGNED: bool>(PhantomData<(S, F)>);

/// Zeros above the XMM part of a vector register.
#[inline(always)]
fn clear_upper(to: *mut VectorRegister) {
    let upper = to.cast::<u128>().wrapping_add(1).cast::<[u128; 3]>();
    // SAFETY: a vector register of the CPU, which has four such parts and their alignment.
    unsafe { upper.write([0; 3]) };
}

/// #GP(0) for an access at `la` that is not aligned as `S` is long.
#[inline(always)]
fn aligned<S: Operand>(la: u64) -> Result<(), To> {
    fn misaligned(cpu: &mut Cpu, _: &Op) -> Done {
        Err(cpu.fault(crate::fault::Fault::gp(0)))
    }
    if la & u64::from(S::BYTES - 1) == 0 { Ok(()) } else { Err(To::Other(plain_handler(misaligned))) }
}

impl<S: Operand> Semantics for Move<S> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        let (to, from) = (m.vector(m.op().dst), m.vector(m.op().src));
        // SAFETY: a vector register of the CPU, half of it.
        let value = unsafe { from.cast::<[u128; 2]>().read() };
        // SAFETY: as above, all of it.
        unsafe { to.cast::<[u128; 4]>().write([value[0], if S::BYTES == 32 { value[1] } else { 0 }, 0, 0]) };
        To::Next
    }
}

impl<S: Operand, F: Form, const ALIGNED: bool> Semantics for Load<S, F, ALIGNED> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, S::BYTES, false) });
        if ALIGNED {
            attempt!(aligned::<S>(la));
        }
        let to = m.vector(m.op().dst);
        attempt!(S::load::<F>(m, la, to));
        if S::BYTES == 16 {
            clear_upper(to);
        }
        To::Next
    }
}

impl<S: Operand, F: Form, const ALIGNED: bool> Semantics for Store<S, F, ALIGNED> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, S::BYTES, true) });
        if ALIGNED {
            attempt!(aligned::<S>(la));
        }
        let from = m.vector(m.op().src);
        let stored: Stored = if S::BYTES == 32 {
            attempt!(m.store_32::<F>(la, from))
        } else {
            // SAFETY: a vector register is larger than and aligned as `V`.
            let value = unsafe { from.cast::<V>().read() };
            attempt!(m.store_16::<F>(la, value))
        };
        stored.then()
    }
}

fn whole<const ALIGNED: bool>(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = match (d.is_mem(0), d.is_mem(1), is_wide(d)) {
        (true, _, true) => by_form!(d, F => handler::<Store<M256, F, ALIGNED>>),
        (true, _, false) => by_form!(d, F => handler::<Store<M128Unaligned, F, ALIGNED>>),
        (_, true, true) => by_form!(d, F => handler::<Load<M256, F, ALIGNED>>),
        (_, true, false) => by_form!(d, F => handler::<Load<M128Unaligned, F, ALIGNED>>),
        (_, _, true) => handler::<Move<M256>>,
        (_, _, false) => handler::<Move<M128Unaligned>>,
    };
    checked(d, h)
}

/// A scalar from memory: zeros above.
struct LoadScalar<W, F>(PhantomData<(W, F)>);
struct StoreScalar<W, F>(PhantomData<(W, F)>);

impl<W: HostWord, F: Form> Semantics for LoadScalar<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let value = attempt!(m.load::<F, W>(la));
        let to = m.vector(m.op().dst).cast::<[u128; 4]>();
        // SAFETY: a vector register of the CPU.
        unsafe { to.write([value.zext().into(), 0, 0, 0]) };
        To::Next
    }
}

impl<W: HostWord, F: Form> Semantics for StoreScalar<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, true) });
        let from = m.vector(m.op().src).cast::<u64>();
        // SAFETY: a vector register of the CPU.
        let value = W::of(unsafe { from.read() });
        attempt!(m.store::<F, _>(la, value)).then()
    }
}

fn scalar_memory<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = if d.is_mem(0) {
        by_form!(d, F => handler::<StoreScalar<W, F>>)
    } else {
        by_form!(d, F => handler::<LoadScalar<W, F>>)
    };
    checked(d, h)
}

/// Between registers, all but the scalar is the first source's.
fn scalar<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn merge<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        let low = u128::from(u64::MAX >> (64 - W::BITS));
        join(cpu, op, |a, b| a & !low | b & low)
    }
    if d.is_mem(0) || d.is_mem(1) { scalar_memory::<W>(d) } else { plain(d, plain_handler(merge::<W>)) }
}

/// XMM: a function of the first source and the last operand.
fn join(cpu: &mut Cpu, op: &Op, f: impl FnOnce(u128, u128) -> u128) -> Done {
    cpu.require_avx()?;
    let b = cpu.last_operand(op)?[0];
    cpu.set_ymm(op.dst, [f(cpu.xmm(op.src), b), 0]);
    Ok(Then::Next)
}

fn from_general<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        cpu.set_ymm(op.dst, [cpu.get::<W>(op.src).zext().into(), 0]);
        Ok(Then::Next)
    }
    if d.is_mem(1) { scalar_memory::<W>(d) } else { checked(d, plain_handler(reg::<W>)) }
}

fn to_general<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        cpu.put(op.dst, W::of(cpu.xmm(op.src) as u64));
        Ok(Then::Next)
    }
    if d.is_mem(0) { scalar_memory::<W>(d) } else { checked(d, plain_handler(reg::<W>)) }
}

/// VMOVQ between registers keeps the low quadword alone.
fn quad(d: &Digest<'_>) -> Option<Lowered> {
    fn reg(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        cpu.set_ymm(op.dst, [u128::from(cpu.xmm(op.src) as u64), 0]);
        Ok(Then::Next)
    }
    if d.is_mem(0) || d.is_mem(1) { scalar_memory::<u64>(d) } else { checked(d, plain_handler(reg)) }
}

/// The quadword at bit `AT`: out of a register, or from memory into a copy of one.
fn half<const AT: u32>(d: &Digest<'_>) -> Option<Lowered> {
    fn store<const AT: u32>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_avx()?;
        cpu.write_operand(op, (cpu.xmm(op.src) >> AT) as u64)?;
        Ok(Then::Next)
    }
    fn load<const AT: u32>(cpu: &mut Cpu, op: &Op) -> Done {
        join(cpu, op, |a, b| a & !(u128::from(u64::MAX) << AT) | b << AT)
    }
    if d.is_mem(0) { checked(d, plain_handler(store::<AT>)) } else { plain(d, plain_handler(load::<AT>)) }
}

/// The sign bit of each lane of `BITS`, in the low bits of a general register.
fn signs<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let value = cpu.ymm(op.aux);
    let half = |value: u128| (0..128 / BITS).fold(0, |all, i| all | ((value >> (BITS * i + BITS - 1)) as u32 & 1) << i);
    let high = if op.imm & WIDE != 0 { half(value[1]) } else { 0 };
    cpu.put(op.dst, half(value[0]) | high << (128 / BITS));
    Ok(Then::Next)
}

/// VPMOVMSKB, which string functions spend their time in.
struct SignsOfBytes<const WIDE: bool>;
impl<const WIDE: bool> Semantics for SignsOfBytes<WIDE> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        let from = m.vector(m.op().src);
        let signs = if WIDE {
            // SAFETY: a vector register of the CPU; the selector has asked the host.
            unsafe { host_vex::signs_32(from) }
        } else {
            // SAFETY: a vector register is larger than and aligned as `V`.
            let value = unsafe { from.cast::<V>().read() };
            // SAFETY: SSE2 is the baseline.
            unsafe { std::arch::x86_64::_mm_movemask_epi8(value) as u32 }
        };
        m.put(m.op().dst, signs);
        To::Next
    }
}

fn signs_of_bytes(d: &Digest<'_>) -> Option<Lowered> {
    checked(d, if is_wide(d) { handler::<SignsOfBytes<true>> } else { handler::<SignsOfBytes<false>> })
}

/// ZF: no bit of the last operand is set in the first; CF: none outside of it. Of lanes of `BITS` only the sign counts,
/// of 128 every bit.
fn test<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let b = cpu.last_operand(op)?;
    let a = cpu.ymm(op.dst);
    let counts = match BITS {
        32 => 0x8000_0000_8000_0000_8000_0000_8000_0000,
        64 => 0x8000_0000_0000_0000_8000_0000_0000_0000,
        _ => u128::MAX,
    };
    let upper = if op.imm & WIDE != 0 { counts } else { 0 };
    let any = |f: fn(u128, u128) -> u128| f(a[0], b[0]) & counts | f(a[1], b[1]) & upper;
    let (inside, outside) = (any(|a, b| a & b), any(|a, b| !a & b));
    cpu.set_flags(Flags::explicit(u64::from(inside == 0) * ZF | u64::from(outside == 0) * CF));
    Ok(Then::Next)
}

fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let (value, mask) = (cpu.xmm(op.src), cpu.xmm(op.aux));
    store_masked(cpu, op, value.to_le_bytes(), mask.to_le_bytes())
}

/// VZEROUPPER, which compilers put behind every function that used YMM registers.
struct ZeroUpper;
impl Semantics for ZeroUpper {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        let registers = if m.cpu().is_64bit() { 16 } else { 8 };
        for n in 0..registers {
            clear_upper(m.vector(n));
        }
        To::Next
    }
}

fn zero_all(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_avx()?;
    let zero: Halves = [0; 2];
    for n in 0..cpu.xmm_registers() {
        cpu.fpu.vector[usize::from(n)] = register(zero);
    }
    Ok(Then::Next)
}
