//! A vCPU: what it is made of, and its thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;

use crate::boot::Start;
use crate::bus::Bus;
use crate::kick::Target;
use crate::style::{Style, VcpuStep};

/// `KVM_SET_CPUID2`: what KVM offers, with this vCPU's APIC id, the hypervisor's bit and the timer's.
fn set_cpuid(vcpu: &VcpuFd, offered: &CpuId, id: u8, cpus: u8) -> Result<()> {
    let mut cpuid = offered.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | u32::from(id) << 24 | u32::from(cpus) << 16;
                // TSC deadline and hypervisor: SDM Vol. 2 "CPUID".
                entry.ecx |= 1 << 24 | 1 << 31;
            }
            0xb | 0x1f => entry.edx = id.into(),
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")
}

/// What Firecracker and Cloud Hypervisor write at boot, in one call: all of them must be taken.
fn boot_msrs() -> [kvm_msr_entry; 11] {
    let entry = |index, data| kvm_msr_entry { index, data, reserved: 0 };
    const MTRR_DEFAULT: u64 = 0xc06;
    [
        entry(0x174, 0),
        entry(0x175, 0),
        entry(0x176, 0),
        entry(0xc000_0081, 0),
        entry(0xc000_0083, 0),
        entry(0xc000_0102, 0),
        entry(0xc000_0084, 0),
        entry(0xc000_0082, 0),
        entry(0x10, 0),
        entry(0x1a0, 1),
        entry(0x2ff, MTRR_DEFAULT),
    ]
}

/// All of the VM that a vCPU's own steps need.
#[derive(Clone)]
pub struct Plan {
    pub vm: Arc<VmFd>,
    pub offered: Option<CpuId>,
    pub start: Option<Start>,
    pub memory: GuestMemoryMmap<()>,
    pub cpus: u8,
}

impl Plan {
    fn start(&self) -> Result<Start> {
        self.start.context("the style needs a kernel before it is loaded")
    }

    /// Takes a step of vCPU `id`.
    pub fn step(&self, step: VcpuStep, id: u8, vcpu: &mut Option<VcpuFd>) -> Result<()> {
        if let VcpuStep::Create = step {
            *vcpu = Some(self.vm.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?);
            return Ok(());
        }
        let vcpu = vcpu.as_mut().context("the style needs a vCPU before it is made")?;
        match step {
            VcpuStep::Create => {}
            VcpuStep::Caps => {
                self.vm.check_extension_int(Cap::Xsave2);
                self.vm.check_extension_int(Cap::Xcrs);
            }
            VcpuStep::TscKhz => {
                vcpu.get_tsc_khz().context("KVM_GET_TSC_KHZ")?;
            }
            VcpuStep::Cpuid => {
                set_cpuid(vcpu, self.offered.as_ref().context("CPUID was not asked for")?, id, self.cpus)?;
            }
            VcpuStep::Msrs => {
                let msrs = boot_msrs();
                let set = vcpu.set_msrs(&Msrs::from_entries(&msrs).context("MSRs")?).context("KVM_SET_MSRS")?;
                if set != msrs.len() {
                    bail!("KVM_SET_MSRS took {set} of {}", msrs.len());
                }
            }
            VcpuStep::MsrsOneByOne => {
                const MTRR_CAP: kvm_msr_entry = kvm_msr_entry { index: 0xfe, reserved: 0, data: 0 };
                let _ = vcpu.get_msrs(&mut Msrs::from_entries(&[MTRR_CAP]).context("MSRs")?);
                for msr in boot_msrs() {
                    let set = vcpu.set_msrs(&Msrs::from_entries(&[msr]).context("MSRs")?).context("KVM_SET_MSRS")?;
                    if set != 1 {
                        bail!("KVM_SET_MSRS did not take {:#x}", msr.index);
                    }
                }
            }
            VcpuStep::Regs => vcpu.set_regs(&self.start()?.regs()).context("KVM_SET_REGS")?,
            VcpuStep::Fpu => {
                let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
                vcpu.set_fpu(&fpu).context("KVM_SET_FPU")?;
            }
            VcpuStep::Sregs => {
                let sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
                vcpu.set_sregs(&self.start()?.sregs(&self.memory, sregs)?).context("KVM_SET_SREGS")?;
            }
            VcpuStep::Lapic => set_lint(vcpu)?,
        }
        Ok(())
    }
}

/// LINT0 is the PIC's, LINT1 is NMI: what every VMM makes of the local APIC's reset state.
fn set_lint(vcpu: &VcpuFd) -> Result<()> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    for (register, mode) in [(LVT_LINT0, 7_u32), (LVT_LINT1, 4)] {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(&lapic.regs[register..]).for_each(|(to, from)| *to = from.cast_unsigned());
        let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
        lapic.regs[register..].iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte.cast_signed());
    }
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}

/// What a vCPU's thread has.
pub struct Runner {
    pub style: &'static Style,
    pub id: u8,
    pub plan: Plan,
    pub bus: Arc<Bus>,
    pub target: Arc<Target>,
    pub stop: Arc<AtomicBool>,
}

impl Runner {
    /// Runs until it is told to stop. The vCPU is given back: a filter may forbid its thread to close it.
    pub fn run(&self, mut vcpu: Option<VcpuFd>) -> (Result<()>, Option<VcpuFd>) {
        let result = self.run_until_told(&mut vcpu);
        self.target.leave();
        if result.is_err() {
            // The main thread shall not wait for a guest that has no CPU.
            let _ = self.bus.reset.write(1);
        }
        (result, vcpu)
    }

    fn run_until_told(&self, vcpu: &mut Option<VcpuFd>) -> Result<()> {
        for step in self.style.on_thread {
            self.plan.step(*step, self.id, vcpu).with_context(|| format!("{step:?}"))?;
        }
        let vcpu = vcpu.as_mut().context("nobody has made the vCPU")?;
        self.target.enter(vcpu);
        self.style.filter.on_vcpu()?;
        self.exits(vcpu)
    }

    fn exits(&self, vcpu: &mut VcpuFd) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            match vcpu.run() {
                Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
                Ok(VcpuExit::IoOut(port, data)) => self.bus.port_write(port, data)?,
                Ok(VcpuExit::MmioRead(address, data)) => self.bus.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.bus.write(address, data)?,
                // No line of ours is level-triggered.
                Ok(VcpuExit::IoapicEoi(_)) => {}
                // HLT waits inside KVM_RUN: an exit is an error to all of them.
                Ok(other) => bail!("exit {other:?}"),
                Err(error) if error.errno() == libc::EINTR => self.target.interrupted(self.style.kick, vcpu)?,
                // A processor that has just been started.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => bail!("KVM_RUN: {error}"),
            }
        }
        Ok(())
    }
}
