//! Comparisons and tests into mask registers and RFLAGS, and moves between masks and vectors. SDM Vol. 2, the page of each
//! mnemonic.

use iced_x86::Mnemonic as M;

use super::{Float, Inexact, Insn, from_mask, insn, kab, kabi, kai, one, one_imm, rows, to_mask};
use crate::isa::Row;

pub(in crate::isa) const ROWS: &[Row] = &rows(&INSNS);

pub(super) static INSNS: [Insn; 45] = [
    // Integers
    insn(M::Vpcmpeqb, 1, kab!("vpcmpeqb")),
    insn(M::Vpcmpeqw, 2, kab!("vpcmpeqw")),
    insn(M::Vpcmpeqd, 4, kab!("vpcmpeqd")),
    insn(M::Vpcmpeqq, 8, kab!("vpcmpeqq")),
    insn(M::Vpcmpgtb, 1, kab!("vpcmpgtb")),
    insn(M::Vpcmpgtw, 2, kab!("vpcmpgtw")),
    insn(M::Vpcmpgtd, 4, kab!("vpcmpgtd")),
    insn(M::Vpcmpgtq, 8, kab!("vpcmpgtq")),
    insn(M::Vptestmb, 1, kab!("vptestmb")),
    insn(M::Vptestmw, 2, kab!("vptestmw")),
    insn(M::Vptestmd, 4, kab!("vptestmd")),
    insn(M::Vptestmq, 8, kab!("vptestmq")),
    insn(M::Vptestnmb, 1, kab!("vptestnmb")),
    insn(M::Vptestnmw, 2, kab!("vptestnmw")),
    insn(M::Vptestnmd, 4, kab!("vptestnmd")),
    insn(M::Vptestnmq, 8, kab!("vptestnmq")),
    insn(M::Vpcmpb, 1, kabi!("vpcmpb")).imm(),
    insn(M::Vpcmpub, 1, kabi!("vpcmpub")).imm(),
    insn(M::Vpcmpw, 2, kabi!("vpcmpw")).imm(),
    insn(M::Vpcmpuw, 2, kabi!("vpcmpuw")).imm(),
    insn(M::Vpcmpd, 4, kabi!("vpcmpd")).imm(),
    insn(M::Vpcmpud, 4, kabi!("vpcmpud")).imm(),
    insn(M::Vpcmpq, 8, kabi!("vpcmpq")).imm(),
    insn(M::Vpcmpuq, 8, kabi!("vpcmpuq")).imm(),
    insn(M::Vpshufbitqmb, 1, kab!("vpshufbitqmb")),
    insn(M::Vpmovb2m, 1, to_mask!("vpmovb2m")),
    insn(M::Vpmovw2m, 2, to_mask!("vpmovw2m")),
    insn(M::Vpmovd2m, 4, to_mask!("vpmovd2m")),
    insn(M::Vpmovq2m, 8, to_mask!("vpmovq2m")),
    insn(M::Vpmovm2b, 1, from_mask!("vpmovm2b")),
    insn(M::Vpmovm2w, 2, from_mask!("vpmovm2w")),
    insn(M::Vpmovm2d, 4, from_mask!("vpmovm2d")),
    insn(M::Vpmovm2q, 8, from_mask!("vpmovm2q")),
    // Floats
    insn(M::Vcmpps, 4, kabi!("vcmpps")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vcmppd, 8, kabi!("vcmppd")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vcmpss, 0, one_imm!("vcmpss k2 {{k1}}, xmm1, xmm2")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vcmpsd, 0, one_imm!("vcmpsd k2 {{k1}}, xmm1, xmm2")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vfpclassps, 4, kai!("vfpclassps")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vfpclasspd, 8, kai!("vfpclasspd")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vfpclassss, 0, one_imm!("vfpclassss k2 {{k1}}, xmm1")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vfpclasssd, 0, one_imm!("vfpclasssd k2 {{k1}}, xmm1")).imm().float(Float::Other, Inexact::Unknown),
    insn(M::Vcomiss, 0, one!("vcomiss xmm1, xmm2\npushfq\npop rax")).flags().float(Float::Other, Inexact::Unknown),
    insn(M::Vcomisd, 0, one!("vcomisd xmm1, xmm2\npushfq\npop rax")).flags().float(Float::Other, Inexact::Unknown),
    insn(M::Vucomiss, 0, one!("vucomiss xmm1, xmm2\npushfq\npop rax")).flags().float(Float::Other, Inexact::Unknown),
    insn(M::Vucomisd, 0, one!("vucomisd xmm1, xmm2\npushfq\npop rax")).flags().float(Float::Other, Inexact::Unknown),
];
