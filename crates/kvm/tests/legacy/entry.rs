//! VM entry refuses guest state: every rule of SDM Vol. 3 "Checks on the Guest State Area" that the ioctls of 2007 can break,
//! broken once. Linux 2.6.22 hands the exit reason on (`kvm_handle_exit`): `KVM_EXIT_UNKNOWN`, 33 with bit 31.
//!
//! Rules that they cannot break, and why:
//!
//! | rule | |
//! |---|---|
//! | CR0.NE, CR4.VMXE and what else VMX fixes to 1 | KVM sets them (`KVM_VM_CR0_ALWAYS_ON`, `KVM_PMODE_VM_CR4_ALWAYS_ON`) |
//! | reserved bits of CR0[31:0]; NW and CD | not checked: IA32_VMX_CR0_FIXED1 has them, and VM entry leaves them out |
//! | CR4.CET needs WP; S_CET, SSP, the interrupt SSP table | CR4.CET is reserved |
//! | IA32_SYSENTER_ESP and _EIP are canonical | `KVM_SET_MSRS` makes them so, as today's Linux does; 2.6.22 took what it got |
//! | DR7[63:32] | no ioctl of 2007 loads debug registers (`KVM_SET_DEBUGREGS` of later years does) |
//! | IA32_DEBUGCTL, PERF_GLOBAL_CTRL, PAT, BNDCFGS, RTIT_CTL, LBR_CTL, PKRS, UINV | `KVM_SET_MSRS` does not know them or refuses their reserved bits |
//! | access rights 31:17 and 11:8; limits of GDTR and IDTR 31:16 | `kvm_segment` and `kvm_dtable` have no such bits |
//! | RPL of SS is that of CS, and DPL of SS is its RPL; DPL of data segments is not below their RPL; CS type 3 | not with "unrestricted guest", which is on here |
//! | accessed bit of segments, busy bit of TR | KVM sets the lowest bit of each type |
//! | an absent segment | `vmx_segment_access_rights` makes it unusable; so it breaks the rules for CS and TR alone |
//! | attributes and types in real mode | 2007 gives segments those of virtual-8086 mode |
//! | RFLAGS bit 1 | set by `KVM_SET_REGS`; 2.6.22 took it as given, and a client that left it out could not run |
//! | RFLAGS.VM without CR0.PE | real mode was virtual-8086 mode, so it says nothing: dropped |
//! | RFLAGS.IF for an interrupt that is injected | none is before the guest can take it |
//! | activity state, pending debug exceptions, blocking by NMI and SMI, VMCS link pointer | 2007 has no ioctl for them |
//! | blocking by MOV SS together with STI | no guest gets there |
//! | PDPTEs | read from the guest's memory by the processor, and a bad one is its #GP; 2.6.22 ran without EPT |

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{kvm_segment, kvm_sregs};

use crate::machine::{CODE, DEVICE, Machine, STACK, TABLES};

/// A guest whose state every rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Virtual8086,
    Protected,
    Compatibility,
    Long,
}
use Mode::{Compatibility, Long, Protected, Real, Virtual8086};

const NON_CANONICAL: u64 = 1 << 47;

/// HLT, where it may.
fn machine(mode: Mode) -> Machine {
    let m = match mode {
        Real => Machine::real(|a| a.hlt().unwrap()),
        _ => Machine::long(|a| a.hlt().unwrap()),
    };
    if mode != Real {
        m.set_sregs(|sregs| {
            sregs.ldt = kvm_segment { type_: 2, present: 1, limit: 0xffff, ..kvm_abi::Plain::zeroed() };
            if mode != Long {
                (sregs.cs.l, sregs.cs.db) = (0, 1);
            }
            if matches!(mode, Protected | Virtual8086) {
                (sregs.cr0, sregs.cr4, sregs.efer) = (0x11, 0, 0);
            }
            if mode == Virtual8086 {
                let base = u64::from(8u16) << 4;
                let segment = kvm_segment {
                    base,
                    limit: 0xffff,
                    selector: 8,
                    type_: 3,
                    s: 1,
                    dpl: 3,
                    present: 1,
                    ..kvm_abi::Plain::zeroed()
                };
                (sregs.cs, sregs.ss, sregs.ds) = (segment, segment, segment);
                (sregs.es, sregs.fs, sregs.gs) = (segment, segment, segment);
            }
        });
    }
    if mode == Virtual8086 {
        m.set_regs(|regs| regs.rflags |= 1 << 17);
    }
    m
}

/// What a guest of legal state comes to. HLT in virtual-8086 mode is #GP, and there is no IDT.
fn legal(mode: Mode) -> u32 {
    if mode == Virtual8086 { KVM_EXIT_SHUTDOWN } else { KVM_EXIT_HLT }
}

/// What breaks a rule.
enum Break {
    Sregs(fn(&mut kvm_sregs)),
    /// RIP or RFLAGS.
    Regs(fn(&mut kvm_abi::kvm_regs)),
}
use Break::{Regs, Sregs};

#[test]
fn state_that_vm_entry_refuses_is_unknown() {
    #[rustfmt::skip]
    let table: &[(&str, Mode, Break)] = &[
        // "Checks on Guest Control Registers, Debug Registers, and MSRs"
        ("CR0 has no bit that is not supported", Long, Sregs(|s| s.cr0 |= 1 << 32)),
        ("CR0.PG needs PE", Real, Sregs(|s| s.cr0 |= 1 << 31)),
        ("CR4 has no bit that is not supported", Real, Sregs(|s| s.cr4 |= 1 << 31)),
        ("CR4 has no bit that is not supported", Long, Sregs(|s| s.cr4 |= 1 << 15)),
        ("CR4 has no bit that is not supported", Protected, Sregs(|s| s.cr4 |= 1 << 63)),
        ("IA-32e mode needs PAE", Long, Sregs(|s| s.cr4 &= !0x20)),
        ("IA-32e mode needs paging", Long, Sregs(|s| s.cr0 &= !(1 << 31))),
        ("PCIDs need IA-32e mode", Protected, Sregs(|s| s.cr4 |= 1 << 17)),
        ("CR3 is inside the physical-address width", Long, Sregs(|s| s.cr3 |= 1 << 51)),
        ("CR3 is inside the physical-address width", Protected, Sregs(|s| s.cr3 = 1 << 63)),
        ("EFER has no reserved bit", Real, Sregs(|s| s.efer |= 2)),
        ("LMA is LME under paging", Long, Sregs(|s| s.efer &= !(1 << 8))),
        ("LMA is LME under paging", Protected, Sregs(|s| (s.cr0, s.cr3, s.efer) = (0x8000_0011, TABLES, 1 << 8))),
        // "Checks on Guest Segment Registers": selectors
        ("TR is in the GDT", Long, Sregs(|s| s.tr.selector = 4)),
        ("LDTR is in the GDT", Long, Sregs(|s| s.ldt.selector = 4)),
        // Base addresses
        ("a virtual-8086 base is the selector × 16", Virtual8086, Sregs(|s| s.cs.base += 0x10)),
        ("a virtual-8086 base is the selector × 16", Virtual8086, Sregs(|s| s.ss.selector += 1)),
        ("TR's base is canonical", Long, Sregs(|s| s.tr.base = NON_CANONICAL)),
        ("FS's base is canonical", Long, Sregs(|s| s.fs.base = NON_CANONICAL)),
        ("GS's base is canonical", Compatibility, Sregs(|s| s.gs.base = NON_CANONICAL)),
        ("LDTR's base is canonical", Long, Sregs(|s| s.ldt.base = NON_CANONICAL)),
        ("CS's base has 32 bits", Long, Sregs(|s| s.cs.base = 1 << 32)),
        ("CS's base has 32 bits", Real, Sregs(|s| s.cs.base = 1 << 32)),
        ("SS's base has 32 bits", Long, Sregs(|s| s.ss.base = 1 << 32)),
        ("DS's base has 32 bits", Protected, Sregs(|s| s.ds.base = 1 << 32)),
        ("ES's base has 32 bits", Compatibility, Sregs(|s| s.es.base = 1 << 32)),
        // Limits
        ("a virtual-8086 limit is FFFFH", Virtual8086, Sregs(|s| s.ds.limit = 0xfffe)),
        // Access rights
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.es.type_ = 11)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.fs.s = 0)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.gs.dpl = 0)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.ds.present = 0)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.cs.db = 1)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.ss.g = 1)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.es.avl = 1)),
        ("virtual-8086 access rights are F3H", Virtual8086, Sregs(|s| s.fs.l = 1)),
        ("CS is code, or data of level 0", Protected, Sregs(|s| s.cs.type_ = 1)),
        ("CS is code, or data of level 0", Protected, Sregs(|s| s.cs.type_ = 7)),
        ("data in CS has level 0", Protected, Sregs(|s| (s.cs.type_, s.cs.dpl) = (3, 1))),
        ("nonconforming code has SS's level", Protected, Sregs(|s| s.cs.dpl = 3)),
        ("conforming code has no level beyond SS's", Protected, Sregs(|s| (s.cs.type_, s.cs.dpl) = (15, 1))),
        ("CS is no system segment", Protected, Sregs(|s| s.cs.s = 0)),
        ("CS is present", Protected, Sregs(|s| s.cs.present = 0)),
        ("CS is usable", Long, Sregs(|s| s.cs.unusable = 1)),
        ("CS is for 64 bits or for 32, not both", Long, Sregs(|s| s.cs.db = 1)),
        ("CS: pages leave the limit's low bits set", Protected, Sregs(|s| s.cs.limit = 0xf_f000)),
        ("CS: bytes do not reach beyond 1 MByte", Protected, Sregs(|s| s.cs.g = 0)),
        ("SS is writable data", Protected, Sregs(|s| s.ss.type_ = 1)),
        ("SS is writable data", Protected, Sregs(|s| s.ss.type_ = 11)),
        ("SS is no system segment", Protected, Sregs(|s| s.ss.s = 0)),
        ("SS has level 0 below data in CS", Protected, Sregs(|s| (s.cs.type_, s.ss.dpl) = (3, 3))),
        ("SS: pages leave the limit's low bits set", Protected, Sregs(|s| s.ss.limit = 0x1f_f000)),
        ("SS: bytes do not reach beyond 1 MByte", Long, Sregs(|s| s.ss.g = 0)),
        ("DS is no system segment", Long, Sregs(|s| s.ds.s = 0)),
        ("code in ES is readable", Protected, Sregs(|s| s.es.type_ = 9)),
        ("FS: pages leave the limit's low bits set", Protected, Sregs(|s| s.fs.limit = 0x1f_f000)),
        ("GS: bytes do not reach beyond 1 MByte", Compatibility, Sregs(|s| s.gs.g = 0)),
        ("DS: pages leave the limit's low bits set", Real, Sregs(|s| s.ds.limit = 0x1f_f000)),
        ("TR is a busy 32-bit or 64-bit TSS", Protected, Sregs(|s| s.tr.type_ = 9)),
        ("TR is a 64-bit TSS in IA-32e mode", Long, Sregs(|s| s.tr.type_ = 3)),
        ("TR is a system segment", Protected, Sregs(|s| s.tr.s = 1)),
        ("TR is present", Protected, Sregs(|s| s.tr.present = 0)),
        ("TR is usable", Long, Sregs(|s| s.tr.unusable = 1)),
        ("TR: pages leave the limit's low bits set", Protected, Sregs(|s| (s.tr.limit, s.tr.g) = (0x68, 1))),
        ("TR: bytes do not reach beyond 1 MByte", Protected, Sregs(|s| (s.tr.limit, s.tr.g) = (0x10_0000, 0))),
        ("LDTR is an LDT", Protected, Sregs(|s| s.ldt.type_ = 3)),
        ("LDTR is a system segment", Protected, Sregs(|s| s.ldt.s = 1)),
        ("LDTR: pages leave the limit's low bits set", Long, Sregs(|s| (s.ldt.limit, s.ldt.g) = (0x68, 1))),
        ("LDTR: bytes do not reach beyond 1 MByte", Long, Sregs(|s| (s.ldt.limit, s.ldt.g) = (0x10_0000, 0))),
        // "Checks on Guest Descriptor-Table Registers"
        ("GDTR's base is canonical", Real, Sregs(|s| s.gdt.base = NON_CANONICAL)),
        ("IDTR's base is canonical", Long, Sregs(|s| s.idt.base = NON_CANONICAL)),
        // "Checks on Guest RIP, RFLAGS, and SSP"
        ("RIP has 32 bits outside 64-bit mode", Real, Regs(|r| r.rip |= 1 << 32)),
        ("RIP has 32 bits outside 64-bit mode", Compatibility, Regs(|r| r.rip |= 1 << 63)),
        ("RIP is canonical", Long, Regs(|r| r.rip |= NON_CANONICAL)),
        ("RFLAGS has no reserved bit", Real, Regs(|r| r.rflags |= 1 << 3)),
        ("RFLAGS has no reserved bit", Protected, Regs(|r| r.rflags |= 1 << 5)),
        ("RFLAGS has no reserved bit", Long, Regs(|r| r.rflags |= 1 << 15)),
        ("RFLAGS has no reserved bit", Virtual8086, Regs(|r| r.rflags |= 1 << 22)),
        ("RFLAGS has no reserved bit", Compatibility, Regs(|r| r.rflags |= 1 << 63)),
        ("RFLAGS.VM is not for IA-32e mode", Long, Regs(|r| r.rflags |= 1 << 17)),
    ];
    for (row, (rule, mode, broken)) in table.iter().enumerate() {
        let what = format!("row {row}, {rule}, {mode:?}");
        let m = machine(*mode);
        let (sregs, regs) = (m.sregs(), m.regs());
        match *broken {
            Sregs(change) => m.set_sregs(change),
            Regs(change) => m.set_regs(change),
        }
        let rip = m.regs().rip;
        m.run.store_u64(32, u64::MAX).unwrap();
        assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN), "{what}");
        assert_eq!(m.run.load_u64(32), Some(0x8000_0021), "{what}");
        assert_eq!(m.regs().rip, rip, "nothing has run: {what}");
        assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN), "and again: {what}");
        // It was that, and nothing else.
        m.set(KVM_SET_SREGS, &sregs).unwrap();
        m.set(KVM_SET_REGS, &regs).unwrap();
        assert_eq!(m.run(), Ok(legal(*mode)), "{what}");
    }
}

/// "Checks on Guest Non-Register State": blocking by STI needs IF. STI blocks for one instruction; if that reads a device, and the
/// client clears IF before it answers, the state is one that no guest makes. 2.6.22's emulator left the blocking in place.
#[test]
fn blocking_by_sti_without_if_is_unknown() {
    let m = Machine::real(|a| {
        a.sti().unwrap();
        a.mov(al, byte_ptr(0x20).es()).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.es.base = DEVICE);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO));
    m.set_regs(|regs| regs.rflags &= !0x200);
    assert_eq!(m.run(), Ok(KVM_EXIT_UNKNOWN));
    assert_eq!(m.run.load_u64(32), Some(0x8000_0021));
    m.set_regs(|regs| regs.rflags |= 0x200);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

/// What Intel's hosts of 2007 saved of a guest in real mode, loaded while the vCPU is in another mode.
#[test]
fn real_mode_state_with_rflags_vm_is_real_mode() {
    let real = Machine::real(|a| a.hlt().unwrap());
    let m = machine(Protected);
    m.set_regs(|regs| (regs.rflags, regs.rip, regs.rsp) = (0x2_3002, CODE, STACK));
    m.set(KVM_SET_SREGS, &real.sregs()).unwrap();
    assert_eq!(m.regs().rflags, 0x3002);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}
