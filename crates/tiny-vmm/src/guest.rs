//! One VM with one vCPU and one piece of RAM.
#![expect(unsafe_code, reason = "KVM is handed a pointer to the guest's RAM, and kvm_run is a union")]

use std::time::Duration;

use anyhow::{Context, Result};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::MmapMut;

use crate::alarm::Alarm;
use crate::{CODE, Mode, STACK};

/// A guest that has not run yet, or has exited. Its RAM is anonymous private memory, as QEMU's is.
pub struct Guest {
    // Dropped in this order: the vCPU before its VM, the RAM last.
    vcpu: VcpuFd,
    vm: VmFd,
    ram: MmapMut,
}

/// How a call of [`Guest::run_until_end`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// `KVM_EXIT_HLT`
    Hlt,
    /// `KVM_EXIT_SHUTDOWN`: a triple fault.
    Shutdown,
    /// `KVM_EXIT_INTERNAL_ERROR`
    InternalError(InternalError),
    /// `KVM_EXIT_FAIL_ENTRY` and its `hardware_entry_failure_reason`.
    FailEntry(u64),
    /// The time was over: `KVM_RUN` gave EINTR.
    Interrupted,
    /// So many port and MMIO exits that the guest was left alone.
    Busy,
    /// Any other exit, as kvm-ioctls prints it.
    Other(String),
    /// `KVM_RUN` failed with this errno.
    Errno(i32),
}

/// What `kvm_run` says about a `KVM_EXIT_INTERNAL_ERROR`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`
    pub suberror: u32,
    /// The valid words of `data`.
    pub data: Vec<u64>,
}

impl Guest {
    /// A guest with `ram` bytes from guest-physical 0, at least 1 MiB, and `code` at [`CODE`].
    pub fn new(mode: Mode, ram: usize, code: &[u8]) -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        Self::on(&kvm, mode, ram, code)
    }

    /// The same on an open /dev/kvm.
    pub fn on(kvm: &Kvm, mode: Mode, ram: usize, code: &[u8]) -> Result<Self> {
        Self::make(kvm, mode, ram, code, false)
    }

    /// The same with interrupt controllers in the kernel.
    pub fn with_irqchip(kvm: &Kvm, mode: Mode, ram: usize, code: &[u8]) -> Result<Self> {
        Self::make(kvm, mode, ram, code, true)
    }

    fn make(kvm: &Kvm, mode: Mode, ram: usize, code: &[u8], irqchip: bool) -> Result<Self> {
        assert!(ram >= 1 << 20, "the paging structures lie below 1 MiB");
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let mut ram = MmapMut::map_anon(ram).context("no memory for the guest")?;
        let start = usize::try_from(CODE).expect("64-bit host");
        ram[start..start + code.len()].copy_from_slice(code);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: ram.len() as u64,
            userspace_addr: ram.as_ptr() as u64,
        };
        // SAFETY: the region is the whole of `ram`, which `Guest` keeps mapped until the VM is closed, and which is
        // only touched here while no vCPU runs.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        if irqchip {
            vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        }
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        mode.enter(&mut sregs, &mut ram);
        vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        // RFLAGS bit 1 is always set.
        let regs = kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() };
        vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
        Ok(Self { vcpu, vm, ram })
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// The VM.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Guest RAM, while the vCPU does not run.
    pub fn ram(&mut self) -> &mut [u8] {
        &mut self.ram
    }

    /// Runs to the next exit; the caller answers it.
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.vcpu.run()
    }

    /// Runs on over at most 1000 port and MMIO exits, answered with ones as an empty bus does, to the first exit of
    /// another kind, or until `limit` is over.
    pub fn run_until_end(&mut self, limit: Duration) -> End {
        let _alarm = Alarm::new(limit);
        for _ in 0..1000 {
            match self.vcpu.run() {
                Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
                Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
                Ok(VcpuExit::Hlt) => return End::Hlt,
                Ok(VcpuExit::Shutdown) => return End::Shutdown,
                Ok(VcpuExit::FailEntry(reason, _)) => return End::FailEntry(reason),
                Ok(VcpuExit::InternalError) => return End::InternalError(self.internal_error()),
                Ok(other) => return End::Other(format!("{other:?}")),
                Err(error) if error.errno() == nix::errno::Errno::EINTR as i32 => return End::Interrupted,
                Err(error) => return End::Errno(error.errno()),
            }
        }
        End::Busy
    }

    fn internal_error(&mut self) -> InternalError {
        let run = self.vcpu.get_kvm_run();
        // SAFETY: `internal` is the union's member for KVM_EXIT_INTERNAL_ERROR, which was just reported; all its
        // fields are integers, for which every bit pattern is a value.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let words = internal.data.len().min(internal.ndata as usize);
        InternalError { suberror: internal.suberror, data: internal.data[..words].to_vec() }
    }
}
