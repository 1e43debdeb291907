//! The state ioctls of a vCPU, and what a fresh one has.

use iced_x86::code_asm::*;
use kvm_abi::consts::*;
use kvm_abi::request::*;
use kvm_abi::*;

use crate::machine::{CODE, DEVICE, Machine, STACK, TABLES, assemble};

#[test]
fn fresh_vcpus_are_all_alike() {
    let m = Machine::new();
    for id in 0..4u64 {
        let vcpu = if id == 0 { m.vcpu } else { m.client.ioctl(m.vm, KVM_CREATE_VCPU, id).unwrap() };
        let regs: kvm_regs = m.client.get(vcpu, KVM_GET_REGS);
        assert_eq!(regs, kvm_regs { rdx: 0x600, rip: 0xfff0, rflags: 2, ..Plain::zeroed() });
        let sregs: kvm_sregs = m.client.get(vcpu, KVM_GET_SREGS);
        assert_eq!((sregs.cs.selector, sregs.cs.base, sregs.cs.limit), (0xf000, 0xf_0000, 0xffff));
        for segment in [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.tr, sregs.ldt] {
            assert_eq!((segment.selector, segment.base, segment.limit), (0, 0, 0xffff));
        }
        assert_eq!((sregs.tr.type_, sregs.ldt.type_), (0xb, 2));
        assert_eq!((sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit), (0, 0xffff, 0, 0xffff));
        assert_eq!((sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8), (0x6000_0010, 0, 0, 0, 0));
        assert_eq!((sregs.efer, sregs.interrupt_bitmap), (0, [0; 4]));
        let bsp = if id == 0 { 0x100 } else { 0 };
        assert_eq!(sregs.apic_base, 0xfee0_0800 | bsp);
        let fpu: kvm_fpu = m.client.get(vcpu, KVM_GET_FPU);
        assert_eq!(fpu, kvm_fpu { fcw: 0x37f, ..Plain::zeroed() });
    }
}

/// Its debug registers and MXCSR, as the guest sees them.
#[test]
fn a_fresh_vcpu_has_dr7_400_and_mxcsr_1f80() {
    let m = Machine::real(|a| {
        a.mov(eax, dr7).unwrap();
        a.mov(ecx, cr4).unwrap();
        a.or(ecx, 0x200).unwrap();
        a.mov(cr4, ecx).unwrap();
        a.stmxcsr(dword_ptr(0x500)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.regs().rax, m.ram.load_u32(0x500)), (0x400, Some(0x1f80)));
}

#[test]
fn get_regs_and_set_regs_take_anything() {
    let m = Machine::new();
    let words: Vec<u8> = (1..=18u64).flat_map(|n| n.wrapping_mul(0xf101_0101_0101_0101).to_le_bytes()).collect();
    let mut regs = kvm_regs::from_bytes(&words).unwrap();
    regs.rflags = 0x4_0ed5;
    assert_eq!(m.set(KVM_SET_REGS, &regs), Ok(0));
    assert_eq!(m.regs(), kvm_regs { rflags: 0x4_0ed7, ..regs });
}

/// Intel's showed real mode as virtual-8086 mode: VM and IOPL 3 in RFLAGS.
#[test]
fn set_regs_in_real_mode_drops_rflags_vm() {
    let m = Machine::real(|a| a.hlt().unwrap());
    m.set_regs(|regs| regs.rflags = 0x2_3002);
    assert_eq!(m.regs().rflags & 0x2_0000, 0);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn get_sregs_and_set_sregs_keep_what_is_given() {
    let m = Machine::new();
    m.enter_long();
    m.set_sregs(|sregs| {
        (sregs.cr2, sregs.cr8, sregs.gdt.base, sregs.gdt.limit) = (0x1234, 9, 0x5000, 0x7f);
        (sregs.fs.base, sregs.ldt.selector, sregs.ldt.base) = (0x7fff_0000_1234, 0x28, 0x6000);
        sregs.apic_base = 0x1234_5fff;
        sregs.interrupt_bitmap = [1, 2, 3, 4];
    });
    let sregs = m.sregs();
    assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0011, TABLES, 0x20, 0x500));
    assert_eq!((sregs.cr2, sregs.cr8, sregs.gdt.base, sregs.gdt.limit), (0x1234, 9, 0x5000, 0x7f));
    assert_eq!((sregs.fs.base, sregs.ldt.selector, sregs.ldt.base), (0x7fff_0000_1234, 0x28, 0x6000));
    assert_eq!((sregs.apic_base, sregs.interrupt_bitmap), (0x1234_5fff, [1, 2, 3, 4]));
}

#[test]
fn set_sregs_refuses_nothing() {
    let m = Machine::new();
    let words: Vec<u8> = (1..=39u64).flat_map(|n| n.wrapping_mul(0xe1f1_7151_4131_2101).to_le_bytes()).collect();
    assert_eq!(m.set(KVM_SET_SREGS, &kvm_sregs::from_bytes(&words).unwrap()), Ok(0));
    for (c0, c4, efer) in [(0x8000_0000, 0, 0), (0x2000_0011, 1 << 30, 0x400), (0x8000_0011, 0, 0x500)] {
        let sregs = kvm_sregs { cr0: c0, cr4: c4, efer, ..m.sregs() };
        assert_eq!(m.set(KVM_SET_SREGS, &sregs), Ok(0));
    }
    assert_eq!(m.sregs().efer, 0x500, "LMA as given");
}

#[test]
fn set_sregs_replaces_queued_vectors() {
    let m = Machine::new();
    m.interrupt(0x21).unwrap();
    m.interrupt(0x80).unwrap();
    assert_eq!(m.sregs().interrupt_bitmap, [1 << 0x21, 0, 1, 0]);
    m.set_sregs(|sregs| sregs.interrupt_bitmap = [0, 1, 0, 1 << 63]);
    assert_eq!(m.sregs().interrupt_bitmap, [0, 1, 0, 1 << 63]);
    m.set_sregs(|sregs| sregs.interrupt_bitmap = [0; 4]);
    assert_eq!(m.sregs().interrupt_bitmap, [0; 4]);
}

/// What qemu of 2007 sends at reset: a data type in CS, the base of later years, nothing for TR and LDTR.
#[test]
fn set_sregs_in_real_mode_takes_a_data_type_for_cs_and_moves_the_reset_base() {
    let m = Machine::new();
    m.client
        .set(
            m.vm,
            KVM_SET_MEMORY_REGION,
            &kvm_abi::legacy::kvm_memory_region { slot: 1, flags: 0, guest_phys_addr: 0xf_0000, memory_size: 0x1_0000 },
        )
        .unwrap();
    m.ram.write(0xf_fff0, &[0xf4]).unwrap();
    m.set_sregs(|sregs| {
        (sregs.cs.base, sregs.cs.selector, sregs.cs.type_) = (0xffff_0000, 0xf000, 2);
        (sregs.tr, sregs.ldt) = (Plain::zeroed(), Plain::zeroed());
    });
    assert_eq!(m.sregs().cs.base, 0xf_0000);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    m.set_sregs(|sregs| (sregs.cs.base, sregs.cs.selector) = (0xffff_0000, 0xf001));
    assert_eq!(m.sregs().cs.base, 0xffff_0000, "of that selector alone");
}

/// And in protected mode, as long as there is no paging.
#[test]
fn a_data_type_in_cs_executes_in_protected_mode() {
    let m = Machine::new();
    m.ram.write(CODE, &[0xf4]).unwrap();
    m.enter_long();
    m.set_sregs(|sregs| {
        (sregs.cr0, sregs.cr4, sregs.efer) = (0x11, 0, 0);
        sregs.cs = kvm_segment { type_: 2, l: 0, db: 1, ..sregs.cs };
    });
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn set_sregs_in_real_mode_keeps_base_limit_and_selector() {
    let m = Machine::real(|a| {
        a.mov(ebx, 0x9_0010).unwrap();
        a.mov(al, byte_ptr(ebx).fs()).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| sregs.fs = kvm_segment { base: 0x40, limit: 0xf_ffff, selector: 0x1234, ..Plain::zeroed() });
    let loaded = m.sregs().fs;
    assert_eq!((loaded.base, loaded.limit, loaded.selector), (0x40, 0xf_ffff, 0x1234));
    m.ram.store_u8(0x9_0050, 0x77).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT), "whatever attributes were sent");
    assert_eq!(m.regs().rax & 0xff, 0x77);
}

#[test]
fn a_segment_without_attributes_is_unusable() {
    let m = Machine::long(|a| {
        a.mov(rax, qword_ptr(0x4000)).unwrap();
        a.hlt().unwrap();
    });
    m.set_sregs(|sregs| {
        (sregs.ds, sregs.es, sregs.gs) = (Plain::zeroed(), Plain::zeroed(), Plain::zeroed());
        sregs.ldt = kvm_segment { type_: 2, ..Plain::zeroed() };
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT), "which 64-bit code does not mind");
    assert_eq!(m.sregs().ds.unusable, 1);
}

/// PDPTEs are those in memory at the time of the call.
#[test]
fn set_sregs_loads_pdptes() {
    let m = Machine::new();
    m.ram.store_u64(0x5000, 0x6001).unwrap();
    m.ram.store_u64(0x6000, 0x83).unwrap();
    m.ram.write(0x1000, &[0xf4]).unwrap();
    m.enter_long();
    m.set_sregs(|sregs| {
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, 0x5000, 0x20, 0);
        (sregs.cs.l, sregs.cs.db) = (0, 1);
    });
    m.ram.store_u64(0x5000, 0).unwrap();
    m.set_regs(|regs| regs.rip = CODE);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
}

#[test]
fn translate_walks_as_a_supervisor_and_sets_accessed_bits() {
    let m = Machine::real(|a| a.hlt().unwrap());
    let translate = |linear_address| {
        let mut translation = kvm_translation { linear_address, ..Plain::zeroed() };
        assert_eq!(m.client.ioctl_with(m.vcpu, KVM_TRANSLATE, &mut translation), Ok(0));
        assert_eq!((translation.writeable, translation.usermode), (1, 0), "constants");
        (translation.physical_address, translation.valid)
    };
    assert_eq!(translate(0x1234_5678), (0x1234_5678, 1), "without paging");
    m.enter_long();
    m.ram.store_u64(TABLES + 0x2008, 0x40_0083).unwrap();
    assert_eq!(translate(0x20_1234), (0x40_1234, 1));
    assert_eq!(m.ram.load_u64(TABLES + 0x2008), Some(0x40_00a3));
    m.ram.store_u64(TABLES + 0x2010, 0).unwrap();
    assert_eq!(translate(0x40_0000), (u64::MAX, 0));
    assert_eq!(translate(1 << 40), (u64::MAX, 0));
}

#[test]
fn interrupt_queues_each_vector_once_at_any_time() {
    let m = Machine::real(|a| a.hlt().unwrap());
    for irq in [255, 0, 255] {
        assert_eq!(m.interrupt(irq), Ok(0), "IF says nothing");
    }
    assert_eq!(m.sregs().interrupt_bitmap, [1, 0, 0, 1 << 63]);
}

#[test]
fn get_fpu_and_set_fpu_move_all_but_mxcsr() {
    let m = Machine::real(|a| {
        a.mov(ecx, cr4).unwrap();
        a.or(ecx, 0x200).unwrap();
        a.mov(cr4, ecx).unwrap();
        a.fnstsw(word_ptr(0x500)).unwrap();
        a.fstp(dword_ptr(0x504)).unwrap();
        a.movups(xmmword_ptr(0x510), xmm7).unwrap();
        a.stmxcsr(dword_ptr(0x508)).unwrap();
        a.hlt().unwrap();
    });
    let mut fpu: kvm_fpu = m.get(KVM_GET_FPU);
    (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr) = (0x27f, 0x3800, 0x80, 0);
    (fpu.last_opcode, fpu.last_ip, fpu.last_dp) = (0x123, 0x1111_2222_3333, 0x4444_5555_6666);
    fpu.fpr[0][..10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]); // 1.0
    fpu.xmm[7] = *b"sixteen bytes of";
    assert_eq!(m.set(KVM_SET_FPU, &fpu), Ok(0));
    assert_eq!(m.get::<kvm_fpu>(KVM_GET_FPU), fpu, "MXCSR reads as 0");
    m.set_sregs(|sregs| sregs.cr0 &= !0xc);
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.ram.load_u16(0x500), m.ram.load_u32(0x504)), (Some(0x3800), Some(1f32.to_bits())));
    assert_eq!(m.ram.load_u32(0x508), Some(0x1f80), "a MXCSR of 0 unmasks nothing");
    let mut bytes = [0; 16];
    m.ram.read(0x510, &mut bytes).unwrap();
    assert_eq!(&bytes, b"sixteen bytes of");
}

#[test]
fn set_cpuid_matches_eax_alone_and_falls_to_the_highest_of_a_half() {
    let m = Machine::long(|a| {
        a.cpuid().unwrap();
        a.hlt().unwrap();
    });
    let entry = |function: u32| kvm_cpuid_entry { function, eax: function ^ 0xff, ebx: 2, ecx: 3, edx: 4, padding: 0 };
    let ask = |leaf: u64, index: u64| {
        m.set_regs(|regs| (regs.rip, regs.rax, regs.rcx) = (CODE, leaf, index));
        assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
        let regs = m.regs();
        (regs.rax, regs.rbx, regs.rcx, regs.rdx)
    };
    let answer = |function: u64| (function ^ 0xff, 2, 3, 4);
    assert_eq!(m.set_cpuid(&[entry(1), entry(4), entry(0), entry(0x8000_0001), entry(0x8000_0000)]), Ok(0));
    assert_eq!(ask(1, 7), answer(1), "bit for bit, whatever ECX and CR4 say");
    assert_eq!(ask(0, 0), answer(0));
    assert_eq!(ask(2, 0), answer(4));
    assert_eq!(ask(0x1234_5678, 0), answer(4));
    assert_eq!(ask(0x8000_0008, 0), answer(0x8000_0001));
    // Another table in place of it, after the vCPU has run.
    assert_eq!(m.set_cpuid(&[entry(0x8000_0000)]), Ok(0));
    assert_eq!(ask(1, 0), (0, 0, 0, 0));
    assert_eq!(m.set_cpuid(&[]), Ok(0));
    assert_eq!(ask(0x8000_0000, 0), (0, 0, 0, 0));
}

/// EFER and CR4 of 2007 do not ask CPUID.
#[test]
fn a_table_without_long_mode_and_nx_forbids_neither() {
    let m = Machine::real(|a| {
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.rdmsr().unwrap();
        a.or(eax, 0x901).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr4).unwrap();
        a.or(eax, 0x7f0).unwrap();
        a.mov(cr4, eax).unwrap();
        a.hlt().unwrap();
    });
    m.set_cpuid(&[kvm_cpuid_entry { function: 1, ..Plain::zeroed() }]).unwrap();
    assert_eq!(m.run(), Ok(KVM_EXIT_HLT));
    assert_eq!((m.sregs().efer, m.sregs().cr4), (0x901, 0x7f0));
    // A bit that 2007 did not know is #GP.
    m.handler(13);
    m.ram
        .write(
            CODE,
            &assemble(16, CODE, |a| {
                a.or(eax, 0x10_0000).unwrap();
                a.mov(cr4, eax).unwrap();
            }),
        )
        .unwrap();
    m.set_regs(|regs| (regs.rip, regs.rsp) = (CODE, STACK));
    assert_eq!(m.run(), Ok(KVM_EXIT_IO));
    assert_eq!(m.io_data(1), [13]);
}

#[test]
fn apic_base_is_stored_and_nothing_more() {
    let m = Machine::real(|a| {
        a.mov(ecx, 0x1bu32).unwrap();
        a.rdmsr().unwrap();
        a.mov(esi, eax).unwrap();
        a.mov(eax, 0xa_0123u32).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 1).unwrap();
        a.cpuid().unwrap();
        a.mov(al, byte_ptr(0x20).es()).unwrap();
        a.hlt().unwrap();
    });
    let apic = kvm_cpuid_entry { function: 1, edx: 1 << 9, ..Plain::zeroed() };
    m.set_cpuid(&[apic]).unwrap();
    m.set_sregs(|sregs| (sregs.apic_base, sregs.es.base) = (0x1_2345, DEVICE));
    m.set_regs(|regs| regs.rdx = 0);
    assert_eq!(m.run(), Ok(KVM_EXIT_MMIO), "no APIC is decoded there");
    assert_eq!((m.regs().rsi, m.regs().rdx), (0x1_2345, 1 << 9), "CPUID's bit is the table's");
    assert_eq!((m.sregs().apic_base, m.run.load_u64(24)), (0xa_0123, Some(0xa_0123)));
}

/// MOV to control registers: what 2.6.22 refused and the manual refuses as well.
#[test]
fn bad_control_registers_are_the_guests_fault() {
    type Code = fn(&mut CodeAssembler);
    let bad: [(&str, Code); 5] = [
        ("PG without PE", |a| {
            a.mov(eax, 0x8000_0010u32).unwrap();
            a.mov(cr0, eax).unwrap();
        }),
        ("NW without CD", |a| {
            a.mov(eax, 0x2000_0011u32).unwrap();
            a.mov(cr0, eax).unwrap();
        }),
        ("a bit of CR4 that nobody has", |a| {
            a.mov(eax, 1u32 << 31).unwrap();
            a.mov(cr4, eax).unwrap();
        }),
        ("long mode without PAE", |a| {
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.mov(eax, 0x100).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
            a.mov(eax, 0x8000_0011u32).unwrap();
            a.mov(cr0, eax).unwrap();
        }),
        ("a bit of EFER that nobody has", |a| {
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.mov(eax, 0x8000).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
        }),
    ];
    for (name, code) in bad {
        let m = Machine::real(code);
        m.handler(13);
        assert_eq!(m.run(), Ok(KVM_EXIT_IO), "{name}");
        assert_eq!(m.io_data(1), [13], "{name}");
    }
    let m = Machine::long(|a| {
        a.mov(eax, 16).unwrap();
        a.mov(cr8, rax).unwrap();
    });
    assert_eq!(m.run(), Ok(KVM_EXIT_SHUTDOWN), "CR8 has four bits; there is no IDT");
}
