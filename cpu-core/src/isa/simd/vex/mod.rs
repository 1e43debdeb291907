//! AVX to VAES: what the VEX-encoded families share. SDM Vol. 1 "Programming with Intel AVX, FMA, and Intel AVX2"; Vol. 2
//! "Exceptions Type of Intel AVX Instructions" and the page of each mnemonic.
//!
//! A memory operand is loaded by an op handler of its own into [`Cpu::memory_vector`], which then goes on to the handler
//! of the register form: so a row costs two handlers, for 128 and for 256 bits, whatever its addresses look like.
#![expect(unsafe_code, reason = "hot semantics run on the dispatch's raw CPU pointer")]

pub(in crate::isa) mod convert;
pub(in crate::isa) mod float;
pub(in crate::isa) mod fma;
pub(in crate::isa) mod gather;
pub(in crate::isa) mod integer;
pub(in crate::isa) mod moves;
pub(in crate::isa) mod shuffle;
#[cfg(test)]
mod tests;

use std::marker::PhantomData;

use iced_x86::{CpuidFeature, Mnemonic};

use super::{M16, M32, M64, M128Unaligned, Narrow, Source, keeps, lacking};
use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::decode::digest::{Digest, Lowered, Select, slot};
use crate::fault::Fault;
use crate::host_simd::{self, CONTROL, DEFAULT, V};
use crate::host_vex::{self, Vex, VexFloat};
use crate::isa::{Key, Row, by_form, plain_handler};
use crate::op::{Form, Handler, Machine, Op, Semantics, Stored, To, attempt, handler};
use crate::state::VectorRegister;

/// A row for the VEX encodings of a mnemonic; EVEX shares the name.
pub(super) const fn vex(mnemonic: Mnemonic, select: Select) -> Row {
    Row { key: Key::Vex(mnemonic), select }
}

const AVX_BLOCKED: u8 = fp_gate::TS | fp_gate::NO_AVX;
/// In `Op::aux`: the operand is [`Cpu::memory_vector`].
const MEMORY: u8 = 16;
/// Behind the immediate in `Op::imm`: bytes of the memory operand.
const BYTES_AT: u32 = 8;
/// In `Op::imm`: 256 bits.
const WIDE: u64 = 1 << 16;

/// Whether an op that [`plain`] lowered has a memory operand: a register's number says nothing in the general file.
fn has_memory(op: &Op) -> bool {
    op.imm >> BYTES_AT & 0xff != 0
}

/// A vector as two numbers, the lower half first.
pub(super) type Halves = [u128; 2];

fn halves(register: &VectorRegister) -> Halves {
    let half = |at: usize| {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&register.0[at..at + 16]);
        u128::from_le_bytes(bytes)
    };
    [half(0), half(16)]
}

fn register(halves: Halves) -> VectorRegister {
    let mut register = VectorRegister::default();
    register.0[..16].copy_from_slice(&halves[0].to_le_bytes());
    register.0[16..32].copy_from_slice(&halves[1].to_le_bytes());
    register
}

/// Whether the host has an encoding's features, as far as they are vectors'.
fn host_has(d: &Digest<'_>) -> bool {
    d.ins.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::VAES => is_x86_feature_detected!("vaes"),
        CpuidFeature::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        CpuidFeature::AVX_VNNI => is_x86_feature_detected!("avxvnni"),
        _ => true,
    })
}

/// An operand of the instruction has 256 bits.
fn is_wide(d: &Digest<'_>) -> bool {
    (0..d.ins.op_count()).any(|i| d.is_reg(i) && d.reg(i).is_ymm() || d.is_mem(i) && d.bytes(i) == 32)
}

impl Cpu {
    /// #UD or #NM where CR4, XCR0, CR0 or the mode do not let VEX-encoded vector instructions run.
    #[inline(always)]
    pub(super) fn require_avx(&mut self) -> Result<(), Stop> {
        if self.fp_gate & AVX_BLOCKED == 0 { Ok(()) } else { Err(self.avx_blocked()) }
    }

    #[cold]
    #[inline(never)]
    fn avx_blocked(&mut self) -> Stop {
        let fault = if self.fp_gate & fp_gate::NO_AVX != 0 { Fault::UD } else { Fault::NM };
        self.fault(fault)
    }

    /// YMMn.
    fn ymm(&self, n: u8) -> Halves {
        halves(&self.fpu.vector[usize::from(n & 15)])
    }

    /// Writes YMMn, and zeros above it.
    fn set_ymm(&mut self, n: u8, value: Halves) {
        self.fpu.vector[usize::from(n & 15)] = register(value);
    }

    /// The last vector operand of an op that [`plain`] lowered.
    fn last_operand(&mut self, op: &Op) -> Result<Halves, Stop> {
        if op.aux != MEMORY {
            return Ok(self.ymm(op.aux));
        }
        match (op.imm >> BYTES_AT) as usize & 0xff {
            1 => Ok([self.read_operand::<u8>(op)?.into(), 0]),
            2 => Ok([self.read_operand::<u16>(op)?.into(), 0]),
            4 => Ok([self.read_operand::<u32>(op)?.into(), 0]),
            8 => Ok([self.read_operand::<u64>(op)?.into(), 0]),
            bytes => {
                let mut value = VectorRegister::default();
                let at = self.ea(op);
                self.read_bytes(op.segment(), at, &mut value.0[..bytes])?;
                Ok(halves(&value))
            }
        }
    }
}

/// #UD or #NM where VEX-encoded vector instructions may not run.
#[inline(always)]
fn avx(m: &mut Machine) -> Result<(), To> {
    fn refuse(cpu: &mut Cpu, _: &Op) -> Done {
        cpu.require_avx()?;
        Ok(Then::Again)
    }
    if m.cpu().fp_gate & AVX_BLOCKED == 0 { Ok(()) } else { Err(To::Other(plain_handler(refuse))) }
}

impl Machine {
    /// Vector register `n`.
    #[inline(always)]
    fn vector(&self, n: u8) -> *mut VectorRegister {
        // SAFETY: `cpu` is the running CPU; the index is below 16.
        unsafe { &raw mut (*self.cpu).fpu.vector[usize::from(n & 15)] }
    }

    /// The memory operand.
    #[inline(always)]
    fn memory_vector(&self) -> *mut VectorRegister {
        // SAFETY: `cpu` is the running CPU.
        unsafe { &raw mut (*self.cpu).memory_vector }
    }

    /// Vector register `n`, or the memory operand for [`MEMORY`].
    #[inline(always)]
    fn vector_or_memory(&self, n: u8) -> *mut VectorRegister {
        if n == MEMORY { self.memory_vector() } else { self.vector(n) }
    }

    /// Loads 32 bytes from a linear address into `to`.
    #[inline(always)]
    fn load_32<F: Form>(&mut self, la: u64, to: *mut VectorRegister) -> Result<(), To> {
        let seg = self.op().segment();
        let cpu = self.cpu();
        if !F::HOT {
            let mut value = VectorRegister::default();
            cpu.load_bytes(la, &mut value.0[..32], seg).map_err(|Stop| To::Stop)?;
            // SAFETY: a vector register of the CPU.
            unsafe { to.write(value) };
            return Ok(());
        }
        match cpu.tlb.read(la, 32) {
            // SAFETY: a TLB hit names mapped RAM of a slot that the CPU's view keeps alive; `to` is one of ours.
            Some(host) => unsafe { host_vex::load_32(host, to) },
            None => return Err(To::Miss { la, size: 32, write: false }),
        }
        Ok(())
    }

    /// Stores 32 bytes of `from` to a linear address.
    #[inline(always)]
    fn store_32<F: Form>(&mut self, la: u64, from: *const VectorRegister) -> Result<Stored, To> {
        let seg = self.op().segment();
        let cpu = self.cpu();
        if !F::HOT {
            // SAFETY: a vector register of the CPU.
            let value = unsafe { from.read() };
            return match cpu.store_bytes(la, &value.0[..32], seg) {
                Ok(()) if cpu.leave => Ok(Stored::Elsewhere),
                Ok(()) => Ok(Stored::Ram),
                Err(Stop) => Err(To::Stop),
            };
        }
        match cpu.tlb.write(la, 32) {
            // SAFETY: a TLB hit names mapped, writable RAM of a slot that the CPU's view keeps alive.
            Some(host) => unsafe { host_vex::store_32(host, from) },
            None => return Err(To::Miss { la, size: 32, write: true }),
        }
        Ok(Stored::Ram)
    }
}

/// A memory operand that goes into a vector register.
trait Operand: 'static {
    const BYTES: u32;
    /// Loads it from a linear address into `to`; what lies above is left to chance.
    fn load<F: Form>(m: &mut Machine, la: u64, to: *mut VectorRegister) -> Result<(), To>;
}

impl<S: Source> Operand for S {
    const BYTES: u32 = S::BYTES;
    #[inline(always)]
    fn load<F: Form>(m: &mut Machine, la: u64, to: *mut VectorRegister) -> Result<(), To> {
        let value = S::load::<F>(m, la)?;
        // SAFETY: a vector register is larger than and aligned as `V`.
        unsafe { to.cast::<V>().write(value) };
        Ok(())
    }
}

/// 32 bytes.
struct M256;
impl Operand for M256 {
    const BYTES: u32 = 32;
    #[inline(always)]
    fn load<F: Form>(m: &mut Machine, la: u64, to: *mut VectorRegister) -> Result<(), To> {
        m.load_32::<F>(la, to)
    }
}

/// Loads the memory operand, then is the op of the handler in `Op::imm`.
struct LoadFirst<S, F>(PhantomData<(S, F)>);
impl<S: Operand, F: Form> Semantics for LoadFirst<S, F> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        // SAFETY: `m` is the dispatch's.
        let la = attempt!(unsafe { F::linear(m, S::BYTES, false) });
        let to = m.memory_vector();
        attempt!(S::load::<F>(m, la, to));
        // SAFETY: `with_operands` put a handler there.
        To::Other(unsafe { std::mem::transmute::<u64, Handler>(m.op().imm) })
    }
}

fn load_first(d: &Digest<'_>, bytes: u32) -> Option<Handler> {
    Some(match bytes {
        1 => by_form!(d, F => handler::<LoadFirst<Narrow<u8>, F>>),
        2 => by_form!(d, F => handler::<LoadFirst<M16, F>>),
        4 => by_form!(d, F => handler::<LoadFirst<M32, F>>),
        8 => by_form!(d, F => handler::<LoadFirst<M64, F>>),
        16 => by_form!(d, F => handler::<LoadFirst<M128Unaligned, F>>),
        32 => by_form!(d, F => handler::<LoadFirst<M256, F>>),
        _ => return None,
    })
}

/// The op of `h`: `dst` and `src` as always, the last operand in `aux`, loaded first where it is memory.
fn with_operands(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    let mut lowered = keeps(d, h)?;
    let last = d.ins.op_count() - 1;
    lowered.op.aux = if d.is_mem(last) { MEMORY } else { slot(d.reg(last)) };
    if d.is_mem(last) {
        lowered.op.handler = load_first(d, d.bytes(last))?;
        lowered.op.imm = h as usize as u64;
    }
    Some(lowered)
}

/// The op of a plain function that takes its last vector operand from [`Cpu::last_operand`]. `imm` also tells its size
/// and whether anything has 256 bits; a register encoded in an immediate is `imm`.
fn plain(d: &Digest<'_>, h: Handler) -> Option<Lowered> {
    if !host_has(d) {
        return lacking(d);
    }
    let mut lowered = keeps(d, h)?;
    let mut last = d.ins.op_count() - 1;
    let op = &mut lowered.op;
    op.imm = if d.is_imm(last) { op.imm & 0xff } else { 0 };
    if d.is_imm(last) {
        last -= 1;
    } else if last == 3 {
        op.imm = slot(d.reg(last)).into();
        last -= 1;
    }
    op.aux = if d.is_mem(last) { MEMORY } else { slot(d.reg(last)) };
    // The decoder names a size for register forms too.
    let bytes = if (0..d.ins.op_count()).any(|i| d.is_mem(i)) { d.ins.memory_size().size() as u64 } else { 0 };
    op.imm |= bytes << BYTES_AT | if is_wide(d) { WIDE } else { 0 };
    Some(lowered)
}

/// `I` on the two sources.
struct Compute<I, const WIDE: bool>(PhantomData<I>);
impl<I: Vex, const WIDE: bool> Semantics for Compute<I, WIDE> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        let op = m.op();
        let (d, a, b) = (m.vector(op.dst), m.vector(op.src), m.vector_or_memory(op.aux));
        // SAFETY: vector registers of the CPU, to which no reference is alive; the selector has asked the host.
        unsafe { I::run::<WIDE>(d, a, b) };
        To::Next
    }
}

/// `I` on a source and the immediate.
struct ComputeImm<I, const WIDE: bool>(PhantomData<I>);
impl<I: Vex, const WIDE: bool> Semantics for ComputeImm<I, WIDE> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        let (op, b) = (m.op(), m.memory_vector());
        let (d, a, count) = (m.vector(op.dst), m.vector(op.src), host_simd::from_u128((op.imm & 0xff).into()));
        // SAFETY: a vector register is larger than and aligned as `V`.
        unsafe { b.cast::<V>().write(count) };
        // SAFETY: as in `Compute`.
        unsafe { I::run::<WIDE>(d, a, b) };
        To::Next
    }
}

/// `I` on the two sources, and the destination where it is a source too.
struct ComputeFloat<I, const WIDE: bool>(PhantomData<I>);
impl<I: VexFloat, const WIDE: bool> Semantics for ComputeFloat<I, WIDE> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(avx(m));
        // SAFETY: `cpu` is the running CPU.
        let mxcsr = unsafe { &raw mut (*m.cpu).fpu.mxcsr };
        // SAFETY: as above.
        if unsafe { mxcsr.read() } & CONTROL != DEFAULT {
            return To::Other(plain_handler(compute_careful::<I, WIDE>));
        }
        let op = m.op();
        let (d, a, b) = (m.vector(op.dst), m.vector(op.src), m.vector_or_memory(op.aux));
        // SAFETY: as in `Compute`; `mxcsr` is the guest's, which under these control bits the host's follows.
        unsafe { I::run::<WIDE>(d, a, b, mxcsr) };
        To::Next
    }
}

/// As [`ComputeFloat`] under any MXCSR; a memory operand has been loaded.
fn compute_careful<I: VexFloat, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let a = cpu.fpu.vector[usize::from(op.src & 15)];
    let b = if op.aux == MEMORY { cpu.memory_vector } else { cpu.fpu.vector[usize::from(op.aux & 15)] };
    let old = cpu.fpu.vector[usize::from(op.dst & 15)];
    cpu.fpu.vector[usize::from(op.dst & 15)] = careful::<I, WIDE>(cpu, old, a, b)?;
    Ok(Then::Next)
}

/// A float result under any MXCSR; the fault, and the flags, where an exception is unmasked.
fn careful<I: VexFloat, const WIDE: bool>(
    cpu: &mut Cpu,
    old: VectorRegister,
    a: VectorRegister,
    b: VectorRegister,
) -> Result<VectorRegister, Stop> {
    let mut under = super::float::under(cpu);
    let mut out = old;
    // SAFETY: vector registers of ours; the selector has asked the host.
    unsafe { I::run_under::<WIDE>(&mut out, &a, &b, &mut under) };
    let inexact = |mxcsr| I::is_inexact_unbounded([&old, &a, &b], WIDE, mxcsr);
    super::float::settle(cpu, under.found, || I::is_tiny(&out, WIDE), inexact)?;
    Ok(out)
}

/// Selector of `op ymm, ymm/mem` and of `op ymm, ymm, ymm/mem`.
pub(super) fn data<I: Vex>(d: &Digest<'_>) -> Option<Lowered> {
    if !host_has(d) {
        return lacking(d);
    }
    with_operands(d, if is_wide(d) { handler::<Compute<I, true>> } else { handler::<Compute<I, false>> })
}

/// As [`data`], where the last operand may be an immediate.
pub(super) fn data_or_imm<I: Vex>(d: &Digest<'_>) -> Option<Lowered> {
    if !host_has(d) || !d.is_imm(2) {
        return data::<I>(d);
    }
    keeps(d, if is_wide(d) { handler::<ComputeImm<I, true>> } else { handler::<ComputeImm<I, false>> })
}

/// As [`data`], for floats.
pub(super) fn floats<I: VexFloat>(d: &Digest<'_>) -> Option<Lowered> {
    if !host_has(d) {
        return lacking(d);
    }
    with_operands(d, if is_wide(d) { handler::<ComputeFloat<I, true>> } else { handler::<ComputeFloat<I, false>> })
}

/// Row's selector: `op a, a, b` of the host.
macro_rules! three {
    ($name:literal) => {{
        struct I;
        $crate::host_vex::vex_impl!(I, concat!($name, " xmm0, xmm0, xmm1"), concat!($name, " ymm0, ymm0, ymm1"));
        $crate::isa::simd::vex::data::<I>
    }};
}

/// As [`three`], for `op a, b`; the operands of the 256-bit form where they are of two sizes.
macro_rules! two {
    ($name:literal) => {
        $crate::isa::simd::vex::two!($name, "ymm0, ymm1")
    };
    ($name:literal, $wide:literal) => {
        $crate::isa::simd::vex::text!(concat!($name, " xmm0, xmm1"), concat!($name, " ", $wide))
    };
}

/// As [`three`], with the whole text of both forms.
macro_rules! text {
    ($x:expr, $y:expr) => {{
        struct I;
        $crate::host_vex::vex_impl!(I, $x, $y);
        $crate::isa::simd::vex::data::<I>
    }};
}
pub(in crate::isa::simd) use {text, three, two};
