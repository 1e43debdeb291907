//! A vCPU: what it is made of, and its thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;

use crate::boot::Start;
use crate::bus::Bus;
use crate::kick::Target;
use crate::style::Style;

/// `KVM_SET_CPUID2`: what KVM offers, with this vCPU's APIC id, the hypervisor's bit and the timer's.
pub fn set_cpuid(vcpu: &VcpuFd, offered: &CpuId, id: u8, cpus: u8) -> Result<()> {
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

/// Registers, in Firecracker's order.
pub fn set_state(vcpu: &VcpuFd, start: Start, memory: &GuestMemoryMmap<()>, lapic: bool) -> Result<()> {
    let msrs = boot_msrs();
    let set = vcpu.set_msrs(&Msrs::from_entries(&msrs).context("MSRs")?).context("KVM_SET_MSRS")?;
    if set != msrs.len() {
        bail!("KVM_SET_MSRS took {set} of {}", msrs.len());
    }
    vcpu.set_regs(&start.regs()).context("KVM_SET_REGS")?;
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }).context("KVM_SET_FPU")?;
    let sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    vcpu.set_sregs(&start.sregs(memory, sregs)?).context("KVM_SET_SREGS")?;
    if lapic {
        set_lint(vcpu)?;
    }
    Ok(())
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
    pub bus: Arc<Bus>,
    pub target: Arc<Target>,
    pub stop: Arc<AtomicBool>,
}

impl Runner {
    /// Runs until it is told to stop.
    pub fn run(&self, vcpu: &mut VcpuFd) -> Result<()> {
        self.target.enter(vcpu);
        let result = self.style.filter.on_vcpu().and_then(|()| self.exits(vcpu));
        self.target.leave();
        if result.is_err() {
            // The main thread shall not wait for a guest that has no CPU.
            let _ = self.bus.reset.write(1);
        }
        result
    }

    fn exits(&self, vcpu: &mut VcpuFd) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            match vcpu.run() {
                Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
                Ok(VcpuExit::IoOut(port, data)) => self.bus.port_write(port, data)?,
                Ok(VcpuExit::MmioRead(address, data)) => self.bus.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.bus.write(address, data)?,
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
