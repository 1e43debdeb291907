//! A client without a process: one range of memory, descriptors that are indices, signals on demand.

#![allow(dead_code, reason = "every test binary uses its own part")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvm::client::{AddressSpace, Client, File, InterruptAction, SharedPiece, SignalMask, WindowPiece};
use kvm::{Kvm, system_file};
use kvm_abi::request::{KVM_CREATE_VM, KVM_ENABLE_CAP, KVM_SET_USER_MEMORY_REGION, READ, WRITE, direction, size};
use kvm_abi::{Plain, kvm_enable_cap, kvm_userspace_memory_region};
use mmu::Mapping;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;

/// Client address of the first byte of its memory.
pub const BASE: u64 = 0x7000_0000_0000;
/// Bytes of client memory.
pub const BYTES: u64 = 16 << 20;
/// How long a test may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);
/// Where arguments are put.
pub const SCRATCH: u64 = BASE + BYTES - 0x10_0000;

/// xorshift64*, so that a failure comes again.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number of the kind that finds mistakes: small, a single bit, all ones, an address, anything.
    pub fn number(&mut self) -> u64 {
        match self.next() % 8 {
            0 => self.next() % 300,
            1 => 1 << (self.next() % 64),
            2 => u64::MAX << (self.next() % 64),
            3 => BASE + self.next() % BYTES,
            4 => (self.next() % BYTES) & !0xfff,
            5 => u64::MAX - self.next() % 0x2000,
            _ => self.next(),
        }
    }
}

pub struct FakeClient {
    pub memory: Arc<Mapping>,
    pub files: Mutex<Vec<Arc<dyn File>>>,
    pub pid: u32,
    /// The thread's id.
    tid: AtomicU32,
    pub signal: AtomicBool,
    /// Close-on-exec of the descriptors, from 1.
    pub cloexec: Mutex<Vec<bool>>,
    /// Nothing runs the action: who runs a guest must ask.
    pub silent: AtomicBool,
    /// The mask of every action that was registered.
    pub masks: Mutex<Vec<Option<SignalMask>>>,
    action: Mutex<Option<InterruptAction>>,
    /// `/proc/PID/schedstat`; `None`: nobody measures.
    schedstat: Mutex<Option<std::fs::File>>,
    /// Descriptors that are no files of KVM, from [`FIRST_EVENT`].
    events: Mutex<Vec<OwnedFd>>,
}

/// Where descriptors of eventfds begin.
pub const FIRST_EVENT: i32 = 1000;

impl FakeClient {
    /// A client with `/dev/kvm` open as descriptor 0.
    pub fn new() -> Arc<Self> {
        Self::with(&Kvm::new())
    }

    pub fn with(kvm: &Arc<Kvm>) -> Arc<Self> {
        let client = Arc::new(Self {
            memory: Mapping::create("client", BYTES).unwrap(),
            files: Mutex::new(vec![system_file(kvm)]),
            pid: 1000,
            tid: AtomicU32::new(1000),
            signal: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            cloexec: Mutex::default(),
            masks: Mutex::default(),
            action: Mutex::default(),
            schedstat: Mutex::default(),
            events: Mutex::default(),
        });
        // A guest that never ends is called back, and its test fails.
        let alive = Arc::downgrade(&client);
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE);
            if let Some(client) = alive.upgrade() {
                client.raise();
            }
        });
        client
    }

    /// Another process that has the same files.
    pub fn fork(&self) -> Arc<Self> {
        Arc::new(Self {
            memory: self.memory.clone(),
            files: Mutex::new(self.files.lock().clone()),
            pid: self.pid + 1,
            tid: AtomicU32::new(self.pid + 1),
            signal: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            cloexec: Mutex::default(),
            masks: Mutex::default(),
            action: Mutex::default(),
            schedstat: Mutex::default(),
            events: Mutex::default(),
        })
    }

    /// Another thread of the process: signals are its own.
    pub fn thread(&self) -> Arc<Self> {
        Arc::new(Self { pid: self.pid, ..Arc::into_inner(self.fork()).unwrap() })
    }

    /// As [`thread`](Self::thread), with an id of its own.
    pub fn thread_numbered(&self, tid: u32) -> Arc<Self> {
        let thread = Arc::into_inner(self.thread()).unwrap();
        thread.tid.store(tid, Ordering::SeqCst);
        Arc::new(thread)
    }

    /// Gives it a descriptor of what `fd` is.
    pub fn adopt(&self, fd: impl AsFd) -> i32 {
        let mut events = self.events.lock();
        events.push(fd.as_fd().try_clone_to_owned().unwrap());
        FIRST_EVENT + events.len() as i32 - 1
    }

    pub fn file(&self, fd: i32) -> Arc<dyn File> {
        self.files.lock()[fd as usize].clone()
    }

    /// A signal comes for the thread, and stays pending.
    pub fn raise(&self) {
        self.signal.store(true, Ordering::SeqCst);
        if let Some(action) = &*self.action.lock()
            && !self.silent.load(Ordering::SeqCst)
        {
            (action.run)();
        }
    }

    /// The thread has waited for a CPU for so long since it began.
    pub fn set_waited(&self, ns: u64) {
        self.set_schedstat(ns, 1);
    }

    /// The same, and how often it came to one.
    pub fn set_schedstat(&self, ns: u64, arrivals: u32) {
        let mut schedstat = self.schedstat.lock();
        let file = schedstat.get_or_insert_with(|| memfd_create("schedstat", MFdFlags::empty()).unwrap().into());
        file.write_all_at(format!("1000 {ns:020} {arrivals:010}\n").as_bytes(), 0).unwrap();
    }

    pub fn consume_signal(&self) {
        self.signal.store(false, Ordering::SeqCst);
    }

    /// ioctl(2) as a front end brings it.
    pub fn ioctl(&self, fd: i32, request: u32, arg: u64) -> Result<i32, Errno> {
        let mut input = Vec::new();
        if direction(request) & WRITE != 0 && arg != 0 {
            input.resize(size(request), 0);
            self.read(arg, &mut input)?;
        }
        let reply = self.file(fd).ioctl(self, request, arg, &input)?;
        if direction(request) & READ != 0 {
            assert_eq!(reply.output.len(), size(request), "a READ request fills its argument");
            self.write(arg, &reply.output)?;
        } else {
            assert!(reply.output.is_empty());
        }
        Ok(reply.ret)
    }

    /// An ioctl whose argument is a structure.
    pub fn ioctl_with<T: Plain>(&self, fd: i32, request: u32, value: &mut T) -> Result<i32, Errno> {
        self.ioctl_bytes(fd, request, value.as_bytes().to_vec()).map(|(ret, bytes)| {
            *value = T::from_bytes(&bytes).unwrap();
            ret
        })
    }

    /// An ioctl whose argument is these bytes; returns them as they are afterwards.
    pub fn ioctl_bytes(&self, fd: i32, request: u32, bytes: Vec<u8>) -> Result<(i32, Vec<u8>), Errno> {
        self.write(SCRATCH, &bytes)?;
        let ret = self.ioctl(fd, request, SCRATCH)?;
        let mut after = bytes;
        self.read(SCRATCH, &mut after)?;
        Ok((ret, after))
    }

    pub fn get<T: Plain>(&self, fd: i32, request: u32) -> T {
        let mut value = T::zeroed();
        self.ioctl_with(fd, request, &mut value).unwrap();
        value
    }

    pub fn set<T: Plain>(&self, fd: i32, request: u32, value: &T) -> Result<i32, Errno> {
        self.ioctl_with(fd, request, &mut { *value })
    }

    /// A VM whose RAM, so many bytes from 0 on, is the client's memory from [`BASE`] on.
    pub fn vm_with_ram(&self, bytes: u64) -> i32 {
        let vm = self.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        self.slot(vm, (0, 0), 0, bytes, 0).unwrap();
        vm
    }

    /// Slot and flags: `bytes` from guest-physical `gpa` on are the client's memory, `at` bytes behind [`BASE`].
    pub fn slot(&self, vm: i32, (slot, flags): (u32, u32), gpa: u64, bytes: u64, at: u64) -> Result<i32, Errno> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: bytes,
            userspace_addr: BASE + at,
        };
        self.set(vm, KVM_SET_USER_MEMORY_REGION, &region)
    }

    /// Enables a capability that takes one value.
    pub fn enable(&self, fd: i32, cap: u32, value: u64) -> Result<i32, Errno> {
        self.set(fd, KVM_ENABLE_CAP, &kvm_enable_cap { cap, args: [value, 0, 0, 0], ..Plain::zeroed() })
    }

    pub fn read_u32(&self, addr: u64) -> u32 {
        self.memory.load_u32(addr - BASE).unwrap()
    }

    pub fn write_u32(&self, addr: u64, value: u32) {
        self.memory.store_u32(addr - BASE, value).unwrap();
    }

    /// The `kvm_run` pages of a vCPU.
    pub fn map(&self, fd: i32) -> Arc<Mapping> {
        self.file(fd).mapping().unwrap()
    }

    /// mmap of a 2007 VM.
    pub fn ram(&self, fd: i32) -> Ram {
        assert!(self.file(fd).ram_window().is_some(), "a VM of 2007");
        Ram(Arc::downgrade(&self.file(fd)))
    }
}

/// Guest RAM by guest-physical address, as it is at each access; `None`: there is none.
pub struct Ram(Weak<dyn File>);

impl Ram {
    fn at(&self, gpa: u64, len: u64) -> Option<(Arc<Mapping>, u64)> {
        let holds = |piece: &WindowPiece| piece.gpa <= gpa && gpa + len <= piece.gpa + piece.ram.len;
        let piece = self.0.upgrade()?.ram_window()?.into_iter().find(holds)?;
        Some((piece.ram.mapping, piece.ram.offset + (gpa - piece.gpa)))
    }

    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Option<()> {
        let (mapping, offset) = self.at(gpa, bytes.len() as u64)?;
        mapping.read(offset, bytes)
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Option<()> {
        let (mapping, offset) = self.at(gpa, bytes.len() as u64)?;
        mapping.write(offset, bytes)
    }
}

macro_rules! ram {
    ($($load:ident $store:ident $value:ty;)*) => {
        impl Ram {$(
            pub fn $load(&self, gpa: u64) -> Option<$value> {
                let (mapping, offset) = self.at(gpa, size_of::<$value>() as u64)?;
                mapping.$load(offset)
            }

            pub fn $store(&self, gpa: u64, value: $value) -> Option<()> {
                let (mapping, offset) = self.at(gpa, size_of::<$value>() as u64)?;
                mapping.$store(offset, value)
            }
        )*}
    };
}

ram! {
    load_u8 store_u8 u8;
    load_u16 store_u16 u16;
    load_u32 store_u32 u32;
    load_u64 store_u64 u64;
}

impl Client for FakeClient {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.memory.read(addr.wrapping_sub(BASE), buf).ok_or(Errno::EFAULT)
    }

    fn write(&self, addr: u64, buf: &[u8]) -> Result<(), Errno> {
        self.memory.write(addr.wrapping_sub(BASE), buf).ok_or(Errno::EFAULT)
    }

    fn install(&self, file: Arc<dyn File>, cloexec: bool) -> Result<i32, Errno> {
        let mut files = self.files.lock();
        self.cloexec.lock().push(cloexec);
        files.push(file);
        Ok(files.len() as i32 - 1)
    }

    fn descriptor(&self, fd: i32) -> Result<OwnedFd, Errno> {
        let events = self.events.lock();
        let event = fd.checked_sub(FIRST_EVENT).and_then(|index| events.get(index as usize)).ok_or(Errno::EBADF)?;
        event.try_clone().map_err(|_| Errno::EMFILE)
    }

    fn share(&self, addr: u64, len: u64) -> Result<Vec<SharedPiece>, Errno> {
        let offset = addr.wrapping_sub(BASE);
        if offset.checked_add(len).is_none_or(|end| end > BYTES) {
            return Err(Errno::EFAULT);
        }
        Ok(vec![SharedPiece { len, mapping: self.memory.clone(), offset }])
    }

    fn address_space(&self) -> AddressSpace {
        AddressSpace { pid: self.pid, generation: 0 }
    }

    fn thread(&self) -> u32 {
        self.tid.load(Ordering::SeqCst)
    }

    fn schedstat(&self) -> Option<std::fs::File> {
        self.schedstat.lock().as_ref()?.try_clone().ok()
    }

    fn set_interrupt_action(&self, action: Option<InterruptAction>) {
        let mut slot = self.action.lock();
        if let Some(action) = &action {
            self.masks.lock().push(action.mask);
        }
        if let (Some(action), true) = (&action, self.interrupted()) {
            (action.run)();
        }
        *slot = action;
    }

    fn interrupted(&self) -> bool {
        self.signal.load(Ordering::SeqCst)
    }

    fn poll_interval(&self) -> Option<Duration> {
        self.silent.load(Ordering::SeqCst).then_some(Duration::from_micros(100))
    }
}
