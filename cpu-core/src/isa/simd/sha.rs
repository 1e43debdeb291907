//! SHA extensions. One host instruction each. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::Mnemonic as M;

use super::float::{Mem, Operand, Reg};
use super::{M128, keeps, lacking, xmm};
use crate::cpu::{Cpu, Done, Then};
use crate::decode::digest::{Digest, Lowered};
use crate::host_simd::{V, from_u128, to_u128};
use crate::isa::{Row, plain_handler, row};
use crate::op::{Exact, Op};

pub(in crate::isa) const ROWS: &[Row] = &[
    row(M::Sha1nexte, xmm!("sha1nexte", "sha")),
    row(M::Sha1msg1, xmm!("sha1msg1", "sha")),
    row(M::Sha1msg2, xmm!("sha1msg2", "sha")),
    row(M::Sha256msg1, xmm!("sha256msg1", "sha")),
    row(M::Sha256msg2, xmm!("sha256msg2", "sha")),
    row(M::Sha1rnds4, sha1rnds4),
    row(M::Sha256rnds2, sha256rnds2),
];

/// Four rounds with the function and constant that bits 1:0 of the immediate name.
fn sha1rnds4(d: &Digest<'_>) -> Option<Lowered> {
    fn one<const IMM: u8>(mut a: V, b: V) -> V {
        // SAFETY: registers only; the selector has looked whether the host has it.
        unsafe {
            std::arch::asm!("sha1rnds4 {a}, {b}, {imm}", a = inout(xmm_reg) a, b = in(xmm_reg) b, imm = const IMM,
                options(pure, nomem, nostack, preserves_flags));
        }
        a
    }
    fn run<O: Operand<V>>(cpu: &mut Cpu, op: &Op) -> Done {
        static TABLE: [fn(V, V) -> V; 4] = [one::<0>, one::<1>, one::<2>, one::<3>];
        cpu.require_sse()?;
        let b = O::exact(cpu, op)?;
        let out = TABLE[op.imm as usize & 3](from_u128(cpu.xmm(op.dst)), b);
        cpu.set_xmm(op.dst, to_u128(out));
        Ok(Then::Next)
    }
    if !is_x86_feature_detected!("sha") {
        return lacking(d);
    }
    let mem = plain_handler(run::<Mem<M128, Exact>>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(run::<Reg>) })
}

/// Two rounds; XMM0 holds the message and the constants.
fn sha256rnds2(d: &Digest<'_>) -> Option<Lowered> {
    fn run<O: Operand<V>>(cpu: &mut Cpu, op: &Op) -> Done {
        cpu.require_sse()?;
        let b = O::exact(cpu, op)?;
        let mut a = from_u128(cpu.xmm(op.dst));
        let message = from_u128(cpu.xmm(0));
        // SAFETY: registers only; the selector has looked whether the host has it.
        unsafe {
            std::arch::asm!("sha256rnds2 {a}, {b}, xmm0", a = inout(xmm_reg) a, b = in(xmm_reg) b,
                in("xmm0") message, options(pure, nomem, nostack, preserves_flags));
        }
        cpu.set_xmm(op.dst, to_u128(a));
        Ok(Then::Next)
    }
    if !is_x86_feature_detected!("sha") {
        return lacking(d);
    }
    let mem = plain_handler(run::<Mem<M128, Exact>>);
    keeps(d, if d.is_mem(1) { mem } else { plain_handler(run::<Reg>) })
}
