//! What user space chooses for a VM: quirks, limits, rates, MSRs that are its own. What must happen is said by api.rst, "Capabilities
//! that can be enabled on VMs", and by x86.c, cpuid.c and lapic.c of Linux 6.1.

mod common;

use std::sync::Arc;

use common::{BASE, FakeClient, SCRATCH};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{
    DeviceAttr, MsrFilter, Plain, kvm_cpuid_entry2, kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_x86_mce,
};
use mmu::Mapping;
use nix::errno::Errno;

const CODE: u64 = 0x1000;
/// Of #UD, #GP and interrupt 30H: says so at a port, with AX, and goes behind an instruction of three bytes.
const HANDLER: u64 = 0x3000;
const CR0_PE: u64 = 1;

const PLATFORM_INFO: u32 = 0xce;
const ARCH_CAPABILITIES: u32 = 0x10a;
const MISC_FEATURES: u32 = 0x140;
const MISC_ENABLE: u32 = 0x1a0;
const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const FMASK: u32 = 0xc000_0084;

type Code = Result<(), IcedError>;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    page: Arc<Mapping>,
}

fn assemble(client: &FakeClient, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Code) {
    let mut a = CodeAssembler::new(16).unwrap();
    code(&mut a).unwrap();
    client.memory.write(at, &a.assemble(at).unwrap()).unwrap();
}

/// A VM with 64 KiB of RAM.
fn new_vm() -> (Arc<FakeClient>, i32) {
    let client = FakeClient::new();
    let vm = client.vm_with_ram(0x1_0000);
    (client, vm)
}

impl Machine {
    /// A vCPU in real mode.
    fn new(code: impl FnOnce(&mut CodeAssembler) -> Code) -> Self {
        let (client, vm) = new_vm();
        Self::of(client, vm, code)
    }

    fn with_chip(code: impl FnOnce(&mut CodeAssembler) -> Code) -> Self {
        let (client, vm) = new_vm();
        client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        Self::of(client, vm, code)
    }

    fn of(client: Arc<FakeClient>, vm: i32, code: impl FnOnce(&mut CodeAssembler) -> Code) -> Self {
        assemble(&client, CODE, code);
        for (vector, port) in [(6, 0xf6u64), (13, 0xfd), (0x30, 0x30)] {
            let at = HANDLER + 0x20 * (port & 0xf);
            assemble(&client, at, |a| {
                a.out(port as i32, eax)?;
                a.mov(bp, sp)?;
                a.add(word_ptr(bp), 3)?;
                a.iret()
            });
            client.write_u32(BASE + 4 * vector, at as u32);
        }
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let page = client.map(vcpu);
        let machine = Self { client, vm, vcpu, page };
        let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        // Also what lies above 1 MiB.
        (sregs.ds.limit, sregs.ds.g) = (0xffff_ffff, 1);
        machine.set(KVM_SET_SREGS, &sregs).unwrap();
        machine.set(KVM_SET_REGS, &kvm_regs { rip: CODE, rflags: 2, rsp: 0x8000, ..Plain::zeroed() }).unwrap();
        machine
    }

    fn get<T: Plain>(&self, request: u32) -> T {
        self.client.get(self.vcpu, request)
    }

    fn set<T: Plain>(&self, request: u32, value: &T) -> Result<i32, Errno> {
        self.client.set(self.vcpu, request, value)
    }

    fn enable(&self, cap: u32, value: u64) -> Result<i32, Errno> {
        self.client.enable(self.vm, cap, value)
    }

    fn run(&self) -> u32 {
        self.client.ioctl(self.vcpu, KVM_RUN, 0).unwrap();
        self.page.load_u32(8).unwrap()
    }

    /// Runs to the next OUT: its port and value.
    fn out(&self) -> (u16, u32) {
        let reason = self.run();
        assert_eq!(reason, KVM_EXIT_IO, "{:#x}", self.get::<kvm_regs>(KVM_GET_REGS).rip);
        let (port, data) = (self.page.load_u16(34).unwrap(), self.page.load_u32(4096).unwrap());
        (port, if self.page.load_u8(33).unwrap() == 1 { data & 0xff } else { data })
    }

    /// An exit for an MSR: reason of the exit, why, index, data.
    fn msr_exit(&self) -> (u32, u32, u32, u64) {
        let reason = self.run();
        let [why, index] = [40, 44].map(|at| self.page.load_u32(at).unwrap());
        (reason, why, index, self.page.load_u64(48).unwrap())
    }

    fn set_cpuid(&self, table: &[kvm_cpuid_entry2]) {
        let mut bytes = [table.len() as u32, 0].map(u32::to_le_bytes).concat();
        bytes.extend(table.iter().flat_map(|entry| entry.as_bytes()));
        self.client.ioctl_bytes(self.vcpu, KVM_SET_CPUID2, bytes).unwrap();
    }

    fn cpuid_of(&self, leaf: u32) -> kvm_cpuid_entry2 {
        let mut bytes = vec![0; 8 + 40 * 100];
        bytes[0] = 100;
        let (_, after) = self.client.ioctl_bytes(self.vcpu, KVM_GET_CPUID2, bytes).unwrap();
        let mut entries = after[8..].chunks_exact(40).filter_map(kvm_cpuid_entry2::from_bytes);
        entries.find(|entry| entry.function == leaf).unwrap()
    }

    fn set_msr(&self, index: u32, data: u64) -> i32 {
        let entry = kvm_msr_entry { index, data, ..Plain::zeroed() };
        let bytes = [&[1, 0, 0, 0, 0, 0, 0, 0], entry.as_bytes()].concat();
        self.client.ioctl_bytes(self.vcpu, KVM_SET_MSRS, bytes).unwrap().0
    }

    fn msr(&self, index: u32) -> u64 {
        let entry = kvm_msr_entry { index, ..Plain::zeroed() };
        let bytes = [&[1, 0, 0, 0, 0, 0, 0, 0], entry.as_bytes()].concat();
        let (count, after) = self.client.ioctl_bytes(self.vcpu, KVM_GET_MSRS, bytes).unwrap();
        assert_eq!(count, 1, "{index:#x}");
        kvm_msr_entry::from_bytes(&after[8..]).unwrap().data
    }
}

fn leaf(function: u32, c: u32, b: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, ecx: c, ebx: b, ..Plain::zeroed() }
}

fn is_amd() -> bool {
    matches!(std::arch::x86_64::__cpuid(0).ebx.to_le_bytes(), [b'A', b'u', b't', b'h'] | [b'H', b'y', b'g', b'o'])
}

fn rdmsr(a: &mut CodeAssembler, index: u32) -> Code {
    a.mov(ecx, index)?;
    a.rdmsr()?;
    // Three bytes with RDMSR, for the handler.
    a.nop()
}

fn wrmsr(a: &mut CodeAssembler, index: u32, high: u32, low: u32) -> Code {
    a.mov(ecx, index)?;
    a.mov(edx, high)?;
    a.mov(eax, low)?;
    a.wrmsr()?;
    a.nop()
}

#[test]
fn unknown_quirks_are_refused_by_the_second_capability_alone() {
    let (client, vm) = new_vm();
    assert_eq!(client.ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_DISABLE_QUIRKS2.into()), Ok(0x7f));
    assert_eq!(client.enable(vm, KVM_CAP_DISABLE_QUIRKS2, 0x80), Err(Errno::EINVAL));
    assert_eq!(client.enable(vm, KVM_CAP_DISABLE_QUIRKS2, 0x7f), Ok(0));
    assert_eq!(client.enable(vm, KVM_CAP_DISABLE_QUIRKS, 0x80), Ok(0));
}

/// `emulator_fix_hypercall`.
#[test]
fn the_other_vendors_hypercall_is_patched_or_undefined() {
    let code = |a: &mut CodeAssembler| {
        a.mov(eax, 99)?;
        if is_amd() {
            a.vmcall()?
        } else {
            a.vmmcall()?
        }
        a.out(0x80, eax)?;
        a.mov(al, byte_ptr(CODE as i32 + 8))?;
        a.out(0x81, al)
    };
    let machine = Machine::new(code);
    assert_eq!(machine.out(), (0x80, -1000i32 as u32));
    assert_eq!(machine.out(), (0x81, if is_amd() { 0xd9 } else { 0xc1 }));
    let machine = Machine::new(code);
    machine.enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into()).unwrap();
    assert_eq!(machine.out(), (0xf6, 99));
    assert_eq!(machine.out(), (0x80, 99));
    assert_eq!(machine.out(), (0x81, if is_amd() { 0xc1 } else { 0xd9 }));
}

/// `kvm_emulate_monitor_mwait`.
#[test]
fn monitor_and_mwait_are_undefined_without_cpuid_once_the_quirk_is_off() {
    let machine = Machine::new(|a| {
        a.monitor()?;
        a.out(0x80, al)?;
        a.monitor()?;
        a.mwait()?;
        a.out(0x81, al)
    });
    machine.set_cpuid(&[leaf(0, 0, 0)]);
    assert_eq!(machine.out().0, 0x80);
    machine.enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS.into()).unwrap();
    assert_eq!([machine.out().0, machine.out().0, machine.out().0], [0xf6, 0xf6, 0x81]);
}

/// `kvm_set_msr_common`, `__kvm_update_cpuid_runtime`.
#[test]
fn the_monitor_bit_of_cpuid_follows_misc_enable_once_the_quirk_is_off() {
    const MONITOR: u32 = 1 << 3;
    let machine = Machine::new(|a| {
        rdmsr(a, MISC_ENABLE)?;
        a.xor(eax, 1 << 18)?;
        a.wrmsr()?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.out(0x80, eax)?;
        a.mov(eax, ecx)?;
        a.out(0x81, eax)?;
        // Performance monitoring is not the guest's to change.
        a.mov(ecx, MISC_ENABLE)?;
        a.rdmsr()?;
        a.xor(eax, 1 << 11)?;
        a.wrmsr()?;
        a.nop()?;
        a.out(0x82, al)
    });
    machine.set_cpuid(&[leaf(0, 0, 0), leaf(1, 1, 0)]);
    assert_eq!(machine.set_msr(MISC_ENABLE, 1 << 18), 1);
    assert_eq!(machine.cpuid_of(1).ecx & MONITOR, 0, "the quirk is on");
    machine.enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT.into()).unwrap();
    assert_eq!(machine.set_msr(MISC_ENABLE, 0x1800), 1);
    assert_eq!(machine.cpuid_of(1).ecx & MONITOR, 0);
    machine.out();
    let (port, features) = machine.out();
    assert_eq!((port, features & MONITOR), (0x81, MONITOR));
    assert_eq!(machine.cpuid_of(1).ecx & MONITOR, MONITOR);
    assert_eq!(machine.out().0, 0xfd);
    assert_eq!(machine.msr(MISC_ENABLE), 0x1800 | 1 << 18);
    machine.out();
    // Without SSE3 there can be no MONITOR.
    let machine = Machine::new(|a| a.nop());
    machine.enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT.into()).unwrap();
    assert_eq!(machine.set_msr(MISC_ENABLE, 0x1800 | 1 << 18), 0);
}

/// `apic_mmio_read`: a disabled APIC leaves a hole too.
#[test]
fn the_hole_of_an_absent_apic_page_is_user_spaces_once_the_quirk_is_off() {
    for base in [0xfee0_0000u64, 0xfee0_0c00] {
        let machine = Machine::with_chip(|a| {
            a.mov(ebx, 0xfee0_0030u32)?;
            a.mov(eax, dword_ptr(ebx))?;
            a.out(0x80, eax)?;
            a.mov(dword_ptr(ebx), eax)?;
            a.out(0x81, eax)?;
            a.mov(dword_ptr(ebx), eax)?;
            a.mov(eax, dword_ptr(ebx))
        });
        machine.set_cpuid(&[leaf(0, 0, 0), leaf(1, 1 << 21, 0)]);
        let sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
        machine.set(KVM_SET_SREGS, &kvm_sregs { apic_base: base, ..sregs }).unwrap();
        assert_eq!(machine.out(), (0x80, u32::MAX), "{base:#x}");
        assert_eq!(machine.out().0, 0x81);
        machine.enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LAPIC_MMIO_HOLE.into()).unwrap();
        for write in [1, 0] {
            assert_eq!(machine.run(), KVM_EXIT_MMIO);
            assert_eq!((machine.page.load_u64(32), machine.page.load_u8(52)), (Some(0xfee0_0030), Some(write)));
        }
    }
}

/// `kvm_lapic_reset`.
#[test]
fn lint0_of_the_bootstrap_processor_is_masked_once_the_quirk_is_off() {
    for (quirks, lint0) in [(0, 0x700), (KVM_X86_QUIRK_LINT0_REENABLED, 0x1_0000)] {
        let (client, vm) = new_vm();
        client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        client.enable(vm, KVM_CAP_DISABLE_QUIRKS2, quirks.into()).unwrap();
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let lapic: [u32; 256] = client.get(vcpu, KVM_GET_LAPIC);
        assert_eq!(lapic[0x350 / 4], lint0);
    }
}

/// `kvm_fast_pio_out`.
#[test]
fn rip_is_at_an_out_to_port_7e_once_the_quirk_is_off() {
    let machine = Machine::new(|a| {
        a.out(0x7e, al)?;
        a.out(0x7e, al)
    });
    machine.out();
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rip, CODE + 2);
    machine.enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP.into()).unwrap();
    machine.out();
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rip, CODE + 2);
}

#[test]
fn guests_read_platform_information_if_user_space_lets_them() {
    let machine = Machine::new(|a| {
        for port in [0x80, 0x81] {
            rdmsr(a, PLATFORM_INFO)?;
            a.out(port, eax)?;
        }
        wrmsr(a, PLATFORM_INFO, 0, 1 << 31)
    });
    assert_eq!(machine.msr(PLATFORM_INFO), 1 << 31);
    assert_eq!(machine.set_msr(PLATFORM_INFO, 1 << 31 | 0xff00), 1);
    assert_eq!(machine.out(), (0x80, 1 << 31 | 0xff00));
    machine.enable(KVM_CAP_MSR_PLATFORM_INFO, 0).unwrap();
    assert_eq!([machine.out().0, machine.out().0], [0xfd, 0x81]);
    assert_eq!(machine.msr(PLATFORM_INFO), 1 << 31 | 0xff00);
    assert_eq!(machine.out().0, 0xfd, "a guest never writes it");
}

/// `kvm_get_msr_common`: only where CPUID.7.0:EDX bit 29 tells of it. User space loads what it likes, a guest nothing.
#[test]
fn guests_read_arch_capabilities_if_cpuid_tells_of_them() {
    let machine = Machine::new(|a| {
        for port in [0x80, 0x81] {
            rdmsr(a, ARCH_CAPABILITIES)?;
            a.out(port, eax)?;
        }
        wrmsr(a, ARCH_CAPABILITIES, 0, 0)
    });
    assert_eq!(machine.set_msr(ARCH_CAPABILITIES, 0x1_0000_0021), 1);
    assert_eq!(machine.msr(ARCH_CAPABILITIES), 0x1_0000_0021);
    assert_eq!(machine.out().0, 0xfd, "no CPUID");
    let machine = Machine::new(|a| {
        rdmsr(a, ARCH_CAPABILITIES)?;
        a.out(0x80, eax)?;
        wrmsr(a, ARCH_CAPABILITIES, 0, 0)
    });
    let entry = kvm_cpuid_entry2 { function: 7, flags: 1, edx: 1 << 29, ..Plain::zeroed() };
    machine.set_cpuid(&[entry]);
    assert_eq!(machine.set_msr(ARCH_CAPABILITIES, 0x21), 1);
    assert_eq!(machine.out(), (0x80, 0x21));
    assert_eq!(machine.out().0, 0xfd, "a guest never writes them");
}

/// `kvm_emulate_cpuid`; MSR_MISC_FEATURES_ENABLES in `kvm_set_msr_common`.
#[test]
fn cpuid_faults_above_level_0_where_the_guest_wants_it() {
    // Virtual-8086 mode is level 3.
    let machine = Machine::new(|a| {
        a.out(0x80, al)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.out(0x81, al)
    });
    assert_eq!(machine.set_msr(PLATFORM_INFO, 0), 1);
    assert_eq!(machine.set_msr(MISC_FEATURES, 1), 0, "the processor cannot");
    assert_eq!(machine.set_msr(PLATFORM_INFO, 1 << 31), 1);
    assert_eq!(machine.set_msr(MISC_FEATURES, 2), 0);
    assert_eq!(machine.set_msr(MISC_FEATURES, 1), 1);
    assert_eq!(machine.set_msr(PLATFORM_INFO, 0), 0, "it is in use");
    machine.out();
    assert_eq!(machine.out().0, 0x81, "level 0");

    let machine = Machine::new(|a| {
        a.xor(eax, eax)?;
        a.cpuid()
    });
    assert_eq!(machine.set_msr(MISC_FEATURES, 1), 1);
    let mut sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        (segment.dpl, segment.limit, segment.g, segment.type_) = (3, 0xffff, 0, 3);
        segment.base = u64::from(segment.selector) << 4;
    }
    sregs.cr0 |= CR0_PE;
    // No gate is within the limit: the fault of CPUID becomes a triple fault.
    sregs.idt.limit = 0;
    machine.set(KVM_SET_SREGS, &sregs).unwrap();
    let regs: kvm_regs = machine.get(KVM_GET_REGS);
    machine.set(KVM_SET_REGS, &kvm_regs { rflags: 2 | 1 << 17 | 3 << 12, ..regs }).unwrap();
    assert_eq!(machine.run(), KVM_EXIT_SHUTDOWN);
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rip, CODE + 3, "at CPUID");
}

/// `kvm_set_boot_cpu_id`, `kvm_arch_vcpu_create`, `kvm_lapic_reset`.
#[test]
fn another_vcpu_is_the_bootstrap_processor() {
    let (client, vm) = new_vm();
    client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
    assert_eq!(client.ioctl(vm, KVM_SET_BOOT_CPU_ID, 1), Ok(0));
    for (id, state, bsp) in [(0, KVM_MP_STATE_UNINITIALIZED, 0), (1, KVM_MP_STATE_RUNNABLE, 1 << 8)] {
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
        assert_eq!(client.get::<kvm_mp_state>(vcpu, KVM_GET_MP_STATE).mp_state, state, "{id}");
        assert_eq!(client.get::<kvm_sregs>(vcpu, KVM_GET_SREGS).apic_base & 1 << 8, bsp, "{id}");
    }
    assert_eq!(client.ioctl(vm, KVM_SET_BOOT_CPU_ID, 0), Err(Errno::EBUSY));
}

/// `kvm_vm_ioctl_enable_cap`, `kvm_arch_vcpu_precreate`.
#[test]
fn ids_have_a_limit_that_is_set_once() {
    let (client, vm) = new_vm();
    let limit = |value| client.enable(vm, KVM_CAP_MAX_VCPU_ID, value);
    assert_eq!(limit(4097), Err(Errno::EINVAL));
    assert_eq!(limit(0), Ok(0));
    assert_eq!([limit(2), limit(2)], [Ok(0), Ok(0)]);
    assert_eq!([limit(3), limit(0)], [Err(Errno::EINVAL), Err(Errno::EINVAL)]);
    assert_eq!(client.ioctl(vm, KVM_CREATE_VCPU, 2), Err(Errno::EINVAL));
    assert!(client.ioctl(vm, KVM_CREATE_VCPU, 1).is_ok());
    let (client, vm) = new_vm();
    client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    assert_eq!(client.enable(vm, KVM_CAP_MAX_VCPU_ID, 2), Err(Errno::EINVAL), "the first vCPU fixes it");
}

/// `kvm_arch_commit_memory_region`: one page for 50 of memory, 64 at the least.
#[test]
fn pages_of_page_tables_are_counted() {
    let client = FakeClient::new();
    let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
    let pages = || client.ioctl(vm, KVM_GET_NR_MMU_PAGES, 0).unwrap();
    let slot = |slot, pages: u64| {
        let guest_phys_addr = u64::from(slot) << 32;
        let memory_size = pages * 4096;
        client.slot(vm, (slot, 0), guest_phys_addr, memory_size, 0).unwrap();
    };
    assert_eq!(pages(), 0);
    slot(0, 1);
    assert_eq!(pages(), 64);
    slot(1, 3600);
    slot(2, 3600);
    assert_eq!(pages(), 7201 / 50);
    slot(1, 0);
    assert_eq!(pages(), 3601 / 50);
    assert_eq!(client.ioctl(vm, KVM_SET_NR_MMU_PAGES, 63), Err(Errno::EINVAL));
    assert_eq!(client.ioctl(vm, KVM_SET_NR_MMU_PAGES, 1000), Ok(0));
    slot(2, 0);
    assert_eq!(pages(), 1000);
}

#[test]
fn new_vcpus_have_the_rate_of_their_vm() {
    let (client, vm) = new_vm();
    let host = client.ioctl(vm, KVM_GET_TSC_KHZ, 0).unwrap();
    let first = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
    assert_eq!(client.ioctl(vm, KVM_SET_TSC_KHZ, (host / 2) as u64), Ok(0));
    assert_eq!(client.ioctl(vm, KVM_GET_TSC_KHZ, 0), Ok(host / 2));
    assert_eq!(client.ioctl(first, KVM_GET_TSC_KHZ, 0), Ok(host));
    let second = client.ioctl(vm, KVM_CREATE_VCPU, 1).unwrap();
    assert_eq!(client.ioctl(second, KVM_GET_TSC_KHZ, 0), Ok(host / 2));
    assert_eq!(client.ioctl(vm, KVM_SET_TSC_KHZ, 0), Ok(0));
    assert_eq!(client.ioctl(vm, KVM_GET_TSC_KHZ, 0), Ok(host));
    assert_eq!(
        client.ioctl(vm, KVM_SET_TSC_KHZ, u32::MAX.into()),
        if host < 65536 { Err(Errno::EINVAL) } else { Ok(0) }
    );
}

/// Documentation/virt/kvm/devices/vcpu.rst, "ATTRIBUTE: KVM_VCPU_TSC_OFFSET".
#[test]
fn the_offset_of_a_counter_is_an_attribute() {
    let machine = Machine::new(|a| a.nop());
    let attr =
        DeviceAttr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: SCRATCH + 0x100, flags: 0 };
    let ask = |request, attr| machine.set(request, &attr);
    assert_eq!(ask(KVM_HAS_DEVICE_ATTR, attr), Ok(0));
    for other in [DeviceAttr { group: 1, ..attr }, DeviceAttr { attr: 1, ..attr }] {
        for request in [KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR] {
            assert_eq!(ask(request, other), Err(Errno::ENXIO));
        }
    }
    let value = || machine.client.memory.load_u64(attr.addr - BASE).unwrap();
    ask(KVM_GET_DEVICE_ATTR, attr).unwrap();
    let (offset, before) = (value(), machine.msr(TSC));
    machine.client.memory.store_u64(attr.addr - BASE, offset.wrapping_add(1 << 50)).unwrap();
    ask(KVM_SET_DEVICE_ATTR, attr).unwrap();
    let moved = machine.msr(TSC).wrapping_sub(before);
    assert!((1 << 50..(1 << 50) + (1 << 40)).contains(&moved), "{moved:#x}");
    assert_eq!(machine.msr(TSC_ADJUST), 0);
    assert_eq!(ask(KVM_GET_DEVICE_ATTR, DeviceAttr { addr: 8, ..attr }), Err(Errno::EFAULT));
}

#[test]
fn what_xcr0_may_have_is_an_attribute_of_the_system() {
    let client = FakeClient::new();
    let attr = DeviceAttr { attr: KVM_X86_XCOMP_GUEST_SUPP.into(), addr: SCRATCH + 0x100, ..Plain::zeroed() };
    assert_eq!(client.set(0, KVM_HAS_DEVICE_ATTR, &attr), Ok(0));
    assert_eq!(client.set(0, KVM_HAS_DEVICE_ATTR, &DeviceAttr { attr: 1, ..attr }), Err(Errno::ENXIO));
    assert_eq!(client.set(0, KVM_GET_DEVICE_ATTR, &DeviceAttr { group: 1, ..attr }), Err(Errno::ENXIO));
    assert_eq!(client.set(0, KVM_GET_DEVICE_ATTR, &attr), Ok(0));
    // As CPUID leaf DH tells them.
    let mut bytes = vec![0; 8 + 40 * 100];
    bytes[0] = 100;
    let (_, table) = client.ioctl_bytes(0, KVM_GET_SUPPORTED_CPUID, bytes).unwrap();
    let mut entries = table[8..].chunks_exact(40).filter_map(kvm_cpuid_entry2::from_bytes);
    let entry = entries.find(|entry| (entry.function, entry.index) == (0xd, 0)).unwrap();
    let components = u64::from(entry.edx) << 32 | u64::from(entry.eax);
    client.memory.store_u64(attr.addr - BASE, 0).unwrap();
    client.set(0, KVM_GET_DEVICE_ATTR, &attr).unwrap();
    assert_eq!(client.memory.load_u64(attr.addr - BASE), Some(components));
}

/// `__set_sregs2`, `__get_sregs2`.
#[test]
fn page_directory_pointers_travel_with_the_second_form_of_special_registers() {
    let machine = Machine::new(|a| a.nop());
    let sregs: kvm_sregs2 = machine.get(KVM_GET_SREGS2);
    assert_eq!((sregs.flags, sregs.pdptrs), (0, [0; 4]));
    let valid = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
    assert_eq!(machine.set(KVM_SET_SREGS2, &kvm_sregs2 { flags: valid, ..sregs }), Err(Errno::EINVAL));
    assert_eq!(machine.set(KVM_SET_SREGS2, &kvm_sregs2 { flags: 2, ..sregs }), Err(Errno::EINVAL));
    // In memory, and otherwise as they are given.
    machine.client.memory.store_u64(0x4000, 0x5001).unwrap();
    let pae = kvm_sregs2 { cr0: 0x8000_0011, cr3: 0x4000, cr4: 1 << 5, ..sregs };
    machine.set(KVM_SET_SREGS2, &pae).unwrap();
    let loaded: kvm_sregs2 = machine.get(KVM_GET_SREGS2);
    assert_eq!((loaded.flags, loaded.pdptrs), (valid, [0x5001, 0, 0, 0]));
    let pdptrs = [0x6001, 0x7001, 0, 0x8001];
    machine.set(KVM_SET_SREGS2, &kvm_sregs2 { flags: valid, pdptrs, ..pae }).unwrap();
    let loaded: kvm_sregs2 = machine.get(KVM_GET_SREGS2);
    assert_eq!((loaded.flags, loaded.pdptrs), (valid, pdptrs));
    assert_eq!(machine.get::<kvm_sregs>(KVM_GET_SREGS).cr3, 0x4000);
}

#[test]
fn the_second_form_of_xsave_is_as_large_as_its_capability_says() {
    let machine = Machine::new(|a| a.nop());
    assert_eq!(machine.client.ioctl(0, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2.into()), Ok(4096));
    let image: [u32; 1024] = machine.get(KVM_GET_XSAVE2);
    assert_eq!(image, machine.get::<[u32; 1024]>(KVM_GET_XSAVE));
}

/// `kvm_msr_user_space`.
#[test]
fn msrs_that_fail_are_user_spaces_for_the_reasons_it_names() {
    const UNKNOWN: u32 = 0x474f_4f00;
    let machine = Machine::new(|a| {
        rdmsr(a, UNKNOWN)?;
        a.out(0x80, eax)?;
        a.mov(eax, edx)?;
        a.out(0x81, eax)?;
        wrmsr(a, UNKNOWN, 0x1234_5678, 0x9abc_def0)?;
        // A value that it does not take.
        wrmsr(a, MISC_FEATURES, 0, 2)?;
        a.out(0x82, al)?;
        rdmsr(a, UNKNOWN)?;
        a.out(0x83, eax)
    });
    assert_eq!(machine.enable(KVM_CAP_X86_USER_SPACE_MSR, 1 << 3), Err(Errno::EINVAL));
    machine.enable(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN.into()).unwrap();
    machine.page.store_u64(32, u64::MAX).unwrap();
    assert_eq!(machine.msr_exit(), (KVM_EXIT_X86_RDMSR, KVM_MSR_EXIT_REASON_UNKNOWN, UNKNOWN, 0));
    assert_eq!(machine.page.load_u64(32), Some(0), "error and padding");
    assert_eq!(machine.get::<kvm_regs>(KVM_GET_REGS).rip, CODE + 6, "at RDMSR");
    machine.page.store_u64(48, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(machine.out(), (0x80, 0x5566_7788));
    assert_eq!(machine.out(), (0x81, 0x1122_3344));
    let written = (KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_UNKNOWN, UNKNOWN, 0x1234_5678_9abc_def0);
    assert_eq!(machine.msr_exit(), written);
    assert_eq!(machine.out().0, 0xfd, "another reason");
    machine.enable(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_INVAL.into()).unwrap();
    assert_eq!(machine.out().0, 0x82);
    assert_eq!(machine.out().0, 0xfd);
}

#[test]
fn user_space_may_answer_with_a_fault() {
    let machine = Machine::new(|a| {
        wrmsr(a, MISC_FEATURES, 0, 2)?;
        a.out(0x80, al)
    });
    machine.enable(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_INVAL.into()).unwrap();
    assert_eq!(machine.msr_exit(), (KVM_EXIT_X86_WRMSR, KVM_MSR_EXIT_REASON_INVAL, MISC_FEATURES, 2));
    machine.page.store_u8(32, 1).unwrap();
    assert_eq!(machine.out().0, 0xfd);
    assert_eq!(machine.out().0, 0x80);
}

/// `kvm_vm_ioctl_set_msr_filter`, `kvm_msr_allowed`.
#[test]
fn a_filter_denies_guests_what_its_bits_do_not_allow() {
    let machine = Machine::with_chip(|a| {
        rdmsr(a, FMASK)?;
        wrmsr(a, FMASK, 0, 5)?;
        // The next one is no part of the range.
        rdmsr(a, TSC)?;
        a.out(0x80, al)?;
        rdmsr(a, FMASK)?;
        a.out(0x81, al)
    });
    let set = |filter: &MsrFilter| machine.client.set(machine.vm, KVM_X86_SET_MSR_FILTER, filter);
    let mut filter = MsrFilter { flags: KVM_MSR_FILTER_DEFAULT_DENY, ..Plain::zeroed() };
    assert_eq!(set(&filter), Err(Errno::EINVAL), "nothing is allowed");
    assert_eq!(set(&MsrFilter { flags: 2, ..filter }), Err(Errno::EINVAL));
    filter.flags = 0;
    filter.ranges[3].nmsrs = 3;
    filter.ranges[3].base = FMASK - 2;
    filter.ranges[3].bitmap = SCRATCH + 0x1000;
    for flags in [0, 4] {
        filter.ranges[3].flags = flags;
        assert_eq!(set(&filter), Err(Errno::EINVAL), "{flags}");
    }
    filter.ranges[3].flags = KVM_MSR_FILTER_READ;
    filter.ranges[3].nmsrs = 0x3001;
    assert_eq!(set(&filter), Err(Errno::EINVAL), "more than 600H bytes");
    filter.ranges[3].nmsrs = 3;
    filter.ranges[3].bitmap = 8;
    assert_eq!(set(&filter), Err(Errno::EFAULT));
    filter.ranges[3].bitmap = SCRATCH + 0x1000;
    machine.client.memory.store_u64(SCRATCH + 0x1000 - BASE, 0b011).unwrap();
    assert_eq!(set(&filter), Ok(0));
    assert_eq!(machine.out().0, 0xfd, "the read, and not the write");
    assert_eq!(machine.out().0, 0x80);
    machine.enable(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER.into()).unwrap();
    assert_eq!(machine.msr_exit(), (KVM_EXIT_X86_RDMSR, KVM_MSR_EXIT_REASON_FILTER, FMASK, 0));
    assert_eq!(machine.msr(FMASK), 5, "user space reads it all the same");
    assert_eq!(machine.out().0, 0x81);
}

#[test]
fn a_filter_that_denies_the_rest_spares_the_x2apic() {
    let machine = Machine::with_chip(|a| {
        rdmsr(a, 0x802)?;
        a.out(0x80, eax)?;
        rdmsr(a, TSC)
    });
    machine.set_cpuid(&[leaf(0, 0, 0), leaf(1, 1 << 21, 0)]);
    let sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    machine.set(KVM_SET_SREGS, &kvm_sregs { apic_base: 0xfee0_0d00, ..sregs }).unwrap();
    let mut filter = MsrFilter { flags: KVM_MSR_FILTER_DEFAULT_DENY, ..Plain::zeroed() };
    (filter.ranges[0].flags, filter.ranges[0].nmsrs) = (KVM_MSR_FILTER_READ, 1);
    filter.ranges[0].bitmap = SCRATCH + 0x1000;
    machine.client.set(machine.vm, KVM_X86_SET_MSR_FILTER, &filter).unwrap();
    assert_eq!(machine.out(), (0x80, 0));
    assert_eq!(machine.out().0, 0xfd);
}

/// api.rst `KVM_GET_STATS_FD`: header, name, descriptors, values.
#[test]
fn statistics_describe_themselves() {
    let machine = Machine::new(|a| {
        a.out(0x80, al)?;
        a.out(0x81, al)
    });
    for (fd, name) in [(machine.vm, "kvm-1000"), (machine.vcpu, "kvm-1000/vcpu-0")] {
        let stats = machine.client.ioctl(fd, KVM_GET_STATS_FD, 0).unwrap();
        let file = machine.client.file(stats);
        let read = |offset: usize, len| file.read(offset as u64, len).unwrap();
        let words = |offset, len| -> Vec<usize> {
            read(offset, len).chunks_exact(4).map(|word| u32::from_bytes(word).unwrap() as usize).collect()
        };
        let text = |offset| {
            let bytes = read(offset, 48);
            String::from_utf8(bytes.into_iter().take_while(|&byte| byte != 0).collect()).unwrap()
        };
        let [flags, 48, count, id, descriptors, values] = words(0, 24)[..] else { panic!("{:?}", words(0, 24)) };
        assert_eq!((flags, text(id)), (0, name.to_owned()));
        assert_eq!(read(values, 1 << 20).len(), 8 * count);
        assert_eq!(read(values + 8 * count, 8), []);
        let value = |wanted: &str| {
            let at = (0..count).map(|n| descriptors + 64 * n).find(|&at| text(at + 16) == wanted).unwrap();
            let [_, exponent_and_size, offset, 0] = words(at, 16)[..] else { panic!("a histogram") };
            assert_eq!(exponent_and_size >> 16, 1, "one value");
            u64::from_bytes(&read(values + offset, 8)).unwrap()
        };
        if fd == machine.vm {
            assert_eq!([value("memory_bytes"), value("memory_slots"), value("vcpus")], [0x1_0000, 1, 1]);
        } else {
            machine.out();
            machine.out();
            assert_eq!([value("exits"), value("io_exits"), value("guest_mode")], [2, 2, 0]);
        }
        assert_eq!(machine.client.ioctl(stats, KVM_RUN, 0), Err(Errno::ENOTTY));
    }
    assert!(*machine.client.cloexec.lock().last().unwrap(), "closed on exec");
}

/// `kvm_vcpu_x86_set_ucna`, `kvm_apic_after_set_mcg_cap`.
#[test]
fn an_error_that_needs_no_action_interrupts_through_its_lvt_entry() {
    const CMCI: u64 = 1 << 10;
    let machine = Machine::with_chip(|a| {
        a.mov(ebx, 0xfee0_00f0u32)?;
        a.mov(dword_ptr(ebx), 0x1ff)?;
        a.mov(ebx, 0xfee0_02f0u32)?;
        a.mov(dword_ptr(ebx), 0x30)?;
        wrmsr(a, 0x280 + 3, 0, 1 << 30)?;
        a.out(0x80, al)?;
        a.sti()?;
        a.nop()?;
        a.out(0x81, al)?;
        a.nop()?;
        a.nop()
    });
    let lapic = || machine.get::<[u32; 256]>(KVM_GET_LAPIC);
    assert_eq!((lapic()[0x2f0 / 4], lapic()[0x30 / 4] >> 16), (0, 5));
    let supported: u64 = machine.client.get(0, KVM_X86_GET_MCE_CAP_SUPPORTED);
    assert_eq!(supported & CMCI, CMCI);
    machine.set(KVM_X86_SETUP_MCE, &(10 | CMCI)).unwrap();
    assert_eq!((lapic()[0x2f0 / 4], lapic()[0x30 / 4] >> 16), (0x1_0000, 6));
    assert_eq!(machine.out().0, 0x80);
    let status = 1 << 63 | 1 << 61 | 1 << 60 | 0x1_0090;
    let error = kvm_x86_mce { status, addr: 0x5000, bank: 3, ..Plain::zeroed() };
    machine.set(KVM_X86_SET_MCE, &error).unwrap();
    assert_eq!(machine.out().0, 0x30);
    assert_eq!((machine.msr(0x40d), machine.msr(0x40e)), (status, 0x5000));
}

/// IA32_TSC_ADJUST: SDM Vol. 3 "IA32_TSC_ADJUST MSR"; user space's writes leave the other alone.
#[test]
fn the_counter_and_its_adjustment_move_together_in_the_guest_alone() {
    const BIT: u64 = 1 << 50;
    let machine = Machine::new(|a| {
        wrmsr(a, TSC, 1 << 18, 0)?;
        a.out(0x80, al)?;
        wrmsr(a, TSC_ADJUST, 2 << 18, 0)?;
        a.out(0x81, al)
    });
    let near = |index, value: u64| {
        let is = machine.msr(index);
        assert!(is.wrapping_sub(value).wrapping_add(BIT / 4) < BIT / 2, "{index:#x}: {is:#x}, not {value:#x}");
    };
    // Without the feature nothing is stored.
    assert_eq!(machine.set_msr(TSC_ADJUST, BIT), 1);
    assert_eq!(machine.msr(TSC_ADJUST), 0);
    machine.set_cpuid(&[leaf(0, 0, 0), leaf(7, 0, 1 << 1)]);
    machine.out();
    near(TSC, BIT);
    near(TSC_ADJUST, BIT);
    machine.out();
    near(TSC, 2 * BIT);
    assert_eq!(machine.msr(TSC_ADJUST), 2 * BIT);
    machine.set_msr(TSC, 5 * BIT);
    assert_eq!(machine.msr(TSC_ADJUST), 2 * BIT);
    machine.set_msr(TSC_ADJUST, 7 * BIT);
    near(TSC, 5 * BIT);
}

/// `KVM_GUESTDBG_BLOCKIRQ`: `inject_pending_event`.
#[test]
fn a_debugger_holds_back_interrupts_and_nmis() {
    let machine = Machine::with_chip(|a| {
        a.mov(ebx, 0xfee0_00f0u32)?;
        a.mov(dword_ptr(ebx), 0x1ff)?;
        a.mov(ebx, 0xfee0_0300u32)?;
        // To itself, vector 30H.
        a.mov(dword_ptr(ebx), 0x4_4030)?;
        a.out(0x80, al)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.out(0x81, al)?;
        a.nop()?;
        a.nop()
    });
    assert_ne!(machine.client.ioctl(0, KVM_CHECK_EXTENSION, KVM_CAP_SET_GUEST_DEBUG2.into()), Ok(0));
    machine.client.write_u32(BASE + 4 * 2, HANDLER as u32 + 0x1c0);
    assemble(&machine.client, HANDLER + 0x1c0, |a| {
        a.out(0x02, al)?;
        a.iret()
    });
    let block = |control| machine.set(KVM_SET_GUEST_DEBUG, &kvm_guest_debug { control, ..Plain::zeroed() }).unwrap();
    block(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_BLOCKIRQ);
    assert_eq!(machine.out().0, 0x80);
    machine.client.ioctl(machine.vcpu, KVM_NMI, 0).unwrap();
    assert_eq!(machine.out().0, 0x81);
    block(0);
    assert_eq!([machine.out().0, machine.out().0], [0x02, 0x30]);
}

/// `kvm_lapic_reg_write`: all bits of the low half are kept but "delivery status", as in x86_64/xapic_state_test.
#[test]
fn reserved_bits_of_the_interrupt_command_are_kept_in_memory_and_refused_as_an_msr() {
    let machine = Machine::with_chip(|a| {
        a.mov(ebx, 0xfee0_0300u32)?;
        a.mov(dword_ptr(ebx), 0xa5b1_b4a5u32)?;
        a.out(0x80, al)
    });
    machine.out();
    assert_eq!(machine.get::<[u32; 256]>(KVM_GET_LAPIC)[0x300 / 4], 0xa5b1_a4a5);
    let machine = Machine::with_chip(|a| {
        wrmsr(a, 0x830, 0, 1 << 20)?;
        wrmsr(a, 0x830, 0, 1 << 13)?;
        wrmsr(a, 0x830, 0, 1 << 12 | 1 << 14 | 0x40)?;
        a.out(0x80, al)
    });
    machine.set_cpuid(&[leaf(0, 0, 0), leaf(1, 1 << 21, 0)]);
    let sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    machine.set(KVM_SET_SREGS, &kvm_sregs { apic_base: 0xfee0_0d00, ..sregs }).unwrap();
    assert_eq!([machine.out().0, machine.out().0, machine.out().0], [0xfd, 0xfd, 0x80]);
    assert_eq!(machine.get::<[u32; 256]>(KVM_GET_LAPIC)[0x300 / 4], 1 << 14 | 0x40);
}

/// `__kvm_is_valid_cr4`: a guest that has no CPUID yet may use all there is.
#[test]
fn control_bits_are_free_until_the_guest_has_a_cpuid() {
    const UMIP: u64 = 1 << 11;
    const VMXE: u64 = 1 << 13;
    let machine = Machine::new(|a| a.nop());
    let sregs: kvm_sregs = machine.get(KVM_GET_SREGS);
    assert_eq!(machine.set(KVM_SET_SREGS, &kvm_sregs { cr4: UMIP, ..sregs }), Ok(0));
    assert_eq!(machine.set(KVM_SET_SREGS, &kvm_sregs { cr4: VMXE, ..sregs }), Err(Errno::EINVAL));
    machine.set_cpuid(&[]);
    assert_eq!(machine.set(KVM_SET_SREGS, &kvm_sregs { cr4: UMIP, ..sregs }), Err(Errno::EINVAL));
}

/// What has no effect here but is taken; the values are those that x86.c and kvm_main.c take.
#[test]
fn choices_without_an_effect() {
    let (client, vm) = new_vm();
    for (cap, offered, taken, refused) in [
        (KVM_CAP_HALT_POLL, 1, &[0, 200_000, u32::MAX.into()][..], &[1 << 32][..]),
        (KVM_CAP_X86_DISABLE_EXITS, 4, &[0, 4, 15], &[16, 1 << 32]),
        (KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1, &[0, 1], &[2, u64::MAX]),
    ] {
        assert_eq!(client.ioctl(vm, KVM_CHECK_EXTENSION, cap.into()), Ok(offered));
        for &value in taken {
            assert_eq!(client.enable(vm, cap, value), Ok(0), "{cap} {value:#x}");
        }
        for &value in refused {
            assert_eq!(client.enable(vm, cap, value), Err(Errno::EINVAL), "{cap} {value:#x}");
        }
    }
    // struct kvm_pmu_event_filter: action, number of events, fixed counters, flags.
    let filter =
        |action, events, flags| client.set(vm, KVM_SET_PMU_EVENT_FILTER, &[action, events, 0, flags, 0, 0, 0, 0u32]);
    assert_eq!(filter(KVM_PMU_EVENT_ALLOW, 300, 0), Ok(0));
    assert_eq!(filter(KVM_PMU_EVENT_DENY, 0, 0), Ok(0));
    assert_eq!(filter(2, 0, 0), Err(Errno::EINVAL));
    assert_eq!(filter(KVM_PMU_EVENT_ALLOW, 0, 1), Err(Errno::EINVAL));
    assert_eq!(filter(KVM_PMU_EVENT_ALLOW, 301, 0), Err(Errno::E2BIG));
}
