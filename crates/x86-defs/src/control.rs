//! Control, flags and debug registers. SDM Vol. 3 "Control Registers", "Extended Feature Enable Register", "Debug
//! Registers"; Vol. 1 "EFLAGS Register" and "XSAVE-Supported Features and State-Component Bitmaps".

use bitflags::bitflags;

bitflags! {
    /// CR0.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr0: u64 {
        /// Protection enable.
        const PE = 1 << 0;
        /// Monitor coprocessor.
        const MP = 1 << 1;
        /// Emulation.
        const EM = 1 << 2;
        /// Task switched.
        const TS = 1 << 3;
        /// Extension type; always 1.
        const ET = 1 << 4;
        /// Numeric error.
        const NE = 1 << 5;
        /// Write protect.
        const WP = 1 << 16;
        /// Alignment mask.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
    }

    /// CR4.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr4: u64 {
        /// Virtual-8086 mode extensions.
        const VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// Time stamp disable.
        const TSD = 1 << 2;
        /// Debugging extensions.
        const DE = 1 << 3;
        /// Page size extensions.
        const PSE = 1 << 4;
        /// Physical address extension.
        const PAE = 1 << 5;
        /// Machine-check enable.
        const MCE = 1 << 6;
        /// Page global enable.
        const PGE = 1 << 7;
        /// Performance-monitoring counter enable.
        const PCE = 1 << 8;
        /// Operating system support for FXSAVE and FXRSTOR.
        const OSFXSR = 1 << 9;
        /// Operating system support for unmasked SIMD floating-point exceptions.
        const OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        const UMIP = 1 << 11;
        /// 57-bit linear addresses.
        const LA57 = 1 << 12;
        /// VMX enable.
        const VMXE = 1 << 13;
        /// SMX enable.
        const SMXE = 1 << 14;
        /// FSGSBASE enable.
        const FSGSBASE = 1 << 16;
        /// PCID enable.
        const PCIDE = 1 << 17;
        /// XSAVE and processor extended states enable.
        const OSXSAVE = 1 << 18;
        /// Key locker enable.
        const KL = 1 << 19;
        /// Supervisor-mode execution prevention.
        const SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        const SMAP = 1 << 21;
        /// Protection keys for user-mode pages.
        const PKE = 1 << 22;
        /// Control-flow enforcement technology.
        const CET = 1 << 23;
        /// Protection keys for supervisor-mode pages.
        const PKS = 1 << 24;
        /// User interrupts.
        const UINTR = 1 << 25;
        /// Linear-address-space separation.
        const LASS = 1 << 27;
        /// Supervisor linear-address masking.
        const LAM_SUP = 1 << 28;
    }

    /// The bits of CR3 that are not the address of the paging structure.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr3: u64 {
        /// Page-level write-through; no such bit while CR4.PCIDE = 1.
        const PWT = 1 << 3;
        /// Page-level cache disable; no such bit while CR4.PCIDE = 1.
        const PCD = 1 << 4;
        /// Process-context identifier, while CR4.PCIDE = 1.
        const PCID = 0xfff;
        /// LAM for user addresses, 57 bits.
        const LAM_U57 = 1 << 61;
        /// LAM for user addresses, 48 bits.
        const LAM_U48 = 1 << 62;
        /// In the operand of MOV to CR3 with CR4.PCIDE = 1: keep the TLB entries of that PCID. Never stored.
        const NO_FLUSH = 1 << 63;
    }

    /// IA32_EFER.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Efer: u64 {
        /// SYSCALL enable.
        const SCE = 1 << 0;
        /// IA-32e mode enable.
        const LME = 1 << 8;
        /// IA-32e mode active.
        const LMA = 1 << 10;
        /// Execute-disable enable.
        const NXE = 1 << 11;
        /// Secure virtual machine enable (AMD).
        const SVME = 1 << 12;
        /// Long mode segment limit enable (AMD).
        const LMSLE = 1 << 13;
        /// Fast FXSAVE/FXRSTOR (AMD).
        const FFXSR = 1 << 14;
    }

    /// RFLAGS.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Rflags: u64 {
        /// Carry.
        const CF = 1 << 0;
        /// Reserved, always 1.
        const FIXED = 1 << 1;
        /// Parity.
        const PF = 1 << 2;
        /// Auxiliary carry.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Trap.
        const TF = 1 << 8;
        /// Interrupt enable.
        const IF = 1 << 9;
        /// Direction.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// I/O privilege level, two bits.
        const IOPL = 3 << 12;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, access control.
        const AC = 1 << 18;
        /// Virtual interrupt.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// Identification.
        const ID = 1 << 21;
    }

    /// DR6. Bits 11 and 16 are active low.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Dr6: u64 {
        /// Breakpoint 0 condition detected.
        const B0 = 1 << 0;
        /// Breakpoint 1 condition detected.
        const B1 = 1 << 1;
        /// Breakpoint 2 condition detected.
        const B2 = 1 << 2;
        /// Breakpoint 3 condition detected.
        const B3 = 1 << 3;
        /// Clear: a bus lock was detected.
        const BLD = 1 << 11;
        /// Debug-register access detected.
        const BD = 1 << 13;
        /// Single step.
        const BS = 1 << 14;
        /// Task switch.
        const BT = 1 << 15;
        /// Clear: inside a transactional region.
        const RTM = 1 << 16;
    }

    /// DR7, without the two-bit fields R/W0–3 and LEN0–3, see [`Dr7::rw`] and [`Dr7::len`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Dr7: u64 {
        /// Local enable of breakpoint 0.
        const L0 = 1 << 0;
        /// Global enable of breakpoint 0.
        const G0 = 1 << 1;
        /// Local enable of breakpoint 1.
        const L1 = 1 << 2;
        /// Global enable of breakpoint 1.
        const G1 = 1 << 3;
        /// Local enable of breakpoint 2.
        const L2 = 1 << 4;
        /// Global enable of breakpoint 2.
        const G2 = 1 << 5;
        /// Local enable of breakpoint 3.
        const L3 = 1 << 6;
        /// Global enable of breakpoint 3.
        const G3 = 1 << 7;
        /// Local exact breakpoint enable.
        const LE = 1 << 8;
        /// Global exact breakpoint enable.
        const GE = 1 << 9;
        /// Reserved, always 1.
        const FIXED = 1 << 10;
        /// Restricted transactional memory.
        const RTM = 1 << 11;
        /// General detect enable.
        const GD = 1 << 13;
    }

    /// XCR0, and the state-component bitmaps in an XSAVE area and IA32_XSS.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct XCr0: u64 {
        /// x87 state; always 1 in XCR0.
        const X87 = 1 << 0;
        /// SSE state: XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// AVX state: upper halves of the YMM registers.
        const AVX = 1 << 2;
        /// MPX bound registers.
        const BNDREGS = 1 << 3;
        /// MPX bound configuration and status.
        const BNDCSR = 1 << 4;
        /// AVX-512 opmask registers.
        const OPMASK = 1 << 5;
        /// Upper halves of ZMM0–ZMM15.
        const ZMM_HI256 = 1 << 6;
        /// ZMM16–ZMM31.
        const HI16_ZMM = 1 << 7;
        /// Processor trace (IA32_XSS).
        const PT = 1 << 8;
        /// PKRU.
        const PKRU = 1 << 9;
        /// CET user state (IA32_XSS).
        const CET_U = 1 << 11;
        /// CET supervisor state (IA32_XSS).
        const CET_S = 1 << 12;
        /// AMX tile configuration.
        const TILECFG = 1 << 17;
        /// AMX tile data.
        const TILEDATA = 1 << 18;
    }
}

impl Cr0 {
    /// After power-up, reset and INIT (INIT keeps CD and NW). SDM Vol. 3 "IA-32 and Intel 64 Processor States Following
    /// Power-up, Reset, or INIT".
    pub const RESET: Self = Self::CD.union(Self::NW).union(Self::ET);
}

impl Rflags {
    /// After reset.
    pub const RESET: Self = Self::FIXED;
    /// The six status flags.
    pub const STATUS: Self = Self::CF.union(Self::PF).union(Self::AF).union(Self::ZF).union(Self::SF).union(Self::OF);
    /// Shift of the IOPL field.
    pub const IOPL_SHIFT: u32 = 12;

    /// I/O privilege level, 0 to 3.
    #[inline]
    pub const fn iopl(self) -> u8 {
        (self.bits() >> Self::IOPL_SHIFT & 3) as u8
    }
}

impl Dr6 {
    /// After reset: every reserved and active-low bit set.
    pub const RESET: u64 = 0xffff_0ff0;
    /// Bits that read as 1 whatever was written, without RTM and bus-lock detection.
    pub const FIXED_1: u64 = 0xffff_0ff0;
    /// All four breakpoint conditions.
    pub const B: Self = Self::B0.union(Self::B1).union(Self::B2).union(Self::B3);
}

/// What a breakpoint watches: R/W0–3 of DR7. SDM Vol. 3 "Debug Control Register (DR7)".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BreakpointKind {
    /// Instruction execution.
    Execute = 0,
    /// Data writes.
    Write = 1,
    /// I/O reads and writes while CR4.DE = 1, otherwise undefined.
    Io = 2,
    /// Data reads and writes, not instruction fetches.
    ReadWrite = 3,
}

impl Dr7 {
    /// After reset.
    pub const RESET: u64 = 0x400;
    /// All L and G bits.
    pub const ENABLES: u64 = 0xff;

    /// R/Wn: what breakpoint `n` (0 to 3) watches.
    #[inline]
    pub const fn rw(dr7: u64, n: u32) -> BreakpointKind {
        match dr7 >> (16 + 4 * n) & 3 {
            0 => BreakpointKind::Execute,
            1 => BreakpointKind::Write,
            2 => BreakpointKind::Io,
            _ => BreakpointKind::ReadWrite,
        }
    }

    /// LENn in bytes: 1, 2, 4 or 8.
    #[inline]
    pub const fn len(dr7: u64, n: u32) -> u64 {
        match dr7 >> (18 + 4 * n) & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        }
    }

    /// Whether Ln or Gn is set.
    #[inline]
    pub const fn enabled(dr7: u64, n: u32) -> bool {
        dr7 >> (2 * n) & 3 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dr7_fields() {
        let dr7 = 0x400 | 1 << 0 | 1 << 7 | 1 << 16 | 3 << 18 | 3 << 28 | 2 << 30;
        assert_eq!((Dr7::rw(dr7, 0), Dr7::len(dr7, 0), Dr7::enabled(dr7, 0)), (BreakpointKind::Write, 4, true));
        assert_eq!((Dr7::rw(dr7, 3), Dr7::len(dr7, 3), Dr7::enabled(dr7, 3)), (BreakpointKind::ReadWrite, 8, true));
        assert_eq!((Dr7::rw(dr7, 1), Dr7::len(dr7, 1), Dr7::enabled(dr7, 1)), (BreakpointKind::Execute, 1, false));
    }

    #[test]
    fn iopl_is_bits_13_to_12() {
        assert_eq!(Rflags::from_bits_retain(0x3002).iopl(), 3);
        assert_eq!(Rflags::from_bits_retain(0x1fd7).iopl(), 1);
    }

    #[test]
    fn reset_values() {
        assert_eq!(Cr0::RESET.bits(), 0x6000_0010);
        assert_eq!(Rflags::STATUS.bits(), 0x8d5);
    }
}
