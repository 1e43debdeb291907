//! The decoded form of an instruction and the threaded dispatch from one to the next.
//!
//! A trace is an array of 32-byte [`Op`]s: a head, then one op an instruction (sometimes a second slot of data). Each
//! names its handler; a handler ends in a call to the next op's handler with the same arguments, which an optimising
//! build turns into a jump. Where it does not (debug builds), a quantum of few instructions bounds the stack.
#![expect(unsafe_code, reason = "handlers follow op pointers inside the trace arena and the CPU that owns it")]

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use std::sync::atomic::Ordering;

use mmu::host::opaque;

use crate::access::By;
use crate::cpu::{Cpu, Done, JumpEntry, Stop, Then};
use crate::decode::trace::{At, OPS_PER_LINE};
use crate::flags::Flags;
use crate::host::HostWord;
use crate::state::Seg;

/// A handler: the CPU, its op, the two flag operands, and the instructions left in the quantum. All five stay in
/// registers from handler to handler.
///
/// # Safety
/// The CPU is the running one: valid, its caller's alone, and no reference to it or into it is used again before the
/// handler returns. The op is initialised, lies in that CPU's arena, names this handler, and whatever its handler expects
/// behind it (the next op, a data slot, a link) was written by `decode::trace`. The arena is freed only between traces,
/// so the op outlives the call. The loop vouches for this at the first head; each handler passes it on to the next.
pub(crate) type Handler = unsafe fn(*mut Cpu, *const Op, u64, u64, i64);

/// Most instructions between two looks at the world. A handler whose call of the next one has not become a jump (none has in
/// a debug build; in others it is up to the compiler) holds its frame until the quantum ends, so the quantum bounds the
/// stack.
pub(crate) const QUANTUM: i64 = if cfg!(debug_assertions) { 400 } else { 1 << 15 };

/// Stack that a thread needs to run a CPU, bytes. Handlers that hold on to their frames have 512 bytes each; they use some 60
/// to 200.
pub const STACK_BYTES: usize = 16 << 20;

const _: () = assert!(cfg!(debug_assertions) || STACK_BYTES / QUANTUM as usize >= 512);

/// One decoded instruction.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Op {
    pub(crate) handler: Handler,
    /// Immediate, or the op that a branch goes to.
    pub(crate) imm: u64,
    /// Displacement of the memory operand.
    pub(crate) disp: i32,
    /// Destination register: its byte offset in `Cpu::gpr` (AH is 1), or its number for other files.
    pub(crate) dst: u8,
    /// Source register, likewise.
    pub(crate) src: u8,
    /// Base register of the memory operand, byte offset.
    pub(crate) base: u8,
    /// Index register of the memory operand, byte offset.
    pub(crate) index: u8,
    /// 1, 2, 4 or 8.
    pub(crate) scale: u8,
    /// Segment of the memory operand in bits 2:0, log2 of address bytes in bits 5:4.
    pub(crate) seg: u8,
    /// Instruction length, bytes.
    pub(crate) len: u8,
    /// Free for the family: a third register, a condition, prefixes.
    pub(crate) aux: u8,
    /// Distance of the instruction from the trace's first, bytes.
    pub(crate) off: u16,
    /// Instructions of the trace from this one on.
    pub(crate) left: u16,
}

/// The first op of a trace, same size and place of `handler` and `imm`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct Head {
    pub(crate) handler: Handler,
    /// Epoch in which the trace was last found equal to memory; 0 when it must be looked at.
    pub(crate) stamp: u64,
    /// Offset in CS of the first instruction.
    pub(crate) ip: u64,
    /// Index in `Traces`.
    pub(crate) trace: u32,
    /// [`Head::MARK`], where a stub has 0.
    pub(crate) mark: u16,
    /// Instructions of the trace.
    pub(crate) count: u16,
}

impl Head {
    /// Tells a head from a stub, which a link leads to as well.
    pub(crate) const MARK: u16 = u16::MAX;
}

impl Op {
    /// The slot behind a call's op: its `imm` is the link of the return address.
    ///
    /// # Safety
    /// `op` is the op of a call in an arena that is alive: `decode::trace` puts a data slot behind each.
    #[inline(always)]
    pub(crate) unsafe fn link_behind(op: *const Op) -> *const Op {
        // SAFETY: the caller's: the data slot lies in the same arena.
        let data = unsafe { op.add(1) };
        // SAFETY: the slot was written when the trace was; nobody writes ops while a handler reads one.
        unsafe { (*data).imm as *const Op }
    }
}

const _: () = assert!(size_of::<Op>() == 32 && size_of::<Head>() == 32);

/// A predicted return.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct RasEntry {
    ip: u64,
    context: u64,
    op: *const Op,
}

impl RasEntry {
    pub(crate) const EMPTY: Self = Self { ip: 0, context: 0, op: std::ptr::null() };
}

impl Op {
    /// Segment of the memory operand.
    #[inline(always)]
    pub(crate) fn segment(&self) -> Seg {
        match self.seg & 7 {
            0 => Seg::Es,
            1 => Seg::Cs,
            2 => Seg::Ss,
            3 => Seg::Ds,
            4 => Seg::Fs,
            _ => Seg::Gs,
        }
    }

    /// log2 of the address size in bytes: 1, 2 or 3.
    #[inline(always)]
    pub(crate) fn address_log2(&self) -> u8 {
        self.seg >> 4
    }

    /// All ones over the address size.
    #[inline(always)]
    pub(crate) fn address_mask(&self) -> u64 {
        const MASKS: [u64; 4] = [0xff, 0xffff, 0xffff_ffff, u64::MAX];
        MASKS[usize::from(self.address_log2() & 3)]
    }
}

/// What the semantics of an instruction see: one CPU, its op, and the state that lives in host registers.
///
/// Made by handlers only, from their own arguments, and gone when they end: `cpu` and `op` are as a [`Handler`]'s
/// contract says, which is what the methods below rely on.
pub(crate) struct Machine {
    pub(crate) cpu: *mut Cpu,
    pub(crate) op: *const Op,
    pub(crate) fa: u64,
    pub(crate) fb: u64,
    pub(crate) budget: i64,
}

/// Where to go after an instruction. Never materialised: it folds away when the semantics are inlined.
pub(crate) enum To {
    /// The op behind this one.
    Next,
    /// The second op behind this one: this one has a data slot.
    Skip,
    /// A head, or a stub that finds one.
    Op(*const Op),
    /// Instruction complete, but the trace must be left: RIP is the next in memory order.
    Leave,
    /// A computed target; #GP(0) at this instruction where it is not canonical.
    Indirect(u64),
    /// A computed target that is canonical.
    IndirectChecked(u64),
    /// Instruction complete, but the loop is wanted: RIP is what the link leads to.
    LeaveFor(*const Op),
    /// Fault or exit: nothing was committed.
    Stop,
    /// `size` bytes at this linear address are not in the TLB: nothing was committed, and the instruction starts again.
    Miss {
        /// Linear address.
        la: u64,
        /// Bytes.
        size: u32,
        /// Read, or write.
        write: bool,
    },
    /// The instruction needs the exact path: the loop runs it by itself.
    Alone,
    /// Another handler takes this op over; nothing was committed.
    Other(Handler),
}

/// Semantics of an instruction that lives in the hot part. Implementations are zero-sized.
pub(crate) trait Semantics: 'static {
    /// Executes one instruction.
    ///
    /// # Safety
    /// `m` holds the arguments of the [`Handler`] that calls, whose contract is in force: no reference to the CPU is
    /// alive, and none that the semantics make outlives a statement.
    unsafe fn run(m: &mut Machine) -> To;
}

macro_rules! dispatch {
    ($cpu:expr, $op:expr, $m:expr) => {{
        let op: *const Op = $op;
        // SAFETY: `op` is an initialised op of the arena of `cpu` (links and trace order are made by `decode::trace`).
        let handler = unsafe { (*op).handler };
        // SAFETY: a handler's contract is the one this handler was called under.
        return unsafe { handler($cpu, op, $m.fa, $m.fb, $m.budget) };
    }};
}

/// The handler of `S`.
///
/// # Safety
/// That of a [`Handler`].
pub(crate) unsafe fn handler<S: Semantics>(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    let mut m = Machine { cpu, op, fa, fb, budget };
    // SAFETY: handlers are called with the running CPU and one of its ops.
    let to = unsafe { S::run(&mut m) };
    // SAFETY: as above.
    unsafe { go(m, to) }
}

/// The handler of `A` where `B` is the op behind it: one dispatch for both. Each stops, misses and leaves at its own op, and
/// `B` that starts again does so by its own handler.
///
/// # Safety
/// That of a [`Handler`], and the op behind is one of `B`.
pub(crate) unsafe fn pair<A: Semantics, B: Semantics>(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    let mut m = Machine { cpu, op, fa, fb, budget };
    // SAFETY: handlers are called with the running CPU and one of its ops.
    match unsafe { A::run(&mut m) } {
        To::Next => {}
        // SAFETY: as above.
        to => return unsafe { go(m, to) },
    }
    // SAFETY: the trace builder makes pairs of neighbours only.
    m.op = unsafe { op.add(1) };
    // SAFETY: the first is complete, so the second's handler would be called with just this.
    let to = unsafe { B::run(&mut m) };
    // SAFETY: as above.
    unsafe { go(m, to) }
}

/// Where the op of `m` goes on: the last thing that its handler does.
///
/// # Safety
/// That of a [`Handler`], with the arguments in `m`; `to` is what the semantics of its op returned.
#[inline(always)]
unsafe fn go(m: Machine, to: To) {
    let Machine { cpu, op, .. } = m;
    match to {
        // SAFETY: a trace ends in an op that does not return `Next`, so there is one behind.
        To::Next => dispatch!(cpu, unsafe { op.add(1) }, m),
        // SAFETY: as above, with a data slot between.
        To::Skip => dispatch!(cpu, unsafe { op.add(2) }, m),
        To::Op(target) => dispatch!(cpu, target, m),
        To::Indirect(ip) | To::IndirectChecked(ip) => {
            // SAFETY: `cpu` is the running CPU.
            let target = unsafe { jump_cached(cpu, ip) };
            if target.is_null() {
                // SAFETY: as above.
                unsafe { (*cpu).miss.0 = ip };
                // SAFETY: as above; a jump, so the hot path keeps no frame for it.
                return unsafe { jump_slow(cpu, op, m.fa, m.fb, m.budget) };
            }
            dispatch!(cpu, target, m)
        }
        // SAFETY: `cpu` is the running CPU, `op` the current op.
        To::Leave => unsafe { leave(cpu, op, m.fa, m.fb, m.budget) },
        // SAFETY: as above; `to` is a link: a head or a stub.
        To::LeaveFor(to) => unsafe { leave_to(cpu, op, to, m.fa, m.fb, m.budget) },
        // SAFETY: as above.
        To::Stop => unsafe { stop(cpu, op, m.fa, m.fb, m.budget) },
        To::Miss { la, size, write } => {
            let what = if write { size | MISS_WRITE } else { size };
            // SAFETY: as above.
            unsafe { (*cpu).miss = (la, what) };
            // SAFETY: as above; a jump, so the hot path keeps no frame for it.
            unsafe { miss(cpu, op, m.fa, m.fb, m.budget) }
        }
        // SAFETY: as above.
        To::Alone => unsafe { alone(cpu, op, m.fa, m.fb, m.budget) },
        // SAFETY: as above; a jump, so the hot path keeps no frame for it.
        To::Other(other) => unsafe { other(cpu, op, m.fa, m.fb, m.budget) },
    }
}

/// In [`Cpu::miss`]: the access is a write.
const MISS_WRITE: u32 = 1 << 31;

/// The access in [`Cpu::miss`] was not in the TLB. If a walk puts it there the op starts again; a device, a page end or
/// decoded code cannot be put there, and the exact path takes over.
///
/// # Safety
/// That of a [`Handler`], for the op that stopped.
#[cold]
#[inline(never)]
unsafe fn miss(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    let m = Machine { cpu, op, fa, fb, budget };
    let seg = m.op().segment();
    // SAFETY: `cpu` is the running CPU.
    match unsafe { &mut *cpu }.fill(seg) {
        Ok(true) => dispatch!(cpu, op, m),
        // SAFETY: as above.
        Ok(false) => unsafe { alone(cpu, op, fa, fb, budget) },
        // SAFETY: as above.
        Err(Stop) => unsafe { stop(cpu, op, fa, fb, budget) },
    }
}

impl Cpu {
    /// Walks for the access in `miss`. True: the TLB has it now.
    #[inline(never)]
    fn fill(&mut self, seg: Seg) -> Result<bool, Stop> {
        let (la, what) = self.miss;
        let (size, write) = (u64::from(what & !MISS_WRITE), what & MISS_WRITE != 0);
        if (la & 0xfff) + size > 0x1000 {
            return Ok(false);
        }
        self.target(la, write, By::Code, seg)?;
        Ok(if write { self.tlb.write(la, size) } else { self.tlb.read(la, size) }.is_some())
    }
}

/// Back to the loop, which runs the op's instruction by itself, on the exact path.
///
/// # Safety
/// That of a [`Handler`], for the op that stopped.
#[cold]
#[inline(never)]
unsafe fn alone(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: `cpu` is the running CPU.
    unsafe { (*cpu).alone = true };
    // SAFETY: as above.
    unsafe { stop(cpu, op, fa, fb, budget) };
}

/// Back to the loop with RIP at the op's instruction, which has not happened.
///
/// # Safety
/// That of a [`Handler`], for the op that stopped.
#[cold]
pub(crate) unsafe fn stop(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: `cpu` is the running CPU; no other reference to it is alive while a handler runs.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: `op` is the op being executed; ops are not moved while a trace runs.
    let op = unsafe { &*op };
    cpu.fa = fa;
    cpu.fb = fb;
    cpu.budget = budget + i64::from(op.left);
    cpu.rip = cpu.ip_of(op);
}

/// Back to the loop with RIP behind the op's instruction, which is complete.
///
/// # Safety
/// That of a [`Handler`], for the op that is complete.
#[cold]
pub(crate) unsafe fn leave(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: `cpu` is the running CPU; no other reference to it is alive while a handler runs.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: `op` is the op that was executed; ops are not moved while a trace runs.
    let op = unsafe { &*op };
    cpu.fa = fa;
    cpu.fb = fb;
    cpu.budget = budget + i64::from(op.left) - 1;
    cpu.rip = cpu.next_ip(op);
}

/// Back to the loop with RIP where the link leads.
///
/// # Safety
/// That of a [`Handler`], for the op that is complete; `to` is a head or a stub of the same arena.
#[cold]
unsafe fn leave_to(cpu: *mut Cpu, op: *const Op, to: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: called for the op that is complete, as `leave` is.
    unsafe { leave(cpu, op, fa, fb, budget) };
    // SAFETY: `to` is a head or a stub, copied out.
    let target = unsafe { *to };
    // SAFETY: a head and an op have one layout in these fields.
    let head = unsafe { *to.cast::<Head>() };
    // SAFETY: `cpu` is the running CPU.
    unsafe { (*cpu).rip = if head.mark == Head::MARK { head.ip } else { target.imm } };
}

impl Cpu {
    /// Offset in CS of the op's instruction.
    #[inline(always)]
    pub(crate) fn ip_of(&self, op: &Op) -> u64 {
        self.gpr[17].wrapping_add(u64::from(op.off))
    }

    /// Offset in CS of the instruction behind the op's, wrapped as the mode does.
    #[inline(always)]
    pub(crate) fn next_ip(&self, op: &Op) -> u64 {
        self.ip_of(op).wrapping_add(u64::from(op.len)) & self.ip_mask()
    }
}

#[inline(always)]
fn jump_index(ip: u64) -> usize {
    (ip ^ ip >> 12) as usize & 4095
}

/// The trace head for `ip`, if the jump cache has it. Null otherwise.
///
/// # Safety
/// `cpu` is the running CPU, and no exclusive reference to it is alive.
#[inline(always)]
unsafe fn jump_cached(cpu: *mut Cpu, ip: u64) -> *const Op {
    // SAFETY: `cpu` is the running CPU; the borrow ends with this function.
    let cpu = unsafe { &*cpu };
    let entry = &cpu.jumps[jump_index(ip)];
    if entry.ip == ip && entry.context == cpu.code_context { entry.op } else { std::ptr::null() }
}

/// Goes to the trace at `Cpu::miss.0`, which the jump cache does not have.
///
/// # Safety
/// That of a [`Handler`], for the op that jumps.
#[cold]
#[inline(never)]
unsafe fn jump_slow(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    let m = Machine { cpu, op, fa, fb, budget };
    // SAFETY: `cpu` is the running CPU.
    let ip = unsafe { (*cpu).miss.0 };
    // SAFETY: as above; the borrow ends with the statement.
    let canonical = unsafe { &*cpu }.is_canonical(ip);
    if !canonical {
        // SAFETY: as above.
        unsafe { &mut *cpu }.fault(crate::fault::Fault::gp(0));
        // SAFETY: `op` is the current op.
        return unsafe { stop(cpu, op, fa, fb, budget) };
    }
    // SAFETY: as above.
    let target = unsafe { &mut *cpu }.find_target(ip);
    if !target.is_null() {
        // SAFETY: `op` is the current op.
        let m = Machine { budget: budget + unsafe { i64::from((*op).left) } - 1, ..m };
        dispatch!(cpu, target, m)
    }
    // SAFETY: `op` is the current op, which is complete.
    unsafe { leave(cpu, op, fa, fb, budget) };
    // SAFETY: as above.
    unsafe { (*cpu).rip = ip };
}

impl Cpu {
    /// As [`Self::find_trace`]; null where the loop is wanted first.
    fn find_target(&mut self, ip: u64) -> *const Op {
        if self.leave { std::ptr::null() } else { self.find_trace(ip) }
    }
}

impl Cpu {
    /// The head of the trace at `ip` in the current mode, through the jump cache. Null when the loop must execute a
    /// single instruction (limit, page end, fetch fault): it finds out which.
    pub(crate) fn find_trace(&mut self, ip: u64) -> *const Op {
        // SAFETY: `self` is a CPU and no handler runs inside this call.
        let cached = unsafe { jump_cached(self, ip) };
        if !cached.is_null() {
            return cached;
        }
        self.counts.jump_cache_misses += 1;
        let head = self.trace_at(ip);
        if !head.is_null() {
            self.may_link(ip);
            self.jumps[jump_index(ip)] = JumpEntry { ip, context: self.code_context, op: head };
        }
        head
    }

    /// Runs from a head until something asks for the loop.
    pub(crate) fn execute(&mut self, head: *const Op) {
        let (fa, fb, budget) = (self.fa, self.fb, self.budget);
        // SAFETY: `head` came from `find_trace` or `Traces::single` and no trace was flushed since.
        let handler = unsafe { (*head).handler };
        // SAFETY: handlers' contract: this CPU, an op of its arena; `self` is not used until it returns.
        unsafe { handler(self, head, fa, fb, budget) };
    }
}

/// Head of a trace: charges its instructions, and looks whether anybody wants attention. Its op is a [`Head`].
pub(crate) struct Enter;
impl Semantics for Enter {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `cpu` is the running CPU.
        let stamp = unsafe { (*m.cpu).stamp };
        // SAFETY: it points into the `Kick` that the CPU keeps alive.
        let stamp = unsafe { &*stamp }.load(Ordering::Relaxed);
        // SAFETY: a head's handler is called with a head; copied out, since nobody else is to see a reference to it.
        let Head { stamp: known, ip, count, .. } = unsafe { *m.op.cast::<Head>() };
        // The budget may go below zero by one trace; the instruction count stays exact.
        if stamp != known || m.budget <= 0 {
            return To::Other(enter_again);
        }
        // SAFETY: `cpu` is the running CPU.
        unsafe { (*m.cpu).gpr[17] = ip };
        m.budget -= i64::from(count);
        To::Next
    }
}

/// Cache lines behind that of the head that most traces reach into.
const LINES_AHEAD: usize = 3;

/// Enters a trace whose stamp is an old one, or back to the loop with RIP at it.
///
/// # Safety
/// That of a [`Handler`], with a [`Head`] in the place of the op.
#[cold]
#[inline(never)]
unsafe fn enter_again(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: `cpu` is the running CPU; the head's handler holds no reference.
    let running = unsafe { &mut *cpu };
    // Where traces are old, they have left the host's first cache: what the next instructions are comes while bytes are compared.
    for line in 1..=LINES_AHEAD {
        let ahead = op.wrapping_add(line * OPS_PER_LINE);
        // SAFETY: a hint, whatever the address.
        unsafe { _mm_prefetch(ahead.cast(), _MM_HINT_T0) };
    }
    // SAFETY: called with a head of this CPU's arena only.
    let head = unsafe { At::new(op) };
    if budget > 0 && !running.kick.asked() && running.stands(head) {
        let m = Machine { cpu, op, fa, fb, budget };
        // The stamp is the current one now, unless attention was asked for in between: then it ends here the next time.
        dispatch!(cpu, op, m)
    }
    // SAFETY: as above; a jump, so this path keeps no frame for it.
    unsafe { enter_anew(cpu, op, fa, fb, budget) }
}

/// As [`enter_again`], for a trace that does not stand as it is.
///
/// # Safety
/// That of [`enter_again`].
#[cold]
unsafe fn enter_anew(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    // SAFETY: `cpu` is the running CPU; the head's handler holds no reference.
    let running = unsafe { &mut *cpu };
    // SAFETY: a head is there, copied out.
    let Head { trace, ip, .. } = unsafe { *op.cast::<Head>() };
    if budget > 0 && running.trace_is_current(trace) {
        let m = Machine { cpu, op, fa, fb, budget };
        dispatch!(cpu, op, m)
    }
    running.fa = fa;
    running.fb = fb;
    running.budget = budget;
    running.rip = ip;
}

/// Behind a trace that ended for want of space: goes on at the op's own address, as a jump to it would.
pub(crate) struct Continue;
impl Semantics for Continue {
    #[inline(always)]
    unsafe fn run(m: &mut Machine) -> To {
        // SAFETY: `m.op` is the current op.
        To::Op(unsafe { (*m.op).imm } as *const Op)
    }
}

/// A stub behind a branch: finds the target, and where the target lies in the same page links the branch to it.
/// `imm` is the target, `disp` the distance in bytes to the link, `left` that of the branch's fall-through.
///
/// # Safety
/// That of a [`Handler`], with a stub for an op.
pub(crate) unsafe fn resolve(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    let m = Machine { cpu, op, fa, fb, budget };
    // SAFETY: `cpu` is the running CPU, `op` a stub.
    let target = unsafe { resolve_cold(cpu, op, fa, fb, budget) };
    if target.is_null() {
        return;
    }
    dispatch!(cpu, target, m)
}

/// The trace that a stub leads to, linked to it; null, and the CPU ready for the loop, where the loop is wanted first.
///
/// # Safety
/// That of a [`Handler`], with a stub for an op.
#[cold]
#[inline(never)]
unsafe fn resolve_cold(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) -> *const Op {
    // SAFETY: `cpu` is the running CPU; the stub's handler holds no reference.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: `op` is a stub of the arena, copied out.
    let stub = unsafe { *op };
    let target = cpu.find_trace(stub.imm);
    if target.is_null() {
        cpu.fa = fa;
        cpu.fb = fb;
        cpu.budget = budget;
        cpu.rip = stub.imm;
        return target;
    }
    cpu.traces.link(op, target, cpu.gpr[17], cpu.code_context);
    target
}

/// The slot behind a stub that [`cross`] handles.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct CrossLink {
    pub(crate) target: *const Op,
    pub(crate) context: u64,
    pub(crate) unused: [u64; 2],
}

const _: () = assert!(size_of::<CrossLink>() == size_of::<Op>());

/// A stub whose target lies in another page: good while the context is the one it was found in.
///
/// # Safety
/// That of a [`Handler`], with a stub for an op, and a [`CrossLink`] behind it.
pub(crate) unsafe fn cross(cpu: *mut Cpu, op: *const Op, fa: u64, fb: u64, budget: i64) {
    let m = Machine { cpu, op, fa, fb, budget };
    // SAFETY: a stub is followed by a slot of its own.
    let data = unsafe { op.add(1) }.cast::<CrossLink>();
    // SAFETY: `link` wrote it before it made this the stub's handler.
    let CrossLink { target, context, .. } = unsafe { *data };
    // SAFETY: `cpu` is the running CPU.
    if context == unsafe { (*cpu).code_context } {
        dispatch!(cpu, target, m)
    }
    // SAFETY: as above; a jump, so the hot path keeps no frame for it.
    unsafe { resolve(cpu, op, fa, fb, budget) }
}

// Plain functions as handlers

/// The handler of an instruction written as a function of the whole CPU. `F` is a function item: zero-sized.
///
/// # Safety
/// That of a [`Handler`].
pub(crate) unsafe fn plain<F: Fn(&mut Cpu, &Op) -> Done + Copy + 'static>(
    cpu: *mut Cpu,
    op: *const Op,
    fa: u64,
    fb: u64,
    budget: i64,
) {
    // SAFETY: `cpu` is the running CPU, `op` one of its ops.
    let on = unsafe { call_plain::<F>(cpu, op, fa, fb, budget) };
    // SAFETY: `cpu` is the running CPU; the borrow ends here.
    let now = unsafe { &*cpu };
    // `call_plain` left the registers' state in the CPU.
    let m = Machine { cpu, op, fa: now.fa, fb: now.fb, budget };
    match on {
        // SAFETY: a trace ends in an op that leaves it.
        On::Next => dispatch!(cpu, unsafe { op.add(1) }, m),
        On::Branch => {
            // SAFETY: `cpu` is the running CPU.
            let ip = unsafe { (*cpu).rip };
            // SAFETY: `op` is the current op.
            let m = Machine { budget: budget + unsafe { i64::from((*op).left) } - 1, ..m };
            // SAFETY: as above.
            let target = unsafe { jump_cached(cpu, ip) };
            if !target.is_null() {
                dispatch!(cpu, target, m)
            }
            // SAFETY: as above. It takes back what was given back here.
            unsafe { (*cpu).miss.0 = ip };
            // SAFETY: as above.
            unsafe { jump_slow(cpu, op, m.fa, m.fb, budget) }
        }
        On::Loop => {}
    }
}

/// Where a plain function's handler goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    /// The next op.
    Next,
    /// The trace at `Cpu::rip`.
    Branch,
    /// Back to the loop; the CPU is ready for it.
    Loop,
}

/// Calls `F` with the registers' state in the CPU, and leaves the CPU ready for where the handler goes.
///
/// # Safety
/// That of a [`Handler`].
#[inline(never)]
unsafe fn call_plain<F: Fn(&mut Cpu, &Op) -> Done + Copy + 'static>(
    cpu: *mut Cpu,
    op: *const Op,
    fa: u64,
    fb: u64,
    budget: i64,
) -> On {
    const { assert!(size_of::<F>() == 0) };
    // SAFETY: a zero-sized function item has one value, which needs no storage.
    let f = unsafe { std::ptr::NonNull::<F>::dangling().as_ref() };
    // SAFETY: the handler that called holds no reference.
    let cpu = unsafe { &mut *cpu };
    // SAFETY: ops are not moved or freed while a trace runs.
    let op = unsafe { &*op };
    cpu.fa = fa;
    cpu.fb = fb;
    cpu.budget = budget;
    let done = f(cpu, op);
    match done {
        Ok(Then::Next) if !cpu.leave => return On::Next,
        Ok(Then::Branch) if !cpu.leave => return On::Branch,
        Ok(Then::Next | Then::Leave) => cpu.rip = cpu.next_ip(op),
        Ok(Then::Jump | Then::Branch) => {}
        // Each iteration of a REP that is left counts.
        Ok(Then::Again) => cpu.rip = cpu.ip_of(op),
        Err(Stop) => {
            cpu.rip = cpu.ip_of(op);
            cpu.budget += 1;
        }
    }
    cpu.budget += i64::from(op.left) - 1;
    On::Loop
}

// Operands of the hot semantics

/// How a memory operand is reached.
pub(crate) trait Form: 'static {
    /// Accesses go through the TLB only, and miss otherwise; else they are exact wherever they lead.
    const HOT: bool = true;
    /// Linear address of `size` bytes.
    ///
    /// # Safety
    /// `m` is what [`Semantics::run`] was called with, and no reference to its CPU is alive.
    unsafe fn linear(m: &Machine, size: u32, write: bool) -> Result<u64, To>;
}

/// 64-bit mode, no segment base: base + displacement. Also the stack there.
pub(crate) struct BaseDisp;
/// 64-bit mode, no segment base: base + index × scale + displacement.
pub(crate) struct BaseIndex;
/// Every address size, every mode: segment base and bound.
pub(crate) struct General;
/// As [`General`], on the exact path: what a single instruction uses.
pub(crate) struct Exact;

impl Form for BaseDisp {
    #[inline(always)]
    unsafe fn linear(m: &Machine, _: u32, _: bool) -> Result<u64, To> {
        let op = m.op();
        Ok(opaque(m.get::<u64>(op.base).wrapping_add(op.disp as u64)))
    }
}

impl Form for BaseIndex {
    #[inline(always)]
    unsafe fn linear(m: &Machine, _: u32, _: bool) -> Result<u64, To> {
        let op = m.op();
        let index = m.get::<u64>(op.index).wrapping_mul(u64::from(op.scale));
        Ok(opaque(m.get::<u64>(op.base).wrapping_add(index).wrapping_add(op.disp as u64)))
    }
}

impl Form for General {
    #[inline(always)]
    unsafe fn linear(m: &Machine, size: u32, write: bool) -> Result<u64, To> {
        let op = m.op();
        let index = m.get::<u64>(op.index).wrapping_mul(u64::from(op.scale));
        let offset = m.get::<u64>(op.base).wrapping_add(index).wrapping_add(op.disp as u64) & op.address_mask();
        // SAFETY: `cpu` is the running CPU; the borrow ends with this function.
        let cpu = unsafe { &*m.cpu };
        let seg = op.segment() as usize;
        let bound = if write { cpu.write_bound[seg] } else { cpu.read_bound[seg] };
        // Outside 64-bit mode offsets have 32 bits, so the sum cannot wrap; in 64-bit mode the bound is u64::MAX.
        if offset.wrapping_add(u64::from(size)) > bound {
            return Err(To::Alone);
        }
        Ok(cpu.wrap_linear(cpu.seg_base[seg].wrapping_add(offset)))
    }
}

impl Form for Exact {
    const HOT: bool = false;
    #[inline(always)]
    unsafe fn linear(m: &Machine, size: u32, write: bool) -> Result<u64, To> {
        // SAFETY: `cpu` is the running CPU; no other reference is alive in a handler.
        let cpu = unsafe { &mut *m.cpu };
        let op = m.op();
        let offset = cpu.ea(op);
        cpu.linear(op.segment(), offset, size, write).map_err(|Stop| To::Stop)
    }
}

/// Address of a slot of the register file.
///
/// # Safety
/// `cpu` points to a CPU; `slot` is a byte offset into its register file, as ops hold them.
#[inline(always)]
pub(crate) unsafe fn gpr(cpu: *mut Cpu, slot: u8) -> *mut u64 {
    // SAFETY: slots are byte offsets into `Cpu::gpr`, which starts the structure; the largest is inside it.
    unsafe { cpu.cast::<u8>().add(usize::from(slot)).cast() }
}

impl Machine {
    /// The status flags, lazy.
    #[inline(always)]
    pub(crate) fn flags(&self) -> Flags {
        // SAFETY: `cpu` is the running CPU.
        Flags { kind: unsafe { (*self.cpu).fk }, a: self.fa, b: self.fb }
    }

    /// Replaces the status flags.
    #[inline(always)]
    pub(crate) fn set_flags(&mut self, flags: Flags) {
        // SAFETY: `cpu` is the running CPU.
        unsafe { (*self.cpu).fk = flags.kind };
        self.fa = flags.a;
        self.fb = flags.b;
    }

    /// A register operand.
    #[inline(always)]
    pub(crate) fn get<W: HostWord>(&self, slot: u8) -> W {
        // SAFETY: slots are those of ops.
        let at = unsafe { gpr(self.cpu, slot) }.cast::<W>();
        // SAFETY: as in `gpr`; AH to BH are odd offsets and read one byte.
        unsafe { at.read() }
    }

    /// Writes a register operand: 32 bits clear the upper half, 8 and 16 keep the rest.
    #[inline(always)]
    pub(crate) fn put<W: HostWord>(&mut self, slot: u8, value: W) {
        // SAFETY: slots are those of ops.
        let at = unsafe { gpr(self.cpu, slot) };
        if W::BYTES == 4 {
            // SAFETY: as in `gpr`; 32-bit operands start a slot.
            unsafe { at.write(value.zext()) }
        } else {
            // SAFETY: as in `gpr`; AH to BH are odd offsets and write one byte.
            unsafe { at.cast::<W>().write(value) }
        }
    }

    /// The current op.
    #[inline(always)]
    pub(crate) fn op(&self) -> &Op {
        // SAFETY: the current op outlives the handler.
        unsafe { &*self.op }
    }

    /// Loads from a linear address.
    #[inline(always)]
    pub(crate) fn load<F: Form, W: HostWord>(&mut self, la: u64) -> Result<W, To> {
        // SAFETY: `cpu` is the running CPU, and the handler holds no other reference.
        let cpu = unsafe { &mut *self.cpu };
        if !F::HOT {
            return cpu.load_slow(la, W::BYTES, By::Code, self.op().segment()).map(W::of).map_err(|Stop| To::Stop);
        }
        match cpu.tlb.read(la, u64::from(W::BYTES)) {
            // SAFETY: a TLB hit names mapped RAM of a slot that the CPU's view keeps alive.
            Some(host) => Ok(unsafe { W::load(host) }),
            None => Err(To::Miss { la, size: W::BYTES, write: false }),
        }
    }

    /// Stores to a linear address; the instruction commits the rest and goes where [`Stored::then`] says.
    #[inline(always)]
    pub(crate) fn store<F: Form, W: HostWord>(&mut self, la: u64, value: W) -> Result<Stored, To> {
        // SAFETY: `cpu` is the running CPU, and the handler holds no other reference.
        let cpu = unsafe { &mut *self.cpu };
        if !F::HOT {
            return match cpu.store_slow(la, value.zext(), W::BYTES, By::Code, self.op().segment()) {
                Ok(()) if cpu.leave => Ok(Stored::Elsewhere),
                Ok(()) => Ok(Stored::Ram),
                Err(Stop) => Err(To::Stop),
            };
        }
        match cpu.tlb.write(la, u64::from(W::BYTES)) {
            // SAFETY: a TLB hit names mapped, writable RAM of a slot that the CPU's view keeps alive.
            Some(host) => unsafe { W::store(host, value) },
            None => return Err(To::Miss { la, size: W::BYTES, write: true }),
        }
        Ok(Stored::Ram)
    }

    /// `[la] ← f([la])` without LOCK. Returns the old value.
    #[inline(always)]
    pub(crate) fn modify<F: Form, W: HostWord>(&mut self, la: u64, f: impl Fn(W) -> W) -> Result<(W, Stored), To> {
        // SAFETY: `cpu` is the running CPU, and the handler holds no other reference.
        let cpu = unsafe { &mut *self.cpu };
        if !F::HOT {
            return match cpu.modify(la, self.op().segment(), false, |old| Some(f(old))) {
                Ok(old) => Ok((old, if cpu.leave { Stored::Elsewhere } else { Stored::Ram })),
                Err(Stop) => Err(To::Stop),
            };
        }
        let Some(host) = cpu.tlb.write(la, u64::from(W::BYTES)) else {
            return Err(To::Miss { la, size: W::BYTES, write: true });
        };
        // SAFETY: a TLB hit names mapped, writable RAM of a slot that the CPU's view keeps alive.
        let old = unsafe { W::load(host) };
        // SAFETY: as above.
        unsafe { W::store(host, f(old)) };
        Ok((old, Stored::Ram))
    }
}

/// What a store means for the trace.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Nothing.
    Ram,
    /// A device write to be reported, or changed code: leave once the instruction is done.
    Elsewhere,
}

impl Stored {
    /// Where to go when the store was the last thing that could stop the instruction.
    #[inline(always)]
    pub(crate) fn then(self) -> To {
        match self {
            Self::Ram => To::Next,
            Self::Elsewhere => To::Leave,
        }
    }
}

/// Pushes a predicted return.
#[inline(always)]
pub(crate) fn ras_push(m: &mut Machine, ip: u64, op: *const Op) {
    // SAFETY: `cpu` is the running CPU; the borrow ends here.
    let cpu = unsafe { &mut *m.cpu };
    let top = cpu.ras_top.wrapping_add(1) & 31;
    cpu.ras_top = top;
    cpu.ras[top as usize] = RasEntry { ip, context: cpu.code_context, op };
}

/// The predicted return for `ip`, popped if it matches.
#[inline(always)]
pub(crate) fn ras_pop(m: &mut Machine, ip: u64) -> To {
    // SAFETY: `cpu` is the running CPU; the borrow ends here.
    let cpu = unsafe { &mut *m.cpu };
    let entry = &cpu.ras[cpu.ras_top as usize & 31];
    if entry.ip == ip && entry.context == cpu.code_context {
        let op = entry.op;
        cpu.ras_top = cpu.ras_top.wrapping_sub(1) & 31;
        return To::Op(op);
    }
    To::Indirect(ip)
}

/// The value, or where the instruction goes instead.
macro_rules! attempt {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(to) => return to,
        }
    };
}
pub(crate) use attempt;
