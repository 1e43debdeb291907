//! Lanes to other places: shuffles, permutations, broadcasts, compression. SDM Vol. 2, the page of each mnemonic.

use iced_x86::{Mnemonic as M, OpCodeOperandKind as K};

use super::{
    Insn, Memory, da, dab, dab_wide, dabi, dabi_wide, dai, dai_wide, from_eax, from_mask, from_rax, from_xmm,
    from_xmm_wide, insn, one_imm, rows, stubs,
};
use crate::isa::Row;

pub(in crate::isa) const ROWS: &[Row] = &rows(&INSNS);

pub(super) static INSNS: [Insn; 113] = [
    // Within 128 bits
    insn(M::Vpshufb, 1, dab!("vpshufb")).whole(),
    insn(M::Vpunpckhbw, 1, dab!("vpunpckhbw")).whole(),
    insn(M::Vpunpckhwd, 2, dab!("vpunpckhwd")).whole(),
    insn(M::Vpunpckhdq, 4, dab!("vpunpckhdq")).whole(),
    insn(M::Vpunpckhqdq, 8, dab!("vpunpckhqdq")).whole(),
    insn(M::Vpunpcklbw, 1, dab!("vpunpcklbw")).whole(),
    insn(M::Vpunpcklwd, 2, dab!("vpunpcklwd")).whole(),
    insn(M::Vpunpckldq, 4, dab!("vpunpckldq")).whole(),
    insn(M::Vpunpcklqdq, 8, dab!("vpunpcklqdq")).whole(),
    insn(M::Vunpckhps, 4, dab!("vunpckhps")).whole(),
    insn(M::Vunpckhpd, 8, dab!("vunpckhpd")).whole(),
    insn(M::Vunpcklps, 4, dab!("vunpcklps")).whole(),
    insn(M::Vunpcklpd, 8, dab!("vunpcklpd")).whole(),
    insn(M::Vpacksswb, 1, dab!("vpacksswb")).whole(),
    insn(M::Vpackssdw, 2, dab!("vpackssdw")).whole(),
    insn(M::Vpackuswb, 1, dab!("vpackuswb")).whole(),
    insn(M::Vpackusdw, 2, dab!("vpackusdw")).whole(),
    insn(M::Vpshufd, 4, dai!("vpshufd")).imm().whole(),
    insn(M::Vpshufhw, 2, dai!("vpshufhw")).imm().whole(),
    insn(M::Vpshuflw, 2, dai!("vpshuflw")).imm().whole(),
    insn(M::Vshufps, 4, dabi!("vshufps")).imm().whole(),
    insn(M::Vshufpd, 8, dabi!("vshufpd")).imm().whole(),
    insn(M::Vpermilps, 4, dai!("vpermilps")).imm().whole().with(K::imm8),
    insn(M::Vpermilps, 4, dab!("vpermilps")).whole(),
    insn(M::Vpermilpd, 8, dai!("vpermilpd")).imm().whole().with(K::imm8),
    insn(M::Vpermilpd, 8, dab!("vpermilpd")).whole(),
    insn(M::Vpalignr, 1, dabi!("vpalignr")).imm().whole(),
    insn(M::Vmovddup, 8, da!("vmovddup")).whole(),
    insn(M::Vmovshdup, 4, da!("vmovshdup")).whole(),
    insn(M::Vmovsldup, 4, da!("vmovsldup")).whole(),
    insn(M::Vpmultishiftqb, 1, dab!("vpmultishiftqb")).whole(),
    // Across a vector
    insn(M::Vpermb, 1, dab!("vpermb")).whole(),
    insn(M::Vpermw, 2, dab!("vpermw")).whole(),
    insn(M::Vpermd, 4, dab_wide!("vpermd")).whole(),
    insn(M::Vpermps, 4, dab_wide!("vpermps")).whole(),
    insn(M::Vpermq, 8, dai_wide!("vpermq")).imm().whole().with(K::imm8),
    insn(M::Vpermq, 8, dab_wide!("vpermq")).whole(),
    insn(M::Vpermpd, 8, dai_wide!("vpermpd")).imm().whole().with(K::imm8),
    insn(M::Vpermpd, 8, dab_wide!("vpermpd")).whole(),
    insn(M::Vpermi2b, 1, dab!("vpermi2b")).whole().reads_destination(),
    insn(M::Vpermi2w, 2, dab!("vpermi2w")).whole().reads_destination(),
    insn(M::Vpermi2d, 4, dab!("vpermi2d")).whole().reads_destination(),
    insn(M::Vpermi2q, 8, dab!("vpermi2q")).whole().reads_destination(),
    insn(M::Vpermi2ps, 4, dab!("vpermi2ps")).whole().reads_destination(),
    insn(M::Vpermi2pd, 8, dab!("vpermi2pd")).whole().reads_destination(),
    insn(M::Vpermt2b, 1, dab!("vpermt2b")).whole().reads_destination(),
    insn(M::Vpermt2w, 2, dab!("vpermt2w")).whole().reads_destination(),
    insn(M::Vpermt2d, 4, dab!("vpermt2d")).whole().reads_destination(),
    insn(M::Vpermt2q, 8, dab!("vpermt2q")).whole().reads_destination(),
    insn(M::Vpermt2ps, 4, dab!("vpermt2ps")).whole().reads_destination(),
    insn(M::Vpermt2pd, 8, dab!("vpermt2pd")).whole().reads_destination(),
    insn(M::Vshuff32x4, 4, dabi_wide!("vshuff32x4")).imm().whole(),
    insn(M::Vshuff64x2, 8, dabi_wide!("vshuff64x2")).imm().whole(),
    insn(M::Vshufi32x4, 4, dabi_wide!("vshufi32x4")).imm().whole(),
    insn(M::Vshufi64x2, 8, dabi_wide!("vshufi64x2")).imm().whole(),
    insn(M::Valignd, 4, dabi!("valignd")).imm().whole(),
    insn(M::Valignq, 8, dabi!("valignq")).imm().whole(),
    // Chosen by a mask
    insn(M::Vblendmps, 4, dab!("vblendmps")).reads_destination(),
    insn(M::Vblendmpd, 8, dab!("vblendmpd")).reads_destination(),
    insn(M::Vpblendmb, 1, dab!("vpblendmb")).reads_destination(),
    insn(M::Vpblendmw, 2, dab!("vpblendmw")).reads_destination(),
    insn(M::Vpblendmd, 4, dab!("vpblendmd")).reads_destination(),
    insn(M::Vpblendmq, 8, dab!("vpblendmq")).reads_destination(),
    insn(M::Vcompressps, 4, da!("vcompressps")).memory(Memory::Packed),
    insn(M::Vcompresspd, 8, da!("vcompresspd")).memory(Memory::Packed),
    insn(M::Vpcompressb, 1, da!("vpcompressb")).memory(Memory::Packed),
    insn(M::Vpcompressw, 2, da!("vpcompressw")).memory(Memory::Packed),
    insn(M::Vpcompressd, 4, da!("vpcompressd")).memory(Memory::Packed),
    insn(M::Vpcompressq, 8, da!("vpcompressq")).memory(Memory::Packed),
    insn(M::Vexpandps, 4, da!("vexpandps")).memory(Memory::Packed),
    insn(M::Vexpandpd, 8, da!("vexpandpd")).memory(Memory::Packed),
    insn(M::Vpexpandb, 1, da!("vpexpandb")).memory(Memory::Packed),
    insn(M::Vpexpandw, 2, da!("vpexpandw")).memory(Memory::Packed),
    insn(M::Vpexpandd, 4, da!("vpexpandd")).memory(Memory::Packed),
    insn(M::Vpexpandq, 8, da!("vpexpandq")).memory(Memory::Packed),
    // Copies of a lane, or of some. Those from memory alone come here as a whole vector.
    insn(M::Vbroadcastss, 4, from_xmm!("vbroadcastss")).memory(Memory::Repeated),
    insn(M::Vbroadcastsd, 8, from_xmm_wide!("vbroadcastsd")).memory(Memory::Repeated),
    insn(M::Vbroadcastf32x2, 4, from_xmm_wide!("vbroadcastf32x2")).memory(Memory::Repeated),
    insn(M::Vbroadcasti32x2, 4, from_xmm!("vbroadcasti32x2")).memory(Memory::Repeated),
    insn(M::Vpbroadcastb, 1, from_eax!("vpbroadcastb")).with(K::r32_rm),
    insn(M::Vpbroadcastw, 2, from_eax!("vpbroadcastw")).with(K::r32_rm),
    insn(M::Vpbroadcastd, 4, from_eax!("vpbroadcastd")).with(K::r32_rm),
    insn(M::Vpbroadcastq, 8, from_rax!("vpbroadcastq")).with(K::r64_rm),
    insn(M::Vpbroadcastb, 1, from_xmm!("vpbroadcastb")).memory(Memory::Repeated),
    insn(M::Vpbroadcastw, 2, from_xmm!("vpbroadcastw")).memory(Memory::Repeated),
    insn(M::Vpbroadcastd, 4, from_xmm!("vpbroadcastd")).memory(Memory::Repeated),
    insn(M::Vpbroadcastq, 8, from_xmm!("vpbroadcastq")).memory(Memory::Repeated),
    insn(M::Vbroadcastf32x4, 4, da!("vmovdqu32")).memory(Memory::Repeated),
    insn(M::Vbroadcasti32x4, 4, da!("vmovdqu32")).memory(Memory::Repeated),
    insn(M::Vbroadcastf32x8, 4, da!("vmovdqu32")).memory(Memory::Repeated),
    insn(M::Vbroadcasti32x8, 4, da!("vmovdqu32")).memory(Memory::Repeated),
    insn(M::Vbroadcastf64x2, 8, da!("vmovdqu64")).memory(Memory::Repeated),
    insn(M::Vbroadcasti64x2, 8, da!("vmovdqu64")).memory(Memory::Repeated),
    insn(M::Vbroadcastf64x4, 8, da!("vmovdqu64")).memory(Memory::Repeated),
    insn(M::Vbroadcasti64x4, 8, da!("vmovdqu64")).memory(Memory::Repeated),
    insn(M::Vpbroadcastmb2q, 8, from_mask!("vpbroadcastmb2q")),
    insn(M::Vpbroadcastmw2d, 4, from_mask!("vpbroadcastmw2d")),
    // Parts of vectors
    insn(
        M::Vextractf32x4,
        4,
        stubs!(stub_imm, "vextractf32x4", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, zmm1"),
    )
    .imm()
    .span(16)
    .whole(),
    insn(
        M::Vextractf64x2,
        8,
        stubs!(stub_imm, "vextractf64x2", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, zmm1"),
    )
    .imm()
    .span(16)
    .whole(),
    insn(M::Vextractf32x8, 4, one_imm!("vextractf32x8 ymm0 {{k1}}, zmm1")).imm().span(32).whole(),
    insn(M::Vextractf64x4, 8, one_imm!("vextractf64x4 ymm0 {{k1}}, zmm1")).imm().span(32).whole(),
    insn(
        M::Vinsertf32x4,
        4,
        stubs!(
            stub_imm,
            "vinsertf32x4",
            "ymm0 {{k1}}, ymm1, xmm2",
            "ymm0 {{k1}}, ymm1, xmm2",
            "zmm0 {{k1}}, zmm1, xmm2"
        ),
    )
    .imm()
    .whole(),
    insn(
        M::Vinsertf64x2,
        8,
        stubs!(
            stub_imm,
            "vinsertf64x2",
            "ymm0 {{k1}}, ymm1, xmm2",
            "ymm0 {{k1}}, ymm1, xmm2",
            "zmm0 {{k1}}, zmm1, xmm2"
        ),
    )
    .imm()
    .whole(),
    insn(M::Vinsertf32x8, 4, one_imm!("vinsertf32x8 zmm0 {{k1}}, zmm1, ymm2")).imm().whole(),
    insn(M::Vinsertf64x4, 8, one_imm!("vinsertf64x4 zmm0 {{k1}}, zmm1, ymm2")).imm().whole(),
    insn(
        M::Vextracti32x4,
        4,
        stubs!(stub_imm, "vextracti32x4", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, zmm1"),
    )
    .imm()
    .span(16)
    .whole(),
    insn(
        M::Vextracti64x2,
        8,
        stubs!(stub_imm, "vextracti64x2", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, ymm1", "xmm0 {{k1}}, zmm1"),
    )
    .imm()
    .span(16)
    .whole(),
    insn(M::Vextracti32x8, 4, one_imm!("vextracti32x8 ymm0 {{k1}}, zmm1")).imm().span(32).whole(),
    insn(M::Vextracti64x4, 8, one_imm!("vextracti64x4 ymm0 {{k1}}, zmm1")).imm().span(32).whole(),
    insn(
        M::Vinserti32x4,
        4,
        stubs!(
            stub_imm,
            "vinserti32x4",
            "ymm0 {{k1}}, ymm1, xmm2",
            "ymm0 {{k1}}, ymm1, xmm2",
            "zmm0 {{k1}}, zmm1, xmm2"
        ),
    )
    .imm()
    .whole(),
    insn(
        M::Vinserti64x2,
        8,
        stubs!(
            stub_imm,
            "vinserti64x2",
            "ymm0 {{k1}}, ymm1, xmm2",
            "ymm0 {{k1}}, ymm1, xmm2",
            "zmm0 {{k1}}, zmm1, xmm2"
        ),
    )
    .imm()
    .whole(),
    insn(M::Vinserti32x8, 4, one_imm!("vinserti32x8 zmm0 {{k1}}, zmm1, ymm2")).imm().whole(),
    insn(M::Vinserti64x4, 8, one_imm!("vinserti64x4 zmm0 {{k1}}, zmm1, ymm2")).imm().whole(),
];
