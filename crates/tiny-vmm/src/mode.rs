//! The modes that a guest can start in, as `kvm_sregs`.

use kvm_bindings::{kvm_segment, kvm_sregs};
use memmap2::MmapMut;
use x86_defs::{Cr0, Cr4, Efer, pte};

/// How the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit real-address mode, all segment bases 0.
    Real,
    /// 32-bit protected mode, flat segments, no paging, CPL 0.
    Protected,
    /// 64-bit mode, the first GiB mapped one to one, CPL 0.
    Long,
}

/// The paging structures of long mode, below the first MiB and above the stack.
const PML4: u64 = 0x9_0000;
const PDPT: u64 = 0x9_1000;
const PAGE_DIRECTORY: u64 = 0x9_2000;
/// Bytes mapped by one entry of the page directory.
const LARGE_PAGE: u64 = 2 << 20;

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 3] = [Mode::Real, Mode::Protected, Mode::Long];

    /// The default operand size, as an assembler wants it.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Protected => 32,
            Mode::Long => 64,
        }
    }

    /// Changes a fresh vCPU's `sregs`, and puts into `ram` what they point to.
    pub(crate) fn enter(self, sregs: &mut kvm_sregs, ram: &mut MmapMut) {
        sregs.idt.limit = 0;
        if self == Mode::Real {
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
            return;
        }
        // Type: code, executable and readable, accessed; data, writable, accessed. SDM Vol. 3 "Segment Descriptors".
        let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, db: 1, ..Default::default() };
        let data = kvm_segment { type_: 3, selector: 0x10, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        let long = u8::from(self == Mode::Long);
        sregs.cs = kvm_segment { type_: 11, selector: 0x08, l: long, db: 1 - long, ..flat };
        sregs.cr0 |= Cr0::PE.bits();
        if self == Mode::Long {
            map_one_to_one(ram);
            sregs.cr3 = PML4;
            sregs.cr4 |= Cr4::PAE.bits();
            sregs.cr0 |= Cr0::PG.bits();
            sregs.efer |= (Efer::LME | Efer::LMA).bits();
        }
    }
}

fn map_one_to_one(ram: &mut MmapMut) {
    let mut put = |at: u64, entry: u64| {
        let at = usize::try_from(at).expect("below 1 MiB");
        ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    let bits = pte::P | pte::RW;
    put(PML4, PDPT | bits);
    put(PDPT, PAGE_DIRECTORY | bits);
    for i in 0..512 {
        put(PAGE_DIRECTORY + 8 * i, (LARGE_PAGE * i) | bits | pte::PS);
    }
}
