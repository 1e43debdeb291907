//! The paravirtual clock: a page of guest memory with which a guest turns its time-stamp counter into nanoseconds.
//!
//! Documentation/virt/kvm/x86/msr.rst `MSR_KVM_SYSTEM_TIME_NEW`, `MSR_KVM_WALL_CLOCK_NEW`; arch/x86/include/asm/pvclock-abi.h.
//!
//! A VM's clock is a straight line over the host's counter, and every vCPU's page says the same line by its own counter: the
//! clock reads the same on all of them, and is that of `KVM_GET_CLOCK`. A page is written by its vCPU's owner before the guest
//! goes on, so nobody else has to reach guest memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, fence};

use kvm_abi::consts::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE};
use kvm_abi::{Plain, kvm_clock_data};
use mmu::View;
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;
use x86_defs::{GuestPhysAddr, msr};

use crate::machine::{host_tsc, host_tsc_khz};
use crate::paravirt::ENABLE;
use crate::vcpu::Vcpu;

/// `MSR_KVM_WALL_CLOCK`, of before 2010, and its later number.
const WALL_CLOCK: [u32; 2] = [msr::MSR_KVM_WALL_CLOCK, msr::MSR_KVM_WALL_CLOCK_NEW];
/// `MSR_KVM_SYSTEM_TIME` likewise.
const SYSTEM_TIME: [u32; 2] = [msr::MSR_KVM_SYSTEM_TIME, msr::MSR_KVM_SYSTEM_TIME_NEW];

/// Flags of the page.
const TSC_STABLE: u8 = 1 << 0;
const GUEST_STOPPED: u8 = 1 << 1;

/// Flags of `struct kvm_clock_data`, all of which `KVM_GET_CLOCK` sets.
pub(crate) const CLOCK_FLAGS: u32 = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;

const NS_PER_S: u128 = 1_000_000_000;

/// How ticks become nanoseconds: (ticks × 2^shift) × mul / 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// The most exact one for a counter of this rate.
    fn of_khz(khz: u64) -> Self {
        let hz = u128::from(khz.max(1)) * 1000;
        let scale = |shift: i8| (NS_PER_S << (32 - shift)) / hz;
        let shift = (-31..32).rev().find(|&shift| scale(shift) >> 31 == 1).unwrap_or(0);
        Self { mul: scale(shift) as u32, shift }
    }

    fn ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = if self.shift < 0 { ticks >> -self.shift } else { ticks << self.shift };
        ((shifted * u128::from(self.mul)) >> 32) as u64
    }
}

/// Where the line starts.
#[derive(Clone, Copy, Debug)]
struct Start {
    host_tsc: u64,
    ns: u64,
}

/// A VM's clock.
pub(crate) struct VmClock {
    start: Mutex<Start>,
    /// Of `start`; pages of another one are out of date.
    generation: AtomicU32,
    /// The wall clock MSR, which is the VM's.
    wall_clock: AtomicU64,
}

fn realtime_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("every Linux has this clock");
    now.tv_sec() as u64 * NS_PER_S as u64 + now.tv_nsec() as u64
}

impl VmClock {
    /// Reads 0 now.
    pub(crate) fn new() -> Arc<Self> {
        let start = Mutex::new(Start { host_tsc: host_tsc(), ns: 0 });
        Arc::new(Self { start, generation: AtomicU32::new(1), wall_clock: AtomicU64::new(0) })
    }

    /// What it reads when the host's counter reads this.
    pub(crate) fn ns_at(&self, host_tsc: u64) -> u64 {
        let start = *self.start.lock();
        start.ns.wrapping_add(Scale::of_khz(host_tsc_khz().into()).ns(host_tsc.wrapping_sub(start.host_tsc)))
    }

    /// `KVM_GET_CLOCK`
    pub(crate) fn data(&self) -> kvm_clock_data {
        let host_tsc = host_tsc();
        let (clock, realtime) = (self.ns_at(host_tsc), realtime_ns());
        kvm_clock_data { clock, flags: CLOCK_FLAGS, realtime, host_tsc, ..Plain::zeroed() }
    }

    /// When it read 0 by the wall clock: lower half of the seconds, nanoseconds, as they stand behind a version; and the upper half.
    fn began(&self) -> ([u8; 8], [u8; 4]) {
        let began = realtime_ns().wrapping_sub(self.ns_at(host_tsc()));
        let (seconds, ns) = (began / NS_PER_S as u64, began % NS_PER_S as u64);
        ((ns << 32 | seconds & 0xffff_ffff).to_le_bytes(), ((seconds >> 32) as u32).to_le_bytes())
    }

    /// Xen's wall clock, `at` behind `gpa`: version, seconds, nanoseconds; and the upper half of the seconds. `kvm_xen_shared_info_init`
    pub(crate) fn write_xen_wall_clock(&self, view: &View, gpa: GuestPhysAddr, at: [u64; 2]) {
        let (body, upper) = self.began();
        let [clock, upper_at] = at.map(|at| gpa.wrapping_add(at));
        write_versioned(view, clock, &[(clock.wrapping_add(4), &body), (upper_at, &upper)]);
    }

    /// `KVM_SET_CLOCK`: goes on from `ns`, and from what has passed since `realtime` if that is given.
    pub(crate) fn set(&self, ns: u64, realtime: Option<u64>) {
        let passed = realtime.map_or(0, |then| realtime_ns().saturating_sub(then));
        *self.start.lock() = Start { host_tsc: host_tsc(), ns: ns.wrapping_add(passed) };
        self.generation.fetch_add(1, Relaxed);
    }
}

/// What a vCPU has of it.
pub(crate) struct PvTime {
    vm: Arc<VmClock>,
    /// The system time MSR.
    system_time: AtomicU64,
    /// Generation that the page shows; 0: none.
    shows: AtomicU32,
    /// The wall clock is to be written.
    wall_clock_due: AtomicBool,
    /// `KVM_KVMCLOCK_CTRL`: the guest is to be told that it stood still.
    stopped: AtomicBool,
}

impl PvTime {
    pub(crate) fn new(vm: Arc<VmClock>) -> Self {
        let shows = AtomicU32::new(vm.generation.load(Relaxed));
        let (system_time, off) = (AtomicU64::new(0), || AtomicBool::new(false));
        Self { vm, system_time, shows, wall_clock_due: off(), stopped: off() }
    }

    /// `None`: another MSR.
    pub(crate) fn read_msr(&self, index: u32) -> Option<u64> {
        match index {
            _ if WALL_CLOCK.contains(&index) => Some(self.vm.wall_clock.load(Relaxed)),
            _ if SYSTEM_TIME.contains(&index) => Some(self.system_time.load(Relaxed)),
            _ => None,
        }
    }

    /// `None`: another MSR. The pages are written when the guest is next entered.
    pub(crate) fn write_msr(&self, index: u32, value: u64) -> Option<()> {
        if WALL_CLOCK.contains(&index) {
            self.vm.wall_clock.store(value, Relaxed);
            self.wall_clock_due.store(true, Relaxed);
        } else if SYSTEM_TIME.contains(&index) {
            self.system_time.store(value, Relaxed);
            self.counter_changed();
        } else {
            return None;
        }
        Some(())
    }

    /// INIT: the guest has no page.
    pub(crate) fn reset(&self) {
        self.system_time.store(0, Relaxed);
        self.counter_changed();
    }

    /// The vCPU's counter no longer is what its page says.
    pub(crate) fn counter_changed(&self) {
        self.shows.store(0, Relaxed);
    }

    /// False: the guest has no page.
    pub(crate) fn guest_stopped(&self) -> bool {
        let enabled = self.system_time.load(Relaxed) & ENABLE != 0;
        if enabled {
            self.stopped.store(true, Relaxed);
            self.counter_changed();
        }
        enabled
    }

    fn is_due(&self) -> bool {
        self.shows.load(Relaxed) != self.vm.generation.load(Relaxed) || self.wall_clock_due.load(Relaxed)
    }
}

/// `struct pvclock_vcpu_time_info`: version, padding, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags, padding.
const PAGE_BYTES: usize = 32;
const FLAGS_AT: usize = 29;

/// Writes what a version at `gpa` is of, which is odd meanwhile. Memory that is not there is passed over, as in Linux.
fn write_versioned(view: &View, gpa: GuestPhysAddr, parts: &[(GuestPhysAddr, &[u8])]) {
    let mut version = [0; 4];
    if view.read(gpa, &mut version).is_err() {
        return;
    }
    let even = u32::from_le_bytes(version).wrapping_add(1) & !1;
    let write = |at: GuestPhysAddr, bytes: &[u8]| {
        if let Err(error) = view.write(at, bytes) {
            tracing::debug!(%error, "a guest's clock cannot be written");
        }
        fence(std::sync::atomic::Ordering::SeqCst);
    };
    write(gpa, &even.wrapping_add(1).to_le_bytes());
    for (at, bytes) in parts {
        write(*at, bytes);
    }
    write(gpa, &even.wrapping_add(2).to_le_bytes());
}

impl Vcpu {
    /// Brings the guest's clock up to date if it is not. Called before each entry.
    pub(crate) fn write_clock(&mut self) {
        if self.machine.time.is_due() {
            self.write_clock_now();
        }
    }

    #[cold]
    fn write_clock_now(&mut self) {
        let time = &self.machine.time;
        let view = self.machine.memory();
        let system_time = time.system_time.load(Relaxed);
        let own = (system_time & ENABLE != 0).then_some(GuestPhysAddr(system_time & !ENABLE));
        let generation = time.vm.generation.load(Relaxed);
        let scale = Scale::of_khz(self.machine.counted_khz().into());
        let mut stopped = 0;
        for gpa in [own].into_iter().chain(self.xen.clocks()).flatten() {
            let mut page = [0; PAGE_BYTES];
            // What the guest was told stays until it clears it.
            if view.read(gpa, &mut page).is_ok() {
                stopped |= page[FLAGS_AT] & GUEST_STOPPED;
            }
            if time.stopped.swap(false, Relaxed) {
                stopped = GUEST_STOPPED;
            }
            let start = *time.vm.start.lock();
            page[8..16].copy_from_slice(&self.machine.tsc_at(start.host_tsc).to_le_bytes());
            page[16..24].copy_from_slice(&start.ns.to_le_bytes());
            page[24..28].copy_from_slice(&scale.mul.to_le_bytes());
            page[28] = scale.shift as u8;
            page[FLAGS_AT..].copy_from_slice(&[stopped | TSC_STABLE, 0, 0]);
            write_versioned(&view, gpa, &[(gpa.wrapping_add(4), &page[4..])]);
        }
        time.shows.store(generation, Relaxed);
        if time.wall_clock_due.swap(false, Relaxed) {
            let gpa = time.vm.wall_clock.load(Relaxed);
            if gpa != 0 {
                let (body, _) = time.vm.began();
                let gpa = GuestPhysAddr(gpa);
                write_versioned(&view, gpa, &[(gpa.wrapping_add(4), &body)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_ticks_is_a_second() {
        for khz in [1u64, 1_000, 999_999, 1_000_000, 1_000_001, 2_445_426, 3_999_999, 4_294_967, 90_000_000] {
            let scale = Scale::of_khz(khz);
            assert!(scale.mul >> 31 == 1, "{khz}: all bits are used");
            let ns = scale.ns(khz * 1000);
            assert!(ns.abs_diff(1_000_000_000) <= 2, "{khz}: {ns}");
        }
    }

    #[test]
    fn the_clock_goes_on_from_where_it_is_set() {
        let clock = VmClock::new();
        let before = clock.data();
        clock.set(10, None);
        let after = clock.data();
        assert!(after.clock >= 10 && after.host_tsc > before.host_tsc);
        clock.set(10, Some(after.realtime - 5_000_000_000));
        assert!(clock.data().clock >= 5_000_000_010);
    }
}
