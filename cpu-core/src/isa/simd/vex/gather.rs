//! Elements that a mask chooses: masked loads and stores, gathers. SDM Vol. 2 "VMASKMOV", "VPMASKMOV", "VGATHER…".
//!
//! An element whose mask is clear is not accessed at all. A gather goes from the lowest element up and keeps what it has
//! when one faults: destination and mask show how far it came, and it goes on there. Mask elements it has not come to
//! stay as they are, as on AMD's CPUs.

use iced_x86::Mnemonic as M;

use super::{Halves, MEMORY, WIDE, plain, vex};
use crate::cpu::{Cpu, Done, Stop, StopReason, Then};
use crate::decode::digest::{Digest, Lowered, slot};
use crate::fault::Fault;
use crate::host::HostWord;
use crate::isa::{Row, plain_handler};
use crate::op::Op;
use crate::state::Seg;

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vmaskmovps, masked::<u32>),
    vex(M::Vmaskmovpd, masked::<u64>),
    vex(M::Vpmaskmovd, masked::<u32>),
    vex(M::Vpmaskmovq, masked::<u64>),
    vex(M::Vpgatherdd, gather::<u32, u32>),
    vex(M::Vpgatherdq, gather::<u64, u32>),
    vex(M::Vpgatherqd, gather::<u32, u64>),
    vex(M::Vpgatherqq, gather::<u64, u64>),
    vex(M::Vgatherdps, gather::<u32, u32>),
    vex(M::Vgatherdpd, gather::<u64, u32>),
    vex(M::Vgatherqps, gather::<u32, u64>),
    vex(M::Vgatherqpd, gather::<u64, u64>),
];

/// Element `i` of a vector.
fn element<W: HostWord>(from: Halves, i: u32) -> W {
    let at = i * W::BITS;
    W::of((from[at as usize / 128] >> (at % 128)) as u64)
}

fn set_element<W: HostWord>(to: &mut Halves, i: u32, value: W) {
    let at = i * W::BITS;
    let half = &mut to[at as usize / 128];
    let ones = u128::from(u64::MAX >> (64 - W::BITS)) << (at % 128);
    *half = *half & !ones | u128::from(value.zext()) << (at % 128);
}

/// Zeros from bit `bits` on.
fn clear_above(value: &mut Halves, bits: u32) {
    for (half, value) in value.iter_mut().enumerate() {
        let kept = bits.saturating_sub(128 * half as u32).min(128);
        *value &= u128::MAX.checked_shr(128 - kept).unwrap_or(0);
    }
}

/// Whether element `i` of the mask has its sign set.
fn chosen<W: HostWord>(mask: Halves, i: u32) -> bool {
    element::<W>(mask, i).zext() >> (W::BITS - 1) != 0
}

fn masked<W: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    let mut lowered = plain(d, if d.is_mem(0) { plain_handler(store::<W>) } else { plain_handler(load::<W>) })?;
    if d.is_mem(0) {
        // Mask, then what is stored.
        lowered.op.src = slot(d.reg(1));
        lowered.op.aux = slot(d.reg(2));
    }
    Some(lowered)
}

impl Cpu {
    /// Linear address of `bytes` of the op's operand, `behind` its start. The start is of the address size; what is behind it
    /// goes on in the segment, whose offsets have 32 bits outside 64-bit mode.
    pub(in crate::isa::simd) fn part_address(
        &mut self,
        op: &Op,
        behind: u32,
        bytes: u32,
        write: bool,
    ) -> Result<u64, Stop> {
        let sum = self.ea(op).wrapping_add(behind.into());
        let offset = if self.is_64bit() { sum } else { u64::from(sum as u32) };
        self.linear(op.segment(), offset, bytes, write)
    }

    /// As [`Cpu::load`], with "no AC# reported for any mask bit combinations" (SDM Vol. 2 "VMASKMOV", "VPMASKMOV").
    fn load_unaligned<W: HostWord>(&mut self, la: u64, seg: Seg) -> Result<W, Stop> {
        if !self.alignment_checked() {
            return self.load(la, seg);
        }
        let mut bytes = [0; 8];
        self.load_bytes(la, &mut bytes[..W::BYTES as usize], seg)?;
        Ok(W::of(u64::from_le_bytes(bytes)))
    }

    fn store_unaligned<W: HostWord>(&mut self, la: u64, value: W, seg: Seg) -> Result<(), Stop> {
        if !self.alignment_checked() {
            return self.store(la, value, seg);
        }
        self.store_bytes(la, &value.zext().to_le_bytes()[..W::BYTES as usize], seg)
    }
}

fn lanes<W: HostWord>(op: &Op) -> u32 {
    (if op.imm & WIDE != 0 { 256 } else { 128 }) / W::BITS
}

fn load<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    debug_assert_eq!(op.aux, MEMORY);
    let mask = cpu.ymm(op.src);
    let mut result = [0; 2];
    for i in (0..lanes::<W>(op)).filter(|i| chosen::<W>(mask, *i)) {
        let la = cpu.part_address(op, i * W::BYTES, W::BYTES, false)?;
        let value = cpu.load_unaligned::<W>(la, op.segment())?;
        set_element(&mut result, i, value);
    }
    cpu.set_ymm(op.dst, result);
    Ok(Then::Next)
}

fn store<W: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let (mask, value, seg) = (cpu.ymm(op.src), cpu.ymm(op.aux), op.segment());
    let chosen = (0..lanes::<W>(op)).filter(|i| chosen::<W>(mask, *i));
    for i in chosen.clone() {
        let la = cpu.part_address(op, i * W::BYTES, W::BYTES, true)?;
        cpu.probe_write(la, W::BYTES, seg)?;
    }
    for i in chosen {
        let la = cpu.part_address(op, i * W::BYTES, W::BYTES, true)?;
        cpu.store_unaligned::<W>(la, element(value, i), seg)?;
    }
    Ok(Then::Next)
}

/// Elements `W` by indices `X`. `Op::index` is the vector of indices, `src` the mask; the digest counts registers so.
fn gather<W: HostWord, X: HostWord>(d: &Digest<'_>) -> Option<Lowered> {
    fn same(cpu: &mut Cpu, _: &Op) -> Done {
        cpu.require_avx()?;
        Err(cpu.fault(Fault::UD))
    }
    let registers = [d.reg(0), d.reg(2), d.ins.memory_index()].map(slot);
    let [a, b, c] = registers;
    let distinct = a != b && b != c && a != c;
    let mut lowered = plain(d, if distinct { plain_handler(run::<W, X>) } else { plain_handler(same) })?;
    (lowered.op.dst, lowered.op.src, lowered.op.index) = (a, b, c);
    // The longer of the two sorts of element fills its vector.
    let wide = d.reg(0).is_ymm() || d.reg(2).is_ymm() || d.ins.memory_index().is_ymm();
    lowered.op.imm = if wide { WIDE } else { 0 };
    Some(lowered)
}

fn run<W: HostWord, X: HostWord>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx()?;
    let length = if op.imm & WIDE != 0 { 256 } else { 128 };
    let count = length / W::BITS.max(X::BITS);
    let mut is_begun = false;
    let indices = cpu.ymm(op.index);
    let (mut result, mut mask) = (cpu.ymm(op.dst), cpu.ymm(op.src));
    let base = cpu.get::<u64>(op.base);
    for i in 0..count {
        if !chosen::<W>(mask, i) {
            set_element(&mut mask, i, W::of(0));
            continue;
        }
        let index = element::<X>(indices, i).zext();
        let index = (index << (64 - X::BITS)) as i64 >> (64 - X::BITS);
        let offset = base.wrapping_add((index as u64).wrapping_mul(op.scale.into())).wrapping_add(op.disp as u64);
        let loaded = cpu
            .linear(op.segment(), offset & op.address_mask(), W::BYTES, false)
            .and_then(|la| cpu.load::<W>(la, op.segment()));
        match loaded {
            Ok(value) => {
                set_element(&mut result, i, value);
                is_begun = true;
            }
            Err(Stop) => {
                // Behind a device read all of it starts again, and finds the answers that it has had.
                if matches!(cpu.stop, Some(StopReason::Fault(_))) {
                    // The mask's elements were made all ones or zeros before anything else (SDM Vol. 2 "VGATHERDPS", Operation).
                    // On Intel's CPUs these are all that the vector length has room for, and zeros are above them; above the
                    // destination, too, as soon as one element is in it.
                    for i in i..length / W::BITS {
                        let ones = if chosen::<W>(mask, i) { W::of(u64::MAX) } else { W::of(0) };
                        set_element(&mut mask, i, ones);
                    }
                    clear_above(&mut mask, length);
                    cpu.set_ymm(op.src, mask);
                    if is_begun {
                        clear_above(&mut result, length);
                        cpu.set_ymm(op.dst, result);
                    }
                }
                return Err(Stop);
            }
        }
        set_element(&mut mask, i, W::of(0));
    }
    // What lies above the elements is cleared, in both.
    clear_above(&mut result, count * W::BITS);
    cpu.set_ymm(op.dst, result);
    cpu.set_ymm(op.src, [0; 2]);
    Ok(Then::Next)
}
