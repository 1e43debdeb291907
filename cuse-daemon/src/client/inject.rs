//! Makes a client's thread run system calls for us, on its way out of the ioctl that it is in.
//!
//! The thread waits in the kernel for our answer. `PTRACE_SEIZE` and `PTRACE_INTERRUPT` make it stop when the answer
//! lets it leave, just behind its `syscall` instruction, before any signal is looked at. There it runs that instruction
//! again with other registers, as often as wanted, and then goes on as if its ioctl had returned what we say.
//!
//! Neither side's death holds up the other: a tracer's detaches it (`PTRACE_O_EXITKILL` is not set, and `guard.rs` sees to
//! its signals), and a tracee's shows as `ESRCH` here. Only the thread that seized may drive it, so a `Held` stays where it was made.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::time::Duration;

use libc::user_regs_struct;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;

use super::guard::Note;
use super::maps::PAGE;
use super::stop::{attached, tracer};
use super::{maps, vm};
use crate::place::Beside;
use crate::sys;

/// Lifts the client's seccomp filter while it is traced; needs `CAP_SYS_ADMIN` and a tracer without a filter.
const SUSPEND_SECCOMP: i32 = 1 << 21;
/// `syscall`.
const SYSCALL_INSTRUCTION: u16 = u16::from_le_bytes([0x0f, 0x05]);
/// Code segment of 64-bit user code on x86-64 Linux.
const USER64_CS: u64 = 0x33;
/// `PTRACE_EVENT_STOP`, as it shows in bits 16 and up of a wait status.
const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;
/// A stop comes within microseconds, unless the machine is loaded or the thread is dead: looks before sleeping.
const SPINS: u32 = 200;
const POLL: Duration = Duration::from_micros(50);

thread_local! {
    /// Threads that died while this one traced them, and whose status it has yet to collect. Until then they, and with
    /// them their process, do not go away.
    static DYING: RefCell<Vec<Pid>> = const { RefCell::new(Vec::new()) };
}

/// Is there anything for [`collect_dead`]?
pub fn has_dead() -> bool {
    DYING.with_borrow(|dying| !dying.is_empty())
}

/// Collects what died. Blocks until it has: a process's first thread is not dead before all others are, and some of them
/// may be inside requests to us. So the caller holds no lock that a request could want.
pub fn collect_dead() {
    for tid in DYING.take() {
        while let Ok(Some(status)) = sys::wait_for(tid, true) {
            if !libc::WIFSTOPPED(status) || ptrace::detach(tid, None).is_ok() {
                break;
            }
        }
    }
}

/// Has the thread ended, even if nobody can collect it yet?
pub(super) fn is_dead(tid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    // The state follows the name, which ends with the last parenthesis.
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// A thread that this one traces, until dropped.
#[derive(Debug)]
struct Traced {
    tid: Pid,
    /// Its end has been seen.
    ended: Cell<bool>,
    beside: Option<Beside>,
    not_send: PhantomData<*const ()>,
}

impl Traced {
    /// The next stop's status; `ESRCH` if it ends instead.
    ///
    /// Not by a wait that blocks: a process's first thread counts as dead only when all others are gone, and those may
    /// wait for us to be done here.
    fn next_stop(&self) -> Result<i32, Errno> {
        self.next_stop_while(&mut || {})
    }

    /// The same. `meanwhile` is done again and again where it takes longer.
    fn next_stop_while(&self, meanwhile: &mut dyn FnMut()) -> Result<i32, Errno> {
        for round in 0_u32.. {
            if let Some(status) = sys::wait_for(self.tid, false)? {
                if libc::WIFSTOPPED(status) {
                    return Ok(status);
                }
                self.ended.set(true);
                break;
            }
            if round < SPINS {
                std::thread::yield_now();
            } else {
                std::thread::sleep(POLL);
                meanwhile();
                if is_dead(self.tid) {
                    break;
                }
            }
        }
        Err(Errno::ESRCH)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        drop(self.beside.take());
        // Only a standing thread can be let go. One that does not stand was killed.
        if !self.ended.get() && ptrace::detach(self.tid, None).is_err() {
            DYING.with_borrow_mut(|dying| dying.push(self.tid));
        }
    }
}

/// A thread that will stop when its system call returns.
#[derive(Debug)]
pub struct Seized(Traced);

/// A thread that stands behind its `syscall` instruction, or where it ran into a page fault. Dropped without a result, its
/// ioctl gives `EIO`; a page fault needs none.
#[derive(Debug)]
pub struct Held {
    traced: Traced,
    /// As they were when it stopped.
    registers: user_regs_struct,
    /// The address of a `syscall` instruction.
    gate: u64,
    blocked: u64,
    /// For the case that this process is killed meanwhile.
    note: Option<Note>,
    /// What it goes on with.
    next: Cell<user_regs_struct>,
    /// The address of a page in the client for arguments; 0 before the first use.
    scratch: Cell<u64>,
}

impl Seized {
    /// Makes thread `tid` stop when its system call returns. `EPERM`: another tracer has it. `EACCES`: it is under a filter that
    /// stays, and a system call that we have it run could end the client.
    pub fn new(tid: Pid) -> Result<Self, Errno> {
        let options = Options::PTRACE_O_TRACESYSGOOD;
        attached(tid, || {
            ptrace::seize(tid, options | Options::from_bits_retain(SUSPEND_SECCOMP)).or_else(|_| {
                if tracer(tid).is_none() && has_filter_of_its_own(tid) {
                    return Err(Errno::EACCES);
                }
                ptrace::seize(tid, options)
            })
        })?;
        let beside = Beside::new(tid);
        let seized = Self(Traced { tid, ended: Cell::new(false), beside, not_send: PhantomData });
        ptrace::interrupt(tid)?;
        Ok(seized)
    }

    /// The thread.
    pub fn tid(&self) -> Pid {
        self.0.tid
    }

    /// Waits until it stands. The ioctl must have been answered.
    pub fn stopped(self) -> Result<Held, Errno> {
        let held = self.stand(&mut || {})?;
        held.set_result(-(Errno::EIO as i64));
        let gate = held.check().inspect_err(|errno| held.set_result(-(*errno as i64)))?;
        held.ready(gate)
    }

    /// The same for a thread in a page fault, be it of its own or of a system call that it makes. The fault must have been
    /// answered.
    pub fn stopped_in_fault(self) -> Result<Held, Errno> {
        self.stopped_while(&mut || {})
    }

    /// The same. `meanwhile` is done again and again where it takes longer: what it waits for may be of several parts.
    pub fn stopped_while(self, meanwhile: &mut dyn FnMut()) -> Result<Held, Errno> {
        let mut held = self.stand(meanwhile)?;
        held.next.set(restarted(held.registers));
        let gate =
            held.check().or_else(|errno| if held.registers.cs == USER64_CS { held.vdso() } else { Err(errno) })?;
        // Where we are killed meanwhile, it goes on behind the gate, with a call's registers. No error can reach it there, nor
        // should it run what its stack happens to hold: it ends by SIGSEGV.
        held.registers.rsp = 0;
        held.ready(gate)
    }

    fn stand(self, meanwhile: &mut dyn FnMut()) -> Result<Held, Errno> {
        let traced = self.0;
        loop {
            let status = traced.next_stop_while(meanwhile)?;
            if status >> 16 == EVENT_STOP {
                break;
            }
            // A signal that came before the answer did.
            sys::resume_to_syscall(traced.tid, libc::WSTOPSIG(status))?;
        }
        let registers = ptrace::getregs(traced.tid)?;
        let blocked = sys::blocked_signals(traced.tid)?;
        let (next, scratch) = (Cell::new(registers), Cell::new(0));
        Ok(Held { traced, registers, gate: 0, blocked, note: None, next, scratch })
    }
}

/// Is the thread under more seccomp filters than this one? What both are under, a container's, lets us do what we do.
fn has_filter_of_its_own(tid: Pid) -> bool {
    let filters = |path: &str| {
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let count = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
        count.and_then(|count| count.trim().parse::<u32>().ok()).unwrap_or(0)
    };
    filters(&format!("/proc/{tid}/status")) > filters("/proc/thread-self/status")
}

/// A system call that a stop interrupted begins again, as the kernel does it where no signal is to be delivered.
fn restarted(mut registers: user_regs_struct) -> user_regs_struct {
    // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND; ERESTART_RESTARTBLOCK has a call of its own. linux/errno.h
    let again = match registers.rax.cast_signed() {
        _ if registers.orig_rax.cast_signed() < 0 => return registers,
        -514..=-512 => registers.orig_rax,
        -516 => libc::SYS_restart_syscall.cast_unsigned(),
        _ => return registers,
    };
    registers.rax = again;
    registers.rip = registers.rip.wrapping_sub(2);
    registers
}

impl Held {
    /// Injection needs 64-bit code that came here by `syscall`; where that instruction is.
    fn check(&self) -> Result<u64, Errno> {
        let at = self.registers.rip.wrapping_sub(2);
        let address = std::ptr::without_provenance_mut::<libc::c_void>(at as usize);
        let code = ptrace::read(self.traced.tid, address)? as u16;
        if self.registers.cs != USER64_CS || code != SYSCALL_INSTRUCTION {
            return Err(Errno::ENOEXEC);
        }
        Ok(at)
    }

    /// A `syscall` instruction in the kernel's own code in the process, which has some for clocks that it cannot read.
    fn vdso(&self) -> Result<u64, Errno> {
        let all = maps::areas(self.traced.tid, &(0..u64::MAX)).map_err(|_| Errno::ESRCH)?;
        let vdso = all.into_iter().find(|area| area.name == "[vdso]").ok_or(Errno::ENOEXEC)?;
        let mut code = vec![0; (vdso.range.end - vdso.range.start) as usize];
        vm::read(self.traced.tid, vdso.range.start, &mut code)?;
        let found = code.windows(2).position(|pair| pair == SYSCALL_INSTRUCTION.to_le_bytes());
        found.map(|at| vdso.range.start + at as u64).ok_or(Errno::ENOEXEC)
    }

    fn ready(mut self, gate: u64) -> Result<Self, Errno> {
        self.gate = gate;
        self.note = Note::of(self.traced.tid, self.blocked);
        sys::set_blocked_signals(self.traced.tid, !0)?;
        Ok(self)
    }

    /// It died, and its id may mean another thread by now.
    pub fn ended(&self) -> bool {
        self.traced.ended.get()
    }

    /// The argument registers of the ioctl: descriptor, request, arg.
    pub fn ioctl_fd(&self) -> i32 {
        self.registers.rdi as i32
    }

    /// Runs one system call in the client.
    pub fn syscall(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<u64, Errno> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let rax = number.cast_unsigned();
        let rip = self.gate;
        // orig_rax −1: in no system call, so the kernel has nothing to restart.
        let call = user_regs_struct { rax, rdi, rsi, rdx, r10, r8, r9, rip, orig_rax: !0, ..self.registers };
        ptrace::setregs(self.traced.tid, call)?;
        self.next_syscall_stop()?;
        self.next_syscall_stop()?;
        let result = ptrace::getregs(self.traced.tid)?.rax.cast_signed();
        match result {
            -4095..0 => Err(Errno::from_raw(-result as i32)),
            result => Ok(result.cast_unsigned()),
        }
    }

    fn next_syscall_stop(&self) -> Result<(), Errno> {
        let mut signal = 0;
        loop {
            sys::resume_to_syscall(self.traced.tid, signal)?;
            let status = self.traced.next_stop()?;
            signal = match (libc::WSTOPSIG(status), status >> 16) {
                (stop, 0) if stop == libc::SIGTRAP | 0x80 => return Ok(()),
                // Only SIGSTOP passes the mask. Delivered, it stops the whole process, and holds once we detach.
                (signal, 0) => signal,
                _ => 0,
            };
        }
    }

    /// A page in the client that both sides may use for arguments, until `finish`.
    pub fn scratch(&self) -> Result<u64, Errno> {
        if self.scratch.get() == 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let page = self.syscall(libc::SYS_mmap, [0, PAGE, prot as u64, flags as u64, !0, 0])?;
            self.scratch.set(page);
        }
        Ok(self.scratch.get())
    }

    /// The thread whose memory [`scratch`](Self::scratch) lies in.
    pub fn tid(&self) -> Pid {
        self.traced.tid
    }

    /// Writes arguments to the scratch page.
    pub fn poke(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        vm::write(self.traced.tid, address, bytes)
    }

    /// Lets the thread go on with `result` from its ioctl.
    pub fn finish(self, result: i64) {
        self.set_result(result);
    }

    /// Lets the thread make its ioctl once more, and nobody knows of the first.
    pub fn repeat(self) {
        let (rax, rip) = (libc::SYS_ioctl.cast_unsigned(), self.registers.rip.wrapping_sub(2));
        self.next.set(user_regs_struct { rax, rip, orig_rax: !0, ..self.registers });
    }

    fn set_result(&self, result: i64) {
        self.next.set(user_regs_struct { rax: result.cast_unsigned(), orig_rax: !0, ..self.registers });
    }

    fn drop_scratch(&self) -> Result<(), Errno> {
        match self.scratch.replace(0) {
            0 => Ok(()),
            page => self.syscall(libc::SYS_munmap, [page, PAGE, 0, 0, 0, 0]).map(drop),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let tid = self.traced.tid;
        let result = self.drop_scratch().and_then(|()| ptrace::setregs(tid, self.next.get()));
        let result = result.and_then(|()| sys::set_blocked_signals(tid, self.blocked));
        if let Err(errno) = result {
            tracing::debug!(tid = tid.as_raw(), %errno, "client thread is gone");
        }
    }
}
