//! MMX and SSE to SSE4.2, AES and SHA: what their families share. SDM Vol. 2, the page of each mnemonic; Vol. 1 chapters 9 to 12.
//!
//! Shapes (which operand is where, how wide, how aligned) are generic code here; a row names its instruction and a shape.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

pub(super) mod convert;
pub(super) mod evex;
pub(super) mod float;
pub(super) mod gfni;
pub(super) mod integer;
pub(super) mod moves;
pub(super) mod sha;
pub(super) mod shuffle;
pub(super) mod sse4;
pub(super) mod state;
#[cfg(test)]
mod tests;
pub(super) mod vex;
pub(super) mod xsave;

use std::marker::PhantomData;

use super::plain_handler;
use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::decode::digest::{Digest, Lowered};
use crate::fault::Fault;
use crate::host::HostWord;
use crate::host_simd::{self, Mm2, V, Xmm2};
use crate::op::{Form, Handler, Machine, Op, Semantics, Stored, To, attempt, handler};
use crate::state::Seg;

/// The op of an instruction that keeps RFLAGS' status flags and may fault.
pub(super) fn keeps(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    Some(Lowered { reads_flags: false, barrier: true, ..d.lower(h).keeps_flags() })
}

/// An instruction that the host, and so the guest's CPUID, lacks: #UD.
pub(super) fn lacking(d: &Digest<'_>) -> Option<Lowered> {
    fn undefined(cpu: &mut Cpu, _: &Op) -> Done {
        Err(cpu.fault(Fault::UD))
    }
    Some(d.lower(plain_handler(undefined)).ends())
}

const SSE_BLOCKED: u8 = fp_gate::TS | fp_gate::EM | fp_gate::NO_OSFXSR;
const MMX_BLOCKED: u8 = fp_gate::TS | fp_gate::EM;
/// FSW.ES: an unmasked x87 exception waits.
const FSW_ES: u16 = 1 << 7;

impl Cpu {
    /// #UD or #NM where CR0 and CR4 do not let SSE instructions run.
    #[inline(always)]
    pub(crate) fn require_sse(&mut self) -> Result<(), Stop> {
        if self.fp_gate & SSE_BLOCKED == 0 { Ok(()) } else { Err(self.blocked(fp_gate::EM | fp_gate::NO_OSFXSR)) }
    }

    /// #UD, #NM or the pending #MF that MMX instructions raise before anything else.
    #[inline(always)]
    pub(crate) fn require_mmx(&mut self) -> Result<(), Stop> {
        if self.fp_gate & MMX_BLOCKED != 0 {
            return Err(self.blocked(fp_gate::EM));
        }
        if self.fpu.fsw & FSW_ES != 0 { Err(self.fault(Fault::MF)) } else { Ok(()) }
    }

    #[cold]
    #[inline(never)]
    fn blocked(&mut self, undefined: u8) -> Stop {
        let fault = if self.fp_gate & undefined != 0 { Fault::UD } else { Fault::NM };
        self.fault(fault)
    }

    /// XMMn.
    #[inline(always)]
    pub(crate) fn xmm(&self, n: u8) -> u128 {
        let (low, _) = self.fpu.vector[usize::from(n & 15)].0.split_first_chunk::<16>().expect("64 bytes");
        u128::from_le_bytes(*low)
    }

    /// Writes XMMn; what lies above stays.
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, n: u8, value: u128) {
        self.fpu.vector[usize::from(n & 15)].0[..16].copy_from_slice(&value.to_le_bytes());
    }

    /// MMn.
    #[inline(always)]
    pub(crate) fn mm(&self, n: u8) -> u64 {
        let (low, _) = self.fpu.st[usize::from(n & 7)].split_first_chunk::<8>().expect("16 bytes");
        u64::from_le_bytes(*low)
    }

    /// Writes MMn: the exponent above it becomes all ones (SDM Vol. 1 "MMX Technology Programming Environment").
    #[inline(always)]
    pub(crate) fn set_mm(&mut self, n: u8, value: u64) {
        let value = u128::from(value) | 0xffff << 64;
        self.fpu.st[usize::from(n & 7)] = value.to_le_bytes();
    }

    /// What every MMX instruction but EMMS does to the x87 state: TOP 0, all registers valid.
    #[inline(always)]
    pub(crate) fn enter_mmx(&mut self) {
        self.fpu.fsw &= !(7 << 11);
        self.fpu.ftw = 0xff;
    }

    /// Linear address of the memory operand of `op`.
    #[inline(always)]
    pub(crate) fn operand_address(&mut self, op: &Op, size: u32, write: bool) -> Result<u64, Stop> {
        let offset = self.ea(op);
        self.linear(op.segment(), offset, size, write)
    }
}

impl Machine {
    /// The CPU, for one statement.
    #[inline(always)]
    pub(super) fn cpu(&mut self) -> &mut Cpu {
        // SAFETY: `cpu` is the running CPU, and the handler holds no other reference.
        unsafe { &mut *self.cpu }
    }

    #[inline(always)]
    fn xmm_at(&self, n: u8) -> *mut V {
        // SAFETY: `cpu` is the running CPU; the index is below 16, and a register is larger than and aligned as `V`.
        unsafe { (&raw mut (*self.cpu).fpu.vector[usize::from(n & 15)]).cast() }
    }

    /// XMMn.
    #[inline(always)]
    pub(super) fn xmm(&self, n: u8) -> V {
        // SAFETY: the register is initialised, and no other reference to the running CPU is alive.
        unsafe { self.xmm_at(n).read() }
    }

    /// Writes XMMn; what lies above stays.
    #[inline(always)]
    pub(super) fn set_xmm(&mut self, n: u8, value: V) {
        // SAFETY: the register is the running CPU's, to which no other reference is alive.
        unsafe { self.xmm_at(n).write(value) }
    }

    /// Loads 16 bytes from a linear address.
    #[inline(always)]
    pub(super) fn load_16<F: Form>(&mut self, la: u64) -> Result<V, To> {
        let seg = self.op().segment();
        let cpu = self.cpu();
        if !F::HOT {
            return cpu.load_16(la, seg).map_err(|Stop| To::Stop);
        }
        match cpu.tlb.read(la, 16) {
            // SAFETY: a TLB hit names mapped RAM of a slot that the CPU's view keeps alive.
            Some(host) => Ok(unsafe { host_simd::load(host) }),
            None => Err(To::Miss { la, size: 16, write: false }),
        }
    }

    /// Stores 16 bytes to a linear address.
    #[inline(always)]
    pub(super) fn store_16<F: Form>(&mut self, la: u64, value: V) -> Result<Stored, To> {
        let seg = self.op().segment();
        let cpu = self.cpu();
        if !F::HOT {
            return match cpu.store_16(la, value, seg) {
                Ok(()) if cpu.leave => Ok(Stored::Elsewhere),
                Ok(()) => Ok(Stored::Ram),
                Err(Stop) => Err(To::Stop),
            };
        }
        match cpu.tlb.write(la, 16) {
            // SAFETY: a TLB hit names mapped, writable RAM of a slot that the CPU's view keeps alive.
            Some(host) => unsafe { host_simd::store(host, value) },
            None => return Err(To::Miss { la, size: 16, write: true }),
        }
        Ok(Stored::Ram)
    }
}

/// #GP(0) for a 16-byte access at `la` that is not aligned.
#[inline(always)]
pub(super) fn aligned(la: u64) -> Result<(), To> {
    fn misaligned(cpu: &mut Cpu, _: &Op) -> Done {
        Err(cpu.fault(Fault::gp(0)))
    }
    if la & 15 == 0 { Ok(()) } else { Err(To::Other(plain_handler(misaligned))) }
}

/// A memory operand of a vector instruction.
pub(crate) trait Source: 'static {
    /// Bytes read.
    const BYTES: u32;
    /// Loads them into the low end of a vector, zeros above.
    fn load<F: Form>(m: &mut Machine, la: u64) -> Result<V, To>;
    /// As [`Self::load`], wherever it leads.
    fn load_exact(cpu: &mut Cpu, la: u64, seg: Seg) -> Result<V, Stop>;
}

/// 16 bytes, aligned.
pub(crate) struct M128;
/// 16 bytes, anywhere.
pub(crate) struct M128Unaligned;
/// 1 to 8 bytes, zeros above.
pub(crate) struct Narrow<W>(PhantomData<W>);

impl Source for M128 {
    const BYTES: u32 = 16;
    #[inline(always)]
    fn load<F: Form>(m: &mut Machine, la: u64) -> Result<V, To> {
        aligned(la)?;
        m.load_16::<F>(la)
    }
    fn load_exact(cpu: &mut Cpu, la: u64, seg: Seg) -> Result<V, Stop> {
        cpu.require_aligned(la, 16)?;
        cpu.load_16(la, seg)
    }
}
impl Source for M128Unaligned {
    const BYTES: u32 = 16;
    #[inline(always)]
    fn load<F: Form>(m: &mut Machine, la: u64) -> Result<V, To> {
        m.load_16::<F>(la)
    }
    fn load_exact(cpu: &mut Cpu, la: u64, seg: Seg) -> Result<V, Stop> {
        cpu.load_16(la, seg)
    }
}
impl<W: HostWord> Source for Narrow<W> {
    const BYTES: u32 = W::BYTES;
    #[inline(always)]
    fn load<F: Form>(m: &mut Machine, la: u64) -> Result<V, To> {
        Ok(host_simd::from_u128(m.load::<F, W>(la)?.zext().into()))
    }
    fn load_exact(cpu: &mut Cpu, la: u64, seg: Seg) -> Result<V, Stop> {
        Ok(host_simd::from_u128(cpu.load::<W>(la, seg)?.zext().into()))
    }
}

/// The memory operand of `m`'s op.
#[inline(always)]
pub(super) fn source<S: Source, F: Form>(m: &mut Machine) -> Result<V, To> {
    // SAFETY: `m` is the dispatch's.
    let la = unsafe { F::linear(m, S::BYTES, false) }?;
    S::load::<F>(m, la)
}

/// 8 bytes.
pub(crate) type M64 = Narrow<u64>;
/// 4 bytes.
pub(crate) type M32 = Narrow<u32>;
/// 2 bytes.
pub(crate) type M16 = Narrow<u16>;

/// Picks the form of the memory operand where two will do: hot, or exact.
macro_rules! by_heat {
    ($digest:expr, $F:ident => $handler:expr) => {
        if $digest.exact {
            type $F = $crate::op::Exact;
            $handler
        } else {
            type $F = $crate::op::General;
            $handler
        }
    };
}
pub(super) use by_heat;

/// #UD or #NM where CR0 and CR4 do not let SSE run.
#[inline(always)]
pub(super) fn sse(m: &mut Machine) -> Result<(), To> {
    fn refuse(cpu: &mut Cpu, _: &Op) -> Done {
        cpu.require_sse()?;
        Ok(Then::Again)
    }
    if m.cpu().fp_gate & SSE_BLOCKED == 0 { Ok(()) } else { Err(To::Other(plain_handler(refuse))) }
}

// Two XMM operands, or one and memory, result in the first

struct XmmXmm<I>(PhantomData<I>);
struct XmmMem<I, S, F>(PhantomData<(I, S, F)>);
struct XmmImm<I>(PhantomData<I>);

impl<I: Xmm2> Semantics for XmmXmm<I> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let (dst, src) = (m.op().dst, m.op().src);
        let result = I::eval(m.xmm(dst), m.xmm(src));
        m.set_xmm(dst, result);
        To::Next
    }
}

impl<I: Xmm2, S: Source, F: Form> Semantics for XmmMem<I, S, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let src = attempt!(source::<S, F>(m));
        let dst = m.op().dst;
        let result = I::eval(m.xmm(dst), src);
        m.set_xmm(dst, result);
        To::Next
    }
}

impl<I: Xmm2> Semantics for XmmImm<I> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        let dst = m.op().dst;
        let result = I::eval(m.xmm(dst), host_simd::from_u128((m.op().imm & 0xff).into()));
        m.set_xmm(dst, result);
        To::Next
    }
}

/// Selector of `op xmm, xmm/mem` and of shifts by an immediate.
pub(super) fn xmm2<I: Xmm2, S: Source>(d: &Digest<'_>) -> Option<Lowered> {
    let h = match (d.is_mem(1), d.is_imm(1)) {
        (true, _) => by_heat!(d, F => handler::<XmmMem<I, S, F>> as Handler),
        (_, true) => handler::<XmmImm<I>>,
        _ => handler::<XmmXmm<I>>,
    };
    keeps(d, h)
}

/// Selector of an instruction that has an MMX and an XMM form.
pub(super) fn both2<I: Xmm2 + Mm2>(d: &Digest<'_>) -> Option<Lowered> {
    if !d.reg(0).is_mm() {
        return xmm2::<I, M128>(d);
    }
    keeps(d, mm2_handler::<I>(d)?)
}

fn mm2_handler<I: Mm2>(d: &Digest<'_>) -> Option<Handler> {
    Some(match (d.is_mem(1), d.is_imm(1)) {
        (true, _) if d.ins.memory_size().size() == 4 => plain_handler(mm_mem::<I, u32>),
        (true, _) => plain_handler(mm_mem::<I, u64>),
        (_, true) => plain_handler(mm_imm::<I>),
        _ => plain_handler(mm_mm::<I>),
    })
}

fn mm_mm<I: Mm2>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    mm_result::<I>(cpu, op, cpu.mm(op.src))
}

fn mm_imm<I: Mm2>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    mm_result::<I>(cpu, op, op.imm & 0xff)
}

fn mm_mem<I: Mm2, W: crate::host::HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_mmx()?;
    let src = cpu.read_operand::<W>(op)?.zext();
    mm_result::<I>(cpu, op, src)
}

fn mm_result<I: Mm2>(cpu: &mut Cpu, op: &Op, src: u64) -> Done {
    let result = I::eval(cpu.mm(op.dst), src);
    cpu.enter_mmx();
    cpu.set_mm(op.dst, result);
    Ok(Then::Next)
}

/// Row's selector: the XMM form of a host instruction, what it reads of memory if not 16 bytes, and a feature that it
/// needs beyond SSE2.
macro_rules! xmm {
    ($name:literal) => {
        $crate::isa::simd::xmm!($name, M128)
    };
    ($name:literal, $S:ident) => {{
        struct I;
        $crate::host_simd::xmm2_impl!(I, $name);
        $crate::isa::simd::xmm2::<I, $crate::isa::simd::$S>
    }};
    ($name:literal, $feature:tt) => {
        $crate::isa::simd::xmm!($name, M128, $feature)
    };
    ($name:literal, $S:ident, $feature:tt) => {{
        struct I;
        $crate::host_simd::xmm2_impl!(I, $name);
        |d: &$crate::decode::digest::Digest<'_>| {
            if std::arch::is_x86_feature_detected!($feature) {
                $crate::isa::simd::xmm2::<I, $crate::isa::simd::$S>(d)
            } else {
                $crate::isa::simd::lacking(d)
            }
        }
    }};
}

/// As [`xmm`], for an instruction that has an MMX form too.
macro_rules! both {
    ($name:literal) => {{
        struct I;
        $crate::host_simd::xmm2_impl!(I, $name);
        $crate::host_simd::mm2_impl!(I, $name);
        $crate::isa::simd::both2::<I>
    }};
    ($name:literal, $feature:tt) => {{
        struct I;
        $crate::host_simd::xmm2_impl!(I, $name);
        $crate::host_simd::mm2_impl!(I, $name);
        |d: &$crate::decode::digest::Digest<'_>| {
            if std::arch::is_x86_feature_detected!($feature) {
                $crate::isa::simd::both2::<I>(d)
            } else {
                $crate::isa::simd::lacking(d)
            }
        }
    }};
}
pub(super) use {both, xmm};
