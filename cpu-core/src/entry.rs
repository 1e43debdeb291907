//! What VM entry checks of the guest's state before its first instruction, with "unrestricted guest" on: real-address mode and
//! big real mode are legal. SDM Vol. 3 "Checks on the Guest State Area".
//!
//! State that instructions have made passes by construction, so only what user space has loaded is looked at.

use x86_defs::descriptor::system_type as system;
use x86_defs::{Cr0, Cr4, Efer, Rflags};

use crate::cpu::{Cpu, RFLAGS_MASK};
use crate::isa::cr4_exists;
use crate::state::{Seg, Segment};

/// A rule and whether the guest keeps it.
type Check = (&'static str, fn(&Cpu) -> bool);

/// "Checks on Guest Control Registers, Debug Registers, and MSRs", "… on Guest Segment Registers", "… on Guest
/// Descriptor-Table Registers", "… on Guest RIP, RFLAGS, and SSP", "… on Guest Non-Register State". What the API cannot load has
/// no rule here: activity state and pending debug exceptions, which the core keeps itself; reserved bits of PDPTEs and of MSRs but
/// EFER, which the KVM layer refuses or masks, as it does RFLAGS bit 1; an event to be injected, which waits until the guest
/// can take it. Reserved bits 31:0 of CR0 are not checked, nor loaded (IA32_VMX_CR0_FIXED1 is FFFFFFFFH).
const CHECKS: &[Check] = &[
    ("CR0 has 32 bits", |cpu| cpu.cr0.bits() >> 32 == 0),
    ("CR0.PG needs PE", |cpu| !cpu.cr0.contains(Cr0::PG) || cpu.cr0.contains(Cr0::PE)),
    ("CR4 has no reserved bit", |cpu| cr4_exists(cpu.cr4)),
    ("IA-32e mode needs paging and PAE", |cpu| {
        !cpu.is_long() || cpu.cr0.contains(Cr0::PG) && cpu.cr4.contains(Cr4::PAE)
    }),
    ("PCIDs need IA-32e mode", |cpu| cpu.is_long() || !cpu.cr4.contains(Cr4::PCIDE)),
    ("LMA is LME under paging", |cpu| {
        let (lma, lme) = (cpu.efer.contains(Efer::LMA), cpu.efer.contains(Efer::LME));
        !cpu.cr0.contains(Cr0::PG) || lma == lme
    }),
    ("CR3 inside the physical-address width", |cpu| cpu.cr3 >> cpu.phys_bits == 0),
    ("DR7 has 32 bits", |cpu| cpu.debug.dr7 >> 32 == 0),
    ("SYSENTER addresses are canonical", |cpu| {
        cpu.is_canonical(cpu.msrs.sysenter_esp) && cpu.is_canonical(cpu.msrs.sysenter_eip)
    }),
    ("EFER has no reserved bit", |cpu| (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).contains(cpu.efer)),
    ("TR is in the GDT", |cpu| cpu.tr.selector & 4 == 0),
    ("LDTR is in the GDT", |cpu| cpu.ldt.unusable || cpu.ldt.selector & 4 == 0),
    ("bases of TR, FS and GS are canonical", |cpu| {
        [cpu.tr, cpu.seg[Seg::Fs as usize], cpu.seg[Seg::Gs as usize]].iter().all(|s| cpu.is_canonical(s.base))
    }),
    ("base of LDTR is canonical", |cpu| cpu.ldt.unusable || cpu.is_canonical(cpu.ldt.base)),
    ("bases of CS, SS, DS and ES have 32 bits", |cpu| {
        [Seg::Cs, Seg::Ss, Seg::Ds, Seg::Es].iter().all(|seg| {
            let segment = &cpu.seg[*seg as usize];
            *seg != Seg::Cs && segment.unusable || segment.base >> 32 == 0
        })
    }),
    ("virtual-8086 segments", |cpu| !cpu.is_v86() || cpu.seg.iter().all(is_virtual_8086)),
    ("CS", |cpu| cpu.is_v86() || is_code(cpu)),
    ("SS", |cpu| cpu.is_v86() || is_stack(cpu)),
    ("DS, ES, FS and GS", |cpu| {
        cpu.is_v86() || [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs].iter().all(|seg| is_data(&cpu.seg[*seg as usize]))
    }),
    ("TR is a busy TSS", |cpu| {
        let kind = cpu.tr.type_ == system::TSS32_BUSY || cpu.tr.type_ == system::TSS16_BUSY && !cpu.is_long();
        kind && !cpu.tr.s && cpu.tr.present && !cpu.tr.unusable && granularity_fits(&cpu.tr)
    }),
    ("LDTR is an LDT", |cpu| {
        let ldt = &cpu.ldt;
        ldt.unusable || ldt.type_ == system::LDT && !ldt.s && ldt.present && granularity_fits(ldt)
    }),
    ("bases of GDTR and IDTR are canonical", |cpu| cpu.is_canonical(cpu.gdt.base) && cpu.is_canonical(cpu.idt.base)),
    ("RIP fits the mode", |cpu| if cpu.is_64bit() { cpu.is_canonical(cpu.rip) } else { cpu.rip >> 32 == 0 }),
    ("RFLAGS has no reserved bit", |cpu| cpu.rflags & !(RFLAGS_MASK | Rflags::FIXED.bits()) == 0),
    ("blocking by STI needs IF, and excludes blocking by MOV SS", |cpu| {
        let events = cpu.events();
        !events.shadow_sti || cpu.rflags & Rflags::IF.bits() != 0 && !events.shadow_mov_ss
    }),
    ("RFLAGS.VM needs legacy protected mode", |cpu| !cpu.is_v86() || cpu.cr0.contains(Cr0::PE) && !cpu.is_long()),
];

impl Cpu {
    /// The rule that the guest's state breaks. VM entry fails on it: [`crate::Exit::EntryFailure`].
    pub(crate) fn entry_check(&self) -> Option<&'static str> {
        CHECKS.iter().find(|check| !check.1(self)).map(|check| check.0)
    }
}

/// G says how the limit was encoded: pages leave the low bits set, bytes cannot reach beyond 1 MByte.
fn granularity_fits(segment: &Segment) -> bool {
    (segment.limit & 0xfff == 0xfff || !segment.g) && (segment.limit >> 20 == 0 || segment.g)
}

/// Access rights F3H: present, level 3, writable, accessed.
fn is_virtual_8086(segment: &Segment) -> bool {
    segment.base == u64::from(segment.selector) << 4
        && segment.limit == 0xffff
        && segment.type_ == 3
        && segment.s
        && segment.dpl == 3
        && segment.present
        && !(segment.unusable || segment.avl || segment.l || segment.db || segment.g)
}

fn is_code(cpu: &Cpu) -> bool {
    let (cs, ss) = (&cpu.seg[Seg::Cs as usize], &cpu.seg[Seg::Ss as usize]);
    let level = match cs.type_ {
        3 => cs.dpl == 0,
        9 | 11 => cs.dpl == ss.dpl,
        13 | 15 => cs.dpl <= ss.dpl,
        _ => return false,
    };
    level && cs.s && cs.present && !cs.unusable && granularity_fits(cs) && !(cpu.is_long() && cs.l && cs.db)
}

fn is_stack(cpu: &Cpu) -> bool {
    let ss = &cpu.seg[Seg::Ss as usize];
    let level_0 = !cpu.cr0.contains(Cr0::PE) || cpu.seg[Seg::Cs as usize].type_ == 3;
    if level_0 && ss.dpl != 0 {
        return false;
    }
    ss.unusable || matches!(ss.type_, 3 | 7) && ss.s && ss.present && granularity_fits(ss)
}

fn is_data(segment: &Segment) -> bool {
    let readable = segment.type_ & 1 != 0 && (segment.type_ & 8 == 0 || segment.type_ & 2 != 0);
    segment.unusable || readable && segment.s && segment.present && granularity_fits(segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Events, Regs};
    use crate::testing::Machine;

    /// A guest whose state every rule allows.
    #[derive(Clone, Copy, Debug)]
    enum Mode {
        Real,
        Virtual8086,
        Protected,
        Compatibility,
        Long,
    }
    use Mode::{Compatibility, Long, Protected, Real, Virtual8086};

    fn machine(mode: Mode) -> Machine {
        let mut machine = match mode {
            Real => Machine::new_real(|_| ()),
            Protected | Virtual8086 => Machine::new_32bit(|_| ()),
            Compatibility | Long => Machine::new_64bit(|_| ()),
        };
        let cpu = &mut machine.cpu;
        match mode {
            Virtual8086 => {
                cpu.rflags |= Rflags::VM.bits();
                cpu.seg = [Segment::virtual_8086(0x100); 6];
            }
            Compatibility => {
                let code = &mut cpu.seg[CS];
                (code.l, code.db) = (false, true);
            }
            _ => {}
        }
        cpu.ldt = Segment { unusable: false, type_: system::LDT, s: false, present: true, ..cpu.ldt };
        cpu.derive();
        machine
    }

    const ES: usize = Seg::Es as usize;
    const CS: usize = Seg::Cs as usize;
    const SS: usize = Seg::Ss as usize;
    const DS: usize = Seg::Ds as usize;
    const FS: usize = Seg::Fs as usize;
    const GS: usize = Seg::Gs as usize;

    /// As user space does.
    fn load_rflags(cpu: &mut Cpu, rflags: u64) {
        let regs = cpu.regs();
        cpu.set_regs(&Regs { rflags, ..regs });
    }

    /// Each change breaks the rule beside it, and no earlier one: a row for every condition of the SDM's sections.
    #[test]
    fn broken_state_is_named() {
        type Break = fn(&mut Cpu);
        let table: &[(&str, Mode, Break)] = &[
            // "Checks on Guest Control Registers, Debug Registers, and MSRs"
            ("CR0 has 32 bits", Long, |cpu| cpu.cr0 |= Cr0::from_bits_retain(1 << 32)),
            ("CR0.PG needs PE", Real, |cpu| cpu.cr0 |= Cr0::PG),
            ("CR4 has no reserved bit", Long, |cpu| cpu.cr4 |= Cr4::from_bits_retain(1 << 15)),
            ("CR4 has no reserved bit", Real, |cpu| cpu.cr4 |= Cr4::SMXE),
            ("CR4 has no reserved bit", Protected, |cpu| cpu.cr4 |= Cr4::from_bits_retain(1 << 63)),
            ("IA-32e mode needs paging and PAE", Long, |cpu| cpu.cr4 -= Cr4::PAE),
            ("IA-32e mode needs paging and PAE", Long, |cpu| cpu.cr0 -= Cr0::PG),
            ("PCIDs need IA-32e mode", Protected, |cpu| cpu.cr4 |= Cr4::PCIDE),
            ("LMA is LME under paging", Long, |cpu| cpu.efer -= Efer::LME),
            ("LMA is LME under paging", Protected, |cpu| {
                cpu.cr0 |= Cr0::PG;
                cpu.efer |= Efer::LME;
            }),
            ("CR3 inside the physical-address width", Long, |cpu| cpu.cr3 |= 1 << cpu.phys_bits),
            ("DR7 has 32 bits", Long, |cpu| cpu.debug.dr7 |= 1 << 32),
            ("SYSENTER addresses are canonical", Long, |cpu| cpu.msrs.sysenter_eip = 1 << 63),
            ("SYSENTER addresses are canonical", Long, |cpu| cpu.msrs.sysenter_esp = 1 << 47),
            ("EFER has no reserved bit", Real, |cpu| cpu.efer |= Efer::from_bits_retain(2)),
            ("EFER has no reserved bit", Long, |cpu| cpu.efer |= Efer::SVME),
            // "Checks on Guest Segment Registers": selectors, bases
            ("TR is in the GDT", Long, |cpu| cpu.tr.selector = 4),
            ("LDTR is in the GDT", Long, |cpu| cpu.ldt.selector = 4),
            ("bases of TR, FS and GS are canonical", Long, |cpu| cpu.tr.base = 1 << 50),
            ("bases of TR, FS and GS are canonical", Long, |cpu| cpu.seg[FS].base = 1 << 50),
            ("bases of TR, FS and GS are canonical", Long, |cpu| cpu.seg[GS].base = 1 << 50),
            ("base of LDTR is canonical", Long, |cpu| cpu.ldt.base = 1 << 50),
            ("bases of CS, SS, DS and ES have 32 bits", Long, |cpu| cpu.seg[CS].base = 1 << 32),
            ("bases of CS, SS, DS and ES have 32 bits", Long, |cpu| cpu.seg[SS].base = 1 << 32),
            ("bases of CS, SS, DS and ES have 32 bits", Long, |cpu| cpu.seg[DS].base = 1 << 32),
            ("bases of CS, SS, DS and ES have 32 bits", Long, |cpu| cpu.seg[ES].base = 1 << 32),
            // Virtual-8086 mode
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[CS].base += 0x10),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[SS].selector = 0),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[DS].limit = 0xfffe),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[ES].type_ = 0xb),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[FS].dpl = 0),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[GS].s = false),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[CS].present = false),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[SS].db = true),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[DS].g = true),
            ("virtual-8086 segments", Virtual8086, |cpu| cpu.seg[ES].unusable = true),
            // CS
            ("CS", Real, |cpu| cpu.seg[CS].type_ = 2),
            ("CS", Protected, |cpu| cpu.seg[CS].type_ = 8),
            ("CS", Protected, |cpu| cpu.seg[CS].s = false),
            ("CS", Protected, |cpu| cpu.seg[CS].present = false),
            ("CS", Protected, |cpu| cpu.seg[CS].unusable = true),
            ("CS", Protected, |cpu| cpu.seg[CS].dpl = 3),
            ("CS", Protected, |cpu| (cpu.seg[CS].type_, cpu.seg[CS].dpl) = (3, 1)),
            ("CS", Protected, |cpu| (cpu.seg[CS].type_, cpu.seg[CS].dpl) = (15, 1)),
            ("CS", Protected, |cpu| cpu.seg[CS].limit = 0xf_f000),
            ("CS", Protected, |cpu| cpu.seg[CS].g = false),
            ("CS", Long, |cpu| cpu.seg[CS].db = true),
            // SS
            ("SS", Real, |cpu| cpu.seg[SS].type_ = 1),
            ("SS", Real, |cpu| (cpu.seg[SS].dpl, cpu.seg[CS].dpl) = (3, 3)),
            ("SS", Protected, |cpu| (cpu.seg[SS].dpl, cpu.seg[CS].type_) = (3, 3)),
            ("SS", Protected, |cpu| cpu.seg[SS].type_ = 11),
            ("SS", Protected, |cpu| cpu.seg[SS].s = false),
            ("SS", Protected, |cpu| cpu.seg[SS].present = false),
            ("SS", Protected, |cpu| cpu.seg[SS].limit = 0x1f_f000),
            // DS, ES, FS, GS
            ("DS, ES, FS and GS", Real, |cpu| cpu.seg[DS].type_ = 2),
            ("DS, ES, FS and GS", Real, |cpu| cpu.seg[DS].limit = 0x1f_ffff),
            ("DS, ES, FS and GS", Protected, |cpu| cpu.seg[ES].type_ = 9),
            ("DS, ES, FS and GS", Protected, |cpu| cpu.seg[FS].s = false),
            ("DS, ES, FS and GS", Protected, |cpu| cpu.seg[GS].present = false),
            ("DS, ES, FS and GS", Long, |cpu| cpu.seg[DS].g = false),
            // TR and LDTR
            ("TR is a busy TSS", Protected, |cpu| cpu.tr.type_ = system::TSS32_AVAILABLE),
            ("TR is a busy TSS", Long, |cpu| cpu.tr.type_ = system::TSS16_BUSY),
            ("TR is a busy TSS", Protected, |cpu| cpu.tr.s = true),
            ("TR is a busy TSS", Protected, |cpu| cpu.tr.present = false),
            ("TR is a busy TSS", Protected, |cpu| cpu.tr.unusable = true),
            ("TR is a busy TSS", Protected, |cpu| (cpu.tr.limit, cpu.tr.g) = (0x68, true)),
            ("TR is a busy TSS", Protected, |cpu| (cpu.tr.limit, cpu.tr.g) = (0x10_0000, false)),
            ("LDTR is an LDT", Protected, |cpu| cpu.ldt.type_ = 3),
            ("LDTR is an LDT", Protected, |cpu| cpu.ldt.s = true),
            ("LDTR is an LDT", Protected, |cpu| cpu.ldt.present = false),
            ("LDTR is an LDT", Protected, |cpu| (cpu.ldt.limit, cpu.ldt.g) = (0x68, true)),
            // "Checks on Guest Descriptor-Table Registers"; limits have 16 bits by their type
            ("bases of GDTR and IDTR are canonical", Real, |cpu| cpu.gdt.base = 1 << 48),
            ("bases of GDTR and IDTR are canonical", Long, |cpu| cpu.idt.base = 1 << 48),
            // "Checks on Guest RIP, RFLAGS, and SSP"
            ("RIP fits the mode", Real, |cpu| cpu.rip = 1 << 32),
            ("RIP fits the mode", Compatibility, |cpu| cpu.rip = 1 << 32),
            ("RIP fits the mode", Long, |cpu| cpu.rip = 1 << 48),
            ("RFLAGS has no reserved bit", Real, |cpu| load_rflags(cpu, 2 | 1 << 3)),
            ("RFLAGS has no reserved bit", Protected, |cpu| load_rflags(cpu, 2 | 1 << 5)),
            ("RFLAGS has no reserved bit", Long, |cpu| load_rflags(cpu, 2 | 1 << 15)),
            ("RFLAGS has no reserved bit", Long, |cpu| load_rflags(cpu, 2 | 1 << 22)),
            ("RFLAGS has no reserved bit", Long, |cpu| load_rflags(cpu, 2 | 1 << 63)),
            ("RFLAGS.VM needs legacy protected mode", Long, |cpu| {
                cpu.rflags |= Rflags::VM.bits();
                cpu.seg = [Segment::virtual_8086(0x100); 6];
            }),
            ("RFLAGS.VM needs legacy protected mode", Virtual8086, |cpu| cpu.cr0 -= Cr0::PE),
            // "Checks on Guest Non-Register State"
            ("blocking by STI needs IF, and excludes blocking by MOV SS", Real, |cpu| {
                cpu.set_events(Events { shadow_sti: true, ..Events::default() });
            }),
            ("blocking by STI needs IF, and excludes blocking by MOV SS", Long, |cpu| {
                cpu.rflags |= Rflags::IF.bits();
                cpu.set_events(Events { shadow_sti: true, shadow_mov_ss: true, ..Events::default() });
            }),
        ];
        for (row, (rule, mode, change)) in table.iter().enumerate() {
            let mut machine = machine(*mode);
            assert_eq!(machine.cpu.entry_check(), None, "before row {row}, {rule}, {mode:?}");
            change(&mut machine.cpu);
            assert_eq!(machine.cpu.entry_check(), Some(*rule), "row {row}, {mode:?}");
        }
        for (rule, _) in CHECKS {
            assert!(table.iter().any(|row| row.0 == *rule), "no row breaks: {rule}");
        }
    }

    #[test]
    fn odd_state_that_is_legal_enters() {
        type Change = fn(&mut Cpu);
        let table: &[(&str, Mode, Change)] = &[
            ("LMA without paging in no mode", Protected, |cpu| cpu.efer |= Efer::LME),
            ("unusable data segments hold anything", Long, |cpu| {
                cpu.seg[DS] = Segment { unusable: true, present: false, type_: 2, limit: 0x1f_f000, ..cpu.seg[DS] };
            }),
            ("an unusable stack segment of the level", Long, |cpu| cpu.seg[SS].unusable = true),
            ("flags that may be anything", Protected, |cpu| load_rflags(cpu, 0x003d_7fd7)),
            ("CR4.VMXE, which is set where guests run", Long, |cpu| cpu.cr4 |= Cr4::VMXE),
            ("reserved bits of CR0[31:0], which are not loaded", Long, |cpu| {
                cpu.cr0 |= Cr0::from_bits_retain(0x1ffa_ffc0);
            }),
            ("an unusable LDTR", Long, |cpu| (cpu.ldt.unusable, cpu.ldt.selector, cpu.ldt.base) = (true, 4, 1 << 50)),
            ("a 16-bit TSS outside IA-32e mode", Protected, |cpu| cpu.tr.type_ = system::TSS16_BUSY),
            ("conforming code of an inner level", Protected, |cpu| {
                (cpu.seg[CS].type_, cpu.seg[CS].dpl, cpu.seg[SS].dpl) = (15, 0, 3);
            }),
            ("code in a data segment, as before the first far jump", Real, |cpu| cpu.seg[CS].type_ = 3),
            ("a data segment of another level", Protected, |cpu| cpu.seg[DS].dpl = 0),
            ("blocking by STI", Long, |cpu| {
                cpu.rflags |= Rflags::IF.bits();
                cpu.set_events(Events { shadow_sti: true, ..Events::default() });
            }),
            ("blocking by MOV SS without IF", Long, |cpu| {
                cpu.set_events(Events { shadow_mov_ss: true, ..Events::default() });
            }),
        ];
        for (what, mode, change) in table {
            let mut machine = machine(*mode);
            change(&mut machine.cpu);
            assert_eq!(machine.cpu.entry_check(), None, "{what}");
        }
    }

    #[test]
    fn big_real_mode_is_legal() {
        let mut machine = Machine::new_real(|_| ());
        machine.cpu.seg[3] = Segment { limit: u32::MAX, g: true, ..machine.cpu.seg[3] };
        assert_eq!(machine.cpu.entry_check(), None);
    }
}
