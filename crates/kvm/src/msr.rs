//! MSRs beyond the core's own: memory types, and what Linux answers because guests ask for it.
//!
//! A row answers RDMSR, WRMSR, `KVM_GET_MSRS`, `KVM_SET_MSRS` and, if it is state, the index list. The core keeps those
//! that its instructions use; the time-stamp counter and the APIC base are the machine's.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cpu_core::Cpu;
use x86_defs::msr::{self, PAT_RESET, apic_base, misc_enable};
use x86_defs::{Cr0, Efer, vector};

use crate::arch_capabilities;
use crate::era::Era;
use crate::hyperv;
use crate::machine::Machine;
use crate::mce::Mce;
use crate::paravirt;
use crate::vcpu::Vcpu;

/// What a write may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Write {
    /// #GP(0).
    Never,
    /// Taken and forgotten.
    Ignored,
    /// These bits; #GP(0) for another.
    Bits(u64),
    /// These bits, and a memory type in the lowest byte.
    BitsAndType(u64),
    /// Eight memory types, those of this mask.
    Types(u8),
}
use Write::{Bits, BitsAndType, Ignored, Never, Types};

/// One MSR.
struct Row {
    index: u32,
    reset: u64,
    write: Write,
    /// Part of a guest's state: in the index list.
    listed: bool,
}

const fn state(index: u32, reset: u64, write: Write) -> Row {
    Row { index, reset, write, listed: true }
}

const fn constant(index: u32, value: u64, write: Write) -> Row {
    Row { index, reset: value, write, listed: false }
}

/// MSR_PLATFORM_INFO: CPUID can be made to fault.
pub(crate) const HAS_CPUID_FAULTING: u64 = 1 << 31;
/// MISC_FEATURES_ENABLES: it does, above CPL 0.
pub(crate) const CPUID_FAULTS: u64 = 1;
/// Memory types that MTRRs take: UC, WC, WT, WP, WB. SDM Vol. 3 "MTRR Memory Types".
const MTRR_TYPES: u8 = 0b0111_0011;
/// The PAT takes UC− too. SDM Vol. 3 "Page Attribute Table".
const PAT_TYPES: u8 = 0b1111_0011;
/// MTRR capability: 8 variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 0x508;
/// Physical address bits of a variable range; the width that CPUID tells does not narrow it.
const RANGE_BASE: u64 = 0x000f_ffff_ffff_f0ff;
const RANGE_MASK: u64 = 0x000f_ffff_ffff_f800;

const fn base(n: u32) -> Row {
    state(msr::IA32_MTRR_PHYSBASE0 + 2 * n, 0, BitsAndType(RANGE_BASE))
}

const fn mask(n: u32) -> Row {
    state(msr::IA32_MTRR_PHYSMASK0 + 2 * n, 0, Bits(RANGE_MASK))
}

const fn fixed(index: u32) -> Row {
    state(index, 0, Types(MTRR_TYPES))
}

/// In ascending order. SDM Vol. 4; AMD's from the BKDG and PPR; the constants are `kvm_get_msr_common`'s.
const ROWS: &[Row] = &[
    //       index                            value     guest's write
    constant(0x0000_0000, /* P5_MC_ADDR */ 0, Never),
    constant(0x0000_0001, /* P5_MC_TYPE */ 0, Never),
    constant(0x0000_0017, /* PLATFORM_ID */ 0, Never),
    constant(0x0000_002a, /* EBL_CR_POWERON */ 0, Never),
    constant(0x0000_002c, /* EBC_FREQUENCY_ID */ 1 << 24, Never),
    state(msr::IA32_TSC_ADJUST, 0, Bits(u64::MAX)),
    constant(msr::IA32_BIOS_UPDT_TRIG, 0, Ignored),
    constant(msr::IA32_BIOS_SIGN_ID, 1 << 32, Ignored),
    state(msr::MSR_PLATFORM_INFO, HAS_CPUID_FAULTING, Never),
    constant(msr::IA32_MTRRCAP, MTRR_CAP, Never),
    // What the host has; user space loads anything.
    state(msr::IA32_ARCH_CAPABILITIES, 0, Never),
    state(msr::MISC_FEATURES_ENABLES, 0, Bits(CPUID_FAULTS)),
    constant(msr::IA32_PERF_STATUS, 1000 | 4 << 40, Never),
    state(msr::IA32_MISC_ENABLE, misc_enable::BTS_UNAVAIL | misc_enable::PEBS_UNAVAIL, Bits(u64::MAX)),
    constant(msr::IA32_DEBUGCTL, 0, Bits(0)),
    state(msr::MSR_POWER_CTL, 0, Bits(u64::MAX)),
    base(0),
    mask(0),
    base(1),
    mask(1),
    base(2),
    mask(2),
    base(3),
    mask(3),
    base(4),
    mask(4),
    base(5),
    mask(5),
    base(6),
    mask(6),
    base(7),
    mask(7),
    fixed(0x250),
    fixed(0x258),
    fixed(0x259),
    fixed(0x268),
    fixed(0x269),
    fixed(0x26a),
    fixed(0x26b),
    fixed(0x26c),
    fixed(0x26d),
    fixed(0x26e),
    fixed(0x26f),
    state(msr::IA32_PAT, PAT_RESET, Types(PAT_TYPES)),
    state(msr::IA32_MTRR_DEF_TYPE, 0, BitsAndType(0xcff)),
    constant(0xc001_0010, /* SYSCFG */ 0, Ignored),
    constant(0xc001_0015, /* HWCR */ 0, Ignored),
    constant(0xc001_001f, /* NB_CFG */ 0, Ignored),
    constant(0xc001_0055, /* INT_PENDING_MSG */ 0, Ignored),
    constant(0xc001_0058, /* MMIO_CONF_BASE */ 0, Ignored),
    constant(0xc001_0112, /* SMM_ADDR */ 0, Ignored),
    constant(0xc001_0113, /* SMM_MASK */ 0, Ignored),
    constant(0xc001_0140, /* OSVW_ID_LENGTH */ 0, Ignored),
    constant(0xc001_0141, /* OSVW_STATUS */ 0, Ignored),
    constant(0xc001_1022, /* DC_CFG */ 0, Ignored),
    // LFENCE is serialising, as Linux would set it on AMD.
    constant(0xc001_1029, /* DE_CFG */ 2, Ignored),
    constant(0xc001_102a, /* BU_CFG2 */ 0, Ignored),
];

/// MSRs that tell a VMM what a guest may be told (`kvm_get_msr_feature`). No performance counter is described.
pub(crate) fn features() -> [(u32, u64); 3] {
    [
        (msr::IA32_BIOS_SIGN_ID, 1 << 32),
        (msr::IA32_ARCH_CAPABILITIES, arch_capabilities::value()),
        (0x0000_0345, /* PERF_CAPABILITIES */ 0),
    ]
}

const _: () = {
    let mut at = 1;
    while at < ROWS.len() {
        assert!(ROWS[at - 1].index < ROWS[at].index, "rows are sorted and no MSR has two");
        at += 1;
    }
};

/// What 2.6.22 answers beyond the rows, and its value; a write is taken and forgotten (`kvm_get_msr_common`).
const OF_2007: &[(std::ops::RangeInclusive<u32>, u64)] = &[
    (0xcd..=0xcd, /* FSB_FREQ */ 3),
    // MTRRs and what lies between them.
    (0x200..=0x2ff, 0),
];

/// An MSR that reads as a constant in this era alone.
pub(crate) fn constant_of(era: Era, index: u32) -> Option<u64> {
    let row = OF_2007.iter().find(|row| row.0.contains(&index)).filter(|_| era.has_constant_msrs())?;
    Some(row.1)
}

/// MSRs that `KVM_GET_SREGS` carries.
const IN_SREGS: [u32; 3] = [msr::IA32_EFER, msr::IA32_FS_BASE, msr::IA32_GS_BASE];

/// `KVM_GET_MSR_INDEX_LIST`
pub(crate) fn index_list() -> Vec<u32> {
    let core = Cpu::msr_indices().filter(|index| !IN_SREGS.contains(index));
    let rows = ROWS.iter().filter(|row| row.listed).map(|row| row.index);
    core.chain([msr::IA32_MCG_STATUS, msr::IA32_TSC_DEADLINE])
        .chain(paravirt::indices())
        .chain(hyperv::indices())
        .chain(rows)
        .collect()
}

fn has_type(types: u8, byte: u8) -> bool {
    byte < 8 && types >> byte & 1 != 0
}

/// The values of the rows.
pub(crate) struct Bank([AtomicU64; ROWS.len()]);

impl Bank {
    pub(crate) fn new() -> Self {
        let bank = Self(std::array::from_fn(|at| AtomicU64::new(ROWS[at].reset)));
        bank.put(msr::IA32_ARCH_CAPABILITIES, arch_capabilities::value());
        bank
    }

    fn find(index: u32) -> Option<usize> {
        ROWS.binary_search_by_key(&index, |row| row.index).ok()
    }

    /// `None`: not in this bank.
    pub(crate) fn read(&self, index: u32) -> Option<u64> {
        Some(self.0[Self::find(index)?].load(Relaxed))
    }

    /// User space loads an MSR that a guest cannot write.
    fn put(&self, index: u32, value: u64) {
        self.0[Self::find(index).expect("the caller names a row")].store(value, Relaxed);
    }

    /// `None`: not in this bank, or a value that it does not take. User space may also write back what it read.
    pub(crate) fn write(&self, index: u32, value: u64, by_guest: bool) -> Option<()> {
        let at = Self::find(index)?;
        let fits = match ROWS[at].write {
            Ignored => return Some(()),
            Never => false,
            Bits(bits) => value & !bits == 0,
            BitsAndType(bits) => value & !bits == 0 && has_type(MTRR_TYPES, value as u8),
            Types(types) => value.to_le_bytes().iter().all(|&byte| has_type(types, byte)),
        };
        if !fits && (by_guest || value != self.0[at].load(Relaxed)) {
            return None;
        }
        self.0[at].store(value, Relaxed);
        Some(())
    }
}

/// `KVM_GET_MSRS`, one entry.
pub(crate) fn get(vcpu: &mut Vcpu, index: u32) -> Option<u64> {
    if Mce::has(index) {
        return vcpu.machine.mce.lock().read(index, false);
    }
    if matches!(index, msr::MSR_PLATFORM_INFO | msr::IA32_ARCH_CAPABILITIES) {
        return vcpu.machine.msrs.read(index);
    }
    if let Some(value) = vcpu.machine.read_hyperv_msr(index, false) {
        return Some(value);
    }
    vcpu.cpu.msr(index)
}

/// `KVM_SET_MSRS`, one entry: what differs from a guest's WRMSR is here, the rest is the core's.
pub(crate) fn set(vcpu: &mut Vcpu, index: u32, value: u64) -> Option<()> {
    match index {
        msr::IA32_TIME_STAMP_COUNTER => vcpu.machine.set_tsc(value),
        msr::IA32_APIC_BASE if !is_apic_base(&vcpu.machine, value) => return None,
        msr::IA32_APIC_BASE => {
            vcpu.machine.set_apic_base(value);
            vcpu.load_cpuid();
        }
        msr::IA32_EFER if vcpu.era.bad_efer_faults_in_guest() && is_bad_efer(vcpu, value) => {
            vcpu.cpu.queue_exception(vector::GP, Some(0));
        }
        // `set_msr_common`: what is in use cannot be taken away.
        msr::MSR_PLATFORM_INFO => {
            let faults = vcpu.machine.msrs.read(msr::MISC_FEATURES_ENABLES)? & CPUID_FAULTS != 0;
            if faults && value & HAS_CPUID_FAULTING == 0 {
                return None;
            }
            vcpu.machine.msrs.put(index, value);
        }
        msr::IA32_ARCH_CAPABILITIES => vcpu.machine.msrs.put(index, value),
        msr::MISC_FEATURES_ENABLES if value & !vcpu.machine.misc_features() != 0 => return None,
        msr::IA32_MISC_ENABLE => {
            vcpu.machine.set_misc_enable(value)?;
            vcpu.load_cpuid();
        }
        msr::IA32_TSC_ADJUST if !vcpu.machine.tsc_adjust.load(Relaxed) => {}
        _ if Mce::has(index) => return vcpu.machine.mce.lock().write(index, value, false),
        _ if hyperv::indices().any(|known| known == index) => {
            return vcpu.machine.write_hyperv_msr(index, value, false);
        }
        _ if vcpu.machine.msrs.read(index).is_some() => return vcpu.machine.msrs.write(index, value, false),
        _ => return vcpu.cpu.set_msr(index, value),
    }
    Some(())
}

/// What WRMSR of 2.6.22 refuses (`set_efer`): a bit that it does not know, a change of LME under paging.
fn is_bad_efer(vcpu: &Vcpu, value: u64) -> bool {
    const KNOWN: Efer = Efer::SCE.union(Efer::LME).union(Efer::LMA).union(Efer::NXE);
    let sregs = vcpu.cpu.sregs();
    let switches = (value ^ sregs.efer.bits()) & Efer::LME.bits() != 0 && sregs.cr0.contains(Cr0::PG);
    value & !KNOWN.bits() != 0 || switches
}

/// `kvm_set_apic_base`: no reserved bit; x2APIC mode of an enabled APIC that is here, if the guest's CPUID has it.
pub(crate) fn is_apic_base(machine: &Machine, value: u64) -> bool {
    let has_x2apic = machine.apic().is_some() && machine.x2apic.load(Relaxed);
    let reserved = 0x2ff | u64::MAX << machine.phys_bits.load(Relaxed) | if has_x2apic { 0 } else { apic_base::EXTD };
    let mode = value & (apic_base::EN | apic_base::EXTD);
    !machine.era.decodes_apic_base() || value & reserved == 0 && mode != apic_base::EXTD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_reset_and_keep_their_masks() {
        for row in ROWS {
            let bank = Bank::new();
            bank.put(row.index, row.reset);
            assert_eq!(bank.write(row.index, row.reset, false), Some(()), "{:#x}: its own value", row.index);
            let taken = match row.write {
                Never => continue,
                Ignored => {
                    assert_eq!(bank.write(row.index, u64::MAX, true), Some(()));
                    assert_eq!(bank.read(row.index), Some(row.reset));
                    continue;
                }
                Bits(bits) => bits,
                BitsAndType(bits) => bits & !0xff | 6,
                Types(_) => 0x0606_0606_0606_0606,
            };
            assert_eq!(bank.write(row.index, taken, true), Some(()), "{:#x}", row.index);
            assert_eq!(bank.read(row.index), Some(taken));
            if taken != u64::MAX {
                assert_eq!(bank.write(row.index, u64::MAX, true), None, "{:#x}", row.index);
                assert_eq!(bank.read(row.index), Some(taken));
            }
        }
    }

    #[test]
    fn list_is_short_enough_for_vmms_that_add_to_it() {
        let list = index_list();
        assert!(list.len() < 229, "one VMM adds 28 and calls KVM_GET_MSRS with all of them");
        let mut unique = list.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), list.len());
    }

    #[test]
    fn reserved_memory_types_are_refused() {
        let bank = Bank::new();
        assert_eq!(bank.write(msr::IA32_PAT, 7, true), Some(()));
        assert_eq!(bank.write(0x250, 7, true), None);
        assert_eq!(bank.write(msr::IA32_PAT, 2, true), None);
    }
}
