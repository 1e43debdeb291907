//! Choices that a virtual machine has where the manual leaves them to the VMM, or where its VMM expects another processor.

/// How one CPU differs from others. The default is what today's KVM shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// EFER's SCE, LME, LMA and NXE and CR4's bits 10:0 may be set whatever CPUID offers.
    pub ungated_controls: bool,
    /// CPUID looks at EAX alone and shows the table as it was given. A leaf that is missing shows the highest one of its
    /// half (bit 31 clear or set).
    pub plain_cpuid: bool,
    /// A device is accessed in 1, 2, 4 or 8 bytes only: the 3, 5, 6 or 7 that a page end leaves of an access are several.
    pub natural_mmio: bool,
    /// Most bytes that one exit of INS asks for, and one of OUTS hands over. None goes beyond a page of memory.
    pub ins_bytes: u16,
    /// See [`Self::ins_bytes`]; an exit has one element at least.
    pub outs_bytes: u16,
}

impl Default for Variant {
    /// INS: as Linux's emulator reads ahead (`pio_in_emulated`). OUTS: element by element.
    fn default() -> Self {
        Self { ungated_controls: false, plain_cpuid: false, natural_mmio: false, ins_bytes: 1024, outs_bytes: 0 }
    }
}
