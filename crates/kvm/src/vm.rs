//! A VM: its memory, its vCPUs, and the era it turned out to be of.
//!
//! Locks, outer first: `vcpus`, `layout`. A vCPU's own lock is never taken with either held, so a slot change may wait for
//! running vCPUs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use cpu_core::Kick;
use kvm_abi::consts::{KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS};
use mmu::{DirtyRing, Mapping, Memory};
use nix::errno::Errno;
use parking_lot::Mutex;

use crate::chip::Chip;
use crate::client::{AddressSpace, Client, File, FileKind, Reply, Share, WindowPiece};
use crate::coalesced::Zones;
use crate::era::Era;
use crate::exit::hypercall;
use crate::ioctl::{self, Call, Target};
use crate::ioeventfd::Ioeventfds;
use crate::kvmclock::VmClock;
use crate::machine::Clock;
use crate::options::Options;
use crate::processors::Processors;
use crate::status::{Counters, VmStatus};
use crate::system::Kvm;

/// Flags of `KVM_CAP_X2APIC_API`: the answer to `KVM_CHECK_EXTENSION`.
pub(crate) const X2APIC_API: u32 = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;

/// What a VM keeps of a vCPU; the vCPU itself hangs on its file.
pub(crate) struct VcpuEntry {
    pub(crate) kick: Arc<Kick>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) ring: Option<Arc<DirtyRing>>,
}

/// One VM. It lives while its file or a file of one of its vCPUs is open.
pub(crate) struct Vm {
    kvm: Arc<Kvm>,
    /// Number, from 1, in order of creation.
    pub(crate) id: u64,
    /// Who made it.
    pub(crate) address_space: AddressSpace,
    created: Instant,
    era: OnceLock<Era>,
    /// Guest-physical memory.
    pub(crate) memory: Arc<Memory>,
    /// Held while `memory` is changed.
    pub(crate) layout: Mutex<()>,
    /// By id. An id stays taken when the vCPU's file is closed.
    pub(crate) vcpus: Mutex<BTreeMap<u32, VcpuEntry>>,
    /// Where Intel's CPUs without unrestricted guest would keep a page table; kept because clients may set it.
    pub(crate) identity_map_addr: AtomicU64,
    /// The guest's time-stamp counter.
    pub(crate) clock: Clock,
    /// What user space has chosen.
    pub(crate) options: Arc<Options>,
    /// What `KVM_GET_CLOCK` and the paravirtual clock tell.
    pub(crate) time: Arc<VmClock>,
    /// Interrupt controllers, if they are not user space's.
    chip: OnceLock<Arc<Chip>>,
    /// Writes that signal eventfds.
    pub(crate) ioeventfds: Ioeventfds,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: its options.
    pub(crate) manual_dirty_log: AtomicU32,
    /// `KVM_CAP_DIRTY_LOG_RING`: size of each vCPU's ring; 0: there are none. Changed with `vcpus` locked.
    pub(crate) dirty_ring_bytes: AtomicU32,
    /// `KVM_CAP_EXIT_HYPERCALL`: bit n, user space answers hypercall n.
    hypercall_exits: AtomicU64,
    /// Writes that wait in a ring.
    pub(crate) coalesced: Zones,
    /// `KVM_CAP_X2APIC_API`: its flags.
    x2apic_api: AtomicU32,
    /// There is a device of type VFIO.
    pub(crate) has_vfio: AtomicBool,
}

impl Vm {
    /// A VM without memory or vCPUs.
    pub(crate) fn new(kvm: Arc<Kvm>, address_space: AddressSpace) -> Arc<Self> {
        let (memory, time) = (Arc::new(Memory::new()), VmClock::new());
        let options = Arc::new(Options::new(memory.clone(), time.clone()));
        Arc::new(Self {
            id: kvm.next_vm_id(),
            kvm,
            address_space,
            created: Instant::now(),
            era: OnceLock::new(),
            memory,
            layout: Mutex::default(),
            vcpus: Mutex::default(),
            identity_map_addr: AtomicU64::new(0xfffb_c000),
            clock: Clock::default(),
            options,
            time,
            chip: OnceLock::new(),
            ioeventfds: Ioeventfds::default(),
            manual_dirty_log: AtomicU32::new(0),
            dirty_ring_bytes: AtomicU32::new(0),
            hypercall_exits: AtomicU64::new(0),
            coalesced: Zones::default(),
            x2apic_api: AtomicU32::new(0),
            has_vfio: AtomicBool::new(false),
        })
    }

    /// What its vCPUs run on.
    pub(crate) fn processors(&self) -> &Arc<Processors> {
        &self.kvm.processors
    }

    /// Interrupt controllers, if they are not user space's.
    pub(crate) fn chip(&self) -> Option<&Arc<Chip>> {
        self.chip.get()
    }

    /// Makes them. `split` as [`Chip::new`] has it. EEXIST: there are some. EINVAL: there are vCPUs, which have none.
    pub(crate) fn create_chip(&self, split: Option<u32>) -> Result<(), Errno> {
        let vcpus = self.vcpus.lock();
        if self.chip.get().is_some() {
            return Err(Errno::EEXIST);
        }
        if !vcpus.is_empty() {
            return Err(Errno::EINVAL);
        }
        self.chip.set(Chip::new(split, &self.options.xen)?).map_err(|_| Errno::EEXIST)?;
        self.show_x2apic_api();
        Ok(())
    }

    /// `KVM_CAP_X2APIC_API`; what is on stays on. EINVAL: an unknown flag.
    pub(crate) fn set_x2apic_api(&self, flags: u64) -> Result<(), Errno> {
        if flags & !u64::from(X2APIC_API) != 0 {
            return Err(Errno::EINVAL);
        }
        let _vcpus = self.vcpus.lock();
        self.x2apic_api.fetch_or(flags as u32, Ordering::Relaxed);
        self.show_x2apic_api();
        Ok(())
    }

    fn show_x2apic_api(&self) {
        let has = |flag| self.x2apic_api.load(Ordering::Relaxed) & flag != 0;
        if let Some(chip) = self.chip() {
            let (wide, strict) = (KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
            chip.wires.set_x2apic_api(has(wide), has(strict));
        }
    }

    /// The VM's era, as far as it shows.
    pub(crate) fn era(&self) -> Era {
        self.era.get().copied().unwrap_or(Era::Modern)
    }

    /// An ioctl that only `era` has was called: undecided VMs become that, others must be it.
    pub(crate) fn require(&self, era: Era) -> Result<(), Errno> {
        if *self.era.get_or_init(|| era) == era { Ok(()) } else { Err(self.era().unknown_vm_request()) }
    }

    /// The era is needed now: what has not shown 2007's ioctls by now is modern.
    pub(crate) fn settle_era(&self) -> Era {
        *self.era.get_or_init(|| Era::Modern)
    }

    /// Address spaces that today's KVM refuses.
    pub(crate) fn check_address_space(&self, client: &dyn Client) -> Result<(), Errno> {
        let foreign = self.era().bound_to_address_space() && client.address_space() != self.address_space;
        if foreign { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Returns when no vCPU uses memory as it was before the last change. The caller holds `layout`, not a vCPU's lock.
    pub(crate) fn quiesce(&self) {
        for vcpu in self.vcpus.lock().values() {
            vcpu.kick.refresh();
        }
        self.memory.wait_until_seen(self.memory.generation());
    }

    /// User space answers this hypercall, which has a bit in [`hypercall::EXITS`].
    pub(crate) fn exits_on_hypercall(&self, number: u64) -> bool {
        self.hypercall_exits.load(Ordering::Relaxed) >> number & 1 != 0
    }

    /// `KVM_CAP_EXIT_HYPERCALL`. EINVAL: one that is always answered here.
    pub(crate) fn set_hypercall_exits(&self, numbers: u64) -> Result<(), Errno> {
        if numbers & !hypercall::EXITS != 0 {
            return Err(Errno::EINVAL);
        }
        self.hypercall_exits.store(numbers, Ordering::Relaxed);
        Ok(())
    }

    /// For `softkvm status`.
    pub(crate) fn status(&self) -> VmStatus {
        let slots = self.memory.slots();
        VmStatus {
            id: self.id,
            owner_pid: self.address_space.pid,
            legacy: self.era() == Era::Legacy,
            memory_bytes: slots.iter().map(mmu::Slot::len).sum(),
            slots: slots.iter().len(),
            age_ms: self.created.elapsed().as_millis() as u64,
            vcpus: self.vcpus.lock().iter().map(|(&id, vcpu)| vcpu.counters.status(id)).collect(),
        }
    }

    /// `KVM_SET_IDENTITY_MAP_ADDR`'s value; 0 means the default.
    pub(crate) fn set_identity_map_addr(&self, addr: u64) {
        self.identity_map_addr.store(addr, Ordering::Relaxed);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        tracing::debug!(vm = self.id, "VM ended");
        self.kvm.ended(self.status());
    }
}

impl File for Vm {
    fn ioctl(self: Arc<Self>, client: &dyn Client, request: u32, arg: u64, input: &[u8]) -> Result<Reply, Errno> {
        self.check_address_space(client)?;
        ioctl::dispatch(Target::Vm(&self), &Call { client, request, arg, input })
            .unwrap_or(Err(self.era().unknown_vm_request()))
    }

    fn mapping(&self) -> Option<Arc<Mapping>> {
        None
    }

    fn ram_window(&self) -> Option<Vec<WindowPiece>> {
        (self.era() == Era::Legacy).then(|| Vm::ram_window(self))
    }

    fn remapped(&self, space: AddressSpace, range: &Range<u64>, share: &mut Share<'_>) {
        if space == self.address_space {
            self.follow_remapping(range, share);
        }
    }

    fn kind(&self) -> FileKind {
        FileKind::Vm
    }

    /// As `kvm_vm_release`: eventfds interrupt no more, though vCPUs may live on.
    fn released(&self) {
        if let Some(chip) = self.chip() {
            chip.drop_irqfds();
        }
    }
}
