//! A plain VMM: RAM, one processor, the kernel's interrupt controllers and timer, and a serial port that is stdout. Linux
//! starts at the 64-bit entry of its bzImage, without firmware.
#![expect(unsafe_code, reason = "KVM is handed a pointer to the guest's RAM")]

use std::fs;
use std::io::{Stdout, stdout};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use assets::iso;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use nix::errno::Errno;
use softkvm_tests::acpi::{self, SERIAL_IRQ, serial_register};
use softkvm_tests::linux::{self, Memory};
use softkvm_tests::softkvm;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::image::Image;

/// This program as the VMM, on softkvm's /dev/kvm.
pub(crate) fn command(image: &Image) -> Result<Command> {
    let me = std::env::current_exe().context("our own path")?;
    let memory = image.guest.memory_mib().to_string();
    let arguments = [me.as_os_str(), "--plain".as_ref(), image.kernel.as_os_str(), image.initrd.as_os_str()];
    softkvm::run::<&str, _>(&[], &[&arguments[..], &[memory.as_ref(), image.options.as_ref()]].concat())
}

/// Boots a kernel on the /dev/kvm that is there. It ends when the guest resets the machine; power off, of which the guest knows
/// no way, halts it. `arguments`: kernel, initramfs, MiB of RAM, command line.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [kernel, initrd, memory_mib, options] = arguments else { bail!("--plain KERNEL INITRD MIB OPTIONS") };
    let size = memory_mib.parse::<usize>().context("MiB of RAM")? << 20;
    // Anonymous private pages.
    let memory = Memory::from_ranges(&[(GuestAddress(0), size)]).context("no memory for the guest")?;
    let initrd = fs::read(initrd).with_context(|| format!("cannot read {initrd}"))?;
    let initrd = linux::put_initrd(&memory, &initrd)?;
    // By the keyboard controller: there is no other way.
    linux::put_command_line(&memory, &format!("{options} reboot=k"))?;
    let rsdp = acpi::write(&memory, 1, Vec::new())?;
    let start = linux::put_bzimage(&memory, Path::new(kernel), initrd, rsdp)?;

    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    // Where no VMM's guest has anything; KVM on Intel's processors wants three pages.
    vm.set_tss_address(0xfffb_d000).context("KVM_SET_TSS_ADDR")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).context("KVM_CREATE_PIT2")?;
    let host = memory.get_host_address(GuestAddress(0)).context("RAM begins at 0")?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: size as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is the whole of `memory`, which is declared before the VM and so unmapped after it is gone. Nobody
    // here has a reference into it: vm-memory reads and writes it by pointers.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    let interrupt = EventFd::new(EFD_NONBLOCK).context("an eventfd")?;
    vm.register_irqfd(&interrupt, SERIAL_IRQ.into()).context("KVM_IRQFD")?;

    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&qemu64(&offered)?).context("KVM_SET_CPUID2")?;
    let sregs = start.sregs(&memory, vcpu.get_sregs().context("KVM_GET_SREGS")?)?;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&start.regs()).context("KVM_SET_REGS")?;
    linux::set_boot_msrs(&vcpu)?;
    linux::set_lint(&vcpu)?;
    println!("{}", iso::ENTERING);
    exits(&mut vcpu, &mut Serial::new(Irqfd(interrupt), stdout()))
}

/// The serial port's interrupt.
struct Irqfd(EventFd);

impl Trigger for Irqfd {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// Runs the guest until it resets the machine. What nobody answers reads as ones, as on an empty bus.
fn exits(vcpu: &mut VcpuFd, serial: &mut Serial<Irqfd, NoEvents, Stdout>) -> Result<()> {
    /// Of the keyboard controller there is the one command that pulls the reset line, for which its buffer is always empty.
    const KEYBOARD: u16 = 0x64;
    const RESET: &[u8] = &[0xfe];
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(KEYBOARD, data)) => data.fill(0),
            Ok(VcpuExit::IoIn(port, data)) => match (serial_register(port), &mut *data) {
                (Some(register), [byte]) => *byte = serial.read(register),
                _ => data.fill(0xff),
            },
            Ok(VcpuExit::IoOut(KEYBOARD, RESET) | VcpuExit::Shutdown) => return Ok(()),
            Ok(VcpuExit::IoOut(port, data)) => {
                if let (Some(register), [byte]) = (serial_register(port), data) {
                    serial.write(register, *byte).map_err(|error| anyhow!("the serial port: {error:?}"))?;
                }
            }
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::MmioWrite(..)) => {}
            // HLT waits inside KVM_RUN.
            Ok(other) => bail!("exit {other:?}"),
            Err(error) if error.errno() == Errno::EINTR as i32 => {}
            Err(error) => bail!("KVM_RUN: {error}"),
        }
    }
}

/// What a guest reads in QEMU 7.2 with `-accel kvm -cpu qemu64`: leaf, index, EAX, EBX, ECX, EDX. Other leaves are zeros.
const QEMU64: &[[u32; 6]] = &[
    [0x0, 0, 0xd, 0, 0, 0],
    [0x1, 0, 0x0006_0fb1, 0x0000_0800, 0x8020_2001, 0x078b_fbfd],
    [0x2, 0, 0x0000_0001, 0, 0x0000_004d, 0x002c_307d],
    // Caches.
    [0x4, 0, 0x0000_0121, 0x01c0_003f, 0x0000_003f, 0x0000_0001],
    [0x4, 1, 0x0000_0122, 0x01c0_003f, 0x0000_003f, 0x0000_0001],
    [0x4, 2, 0x0000_0143, 0x03c0_003f, 0x0000_0fff, 0x0000_0001],
    [0x4, 3, 0x0000_0163, 0x03c0_003f, 0x0000_3fff, 0x0000_0006],
    [0x5, 0, 0, 0, 0x0000_0003, 0],
    // One processor.
    [0xb, 0, 0, 1, 0x0000_0100, 0],
    [0xb, 1, 0, 1, 0x0000_0201, 0],
    // KVM's own: clock, steal time, EOI.
    [0x4000_0000, 0, 0x4000_0001, 0, 0, 0],
    [0x4000_0001, 0, 0x0100_006b, 0, 0, 0],
    [0x8000_0000, 0, 0x8000_000a, 0, 0, 0],
    [0x8000_0001, 0, 0x0006_0fb1, 0, 0x0000_0001, 0x2010_0800],
    // "QEMU Virtual CPU version 2.5+"
    [0x8000_0002, 0, 0x554d_4551, 0x7269_5620, 0x6c61_7574, 0x5550_4320],
    [0x8000_0003, 0, 0x7265_7620, 0x6e6f_6973, 0x352e_3220, 0x0000_002b],
    // Caches and TLBs, in AMD's form.
    [0x8000_0005, 0, 0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
    [0x8000_0006, 0, 0, 0x4200_4200, 0x0200_8140, 0x0080_8140],
    [0x8000_0008, 0, 0x0000_3028, 0, 0, 0],
];

/// The processor that the guest has in QEMU as well. Its vendor is the host's, as QEMU has it with KVM. What differs: where that
/// is AMD, QEMU repeats bits of leaf 1 in leaf 80000001H.
fn qemu64(offered: &CpuId) -> Result<CpuId> {
    let vendor_of = |leaf: u32| {
        let entry = offered.as_slice().iter().find(|entry| entry.function == leaf);
        entry.with_context(|| format!("KVM_GET_SUPPORTED_CPUID has no leaf {leaf:#x}"))
    };
    let mut entries = Vec::new();
    for &[function, index, eax, ebx, ecx, edx] in QEMU64 {
        let flags = if matches!(function, 4 | 0xb) { kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        let mut entry = kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() };
        // 0 and 80000000H name the vendor, 40000000H the hypervisor.
        if function & 0x3fff_ffff == 0 {
            let vendor = vendor_of(function)?;
            (entry.ebx, entry.ecx, entry.edx) = (vendor.ebx, vendor.ecx, vendor.edx);
        }
        entries.push(entry);
    }
    CpuId::from_entries(&entries).map_err(|error| anyhow!("{error:?}"))
}
