//! How the child shuts itself in: the system calls it makes before its first case, as data.

use super::shared::{self, BASE, MAX_STEPS, SockFilter, Step, at};
use super::stub;
use crate::layout::{CODE_BASE, CODE_BYTES, DATA_BASE, DATA_BYTES, PAGE, READONLY_BASE};
use crate::segments::LDT;

/// End of user addresses with 4-level paging (arch/x86 `TASK_SIZE_MAX`).
const TASK_END: u64 = 0x7fff_ffff_f000;

/// Signals in which a case can end.
const SIGNALS: [i32; 6] = [libc::SIGILL, libc::SIGTRAP, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV, libc::SIGSYS];

/// Flags of the handler: siginfo and ucontext, on the alternate stack, returning through `restorer`.
const ACTION_FLAGS: u64 = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64 | 0x0400_0000;

/// A registration of the C library that the kernel would write to after its memory is gone: `(address, bytes)` of the
/// thread's `struct rseq`.
pub(super) type Rseq = Option<(u64, u64)>;

/// The signature with which glibc registers its rseq area on x86 (`RSEQ_SIG`).
const RSEQ_SIG: u64 = 0x5305_3053;

fn step(number: i64, args: &[u64]) -> Step {
    let mut step = Step { number: number as u64, ..Step::default() };
    step.args[..args.len()].copy_from_slice(args);
    step
}

/// The steps, in order. `addresses`: where in the child the structures of the control page lie.
pub(super) fn steps(fd: i32, rseq: Rseq, structures: &Structures) -> Vec<Step> {
    // Populated: a page that the kernel had yet to map would show as "not present" in a page-fault error code.
    let shared_fixed = (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64;
    let (read, write, execute) = (libc::PROT_READ as u64, libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
    let map = |address: u64, bytes: u64, rights: u64, offset: u64| {
        step(libc::SYS_mmap, &[address, bytes, rights, shared_fixed, fd as u64, offset])
    };
    let mut steps = vec![step(libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64])];
    if let Some((address, bytes)) = rseq {
        for bytes in [bytes, 32] {
            steps.push(Step { may_fail: 1, ..step(libc::SYS_rseq, &[address, bytes, 1, RSEQ_SIG]) });
        }
    }
    let end = BASE + at::END;
    steps.extend([
        step(libc::SYS_munmap, &[0, BASE]),
        step(libc::SYS_munmap, &[end, TASK_END - end]),
        map(CODE_BASE, CODE_BYTES as u64, read | execute, at::CODE),
        map(DATA_BASE, DATA_BYTES as u64, read | write, at::DATA),
        map(READONLY_BASE, PAGE, read, at::READONLY),
        step(libc::SYS_close_range, &[0, u64::from(u32::MAX), 0]),
        step(libc::SYS_sigaltstack, &[structures.alt_stack, 0]),
    ]);
    // Function 17: write in the current format of `struct user_desc`.
    steps.extend((0..LDT.len() as u64).map(|n| step(libc::SYS_modify_ldt, &[17, structures.ldt + 16 * n, 16])));
    steps.extend(SIGNALS.map(|signal| step(libc::SYS_rt_sigaction, &[signal as u64, structures.action, 0, 8])));
    steps.extend([
        step(libc::SYS_prlimit64, &[0, u64::from(libc::RLIMIT_CORE), structures.no_core, 0]),
        step(libc::SYS_prctl, &[libc::PR_SET_NO_NEW_PRIVS as u64, 1]),
        step(libc::SYS_seccomp, &[u64::from(libc::SECCOMP_SET_MODE_FILTER), 0, structures.program]),
        Step { number: Step::END, ..Step::default() },
    ]);
    assert!(steps.len() <= MAX_STEPS, "the control page has room for {MAX_STEPS} steps");
    steps
}

/// Addresses in the child of what the steps point to.
pub(super) struct Structures {
    pub(super) ldt: u64,
    pub(super) alt_stack: u64,
    pub(super) action: u64,
    pub(super) no_core: u64,
    pub(super) program: u64,
}

/// `stack_t`.
pub(super) fn alt_stack() -> [u64; 3] {
    [BASE + at::STACK, 0, at::STACK_BYTES]
}

/// The kernel's `struct sigaction`, every signal blocked while the handler runs: a fault in it ends the child.
pub(super) fn action() -> [u64; 4] {
    let stub = BASE + at::STUB;
    [stub + stub::handler(), ACTION_FLAGS, stub + stub::restorer(), u64::MAX]
}

/// Only the stub may make system calls, and only those it needs: a tested SYSCALL or INT 80h raises SIGSYS instead.
pub(super) fn filter() -> Vec<SockFilter> {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    // Offsets in `struct seccomp_data`.
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    const IP_LOW: u32 = 8;
    const IP_HIGH: u32 = 12;
    let stub = BASE + at::STUB;
    let load = |k| SockFilter { code: 0x20, jt: 0, jf: 0, k };
    let equal = |k, jt, jf| SockFilter { code: 0x15, jt, jf, k };
    let at_least = |k, jt, jf| SockFilter { code: 0x35, jt, jf, k };
    let give = |k| SockFilter { code: 0x06, jt: 0, jf: 0, k };
    vec![
        load(ARCH),
        equal(AUDIT_ARCH_X86_64, 0, 10),
        load(IP_HIGH),
        equal((stub >> 32) as u32, 0, 8),
        load(IP_LOW),
        at_least(stub as u32, 0, 6),
        at_least((stub + PAGE) as u32, 5, 0),
        load(NR),
        equal(libc::SYS_rt_sigreturn as u32, 2, 0),
        equal(libc::SYS_futex as u32, 1, 0),
        give(libc::SECCOMP_RET_KILL_PROCESS),
        give(libc::SECCOMP_RET_ALLOW),
        give(libc::SECCOMP_RET_TRAP),
    ]
}

const _: () = assert!(shared::BASE.is_multiple_of(PAGE));
