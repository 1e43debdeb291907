//! Conversions between floats and integers, and between widths of either. SDM Vol. 2, the page of each mnemonic.

use iced_x86::{Mnemonic as M, OpCodeOperandKind as K};

use super::{
    Float, Inexact, Insn, da, dab, from_xmm, insn, narrowed, narrowed_imm, one, rows, scalar, to_xmm, widened,
};
use crate::isa::Row;

pub(in crate::isa) const ROWS: &[Row] = &rows(&INSNS);

pub(super) static INSNS: [Insn; 86] = [
    // Floats and integers
    insn(M::Vcvtps2dq, 4, da!("vcvtps2dq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttps2dq, 4, da!("vcvttps2dq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtps2udq, 4, da!("vcvtps2udq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttps2udq, 4, da!("vcvttps2udq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtdq2ps, 4, da!("vcvtdq2ps")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtudq2ps, 4, da!("vcvtudq2ps")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtpd2qq, 8, da!("vcvtpd2qq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttpd2qq, 8, da!("vcvttpd2qq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtpd2uqq, 8, da!("vcvtpd2uqq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttpd2uqq, 8, da!("vcvttpd2uqq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtqq2pd, 8, da!("vcvtqq2pd")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtuqq2pd, 8, da!("vcvtuqq2pd")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtdq2pd, 8, widened!("vcvtdq2pd")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtudq2pd, 8, widened!("vcvtudq2pd")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtps2qq, 8, widened!("vcvtps2qq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttps2qq, 8, widened!("vcvttps2qq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtps2uqq, 8, widened!("vcvtps2uqq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttps2uqq, 8, widened!("vcvttps2uqq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtpd2dq, 8, narrowed!("vcvtpd2dq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttpd2dq, 8, narrowed!("vcvttpd2dq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtpd2udq, 8, narrowed!("vcvtpd2udq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttpd2udq, 8, narrowed!("vcvttpd2udq")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtqq2ps, 8, narrowed!("vcvtqq2ps")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtuqq2ps, 8, narrowed!("vcvtuqq2ps")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsi2ss, 0, one!("vcvtsi2ss xmm0, xmm1, rax")).with(K::r64_or_mem).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsi2ss, 0, one!("vcvtsi2ss xmm0, xmm1, eax")).with(K::r32_or_mem).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsi2sd, 0, one!("vcvtsi2sd xmm0, xmm1, rax")).with(K::r64_or_mem).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsi2sd, 0, one!("vcvtsi2sd xmm0, xmm1, eax")).with(K::r32_or_mem).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtusi2ss, 0, one!("vcvtusi2ss xmm0, xmm1, rax"))
        .with(K::r64_or_mem)
        .float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtusi2ss, 0, one!("vcvtusi2ss xmm0, xmm1, eax"))
        .with(K::r32_or_mem)
        .float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtusi2sd, 0, one!("vcvtusi2sd xmm0, xmm1, rax"))
        .with(K::r64_or_mem)
        .float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtusi2sd, 0, one!("vcvtusi2sd xmm0, xmm1, eax"))
        .with(K::r32_or_mem)
        .float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtss2si, 0, one!("vcvtss2si rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtss2si, 0, one!("vcvtss2si eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtss2usi, 0, one!("vcvtss2usi rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtss2usi, 0, one!("vcvtss2usi eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsd2si, 0, one!("vcvtsd2si rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsd2si, 0, one!("vcvtsd2si eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsd2usi, 0, one!("vcvtsd2usi rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsd2usi, 0, one!("vcvtsd2usi eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttss2si, 0, one!("vcvttss2si rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttss2si, 0, one!("vcvttss2si eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttss2usi, 0, one!("vcvttss2usi rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttss2usi, 0, one!("vcvttss2usi eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttsd2si, 0, one!("vcvttsd2si rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttsd2si, 0, one!("vcvttsd2si eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttsd2usi, 0, one!("vcvttsd2usi rax, xmm1")).with(K::r64_reg).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvttsd2usi, 0, one!("vcvttsd2usi eax, xmm1")).with(K::r32_reg).float(Float::Other, Inexact::Unknown),
    // Widths of floats
    insn(M::Vcvtps2pd, 8, widened!("vcvtps2pd")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtpd2ps, 8, narrowed!("vcvtpd2ps")).float(Float::Single, Inexact::Narrow),
    insn(M::Vcvtss2sd, 0, scalar!("vcvtss2sd")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtsd2ss, 0, scalar!("vcvtsd2ss")).float(Float::Single, Inexact::NarrowScalar),
    insn(M::Vcvtph2ps, 4, widened!("vcvtph2ps")).float(Float::Other, Inexact::Unknown),
    insn(M::Vcvtps2ph, 4, narrowed_imm!("vcvtps2ph")).imm().float(Float::Half, Inexact::Half),
    insn(M::Vcvtneps2bf16, 4, narrowed!("vcvtneps2bf16")),
    insn(M::Vcvtne2ps2bf16, 2, dab!("vcvtne2ps2bf16")).whole(),
    // Widths of integers
    insn(M::Vpmovsxbw, 2, widened!("vpmovsxbw")),
    insn(M::Vpmovsxbd, 4, from_xmm!("vpmovsxbd")),
    insn(M::Vpmovsxbq, 8, from_xmm!("vpmovsxbq")),
    insn(M::Vpmovsxwd, 4, widened!("vpmovsxwd")),
    insn(M::Vpmovsxwq, 8, from_xmm!("vpmovsxwq")),
    insn(M::Vpmovsxdq, 8, widened!("vpmovsxdq")),
    insn(M::Vpmovzxbw, 2, widened!("vpmovzxbw")),
    insn(M::Vpmovzxbd, 4, from_xmm!("vpmovzxbd")),
    insn(M::Vpmovzxbq, 8, from_xmm!("vpmovzxbq")),
    insn(M::Vpmovzxwd, 4, widened!("vpmovzxwd")),
    insn(M::Vpmovzxwq, 8, from_xmm!("vpmovzxwq")),
    insn(M::Vpmovzxdq, 8, widened!("vpmovzxdq")),
    insn(M::Vpmovwb, 2, narrowed!("vpmovwb")),
    insn(M::Vpmovdb, 4, to_xmm!("vpmovdb")),
    insn(M::Vpmovdw, 4, narrowed!("vpmovdw")),
    insn(M::Vpmovqb, 8, to_xmm!("vpmovqb")),
    insn(M::Vpmovqw, 8, to_xmm!("vpmovqw")),
    insn(M::Vpmovqd, 8, narrowed!("vpmovqd")),
    insn(M::Vpmovswb, 2, narrowed!("vpmovswb")),
    insn(M::Vpmovsdb, 4, to_xmm!("vpmovsdb")),
    insn(M::Vpmovsdw, 4, narrowed!("vpmovsdw")),
    insn(M::Vpmovsqb, 8, to_xmm!("vpmovsqb")),
    insn(M::Vpmovsqw, 8, to_xmm!("vpmovsqw")),
    insn(M::Vpmovsqd, 8, narrowed!("vpmovsqd")),
    insn(M::Vpmovuswb, 2, narrowed!("vpmovuswb")),
    insn(M::Vpmovusdb, 4, to_xmm!("vpmovusdb")),
    insn(M::Vpmovusdw, 4, narrowed!("vpmovusdw")),
    insn(M::Vpmovusqb, 8, to_xmm!("vpmovusqb")),
    insn(M::Vpmovusqw, 8, to_xmm!("vpmovusqw")),
    insn(M::Vpmovusqd, 8, narrowed!("vpmovusqd")),
];
