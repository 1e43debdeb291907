//! Xen's interface to its guests. What must happen is said by api.rst, xen.c, irq.c and x86.c of Linux 6.1, and for layouts and numbers
//! include/xen/interface there; x86_64/xen_shinfo_test and xen_vmcall_test of its selftests are run by `tests/selftests`.

mod common;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{BASE, FakeClient};
use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::{Plain, XenAttr, kvm_clock_data, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xen_hvm_config};
use mmu::Mapping;
use nix::errno::Errno;

const RAM: u64 = 0x20_0000;
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const HANDLER: u64 = 0x8000;
/// Of vCPU n: 1000H further each.
const CODE: u64 = 0x9000;
const STACKS: u64 = 0x1_0000;
/// struct shared_info
const SHARED: u64 = 0x2_0000;
/// struct vcpu_info of vCPU n: 40H further each.
const INFO: u64 = 0x2_1000;
const CLOCK: u64 = 0x2_2000;
const RUNSTATE: u64 = 0x2_3ff0 - 48;
const PAGE: u64 = 0x2_5000;
const APIC: u64 = 0xfee0_0000;
/// Without memory.
const HOLE: u64 = 0x1000_0000;
const NOWHERE: u64 = u64::MAX;

const XEN_MSR: u32 = 0x4000_0200;
const VECTOR: u8 = 0x31;
/// Ports of guests: the handler's, and of what is no number of vCPU n, n higher.
const HANDLED: u16 = 0x80;
const AT: u16 = 0x90;

const RUNNING: u64 = 0;
const BLOCKED: u64 = 2;
const OFFLINE: u64 = 3;

type Code = Result<(), IcedError>;

/// A VM with interrupt controllers, whose vCPUs run 64-bit code.
struct Machine {
    client: Arc<FakeClient>,
    vm: i32,
    vcpus: Vec<(i32, Arc<Mapping>)>,
}

fn attr(type_: u32, u: &[u64]) -> XenAttr {
    let mut attr = XenAttr { type_: type_ as u16, ..XenAttr::default() };
    attr.u[..u.len()].copy_from_slice(u);
    attr
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Code {
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    a.nop()
}

/// Says where it is.
fn here(a: &mut CodeAssembler) -> Code {
    a.mov(dx, u32::from(AT))?;
    a.out(dx, al)
}

impl Machine {
    fn new(codes: &[&dyn Fn(&mut CodeAssembler) -> Code]) -> Self {
        let client = FakeClient::new();
        let vm = client.vm_with_ram(RAM);
        client.ioctl(vm, KVM_CREATE_IRQCHIP, 0).unwrap();
        let put = |at: u64, value: u64| client.memory.store_u64(at, value).unwrap();
        // The first two megabytes, and those of the APIC, where they are.
        put(TABLES, TABLES + 0x1003);
        put(TABLES + 0x1000, TABLES + 0x2003);
        put(TABLES + 0x1018, TABLES + 0x3003);
        put(TABLES + 0x2000, 0x83);
        put(TABLES + 0x3000 + 8 * 0x1f7, APIC | 0x93);
        put(GDT + 8, 0x00af_9b00_0000_ffff);
        put(GDT + 16, 0x00cf_9300_0000_ffff);
        for vector in 0..256 {
            put(IDT + 16 * vector, 0x0000_8e00_0008_0000 | HANDLER);
        }
        let assemble = |at: u64, code: &dyn Fn(&mut CodeAssembler) -> Code| {
            let mut a = CodeAssembler::new(64).unwrap();
            code(&mut a).unwrap();
            client.memory.write(at, &a.assemble(at).unwrap()).unwrap();
        };
        assemble(HANDLER, &|a| {
            a.out(u32::from(HANDLED), al)?;
            a.iretq()
        });
        let mut vcpus = Vec::new();
        for (id, code) in (0..).zip(codes) {
            assemble(CODE + 0x1000 * id, &|a| {
                a.mov(ebx, APIC as u32)?;
                a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
                code(a)
            });
            let fd = client.ioctl(vm, KVM_CREATE_VCPU, id).unwrap();
            let mut sregs: kvm_sregs = client.get(fd, KVM_GET_SREGS);
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, TABLES, 0x20, 0x500);
            (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit) = (GDT, 23, IDT, 0xfff);
            (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) = (8, 0, 0xffff_ffff);
            (sregs.cs.type_, sregs.cs.l, sregs.cs.db, sregs.cs.g) = (11, 1, 0, 1);
            (sregs.ss.selector, sregs.ds.selector) = (16, 16);
            client.set(fd, KVM_SET_SREGS, &sregs).unwrap();
            let regs =
                kvm_regs { rip: CODE + 0x1000 * id, rsp: STACKS + 0x1000 * (id + 1), rflags: 2, ..Plain::zeroed() };
            client.set(fd, KVM_SET_REGS, &regs).unwrap();
            client.set(fd, KVM_SET_MP_STATE, &kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
            vcpus.push((fd, client.map(fd)));
        }
        Self { client, vm, vcpus }
    }

    /// As [`Machine::new`], and Xen's, with 64-bit layouts and all that vCPUs share.
    fn with_xen(codes: &[&dyn Fn(&mut CodeAssembler) -> Code]) -> Self {
        let machine = Self::new(codes);
        machine.configure(KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL).unwrap();
        machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[1]).unwrap();
        machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
        for id in 0..codes.len() as u64 {
            machine.set_vcpu(id as usize, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[INFO + 0x40 * id]).unwrap();
        }
        machine
    }

    fn configure(&self, flags: u32) -> Result<i32, Errno> {
        let config = kvm_xen_hvm_config { flags, msr: XEN_MSR, ..Plain::zeroed() };
        self.client.set(self.vm, KVM_XEN_HVM_CONFIG, &config)
    }

    fn set(&self, type_: u32, u: &[u64]) -> Result<i32, Errno> {
        self.client.set(self.vm, KVM_XEN_HVM_SET_ATTR, &attr(type_, u))
    }

    fn get(&self, type_: u32) -> Result<u64, Errno> {
        let mut attr = attr(type_, &[]);
        self.client.ioctl_with(self.vm, KVM_XEN_HVM_GET_ATTR, &mut attr).map(|_| attr.u[0])
    }

    fn set_vcpu(&self, vcpu: usize, type_: u32, u: &[u64]) -> Result<i32, Errno> {
        self.client.set(self.vcpus[vcpu].0, KVM_XEN_VCPU_SET_ATTR, &attr(type_, u))
    }

    fn get_vcpu(&self, vcpu: usize, type_: u32) -> Result<[u64; 8], Errno> {
        let mut attr = attr(type_, &[]);
        self.client.ioctl_with(self.vcpus[vcpu].0, KVM_XEN_VCPU_GET_ATTR, &mut attr).map(|_| attr.u)
    }

    /// State, entry, times.
    fn runstate(&self) -> [u64; 6] {
        let data = self.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA).unwrap();
        data[..6].try_into().unwrap()
    }

    /// Exit reason, and the port of an OUT.
    fn run(&self, vcpu: usize) -> Result<(u32, u16), Errno> {
        let (fd, page) = &self.vcpus[vcpu];
        self.client.ioctl(*fd, KVM_RUN, 0)?;
        Ok((page.load_u32(8).unwrap(), page.load_u16(34).unwrap()))
    }

    /// Runs to the next OUT.
    fn out(&self, vcpu: usize) -> u16 {
        let (reason, port) = self.run(vcpu).unwrap();
        assert_eq!(reason, KVM_EXIT_IO, "{:#x?}", self.regs(vcpu));
        port
    }

    fn regs(&self, vcpu: usize) -> kvm_regs {
        self.client.get(self.vcpus[vcpu].0, KVM_GET_REGS)
    }

    fn u64(&self, at: u64) -> u64 {
        self.client.memory.load_u64(at).unwrap()
    }

    fn u32(&self, at: u64) -> u32 {
        self.client.memory.load_u32(at).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.client.memory.write(at, bytes).unwrap();
    }

    fn clock(&self) -> u64 {
        self.client.get::<kvm_clock_data>(self.vm, KVM_GET_CLOCK).clock
    }
}

/// `kvm_xen_hvm_set_attr`, `kvm_xen_hvm_get_attr`; `kvm_gfn_to_pfn_cache_refresh`.
#[test]
fn attributes_of_a_vm_are_kept_if_they_can_be() {
    let machine = Machine::new(&[]);
    let all = [KVM_XEN_ATTR_TYPE_LONG_MODE, KVM_XEN_ATTR_TYPE_SHARED_INFO, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR];
    assert_eq!(all.map(|type_| machine.get(type_)), [Ok(0), Ok(NOWHERE), Ok(0)]);
    machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[0x7f02]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[0x110]).unwrap();
    assert_eq!(all.map(|type_| machine.get(type_)), [Ok(1), Ok(SHARED >> 12), Ok(0x10)], "bytes are read as such");
    for vector in 1..0x10 {
        assert_eq!(machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[vector]), Err(Errno::EINVAL));
    }
    assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR), Ok(0x10));
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[0]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[NOWHERE]).unwrap();
    machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[0]).unwrap();
    assert_eq!(all.map(|type_| machine.get(type_)), [Ok(0), Ok(NOWHERE), Ok(0)]);
    // What is no memory, or is not to be written, is kept, and an error.
    machine.client.slot(machine.vm, (1, KVM_MEM_READONLY), HOLE << 1, 0x1000, 0).unwrap();
    for gfn in [HOLE >> 12, HOLE << 1 >> 12, NOWHERE >> 1] {
        assert_eq!(machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[gfn]), Err(Errno::EFAULT));
        assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_SHARED_INFO), Ok(gfn << 12 >> 12));
    }
    for type_ in [77, 0xffff] {
        assert_eq!((machine.set(type_, &[0]), machine.get(type_)), (Err(Errno::ENOENT), Err(Errno::ENOENT)));
    }
}

/// `kvm_xen_vcpu_set_attr`, `kvm_xen_vcpu_get_attr`.
#[test]
fn attributes_of_a_vcpu_are_kept_if_they_can_be() {
    let machine = Machine::new(&[&|a| a.nop()]);
    let areas = [
        (KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO, 64, Ok(NOWHERE)),
        (KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, CLOCK, 32, Ok(NOWHERE)),
        (KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, RUNSTATE, 48, Err(Errno::ENOENT)),
    ];
    for (type_, gpa, bytes, nowhere) in areas {
        let get = || machine.get_vcpu(0, type_).map(|u| u[0]);
        assert_eq!(get(), nowhere);
        for gpa in [gpa, gpa + 0x1000 - gpa % 0x1000 - bytes] {
            assert_eq!(machine.set_vcpu(0, type_, &[gpa]), Ok(0));
            assert_eq!(get(), Ok(gpa));
            assert_eq!(machine.set_vcpu(0, type_, &[gpa - gpa % 0x1000 + 0x1001 - bytes]), Err(Errno::EINVAL));
            assert_eq!(get(), Ok(gpa), "it must lie in one page");
        }
        assert_eq!(machine.set_vcpu(0, type_, &[HOLE]), Err(Errno::EFAULT));
        assert_eq!(get(), Ok(HOLE));
        assert_eq!(machine.set_vcpu(0, type_, &[NOWHERE]), Ok(0));
        assert_eq!(get(), nowhere);
    }
    assert_eq!(machine.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST), Err(Errno::EINVAL));
    assert_eq!(machine.get_vcpu(0, 77), Err(Errno::ENOENT));
    assert_eq!(machine.set_vcpu(0, 77, &[]), Err(Errno::ENOENT));
}

/// `kvm_xen_vcpu_set_attr`: what does not add up, or is to come, is EINVAL.
#[test]
fn run_states_are_loaded_and_moved() {
    let machine = Machine::new(&[&|a| a.nop()]);
    let data = |u: &[u64]| machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA, u);
    let adjust = |u: &[u64]| machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST, u);
    let current = |state| machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, &[state]);
    assert_eq!(machine.runstate(), [0; 6]);
    machine.client.set(machine.vm, KVM_SET_CLOCK, &kvm_clock_data { clock: 1 << 40, ..Plain::zeroed() }).unwrap();
    assert_eq!(data(&[BLOCKED, 1000, 400, 300, 200, 100]), Ok(0));
    assert_eq!(machine.runstate(), [BLOCKED, 1000, 400, 300, 200, 100]);
    for wrong in [[4, 1000, 400, 300, 200, 100], [0, 1000, 400, 300, 200, 101], [0, 1 << 50, 1 << 50, 0, 0, 0]] {
        assert_eq!((data(&wrong), adjust(&wrong)), (Err(Errno::EINVAL), Err(Errno::EINVAL)));
    }
    assert_eq!(data(&[u64::MAX, 0, 0, 0, 0, 0]), Err(Errno::EINVAL));
    assert_eq!(adjust(&[u64::MAX, 10, 0u64.wrapping_sub(100), 50, 30, 30]), Ok(0));
    assert_eq!(machine.runstate(), [BLOCKED, 1010, 300, 350, 230, 130]);
    assert_eq!(current(4), Err(Errno::EINVAL));
    assert_eq!(current(OFFLINE), Ok(0));
    let [state, entry, times @ ..] = machine.runstate();
    assert_eq!((state, entry), (OFFLINE, times.iter().sum()));
    assert_eq!(machine.get_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT).unwrap()[0], OFFLINE);
    assert!(entry >= 1 << 40 && entry <= machine.clock());
    assert_eq!([times[0], times[1], times[3]], [300, 350, 130], "it was blocked");
    assert_eq!(adjust(&[RUNNING, 0, 0, 0, 0, 0]), Ok(0));
    let now = machine.runstate();
    assert!(now[0] == RUNNING && now[1] > entry && now[5] == 130 + (now[1] - entry), "{now:?}");
}

/// `kvm_xen_update_runstate_guest`: each KVM_RUN begins it anew, and what the scheduler lets the vCPU's thread wait is its own state.
/// Layouts: struct vcpu_runstate_info, compat_vcpu_runstate_info.
#[test]
fn run_states_are_shown() {
    for (long, times_at) in [(1, 8), (0, 4)] {
        let machine = Machine::with_xen(&[&|a| {
            for _ in 0..4 {
                here(a)?;
            }
            Ok(())
        }]);
        machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[long]).unwrap();
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &[RUNSTATE]).unwrap();
        let shown = || {
            let at = |n: u64| {
                let mut bytes = [0; 8];
                machine.client.memory.read(RUNSTATE + times_at + 8 * n, &mut bytes).unwrap();
                u64::from_le_bytes(bytes)
            };
            [self::Machine::u32(&machine, RUNSTATE).into(), at(0), at(1), at(2), at(3), at(4)]
        };
        machine.client.set_waited(1_000_000);
        machine.out(0);
        let first = shown();
        assert_eq!(first, machine.runstate());
        assert_eq!((first[0], first[1], first[4]), (RUNNING, first[2..].iter().sum(), 0));
        assert_ne!(first[5], 0, "it was offline");
        std::thread::sleep(Duration::from_millis(5));
        machine.client.set_waited(2_500_000);
        machine.out(0);
        let second = shown();
        assert_eq!(second[1], second[2..].iter().sum());
        assert!(second[3] >= 1_500_000 && second[2] >= 2_000_000, "{second:?}");
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, &[BLOCKED]).unwrap();
        assert_eq!(shown(), second, "the guest sees it when it runs");
        std::thread::sleep(Duration::from_millis(5));
        machine.out(0);
        let third = shown();
        assert!(third[4] >= 5_000_000, "{third:?}");
        assert_eq!((third[0], third[1]), (RUNNING, third[2..].iter().sum()));
        // Memory that is gone, and none.
        machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &[HOLE]).unwrap_err();
        machine.out(0);
        assert_eq!(shown(), third);
    }
}

/// `kvm_xen_shared_info_init`: struct shared_info's wall clock, of 64-bit guests and of others.
#[test]
fn the_wall_clock_is_written_where_the_mode_has_it() {
    for (long, [clock, upper]) in [(1, [0xc00, 0xc0c]), (0, [0x900, 0x924])] {
        let machine = Machine::new(&[]);
        machine.set(KVM_XEN_ATTR_TYPE_LONG_MODE, &[long]).unwrap();
        machine.put(SHARED + clock, &[7, 0, 0, 0]);
        machine.put(SHARED + upper, &[0xff; 4]);
        machine.set(KVM_XEN_ATTR_TYPE_SHARED_INFO, &[SHARED >> 12]).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let [version, seconds, ns] = [0, 4, 8].map(|at| machine.u32(SHARED + clock + at));
        assert_eq!((version, machine.u32(SHARED + upper)), (10, (now / 1_000_000_000 >> 32) as u32));
        let told = u64::from(seconds) * 1_000_000_000 + u64::from(ns) + machine.clock();
        assert!(told.abs_diff(now) < 1_000_000_000, "{told} {now}");
    }
}

/// `kvm_guest_time_update`: in vcpu_info and beside it, the same line.
#[test]
fn clocks_are_in_two_places() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        here(a)
    }]);
    machine.out(0);
    assert_eq!(machine.u32(CLOCK), 0);
    assert_eq!(machine.u32(INFO + 32), 2);
    machine.put(INFO + 32 + 29, &[2]);
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, &[CLOCK]).unwrap();
    machine.out(0);
    assert_eq!([machine.u32(INFO + 32), machine.u32(CLOCK)], [4, 2]);
    let [tsc, ns, scale] = [8, 16, 24].map(|at| machine.u64(CLOCK + at));
    assert_ne!((tsc, scale & 0xffff_ffff), (0, 0));
    assert_eq!([8, 16, 24].map(|at| machine.u64(INFO + 32 + at)), [tsc, ns, scale]);
    // Stable; and stopped, as the guest was told and has not cleared.
    assert_eq!(scale >> 40, 3);
}

/// `kvm_xen_has_interrupt`, `kvm_cpu_get_extint`: while vcpu_info says so, and not through the local APIC.
#[test]
fn the_vector_comes_while_vcpu_info_says_so() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        here(a)?;
        a.hlt()?;
        here(a)?;
        here(a)
    }]);
    assert_eq!(machine.out(0), AT);
    machine.put(INFO, &[1]);
    assert_eq!(machine.out(0), AT, "there is no vector");
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    assert_eq!([machine.out(0), machine.out(0)], [HANDLED; 2], "again and again");
    let irr: [u32; 256] = machine.client.get(machine.vcpus[0].0, KVM_GET_LAPIC);
    assert!((0x100 / 4..0x280 / 4).all(|at| irr[at] == 0), "no interrupt of the APIC's");
    machine.put(INFO, &[0]);
    // It sleeps in HLT. What user space stores there wakes nobody, and is seen by the next KVM_RUN.
    let client = machine.client.clone();
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        client.raise();
    });
    assert_eq!(machine.run(0), Err(Errno::EINTR));
    ends.join().unwrap();
    machine.client.consume_signal();
    machine.put(INFO, &[1]);
    assert_eq!(machine.out(0), HANDLED);
    machine.put(INFO, &[0]);
    assert_eq!(machine.out(0), AT, "behind the HLT");
    machine.put(INFO, &[0x80]);
    assert_eq!(machine.out(0), HANDLED);
    // Memory that is gone says nothing.
    machine.set_vcpu(0, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &[HOLE]).unwrap_err();
    assert_eq!(machine.out(0), AT);
}

/// With interrupts off it waits for the instruction behind STI.
#[test]
fn the_vector_waits_for_the_guest() {
    let machine = Machine::with_xen(&[&|a| {
        here(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        here(a)
    }]);
    machine.set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &[VECTOR.into()]).unwrap();
    machine.put(INFO, &[1]);
    assert_eq!([machine.out(0), machine.out(0)], [AT, HANDLED]);
    let behind_sti = machine.u64(STACKS + 0x1000 - 40);
    assert_eq!(machine.client.memory.load_u8(behind_sti - 2).unwrap(), 0xfb, "STI, NOP");
}

/// `kvm_xen_write_hypercall_page`: a page of user space's, by mode and number; the mode that counts from then on.
#[test]
fn user_space_brings_pages_of_hypercalls() {
    let blobs = BASE + 0x80_0000;
    let machine = Machine::new(&[&|a| {
        wrmsr(a, XEN_MSR, PAGE | 1)?;
        here(a)?;
        wrmsr(a, XEN_MSR, PAGE | 2)?;
        wrmsr(a, XEN_MSR, HOLE)?;
        here(a)
    }]);
    for page in 0..4u8 {
        machine.put(0x80_0000 + 0x1000 * u64::from(page), &[page + 1; 4096]);
    }
    let config = kvm_xen_hvm_config {
        msr: XEN_MSR,
        blob_addr_32: blobs,
        blob_addr_64: blobs + 0x1000,
        blob_size_32: 1,
        blob_size_64: 2,
        ..Plain::zeroed()
    };
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &config).unwrap();
    assert_eq!(machine.out(0), AT);
    let mut page = [0; 4096];
    machine.client.memory.read(PAGE, &mut page).unwrap();
    assert_eq!(page, [3; 4096], "the second of those for 64 bits");
    assert_eq!(machine.get(KVM_XEN_ATTR_TYPE_LONG_MODE), Ok(1));
    // The handler has an error code where it expects none, and says where it is before that matters.
    let set = |value| {
        let entry = kvm_msr_entry { index: XEN_MSR, data: value, ..Plain::zeroed() };
        let bytes = [&[1, 0, 0, 0, 0, 0, 0, 0], entry.as_bytes()].concat();
        machine.client.ioctl_bytes(machine.vcpus[0].0, KVM_SET_MSRS, bytes).unwrap().0
    };
    assert_eq!([PAGE | 2, HOLE, PAGE].map(set), [0, 0, 1], "user space writes it too");
    machine.client.memory.read(PAGE, &mut page).unwrap();
    assert_eq!(page, [2; 4096]);
    assert_eq!(machine.out(0), HANDLED, "#GP: there are two pages");
    // User space may want to hear of it.
    let machine = Machine::new(&[&|a| {
        wrmsr(a, XEN_MSR, PAGE | 2)?;
        wrmsr(a, XEN_MSR, PAGE)
    }]);
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &config).unwrap();
    machine.client.enable(machine.vm, KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_INVAL)).unwrap();
    assert_eq!(machine.run(0).unwrap().0, KVM_EXIT_X86_WRMSR);
    // User space's page is not there: KVM_RUN says so, and RIP stays.
    let missing = kvm_xen_hvm_config { blob_addr_64: 0x1000, ..config };
    machine.client.set(machine.vm, KVM_XEN_HVM_CONFIG, &missing).unwrap();
    assert_eq!(machine.run(0), Err(Errno::EFAULT));
    let rip = machine.regs(0).rip;
    assert_eq!(machine.run(0), Err(Errno::EFAULT));
    assert_eq!(machine.regs(0).rip, rip);
    assert_eq!(machine.client.memory.load_u16(rip).unwrap(), 0x300f, "WRMSR");
    assert_eq!(set_bad(&machine), 0);
}

fn set_bad(machine: &Machine) -> i32 {
    let entry = kvm_msr_entry { index: XEN_MSR, data: PAGE, ..Plain::zeroed() };
    let bytes = [&[1, 0, 0, 0, 0, 0, 0, 0], entry.as_bytes()].concat();
    machine.client.ioctl_bytes(machine.vcpus[0].0, KVM_SET_MSRS, bytes).unwrap().0
}
