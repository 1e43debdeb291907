//! Xen's interface to its guests, as KVM has it: a page of hypercalls, pages that the guest shares with its hypervisor, event channels
//! of two levels, a timer. api.rst `KVM_XEN_HVM_CONFIG`, `KVM_XEN_HVM_SET_ATTR`, `KVM_XEN_VCPU_SET_ATTR`; xen.c of Linux 6.1; layouts from
//! include/xen/interface there.
//!
//! User space is the hypervisor, and these are shortcuts past it: nothing happens that it has not asked for. A VM is Xen's while
//! its hypercall MSR has a number; until then every path here ends at that one look ([`Xen::is_on`]).

mod attributes;
mod event;
mod page;
mod runstate;
mod timer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

use cpu_core::MsrAccess;
use kvm_abi::consts::{
    KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL, KVM_XEN_HVM_CONFIG_EVTCHN_SEND, KVM_XEN_HVM_CONFIG_HYPERCALL_MSR,
    KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, KVM_XEN_HVM_CONFIG_RUNSTATE, KVM_XEN_HVM_CONFIG_SHARED_INFO,
};
use kvm_abi::{Plain, kvm_xen_hvm_config};
use mmu::{Lookup, Memory, View};
use nix::errno::Errno;
use parking_lot::{Mutex, RwLock};
use x86_defs::{GuestPhysAddr, PAGE_BYTES};

use crate::kvmclock::VmClock;
use crate::steal;

use self::event::Ports;
pub(crate) use self::event::{Events, check_priority};
use self::runstate::Runstate;
use self::timer::{Poll, Timer};

/// Flags that `KVM_XEN_HVM_CONFIG` takes.
const CONFIG_FLAGS: u32 = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;

/// The answer for `KVM_CAP_XEN_HVM`. Run states need what the scheduler tells.
pub(crate) fn flags() -> u32 {
    let runstate = if steal::is_measured() { KVM_XEN_HVM_CONFIG_RUNSTATE } else { 0 };
    KVM_XEN_HVM_CONFIG_HYPERCALL_MSR
        | CONFIG_FLAGS
        | KVM_XEN_HVM_CONFIG_SHARED_INFO
        | KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL
        | runstate
}

/// Where guest memory is shared, or nowhere.
struct Place(AtomicU64);

/// No place: no page starts there, and no area that lies in a page.
const NOWHERE: u64 = u64::MAX;

impl Default for Place {
    fn default() -> Self {
        Self(AtomicU64::new(NOWHERE))
    }
}

impl Place {
    fn get(&self) -> Option<GuestPhysAddr> {
        let gpa = self.0.load(Relaxed);
        (gpa != NOWHERE).then_some(GuestPhysAddr(gpa))
    }

    fn set(&self, gpa: u64) {
        self.0.store(gpa, Relaxed);
    }

    /// As user space reads it.
    fn gpa(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A view that threads use in turn, made when it is first wanted. The dirty log is told of nothing: api.rst exempts what lies in
/// shared_info and vcpu_info.
struct Shared {
    memory: Arc<Memory>,
    view: Mutex<Option<View>>,
}

impl Shared {
    fn new(memory: Arc<Memory>) -> Self {
        Self { memory, view: Mutex::new(None) }
    }

    fn with<R>(&self, f: impl FnOnce(&View) -> R) -> R {
        let mut view = self.view.lock();
        let view = view.get_or_insert_with(|| View::unlogged(&self.memory));
        // Nothing here holds a pointer into memory. Who changes a slot waits for us: behind that, nothing is written to what was there.
        let _ = view.enter();
        let result = f(view);
        view.leave();
        result
    }

    /// EFAULT: no memory is there that can be written.
    fn check(&self, gpa: u64) -> Result<(), Errno> {
        let is_there = self.with(|view| matches!(view.page(GuestPhysAddr(gpa), true), Lookup::Ram { .. }));
        if is_there { Ok(()) } else { Err(Errno::EFAULT) }
    }
}

/// What a VM has of it.
pub(crate) struct Xen {
    time: Arc<VmClock>,
    config: Mutex<kvm_xen_hvm_config>,
    /// Of `config`. 0: none.
    msr: AtomicU32,
    /// Of `config`.
    flags: AtomicU32,
    /// Shared pages have the layouts of 64-bit guests.
    long_mode: AtomicBool,
    /// struct shared_info
    shared_info: Place,
    /// The vector of all vCPUs whose vcpu_info says that an event waits; 0: none.
    upcall_vector: AtomicU8,
    /// XENVER_version; 0: user space answers.
    version: AtomicU32,
    /// What the guest sends on, and where that goes.
    ports: Mutex<Ports>,
    /// By vCPU id.
    vcpus: RwLock<BTreeMap<u32, Arc<Events>>>,
    shared: Shared,
}

/// What the owner of a vCPU keeps of it.
pub(crate) struct VcpuXen {
    pub(crate) events: Arc<Events>,
    /// The number that the guest knows the vCPU by.
    pub(crate) id: u32,
    /// One more struct pvclock_vcpu_time_info.
    time_info: Place,
    /// struct vcpu_runstate_info
    runstate_info: Place,
    runstate: Runstate,
    timer: Timer,
    poll: Option<Poll>,
    /// The guest has named its hypercall page, which is to be written before it goes on.
    pub(crate) page: Option<MsrAccess>,
}

impl VcpuXen {
    /// `index`: place in the order of creation.
    pub(crate) fn new(events: Arc<Events>, index: u32) -> Self {
        let (time_info, runstate_info) = (Place::default(), Place::default());
        let (runstate, timer) = (Runstate::default(), Timer::default());
        Self { events, id: index, time_info, runstate_info, runstate, timer, poll: None, page: None }
    }

    /// Where the guest has its clock, beside the one of `MSR_KVM_SYSTEM_TIME_NEW`.
    pub(crate) fn clocks(&self) -> [Option<GuestPhysAddr>; 2] {
        [self.events.clock(), self.time_info.get()]
    }
}

impl Xen {
    pub(crate) fn new(memory: Arc<Memory>, time: Arc<VmClock>) -> Arc<Self> {
        Arc::new(Self {
            time,
            config: Mutex::new(Plain::zeroed()),
            msr: AtomicU32::new(0),
            flags: AtomicU32::new(0),
            long_mode: AtomicBool::new(false),
            shared_info: Place::default(),
            upcall_vector: AtomicU8::new(0),
            version: AtomicU32::new(0),
            ports: Mutex::default(),
            vcpus: RwLock::default(),
            shared: Shared::new(memory),
        })
    }

    /// `KVM_XEN_HVM_CONFIG`. EINVAL: an unknown flag, or pages beside those that are made here.
    pub(crate) fn configure(&self, config: &kvm_xen_hvm_config) -> Result<(), Errno> {
        let &kvm_xen_hvm_config { flags, msr, blob_addr_32, blob_addr_64, blob_size_32, blob_size_64, .. } = config;
        let has_pages = blob_addr_32 != 0 || blob_addr_64 != 0 || blob_size_32 != 0 || blob_size_64 != 0;
        if flags & !CONFIG_FLAGS != 0 || flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL != 0 && has_pages {
            return Err(Errno::EINVAL);
        }
        let mut kept = self.config.lock();
        *kept = *config;
        self.flags.store(flags, Relaxed);
        self.msr.store(msr, Relaxed);
        Ok(())
    }

    /// The VM is Xen's.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.msr.load(Relaxed) != 0
    }

    fn has_flag(&self, flag: u32) -> bool {
        self.is_on() && self.flags.load(Relaxed) & flag != 0
    }

    /// Hypercalls are Xen's.
    pub(crate) fn intercepts(&self) -> bool {
        self.has_flag(KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL)
    }

    /// User space leaves all events to us, so that a guest may wait for them here.
    pub(crate) fn sends_all(&self) -> bool {
        self.has_flag(KVM_XEN_HVM_CONFIG_EVTCHN_SEND)
    }

    /// The guest names its page by this MSR.
    pub(crate) fn is_msr(&self, index: u32) -> bool {
        index != 0 && index == self.msr.load(Relaxed)
    }

    /// What XENVER_version says. `None`: user space says it.
    pub(crate) fn version(&self) -> Option<u32> {
        let version = self.version.load(Relaxed);
        (version != 0).then_some(version)
    }

    /// A vCPU has come.
    pub(crate) fn add(&self, events: Arc<Events>) {
        self.vcpus.write().insert(events.id(), events);
    }

    fn is_long(&self) -> bool {
        self.long_mode.load(Relaxed)
    }

    fn layout(&self) -> &'static Layout {
        if self.is_long() { &LONG } else { &COMPAT }
    }

    /// Has shared_info at this frame, and the wall clock of now in it; all ones: nowhere. EFAULT: no memory is there that can be
    /// written; once there is, it counts.
    fn set_shared_info(&self, gfn: u64) -> Result<(), Errno> {
        if gfn == u64::MAX {
            self.shared_info.set(NOWHERE);
            return Ok(());
        }
        let gpa = gfn.wrapping_mul(PAGE_BYTES);
        self.shared_info.set(gpa);
        self.shared.check(gpa)?;
        self.shared.with(|view| self.time.write_xen_wall_clock(view, GuestPhysAddr(gpa), self.layout().wall_clock));
        Ok(())
    }
}

/// Where things are: struct shared_info, vcpu_info and vcpu_runstate_info, and their like for 32-bit guests. include/xen/interface/xen.h,
/// vcpu.h; arch/x86/kvm/xen.h.
struct Layout {
    /// How many event channels there are, and their bits in shared_info: that they wait, that they are masked.
    channels: u32,
    pending: u64,
    mask: u64,
    /// Channels to a word, and where vcpu_info has a bit for each of these.
    word_bits: u32,
    selector: u64,
    /// Of the wall clock in shared_info, and of the upper half of its seconds.
    wall_clock: [u64; 2],
    /// Of the rest of vcpu_runstate_info, behind the state.
    runstate_times: u64,
}

const LONG: Layout = Layout {
    channels: 4096,
    pending: 0x800,
    mask: 0xa00,
    word_bits: 64,
    selector: 8,
    wall_clock: [0xc00, 0xc0c],
    runstate_times: 8,
};
const COMPAT: Layout = Layout {
    channels: 1024,
    pending: 0x800,
    mask: 0x880,
    word_bits: 32,
    selector: 4,
    wall_clock: [0x900, 0x924],
    runstate_times: 4,
};
/// The clock of vcpu_info.
const INFO_CLOCK: u64 = 32;
const INFO_BYTES: u64 = 64;
const TIME_INFO_BYTES: u64 = 32;
/// Of 64-bit guests, and so much must there be for others too.
const RUNSTATE_BYTES: u64 = 48;
