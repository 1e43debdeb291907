//! Seccomp filters of threads, as VMMs install them: what is not on the list raises SIGSYS, whose handler ends the process.
#![expect(unsafe_code, reason = "a signal handler")]

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Whose filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// None.
    None,
    /// One for each kind of thread: a vCPU's may not even read.
    Firecracker,
    /// One for whoever builds the VM, before there is one; vCPUs' threads inherit it and add their own.
    CloudHypervisor,
}

/// A call that is allowed: whatever its arguments are, or with one of these at that place.
type Allowed = (i64, Option<(u8, &'static [u64])>);

const IOCTL: i64 = libc::SYS_ioctl;
const KVM_RUN: u64 = 0xae80;

/// What a thread of Rust's and glibc's does by itself, when it waits, prints, frees and ends.
const ANY_THREAD: &[Allowed] = &[
    (libc::SYS_exit, None),
    (libc::SYS_exit_group, None),
    (libc::SYS_futex, None),
    (libc::SYS_madvise, Some((2, &[libc::MADV_DONTNEED as u64]))),
    (libc::SYS_mmap, Some((2, &[libc::PROT_NONE as u64, (libc::PROT_READ | libc::PROT_WRITE) as u64]))),
    (libc::SYS_mremap, None),
    (libc::SYS_munmap, None),
    (libc::SYS_rt_sigprocmask, None),
    (libc::SYS_rt_sigreturn, None),
    (libc::SYS_sigaltstack, None),
    (libc::SYS_write, None),
];

/// A vCPU's thread of Firecracker. It forbids read, poll, mprotect, clone, tgkill and rt_sigaction.
const FIRECRACKER_VCPU: &[Allowed] =
    &[(libc::SYS_eventfd2, None), (libc::SYS_timerfd_settime, None), (IOCTL, Some((1, &[KVM_RUN])))];

/// Its main thread, once the VM is built.
const FIRECRACKER_MAIN: &[Allowed] = &[
    (libc::SYS_clock_nanosleep, None),
    (libc::SYS_close, None),
    (libc::SYS_epoll_wait, None),
    // Builds with debug assertions look at what they close.
    (libc::SYS_fcntl, Some((1, &[libc::F_GETFD as u64]))),
    (libc::SYS_getpid, None),
    (libc::SYS_lseek, None),
    (libc::SYS_read, None),
    (libc::SYS_tgkill, None),
];

/// The thread of Cloud Hypervisor that builds the VM and waits for its end.
const CLOUD_HYPERVISOR_VMM: &[Allowed] = &[
    (libc::SYS_clock_nanosleep, None),
    (libc::SYS_clone, None),
    (libc::SYS_clone3, None),
    (libc::SYS_close, None),
    (libc::SYS_epoll_create1, None),
    (libc::SYS_epoll_ctl, None),
    (libc::SYS_epoll_wait, None),
    (libc::SYS_eventfd2, None),
    (libc::SYS_fcntl, None),
    (libc::SYS_fstat, None),
    (libc::SYS_getpid, None),
    (libc::SYS_getrandom, None),
    (libc::SYS_gettid, None),
    (IOCTL, None),
    (libc::SYS_lseek, None),
    (libc::SYS_madvise, None),
    (libc::SYS_mprotect, None),
    (libc::SYS_openat, None),
    (libc::SYS_prctl, None),
    (libc::SYS_read, None),
    (libc::SYS_rseq, None),
    (libc::SYS_rt_sigaction, None),
    (libc::SYS_sched_getaffinity, None),
    (libc::SYS_seccomp, None),
    (libc::SYS_set_robust_list, None),
    (libc::SYS_statx, None),
    (libc::SYS_tgkill, None),
];

/// A vCPU's thread of its: of KVM's only what an exit may lead to.
const CLOUD_HYPERVISOR_VCPU: &[Allowed] = &[
    (libc::SYS_close, None),
    (libc::SYS_fcntl, None),
    (IOCTL, Some((1, CLOUD_HYPERVISOR_IOCTLS))),
    (libc::SYS_mprotect, None),
    (libc::SYS_nanosleep, None),
    (libc::SYS_read, None),
    (libc::SYS_rt_sigaction, None),
    (libc::SYS_tgkill, None),
];
/// RUN, IRQFD, IOEVENTFD, SET_GSI_ROUTING, SET_USER_MEMORY_REGION, NMI, CHECK_EXTENSION.
const CLOUD_HYPERVISOR_IOCTLS: &[u64] = &[KVM_RUN, 0x4020_ae76, 0x4040_ae79, 0x4008_ae6a, 0x4020_ae46, 0xae9a, 0xae03];

fn install(lists: &[&[Allowed]]) -> Result<()> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (number, argument) in lists.iter().copied().flatten() {
        // No rule: whatever the arguments are.
        let always = lists.iter().copied().flatten().any(|(other, argument)| other == number && argument.is_none());
        let rules = rules.entry(*number).or_default();
        if always {
            continue;
        }
        let Some((index, values)) = argument else { continue };
        for &value in *values {
            // Descriptors' calls, protections and advice are 32 bits wide.
            let condition = SeccompCondition::new(*index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
            rules.push(SeccompRule::new(vec![condition])?);
        }
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into().context("a seccomp filter")?;
    seccompiler::apply_filter(&program).context("seccomp")
}

extern "C" fn bad_system_call(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // `si_syscall` of asm-generic/siginfo.h, behind `si_call_addr`.
    const SI_SYSCALL: usize = 24;
    // SAFETY: the kernel passes a `siginfo_t` of 128 bytes.
    let mut number = unsafe { info.cast::<u8>().wrapping_add(SI_SYSCALL).cast::<i32>().read() };
    let mut text = *b"vmms: system call     is forbidden\n";
    for digit in text[18..21].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
    // SAFETY: both calls are async-signal-safe.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    // SAFETY: as above.
    unsafe { libc::_exit(1) };
}

/// The VMM's own handler for SIGSYS.
pub fn install_handler() -> Result<()> {
    // SAFETY: all bytes zero are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = bad_system_call as extern "C" fn(_, _, _) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler touches nothing that a thread could be in the midst of.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).context("sigaction"),
    }
}

impl Filter {
    /// The calling thread is a vCPU's, and about to run it.
    pub fn on_vcpu(self) -> Result<()> {
        match self {
            Filter::None => Ok(()),
            Filter::Firecracker => install(&[ANY_THREAD, FIRECRACKER_VCPU]),
            Filter::CloudHypervisor => install(&[ANY_THREAD, CLOUD_HYPERVISOR_VCPU]),
        }
    }

    /// The calling thread is the main one, and all vCPUs have been started.
    pub fn on_main(self) -> Result<()> {
        match self {
            Filter::None | Filter::CloudHypervisor => Ok(()),
            Filter::Firecracker => install(&[ANY_THREAD, FIRECRACKER_MAIN]),
        }
    }

    /// The calling thread is about to build the VM.
    pub fn on_builder(self) -> Result<()> {
        match self {
            Filter::None | Filter::Firecracker => Ok(()),
            Filter::CloudHypervisor => install(&[ANY_THREAD, CLOUD_HYPERVISOR_VMM]),
        }
    }
}
