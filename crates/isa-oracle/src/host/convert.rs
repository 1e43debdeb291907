//! Between a case and what the child's signal frame holds.

use std::sync::LazyLock;

use zerocopy::FromZeros;

use super::shared::{CODE_WINDOW, Image, word};
use crate::layout::CODE_BYTES;
use crate::state::{Avx512, Case, End, Exception, Outcome, State, X87, flag};
use crate::stop::{self, Stop};

pub(super) const INT3: u8 = 0xcc;

/// `struct sigcontext` and FXSAVE as the child is to load them.
pub(super) fn to_image(case: &Case) -> Box<Image> {
    let mut image = Box::new(Image::new_zeroed());
    let state = &case.state;
    for (gpr, at) in state.gpr.iter().zip(word::GPR) {
        image.sigcontext[at] = *gpr;
    }
    image.sigcontext[word::RIP] = state.rip;
    let step = if stop::of(case) == Stop::Step { flag::TF } else { 0 };
    image.sigcontext[word::EFLAGS] = state.rflags & flag::SETTABLE | step;
    let [es, cs, ss, ds, fs, gs] = state.seg;
    image.sigcontext[word::SELECTORS] = u64::from(cs) | u64::from(ss) << 48;
    image.selectors = [es, ds, fs, gs];
    image.fs_base = state.fs_base;
    image.gs_base = state.gs_base;
    image.held_flags = state.rflags & (flag::NT | flag::ID) | 2;
    image.code_offset = state.rip.wrapping_sub(case.mode.start()).min(CODE_BYTES as u64);
    image.code = [INT3; CODE_WINDOW];
    image.code[..case.bytes.len()].copy_from_slice(&case.bytes);
    put_xsave(&mut image.xsave, state);
    image.memory = *state.memory;
    image
}

/// What the child's last signal says about `case`.
pub(super) fn outcome(case: &Case, image: &Image) -> Outcome {
    let words = &image.sigcontext;
    let mut state = State {
        gpr: word::GPR.map(|at| words[at]),
        rip: words[word::RIP],
        rflags: words[word::EFLAGS] & !(flag::TF | flag::RF),
        seg: {
            let [es, ds, fs, gs] = image.selectors;
            let selectors = words[word::SELECTORS];
            [es, selectors as u16, (selectors >> 48) as u16, ds, fs, gs]
        },
        fs_base: image.fs_base,
        gs_base: image.gs_base,
        memory: Box::new(image.memory),
        ..State::default()
    };
    get_xsave(&image.xsave, &mut state);
    let vector = words[word::TRAPNO] as u8;
    let landed = vector == 3 && stop::behind(case, state.rip.wrapping_sub(1));
    let end = match (image.signal as i32, vector) {
        (libc::SIGSYS, _) => End::Lost("made a system call"),
        (libc::SIGTRAP, 1) if stop::of(case) == Stop::Step => End::Done,
        (libc::SIGTRAP, 3) if landed => {
            state.rip = state.rip.wrapping_sub(1);
            End::Done
        }
        _ => {
            let error = words[word::ERR] as u32;
            let cr2 = words[word::CR2];
            match vector {
                14 => End::Exception(Exception { vector, error, cr2 }),
                8 | 10..=13 | 17 | 21 => End::Exception(Exception { vector, error, cr2: 0 }),
                _ => End::Exception(Exception { vector, error: 0, cr2: 0 }),
            }
        }
    };
    Outcome { end, state }
}

/// Bytes of an image with x87, SSE and AVX: legacy region, header, YMM high halves.
const AVX_END: usize = 512 + 64 + 256;

/// Places of AVX-512's components in an image of the host: opmask registers, ZMM0 to 15 above YMM, ZMM16 to 31.
static AVX512_AT: LazyLock<Option<[usize; 3]>> = LazyLock::new(|| {
    let at = |component| std::arch::x86_64::__cpuid_count(0xd, component).ebx as usize;
    let places = [at(5), at(6), at(7)];
    let fits = places[2] + 1024 <= super::shared::XSAVE_BYTES;
    (is_x86_feature_detected!("avx512f") && fits).then_some(places)
});

/// 8-byte words of an image that are moved.
pub(super) fn xsave_words() -> u64 {
    AVX512_AT.map_or(AVX_END, |[_, _, high]| high + 1024) as u64 / 8
}

/// XSAVE's standard format: legacy region, header with x87, SSE and AVX in use, YMM high halves.
fn put_xsave(to: &mut [u8], state: &State) {
    let mut put = |at: usize, bytes: &[u8]| to[at..at + bytes.len()].copy_from_slice(bytes);
    let x87 = &state.x87;
    put(0, &x87.fcw.to_le_bytes());
    put(2, &x87.fsw.to_le_bytes());
    put(4, &[x87.ftw, 0]);
    put(6, &x87.fop.to_le_bytes());
    put(8, &x87.fip.to_le_bytes());
    put(16, &x87.fdp.to_le_bytes());
    put(24, &state.mxcsr.to_le_bytes());
    for (i, st) in x87.st.iter().enumerate() {
        put(32 + 16 * i, &st.to_le_bytes()[..10]);
    }
    for (i, [low, high]) in state.ymm.iter().enumerate() {
        put(160 + 16 * i, &low.to_le_bytes());
        put(576 + 16 * i, &high.to_le_bytes());
    }
    let Some([opmask, upper, high]) = *AVX512_AT else {
        put(512, &7u64.to_le_bytes());
        return;
    };
    for (i, k) in state.avx512.k.iter().enumerate() {
        put(opmask + 8 * i, &k.to_le_bytes());
    }
    for (i, lane) in state.avx512.upper.iter().flatten().enumerate() {
        put(upper + 16 * i, &lane.to_le_bytes());
    }
    for (i, lane) in state.avx512.high.iter().flatten().enumerate() {
        put(high + 16 * i, &lane.to_le_bytes());
    }
    put(512, &0xe7u64.to_le_bytes());
}

fn get_xsave(from: &[u8], state: &mut State) {
    fn get<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
        from[at..at + N].try_into().expect("N bytes were taken")
    }
    let u16_at = |at| u16::from_le_bytes(get(from, at));
    let u64_at = |at| u64::from_le_bytes(get(from, at));
    let u128_at = |at| u128::from_le_bytes(get(from, at));
    const ST_MASK: u128 = (1 << 80) - 1;
    state.x87 = X87 {
        fcw: u16_at(0),
        fsw: u16_at(2),
        ftw: from[4],
        fop: u16_at(6),
        fip: u64_at(8),
        fdp: u64_at(16),
        st: std::array::from_fn(|i| u128_at(32 + 16 * i) & ST_MASK),
    };
    state.mxcsr = u32::from_le_bytes(get(from, 24));
    // XSAVE of the frame leaves components in their initial state unwritten in memory only where XSTATE_BV says so.
    let in_use = |component: u32| u64_at(512) >> component & 1 != 0;
    let avx_in_use = in_use(2);
    if let Some([opmask, upper, high]) = *AVX512_AT {
        let lane = |component: u32, at: usize| if in_use(component) { u128_at(at) } else { 0 };
        state.avx512 = Avx512 {
            k: std::array::from_fn(|i| if in_use(5) { u64_at(opmask + 8 * i) } else { 0 }),
            upper: std::array::from_fn(|i| std::array::from_fn(|j| lane(6, upper + 32 * i + 16 * j))),
            high: std::array::from_fn(|i| std::array::from_fn(|j| lane(7, high + 64 * i + 16 * j))),
        };
    }
    state.ymm = std::array::from_fn(|i| [u128_at(160 + 16 * i), if avx_in_use { u128_at(576 + 16 * i) } else { 0 }]);
}
