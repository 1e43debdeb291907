//! The API's structures to and from the core's.

use cpu_core::{CpuidEntry, DebugRegs, DescriptorTable, Events, Fpu, PendingException, Regs, Seg, Segment, Sregs};
use kvm_abi::consts::{
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SMM, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI,
};
use kvm_abi::{
    Plain, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use x86_defs::{Cr0, Cr4, Efer};

pub(crate) fn from_core_regs(regs: &Regs) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = regs.gpr;
    let (rip, rflags) = (regs.rip, regs.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

pub(crate) fn to_core_regs(regs: &kvm_regs) -> Regs {
    let &kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } = regs;
    Regs { gpr: [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15], rip, rflags }
}

fn from_core_segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.type_,
        present: segment.present.into(),
        dpl: segment.dpl,
        db: segment.db.into(),
        s: segment.s.into(),
        l: segment.l.into(),
        g: segment.g.into(),
        avl: segment.avl.into(),
        unusable: segment.unusable.into(),
        padding: 0,
    }
}

/// A segment that is not present is unusable, as `vmx_segment_access_rights` has it.
fn to_core_segment(segment: &kvm_segment) -> Segment {
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        type_: segment.type_ & 15,
        s: segment.s & 1 != 0,
        dpl: segment.dpl & 3,
        present: segment.present & 1 != 0,
        avl: segment.avl & 1 != 0,
        l: segment.l & 1 != 0,
        db: segment.db & 1 != 0,
        g: segment.g & 1 != 0,
        unusable: segment.unusable != 0 || segment.present & 1 == 0,
    }
}

fn from_core_table(table: DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

fn to_core_table(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: table.base, limit: table.limit }
}

pub(crate) fn from_core_sregs(sregs: &Sregs, apic_base: u64, interrupt_bitmap: [u64; 4]) -> kvm_sregs {
    let segment = |name: Seg| from_core_segment(&sregs.segments[name as usize]);
    kvm_sregs {
        cs: segment(Seg::Cs),
        ds: segment(Seg::Ds),
        es: segment(Seg::Es),
        fs: segment(Seg::Fs),
        gs: segment(Seg::Gs),
        ss: segment(Seg::Ss),
        tr: from_core_segment(&sregs.tr),
        ldt: from_core_segment(&sregs.ldt),
        gdt: from_core_table(sregs.gdt),
        idt: from_core_table(sregs.idt),
        cr0: sregs.cr0.bits(),
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4.bits(),
        cr8: sregs.cr8,
        efer: sregs.efer.bits(),
        apic_base,
        interrupt_bitmap,
    }
}

/// Bits that the control registers do not have are kept: who wants them refused has checked before.
pub(crate) fn to_core_sregs(sregs: &kvm_sregs) -> Sregs {
    let mut segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(to_core_segment);
    let mut tr = to_core_segment(&sregs.tr);
    // Old user space leaves the accessed bit out; `vmx_set_segment` sets it for all but LDTR.
    for segment in segments.iter_mut().chain([&mut tr]) {
        segment.type_ |= 1;
    }
    Sregs {
        segments,
        tr,
        ldt: to_core_segment(&sregs.ldt),
        gdt: to_core_table(&sregs.gdt),
        idt: to_core_table(&sregs.idt),
        cr0: Cr0::from_bits_retain(sregs.cr0),
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: Cr4::from_bits_retain(sregs.cr4),
        cr8: sregs.cr8 & 15,
        efer: Efer::from_bits_retain(sregs.efer),
    }
}

/// Bytes of the FXSAVE image in order; MXCSR stays out, as in Linux. SDM Vol. 1 "FXSAVE Area".
pub(crate) fn from_core_fpu(fpu: &Fpu) -> kvm_fpu {
    let image = fpu.to_fxsave(0);
    let mut out = kvm_fpu { fcw: fpu.fcw, fsw: fpu.fsw, ftwx: fpu.ftw, last_opcode: fpu.fop, ..Plain::zeroed() };
    (out.last_ip, out.last_dp) = (fpu.fip, fpu.fdp);
    for (register, bytes) in out.fpr.iter_mut().zip(image[32..].chunks_exact(16)) {
        register.copy_from_slice(bytes);
    }
    for (register, bytes) in out.xmm.iter_mut().zip(image[160..].chunks_exact(16)) {
        register.copy_from_slice(bytes);
    }
    out
}

/// Loads all but MXCSR, as `kvm_arch_vcpu_ioctl_set_fpu` does.
pub(crate) fn load_core_fpu(fpu: &mut Fpu, from: &kvm_fpu) {
    let mut image = fpu.to_fxsave(0);
    image[0..2].copy_from_slice(&from.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&from.fsw.to_le_bytes());
    image[4] = from.ftwx;
    image[6..8].copy_from_slice(&from.last_opcode.to_le_bytes());
    image[8..16].copy_from_slice(&from.last_ip.to_le_bytes());
    image[16..24].copy_from_slice(&from.last_dp.to_le_bytes());
    image[32..160].copy_from_slice(from.fpr.as_flattened());
    image[160..416].copy_from_slice(from.xmm.as_flattened());
    fpu.load_fxsave(&image);
}

pub(crate) fn from_core_debugregs(debug: &DebugRegs) -> kvm_debugregs {
    kvm_debugregs { db: debug.db, dr6: debug.dr6, dr7: debug.dr7, ..Plain::zeroed() }
}

pub(crate) fn to_core_cpuid(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        function: entry.function,
        index: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        regs: [entry.eax, entry.ebx, entry.ecx, entry.edx],
    }
}

/// Pending and injected exceptions are one, unless there is `KVM_CAP_EXCEPTION_PAYLOAD`.
pub(crate) fn from_core_events(events: &Events, has_payloads: bool) -> kvm_vcpu_events {
    let mut out: kvm_vcpu_events = Plain::zeroed();
    // The vectors of INT3 and INTO would come again by themselves: Linux leaves them out, for lack of a length.
    if let Some(exception) = events.exception {
        let soft = matches!(exception.vector, x86_defs::vector::BP | x86_defs::vector::OF);
        let injected = exception.injected || !has_payloads;
        out.exception.injected = u8::from(!soft && injected);
        out.exception.pending = u8::from(!soft && !injected);
        out.exception.nr = exception.vector;
        out.exception.has_error_code = exception.error.is_some().into();
        out.exception.error_code = exception.error.unwrap_or(0);
        out.exception_has_payload = exception.payload.is_some().into();
        out.exception_payload = exception.payload.unwrap_or(0);
    }
    out.interrupt.injected = (events.interrupt.is_some() && !events.soft).into();
    out.interrupt.nr = events.interrupt.unwrap_or(0);
    out.interrupt.shadow = if events.shadow_sti { KVM_X86_SHADOW_INT_STI as u8 } else { 0 }
        | if events.shadow_mov_ss { KVM_X86_SHADOW_INT_MOV_SS as u8 } else { 0 };
    out.nmi.pending = events.nmi_pending.into();
    out.nmi.masked = events.nmi_masked.into();
    out.smi.smm = events.smm.into();
    out.smi.pending = events.smi_pending.into();
    out.smi.smm_inside_nmi = events.smm_inside_nmi.into();
    out.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
    if has_payloads {
        out.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    out
}

/// `old` supplies what the flags say is not given.
pub(crate) fn to_core_events(events: &kvm_vcpu_events, old: &Events) -> Events {
    let valid = |flag: u32| events.flags & flag != 0;
    // One that is pending goes before one that was injected.
    let pending = valid(KVM_VCPUEVENT_VALID_PAYLOAD) && events.exception.pending != 0;
    let exception = (pending || events.exception.injected != 0).then(|| PendingException {
        vector: events.exception.nr,
        error: (events.exception.has_error_code != 0).then_some(events.exception.error_code),
        injected: !pending,
        payload: (pending && events.exception_has_payload != 0).then_some(events.exception_payload),
    });
    let shadow = |bit: u32, old: bool| {
        if valid(KVM_VCPUEVENT_VALID_SHADOW) { u32::from(events.interrupt.shadow) & bit != 0 } else { old }
    };
    let smi = |given: u8, old: bool| if valid(KVM_VCPUEVENT_VALID_SMM) { given != 0 } else { old };
    let smm = smi(events.smi.smm, old.smm);
    Events {
        exception,
        smm,
        smi_pending: smi(events.smi.pending, old.smi_pending),
        smm_inside_nmi: smm && smi(events.smi.smm_inside_nmi, old.smm_inside_nmi),
        interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
        soft: events.interrupt.soft != 0,
        // An NMI under injection has not reached its handler: it is still to be delivered.
        nmi_pending: events.nmi.injected != 0
            || if valid(KVM_VCPUEVENT_VALID_NMI_PENDING) { events.nmi.pending != 0 } else { old.nmi_pending },
        nmi_masked: events.nmi.masked != 0,
        shadow_sti: shadow(KVM_X86_SHADOW_INT_STI, old.shadow_sti),
        shadow_mov_ss: shadow(KVM_X86_SHADOW_INT_MOV_SS, old.shadow_mov_ss),
    }
}
