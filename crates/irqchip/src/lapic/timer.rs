//! The timer: one-shot, periodic, and TSC deadline. SDM Vol. 3 "APIC Timer".

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::{Bus, Lapic, at};
use crate::Now;
use crate::reg::Access;

/// A guest cannot ask for a shorter period, ns (KVM's `min_timer_period_us`).
const MIN_PERIOD_NS: u64 = 200_000;
/// Bits 18:17 of its LVT entry.
const MODE_SHIFT: u32 = 17;

/// When the timer fires, by the clock of its mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Not at all.
    Never,
    /// [`Now::ns`]
    Ns(u64),
    /// [`Now::tsc`]
    Tsc(u64),
}

/// 0: not armed.
#[derive(Default)]
pub(super) struct Timer {
    deadline_ns: AtomicU64,
    deadline_tsc: AtomicU64,
}

impl Timer {
    pub(super) fn stop(&self) {
        self.deadline_ns.store(0, SeqCst);
        self.deadline_tsc.store(0, SeqCst);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

fn mode(lvt: u32) -> Mode {
    match lvt >> MODE_SHIFT & 3 {
        0 => Mode::OneShot,
        1 => Mode::Periodic,
        _ => Mode::TscDeadline,
    }
}

/// Bits 3, 1 and 0: divide by 2, 4, … 128, 1.
fn divisor(configuration: u32) -> u64 {
    1 << ((configuration >> 1 & 4 | configuration & 3) + 1 & 7)
}

impl Lapic {
    /// ns for `counts` counts: the bus clock is 1 GHz.
    fn counts_to_ns(&self, counts: u32) -> u64 {
        u64::from(counts) * divisor(self.load(at::DIVIDE))
    }

    fn period_ns(&self) -> u64 {
        self.counts_to_ns(self.load(at::INITIAL_COUNT)).max(MIN_PERIOD_NS)
    }

    /// Moving to and from TSC-deadline mode disarms the timer.
    pub(super) fn timer_mode_changed(&self, before: u32) {
        let (before, after) = (mode(before), mode(self.load(at::LVT_TIMER)));
        if before != after && [before, after].contains(&Mode::TscDeadline) {
            self.timer.stop();
            self.store(at::INITIAL_COUNT, 0);
        }
    }

    pub(super) fn initial_count_written(&self, access: Access<'_, dyn Bus>, value: u32) {
        let mode = mode(self.load(at::LVT_TIMER));
        if mode == Mode::TscDeadline {
            return;
        }
        self.store(at::INITIAL_COUNT, value);
        let ns = if mode == Mode::Periodic { self.period_ns() } else { self.counts_to_ns(value) };
        self.timer.deadline_ns.store(if value == 0 { 0 } else { access.now.ns + ns }, SeqCst);
    }

    pub(super) fn current_count_shown(&self, access: Access<'_, dyn Bus>) -> u32 {
        self.current_count(access.now)
    }

    pub(super) fn current_count(&self, now: Now) -> u32 {
        let left = match self.timer.deadline_ns.load(SeqCst) {
            0 => return 0,
            deadline => deadline.saturating_sub(now.ns),
        };
        (left / divisor(self.load(at::DIVIDE))) as u32
    }

    /// Counts that are left go on at the new rate.
    pub(super) fn divide_written(&self, access: Access<'_, dyn Bus>, value: u32) {
        let left = self.current_count(access.now);
        self.store(at::DIVIDE, value);
        if self.timer.deadline_ns.load(SeqCst) != 0 {
            self.timer.deadline_ns.store(access.now.ns + self.counts_to_ns(left).max(1), SeqCst);
        }
    }

    /// From a saved page: `left` counts remain of the initial count, at most all. A one-shot timer without any fires at
    /// once: it may have run out while nobody was there to take the interrupt, and a second one does no harm
    /// (`set_target_expiration` in lapic.c).
    pub(super) fn resume_timer(&self, left: u32, now: Now) {
        self.timer.stop();
        let mode = mode(self.load(at::LVT_TIMER));
        let all = match mode {
            Mode::TscDeadline => return,
            Mode::OneShot => self.counts_to_ns(self.load(at::INITIAL_COUNT)),
            Mode::Periodic => self.period_ns(),
        };
        if self.load(at::INITIAL_COUNT) != 0 {
            let ns = match self.counts_to_ns(left) {
                0 if mode == Mode::Periodic => all,
                left => left.min(all),
            };
            self.timer.deadline_ns.store((now.ns + ns).max(1), SeqCst);
        }
    }

    /// IA32_TSC_DEADLINE: 0 outside of its mode.
    pub fn tsc_deadline(&self) -> u64 {
        self.timer.deadline_tsc.load(SeqCst)
    }

    /// WRMSR IA32_TSC_DEADLINE: ignored outside of its mode; 0 disarms.
    pub fn set_tsc_deadline(&self, value: u64) {
        if mode(self.load(at::LVT_TIMER)) == Mode::TscDeadline && self.is_enabled() {
            self.timer.deadline_tsc.store(value, SeqCst);
        }
    }

    /// When [`Lapic::advance`] is wanted next.
    pub fn deadline(&self) -> Deadline {
        match (self.timer.deadline_tsc.load(SeqCst), self.timer.deadline_ns.load(SeqCst)) {
            (0, 0) => Deadline::Never,
            (0, ns) => Deadline::Ns(ns),
            (tsc, _) => Deadline::Tsc(tsc),
        }
    }

    /// Time has come to `now`: fires the timer if it is due. Periods that were missed are one interrupt.
    pub fn advance(&self, now: Now) {
        match self.deadline() {
            Deadline::Tsc(tsc) if tsc <= now.tsc => self.timer.deadline_tsc.store(0, SeqCst),
            Deadline::Ns(ns) if ns <= now.ns => {
                let next = match mode(self.load(at::LVT_TIMER)) {
                    Mode::Periodic => {
                        let period = self.period_ns();
                        ns + ((now.ns - ns) / period + 1) * period
                    }
                    _ => 0,
                };
                self.timer.deadline_ns.store(next, SeqCst);
            }
            _ => return,
        }
        self.local(at::LVT_TIMER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SDM Vol. 3 "Divide Configuration Register".
    #[test]
    fn divide_configuration_is_the_manuals() {
        let table = [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1001, 64), (0b1010, 128)];
        for (bits, by) in table {
            assert_eq!(divisor(bits), by, "{bits:#06b}");
        }
        assert_eq!(divisor(0b1011), 1);
    }
}
