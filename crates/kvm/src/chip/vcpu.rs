//! The local APIC of a vCPU, as its owner's thread uses it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use irqchip::lapic::Deadline;
use irqchip::{Lapic, Now, Wake};
use kvm_abi::consts::KVM_X86_QUIRK_LAPIC_MMIO_HOLE;
use mmu::View;
use parking_lot::Mutex;
use x86_defs::msr::{self, apic_base};

use super::alarm::{Who, monotonic_ns};
use super::pages::Pages;
use super::{Chip, Waker};
use crate::machine::Machine;

/// x2APIC register behind the task priority.
const X2APIC_TPR: u32 = msr::IA32_X2APIC_BASE + 8;
/// Spurious-interrupt vector register.
const X2APIC_SVR: u32 = msr::IA32_X2APIC_BASE + 0xf;

/// A vCPU's local APIC and what wakes the vCPU.
pub(crate) struct VcpuApic {
    pub(crate) lapic: Arc<Lapic>,
    pub(crate) chip: Arc<Chip>,
    pub(crate) waker: Arc<Waker>,
    /// What the alarm is set to. Only the owner looks.
    armed: Mutex<Deadline>,
    pub(super) pages: Pages,
}

impl VcpuApic {
    /// `base`: IA32_APIC_BASE. `memory`: the guest's, as the vCPU writes it. `None`: the id is taken.
    pub(crate) fn new(chip: &Arc<Chip>, id: u32, base: u64, waker: Arc<Waker>, memory: View) -> Option<Self> {
        let lapic = Arc::new(Lapic::new(id, base, waker.clone()));
        if !chip.wires.add_lapic(lapic.clone()) {
            return None;
        }
        chip.wakers.write().insert(id, waker.clone());
        let (chip, armed, pages) = (chip.clone(), Mutex::new(Deadline::Never), Pages::new(memory));
        Some(Self { lapic, chip, waker, armed, pages })
    }

    /// Where its registers are in memory, or would be: a disabled APIC and one in x2APIC mode leave a hole there, which is
    /// theirs while `KVM_X86_QUIRK_LAPIC_MMIO_HOLE` is on (`apic_mmio_read`). `None`: nothing is.
    pub(super) fn page_address(&self, machine: &Machine) -> Option<u64> {
        let is_there = self.has_page() || machine.options.has_quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE);
        is_there.then(|| self.lapic.base() & !0xfff)
    }

    /// The page shows registers.
    pub(super) fn has_page(&self) -> bool {
        self.lapic.is_enabled() && !self.lapic.is_x2apic()
    }

    /// When its timer fires, ns of the monotonic clock.
    pub(super) fn deadline_ns(&self, machine: &Machine) -> Option<u64> {
        match self.lapic.deadline() {
            Deadline::Never => None,
            Deadline::Ns(ns) => Some(ns),
            Deadline::Tsc(tsc) => {
                let now = machine.now();
                let left = u128::from(tsc.saturating_sub(now.tsc)) * 1_000_000 / u128::from(machine.tsc_khz().max(1));
                Some(now.ns.saturating_add(u64::try_from(left).unwrap_or(u64::MAX)).saturating_add(1))
            }
        }
    }

    /// Has the alarm ring for the timer while the guest runs.
    pub(super) fn arm(&self, machine: &Machine) {
        let deadline = self.lapic.deadline();
        let mut armed = self.armed.lock();
        if self.waker.rung.swap(false, Relaxed) || *armed != deadline {
            *armed = deadline;
            self.chip.alarm.set(Who::Vcpu(self.lapic.id()), self.deadline_ns(machine));
        }
    }

    /// The owner sleeps and minds the timer itself.
    pub(super) fn disarm(&self) {
        let mut armed = self.armed.lock();
        if *armed != Deadline::Never {
            *armed = Deadline::Never;
            self.chip.alarm.set(Who::Vcpu(self.lapic.id()), None);
        }
    }
}

impl Drop for VcpuApic {
    fn drop(&mut self) {
        self.disarm();
    }
}

impl Machine {
    /// The clocks now.
    pub(crate) fn now(&self) -> Now {
        Now { ns: monotonic_ns(), tsc: self.tsc() }
    }

    /// Loads IA32_APIC_BASE; the APIC follows.
    pub(crate) fn set_apic_base(&self, base: u64) {
        self.apic_base.store(base, Relaxed);
        if let Some(apic) = self.apic() {
            apic.lapic.set_base(base);
        }
    }

    /// The guest's WRMSR IA32_APIC_BASE. `None`: modes change in another order. SDM Vol. 3 "x2APIC State Transitions".
    pub(crate) fn guest_sets_apic_base(&self, base: u64) -> Option<()> {
        let mode = |base: u64| base & (apic_base::EN | apic_base::EXTD);
        let (old, new) = (mode(self.apic_base.load(Relaxed)), mode(base));
        let both = apic_base::EN | apic_base::EXTD;
        if old == both && new == apic_base::EN || old == 0 && new == both {
            return None;
        }
        self.set_apic_base(base);
        if let Some(apic) = self.apic() {
            self.cpuid_is_stale.store(true, Relaxed);
            apic.waker.wake();
        }
        Some(())
    }

    /// The registers that are MSRs: those of x2APIC mode, and the timer's deadline, which reads 0 without an APIC here.
    /// `None`: #GP(0).
    pub(crate) fn read_apic_msr(&self, index: u32) -> Option<u64> {
        if let Some(apic) = self.apic() {
            apic.take_pages(self.pv.pv_eoi.load(Relaxed));
        }
        match (self.apic(), index) {
            (apic, msr::IA32_TSC_DEADLINE) => Some(apic.map_or(0, |apic| apic.lapic.tsc_deadline())),
            (Some(apic), _) => apic.lapic.read_msr(index, &apic.chip.wires, self.now()),
            (None, _) => None,
        }
    }

    /// See [`Self::read_apic_msr`].
    pub(crate) fn write_apic_msr(&self, index: u32, value: u64) -> Option<()> {
        let Some(apic) = self.apic() else {
            return (index == msr::IA32_TSC_DEADLINE).then_some(());
        };
        apic.take_pages(self.pv.pv_eoi.load(Relaxed));
        match index {
            msr::IA32_TSC_DEADLINE => apic.lapic.set_tsc_deadline(value),
            _ => apic.lapic.write_msr(index, value, &apic.chip.wires, self.now())?,
        }
        apic.show_pages(self.pv.pv_eoi.load(Relaxed));
        if index == X2APIC_SVR {
            self.options.xen.apic_enabled(apic.lapic.id());
        }
        if index == X2APIC_TPR {
            // CR8 is another name for it: the loop around the guest loads it.
            apic.waker.wake();
        }
        apic.arm(self);
        Some(())
    }

    /// CR8 has this value now.
    pub(crate) fn set_tpr(&self, value: u64) {
        let Some(apic) = self.apic() else { return };
        apic.take_pages(self.pv.pv_eoi.load(Relaxed));
        let waits = apic.lapic.set_cr8(value);
        apic.show_pages(self.pv.pv_eoi.load(Relaxed));
        if waits {
            apic.waker.wake();
        }
    }

    /// The guest's MOV to CR8. True: user space's local APIC is to hear of it, which it is of lower priorities.
    pub(crate) fn guest_sets_tpr(&self, old: u64, value: u64) -> bool {
        self.set_tpr(value);
        self.apic().is_none() && self.era.reports_tpr() && value < old
    }
}
