//! Accesses by memory and by MSR, and what writes do.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use x86_defs::msr::IA32_X2APIC_BASE;

use super::*;
use crate::Now;
use crate::reg::{Access, find};

impl Lapic {
    /// A read of the page, `offset` from its start. Only aligned parts of a register's 32 bits can be read; the rest is 0.
    pub fn read(&self, offset: u32, len: u8, bus: &(dyn Bus + 'static), now: Now) -> u32 {
        let (register, byte) = (offset & !0xf, offset & 0xf);
        let Some(reg) = find(REGS, STEP, register).filter(|reg| !reg.msr_only && self.has(reg)) else {
            self.error(esr::ILLEGAL_REGISTER);
            return 0;
        };
        if byte + u32::from(len) > 4 || reg.write_only {
            return 0;
        }
        self.shown(reg, Access { bus, now, offset: register }) >> (8 * byte)
    }

    fn shown(&self, reg: &Reg<Self>, access: Access<'_, dyn Bus>) -> u32 {
        match reg.shown {
            Some(shown) => shown(self, access),
            None => self.load(access.offset),
        }
    }

    /// A write of the page. Only whole aligned registers can be written.
    pub fn write(&self, offset: u32, len: u8, value: u32, bus: &(dyn Bus + 'static), now: Now) {
        if len != 4 || offset & 0xf != 0 {
            return;
        }
        match find(REGS, STEP, offset) {
            Some(reg) if !reg.msr_only && self.has(reg) => self.written(reg, value, Access { bus, now, offset }),
            _ => self.error(esr::ILLEGAL_REGISTER),
        }
    }

    fn written(&self, reg: &Reg<Self>, value: u32, access: Access<'_, dyn Bus>) {
        let value = self.load(access.offset) & !reg.writable | value & reg.writable;
        match reg.written {
            Some(written) => written(self, access, value),
            None if reg.writable != 0 => self.store(access.offset, value),
            None => {}
        }
    }

    /// RDMSR of an x2APIC register. `None`: #GP(0).
    pub fn read_msr(&self, index: u32, bus: &(dyn Bus + 'static), now: Now) -> Option<u64> {
        let (reg, offset) = self.msr(index)?;
        if reg.write_only {
            return None;
        }
        let low = u64::from(self.shown(reg, Access { bus, now, offset }));
        let high: u64 = if offset == at::ICR { self.load(at::ICR_HIGH).into() } else { 0 };
        Some(high << 32 | low)
    }

    /// WRMSR of an x2APIC register. `None`: #GP(0), for reserved bits too. SDM Vol. 3 "Reserved Bit Checking".
    pub fn write_msr(&self, index: u32, value: u64, bus: &(dyn Bus + 'static), now: Now) -> Option<()> {
        let (reg, offset) = self.msr(index)?;
        let (low, high) = (value as u32, (value >> 32) as u32);
        let writable = match offset {
            at::SVR => reg.writable | self.version_bit_12(),
            at::ICR => reg.writable & !icr::RESERVED,
            _ => reg.writable,
        };
        let read_only = reg.msr_read_only || reg.writable == 0 && reg.written.is_none();
        if read_only || low & !writable & !self.tolerated(offset) != 0 || high != 0 && offset != at::ICR {
            return None;
        }
        if offset == at::ICR {
            self.store(at::ICR_HIGH, high);
        }
        self.written(reg, low, Access { bus, now, offset });
        Some(())
    }

    /// Status bits, which may be written and do not change: delivery status, and remote IRR of the two inputs.
    fn tolerated(&self, offset: u32) -> u32 {
        match offset {
            at::LVT_LINT0 | at::LVT_LINT1 => 1 << 12 | 1 << 14,
            at::ICR | at::LVT_CMCI | at::LVT_TIMER..=at::LVT_ERROR => 1 << 12,
            _ => 0,
        }
    }

    fn version_bit_12(&self) -> u32 {
        if self.directed_eoi.load(Relaxed) { svr::SUPPRESS_EOI_BROADCAST } else { 0 }
    }

    fn msr(&self, index: u32) -> Option<(&'static Reg<Self>, u32)> {
        let offset = index.checked_sub(IA32_X2APIC_BASE)? * STEP;
        let reg = find(REGS, STEP, offset).filter(|reg| !reg.memory_only && self.has(reg))?;
        self.is_x2apic().then_some((reg, offset))
    }

    pub(super) fn version(&self, _: Access<'_, dyn Bus>) -> u32 {
        self.version_shown()
    }

    pub(super) fn version_shown(&self) -> u32 {
        let cmci = if self.cmci.load(Relaxed) { VERSION_CMCI } else { 0 };
        VERSION + cmci | if self.directed_eoi.load(Relaxed) { VERSION_DIRECTED_EOI } else { 0 }
    }

    pub(super) fn ppr_shown(&self, _: Access<'_, dyn Bus>) -> u32 {
        self.ppr()
    }

    pub(super) fn tpr_written(&self, _: Access<'_, dyn Bus>, value: u32) {
        self.store(at::TPR, value);
        self.look_again();
    }

    /// An interrupt may have become pending by the owner's doing.
    fn look_again(&self) {
        if self.pending().is_some() {
            self.wake.wake();
        }
    }

    /// SDM Vol. 3 "Signaling Interrupt Servicing Completion".
    pub(super) fn eoi_written(&self, access: Access<'_, dyn Bus>, _: u32) {
        let Some(vector) = self.highest(at::ISR) else { return };
        self.set_bit(at::ISR, vector, false);
        if self.bit(at::TMR, vector) && self.load(at::SVR) & svr::SUPPRESS_EOI_BROADCAST == 0 {
            access.bus.end_of_interrupt(self, vector);
        }
        self.look_again();
    }

    /// Disabling sets the masks of the local vector table. SDM Vol. 3 "Local APIC State After It Has Been Software Disabled".
    pub(super) fn svr_written(&self, _: Access<'_, dyn Bus>, value: u32) {
        let value = value & (!svr::SUPPRESS_EOI_BROADCAST | self.version_bit_12());
        self.store(at::SVR, value);
        if value & svr::ENABLED == 0 {
            let cmci = self.cmci.load(Relaxed).then_some(at::LVT_CMCI);
            for offset in LVTS.into_iter().chain(cmci) {
                self.store(offset, self.load(offset) | lvt::MASKED);
            }
        }
    }

    /// Shows what happened since the last write.
    pub(super) fn esr_written(&self, _: Access<'_, dyn Bus>, _: u32) {
        self.store(at::ESR, self.errors.swap(0, SeqCst));
    }

    pub(super) fn icr_written(&self, access: Access<'_, dyn Bus>, value: u32) {
        self.store(at::ICR, value);
        let high = self.load(at::ICR_HIGH);
        let shorthand = match value >> icr::SHORTHAND_SHIFT & 3 {
            0 => Shorthand::None,
            1 => Shorthand::ToSelf,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        let Some(mode) = DeliveryMode::of(value >> icr::MODE_SHIFT) else { return };
        let message = Message {
            vector: value as u8,
            mode,
            dest: if self.is_x2apic() { high } else { high >> 24 },
            logical: value & icr::LOGICAL != 0,
            level: value & icr::LEVEL != 0,
            assert: value & icr::ASSERT != 0,
        };
        self.send(access, shorthand, &message);
    }

    fn send(&self, access: Access<'_, dyn Bus>, shorthand: Shorthand, message: &Message) {
        let carries_vector = matches!(message.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if carries_vector && message.vector < 16 {
            return self.error(esr::SEND_ILLEGAL_VECTOR);
        }
        access.bus.send_ipi(self, shorthand, message);
    }

    pub(super) fn self_ipi_written(&self, access: Access<'_, dyn Bus>, value: u32) {
        let vector = value as u8;
        let (mode, dest) = (DeliveryMode::Fixed, self.id);
        let message = Message { vector, mode, dest, logical: false, level: false, assert: true };
        self.send(access, Shorthand::ToSelf, &message);
    }

    fn set_lvt(&self, offset: u32, value: u32) {
        let masked = if self.is_software_enabled() { 0 } else { lvt::MASKED };
        self.store(offset, value | masked);
    }

    pub(super) fn lvt_timer_written(&self, _: Access<'_, dyn Bus>, value: u32) {
        let before = self.load(at::LVT_TIMER);
        self.set_lvt(at::LVT_TIMER, value);
        self.timer_mode_changed(before);
    }

    pub(super) fn lvt_written(&self, access: Access<'_, dyn Bus>, value: u32) {
        self.set_lvt(access.offset, value);
    }

    pub(super) fn lvt_lint0_written(&self, _: Access<'_, dyn Bus>, value: u32) {
        self.set_lvt(at::LVT_LINT0, value);
        // A PIC that waited may come through now.
        self.wake.wake();
    }
}
