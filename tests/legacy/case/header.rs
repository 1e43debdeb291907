//! Every request and every exit reason of the header that the other cases do not come by.
//!
//! `KVM_EXIT_EXCEPTION` and `KVM_EXIT_FAIL_ENTRY` told of gaps in 2.6.22's emulator and of refused VMX instructions; a
//! guest has no way to cause them here.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use iced_x86::code_asm::*;
use nix::errno::Errno;

use super::same;
use crate::abi::{self, request};
use crate::guest::{self, Image, Written, assemble, at};
use crate::kvmctl::{MAX_CPUS, Machine, RAM_END, port};
use crate::vmm::{Exit, Kvm, Vcpu, unused_requests};

/// CR0 bits. SDM Vol. 3 "Control Registers".
const PE: u64 = 1;
const PG: u64 = 1 << 31;
const EFER: u32 = 0xc000_0080;
/// What Linux 2.6.22 lists on 64-bit hosts, in its order: SYSENTER_CS, _ESP, _EIP, STAR, CSTAR, KERNEL_GS_BASE, SYSCALL_MASK,
/// LSTAR, TSC, MISC_ENABLE.
const MSRS: [u32; 10] =
    [0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0083, 0xc000_0102, 0xc000_0084, 0xc000_0082, 0x10, 0x1a0];

pub(crate) fn all(_time: Duration) -> Result<()> {
    system().context("/dev/kvm")?;
    memory().context("memory")?;
    fresh_vcpu().context("a fresh vCPU")?;
    state().context("state")?;
    cpuid().context("KVM_SET_CPUID")?;
    exits().context("exits")?;
    window().context("the interrupt window")?;
    debug().context("KVM_DEBUG_GUEST")?;
    long_mode().context("long mode")?;
    same!(unused_requests(), [""; 0], "requests of the header that no case has made");
    Ok(())
}

/// Real mode from the reset vector.
fn real(write: impl FnOnce(&mut CodeAssembler) -> Written) -> Result<Machine> {
    let mut image = Image::default();
    image.data(at::BIOS, &assemble(16, 0, write));
    image.data(at::BIOS + 0xfff0, &assemble(16, 0xfff0, |a| a.jmp_far(0xf000, 0)));
    Machine::new(&Kvm::open()?, &image)
}

fn system() -> Result<()> {
    let kvm = Kvm::open()?;
    same!(kvm.number(request::GET_API_VERSION, 1), Err(Errno::EINVAL), "KVM_GET_API_VERSION with an argument");
    let size = kvm.number(request::GET_VCPU_MMAP_SIZE, 0)?;
    ensure!(size >= abi::VCPU_MMAP_SIZE, "KVM_GET_VCPU_MMAP_SIZE: {size}");
    // Which extensions there are is today's business; in 2007 there were none.
    kvm.number(request::CHECK_EXTENSION, 0).context("KVM_CHECK_EXTENSION")?;
    same!(kvm.number(0xaeff, 0), Err(Errno::EINVAL), "an unknown request");
    // As libkvm did it: ask how many, then for all.
    let mut list = abi::MsrList { nmsrs: 0, indices: [0; 1024] };
    same!(kvm.msr_index_list(&mut list), Err(Errno::E2BIG), "KVM_GET_MSR_INDEX_LIST with no room");
    same!(kvm.msr_index_list(&mut list), Ok(0), "KVM_GET_MSR_INDEX_LIST");
    let found = &list.indices[..list.nmsrs as usize];
    let missing: Vec<_> = MSRS.iter().filter(|msr| !found.contains(msr)).collect();
    same!(missing, Vec::<&u32>::new(), "MSRs of 2007 that are not listed");
    Ok(())
}

/// `KVM_SET_MEMORY_REGION` in the order of its checks, and what becomes of the contents.
fn memory() -> Result<()> {
    let vm = Kvm::open()?.create_vm()?;
    const MIB: u64 = 1 << 20;
    same!(vm.set_memory_region(0, 0, 0, MIB + 1), Err(Errno::EINVAL), "a size of odd bytes");
    same!(vm.set_memory_region(0, 0, 1, MIB), Err(Errno::EINVAL), "an odd address");
    // How many slots there are differs from kernel to kernel; 2.6.22 had 4.
    const NO_SLOT: u32 = u32::MAX;
    same!(vm.set_memory_region(NO_SLOT, 0, 0, MIB), Err(Errno::EINVAL), "no slot");
    same!(vm.set_memory_region(0, 0, !0xfff, MIB), Err(Errno::EINVAL), "a range that wraps");
    same!(vm.set_memory_region(0, 0, MIB, MIB), Ok(()), "a slot");
    same!(vm.set_memory_region(1, 0, MIB, MIB), Err(Errno::EEXIST), "another at the same place");
    same!(vm.set_memory_region(0, 0, MIB, 2 * MIB), Err(Errno::EINVAL), "another size");
    same!(vm.number(0xaeff, 0), Err(Errno::EINVAL), "an unknown request");
    let ram = vm.map(0, 8 * MIB)?;
    // Alias, log and vCPU wait for no order.
    same!(vm.set_memory_alias(NO_SLOT, 0, MIB, MIB), Err(Errno::EINVAL), "no alias");
    same!(vm.set_memory_alias(0, 0xa_0000, 0x8000, MIB), Ok(()), "an alias");
    same!(vm.dirty_log(0, 256), Err(Errno::ENOENT), "the log of a slot without");
    same!(vm.dirty_log(NO_SLOT, 256), Err(Errno::EINVAL), "the log of no slot");
    ram.write(MIB + 5, b"contents");
    same!(vm.set_memory_region(0, abi::MEM_LOG_DIRTY_PAGES, 4 * MIB, MIB), Ok(()), "moving the slot");
    same!(ram.read(4 * MIB + 5), *b"contents", "what has moved");
    same!(vm.dirty_log(0, 256), Ok(vec![]), "the log of what the VMM wrote");
    same!(vm.set_memory_region(0, 0, 4 * MIB, 0), Ok(()), "deleting the slot");
    same!(vm.set_memory_region(0, 0, 4 * MIB, MIB), Ok(()), "making it again");
    same!(vm.map(4 * MIB, MIB)?.read(4 * MIB + 5), [0; 8], "new memory");
    same!(ram.read(4 * MIB + 5), *b"contents", "a page that was touched before: the old one");
    // mmap over holes is fine; whoever touches one gets SIGBUS.
    same!(ram.probe(4 * MIB), Ok(()), "memory that is there");
    same!(ram.probe(6 * MIB), Err(Errno::EFAULT), "a hole");
    ensure!(vm.create_vcpu(-1).is_err(), "vCPU -1");
    let vcpu = vm.create_vcpu(MAX_CPUS as i32 - 1)?;
    ensure!(vm.create_vcpu(MAX_CPUS as i32 - 1).is_err(), "the same vCPU twice");
    same!(vcpu.number(0xaeff, 0), Err(Errno::EINVAL), "an unknown request");
    same!(vcpu.number(request::RUN, 1), Err(Errno::EINVAL), "KVM_RUN with an argument");
    Ok(())
}

/// As `vmx_vcpu_setup` of 2.6.22 leaves it.
fn fresh_vcpu() -> Result<()> {
    let machine = real(|a| a.hlt())?;
    let vcpu = machine.vcpu0();
    let (regs, sregs, fpu) = (vcpu.regs()?, vcpu.sregs()?, vcpu.fpu()?);
    same!((regs.rip, regs.rsp, regs.rax), (0xfff0, 0, 0), "RIP, RSP, RAX");
    same!(regs.rflags & 2, 2, "RFLAGS bit 1");
    same!((sregs.cs.selector, sregs.cs.base, sregs.cs.limit), (0xf000, 0xf_0000, 0xffff), "CS");
    same!((sregs.ds.selector, sregs.ds.base, sregs.ds.limit), (0, 0, 0xffff), "DS");
    same!((sregs.gdt.base, sregs.gdt.limit, sregs.idt.base), (0, 0xffff, 0), "GDT and IDT");
    same!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x6000_0010, 0, 0, 0), "CR0, CR3, CR4, EFER");
    same!(sregs.apic_base, 0xfee0_0900, "the APIC's base, of the boot processor");
    // MXCSR is in the structure, and no Linux has ever copied it.
    same!((fpu.fcw, fpu.fsw, fpu.ftwx, fpu.xmm), (0x37f, 0, 0, [[0; 16]; 16]), "x87 and XMM registers");
    Ok(())
}

/// What is set is what is there.
fn state() -> Result<()> {
    let machine = real(|a| {
        // One line for the guest to tell what it has: its own XMM0 and MM registers come back by GET_FPU.
        a.movd(eax, xmm0)?;
        a.hlt()
    })?;
    let vcpu = machine.vcpu0();
    let mut regs = vcpu.regs()?;
    regs.rbx = 0x1122_3344_5566_7788;
    regs.r8_to_r15 = std::array::from_fn(|n| n as u64 * 0x0101_0101_0101);
    vcpu.set_regs(regs)?;
    same!(vcpu.regs()?, regs, "registers");
    let mut fpu = vcpu.fpu()?;
    fpu.xmm = std::array::from_fn(|n| [n as u8 + 1; 16]);
    fpu.fcw = 0x27f;
    vcpu.set_fpu(fpu)?;
    same!(vcpu.fpu()?.xmm, fpu.xmm, "XMM registers");
    same!(vcpu.fpu()?.fcw, 0x27f, "the control word");
    let mut sregs = vcpu.sregs()?;
    sregs.es.selector = 0x1234;
    sregs.es.base = 0x1_2340;
    // CR4.OSFXSR, for MOVD.
    sregs.cr4 |= 1 << 9;
    vcpu.set_sregs(sregs)?;
    // In real mode 2.6.22 ran its guests as virtual-8086 tasks: code segments came back as data segments.
    let found = vcpu.sregs()?;
    same!(found, abi::Sregs { cs: abi::Segment { typ: found.cs.typ, ..sregs.cs }, ..sregs }, "system registers");
    // All but the counter, which does not stand still.
    same!(vcpu.set_msrs([(0x175, 0x1000), (0xc000_0082, 0xffff_8000_0000_1000)]), Ok(2), "KVM_SET_MSRS");
    let values: Vec<_> = vcpu.msrs([0x175, 0xc000_0082])?.iter().map(|msr| msr.data).collect();
    same!(values, [0x1000, 0xffff_8000_0000_1000], "MSRs");
    same!(vcpu.msrs(MSRS)?.len(), MSRS.len(), "MSRs that can be read");
    same!(vcpu.msrs([0x174, 0xdead_0000, 0x175])?.len(), 1, "MSRs before one that is not there");
    same!(vcpu.set_signal_mask(0), Ok(()), "KVM_SET_SIGNAL_MASK");
    same!(vcpu.run(), Ok(Exit::Hlt), "KVM_RUN");
    same!(vcpu.regs()?.rax, 0x0101_0101, "XMM0 as the guest sees it");
    same!(vcpu.regs()?.rbx, regs.rbx, "RBX behind the guest");
    Ok(())
}

/// A leaf that is not there reads as the highest entry of its half.
fn cpuid() -> Result<()> {
    let machine = real(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.cpuid()?;
        a.hlt()?;
        a.jmp(again)
    })?;
    let vcpu = machine.vcpu0();
    let entry = |function| abi::CpuidEntry { function, eax: function ^ 0x55, ebx: 2, ecx: 3, edx: 4, padding: 0 };
    vcpu.set_cpuid([0, 1, 2, 0x8000_0000, 0x8000_0001].map(entry))?;
    for (leaf, from) in [(0, 0), (1, 1), (7, 2), (0x8000_0000, 0x8000_0000), (0x8000_0008, 0x8000_0001)] {
        let regs = abi::Regs { rax: leaf, ..vcpu.regs()? };
        vcpu.set_regs(regs)?;
        same!(vcpu.run(), Ok(Exit::Hlt), "KVM_RUN");
        let regs = vcpu.regs()?;
        same!((regs.rax, regs.rbx, regs.rcx, regs.rdx), (from ^ 0x55, 2, 3, 4), "leaf {leaf:#x}");
    }
    Ok(())
}

fn exits() -> Result<()> {
    // IN: the guest finds its own EAX where the VMM answers nothing, the answer's low bytes where it does.
    let machine = real(|a| {
        a.mov(eax, 0x1122_3344)?;
        a.in_(al, 0x70)?;
        a.in_(al, 0x71)?;
        a.hlt()
    })?;
    let vcpu = machine.vcpu0();
    let input = |port| Ok(Exit::Io { out: false, size: 1, port, count: 1 });
    same!(vcpu.run(), input(0x70), "IN");
    same!(vcpu.run(), input(0x71), "IN");
    same!(vcpu.regs()?.rax, 0x1122_3344, "EAX behind an IN that nobody answered");
    vcpu.set_port_data(0, 0x99);
    same!(vcpu.run(), Ok(Exit::Hlt), "HLT");
    same!(vcpu.regs()?.rax, 0x1122_3399, "EAX behind one that was");

    // Memory that is not there, read and written.
    let machine = real(|a| {
        a.mov(ax, 0xa000)?;
        a.mov(es, ax)?;
        a.add(word_ptr(0x10).es(), 5)?;
        a.hlt()
    })?;
    let vcpu = machine.vcpu0();
    let read = vcpu.run();
    ensure!(matches!(read, Ok(Exit::Mmio { gpa: 0xa_0010, len: 2, write: false, .. })), "{read:x?}");
    vcpu.set_mmio_data(0x1000);
    match vcpu.run() {
        Ok(Exit::Mmio { gpa: 0xa_0010, len: 2, write: true, data }) => same!(data & 0xffff, 0x1005, "data"),
        other => anyhow::bail!("not a write: {other:x?}"),
    }
    same!(vcpu.run(), Ok(Exit::Hlt), "behind the write");

    // A triple fault.
    let machine = real(|a| {
        a.lidt(fword_ptr(at::SCRATCH))?;
        a.ud2()
    })?;
    same!(machine.vcpu0().run(), Ok(Exit::Shutdown), "a triple fault");

    // State that VM entry refuses: paging without protection. SDM Vol. 3 "Checks on Guest Control Registers"; App. C 33.
    let machine = real(|a| a.hlt())?;
    let sregs = machine.vcpu0().sregs()?;
    machine.vcpu0().set_sregs(abi::Sregs { cr0: sregs.cr0 & !PE | PG, ..sregs })?;
    same!(machine.vcpu0().run(), Ok(Exit::Unknown(0x8000_0021)), "bad state");

    // A hypercall and its result.
    let machine = guest::protected(|a| {
        for (register, value) in [(ecx, 2), (edx, 3), (esi, 4), (edi, 5), (ebp, 6), (ebx, 7), (eax, 1)] {
            a.mov(register, value)?;
        }
        a.vmcall()?;
        a.hlt()
    });
    let machine = Machine::new(&Kvm::open()?, &machine)?;
    let vcpu = machine.vcpu0();
    same!(boot(vcpu)?, Exit::Hypercall { args: [1, 2, 3, 4, 5, 6], longmode: false }, "VMCALL");
    vcpu.set_hypercall_result(0x77);
    same!(vcpu.run(), Ok(Exit::Hlt), "behind VMCALL");
    same!(vcpu.regs()?.rax, 0x77, "its result");
    Ok(())
}

/// Through `bootstrap` as the only CPU: the first exit that is none of its ports.
fn boot(vcpu: &Vcpu) -> Result<Exit> {
    loop {
        match vcpu.run().context("KVM_RUN")? {
            Exit::Io { out, port, .. } if port::SILLY_APIC.contains(&port) => {
                if !out {
                    vcpu.set_port_data(0, u32::from(port == port::CPUS));
                }
            }
            other => return Ok(other),
        }
    }
}

/// Interrupts are queued while IF is clear, and go in lowest first; the VMM can ask to hear when the window opens.
fn window() -> Result<()> {
    const COUNT: u64 = at::SCRATCH;
    let mut image = Image::default();
    let handler = assemble(16, 0, |a| {
        // Each vector's digit behind those that came before.
        a.shl(dword_ptr(COUNT), 4)?;
        a.or(dword_ptr(COUNT), 1)?;
        a.iret()?;
        a.nops_with_size(1)
    });
    let second = assemble(16, 0x100, |a| {
        a.shl(dword_ptr(COUNT), 4)?;
        a.or(dword_ptr(COUNT), 2)?;
        a.iret()
    });
    let code = assemble(16, 0x200, |a| {
        a.mov(sp, 0x7000)?;
        a.cli()?;
        a.out(0x10, al)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.hlt()
    });
    for (offset, code) in [(0, handler), (0x100, second), (0x200, code)] {
        image.data(at::BIOS + offset, &code);
    }
    image.data(at::BIOS + 0xfff0, &assemble(16, 0xfff0, |a| a.jmp_far(0xf000, 0x200)));
    image.data(4 * 0x31, &0xf000_0000_u32.to_le_bytes());
    image.data(4 * 0x32, &0xf000_0100_u32.to_le_bytes());
    let kvm = Kvm::open()?;

    let machine = Machine::new(&kvm, &image)?;
    let vcpu = machine.vcpu0();
    same!(vcpu.run(), Ok(Exit::Io { out: true, size: 1, port: 0x10, count: 1 }), "OUT");
    same!(vcpu.takes_interrupts(), (false, true), "if_flag and ready with IF clear");
    vcpu.interrupt(0x32)?;
    vcpu.interrupt(0x31)?;
    same!(vcpu.sregs()?.interrupt_bitmap, [1 << 0x31 | 1 << 0x32, 0, 0, 0], "queued vectors");
    same!(vcpu.run(), Ok(Exit::Hlt), "HLT");
    same!(machine.ram.read(COUNT), 0x12_u32.to_le_bytes(), "the lower vector went first");

    let machine = Machine::new(&kvm, &image)?;
    let vcpu = machine.vcpu0();
    vcpu.run()?;
    vcpu.request_interrupt_window(true);
    same!(vcpu.run(), Ok(Exit::IrqWindowOpen), "STI");
    same!(vcpu.takes_interrupts(), (true, true), "if_flag and ready in the window");
    vcpu.request_interrupt_window(false);
    vcpu.interrupt(0x32)?;
    same!(vcpu.run(), Ok(Exit::Hlt), "HLT");
    same!(machine.ram.read(COUNT), 2_u32.to_le_bytes(), "the vector that was queued in the window");
    Ok(())
}

fn debug() -> Result<()> {
    let machine = real(|a| {
        for _ in 0..8 {
            a.nop()?;
        }
        a.hlt()
    })?;
    let vcpu = machine.vcpu0();
    let mut debug = abi::DebugGuest { enabled: 1, singlestep: 1, ..Default::default() };
    vcpu.debug_guest(debug)?;
    for step in 0..3 {
        same!(vcpu.run(), Ok(Exit::Debug), "a single step");
        same!(vcpu.regs()?.rip, step, "RIP after a step");
    }
    debug.singlestep = 0;
    debug.breakpoints[2] = abi::Breakpoint { enabled: 1, padding: 0, address: at::BIOS + 6 };
    vcpu.debug_guest(debug)?;
    same!(vcpu.run(), Ok(Exit::Debug), "a breakpoint");
    same!(vcpu.regs()?.rip, 6, "RIP at the breakpoint");
    vcpu.debug_guest(abi::DebugGuest::default())?;
    same!(vcpu.run(), Ok(Exit::Hlt), "without a debugger");
    Ok(())
}

/// CR8 from `kvm_run`, EFER without CPUID, and `KVM_TRANSLATE`.
fn long_mode() -> Result<()> {
    let image = guest::long(
        |a| {
            a.out(u32::from(port::END), al)?;
            a.mov(rax, cr8)?;
            a.hlt()
        },
        |_| Ok(()),
    );
    let machine = Machine::new(&Kvm::open()?, &image)?;
    let vcpu = machine.vcpu0();
    same!(boot(vcpu)?, Exit::Io { out: true, size: 1, port: port::END, count: 1 }, "OUT");
    let efer = vcpu.msrs([EFER])?;
    same!(efer[0].data, 0x500, "EFER: LME and LMA");
    same!(vcpu.apic_base(), vcpu.sregs()?.apic_base, "apic_base");
    vcpu.set_cr8(5);
    same!(vcpu.run(), Ok(Exit::Hlt), "HLT");
    same!((vcpu.regs()?.rax, vcpu.sregs()?.cr8), (5, 5), "CR8 as the guest and the VMM see it");
    let there = vcpu.translate(at::MAIN + 0x123)?;
    same!((there.physical_address, there.valid), (at::MAIN + 0x123, 1), "an address that is mapped");
    same!(vcpu.translate(guest::MAPPED)?.valid, 0, "one that is not");
    ensure!(RAM_END > at::MAIN, "MAIN is RAM");
    Ok(())
}
