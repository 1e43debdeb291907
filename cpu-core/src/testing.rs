//! Small machines for unit tests: RAM from 0, code at [`CODE`], a CPU in the mode that the test asks for.

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr};

use crate::cpu::Cpu;
use crate::platform::HostPlatform;
use crate::state::{Seg, Segment};
use crate::vmx::Exit;

/// Where [`Machine::new_64bit`] and [`Machine::new_real`] put code.
pub(crate) const CODE: u64 = 0x1000;
/// Bytes of RAM.
pub(crate) const RAM: u64 = 16 << 20;
const PML4: u64 = 0x8_0000;

/// A CPU with RAM.
pub(crate) struct Machine {
    pub(crate) cpu: Box<Cpu>,
    pub(crate) memory: Arc<Memory>,
}

impl Machine {
    fn new() -> Self {
        let memory = Arc::new(Memory::new());
        let mapping = Mapping::create("test", RAM).expect("a memfd");
        let backing = Backing::new(mapping, 0);
        let flags = SlotFlags::default();
        let spec = SlotSpec { id: 0, gpa: GuestPhysAddr(0), len: RAM, flags, userspace_addr: 0, backing };
        memory.set_slot(spec).expect("an empty VM takes a slot");
        let cpu = Cpu::new(memory.clone(), Box::new(HostPlatform::default()), 40);
        Self { cpu, memory }
    }

    /// Writes guest RAM as the VMM would.
    pub(crate) fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.cpu.view.write(GuestPhysAddr(gpa), bytes).expect("inside RAM");
    }

    /// Reads guest RAM.
    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.cpu.view.read(GuestPhysAddr(gpa), &mut bytes).expect("inside RAM");
        bytes
    }

    fn load(mut self, bitness: u32, assemble: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut a = CodeAssembler::new(bitness).expect("16, 32 or 64");
        assemble(&mut a);
        let code = a.assemble(CODE).expect("encodable");
        self.write(CODE, &code);
        self.cpu.rip = CODE;
        self
    }

    /// Real mode, all segments at 0.
    pub(crate) fn new_real(assemble: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Self::new();
        machine.cpu.seg = [Segment::real_mode(0); 6];
        machine.cpu.seg[Seg::Cs as usize].type_ = 0xb;
        machine.cpu.gpr[4] = 0x7000;
        machine.cpu.derive();
        machine.load(16, assemble)
    }

    /// 32-bit protected mode at CPL 0 without paging, flat segments, no descriptor tables.
    pub(crate) fn new_32bit(assemble: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Self::new();
        let cpu = &mut machine.cpu;
        cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
        let flat = Segment { limit: u32::MAX, g: true, db: true, selector: 0x10, ..Segment::real_mode(0) };
        cpu.seg = [Segment { base: 0, ..flat }; 6];
        cpu.seg[Seg::Cs as usize] = Segment { base: 0, type_: 0xb, selector: 8, ..flat };
        cpu.gpr[4] = 0x7_0000;
        cpu.derive();
        machine.load(32, assemble)
    }

    /// 64-bit mode at CPL 0, the first GiB identity-mapped with 2-MByte pages, stack below 0x7_0000.
    pub(crate) fn new_64bit(assemble: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut machine = Self::new();
        machine.write(PML4, &(PML4 + 0x1007).to_le_bytes());
        machine.write(PML4 + 0x1000, &(PML4 + 0x2007).to_le_bytes());
        for i in 0..512u64 {
            machine.write(PML4 + 0x2000 + 8 * i, &(i << 21 | 0x87).to_le_bytes());
        }
        let cpu = &mut machine.cpu;
        cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::NE | Cr0::MP;
        cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        cpu.efer = Efer::LME | Efer::LMA | Efer::SCE | Efer::NXE;
        cpu.cr3 = PML4;
        let flat = Segment { limit: u32::MAX, g: true, db: true, selector: 0x10, ..Segment::real_mode(0) };
        cpu.seg = [Segment { base: 0, ..flat }; 6];
        cpu.seg[Seg::Cs as usize] = Segment { base: 0, type_: 0xb, l: true, db: false, selector: 8, ..flat };
        cpu.gpr[4] = 0x7_0000;
        cpu.flush_tlb();
        cpu.derive();
        machine.load(64, assemble)
    }
}

/// Runs one instruction; the vector of its fault.
pub(crate) fn step(machine: &mut Machine) -> Option<u8> {
    machine.cpu.set_exception_bitmap(!0);
    match machine.cpu.step() {
        None => None,
        Some(Exit::Exception { vector, .. }) => Some(vector),
        Some(other) => panic!("{other:?}"),
    }
}
