//! Code that changes: under the CPU that runs it, by another CPU, by the VMM, through other addresses. What must be seen, and
//! from when on, is SDM Vol. 3 "Self-Modifying Code" and "Handling Self- and Cross-Modifying Code"; like processors since
//! the P6 family, the core sees its own stores at the next instruction.

use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;
use mmu::View;
use x86_defs::{Cr4, GuestPhysAddr, pte};

use crate::Cpu;
use crate::platform::HostPlatform;
use crate::state::{DescriptorTable, Gpr, Seg, Segment};
use crate::testing::{CODE, Machine};
use crate::vmx::Exit;

type Assemble = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

/// Linear address of the second mapping of the first 2 MBytes.
const ALIAS: u64 = 0x60_0000;
const PAGE_DIRECTORY: u64 = 0x8_2000;

/// 64-bit mode with all of memory a second time at [`ALIAS`].
fn machine(assemble: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Machine {
    let mut machine = Machine::new_64bit(|a| {
        assemble(a).expect("encodable");
        a.hlt().expect("encodable");
    });
    machine.write(PAGE_DIRECTORY + 8 * (ALIAS >> 21), &0x87u64.to_le_bytes());
    machine.cpu.cr4 |= x86_defs::Cr4::OSXSAVE;
    machine.cpu.fpu_mut().xcr0 = 3;
    machine
}

/// Every kind of store over the operand of an instruction that the same trace has decoded already. RBX: the address of four
/// bytes that become 77777777H; all sources hold that value.
const STORES: &[(&str, Assemble)] = &[
    ("MOV byte", |a| a.mov(byte_ptr(rbx), al).and(a.mov(byte_ptr(rbx + 1), ah)).and(a.mov(word_ptr(rbx + 2), ax))),
    ("MOV", |a| a.mov(dword_ptr(rbx), eax)),
    ("MOV immediate", |a| a.mov(dword_ptr(rbx), 0x7777_7777)),
    ("MOV with an index", |a| a.mov(dword_ptr(rbx + rcx * 4), eax)),
    ("MOVNTI", |a| a.movnti(dword_ptr(rbx), eax)),
    ("MOVDIRI", |a| a.movdiri(dword_ptr(rbx), eax)),
    ("MOVBE", |a| a.movbe(dword_ptr(rbx), eax)),
    ("XCHG", |a| a.mov(edx, eax).and(a.xchg(dword_ptr(rbx), edx))),
    ("ADD", |a| a.add(dword_ptr(rbx), edi)),
    ("LOCK ADD", |a| a.lock().add(dword_ptr(rbx), edi)),
    ("LOCK CMPXCHG", |a| a.mov(edx, eax).and(a.mov(eax, 0x1111_1111)).and(a.lock().cmpxchg(dword_ptr(rbx), edx))),
    ("NOT", |a| a.mov(dword_ptr(rbx), 0x8888_8888u32).and(a.not(dword_ptr(rbx)))),
    ("SHR", |a| a.mov(dword_ptr(rbx), 0xeeee_eeeeu32).and(a.shr(dword_ptr(rbx), 1))),
    ("PUSH", |a| a.mov(rbp, rsp).and(a.lea(rsp, ptr(rbx + 4))).and(a.push(ax)).and(a.push(ax)).and(a.mov(rsp, rbp))),
    ("POP", |a| a.push(rax).and(a.pop(word_ptr(rbx))).and(a.pop(word_ptr(rbx + 2))).and(a.add(rsp, 4))),
    ("STOSD", |a| a.mov(rdi, rbx).and(a.stosd())),
    ("REP STOSB", |a| a.mov(rdi, rbx).and(a.mov(ecx, 4)).and(a.rep().stosb())),
    ("REP MOVSB", |a| a.push(rax).and(a.mov(rsi, rsp)).and(a.mov(rdi, rbx)).and(a.mov(ecx, 4)).and(a.rep().movsb())),
    ("MOVD", |a| a.movd(xmm0, eax).and(a.movd(dword_ptr(rbx), xmm0))),
    ("MOVSS", |a| a.movd(xmm0, eax).and(a.movss(dword_ptr(rbx), xmm0))),
    ("FISTP", |a| a.push(rax).and(a.fild(dword_ptr(rsp))).and(a.fistp(dword_ptr(rbx)))),
    ("MOVD MM", |a| a.movd(mm0, eax).and(a.movd(dword_ptr(rbx), mm0)).and(a.emms())),
];

/// Runs what `store` writes over `mov r8d, 11111111H`, `ahead` bytes of NOP behind the store.
fn patched(store: Assemble, ahead: usize, address: u64) -> Machine {
    let mut machine = machine(|a| {
        let mut target = a.create_label();
        a.lea(rbx, ptr(target))?;
        a.add(rbx, rcx)?;
        a.xor(ecx, ecx)?;
        a.mov(eax, 0x7777_7777)?;
        a.mov(edi, 0x6666_6666)?;
        store(a)?;
        for _ in 0..ahead {
            a.nop()?;
        }
        a.nop()?;
        a.set_label(&mut target)?;
        a.mov(r8d, 0x1111_1111)
    });
    // The label is that of the instruction; its operand is two bytes further.
    machine.cpu.set_reg(Gpr::Rcx, address + 2);
    machine
}

#[test]
fn a_cpus_own_stores_are_seen_at_the_next_instruction() {
    for (name, store) in STORES {
        for (ahead, address) in [(0, 0), (40, 0), (0, ALIAS), (3, ALIAS)] {
            let mut machine = patched(*store, ahead, address);
            assert_eq!(machine.cpu.run(), Exit::Hlt, "{name}");
            assert_eq!(machine.cpu.reg(Gpr::R8), 0x7777_7777, "{name}, {ahead} bytes ahead, {address:#x}");
            // Once more over code that has run: from the start, with the first bytes back in place.
            let mut again = patched(*store, ahead, address);
            again.cpu.rip = CODE;
            let first = again.read::<256>(CODE);
            for _ in 0..3 {
                again.write(CODE, &first);
                again.cpu.rip = CODE;
                again.cpu.set_reg(Gpr::Rcx, address + 2);
                again.cpu.set_reg(Gpr::R8, 0);
                assert_eq!(again.cpu.run(), Exit::Hlt, "{name}");
                assert_eq!(again.cpu.reg(Gpr::R8), 0x7777_7777, "{name} again");
            }
        }
    }
}

#[test]
fn a_store_that_crosses_into_the_next_page_changes_both() {
    // `mov r8d, imm32` with two bytes of its operand in the next page, run in a loop that stores what it counts.
    let mut machine = machine(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 200)?;
        a.set_label(&mut top)?;
        a.mov(dword_ptr(0x2ffe), ecx)?;
        a.call(0x2ffcu64)?;
        a.add(r9d, r8d)?;
        a.dec(ecx)?;
        a.jne(top)
    });
    machine.write(0x2ffc, &[0x41, 0xb8, 0, 0, 0, 0, 0xc3]);
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.reg(Gpr::R9), (1..=200).sum());
}

#[test]
fn a_page_of_code_that_becomes_data_is_other_code_afterwards() {
    // `mov r8d, ecx's value; ret` is written, called, and overwritten by what fills its page: by a repeated store of all of it,
    // then by single ones of each line.
    let mut machine = machine(|a| {
        let (mut top, mut line) = (a.create_label(), a.create_label());
        a.mov(edx, 50)?;
        a.set_label(&mut top)?;
        a.mov(edi, 0x3000)?;
        a.mov(ecx, 512)?;
        a.rep().stosq()?;
        a.mov(edi, 0x3000)?;
        a.mov(ecx, 64)?;
        a.set_label(&mut line)?;
        a.mov(qword_ptr(rdi), rdx)?;
        a.add(rdi, 64)?;
        a.dec(ecx)?;
        a.jne(line)?;
        a.mov(word_ptr(0x3000), 0xb841)?;
        a.mov(dword_ptr(0x3002), edx)?;
        a.mov(byte_ptr(0x3006), 0xc3)?;
        a.call(0x3000u64)?;
        a.add(r9d, r8d)?;
        a.dec(edx)?;
        a.jne(top)
    });
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.reg(Gpr::R9), (1..=50).sum());
    assert_eq!(machine.cpu.traces.code_pages(), 2, "the program's page and that of what it wrote last");
    let mut machine = self::machine(|a| {
        a.mov(dword_ptr(0x3000), 0xc390_9090u32 as i32)?;
        a.call(0x3000u64)?;
        a.mov(edi, 0x3000)?;
        a.mov(ecx, 512)?;
        a.rep().stosq()
    });
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.traces.code_pages(), 1, "the page holds data");
}

#[test]
fn a_repeated_store_over_itself_ends() {
    // REP STOSB fills from itself on with HLT. It goes on as it was fetched, or, interrupted, stops at the HLT that it is now.
    let mut machine = machine(|a| {
        let mut itself = a.create_label();
        a.mov(eax, 0xf4)?;
        a.mov(ecx, 64)?;
        a.lea(rdi, ptr(itself))?;
        a.mov(rbx, rdi)?;
        a.set_label(&mut itself)?;
        a.rep().stosb()?;
        a.ud2()
    });
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    let (start, left) = (machine.cpu.reg(Gpr::Rbx), machine.cpu.reg(Gpr::Rcx));
    assert_eq!(machine.cpu.reg(Gpr::Rdi), start + 64 - left);
    assert_eq!(machine.cpu.rip, start + 1 + if left == 0 { 2 } else { 0 });
    assert!(machine.read::<64>(start)[..(64 - left) as usize].iter().all(|byte| *byte == 0xf4));
}

#[test]
fn frames_that_the_cpu_pushes_over_code_are_seen() {
    // INT 3 pushes its frame over `hlt` at 3000H..; the handler goes there. The low byte of the frame's RIP is the new code.
    let mut machine = machine(|a| {
        a.call(0x3000u64)?;
        a.mov(rsp, 0x3030u64)?;
        a.int3()
    });
    // The frame: SS RSP RFLAGS CS RIP at 3008H. RIP's low bytes make the instruction there: whatever they are, not RET.
    machine.write(0x3000, &[0x90; 8]);
    machine.write(0x3008, &[0xc3; 40]);
    machine.write(0x4000, &[0xf4]);
    let gate = 0x4000u64 & 0xffff | 8 << 16 | 0x8e << 40;
    machine.write(0x5000 + 16 * 3, &gate.to_le_bytes());
    machine.write(0x5000 + 16 * 3 + 8, &0u64.to_le_bytes());
    // A GDT with a 64-bit code segment at 8.
    machine.write(0x6008, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    machine.write(0x6010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    machine.cpu.gdt = DescriptorTable { base: 0x6000, limit: 0x17 };
    machine.cpu.idt = DescriptorTable { base: 0x5000, limit: 0xfff };
    let flat = machine.cpu.seg[Seg::Ds as usize];
    machine.cpu.seg[Seg::Ss as usize] = Segment { selector: 0x10, ..flat };
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.reg(Gpr::Rsp), 0x3008);
    // What was RET is now part of the frame: an instruction that decodes anew.
    machine.write(0x3008, &[0x41, 0xb8, 5, 0, 0, 0, 0xf4]);
    machine.cpu.rip = 0x3000;
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.reg(Gpr::R8), 5);
}

#[test]
fn a_page_mapped_elsewhere_is_other_code() {
    // Two pages of code, the same linear page in turn: by a store to the PDE, and what the SDM has for its translation, global
    // or not (Vol. 3 "Operations that Invalidate TLBs and Paging-Structure Caches").
    const AT: u64 = 0x80_0000;
    let table: &[(&str, u64, Assemble)] = &[
        ("INVLPG", 0, |a| a.invlpg(ptr(rbx))),
        ("INVLPG", pte::G, |a| a.invlpg(ptr(rbx))),
        ("MOV CR3", 0, |a| a.mov(rax, cr3).and(a.mov(cr3, rax))),
        ("INVPCID, all but global", 0, |a| a.mov(eax, 3).and(a.invpcid(rax, xmmword_ptr(0x7000)))),
        ("INVPCID, all", pte::G, |a| a.mov(eax, 2).and(a.invpcid(rax, xmmword_ptr(0x7000)))),
        ("CR4.PGE", pte::G, |a| {
            a.mov(rax, cr4)?;
            a.btc(eax, 7)?;
            a.mov(cr4, rax)?;
            a.btc(eax, 7)?;
            a.mov(cr4, rax)
        }),
    ];
    for (flush, global, invalidate) in table {
        let mut machine = machine(|a| {
            let mut top = a.create_label();
            a.mov(ecx, 50)?;
            a.mov(rbx, AT)?;
            a.set_label(&mut top)?;
            // By the jump cache, a link across pages, the return stack.
            a.call(rbx)?;
            a.call(AT)?;
            a.xor(qword_ptr(PAGE_DIRECTORY + 8 * (AT >> 21)), 0x60_0000)?;
            invalidate(a)?;
            a.dec(ecx)?;
            a.jne(top)
        });
        for (page, adds) in [(0xa0_0000u64, 1u8), (0xc0_0000, 100)] {
            machine.write(page, &[0x49, 0x83, 0xc0, adds, 0xc3]);
        }
        machine.cpu.cr4 |= Cr4::PGE;
        machine.write(PAGE_DIRECTORY, &(0x87 | pte::G).to_le_bytes());
        machine.write(PAGE_DIRECTORY + 8 * (AT >> 21), &(0xa0_0087 | global).to_le_bytes());
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        assert_eq!(machine.cpu.reg(Gpr::R8), 2 * 25 * 101, "{flush}");
    }
}

/// Data and code in global pages, and what is linked to it, are found without a walk or a lookup behind MOV CR3.
#[test]
fn global_pages_outlive_mov_cr3() {
    const TIMES: u32 = 50;
    // In a page of its own, so that a link and a return lead across pages.
    const AT: u64 = 0x3000;
    let slow = |global: u64| {
        let mut machine = machine(|a| {
            let mut top = a.create_label();
            a.mov(ecx, TIMES)?;
            a.set_label(&mut top)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.call(AT)?;
            a.inc(qword_ptr(0x7000))?;
            a.dec(ecx)?;
            a.jne(top)
        });
        machine.write(AT, &[0xc3]);
        machine.cpu.cr4 |= Cr4::PGE;
        machine.write(PAGE_DIRECTORY, &(0x87 | global).to_le_bytes());
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        let counts = &machine.cpu.counts;
        [counts.data_walks, counts.fetch_walks, counts.jump_cache_misses]
    };
    assert!(slow(0).iter().all(|count| *count >= u64::from(TIMES)), "{:?}", slow(0));
    assert!(slow(pte::G).iter().all(|count| *count < 10), "{:?}", slow(pte::G));
}

/// Where the code lies that others change: `mov r8d, imm32; ret`, and where the sides talk.
const SHARED: u64 = 0xa_0000;
const TURN: u64 = 0xb_0000;
const ROUNDS: u32 = 50;

/// The executing side of "Handling Self- and Cross-Modifying Code": waits for its turn, executes a serialising instruction,
/// then the modified code, and hands the turn back with what it saw.
fn executor(serialise: Assemble) -> Machine {
    let mut machine = machine(|a| {
        let (mut wait, mut bad) = (a.create_label(), a.create_label());
        a.mov(esi, 1)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(TURN), esi)?;
        a.jne(wait)?;
        serialise(a)?;
        a.call(SHARED)?;
        a.cmp(r8d, esi)?;
        a.jne(bad)?;
        a.mov(dword_ptr(TURN + 64), esi)?;
        a.inc(esi)?;
        a.cmp(esi, ROUNDS as i32)?;
        a.jbe(wait)?;
        a.set_label(&mut bad)?;
        a.nop()
    });
    machine.write(SHARED, &[0x41, 0xb8, 0, 0, 0, 0, 0xc3]);
    machine
}

fn assert_all_seen(machine: &Machine, name: &str) {
    assert_eq!(machine.cpu.reg(Gpr::R8), u64::from(ROUNDS), "{name}");
    assert_eq!(machine.cpu.reg(Gpr::Rsi), u64::from(ROUNDS) + 1, "{name}");
}

/// SDM Vol. 3 "Serializing Instructions", those that a guest at level 0 has at hand.
const SERIALISING: &[(&str, Assemble)] = &[
    ("CPUID", |a| a.xor(eax, eax).and(a.cpuid())),
    ("SERIALIZE", |a| a.serialize()),
    ("MOV CR0", |a| a.mov(rax, cr0).and(a.mov(cr0, rax))),
    ("MOV CR3", |a| a.mov(rax, cr3).and(a.mov(cr3, rax))),
    ("MOV DR7", |a| a.mov(rax, dr7).and(a.mov(dr7, rax))),
    ("INVLPG", |a| a.invlpg(ptr(TURN))),
    ("WBINVD", |a| a.wbinvd()),
    ("WRMSR", |a| a.mov(ecx, 0xc000_0103u32).and(a.xor(eax, eax)).and(a.xor(edx, edx)).and(a.wrmsr())),
    ("LGDT", |a| a.lgdt(fword_ptr(0x7000))),
    ("IRETQ", |a| {
        let mut next = a.create_label();
        a.mov(rbp, rsp)?;
        a.push(0x10)?;
        a.push(rbp)?;
        a.pushfq()?;
        a.push(8)?;
        a.lea(rax, ptr(next))?;
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut next)?;
        a.nop()
    }),
];

fn with_gdt(machine: &mut Machine) {
    machine.write(0x6008, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    machine.write(0x6010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    machine.write(0x7000, &[0x17, 0, 0, 0x60, 0, 0, 0, 0, 0, 0]);
    machine.cpu.gdt = DescriptorTable { base: 0x6000, limit: 0x17 };
}

/// The VMM writes guest memory from a thread of its own, without a word to the CPU.
#[test]
fn code_that_the_vmm_writes_while_the_guest_runs_is_seen_behind_a_serialising_instruction() {
    for (name, serialise) in SERIALISING {
        let mut machine = executor(*serialise);
        with_gdt(&mut machine);
        let memory = machine.memory.clone();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut view = View::new(&memory);
                let _ = view.refresh();
                for turn in 1..=ROUNDS {
                    view.write(GuestPhysAddr(SHARED + 2), &turn.to_le_bytes()).expect("RAM");
                    std::sync::atomic::fence(Ordering::SeqCst);
                    view.write(GuestPhysAddr(TURN), &turn.to_le_bytes()).expect("RAM");
                    let mut seen = [0; 4];
                    while seen != turn.to_le_bytes() && !stop.load(Ordering::Relaxed) {
                        view.read(GuestPhysAddr(TURN + 64), &mut seen).expect("RAM");
                        std::thread::yield_now();
                    }
                }
            });
            assert_eq!(machine.cpu.run(), Exit::Hlt, "{name}");
            stop.store(true, Ordering::Relaxed);
        });
        assert_all_seen(&machine, name);
    }
}

/// Another CPU of the same VM writes it, through the second mapping.
#[test]
fn code_that_another_cpu_writes_is_seen_behind_a_serialising_instruction() {
    for (name, serialise) in SERIALISING {
        let mut machine = executor(*serialise);
        with_gdt(&mut machine);
        let mut other = Cpu::new(machine.memory.clone(), Box::new(HostPlatform::default()), 40);
        other.set_sregs(&machine.cpu.sregs());
        let mut writer = CodeAssembler::new(64).expect("64 bits");
        let assembled = (|a: &mut CodeAssembler| {
            let (mut top, mut wait) = (a.create_label(), a.create_label());
            a.mov(esi, 1)?;
            a.set_label(&mut top)?;
            a.mov(dword_ptr(ALIAS + SHARED + 2), esi)?;
            a.mov(dword_ptr(ALIAS + TURN), esi)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(TURN + 64), esi)?;
            a.jne(wait)?;
            a.inc(esi)?;
            a.cmp(esi, ROUNDS as i32)?;
            a.jbe(top)?;
            a.hlt()
        })(&mut writer);
        assembled.expect("encodable");
        let code = writer.assemble(0xc_0000).expect("encodable");
        machine.write(0xc_0000, &code);
        other.rip = 0xc_0000;
        let kick = other.kicker();
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| other.run());
            assert_eq!(machine.cpu.run(), Exit::Hlt, "{name}");
            if machine.cpu.reg(Gpr::Rsi) <= u64::from(ROUNDS) {
                kick.kick();
            }
            let _ = writing.join().expect("no panic");
        });
        assert_all_seen(&machine, name);
    }
}

/// A store by another guest-physical address of the same memory, as KVM_SET_MEMORY_ALIAS of 2007 makes them.
#[test]
fn a_store_through_an_alias_of_the_vm_is_seen_at_the_next_instruction() {
    const AT: u64 = 0x4000_0000;
    for (what, running, writing) in [("the code's alias", AT + CODE, 0), ("the store's alias", CODE, AT)] {
        let mut machine = machine(|a| {
            let mut target = a.create_label();
            a.mov(dword_ptr(rbx), 0x7777_7777)?;
            a.nop()?;
            a.set_label(&mut target)?;
            a.mov(r8d, 0x1111_1111)
        });
        let alias = mmu::Alias { gpa: GuestPhysAddr(AT), len: 0x20_0000, target: GuestPhysAddr(0) };
        machine.memory.set_alias(0, alias).expect("there is none yet");
        // Linear AT shows the alias: the second GiB's first 2 MBytes.
        machine.write(PAGE_DIRECTORY - 0x1000 + 8, &0x8_4007u64.to_le_bytes());
        machine.write(0x8_4000, &(AT | 0x87).to_le_bytes());
        machine.cpu.flush_tlb();
        machine.cpu.rip = running;
        // MOV [RBX], imm32 has 6 bytes, the operand of MOV R8D lies 2 behind its start.
        machine.cpu.set_reg(Gpr::Rbx, writing + CODE + 6 + 1 + 2);
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        assert_eq!(machine.cpu.reg(Gpr::R8), 0x7777_7777, "{what}");
    }
}

/// Another slot where a CPU runs: the loop that it runs is no longer there.
#[test]
fn a_slot_changed_under_a_running_cpu_is_other_code() {
    let mut machine = machine(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.inc(rax)?;
        a.jmp(spin)
    });
    let memory = machine.memory.clone();
    let kick = machine.cpu.kicker();
    let replacement = mmu::Mapping::create("test", crate::testing::RAM).expect("a memfd");
    let slot = move || mmu::SlotSpec {
        id: 0,
        gpa: GuestPhysAddr(0),
        len: crate::testing::RAM,
        flags: mmu::SlotFlags::default(),
        userspace_addr: 0,
        backing: mmu::Backing::new(replacement.clone(), 0),
    };
    // The same tables, and HLT where the loop is.
    let mut bytes = vec![0; 0x8_4000];
    View::new(&memory).read(GuestPhysAddr(0), &mut bytes).expect("inside RAM");
    bytes[CODE as usize..][..64].fill(0xf4);
    let other = std::sync::Arc::new(mmu::Memory::new());
    other.set_slot(slot()).expect("there is room");
    View::new(&other).write(GuestPhysAddr(0), &bytes).expect("inside RAM");
    let changer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        memory.delete_slot(0).expect("it is there");
        memory.set_slot(slot()).expect("there is room");
        kick.refresh();
    });
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    changer.join().expect("no panic");
}

/// INVLPG of a page whose code was linked to, and of one that holds data: a call finds the page that is mapped then.
#[test]
fn code_behind_another_translation_is_found_behind_invlpg() {
    const FUNCTION: u64 = 0x4000_0000;
    const TABLE: u64 = 0x8_5000;
    let mut machine = machine(|a| {
        a.mov(rsi, FUNCTION)?;
        a.mov(rdi, TABLE)?;
        a.xor(r9d, r9d)?;
        a.call(rsi)?;
        a.call(rsi)?;
        a.add(r9, rax)?;
        // Data first: what leads to the function stays.
        a.invlpg(ptr(rbx))?;
        a.call(rsi)?;
        a.add(r9, rax)?;
        a.mov(qword_ptr(rdi), rbp)?;
        a.invlpg(ptr(rsi))?;
        a.call(rsi)?;
        a.add(r9, rax)?;
        a.hlt()
    });
    let (first, second) = (0x10_0000, 0x10_1000);
    machine.write(first, &[0xb8, 1, 0, 0, 0, 0xc3]); // mov eax, 1; ret
    machine.write(second, &[0xb8, 16, 0, 0, 0, 0xc3]);
    machine.write(PAGE_DIRECTORY - 0x1000 + 8, &0x8_4007u64.to_le_bytes());
    machine.write(0x8_4000, &(TABLE | 7).to_le_bytes());
    machine.write(TABLE, &(first | 7).to_le_bytes());
    machine.cpu.flush_tlb();
    machine.cpu.set_reg(Gpr::Rbx, 0x9_0000);
    machine.cpu.set_reg(Gpr::Rbp, second | 7);
    machine.cpu.rip = CODE;
    assert_eq!(machine.cpu.run(), Exit::Hlt);
    assert_eq!(machine.cpu.reg(Gpr::R9), 1 + 1 + 16);
}

/// An instruction over a page end becomes one that ends before it, and the other way round.
#[test]
fn an_instruction_at_a_page_end_that_changes_its_length_is_seen() {
    const AT: u64 = 0x3_0ffd;
    let mut machine = machine(|a| {
        a.mov(rax, AT)?;
        a.jmp(rax)
    });
    let mut run = |bytes: &[u8]| {
        machine.write(AT, bytes);
        machine.cpu.set_reg(Gpr::R8, 0);
        machine.cpu.rip = AT;
        assert_eq!(machine.cpu.run(), Exit::Hlt);
        machine.cpu.reg(Gpr::R8)
    };
    for _ in 0..3 {
        assert_eq!(run(&[0x41, 0xb8, 1, 0, 0, 0, 0xf4]), 1); // mov r8d, 1; hlt
        assert_eq!(run(&[0x41, 0xb0, 2, 0xf4]), 2); // mov r8b, 2; hlt
    }
}
