//! Ioctls of a vCPU file. The vCPU's lock is held throughout.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use irqchip::lapic::event;
use kvm_abi::consts::*;
use kvm_abi::legacy::kvm_debug_guest;
use kvm_abi::{
    KVM_NR_INTERRUPTS, Plain, kvm_cpuid_entry, kvm_cpuid_entry2, kvm_debugregs, kvm_enable_cap, kvm_fpu,
    kvm_guest_debug, kvm_interrupt, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sregs2, kvm_translation,
    kvm_vcpu_events, kvm_x86_mce, kvm_xcrs,
};
use nix::errno::Errno;
use x86_defs::cpuid as bit;
use x86_defs::{Cr0, Cr4, Efer, Rflags, vector};

use super::Fam;
use super::system::store_cpuid;
use crate::client::{Client, SignalMask};
use crate::era::Era;
use crate::interrupt::InterruptQueue;
use crate::mce::Injected;
use crate::stats::StatsFile;
use crate::vcpu::Vcpu;
use crate::{cpuid, debug, hyperv, msr, nested, state, xsave};

/// `MAX_IO_MSRS`: entries of one `KVM_GET_MSRS` or `KVM_SET_MSRS` are fewer.
pub(super) const MAX_IO_MSRS: u32 = 256;
/// What a kernel `sigset_t` takes.
const SIGSET_BYTES: u32 = 8;

/// Runs the guest until something is for user space. api.rst `KVM_RUN`. EINVAL: an argument, a CR8 above 15. EINTR: a
/// signal, or `immediate_exit`.
pub(super) fn run(vcpu: &mut Vcpu, client: &dyn Client, arg: u64) -> Result<(), Errno> {
    if arg != 0 {
        return Err(Errno::EINVAL);
    }
    vcpu.run(client)
}

/// Reads RAX–R15, RIP and RFLAGS. api.rst `KVM_GET_REGS`. TF and RF of a debugger are hidden.
pub(crate) fn get_regs(vcpu: &mut Vcpu) -> Result<kvm_regs, Errno> {
    let mut regs = state::from_core_regs(&vcpu.cpu.regs());
    regs.rip = vcpu.rip_behind_io().unwrap_or(regs.rip);
    regs.rflags &= !debug::hidden_flags(vcpu);
    Ok(regs)
}

/// Loads RAX–R15, RIP and RFLAGS. api.rst `KVM_SET_REGS`. RFLAGS bit 1 is forced to 1; a pending exception is dropped, as
/// `__set_regs` does. A VM of 2007 may carry VM86 flags that hide real mode: they are masked there.
pub(crate) fn set_regs(vcpu: &mut Vcpu, regs: &kvm_regs) -> Result<(), Errno> {
    let mut regs = state::to_core_regs(regs);
    if vcpu.era.drops_vm_flag_in_real_mode() && !vcpu.cpu.sregs().cr0.contains(Cr0::PE) {
        regs.rflags &= !Rflags::VM.bits();
    }
    if let Some(behind) = vcpu.rip_behind_io() {
        if regs.rip == behind {
            // As shown by `get_regs`: the instruction still has to be finished.
            regs.rip = vcpu.cpu.regs().rip;
        } else {
            vcpu.cpu.abandon_exit();
            vcpu.pending = None;
        }
    }
    regs.rflags |= debug::forced_flags(vcpu);
    vcpu.cpu.set_regs(&regs);
    let events = vcpu.cpu.events();
    if events.exception.is_some() {
        vcpu.cpu.set_events(cpu_core::Events { exception: None, ..events });
    }
    Ok(())
}

/// Reads segments, tables, control registers, APIC base and queued vectors. api.rst `KVM_GET_SREGS`.
pub(crate) fn get_sregs(vcpu: &mut Vcpu) -> Result<kvm_sregs, Errno> {
    let events = vcpu.cpu.events();
    vcpu.load_cr8();
    let mut queued = vcpu.interrupts;
    if let (Some(vector), false) = (events.interrupt, events.soft) {
        queued.insert(vector);
    }
    Ok(state::from_core_sregs(&vcpu.cpu.sregs(), vcpu.machine.apic_base.load(Relaxed), queued.bitmap()))
}

/// Loads what [`get_sregs`] reads. api.rst `KVM_SET_SREGS`. EINVAL: what `kvm_is_valid_sregs` refuses; 2007 refuses
/// nothing. Of several vectors today's KVM queues the lowest, 2007's all.
pub(crate) fn set_sregs(vcpu: &mut Vcpu, sregs: &kvm_sregs) -> Result<(), Errno> {
    load_sregs(vcpu, sregs)?;
    let mut queue = InterruptQueue::of_bitmap(sregs.interrupt_bitmap);
    if vcpu.era.collects_interrupts() {
        vcpu.requeue_interrupt();
        vcpu.interrupts = queue;
    } else if let Some(vector) = queue.pop() {
        vcpu.cpu.queue_interrupt(vector);
    }
    Ok(())
}

/// All but the queued vectors.
fn load_sregs(vcpu: &mut Vcpu, sregs: &kvm_sregs) -> Result<(), Errno> {
    let mut loaded = state::to_core_sregs(sregs);
    if vcpu.era.validates_sregs() {
        if !is_valid_sregs(vcpu, sregs) || !msr::is_apic_base(&vcpu.machine, sregs.apic_base) {
            return Err(Errno::EINVAL);
        }
    } else {
        legacy_segments(&mut loaded, vcpu.era);
    }
    vcpu.machine.set_apic_base(sregs.apic_base);
    vcpu.cpu.set_sregs(&loaded);
    if vcpu.era.drops_vm_flag_in_real_mode() && !loaded.cr0.contains(Cr0::PE) {
        let regs = vcpu.cpu.regs();
        vcpu.cpu.set_regs(&cpu_core::Regs { rflags: regs.rflags & !Rflags::VM.bits(), ..regs });
    }
    vcpu.machine.set_tpr(vcpu.cpu.cr8());
    vcpu.load_cpuid();
    Ok(())
}

/// As [`get_sregs`], with PAE's page-directory pointers in the place of queued vectors. api.rst `KVM_GET_SREGS2`.
pub(super) fn get_sregs2(vcpu: &mut Vcpu) -> Result<kvm_sregs2, Errno> {
    let kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } =
        get_sregs(vcpu)?;
    let pdptrs = vcpu.cpu.pdptes();
    let flags = if pdptrs.is_some() { KVM_SREGS2_FLAGS_PDPTRS_VALID.into() } else { 0 };
    let pdptrs = pdptrs.unwrap_or_default();
    Ok(kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs,
    })
}

/// Loads what [`get_sregs2`] reads; without pointers they come from memory, as [`set_sregs`] takes them. Queued vectors stay.
/// api.rst `KVM_SET_SREGS2`. EINVAL: also another flag, or pointers without PAE paging.
pub(super) fn set_sregs2(vcpu: &mut Vcpu, sregs: &kvm_sregs2) -> Result<(), Errno> {
    let has_pointers = sregs.flags == u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
    let on = |value: u64, bit: u64| value & bit != 0;
    let pae = on(sregs.cr0, Cr0::PG.bits()) && on(sregs.cr4, Cr4::PAE.bits()) && !on(sregs.efer, Efer::LMA.bits());
    if !has_pointers && sregs.flags != 0 || has_pointers && !pae {
        return Err(Errno::EINVAL);
    }
    let &kvm_sregs2 { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = sregs;
    let interrupt_bitmap = [0; 4];
    let common = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap,
    };
    load_sregs(vcpu, &common)?;
    if has_pointers {
        vcpu.cpu.set_pdptes(sregs.pdptrs);
    }
    Ok(())
}

/// `kvm_is_valid_sregs`: modes that fit together, and no bit that the CPU or the guest's CPUID lacks.
fn is_valid_sregs(vcpu: &Vcpu, sregs: &kvm_sregs) -> bool {
    let (Some(cr0), Some(cr4)) = (Cr0::from_bits(sregs.cr0 & 0xffff_ffff), Cr4::from_bits(sregs.cr4)) else {
        return false;
    };
    let efer = Efer::from_bits_retain(sregs.efer);
    let modes = if efer.contains(Efer::LME) && cr0.contains(Cr0::PG) {
        let root_fits = sregs.cr3 >> cpuid::phys_bits(&vcpu.cpuid) == 0;
        cr4.contains(Cr4::PAE) && efer.contains(Efer::LMA) && root_fits
    } else {
        !efer.contains(Efer::LMA) && sregs.cs.l == 0
    };
    // Until the guest has a CPUID it may use what can be offered: `cr4_guest_rsvd_bits` is 0.
    let table = if vcpu.has_cpuid { &vcpu.cpuid[..] } else { cpuid::supported() };
    let missing = CR4_FEATURES.iter().any(|&(bits, feature)| cr4.intersects(bits) && !cpuid::has(table, feature));
    let cr0_fits = sregs.cr0 >> 32 == 0
        && (cr0.contains(Cr0::CD) || !cr0.contains(Cr0::NW))
        && (cr0.contains(Cr0::PE) || !cr0.contains(Cr0::PG));
    modes && cr0_fits && !missing && !cr4.intersects(CR4_ABSENT)
}

/// CR4 bits that only a guest with the feature may set.
const CR4_FEATURES: &[(Cr4, bit::Feature)] = &[
    (Cr4::OSXSAVE, bit::XSAVE),
    (Cr4::SMEP, bit::SMEP),
    (Cr4::SMAP, bit::SMAP),
    (Cr4::FSGSBASE, bit::FSGSBASE),
    (Cr4::PKE, bit::PKU),
    (Cr4::LA57, bit::LA57),
    (Cr4::UMIP, bit::UMIP),
    (Cr4::PCIDE, bit::PCID),
];

/// CR4 bits that no guest has here.
const CR4_ABSENT: Cr4 = Cr4::VMXE
    .union(Cr4::SMXE)
    .union(Cr4::KL)
    .union(Cr4::CET)
    .union(Cr4::PKS)
    .union(Cr4::UINTR)
    .union(Cr4::LASS)
    .union(Cr4::LAM_SUP);

/// 2007 takes any segments. In real mode their attributes are those of real mode, whatever user space sends: a data type in
/// CS, none in TR; and the reset base is in the first mebibyte.
fn legacy_segments(sregs: &mut cpu_core::Sregs, era: Era) {
    if sregs.cr0.contains(Cr0::PE) {
        return;
    }
    let large = |limit: u32| limit >> 20 != 0;
    for segment in &mut sregs.segments {
        if segment.selector == 0xf000 && segment.base == 0xffff_0000 {
            segment.base = era.reset_cs_base();
        }
        let cpu_core::Segment { base, limit, selector, .. } = *segment;
        *segment = cpu_core::Segment { base, limit, g: large(limit), ..cpu_core::Segment::real_mode(selector) };
    }
    let cpu_core::Segment { base, limit, selector, .. } = sregs.tr;
    let busy = x86_defs::descriptor::system_type::TSS32_BUSY;
    sregs.tr = cpu_core::Segment {
        base,
        limit,
        selector,
        type_: busy,
        present: true,
        g: large(limit),
        ..cpu_core::Segment::default()
    };
}

/// Walks the guest's tables as a supervisor's read, accessed bits included. api.rst `KVM_TRANSLATE`. `physical_address` is ~0 where nothing is
/// mapped; `writeable` and `usermode` are constants, as in Linux.
pub(super) fn translate(vcpu: &mut Vcpu, translation: &mut kvm_translation) -> Result<(), Errno> {
    // Without paging any address is its own translation; ~0 still says that there is none.
    let gpa = vcpu.cpu.translate(translation.linear_address).filter(|&gpa| gpa != u64::MAX);
    translation.physical_address = gpa.unwrap_or(u64::MAX);
    translation.valid = gpa.is_some().into();
    translation.writeable = 1;
    translation.usermode = 0;
    Ok(())
}

/// Queues an external interrupt. api.rst `KVM_INTERRUPT`. EINVAL: not a vector. ENXIO: the PIC is here. EEXIST:
/// only the local APIC is, and a vector waits. Without either today the last vector wins, in 2007 all wait.
pub(super) fn interrupt(vcpu: &mut Vcpu, interrupt: &kvm_interrupt) -> Result<(), Errno> {
    if interrupt.irq >= KVM_NR_INTERRUPTS {
        return Err(Errno::EINVAL);
    }
    let vector = interrupt.irq as u8;
    if let Some(apic) = vcpu.machine.apic() {
        if !apic.chip.wires.is_split() {
            return Err(Errno::ENXIO);
        }
        if vcpu.external_vector.is_some() {
            return Err(Errno::EEXIST);
        }
        vcpu.external_vector = Some(vector);
        return Ok(());
    }
    if vcpu.era.collects_interrupts() {
        vcpu.interrupts.insert(vector)
    } else {
        vcpu.cpu.queue_interrupt(vector)
    }
    Ok(())
}

/// Queues an NMI. api.rst `KVM_NMI`. No error.
pub(super) fn nmi(vcpu: &mut Vcpu, _: &dyn Client, _: u64) -> Result<(), Errno> {
    vcpu.cpu.queue_nmi();
    Ok(())
}

/// Queues an SMI. api.rst `KVM_SMI`. No error.
pub(super) fn smi(vcpu: &mut Vcpu, _: &dyn Client, _: u64) -> Result<(), Errno> {
    vcpu.cpu.queue_smi();
    Ok(())
}

/// Breakpoints and single steps of 2007. EINVAL on a modern VM, where `KVM_SET_GUEST_DEBUG` took its place.
pub(super) fn debug_guest(vcpu: &mut Vcpu, debug: &kvm_debug_guest) -> Result<(), Errno> {
    if vcpu.era.has_debug_guest() { debug::set(vcpu, &debug::of_legacy(debug)) } else { Err(Errno::EINVAL) }
}

/// Breakpoints, single steps and injected traps of a debugger. api.rst `KVM_SET_GUEST_DEBUG`. EBUSY: a trap is to be
/// injected while an exception waits.
pub(super) fn set_guest_debug(vcpu: &mut Vcpu, debug: &kvm_guest_debug) -> Result<(), Errno> {
    debug::set(vcpu, debug)
}

/// Reads MSRs up to the first that does not exist; returns how many. api.rst `KVM_GET_MSRS`. E2BIG: 256 or more.
pub(super) fn get_msrs(vcpu: &mut Vcpu, list: &Fam<'_, kvm_msr_entry>) -> Result<i32, Errno> {
    let mut entries = msr_entries(vcpu, list)?;
    let mut done = 0;
    for entry in &mut entries {
        let Some(value) = msr::get(vcpu, entry.index) else { break };
        entry.data = value;
        done += 1;
    }
    list.write(&entries)?;
    Ok(done)
}

/// Writes MSRs up to the first that does not exist or refuses the value; returns how many. api.rst `KVM_SET_MSRS`. E2BIG:
/// 256 or more.
pub(super) fn set_msrs(vcpu: &mut Vcpu, list: &Fam<'_, kvm_msr_entry>) -> Result<i32, Errno> {
    let entries = msr_entries(vcpu, list)?;
    let mut set = |entry: &&kvm_msr_entry| {
        if vcpu.vm.options.xen.is_msr(entry.index) {
            return vcpu.write_xen_page(list.client(), entry.data) == Ok(true);
        }
        msr::set(vcpu, entry.index, entry.data).is_some()
    };
    Ok(entries.iter().take_while(|entry| set(entry)).count() as i32)
}

fn msr_entries(vcpu: &Vcpu, list: &Fam<'_, kvm_msr_entry>) -> Result<Vec<kvm_msr_entry>, Errno> {
    match list.count() {
        0 if vcpu.era.no_msr_is_enomem() => Err(Errno::ENOMEM),
        MAX_IO_MSRS.. => Err(Errno::E2BIG),
        _ => list.read(),
    }
}

/// 2007's table, without sub-leaves. api.rst `KVM_SET_CPUID`. Errors as [`set_cpuid2`].
pub(super) fn set_cpuid(vcpu: &mut Vcpu, list: &Fam<'_, kvm_cpuid_entry>) -> Result<(), Errno> {
    if list.count() > vcpu.era.max_cpuid_entries() {
        return Err(Errno::E2BIG);
    }
    let table = list.read()?.iter().map(cpuid::of_legacy).collect();
    load_cpuid(vcpu, table)
}

/// The guest's CPUID table. api.rst `KVM_SET_CPUID2`. E2BIG: more than 256 entries. EINVAL: linear addresses of another
/// width than 48 or 57 bits, or another table once the guest has run.
pub(super) fn set_cpuid2(vcpu: &mut Vcpu, list: &Fam<'_, kvm_cpuid_entry2>) -> Result<(), Errno> {
    if list.count() > cpuid::MAX_ENTRIES {
        return Err(Errno::E2BIG);
    }
    let table = list.read()?;
    load_cpuid(vcpu, table)
}

fn load_cpuid(vcpu: &mut Vcpu, table: Vec<kvm_cpuid_entry2>) -> Result<(), Errno> {
    let linear_bits = cpuid::find(&table, 0x8000_0008, 0).map_or(0, |entry| entry.eax >> 8 & 0xff);
    if vcpu.era.checks_cpuid() && !matches!(linear_bits, 0 | 48 | 57) {
        return Err(Errno::EINVAL);
    }
    let old = std::mem::replace(&mut vcpu.cpuid, table);
    vcpu.load_cpuid();
    if vcpu.era.checks_cpuid() && vcpu.has_run && vcpu.cpuid != old {
        vcpu.cpuid = old;
        vcpu.load_cpuid();
        return Err(Errno::EINVAL);
    }
    vcpu.has_cpuid = true;
    Ok(())
}

/// The guest's table as it is, in the order it was given. api.rst `KVM_GET_CPUID2`. E2BIG: room for fewer entries.
pub(super) fn get_cpuid2(vcpu: &mut Vcpu, list: &Fam<'_, kvm_cpuid_entry2>) -> Result<(), Errno> {
    if (list.count() as usize) < vcpu.cpuid.len() {
        return Err(Errno::E2BIG);
    }
    list.write(&vcpu.cpuid)?;
    list.set_count(vcpu.cpuid.len() as u32)
}

/// Signals that are blocked during `KVM_RUN` only; null: those that the thread blocks. api.rst `KVM_SET_SIGNAL_MASK`.
/// EINVAL: not eight bytes.
pub(super) fn set_signal_mask(vcpu: &mut Vcpu, mask: Option<&Fam<'_, u8>>) -> Result<(), Errno> {
    const KILL_AND_STOP: u64 = 1 << (libc_signal::SIGKILL - 1) | 1 << (libc_signal::SIGSTOP - 1);
    vcpu.signal_mask = match mask {
        None => None,
        Some(mask) if mask.count() != SIGSET_BYTES => return Err(Errno::EINVAL),
        Some(mask) => {
            let bytes = mask.read()?;
            let set = bytes.iter().rev().fold(0, |set, &byte| set << 8 | u64::from(byte));
            Some(SignalMask(set & !KILL_AND_STOP))
        }
    };
    Ok(())
}

/// Signals that cannot be blocked.
mod libc_signal {
    pub(super) const SIGKILL: i32 = nix::sys::signal::Signal::SIGKILL as i32;
    pub(super) const SIGSTOP: i32 = nix::sys::signal::Signal::SIGSTOP as i32;
}

/// Reads x87 and SSE state. api.rst `KVM_GET_FPU`. MXCSR reads as 0, as in Linux.
pub(super) fn get_fpu(vcpu: &mut Vcpu) -> Result<kvm_fpu, Errno> {
    Ok(state::from_core_fpu(vcpu.cpu.fpu()))
}

/// Loads x87 and SSE state but MXCSR. api.rst `KVM_SET_FPU`. No error.
pub(super) fn set_fpu(vcpu: &mut Vcpu, fpu: &kvm_fpu) -> Result<(), Errno> {
    state::load_core_fpu(vcpu.cpu.fpu_mut(), fpu);
    Ok(())
}

/// Reads x87 and vector state as an XSAVE image. api.rst `KVM_GET_XSAVE`.
pub(super) fn get_xsave(vcpu: &mut Vcpu) -> Result<[u32; 1024], Errno> {
    Ok(xsave::image(vcpu.cpu.fpu()))
}

/// As [`get_xsave`], as large as `KVM_CAP_XSAVE2` says: no component lies behind its first page. api.rst `KVM_GET_XSAVE2`.
pub(super) fn get_xsave2(vcpu: &mut Vcpu) -> Result<[u32; 1024], Errno> {
    get_xsave(vcpu)
}

/// Loads an XSAVE image. api.rst `KVM_SET_XSAVE`. EINVAL: a component that the CPU lacks, a compacted or malformed header,
/// reserved bits in MXCSR.
pub(super) fn set_xsave(vcpu: &mut Vcpu, image: &[u32; 1024]) -> Result<(), Errno> {
    xsave::load(vcpu.cpu.fpu_mut(), image)
}

/// Reads XCR0. api.rst `KVM_GET_XCRS`.
pub(super) fn get_xcrs(vcpu: &mut Vcpu) -> Result<kvm_xcrs, Errno> {
    let mut xcrs: kvm_xcrs = Plain::zeroed();
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: vcpu.cpu.fpu().xcr0 };
    Ok(xcrs)
}

/// Loads XCR0. api.rst `KVM_SET_XCRS`. EINVAL: flags, more than 16, x87 left out, or what the guest's CPUID lacks.
pub(super) fn set_xcrs(vcpu: &mut Vcpu, xcrs: &kvm_xcrs) -> Result<(), Errno> {
    let count = xcrs.nr_xcrs as usize;
    if count > xcrs.xcrs.len() || xcrs.flags != 0 {
        return Err(Errno::EINVAL);
    }
    if let Some(xcr0) = xcrs.xcrs[..count].iter().find(|xcr| xcr.xcr == 0) {
        let supported =
            cpuid::find(&vcpu.cpuid, 0xd, 0).map_or(0, |entry| u64::from(entry.edx) << 32 | u64::from(entry.eax));
        if !xsave::is_valid_xcr0(xcr0.value, supported & xsave::components()) {
            return Err(Errno::EINVAL);
        }
        vcpu.cpu.set_xcr0(xcr0.value);
    }
    Ok(())
}

/// Reads DR0–DR3, DR6, DR7. api.rst `KVM_GET_DEBUGREGS`.
pub(super) fn get_debugregs(vcpu: &mut Vcpu) -> Result<kvm_debugregs, Errno> {
    Ok(state::from_core_debugregs(&vcpu.cpu.debug_regs()))
}

/// Loads DR0–DR3, DR6, DR7. api.rst `KVM_SET_DEBUGREGS`. EINVAL: flags, or the upper half of DR6 or DR7.
pub(super) fn set_debugregs(vcpu: &mut Vcpu, regs: &kvm_debugregs) -> Result<(), Errno> {
    if regs.flags != 0 || regs.dr6 >> 32 != 0 || regs.dr7 >> 32 != 0 {
        return Err(Errno::EINVAL);
    }
    vcpu.cpu.set_debug_regs(cpu_core::DebugRegs { db: regs.db, dr6: regs.dr6, dr7: regs.dr7 });
    Ok(())
}

/// Sets IA32_MCG_CAP and resets the banks. api.rst `KVM_X86_SETUP_MCE`. EINVAL: no bank, too many, unknown capability.
pub(super) fn setup_mce(vcpu: &mut Vcpu, cap: &u64) -> Result<(), Errno> {
    let mut mce = vcpu.machine.mce.lock();
    mce.setup(*cap)?;
    if let Some(apic) = vcpu.machine.apic() {
        apic.lapic.set_cmci(mce.has_cmci());
    }
    Ok(())
}

/// Logs a machine-check error and raises #MC if it was not corrected, or the interrupt for one that needs no action. api.rst `KVM_X86_SET_MCE`. EINVAL: no such bank, or
/// the status is not valid.
pub(super) fn set_mce(vcpu: &mut Vcpu, error: &kvm_x86_mce) -> Result<(), Errno> {
    let enabled = vcpu.cpu.sregs().cr4.contains(Cr4::MCE);
    let injected = vcpu.machine.mce.lock().inject(error, enabled)?;
    match injected {
        Injected::Nothing => {}
        Injected::Interrupt => {
            if let Some(apic) = vcpu.machine.apic() {
                apic.lapic.corrected_machine_check();
            }
        }
        Injected::Exception => vcpu.cpu.queue_exception(vector::MC, None),
        Injected::TripleFault => vcpu.triple_fault = true,
    }
    Ok(())
}

/// Reads events between instructions. api.rst `KVM_GET_VCPU_EVENTS`.
pub(crate) fn get_vcpu_events(vcpu: &mut Vcpu) -> Result<kvm_vcpu_events, Errno> {
    let machine = vcpu.machine.clone();
    let mut latched_init = false;
    if let Some(apic) = machine.apic() {
        vcpu.accept_nmi_and_smi(apic);
        latched_init = apic.lapic.events() & event::INIT != 0;
    }
    let options = &machine.options;
    let mut events = state::from_core_events(&vcpu.cpu.events(), options.has_payloads.load(Relaxed));
    events.smi.latched_init = latched_init.into();
    if options.has_triple_faults.load(Relaxed) {
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = vcpu.triple_fault.into();
    }
    Ok(events)
}

/// Loads events between instructions. api.rst `KVM_SET_VCPU_EVENTS`. EINVAL: a flag of a capability that is not switched on,
/// an exception that is none, SMM while the vCPU waits for a start-up IPI.
pub(crate) fn set_vcpu_events(vcpu: &mut Vcpu, events: &kvm_vcpu_events) -> Result<(), Errno> {
    const FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
        | KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | KVM_VCPUEVENT_VALID_SHADOW
        | KVM_VCPUEVENT_VALID_SMM
        | KVM_VCPUEVENT_VALID_PAYLOAD
        | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    let valid = |flag: u32| events.flags & flag != 0;
    let options = vcpu.machine.options.clone();
    let lacks = |flag: u32, has: &AtomicBool| valid(flag) && !has.load(Relaxed);
    let exception = &events.exception;
    let no_exception = exception.nr > 31 || exception.nr == vector::NMI;
    let has_exception = exception.injected != 0 || valid(KVM_VCPUEVENT_VALID_PAYLOAD) && exception.pending != 0;
    if events.flags & !FLAGS != 0
        || lacks(KVM_VCPUEVENT_VALID_PAYLOAD, &options.has_payloads)
        || lacks(KVM_VCPUEVENT_VALID_TRIPLE_FAULT, &options.has_triple_faults)
        || has_exception && no_exception
    {
        return Err(Errno::EINVAL);
    }
    let wants_smm = valid(KVM_VCPUEVENT_VALID_SMM) && (events.smi.smm != 0 || events.smi.pending != 0);
    if wants_smm && vcpu.mp_state == KVM_MP_STATE_INIT_RECEIVED {
        return Err(Errno::EINVAL);
    }
    let old = vcpu.cpu.events();
    vcpu.cpu.set_events(state::to_core_events(events, &old));
    if valid(KVM_VCPUEVENT_VALID_TRIPLE_FAULT) {
        vcpu.triple_fault = events.triple_fault.pending != 0;
    }
    let Some(apic) = vcpu.machine.apic() else { return Ok(()) };
    if valid(KVM_VCPUEVENT_VALID_SIPI_VECTOR) {
        apic.lapic.set_start_up_vector(events.sipi_vector as u8);
    }
    if valid(KVM_VCPUEVENT_VALID_SMM) {
        if events.smi.latched_init != 0 {
            apic.lapic.put_event(event::INIT);
        } else {
            apic.lapic.take_events(event::INIT);
        }
    }
    Ok(())
}

/// What the vCPU waits for. api.rst `KVM_GET_MP_STATE`. INIT and start-up IPIs that came count. Without a local APIC here it
/// always runs.
pub(super) fn get_mp_state(vcpu: &mut Vcpu) -> Result<kvm_mp_state, Errno> {
    let machine = vcpu.machine.clone();
    if let Some(apic) = machine.apic() {
        vcpu.accept_events(apic);
        let halted = matches!(vcpu.mp_state, KVM_MP_STATE_HALTED | KVM_MP_STATE_AP_RESET_HOLD);
        if halted && apic.lapic.events() & event::UNHALT != 0 {
            return Ok(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE });
        }
    }
    Ok(kvm_mp_state { mp_state: vcpu.mp_state })
}

/// api.rst `KVM_SET_MP_STATE`. EINVAL: no such state, or without a local APIC here anything but runnable; a wait for a start-up IPI
/// in SMM, where INITs wait, or before it.
pub(super) fn set_mp_state(vcpu: &mut Vcpu, state: &kvm_mp_state) -> Result<(), Errno> {
    let events = vcpu.cpu.events();
    let after_init = matches!(state.mp_state, KVM_MP_STATE_SIPI_RECEIVED | KVM_MP_STATE_INIT_RECEIVED);
    if after_init && (events.smm || events.smi_pending) {
        return Err(Errno::EINVAL);
    }
    vcpu.mp_state = match (state.mp_state, vcpu.machine.apic()) {
        (KVM_MP_STATE_RUNNABLE, _) => KVM_MP_STATE_RUNNABLE,
        (KVM_MP_STATE_SIPI_RECEIVED, Some(apic)) => {
            apic.lapic.put_event(event::START_UP);
            KVM_MP_STATE_INIT_RECEIVED
        }
        (
            state @ (KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_INIT_RECEIVED
            | KVM_MP_STATE_HALTED
            | KVM_MP_STATE_AP_RESET_HOLD),
            Some(_),
        ) => state,
        _ => return Err(Errno::EINVAL),
    };
    Ok(())
}

/// `KVM_CAP_ENFORCE_PV_FEATURE_CPUID`, `KVM_CAP_HYPERV_ENFORCE_CPUID`: the guest has those of KVM's services, and of Hyper-V's, that
/// its CPUID tells. api.rst `KVM_ENABLE_CAP`. EINVAL: another capability, flags.
pub(super) fn enable_cap(vcpu: &mut Vcpu, cap: &kvm_enable_cap) -> Result<(), Errno> {
    let enforce = cap.args[0] != 0;
    match cap.cap {
        _ if cap.flags != 0 => return Err(Errno::EINVAL),
        KVM_CAP_ENFORCE_PV_FEATURE_CPUID => vcpu.enforces_pv = enforce,
        KVM_CAP_HYPERV_ENFORCE_CPUID => vcpu.machine.hyperv.enforce(enforce),
        _ => return Err(Errno::EINVAL),
    }
    vcpu.load_cpuid();
    Ok(())
}

/// As on `/dev/kvm`. api.rst `KVM_GET_SUPPORTED_HV_CPUID`. E2BIG: room for fewer entries.
pub(super) fn get_supported_hv_cpuid(_: &mut Vcpu, list: &Fam<'_, kvm_cpuid_entry2>) -> Result<(), Errno> {
    store_cpuid(list, &hyperv::supported())
}

/// A file with statistics of the vCPU. api.rst `KVM_GET_STATS_FD`.
pub(super) fn get_stats_fd(vcpu: &mut Vcpu, client: &dyn Client, _: u64) -> Result<i32, Errno> {
    client.install(StatsFile::of_vcpu(&vcpu.vm, vcpu.id, &vcpu.counters), true)
}

/// Rate of the guest's time-stamp counter. api.rst `KVM_GET_TSC_KHZ`.
pub(super) fn get_tsc_khz(vcpu: &mut Vcpu, _: &dyn Client, _: u64) -> Result<i32, Errno> {
    Ok(vcpu.machine.tsc_khz() as i32)
}

/// Sets that rate; 0 is the host's. api.rst `KVM_SET_TSC_KHZ`. EINVAL: out of range.
pub(super) fn set_tsc_khz(vcpu: &mut Vcpu, _: &dyn Client, khz: u64) -> Result<(), Errno> {
    if vcpu.machine.set_tsc_khz(khz as u32) { Ok(()) } else { Err(Errno::EINVAL) }
}

/// Tells the guest that it stood still, by a flag of its clock's page. api.rst `KVM_KVMCLOCK_CTRL`. EINVAL: it has none.
pub(super) fn kvmclock_ctrl(vcpu: &mut Vcpu, _: &dyn Client, _: u64) -> Result<(), Errno> {
    if vcpu.machine.time.guest_stopped() { Ok(()) } else { Err(Errno::EINVAL) }
}

/// State of nested guests: none. api.rst `KVM_GET_NESTED_STATE`. E2BIG: no room for the header.
pub(super) fn get_nested_state(_: &mut Vcpu, state: &mut nested::State) -> Result<(), Errno> {
    nested::get(state)
}

/// Takes back what [`get_nested_state`] gives. api.rst `KVM_SET_NESTED_STATE`. EINVAL: anything else.
pub(super) fn set_nested_state(_: &mut Vcpu, state: &nested::State) -> Result<(), Errno> {
    nested::check(state)
}
