//! A vCPU: what it is made of, and its thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use softkvm_tests::linux::{self, Memory, Start};

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

/// All of the VM that a vCPU's own steps need.
#[derive(Clone)]
pub struct Plan {
    pub vm: Arc<VmFd>,
    pub offered: Option<CpuId>,
    pub start: Option<Start>,
    pub memory: Memory,
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
            VcpuStep::Msrs => linux::set_boot_msrs(vcpu)?,
            VcpuStep::MsrsOneByOne => {
                const MTRR_CAP: kvm_msr_entry = kvm_msr_entry { index: 0xfe, reserved: 0, data: 0 };
                let _ = vcpu.get_msrs(&mut Msrs::from_entries(&[MTRR_CAP]).context("MSRs")?);
                for msr in linux::boot_msrs() {
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
            VcpuStep::Lapic => linux::set_lint(vcpu)?,
        }
        Ok(())
    }
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
