//! XSAVE XSAVEOPT XSAVEC XSAVES XRSTOR XRSTORS. SDM Vol. 1 "Managing State Using the XSAVE Feature Set"; Vol. 2, the page of each mnemonic.
//! XGETBV and XSETBV are with the control registers.

use iced_x86::Mnemonic as M;

use super::keeps;
use super::state::{MXCSR_MASK, load_x87, put_x87};
use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::fault::Fault;
use crate::isa::{Row, plain_handler, row};
use crate::op::Op;
use crate::state::{Gpr, Seg};

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
const PKRU: u64 = 1 << 9;
/// XCOMP_BV: the extended region is compacted.
const COMPACTED: u64 = 1 << 63;

/// Places in an XSAVE area, bytes.
const MXCSR_AT: usize = 24;
const XMM_AT: usize = 160;
const HEADER_AT: usize = 512;
const EXTENDED_AT: usize = 576;
/// Bytes of the largest component of [`EXTENDED`].
const LARGEST: usize = 256;

/// A component of the extended region.
struct Component {
    bit: u64,
    bytes: usize,
    /// Place in the standard format.
    at: fn(&Cpu) -> usize,
    in_use: fn(&Cpu) -> bool,
    put: fn(&Cpu, &mut [u8]),
    load: fn(&mut Cpu, &[u8]),
    init: fn(&mut Cpu),
}

/// SDM Vol. 1 "XSAVE-Supported Features and State-Component Bitmaps": user state beyond the legacy region.
const EXTENDED: &[Component] = &[
    Component {
        bit: AVX,
        bytes: 256,
        at: |_| EXTENDED_AT,
        in_use: |cpu| cpu.fpu.vector.iter().any(|v| v.0[16..32] != [0; 16]),
        put: |cpu, out| {
            for n in 0..usize::from(cpu.xmm_registers()) {
                out[16 * n..][..16].copy_from_slice(&cpu.fpu.vector[n].0[16..32]);
            }
        },
        load: |cpu, from| {
            for n in 0..usize::from(cpu.xmm_registers()) {
                cpu.fpu.vector[n].0[16..32].copy_from_slice(&from[16 * n..][..16]);
            }
        },
        init: |cpu| {
            for n in 0..usize::from(cpu.xmm_registers()) {
                cpu.fpu.vector[n].0[16..32].fill(0);
            }
        },
    },
    Component {
        bit: PKRU,
        bytes: 8,
        at: |cpu| cpu.offered.pkru_at as usize,
        in_use: |cpu| cpu.fpu.pkru != 0,
        put: |cpu, out| out.copy_from_slice(&u64::from(cpu.fpu.pkru).to_le_bytes()),
        load: |cpu, from| cpu.set_pkru(word(from, 0) as u32),
        init: |cpu| cpu.set_pkru(0),
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
            let used = 16 * usize::from(cpu.xmm_registers());
            let mut image = [0; LARGEST];
            (component.put)(cpu, &mut image[..component.bytes]);
            cpu.store_part(la.wrapping_add(at as u64), &image, 0, component.bytes.min(used), seg)?;
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
    for (component, image) in EXTENDED.iter().zip(&images) {
        match (requested & component.bit != 0, state & component.bit != 0) {
            (true, true) => (component.load)(cpu, &image[..component.bytes]),
            (true, false) => (component.init)(cpu),
            (false, _) => {}
        }
    }
    Ok(Then::Next)
}
