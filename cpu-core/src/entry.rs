//! What VM entry checks of the guest's state before its first instruction, with "unrestricted guest" on: real-address mode and
//! big real mode are legal. SDM Vol. 3 "Checks on the Guest State Area".
//!
//! State that instructions have made passes by construction, so only what user space has loaded is looked at.

use x86_defs::descriptor::system_type as system;
use x86_defs::{Cr0, Cr4, Efer};

use crate::cpu::Cpu;
use crate::state::{Seg, Segment};

/// A rule and whether the guest keeps it.
type Check = (&'static str, fn(&Cpu) -> bool);

/// "Checks on Guest Control Registers, Debug Registers, and MSRs", "… on Guest Segment Registers", "… on Guest
/// Descriptor-Table Registers", "… on Guest RIP, RFLAGS, and SSP".
const CHECKS: &[Check] = &[
    ("CR0.PG needs PE", |cpu| !cpu.cr0.contains(Cr0::PG) || cpu.cr0.contains(Cr0::PE)),
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
    use crate::testing::Machine;

    /// Each change breaks the rule beside it, and no earlier one.
    #[test]
    fn broken_state_is_named() {
        type Break = fn(&mut Cpu);
        let table: &[(&str, bool, Break)] = &[
            ("CR0.PG needs PE", true, |cpu| cpu.cr0 |= Cr0::PG),
            ("IA-32e mode needs paging and PAE", false, |cpu| cpu.cr4 -= Cr4::PAE),
            ("PCIDs need IA-32e mode", true, |cpu| cpu.cr4 |= Cr4::PCIDE),
            ("LMA is LME under paging", false, |cpu| cpu.efer -= Efer::LME),
            ("CR3 inside the physical-address width", false, |cpu| cpu.cr3 |= 1 << 40),
            ("DR7 has 32 bits", false, |cpu| cpu.debug.dr7 |= 1 << 32),
            ("SYSENTER addresses are canonical", false, |cpu| cpu.msrs.sysenter_eip = 1 << 63),
            ("TR is in the GDT", false, |cpu| cpu.tr.selector = 4),
            ("LDTR is in the GDT", false, |cpu| cpu.ldt.selector = 4),
            ("bases of TR, FS and GS are canonical", false, |cpu| cpu.seg[5].base = 1 << 50),
            ("base of LDTR is canonical", false, |cpu| cpu.ldt.base = 1 << 50),
            ("bases of CS, SS, DS and ES have 32 bits", false, |cpu| cpu.seg[0].base = 1 << 32),
            ("virtual-8086 segments", true, |cpu| cpu.rflags |= x86_defs::Rflags::VM.bits()),
            ("CS", true, |cpu| cpu.seg[1].type_ = 2),
            ("CS", false, |cpu| cpu.seg[1].db = true),
            ("SS", true, |cpu| cpu.seg[2].type_ = 1),
            ("DS, ES, FS and GS", true, |cpu| cpu.seg[3].type_ = 2),
            ("DS, ES, FS and GS", true, |cpu| cpu.seg[3].limit = 0x1f_ffff),
            ("TR is a busy TSS", false, |cpu| cpu.tr.type_ = 9),
            ("TR is a busy TSS", false, |cpu| cpu.tr.type_ = 3),
            ("LDTR is an LDT", true, |cpu| cpu.ldt.type_ = 3),
            ("bases of GDTR and IDTR are canonical", true, |cpu| cpu.gdt.base = 1 << 48),
            ("RIP fits the mode", true, |cpu| cpu.rip = 1 << 32),
            ("RIP fits the mode", false, |cpu| cpu.rip = 1 << 48),
        ];
        for (rule, real, change) in table {
            let mut machine = if *real { Machine::new_real(|_| ()) } else { Machine::new_64bit(|_| ()) };
            assert_eq!(machine.cpu.entry_check(), None, "before {rule}");
            change(&mut machine.cpu);
            assert_eq!(machine.cpu.entry_check(), Some(*rule));
        }
    }

    #[test]
    fn big_real_mode_is_legal() {
        let mut machine = Machine::new_real(|_| ());
        machine.cpu.seg[3] = Segment { limit: u32::MAX, g: true, ..machine.cpu.seg[3] };
        assert_eq!(machine.cpu.entry_check(), None);
    }
}
