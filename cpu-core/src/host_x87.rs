//! The host's x87 instructions on values.
//!
//! Two ways to run one. *Fast*: operands are pushed onto the host's empty stack, the instruction runs with everything
//! masked, results are popped. *Whole*: an FSAVE image with the guest's control and status words and tags is loaded, the
//! instruction runs, and the image is stored again by FNSAVE, which does not wait: so stack faults and unmasked
//! exceptions are the host's own, and never reach us as a signal. Both leave the host's stack empty and its control word
//! at [`DEFAULT_CW`], as Rust demands.
#![expect(unsafe_code, reason = "x87 instructions are reached by inline asm only")]

use std::arch::asm;

/// FCW that the host has outside of single asm blocks; also FNINIT's.
pub(crate) const DEFAULT_CW: u16 = 0x37f;

/// What the asm blocks read and write, by offsets that the rows' text knows: the memory operand is at 64.
#[repr(C, align(16))]
pub(crate) struct Frame {
    /// ST(0) before.
    pub(crate) a: [u8; 16],
    /// The other register operand before.
    pub(crate) b: [u8; 16],
    /// ST(0) after.
    pub(crate) r0: [u8; 16],
    /// ST(1) after.
    pub(crate) r1: [u8; 16],
    /// Memory operand, either way.
    pub(crate) memory: [u8; 16],
    /// Control word to compute under.
    pub(crate) cw: u16,
    back: u16,
    /// Status word after.
    pub(crate) sw: u16,
    /// ZF, PF, CF after FCOMI and the like.
    pub(crate) zf: u8,
    pub(crate) pf: u8,
    pub(crate) cf: u8,
    unused: [u8; 7],
    /// FSAVE's image, 32-bit protected-mode format.
    pub(crate) image: [u8; 112],
}

const _: () = assert!(std::mem::offset_of!(Frame, memory) == 64 && std::mem::offset_of!(Frame, cw) == 80);
const _: () = assert!(std::mem::offset_of!(Frame, sw) == 84 && std::mem::offset_of!(Frame, zf) == 86);
const _: () = assert!(std::mem::offset_of!(Frame, image) == 96);

impl Frame {
    pub(crate) fn new() -> Self {
        Self {
            a: [0; 16],
            b: [0; 16],
            r0: [0; 16],
            r1: [0; 16],
            memory: [0; 16],
            cw: DEFAULT_CW,
            back: DEFAULT_CW,
            sw: 0,
            zf: 0,
            pf: 0,
            cf: 0,
            unused: [0; 7],
            image: [0; 112],
        }
    }
}

/// Which operand register an instruction writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Writes {
    /// None: it compares, or stores to memory.
    Nothing,
    /// ST(0).
    St0,
    /// The other register.
    Sti,
    /// Both: FXCH.
    Both,
}

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Memory {
    /// It has none.
    None,
    /// Reads it.
    Load,
    /// Writes it.
    Store,
}

/// One host instruction. Its text has the other register at st(1) and memory at `[{f} + 64]`.
pub(crate) trait X87: 'static {
    /// Registers read: ST(0), then the other one.
    const INPUTS: u8;
    /// How many of the stack's registers that it saw or pushed are there afterwards.
    const OUTPUTS: u8;
    const WRITES: Writes;
    const MEMORY: Memory;
    /// Condition codes that it changes where there is no stack fault.
    const CC: u16;
    /// How many registers it leaves, and which condition codes it changes, is known beforehand.
    const FAST: bool;

    /// Everything masked, extended precision, round to nearest. The host's sticky flags are not cleared first.
    fn fast(frame: &mut Frame);
    /// As [`Self::fast`], under `frame.cw`, which masks everything.
    fn fast_under(frame: &mut Frame);
    /// On `frame.image`.
    fn whole(frame: &mut Frame);
}

/// Runs lines of x87 text with `f` at the frame.
macro_rules! x87_asm {
    ($frame:ident, $($line:expr),+) => {
        // SAFETY: the text reads and writes the frame alone, and leaves the stack empty and FCW at its default.
        unsafe {
            std::arch::asm!($($line),+, f = in(reg) std::ptr::from_mut($frame), out("st(0)") _, out("st(1)") _,
                out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack));
        }
    };
}

/// Pushes the operands.
macro_rules! x87_push {
    (0) => {
        ""
    };
    (1) => {
        "fld tbyte ptr [{f}]"
    };
    (2) => {
        "fld tbyte ptr [{f} + 16]\nfld tbyte ptr [{f}]"
    };
}

/// Keeps the status word and pops the results.
macro_rules! x87_pop {
    (0) => {
        "fnstsw word ptr [{f} + 84]"
    };
    (1) => {
        "fnstsw word ptr [{f} + 84]\nfstp tbyte ptr [{f} + 32]"
    };
    (2) => {
        "fnstsw word ptr [{f} + 84]\nfstp tbyte ptr [{f} + 32]\nfstp tbyte ptr [{f} + 48]"
    };
}

/// `impl X87`: inputs, outputs, what is written, memory, condition codes, text.
macro_rules! x87_impl {
    // Condition codes, or the number of registers left, depend on the operands: always on the whole image.
    ($I:ident, $in:tt => whole $out:tt, $writes:ident, $memory:ident, $cc:expr, $text:literal) => {
        impl $crate::host_x87::X87 for $I {
            const INPUTS: u8 = $in;
            const OUTPUTS: u8 = $out;
            const WRITES: $crate::host_x87::Writes = $crate::host_x87::Writes::$writes;
            const MEMORY: $crate::host_x87::Memory = $crate::host_x87::Memory::$memory;
            const CC: u16 = $cc;
            const FAST: bool = false;
            fn fast(_: &mut $crate::host_x87::Frame) {}
            fn fast_under(_: &mut $crate::host_x87::Frame) {}
            fn whole(frame: &mut $crate::host_x87::Frame) {
                x87_asm!(frame, "frstor [{f} + 96]", $text, "fnsave [{f} + 96]");
            }
        }
    };
    ($I:ident, $in:tt => $out:tt, $writes:ident, $memory:ident, $cc:expr, $text:literal) => {
        impl $crate::host_x87::X87 for $I {
            const INPUTS: u8 = $in;
            const OUTPUTS: u8 = $out;
            const WRITES: $crate::host_x87::Writes = $crate::host_x87::Writes::$writes;
            const MEMORY: $crate::host_x87::Memory = $crate::host_x87::Memory::$memory;
            const CC: u16 = $cc;
            const FAST: bool = true;
            fn fast(frame: &mut $crate::host_x87::Frame) {
                x87_asm!(frame, x87_push!($in), $text, x87_pop!($out));
            }
            fn fast_under(frame: &mut $crate::host_x87::Frame) {
                x87_asm!(
                    frame,
                    "fldcw word ptr [{f} + 80]",
                    x87_push!($in),
                    $text,
                    x87_pop!($out),
                    "fldcw word ptr [{f} + 82]"
                );
            }
            fn whole(frame: &mut $crate::host_x87::Frame) {
                x87_asm!(frame, "frstor [{f} + 96]", $text, "fnsave [{f} + 96]");
            }
        }
    };
}
pub(crate) use {x87_asm, x87_impl, x87_pop, x87_push};

/// What [`is_inexact`] computes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Arithmetic {
    Add,
    Sub,
    Mul,
    Div,
    /// A double to the precision of a single; `b` is not looked at.
    Narrow,
}

/// Whether `a op b`, rounded to the precision of `bytes` (4 or 8) but with x87's exponents, is inexact. `a` and `b` are
/// numbers of that width, a double for [`Arithmetic::Narrow`]; `rounding` is MXCSR's and FCW's RC.
pub(crate) fn is_inexact(operation: Arithmetic, bytes: u32, a: u64, b: u64, rounding: u16) -> bool {
    /// Load `a` and `b`, do it, keep the status word, pop.
    macro_rules! compute {
        ($frame:ident, $width:literal, $text:literal) => {
            x87_asm!(
                $frame,
                "fnclex",
                "fldcw word ptr [{f} + 80]",
                concat!("fld ", $width, " ptr [{f}]"),
                concat!("fld ", $width, " ptr [{f} + 16]"),
                $text,
                "fnstsw word ptr [{f} + 84]",
                "fstp st(0)",
                "fnclex",
                "fldcw word ptr [{f} + 82]"
            )
        };
    }
    let mut frame = Frame::new();
    let frame = &mut frame;
    frame.a[..8].copy_from_slice(&a.to_le_bytes());
    frame.b[..8].copy_from_slice(&b.to_le_bytes());
    let precision = if bytes == 4 { 0 } else { 2 };
    frame.cw = 0x7f | precision << 8 | rounding << 10;
    match (operation, bytes) {
        (Arithmetic::Add, 4) => compute!(frame, "dword", "faddp st(1), st(0)"),
        (Arithmetic::Add, _) => compute!(frame, "qword", "faddp st(1), st(0)"),
        (Arithmetic::Sub, 4) => compute!(frame, "dword", "fsubp st(1), st(0)"),
        (Arithmetic::Sub, _) => compute!(frame, "qword", "fsubp st(1), st(0)"),
        (Arithmetic::Mul, 4) => compute!(frame, "dword", "fmulp st(1), st(0)"),
        (Arithmetic::Mul, _) => compute!(frame, "qword", "fmulp st(1), st(0)"),
        (Arithmetic::Div, 4) => compute!(frame, "dword", "fdivp st(1), st(0)"),
        (Arithmetic::Div, _) => compute!(frame, "qword", "fdivp st(1), st(0)"),
        // Adding zero rounds to the precision of FCW.
        (Arithmetic::Narrow, _) => compute!(frame, "qword", "faddp st(1), st(0)"),
    }
    frame.sw & 1 << 5 != 0
}

/// Clears the host's sticky exception flags: they are a subset of the guest's whenever a fast instruction starts.
pub(crate) fn forget_flags() {
    // SAFETY: FNCLEX changes the status word only.
    unsafe {
        asm!("fnclex", options(nomem, nostack));
    }
}

/// The host's own state as an FSAVE image; it is initialised behind it.
#[cfg(test)]
pub(crate) fn save_host(frame: &mut Frame) {
    x87_asm!(frame, "fnsave [{f} + 96]");
}
