//! Tables of registers: offset, name, value after reset, what a guest may write, and what an access does.

use crate::Now;

/// A device whose registers are a table.
pub trait Device: Sized + 'static {
    /// The other devices that an access may reach.
    type Bus: ?Sized;
}

/// What a method learns of an access.
pub struct Access<'a, B: ?Sized> {
    /// The other devices.
    pub bus: &'a B,
    /// The time.
    pub now: Now,
    /// Which register.
    pub offset: u32,
}

impl<B: ?Sized> Clone for Access<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: ?Sized> Copy for Access<'_, B> {}

/// What a write does. `value` has only bits that the guest may write, beside the rest of the register as it was.
type Written<D> = fn(&D, Access<'_, <D as Device>::Bus>, u32);
/// What a read shows.
type Shown<D> = fn(&D, Access<'_, <D as Device>::Bus>) -> u32;

/// One register of 32 bits.
pub struct Reg<D: Device> {
    /// Bytes from the start of the device, or its index.
    pub offset: u32,
    /// As in the manual.
    pub name: &'static str,
    /// After reset.
    pub reset: u32,
    /// Bits that a guest may write.
    pub writable: u32,
    /// Registers of the same kind that follow, `step` bytes apart; 1: it is alone.
    pub count: u32,
    /// Called instead of storing the value.
    pub written: Option<Written<D>>,
    /// Called instead of loading the value.
    pub shown: Option<Shown<D>>,
    /// Access by an MSR differs from that by memory: not at all there.
    pub memory_only: bool,
    /// Read-only as an MSR.
    pub msr_read_only: bool,
    /// Not in memory.
    pub msr_only: bool,
    /// Reads fail, where they can.
    pub write_only: bool,
}

/// A register whose accesses do nothing but load and store.
pub const fn reg<D: Device>(offset: u32, name: &'static str, reset: u32, writable: u32) -> Reg<D> {
    Reg {
        offset,
        name,
        reset,
        writable,
        count: 1,
        written: None,
        shown: None,
        memory_only: false,
        msr_read_only: false,
        msr_only: false,
        write_only: false,
    }
}

impl<D: Device> Reg<D> {
    /// Writes call `method`.
    pub const fn write(self, method: Written<D>) -> Self {
        Self { written: Some(method), ..self }
    }

    /// Reads call `method`.
    pub const fn read(self, method: Shown<D>) -> Self {
        Self { shown: Some(method), ..self }
    }

    /// `count` of them.
    pub const fn times(self, count: u32) -> Self {
        Self { count, ..self }
    }

    /// There is no MSR of it.
    pub const fn memory_only(self) -> Self {
        Self { memory_only: true, ..self }
    }

    /// Its MSR is read-only.
    pub const fn msr_read_only(self) -> Self {
        Self { msr_read_only: true, ..self }
    }

    /// It is an MSR only.
    pub const fn msr_only(self) -> Self {
        Self { msr_only: true, ..self }
    }

    /// It cannot be read.
    pub const fn write_only(self) -> Self {
        Self { write_only: true, ..self }
    }
}

/// Registers are in ascending order, each on a multiple of `step`, and none overlaps the next. For a const assertion.
pub const fn is_sorted<D: Device>(regs: &[Reg<D>], step: u32) -> bool {
    let mut at = 0;
    while at < regs.len() {
        if !regs[at].offset.is_multiple_of(step) || regs[at].count == 0 {
            return false;
        }
        if at > 0 && regs[at - 1].offset + regs[at - 1].count * step > regs[at].offset {
            return false;
        }
        at += 1;
    }
    true
}

/// The register at `offset`.
pub fn find<D: Device>(regs: &'static [Reg<D>], step: u32, offset: u32) -> Option<&'static Reg<D>> {
    let after = regs.partition_point(|reg| reg.offset <= offset);
    let reg = regs[..after].last()?;
    (offset.is_multiple_of(step) && offset < reg.offset + reg.count * step).then_some(reg)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl Device for Nothing {
        type Bus = ();
    }

    const REGS: &[Reg<Nothing>] = &[reg(0x10, "A", 1, 2).times(2), reg(0x40, "B", 3, 4)];
    const _: () = assert!(is_sorted(REGS, 0x10));

    #[test]
    fn registers_are_found_where_they_are() {
        let name = |offset| find(REGS, 0x10, offset).map(|reg| reg.name);
        assert_eq!([name(0), name(0x10), name(0x20), name(0x24)], [None, Some("A"), Some("A"), None]);
        assert_eq!([name(0x30), name(0x40), name(0x50)], [None, Some("B"), None]);
    }

    #[test]
    fn overlap_and_disorder_are_seen() {
        assert!(!is_sorted::<Nothing>(&[reg(0x10, "A", 0, 0).times(2), reg(0x20, "B", 0, 0)], 0x10));
        assert!(!is_sorted::<Nothing>(&[reg(0x20, "A", 0, 0), reg(0x10, "B", 0, 0)], 0x10));
        assert!(!is_sorted::<Nothing>(&[reg(0x14, "A", 0, 0)], 0x10));
    }
}
