//! XSAVE XSAVEOPT XSAVEC XSAVES XRSTOR XRSTORS. SDM Vol. 1 "Managing State Using the XSAVE Feature Set"; Vol. 2, the page of each mnemonic.
//! XGETBV and XSETBV are with the control registers.

use iced_x86::Mnemonic as M;

use super::keeps;
use super::state::{MXCSR_MASK, load_x87, put_x87};
use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::fault::Fault;
use crate::isa::{Row, plain_handler, row};
use crate::op::Op;
use crate::state::{Gpr, Seg, VectorRegister};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Xsave, |d| keeps(d, plain_handler(xsave::<Plain, false>))),
    row(M::Xsave64, |d| keeps(d, plain_handler(xsave::<Plain, true>))),
    row(M::Xsaveopt, |d| keeps(d, plain_handler(xsave::<Optimised, false>))),
    row(M::Xsaveopt64, |d| keeps(d, plain_handler(xsave::<Optimised, true>))),
    row(M::Xsavec, |d| keeps(d, plain_handler(xsave::<Compacted, false>))),
    row(M::Xsavec64, |d| keeps(d, plain_handler(xsave::<Compacted, true>))),
    row(M::Xsaves, |d| keeps(d, plain_handler(xsaves::<false>))),
    row(M::Xsaves64, |d| keeps(d, plain_handler(xsaves::<true>))),
    row(M::Xrstor, |d| keeps(d, plain_handler(xrstor::<false, false>))),
    row(M::Xrstor64, |d| keeps(d, plain_handler(xrstor::<true, false>))),
    row(M::Xrstors, |d| keeps(d, plain_handler(xrstor::<false, true>))),
    row(M::Xrstors64, |d| keeps(d, plain_handler(xrstor::<true, true>))),
];

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const OPMASK: u64 = 1 << 5;
const ZMM_HI256: u64 = 1 << 6;
const HI16_ZMM: u64 = 1 << 7;
const PKRU: u64 = 1 << 9;
/// XCOMP_BV: the extended region is compacted.
const COMPACTED: u64 = 1 << 63;

/// Places in an XSAVE area, bytes.
const MXCSR_AT: usize = 24;
const XMM_AT: usize = 160;
const HEADER_AT: usize = 512;
const EXTENDED_AT: usize = 576;
/// Bytes of the largest component of [`EXTENDED`].
const LARGEST: usize = 1024;

/// A component of the extended region.
struct Component {
    bit: u64,
    bytes: usize,
    /// Bytes of it that the mode has: outside 64-bit mode registers above 7 are neither saved nor loaded.
    used: fn(&Cpu) -> usize,
    /// Place in the standard format.
    at: fn(&Cpu) -> usize,
    in_use: fn(&Cpu) -> bool,
    /// Both move `used` bytes. Zeros are the initial state of each.
    put: fn(&Cpu, &mut [u8]),
    load: fn(&mut Cpu, &[u8]),
}

/// SDM Vol. 1 "XSAVE-Supported Features and State-Component Bitmaps": user state beyond the legacy region.
const EXTENDED: &[Component] = &[
    Component {
        bit: AVX,
        bytes: 256,
        used: |cpu| 16 * usize::from(cpu.xmm_registers()),
        at: |_| EXTENDED_AT,
        in_use: |cpu| cpu.fpu.vector[..16].iter().any(|v| v.0[16..32] != [0; 16]),
        put: |cpu, out| cpu.parts(0, out, |v| &v.0[16..32]),
        load: |cpu, from| cpu.set_parts(0, from, |v| &mut v.0[16..32]),
    },
    Component {
        bit: OPMASK,
        bytes: 64,
        used: |_| 64,
        at: |cpu| cpu.offered.opmask_at as usize,
        in_use: |cpu| cpu.fpu.k != [0; 8],
        put: |cpu, out| {
            for (out, k) in out.chunks_exact_mut(8).zip(&cpu.fpu.k) {
                out.copy_from_slice(&k.to_le_bytes());
            }
        },
        load: |cpu, from| cpu.fpu.k = std::array::from_fn(|i| word(from, 8 * i)),
    },
    Component {
        bit: ZMM_HI256,
        bytes: 512,
        used: |cpu| 32 * usize::from(cpu.xmm_registers()),
        at: |cpu| cpu.offered.zmm_hi256_at as usize,
        in_use: |cpu| cpu.fpu.vector[..16].iter().any(|v| v.0[32..] != [0; 32]),
        put: |cpu, out| cpu.parts(0, out, |v| &v.0[32..]),
        load: |cpu, from| cpu.set_parts(0, from, |v| &mut v.0[32..]),
    },
    Component {
        bit: HI16_ZMM,
        bytes: 1024,
        used: |cpu| if cpu.is_64bit() { 1024 } else { 0 },
        at: |cpu| cpu.offered.hi16_zmm_at as usize,
        in_use: |cpu| cpu.fpu.vector[16..].iter().any(|v| v.0 != [0; 64]),
        put: |cpu, out| cpu.parts(16, out, |v| &v.0[..]),
        load: |cpu, from| cpu.set_parts(16, from, |v| &mut v.0[..]),
    },
    Component {
        bit: PKRU,
        bytes: 8,
        used: |_| 8,
        at: |cpu| cpu.offered.pkru_at as usize,
        in_use: |cpu| cpu.fpu.pkru != 0,
        put: |cpu, out| out.copy_from_slice(&u64::from(cpu.fpu.pkru).to_le_bytes()),
        load: |cpu, from| cpu.set_pkru(word(from, 0) as u32),
    },
];

/// How the three saving instructions differ.
trait Form: 'static {
    /// A component in its initial state is not written.
    const SKIPS_INITIAL: bool = true;
    const COMPACTED: bool = false;
}
struct Plain;
impl Form for Plain {
    const SKIPS_INITIAL: bool = false;
}
struct Optimised;
impl Form for Optimised {}
struct Compacted;
impl Form for Compacted {
    const COMPACTED: bool = true;
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Cpu {
    /// #UD or #NM where the XSAVE feature set must not run.
    fn require_xsave(&mut self) -> Result<(), Stop> {
        if !self.cr4.contains(x86_defs::Cr4::OSXSAVE) {
            return Err(self.fault(Fault::UD));
        }
        if self.fp_gate & fp_gate::TS != 0 { Err(self.fault(Fault::NM)) } else { Ok(()) }
    }

    /// As [`Self::require_xsave`] for XSAVES and XRSTORS, which are the supervisor's.
    fn require_xsaves(&mut self) -> Result<(), Stop> {
        if !self.offers(&x86_defs::cpuid::XSAVES) {
            return Err(self.fault(Fault::UD));
        }
        self.require_xsave()?;
        self.require_cpl0()
    }

    /// Requested-feature bitmap: XCR0 and EDX:EAX. IA32_XSS is 0, so XSAVES and XRSTORS know of nothing more.
    fn requested(&self) -> u64 {
        let mask = self.reg(Gpr::Rdx) << 32 | self.reg(Gpr::Rax) & 0xffff_ffff;
        self.fpu.xcr0 & mask
    }

    /// XINUSE. x87 and SSE state always count as in use, which the SDM leaves to the processor.
    pub(in crate::isa) fn in_use(&self) -> u64 {
        EXTENDED.iter().filter(|c| (c.in_use)(self)).fold(X87 | SSE, |bits, c| bits | c.bit)
    }

    /// Copies a part of each vector register from number `first` on, as far as there is room.
    fn parts(&self, first: usize, out: &mut [u8], part: fn(&VectorRegister) -> &[u8]) {
        let bytes = part(&self.fpu.vector[first]).len();
        for (out, register) in out.chunks_exact_mut(bytes).zip(&self.fpu.vector[first..]) {
            out.copy_from_slice(part(register));
        }
    }

    /// Loads what [`Self::parts`] copied.
    fn set_parts(&mut self, first: usize, from: &[u8], part: fn(&mut VectorRegister) -> &mut [u8]) {
        let bytes = part(&mut self.fpu.vector[first]).len();
        for (from, register) in from.chunks_exact(bytes).zip(&mut self.fpu.vector[first..]) {
            part(register).copy_from_slice(from);
        }
    }

    /// Stores `area[from..to]` at its place behind linear address `la`; the bounds are multiples of 8.
    fn store_part(&mut self, la: u64, area: &[u8], from: usize, to: usize, seg: Seg) -> Result<(), Stop> {
        for at in (from..to).step_by(8) {
            let place = self.wrap_linear(la.wrapping_add(at as u64));
            self.store(place, word(area, at), seg)?;
        }
        Ok(())
    }
}

fn xsave<F: Form, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_xsave()?;
    let seg = op.segment();
    let requested = cpu.requested();
    let asked = EXTENDED.iter().filter(|c| requested & c.bit != 0);
    let end = if F::COMPACTED {
        EXTENDED_AT + asked.map(|c| c.bytes).sum::<usize>()
    } else {
        asked.map(|c| (c.at)(cpu) + c.bytes).max().unwrap_or(EXTENDED_AT)
    };
    let la = cpu.operand_address(op, end as u32, true)?;
    cpu.require_aligned(la, 64)?;
    cpu.probe_write(la, end as u32, seg)?;
    let in_use = cpu.in_use();
    let written = if F::SKIPS_INITIAL { requested & in_use } else { requested };

    let mut area = [0; EXTENDED_AT];
    let header = cpu.wrap_linear(la.wrapping_add(HEADER_AT as u64));
    let state =
        if F::COMPACTED { requested & in_use } else { cpu.load::<u64>(header, seg)? & !requested | requested & in_use };
    if written & X87 != 0 {
        put_x87(&cpu.fpu, &mut area, WIDE);
        cpu.store_part(la, &area, 0, MXCSR_AT, seg)?;
        cpu.store_part(la, &area, 32, XMM_AT, seg)?;
    }
    if requested & (SSE | AVX) != 0 {
        let mxcsr = u64::from(cpu.fpu.mxcsr) | u64::from(MXCSR_MASK) << 32;
        let place = cpu.wrap_linear(la.wrapping_add(MXCSR_AT as u64));
        cpu.store(place, mxcsr, seg)?;
    }
    if written & SSE != 0 {
        let registers = cpu.xmm_registers();
        for n in 0..registers {
            area[XMM_AT + 16 * usize::from(n)..][..16].copy_from_slice(&cpu.xmm(n).to_le_bytes());
        }
        cpu.store_part(la, &area, XMM_AT, XMM_AT + 16 * usize::from(registers), seg)?;
    }
    let mut compacted_at = EXTENDED_AT;
    for component in EXTENDED.iter().filter(|c| requested & c.bit != 0) {
        let at = if F::COMPACTED { compacted_at } else { (component.at)(cpu) };
        compacted_at += component.bytes;
        if written & component.bit != 0 {
            let used = (component.used)(cpu);
            let mut image = [0; LARGEST];
            (component.put)(cpu, &mut image[..used]);
            cpu.store_part(la.wrapping_add(at as u64), &image, 0, used, seg)?;
        }
    }
    cpu.store(header, state, seg)?;
    if F::COMPACTED {
        let place = cpu.wrap_linear(header.wrapping_add(8));
        cpu.store(place, requested | COMPACTED, seg)?;
    }
    Ok(Then::Next)
}

/// XSAVEC, for the supervisor. The modified optimisation, which lets it leave out more, is the processor's choice.
fn xsaves<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_xsaves()?;
    xsave::<Compacted, WIDE>(cpu, op)
}

/// `SUPERVISOR`: XRSTORS, which has the compacted form alone.
fn xrstor<const WIDE: bool, const SUPERVISOR: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    if SUPERVISOR { cpu.require_xsaves() } else { cpu.require_xsave() }?;
    let seg = op.segment();
    let requested = cpu.requested();
    let la = cpu.operand_address(op, EXTENDED_AT as u32, false)?;
    cpu.require_aligned(la, 64)?;
    let mut area = [0; EXTENDED_AT];
    cpu.load_image(la, &mut area, seg)?;
    let (state, format) = (word(&area, HEADER_AT), word(&area, HEADER_AT + 8));
    let compacted = format & COMPACTED != 0;
    let valid = if compacted {
        let components = format & !COMPACTED;
        components & !cpu.fpu.xcr0 == 0
            && state & !components == 0
            && area[HEADER_AT + 16..EXTENDED_AT].iter().all(|byte| *byte == 0)
    } else {
        !SUPERVISOR && state & !cpu.fpu.xcr0 == 0 && format == 0 && word(&area, HEADER_AT + 16) == 0
    };
    if !valid {
        return Err(cpu.fault(Fault::gp(0)));
    }
    // The standard form loads MXCSR whatever XSTATE_BV says; the compacted one with the SSE component.
    let mxcsr = word(&area, MXCSR_AT) as u32;
    let loads_mxcsr = if compacted { requested & state & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    if loads_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let mut at = EXTENDED_AT;
    let mut images = [[0; LARGEST]; EXTENDED.len()];
    for (component, image) in EXTENDED.iter().zip(&mut images) {
        let place = if compacted { at } else { (component.at)(cpu) };
        if compacted && format & component.bit != 0 {
            at += component.bytes;
        }
        if requested & state & component.bit != 0 {
            let from = cpu.wrap_linear(la.wrapping_add(place as u64));
            cpu.load_image(from, &mut image[..component.bytes], seg)?;
        }
    }

    // Nothing faults from here on.
    if requested & X87 != 0 {
        if state & X87 != 0 {
            load_x87(&mut cpu.fpu, &area, WIDE);
        } else {
            cpu.fpu.init_x87();
            cpu.fpu.st = [[0; 16]; 8];
            crate::host_x87::forget_flags();
        }
    }
    if loads_mxcsr {
        cpu.set_mxcsr(mxcsr);
    } else if compacted && requested & SSE != 0 {
        cpu.set_mxcsr(crate::host_simd::DEFAULT);
    }
    if requested & SSE != 0 {
        for n in 0..cpu.xmm_registers() {
            let mut value = [0; 16];
            if state & SSE != 0 {
                value.copy_from_slice(&area[XMM_AT + 16 * usize::from(n)..][..16]);
            }
            cpu.set_xmm(n, u128::from_le_bytes(value));
        }
    }
    for (component, image) in EXTENDED.iter().zip(&images).filter(|(component, _)| requested & component.bit != 0) {
        // Of what the header leaves out, zeros.
        (component.load)(cpu, &image[..(component.used)(cpu)]);
    }
    Ok(Then::Next)
}
