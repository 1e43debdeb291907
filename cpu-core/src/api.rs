//! Single pieces of state that the KVM layer reads or loads often.

use crate::cpu::Cpu;
use crate::state::{Seg, Variant};

impl Cpu {
    /// Linear address of the next instruction.
    pub fn linear_rip(&self) -> u64 {
        self.seg_base[Seg::Cs as usize].wrapping_add(self.rip)
    }

    /// RIP of the instruction that the last [`crate::Exit::Mmio`] is of; that of a write is over.
    pub fn mmio_rip(&self) -> u64 {
        self.mmio.rip
    }

    /// Device accesses of an instruction were answered that it still has to be run with.
    pub fn is_inside_instruction(&self) -> bool {
        !self.mmio.answered.is_empty() || !self.io_elements.is_empty()
    }

    /// Task priority, bits 3:0.
    pub fn cr8(&self) -> u64 {
        self.cr8
    }

    /// Loads the task priority; the caller has checked that it is below 16.
    pub fn set_cr8(&mut self, value: u64) {
        self.cr8 = value;
    }

    /// Makes the CPU differ as its VMM expects.
    pub fn set_variant(&mut self, variant: Variant) {
        self.variant = variant;
    }

    /// Sets MAXPHYADDR, bits. Translations made with another width go.
    pub fn set_phys_bits(&mut self, bits: u8) {
        if self.phys_bits != bits {
            self.phys_bits = bits;
            self.flush_tlb();
        }
    }
}
