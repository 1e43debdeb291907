//! The memory that the harness and the sandboxed child share, and its places in the child.
//!
//! One memfd holds all of it. The harness maps it anywhere; the child maps it at `BASE`, and parts of it a second time
//! at the addresses that tested code sees.

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::layout::{CASE_BYTES, CODE_BYTES, DATA_BYTES, PAGE};
use crate::segments::LDT;

/// Where the child maps the memfd: far from any address that tests use or compute.
pub(super) const BASE: u64 = 0x3a5c_0000_0000;

/// Cases in one hand-over to the child. Their slots together stay within a second-level cache.
pub(super) const BATCH: usize = 64;

/// Bytes of the XSAVE image that may be moved: up to the end of AVX-512's components, as far as they go on any CPU.
pub(super) const XSAVE_BYTES: usize = 2688;

/// Bytes of code that are put down at the case's RIP: the instruction, then INT3.
pub(super) const CODE_WINDOW: usize = CASE_BYTES;

/// Words of the kernel's `struct sigcontext_64` in front of its `fpstate` pointer (arch/x86 uapi `sigcontext.h`).
pub(super) const SIGCONTEXT_WORDS: usize = 23;
/// Words of it up to and with the selectors: what sigreturn loads.
pub(super) const SIGCONTEXT_LOADED_WORDS: usize = 19;

/// `sigcontext_64` word numbers by register.
pub(super) mod word {
    /// Word of each general-purpose register, in encoding order RAX … R15.
    pub(crate) const GPR: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];
    pub(crate) const RIP: usize = 16;
    pub(crate) const EFLAGS: usize = 17;
    /// CS in bits 15:0, SS in bits 63:48.
    pub(crate) const SELECTORS: usize = 18;
    pub(crate) const ERR: usize = 19;
    pub(crate) const TRAPNO: usize = 20;
    pub(crate) const CR2: usize = 22;
}

/// Machine state on its way to or from the child.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Image {
    pub(super) sigcontext: [u64; SIGCONTEXT_WORDS],
    pub(super) fs_base: u64,
    pub(super) gs_base: u64,
    /// ES DS FS GS.
    pub(super) selectors: [u16; 4],
    /// RFLAGS bits that sigreturn leaves as they are (NT, ID), loaded by POPF just before it. Input only.
    pub(super) held_flags: u64,
    /// Signal number. Output only, like the next two.
    pub(super) signal: u64,
    pub(super) si_code: u64,
    pub(super) si_addr: u64,
    /// Offset of the code window in the code pages. Input only, like the window.
    pub(super) code_offset: u64,
    pub(super) code: [u8; CODE_WINDOW],
    pub(super) xsave: [u8; XSAVE_BYTES],
    pub(super) memory: [u8; DATA_BYTES],
}

/// One case: what goes in, what comes out.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Slot {
    pub(super) input: Image,
    pub(super) output: Image,
}

/// `struct sock_filter` of seccomp's classic BPF.
#[derive(IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub(super) struct SockFilter {
    pub(super) code: u16,
    pub(super) jt: u8,
    pub(super) jf: u8,
    pub(super) k: u32,
}

/// A system call for the child to make while it shuts itself in.
#[derive(IntoBytes, Immutable, KnownLayout, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Step {
    /// Number, or `END`.
    pub(super) number: u64,
    pub(super) args: [u64; 6],
    /// Nonzero where a failure does not matter.
    pub(super) may_fail: u64,
}

impl Step {
    /// `number` behind the last step.
    pub(super) const END: u64 = u64::MAX;
}

/// Steps that fit the control page.
pub(super) const MAX_STEPS: usize = 44;

/// The control page.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Control {
    /// Futex: number of the batch that the child is to run.
    pub(super) go: u32,
    /// Futex: number of the batch that the child has finished.
    pub(super) done: u32,
    /// Cases in the batch.
    pub(super) count: u32,
    /// Case that runs.
    pub(super) index: u32,
    /// 8-byte words of the XSAVE image that are moved.
    pub(super) xsave_words: u64,
    /// Slot that runs, as an address in the child.
    pub(super) current: u64,
    /// Negated errno of a step that failed.
    pub(super) error: u64,
    /// Address in the child of the step that failed.
    pub(super) failed_step: u64,
    pub(super) steps: [[u64; 8]; MAX_STEPS],
    /// `struct user_desc` of the LDT's segments.
    pub(super) ldt: [[u32; 4]; LDT.len()],
    /// `stack_t` for sigaltstack.
    pub(super) alt_stack: [u64; 3],
    /// Kernel `struct sigaction`: handler, flags, restorer, mask.
    pub(super) action: [u64; 4],
    /// `struct sock_fprog`: length, pointer.
    pub(super) program: [u64; 2],
    pub(super) filter: [u64; 24],
    /// `struct rlimit` for no core files.
    pub(super) no_core: [u64; 2],
}

/// Offsets in the memfd.
pub(super) mod at {
    use super::*;

    pub(crate) const CONTROL: u64 = 0;
    pub(crate) const STUB: u64 = PAGE;
    pub(crate) const STACK: u64 = 2 * PAGE;
    pub(crate) const STACK_BYTES: u64 = 8 * PAGE;
    pub(crate) const CODE: u64 = STACK + STACK_BYTES;
    /// A page of slack behind the code takes what a window at the very end spills.
    pub(crate) const DATA: u64 = CODE + CODE_BYTES as u64 + PAGE;
    pub(crate) const READONLY: u64 = DATA + DATA_BYTES as u64;
    /// A slot in front of the first takes the state in which the child was before its first case.
    pub(crate) const SPARE_SLOT: u64 = READONLY + PAGE;
    pub(crate) const SLOTS: u64 = SPARE_SLOT + size_of::<Slot>() as u64;
    pub(crate) const END: u64 = (SLOTS + (BATCH * size_of::<Slot>()) as u64).next_multiple_of(PAGE);
}

const _: () = assert!(size_of::<Control>() <= PAGE as usize);
const _: () = assert!(offset_of!(Image, code).is_multiple_of(8) && size_of::<Slot>().is_multiple_of(16));
