//! Moves between XMM, MMX, general registers and memory. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M};

use super::{M128, M128Unaligned, Source, aligned, keeps, source, sse};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host::HostWord;
use crate::host_simd::{from_u128, to_u128};
use crate::isa::{Row, by_form, codes, plain_handler, row};
use crate::op::{Form, Handler, Machine, Op, Semantics, To, attempt, handler};
use crate::state::Gpr;

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Movaps, wide::<M128>),
    row(M::Movapd, wide::<M128>),
    row(M::Movdqa, wide::<M128>),
    row(M::Movntps, wide::<M128>),
    row(M::Movntpd, wide::<M128>),
    row(M::Movntdq, wide::<M128>),
    row(M::Movntdqa, wide::<M128>),
    row(M::Movups, wide::<M128Unaligned>),
    row(M::Movupd, wide::<M128Unaligned>),
    row(M::Movdqu, wide::<M128Unaligned>),
    row(M::Lddqu, wide::<M128Unaligned>),
    row(M::Movss, scalar::<u32>),
    // The mnemonic is the string instruction's too.
    codes(&[C::Movsd_xmm_xmmm64, C::Movsd_xmmm64_xmm], scalar::<u64>),
    codes(&[C::Movd_xmm_rm32], from_general::<u32>),
    codes(&[C::Movq_xmm_rm64], from_general::<u64>),
    codes(&[C::Movd_rm32_xmm], to_general::<u32>),
    codes(&[C::Movq_rm64_xmm], to_general::<u64>),
    codes(&[C::Movq_xmm_xmmm64, C::Movq_xmmm64_xmm], quad),
    codes(&[C::Movd_mm_rm32], |d| keeps(d, mm_from_general::<u32>(d))),
    codes(&[C::Movq_mm_rm64], |d| keeps(d, mm_from_general::<u64>(d))),
    codes(&[C::Movd_rm32_mm], |d| keeps(d, mm_to_general::<u32>(d))),
    codes(&[C::Movq_rm64_mm], |d| keeps(d, mm_to_general::<u64>(d))),
    codes(&[C::Movq_mm_mmm64, C::Movq_mmm64_mm], |d| keeps(d, mm_quad(d))),
    row(M::Movntq, |d| keeps(d, mm_quad(d))),
    row(M::Movlps, half::<0>),
    row(M::Movlpd, half::<0>),
    row(M::Movhps, half::<64>),
    row(M::Movhpd, half::<64>),
    row(M::Movhlps, |d| keeps(d, handler::<MoveHalf<64, 0>>)),
    row(M::Movlhps, |d| keeps(d, handler::<MoveHalf<0, 64>>)),
    row(M::Movmskps, |d| keeps(d, plain_handler(signs::<32>))),
    row(M::Movmskpd, |d| keeps(d, plain_handler(signs::<64>))),
    row(M::Pmovmskb, |d| keeps(d, if d.reg(1).is_mm() { plain_handler(signs_mm) } else { handler::<SignsOfBytes> })),
    row(M::Movdq2q, |d| keeps(d, plain_handler(movdq2q))),
    row(M::Movq2dq, |d| keeps(d, plain_handler(movq2dq))),
    row(M::Movnti, movnti),
    row(M::Maskmovq, |d| keeps(d, plain_handler(maskmovq))),
    row(M::Maskmovdqu, |d| keeps(d, plain_handler(maskmovdqu))),
];

struct Move;
struct Load<S, F>(PhantomData<(S, F)>);
struct Store<S, F>(PhantomData<(S, F)>);

impl Semantics for Move {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let value = m.xmm(m.op().src);
        m.set_xmm(m.op().dst, value);
        To::Next
    }
}

impl<S: Source, F: Form> Semantics for Load<S, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let value = attempt!(source::<S, F>(m));
        m.set_xmm(m.op().dst, value);
        To::Next
    }
}

/// Whether a 16-byte store must be aligned, as its load must.
trait Wide: Source {
    const ALIGNED: bool;
}
impl Wide for M128 {
    const ALIGNED: bool = true;
}
impl Wide for M128Unaligned {
    const ALIGNED: bool = false;
}

impl<S: Wide, F: Form> Semantics for Store<S, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, 16, true) });
        if S::ALIGNED {
            attempt!(aligned(la));
        }
        let value = m.xmm(m.op().src);
        attempt!(m.store_16::<F>(la, value)).then()
    }
}

fn wide<S: Wide>(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = match (d.is_mem(0), d.is_mem(1)) {
        (true, _) => by_form!(d, F => handler::<Store<S, F>>),
        (_, true) => by_form!(d, F => handler::<Load<S, F>>),
        _ => handler::<Move>,
    };
    keeps(d, h)
}

/// A scalar moved between registers: what lies above it in the destination stays.
struct Merge<W>(PhantomData<W>);
/// A scalar from memory: zeros above.
struct LoadScalar<W, F>(PhantomData<(W, F)>);
struct StoreScalar<W, F>(PhantomData<(W, F)>);

impl<W: HostWord> Semantics for Merge<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let (dst, src) = (m.op().dst, m.op().src);
        let low = u128::from(u64::MAX >> (64 - W::BITS));
        let value = to_u128(m.xmm(dst)) & !low | to_u128(m.xmm(src)) & low;
        m.set_xmm(dst, from_u128(value));
        To::Next
    }
}

impl<W: HostWord, F: Form> Semantics for LoadScalar<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, false) });
        let value = attempt!(m.load::<F, W>(la));
        m.set_xmm(m.op().dst, from_u128(value.zext().into()));
        To::Next
    }
}

impl<W: HostWord, F: Form> Semantics for StoreScalar<W, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, W::BYTES, true) });
        let value = W::of(to_u128(m.xmm(m.op().src)) as u64);
        attempt!(m.store::<F, _>(la, value)).then()
    }
}

fn scalar<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = match (d.is_mem(0), d.is_mem(1)) {
        (true, _) => by_form!(d, F => handler::<StoreScalar<W, F>>),
        (_, true) => by_form!(d, F => handler::<LoadScalar<W, F>>),
        _ => handler::<Merge<W>>,
    };
    keeps(d, h)
}

struct FromGeneral<W>(PhantomData<W>);
struct ToGeneral<W>(PhantomData<W>);

impl<W: HostWord> Semantics for FromGeneral<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let value = m.get::<W>(m.op().src);
        m.set_xmm(m.op().dst, from_u128(value.zext().into()));
        To::Next
    }
}

impl<W: HostWord> Semantics for ToGeneral<W> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let value = W::of(to_u128(m.xmm(m.op().src)) as u64);
        m.put(m.op().dst, value);
        To::Next
    }
}

fn from_general<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    if d.is_mem(1) { scalar::<W>(d) } else { keeps(d, handler::<FromGeneral<W>>) }
}

fn to_general<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    if d.is_mem(0) { scalar::<W>(d) } else { keeps(d, handler::<ToGeneral<W>>) }
}

/// MOVQ between XMM registers clears the upper half.
struct MoveQuad;
impl Semantics for MoveQuad {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let value = to_u128(m.xmm(m.op().src)) as u64;
        m.set_xmm(m.op().dst, from_u128(value.into()));
        To::Next
    }
}

fn quad(d: &Digest<'_>) -> Option<Lowered> {
    if d.is_mem(0) || d.is_mem(1) { scalar::<u64>(d) } else { keeps(d, handler::<MoveQuad>) }
}

/// 64 bits into or out of the half that starts at bit `AT`; the other half stays.
struct LoadHalf<F, const AT: u32>(PhantomData<F>);
struct StoreHalf<F, const AT: u32>(PhantomData<F>);
struct MoveHalf<const FROM: u32, const TO: u32>;

#[inline(always)]
fn with_half<const AT: u32>(value: u128, half: u64) -> u128 {
    value & !(u128::from(u64::MAX) << AT) | u128::from(half) << AT
}

impl<F: Form, const AT: u32> Semantics for LoadHalf<F, AT> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, 8, false) });
        let half = attempt!(m.load::<F, u64>(la));
        let dst = m.op().dst;
        let value = with_half::<AT>(to_u128(m.xmm(dst)), half);
        m.set_xmm(dst, from_u128(value));
        To::Next
    }
}

impl<F: Form, const AT: u32> Semantics for StoreHalf<F, AT> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, 8, true) });
        let value = (to_u128(m.xmm(m.op().src)) >> AT) as u64;
        attempt!(m.store::<F, _>(la, value)).then()
    }
}

impl<const FROM: u32, const TO: u32> Semantics for MoveHalf<FROM, TO> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let (dst, src) = (m.op().dst, m.op().src);
        let value = with_half::<TO>(to_u128(m.xmm(dst)), (to_u128(m.xmm(src)) >> FROM) as u64);
        m.set_xmm(dst, from_u128(value));
        To::Next
    }
}

fn half<const AT: u32>(d: &Digest<'_>) -> Option<Lowered> {
    let h: Handler = if d.is_mem(0) {
        by_form!(d, F => handler::<StoreHalf<F, AT>>)
    } else {
        by_form!(d, F => handler::<LoadHalf<F, AT>>)
    };
    keeps(d, h)
}

/// PMOVMSKB on XMM, which string functions spend their time in.
struct SignsOfBytes;
impl Semantics for SignsOfBytes {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: SSE2 is the baseline.
        let signs = unsafe { std::arch::x86_64::_mm_movemask_epi8(m.xmm(m.op().src)) };
        m.put(m.op().dst, signs as u32);
        To::Next
    }
}

/// The sign bit of each lane of `BITS`, in the low bits of a general register.
fn signs<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_sse()?;
    let value = cpu.xmm(op.src);
    let signs = (0..128 / BITS).fold(0, |bits, i| bits | ((value >> (BITS * i + BITS - 1)) as u32 & 1) << i);
    cpu.put(op.dst, signs);
    Ok(Then::Next)
}

fn signs_mm(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    let value = cpu.mm(op.src);
    let signs = (0..8).fold(0, |bits, i| bits | ((value >> (8 * i + 7)) as u32 & 1) << i);
    cpu.enter_mmx();
    cpu.put(op.dst, signs);
    Ok(Then::Next)
}

// MMX

fn mm_from_general<W: HostWord>(d: &Digest<'_>) -> Handler {
    fn reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_mmx()?;
        let value = cpu.get::<W>(op.src).zext();
        cpu.enter_mmx();
        cpu.set_mm(op.dst, value);
        Ok(Then::Next)
    }
    if d.is_mem(1) { plain_handler(mm_load::<W>) } else { plain_handler(reg::<W>) }
}

fn mm_to_general<W: HostWord>(d: &Digest<'_>) -> Handler {
    fn reg<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_mmx()?;
        cpu.enter_mmx();
        cpu.put(op.dst, W::of(cpu.mm(op.src)));
        Ok(Then::Next)
    }
    if d.is_mem(0) { plain_handler(mm_store::<W>) } else { plain_handler(reg::<W>) }
}

fn mm_quad(d: &Digest<'_>) -> Handler {
    fn reg(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_mmx()?;
        let value = cpu.mm(op.src);
        cpu.enter_mmx();
        cpu.set_mm(op.dst, value);
        Ok(Then::Next)
    }
    match (d.is_mem(0), d.is_mem(1)) {
        (true, _) => plain_handler(mm_store::<u64>),
        (_, true) => plain_handler(mm_load::<u64>),
        _ => plain_handler(reg),
    }
}

fn mm_load<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    let value = cpu.read_operand::<W>(op)?.zext();
    cpu.enter_mmx();
    cpu.set_mm(op.dst, value);
    Ok(Then::Next)
}

fn mm_store<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    cpu.write_operand(op, W::of(cpu.mm(op.src)))?;
    cpu.enter_mmx();
    Ok(Then::Next)
}

/// #UD, #NM as SSE; #MF as MMX.
fn require_both(cpu: &mut Cpu) -> Result<(), crate::cpu::Stop> {
    cpu.require_sse()?;
    cpu.require_mmx()
}

fn movdq2q(cpu: &mut Cpu, op: &Op) -> Done {
    require_both(cpu)?;
    cpu.enter_mmx();
    cpu.set_mm(op.dst, cpu.xmm(op.src) as u64);
    Ok(Then::Next)
}

fn movq2dq(cpu: &mut Cpu, op: &Op) -> Done {
    require_both(cpu)?;
    cpu.enter_mmx();
    cpu.set_xmm(op.dst, cpu.mm(op.src).into());
    Ok(Then::Next)
}

/// A general register to memory; neither CR0 nor CR4 holds it back.
fn movnti(d: &Digest<'_>) -> Option<Lowered> {
    fn store<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.write_operand(op, cpu.get::<W>(op.src))?;
        Ok(Then::Next)
    }
    keeps(d, if d.bytes(1) == 8 { plain_handler(store::<u64>) } else { plain_handler(store::<u32>) })
}

/// Stores the bytes of `value` whose mask byte is negative at DS:rDI, or the segment that overrides DS.
pub(super) fn store_masked<const N: usize>(cpu: &mut Cpu, op: &Op, value: [u8; N], mask: [u8; N]) -> Done {
    let (seg, address) = (op.segment(), op.address_mask());
    let offset = cpu.reg(Gpr::Rdi) & address;
    let la = cpu.linear(seg, offset, N as u32, true)?;
    // Rights of both pages are checked before the first byte is stored. With a mask of zeros hardware may or may not
    // fault (SDM Vol. 2 "MASKMOVDQU"); as recent CPUs do, it does not here.
    if mask.iter().all(|byte| byte & 0x80 == 0) {
        return Ok(Then::Next);
    }
    cpu.probe_write(la, N as u32, seg)?;
    for (i, (byte, mask)) in value.iter().zip(mask).enumerate() {
        if mask & 0x80 != 0 {
            let la = cpu.wrap_linear(la.wrapping_add(i as u64));
            cpu.store::<u8>(la, *byte, seg)?;
        }
    }
    Ok(Then::Next)
}

fn maskmovdqu(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_sse()?;
    let (value, mask) = (cpu.xmm(op.src), cpu.xmm(op.aux));
    store_masked(cpu, op, value.to_le_bytes(), mask.to_le_bytes())
}

fn maskmovq(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    let (value, mask) = (cpu.mm(op.src), cpu.mm(op.aux));
    store_masked(cpu, op, value.to_le_bytes(), mask.to_le_bytes())?;
    cpu.enter_mmx();
    Ok(Then::Next)
}
