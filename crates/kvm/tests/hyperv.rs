//! Hyper-V's interface and Xen's hypercalls, as far as they go. What must happen is said by the Hyper-V "Hypervisor Top Level Functional
//! Specification", api.rst, and hyperv.c and xen.c of Linux 6.1.

mod common;

use std::sync::Arc;

use common::{BASE, FakeClient};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_clock_data, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xen_hvm_config};
use mmu::Mapping;
use nix::errno::Errno;

const CODE: u64 = 0x1000;
/// Of #GP: says so at a port, with EAX, and goes behind an instruction of three bytes.
const GP_HANDLER: u64 = 0x3000;
const PAGE: u32 = 0x9000;

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const VP_INDEX: u32 = 0x4000_0002;
const RESET: u32 = 0x4000_0003;
const TIME_REF_COUNT: u32 = 0x4000_0020;
const REFERENCE_TSC: u32 = 0x4000_0021;
const TSC_FREQUENCY: u32 = 0x4000_0022;
const APIC_FREQUENCY: u32 = 0x4000_0023;
const CRASH_P0: u32 = 0x4000_0100;
const CRASH_CTL: u32 = 0x4000_0105;
const TSC_EMULATION_CONTROL: u32 = 0x4000_0107;
const TSC_EMULATION_STATUS: u32 = 0x4000_0108;
/// Not offered.
const SCONTROL: u32 = 0x4000_0080;
const XEN_MSR: u32 = 0x4000_0200;

type Code = Result<(), IcedError>;

struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpu: i32,
    page: Arc<Mapping>,
}

fn leaf(function: u32, [a, b, c, d]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax: a, ebx: b, ecx: c, edx: d, ..Plain::zeroed() }
}

fn interface() -> kvm_cpuid_entry2 {
    leaf(0x4000_0001, [u32::from_le_bytes(*b"Hv#1"), 0, 0, 0])
}

fn is_amd() -> bool {
    matches!(std::arch::x86_64::__cpuid(0).ebx.to_le_bytes(), [b'A', b'u', b't', b'h'] | [b'H', b'y', b'g', b'o'])
}

fn hypercall(a: &mut CodeAssembler) -> Code {
    if is_amd() { a.vmmcall() } else { a.vmcall() }
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

impl Machine {
    /// A vCPU in real mode, whose CPUID has the interface.
    fn new(code: impl FnOnce(&mut CodeAssembler) -> Code) -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(0x1_0000);
        let assemble = |at: u64, code: &mut dyn FnMut(&mut CodeAssembler) -> Code| {
            let mut a = CodeAssembler::new(16).unwrap();
            code(&mut a).unwrap();
            client.memory.write(at, &a.assemble(at).unwrap()).unwrap();
        };
        let mut code = Some(code);
        assemble(CODE, &mut |a| code.take().unwrap()(a));
        assemble(GP_HANDLER, &mut |a| {
            a.out(0xfd, eax)?;
            a.mov(bp, sp)?;
            a.add(word_ptr(bp), 3)?;
            a.iret()
        });
        client.write_u32(BASE + 4 * 13, GP_HANDLER as u32);
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let page = client.map(vcpu);
        let machine = Self { client, vm, vcpu, page };
        let mut sregs: kvm_sregs = machine.client.get(vcpu, KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        machine.client.set(vcpu, KVM_SET_SREGS, &sregs).unwrap();
        let regs = kvm_regs { rip: CODE, rflags: 2, rsp: 0x8000, ..Plain::zeroed() };
        machine.client.set(vcpu, KVM_SET_REGS, &regs).unwrap();
        machine.set_cpuid(&[leaf(0, [0; 4]), interface()]);
        machine
    }

    /// Goes to flat protected mode, 32 bits.
    fn protect(&self) {
        let mut sregs: kvm_sregs = self.client.get(self.vcpu, KVM_GET_SREGS);
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.limit, segment.g, segment.db) = (0, 0xffff_ffff, 1, 0);
        }
        (sregs.cs.selector, sregs.cs.type_, sregs.cr0) = (8, 11, sregs.cr0 | 1);
        self.client.set(self.vcpu, KVM_SET_SREGS, &sregs).unwrap();
    }

    fn set_cpuid(&self, table: &[kvm_cpuid_entry2]) {
        let mut bytes = [table.len() as u32, 0].map(u32::to_le_bytes).concat();
        bytes.extend(table.iter().flat_map(|entry| entry.as_bytes()));
        self.client.ioctl_bytes(self.vcpu, KVM_SET_CPUID2, bytes).unwrap();
    }

    fn run(&self) -> u32 {
        self.client.ioctl(self.vcpu, KVM_RUN, 0).unwrap();
        self.page.load_u32(8).unwrap()
    }

    /// Runs to the next OUT: its port and value.
    fn out(&self) -> (u16, u32) {
        assert_eq!(self.run(), KVM_EXIT_IO, "{:#x}", self.regs().rip);
        (self.page.load_u16(34).unwrap(), self.page.load_u32(4096).unwrap())
    }

    fn regs(&self) -> kvm_regs {
        self.client.get(self.vcpu, KVM_GET_REGS)
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

    /// Sequence, scale, offset of the reference page.
    fn reference(&self) -> (u32, u64, u64) {
        let word = |at: u32| self.client.memory.load_u64((PAGE + at).into()).unwrap();
        (word(0) as u32, word(8), word(16))
    }

    fn set_clock(&self, clock: u64) {
        self.client.set(self.vm, KVM_SET_CLOCK, &kvm_clock_data { clock, ..Plain::zeroed() }).unwrap();
    }
}

/// `kvm_get_hv_cpuid`, as x86_64/hyperv_cpuid looks at it.
#[test]
fn supported_leaves_are_told_by_the_system_and_by_a_vcpu() {
    let machine = Machine::new(|a| a.nop());
    for fd in [0, machine.vcpu] {
        let mut bytes = vec![0; 8 + 40 * 20];
        bytes[0] = 9;
        assert_eq!(machine.client.ioctl_bytes(fd, KVM_GET_SUPPORTED_HV_CPUID, bytes.clone()), Err(Errno::E2BIG));
        bytes[0] = 20;
        let (_, after) = machine.client.ioctl_bytes(fd, KVM_GET_SUPPORTED_HV_CPUID, bytes).unwrap();
        assert_eq!(after[0], 10);
        let entry = |at: usize| kvm_cpuid_entry2::from_bytes(&after[8 + 40 * at..][..40]).unwrap();
        assert_eq!((entry(0).function, entry(0).eax, entry(0).ebx), (0x4000_0000, 0x4000_0082, 0x756e_694c));
        assert_eq!(entry(1), interface());
        // TIME_REF_COUNT, HYPERCALL, VP_INDEX, RESET, REFERENCE_TSC, frequencies, re-enlightenment; frequencies and crash.
        assert_eq!((entry(3).eax, entry(3).ebx, entry(3).edx), (0x2ae2, 0, 0x500));
    }
}

/// `kvm_hv_get_msr_common`.
#[test]
fn the_msrs_are_a_guests_that_has_the_interface() {
    let code = |a: &mut CodeAssembler| {
        rdmsr(a, VP_INDEX)?;
        a.out(0x80, eax)?;
        rdmsr(a, SCONTROL)?;
        wrmsr(a, TSC_FREQUENCY, 0, 1)?;
        rdmsr(a, APIC_FREQUENCY)?;
        a.out(0x81, eax)
    };
    let machine = Machine::new(code);
    assert_eq!(machine.set_msr(VP_INDEX, 1024), 0);
    assert_eq!(machine.set_msr(VP_INDEX, 7), 1);
    assert_eq!(machine.set_msr(TSC_FREQUENCY, 1), 1, "user space's is ignored");
    assert_eq!(
        machine.msr(TSC_FREQUENCY) / 1000,
        machine.client.ioctl(machine.vcpu, KVM_GET_TSC_KHZ, 0).unwrap() as u64
    );
    assert_eq!(machine.out(), (0x80, 7));
    assert_eq!([machine.out().0, machine.out().0], [0xfd, 0xfd]);
    assert_eq!(machine.out(), (0x81, 1_000_000_000));
    let machine = Machine::new(code);
    machine.set_cpuid(&[leaf(0, [0; 4])]);
    assert_eq!(machine.out().0, 0xfd);
    assert_eq!(machine.msr(VP_INDEX), 0, "user space reads it all the same");
    let second = machine.client.ioctl(machine.vm, KVM_CREATE_VCPU, 5).unwrap();
    assert_eq!(Machine { vcpu: second, ..machine }.msr(VP_INDEX), 1, "in the order of creation");
}

/// `hv_check_msr_access`.
#[test]
fn features_can_be_enforced() {
    let machine = Machine::new(|a| {
        rdmsr(a, VP_INDEX)?;
        rdmsr(a, TIME_REF_COUNT)?;
        a.out(0x80, al)?;
        wrmsr(a, CRASH_P0, 0, 1)?;
        a.out(0x81, al)
    });
    machine.client.enable(machine.vcpu, KVM_CAP_HYPERV_ENFORCE_CPUID, 1).unwrap();
    machine.set_cpuid(&[leaf(0, [0; 4]), interface(), leaf(0x4000_0003, [1 << 1, 0, 0, 1 << 10])]);
    assert_eq!([machine.out().0, machine.out().0, machine.out().0], [0xfd, 0x80, 0x81]);
    assert_eq!(machine.msr(CRASH_P0), 1);
}

/// As x86_64/hyperv_clock: the page says what the MSR says, and stays where its counter is emulated.
#[test]
fn reference_time_is_in_a_page_and_follows_the_clock() {
    let machine = Machine::new(|a| {
        wrmsr(a, REFERENCE_TSC, 0, PAGE | 1)?;
        a.out(0x80, al)?;
        wrmsr(a, TSC_EMULATION_STATUS, 0, 1)?;
        wrmsr(a, TIME_REF_COUNT, 0, 1)
    });
    machine.set_clock(5_000_000_000);
    let read = machine.msr(TIME_REF_COUNT);
    assert!((50_000_000..650_000_000).contains(&read), "{read}");
    machine.out();
    let (sequence, scale, offset) = machine.reference();
    assert_ne!((sequence, scale), (0, 0));
    let by_page = |(_, scale, offset): (u32, u64, u64), tsc: u64| {
        ((u128::from(tsc) * u128::from(scale)) >> 64).wrapping_add(offset.into()) as u64
    };
    let (before, read, after) = (machine.msr(0x10), machine.msr(TIME_REF_COUNT), machine.msr(0x10));
    let page = machine.reference();
    assert!((by_page(page, before)..=by_page(page, after)).contains(&read), "{read}");
    // The counter's rate: ten million a second.
    let second = machine.msr(TSC_FREQUENCY);
    let passed = by_page(page, before + second) - by_page(page, before);
    assert!(passed.abs_diff(10_000_000) <= 1, "{passed}");
    machine.set_clock(0);
    let moved = machine.reference();
    assert_eq!((moved.0, moved.1), (sequence + 1, scale));
    assert_ne!(moved.2, offset);
    machine.set_msr(TSC_EMULATION_CONTROL, 1);
    machine.set_clock(1 << 50);
    assert_eq!(machine.reference(), moved, "it goes on");
    assert!(machine.msr(TIME_REF_COUNT) < 1 << 40);
    // What a VMM loads goes on from the page that it brought.
    machine.set_msr(REFERENCE_TSC, u64::from(PAGE | 1));
    assert_eq!(machine.reference(), moved);
    machine.set_msr(REFERENCE_TSC, 0);
    assert!(machine.msr(TIME_REF_COUNT) >= (1 << 50) / 100, "the clock's");
    assert_eq!([machine.out().0, machine.out().0], [0xfd, 0xfd]);
}

#[test]
fn a_page_without_memory_leaves_the_msr() {
    let machine = Machine::new(|a| a.nop());
    assert_eq!(machine.set_msr(REFERENCE_TSC, 0x1234_5001), 1);
    machine.set_clock(1 << 50);
    assert!(machine.msr(TIME_REF_COUNT) >= (1 << 50) / 100);
}

/// `kvm_hv_set_msr_pw`: an identity, then the page; `kvm_hv_hypercall`.
#[test]
fn hypercalls_go_through_a_page() {
    let machine = Machine::new(|a| {
        wrmsr(a, HYPERCALL, 0, PAGE | 1)?;
        wrmsr(a, GUEST_OS_ID, 0x8100, 0)?;
        a.out(0x80, al)?;
        wrmsr(a, HYPERCALL, 0, 0x1234_5001)?;
        wrmsr(a, HYPERCALL, 0, PAGE | 1)?;
        a.out(0x81, al)?;
        for control in [8, 0x5c, 0x5d, 0x99, 8 | 1 << 27] {
            a.xor(edx, edx)?;
            a.mov(eax, control)?;
            a.xor(ebx, ebx)?;
            // An address that is not a multiple of 8.
            a.mov(ecx, 0x9004)?;
            hypercall(a)?;
            a.out(0x82, eax)?;
        }
        wrmsr(a, GUEST_OS_ID, 0, 0)?;
        a.out(0x83, al)
    });
    assert_eq!(machine.out().0, 0x80);
    assert_eq!(machine.msr(HYPERCALL), 0, "nobody, so no page");
    assert_eq!(machine.out().0, 0xfd, "no memory");
    assert_eq!(machine.out().0, 0x81);
    let mut page = [0; 4];
    machine.client.memory.read(PAGE.into(), &mut page).unwrap();
    assert_eq!(page, [0x0f, 0x01, if is_amd() { 0xd9 } else { 0xc1 }, 0xc3]);
    machine.protect();
    // Success, and invalid input, alignment, code, input.
    assert_eq!([0; 5].map(|_: i32| machine.out()), [0, 3, 4, 2, 3].map(|status| (0x82, status)));
    machine.out();
    assert_eq!(machine.msr(HYPERCALL), u64::from(PAGE), "off");
}

#[test]
fn a_guest_resets_and_crashes() {
    let machine = Machine::new(|a| {
        wrmsr(a, RESET, 0, 0)?;
        wrmsr(a, RESET, 0, 1)?;
        wrmsr(a, CRASH_P0 + 4, 0, 77)?;
        wrmsr(a, CRASH_CTL, 1 << 31, 0)?;
        a.out(0x80, al)
    });
    // What stood there says nothing: `ndata` counts what is valid (`KVM_CAP_SYSTEM_EVENT_DATA`).
    let system = machine.client.ioctl(0, KVM_CHECK_EXTENSION, KVM_CAP_SYSTEM_EVENT_DATA.into());
    assert_eq!(system, Ok(1));
    for event in [KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH] {
        machine.page.store_u32(36, 16).unwrap();
        assert_eq!(machine.run(), KVM_EXIT_SYSTEM_EVENT);
        assert_eq!([32, 36].map(|at| machine.page.load_u32(at).unwrap()), [event, 0]);
    }
    assert_eq!((machine.msr(CRASH_P0 + 4), machine.msr(CRASH_CTL)), (77, 0));
    machine.set_msr(CRASH_CTL, u64::MAX);
    assert_eq!(machine.msr(CRASH_CTL), 1 << 63);
    assert_eq!(machine.out().0, 0x80);
}

/// `kvm_xen_hvm_config`, `kvm_xen_write_hypercall_page`, `kvm_xen_hypercall`.
#[test]
fn xens_hypercalls_are_user_spaces() {
    let machine = Machine::new(|a| {
        wrmsr(a, XEN_MSR, 0, PAGE | 1)?;
        wrmsr(a, XEN_MSR, 0, PAGE)?;
        wrmsr(a, GUEST_OS_ID, 0x8100, 0)?;
        a.out(0x7f, al)?;
        a.mov(eax, 17)?;
        a.mov(ebx, 1)?;
        a.mov(ecx, 2)?;
        a.mov(edx, 3)?;
        a.mov(esi, 4)?;
        a.mov(edi, 5)?;
        a.mov(ebp, 6)?;
        hypercall(a)?;
        a.out(0x80, eax)?;
        // Hyper-V's, told by the bit, which is reserved in the word itself.
        a.xor(edx, edx)?;
        a.mov(eax, 0x8000_005du32)?;
        a.xor(ebx, ebx)?;
        a.mov(ecx, 0x9004)?;
        hypercall(a)?;
        a.out(0x81, eax)
    });
    let configure = |config: kvm_xen_hvm_config| machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &config);
    let intercept = kvm_xen_hvm_config { flags: KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, msr: XEN_MSR, ..Plain::zeroed() };
    assert_eq!(configure(kvm_xen_hvm_config { flags: 1 << 2, ..intercept }), Err(Errno::EINVAL));
    assert_eq!(configure(kvm_xen_hvm_config { blob_size_64: 1, ..intercept }), Err(Errno::EINVAL));
    assert_eq!(configure(intercept), Ok(0));
    assert_eq!(machine.out().0, 0xfd, "there is one page");
    assert_eq!(machine.out().0, 0x7f);
    machine.protect();
    assert_eq!(machine.run(), KVM_EXIT_XEN);
    let mut entry = [0; 16];
    machine.client.memory.read(u64::from(PAGE) + 17 * 32, &mut entry).unwrap();
    let own = if is_amd() { 0xd9 } else { 0xc1 };
    assert_eq!(entry[..10], [0xb8, 17, 0, 0, 0, 0x0f, 0x01, own, 0xc3, 0xcc]);
    let word = |at: u64| machine.page.load_u32(32 + at).unwrap();
    // Type; mode, level, number; six parameters.
    assert_eq!([0, 8, 12, 16].map(word), [KVM_EXIT_XEN_HCALL, 0, 0, 17]);
    assert_eq!([32, 40, 48, 56, 64, 72].map(word), [1, 2, 3, 4, 5, 6]);
    let mut code = [0; 3];
    machine.client.memory.read(machine.regs().rip, &mut code).unwrap();
    assert_eq!(code, [0x0f, 0x01, own], "at the instruction");
    machine.page.store_u64(32 + 24, 0xcafe).unwrap();
    assert_eq!(machine.out(), (0x80, 0xcafe));
    assert_eq!(machine.out(), (0x81, 3), "invalid input");
}
