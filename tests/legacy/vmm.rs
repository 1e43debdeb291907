//! /dev/kvm as a program of 2007 used it: descriptors, ioctls, and the two mappings.
#![expect(unsafe_code, reason = "ioctl(2) and mmap(2) by their bare numbers are what is tested")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use crate::abi::{self, exit_reason, request, run};

/// Which requests of the header have succeeded in this process, in the order of `request::ALL`.
static USED: [AtomicBool; request::ALL.len()] = [const { AtomicBool::new(false) }; request::ALL.len()];

/// Names of requests that nobody has used yet.
pub(crate) fn unused_requests() -> Vec<&'static str> {
    let unused = |used: &AtomicBool| !used.load(Ordering::Relaxed);
    request::ALL.iter().zip(&USED).filter(|(_, used)| unused(used)).map(|((name, _), _)| *name).collect()
}

/// One ioctl with a plain argument.
fn ioctl(fd: BorrowedFd<'_>, number: u32, arg: u64) -> Result<i32, Errno> {
    // SAFETY: whoever passes an address as `arg` is one of the two functions below, which prove it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number.into(), arg) };
    let result = Errno::result(result)?;
    if let Some(index) = request::ALL.iter().position(|(_, of)| *of == number) {
        USED[index].store(true, Ordering::Relaxed);
    }
    Ok(result)
}

/// One ioctl on a structure, which the caller made as the header says for this number.
fn ioctl_on<T>(fd: BorrowedFd<'_>, number: u32, value: &mut T) -> Result<i32, Errno> {
    // The structure is ours alone and as long as the number says, lists included.
    ioctl(fd, number, (&raw mut *value).expose_provenance() as u64)
}

fn descriptor(fd: i32) -> OwnedFd {
    // SAFETY: the ioctl that returned it made it, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A shared mapping of a VM's or vCPU's file.
struct Mapped {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an address range of the process; every access through it is atomic.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(fd: BorrowedFd<'_>, offset: u64, bytes: usize) -> Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let offset = offset.try_into().context("an offset of mmap")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        ensure!(at != libc::MAP_FAILED, "mmap of {bytes:#x} bytes: {}", io::Error::last_os_error());
        Ok(Self { at: NonNull::new(at.cast()).context("mmap gave the null page")?, bytes })
    }

    fn pointer<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(align_of::<T>()), "{offset:#x} is not aligned");
        assert!(offset + size_of::<T>() <= self.bytes, "{offset:#x} is not in the mapping");
        self.at.as_ptr().wrapping_add(offset).cast()
    }

    fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `pointer` checked that it is inside; whoever else writes there does so behind an atomic's back only.
        unsafe { AtomicU8::from_ptr(self.pointer(offset)) }
    }

    fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `u8`, and aligned.
        unsafe { AtomicU32::from_ptr(self.pointer(offset)) }
    }

    fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `u8`, and aligned.
        unsafe { AtomicU64::from_ptr(self.pointer(offset)) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; all references into it borrow `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

/// /dev/kvm
pub(crate) struct Kvm(File);

impl Kvm {
    pub(crate) fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/kvm").context("cannot open /dev/kvm")?;
        let kvm = Self(file);
        ensure!(kvm.number(request::GET_API_VERSION, 0)? == abi::API_VERSION, "the API has another version");
        Ok(kvm)
    }

    pub(crate) fn number(&self, number: u32, arg: u64) -> Result<i32, Errno> {
        ioctl(self.0.as_fd(), number, arg)
    }

    pub(crate) fn msr_index_list<const N: usize>(&self, list: &mut abi::MsrList<N>) -> Result<i32, Errno> {
        assert!(list.nmsrs as usize <= N);
        ioctl_on(self.0.as_fd(), request::GET_MSR_INDEX_LIST, list)
    }

    pub(crate) fn create_vm(&self) -> Result<Vm> {
        let fd = self.number(request::CREATE_VM, 0).context("KVM_CREATE_VM")?;
        let vcpu_mmap_size = self.number(request::GET_VCPU_MMAP_SIZE, 0).context("KVM_GET_VCPU_MMAP_SIZE")?;
        Ok(Vm { fd: descriptor(fd), vcpu_mmap_size: vcpu_mmap_size.try_into()? })
    }
}

/// What `KVM_CREATE_VM` returns.
pub(crate) struct Vm {
    fd: OwnedFd,
    vcpu_mmap_size: usize,
}

impl Vm {
    /// Any other request, with a plain argument.
    pub(crate) fn number(&self, number: u32, arg: u64) -> Result<i32, Errno> {
        ioctl(self.fd.as_fd(), number, arg)
    }

    pub(crate) fn set_memory_region(&self, slot: u32, flags: u32, gpa: u64, bytes: u64) -> Result<(), Errno> {
        let mut region = abi::MemoryRegion { slot, flags, guest_phys_addr: gpa, memory_size: bytes };
        ioctl_on(self.fd.as_fd(), request::SET_MEMORY_REGION, &mut region).map(drop)
    }

    pub(crate) fn set_memory_alias(&self, slot: u32, gpa: u64, bytes: u64, target: u64) -> Result<(), Errno> {
        let mut alias =
            abi::MemoryAlias { slot, flags: 0, guest_phys_addr: gpa, memory_size: bytes, target_phys_addr: target };
        ioctl_on(self.fd.as_fd(), request::SET_MEMORY_ALIAS, &mut alias).map(drop)
    }

    /// The numbers of dirty pages of a slot of `pages` pages, ascending.
    pub(crate) fn dirty_log(&self, slot: u32, pages: usize) -> Result<Vec<u64>, Errno> {
        let mut bitmap = vec![0u64; pages.div_ceil(64)];
        let mut log = abi::DirtyLog { slot, padding: 0, dirty_bitmap: bitmap.as_mut_ptr() };
        ioctl_on(self.fd.as_fd(), request::GET_DIRTY_LOG, &mut log)?;
        // Written behind the compiler's back.
        let words = std::hint::black_box(bitmap);
        let bits =
            |(n, word): (usize, u64)| (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |b| n as u64 * 64 + b);
        Ok(words.into_iter().enumerate().flat_map(bits).collect())
    }

    pub(crate) fn create_vcpu(&self, id: i32) -> Result<Vcpu> {
        let fd = ioctl(self.fd.as_fd(), request::CREATE_VCPU, id as u64).context("KVM_CREATE_VCPU")?;
        let fd = descriptor(fd);
        let page = Mapped::new(fd.as_fd(), 0, self.vcpu_mmap_size).context("mapping kvm_run")?;
        Ok(Vcpu { fd, page })
    }

    /// mmap of the VM: guest RAM from `gpa` on, holes included.
    pub(crate) fn map(&self, gpa: u64, bytes: u64) -> Result<Ram> {
        let mapped = Mapped::new(self.fd.as_fd(), gpa, bytes.try_into()?).context("mapping guest RAM")?;
        Ok(Ram { mapped, gpa })
    }
}

/// Guest RAM, by guest-physical address.
pub(crate) struct Ram {
    mapped: Mapped,
    gpa: u64,
}

impl Ram {
    fn offset(&self, gpa: u64) -> usize {
        usize::try_from(gpa - self.gpa).expect("64-bit host")
    }

    pub(crate) fn u32(&self, gpa: u64) -> &AtomicU32 {
        self.mapped.u32(self.offset(gpa))
    }

    pub(crate) fn u64(&self, gpa: u64) -> &AtomicU64 {
        self.mapped.u64(self.offset(gpa))
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        for (n, &byte) in bytes.iter().enumerate() {
            self.mapped.u8(self.offset(gpa) + n).store(byte, Ordering::Relaxed);
        }
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        std::array::from_fn(|n| self.mapped.u8(self.offset(gpa) + n).load(Ordering::Relaxed))
    }

    /// Reads a byte in the kernel: EFAULT where the program itself would get SIGBUS.
    pub(crate) fn probe(&self, gpa: u64) -> Result<(), Errno> {
        let (_reader, writer) = std::io::pipe().expect("a pipe");
        let at: *const libc::c_void = self.mapped.pointer::<u8>(self.offset(gpa)).cast();
        // SAFETY: one byte inside the mapping, of which no Rust reference exists.
        Errno::result(unsafe { libc::write(writer.as_raw_fd(), at, 1) }).map(drop)
    }

    /// `LOCK ADD` of 8 bytes at any address, also across cache lines and pages.
    pub(crate) fn locked_add(&self, gpa: u64, value: u64) {
        let at = self.offset(gpa);
        assert!(at + 8 <= self.mapped.bytes);
        let pointer = self.mapped.at.as_ptr().wrapping_add(at);
        // SAFETY: 8 bytes inside the mapping, of which no Rust reference exists.
        unsafe { std::arch::asm!("lock add qword ptr [{}], {}", in(reg) pointer, in(reg) value, options(nostack)) };
    }
}

/// What `KVM_CREATE_VCPU` returns.
pub(crate) struct Vcpu {
    fd: OwnedFd,
    page: Mapped,
}

/// Why `KVM_RUN` came back, as the union of `kvm_run` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Unknown(u64),
    Exception { vector: u32, error: u32 },
    Io { out: bool, size: u8, port: u16, count: u32 },
    Hypercall { args: [u64; 6], longmode: bool },
    Debug,
    Hlt,
    Mmio { gpa: u64, data: u64, len: u32, write: bool },
    IrqWindowOpen,
    Shutdown,
    FailEntry(u64),
    Intr,
    Other(u32),
}

impl Vcpu {
    /// `KVM_RUN`, and what `kvm_run` says behind it.
    pub(crate) fn run(&self) -> Result<Exit, Errno> {
        ioctl(self.fd.as_fd(), request::RUN, 0)?;
        Ok(self.exit())
    }

    /// What `kvm_run` says now.
    pub(crate) fn exit(&self) -> Exit {
        let (u8, u32, u64) = (
            |at| self.page.u8(at).load(Ordering::Acquire),
            |at| self.page.u32(at).load(Ordering::Acquire),
            |at| self.page.u64(at).load(Ordering::Acquire),
        );
        match u32(run::EXIT_REASON) {
            exit_reason::UNKNOWN => Exit::Unknown(u64(run::HARDWARE_REASON)),
            exit_reason::EXCEPTION => Exit::Exception { vector: u32(run::EXCEPTION), error: u32(run::EXCEPTION + 4) },
            exit_reason::IO => Exit::Io {
                out: u8(run::IO_DIRECTION) != 0,
                size: u8(run::IO_SIZE),
                port: u16::from_le_bytes([u8(run::IO_PORT), u8(run::IO_PORT + 1)]),
                count: u32(run::IO_COUNT),
            },
            exit_reason::HYPERCALL => Exit::Hypercall {
                args: std::array::from_fn(|n| u64(run::HYPERCALL_ARGS + 8 * n)),
                longmode: u32(run::HYPERCALL_LONGMODE) != 0,
            },
            exit_reason::DEBUG => Exit::Debug,
            exit_reason::HLT => Exit::Hlt,
            exit_reason::MMIO => Exit::Mmio {
                gpa: u64(run::MMIO_PHYS_ADDR),
                data: u64(run::MMIO_DATA),
                len: u32(run::MMIO_LEN),
                write: u8(run::MMIO_IS_WRITE) != 0,
            },
            exit_reason::IRQ_WINDOW_OPEN => Exit::IrqWindowOpen,
            exit_reason::SHUTDOWN => Exit::Shutdown,
            exit_reason::FAIL_ENTRY => Exit::FailEntry(u64(run::HARDWARE_REASON)),
            exit_reason::INTR => Exit::Intr,
            other => Exit::Other(other),
        }
    }

    /// Element `n` of a port exit.
    pub(crate) fn port_data(&self, n: u32) -> u32 {
        let (at, size) = self.port_element(n);
        (0..size)
            .fold(0, |value, byte| value | u32::from(self.page.u8(at + byte).load(Ordering::Acquire)) << (8 * byte))
    }

    /// The answer to element `n` of a port exit that asks.
    pub(crate) fn set_port_data(&self, n: u32, value: u32) {
        let (at, size) = self.port_element(n);
        for (byte, value) in value.to_le_bytes()[..size].iter().enumerate() {
            self.page.u8(at + byte).store(*value, Ordering::Release);
        }
    }

    fn port_element(&self, n: u32) -> (usize, usize) {
        let size = usize::from(self.page.u8(run::IO_SIZE).load(Ordering::Acquire));
        let first = self.page.u64(run::IO_DATA_OFFSET).load(Ordering::Acquire);
        (usize::try_from(first).expect("an offset in the mapping") + n as usize * size, size)
    }

    /// The answer to a read of memory that is not there.
    pub(crate) fn set_mmio_data(&self, value: u64) {
        self.page.u64(run::MMIO_DATA).store(value, Ordering::Release);
    }

    pub(crate) fn set_hypercall_result(&self, value: u64) {
        self.page.u64(run::HYPERCALL_RET).store(value, Ordering::Release);
    }

    pub(crate) fn request_interrupt_window(&self, on: bool) {
        self.page.u8(run::REQUEST_INTERRUPT_WINDOW).store(on.into(), Ordering::Release);
    }

    /// `if_flag` and `ready_for_interrupt_injection`.
    pub(crate) fn takes_interrupts(&self) -> (bool, bool) {
        let flag = |at| self.page.u8(at).load(Ordering::Acquire) != 0;
        (flag(run::IF_FLAG), flag(run::READY_FOR_INTERRUPT_INJECTION))
    }

    pub(crate) fn set_cr8(&self, value: u64) {
        self.page.u64(run::CR8).store(value, Ordering::Release);
    }

    pub(crate) fn apic_base(&self) -> u64 {
        self.page.u64(run::APIC_BASE).load(Ordering::Acquire)
    }

    fn get<T: Default>(&self, number: u32) -> Result<T, Errno> {
        let mut value = T::default();
        ioctl_on(self.fd.as_fd(), number, &mut value)?;
        Ok(std::hint::black_box(value))
    }

    fn set<T>(&self, number: u32, mut value: T) -> Result<(), Errno> {
        ioctl_on(self.fd.as_fd(), number, &mut value).map(drop)
    }

    pub(crate) fn regs(&self) -> Result<abi::Regs, Errno> {
        self.get(request::GET_REGS)
    }

    pub(crate) fn set_regs(&self, regs: abi::Regs) -> Result<(), Errno> {
        self.set(request::SET_REGS, regs)
    }

    pub(crate) fn sregs(&self) -> Result<abi::Sregs, Errno> {
        self.get(request::GET_SREGS)
    }

    pub(crate) fn set_sregs(&self, sregs: abi::Sregs) -> Result<(), Errno> {
        self.set(request::SET_SREGS, sregs)
    }

    pub(crate) fn fpu(&self) -> Result<abi::Fpu, Errno> {
        self.get(request::GET_FPU)
    }

    pub(crate) fn set_fpu(&self, fpu: abi::Fpu) -> Result<(), Errno> {
        self.set(request::SET_FPU, fpu)
    }

    /// The values of MSRs; fewer than asked for if one of them is not there.
    pub(crate) fn msrs<const N: usize>(&self, indices: [u32; N]) -> Result<Vec<abi::MsrEntry>, Errno> {
        let entries = indices.map(|index| abi::MsrEntry { index, ..Default::default() });
        let mut msrs = abi::Msrs { nmsrs: N as u32, pad: 0, entries };
        let read = ioctl_on(self.fd.as_fd(), request::GET_MSRS, &mut msrs)?;
        Ok(std::hint::black_box(msrs).entries[..read as usize].to_vec())
    }

    /// How many of them were set.
    pub(crate) fn set_msrs<const N: usize>(&self, values: [(u32, u64); N]) -> Result<i32, Errno> {
        let entries = values.map(|(index, data)| abi::MsrEntry { index, reserved: 0, data });
        ioctl_on(self.fd.as_fd(), request::SET_MSRS, &mut abi::Msrs { nmsrs: N as u32, pad: 0, entries })
    }

    pub(crate) fn set_cpuid<const N: usize>(&self, entries: [abi::CpuidEntry; N]) -> Result<(), Errno> {
        self.set(request::SET_CPUID, abi::Cpuid { nent: N as u32, padding: 0, entries })
    }

    pub(crate) fn translate(&self, linear_address: u64) -> Result<abi::Translation, Errno> {
        let mut translation = abi::Translation { linear_address, ..Default::default() };
        ioctl_on(self.fd.as_fd(), request::TRANSLATE, &mut translation)?;
        Ok(std::hint::black_box(translation))
    }

    pub(crate) fn interrupt(&self, vector: u32) -> Result<(), Errno> {
        self.set(request::INTERRUPT, vector)
    }

    pub(crate) fn debug_guest(&self, debug: abi::DebugGuest) -> Result<(), Errno> {
        self.set(request::DEBUG_GUEST, debug)
    }

    /// Any other request, with a plain argument.
    pub(crate) fn number(&self, number: u32, arg: u64) -> Result<i32, Errno> {
        ioctl(self.fd.as_fd(), number, arg)
    }

    /// Signals that are blocked inside `KVM_RUN`, in place of the thread's own mask.
    pub(crate) fn set_signal_mask(&self, sigset: u64) -> Result<(), Errno> {
        self.set(request::SET_SIGNAL_MASK, abi::SignalMask { len: 8, sigset })
    }
}
