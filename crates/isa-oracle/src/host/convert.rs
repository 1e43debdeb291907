//! Between a case and what the child's signal frame holds.

use zerocopy::FromZeros;

use super::shared::{CODE_WINDOW, Image, word};
use crate::layout::CODE_BYTES;
use crate::state::{Case, End, Exception, Outcome, State, X87, flag};
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
    put(512, &7u64.to_le_bytes());
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
    let avx_in_use = u64_at(512) & 4 != 0;
    state.ymm = std::array::from_fn(|i| [u128_at(160 + 16 * i), if avx_in_use { u128_at(576 + 16 * i) } else { 0 }]);
}
