//! Ioctls with right and wrong arguments, and what they return: the same body on a real `/dev/kvm`
//! (`examples/record_returns.rs`) and on our objects (`tests/returns.rs`).

#![allow(dead_code, reason = "the recorder and the test use different parts")]

use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::*;

/// Bytes of memory that a backend has for slots.
pub const MEMORY: u64 = 1 << 20;

/// Where the cases run.
pub trait Backend {
    /// Address of [`MEMORY`] bytes, page-aligned.
    fn memory(&self) -> u64;
    /// ioctl(2) with a number. Errors are the names of errno.
    fn value(&mut self, fd: i32, request: u32, arg: u64) -> Result<i32, String>;
    /// ioctl(2) with a pointer to these bytes, which it may change.
    fn bytes(&mut self, fd: i32, request: u32, bytes: &mut Vec<u8>) -> Result<i32, String>;
    /// `/dev/kvm`
    fn system(&self) -> i32;
}

/// Runs the cases; a line each, `name = result`.
pub fn run(backend: &mut dyn Backend) -> Vec<String> {
    let mut cases = Cases { backend, lines: Vec::new() };
    cases.system();
    cases.memory();
    cases.vm();
    cases.vcpu();
    cases.state();
    cases.lists();
    cases.pointers();
    cases.numbers();
    cases.dirty_ring();
    cases.lines
}

struct Cases<'a> {
    backend: &'a mut dyn Backend,
    lines: Vec<String>,
}

fn region(slot: u32, flags: u32, guest_phys_addr: u64, memory_size: u64, userspace_addr: u64) -> Vec<u8> {
    kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr }.as_bytes().to_vec()
}

/// A header's count and what follows it.
fn counted(count: u32, header: usize, entries: &[u8]) -> Vec<u8> {
    let mut bytes = count.to_le_bytes().to_vec();
    bytes.resize(header, 0);
    bytes.extend_from_slice(entries);
    bytes
}

impl Cases<'_> {
    fn line(&mut self, name: &str, result: &Result<i32, String>) {
        let result = match result {
            Ok(value) => value.to_string(),
            Err(errno) => errno.clone(),
        };
        self.lines.push(format!("{name} = {result}"));
    }

    fn value(&mut self, name: &str, fd: i32, request: u32, arg: u64) {
        let result = self.backend.value(fd, request, arg);
        self.line(name, &result);
    }

    fn bytes(&mut self, name: &str, fd: i32, request: u32, bytes: &[u8]) {
        let result = self.backend.bytes(fd, request, &mut bytes.to_vec());
        self.line(name, &result);
    }

    /// Makes a file that later cases use.
    fn file(&mut self, fd: i32, request: u32, arg: u64) -> i32 {
        self.backend.value(fd, request, arg).expect("a new file")
    }

    fn get<T: Plain>(&mut self, fd: i32, request: u32) -> T {
        let mut bytes = T::zeroed().as_bytes().to_vec();
        self.backend.bytes(fd, request, &mut bytes).expect("state that can be read");
        T::from_bytes(&bytes).expect("its size")
    }

    fn system(&mut self) {
        let system = self.backend.system();
        self.value("system: api version", system, KVM_GET_API_VERSION, 0);
        self.value("system: api version with an argument", system, KVM_GET_API_VERSION, 1);
        self.value("system: mmap size", system, KVM_GET_VCPU_MMAP_SIZE, 0);
        self.value("system: mmap size with an argument", system, KVM_GET_VCPU_MMAP_SIZE, 1);
        self.value("system: unknown extension", system, KVM_CHECK_EXTENSION, 696_969);
        self.value("system: user memory", system, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY.into());
        self.value("system: create vm of unknown type", system, KVM_CREATE_VM, 0x8000_0000);
        self.value("system: unknown request", system, 0xaeff, 0);
        self.value("system: vcpu request", system, KVM_RUN, 0);
        self.value("system: vm request", system, KVM_CREATE_VCPU, 0);
        self.bytes("system: msr list without room", system, KVM_GET_MSR_INDEX_LIST, &counted(0, 4, &[]));
        self.bytes("system: cpuid without room", system, KVM_GET_SUPPORTED_CPUID, &counted(0, 8, &[]));
        self.bytes("system: cpuid with room for one", system, KVM_GET_SUPPORTED_CPUID, &counted(1, 8, &[0; 40]));
        self.bytes(
            "system: cpuid with room for more than ever",
            system,
            KVM_GET_SUPPORTED_CPUID,
            &counted(300, 8, &[0; 40 * 300]),
        );
        self.bytes("system: mce capabilities", system, KVM_X86_GET_MCE_CAP_SUPPORTED, &[0; 8]);
        self.bytes("system: emulated cpuid", system, KVM_GET_EMULATED_CPUID, &counted(100, 8, &[0; 4000]));
    }

    fn memory(&mut self) {
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let user = self.backend.memory();
        let mut slot = |name: &str, bytes: Vec<u8>| {
            let name = format!("memory: {name}");
            self.bytes(&name, vm, KVM_SET_USER_MEMORY_REGION, &bytes);
        };
        slot("delete of what is not there", region(0, 0, 0, 0, 0));
        slot("misaligned size", region(0, 0, 0, 0x1001, user));
        slot("misaligned gpa", region(0, 0, 0x800, 0x1000, user));
        slot("misaligned address", region(0, 0, 0, 0x1000, user + 1));
        slot("address of the kernel", region(0, 0, 0, 0x1000, 0xffff_8000_0000_0000));
        slot("unknown flag", region(0, 4, 0, 0x1000, user));
        slot("slot beyond all", region(0xffff, 0, 0, 0x1000, user));
        slot("address space beyond all", region(0x0002_0000, 0, 0, 0x1000, user));
        slot("wraps", region(0, 0, 0xffff_ffff_ffff_f000, 0x2000, user));
        slot("create", region(0, 0, 0x10000, 0x4000, user));
        slot("the same again", region(0, 0, 0x10000, 0x4000, user));
        slot("overlap", region(1, 0, 0x13000, 0x1000, user));
        slot("neighbour", region(1, 0, 0x14000, 0x1000, user));
        slot("another size", region(0, 0, 0x10000, 0x3000, user));
        slot("another address", region(0, 0, 0x10000, 0x4000, user + 0x1000));
        slot("now read-only", region(0, KVM_MEM_READONLY, 0x10000, 0x4000, user));
        slot("now logged", region(0, KVM_MEM_LOG_DIRTY_PAGES, 0x10000, 0x4000, user));
        slot("moved", region(0, KVM_MEM_LOG_DIRTY_PAGES, 0x20000, 0x4000, user));
        slot("moved over a neighbour", region(0, KVM_MEM_LOG_DIRTY_PAGES, 0x12000, 0x4000, user));
        slot("read-only", region(2, KVM_MEM_READONLY, 0x40000, 0x1000, user));
        let mut log = |name: &str, slot: u32, dirty_bitmap: u64| {
            let log = DirtyLog { slot, padding1: 0, dirty_bitmap };
            self.bytes(&format!("dirty log: {name}"), vm, KVM_GET_DIRTY_LOG, log.as_bytes());
        };
        log("of a logging slot", 0, user);
        log("of a slot that does not log", 1, user);
        log("of no slot", 5, user);
        log("of a slot beyond all", 0xffff, user);
        log("of an address space beyond all", 0x0002_0000, user);
        log("to nowhere", 0, 0x1000);
        self.bytes("memory: delete", vm, KVM_SET_USER_MEMORY_REGION, &region(0, 0, 0, 0, 0));
        self.bytes("memory: 2007's region", vm, KVM_SET_MEMORY_REGION, &[0; 24]);
        self.bytes("memory: 2007's alias", vm, KVM_SET_MEMORY_ALIAS, &[0; 32]);
    }

    fn vm(&mut self) {
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        self.value("vm: user memory", vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY.into());
        self.value("vm: unknown extension", vm, KVM_CHECK_EXTENSION, 696_969);
        self.value("vm: unknown request", vm, 0xaeff, 0);
        self.value("vm: system request", vm, KVM_GET_API_VERSION, 0);
        self.value("vm: vcpu request", vm, KVM_RUN, 0);
        self.value("vm: tss", vm, KVM_SET_TSS_ADDR, 0xfffb_d000);
        self.value("vm: tss too high", vm, KVM_SET_TSS_ADDR, 0xffff_e000);
        self.bytes("vm: identity map", vm, KVM_SET_IDENTITY_MAP_ADDR, &0xfffb_c000_u64.to_le_bytes());
        self.bytes("vm: routes without an interrupt controller", vm, KVM_SET_GSI_ROUTING, &[0; 8]);
        self.value("vm: vcpu id beyond all", vm, KVM_CREATE_VCPU, 65537);
        self.value("vm: negative vcpu id", vm, KVM_CREATE_VCPU, u64::MAX);
        let _ = self.file(vm, KVM_CREATE_VCPU, 3);
        self.value("vm: vcpu again", vm, KVM_CREATE_VCPU, 3);
        self.bytes("vm: identity map after a vcpu", vm, KVM_SET_IDENTITY_MAP_ADDR, &0xfffb_c000_u64.to_le_bytes());
    }

    fn vcpu(&mut self) {
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let vcpu = self.file(vm, KVM_CREATE_VCPU, 0);
        self.value("vcpu: unknown request", vcpu, 0xaeff, 0);
        self.value("vcpu: unknown type", vcpu, 0xaf80, 0);
        self.value("vcpu: vm request", vcpu, KVM_CREATE_VCPU, 1);
        self.value("vcpu: run with an argument", vcpu, KVM_RUN, 1);
        self.value("vcpu: nmi", vcpu, KVM_NMI, 0);
        self.bytes("vcpu: interrupt 255", vcpu, KVM_INTERRUPT, &255u32.to_le_bytes());
        self.bytes("vcpu: interrupt 256", vcpu, KVM_INTERRUPT, &256u32.to_le_bytes());
        self.bytes("vcpu: 2007's debugging", vcpu, KVM_DEBUG_GUEST, &[0; 80]);
        for state in [0, 1, 2, 3, 4, 99u32] {
            self.bytes(&format!("vcpu: mp state {state}"), vcpu, KVM_SET_MP_STATE, &state.to_le_bytes());
        }
        self.value("vcpu: no signal mask", vcpu, KVM_SET_SIGNAL_MASK, 0);
        self.bytes("vcpu: signal mask of 4 bytes", vcpu, KVM_SET_SIGNAL_MASK, &counted(4, 4, &[0; 4]));
        self.bytes("vcpu: signal mask of 8 bytes", vcpu, KVM_SET_SIGNAL_MASK, &counted(8, 4, &[0; 8]));
        self.value("vcpu: no signal mask again", vcpu, KVM_SET_SIGNAL_MASK, 0);
        self.bytes("vcpu: translate", vcpu, KVM_TRANSLATE, &[0; 24]);
        let debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, ..Plain::zeroed() };
        self.bytes("vcpu: single step", vcpu, KVM_SET_GUEST_DEBUG, debug.as_bytes());
        let debug = kvm_guest_debug { control: KVM_GUESTDBG_INJECT_DB, ..Plain::zeroed() };
        self.bytes("vcpu: inject #DB", vcpu, KVM_SET_GUEST_DEBUG, debug.as_bytes());
        self.bytes("vcpu: inject #DB on top of #DB", vcpu, KVM_SET_GUEST_DEBUG, debug.as_bytes());
    }

    fn state(&mut self) {
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let vcpu = self.file(vm, KVM_CREATE_VCPU, 0);
        let reset: kvm_sregs = self.get(vcpu, KVM_GET_SREGS);
        let mut sregs = |name: &str, change: &dyn Fn(&mut kvm_sregs)| {
            let mut sregs = reset;
            change(&mut sregs);
            self.bytes(&format!("sregs: {name}"), vcpu, KVM_SET_SREGS, sregs.as_bytes());
        };
        sregs("as they were", &|_| {});
        sregs("PG without PE", &|s| s.cr0 = 0x8000_0000);
        sregs("NW without CD", &|s| s.cr0 = 0x2000_0011);
        sregs("CR0 above 32 bits", &|s| s.cr0 |= 1 << 32);
        sregs("unknown CR4 bit", &|s| s.cr4 |= 1 << 30);
        sregs("VMXE", &|s| s.cr4 |= 1 << 13);
        sregs("LMA without LME", &|s| s.efer = 0x400);
        sregs("LMA without PG", &|s| s.efer = 0x500);
        sregs("LME without PG", &|s| s.efer = 0x100);
        sregs("PG and LME without PAE", &|s| (s.cr0, s.efer) = (0x8000_0011, 0x500));
        sregs("PG and LME without LMA", &|s| (s.cr0, s.efer, s.cr4) = (0x8000_0011, 0x100, 0x20));
        sregs("long mode", &|s| (s.cr0, s.efer, s.cr4, s.cs.l) = (0x8000_0011, 0x500, 0x20, 1));
        sregs("long mode with CR3 too wide", &|s| (s.cr0, s.efer, s.cr4, s.cr3) = (0x8000_0011, 0x500, 0x20, 1 << 60));
        sregs("L outside of long mode", &|s| s.cs.l = 1);
        sregs("APIC base with reserved bits", &|s| s.apic_base |= 1);
        sregs("APIC base off", &|s| s.apic_base = 0xfee0_0100);
        sregs("APIC in x2APIC mode", &|s| s.apic_base |= 0x400);
        sregs("CR8 of 15", &|s| s.cr8 = 15);

        let debugregs: kvm_debugregs = self.get(vcpu, KVM_GET_DEBUGREGS);
        let mut debug = |name: &str, change: &dyn Fn(&mut kvm_debugregs)| {
            let mut regs = debugregs;
            change(&mut regs);
            self.bytes(&format!("debugregs: {name}"), vcpu, KVM_SET_DEBUGREGS, regs.as_bytes());
        };
        debug("as they were", &|_| {});
        debug("flags", &|d| d.flags = 1);
        debug("DR6 above 32 bits", &|d| d.dr6 |= 1 << 32);
        debug("DR7 above 32 bits", &|d| d.dr7 |= 1 << 32);

        let events: kvm_vcpu_events = self.get(vcpu, KVM_GET_VCPU_EVENTS);
        let mut event = |name: &str, change: &dyn Fn(&mut kvm_vcpu_events)| {
            let mut events = events;
            change(&mut events);
            self.bytes(&format!("events: {name}"), vcpu, KVM_SET_VCPU_EVENTS, events.as_bytes());
        };
        event("as they were", &|_| {});
        event("unknown flag", &|e| e.flags |= 0x8000_0000);
        event("payload", &|e| e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD);
        event("triple fault", &|e| e.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT);
        event("exception 31", &|e| (e.exception.injected, e.exception.nr) = (1, 31));
        event("exception 32", &|e| (e.exception.injected, e.exception.nr) = (1, 32));
        event("exception 2", &|e| (e.exception.injected, e.exception.nr) = (1, 2));
        event("exception 2 not injected", &|e| e.exception.nr = 2);

        let xcrs: kvm_xcrs = self.get(vcpu, KVM_GET_XCRS);
        let mut xcr = |name: &str, change: &dyn Fn(&mut kvm_xcrs)| {
            let mut xcrs = xcrs;
            change(&mut xcrs);
            self.bytes(&format!("xcrs: {name}"), vcpu, KVM_SET_XCRS, xcrs.as_bytes());
        };
        xcr("as they were", &|_| {});
        xcr("17 of them", &|x| x.nr_xcrs = 17);
        xcr("flags", &|x| x.flags = 1);
        xcr("XCR0 of 0", &|x| x.xcrs[0].value = 0);
        xcr("XCR0 without x87", &|x| x.xcrs[0].value = 2);
        xcr("XCR0 of all", &|x| x.xcrs[0].value = u64::MAX);
        xcr("none", &|x| x.nr_xcrs = 0);

        let xsave: [u32; 1024] = self.get(vcpu, KVM_GET_XSAVE);
        let mut save = |name: &str, change: &dyn Fn(&mut [u32; 1024])| {
            let mut image = xsave;
            change(&mut image);
            self.bytes(&format!("xsave: {name}"), vcpu, KVM_SET_XSAVE, image.as_bytes());
        };
        save("as it was", &|_| {});
        save("unknown component", &|x| x[129] |= 1 << 31);
        save("compacted", &|x| x[131] = 1 << 31);
        save("reserved header bytes", &|x| x[133] = 1);
        save("MXCSR with reserved bits", &|x| (x[6], x[128]) = (0xffff_0000, 3));

        for (name, cap) in [
            ("of no bank", 0),
            ("of 33 banks", 33),
            ("of unknown kind", 10 | 1 << 40),
            ("of 10 banks", 0x0100_010a_u64),
        ] {
            self.bytes(&format!("mce: setup {name}"), vcpu, KVM_X86_SETUP_MCE, &cap.to_le_bytes());
        }
        let mce = |bank, status| kvm_x86_mce { bank, status, ..Plain::zeroed() }.as_bytes().to_vec();
        self.bytes("mce: error in bank 10", vcpu, KVM_X86_SET_MCE, &mce(10, 1 << 63));
        self.bytes("mce: error not valid", vcpu, KVM_X86_SET_MCE, &mce(0, 0));
        self.bytes("mce: corrected error", vcpu, KVM_X86_SET_MCE, &mce(0, 1 << 63));

        self.value("tsc: set to the host's", vcpu, KVM_SET_TSC_KHZ, 0);
    }

    fn lists(&mut self) {
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let vcpu = self.file(vm, KVM_CREATE_VCPU, 0);
        let entry = |index: u32, data: u64| kvm_msr_entry { index, reserved: 0, data }.as_bytes().to_vec();
        self.bytes("msrs: get none", vcpu, KVM_GET_MSRS, &counted(0, 8, &[]));
        self.bytes("msrs: get 256", vcpu, KVM_GET_MSRS, &counted(256, 8, &[0; 16 * 256]));
        self.bytes("msrs: set 256", vcpu, KVM_SET_MSRS, &counted(256, 8, &[0; 16 * 256]));
        let two = [entry(0x174, 7), entry(0x4747_4747, 0)].concat();
        self.bytes("msrs: get one of two", vcpu, KVM_GET_MSRS, &counted(2, 8, &two));
        self.bytes("msrs: set one of two", vcpu, KVM_SET_MSRS, &counted(2, 8, &two));
        for (name, index, value) in [
            ("SYSENTER_CS", 0x174, 0x10),
            ("SYSENTER_EIP", 0x176, 0xffff_ffff_8000_0000),
            ("SYSENTER_EIP not canonical", 0x176, 0x8000_0000_0000_0000),
            ("APIC_BASE", 0x1b, 0xfee0_0900),
            ("APIC_BASE with reserved bits", 0x1b, 0xfee0_0901),
            ("MTRR cap", 0xfe, 0),
            ("MTRR default type", 0x2ff, 0xc06),
            ("MTRR default type of a reserved type", 0x2ff, 0xc02),
            ("MTRR fixed", 0x250, 0x0606_0606_0606_0606),
            ("MTRR fixed of a reserved type", 0x250, 2),
            ("MTRR base", 0x200, 0x1000_0006),
            ("PAT", 0x277, 0x0007_0406_0007_0406),
            ("PAT of a reserved type", 0x277, 2),
            ("MISC_ENABLE", 0x1a0, 1),
            ("TSC", 0x10, 0),
            ("EFER", 0xc000_0080, 0xd01),
            ("STAR", 0xc000_0081, u64::MAX),
            ("LSTAR not canonical", 0xc000_0082, 0x8000_0000_0000_0000),
            ("KERNEL_GS_BASE", 0xc000_0102, 0x1000),
            ("MCG_STATUS", 0x17a, 0),
            ("BIOS_SIGN_ID", 0x8b, 0),
            ("MCG_CTL without one", 0x17b, u64::MAX),
            ("MC0_CTL", 0x400, u64::MAX),
            ("MC0_CTL of some bits", 0x400, 2),
            ("MC0_STATUS", 0x401, 5),
            ("MC33_CTL", 0x484, 0),
        ] {
            self.bytes(&format!("msrs: set {name}"), vcpu, KVM_SET_MSRS, &counted(1, 8, &entry(index, value)));
            self.bytes(&format!("msrs: get {name}"), vcpu, KVM_GET_MSRS, &counted(1, 8, &entry(index, 0)));
        }

        let leaf = |function: u32, eax: u32| kvm_cpuid_entry2 { function, eax, ..Plain::zeroed() }.as_bytes().to_vec();
        self.bytes("cpuid: none", vcpu, KVM_SET_CPUID2, &counted(0, 8, &[]));
        self.bytes("cpuid: 257", vcpu, KVM_SET_CPUID2, &counted(257, 8, &[0; 40 * 257]));
        self.bytes(
            "cpuid: linear addresses of 40 bits",
            vcpu,
            KVM_SET_CPUID2,
            &counted(1, 8, &leaf(0x8000_0008, 40 << 8)),
        );
        let three = [leaf(0, 1), leaf(1, 0), leaf(0x8000_0000, 0)].concat();
        self.bytes("cpuid: three", vcpu, KVM_SET_CPUID2, &counted(3, 8, &three));
        self.bytes("cpuid: get into two", vcpu, KVM_GET_CPUID2, &counted(2, 8, &[0; 80]));
        self.bytes("cpuid: get into three", vcpu, KVM_GET_CPUID2, &counted(3, 8, &[0; 120]));
        self.bytes("cpuid: 2007's, one", vcpu, KVM_SET_CPUID, &counted(1, 8, &[0; 24]));
        self.bytes("cpuid: 2007's, 257", vcpu, KVM_SET_CPUID, &counted(257, 8, &[0; 24 * 257]));
    }

    /// Where there is no memory.
    fn pointers(&mut self) {
        const NOWHERE: u64 = 0x1000;
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let vcpu = self.file(vm, KVM_CREATE_VCPU, 0);
        for (name, fd, request) in [
            ("msr list", system, KVM_GET_MSR_INDEX_LIST),
            ("supported cpuid", system, KVM_GET_SUPPORTED_CPUID),
            ("memory region", vm, KVM_SET_USER_MEMORY_REGION),
            ("dirty log", vm, KVM_GET_DIRTY_LOG),
            ("get regs", vcpu, KVM_GET_REGS),
            ("set regs", vcpu, KVM_SET_REGS),
            ("get sregs", vcpu, KVM_GET_SREGS),
            ("set sregs", vcpu, KVM_SET_SREGS),
            ("translate", vcpu, KVM_TRANSLATE),
            ("interrupt", vcpu, KVM_INTERRUPT),
            ("get msrs", vcpu, KVM_GET_MSRS),
            ("set msrs", vcpu, KVM_SET_MSRS),
            ("set cpuid", vcpu, KVM_SET_CPUID),
            ("set cpuid2", vcpu, KVM_SET_CPUID2),
            ("get cpuid2", vcpu, KVM_GET_CPUID2),
            ("signal mask", vcpu, KVM_SET_SIGNAL_MASK),
            ("get fpu", vcpu, KVM_GET_FPU),
            ("set fpu", vcpu, KVM_SET_FPU),
            ("guest debug", vcpu, KVM_SET_GUEST_DEBUG),
            ("get events", vcpu, KVM_GET_VCPU_EVENTS),
            ("set events", vcpu, KVM_SET_VCPU_EVENTS),
        ] {
            self.value(&format!("nowhere: {name}"), fd, request, NOWHERE);
        }
        self.value("nowhere: get regs at 0", vcpu, KVM_GET_REGS, 0);
        self.value("nowhere: set regs at 0", vcpu, KVM_SET_REGS, 0);
        self.value("nowhere: set regs in the kernel's half", vcpu, KVM_SET_REGS, 0xffff_8880_0000_0000);
    }

    /// Request numbers that are nearly right, and arguments by value.
    fn numbers(&mut self) {
        let system = self.backend.system();
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let vcpu = self.file(vm, KVM_CREATE_VCPU, 0);
        for (name, fd, request) in [
            ("get regs as a write", vcpu, KVM_GET_REGS ^ 3 << 30),
            ("get regs of another size", vcpu, KVM_GET_REGS + (8 << 16)),
            ("set sregs of another size", vcpu, KVM_SET_SREGS - (8 << 16)),
            ("translate as a write", vcpu, KVM_TRANSLATE & !(2 << 30)),
            ("2007's debugging of an i386 caller", vcpu, 0x404c_ae87),
            ("memory region of another size", vm, KVM_SET_USER_MEMORY_REGION + (8 << 16)),
            ("dirty log as a read", vm, KVM_GET_DIRTY_LOG ^ 3 << 30),
            ("msr list as a write", system, KVM_GET_MSR_INDEX_LIST & !(2 << 30)),
            ("number 0", system, 0),
            ("number 0", vm, 0),
            ("number 0", vcpu, 0),
        ] {
            let file = if fd == system {
                "system"
            } else if fd == vm {
                "vm"
            } else {
                "vcpu"
            };
            self.bytes(&format!("{file}: {name}"), fd, request, &[0; 0x400]);
        }
        for len in [0u32, 7, 9, 16] {
            self.bytes(&format!("vcpu: signal mask of {len}"), vcpu, KVM_SET_SIGNAL_MASK, &counted(len, 4, &[0; 16]));
        }
        self.bytes("vcpu: interrupt 0", vcpu, KVM_INTERRUPT, &0u32.to_le_bytes());
        self.bytes("vcpu: interrupt of 32 bits", vcpu, KVM_INTERRUPT, &u32::MAX.to_le_bytes());
        self.bytes("vcpu: interrupt again", vcpu, KVM_INTERRUPT, &0x20u32.to_le_bytes());
        self.bytes("vcpu: interrupt on top of it", vcpu, KVM_INTERRUPT, &0x21u32.to_le_bytes());
        self.bytes("vcpu: translate what no table can", vcpu, KVM_TRANSLATE, &[0xff; 24]);
        for arg in [1, 0x8000_0000, u64::MAX] {
            self.value(&format!("vcpu: run with {arg:#x}"), vcpu, KVM_RUN, arg);
        }
        for arg in [1 << 31, 1 << 32, u64::MAX] {
            self.value(&format!("system: extension {arg:#x}"), system, KVM_CHECK_EXTENSION, arg);
            self.value(&format!("vm: vcpu {arg:#x}"), vm, KVM_CREATE_VCPU, arg | 0x8000_0000);
        }
        self.bytes("msrs: get 255", vcpu, KVM_GET_MSRS, &counted(255, 8, &[0; 16 * 255]));
        self.bytes("msrs: set none", vcpu, KVM_SET_MSRS, &counted(0, 8, &[]));
        self.bytes("cpuid: 2007's, none", vcpu, KVM_SET_CPUID, &counted(0, 8, &[]));
        self.bytes("cpuid: 2007's, 41", vcpu, KVM_SET_CPUID, &counted(41, 8, &[0; 24 * 41]));
        let fpu: kvm_fpu = self.get(vcpu, KVM_GET_FPU);
        self.bytes("fpu: as it was", vcpu, KVM_SET_FPU, fpu.as_bytes());
        self.bytes("fpu: every bit", vcpu, KVM_SET_FPU, &[0xff; 416]);
    }

    fn dirty_ring(&mut self) {
        let system = self.backend.system();
        let enable = |cap, size: u64| {
            let mut argument: kvm_enable_cap = Plain::zeroed();
            (argument.cap, argument.args[0]) = (cap, size);
            argument.as_bytes().to_vec()
        };
        for (name, cap) in [("", KVM_CAP_DIRTY_LOG_RING), (" by acquire and release", KVM_CAP_DIRTY_LOG_RING_ACQ_REL)] {
            self.value(&format!("ring{name}: bytes"), system, KVM_CHECK_EXTENSION, cap.into());
        }
        for size in [0, 1, 0x400, 0x800, 0xc00, 0x3000, 1 << 21, 3 << 20, 1 << 31, 1 << 32, 1 << 32 | 0x1000] {
            let vm = self.file(system, KVM_CREATE_VM, 0);
            self.bytes(&format!("ring: of {size:#x}"), vm, KVM_ENABLE_CAP, &enable(KVM_CAP_DIRTY_LOG_RING, size));
        }
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let user = self.backend.memory();
        self.value("ring: reset without", vm, KVM_RESET_DIRTY_RINGS, 0);
        self.bytes("ring: slot", vm, KVM_SET_USER_MEMORY_REGION, &region(0, KVM_MEM_LOG_DIRTY_PAGES, 0, 0x4000, user));
        self.bytes("ring: of the largest", vm, KVM_ENABLE_CAP, &enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 1 << 20));
        self.bytes("ring: again", vm, KVM_ENABLE_CAP, &enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, 1 << 20));
        self.bytes("ring: again, too large", vm, KVM_ENABLE_CAP, &enable(KVM_CAP_DIRTY_LOG_RING, 1 << 21));
        self.value("ring: reset without vcpus", vm, KVM_RESET_DIRTY_RINGS, 0);
        let vcpu = self.file(vm, KVM_CREATE_VCPU, 0);
        self.value("ring: reset", vm, KVM_RESET_DIRTY_RINGS, 0);
        self.value("ring: reset with an argument", vm, KVM_RESET_DIRTY_RINGS, 1);
        self.value("ring: reset of a vcpu", vcpu, KVM_RESET_DIRTY_RINGS, 0);
        for (name, slot) in [("slot", 0), ("slot beyond all", 0xffff)] {
            let log = DirtyLog { slot, padding1: 0, dirty_bitmap: user };
            self.bytes(&format!("ring: dirty log of a {name}"), vm, KVM_GET_DIRTY_LOG, log.as_bytes());
            let log = ClearDirtyLog { slot, num_pages: 4, first_page: 0, dirty_bitmap: user };
            self.bytes(&format!("ring: clearing of a {name}"), vm, KVM_CLEAR_DIRTY_LOG, log.as_bytes());
        }
        let vm = self.file(system, KVM_CREATE_VM, 0);
        let _ = self.file(vm, KVM_CREATE_VCPU, 0);
        self.bytes("ring: after a vcpu", vm, KVM_ENABLE_CAP, &enable(KVM_CAP_DIRTY_LOG_RING, 0x1000));
        let mut flags = enable(KVM_CAP_DIRTY_LOG_RING, 0x1000);
        flags[4] = 1;
        let vm = self.file(system, KVM_CREATE_VM, 0);
        self.bytes("ring: with flags", vm, KVM_ENABLE_CAP, &flags);
    }
}
