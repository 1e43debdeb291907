//! Moves of whole vectors and of scalars under masks. SDM Vol. 2, the page of each mnemonic.

use iced_x86::Mnemonic as M;

use super::{Insn, da, insn, rows, scalar};
use crate::isa::Row;

pub(in crate::isa) const ROWS: &[Row] = &rows(&INSNS);

pub(super) static INSNS: [Insn; 16] = [
    insn(M::Vmovaps, 4, da!("vmovdqu32")).copies().aligned(),
    insn(M::Vmovapd, 8, da!("vmovdqu64")).copies().aligned(),
    insn(M::Vmovups, 4, da!("vmovdqu32")).copies(),
    insn(M::Vmovupd, 8, da!("vmovdqu64")).copies(),
    insn(M::Vmovdqa32, 4, da!("vmovdqu32")).copies().aligned(),
    insn(M::Vmovdqa64, 8, da!("vmovdqu64")).copies().aligned(),
    insn(M::Vmovdqu8, 1, da!("vmovdqu8")).copies(),
    insn(M::Vmovdqu16, 2, da!("vmovdqu16")).copies(),
    insn(M::Vmovdqu32, 4, da!("vmovdqu32")).copies(),
    insn(M::Vmovdqu64, 8, da!("vmovdqu64")).copies(),
    insn(M::Vmovntps, 8, da!("vmovdqu64")).copies().aligned(),
    insn(M::Vmovntpd, 8, da!("vmovdqu64")).copies().aligned(),
    insn(M::Vmovntdq, 8, da!("vmovdqu64")).copies().aligned(),
    insn(M::Vmovntdqa, 8, da!("vmovdqu64")).copies().aligned(),
    // Scalars: from memory alone, into zeros
    insn(M::Vmovss, 0, scalar!("vmovss")).second(),
    insn(M::Vmovsd, 0, scalar!("vmovsd")).second(),
];
