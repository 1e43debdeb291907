//! What single things cost inside the guest: loops in guests of the tiny VMM, timed around `KVM_RUN`. Each row is the difference
//! of two loops, with the thing and without.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use iced_x86::IcedError;
use tiny_vmm::code_asm::*;
use tiny_vmm::{CODE, Guest, Mode, VcpuExit, assemble};

use crate::row::Row;

const TLB_HIT: &str = "load, TLB hit";
const TLB_MISS: &str = "load, TLB miss, the walk begins at the page directory";
const WALK: &str = "MOV CR3 and load, the whole walk";
const LOOKUP: &str = "indirect jump to one of 64 traces";
const DECODE: &str = "first run of an instruction: decode";
const FITTING: &str = "1.5 million instructions in turn, each, traces fit";
const BEYOND: &str = "6 million instructions in turn, each, traces do not fit";
const DELIVERY: &str = "INT and IRET, 32-bit";
pub(crate) const NAMES: &[&str] = &[TLB_HIT, TLB_MISS, WALK, LOOKUP, DECODE, FITTING, BEYOND, DELIVERY];

const MIB: usize = 1 << 20;
/// Behind code, stack and paging structures.
const DATA: u64 = 1 << 20;
const PAGE: u32 = 4096;
const ROUNDS: usize = 5;

type Write = Result<(), IcedError>;

/// On the /dev/kvm that is there.
pub(crate) fn measure() -> Result<Vec<Row>> {
    Ok(vec![
        nanoseconds(TLB_HIT, hit()?),
        nanoseconds(TLB_MISS, miss()?),
        nanoseconds(WALK, walk()?),
        nanoseconds(LOOKUP, lookup()?),
        nanoseconds(DECODE, decode()?),
        nanoseconds(FITTING, straight(1_500_000)?),
        nanoseconds(BEYOND, straight(6_000_000)?),
        nanoseconds(DELIVERY, delivery()?),
    ])
}

fn nanoseconds(name: &str, value: f64) -> Row {
    Row::new(name, "ns", Some(value), None)
}

/// Seconds of one `KVM_RUN` to its HLT.
fn seconds(guest: &mut Guest) -> Result<f64> {
    let started = Instant::now();
    match guest.run().context("KVM_RUN")? {
        VcpuExit::Hlt => Ok(started.elapsed().as_secs_f64()),
        other => bail!("an unexpected exit: {other:?}"),
    }
}

/// The shortest of some runs, behind one that decodes.
fn best(guest: &mut Guest) -> Result<f64> {
    let regs = guest.vcpu().get_regs().context("KVM_GET_REGS")?;
    let mut best = f64::INFINITY;
    for round in 0..=ROUNDS {
        guest.vcpu().set_regs(&regs).context("KVM_SET_REGS")?;
        let took = seconds(guest)?;
        if round > 0 {
            best = best.min(took);
        }
    }
    Ok(best)
}

/// `body` so many times, counted in ECX.
pub(crate) fn repeat(a: &mut CodeAssembler, times: u32, body: impl Fn(&mut CodeAssembler) -> Write) -> Write {
    let mut again = a.create_label();
    a.mov(ecx, times)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.dec(ecx)?;
    a.jnz(again)
}

/// A guest that does `prepare`, then `body` that many times.
fn looping(
    mode: Mode,
    ram: usize,
    times: u32,
    prepare: impl Fn(&mut CodeAssembler) -> Write,
    body: impl Fn(&mut CodeAssembler) -> Write,
) -> Result<Guest> {
    let code = assemble(mode, |a| {
        prepare(a)?;
        repeat(a, times, &body)?;
        a.hlt()
    })?;
    Guest::new(mode, ram, &code)
}

/// Nanoseconds of `with` beyond `without`, each in a loop of 64-bit mode.
fn difference(
    ram: usize,
    times: u32,
    with: impl Fn(&mut CodeAssembler) -> Write,
    without: impl Fn(&mut CodeAssembler) -> Write,
) -> Result<f64> {
    let prepare = |a: &mut CodeAssembler| {
        a.mov(rax, cr3)?;
        a.mov(esi, DATA as u32)
    };
    let with = best(&mut looping(Mode::Long, ram, times, prepare, with)?)?;
    let without = best(&mut looping(Mode::Long, ram, times, prepare, without)?)?;
    Ok((with - without) * 1e9 / f64::from(times))
}

fn hit() -> Result<f64> {
    const LOADS: i32 = 8;
    let loads = |a: &mut CodeAssembler| (0..LOADS).try_for_each(|i| a.mov(rdx, qword_ptr(rsi + 8 * i)));
    Ok(difference(2 * MIB, 2_000_000, loads, |_| Ok(()))? / f64::from(LOADS))
}

/// Round 32 MiB, a page each time: more pages than a TLB holds, and few page directory entries.
fn miss() -> Result<f64> {
    const MASK: i32 = (32 << 20) - 1;
    let next = |a: &mut CodeAssembler| {
        a.add(esi, PAGE as i32)?;
        a.and(esi, MASK)
    };
    let with = |a: &mut CodeAssembler| {
        next(a)?;
        a.mov(rdx, qword_ptr(rsi + DATA as i32))
    };
    difference(64 * MIB, 1_000_000, with, next)
}

fn walk() -> Result<f64> {
    let with = |a: &mut CodeAssembler| {
        a.mov(cr3, rax)?;
        a.mov(rdx, qword_ptr(rsi))
    };
    difference(2 * MIB, 500_000, with, |_| Ok(()))
}

/// 64 targets in turn, through a table.
fn lookup() -> Result<f64> {
    const TARGETS: i32 = 64;
    const TIMES: u32 = 2_000_000;
    let code = |indirect: bool| {
        assemble(Mode::Long, |a| {
            let (mut again, mut back) = (a.create_label(), a.create_label());
            let mut targets: Vec<CodeLabel> = (0..TARGETS).map(|_| a.create_label()).collect();
            a.mov(esi, DATA as u32)?;
            for (i, target) in targets.iter().enumerate() {
                a.lea(rax, qword_ptr(*target))?;
                a.mov(qword_ptr(rsi + 8 * i as i32), rax)?;
            }
            a.mov(ecx, TIMES)?;
            a.set_label(&mut again)?;
            a.mov(eax, ecx)?;
            a.and(eax, TARGETS - 1)?;
            a.mov(rdx, qword_ptr(rsi + rax * 8))?;
            if indirect {
                a.jmp(rdx)?;
            }
            for target in &mut targets {
                a.set_label(target)?;
                a.jmp(back)?;
            }
            a.set_label(&mut back)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.hlt()
        })
    };
    let with = best(&mut Guest::new(Mode::Long, 2 * MIB, &code(true)?)?)?;
    let without = best(&mut Guest::new(Mode::Long, 2 * MIB, &code(false)?)?)?;
    Ok((with - without) * 1e9 / f64::from(TIMES))
}

/// A guest that goes through so many instructions to a HLT, no two of them in one place.
fn long_way(instructions: usize) -> Result<Guest> {
    let four = assemble(Mode::Long, |a| {
        a.add(eax, 0x1234_5678)?;
        a.mov(edx, eax)?;
        a.xor(edx, esi)?;
        a.lea(rsi, qword_ptr(rsi + rdx * 2 + 1))
    })?;
    // It is longer than what lies between the usual place and the stack.
    let place = 2 * MIB;
    let jump = assemble(Mode::Long, |a| {
        a.mov(eax, place as u32)?;
        a.jmp(rax)
    })?;
    let code = four.repeat(instructions / 4);
    let mut guest = Guest::new(Mode::Long, (place + code.len()).next_multiple_of(MIB) + MIB, &jump)?;
    guest.ram()[place..][..code.len()].copy_from_slice(&code);
    guest.ram()[place + code.len()] = HALT;
    Ok(guest)
}

/// HLT.
const HALT: u8 = 0xf4;

/// Nanoseconds an instruction of a way of so many, behind the first time. The vCPU's traces have room for some three million:
/// beyond that each way begins with traces of its second half at best, the worst that can meet a bound.
fn straight(instructions: usize) -> Result<f64> {
    Ok(best(&mut long_way(instructions)?)? * 1e9 / instructions as f64)
}

/// The first run of much code, beyond the second.
fn decode() -> Result<f64> {
    const INSTRUCTIONS: usize = 60_000;
    let mut each = f64::INFINITY;
    for _ in 0..ROUNDS {
        let mut guest = long_way(INSTRUCTIONS)?;
        let first = seconds(&mut guest)?;
        let regs = guest.vcpu().get_regs().context("KVM_GET_REGS")?;
        guest.vcpu().set_regs(&kvm_bindings::kvm_regs { rip: CODE, ..regs }).context("KVM_SET_REGS")?;
        each = each.min((first - seconds(&mut guest)?) * 1e9 / INSTRUCTIONS as f64);
    }
    Ok(each)
}

/// An interrupt by instruction: gate, stack, handler and back.
fn delivery() -> Result<f64> {
    const VECTOR: u8 = 0x30;
    const TIMES: u32 = 500_000;
    let guest = |int: bool| {
        looping(Mode::Protected, 2 * MIB, TIMES, |_| Ok(()), |a| if int { a.int(i32::from(VECTOR)) } else { Ok(()) })
    };
    let mut with = guest(true)?;
    handle(&mut with, VECTOR, |a| a.iretd())?;
    Ok((best(&mut with)? - best(&mut guest(false)?)?) * 1e9 / f64::from(TIMES))
}

/// Gives a guest of 32-bit protected mode an IDT with a handler for one vector.
pub(crate) fn handle(guest: &mut Guest, vector: u8, handler: impl FnOnce(&mut CodeAssembler) -> Write) -> Result<()> {
    const IDT: u64 = 0x8_1000;
    const HANDLER: u32 = 0x8_2000;
    // SDM Vol. 3 "IDT Descriptors": a 32-bit interrupt gate, present, to the code segment that `Mode::enter` loads.
    const GATE: u64 = 0x8e00;
    const CODE_SEGMENT: u64 = 0x08;
    let code = assemble(Mode::Protected, handler)?;
    let (at, handler) = (IDT as usize + 8 * usize::from(vector), u64::from(HANDLER));
    let gate = handler & 0xffff | CODE_SEGMENT << 16 | GATE << 32 | (handler >> 16) << 48;
    guest.ram()[HANDLER as usize..][..code.len()].copy_from_slice(&code);
    guest.ram()[at..at + 8].copy_from_slice(&gate.to_le_bytes());
    let mut sregs = guest.vcpu().get_sregs().context("KVM_GET_SREGS")?;
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0x7ff);
    // IRET loads the code segment anew: from a table with the two segments of that mode.
    const GDT: u64 = 0x8_0800;
    for (i, descriptor) in [0, 0x00cf_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff].iter().enumerate() {
        guest.ram()[GDT as usize + 8 * i..][..8].copy_from_slice(&descriptor.to_le_bytes());
    }
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x17);
    guest.vcpu().set_sregs(&sregs).context("KVM_SET_SREGS")
}
