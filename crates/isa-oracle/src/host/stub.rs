#![expect(unsafe_code, reason = "the child's machine code, and the jump into it")]
//! The code that the sandboxed child runs. It is copied into the shared memory, calls nothing and uses no stack of ours.
//!
//! A case starts by sigreturn, which loads every register, and ends in a signal (single-step trap, INT3 behind the
//! instruction, or the instruction's own exception), whose frame holds every register. So the handler stores the frame of
//! the case that ended, writes the next case into the same frame and returns. No case costs a process switch.

use std::arch::global_asm;
use std::mem::{offset_of, size_of};

use super::shared::{self, Control, Image, Slot, at};
use crate::layout::{DATA_BASE, DATA_BYTES};

global_asm!(
    ".pushsection .rodata.isa_oracle_stub,\"a\",@progbits",
    ".globl isa_oracle_stub_start, isa_oracle_stub_handler, isa_oracle_stub_restorer, isa_oracle_stub_end",
    ".hidden isa_oracle_stub_start, isa_oracle_stub_handler, isa_oracle_stub_restorer, isa_oracle_stub_end",
    ".balign 16",
    "isa_oracle_stub_start:",
    // Entry: the steps that shut the child in.
    "movabs r15, {control}",
    "lea rbx, [r15 + {steps}]",
    "2:",
    "mov rax, [rbx]",
    "cmp rax, -1",
    "je 4f",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "cmp rax, -4096",
    "jbe 3f",
    "cmp qword ptr [rbx + 56], 0",
    "jne 3f",
    "mov [r15 + {error}], rax",
    "mov [r15 + {failed_step}], rbx",
    "mov eax, 231", // exit_group
    "mov edi, 1",
    "syscall",
    "3:",
    "add rbx, 64",
    "jmp 2b",
    "4:",
    "ud2", // into the handler, whose frame carries the cases
    // The handler: rsi = siginfo, rdx = ucontext. Tested code may have left AC, NT and ID set.
    ".balign 16",
    "isa_oracle_stub_handler:",
    "push 2",
    "popfq",
    "mov r12, rsi",
    "mov r13, rdx",
    "movabs r15, {control}",
    "mov r14, [r15 + {current}]",
    "lea rbx, [r14 + {output}]",
    "mov edi, edi",
    "mov [rbx + {signal}], rdi",
    "movsxd rax, dword ptr [r12 + 8]",
    "mov [rbx + {si_code}], rax",
    "mov rax, [r12 + 16]",
    "mov [rbx + {si_addr}], rax",
    "mov [rbx + {selectors}], es",
    "mov [rbx + {selectors} + 2], ds",
    "mov [rbx + {selectors} + 4], fs",
    "mov [rbx + {selectors} + 6], gs",
    "rdfsbase rax",
    "mov [rbx + {fs_base}], rax",
    "rdgsbase rax",
    "mov [rbx + {gs_base}], rax",
    "lea rdi, [rbx + {sigcontext}]",
    "lea rsi, [r13 + 40]",
    "mov ecx, {sigcontext_words}",
    "rep movsq",
    "mov rsi, [r13 + 40 + 8 * {sigcontext_words}]", // fpstate
    "lea rdi, [rbx + {xsave}]",
    "mov ecx, [r15 + {xsave_words}]",
    "rep movsq",
    "mov esi, {data}",
    "lea rdi, [rbx + {memory}]",
    "mov ecx, {data_words}",
    "rep movsq",
    // Its code goes, so that whoever reads the code pages reads INT3.
    "movabs rdi, {code_alias}",
    "add rdi, [r14 + {input} + {code_offset}]",
    "mov rax, 0xcccccccccccccccc",
    "mov ecx, {code_words}",
    "rep stosq",
    "mov eax, [r15 + {index}]",
    "inc eax",
    "mov [r15 + {index}], eax",
    "add r14, {slot_bytes}",
    "cmp eax, [r15 + {count}]",
    "jb 6f",
    // The batch is done.
    "mov ebp, [r15 + {go}]",
    "mov [r15 + {done}], ebp",
    "mov eax, 202", // futex
    "lea rdi, [r15 + {done}]",
    "mov esi, 1", // FUTEX_WAKE
    "mov edx, 1",
    "syscall",
    "5:",
    "mov eax, 202",
    "lea rdi, [r15 + {go}]",
    "xor esi, esi", // FUTEX_WAIT
    "mov edx, ebp",
    "xor r10d, r10d",
    "syscall",
    "cmp [r15 + {go}], ebp",
    "je 5b",
    "mov dword ptr [r15 + {index}], 0",
    "movabs r14, {slots}",
    // The next case.
    "6:",
    "mov [r15 + {current}], r14",
    "lea rbx, [r14 + {input}]",
    "movabs rdi, {code_alias}",
    "add rdi, [rbx + {code_offset}]",
    "lea rsi, [rbx + {code}]",
    "mov ecx, {code_words}",
    "rep movsq",
    "mov edi, {data}",
    "lea rsi, [rbx + {memory}]",
    "mov ecx, {data_words}",
    "rep movsq",
    "mov rdi, [r13 + 40 + 8 * {sigcontext_words}]",
    "lea rsi, [rbx + {xsave}]",
    "mov ecx, 58", // bytes 0..464; up to 512 the frame holds the kernel's own notes
    "rep movsq",
    "add rdi, 48",
    "add rsi, 48",
    "mov ecx, [r15 + {xsave_words}]",
    "sub ecx, 64",
    "rep movsq",
    "lea rdi, [r13 + 40]",
    "lea rsi, [rbx + {sigcontext}]",
    "mov ecx, {sigcontext_loaded_words}",
    "rep movsq",
    "mov qword ptr [r13], 7", // UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    "mov es, [rbx + {selectors}]",
    "mov ds, [rbx + {selectors} + 2]",
    "mov fs, [rbx + {selectors} + 4]",
    "mov gs, [rbx + {selectors} + 6]",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rbx + {gs_base}]",
    "wrgsbase rax",
    "push [rbx + {held_flags}]",
    "popfq",
    "ret",
    "isa_oracle_stub_restorer:",
    "mov eax, 15", // rt_sigreturn
    "syscall",
    "isa_oracle_stub_end:",
    ".popsection",
    control = const shared::BASE + at::CONTROL,
    steps = const offset_of!(Control, steps),
    error = const offset_of!(Control, error),
    failed_step = const offset_of!(Control, failed_step),
    current = const offset_of!(Control, current),
    index = const offset_of!(Control, index),
    count = const offset_of!(Control, count),
    go = const offset_of!(Control, go),
    done = const offset_of!(Control, done),
    slots = const shared::BASE + at::SLOTS,
    slot_bytes = const size_of::<Slot>(),
    input = const offset_of!(Slot, input),
    output = const offset_of!(Slot, output),
    code_alias = const shared::BASE + at::CODE,
    code_words = const shared::CODE_WINDOW / 8,
    data = const DATA_BASE,
    data_words = const DATA_BYTES / 8,
    sigcontext_words = const shared::SIGCONTEXT_WORDS,
    sigcontext_loaded_words = const shared::SIGCONTEXT_LOADED_WORDS,
    xsave_words = const offset_of!(Control, xsave_words),
    sigcontext = const offset_of!(Image, sigcontext),
    fs_base = const offset_of!(Image, fs_base),
    gs_base = const offset_of!(Image, gs_base),
    selectors = const offset_of!(Image, selectors),
    held_flags = const offset_of!(Image, held_flags),
    signal = const offset_of!(Image, signal),
    si_code = const offset_of!(Image, si_code),
    si_addr = const offset_of!(Image, si_addr),
    code_offset = const offset_of!(Image, code_offset),
    code = const offset_of!(Image, code),
    xsave = const offset_of!(Image, xsave),
    memory = const offset_of!(Image, memory),
);

unsafe extern "C" {
    #[link_name = "isa_oracle_stub_start"]
    safe static START: u8;
    #[link_name = "isa_oracle_stub_handler"]
    safe static HANDLER: u8;
    #[link_name = "isa_oracle_stub_restorer"]
    safe static RESTORER: u8;
    #[link_name = "isa_oracle_stub_end"]
    safe static STUB_END: u8;
}

/// The stub's bytes.
pub(super) fn bytes() -> &'static [u8] {
    let start = &raw const START;
    let length = (&raw const STUB_END).addr() - start.addr();
    // SAFETY: both labels bound one read-only section that the assembler laid out above and nothing ever writes.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// Offset of the signal handler in the stub.
pub(super) fn handler() -> u64 {
    ((&raw const HANDLER).addr() - (&raw const START).addr()) as u64
}

/// Offset of the code that a handler returns to.
pub(super) fn restorer() -> u64 {
    ((&raw const RESTORER).addr() - (&raw const START).addr()) as u64
}

/// Forks a child that runs the stub of the shared memory `fd`. The parent gets its process id, or -1.
///
/// The child executes system calls only until it is in the stub, so other threads of the parent may hold any lock.
pub(super) fn fork_into(fd: i32) -> libc::pid_t {
    // SAFETY: a plain fork with no stack and no flags; what the child does is below, and needs no lock or allocation.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid != 0 {
        return pid as libc::pid_t;
    }
    let address = shared::BASE as *mut libc::c_void;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    let (write, execute) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
    // SAFETY: MAP_FIXED_NOREPLACE takes no mapping away; `fd` is the memfd of `at::END` bytes.
    let mapped = unsafe { libc::mmap(address, at::END as usize, write, flags, fd, 0) };
    let stub = (shared::BASE + at::STUB) as *mut libc::c_void;
    // SAFETY: the page belongs to the mapping just made, if it was made; otherwise the call fails and changes nothing.
    let protected = unsafe { libc::mprotect(stub, crate::layout::PAGE as usize, execute) };
    if mapped != address || protected != 0 {
        // SAFETY: ends this child without running anything else.
        unsafe { libc::_exit(2) };
    }
    // SAFETY: the page holds the stub, executable; it never returns, and unmaps all that Rust knows of in this process.
    unsafe { std::arch::asm!("jmp {stub}", stub = in(reg) stub, options(noreturn)) }
}
