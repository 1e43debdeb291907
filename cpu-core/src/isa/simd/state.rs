//! FXSAVE FXRSTOR, LDMXCSR STMXCSR, EMMS, fences and cache-line flushes. SDM Vol. 2, the page of each mnemonic; Vol. 1
//! "FXSAVE and FXRSTOR Instructions".

use iced_x86::Mnemonic as M;

use super::keeps;
use crate::access::By;
use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::decode::digest::{Digest, Lowered};
use crate::fault::Fault;
use crate::isa::{Row, plain_handler, row};
use crate::op::Op;
use crate::state::{Fpu, Seg};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Fxsave, |d| keeps(d, plain_handler(fxsave::<false>))),
    row(M::Fxsave64, |d| keeps(d, plain_handler(fxsave::<true>))),
    row(M::Fxrstor, |d| keeps(d, plain_handler(fxrstor::<false>))),
    row(M::Fxrstor64, |d| keeps(d, plain_handler(fxrstor::<true>))),
    row(M::Ldmxcsr, |d| keeps(d, plain_handler(ldmxcsr::<false>))),
    row(M::Stmxcsr, |d| keeps(d, plain_handler(stmxcsr::<false>))),
    row(M::Emms, |d| keeps(d, plain_handler(emms))),
    row(M::Lfence, fence),
    row(M::Sfence, fence),
    row(M::Mfence, |d| keeps(d, plain_handler(mfence))),
    row(M::Clflush, |d| keeps(d, plain_handler(flush_line))),
    row(M::Clflushopt, |d| keeps(d, plain_handler(flush_line))),
    row(M::Clwb, |d| keeps(d, plain_handler(flush_line))),
];

/// MXCSR bits that exist: MXCSR_MASK.
pub(crate) const MXCSR_MASK: u32 = 0xffff;
/// FXSAVE writes this much of its 512 bytes; the rest is reserved or software's.
const LEGACY_WRITTEN: usize = 416;
const XMM_AT: usize = 160;

fn put<const N: usize>(image: &mut [u8], at: usize, bytes: [u8; N]) {
    image[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&image[at..at + N]);
    bytes
}

/// The x87 part of the legacy region. `wide`: REX.W, 64-bit instruction and data pointers without selectors.
pub(super) fn put_x87(fpu: &Fpu, image: &mut [u8], wide: bool) {
    put(image, 0, fpu.fcw.to_le_bytes());
    put(image, 2, fpu.fsw.to_le_bytes());
    put(image, 4, [fpu.ftw, 0]);
    put(image, 6, fpu.fop.to_le_bytes());
    if wide {
        put(image, 8, fpu.fip.to_le_bytes());
        put(image, 16, fpu.fdp.to_le_bytes());
    } else {
        put(image, 8, (fpu.fip as u32).to_le_bytes());
        put(image, 12, u32::from(fpu.fcs).to_le_bytes());
        put(image, 16, (fpu.fdp as u32).to_le_bytes());
        put(image, 20, u32::from(fpu.fds).to_le_bytes());
    }
    for i in 0..8 {
        let register = fpu.physical(i);
        put(image, 32 + 16 * usize::from(i), fpu.st[register]);
        image[42 + 16 * usize::from(i)..48 + 16 * usize::from(i)].fill(0);
    }
}

/// Loads what [`put_x87`] stored.
pub(super) fn load_x87(fpu: &mut Fpu, image: &[u8], wide: bool) {
    fpu.set_fcw(u16::from_le_bytes(get(image, 0)));
    fpu.fsw = u16::from_le_bytes(get(image, 2));
    fpu.settle_summary();
    crate::host_x87::forget_flags();
    fpu.ftw = image[4];
    fpu.fop = u16::from_le_bytes(get(image, 6)) & 0x7ff;
    if wide {
        fpu.fip = u64::from_le_bytes(get(image, 8));
        fpu.fdp = u64::from_le_bytes(get(image, 16));
    } else {
        fpu.fip = u32::from_le_bytes(get(image, 8)).into();
        fpu.fcs = u16::from_le_bytes(get(image, 12));
        fpu.fdp = u32::from_le_bytes(get(image, 16)).into();
        fpu.fds = u16::from_le_bytes(get(image, 20));
    }
    for i in 0..8 {
        let register = fpu.physical(i);
        let mut value = [0; 16];
        value[..10].copy_from_slice(&get::<10>(image, 32 + 16 * usize::from(i)));
        fpu.st[register] = value;
    }
}

impl Cpu {
    /// XMM registers that the mode has.
    pub(super) fn xmm_registers(&self) -> u8 {
        if self.is_64bit() { 16 } else { 8 }
    }

    /// #NM where FXSAVE and FXRSTOR must not run.
    fn require_fxsr(&mut self) -> Result<(), Stop> {
        if self.fp_gate & (fp_gate::TS | fp_gate::EM) == 0 { Ok(()) } else { Err(self.fault(Fault::NM)) }
    }

    /// #GP(0) unless `la` is a multiple of `align`.
    pub(super) fn require_aligned(&mut self, la: u64, align: u64) -> Result<(), Stop> {
        if la & (align - 1) == 0 { Ok(()) } else { Err(self.fault(Fault::gp(0))) }
    }

    /// Linear address of a memory operand of `size` bytes that is accessed in pieces of `piece`, a multiple of `align`.
    /// Faults come in the host's order: alignment; the first piece where the segment ends before the last; the first
    /// piece, or the last byte (aligned operands), then the other.
    pub(crate) fn large_operand(
        &mut self,
        op: &Op,
        size: u32,
        piece: u32,
        align: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let (seg, offset) = (op.segment(), self.ea(op));
        let start = self.wrap_linear(self.seg_base[seg as usize].wrapping_add(offset));
        if self.is_64bit() && !self.is_canonical(start) {
            self.target(start, write, By::Code, seg)?;
        }
        self.require_aligned(start, align)?;
        let first = self.linear(seg, offset, piece, write)?;
        if align == 1 {
            self.check_alignment(first, piece, By::Code)?;
        }
        let inside = self.linear(seg, offset, size, write).is_ok();
        if align == 1 || !inside {
            self.target(first, write, By::Code, seg)?;
            if (first & 0xfff) + u64::from(piece) > 0x1000 {
                self.target(self.wrap_linear((first | 0xfff).wrapping_add(1)), write, By::Code, seg)?;
            }
        }
        let la = self.linear(seg, offset, size, write)?;
        self.target(self.wrap_linear(la.wrapping_add(u64::from(size) - 1)), write, By::Code, seg)?;
        Ok(la)
    }

    /// Loads `image` from linear address `la`, 16 bytes at a time and what is left, 8, by itself; nothing is committed if any piece faults.
    pub(super) fn load_image(&mut self, la: u64, image: &mut [u8], seg: Seg) -> Result<(), Stop> {
        let even = image.len() & !15;
        let mut pieces = image.chunks_exact_mut(16);
        for (i, piece) in pieces.by_ref().enumerate() {
            let at = self.wrap_linear(la.wrapping_add(16 * i as u64));
            piece.copy_from_slice(&crate::host_simd::to_u128(self.load_16(at, seg)?).to_le_bytes());
        }
        if let rest @ [_, ..] = pieces.into_remainder() {
            let at = self.wrap_linear(la.wrapping_add(even as u64));
            rest.copy_from_slice(&self.load::<u64>(at, seg)?.to_le_bytes());
        }
        Ok(())
    }

    /// Stores `image` at linear address `la`, which has been probed, 16 bytes at a time.
    pub(super) fn store_image(&mut self, la: u64, image: &[u8], seg: Seg) -> Result<(), Stop> {
        for (i, piece) in image.chunks_exact(16).enumerate() {
            let at = self.wrap_linear(la.wrapping_add(16 * i as u64));
            let value = u128::from_le_bytes(get(piece, 0));
            self.store_16(at, crate::host_simd::from_u128(value), seg)?;
        }
        Ok(())
    }

    /// Loads MXCSR; the caller has checked the reserved bits.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        self.fpu.mxcsr = value;
        crate::host_simd::follow(value);
    }
}

fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_fxsr()?;
    let la = cpu.large_operand(op, 512, 16, 16, true)?;
    // Without CR4.OSFXSR the XMM part is left alone (SDM Vol. 2 "FXSAVE": implementation dependent).
    let sse = cpu.fp_gate & fp_gate::NO_OSFXSR == 0;
    let registers = if sse { cpu.xmm_registers() } else { 0 };
    let mut image = [0; LEGACY_WRITTEN];
    put_x87(&cpu.fpu, &mut image, WIDE);
    if sse {
        put(&mut image, 24, cpu.fpu.mxcsr.to_le_bytes());
        put(&mut image, 28, MXCSR_MASK.to_le_bytes());
    }
    for n in 0..registers {
        put(&mut image, XMM_AT + 16 * usize::from(n), cpu.xmm(n).to_le_bytes());
    }
    cpu.probe_write(la, 512, op.segment())?;
    cpu.store_image(la, &image[..XMM_AT + 16 * usize::from(registers)], op.segment())?;
    Ok(Then::Next)
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_fxsr()?;
    let la = cpu.large_operand(op, 512, 16, 16, false)?;
    let mut image = [0; 512];
    cpu.load_image(la, &mut image, op.segment())?;
    let sse = cpu.fp_gate & fp_gate::NO_OSFXSR == 0;
    let mxcsr = u32::from_le_bytes(get(&image, 24));
    if sse && mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    load_x87(&mut cpu.fpu, &image, WIDE);
    if sse {
        cpu.set_mxcsr(mxcsr);
        for n in 0..cpu.xmm_registers() {
            cpu.set_xmm(n, u128::from_le_bytes(get(&image, XMM_AT + 16 * usize::from(n))));
        }
    }
    Ok(Then::Next)
}

/// `VEX`: VLDMXCSR.
pub(super) fn ldmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    if VEX { cpu.require_avx() } else { cpu.require_sse() }?;
    let value: u32 = cpu.read_operand(op)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.fault(Fault::gp(0)));
    }
    cpu.set_mxcsr(value);
    Ok(Then::Next)
}

/// `VEX`: VSTMXCSR.
pub(super) fn stmxcsr<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Done {
    if VEX { cpu.require_avx() } else { cpu.require_sse() }?;
    cpu.write_operand(op, cpu.fpu.mxcsr)?;
    Ok(Then::Next)
}

/// Empties the x87 stack; the contents stay. TOP becomes 0 (SDM Vol. 3 "Action Taken by MMX Instructions on x87 FPU State").
fn emms(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_mmx()?;
    cpu.enter_mmx();
    cpu.fpu.ftw = 0;
    Ok(Then::Next)
}

/// Guest accesses are host accesses in program order, and the host orders loads and stores as the guest expects.
fn fence(d: &Digest<'_>) -> Option<Lowered> {
    fn nothing(_: &mut Cpu, _: &Op) -> Done {
        Ok(Then::Next)
    }
    keeps(d, plain_handler(nothing))
}

/// A store may pass a later load on the host too, so the host's own barrier is due.
fn mfence(_: &mut Cpu, _: &Op) -> Done {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(Then::Next)
}

/// Caches are the host's and coherent: what is left is the check that a byte load makes.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.read_operand::<u8>(op)?;
    Ok(Then::Next)
}
