//! Gathers and scatters. SDM Vol. 2 "VGATHER…", "VPGATHER…", "VSCATTER…", "VPSCATTER…".
//!
//! They go from the lowest element up and clear an element's mask bit when it is done. What has been done stays when one
//! faults, and they go on there.

use iced_x86::Mnemonic as M;

use super::{Fields, Key, host_has, length, prefix_fields};
use crate::cpu::{Cpu, Done, Stop, StopReason, Then};
use crate::decode::digest::{Digest, Lowered, Select, slot};
use crate::fault::Fault;
use crate::isa::simd::{keeps, lacking};
use crate::isa::{Row, plain_handler};
use crate::op::Op;

pub(in crate::isa) const ROWS: &[Row] = &[
    // Bytes of elements, and of indices
    evex(M::Vpgatherdd, gather::<4, 4>),
    evex(M::Vpgatherdq, gather::<8, 4>),
    evex(M::Vpgatherqd, gather::<4, 8>),
    evex(M::Vpgatherqq, gather::<8, 8>),
    evex(M::Vgatherdps, gather::<4, 4>),
    evex(M::Vgatherdpd, gather::<8, 4>),
    evex(M::Vgatherqps, gather::<4, 8>),
    evex(M::Vgatherqpd, gather::<8, 8>),
    evex(M::Vpscatterdd, scatter::<4, 4>),
    evex(M::Vpscatterdq, scatter::<8, 4>),
    evex(M::Vpscatterqd, scatter::<4, 8>),
    evex(M::Vpscatterqq, scatter::<8, 8>),
    evex(M::Vscatterdps, scatter::<4, 4>),
    evex(M::Vscatterdpd, scatter::<8, 4>),
    evex(M::Vscatterqps, scatter::<4, 8>),
    evex(M::Vscatterqpd, scatter::<8, 8>),
];

const fn evex(mnemonic: M, select: Select) -> Row {
    Row { key: Key::Evex(mnemonic, None), select }
}

/// `Op::dst` is the vector, `aux` the mask, `index` the vector of indices, all by number.
fn lower(d: &Digest<'_>, vector: u32, h: crate::op::Handler) -> Option<Lowered> {
    if !host_has(d) {
        return lacking(d);
    }
    let mut lowered = keeps(d, h)?;
    let op = &mut lowered.op;
    op.dst = slot(d.reg(vector));
    op.aux = slot(d.ins.op_mask());
    op.index = slot(d.ins.memory_index());
    debug_assert!(length(d.ins.code()) < 3);
    op.imm = prefix_fields(d);
    Some(lowered)
}

fn gather<const W: usize, const X: usize>(d: &Digest<'_>) -> Option<Lowered> {
    lower(d, 0, plain_handler(run_gather::<W, X>))
}

fn scatter<const W: usize, const X: usize>(d: &Digest<'_>) -> Option<Lowered> {
    lower(d, 1, plain_handler(run_scatter::<W, X>))
}

/// Elements: the longer of the two sorts fills its vector.
fn count<const W: usize, const X: usize>(op: &Op) -> usize {
    (16 << Fields(op.imm).length()) / if W > X { W } else { X }
}

impl Cpu {
    /// Offset of element `i` behind the op's operand, indices of `X` bytes.
    fn element_offset<const X: usize>(&self, op: &Op, i: usize) -> u64 {
        let from = &self.fpu.vector[usize::from(op.index & 31)].0[i * X..][..X];
        let index = from.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let shift = 64 - 8 * X as u32;
        let index = ((index << shift) as i64 >> shift) as u64;
        let offset = self.get::<u64>(op.base).wrapping_add(index.wrapping_mul(op.scale.into()));
        offset.wrapping_add(op.disp as u64) & op.address_mask()
    }
}

fn run_gather<const W: usize, const X: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx512()?;
    if op.dst == op.index {
        return Err(cpu.fault(Fault::UD));
    }
    let count = count::<W, X>(op);
    let k = usize::from(op.aux & 7);
    let (mut out, mut mask) = (cpu.zmm(op.dst), cpu.fpu.k[k]);
    for i in (0..count).filter(|i| cpu.fpu.k[k] >> i & 1 != 0).collect::<Vec<_>>() {
        let at = cpu.element_offset::<X>(op, i);
        let seg = op.segment();
        let loaded = if W == 4 { cpu.read::<u32>(seg, at).map(u64::from) } else { cpu.read::<u64>(seg, at) };
        match loaded {
            Ok(value) => out.0[i * W..][..W].copy_from_slice(&value.to_le_bytes()[..W]),
            Err(Stop) => {
                // Behind a device read all of it starts again, and finds the answers that it has had.
                if matches!(cpu.stop, Some(StopReason::Fault(_))) {
                    if mask != cpu.fpu.k[k] {
                        // The host has written all of its vector length, with zeros above.
                        out.0[16 << Fields(op.imm).length()..].fill(0);
                    }
                    cpu.fpu.vector[usize::from(op.dst & 31)] = out;
                    cpu.fpu.k[k] = mask;
                }
                return Err(Stop);
            }
        }
        mask &= !(1 << i);
    }
    out.0[count * W..].fill(0);
    cpu.fpu.vector[usize::from(op.dst & 31)] = out;
    cpu.fpu.k[k] = 0;
    Ok(Then::Next)
}

fn run_scatter<const W: usize, const X: usize>(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx512()?;
    let k = usize::from(op.aux & 7);
    let from = cpu.zmm(op.dst);
    for i in 0..count::<W, X>(op) {
        if cpu.fpu.k[k] >> i & 1 == 0 {
            continue;
        }
        let at = cpu.element_offset::<X>(op, i);
        let value = from.0[i * W..][..W].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let seg = op.segment();
        if W == 4 { cpu.write(seg, at, value as u32) } else { cpu.write(seg, at, value) }?;
        cpu.fpu.k[k] &= !(1 << i);
    }
    cpu.fpu.k[k] = 0;
    Ok(Then::Next)
}
