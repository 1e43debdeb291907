//! How fast the core alone runs tight loops: 64-bit mode, paging on, no daemon, no VMM. Prints guest MIPS of each loop.
//!
//! `dispatch [NAME…]`: only the loops whose name contains one of these. Time is the thread's CPU time, the best of five
//! rounds, so that a busy machine shows little.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cpu_core::{Cpu, Exit, HostPlatform, Regs, Segment, Sregs};
use iced_x86::code_asm::*;
use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr};

/// Guest RAM: one slot, mapped one to one.
const RAM: u64 = 0x80_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x8_0000;
const DATA: u64 = 0x10_0000;
const DATA_2: u64 = 0x20_0000;
const ROUNDS: u32 = 5;

/// A loop: what it is called, and its code, which ends in HLT.
type Kernel = (&'static str, fn(&mut CodeAssembler) -> Result<(), IcedError>);

const KERNELS: &[Kernel] = &[
    ("crc", crc),
    ("sieve", sieve),
    ("fib", fib),
    ("copy", copy),
    ("rep-copy", rep_copy),
    ("sort", sort),
    ("vm", vm),
    ("hash", hash),
    ("sse-copy", sse_copy),
    ("strlen", strlen),
    ("double", double),
    ("x87", x87),
];

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let mut product = 1.0f64;
    let mut count = 0;
    for (name, code) in KERNELS {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let mips = measure(*code).with_context(|| format!("the loop `{name}`"))?;
        println!("{name:<10} {mips:>8.0} MIPS");
        product *= mips;
        count += 1;
    }
    if count > 1 {
        println!("{:<10} {:>8.0} MIPS", "geomean", product.powf(1.0 / f64::from(count)));
    }
    Ok(())
}

/// Best of the rounds, in millions of guest instructions a second.
fn measure(code: fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Result<f64> {
    let mut assembler = CodeAssembler::new(64)?;
    code(&mut assembler)?;
    let bytes = assembler.assemble(CODE)?;
    let mut cpu = guest(&bytes)?;
    let mut best = 0f64;
    for _ in 0..ROUNDS {
        cpu.set_regs(&Regs { rip: CODE, rflags: 2, gpr: stack() });
        let (start, before) = (thread_time(), cpu.instructions());
        match cpu.run() {
            Exit::Hlt => {}
            exit => bail!("ended in {exit:?} at {:#x}", cpu.linear_rip()),
        }
        let time = thread_time() - start;
        best = best.max((cpu.instructions() - before) as f64 / time.as_secs_f64() / 1e6);
    }
    Ok(best)
}

fn stack() -> [u64; 16] {
    let mut gpr = [0; 16];
    gpr[4] = STACK;
    gpr
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock");
    Duration::new(now.tv_sec() as u64, now.tv_nsec() as u32)
}

/// A CPU in 64-bit mode over RAM that holds `code`, in 4-KByte pages.
fn guest(code: &[u8]) -> Result<Box<Cpu>> {
    let memory = Arc::new(Memory::new());
    let ram = Mapping::create("dispatch-bench", RAM)?;
    let put = |at: u64, value: u64| ram.write(at, &value.to_le_bytes()).context("inside RAM");
    put(PML4, PDPT | 3)?;
    put(PDPT, PD | 3)?;
    for table in 0..RAM >> 21 {
        put(PD + 8 * table, (PT + 0x1000 * table) | 3)?;
    }
    for page in 0..RAM >> 12 {
        put(PT + 8 * page, page << 12 | 3)?;
    }
    ram.write(CODE, code).context("inside RAM")?;
    memory
        .set_slot(SlotSpec {
            id: 0,
            gpa: GuestPhysAddr(0),
            len: RAM,
            flags: SlotFlags::default(),
            userspace_addr: 0,
            backing: Backing::new(ram, 0),
        })
        .map_err(|error| anyhow::anyhow!("{error:?}"))?;
    let mut cpu = Cpu::new(memory, Box::new(HostPlatform::default()), 46);
    let flat = |type_, selector| Segment {
        selector,
        limit: u32::MAX,
        type_,
        s: true,
        present: true,
        db: type_ == 3,
        l: type_ != 3,
        g: true,
        ..Segment::default()
    };
    let mut segments = [flat(3, 0x18); 6];
    segments[1] = flat(0xb, 0x10);
    cpu.set_sregs(&Sregs {
        segments,
        cr0: Cr0::PE | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG,
        cr3: PML4,
        cr4: Cr4::PAE | Cr4::OSFXSR,
        efer: Efer::LME | Efer::LMA,
        ..cpu.sregs()
    });
    Ok(cpu)
}

/// `body` so many times, counted in R9D, then HLT.
fn repeat(
    a: &mut CodeAssembler,
    times: u32,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(r9d, times)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.dec(r9d)?;
    a.jnz(again)?;
    a.hlt()
}

/// RSI and RDI to the two buffers.
fn buffers(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(esi, DATA as u32)?;
    a.mov(edi, DATA_2 as u32)
}

/// CRC-32 by table, as gcc compiles it: dependent loads, byte extraction.
fn crc(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut table, mut bit, mut skip) = (a.create_label(), a.create_label(), a.create_label());
    let mut inner = a.create_label();
    a.mov(r8d, DATA_2 as u32)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut table)?;
    a.mov(eax, ecx)?;
    a.mov(edx, 8)?;
    a.set_label(&mut bit)?;
    a.shr(eax, 1)?;
    a.jnc(skip)?;
    a.xor(eax, 0xedb8_8320u32 as i32)?;
    a.set_label(&mut skip)?;
    a.dec(edx)?;
    a.jnz(bit)?;
    a.mov(dword_ptr(r8 + rcx * 4), eax)?;
    a.inc(ecx)?;
    a.cmp(ecx, 256)?;
    a.jne(table)?;
    repeat(a, 200, |a| {
        a.mov(eax, -1)?;
        a.mov(esi, DATA as u32)?;
        a.lea(rdi, qword_ptr(rsi + 0x1_0000))?;
        a.set_label(&mut inner)?;
        a.movzx(edx, byte_ptr(rsi))?;
        a.add(rsi, 1)?;
        a.xor(edx, eax)?;
        a.movzx(edx, dl)?;
        a.shr(eax, 8)?;
        a.xor(eax, dword_ptr(r8 + rdx * 4))?;
        a.cmp(rsi, rdi)?;
        a.jne(inner)
    })
}

/// Primes below 512 Ki: byte stores with a stride, byte tests.
fn sieve(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let n = 0x8_0000;
    let mut clear = a.create_label();
    let (mut next, mut mark, mut skip, mut done) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    repeat(a, 20, |a| {
        a.mov(edi, DATA as u32)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut clear)?;
        a.mov(qword_ptr(rdi + rcx), 0)?;
        a.add(rcx, 8)?;
        a.cmp(rcx, n)?;
        a.jb(clear)?;
        a.mov(ecx, 2)?;
        a.set_label(&mut next)?;
        a.mov(rax, rcx)?;
        a.imul_2(rax, rcx)?;
        a.cmp(rax, n)?;
        a.jae(done)?;
        a.cmp(byte_ptr(rdi + rcx), 0)?;
        a.jne(skip)?;
        a.set_label(&mut mark)?;
        a.mov(byte_ptr(rdi + rax), 1)?;
        a.add(rax, rcx)?;
        a.cmp(rax, n)?;
        a.jb(mark)?;
        a.set_label(&mut skip)?;
        a.inc(rcx)?;
        a.jmp(next)?;
        a.set_label(&mut done)
    })
}

/// fib(32), recursive: calls, returns, pushes, pops.
fn fib(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut function, mut more, mut end) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(edi, 32)?;
    a.call(function)?;
    a.jmp(end)?;
    a.set_label(&mut function)?;
    a.cmp(edi, 1)?;
    a.ja(more)?;
    a.mov(eax, edi)?;
    a.ret()?;
    a.set_label(&mut more)?;
    a.push(rbp)?;
    a.push(rbx)?;
    a.mov(ebx, edi)?;
    a.lea(edi, dword_ptr(rdi - 1))?;
    a.call(function)?;
    a.mov(ebp, eax)?;
    a.lea(edi, dword_ptr(rbx - 2))?;
    a.call(function)?;
    a.add(eax, ebp)?;
    a.pop(rbx)?;
    a.pop(rbp)?;
    a.ret()?;
    a.set_label(&mut end)?;
    a.hlt()
}

/// A copy of 256 KiB by words, as a compiler unrolls it twice.
fn copy(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut word = a.create_label();
    repeat(a, 600, |a| {
        buffers(a)?;
        a.mov(ecx, 0x4_0000 / 16)?;
        a.set_label(&mut word)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(rdx, qword_ptr(rsi + 8))?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(qword_ptr(rdi + 8), rdx)?;
        a.add(rsi, 16)?;
        a.add(rdi, 16)?;
        a.dec(rcx)?;
        a.jnz(word)
    })
}

/// REP MOVSB of 256 bytes, the size of most copies: what a string instruction costs.
fn rep_copy(a: &mut CodeAssembler) -> Result<(), IcedError> {
    repeat(a, 3_000_000, |a| {
        buffers(a)?;
        a.mov(ecx, 256)?;
        a.rep().movsb()
    })
}

/// Insertion sort of pseudo-random words: branches that nobody predicts.
fn sort(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut fill, mut outer) = (a.create_label(), a.create_label());
    let (mut inner, mut place) = (a.create_label(), a.create_label());
    a.mov(r10d, 12345)?;
    repeat(a, 60, |a| {
        a.mov(edi, DATA as u32)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut fill)?;
        a.imul_3(r10d, r10d, 1_103_515_245)?;
        a.add(r10d, 12345)?;
        a.mov(eax, r10d)?;
        a.shr(eax, 8)?;
        a.mov(dword_ptr(rdi + rcx * 4), eax)?;
        a.inc(ecx)?;
        a.cmp(ecx, 1000)?;
        a.jne(fill)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut outer)?;
        a.mov(eax, dword_ptr(rdi + rcx * 4))?;
        a.mov(edx, ecx)?;
        a.set_label(&mut inner)?;
        a.mov(esi, dword_ptr(rdi + rdx * 4 - 4))?;
        a.cmp(esi, eax)?;
        a.jbe(place)?;
        a.mov(dword_ptr(rdi + rdx * 4), esi)?;
        a.dec(edx)?;
        a.jnz(inner)?;
        a.set_label(&mut place)?;
        a.mov(dword_ptr(rdi + rdx * 4), eax)?;
        a.inc(ecx)?;
        a.cmp(ecx, 1000)?;
        a.jne(outer)
    })
}

/// A bytecode interpreter: indirect jumps through a table, four opcodes.
fn vm(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut fill, mut step) = (a.create_label(), a.create_label());
    let mut cases: Vec<CodeLabel> = (0..4).map(|_| a.create_label()).collect();
    let mut end = a.create_label();
    a.mov(r8d, DATA as u32)?;
    for (i, case) in cases.iter().enumerate() {
        a.lea(rax, qword_ptr(*case))?;
        a.mov(qword_ptr(r8 + 8 * i as i32), rax)?;
    }
    // A program of 1024 opcodes.
    a.mov(r11d, DATA_2 as u32)?;
    a.xor(ecx, ecx)?;
    a.mov(eax, 1)?;
    a.set_label(&mut fill)?;
    a.imul_3(eax, eax, 1_103_515_245)?;
    a.add(eax, 12345)?;
    a.mov(edx, eax)?;
    a.shr(edx, 20)?;
    a.and(edx, 3)?;
    a.mov(byte_ptr(r11 + rcx), dl)?;
    a.inc(ecx)?;
    a.cmp(ecx, 1024)?;
    a.jne(fill)?;
    repeat(a, 20_000, |a| {
        a.xor(ecx, ecx)?;
        a.set_label(&mut step)?;
        a.movzx(edx, byte_ptr(r11 + rcx))?;
        a.inc(rcx)?;
        a.jmp(qword_ptr(r8 + rdx * 8))?;
        for (i, case) in cases.iter_mut().enumerate() {
            a.set_label(case)?;
            match i {
                0 => a.add(rax, rcx)?,
                1 => a.xor(rax, rdx)?,
                2 => a.rol(rax, 3)?,
                _ => a.sub(rax, 7)?,
            }
            a.cmp(rcx, 1024)?;
            a.jb(step)?;
            if i < 3 {
                a.jmp(end)?;
            }
        }
        a.set_label(&mut end)
    })
}

/// A 64-bit mix over a buffer: multiplies, shifts, xors.
fn hash(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut word = a.create_label();
    a.mov(r8, 0x9e37_79b9_7f4a_7c15u64)?;
    repeat(a, 400, |a| {
        a.mov(esi, DATA as u32)?;
        a.mov(ecx, 0x1000)?;
        a.set_label(&mut word)?;
        a.xor(rax, qword_ptr(rsi))?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.xor(rax, rdx)?;
        a.imul_2(rax, r8)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 29)?;
        a.xor(rax, rdx)?;
        a.add(rsi, 8)?;
        a.sub(ecx, 1)?;
        a.jne(word)
    })
}

/// Copies 256 KiB with MOVUPS and MOVAPS, four to a round.
fn sse_copy(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut copy = a.create_label();
    repeat(a, 100, |a| {
        a.xor(ecx, ecx)?;
        buffers(a)?;
        a.set_label(&mut copy)?;
        a.movups(xmm0, xmmword_ptr(rsi + rcx))?;
        a.movups(xmm1, xmmword_ptr(rsi + rcx + 16))?;
        a.movups(xmm2, xmmword_ptr(rsi + rcx + 32))?;
        a.movups(xmm3, xmmword_ptr(rsi + rcx + 48))?;
        a.movaps(xmmword_ptr(rdi + rcx), xmm0)?;
        a.movaps(xmmword_ptr(rdi + rcx + 16), xmm1)?;
        a.movaps(xmmword_ptr(rdi + rcx + 32), xmm2)?;
        a.movaps(xmmword_ptr(rdi + rcx + 48), xmm3)?;
        a.add(rcx, 64)?;
        a.cmp(rcx, 0x4_0000)?;
        a.jb(copy)
    })
}

/// The inner loop of strlen: compare, mask, test.
fn strlen(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut scan, mut found) = (a.create_label(), a.create_label());
    a.pcmpeqb(xmm1, xmm1)?;
    a.mov(edi, DATA as u32)?;
    a.xor(ecx, ecx)?;
    let mut fill = a.create_label();
    a.set_label(&mut fill)?;
    a.movaps(xmmword_ptr(rdi + rcx), xmm1)?;
    a.add(rcx, 16)?;
    a.cmp(rcx, 0x1_0000)?;
    a.jb(fill)?;
    a.mov(byte_ptr(rdi + rcx - 1), 0)?;
    a.pxor(xmm0, xmm0)?;
    repeat(a, 200, |a| {
        a.xor(ecx, ecx)?;
        a.set_label(&mut scan)?;
        a.movdqa(xmm1, xmmword_ptr(rdi + rcx))?;
        a.pcmpeqb(xmm1, xmm0)?;
        a.pmovmskb(eax, xmm1)?;
        a.test(eax, eax)?;
        a.jnz(found)?;
        a.add(rcx, 16)?;
        a.jmp(scan)?;
        a.set_label(&mut found)
    })
}

/// `y[i] += a * x[i]` in doubles, as gcc compiles it without vectors.
fn double(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.mov(eax, 3)?;
    a.cvtsi2sd(xmm2, eax)?;
    buffers(a)?;
    repeat(a, 400, |a| {
        a.xor(ecx, ecx)?;
        a.set_label(&mut next)?;
        a.movsd_2(xmm0, qword_ptr(rsi + rcx * 8))?;
        a.mulsd(xmm0, xmm2)?;
        a.addsd(xmm0, qword_ptr(rdi + rcx * 8))?;
        a.movsd_2(qword_ptr(rdi + rcx * 8), xmm0)?;
        a.inc(rcx)?;
        a.cmp(rcx, 0x1000)?;
        a.jb(next)
    })
}

/// The same in x87.
fn x87(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.fninit()?;
    a.fldpi()?;
    buffers(a)?;
    repeat(a, 100, |a| {
        a.xor(ecx, ecx)?;
        a.set_label(&mut next)?;
        a.fld(qword_ptr(rsi + rcx * 8))?;
        a.fmul_2(st0, st1)?;
        a.fadd(qword_ptr(rdi + rcx * 8))?;
        a.fstp(qword_ptr(rdi + rcx * 8))?;
        a.inc(rcx)?;
        a.cmp(rcx, 0x1000)?;
        a.jb(next)
    })
}
