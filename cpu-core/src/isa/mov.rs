//! MOV between general registers and memory, MOVZX MOVSX MOVSXD, LEA, CMOVcc, SETcc, sign extensions, BSWAP, MOVBE, NOP. SDM
//! Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M, OpKind};

use super::{Row, by_form, by_width, codes, row};
use crate::decode::digest::{Digest, Lowered};
use crate::flags::kind;
use crate::host::HostWord;
use crate::op::{Form, Handler, Machine, Semantics, To, attempt, handler};
use crate::state::Gpr;

pub(super) const ROWS: &[Row] = &[
    codes(
        &[
            C::Mov_r8_rm8,
            C::Mov_rm8_r8,
            C::Mov_r16_rm16,
            C::Mov_rm16_r16,
            C::Mov_r32_rm32,
            C::Mov_rm32_r32,
            C::Mov_r64_rm64,
            C::Mov_rm64_r64,
            C::Mov_AL_moffs8,
            C::Mov_AX_moffs16,
            C::Mov_EAX_moffs32,
            C::Mov_RAX_moffs64,
            C::Mov_moffs8_AL,
            C::Mov_moffs16_AX,
            C::Mov_moffs32_EAX,
            C::Mov_moffs64_RAX,
            C::Mov_r8_imm8,
            C::Mov_r16_imm16,
            C::Mov_r32_imm32,
            C::Mov_r64_imm64,
            C::Mov_rm8_imm8,
            C::Mov_rm16_imm16,
            C::Mov_rm32_imm32,
            C::Mov_rm64_imm32,
        ],
        mov,
    ),
    row(M::Movzx, extend::<Zero>),
    row(M::Movsx, extend::<Sign>),
    row(M::Movsxd, extend::<Sign>),
    row(M::Lea, lea),
    row(M::Cbw, |d| Some(d.lower(handler::<Widen<u8, u16>>).cannot_stop_keeps())),
    row(M::Cwde, |d| Some(d.lower(handler::<Widen<u16, u32>>).cannot_stop_keeps())),
    row(M::Cdqe, |d| Some(d.lower(handler::<Widen<u32, u64>>).cannot_stop_keeps())),
    row(M::Cwd, |d| Some(d.lower(handler::<SignInto<u16>>).cannot_stop_keeps())),
    row(M::Cdq, |d| Some(d.lower(handler::<SignInto<u32>>).cannot_stop_keeps())),
    row(M::Cqo, |d| Some(d.lower(handler::<SignInto<u64>>).cannot_stop_keeps())),
    row(M::Bswap, bswap),
    row(M::Movbe, movbe),
    row(M::Nop, nop),
    row(M::Endbr32, nop),
    row(M::Endbr64, nop),
    row(M::Reservednop, nop),
    row(M::Prefetchnta, nop),
    row(M::Prefetcht0, nop),
    row(M::Prefetcht1, nop),
    row(M::Prefetcht2, nop),
    row(M::Prefetchw, nop),
    row(M::Prefetch, nop),
    row(M::Cmovo, cmov::<0>),
    row(M::Cmovno, cmov::<1>),
    row(M::Cmovb, cmov::<2>),
    row(M::Cmovae, cmov::<3>),
    row(M::Cmove, cmov::<4>),
    row(M::Cmovne, cmov::<5>),
    row(M::Cmovbe, cmov::<6>),
    row(M::Cmova, cmov::<7>),
    row(M::Cmovs, cmov::<8>),
    row(M::Cmovns, cmov::<9>),
    row(M::Cmovp, cmov::<10>),
    row(M::Cmovnp, cmov::<11>),
    row(M::Cmovl, cmov::<12>),
    row(M::Cmovge, cmov::<13>),
    row(M::Cmovle, cmov::<14>),
    row(M::Cmovg, cmov::<15>),
    row(M::Seto, setcc::<0>),
    row(M::Setno, setcc::<1>),
    row(M::Setb, setcc::<2>),
    row(M::Setae, setcc::<3>),
    row(M::Sete, setcc::<4>),
    row(M::Setne, setcc::<5>),
    row(M::Setbe, setcc::<6>),
    row(M::Seta, setcc::<7>),
    row(M::Sets, setcc::<8>),
    row(M::Setns, setcc::<9>),
    row(M::Setp, setcc::<10>),
    row(M::Setnp, setcc::<11>),
    row(M::Setl, setcc::<12>),
    row(M::Setge, setcc::<13>),
    row(M::Setle, setcc::<14>),
    row(M::Setg, setcc::<15>),
];

impl Lowered {
    /// Registers only, and the flags stay.
    fn cannot_stop_keeps(self) -> Self {
        Self { reads_flags: false, ..self.cannot_stop().keeps_flags() }
    }

    /// Keeps the flags, but memory may fault.
    fn keeps(self, memory: bool) -> Self {
        Self { reads_flags: false, barrier: memory, ..self.keeps_flags() }
    }
}

pub(super) struct RegReg<W>(PhantomData<W>);
pub(super) struct RegImm<W>(PhantomData<W>);
pub(super) struct Load<W, F>(PhantomData<(W, F)>);
pub(super) struct Store<W, F>(PhantomData<(W, F)>);
pub(super) struct StoreImm<W, F>(PhantomData<(W, F)>);

impl<W: HostWord> Semantics for RegReg<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = m.get::<W>(m.op().src);
        m.put(m.op().dst, value);
        To::Next
    }
}

impl<W: HostWord> Semantics for RegImm<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        m.put(m.op().dst, W::of(m.op().imm));
        To::Next
    }
}

impl<W: HostWord, F: Form> Semantics for Load<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let value = attempt!(m.load::<F, W>(la));
        m.put(m.op().dst, value);
        To::Next
    }
}

impl<W: HostWord, F: Form> Semantics for Store<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, true) });
        let value = m.get::<W>(m.op().src);
        attempt!(m.store::<F, _>(la, value)).then()
    }
}

impl<W: HostWord, F: Form> Semantics for StoreImm<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, true) });
        let value = W::of(m.op().imm);
        attempt!(m.store::<F, _>(la, value)).then()
    }
}

fn mov(d: &Digest<'_>) -> Option<Lowered> {
    let bytes = d.bytes(0);
    let memory = d.is_mem(0) || d.is_mem(1);
    let h: Handler = match (d.is_mem(0), d.is_mem(1), d.is_imm(1)) {
        (true, _, true) => by_width!(bytes, W => by_form!(d, F => handler::<StoreImm<W, F>>)),
        (true, _, false) => by_width!(bytes, W => by_form!(d, F => handler::<Store<W, F>>)),
        (false, true, _) => by_width!(bytes, W => by_form!(d, F => handler::<Load<W, F>>)),
        (false, false, true) => by_width!(bytes, W => handler::<RegImm<W>>),
        (false, false, false) => by_width!(bytes, W => handler::<RegReg<W>>),
    };
    Some(d.lower(h).keeps(memory))
}

/// How the narrow source fills the wide destination.
pub(super) trait Extension: 'static {
    fn extend<S: HostWord>(value: S) -> u64;
}
pub(super) struct Zero;
impl Extension for Zero {
    #[inline(always)]
    fn extend<S: HostWord>(value: S) -> u64 {
        value.zext()
    }
}
pub(super) struct Sign;
impl Extension for Sign {
    #[inline(always)]
    fn extend<S: HostWord>(value: S) -> u64 {
        value.sext()
    }
}

pub(super) struct ExtendReg<E, S, W>(PhantomData<(E, S, W)>);
pub(super) struct ExtendMem<E, S, W, F>(PhantomData<(E, S, W, F)>);

impl<E: Extension, S: HostWord, W: HostWord> Semantics for ExtendReg<E, S, W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = m.get::<S>(m.op().src);
        m.put(m.op().dst, W::of(E::extend(value)));
        To::Next
    }
}

impl<E: Extension, S: HostWord, W: HostWord, F: Form> Semantics for ExtendMem<E, S, W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, S::BYTES, false) });
        let value = attempt!(m.load::<F, S>(la));
        m.put(m.op().dst, W::of(E::extend(value)));
        To::Next
    }
}

fn extend<E: Extension>(d: &Digest<'_>) -> Option<Lowered> {
    let memory = d.is_mem(1);
    let source = if memory { d.ins.memory_size().size() as u32 } else { d.bytes(1) };
    macro_rules! pick {
        ($S:ty, $W:ty) => {
            if memory {
                by_form!(d, F => handler::<ExtendMem<E, $S, $W, F>> as Handler)
            } else {
                handler::<ExtendReg<E, $S, $W>>
            }
        };
    }
    let h = match (source, d.bytes(0)) {
        (1, 2) => pick!(u8, u16),
        (1, 4) => pick!(u8, u32),
        (1, 8) => pick!(u8, u64),
        (2, 2) => pick!(u16, u16),
        (2, 4) => pick!(u16, u32),
        (2, 8) => pick!(u16, u64),
        (4, 4) => pick!(u32, u32),
        (4, 8) => pick!(u32, u64),
        (4, 2) => pick!(u32, u16),
        _ => return None,
    };
    Some(d.lower(h).keeps(memory))
}

pub(super) struct Lea<W, const INDEXED: bool>(PhantomData<W>);
impl<W: HostWord, const INDEXED: bool> Semantics for Lea<W, INDEXED> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let op = *m.op();
        let mut ea = m.get::<u64>(op.base).wrapping_add(op.disp as u64);
        if INDEXED {
            ea = ea.wrapping_add(m.get::<u64>(op.index).wrapping_mul(u64::from(op.scale))) & op.address_mask();
        }
        m.put(op.dst, W::of(ea));
        To::Next
    }
}

fn lea(d: &Digest<'_>) -> Option<Lowered> {
    // Where the address size is no smaller than the operand's, cutting to the latter does for both.
    let plain = d.mode.is_64bit() && matches!(super::form_of(d), super::FormOf::BaseDisp) && d.displacement_fits();
    let h: Handler = match (d.bytes(0), plain) {
        (2, _) => handler::<Lea<u16, true>>,
        (4, false) => handler::<Lea<u32, true>>,
        (8, false) => handler::<Lea<u64, true>>,
        (4, true) => handler::<Lea<u32, false>>,
        (8, true) => handler::<Lea<u64, false>>,
        _ => return None,
    };
    Some(d.lower(h).cannot_stop_keeps())
}

/// RAX's low half, sign-extended to twice its width.
struct Widen<S, W>(PhantomData<(S, W)>);
impl<S: HostWord, W: HostWord> Semantics for Widen<S, W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = m.get::<S>(Gpr::Rax as u8 * 8);
        m.put(Gpr::Rax as u8 * 8, W::of(value.sext()));
        To::Next
    }
}

/// RDX filled with RAX's sign.
struct SignInto<W>(PhantomData<W>);
impl<W: HostWord> Semantics for SignInto<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let sign = if m.get::<W>(Gpr::Rax as u8 * 8).msb() { u64::MAX } else { 0 };
        m.put(Gpr::Rdx as u8 * 8, W::of(sign));
        To::Next
    }
}

struct Bswap<W>(PhantomData<W>);
impl<W: HostWord> Semantics for Bswap<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let at = m.op().dst;
        let value = swapped(m.get::<W>(at));
        // A 16-bit BSWAP is undefined in the SDM; hardware clears the register.
        m.put(at, if W::BYTES == 2 { W::of(0) } else { value });
        To::Next
    }
}

fn swapped<W: HostWord>(value: W) -> W {
    W::of(value.zext().swap_bytes() >> (64 - W::BITS))
}

fn bswap(d: &Digest<'_>) -> Option<Lowered> {
    Some(by_width!(d.bytes(0), W => d.lower(handler::<Bswap<W>>)).cannot_stop_keeps())
}

struct LoadSwapped<W, F>(PhantomData<(W, F)>);
impl<W: HostWord, F: Form> Semantics for LoadSwapped<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let value = attempt!(m.load::<F, W>(la));
        m.put(m.op().dst, swapped(value));
        To::Next
    }
}

struct StoreSwapped<W, F>(PhantomData<(W, F)>);
impl<W: HostWord, F: Form> Semantics for StoreSwapped<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, true) });
        let value = swapped(m.get::<W>(m.op().src));
        attempt!(m.store::<F, _>(la, value)).then()
    }
}

fn movbe(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = if d.is_mem(0) {
        by_width!(d.bytes(0), W => by_form!(d, F => handler::<StoreSwapped<W, F>>))
    } else {
        by_width!(d.bytes(0), W => by_form!(d, F => handler::<LoadSwapped<W, F>>))
    };
    Some(d.lower(h).keeps(true))
}

struct Nop;
impl Semantics for Nop {
    #[inline(always)]
    unsafe fn run(_: &mut Machine) -> To {
        To::Next
    }
}

fn nop(d: &Digest<'_>) -> Option<Lowered> {
    Some(Lowered { idle: true, ..d.lower(handler::<Nop>).cannot_stop_keeps() })
}

/// The condition `CC`, with flags known to come from a difference of width `1 << LOG2` where `KNOWN`.
#[inline(always)]
fn holds<const CC: u8, const KNOWN: u64>(m: &Machine) -> bool {
    let mut flags = m.flags();
    if KNOWN != ANY {
        flags.kind = KNOWN;
    }
    flags.condition(CC)
}

/// No producer is known at decode.
pub(super) const ANY: u64 = u64::MAX;

struct CmovReg<W, const CC: u8, const KNOWN: u64>(PhantomData<W>);
struct CmovMem<W, F, const CC: u8>(PhantomData<(W, F)>);

impl<W: HostWord, const CC: u8, const KNOWN: u64> Semantics for CmovReg<W, CC, KNOWN> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let op = *m.op();
        // The destination is written either way: a 32-bit CMOV clears the upper half.
        let from = if holds::<CC, KNOWN>(m) { op.src } else { op.dst };
        let value = m.get::<W>(from);
        m.put(op.dst, value);
        To::Next
    }
}

impl<W: HostWord, F: Form, const CC: u8> Semantics for CmovMem<W, F, CC> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let value = attempt!(m.load::<F, W>(la));
        let at = m.op().dst;
        let value = if holds::<CC, ANY>(m) { value } else { m.get(at) };
        m.put(at, value);
        To::Next
    }
}

fn cmov<const CC: u8>(d: &Digest<'_>) -> Option<Lowered> {
    macro_rules! reg {
        ($W:ty) => {
            match d.known_flags {
                Some(k) if k == kind::SUB + 2 => handler::<CmovReg<$W, CC, { kind::SUB + 2 }>> as Handler,
                Some(k) if k == kind::SUB + 3 => handler::<CmovReg<$W, CC, { kind::SUB + 3 }>>,
                _ => handler::<CmovReg<$W, CC, ANY>>,
            }
        };
    }
    let memory = d.is_mem(1);
    let h: Handler = match (d.bytes(0), memory) {
        (2, false) => handler::<CmovReg<u16, CC, ANY>>,
        (4, false) => reg!(u32),
        (8, false) => reg!(u64),
        (2, true) => by_form!(d, F => handler::<CmovMem<u16, F, CC>>),
        (4, true) => by_form!(d, F => handler::<CmovMem<u32, F, CC>>),
        (8, true) => by_form!(d, F => handler::<CmovMem<u64, F, CC>>),
        _ => return None,
    };
    Some(d.lower(h).keeps(memory).reads_flags())
}

struct SetReg<const CC: u8, const KNOWN: u64>;
struct SetMem<F, const CC: u8>(PhantomData<F>);

impl<const CC: u8, const KNOWN: u64> Semantics for SetReg<CC, KNOWN> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        let value = holds::<CC, KNOWN>(m);
        m.put(m.op().dst, u8::from(value));
        To::Next
    }
}

impl<F: Form, const CC: u8> Semantics for SetMem<F, CC> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, 1, true) });
        let value = holds::<CC, ANY>(m);
        attempt!(m.store::<F, _>(la, u8::from(value))).then()
    }
}

fn setcc<const CC: u8>(d: &Digest<'_>) -> Option<Lowered> {
    let memory = d.ins.op0_kind() == OpKind::Memory;
    let h: Handler = match d.known_flags {
        _ if memory => by_form!(d, F => handler::<SetMem<F, CC>>),
        Some(k) if k == kind::SUB => handler::<SetReg<CC, { kind::SUB }>>,
        Some(k) if k == kind::SUB + 2 => handler::<SetReg<CC, { kind::SUB + 2 }>>,
        Some(k) if k == kind::SUB + 3 => handler::<SetReg<CC, { kind::SUB + 3 }>>,
        _ => handler::<SetReg<CC, ANY>>,
    };
    Some(d.lower(h).keeps(memory).reads_flags())
}
