//! Floats: arithmetic, comparison, rounding, and the exceptions of MXCSR. SDM Vol. 1 "SIMD Floating-Point Exceptions"
//! and "Guidelines for SIMD Floating-Point Exception Handling"; Vol. 2, the page of each mnemonic.
//!
//! The host computes with everything masked and says which exceptions there were. Where the guest has unmasked one of
//! them, nothing is committed but the flags.
#![expect(
    unsafe_code,
    reason = "hot semantics run on the dispatch's raw CPU pointer; rows expand to host instructions"
)]

use std::marker::PhantomData;

use iced_x86::{Code as C, Mnemonic as M};

use super::{M32, M64, M128, Source, by_heat, keeps, lacking, source, sse};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{Digest, FlagsOut, Lowered};
use crate::fault::Fault;
use crate::flags::Flags;
use crate::host::HostWord;
use crate::host_simd::{
    self, CONTROL, Compared, DEFAULT, FLAGS, Float, Under, V, float_compare_impl, float_xmm_impl, from_u128, to_u128,
};
use crate::isa::{Row, by_form, codes, plain_handler, row};
use crate::op::{Exact, Form, Handler, Machine, Op, Semantics, To, attempt, handler};

/// `op xmm, xmm/mem`: what it reads of memory; what lanes of the result may be tiny; a feature needed beyond SSE2.
macro_rules! float {
    ($name:literal, M128, $tiny:ident $(, $feature:tt)?) => {
        $crate::isa::simd::float::float!(@ $name, packed, M128, $tiny $(, $feature)?)
    };
    ($name:literal, $S:ident, $tiny:ident $(, $feature:tt)?) => {
        $crate::isa::simd::float::float!(@ $name, scalar, $S, $tiny $(, $feature)?)
    };
    (@ $name:literal, $selector:ident, $S:ident, $tiny:ident) => {{
        struct I;
        float_xmm_impl!([] I, $tiny, $name, "");
        $crate::isa::simd::float::$selector::<I, $crate::isa::simd::$S>
    }};
    (@ $name:literal, $selector:ident, $S:ident, $tiny:ident, $feature:tt) => {{
        struct I;
        float_xmm_impl!([] I, $tiny, $name, "");
        |d: &Digest<'_>| {
            if std::arch::is_x86_feature_detected!($feature) {
                $crate::isa::simd::float::$selector::<I, $crate::isa::simd::$S>(d)
            } else {
                lacking(d)
            }
        }
    }};
}
pub(super) use float;

/// `impl Float` for `op xmm, xmm/mem, imm8`, with one host instruction for each of the `N` immediates that differ.
/// `$steps`: its [`Float::has_tiny_step`].
macro_rules! float_imm_impl {
    ($I:ident, $name:literal, $tiny:ident, $N:literal, $table:ident $(, $steps:expr)?) => {
        pub(super) struct $I;
        const _: () = {
            struct One<const IMM: u8>;
    float_xmm_impl!([<const IMM: u8>] One<IMM>, $tiny, $name, ", {IMM}", IMM);
            impl Float for $I {
                type In = V;
                type Out = V;
                #[inline(always)]
                unsafe fn eval(a: V, b: V, imm: u8, mxcsr: *mut u32) -> V {
                    static TABLE: [unsafe fn(V, V, u8, *mut u32) -> V; $N] = $table!(One, eval);
                    // SAFETY: the caller's.
                    unsafe { TABLE[usize::from(imm) & ($N - 1)](a, b, imm, mxcsr) }
                }
                fn eval_under(a: V, b: V, imm: u8, under: &mut Under) -> V {
                    static TABLE: [fn(V, V, u8, &mut Under) -> V; $N] = $table!(One, eval_under);
                    TABLE[usize::from(imm) & ($N - 1)](a, b, imm, under)
                }
                fn is_tiny(out: V) -> bool {
                    host_simd::tiny::$tiny(out)
                }
                $(fn has_tiny_step(a: V, b: V, imm: u8, run: u32) -> bool {
                    $steps(a, b, imm, run)
                })?
            }
        };
    };
}

/// Row's selector of such an instruction: what it reads of memory; a feature.
macro_rules! float_imm {
    ($I:ident, $S:ident, $feature:tt) => {
        |d: &Digest<'_>| if std::arch::is_x86_feature_detected!($feature) { packed::<$I, $S>(d) } else { lacking(d) }
    };
}

macro_rules! table_8 {
    ($One:ident, $f:ident) => {
        [
            $One::<0>::$f,
            $One::<1>::$f,
            $One::<2>::$f,
            $One::<3>::$f,
            $One::<4>::$f,
            $One::<5>::$f,
            $One::<6>::$f,
            $One::<7>::$f,
        ]
    };
}

macro_rules! table_16 {
    ($One:ident, $f:ident) => {
        [
            $One::<0>::$f,
            $One::<1>::$f,
            $One::<2>::$f,
            $One::<3>::$f,
            $One::<4>::$f,
            $One::<5>::$f,
            $One::<6>::$f,
            $One::<7>::$f,
            $One::<8>::$f,
            $One::<9>::$f,
            $One::<10>::$f,
            $One::<11>::$f,
            $One::<12>::$f,
            $One::<13>::$f,
            $One::<14>::$f,
            $One::<15>::$f,
        ]
    };
}

/// All 256 immediates.
macro_rules! table_256 {
    (@16 $One:ident, $f:ident, $($h:literal)*) => {
        [$($One::<{ $h }>::$f, $One::<{ $h + 1 }>::$f, $One::<{ $h + 2 }>::$f, $One::<{ $h + 3 }>::$f,
           $One::<{ $h + 4 }>::$f, $One::<{ $h + 5 }>::$f, $One::<{ $h + 6 }>::$f, $One::<{ $h + 7 }>::$f,
           $One::<{ $h + 8 }>::$f, $One::<{ $h + 9 }>::$f, $One::<{ $h + 10 }>::$f, $One::<{ $h + 11 }>::$f,
           $One::<{ $h + 12 }>::$f, $One::<{ $h + 13 }>::$f, $One::<{ $h + 14 }>::$f, $One::<{ $h + 15 }>::$f),*]
    };
    ($One:ident, $f:ident) => {
        table_256!(@16 $One, $f, 0 16 32 48 64 80 96 112 128 144 160 176 192 208 224 240)
    };
}

/// `op xmm, xmm/mem`, result in ZF, PF and CF.
macro_rules! compare {
    ($name:literal, $S:ident) => {{
        struct I;
        float_compare_impl!(I, $name);
        compare::<I, $S>
    }};
}

float_imm_impl!(Cmpps, "cmpps", never, 8, table_8);
float_imm_impl!(Cmppd, "cmppd", never, 8, table_8);
float_imm_impl!(Cmpss, "cmpss", never, 8, table_8);
float_imm_impl!(Cmpsd, "cmpsd", never, 8, table_8);
float_imm_impl!(Roundps, "roundps", never, 16, table_16);
float_imm_impl!(Roundpd, "roundpd", never, 16, table_16);
float_imm_impl!(Roundss, "roundss", never, 16, table_16);
float_imm_impl!(Roundsd, "roundsd", never, 16, table_16);
float_imm_impl!(Dpps, "dpps", ps, 256, table_256, tiny_step::<Mulps, Haddps, 4>);
float_imm_impl!(Dppd, "dppd", pd, 256, table_256, tiny_step::<Mulpd, Haddpd, 2>);
float_imm_impl!(Mpsadbw, "mpsadbw", never, 8, table_8);

struct Mulps;
struct Mulpd;
struct Haddps;
struct Haddpd;
float_xmm_impl!([] Mulps, ps, "mulps", "");
float_xmm_impl!([] Mulpd, pd, "mulpd", "");
float_xmm_impl!([] Haddps, ps, "haddps", "");
float_xmm_impl!([] Haddpd, pd, "haddpd", "");

/// Whether a product or a sum of a dot product is denormal: those of the lanes that the immediate's upper half chooses, then
/// neighbours added, then these (SDM Vol. 2 "DPPS", DP_primitive). The host has HADDPS where it has DPPS.
#[cold]
fn tiny_step<Mul, Hadd, const LANES: u32>(a: V, b: V, imm: u8, run: u32) -> bool
where
    Mul: Float<In = V, Out = V>,
    Hadd: Float<In = V, Out = V>,
{
    let mut under = Under { run, found: 0, back: DEFAULT };
    let bits = 128 / LANES;
    let lane = |i: u32| u128::MAX >> (128 - bits) << (bits * i);
    let chosen = (0..LANES).filter(|i| imm >> (4 + i) & 1 != 0).fold(0, |mask, i| mask | lane(i));
    let mut terms = from_u128(to_u128(Mul::eval_under(a, b, 0, &mut under)) & chosen);
    let mut tiny = Mul::is_tiny(terms);
    for _ in 0..LANES.ilog2() {
        terms = Hadd::eval_under(terms, terms, 0, &mut under);
        tiny |= Hadd::is_tiny(terms);
    }
    tiny
}

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Addps, float!("addps", M128, ps)),
    row(M::Addpd, float!("addpd", M128, pd)),
    row(M::Addss, float!("addss", M32, ss)),
    row(M::Addsd, float!("addsd", M64, sd)),
    row(M::Subps, float!("subps", M128, ps)),
    row(M::Subpd, float!("subpd", M128, pd)),
    row(M::Subss, float!("subss", M32, ss)),
    row(M::Subsd, float!("subsd", M64, sd)),
    row(M::Mulps, float!("mulps", M128, ps)),
    row(M::Mulpd, float!("mulpd", M128, pd)),
    row(M::Mulss, float!("mulss", M32, ss)),
    row(M::Mulsd, float!("mulsd", M64, sd)),
    row(M::Divps, float!("divps", M128, ps)),
    row(M::Divpd, float!("divpd", M128, pd)),
    row(M::Divss, float!("divss", M32, ss)),
    row(M::Divsd, float!("divsd", M64, sd)),
    row(M::Sqrtps, float!("sqrtps", M128, never)),
    row(M::Sqrtpd, float!("sqrtpd", M128, never)),
    row(M::Sqrtss, float!("sqrtss", M32, never)),
    row(M::Sqrtsd, float!("sqrtsd", M64, never)),
    row(M::Minps, float!("minps", M128, never)),
    row(M::Minpd, float!("minpd", M128, never)),
    row(M::Minss, float!("minss", M32, never)),
    row(M::Minsd, float!("minsd", M64, never)),
    row(M::Maxps, float!("maxps", M128, never)),
    row(M::Maxpd, float!("maxpd", M128, never)),
    row(M::Maxss, float!("maxss", M32, never)),
    row(M::Maxsd, float!("maxsd", M64, never)),
    row(M::Addsubps, float!("addsubps", M128, ps, "sse3")),
    row(M::Addsubpd, float!("addsubpd", M128, pd, "sse3")),
    row(M::Haddps, float!("haddps", M128, ps, "sse3")),
    row(M::Haddpd, float!("haddpd", M128, pd, "sse3")),
    row(M::Hsubps, float!("hsubps", M128, ps, "sse3")),
    row(M::Hsubpd, float!("hsubpd", M128, pd, "sse3")),
    row(M::Cmpps, float_imm!(Cmpps, M128, "sse2")),
    row(M::Cmppd, float_imm!(Cmppd, M128, "sse2")),
    row(M::Cmpss, float_imm!(Cmpss, M32, "sse2")),
    // The mnemonic is the string instruction's too.
    codes(&[C::Cmpsd_xmm_xmmm64_imm8], float_imm!(Cmpsd, M64, "sse2")),
    row(M::Roundps, float_imm!(Roundps, M128, "sse4.1")),
    row(M::Roundpd, float_imm!(Roundpd, M128, "sse4.1")),
    row(M::Roundss, float_imm!(Roundss, M32, "sse4.1")),
    row(M::Roundsd, float_imm!(Roundsd, M64, "sse4.1")),
    row(M::Dpps, float_imm!(Dpps, M128, "sse4.1")),
    row(M::Dppd, float_imm!(Dppd, M128, "sse4.1")),
    // Integers, and MXCSR is not looked at: here for its immediate.
    row(M::Mpsadbw, float_imm!(Mpsadbw, M128, "sse4.1")),
    row(M::Comiss, compare!("comiss", M32)),
    row(M::Comisd, compare!("comisd", M64)),
    row(M::Ucomiss, compare!("ucomiss", M32)),
    row(M::Ucomisd, compare!("ucomisd", M64)),
];

/// MXCSR: FZ.
pub(super) const FZ: u32 = 1 << 15;
/// MXCSR: all six masks.
const MASKS: u32 = 0x1f80;
/// Flags that are known before anything is computed: IE DE ZE.
const BEFORE: u32 = 7;
const OE: u32 = 1 << 3;
const UE: u32 = 1 << 4;
const PE: u32 = 1 << 5;

/// A float result under any MXCSR; the fault, and the flags, where an exception is unmasked.
pub(super) fn careful<I: Float>(cpu: &mut Cpu, a: V, b: I::In, imm: u8) -> Result<I::Out, Stop> {
    let mut under = under(cpu);
    let out = I::eval_under(a, b, imm, &mut under);
    let tiny = || I::is_tiny(out) || I::has_tiny_step(a, b, imm, under.run);
    settle(cpu, under.found, tiny, |mxcsr| I::is_inexact_unbounded(a, b, mxcsr))?;
    Ok(out)
}

/// Under what the host computes for the guest's MXCSR: everything masked, no flag set.
pub(super) fn under(cpu: &Cpu) -> Under {
    let guest = cpu.fpu.mxcsr;
    // FZ holds only while underflow is masked (SDM Vol. 1 "Flush-To-Zero").
    let unmasked_underflow = guest >> 7 & UE == 0;
    // Every bit below CONTROL is a flag, and starts clear.
    let run = (guest & CONTROL | MASKS) & if unmasked_underflow { !FZ } else { !0 };
    Under { run, found: 0, back: DEFAULT }
}

/// Sets the flags of a computation that `found` these exceptions; the fault where one is unmasked. `tiny`: part of the
/// result is denormal. `inexact`: as [`Float::is_inexact_unbounded`].
pub(super) fn settle(
    cpu: &mut Cpu,
    found: u32,
    tiny: impl FnOnce() -> bool,
    inexact: impl FnOnce(u32) -> Option<bool>,
) -> Result<(), Stop> {
    let guest = cpu.fpu.mxcsr;
    let unmasked = !(guest >> 7) & FLAGS;
    let mut raised = found & FLAGS;
    if unmasked & UE != 0 && tiny() {
        // Unmasked underflow does not ask whether the result is exact.
        raised |= UE;
    }
    if raised & unmasked & (OE | UE) != 0
        && raised & !unmasked & (OE | UE) == 0
        && let Some(inexact) = inexact(guest)
    {
        // The trap handler gets the result with an adjusted exponent; PE tells whether that one was rounded.
        raised = if inexact { raised | PE } else { raised & !PE };
    }
    let before = raised & unmasked & BEFORE;
    if before != 0 {
        // Exceptions found before computing stop it, so no others are known.
        raised &= BEFORE;
    }
    cpu.set_mxcsr(guest | raised);
    if raised & unmasked == 0 {
        return Ok(());
    }
    let reported = cpu.cr4.contains(x86_defs::Cr4::OSXMMEXCPT);
    Err(cpu.fault(if reported { Fault::XM } else { Fault::UD }))
}

/// Where the second operand comes from.
pub(super) trait Operand<T: Copy>: 'static {
    /// The same operand, whatever the form that its address is made in.
    type Any: Operand<T>;
    fn hot(m: &mut Machine) -> Result<T, To>;
    fn exact(cpu: &mut Cpu, op: &Op) -> Result<T, Stop>;
}

/// Where the result goes.
pub(super) trait Sink: Copy + 'static {
    fn hot(m: &mut Machine, out: Self);
    fn exact(cpu: &mut Cpu, op: &Op, out: Self);
}

/// An XMM register, or a general one.
pub(super) struct Reg;
/// A memory operand.
pub(super) struct Mem<S, F>(PhantomData<(S, F)>);

impl Operand<V> for Reg {
    type Any = Self;
    #[inline(always)]
    fn hot(m: &mut Machine) -> Result<V, To> {
        Ok(m.xmm(m.op().src))
    }
    fn exact(cpu: &mut Cpu, op: &Op) -> Result<V, Stop> {
        Ok(host_simd::from_u128(cpu.xmm(op.src)))
    }
}

impl<S: Source, F: Form> Operand<V> for Mem<S, F> {
    type Any = Mem<S, Exact>;
    #[inline(always)]
    fn hot(m: &mut Machine) -> Result<V, To> {
        source::<S, F>(m)
    }
    fn exact(cpu: &mut Cpu, op: &Op) -> Result<V, Stop> {
        let la = cpu.operand_address(op, S::BYTES, false)?;
        S::load_exact(cpu, la, op.segment())
    }
}

impl<W: HostWord> Operand<W> for Reg {
    type Any = Self;
    #[inline(always)]
    fn hot(m: &mut Machine) -> Result<W, To> {
        Ok(m.get(m.op().src))
    }
    fn exact(cpu: &mut Cpu, op: &Op) -> Result<W, Stop> {
        Ok(cpu.get(op.src))
    }
}

/// A general operand in memory.
pub(super) struct MemGeneral<F>(PhantomData<F>);
impl<W: HostWord, F: Form> Operand<W> for MemGeneral<F> {
    type Any = MemGeneral<Exact>;
    #[inline(always)]
    fn hot(m: &mut Machine) -> Result<W, To> {
        // SAFETY: `m` is the dispatch's.
        let la = unsafe { F::linear(m, W::BYTES, false) }?;
        m.load::<F, W>(la)
    }
    fn exact(cpu: &mut Cpu, op: &Op) -> Result<W, Stop> {
        cpu.read_operand(op)
    }
}

impl Sink for V {
    #[inline(always)]
    fn hot(m: &mut Machine, out: Self) {
        m.set_xmm(m.op().dst, out);
    }
    fn exact(cpu: &mut Cpu, op: &Op, out: Self) {
        cpu.set_xmm(op.dst, host_simd::to_u128(out));
    }
}

impl Sink for u32 {
    #[inline(always)]
    fn hot(m: &mut Machine, out: Self) {
        m.put(m.op().dst, out);
    }
    fn exact(cpu: &mut Cpu, op: &Op, out: Self) {
        cpu.put(op.dst, out);
    }
}

impl Sink for u64 {
    #[inline(always)]
    fn hot(m: &mut Machine, out: Self) {
        m.put(m.op().dst, out);
    }
    fn exact(cpu: &mut Cpu, op: &Op, out: Self) {
        cpu.put(op.dst, out);
    }
}

impl Sink for Compared {
    #[inline(always)]
    fn hot(m: &mut Machine, out: Self) {
        m.set_flags(Flags::explicit(out.0));
    }
    fn exact(cpu: &mut Cpu, _: &Op, out: Self) {
        cpu.set_flags(Flags::explicit(out.0));
    }
}

/// `I` on the destination register and operand `O`.
pub(super) struct Compute<I, O>(PhantomData<(I, O)>);

impl<I: Float<Out: Sink>, O: Operand<I::In>> Semantics for Compute<I, O> {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        attempt!(sse(m));
        // SAFETY: `cpu` is the running CPU.
        let mxcsr = unsafe { &raw mut (*m.cpu).fpu.mxcsr };
        // SAFETY: as above.
        if unsafe { mxcsr.read() } & CONTROL != DEFAULT {
            return To::Other(plain_handler(compute_careful::<I, O::Any>));
        }
        let b = attempt!(O::hot(m));
        let (a, imm) = (m.xmm(m.op().dst), m.op().imm as u8);
        // SAFETY: `mxcsr` is the guest's, which under these control bits the host's follows.
        let out = unsafe { I::eval(a, b, imm, mxcsr) };
        I::Out::hot(m, out);
        To::Next
    }
}

fn compute_careful<I: Float<Out: Sink>, O: Operand<I::In>>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_sse()?;
    let b = O::exact(cpu, op)?;
    let a = host_simd::from_u128(cpu.xmm(op.dst));
    let out = careful::<I>(cpu, a, b, op.imm as u8)?;
    I::Out::exact(cpu, op, out);
    Ok(Then::Next)
}

/// Selector for a packed operand.
pub(super) fn packed<I: Float<In = V, Out: Sink>, S: Source>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = || by_heat!(d, F => handler::<Compute<I, Mem<S, F>>> as Handler);
    keeps(d, if d.is_mem(1) { mem() } else { handler::<Compute<I, Reg>> })
}

/// Selector for a scalar operand: in memory they are what compilers make most of.
pub(super) fn scalar<I: Float<In = V, Out: Sink>, S: Source>(d: &Digest<'_>) -> Option<Lowered> {
    let mem = || by_form!(d, F => handler::<Compute<I, Mem<S, F>>> as Handler);
    keeps(d, if d.is_mem(1) { mem() } else { handler::<Compute<I, Reg>> })
}

fn compare<I: Float<In = V, Out = Compared>, S: Source>(d: &Digest<'_>) -> Option<Lowered> {
    Some(Lowered { flags: FlagsOut::Unknown, ..scalar::<I, S>(d)? })
}
