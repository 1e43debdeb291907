//! mmap of a VM of 2007, by a client that touches it. The oracle: Linux 2.6.22 `kvm_vm_nopage`, which looks a page up when it
//! is touched, through aliases first, and whose pages stay with who has them.
#![expect(unsafe_code, reason = "touching memory that may not be there, and a handler that survives it")]

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;

use crate::client::{PAGE, create, device, ioctl, map};

const SET_MEMORY_REGION: u32 = 0x4018_ae40;
const SET_MEMORY_ALIAS: u32 = 0x4020_ae43;
const CREATE_VCPU: u32 = 0xae41;
const RUN: u32 = 0xae80;
const SET_SIGNAL_MASK: u32 = 0x4004_ae8b;
const WINDOW: usize = 2 << 20;

/// SIGBUS so far.
static FAULTS: AtomicU64 = AtomicU64::new(0);

/// Counts, and goes on behind the instruction: [`touch`] and [`put`] use one of two bytes.
extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    FAULTS.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the kernel hands a handler with SA_SIGINFO a siginfo_t.
    assert_eq!(unsafe { (*info).si_code }, 2, "BUS_ADRERR");
    // SAFETY: and a ucontext_t, which belongs to the handler.
    unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] += 2 };
}

fn survive_sigbus() {
    let action = nix::sys::signal::SigAction::new(
        nix::sys::signal::SigHandler::SigAction(on_sigbus),
        nix::sys::signal::SaFlags::SA_SIGINFO,
        nix::sys::signal::SigSet::empty(),
    );
    // SAFETY: the handler touches an atomic and its own arguments.
    unsafe { nix::sys::signal::sigaction(nix::sys::signal::SIGBUS, &action) }.unwrap();
}

/// The byte there, or `None` and a SIGBUS survived.
fn touch(window: *mut u8, gpa: usize) -> Option<u8> {
    let before = FAULTS.load(Ordering::SeqCst);
    let byte: u8;
    // SAFETY: inside a mapping of ours; a fault is survived by `on_sigbus`.
    unsafe { std::arch::asm!("mov al, [rdi]", in("rdi") window.wrapping_add(gpa), inout("al") 0xee_u8 => byte) };
    (FAULTS.load(Ordering::SeqCst) == before).then_some(byte)
}

fn put(window: *mut u8, gpa: usize, byte: u8) -> Option<()> {
    let before = FAULTS.load(Ordering::SeqCst);
    // SAFETY: as for `touch`.
    unsafe { std::arch::asm!("mov [rdi], al", in("rdi") window.wrapping_add(gpa), in("al") byte) };
    (FAULTS.load(Ordering::SeqCst) == before).then_some(())
}

fn region(vm: impl AsFd, slot: u64, gpa: u64, size: u64) {
    assert_eq!(ioctl(vm, SET_MEMORY_REGION, [slot, gpa, size].as_ptr().addr() as u64), Ok(0));
}

fn alias(vm: impl AsFd, gpa: u64, size: u64, target: u64) {
    assert_eq!(ioctl(vm, SET_MEMORY_ALIAS, [0, gpa, size, target].as_ptr().addr() as u64), Ok(0));
}

fn window(vm: impl AsFd) -> *mut u8 {
    let flags = libc::PROT_READ | libc::PROT_WRITE;
    map(WINDOW, flags, libc::MAP_SHARED, vm.as_fd().as_raw_fd())
}

/// RAM below 640 KiB and, as kvmctl has it, up from 768 KiB.
fn machine() -> OwnedFd {
    let vm = create(device());
    region(&vm, 3, 0, 0xa_0000);
    region(&vm, 0, 0xc_0000, 0x8_0000);
    vm
}

/// A vCPU that spins: jmp $.
fn spinning(vm: &OwnedFd, id: u64) -> OwnedFd {
    let window = window(vm);
    put(window, 0xf_fff0, 0xeb).unwrap();
    put(window, 0xf_fff1, 0xfe).unwrap();
    crate::client::owned(ioctl(vm, CREATE_VCPU, id).unwrap())
}

pub fn ram_window() {
    survive_sigbus();
    let vm = machine();
    let first = window(&vm);
    assert_eq!(touch(first, 0xa_0000), None, "a hole");
    assert_eq!(touch(first, 0x1000), Some(0));
    assert_eq!(put(first, 0x1000, 7), Some(()));
    assert_eq!((touch(first, 0x1000), touch(first, 0xa_0000), put(first, 0xb_f000, 1)), (Some(7), None, None));

    // The kernel touches it first, several pages in one call, and a hole at the end.
    let second = window(&vm);
    let (mut from, mut into) = std::io::pipe().unwrap();
    let bytes: Vec<u8> = (0..3 * PAGE).map(|at| (at / 16) as u8 | 1).collect();
    into.write_all(&bytes).unwrap();
    assert_eq!(read(&from, second.wrapping_add(0x4000), 3 * PAGE), Ok(3 * PAGE));
    assert!((0..3 * PAGE).all(|at| touch(second, 0x4000 + at) == Some(bytes[at])), "what read(2) put there");
    assert!((0..3 * PAGE).all(|at| touch(first, 0x4000 + at) == Some(bytes[at])), "and the other mapping shows");
    into.write_all(&bytes[..16]).unwrap();
    assert_eq!(read(&from, second.wrapping_add(0xa_0000), 16), Err(Errno::EFAULT), "into a hole");
    std::io::Read::read(&mut from, &mut [0; 16]).unwrap_or(0);

    // The guest sees the same memory: mov byte [1234h], 5ah; mov al, [4000h]; mov [1236h], al; hlt
    let code = [0xc6, 0x06, 0x34, 0x12, 0x5a, 0xa0, 0x00, 0x40, 0xa2, 0x36, 0x12, 0xf4];
    let third = window(&vm);
    (0..).zip(code).for_each(|(at, byte)| put(third, 0xf_fff0 + at, byte).unwrap());
    let vcpu = crate::client::owned(ioctl(&vm, CREATE_VCPU, 0).unwrap());
    assert_eq!(ioctl(&vcpu, RUN, 0), Ok(0));
    for window in [first, second, third] {
        assert_eq!((touch(window, 0x1234), touch(window, 0x1236)), (Some(0x5a), Some(bytes[0])));
    }

    // A slot that comes after the mapping and after the fault; two pages of it are touched.
    assert_eq!(touch(first, 0x18_0000), None);
    region(&vm, 1, 0x18_0000, 0x4000);
    assert_eq!((touch(first, 0x18_0000), put(first, 0x18_1004, 9)), (Some(0), Some(())));

    // An alias, touched and removed: the page that was touched stays, the others are gone.
    alias(&vm, 0xa_0000, 0x4000, 0x18_1000);
    assert_eq!((touch(first, 0xa_0004), touch(first, 0xa_3000)), (Some(9), None), "its last page shows a hole");
    put(first, 0xa_0005, 10).unwrap();
    assert_eq!(touch(first, 0x18_1005), Some(10));
    alias(&vm, 0, 0, 0);
    assert_eq!((touch(first, 0xa_0004), touch(first, 0xa_1000)), (Some(9), None));
    assert_eq!(touch(second, 0xa_0004), None, "who has not touched it has nothing");

    // An alias over RAM wins, also for what is mapped and was not touched.
    assert_eq!(touch(first, 0x9_0000), Some(0));
    alias(&vm, 0x9_0000, 0x2000, 0x18_1000);
    assert_eq!((touch(first, 0x9_0004), touch(second, 0x9_0004)), (Some(0), Some(9)));
    alias(&vm, 0, 0, 0);

    // A slot that is deleted, and made again: the same.
    region(&vm, 1, 0, 0);
    assert_eq!((touch(first, 0x18_1004), touch(first, 0x18_2000), touch(second, 0x18_1004)), (Some(9), None, None));
    region(&vm, 1, 0x18_0000, 0x4000);
    assert_eq!(
        (touch(first, 0x18_1004), touch(first, 0x18_2000), touch(second, 0x18_1004)),
        (Some(9), Some(0), Some(0))
    );

    // A slot that moves takes its contents along.
    put(second, 0x18_2000, 11).unwrap();
    region(&vm, 1, 0x1c_0000, 0x4000);
    assert_eq!((touch(second, 0x1c_2000), touch(first, 0x1c_2000)), (Some(11), Some(11)));
    assert_eq!((touch(second, 0x18_2000), touch(second, 0x18_3000)), (Some(11), None));

    kept_pages(&vm);

    // Other ways to look at the file leave it as it is.
    assert!(nix::sys::stat::fstat(&vm).is_ok());
    assert_eq!((touch(first, 0x1000), touch(first, 0x1e_0000), touch(window(&vm), 0x1000)), (Some(7), None, Some(7)));
}

/// Slots come and go in one place, and of each the client touches other pages: a page is of the slot that it was touched of.
fn kept_pages(vm: &OwnedFd) {
    const PAGES: usize = 64;
    const AT: usize = 0x14_0000;
    let window = window(vm);
    let mut kept = [None; PAGES];
    for round in 1..=3 {
        region(vm, 2, AT as u64, (PAGES * PAGE) as u64);
        for page in (0..PAGES).step_by(2 * round) {
            let byte = (16 * round + page % 16) as u8;
            put(window, AT + page * PAGE, byte).expect("RAM");
            kept[page] = Some(byte);
        }
        // One page to read, which the guest's RAM does have.
        assert_eq!(touch(window, AT + PAGE * (2 * round - 1)), Some(0), "a new page");
        kept[2 * round - 1] = Some(0);
        region(vm, 2, 0, 0);
        // From the last to the first, so that no touch comes by the way of another.
        for page in (0..PAGES).rev() {
            assert_eq!(touch(window, AT + page * PAGE), kept[page], "page {page} after round {round}");
        }
    }
    let again = self::window(vm);
    assert_eq!(touch(again, AT), None, "who has not touched it has nothing");
}

/// read(2), into memory that may not be there.
fn read(from: impl AsFd, at: *mut u8, len: usize) -> Result<usize, Errno> {
    // SAFETY: the kernel writes inside a mapping of ours, or says EFAULT.
    let done = unsafe { libc::read(from.as_fd().as_raw_fd(), at.cast(), len) };
    Errno::result(done).map(|done| done as usize)
}

/// Many threads touch fresh mappings at once: no write is lost.
pub fn ram_threads() {
    const THREADS: usize = 6;
    survive_sigbus();
    let vm = machine();
    for round in 1..6u8 {
        let all = window(&vm).addr();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    let window = std::ptr::with_exposed_provenance_mut::<u8>(all);
                    for page in 0..0xa0 {
                        put(window, page * PAGE + thread, round).expect("RAM");
                    }
                });
            }
        });
        let again = window(&vm);
        for page in 0..0xa0 {
            let seen: Vec<_> = (0..THREADS).map(|thread| touch(again, page * PAGE + thread)).collect();
            assert_eq!(seen, vec![Some(round); THREADS], "round {round}, page {page:#x}");
        }
    }
}

/// Signals whose handler ran, bit n−1 for signal n.
static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(signal: i32) {
    HANDLED.fetch_or(bit(signal), Ordering::SeqCst);
}

const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn handle(signal: i32) {
    dispose(signal, on_signal as *const () as libc::sighandler_t);
}

fn ignore(signal: i32) {
    dispose(signal, libc::SIG_IGN);
}

fn dispose(signal: i32, handler: libc::sighandler_t) {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    // SAFETY: the handler touches an atomic only.
    assert_eq!(unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) }, 0);
}

/// All real-time signals: 32 to 64 of the kernel's.
pub const REALTIME: u64 = !0 << 31;

/// rt_sigprocmask(2), of this thread.
pub fn mask(how: i32, set: u64) {
    // SAFETY: the kernel reads 8 bytes of `set`. Not by way of libc, which hides two signals.
    assert_eq!(unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const set, 0, 8) }, 0);
}

fn set_mask(vcpu: &OwnedFd, set: u64) {
    let [a, b] = [set as u32, (set >> 32) as u32];
    assert_eq!(ioctl(vcpu, SET_SIGNAL_MASK, [8u32, a, b].as_ptr().addr() as u64), Ok(0));
}

fn gettid() -> i32 {
    nix::unistd::gettid().as_raw()
}

fn tgkill(tid: i32, signal: i32) {
    // SAFETY: takes integers only.
    assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, signal) }, 0);
}

/// Takes a signal that is pending; 0: there is none of `set`.
fn take(set: u64) -> i32 {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel reads 8 bytes of `set` and the time.
    let signal = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const set,
            std::ptr::null_mut::<libc::siginfo_t>(),
            &raw const none,
            8,
        )
    };
    signal.max(0) as i32
}

/// A thread in KVM_RUN that blocks `set`, under a mask that lets all of it through and blocks `masked`.
fn runner(vcpu: &OwnedFd, set: u64, masked: u64, started: &std::sync::mpsc::Sender<i32>) -> (std::time::Instant, i32) {
    mask(libc::SIG_BLOCK, set);
    set_mask(vcpu, masked);
    started.send(gettid()).unwrap();
    assert_eq!(ioctl(vcpu, RUN, 0), Err(Errno::EINTR));
    let ended = std::time::Instant::now();
    (ended, take(set))
}

/// KVM_SET_SIGNAL_MASK by the rules of `kvm_vcpu_ioctl`: during KVM_RUN the mask is the thread's.
pub fn signal_mask() {
    use std::sync::mpsc::channel;
    use std::thread::{scope, sleep};
    use std::time::Duration;
    let (rt, other, usr) = (libc::SIGRTMIN() + 4, libc::SIGRTMIN() + 5, libc::SIGUSR2);
    [rt, other, usr].into_iter().for_each(handle);
    let vm = machine();
    let (first, second) = (spinning(&vm, 0), spinning(&vm, 1));
    let (sender, started) = channel();
    let soon = || sleep(Duration::from_millis(10));

    // One thread, over and over: blocked outside, let through inside. It stays pending, and no handler runs. The first
    // is told apart: it comes while the vCPU is being set up.
    let mut latencies: Vec<Duration> = (0..40)
        .map(|_| {
            scope(|scope| {
                let run = scope.spawn(|| runner(&first, bit(rt), 0, &sender));
                let tid = started.recv().unwrap();
                soon();
                let sent = std::time::Instant::now();
                tgkill(tid, rt);
                let (ended, taken) = run.join().unwrap();
                assert_eq!(taken, rt, "still pending");
                ended - sent
            })
        })
        .collect();
    let first_of_all = latencies.remove(0);
    latencies.sort();
    let (median, slowest) = (latencies[latencies.len() / 2], latencies[latencies.len() - 1]);
    eprintln!("tgkill to the end of KVM_RUN: median {median:?}, slowest {slowest:?}, the first {first_of_all:?}");
    assert_eq!(HANDLED.load(Ordering::SeqCst), 0, "no handler ran");

    // One that is ignored: the kernel drops it as it comes, for during the run it is not blocked. One that was pending
    // before stays, and ends the run.
    ignore(usr);
    scope(|scope| {
        let run = scope.spawn(|| runner(&first, bit(rt) | bit(usr), 0, &sender));
        let tid = started.recv().unwrap();
        soon();
        tgkill(tid, usr);
        soon();
        assert!(!run.is_finished(), "nobody is to hear of it");
        tgkill(tid, rt);
        run.join().unwrap();
    });
    scope(|scope| {
        scope.spawn(|| {
            mask(libc::SIG_BLOCK, bit(usr));
            set_mask(&first, 0);
            tgkill(gettid(), usr);
            assert_eq!(ioctl(&first, RUN, 0), Err(Errno::EINTR));
        });
    });
    handle(usr);

    // Pending before: the same, at once; and again, for nobody took it.
    mask(libc::SIG_BLOCK, bit(rt));
    set_mask(&first, 0);
    tgkill(gettid(), rt);
    assert_eq!((ioctl(&first, RUN, 0), ioctl(&first, RUN, 0)), (Err(Errno::EINTR), Err(Errno::EINTR)));
    assert_eq!(take(bit(rt)), rt);

    // To the process, all of whose threads block it.
    scope(|scope| {
        let run = scope.spawn(|| runner(&first, bit(other), 0, &sender));
        started.recv().unwrap();
        soon();
        let pid = std::process::id().cast_signed();
        // SAFETY: takes integers only.
        assert_eq!(unsafe { libc::kill(pid, other) }, 0);
        assert_eq!(run.join().unwrap().1, other);
    });

    // Two threads, each with a mask of its own: a signal ends the run whose mask lets it through.
    let both = bit(rt) | bit(other);
    scope(|scope| {
        let one = scope.spawn(|| runner(&first, both, bit(other), &sender));
        let one_tid = started.recv().unwrap();
        let two = scope.spawn(|| runner(&second, both, bit(rt), &sender));
        let two_tid = started.recv().unwrap();
        soon();
        tgkill(one_tid, other);
        tgkill(two_tid, rt);
        soon();
        assert!(!one.is_finished() && !two.is_finished(), "both are masked");
        tgkill(two_tid, other);
        assert_eq!(two.join().unwrap().1, rt, "lower numbers are taken first; both pend");
        assert!(!one.is_finished());
        tgkill(one_tid, rt);
        assert_eq!(one.join().unwrap().1, rt);
    });
    assert_eq!(HANDLED.load(Ordering::SeqCst), 0);

    // A signal that the thread takes and the mask blocks does not end the run; its handler runs when something else has.
    scope(|scope| {
        let run = scope.spawn(|| runner(&first, bit(rt), bit(usr), &sender));
        let tid = started.recv().unwrap();
        soon();
        tgkill(tid, usr);
        soon();
        assert!(!run.is_finished(), "masked");
        assert_eq!(HANDLED.load(Ordering::SeqCst), 0);
        tgkill(tid, rt);
        assert_eq!(run.join().unwrap().1, rt);
        assert_eq!(HANDLED.load(Ordering::SeqCst), bit(usr));
    });

    // What the kernel moves before it asks anybody, for a file of FUSE: 4 bytes at a null pointer.
    assert_eq!(ioctl(&first, SET_SIGNAL_MASK, 0), Err(Errno::EFAULT));
}
