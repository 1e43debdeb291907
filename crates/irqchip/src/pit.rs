//! The 8254 timer of a PC: three counters at 1.193182 MHz. Data sheet "8254 Programmable Interval Timer".
//!
//! A counter is its control word, its count and the moment it was loaded; everything else is computed from the time that
//! has passed. Counter 0's output is IRQ 0, counter 2's goes to port 61H.

/// Input clock, Hz.
pub const HZ: u64 = 1_193_182;
/// Port of counter 0; the control word is three behind.
pub const PORT: u16 = 0x40;
/// The port with counter 2's gate and output.
pub const SPEAKER_PORT: u16 = 0x61;
const NS: u128 = 1_000_000_000;
/// Bits of port 61H.
mod speaker {
    pub(super) const GATE: u8 = 1 << 0;
    pub(super) const DATA: u8 = 1 << 1;
    pub(super) const REFRESH_SHIFT: u32 = 4;
    pub(super) const OUT_SHIFT: u32 = 5;
}
/// Ticks of IRQ 0 that wait for an acknowledge are no more than this.
const MAX_MISSED: u32 = 1 << 16;
/// A guest cannot ask for more ticks than one in so many ns (KVM's `min_timer_period_us`).
const MIN_PERIOD_NS: u64 = 200_000;

/// How a count is accessed: control word bits 5:4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Least significant byte.
    Low = 1,
    /// Most significant byte.
    High = 2,
    /// First the low, then the high one.
    #[default]
    Both = 3,
}

/// One counter, as it travels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Count, 1 to 10000H (in BCD: what it means).
    pub count: u32,
    /// Count, latched.
    pub latched_count: u16,
    /// Bytes of it still to be read, as [`Access`]; 0: none.
    pub count_latched: u8,
    /// Status byte is latched.
    pub status_latched: bool,
    /// Status byte.
    pub status: u8,
    /// The next read of an unlatched count is its high byte.
    pub read_high: bool,
    /// The next write is the high byte.
    pub write_high: bool,
    /// Low byte that was written.
    pub write_latch: u8,
    /// How it is accessed.
    pub access: Access,
    /// 0 to 5.
    pub mode: u8,
    /// The count is decimal.
    pub bcd: bool,
    /// Gate.
    pub gate: bool,
    /// When counting started, ns.
    pub loaded_ns: i64,
    /// Clocks that had passed when the gate went low; `None`: counting.
    pub stopped: Option<u64>,
    /// No count since the control word, or (modes 1 and 5) no trigger.
    pub waits: bool,
}

fn clocks(ns: u64) -> u64 {
    (u128::from(ns) * u128::from(HZ) / NS) as u64
}

/// When `clocks` have passed, ns, rounded up.
fn ns(clocks: u64) -> u64 {
    (u128::from(clocks) * NS).div_ceil(u128::from(HZ)) as u64
}

impl Counter {
    fn new() -> Self {
        Self { count: 0x1_0000, gate: true, waits: true, mode: 0, ..Self::default() }
    }

    /// Clocks since the count was loaded.
    fn elapsed(&self, now: u64) -> u64 {
        self.stopped.unwrap_or_else(|| clocks((now as i64).saturating_sub(self.loaded_ns).max(0) as u64))
    }

    fn full(&self) -> u64 {
        self.count.max(1).into()
    }

    /// Output pin.
    fn out(&self, now: u64) -> bool {
        let (d, n) = (self.elapsed(now), self.full());
        match (self.mode, self.waits) {
            (0, true) => false,
            (_, true) => true,
            (0 | 1, _) => d >= n,
            // High while the gate is low: data sheet, modes 2 and 3.
            (2 | 3, _) if !self.gate => true,
            (2, _) => d % n != n - 1,
            (3, _) => d % n < n.div_ceil(2),
            _ => d != n,
        }
    }

    /// Counting element, as read.
    fn counting(&self, now: u64) -> u16 {
        let (d, n) = (self.elapsed(now), self.full());
        let value = match self.mode {
            _ if self.waits => n,
            0 | 1 | 4 | 5 => n.wrapping_sub(d) % self.modulus(),
            2 => n - d % n,
            _ => n - 2 * d % n & !u64::from(n & 1 == 0),
        };
        self.encode((value % self.modulus()) as u32)
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn encode(&self, value: u32) -> u16 {
        if !self.bcd {
            return value as u16;
        }
        (0..4).fold(0, |bcd, digit| bcd | (value / 10u32.pow(digit) % 10) << (4 * digit)) as u16
    }

    fn decode(&self, raw: u16) -> u32 {
        let value = if self.bcd {
            (0..4).map(|digit| u32::from(raw >> (4 * digit) & 0xf) * 10u32.pow(digit)).sum()
        } else {
            raw.into()
        };
        if value == 0 { self.modulus() as u32 } else { value }
    }

    fn load(&mut self, raw: u16, now: u64) {
        self.count = self.decode(raw);
        // Modes 1 and 5 start with a trigger; 2 and 3 that run would take a new count at the end of the period: as KVM, at once.
        self.waits = matches!(self.mode, 1 | 5);
        self.loaded_ns = now as i64;
        self.stopped = (!self.gate && !self.waits).then_some(0);
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        match self.mode {
            1 | 5 if rises => {
                self.waits = false;
                self.loaded_ns = now as i64;
                self.stopped = None;
            }
            // Counting is disabled while low.
            0 | 4 if falls && !self.waits => self.stopped = Some(self.elapsed(now)),
            0 | 4 if rises => {
                if let Some(done) = self.stopped.take() {
                    self.loaded_ns = now as i64 - ns(done) as i64;
                }
            }
            2 | 3 if falls && !self.waits => self.stopped = Some(0),
            // And starts from the full count.
            2 | 3 if rises && !self.waits => {
                self.stopped = None;
                self.loaded_ns = now as i64;
            }
            _ => {}
        }
        self.gate = gate;
    }

    fn control(&mut self, word: u8) {
        let mode = word >> 1 & 7;
        *self = Self {
            count: self.count,
            gate: self.gate,
            loaded_ns: self.loaded_ns,
            access: match word >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::Both,
            },
            // Modes 2 and 3 have a "don't care" bit.
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: word & 1 != 0,
            waits: true,
            ..Self::default()
        };
    }

    fn latch_count(&mut self, now: u64) {
        if self.count_latched == 0 {
            self.latched_count = self.counting(now);
            self.count_latched = self.access as u8;
        }
    }

    fn latch_status(&mut self, now: u64) {
        if !self.status_latched {
            let (out, null) = (u8::from(self.out(now)) << 7, u8::from(self.waits) << 6);
            self.status = out | null | (self.access as u8) << 4 | self.mode << 1 | u8::from(self.bcd);
            self.status_latched = true;
        }
    }

    fn write(&mut self, value: u8, now: u64) -> bool {
        match self.access {
            Access::Low => self.load(value.into(), now),
            Access::High => self.load(u16::from(value) << 8, now),
            Access::Both if !self.write_high => {
                self.write_latch = value;
                self.write_high = true;
                // Mode 0 stops at the first byte.
                if self.mode == 0 && !self.waits {
                    self.stopped = Some(self.elapsed(now));
                }
                return false;
            }
            Access::Both => {
                self.write_high = false;
                self.load(u16::from(value) << 8 | u16::from(self.write_latch), now);
            }
        }
        true
    }

    fn read(&mut self, now: u64) -> u8 {
        if std::mem::take(&mut self.status_latched) {
            return self.status;
        }
        let [low, high] = match self.count_latched {
            0 => self.counting(now),
            _ => self.latched_count,
        }
        .to_le_bytes();
        match self.count_latched {
            0 => match self.access {
                Access::Low => low,
                Access::High => high,
                Access::Both => {
                    self.read_high = !self.read_high;
                    if self.read_high { low } else { high }
                }
            },
            3 => {
                self.count_latched = Access::High as u8;
                low
            }
            which => {
                self.count_latched = 0;
                if which == Access::High as u8 { high } else { low }
            }
        }
    }

    /// Clocks from the load to the output's first rise, and to each further one; `None`: it never rises.
    fn rises(&self) -> Option<(u64, Option<u64>)> {
        if self.waits || self.stopped.is_some() {
            return None;
        }
        let n = self.full();
        match self.mode {
            0 | 1 => Some((n, None)),
            2 | 3 => Some((n, Some(n))),
            _ => Some((n + 1, None)),
        }
    }
}

/// The timer.
#[derive(Clone, Debug)]
pub struct Pit {
    counters: [Counter; 3],
    /// Port 61H bit 1.
    pub speaker_data: bool,
    /// Counter 0 is not IRQ 0: the HPET is.
    pub hpet_legacy: bool,
    /// Ticks that fell due while the last was not acknowledged come later, not never.
    pub reinject: bool,
    /// When counter 0's output rises next, ns; `None`: never.
    next_tick: Option<u64>,
    /// Ticks that wait for the acknowledge of the last.
    missed: u32,
    acknowledged: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// After power-on: nothing counts.
    pub fn new() -> Self {
        let mut counters = [Counter::new(); 3];
        counters[2].gate = false;
        Self {
            counters,
            speaker_data: false,
            hpet_legacy: false,
            reinject: true,
            next_tick: None,
            missed: 0,
            acknowledged: true,
        }
    }

    /// OUT to one of the four ports from [`PORT`] on. `now`: ns.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        let index = usize::from(port & 3);
        if index < 3 {
            if self.counters[index].write(value, now) && index == 0 {
                self.restart(now);
            }
            return;
        }
        let which = usize::from(value >> 6);
        if which == 3 {
            // Read-back: bits 5 and 4 are low for count and status, 3:1 name counters.
            for (index, counter) in self.counters.iter_mut().enumerate() {
                if value & 2 << index != 0 {
                    if value & 0x20 == 0 {
                        counter.latch_count(now);
                    }
                    if value & 0x10 == 0 {
                        counter.latch_status(now);
                    }
                }
            }
        } else if value & 0x30 == 0 {
            self.counters[which].latch_count(now);
        } else {
            self.counters[which].control(value);
            if which == 0 {
                self.restart(now);
            }
        }
    }

    /// IN from the same ports. The control word cannot be read.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        match self.counters.get_mut(usize::from(port & 3)) {
            Some(counter) => counter.read(now),
            None => 0,
        }
    }

    /// OUT to [`SPEAKER_PORT`].
    pub fn write_speaker(&mut self, value: u8, now: u64) {
        self.speaker_data = value & speaker::DATA != 0;
        self.counters[2].set_gate(value & speaker::GATE != 0, now);
    }

    /// IN from it. Bit 4 toggles as memory refresh does, every 16 µs here.
    pub fn read_speaker(&self, now: u64) -> u8 {
        let gate = u8::from(self.counters[2].gate) * speaker::GATE;
        let data = u8::from(self.speaker_data) * speaker::DATA;
        let refresh = ((now >> 14 & 1) as u8) << speaker::REFRESH_SHIFT;
        gate | data | refresh | u8::from(self.counters[2].out(now)) << speaker::OUT_SHIFT
    }

    /// Counter 0 starts anew.
    fn restart(&mut self, now: u64) {
        self.missed = 0;
        self.acknowledged = true;
        self.next_tick = self.tick_after(now);
    }

    fn tick_after(&self, now: u64) -> Option<u64> {
        let counter = &self.counters[0];
        let (first, period) = counter.rises()?;
        let loaded = counter.loaded_ns.max(0) as u64;
        let first_ns = loaded + ns(first);
        if first_ns > now {
            return Some(first_ns);
        }
        let period = period?;
        let done = (counter.elapsed(now) - first) / period;
        let next = loaded + ns(first + (done + 1) * period);
        Some(next.max(now + 1))
    }

    /// When [`Pit::advance`] is wanted next, ns.
    pub fn next(&self) -> Option<u64> {
        self.next_tick
    }

    /// Time has come to `now`. True: IRQ 0 is to be pulsed.
    pub fn advance(&mut self, now: u64) -> bool {
        let Some(due) = self.next_tick else { return false };
        if now < due {
            return false;
        }
        let first = due;
        self.next_tick = self.tick_after(now);
        let periods = match self.counters[0].rises() {
            Some((_, Some(period))) => 1 + (clocks(now - first) / period).min(MAX_MISSED.into()) as u32,
            _ => 1,
        };
        if let Some(next) = &mut self.next_tick {
            *next = (*next).max(now + 1).max(first + MIN_PERIOD_NS.min(ns(self.counters[0].full())));
        }
        if self.hpet_legacy {
            return false;
        }
        if !self.reinject {
            return true;
        }
        self.missed = (self.missed + periods).min(MAX_MISSED);
        self.take_missed()
    }

    fn take_missed(&mut self) -> bool {
        let tick = self.acknowledged && self.missed > 0;
        if tick {
            self.missed -= 1;
            self.acknowledged = false;
        }
        tick
    }

    /// The guest has ended the service of IRQ 0. True: IRQ 0 is to be pulsed for a tick that waited.
    pub fn acknowledge(&mut self) -> bool {
        self.acknowledged = true;
        self.reinject && self.take_missed()
    }

    /// Whether ticks that were missed come later.
    pub fn set_reinject(&mut self, reinject: bool) {
        self.reinject = reinject;
        self.missed = 0;
        self.acknowledged = true;
    }

    /// One counter, 0 to 2.
    pub fn counter(&self, index: usize) -> Counter {
        self.counters[index]
    }

    /// Loads all counters. One whose mode and count are what they were goes on, with its gate moved if that changed;
    /// another starts now, if it does not wait. `loaded_ns` and `stopped` are not looked at.
    pub fn set_counters(&mut self, counters: [Counter; 3], now: u64) {
        for (index, new) in counters.into_iter().enumerate() {
            let old = &mut self.counters[index];
            let count = if new.waits { old.count } else { new.count };
            let mode = if new.mode > 5 { new.mode & 3 } else { new.mode };
            let goes_on = (count, mode, new.bcd, new.waits) == (old.count, old.mode, old.bcd, old.waits);
            let gate = if goes_on { old.gate } else { new.gate };
            let (loaded_ns, stopped) = match goes_on {
                true => (old.loaded_ns, old.stopped),
                false => (now as i64, (!gate && !new.waits).then_some(0)),
            };
            *old = Counter { count: count.clamp(1, 0x1_0000), mode, gate, loaded_ns, stopped, ..new };
            old.set_gate(new.gate, now);
            if index == 0 && !goes_on {
                self.restart(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW_HIGH: u8 = 0x30;

    fn loaded(mode: u8, count: u16) -> Pit {
        let mut pit = Pit::new();
        pit.write(0x43, LOW_HIGH | mode << 1, 0);
        let [low, high] = count.to_le_bytes();
        pit.write(0x40, low, 0);
        pit.write(0x40, high, 0);
        pit
    }

    fn count(pit: &mut Pit, at_clock: u64) -> u16 {
        pit.write(0x43, 0x00, ns(at_clock));
        u16::from_le_bytes([pit.read(0x40, ns(at_clock)), pit.read(0x40, ns(at_clock))])
    }

    fn out(pit: &Pit, at_clock: u64) -> bool {
        pit.counter(0).out(ns(at_clock))
    }

    #[test]
    fn outputs_follow_the_data_sheets_waveforms() {
        // mode, count, output at clocks 0, 1, 2, …
        let waves: &[(u8, u16, &str)] = &[
            (0, 4, "____----------"),
            (2, 3, "--_--_--_--_--"),
            (3, 4, "--__--__--__--"),
            (3, 5, "---__---__---_"),
            (4, 3, "---_----------"),
        ];
        for &(mode, n, wave) in waves {
            let pit = loaded(mode, n);
            let seen: String = (0..wave.len() as u64).map(|d| if out(&pit, d) { '-' } else { '_' }).collect();
            assert_eq!(seen, wave, "mode {mode}, count {n}");
        }
    }

    #[test]
    fn counts_run_down() {
        for (mode, counts) in [
            (0, [4, 3, 2, 1, 0, 0xffff, 0xfffe]),
            (2, [4, 3, 2, 1, 4, 3, 2]),
            (3, [4, 2, 4, 2, 4, 2, 4]),
            (4, [4, 3, 2, 1, 0, 0xffff, 0xfffe]),
        ] {
            let mut pit = loaded(mode, 4);
            let seen: Vec<u16> = (0..7).map(|d| count(&mut pit, d)).collect();
            assert_eq!(seen, counts, "mode {mode}");
        }
    }

    #[test]
    fn modes_1_and_5_wait_for_the_gate() {
        for (mode, wave) in [(1, "___---"), (5, "---_--")] {
            let mut pit = Pit::new();
            pit.write(0x43, 0x90 | mode << 1, 0);
            pit.write(0x42, 3, 0);
            assert!(pit.counter(2).out(ns(100)));
            pit.write_speaker(1, ns(100));
            let wave_seen: String =
                (0..6).map(|d| if pit.counter(2).out(ns(100) + ns(d)) { '-' } else { '_' }).collect();
            assert_eq!(wave_seen, wave, "mode {mode}");
        }
    }

    #[test]
    fn gate_stops_mode_0_and_restarts_mode_3() {
        let mut pit = Pit::new();
        pit.write_speaker(1, 0);
        pit.write(0x43, 0x90, 0);
        pit.write(0x42, 10, 0);
        pit.write_speaker(0, ns(4));
        assert!(!pit.counter(2).out(ns(50)));
        pit.write_speaker(1, ns(50));
        assert!(!pit.counter(2).out(ns(55)));
        assert!(pit.counter(2).out(ns(57)));
        pit.write(0x43, 0x96, ns(100));
        pit.write(0x42, 10, ns(100));
        pit.write_speaker(0, ns(103));
        assert!(pit.counter(2).out(ns(109)), "high while the gate is low");
        pit.write_speaker(1, ns(110));
        assert!(pit.counter(2).out(ns(114)) && !pit.counter(2).out(ns(116)));
    }

    #[test]
    fn speaker_port_shows_gate_data_and_output() {
        let mut pit = Pit::new();
        pit.write_speaker(3, 0);
        pit.write(0x43, 0xb0, 0);
        pit.write(0x42, 0x00, 0);
        pit.write(0x42, 0x10, 0);
        assert_eq!(pit.read_speaker(ns(0xfff)) & !0x10, 0x03);
        assert_eq!(pit.read_speaker(ns(0x1001)) & !0x10, 0x23);
        assert_ne!(pit.read_speaker(0) & 0x10, pit.read_speaker(1 << 14) & 0x10);
    }

    #[test]
    fn latches_hold_until_read() {
        let mut pit = loaded(2, 0x1234);
        pit.write(0x43, 0x00, ns(0x34));
        pit.write(0x43, 0x00, ns(0x100));
        assert_eq!([pit.read(0x40, 0), pit.read(0x40, 0)], [0x00, 0x12]);
        // Read-back of status and count: the status comes first.
        pit.write(0x43, 0xc2, ns(0x34));
        assert_eq!(pit.read(0x40, 0), 0xb4, "OUT, counting, low and high, mode 2");
        assert_eq!([pit.read(0x40, 0), pit.read(0x40, 0)], [0x00, 0x12]);
        pit.write(0x43, 0x34, 0);
        pit.write(0x43, 0xe2, 0);
        assert_eq!(pit.read(0x40, 0), 0xf4, "no count since the control word");
    }

    #[test]
    fn bytes_are_accessed_as_the_control_word_says() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x14, 0);
        pit.write(0x40, 0x80, 0);
        assert_eq!(pit.read(0x40, 0), 0x80);
        pit.write(0x43, 0x24, 0);
        pit.write(0x40, 0x80, 0);
        assert_eq!((pit.read(0x40, 0), pit.counter(0).count), (0x80, 0x8000));
        pit.write(0x43, 0x35, 0);
        pit.write(0x40, 0x00, 0);
        pit.write(0x40, 0x10, 0);
        assert_eq!(pit.counter(0).count, 1000, "BCD");
        assert_eq!(count(&mut pit, 1), 0x0999);
        pit.write(0x43, 0x34, 0);
        pit.write(0x40, 0, 0);
        pit.write(0x40, 0, 0);
        assert_eq!(pit.counter(0).count, 0x1_0000, "0 is the largest");
    }

    #[test]
    fn ticks_come_at_each_rise_of_the_output() {
        let mut pit = loaded(2, 1193);
        pit.set_reinject(false);
        let mut ticks = 0;
        let mut now = 0;
        while now < 1_000_000_000 {
            now = pit.next().unwrap();
            assert!(pit.advance(now));
            ticks += 1;
        }
        assert_eq!(ticks, HZ / 1193 + 1, "in the first second and the one behind");
        let mut pit = loaded(0, 100);
        assert_eq!(pit.next(), Some(ns(100)));
        assert!(pit.advance(ns(100)));
        assert_eq!(pit.next(), None);
    }

    #[test]
    fn ticks_wait_for_the_acknowledge_of_the_last() {
        let mut pit = loaded(2, 2386);
        assert!(pit.advance(pit.next().unwrap()));
        let late = pit.next().unwrap() + ns(2 * 2386);
        assert!(!pit.advance(late));
        assert_eq!(
            [pit.acknowledge(), pit.acknowledge(), pit.acknowledge(), pit.acknowledge()],
            [true, true, true, false]
        );
    }
}
