//! Arbitrary code, decoded to traces and run in every mode that has a decoder of its own. `cargo xtask fuzz trace`.
#![no_main]

use std::sync::Arc;

use cpu_core::{Cpu, HostPlatform, Poll, Seg};
use libfuzzer_sys::fuzz_target;
use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr};

const RAM: u64 = 1 << 16;
const CODE: u64 = 0x8000;
/// Page tables that map the first gigabyte to itself.
const TABLES: [(u64, u64); 3] = [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x83)];

/// Runs `code`: 16-bit code in real mode, 16-, 32- and 64-bit code in protected mode.
fn run(mode: u8, code: &[u8]) {
    let mapping = Mapping::create("trace", RAM).expect("a memfd");
    let memory = Arc::new(Memory::new());
    let mut cpu = Cpu::new(memory.clone(), Box::new(HostPlatform::default()), 40);
    let backing = Backing::new(mapping.clone(), 0);
    let flags = SlotFlags::default();
    let spec = SlotSpec { id: 0, gpa: GuestPhysAddr(0), len: RAM, flags, userspace_addr: 0, backing };
    memory.set_slot(spec).expect("an empty VM takes a slot");
    for (at, entry) in TABLES {
        mapping.write(at, &entry.to_le_bytes()).expect("inside");
    }
    mapping.write(CODE, &code[..code.len().min((RAM - CODE) as usize)]).expect("inside");
    cpu.set_xcr0(7);
    let mut sregs = cpu.sregs();
    sregs.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
    if mode > 0 {
        sregs.cr0 |= Cr0::PE;
    }
    if mode == 3 {
        sregs.cr0 |= Cr0::PG;
        sregs.cr3 = 0x1000;
        sregs.cr4 |= Cr4::PAE;
        sregs.efer = Efer::LME | Efer::LMA;
    }
    for segment in &mut sregs.segments {
        (segment.selector, segment.base) = (0, 0);
        if mode > 0 {
            (segment.limit, segment.g) = (0xffff_ffff, true);
        }
    }
    let cs = &mut sregs.segments[Seg::Cs as usize];
    (cs.db, cs.l) = (mode == 2, mode == 3);
    cpu.set_sregs(&sregs);
    let mut regs = cpu.regs();
    (regs.rip, regs.gpr[4]) = (CODE, CODE);
    cpu.set_regs(&regs);
    let mut asked = 0;
    let mut stop = || {
        asked += 1;
        asked > 1
    };
    cpu.run_polled(Poll { every: std::time::Duration::ZERO, stop: &mut stop });
}

fuzz_target!(|code: &[u8]| {
    for mode in 0..4 {
        run(mode, code);
    }
});
