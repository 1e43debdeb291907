//! Reset as QEMU of 2007 did it: `KVM_SET_REGS`, `KVM_SET_FPU`, `KVM_SET_SREGS`, `KVM_SET_MSRS`, in that order, between an
//! exit and the next `KVM_RUN`. The guest begins again at its reset vector, and nothing of the exit is left.

use std::sync::atomic::Ordering::Acquire;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use iced_x86::code_asm::*;

use super::same;
use crate::guest::{Image, assemble, at};
use crate::kvmctl::{HOLE, Machine};
use crate::vmm::{Exit, Kvm};

/// u32: how often the guest has begun; how often it has come behind the exit.
const BEGUN: u64 = at::SCRATCH;
const BEHIND: u64 = at::SCRATCH + 4;
/// u32 each: EAX, EDX, ESP, CR0, IA32_SYSENTER_CS, the x87 control word as the guest found them.
const FOUND: u64 = at::SCRATCH + 0x10;
/// u16: what the guest loads as its control word.
const CONTROL_WORD: u64 = at::SCRATCH + 0x40;
const SYSENTER_CS: u32 = 0x174;
const RESETS: u32 = 20;

/// Notes what it finds, changes all of it, enters protected mode, and exits by `exit`.
fn guest(exit: impl FnOnce(&mut CodeAssembler) -> crate::guest::Written) -> Image {
    let mut image = Image::default();
    let code = assemble(16, 0, |a| {
        a.inc(dword_ptr(BEGUN))?;
        // ES reaches the hole at 640 KiB.
        a.mov(bx, (HOLE.start >> 4) as u32)?;
        a.mov(es, bx)?;
        let found = |n: u64| dword_ptr(FOUND + 4 * n);
        a.mov(found(0), eax)?;
        a.mov(found(1), edx)?;
        a.mov(found(2), esp)?;
        a.mov(eax, cr0)?;
        a.mov(found(3), eax)?;
        a.mov(ecx, SYSENTER_CS)?;
        a.rdmsr()?;
        a.mov(found(4), eax)?;
        a.fnstcw(word_ptr(FOUND + 20))?;
        a.fldcw(word_ptr(CONTROL_WORD))?;
        a.mov(eax, 0x1234)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        a.mov(esp, 0x8000)?;
        a.mov(edx, 0x5a5a_5a5a_u32)?;
        exit(a)?;
        a.inc(dword_ptr(BEHIND))?;
        a.hlt()
    });
    image.data(at::BIOS, &code);
    image.data(at::BIOS + 0xfff0, &assemble(16, 0xfff0, |a| a.jmp_far(0xf000, 0)));
    image.data(CONTROL_WORD, &0x0f7f_u16.to_le_bytes());
    image
}

pub(crate) fn between_exits(_time: Duration) -> Result<()> {
    let by_port = guest(|a| {
        a.mov(al, 0xfe)?;
        a.out(0x64, al)
    });
    let is_port = |exit| exit == Exit::Io { out: true, size: 1, port: 0x64, count: 1 };
    exits(&by_port, is_port).context("OUT")?;
    let by_memory = guest(|a| a.mov(dword_ptr(0).es(), eax));
    let is_memory = |exit| matches!(exit, Exit::Mmio { gpa, len: 4, write: true, .. } if gpa == HOLE.start);
    exits(&by_memory, is_memory).context("MMIO")
}

fn exits(image: &Image, expected: impl Fn(Exit) -> bool) -> Result<()> {
    let machine = Machine::new(&Kvm::open()?, image)?;
    let (vcpu, word) = (machine.vcpu0(), |gpa| machine.ram.u32(gpa).load(Acquire));
    let (regs, fpu, sregs) = (vcpu.regs()?, vcpu.fpu()?, vcpu.sregs()?);
    let msrs = vcpu.msrs([SYSENTER_CS])?;
    same!((sregs.cs.selector, sregs.cs.base, regs.rip), (0xf000, 0xf_0000, 0xfff0), "the reset vector");
    for reset in 1..=RESETS {
        let exit = vcpu.run().context("KVM_RUN")?;
        ensure!(expected(exit), "reset {reset}: {exit:?}");
        same!(word(BEGUN), reset, "beginnings");
        same!(word(BEHIND), 0, "what is behind the exit, after reset {reset}");
        let found = [regs.rax as u32, regs.rdx as u32, regs.rsp as u32, sregs.cr0 as u32, msrs[0].data as u32];
        for (n, expected) in found.into_iter().enumerate() {
            same!(word(FOUND + 4 * n as u64), expected, "register {n} after reset {reset}");
        }
        same!(word(FOUND + 20) & 0xffff, u32::from(fpu.fcw), "control word after reset {reset}");
        vcpu.set_regs(regs).context("KVM_SET_REGS")?;
        vcpu.set_fpu(fpu).context("KVM_SET_FPU")?;
        vcpu.set_sregs(sregs).context("KVM_SET_SREGS")?;
        same!(vcpu.set_msrs([(SYSENTER_CS, msrs[0].data)]), Ok(1), "KVM_SET_MSRS");
        same!(vcpu.regs()?, regs, "registers of reset {reset}");
    }
    // Without a reset the guest goes on behind the exit.
    ensure!(expected(vcpu.run().context("KVM_RUN")?), "the exit once more");
    same!(vcpu.run(), Ok(Exit::Hlt), "behind the exit");
    same!(word(BEHIND), 1, "what is behind the exit");
    Ok(())
}
