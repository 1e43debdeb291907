//! Single lanes of XMM registers, to and from general registers and memory. SDM Vol. 2, the page of each mnemonic.

use iced_x86::{Code as C, Mnemonic as M};

use super::{Insn, Memory, insn, one, one_imm, rows};
use crate::isa::Row;

pub(in crate::isa) const ROWS: &[Row] = &rows(&INSNS);

pub(super) static INSNS: [Insn; 25] = [
    // General registers, or memory in their place
    insn(M::Vmovd, 0, one!("vmovd xmm0, eax")).codes(&[C::EVEX_Vmovd_xmm_rm32]),
    insn(M::Vmovq, 0, one!("vmovq xmm0, rax")).codes(&[C::EVEX_Vmovq_xmm_rm64]),
    insn(M::Vmovd, 0, one!("vmovd eax, xmm1")).codes(&[C::EVEX_Vmovd_rm32_xmm]),
    insn(M::Vmovq, 0, one!("vmovq rax, xmm1")).codes(&[C::EVEX_Vmovq_rm64_xmm]),
    insn(M::Vpinsrb, 0, one_imm!("vpinsrb xmm0, xmm1, eax")).imm(),
    insn(M::Vpextrb, 0, one_imm!("vpextrb eax, xmm1")).imm(),
    insn(M::Vpinsrw, 0, one_imm!("vpinsrw xmm0, xmm1, eax")).imm(),
    insn(M::Vpextrw, 0, one_imm!("vpextrw eax, xmm1")).imm(),
    insn(M::Vpinsrd, 0, one_imm!("vpinsrd xmm0, xmm1, eax")).imm(),
    insn(M::Vpextrd, 0, one_imm!("vpextrd eax, xmm1")).imm(),
    insn(M::Vpinsrq, 0, one_imm!("vpinsrq xmm0, xmm1, rax")).imm(),
    insn(M::Vpextrq, 0, one_imm!("vpextrq rax, xmm1")).imm(),
    insn(M::Vextractps, 0, one_imm!("vextractps eax, xmm1")).imm(),
    // Parts of XMM registers; a lone source is memory
    insn(M::Vinsertps, 4, one_imm!("vinsertps xmm0, xmm1, xmm2")).imm().memory(Memory::Repeated),
    insn(M::Vmovq, 0, one!("vmovq xmm0, xmm1")).codes(&[C::EVEX_Vmovq_xmm_xmmm64, C::EVEX_Vmovq_xmmm64_xmm]),
    insn(M::Vmovlps, 0, one!("vmovsd xmm0, xmm1, xmm2")).codes(&[C::EVEX_Vmovlps_xmm_xmm_m64]),
    insn(M::Vmovlps, 0, one!("vmovq xmm0, xmm1")).codes(&[C::EVEX_Vmovlps_m64_xmm]),
    insn(M::Vmovlpd, 0, one!("vmovsd xmm0, xmm1, xmm2")).codes(&[C::EVEX_Vmovlpd_xmm_xmm_m64]),
    insn(M::Vmovlpd, 0, one!("vmovq xmm0, xmm1")).codes(&[C::EVEX_Vmovlpd_m64_xmm]),
    insn(M::Vmovhps, 0, one!("vmovlhps xmm0, xmm1, xmm2")).codes(&[C::EVEX_Vmovhps_xmm_xmm_m64]),
    insn(M::Vmovhps, 0, one!("vmovhlps xmm0, xmm1, xmm1")).codes(&[C::EVEX_Vmovhps_m64_xmm]),
    insn(M::Vmovhpd, 0, one!("vmovlhps xmm0, xmm1, xmm2")).codes(&[C::EVEX_Vmovhpd_xmm_xmm_m64]),
    insn(M::Vmovhpd, 0, one!("vmovhlps xmm0, xmm1, xmm1")).codes(&[C::EVEX_Vmovhpd_m64_xmm]),
    insn(M::Vmovhlps, 0, one!("vmovhlps xmm0, xmm1, xmm2")),
    insn(M::Vmovlhps, 0, one!("vmovlhps xmm0, xmm1, xmm2")),
];
