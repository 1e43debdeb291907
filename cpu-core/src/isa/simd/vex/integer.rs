//! Packed integers, and what else is bits to the processor: logic, unpacking and permutation, approximate reciprocals, AES.
//! One host instruction each. SDM Vol. 2, the page of each mnemonic.
#![expect(unsafe_code, reason = "rows expand to host instructions")]

use iced_x86::Mnemonic as M;

use super::{text, three, two, vex};
use crate::decode::digest::{Digest, Lowered};
use crate::isa::Row;

/// A shift of all lanes by the low quadword of an XMM register, or by an immediate.
macro_rules! shift {
    ($name:literal) => {{
        struct I;
        crate::host_vex::vex_impl!(I, concat!($name, " xmm0, xmm0, xmm1"), concat!($name, " ymm0, ymm0, xmm1"));
        super::data_or_imm::<I>
    }};
}

/// Only for 256 bits.
macro_rules! wide {
    ($text:literal) => {
        text!($text, $text)
    };
}

/// The destination plus products of the two sources. EVEX forms have the same name.
macro_rules! accumulate {
    ($name:literal) => {
        text!(
            concat!("vmovdqu xmm2, [{d}]\n{{vex}} ", $name, " xmm2, xmm0, xmm1\nvmovdqa xmm0, xmm2"),
            concat!("vmovdqu ymm2, [{d}]\n{{vex}} ", $name, " ymm2, ymm0, ymm1\nvmovdqa ymm0, ymm2")
        )
    };
}

pub(in crate::isa) const ROWS: &[Row] = &[
    vex(M::Vpaddb, three!("vpaddb")),
    vex(M::Vpaddw, three!("vpaddw")),
    vex(M::Vpaddd, three!("vpaddd")),
    vex(M::Vpaddq, three!("vpaddq")),
    vex(M::Vpaddsb, three!("vpaddsb")),
    vex(M::Vpaddsw, three!("vpaddsw")),
    vex(M::Vpaddusb, three!("vpaddusb")),
    vex(M::Vpaddusw, three!("vpaddusw")),
    vex(M::Vpsubb, three!("vpsubb")),
    vex(M::Vpsubw, three!("vpsubw")),
    vex(M::Vpsubd, three!("vpsubd")),
    vex(M::Vpsubq, three!("vpsubq")),
    vex(M::Vpsubsb, three!("vpsubsb")),
    vex(M::Vpsubsw, three!("vpsubsw")),
    vex(M::Vpsubusb, three!("vpsubusb")),
    vex(M::Vpsubusw, three!("vpsubusw")),
    vex(M::Vpmullw, three!("vpmullw")),
    vex(M::Vpmulhw, three!("vpmulhw")),
    vex(M::Vpmulhuw, three!("vpmulhuw")),
    vex(M::Vpmuludq, three!("vpmuludq")),
    vex(M::Vpmaddwd, three!("vpmaddwd")),
    vex(M::Vpdpbusd, accumulate!("vpdpbusd")),
    vex(M::Vpdpbusds, accumulate!("vpdpbusds")),
    vex(M::Vpdpwssd, accumulate!("vpdpwssd")),
    vex(M::Vpdpwssds, accumulate!("vpdpwssds")),
    vex(M::Vpavgb, three!("vpavgb")),
    vex(M::Vpavgw, three!("vpavgw")),
    vex(M::Vpminub, three!("vpminub")),
    vex(M::Vpminsw, three!("vpminsw")),
    vex(M::Vpmaxub, three!("vpmaxub")),
    vex(M::Vpmaxsw, three!("vpmaxsw")),
    vex(M::Vpsadbw, three!("vpsadbw")),
    vex(M::Vpcmpeqb, three!("vpcmpeqb")),
    vex(M::Vpcmpeqw, three!("vpcmpeqw")),
    vex(M::Vpcmpeqd, three!("vpcmpeqd")),
    vex(M::Vpcmpgtb, three!("vpcmpgtb")),
    vex(M::Vpcmpgtw, three!("vpcmpgtw")),
    vex(M::Vpcmpgtd, three!("vpcmpgtd")),
    vex(M::Vpacksswb, three!("vpacksswb")),
    vex(M::Vpackssdw, three!("vpackssdw")),
    vex(M::Vpackuswb, three!("vpackuswb")),
    vex(M::Vpunpckhbw, three!("vpunpckhbw")),
    vex(M::Vpunpckhwd, three!("vpunpckhwd")),
    vex(M::Vpunpckhdq, three!("vpunpckhdq")),
    vex(M::Vpunpckhqdq, three!("vpunpckhqdq")),
    vex(M::Vpunpcklbw, three!("vpunpcklbw")),
    vex(M::Vpunpcklwd, three!("vpunpcklwd")),
    vex(M::Vpunpckldq, three!("vpunpckldq")),
    vex(M::Vpunpcklqdq, three!("vpunpcklqdq")),
    vex(M::Vpand, three!("vpand")),
    vex(M::Vpandn, three!("vpandn")),
    vex(M::Vpor, three!("vpor")),
    vex(M::Vpxor, three!("vpxor")),
    vex(M::Vandps, three!("vandps")),
    vex(M::Vandpd, three!("vandpd")),
    vex(M::Vandnps, three!("vandnps")),
    vex(M::Vandnpd, three!("vandnpd")),
    vex(M::Vorps, three!("vorps")),
    vex(M::Vorpd, three!("vorpd")),
    vex(M::Vxorps, three!("vxorps")),
    vex(M::Vxorpd, three!("vxorpd")),
    vex(M::Vunpckhps, three!("vunpckhps")),
    vex(M::Vunpckhpd, three!("vunpckhpd")),
    vex(M::Vunpcklps, three!("vunpcklps")),
    vex(M::Vunpcklpd, three!("vunpcklpd")),
    vex(M::Vrcpss, text!("vrcpss xmm0, xmm0, xmm1", "vrcpss xmm0, xmm0, xmm1")),
    vex(M::Vrsqrtss, text!("vrsqrtss xmm0, xmm0, xmm1", "vrsqrtss xmm0, xmm0, xmm1")),
    vex(M::Vphaddw, three!("vphaddw")),
    vex(M::Vphaddd, three!("vphaddd")),
    vex(M::Vphaddsw, three!("vphaddsw")),
    vex(M::Vphsubw, three!("vphsubw")),
    vex(M::Vphsubd, three!("vphsubd")),
    vex(M::Vphsubsw, three!("vphsubsw")),
    vex(M::Vpmaddubsw, three!("vpmaddubsw")),
    vex(M::Vpmulhrsw, three!("vpmulhrsw")),
    vex(M::Vpshufb, three!("vpshufb")),
    vex(M::Vpsignb, three!("vpsignb")),
    vex(M::Vpsignw, three!("vpsignw")),
    vex(M::Vpsignd, three!("vpsignd")),
    vex(M::Vpackusdw, three!("vpackusdw")),
    vex(M::Vpcmpeqq, three!("vpcmpeqq")),
    vex(M::Vpmaxsb, three!("vpmaxsb")),
    vex(M::Vpmaxsd, three!("vpmaxsd")),
    vex(M::Vpmaxud, three!("vpmaxud")),
    vex(M::Vpmaxuw, three!("vpmaxuw")),
    vex(M::Vpminsb, three!("vpminsb")),
    vex(M::Vpminsd, three!("vpminsd")),
    vex(M::Vpminud, three!("vpminud")),
    vex(M::Vpminuw, three!("vpminuw")),
    vex(M::Vpmuldq, three!("vpmuldq")),
    vex(M::Vpmulld, three!("vpmulld")),
    vex(M::Vpcmpgtq, three!("vpcmpgtq")),
    vex(M::Vaesenc, three!("vaesenc")),
    vex(M::Vaesenclast, three!("vaesenclast")),
    vex(M::Vaesdec, three!("vaesdec")),
    vex(M::Vaesdeclast, three!("vaesdeclast")),
    vex(M::Vmovshdup, two!("vmovshdup")),
    vex(M::Vmovsldup, two!("vmovsldup")),
    vex(M::Vmovddup, two!("vmovddup")),
    vex(M::Vrcpps, two!("vrcpps")),
    vex(M::Vrsqrtps, two!("vrsqrtps")),
    vex(M::Vpabsb, two!("vpabsb")),
    vex(M::Vpabsw, two!("vpabsw")),
    vex(M::Vpabsd, two!("vpabsd")),
    vex(M::Vpmovsxbw, two!("vpmovsxbw", "ymm0, xmm1")),
    vex(M::Vpmovsxbd, two!("vpmovsxbd", "ymm0, xmm1")),
    vex(M::Vpmovsxbq, two!("vpmovsxbq", "ymm0, xmm1")),
    vex(M::Vpmovsxwd, two!("vpmovsxwd", "ymm0, xmm1")),
    vex(M::Vpmovsxwq, two!("vpmovsxwq", "ymm0, xmm1")),
    vex(M::Vpmovsxdq, two!("vpmovsxdq", "ymm0, xmm1")),
    vex(M::Vpmovzxbw, two!("vpmovzxbw", "ymm0, xmm1")),
    vex(M::Vpmovzxbd, two!("vpmovzxbd", "ymm0, xmm1")),
    vex(M::Vpmovzxbq, two!("vpmovzxbq", "ymm0, xmm1")),
    vex(M::Vpmovzxwd, two!("vpmovzxwd", "ymm0, xmm1")),
    vex(M::Vpmovzxwq, two!("vpmovzxwq", "ymm0, xmm1")),
    vex(M::Vpmovzxdq, two!("vpmovzxdq", "ymm0, xmm1")),
    vex(M::Vcvtdq2pd, two!("vcvtdq2pd", "ymm0, xmm1")),
    vex(M::Vpsllw, shift!("vpsllw")),
    vex(M::Vpslld, shift!("vpslld")),
    vex(M::Vpsllq, shift!("vpsllq")),
    vex(M::Vpsrlw, shift!("vpsrlw")),
    vex(M::Vpsrld, shift!("vpsrld")),
    vex(M::Vpsrlq, shift!("vpsrlq")),
    vex(M::Vpsraw, shift!("vpsraw")),
    vex(M::Vpsrad, shift!("vpsrad")),
    vex(M::Vphminposuw, two!("vphminposuw", "xmm0, xmm1")),
    vex(M::Vaesimc, two!("vaesimc", "xmm0, xmm1")),
    // Lanes that cross 128 bits, and lanes shifted by counts of their own
    vex(M::Vpermilps, permil_ps),
    vex(M::Vpermilpd, permil_pd),
    vex(M::Vpermd, wide!("vpermd ymm0, ymm0, ymm1")),
    vex(M::Vpermps, wide!("vpermps ymm0, ymm0, ymm1")),
    vex(M::Vpsllvd, three!("vpsllvd")),
    vex(M::Vpsllvq, three!("vpsllvq")),
    vex(M::Vpsrlvd, three!("vpsrlvd")),
    vex(M::Vpsrlvq, three!("vpsrlvq")),
    vex(M::Vpsravd, three!("vpsravd")),
    // Broadcasts. Those of AVX alone must not need AVX2 of the host.
    vex(
        M::Vbroadcastss,
        text!("vshufps xmm0, xmm1, xmm1, 0", "vshufps xmm0, xmm1, xmm1, 0\nvinsertf128 ymm0, ymm0, xmm0, 1"),
    ),
    vex(M::Vbroadcastsd, wide!("vmovddup xmm0, xmm1\nvinsertf128 ymm0, ymm0, xmm0, 1")),
    vex(M::Vbroadcastf128, wide!("vinsertf128 ymm0, ymm1, xmm1, 1")),
    vex(M::Vbroadcasti128, wide!("vinsertf128 ymm0, ymm1, xmm1, 1")),
    vex(M::Vpbroadcastb, two!("vpbroadcastb", "ymm0, xmm1")),
    vex(M::Vpbroadcastw, two!("vpbroadcastw", "ymm0, xmm1")),
    vex(M::Vpbroadcastd, two!("vpbroadcastd", "ymm0, xmm1")),
    vex(M::Vpbroadcastq, two!("vpbroadcastq", "ymm0, xmm1")),
];

/// Without an immediate; with one it is a shuffle.
fn permil_ps(d: &Digest<'_>) -> Option<Lowered> {
    if d.is_imm(2) { super::shuffle::permil::<32>(d) } else { (three!("vpermilps"))(d) }
}

fn permil_pd(d: &Digest<'_>) -> Option<Lowered> {
    if d.is_imm(2) { super::shuffle::permil::<64>(d) } else { (three!("vpermilpd"))(d) }
}
