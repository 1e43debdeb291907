//! Extensions that user mode of the host cannot show: protection keys, 57-bit addresses, direct stores, time and randomness,
//! and who may execute what. Expectations are the SDM's: Vol. 2, the page of each mnemonic; Vol. 3, chapter "Paging".

use iced_x86::code_asm::*;
use x86_defs::vector::{GP, PF, UD};
use x86_defs::{Cr0, Cr4, cpuid, msr};

use super::Seen::{self, Done, Event};
use super::long::{Guest, NON_CANONICAL, Named, TSS, run};
use crate::state::{CpuidEntry, Gpr};

/// Of the guest's page directory, whose entries map 2 MBytes each.
const PAGE_DIRECTORY: u64 = 0x8_2000;
const PML4: u64 = 0x8_0000;
const PML5: u64 = 0x8_8000;
/// Where pages of protection key 1 begin.
const KEYED: u64 = 0x40_0000;

fn keyed_guest(cpl: u8, pkru: u32, assemble: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut guest = Guest::new(cpl, assemble);
    guest.0.write(PAGE_DIRECTORY + 8 * (KEYED >> 21), &(KEYED | 1 << 59 | 0x87).to_le_bytes());
    let cpu = &mut guest.0.cpu;
    cpu.cr4 |= Cr4::PKE;
    cpu.fpu_mut().pkru = pkru;
    cpu.set_reg(Gpr::Rbx, KEYED);
    cpu.derive();
    guest
}

#[test]
fn protection_keys_stop_data_accesses_and_nothing_else() {
    let load: fn(&mut CodeAssembler) = |a| a.mov(eax, dword_ptr(rbx)).unwrap();
    let store: fn(&mut CodeAssembler) = |a| a.mov(dword_ptr(rbx), eax).unwrap();
    let jump: fn(&mut CodeAssembler) = |a| a.jmp(rbx).unwrap();
    // "Protection Keys": ADi stops reads and writes; WDi stops user writes, and supervisor's where CR0.WP is set.
    let (ad, wd, other) = (1 << 2, 1 << 3, !0xf);
    for (pkru, wp, cpl, code, error) in [
        (other, false, 3, load, None),
        (other, false, 3, store, None),
        (ad, false, 3, load, Some(0x25)),
        (ad, false, 3, store, Some(0x27)),
        (ad, false, 0, load, Some(0x21)),
        (ad, false, 0, store, Some(0x23)),
        (wd, false, 3, load, None),
        (wd, false, 3, store, Some(0x27)),
        (wd, false, 0, store, None),
        (wd, true, 0, store, Some(0x23)),
        (!3, true, 3, jump, None),
    ] {
        let mut guest = keyed_guest(cpl, pkru, code);
        guest.0.write(KEYED, &[0xcd, 0x80]);
        guest.0.cpu.cr0.set(Cr0::WP, wp);
        let expected = error.map_or(Done, |error| Event(PF, Some(error), 0));
        assert_eq!(guest.run(), expected, "PKRU {pkru:#x} WP {wp} CPL {cpl}");
        if expected != Done {
            assert_eq!(guest.0.cpu.cr2, KEYED);
        }
    }
}

#[test]
fn wrpkru_holds_from_the_next_instruction_on() {
    let mut guest = keyed_guest(3, 0, |a| {
        a.mov(esi, dword_ptr(rbx)).unwrap();
        a.mov(dword_ptr(rbx), esi).unwrap();
        a.mov(eax, 1 << 2).unwrap();
        a.wrpkru().unwrap();
        a.rdpkru().unwrap();
        a.mov(esi, dword_ptr(rbx)).unwrap();
    });
    guest.0.cpu.set_reg(Gpr::Rdx, u64::MAX << 32);
    assert_eq!(guest.run(), Event(PF, Some(0x25), 2 + 2 + 5 + 3 + 3));
    assert_eq!((guest.0.cpu.reg(Gpr::Rax), guest.0.cpu.reg(Gpr::Rdx)), (1 << 2, 0));
    // And so does XRSTOR of component 9, with the TLB filled before.
    let mut guest = keyed_guest(3, 0, |a| {
        a.mov(esi, dword_ptr(rbx)).unwrap();
        a.mov(eax, 1 << 9).unwrap();
        a.xrstor(ptr(rdi)).unwrap();
        a.mov(esi, dword_ptr(rbx)).unwrap();
    });
    guest.0.cpu.cr4 |= Cr4::OSXSAVE;
    guest.0.cpu.fpu_mut().xcr0 = 1 << 9 | 3;
    guest.0.cpu.set_reg(Gpr::Rdi, 0x6_0000);
    guest.0.write(0x6_0000 + 512, &(1u64 << 9).to_le_bytes());
    guest.0.write(0x6_0000 + 832, &(1u64 << 2).to_le_bytes());
    let seen = guest.run();
    assert_eq!((seen, guest.0.cpu.fpu.pkru), (Event(PF, Some(0x25), 2 + 5 + 3), 1 << 2));
}

#[test]
fn xsave_stores_pkru() {
    let mut guest = keyed_guest(3, 0xdead_0000, |a| {
        a.mov(eax, 1 << 9).unwrap();
        a.xsave(ptr(rdi)).unwrap();
        a.xsavec(ptr(rdi + 0x400)).unwrap();
    });
    guest.0.cpu.cr4 |= Cr4::OSXSAVE;
    guest.0.cpu.fpu_mut().xcr0 = 1 << 9 | 3;
    guest.0.cpu.set_reg(Gpr::Rdi, 0x6_0000);
    assert_eq!(guest.run(), Done);
    let quad = |at: u64| u64::from_le_bytes(guest.0.read(0x6_0000 + at));
    assert_eq!((quad(512), quad(832)), (1 << 9, 0xdead_0000));
    assert_eq!((quad(0x400 + 512), quad(0x400 + 520), quad(0x400 + 576)), (1 << 9, 1 << 63 | 1 << 9, 0xdead_0000));
}

#[test]
fn pkru_registers_are_checked() {
    let read: fn(&mut CodeAssembler) = |a| a.rdpkru().unwrap();
    let write: fn(&mut CodeAssembler) = |a| a.wrpkru().unwrap();
    assert_eq!((run(3, read), run(3, write)), (Event(UD, None, 0), Event(UD, None, 0)));
    for (code, index, high, expected) in [
        (read, 0, 7, Done),
        (read, 1, 0, Event(GP, Some(0), 0)),
        (read, 1 << 32, 0, Done),
        (write, 0, 0, Done),
        (write, 1, 0, Event(GP, Some(0), 0)),
        (write, 0, 1, Event(GP, Some(0), 0)),
        (write, 0, 1 << 32, Done),
    ] {
        let mut guest = keyed_guest(0, 0, code);
        guest.0.cpu.set_reg(Gpr::Rcx, index);
        guest.0.cpu.set_reg(Gpr::Rdx, high);
        assert_eq!(guest.run(), expected, "{index:#x} {high:#x}");
    }
}

/// A guest with the upper levels that map address bits 56:48, all to the same.
fn la57(assemble: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut guest = Guest::new(0, assemble);
    for entry in [0, 4, 511] {
        guest.0.write(PML5 + 8 * entry, &(PML4 | 7).to_le_bytes());
    }
    guest.0.cpu.cr4 |= Cr4::LA57;
    guest.0.cpu.cr3 = PML5;
    guest.0.cpu.flush_tlb();
    guest
}

/// Canonical with 57 bits alone.
const FAR: u64 = 4 << 48;

#[test]
fn five_levels_translate_57_bits() {
    type Case = (&'static str, fn(&mut CodeAssembler), Seen);
    let wrmsr = Event(GP, Some(0), 0);
    let table: &[Case] = &[
        ("load", |a| a.mov(rax, qword_ptr(rbx)).unwrap(), Event(GP, Some(0), 0)),
        ("store", |a| a.mov(qword_ptr(rbx), rax).unwrap(), Event(GP, Some(0), 0)),
        ("push", |a| a.push(qword_ptr(rbx)).unwrap(), Event(GP, Some(0), 0)),
        ("jump", |a| a.jmp(rbx).unwrap(), Event(GP, Some(0), 0)),
        ("call", |a| a.call(rbx).unwrap(), Event(GP, Some(0), 0)),
        ("WRFSBASE", |a| a.wrfsbase(rbx).unwrap(), Event(GP, Some(0), 0)),
        ("WRMSR", |a| a.wrmsr().unwrap(), wrmsr),
    ];
    for (name, code, with_four) in table {
        for five in [false, true] {
            let mut guest = if five { la57(code) } else { Guest::new(0, code) };
            // The same bytes at all addresses, and an end for those that go there.
            guest.0.write(0x6_0000, &[0xcd, 0x80]);
            let cpu = &mut guest.0.cpu;
            cpu.cr4 |= Cr4::FSGSBASE;
            cpu.set_reg(Gpr::Rbx, FAR + 0x6_0000);
            cpu.set_reg(Gpr::Rcx, msr::IA32_LSTAR.into());
            cpu.set_reg(Gpr::Rax, 0x6_0000);
            cpu.set_reg(Gpr::Rdx, FAR >> 32);
            assert_eq!(guest.run(), if five { Done } else { *with_four }, "{name}, five levels: {five}");
        }
    }
    let mut guest = la57(|a| a.mov(rax, qword_ptr(rbx)).unwrap());
    guest.0.cpu.set_reg(Gpr::Rbx, 1 << 56);
    assert_eq!(guest.run(), Event(GP, Some(0), 0), "not canonical with 57 bits");
    let mut guest = la57(|a| a.mov(rax, qword_ptr(rbx)).unwrap());
    guest.0.cpu.set_reg(Gpr::Rbx, 8 << 48);
    assert_eq!(guest.run(), Event(PF, Some(0), 0), "no PML5 entry");
    assert_eq!(guest.0.cpu.cr2, 8 << 48);
}

#[test]
fn la57_is_chosen_before_long_mode() {
    let mut guest = Guest::new(0, |a| a.mov(cr4, rax).unwrap());
    let now = guest.0.cpu.cr4;
    guest.0.cpu.set_reg(Gpr::Rax, (now | Cr4::LA57).bits());
    assert_eq!(guest.run(), Event(GP, Some(0), 0));
    // A guest that is not offered a feature has no such bit.
    for (bit, feature) in [(Cr4::PKE, cpuid::PKU), (Cr4::UMIP, cpuid::UMIP), (Cr4::FSGSBASE, cpuid::FSGSBASE)] {
        for offered in [false, true] {
            let mut guest = Guest::new(0, |a| a.mov(cr4, rax).unwrap());
            let mut regs = [0, 0, 0, 0];
            regs[feature.register as usize] = if offered { feature.mask() } else { 0 };
            let base = [0, 0, 0, 1 << 3 | 1 << 6 | 1 << 24 | 1 << 25];
            let cpu = &mut guest.0.cpu;
            cpu.set_cpuid(&[
                CpuidEntry { function: 1, index: None, regs: base },
                CpuidEntry { function: feature.leaf, index: Some(0), regs },
            ]);
            cpu.set_reg(Gpr::Rax, (now | bit).bits());
            assert_eq!(guest.run(), if offered { Done } else { Event(GP, Some(0), 0) }, "{feature:?} {offered}");
        }
    }
}

#[test]
fn direct_stores() {
    let mut guest = Guest::new(3, |a| {
        a.movdiri(dword_ptr(rdi), eax).unwrap();
        a.movdiri(qword_ptr(rdi + 8), rax).unwrap();
        a.movdir64b(rcx, ptr(rsi + 1)).unwrap();
    });
    let source: [u8; 64] = std::array::from_fn(|i| i as u8 ^ 0xa5);
    guest.0.write(0x6_0001, &source);
    for (register, value) in [(Gpr::Rdi, 0x6_1001), (Gpr::Rax, 0x1122_3344_5566_7788), (Gpr::Rcx, 0x6_2040)] {
        guest.0.cpu.set_reg(register, value);
    }
    guest.0.cpu.set_reg(Gpr::Rsi, 0x6_0000);
    assert_eq!(guest.run(), Done);
    assert_eq!(
        guest.0.read(0x6_1001),
        [0x88, 0x77, 0x66, 0x55, 0, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
    );
    assert_eq!(guest.0.read(0x6_2040), source);
    for (to, from, expected) in [
        (0x6_2020, 0x6_0000, Event(GP, Some(0), 0)),
        (0x6_2000, NON_CANONICAL, Event(GP, Some(0), 0)),
        (NON_CANONICAL, 0x6_0000, Event(GP, Some(0), 0)),
        (0x4000_0000, 0x6_0000, Event(PF, Some(6), 0)),
        (0x6_2000, 0x4000_0000, Event(PF, Some(4), 0)),
    ] {
        let mut guest = Guest::new(3, |a| a.movdir64b(rcx, ptr(rsi)).unwrap());
        guest.0.cpu.set_reg(Gpr::Rcx, to);
        guest.0.cpu.set_reg(Gpr::Rsi, from);
        assert_eq!(guest.run(), expected, "{to:#x} ← {from:#x}");
    }
}

#[test]
fn randomness_comes_with_carry_and_in_the_operands_width() {
    const STATUS: u64 = 0x8d5;
    type Two = fn(&mut CodeAssembler);
    let table: [(Two, u64); 4] = [
        (|a| a.rdrand(ax).and(a.rdrand(bx)).unwrap(), 0xffff),
        (|a| a.rdrand(eax).and(a.rdrand(ebx)).unwrap(), u64::MAX),
        (|a| a.rdseed(rax).and(a.rdseed(rbx)).unwrap(), u64::MAX),
        (|a| a.rdseed(r8w).and(a.rdseed(ax)).unwrap(), 0xffff),
    ];
    for (code, width) in table {
        let mut guest = Guest::new(3, code);
        let before = 0x5555_5555_5555_5555;
        guest.0.cpu.set_reg(Gpr::Rax, before);
        guest.0.cpu.set_rflags(2 | STATUS);
        assert_eq!(guest.run(), Done);
        let after = guest.0.cpu.reg(Gpr::Rax);
        assert!(after != before && (after ^ before) & !width == 0, "{after:#x}");
        // The flags are in the frame of INT 80H.
        let frame: [u64; 3] =
            std::array::from_fn(|i| u64::from_le_bytes(guest.0.read(guest.0.cpu.reg(Gpr::Rsp) + 8 * i as u64)));
        assert_eq!(frame[2] & STATUS, 1, "CF alone");
    }
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..16 {
        let mut guest = Guest::new(0, |a| a.rdrand(rax).unwrap());
        assert_eq!(guest.run(), Done);
        seen.insert(guest.0.cpu.reg(Gpr::Rax));
    }
    assert_eq!(seen.len(), 16);
}

#[test]
fn rdtscp_and_rdpid_tell_tsc_aux() {
    let mut guest = Guest::new(3, |a| {
        a.rdtscp().unwrap();
        a.rdpid(rbx).unwrap();
    });
    guest.0.cpu.msrs.tsc_aux = 0x1234_5678;
    for register in [Gpr::Rax, Gpr::Rbx, Gpr::Rcx, Gpr::Rdx] {
        guest.0.cpu.set_reg(register, u64::MAX);
    }
    assert_eq!(guest.run(), Done);
    let cpu = &guest.0.cpu;
    assert_eq!((cpu.reg(Gpr::Rcx), cpu.reg(Gpr::Rbx)), (0x1234_5678, 0x1234_5678));
    assert!(cpu.reg(Gpr::Rax) >> 32 == 0 && cpu.reg(Gpr::Rdx) >> 32 == 0);
    let mut guest = Guest::new(3, |a| a.rdtscp().unwrap());
    guest.0.cpu.cr4 |= Cr4::TSD;
    assert_eq!(guest.run(), Event(GP, Some(0), 0));
    let leaf = CpuidEntry { function: 0, index: None, regs: [0; 4] };
    for code in [|a: &mut CodeAssembler| a.rdtscp().unwrap(), |a: &mut CodeAssembler| a.rdpid(rbx).unwrap()] {
        let mut guest = Guest::new(3, code);
        guest.0.cpu.set_cpuid(&[leaf]);
        assert_eq!(guest.run(), Event(UD, None, 0), "not offered");
    }
}

/// KVM's guests run with CR0.NE set whatever they write (SDM Vol. 3 "VMX-Fixed Bits in CR0"): no FERR#, no deferral to an
/// interrupt controller.
#[test]
fn x87_exceptions_are_mf_with_and_without_ne() {
    for ne in [false, true] {
        let mut guest = Guest::new(3, |a| {
            a.fninit().unwrap();
            a.fldcw(word_ptr(rdi)).unwrap();
            a.fld1().unwrap();
            a.fldz().unwrap();
            a.fdivp(st1, st0).unwrap();
            a.nop().unwrap();
            a.fnstsw(ax).unwrap();
            a.wait().unwrap();
        });
        guest.0.cpu.cr0.set(Cr0::NE, ne);
        guest.0.cpu.set_reg(Gpr::Rdi, 0x6_0000);
        guest.0.write(0x6_0000, &0x37bu16.to_le_bytes());
        // The divide-by-zero waits for the next waiting instruction; FNSTSW does not wait.
        assert_eq!(guest.run(), Event(x86_defs::vector::MF, None, 13), "NE {ne}");
        assert_eq!(guest.0.cpu.reg(Gpr::Rax) & 0x84, 0x84, "ES and ZE");
    }
}

#[test]
fn monitor_and_mwait_are_no_ops_of_level_0() {
    for code in [|a: &mut CodeAssembler| a.monitor().unwrap(), |a: &mut CodeAssembler| a.mwait().unwrap()] {
        let mut guest = Guest::new(0, code);
        guest.0.cpu.set_reg(Gpr::Rax, NON_CANONICAL);
        guest.0.cpu.set_reg(Gpr::Rcx, 1);
        assert_eq!(guest.run(), Done);
        assert_eq!(run(3, code), Event(UD, None, 0));
    }
}

#[test]
fn privileged_instructions_need_level_0() {
    let table: &[Named] = &[
        ("HLT", |a| a.hlt().unwrap()),
        ("CLTS", |a| a.clts().unwrap()),
        ("LGDT", |a| a.lgdt(ptr(rsp)).unwrap()),
        ("LIDT", |a| a.lidt(ptr(rsp)).unwrap()),
        ("LLDT", |a| a.lldt(ax).unwrap()),
        ("LTR", |a| a.ltr(ax).unwrap()),
        ("LMSW", |a| a.lmsw(ax).unwrap()),
        ("INVD", |a| a.invd().unwrap()),
        ("WBINVD", |a| a.wbinvd().unwrap()),
        ("WBNOINVD", |a| a.wbnoinvd().unwrap()),
        ("INVLPG", |a| a.invlpg(ptr(rsp)).unwrap()),
        ("INVPCID", |a| a.invpcid(rax, ptr(rsp)).unwrap()),
        ("MOV from CR0", |a| a.mov(rax, cr0).unwrap()),
        ("MOV to CR3", |a| a.mov(cr3, rax).unwrap()),
        ("MOV from CR8", |a| a.mov(rax, cr8).unwrap()),
        ("MOV from DR7", |a| a.mov(rax, dr7).unwrap()),
        ("MOV to DR0", |a| a.mov(dr0, rax).unwrap()),
        ("RDMSR", |a| a.rdmsr().unwrap()),
        ("WRMSR", |a| a.wrmsr().unwrap()),
        ("SWAPGS", |a| a.swapgs().unwrap()),
        ("SYSRETQ", |a| a.sysretq().unwrap()),
        ("SYSEXITQ", |a| a.sysexitq().unwrap()),
        ("CLI", |a| a.cli().unwrap()),
        ("STI", |a| a.sti().unwrap()),
        ("IN", |a| a.in_(al, 0x80).unwrap()),
        ("OUT", |a| a.out(0x80, al).unwrap()),
        ("INSB", |a| a.insb().unwrap()),
        ("OUTSD", |a| a.outsd().unwrap()),
        ("RDPMC", |a| a.rdpmc().unwrap()),
    ];
    for (name, code) in table {
        let mut guest = Guest::new(3, code);
        // The TSS has no I/O bitmap: its base is behind the limit.
        guest.0.write(TSS + 102, &[0xff, 0xff]);
        assert_eq!(guest.run(), Event(GP, Some(0), 0), "{name}");
    }
    let undefined: &[Named] =
        &[("CLAC", |a| a.clac().unwrap()), ("STAC", |a| a.stac().unwrap()), ("RSM", |a| a.rsm().unwrap())];
    for (name, code) in undefined {
        assert_eq!(run(3, code), Event(UD, None, 0), "{name}");
    }
    assert_eq!(run(0, |a| a.stac().and(a.clac()).and(a.serialize()).and(a.wbnoinvd()).unwrap()), Done);
}

/// SDM Vol. 2 "INVPCID": type in the register, PCID and address in memory.
#[test]
fn invpcid_checks_its_descriptor() {
    for (kind, pcid, la, pcide, expected) in [
        (0, 0, 0x1000, false, Done),
        (0, 1, 0x1000, false, Event(GP, Some(0), 0)),
        (0, 1, 0x1000, true, Done),
        (0, 0, NON_CANONICAL, true, Event(GP, Some(0), 0)),
        (1, 0, NON_CANONICAL, true, Done),
        (1, 1 << 12, 0, true, Event(GP, Some(0), 0)),
        (2, 0, 0, false, Done),
        (3, u64::MAX, NON_CANONICAL, false, Done),
        (4, 0, 0, true, Event(GP, Some(0), 0)),
    ] {
        let mut guest = Guest::new(0, |a| a.invpcid(rax, ptr(rdi)).unwrap());
        guest.0.write(0x6_0000, &pcid.to_le_bytes());
        guest.0.write(0x6_0008, &la.to_le_bytes());
        guest.0.cpu.cr4.set(Cr4::PCIDE, pcide);
        guest.0.cpu.set_reg(Gpr::Rax, kind);
        guest.0.cpu.set_reg(Gpr::Rdi, 0x6_0000);
        assert_eq!(guest.run(), expected, "type {kind} PCID {pcid:#x} at {la:#x}, PCIDE {pcide}");
    }
}
