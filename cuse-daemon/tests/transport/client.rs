//! The client's side: what a VMM does, in a process of its own.
#![expect(unsafe_code, reason = "a client is system calls and raw memory")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::fake::request;

/// Names the case; not set: this is no client.
pub const CASE: &str = "SOFTKVM_CLIENT_CASE";
/// Where the device is.
pub const DEVICE: &str = "SOFTKVM_CLIENT_DEVICE";

pub const PAGE: usize = 4096;

#[test]
fn client() {
    let Ok(case) = std::env::var(CASE) else { return };
    match case.as_str() {
        "descriptors" => descriptors(),
        "pages" => pages(),
        "inherit" => inherit(),
        "share" => share(),
        "share-files" => share_files(),
        "share-writers" => share_writers(),
        "share-huge" => share_huge(),
        "signals" => signals(),
        "masked" => masked(),
        "window" => window(),
        "panic" => panics(),
        "compat" => compat(),
        "seccomp" => seccomp(),
        "seccomp-stays" => seccomp_stays(),
        "spaces" => spaces(),
        "churn" => churn(),
        "churn-alone" => churn_alone(),
        "serve" => serve(),
        "wait" => wait(),
        "asks-itself" => crate::guard::asks_itself(),
        "namespaces" => namespaces(),
        "ram-window" => crate::legacy::ram_window(),
        "signal-mask" => crate::legacy::signal_mask(),
        "ram-threads" => crate::legacy::ram_threads(),
        case => panic!("no such case: {case}"),
    }
}

pub fn device() -> File {
    OpenOptions::new().read(true).write(true).open(std::env::var_os(DEVICE).unwrap()).unwrap()
}

pub fn ioctl(fd: impl AsFd, request: u32, arg: u64) -> Result<i32, Errno> {
    // SAFETY: the fake objects use `arg` as a value, or as the address of live memory of the size in the request.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request.into(), arg) })
}

fn words(fd: impl AsFd, request: u32, words: [u64; 2]) -> Result<i32, Errno> {
    ioctl(fd, request, words.as_ptr().addr() as u64)
}

pub fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the ioctl just gave this descriptor to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub fn create(fd: impl AsFd) -> OwnedFd {
    owned(ioctl(fd, request::CREATE, 0).unwrap())
}

pub fn map(len: usize, prot: i32, flags: i32, fd: RawFd) -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED, "mmap: {}", Errno::last());
    at.cast()
}

fn anonymous(len: usize) -> *mut u8 {
    map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
}

fn poke(at: *mut u8, offset: usize, byte: u8) {
    let at = at.wrapping_add(offset);
    // SAFETY: callers stay inside their mappings, which nobody unmaps.
    unsafe { at.write_volatile(byte) }
}

fn peek(at: *mut u8, offset: usize) -> u8 {
    let at = at.wrapping_add(offset);
    // SAFETY: callers stay inside their mappings, which nobody unmaps.
    unsafe { at.read_volatile() }
}

fn free_descriptor() -> RawFd {
    let free = File::open("/dev/null").unwrap();
    free.as_raw_fd()
}

fn is_cloexec(fd: impl AsFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFD).unwrap() & libc::FD_CLOEXEC != 0
}

fn own_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn descriptors() {
    let kvm = device();
    assert_eq!(ioctl(&kvm, request::VERSION, 0), Ok(12));
    let before = own_descriptors();
    let lowest = free_descriptor();
    let vm = create(&kvm);
    assert_eq!(vm.as_raw_fd(), lowest, "the lowest free number, as the kernel gives it");
    assert!(is_cloexec(&vm));
    let vcpu = create(&vm);
    assert_eq!(vcpu.as_raw_fd(), lowest + 1);
    let kept = owned(ioctl(&vm, request::CREATE_KEEP, 1).unwrap());
    assert!(!is_cloexec(&kept));
    assert_eq!(own_descriptors(), before + 3, "no helper descriptor stays");
    let mut bytes = [0u8; 4];
    let fourth = owned(ioctl(&kvm, request::OUTPUT, bytes.as_mut_ptr().addr() as u64).unwrap());
    assert_eq!(fourth.as_raw_fd(), lowest + 3);
    assert_eq!(&bytes, b"out!", "an answer ahead of the end still delivers its bytes");
    let link = std::fs::read_link(format!("/proc/self/fd/{}", vcpu.as_raw_fd())).unwrap();
    assert!(link.to_string_lossy().contains("kvm-vcpu"), "{link:?}");
    let again = File::open(format!("/proc/self/fd/{}", vcpu.as_raw_fd()));
    assert!(again.is_err(), "KVM's files cannot be opened by name");
    let mut words = [5u8; 64];
    ioctl(&vm, request::COPY, words.as_mut_ptr().addr() as u64).unwrap();
    assert_eq!(words, [6; 64]);
    assert_eq!(ioctl(&vm, request::COPY, 8), Err(Errno::EFAULT));
    assert_eq!(nix::unistd::read(&vm, &mut [0]), Err(Errno::EINVAL), "no read method");
}

fn pages() {
    let kvm = device();
    let vm = create(&kvm);
    // SAFETY: a mapping at an address of the kernel's choice, which is expected to fail.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, 1, libc::MAP_SHARED, vm.as_raw_fd(), 0) };
    assert_eq!((at, Errno::last()), (libc::MAP_FAILED, Errno::ENODEV));
    let vcpu = create(&vm);
    let flags = libc::PROT_READ | libc::PROT_WRITE;
    let first = map(3 * PAGE, flags, libc::MAP_SHARED, vcpu.as_raw_fd());
    // Written before any ioctl of this vCPU: must be there afterwards.
    poke(first, 1, 77);
    assert_eq!(ioctl(&vcpu, request::VERSION, 0), Ok(12));
    assert_eq!((peek(first, 1), peek(first, PAGE)), (77, b'p'));
    let second = map(3 * PAGE, flags, libc::MAP_SHARED, vcpu.as_raw_fd());
    assert_eq!((peek(second, 1), peek(second, PAGE + 1)), (77, b'a'));
    assert_eq!(ioctl(&vcpu, request::VERSION, 0), Ok(12));
    poke(second, 2, 78);
    assert_eq!(peek(first, 2), 78, "both mappings show the same page");
    let dup = vcpu.try_clone().unwrap();
    drop(vcpu);
    let third = map(PAGE, flags, libc::MAP_SHARED, dup.as_raw_fd());
    assert_eq!(ioctl(&dup, request::VERSION, 0), Ok(12));
    assert_eq!(peek(third, 2), 78);
}

fn inherit() {
    let kvm = device();
    let vm = owned(ioctl(&kvm, request::CREATE_KEEP, 0).unwrap());
    let dup = nix::unistd::dup(&vm).unwrap();
    drop(vm);
    drop(kvm);
    // By exec: the shell has it as its own.
    let script = format!("exec 9<&{} ; test -e /proc/self/fd/9", dup.as_raw_fd());
    assert!(std::process::Command::new("sh").args(["-c", &script]).status().unwrap().success());
    // By SCM_RIGHTS.
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    let fds = [dup.as_raw_fd()];
    let rights = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
    let flags = nix::sys::socket::MsgFlags::empty();
    nix::sys::socket::sendmsg::<()>(a.as_raw_fd(), &[std::io::IoSlice::new(b"x")], &rights, flags, None).unwrap();
    drop(dup);
    let mut byte = [0];
    let mut iov = [std::io::IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = nix::sys::socket::recvmsg::<()>(b.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
    let received = message.cmsgs().unwrap().next().unwrap();
    let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = received else { panic!() };
    let received = owned(fds[0]);
    assert_eq!(ioctl(&received, request::VERSION, 0), Ok(12));
    let vcpu = create(&received);
    assert_eq!(ioctl(&vcpu, request::VERSION, 0), Ok(12));
}

fn vm_flags(at: *mut u8) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{:x}-", at.addr());
    let area = smaps.split(&head).nth(1).expect("mapped");
    area.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap().to_owned()
}

fn share() {
    let kvm = device();
    let vm = create(&kvm);
    let ram = anonymous(64 * PAGE);
    // SAFETY: a mapping of our own; neither call changes its contents.
    unsafe {
        assert_eq!(libc::madvise(ram.cast(), 64 * PAGE, libc::MADV_DONTFORK), 0);
    }
    poke(ram, 10 * PAGE + 5, 42);
    poke(ram, 63 * PAGE, 43);
    let address = ram.addr() as u64;
    assert_eq!(words(&vm, request::SHARE, [address, 64 * PAGE as u64]), Ok(1));
    assert_eq!((peek(ram, 10 * PAGE + 5), peek(ram, 63 * PAGE), peek(ram, 0)), (42, 43, 0), "contents stay");
    assert_eq!(ioctl(&vm, request::PEEK, 10 * PAGE as u64 + 5), Ok(42));
    poke(ram, 7, 99);
    assert_eq!(ioctl(&vm, request::PEEK, 7), Ok(99), "the daemon sees what the client writes");
    words(&vm, request::POKE, [8 * PAGE as u64, 17]).unwrap();
    assert_eq!(peek(ram, 8 * PAGE), 17, "and the other way round");
    assert!(vm_flags(ram).contains(" dc"), "MADV_DONTFORK stays: {}", vm_flags(ram));
    assert!(vm_flags(ram).contains(" sh"), "{}", vm_flags(ram));

    // The same range again, a part of it, and one that goes beyond.
    let map_count = || std::fs::read_to_string("/proc/self/maps").unwrap().matches("softkvm-ram").count();
    assert_eq!(words(&vm, request::SHARE, [address, 64 * PAGE as u64]), Ok(1));
    assert_eq!(words(&vm, request::SHARE, [address + 8 * PAGE as u64, 2 * PAGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 0), Ok(17));
    assert_eq!(map_count(), 1, "nothing was made twice");
    let more = anonymous(32 * PAGE);
    assert_eq!(words(&vm, request::SHARE, [more.addr() as u64 + 4 * PAGE as u64, 4 * PAGE as u64]), Ok(1));
    poke(more, 6 * PAGE, 3);
    assert_eq!(words(&vm, request::SHARE, [more.addr() as u64, 32 * PAGE as u64]), Ok(3));
    poke(more, 0, 1);
    poke(more, 31 * PAGE, 2);
    for (page, byte) in [(0, 1), (31, 2), (6, 3)] {
        assert_eq!(ioctl(&vm, request::PEEK, page * PAGE as u64), Ok(byte));
    }

    // Protections stay.
    let readonly = anonymous(2 * PAGE);
    poke(readonly, 0, 9);
    // SAFETY: a mapping of our own, only read from here on.
    assert_eq!(unsafe { libc::mprotect(readonly.cast(), 2 * PAGE, libc::PROT_READ) }, 0);
    assert_eq!(words(&vm, request::SHARE, [readonly.addr() as u64, 2 * PAGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 0), Ok(9));
    assert!(!vm_flags(readonly).contains(" wr"), "{}", vm_flags(readonly));

    // SAFETY: a mapping of our own, not used any more.
    assert_eq!(unsafe { libc::munmap(readonly.cast(), 2 * PAGE) }, 0);
    assert_eq!(words(&vm, request::SHARE, [readonly.addr() as u64, PAGE as u64]), Err(Errno::EFAULT));
    assert_eq!(words(&vm, request::SHARE, [u64::MAX - 4095, 8192]), Err(Errno::EINVAL));
}

fn share_files() {
    let kvm = device();
    let vm = create(&kvm);
    let memfd = nix::sys::memfd::memfd_create(c"vmm-ram", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.set_len(16 * PAGE as u64).unwrap();
    let flags = libc::PROT_READ | libc::PROT_WRITE;
    let shared = map(16 * PAGE, flags, libc::MAP_SHARED, file.as_raw_fd());
    assert_eq!(words(&vm, request::SHARE, [(shared.addr() + 2 * PAGE) as u64, 4 * PAGE as u64]), Ok(1));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("softkvm-ram"), "left as it was: {maps}");
    poke(shared, 3 * PAGE, 5);
    assert_eq!(ioctl(&vm, request::PEEK, PAGE as u64), Ok(5));
    words(&vm, request::POKE, [0, 6]).unwrap();
    assert_eq!(peek(shared, 2 * PAGE), 6);

    // The client takes its file away: zeros for the daemon, no SIGBUS.
    file.set_len(0).unwrap();
    assert_eq!(ioctl(&vm, request::PEEK, PAGE as u64), Ok(0));
    file.set_len(16 * PAGE as u64).unwrap();

    // A private mapping of a file: what the file holds, and what the client wrote over it.
    file.write_all(&[7; PAGE]).unwrap();
    let private = map(2 * PAGE, flags, libc::MAP_PRIVATE, file.as_raw_fd());
    poke(private, PAGE, 8);
    assert_eq!(words(&vm, request::SHARE, [private.addr() as u64, 2 * PAGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 0), Ok(7));
    assert_eq!(ioctl(&vm, request::PEEK, PAGE as u64), Ok(8));
    poke(private, 1, 9);
    assert_eq!(ioctl(&vm, request::PEEK, 1), Ok(9));

    // A file that the client may only read: the daemon is root, and must not write it for the client.
    let path = std::env::temp_dir().join(format!("softkvm-read-only-{}", std::process::id()));
    std::fs::write(&path, [11; PAGE]).unwrap();
    let file = File::open(&path).unwrap();
    let readable = map(PAGE, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
    assert_eq!(words(&vm, request::SHARE, [readable.addr() as u64, PAGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 5), Ok(11));
    assert_eq!(words(&vm, request::POKE, [5, 12]), Err(Errno::EFAULT));
    // One that it may write, but has mapped for reading so far.
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let both = map(PAGE, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
    assert_eq!(words(&vm, request::SHARE, [both.addr() as u64, PAGE as u64]), Ok(1));
    assert_eq!(words(&vm, request::POKE, [5, 12]), Ok(0));
    std::fs::remove_file(&path).unwrap();

    // Anonymous and shared.
    let anonymous = map(PAGE, flags, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    poke(anonymous, 0, 3);
    assert_eq!(words(&vm, request::SHARE, [anonymous.addr() as u64, PAGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 0), Ok(3));
}

/// Private memory in huge pages, as QEMU has it with `-mem-path` on hugetlbfs and `share=off`.
fn share_huge() {
    const HUGE: usize = 2 << 20;
    let kvm = device();
    let vm = create(&kvm);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let ram = map(2 * HUGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1);
    poke(ram, 5, 42);
    poke(ram, HUGE + 7 * PAGE, 43);
    // A part that begins and ends within huge pages, as slots may: these are shared as a whole.
    assert_eq!(words(&vm, request::SHARE, [ram.addr() as u64 + PAGE as u64, HUGE as u64]), Ok(1));
    assert_eq!((peek(ram, 5), peek(ram, HUGE + 7 * PAGE)), (42, 43), "contents stay");
    poke(ram, 3 * PAGE, 41);
    assert_eq!(ioctl(&vm, request::PEEK, 2 * PAGE as u64), Ok(41));
    assert_eq!(words(&vm, request::SHARE, [ram.addr() as u64, 2 * HUGE as u64]), Ok(1));
    assert_eq!((peek(ram, 5), peek(ram, HUGE + 7 * PAGE)), (42, 43));
    assert_eq!(ioctl(&vm, request::PEEK, (HUGE + 7 * PAGE) as u64), Ok(43));
    poke(ram, 6, 44);
    assert_eq!(ioctl(&vm, request::PEEK, 6), Ok(44));
    // Shared from the start: the huge pages themselves.
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    let shared = map(HUGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1);
    poke(shared, 9, 45);
    assert_eq!(words(&vm, request::SHARE, [shared.addr() as u64, HUGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 9), Ok(45));
}

/// As `churn`, until its daemon is killed. Whatever an ioctl gave then, the thread's signals are not blocked soon after.
fn churn_alone() {
    let worker = || {
        // By numbers that nobody owns: the last ioctls may have given anything.
        while ioctl(device_or_end()?, request::CREATE, 0).is_ok_and(|vm| {
            let ram = anonymous(32 * PAGE);
            poke(ram, 5 * PAGE, 1);
            let range = [ram.addr() as u64, 32 * PAGE as u64];
            // SAFETY: takes integers, or the address of `range`.
            let shared = unsafe { libc::ioctl(vm, request::SHARE.into(), range.as_ptr()) };
            // SAFETY: as above.
            unsafe { libc::close(vm) };
            shared == 1
        }) {}
        Some(())
    };
    let checked = || {
        worker();
        let start = Instant::now();
        let blocked = || nix::sys::signal::SigSet::thread_get_mask().unwrap().contains(nix::sys::signal::SIGUSR1);
        while blocked() {
            assert!(start.elapsed() < Duration::from_secs(2), "signals stay blocked");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(checked);
        scope.spawn(checked);
    });
}

fn device_or_end() -> Option<File> {
    OpenOptions::new().read(true).write(true).open(std::env::var_os(DEVICE)?).ok()
}

/// A daemon in a process that may be killed: says where its device is, and in which namespace.
fn serve() {
    let Some(daemon) = crate::fake::Daemon::start_guarded() else { return };
    let namespace = format!("/proc/{}/task/{}/ns/mnt", std::process::id(), nix::unistd::gettid());
    let told = format!("{}\n{namespace}\n", daemon.device.display());
    std::fs::write(std::env::var_os(DEVICE).unwrap(), told).unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

/// Other threads write while memory is shared: each of their writes must be there afterwards.
fn share_writers() {
    const THREADS: usize = 4;
    const PAGES: usize = 256;
    let kvm = device();
    let vm = create(&kvm);
    for round in 0..10u8 {
        let ram = anonymous(PAGES * PAGE).addr();
        let done = AtomicBool::new(false);
        let written: [AtomicU64; THREADS] = Default::default();
        std::thread::scope(|scope| {
            for (index, written) in written.iter().enumerate() {
                let done = &done;
                scope.spawn(move || {
                    let counter = std::ptr::with_exposed_provenance_mut::<u64>(ram + index * 8 + 4096 * 3);
                    let mut count = 0;
                    while !done.load(Ordering::Relaxed) {
                        count += 1;
                        // SAFETY: inside the mapping, a place that only this thread writes.
                        unsafe { counter.write_volatile(count) };
                        // SAFETY: as above.
                        let seen = unsafe { counter.read_volatile() };
                        assert_eq!(seen, count, "a write was lost");
                    }
                    written.store(count, Ordering::Relaxed);
                });
            }
            // Blocked in the kernel all the while.
            let (read, write) = std::io::pipe().unwrap();
            scope.spawn(move || std::io::Read::read(&mut &read, &mut [0]).unwrap());
            std::thread::sleep(Duration::from_millis(3));
            assert_eq!(words(&vm, request::SHARE, [ram as u64, (PAGES * PAGE) as u64]), Ok(1), "round {round}");
            std::thread::sleep(Duration::from_millis(3));
            done.store(true, Ordering::Relaxed);
            drop(write);
        });
        for (index, written) in written.iter().enumerate() {
            let counter = std::ptr::with_exposed_provenance_mut::<u64>(ram + index * 8 + 4096 * 3);
            // SAFETY: inside the mapping; its writer has ended.
            assert_eq!(unsafe { counter.read_volatile() }, written.load(Ordering::Relaxed));
        }
    }
}

extern "C" fn nothing(_: i32) {}

fn handle(signal: nix::sys::signal::Signal) {
    let handler = nix::sys::signal::SigHandler::Handler(nothing);
    // SAFETY: the handler does nothing.
    unsafe { nix::sys::signal::signal(signal, handler) }.unwrap();
}

fn signals() {
    handle(nix::sys::signal::SIGUSR1);
    let kvm = device();
    let vm = create(&kvm);
    let vcpu = create(&vm);
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let runner = scope.spawn(|| {
                sender.send(nix::sys::pthread::pthread_self()).unwrap();
                (ioctl(&vcpu, request::RUN, 0), Instant::now())
            });
            let target = receiver.recv().unwrap();
            std::thread::sleep(Duration::from_millis(3));
            let mut sent = Instant::now();
            nix::sys::pthread::pthread_kill(target, nix::sys::signal::SIGUSR1).unwrap();
            // One that comes before the ioctl does is lost, as with the kernel's; a VMM sends it again.
            while !runner.is_finished() {
                if sent.elapsed() > Duration::from_millis(500) {
                    sent = Instant::now();
                    nix::sys::pthread::pthread_kill(target, nix::sys::signal::SIGUSR1).unwrap();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let (result, ended) = runner.join().unwrap();
            assert_eq!(result, Err(Errno::EINTR));
            slowest = slowest.max(ended.saturating_duration_since(sent));
        });
    }
    println!("slowest kick: {slowest:?}");
}

/// A blocked signal ends a run whose mask lets it through, its handler does not run, and it stays pending.
fn masked() {
    use nix::sys::signal::{SIGUSR1, SIGUSR2, SigSet, raise};
    let kvm = device();
    let vm = create(&kvm);
    let vcpu = create(&vm);
    let mut set = SigSet::empty();
    set.add(SIGUSR1);
    set.thread_block().unwrap();
    let all_but_usr1 = !(1u64 << (libc::SIGUSR1 - 1));
    raise(SIGUSR1).unwrap();
    assert_eq!(ioctl(&vcpu, request::RUN_MASKED, all_but_usr1), Err(Errno::EINTR), "pending before");
    assert_eq!(set.wait().unwrap(), SIGUSR1, "still pending");
    // A signal that the thread takes but the mask holds does not end the run; the one it lets through does.
    handle(SIGUSR2);
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| {
            sender.send(nix::sys::pthread::pthread_self()).unwrap();
            ioctl(&vcpu, request::RUN_MASKED, all_but_usr1)
        });
        let target = receiver.recv().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        nix::sys::pthread::pthread_kill(target, SIGUSR2).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!runner.is_finished(), "SIGUSR2 is masked");
        nix::sys::pthread::pthread_kill(target, SIGUSR1).unwrap();
        assert_eq!(runner.join().unwrap(), Err(Errno::EINTR));
    });
}

fn window() {
    let kvm = device();
    let vm = create(&kvm);
    let number = vm.as_raw_fd();
    assert!(is_cloexec(&vm), "nobody knows yet");
    ioctl(&vm, request::WINDOW, 0).unwrap();
    // Linux 2.6.22, kvm_main.c `create_vcpu_fd` and fs/anon_inodes.c `anon_inode_getfd`: get_unused_fd() clears the flag.
    assert!(!is_cloexec(&vm), "open over exec");
    let ram = map(1 << 20, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, number);
    poke(ram, 3, 44);
    assert_eq!(ioctl(&vm, request::PEEK, 0x8000), Ok(i32::from(b'w')));
    assert_eq!(ioctl(&vm, request::PEEK, 3), Ok(44));
    assert_eq!(peek(ram, 0x8001), b'i');
    words(&vm, request::POKE, [0x9000, 12]).unwrap();
    assert_eq!(peek(ram, 0x9000), 12);
    let vcpu = create(&vm);
    assert_eq!(vcpu.as_raw_fd(), number + 1, "nothing else stays open");
}

fn panics() {
    let kvm = device();
    assert_eq!(ioctl(&kvm, request::PANIC, 0), Err(Errno::EIO));
    assert_eq!(ioctl(&kvm, request::VERSION, 0), Ok(12));
}

/// A 32-bit system call, from 64-bit code.
fn compat() {
    let kvm = device();
    let result: i32;
    // SAFETY: system call 54 of the 32-bit table is ioctl; it changes no memory of ours. `ebx` is kept by hand.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {fd:r}", "int 0x80", "xchg rbx, {fd:r}",
            fd = inout(reg) u64::from(kvm.as_raw_fd().cast_unsigned()) => _,
            inout("eax") 54 => result, in("ecx") request::VERSION, in("edx") 0,
            lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
    assert_eq!(result, -libc::EINVAL, "a clear refusal");
    assert_eq!(ioctl(&kvm, request::VERSION, 0), Ok(12));
}

/// A filter that lets nothing but ioctl, write and exit through: the calls that the daemon injects are not its business.
/// Puts this thread, and what it starts, under a filter: `calls` are allowed, all others end in `otherwise`.
pub fn filter_this_thread(calls: &[libc::c_long], otherwise: u32) {
    let statement = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let (load, equal, end) = (0x20, 0x15, 0x06);
    let allow =
        |number: &libc::c_long| [statement(equal, 1, *number as u32), statement(end, 0, libc::SECCOMP_RET_ALLOW)];
    let mut program = vec![statement(load, 0, 0)];
    program.extend(calls.iter().flat_map(allow));
    program.push(statement(end, 0, otherwise));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: takes integers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: `filter` is a valid program that outlives the call.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) }, 0);
}

/// `KVM_CREATE_VM` of a thread that may make hardly any other system call.
fn create_under_a_filter(kvm: File) -> Result<RawFd, Errno> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let runner = std::thread::spawn(move || {
        let calls = [
            libc::SYS_ioctl,
            libc::SYS_exit,
            libc::SYS_futex,
            libc::SYS_munmap,
            libc::SYS_madvise,
            libc::SYS_sigaltstack,
            libc::SYS_rt_sigprocmask,
        ];
        filter_this_thread(&calls, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
        let vm = ioctl(&kvm, request::CREATE, 0);
        sender.send(vm).unwrap();
        std::mem::forget(kvm);
    });
    let vm = receiver.recv().unwrap();
    runner.join().unwrap();
    vm
}

fn seccomp() {
    let vm = owned(create_under_a_filter(device()).expect("a filter does not matter"));
    assert_eq!(ioctl(&vm, request::VERSION, 0), Ok(12));
}

fn seccomp_stays() {
    let kvm = device();
    assert_eq!(create_under_a_filter(kvm.try_clone().unwrap()), Err(Errno::EACCES));
    let vm = create(&kvm);
    assert_eq!(ioctl(&vm, request::VERSION, 0), Ok(12));
}

fn spaces() {
    let kvm = device();
    let vm = owned(ioctl(&kvm, request::CREATE_KEEP, 0).unwrap());
    assert_eq!(ioctl(&vm, request::SAME_SPACE, 0), Ok(1));
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(ioctl(&vm, request::SAME_SPACE, 0), Ok(1))).join().unwrap();
    });
    // SAFETY: the child makes one system call and ends.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let same = ioctl(&vm, request::SAME_SPACE, 0);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(same.unwrap_or(99)) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    assert_eq!(ioctl(&vm, request::SAME_SPACE, 0), Ok(1));
}

/// Makes VMs, vCPUs and shared memory until it is killed.
fn churn() {
    let worker = || {
        while std::hint::black_box(true) {
            let kvm = device();
            let vm = create(&kvm);
            let ram = anonymous(32 * PAGE);
            poke(ram, 5 * PAGE, 1);
            assert_eq!(words(&vm, request::SHARE, [ram.addr() as u64, 32 * PAGE as u64]), Ok(1));
            let vcpu = create(&vm);
            let page = map(PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, vcpu.as_raw_fd());
            assert_eq!(ioctl(&vcpu, request::VERSION, 0), Ok(12));
            assert_eq!(peek(ram, 5 * PAGE), 1);
            // SAFETY: mappings of our own, not used any more.
            unsafe { libc::munmap(page.cast(), PAGE) };
            // SAFETY: as above.
            unsafe { libc::munmap(ram.cast(), 32 * PAGE) };
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(worker);
        }
        // The process's first thread as well, if the harness lets us have it: it is dead only when all others are.
        worker();
    });
}

/// Waits in a run that nobody ends.
fn wait() {
    let kvm = device();
    let vm = create(&kvm);
    let vcpu = create(&vm);
    panic!("{:?}", ioctl(&vcpu, request::RUN, 0));
}

/// In an empty root and other namespaces no path of the daemon's is to be seen.
fn namespaces() {
    let kvm = device();
    let flags = nix::sched::CloneFlags::CLONE_NEWNS
        | nix::sched::CloneFlags::CLONE_NEWNET
        | nix::sched::CloneFlags::CLONE_NEWIPC;
    nix::sched::unshare(flags).unwrap();
    let empty = std::env::temp_dir().join(format!("softkvm-empty-{}", std::process::id()));
    std::fs::create_dir_all(&empty).unwrap();
    let lowest = free_descriptor();
    // Removed while it is ours, so that nothing stays behind.
    nix::unistd::chdir(&empty).unwrap();
    std::fs::remove_dir(&empty).unwrap();
    nix::unistd::chroot(".").unwrap();
    nix::unistd::chdir("/").unwrap();
    let vm = create(&kvm);
    assert_eq!(vm.as_raw_fd(), lowest);
    let ram = anonymous(4 * PAGE);
    poke(ram, 0, 5);
    assert_eq!(words(&vm, request::SHARE, [ram.addr() as u64, 4 * PAGE as u64]), Ok(1));
    assert_eq!(ioctl(&vm, request::PEEK, 0), Ok(5));
}
