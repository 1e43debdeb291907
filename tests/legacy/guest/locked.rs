//! Every CPU adds to the same words by every kind of locked instruction, without leaving guest mode.

use iced_x86::code_asm::*;

use super::*;

/// Times that each CPU goes round, and each thread of the VMM. Few where the kernel may trap bus locks one by one (Intel CPUs,
/// `split_lock_detect`): an operand that crosses a cache line takes 74 µs there.
pub(crate) fn locked_rounds() -> u64 {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if ["bus_lock_detect", "split_lock_detect"].iter().any(|flag| cpu.contains(flag)) { 1_000 } else { 50_000 }
}

/// Words that are added to, each by `by` once a round.
#[derive(Clone, Copy)]
pub(crate) struct Addend {
    pub(crate) name: &'static str,
    /// Guest-physical.
    pub(crate) at: u64,
    pub(crate) by: u64,
    /// The VMM's threads add as well.
    pub(crate) shared: bool,
}

const fn addend(name: &'static str, at: u64, by: u64, shared: bool) -> Addend {
    Addend { name, at, by, shared }
}

/// Memory of the race, above everything else, and the words in it.
const BASE: u64 = 0x40_0000;
const SPIN_LOCK: u64 = BASE + 0x280;
/// Two frames that are no neighbours, at neighbouring linear addresses: an operand of 8 bytes, 4 in each.
const FAR_LOW: u64 = BASE + 0x3ffc;
const FAR_HIGH: u64 = BASE + 0x8000;

/// What each word has at the end: (CPUs × rounds [+ VMM's rounds]) × `by`. In the order of the code.
pub(crate) const ADDENDS: &[Addend] = &[
    addend("LOCK INC", BASE, 1, true),
    addend("LOCK ADD of 4 bytes", BASE + 0x40, 5, true),
    addend("LOCK XADD", BASE + 0x80, 3, true),
    addend("LOCK CMPXCHG", BASE + 0xc0, 1, true),
    addend("LOCK CMPXCHG16B", BASE + 0x100, 1, true),
    addend("the half above it", BASE + 0x108, 2, false),
    addend("INC under a lock of LOCK BTS", BASE + 0x240, 1, false),
    addend("LOCK ADD across a cache line", BASE + 0x1000 - 0x40 - 4, 7, true),
    addend("LOCK XADD across a page", BASE + 0x2000 - 4, 9, true),
];

/// The barrier that all CPUs wait at.
pub(crate) mod race {
    use super::at::MAILBOX;
    /// u32: CPUs that are there.
    pub(crate) const ARRIVED: u64 = MAILBOX;
    /// u32: CPUs that are through.
    pub(crate) const FINISHED: u64 = MAILBOX + 0x80;
}
/// Where the halves of the operand across two frames that are no neighbours lie, low first. Added to by 1.
pub(crate) const FAR_HALVES: [u64; 2] = [FAR_LOW, FAR_HIGH];

/// The guest.
pub(crate) fn locked() -> Image {
    const BODY: u64 = at::HANDLERS;
    let mut image = long(
        |a| {
            wake_others(a)?;
            // Everybody runs BODY from the handler; CPU 0 starts last.
            a.mov(rax, BODY)?;
            a.mov(qword_ptr(at::FUNCTION), rax)?;
            each_other(a, interrupt_ebx)?;
            a.call(BODY)?;
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.mov(eax, dword_ptr(race::FINISHED))?;
            a.cmp(eax, dword_ptr(at::CPUS))?;
            a.jb(wait)?;
            end(a)
        },
        |_| Ok(()),
    );
    let frames = [FAR_LOW & !0xfff, FAR_HIGH].map(|frame| frame | pte::P | pte::RW);
    image.words(at::MAPPED_PT, &frames);
    image.code(64, BODY, body);
    image
}

fn body(a: &mut CodeAssembler) -> Written {
    let (mut barrier, mut round) = (a.create_label(), a.create_label());
    for register in [rbx, rsi, rdi, rbp] {
        a.push(register)?;
    }
    a.lock().inc(dword_ptr(race::ARRIVED))?;
    a.set_label(&mut barrier)?;
    a.pause()?;
    a.mov(eax, dword_ptr(race::ARRIVED))?;
    a.cmp(eax, dword_ptr(at::CPUS))?;
    a.jb(barrier)?;
    a.mov(ebp, locked_rounds() as u32)?;
    a.set_label(&mut round)?;
    let [inc, add, xadd, cmpxchg, wide, _, under, line, page] = *ADDENDS else { unreachable!("as many as there are") };
    a.lock().inc(qword_ptr(inc.at))?;
    a.lock().add(dword_ptr(add.at), add.by as i32)?;
    a.mov(eax, xadd.by as u32)?;
    a.lock().xadd(qword_ptr(xadd.at), rax)?;
    let mut again = a.create_label();
    a.mov(rax, qword_ptr(cmpxchg.at))?;
    a.set_label(&mut again)?;
    a.lea(rcx, qword_ptr(rax + 1))?;
    a.lock().cmpxchg(qword_ptr(cmpxchg.at), rcx)?;
    a.jne(again)?;
    let mut again = a.create_label();
    a.mov(rax, qword_ptr(wide.at))?;
    a.mov(rdx, qword_ptr(wide.at + 8))?;
    a.set_label(&mut again)?;
    a.lea(rbx, qword_ptr(rax + 1))?;
    a.lea(rcx, qword_ptr(rdx + 2))?;
    a.lock().cmpxchg16b(xmmword_ptr(wide.at))?;
    a.jne(again)?;
    let mut again = a.create_label();
    let mut taken = a.create_label();
    a.set_label(&mut again)?;
    a.lock().bts(dword_ptr(SPIN_LOCK), 3)?;
    a.jnc(taken)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut taken)?;
    a.inc(qword_ptr(under.at))?;
    a.lock().btr(dword_ptr(SPIN_LOCK), 3)?;
    a.lock().add(qword_ptr(line.at), line.by as i32)?;
    a.mov(eax, page.by as u32)?;
    a.lock().xadd(qword_ptr(page.at), rax)?;
    a.mov(rsi, MAPPED + (FAR_LOW & 0xfff))?;
    a.lock().inc(qword_ptr(rsi))?;
    a.dec(ebp)?;
    a.jnz(round)?;
    a.lock().inc(dword_ptr(race::FINISHED))?;
    for register in [rbp, rdi, rsi, rbx] {
        a.pop(register)?;
    }
    a.ret()
}
