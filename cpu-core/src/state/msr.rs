//! Model-specific registers that the core holds: those that its own instructions use. All others are the platform's.

use x86_defs::{Cr0, Efer, cpuid, msr};

use crate::cpu::Cpu;
use crate::state::Seg;
use crate::vmx::MsrRefusal;

/// The MSRs that have storage in the core, by the SDM's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msrs {
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_SMBASE.
    pub smbase: u64,
    /// MSR_SMI_COUNT.
    pub smi_count: u64,
}

/// Where an MSR lives and what a write may hold.
enum Access {
    /// In [`Msrs`]; a write for which the function answers `None` is #GP(0).
    Held(fn(&mut Msrs) -> &mut u64, fn(&Cpu, u64) -> Option<u64>),
    /// The time-stamp counter.
    Tsc,
    /// IA32_EFER.
    Efer,
    /// The base of a segment register.
    Base(Seg),
}
use Access::{Base, Held, Tsc};

struct Row {
    index: u32,
    access: Access,
}

const fn row(index: u32, access: Access) -> Row {
    Row { index, access }
}

/// SDM Vol. 4 "Architectural MSRs". All but IA32_SMBASE are 0 after reset.
const ROWS: &[Row] = &[
    row(msr::IA32_TIME_STAMP_COUNTER, Tsc),
    row(msr::IA32_SYSENTER_CS, Held(|msrs| &mut msrs.sysenter_cs, |_, value| Some(value & 0xffff_ffff))),
    row(msr::IA32_SYSENTER_ESP, Held(|msrs| &mut msrs.sysenter_esp, |cpu, value| Some(made_canonical(cpu, value)))),
    row(msr::IA32_SYSENTER_EIP, Held(|msrs| &mut msrs.sysenter_eip, |cpu, value| Some(made_canonical(cpu, value)))),
    row(msr::IA32_EFER, Access::Efer),
    row(msr::IA32_STAR, Held(|msrs| &mut msrs.star, |_, value| Some(value))),
    row(msr::IA32_LSTAR, Held(|msrs| &mut msrs.lstar, canonical)),
    row(msr::IA32_CSTAR, Held(|msrs| &mut msrs.cstar, canonical)),
    row(msr::IA32_FMASK, Held(|msrs| &mut msrs.fmask, |_, value| Some(value & 0xffff_ffff))),
    row(msr::IA32_FS_BASE, Base(Seg::Fs)),
    row(msr::IA32_GS_BASE, Base(Seg::Gs)),
    row(msr::IA32_KERNEL_GS_BASE, Held(|msrs| &mut msrs.kernel_gs_base, canonical)),
    row(msr::IA32_TSC_AUX, Held(|msrs| &mut msrs.tsc_aux, |_, value| (value >> 32 == 0).then_some(value))),
    // The core has no supervisor state component.
    row(msr::IA32_XSS, Held(|msrs| &mut msrs.xss, |_, value| (value == 0).then_some(0))),
    row(msr::IA32_SMBASE, Held(|msrs| &mut msrs.smbase, |_, value| Some(value))),
    row(msr::MSR_SMI_COUNT, Held(|msrs| &mut msrs.smi_count, |_, value| Some(value))),
];

fn canonical(cpu: &Cpu, value: u64) -> Option<u64> {
    cpu.is_canonical(value).then_some(value)
}

/// 32-bit guests leave rubbish in the upper half, which AMD's ignore: KVM extends the sign (`__kvm_set_msr`).
fn made_canonical(cpu: &Cpu, value: u64) -> u64 {
    let unused = if cpu.cr4.contains(x86_defs::Cr4::LA57) { 7 } else { 16 };
    ((value << unused) as i64 >> unused) as u64
}

impl Cpu {
    /// The MSRs that the core holds, for KVM_GET_MSR_INDEX_LIST.
    pub fn msr_indices() -> impl Iterator<Item = u32> {
        ROWS.iter().map(|row| row.index)
    }

    /// Reads an MSR as RDMSR does. `None`: #GP(0).
    pub(crate) fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            msr::IA32_TSC_AUX if !self.has_tsc_aux() => None,
            msr::IA32_XSS if !self.offers(&cpuid::XSAVES) => None,
            // The VMM's, as in Linux.
            msr::IA32_SMBASE => None,
            _ => self.msr(index),
        }
    }

    /// Writes an MSR as WRMSR does. `None`: #GP(0).
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        match index {
            msr::IA32_TSC_AUX if !self.has_tsc_aux() => None,
            msr::IA32_XSS if !self.offers(&cpuid::XSAVES) => None,
            msr::IA32_EFER => self.write_efer(value),
            msr::IA32_SMBASE | msr::MSR_SMI_COUNT => None,
            _ => self.set_msr(index, value),
        }
    }

    /// Why an access to this MSR failed.
    pub(crate) fn msr_refusal(&mut self, index: u32) -> MsrRefusal {
        let is_known = ROWS.iter().any(|row| row.index == index) || self.platform.knows_msr(index);
        if is_known { MsrRefusal::Invalid } else { MsrRefusal::Unknown }
    }

    fn has_tsc_aux(&self) -> bool {
        self.offers(&cpuid::RDTSCP) || self.offers(&cpuid::RDPID)
    }

    /// Reads an MSR on behalf of the VMM. `None`: no such MSR.
    pub fn msr(&mut self, index: u32) -> Option<u64> {
        let Some(row) = ROWS.iter().find(|row| row.index == index) else { return self.platform.read_msr(index) };
        Some(match row.access {
            Held(field, _) => *field(&mut self.msrs),
            Tsc => self.platform.tsc(),
            Access::Efer => self.efer.bits(),
            Base(seg) => self.seg[seg as usize].base,
        })
    }

    /// Writes an MSR on behalf of the VMM: EFER without the checks that a running guest is held to, LMA as it is. `None`: no
    /// such MSR, or a value that it cannot hold.
    pub fn set_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let Some(row) = ROWS.iter().find(|row| row.index == index) else {
            return self.platform.write_msr(index, value);
        };
        match row.access {
            Held(field, accepted) => {
                let value = accepted(self, value)?;
                *field(&mut self.msrs) = value;
            }
            Tsc => self.platform.set_tsc(value),
            Access::Efer => self.load_efer(Efer::from_bits(value)?),
            Base(seg) => {
                self.seg[seg as usize].base = canonical(self, value)?;
                self.derive();
            }
        }
        Some(())
    }

    /// WRMSR of IA32_EFER: only what CPUID offers; LME may not change under paging. LMA is the processor's own.
    pub(crate) fn write_efer(&mut self, value: u64) -> Option<()> {
        const FEATURES: &[(Efer, cpuid::Feature)] = &[
            (Efer::SCE, cpuid::SYSCALL),
            (Efer::LME, cpuid::LM),
            (Efer::LMA, cpuid::LM),
            (Efer::NXE, cpuid::NX),
            (Efer::FFXSR, cpuid::FFXSR),
        ];
        let new = Efer::from_bits(value)?;
        const UNGATED: Efer = Efer::SCE.union(Efer::LME).union(Efer::LMA).union(Efer::NXE);
        let always = if self.variant.ungated_controls { UNGATED } else { Efer::empty() };
        let offered = FEATURES.iter().filter(|row| self.offers(&row.1)).fold(always, |all, row| all | row.0);
        let switches = (new ^ self.efer).contains(Efer::LME) && self.cr0.contains(Cr0::PG);
        if !offered.contains(new) || switches {
            return None;
        }
        self.load_efer(new);
        Some(())
    }

    fn load_efer(&mut self, new: Efer) {
        let old = self.efer;
        self.efer = (new - Efer::LMA) | (old & Efer::LMA);
        if (old ^ self.efer).contains(Efer::NXE) {
            self.flush_tlb();
        }
        self.derive();
    }
}
