//! INVPCID. SDM Vol. 2 "INVPCID": its types, what each takes out of the TLB, its faults.

use super::*;
use crate::state::CpuidEntry;
use x86_defs::cpuid;

/// A page of which the VMM changes the translation behind the TLB's back.
const LA: u64 = 0x4000_0000;
const DESCRIPTOR: u64 = 0x7_1000;
const PCID: u64 = 5;

/// Reads LA, halts; reads it again behind INVPCID. `rax` is the type.
fn guest(kind: u64, pcid: u64, la: u64) -> Guest {
    let mut guest = Guest::new(0, |a| {
        a.mov(rbx, qword_ptr(rsi)).unwrap();
        a.hlt().unwrap();
        a.invpcid(rax, xmmword_ptr(rdi)).unwrap();
        a.mov(rbx, qword_ptr(rsi)).unwrap();
    });
    guest.0.write(DESCRIPTOR, &pcid.to_le_bytes());
    guest.0.write(DESCRIPTOR + 8, &la.to_le_bytes());
    map(&mut guest, 0x10_0000);
    guest.0.write(0x10_0000, &1u64.to_le_bytes());
    guest.0.write(0x20_0000, &2u64.to_le_bytes());
    let cpu = &mut guest.0.cpu;
    cpu.cr4 |= Cr4::PCIDE;
    cpu.cr3 |= PCID;
    for (register, value) in [(Gpr::Rax, kind), (Gpr::Rsi, LA), (Gpr::Rdi, DESCRIPTOR)] {
        cpu.set_reg(register, value);
    }
    cpu.flush_tlb();
    cpu.derive();
    guest
}

/// LA's 2 MiB lie at `gpa`, which is the third entry behind the first GiB.
fn map(guest: &mut Guest, gpa: u64) {
    let pdpt = guest.quad(guest.0.cpu.cr3 & !0xfff) & !0xfff;
    let (directory, table) = (0x30_0000u64, 0x30_1000u64);
    guest.0.write(pdpt + 8, &(directory | 7).to_le_bytes());
    guest.0.write(directory, &(table | 7).to_le_bytes());
    guest.0.write(table, &(gpa | 7).to_le_bytes());
}

#[test]
fn each_type_takes_out_what_it_names() {
    for (kind, pcid, la) in [(0, PCID, LA), (1, PCID, 0), (2, 0, 0), (3, 0, 0), (2, u64::MAX, NON_CANONICAL)] {
        let mut guest = guest(kind, pcid, la);
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        assert_eq!(guest.0.cpu.reg(Gpr::Rbx), 1);
        map(&mut guest, 0x20_0000);
        assert_eq!(guest.run(), Done);
        assert_eq!(guest.0.cpu.reg(Gpr::Rbx), 2, "type {kind}");
    }
}

#[test]
fn what_does_not_exist_is_refused() {
    let table = [
        ("type", 4, PCID, LA),
        ("type", 1 << 32, PCID, LA),
        ("reserved bits", 0, 1 << 12, LA),
        ("reserved bits", 1, 1 << 63, LA),
        ("address", 0, PCID, NON_CANONICAL),
    ];
    for (what, kind, pcid, la) in table {
        let mut guest = guest(kind, pcid, la);
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        assert!(matches!(guest.run(), Event(GP, Some(0), _)), "{what}");
    }
    // Without CR4.PCIDE there is PCID 0 only.
    for (pcid, good) in [(0, true), (PCID, false)] {
        let mut guest = guest(1, pcid, 0);
        guest.0.cpu.cr4 -= Cr4::PCIDE;
        guest.0.cpu.cr3 &= !0xfff;
        assert_eq!(guest.0.cpu.run(), Exit::Hlt);
        assert_eq!(guest.run() == Done, good, "PCID {pcid}");
    }
}

#[test]
fn level_and_cpuid_decide() {
    let code = |a: &mut CodeAssembler| a.invpcid(rax, xmmword_ptr(rdi)).unwrap();
    assert_eq!(run(3, code), Event(GP, Some(0), 0));
    let mut guest = Guest::new(0, code);
    guest.0.cpu.set_cpuid(&[CpuidEntry { function: cpuid::INVPCID.leaf, index: Some(0), regs: [0; 4] }]);
    assert_eq!(guest.run(), Event(UD, None, 0));
    // The descriptor is 16 bytes of memory.
    let mut guest = Guest::new(0, code);
    guest.0.cpu.set_reg(Gpr::Rdi, 0x5000_0000);
    assert_eq!(guest.run(), Event(PF, Some(0), 0));
}
