//! XSAVE images as `KVM_GET_XSAVE` and `KVM_SET_XSAVE` move them: the standard form of SDM Vol. 1 "XSAVE Area".

use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};
use std::sync::LazyLock;

use cpu_core::Fpu;
use nix::errno::Errno;

/// XCR0 components: x87, SSE, and AVX, AVX-512's and PKRU where the host has them.
pub(crate) fn components() -> u64 {
    let avx512 = if avx512_at().is_some() { AVX512 } else { 0 };
    X87 | SSE | avx512 | if has_avx() { AVX } else { 0 } | if pkru_at().is_some() { PKRU } else { 0 }
}
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const AVX512: u64 = OPMASK | ZMM_HI256 | HI16_ZMM;
const OPMASK: u64 = 1 << 5;
const ZMM_HI256: u64 = 1 << 6;
const HI16_ZMM: u64 = 1 << 7;
const PKRU: u64 = 1 << 9;

/// Bytes of an image: no component lies behind them. The answer for `KVM_CAP_XSAVE2`.
pub(crate) const IMAGE_BYTES: u32 = 4096;

/// Bytes of the AVX component: the upper halves of YMM0 to 15. SDM Vol. 1 "AVX State".
pub(crate) const AVX_BYTES: u32 = 256;
/// Its place in an image, which is the same on every processor.
pub(crate) const AVX_AT: u32 = HEADER_END as u32;

/// The core executes AVX with the host's own instructions.
pub(crate) fn has_avx() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}

/// Place of PKRU in an image, bytes, where the host has it. VMMs ask the host's CPUID for it and not ours (QEMU's
/// `kvm_cpu_xsave_init`), so guests of a host without it are told of no protection keys.
pub(crate) fn pkru_at() -> Option<u32> {
    static AT: LazyLock<Option<u32>> = LazyLock::new(|| place(9, 8));
    *AT
}

/// Bytes of AVX-512's components: opmask registers, upper halves of ZMM0 to 15, ZMM16 to 31. SDM Vol. 1 "AVX-512 State".
pub(crate) const AVX512_BYTES: [u32; 3] = [64, 512, 1024];

/// Their places in an image, bytes, where the host's instructions can execute AVX-512 for guests.
pub(crate) fn avx512_at() -> Option<[u32; 3]> {
    static AT: LazyLock<Option<[u32; 3]>> = LazyLock::new(|| {
        let [opmask, upper, high] = AVX512_BYTES;
        let places = [place(5, opmask)?, place(6, upper)?, place(7, high)?];
        let offered = crate::cpuid::OFFERED.contains(&x86_defs::cpuid::AVX512F);
        (offered && cpu_core::host_has_avx512()).then_some(places)
    });
    *AT
}

/// Components behind the header: number, bytes, place in an image.
pub(crate) fn places() -> impl Iterator<Item = (u32, u32, u32)> {
    let avx = has_avx().then_some((2, AVX_BYTES, AVX_AT));
    let avx512 = avx512_at().into_iter().flat_map(|at| (5..).zip(AVX512_BYTES).zip(at));
    let pkru = pkru_at().map(|at| (9, 8, at));
    avx.into_iter().chain(avx512.map(|((component, bytes), at)| (component, bytes, at))).chain(pkru)
}

/// Place of a component of `bytes` where the host has it.
fn place(component: u32, bytes: u32) -> Option<u32> {
    let highest = __cpuid(0).eax;
    let CpuidResult { eax, ebx, .. } = __cpuid_count(0xd, component);
    (highest >= 0xd && eax == bytes && ebx >= HEADER_END as u32 && ebx <= 4096 - bytes).then_some(ebx)
}

/// Bytes of the legacy region; the header follows: XSTATE_BV, XCOMP_BV, 48 reserved bytes.
const LEGACY: usize = 512;
const HEADER_END: usize = LEGACY + 64;
/// MXCSR bits that exist; the image's MXCSR_MASK.
const MXCSR_MASK: u32 = 0xffff;

/// XCR0 that XSETBV takes: x87 always, AVX with SSE, AVX-512's components together and with AVX, nothing beyond
/// `supported`.
pub(crate) fn is_valid_xcr0(xcr0: u64, supported: u64) -> bool {
    let avx512 = xcr0 & AVX512 == 0 || xcr0 & (AVX512 | AVX) == AVX512 | AVX;
    xcr0 & X87 != 0 && xcr0 & (SSE | AVX) != AVX && avx512 && xcr0 & !(supported | X87) == 0
}

/// The state of a CPU. All components are marked as in use, as Linux does for KVM.
pub(crate) fn image(fpu: &Fpu) -> [u32; 1024] {
    let mut bytes = [0; 4096];
    bytes[..LEGACY].copy_from_slice(&fpu.to_fxsave(MXCSR_MASK));
    bytes[LEGACY..LEGACY + 8].copy_from_slice(&components().to_le_bytes());
    if has_avx() {
        for (upper, register) in bytes[AVX_AT as usize..].chunks_exact_mut(16).zip(&fpu.vector[..16]) {
            upper.copy_from_slice(&register.0[16..32]);
        }
    }
    if let Some([opmask, upper, high]) = avx512_at().map(|at| at.map(|at| at as usize)) {
        for (bytes, k) in bytes[opmask..].chunks_exact_mut(8).zip(&fpu.k) {
            bytes.copy_from_slice(&k.to_le_bytes());
        }
        for (bytes, register) in bytes[upper..].chunks_exact_mut(32).zip(&fpu.vector[..16]) {
            bytes.copy_from_slice(&register.0[32..]);
        }
        for (bytes, register) in bytes[high..].chunks_exact_mut(64).zip(&fpu.vector[16..]) {
            bytes.copy_from_slice(&register.0);
        }
    }
    if let Some(at) = pkru_at() {
        bytes[at as usize..][..4].copy_from_slice(&fpu.pkru.to_le_bytes());
    }
    let mut words = [0; 1024];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    words
}

/// Loads an image; a component that its header leaves out gets its initial state. EINVAL: a component the core lacks, the
/// compacted form, reserved header bytes, or reserved bits in an MXCSR that is in use.
pub(crate) fn load(fpu: &mut Fpu, words: &[u32; 1024]) -> Result<(), Errno> {
    let bytes: Vec<u8> = words[..HEADER_END / 4].iter().flat_map(|word| word.to_le_bytes()).collect();
    let qword = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let in_use = qword(LEGACY);
    if in_use & !components() != 0 || bytes[LEGACY + 8..HEADER_END].iter().any(|&byte| byte != 0) {
        return Err(Errno::EINVAL);
    }
    if in_use & (X87 | SSE) != 0 && words[6] & !MXCSR_MASK != 0 {
        return Err(Errno::EINVAL);
    }
    let initial = Fpu { xcr0: fpu.xcr0, ..Fpu::default() };
    let mut image = initial.to_fxsave(MXCSR_MASK);
    let mut take = |range: std::ops::Range<usize>| image[range.clone()].copy_from_slice(&bytes[range]);
    if in_use & X87 != 0 {
        take(0..24);
        take(32..160);
    }
    if in_use & (X87 | SSE) != 0 {
        take(24..28);
    }
    if in_use & SSE != 0 {
        take(160..416);
    }
    fpu.load_fxsave(&image);
    let upper = words[AVX_AT as usize / 4..].chunks_exact(4);
    for (register, upper) in fpu.vector[..16].iter_mut().zip(upper) {
        for (bytes, word) in register.0[16..32].chunks_exact_mut(4).zip(upper) {
            bytes.copy_from_slice(&if in_use & AVX != 0 { *word } else { 0 }.to_le_bytes());
        }
    }
    let words_at = |at: usize, component: u64, words_of: &mut [u8]| {
        for (bytes, word) in words_of.chunks_exact_mut(4).zip(&words[at / 4..]) {
            bytes.copy_from_slice(&if in_use & component != 0 { *word } else { 0 }.to_le_bytes());
        }
    };
    if let Some([opmask, upper, high]) = avx512_at().map(|at| at.map(|at| at as usize)) {
        for (i, k) in fpu.k.iter_mut().enumerate() {
            let mut bytes = [0; 8];
            words_at(opmask + 8 * i, OPMASK, &mut bytes);
            *k = u64::from_le_bytes(bytes);
        }
        for (i, register) in fpu.vector[..16].iter_mut().enumerate() {
            words_at(upper + 32 * i, ZMM_HI256, &mut register.0[32..]);
        }
        for (i, register) in fpu.vector[16..].iter_mut().enumerate() {
            words_at(high + 64 * i, HI16_ZMM, &mut register.0);
        }
    }
    fpu.pkru = match pkru_at() {
        Some(at) if in_use & PKRU != 0 => words[at as usize / 4],
        _ => 0,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Fpu {
        let mut fpu = Fpu { fcw: 0x27f, fsw: 3 << 11, ftw: 0x81, mxcsr: 0x1f00, ..Fpu::default() };
        fpu.pkru = if pkru_at().is_some() { 0x5555_5554 } else { 0 };
        fpu.st[3][..10].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        fpu.vector[15].0[..16].copy_from_slice(&[7; 16]);
        if has_avx() {
            fpu.vector[3].0[16..32].copy_from_slice(&[9; 16]);
        }
        if avx512_at().is_some() {
            fpu.vector[3].0[32..].copy_from_slice(&[11; 32]);
            fpu.vector[31].0 = [13; 64];
            fpu.k = [1, 2, 3, 4, 5, 6, 7, u64::MAX];
        }
        fpu
    }

    #[test]
    fn an_image_comes_back() {
        let mut fpu = Fpu::default();
        load(&mut fpu, &image(&sample())).unwrap();
        assert_eq!(fpu, sample());
    }

    #[test]
    fn what_the_header_leaves_out_is_initial() {
        let mut words = image(&sample());
        words[LEGACY / 4] = SSE as u32;
        let mut fpu = sample();
        load(&mut fpu, &words).unwrap();
        assert_eq!((fpu.fcw, fpu.mxcsr), (0x37f, 0x1f00));
        assert_eq!(fpu.vector[15], sample().vector[15]);
        assert_eq!(fpu.vector[3], cpu_core::VectorRegister::default());
        assert_eq!((fpu.vector[31], fpu.k), (cpu_core::VectorRegister::default(), [0; 8]));
    }

    #[test]
    fn malformed_images_are_refused() {
        for (word, value) in [(LEGACY / 4, 1 << 8), (LEGACY / 4 + 2, 1), (LEGACY / 4 + 15, 1), (6, 1 << 16)] {
            let mut words = image(&sample());
            words[word] = value;
            assert_eq!(load(&mut Fpu::default(), &words), Err(Errno::EINVAL), "word {word}");
        }
    }

    #[test]
    fn xcr0_needs_x87() {
        assert!(is_valid_xcr0(1, 0) && is_valid_xcr0(3, 3) && is_valid_xcr0(7, 7) && is_valid_xcr0(0xe7, 0xe7));
        for partial in [0xe3, 0x27, 0x47, 0x87, 0x67, 0xa7, 0xc7, 0xe5] {
            assert!(!is_valid_xcr0(partial, 0xe7), "{partial:x}");
        }
        assert!(!is_valid_xcr0(5, 7) && !is_valid_xcr0(2, 3) && !is_valid_xcr0(3, 0) && !is_valid_xcr0(7, 3));
    }
}
