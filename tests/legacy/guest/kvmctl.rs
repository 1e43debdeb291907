//! Counterparts of kvmctl's own test guests: what each exercises is what the original did, the code is not.

use iced_x86::code_asm::*;

use super::*;
use crate::kvmctl::port;

/// Interrupts between CPUs: each other CPU says that it runs, then every CPU is told to call a function, in order.
pub(crate) fn smp() -> Image {
    const CALLED: u64 = at::HANDLERS;
    let mut image = long(
        |a| {
            wake_others(a)?;
            print(a, "found ")?;
            a.mov(eax, dword_ptr(at::CPUS))?;
            a.call(at::PRINT_DECIMAL)?;
            print(a, " cpus\n")?;
            a.mov(rax, CALLED)?;
            a.call(rax)?;
            a.mov(rax, CALLED)?;
            a.mov(qword_ptr(at::FUNCTION), rax)?;
            each_other(a, |a| {
                interrupt_ebx(a)?;
                let mut spin = a.create_label();
                a.set_label(&mut spin)?;
                a.cmp(dword_ptr(at::CALLED), ebx)?;
                a.jb(spin)
            })?;
            end(a)
        },
        |a| {
            print(a, "smp main ")?;
            in32(a, port::OWN_ID)?;
            a.call(at::PRINT_DECIMAL)?;
            print(a, "\n")
        },
    );
    image.code(64, CALLED, |a| {
        print(a, "ipi called, cpu ")?;
        in32(a, port::OWN_ID)?;
        a.call(at::PRINT_DECIMAL)?;
        print(a, "\n")?;
        a.ret()
    });
    image
}

/// CPUIDs that `vmexit` executes.
pub(crate) const VMEXITS: u32 = 1 << 22;

/// CPUID leaves guest mode and comes back; RDTSC says how long it takes. Nobody called `KVM_SET_CPUID`: all zeros.
pub(crate) fn vmexit() -> Image {
    long(
        |a| {
            a.xor(edi, edi)?;
            a.mov(ebp, VMEXITS)?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.lea(rsi, qword_ptr(rax + rdx))?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(eax, ebp)?;
            a.cpuid()?;
            for register in [eax, ebx, ecx, edx] {
                a.or(edi, register)?;
            }
            a.dec(ebp)?;
            a.jnz(again)?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.sub(rax, rsi)?;
            a.mov(rsi, rax)?;
            print(a, "vmexit latency: ")?;
            a.mov(rax, rsi)?;
            a.shr(rax, VMEXITS.trailing_zeros())?;
            a.call(at::PRINT_DECIMAL)?;
            print(a, "\ncpuid: ")?;
            a.mov(eax, edi)?;
            a.call(at::PRINT_DECIMAL)?;
            print(a, "\n")?;
            end(a)
        },
        |_| Ok(()),
    )
}

/// Numbers that the first two sieves look at, and primes among them: π(10⁶).
pub(crate) const SIEVE: (u64, u64) = (1_000_000, 78_498);
/// The same of the last one: π(10⁷) and, as in 2007, π(10⁸).
pub(crate) const LAST_SIEVE: [(u64, u64); 2] = [(10_000_000, 664_579), (100_000_000, 5_761_455)];

/// The sieve of Eratosthenes: in memory mapped one to one; in fresh 4 KiB mappings, twice over `mapped`; and in mappings
/// at the top of the linear addresses, of `numbers` bytes. A byte per number.
pub(crate) fn sieve(numbers: u64) -> Image {
    const FUNCTION: u64 = at::HANDLERS;
    const STRINGS: u64 = at::HANDLERS + 0x800;
    const STATIC: u64 = 2 << 20;
    // New paging structures, and the memory that they map.
    const TABLES: u64 = 0x30_0000;
    const FRAMES: u64 = 0x100_0000;
    const TOP: u64 = 0xffff_ffff_f800_0000;
    let texts: [(&str, u64); 4] =
        [("starting sieve\n", 0), ("static: ", 0x20), ("mapped: ", 0x40), ("virtual: ", 0x60)];
    let pages = |bytes: u64| bytes.div_ceil(0x1000);
    let mut image = long(
        |a| {
            // OUTSB without REP, a byte at a time.
            let say = |a: &mut CodeAssembler, text: usize| {
                let mut again = a.create_label();
                a.mov(rsi, STRINGS + texts[text].1)?;
                a.mov(ecx, texts[text].0.len() as u32)?;
                a.mov(edx, u32::from(port::SERIAL))?;
                a.set_label(&mut again)?;
                a.outsb()?;
                a.dec(ecx)?;
                a.jnz(again)
            };
            let count = |a: &mut CodeAssembler, array: u64, numbers: u64| {
                a.mov(rdi, array)?;
                a.mov(rsi, numbers)?;
                a.call(FUNCTION)?;
                a.call(at::PRINT_DECIMAL)?;
                print(a, "\n")
            };
            // `pages` 4 KiB pages of FRAMES: entries from RDI on.
            let fill = |a: &mut CodeAssembler, entries: u64, count: u64, step: u64, from: u64| {
                let mut again = a.create_label();
                a.mov(rdi, entries)?;
                a.mov(rcx, count)?;
                a.mov(rax, from | pte::P | pte::RW)?;
                a.set_label(&mut again)?;
                a.mov(qword_ptr(rdi), rax)?;
                a.add(rdi, 8)?;
                a.add(rax, step as i32)?;
                a.dec(rcx)?;
                a.jnz(again)
            };
            say(a, 0)?;
            say(a, 1)?;
            count(a, STATIC, SIEVE.0)?;
            // PML4 at TABLES: entry 0 as it was, entry 511 new. TABLES + 1000: its PDPT. + 2000: directory of the top GiB.
            // From + 4000 on: page tables.
            a.mov(rax, qword_ptr(at::PML4))?;
            a.mov(qword_ptr(TABLES), rax)?;
            fill(a, TABLES + 8 * 511, 1, 0, TABLES + 0x1000)?;
            fill(a, TABLES + 0x1000 + 8 * 511, 1, 0, TABLES + 0x2000)?;
            let tables = pages(numbers).div_ceil(512);
            fill(a, TABLES + 0x2000 + 8 * (TOP >> 21 & 511), tables, 0x1000, TABLES + 0x4000)?;
            fill(a, TABLES + 0x4000, pages(numbers), 0x1000, FRAMES)?;
            // The table behind MAPPED has room for 512 pages.
            fill(a, at::MAPPED_PT, pages(SIEVE.0), 0x1000, FRAMES)?;
            a.mov(eax, TABLES as u32)?;
            a.mov(cr3, rax)?;
            print(a, "paging enabled\n")?;
            for _ in 0..2 {
                say(a, 2)?;
                count(a, MAPPED, SIEVE.0)?;
            }
            say(a, 3)?;
            count(a, TOP, numbers)?;
            end(a)
        },
        |_| Ok(()),
    );
    for (text, offset) in texts {
        image.data(STRINGS + offset, text.as_bytes());
    }
    // RAX ← primes below RSI, with the RSI bytes at RDI.
    image.code(64, FUNCTION, |a| {
        let (mut number, mut next, mut strike, mut done) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.xor(eax, eax)?;
        a.mov(rcx, rsi)?;
        a.mov(rdx, rdi)?;
        a.rep().stosb()?;
        a.mov(rdi, rdx)?;
        a.mov(ecx, 2)?;
        a.set_label(&mut number)?;
        a.cmp(rcx, rsi)?;
        a.jae(done)?;
        a.cmp(byte_ptr(rdi + rcx), 0)?;
        a.jne(next)?;
        a.inc(rax)?;
        a.lea(rdx, qword_ptr(rcx + rcx))?;
        a.set_label(&mut strike)?;
        a.cmp(rdx, rsi)?;
        a.jae(next)?;
        a.mov(byte_ptr(rdi + rdx), 1)?;
        a.add(rdx, rcx)?;
        a.jmp(strike)?;
        a.set_label(&mut next)?;
        a.inc(rcx)?;
        a.jmp(number)?;
        a.set_label(&mut done)?;
        a.ret()
    });
    image
}

/// Combinations that `access` tries: bits 0 to 2 are P, R/W and U/S of the page, 3 and 4 its A and D, 5: a write, 6: by
/// user code, 7: CR0.WP.
pub(crate) const ACCESSES: u64 = 256;
/// Results of `access`, 32 bytes for each: error code of the #PF or −1, CR2, page entry afterwards, 0.
pub(crate) const ACCESS_RESULTS: u64 = 0x2_0000;
/// Frame of the page that is accessed.
pub(crate) const ACCESS_FRAME: u64 = 0x20_0000;

/// All combinations of rights against all kinds of data access.
pub(crate) fn access() -> Image {
    const USER_FRAME: u64 = 0x20_1000;
    const USER_CODE: u64 = MAPPED + 0x1000;
    const USER_STACK: u64 = MAPPED + 0x3000;
    const PAGE_FAULT: u64 = at::HANDLERS;
    const LEAVE_USER: u64 = at::HANDLERS + 0x100;
    // R12: combination. RSI: address. R13: where kernel code goes on, on stack R14. R15: behind the access.
    let touch = |a: &mut CodeAssembler| {
        let (mut write, mut done) = (a.create_label(), a.create_label());
        a.lea(r15, ptr(done))?;
        a.test(r12d, 1 << 5)?;
        a.jnz(write)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.jmp(done)?;
        a.set_label(&mut write)?;
        a.mov(qword_ptr(rsi), rax)?;
        a.set_label(&mut done)
    };
    let mut image = long(
        |a| {
            let (mut again, mut user, mut back) = (a.create_label(), a.create_label(), a.create_label());
            print(a, "starting test\n\nrun\n")?;
            a.xor(r12d, r12d)?;
            a.mov(rsi, MAPPED)?;
            a.mov(r14, rsp)?;
            a.lea(r13, ptr(back))?;
            a.set_label(&mut again)?;
            // The entry: A and D two bits higher than in the combination.
            a.mov(eax, r12d)?;
            a.and(eax, 7)?;
            a.mov(ecx, r12d)?;
            a.and(ecx, 0x18)?;
            a.shl(ecx, 2)?;
            a.lea(eax, dword_ptr(rax + rcx + ACCESS_FRAME))?;
            a.mov(qword_ptr(at::MAPPED_PT), rax)?;
            a.invlpg(byte_ptr(rsi))?;
            a.mov(rax, cr0)?;
            a.btr(eax, 16)?;
            a.mov(ecx, r12d)?;
            a.and(ecx, 1 << 7)?;
            a.shl(ecx, 9)?;
            a.or(rax, rcx)?;
            a.mov(cr0, rax)?;
            // The result's place.
            a.mov(rbx, r12)?;
            a.shl(rbx, 5)?;
            a.add(rbx, ACCESS_RESULTS as i32)?;
            a.mov(qword_ptr(rbx), -1)?;
            a.test(r12d, 1 << 6)?;
            a.jnz(user)?;
            touch(a)?;
            a.jmp(back)?;
            a.set_label(&mut user)?;
            a.push(i32::from(selector::USER_DATA))?;
            a.mov(rax, USER_STACK)?;
            a.push(rax)?;
            a.push(2)?;
            a.push(i32::from(selector::USER_CODE64))?;
            a.mov(rax, USER_CODE)?;
            a.push(rax)?;
            a.iretq()?;
            a.set_label(&mut back)?;
            a.mov(rax, qword_ptr(at::MAPPED_PT))?;
            a.mov(qword_ptr(rbx + 16), rax)?;
            a.inc(r12d)?;
            a.cmp(r12d, ACCESSES as i32)?;
            a.jb(again)?;
            end(a)
        },
        |_| Ok(()),
    );
    let user = pte::P | pte::RW | pte::US;
    image.words(at::MAPPED_PT + 8, &[USER_FRAME | user, (USER_FRAME + 0x1000) | user]);
    image.data(
        USER_FRAME,
        &assemble(64, USER_CODE, |a| {
            touch(a)?;
            a.int(u32::from(VECTOR) + 2)
        }),
    );
    image.code(64, PAGE_FAULT, |a| {
        a.pop(qword_ptr(rbx))?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(qword_ptr(rsp), r15)?;
        a.iretq()
    });
    image.gate(14, PAGE_FAULT, 0);
    image.code(64, LEAVE_USER, |a| {
        a.mov(rsp, r14)?;
        a.xor(eax, eax)?;
        a.mov(ss, eax)?;
        a.jmp(r13)
    });
    image.gate(VECTOR + 2, LEAVE_USER, 3);
    image
}

/// REP OUTSB, up and then down.
pub(crate) fn stringio() -> Image {
    const TEXT: u64 = at::HANDLERS;
    let (up, down) = (b"forward", b"backward");
    let mut image = protected(|a| {
        a.cld()?;
        a.mov(esi, TEXT as u32)?;
        a.mov(ecx, up.len() as u32)?;
        a.mov(edx, 1)?;
        a.rep().outsb()?;
        a.std()?;
        a.mov(esi, (TEXT + 0x80) as u32 + down.len() as u32 - 1)?;
        a.mov(ecx, down.len() as u32)?;
        a.mov(edx, 2)?;
        a.rep().outsb()?;
        end(a)
    });
    image.data(TEXT, up);
    image.data(TEXT + 0x80, down);
    image
}

/// Interrupts by software and by the VMM, with IF set and clear, in long mode.
pub(crate) fn irq() -> Image {
    const COUNT: u64 = at::SCRATCH;
    const HANDLER: u64 = at::HANDLERS;
    let mut image = long(
        |a| {
            let mut failed = a.create_label();
            print(a, "irq test\n")?;
            a.int(u32::from(VECTOR) + 2)?;
            a.cmp(dword_ptr(COUNT), 1)?;
            a.jne(failed)?;
            print(a, "software interrupt\n")?;
            a.sti()?;
            a.mov(al, u32::from(VECTOR) + 2)?;
            a.out(u32::from(port::INTERRUPT), al)?;
            a.mov(ebx, dword_ptr(COUNT))?;
            a.cmp(ebx, 2)?;
            a.jne(failed)?;
            print(a, "interrupt with IF set\n")?;
            a.cli()?;
            a.mov(al, u32::from(VECTOR) + 2)?;
            a.out(u32::from(port::INTERRUPT), al)?;
            a.nop()?;
            a.mov(ebx, dword_ptr(COUNT))?;
            a.sti()?;
            // In the shadow of STI: not yet.
            a.mov(esi, dword_ptr(COUNT))?;
            a.mov(edi, dword_ptr(COUNT))?;
            a.cli()?;
            for (register, count) in [(ebx, 2), (esi, 2), (edi, 3)] {
                a.cmp(register, count)?;
                a.jne(failed)?;
            }
            print(a, "interrupt behind the instruction that follows STI\n")?;
            end(a)?;
            a.set_label(&mut failed)?;
            print(a, "not as expected\n")?;
            end(a)
        },
        |_| Ok(()),
    );
    image.code(64, HANDLER, |a| {
        a.inc(dword_ptr(COUNT))?;
        a.iretq()
    });
    image.gate(VECTOR + 2, HANDLER, 0);
    image
}

/// Values that `simple` writes, downwards from 0xff.
pub(crate) const SIMPLE: u32 = 24;

/// Tight loops that grow, and a port.
pub(crate) fn simple() -> Image {
    protected(|a| {
        let (mut next, mut wait) = (a.create_label(), a.create_label());
        a.mov(ebx, 1)?;
        a.mov(al, 0xff)?;
        a.set_label(&mut next)?;
        a.mov(ecx, ebx)?;
        a.shl(ecx, 14)?;
        a.set_label(&mut wait)?;
        a.loop_(wait)?;
        a.out(0x80, al)?;
        a.dec(al)?;
        a.inc(ebx)?;
        a.cmp(ebx, SIMPLE as i32)?;
        a.jbe(next)?;
        end(a)
    })
}

/// Touches every page from 0x1000 up, says so at every fourth, and runs into the hole at 640 KiB.
pub(crate) fn memtest1() -> Image {
    protected(|a| {
        let (mut page, mut quiet) = (a.create_label(), a.create_label());
        a.mov(edi, 0x1000)?;
        // What lies below 64 KiB is in use: it is written back.
        a.set_label(&mut page)?;
        a.mov(ecx, dword_ptr(edi))?;
        a.mov(dword_ptr(edi), ecx)?;
        a.mov(ecx, edi)?;
        a.add(edi, 0x1000)?;
        a.and(ecx, 0x3000)?;
        a.jnz(quiet)?;
        a.xor(eax, eax)?;
        a.out(0x80, al)?;
        a.set_label(&mut quiet)?;
        a.cmp(edi, crate::kvmctl::HOLE.start as i32)?;
        a.jb(page)?;
        a.mov(dword_ptr(edi), 0x1234_5678)?;
        end(a)
    })
}
