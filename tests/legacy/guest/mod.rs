//! Guests, assembled here: what the BIOS of kvmctl's test guests did, and the way on to long mode.
//!
//! Everything lies at a fixed guest-physical address, and all segments are flat, so that pieces of code for different
//! modes need no linker.

mod display;
mod kvmctl;
mod locked;

pub(crate) use display::{display, mailbox};
pub(crate) use kvmctl::*;
pub(crate) use locked::{ADDENDS, FAR_HALVES, locked, locked_rounds, race};

use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction};

use crate::kvmctl::{MAX_CPUS, port};

/// Pieces of memory: guest-physical address and bytes.
#[derive(Default)]
pub(crate) struct Image {
    pub(crate) pieces: Vec<(u64, Vec<u8>)>,
}

/// What writing code gives.
pub(crate) type Written = Result<(), IcedError>;

/// Where things lie.
pub(crate) mod at {
    /// Real mode's vectors, and the first 256 bytes of protected mode's: both tables at 0, as in kvmctl's guests.
    pub(crate) const IVT: u64 = 0;
    pub(crate) const GDT: u64 = 0x800;
    /// Operands of LGDT, LIDT to the table at 0, LIDT to the table of long mode.
    pub(crate) const GDTR: u64 = 0x9c0;
    pub(crate) const IDTR: u64 = 0x9d0;
    pub(crate) const IDTR_LONG: u64 = 0x9e0;
    /// u32: CPUs, those that run in real mode, those that have taken their first interrupt.
    pub(crate) const CPUS: u64 = 0xa00;
    pub(crate) const READY: u64 = 0xa04;
    pub(crate) const WOKEN: u64 = 0xa08;
    /// u32: CPUs in long mode.
    pub(crate) const IN_LONG_MODE: u64 = 0xa0c;
    /// u64: what an interrupt between CPUs calls, or 0; u32: how often it was done.
    pub(crate) const FUNCTION: u64 = 0xa10;
    pub(crate) const CALLED: u64 = 0xa18;
    /// Scratch words of a guest's own.
    pub(crate) const SCRATCH: u64 = 0xb00;
    /// A task-state segment per CPU, 0x100 bytes apart.
    pub(crate) const TSS: u64 = 0x1000;
    pub(crate) const IDT_LONG: u64 = 0x2000;
    /// Mailboxes of tests.
    pub(crate) const MAILBOX: u64 = 0x3000;
    /// Tops of stacks, 0x1000 apart, one per CPU.
    pub(crate) const STACKS: u64 = 0x9000;
    /// Paging structures of long mode: the first GiB one to one.
    pub(crate) const PML4: u64 = 0x1_0000;
    pub(crate) const PDPT: u64 = 0x1_1000;
    pub(crate) const PD: u64 = 0x1_2000;
    /// The page directory and the page table for linear [`super::MAPPED`], which tests fill.
    pub(crate) const MAPPED_PD: u64 = 0x1_3000;
    pub(crate) const MAPPED_PT: u64 = 0x1_4000;
    /// Where the BIOS lies, as a segment's base, and its size.
    pub(crate) const BIOS: u64 = 0xf_0000;
    /// Where `bootstrap` jumps to, in 32-bit protected mode; what every other CPU does there; the same in long mode.
    pub(crate) const MAIN: u64 = 0x10_0000;
    pub(crate) const SECONDARY: u64 = 0x10_1000;
    pub(crate) const LONG_MAIN: u64 = 0x10_2000;
    /// Subroutines of long mode: prints RAX in decimal; the interrupt between CPUs.
    pub(crate) const PRINT_DECIMAL: u64 = 0x10_4000;
    pub(crate) const IPI_HANDLER: u64 = 0x10_5000;
    pub(crate) const WAKE_HANDLER: u64 = 0x10_5800;
    /// Handlers and functions of a guest's own.
    pub(crate) const HANDLERS: u64 = 0x10_6000;
}

/// First linear address behind what is mapped one to one.
pub(crate) const MAPPED: u64 = 1 << 30;
/// Selectors in the GDT.
pub(crate) mod selector {
    pub(crate) const CODE32: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const CODE64: u16 = 0x18;
    pub(crate) const USER_CODE64: u16 = 0x20 | 3;
    pub(crate) const USER_DATA: u16 = 0x28 | 3;
    /// Of CPU 0; the others follow 16 bytes apart.
    pub(crate) const TSS: u16 = 0x40;
}
/// Vector of interrupts between CPUs in long mode, and of `INT` in kvmctl's guests.
pub(crate) const VECTOR: u8 = 0x20;
/// What brings a CPU to long mode. Its handler does nothing.
const WAKE_VECTOR: u8 = 0x21;
/// The first interrupt that a CPU takes, in real mode.
const REAL_VECTOR: u8 = 0xf0;

/// Page-entry bits, SDM Vol. 3 "Paging-Structure Entries".
pub(crate) mod pte {
    pub(crate) const P: u64 = 1;
    pub(crate) const RW: u64 = 2;
    pub(crate) const US: u64 = 4;
    pub(crate) const A: u64 = 1 << 5;
    pub(crate) const D: u64 = 1 << 6;
    pub(crate) const PS: u64 = 1 << 7;
}

impl Image {
    /// Adds data.
    pub(crate) fn data(&mut self, at: u64, bytes: &[u8]) {
        self.pieces.push((at, bytes.to_vec()));
    }

    pub(crate) fn words(&mut self, at: u64, words: &[u64]) {
        self.data(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>());
    }

    /// Adds code for `bits` mode that runs at linear, and lies at guest-physical, `at`.
    pub(crate) fn code(&mut self, bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler) -> Written) {
        let bytes = assemble(bits, at, write);
        self.pieces.push((at, bytes));
    }

    /// A gate of long mode for `vector`. SDM Vol. 3 "64-Bit IDT Gate Descriptors": an interrupt gate.
    pub(crate) fn gate(&mut self, vector: u8, handler: u64, dpl: u64) {
        let low = (handler & 0xffff)
            | u64::from(selector::CODE64) << 16
            | (0x8e | dpl << 5) << 40
            | (handler >> 16 & 0xffff) << 48;
        self.words(at::IDT_LONG + 16 * u64::from(vector), &[low, handler >> 32]);
    }
}

/// Code for `bits` mode at offset `at` in CS.
pub(crate) fn assemble(bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler) -> Written) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("16, 32 or 64");
    write(&mut a).and_then(|()| a.assemble(at)).expect("a guest's code assembles")
}

/// The BIOS and the tables: reset vector, every CPU through real mode into 32-bit protected mode, CPU 0 to `MAIN`, the
/// others to `SECONDARY`.
pub(crate) fn bootstrap() -> Image {
    let mut image = Image::default();
    let (mut start, mut secondary, mut handler) = (0, 0, 0);
    // Three pieces one behind the other.
    let mut bios = Vec::new();
    let mut add = |offset: &mut u64, write: &dyn Fn(&mut CodeAssembler) -> Written| {
        *offset = bios.len() as u64;
        bios.extend(assemble(16, *offset, write));
    };
    add(&mut handler, &|a| {
        a.lock().inc(dword_ptr(at::WOKEN))?;
        a.iret()
    });
    add(&mut secondary, &|a| {
        real_mode_stack(a)?;
        a.lock().inc(dword_ptr(at::READY))?;
        a.sti()?;
        a.nop()?;
        a.hlt()?;
        a.cli()?;
        enter_protected_mode(a, at::SECONDARY)
    });
    add(&mut start, &|a| boot_others(a, secondary));
    image.data(at::BIOS, &bios);
    // The reset vector: CS selector F000, base F0000, IP FFF0.
    image.data(at::BIOS + 0xfff0, &assemble(16, 0xfff0, |a| a.jmp_far(0xf000, start as u32)));
    image.words(at::IVT + 4 * u64::from(REAL_VECTOR), &[0xf000 << 16 | handler]);
    tables(&mut image);
    // A CPU that is not told otherwise waits for ever.
    image.code(32, at::SECONDARY, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    image
}

fn tables(image: &mut Image) {
    // SDM Vol. 3 "Segment Descriptors": base 0, limit 4 GiB; access byte and flags as named.
    let flat = |access: u64, flags: u64| 0xffff | access << 40 | 0xf << 48 | flags << 52;
    let mut gdt = [0; 16];
    let mut set = |selector: u16, descriptor| gdt[usize::from(selector >> 3)] = descriptor;
    set(selector::CODE32, flat(0x9b, 0xc));
    set(selector::DATA, flat(0x93, 0xc));
    set(selector::CODE64, flat(0x9b, 0xa));
    set(selector::USER_CODE64, flat(0xfb, 0xa));
    set(selector::USER_DATA, flat(0xf3, 0xc));
    for cpu in 0..MAX_CPUS as u64 {
        // An available 64-bit TSS of 0x68 bytes; RSP0 at byte 4.
        let tss = at::TSS + 0x100 * cpu;
        set(selector::TSS + 16 * cpu as u16, 0x67 | (tss & 0xffff) << 16 | 0x89 << 40);
        let stack = at::STACKS + 0x1000 * cpu - 0x400;
        image.data(tss + 4, &stack.to_le_bytes());
    }
    image.words(at::GDT, &gdt);
    let pseudo = |limit: u64, base: u64| limit | base << 16;
    image.words(at::GDTR, &[pseudo(8 * gdt.len() as u64 - 1, at::GDT)]);
    image.words(at::IDTR, &[pseudo(0x7ff, at::IVT)]);
    image.words(at::IDTR_LONG, &[pseudo(0xfff, at::IDT_LONG)]);

    let all = pte::P | pte::RW | pte::US;
    image.words(at::PML4, &[at::PDPT | all]);
    image.words(at::PDPT, &[at::PD | all, at::MAPPED_PD | all]);
    let large: Vec<u64> = (0..512).map(|n| n << 21 | pte::P | pte::RW | pte::PS).collect();
    image.words(at::PD, &large);
    image.words(at::MAPPED_PD, &[at::MAPPED_PT | all]);
}

fn real_mode_stack(a: &mut CodeAssembler) -> Written {
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)?;
    // 0x7000 less 0x400 per CPU.
    in32(a, port::OWN_ID)?;
    a.shl(eax, 10)?;
    a.mov(sp, 0x7000)?;
    a.sub(sp, ax)
}

fn boot_others(a: &mut CodeAssembler, secondary: u64) -> Written {
    real_mode_stack(a)?;
    out32(a, port::IPI_VECTOR, REAL_VECTOR.into())?;
    out32(a, port::START_ADDRESS, secondary as u32)?;
    in32(a, port::CPUS)?;
    a.mov(dword_ptr(at::CPUS), eax)?;
    a.mov(ebx, 1)?;
    let (mut next, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut next)?;
    a.cmp(ebx, dword_ptr(at::CPUS))?;
    a.jae(done)?;
    for (port, word) in [(port::START, at::READY), (port::IPI, at::WOKEN)] {
        a.mov(eax, ebx)?;
        a.mov(dx, u32::from(port))?;
        a.out(dx, eax)?;
        // Without an exit: the other CPU must run at the same time.
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.cmp(dword_ptr(word), ebx)?;
        a.jb(spin)?;
    }
    a.inc(ebx)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    enter_protected_mode(a, at::MAIN)
}

fn enter_protected_mode(a: &mut CodeAssembler, target: u64) -> Written {
    a.lidt(fword_ptr(at::IDTR))?;
    a.lgdt(fword_ptr(at::GDTR))?;
    a.mov(eax, cr0)?;
    a.or(eax, 1)?;
    a.mov(cr0, eax)?;
    a.add_instruction(Instruction::with_far_branch(Code::Jmp_ptr1632, selector::CODE32, target as u32)?)
}

/// `IN EAX, port`
pub(crate) fn in32(a: &mut CodeAssembler, port: u16) -> Written {
    a.mov(dx, u32::from(port))?;
    a.in_(eax, dx)
}

/// `OUT port, EAX` with a constant.
pub(crate) fn out32(a: &mut CodeAssembler, port: u16, value: u32) -> Written {
    a.mov(eax, value)?;
    a.mov(dx, u32::from(port))?;
    a.out(dx, eax)
}

/// Prints a constant text; changes AL.
pub(crate) fn print(a: &mut CodeAssembler, text: &str) -> Written {
    text.bytes().try_for_each(|byte| {
        a.mov(al, u32::from(byte))?;
        a.out(u32::from(port::SERIAL), al)
    })
}

/// Tells the VMM that the guest is done, and does nothing more.
pub(crate) fn end(a: &mut CodeAssembler) -> Written {
    let mut again = a.create_label();
    a.nop()?; // An instruction has one label at most; this one is for a label of the caller's.
    a.set_label(&mut again)?;
    a.out(u32::from(port::END), al)?;
    a.jmp(again)
}

/// Data segments and a stack for 32-bit code.
pub(crate) fn flat_segments(a: &mut CodeAssembler) -> Written {
    a.mov(eax, u32::from(selector::DATA))?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)
}

/// `bootstrap`, then 32-bit `main` on CPU 0.
pub(crate) fn protected(main: impl FnOnce(&mut CodeAssembler) -> Written) -> Image {
    let mut image = bootstrap();
    image.code(32, at::MAIN, |a| {
        flat_segments(a)?;
        a.mov(esp, at::STACKS as u32)?;
        main(a)
    });
    image
}

/// `bootstrap`, then long mode: 64-bit `main` on CPU 0. The others, once CPU 0 interrupts them for the first time, come
/// to long mode as well, do `secondary` and halt with interrupts on.
pub(crate) fn long(
    main: impl FnOnce(&mut CodeAssembler) -> Written,
    secondary: impl FnOnce(&mut CodeAssembler) -> Written,
) -> Image {
    let mut image = bootstrap();
    image.code(32, at::MAIN, |a| enter_long_mode(a, at::LONG_MAIN));
    image.code(32, at::SECONDARY, |a| {
        a.hlt()?;
        enter_long_mode(a, at::LONG_MAIN)
    });
    image.code(64, at::LONG_MAIN, |a| {
        let mut other = a.create_label();
        a.lidt(ptr(at::IDTR_LONG))?;
        in32(a, port::OWN_ID)?;
        a.mov(ebx, eax)?;
        a.shl(eax, 4)?;
        a.add(eax, u32::from(selector::TSS))?;
        a.ltr(eax)?;
        a.xor(eax, eax)?;
        a.mov(ss, eax)?;
        a.mov(eax, ebx)?;
        a.shl(eax, 12)?;
        a.lea(rsp, qword_ptr(rax + at::STACKS))?;
        a.test(ebx, ebx)?;
        a.jnz(other)?;
        main(a)?;
        a.set_label(&mut other)?;
        secondary(a)?;
        a.lock().inc(dword_ptr(at::IN_LONG_MODE))?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(again)
    });
    print_decimal(&mut image);
    ipi_handler(&mut image);
    image.gate(VECTOR, at::IPI_HANDLER, 0);
    image.code(64, at::WAKE_HANDLER, |a| a.iretq());
    image.gate(WAKE_VECTOR, at::WAKE_HANDLER, 0);
    image
}

fn enter_long_mode(a: &mut CodeAssembler, target: u64) -> Written {
    flat_segments(a)?;
    a.mov(eax, cr4)?;
    a.or(eax, 1 << 5)?; // PAE
    a.mov(cr4, eax)?;
    a.mov(eax, at::PML4 as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, 0xc000_0080_u32)?;
    a.rdmsr()?;
    a.or(eax, 1 << 8)?; // EFER.LME, though CPUID says nothing of it.
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, 1 << 31)?; // PG
    a.mov(cr0, eax)?;
    a.jmp_far(selector::CODE64, target as u32)
}

/// Prints RAX; changes RAX, RCX, RDX.
fn print_decimal(image: &mut Image) {
    image.code(64, at::PRINT_DECIMAL, |a| {
        let (mut digit, mut show) = (a.create_label(), a.create_label());
        a.mov(rcx, 0u64)?;
        a.set_label(&mut digit)?;
        a.xor(edx, edx)?;
        a.push(rbx)?;
        a.mov(ebx, 10)?;
        a.div(rbx)?;
        a.pop(rbx)?;
        a.push(rdx)?;
        a.inc(ecx)?;
        a.test(rax, rax)?;
        a.jnz(digit)?;
        a.set_label(&mut show)?;
        a.pop(rax)?;
        a.add(al, i32::from(b'0'))?;
        a.out(u32::from(port::SERIAL), al)?;
        a.dec(ecx)?;
        a.jnz(show)?;
        a.ret()
    });
}

/// Calls what `FUNCTION` says, if anything, and counts it. Functions may change RAX, RCX and RDX.
fn ipi_handler(image: &mut Image) {
    image.code(64, at::IPI_HANDLER, |a| {
        let mut nothing = a.create_label();
        a.push(rax)?;
        a.push(rcx)?;
        a.push(rdx)?;
        a.mov(rax, qword_ptr(at::FUNCTION))?;
        a.test(rax, rax)?;
        a.jz(nothing)?;
        a.call(rax)?;
        a.lock().inc(dword_ptr(at::CALLED))?;
        a.set_label(&mut nothing)?;
        a.pop(rdx)?;
        a.pop(rcx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// Brings every other CPU to long mode and waits until all are there. Interrupts CPU after CPU; changes EAX, EBX, EDX.
pub(crate) fn wake_others(a: &mut CodeAssembler) -> Written {
    out32(a, port::IPI_VECTOR, WAKE_VECTOR.into())?;
    each_other(a, |a| {
        interrupt_ebx(a)?;
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.cmp(dword_ptr(at::IN_LONG_MODE), ebx)?;
        a.jb(spin)
    })?;
    out32(a, port::IPI_VECTOR, VECTOR.into())
}

/// Interrupts the CPU whose number is in EBX; changes EAX and EDX.
pub(crate) fn interrupt_ebx(a: &mut CodeAssembler) -> Written {
    a.mov(eax, ebx)?;
    a.mov(edx, u32::from(port::IPI))?;
    a.out(dx, eax)
}

/// `body` for EBX from 1 to the last CPU.
pub(crate) fn each_other(a: &mut CodeAssembler, body: impl FnOnce(&mut CodeAssembler) -> Written) -> Written {
    let (mut next, mut done) = (a.create_label(), a.create_label());
    a.mov(ebx, 1)?;
    a.set_label(&mut next)?;
    a.cmp(ebx, dword_ptr(at::CPUS))?;
    a.jae(done)?;
    body(a)?;
    a.inc(ebx)?;
    a.jmp(next)?;
    a.set_label(&mut done)?;
    a.nop() // As in `end`.
}
