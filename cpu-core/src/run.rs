//! The loop around the traces: events before an instruction, traces, what a trace stopped for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mmu::{DirtyRing, Lookup, PageFault};
use x86_defs::{Dr6, GuestPhysAddr, Rflags};

use crate::cpu::{ASKED_RETURN, ASKED_SAMPLE, Cpu, Stop, StopReason};
use crate::decode::trace::MAX_INSTRUCTION_BYTES;
use crate::event::{self, Delivery};
use crate::fault::{Fault, Origin};
use crate::isa::PauseLoop;
use crate::op::QUANTUM;
use crate::state::{Breakpoints, Seg};
use crate::vmx::{Exit, Io, Mmio};

const PAGE: u64 = 0x1000;

/// Who has to be asked whether the guest may go on, because no [`Kick`](crate::Kick) tells.
pub struct Poll<'a> {
    /// How often; a guest that executes slowly is asked for up to some ten thousand instructions later.
    pub every: Duration,
    /// True: [`Cpu::run_polled`] returns with [`Exit::ExternalInterrupt`].
    pub stop: &'a mut dyn FnMut() -> bool,
}

/// A [`Poll`], and when its time comes.
struct Polling<'a> {
    poll: Poll<'a>,
    due: Instant,
}

impl Polling<'_> {
    fn wants_stop(&mut self) -> bool {
        let now = Instant::now();
        if now < self.due {
            return false;
        }
        self.due = now + self.poll.every;
        (self.poll.stop)()
    }
}

/// What a look at the events before an instruction found.
enum Due {
    /// Nothing that may be delivered now.
    Nothing,
    /// One event, which ended in an exit or in its handler.
    Delivered(Option<Exit>),
}

impl Cpu {
    /// Runs the guest until something needs the KVM layer.
    pub fn run(&mut self) -> Exit {
        self.run_polling(None)
    }

    /// As [`run`](Self::run), also until `poll` has enough. Its thread is this one: it waits for no other to be scheduled.
    pub fn run_polled(&mut self, poll: Poll<'_>) -> Exit {
        let due = Instant::now() + poll.every;
        self.run_polling(Some(Polling { poll, due }))
    }

    fn run_polling(&mut self, polling: Option<Polling<'_>>) -> Exit {
        if self.unchecked && self.entry_check().is_some() {
            return Exit::EntryFailure;
        }
        self.unchecked = false;
        self.enter();
        let exit = self.run_entered(polling);
        self.leave_guest();
        exit
    }

    /// Executes at most one instruction, events before it included. `None`: nothing needs the KVM layer.
    pub fn step(&mut self) -> Option<Exit> {
        if self.unchecked && self.entry_check().is_some() {
            return Some(Exit::EntryFailure);
        }
        self.unchecked = false;
        self.enter();
        let exit = self.take_events().unwrap_or_else(|| self.run_one());
        self.leave_guest();
        exit.or_else(|| self.next_mmio_write().map(Exit::Mmio))
    }

    fn enter(&mut self) {
        if self.view.enter() {
            self.flush_tlb();
        }
        // Whatever the VMM did to memory while we were away is visible to fetches from here on.
        self.serialize();
        self.fpu.settle();
        self.pause_loop = PauseLoop::default();
        // Whatever was asked for meanwhile was not of the guest's time.
        self.kick.take_sample();
    }

    fn leave_guest(&mut self) {
        if self.kick.take_sample() {
            self.sample();
        }
        self.publish();
        self.view.leave();
    }

    fn run_entered(&mut self, mut polling: Option<Polling<'_>>) -> Exit {
        loop {
            if let Some(exit) = self.look_around() {
                return exit;
            }
            if polling.as_mut().is_some_and(Polling::wants_stop) {
                return Exit::ExternalInterrupt;
            }
            match self.take_events() {
                Some(Some(exit)) => return exit,
                Some(None) => continue,
                None => {}
            }
            let alone = std::mem::take(&mut self.alone)
                || self.rflags & (Rflags::TF | Rflags::RF).bits() != 0
                || self.in_shadow()
                || self.has_breakpoints()
                || !self.mmio.answered.is_empty()
                || !self.io_elements.is_empty();
            let exit = if alone { self.run_one() } else { self.run_traces() };
            if let Some(exit) = exit {
                return exit;
            }
        }
    }

    /// What other threads ask for, and device writes that wait to be reported.
    fn look_around(&mut self) -> Option<Exit> {
        if let Some(write) = self.mmio.writes.pop_front() {
            return Some(Exit::Mmio(write));
        }
        if self.kick.asked() {
            let asked = self.kick.take();
            if asked & ASKED_SAMPLE != 0 {
                self.sample();
                self.publish();
            }
            self.refresh_memory();
            if asked & ASKED_RETURN != 0 {
                return Some(Exit::ExternalInterrupt);
            }
        }
        None
    }

    /// Slots changed, or a dirty log was harvested: everything that holds host addresses goes, and fetches see what is there
    /// now, as behind the exit that KVM forces (`kvm_arch_flush_shadow_all`, `KVM_REQ_TLB_FLUSH`).
    pub(crate) fn refresh_memory(&mut self) {
        if self.view.refresh() {
            self.flush_tlb();
            self.serialize();
        }
    }

    /// Pages that this CPU makes dirty go into `ring` from now on.
    pub fn set_dirty_ring(&mut self, ring: Arc<DirtyRing>) {
        self.view.set_ring(Some(ring));
    }

    /// Delivers all that is due before the next instruction: an NMI may come before the first one of a trap's handler. `Some`: an exit,
    /// or somebody wants attention before that is done; a breakpoint on the stack of #DB makes a delivery of each delivery.
    fn take_events(&mut self) -> Option<Option<Exit>> {
        if !self.io_elements.is_empty() || !self.mmio.answered.is_empty() {
            // The device has been asked already: the instruction that asked goes on first.
            return None;
        }
        loop {
            match self.take_event() {
                Due::Nothing => return None,
                Due::Delivered(None) if !self.kick.asked() => {}
                Due::Delivered(exit) => return Some(exit),
            }
        }
    }

    /// The first of the order in SDM Vol. 3 "Priority Among Concurrent Events".
    fn take_event(&mut self) -> Due {
        let held = self.in_shadow() && self.events.shadow_mov_ss;
        if self.debug_pending != 0 && self.events.exception.is_none() && !held {
            let dr6 = std::mem::take(&mut self.debug_pending);
            return Due::Delivered(self.raise(Fault::db(dr6, Origin::Trap)));
        }
        if let Some(pending) = self.events.exception.take() {
            return Due::Delivered(self.deliver(Delivery::Injected(pending)));
        }
        if self.in_shadow() {
            return Due::Nothing;
        }
        if let Some(number) = self.events.interrupt
            && self.events.soft
        {
            self.events.interrupt = None;
            self.events.soft = false;
            return Due::Delivered(self.deliver(Delivery::External(number)));
        }
        // What is on its way already goes first, as in KVM.
        let accepted = self.events.interrupt.is_some() && self.rflags & Rflags::IF.bits() != 0;
        if self.has_smi() && !accepted && !self.holds_nmi {
            self.enter_smm();
            // SMBASE may be where no code segment can be.
            return Due::Delivered(self.entry_check().map(|_| Exit::EntryFailure));
        }
        if self.events.nmi_pending && !self.events.nmi_masked && !self.holds_nmi {
            self.events.nmi_pending = false;
            self.events.nmi_masked = true;
            return Due::Delivered(self.deliver(Delivery::Nmi));
        }
        if self.rflags & Rflags::IF.bits() == 0 {
            return Due::Nothing;
        }
        if let Some(number) = self.events.interrupt.take() {
            // An interrupt may announce data that a device wrote: fetches see it from here on.
            self.serialize();
            return Due::Delivered(self.deliver(Delivery::External(number)));
        }
        if self.interrupt_window { Due::Delivered(Some(Exit::InterruptWindow)) } else { Due::Nothing }
    }

    /// Runs traces until the quantum ends, an instruction stops, or somebody asks for attention.
    fn run_traces(&mut self) -> Option<Exit> {
        self.make_room_for_traces();
        let head = self.find_trace(self.rip);
        if head.is_null() {
            return if self.kick.asked() { None } else { self.run_one() };
        }
        self.note_entry(false);
        self.begin(QUANTUM);
        self.execute(head);
        self.end()
    }

    fn begin(&mut self, quantum: i64) {
        self.quantum = quantum;
        self.budget = quantum;
        self.leave = false;
        self.stop = None;
        self.keep_rf = false;
        self.suppress_step = false;
    }

    /// Settles the instruction count, and deals with what the last instruction stopped for.
    fn end(&mut self) -> Option<Exit> {
        self.instructions += (self.quantum - self.budget) as u64;
        self.leave = false;
        if std::mem::take(&mut self.shadow_wanted) {
            self.shadow_at = self.instructions;
        }
        match self.stop.take() {
            None => None,
            Some(StopReason::Exit(exit)) => {
                // A read that waits is answered, and the instruction starts again.
                self.mmio.used = 0;
                Some(exit)
            }
            Some(StopReason::Fault(fault)) => {
                self.forget_answers();
                self.raise(fault)
            }
        }
    }

    /// The instruction that device reads were answered for is over.
    pub(crate) fn forget_answers(&mut self) {
        self.mmio.answered.clear();
        self.mmio.used = 0;
        self.io_elements.clear();
    }

    /// Executes one instruction by itself: under TF, in a shadow, at a page end, while device reads are answered.
    fn run_one(&mut self) -> Option<Exit> {
        let traced = self.rflags & Rflags::TF.bits() != 0;
        self.mmio.rip = self.rip;
        self.note_entry(true);
        self.counts.single_instructions += 1;
        self.begin(1);
        self.budget = 0;
        if let Some(exit) = self.instruction_breakpoint() {
            return Some(exit);
        }
        if self.stop.is_none() {
            let mut bytes = [0; MAX_INSTRUCTION_BYTES];
            match self.fetch(&mut bytes) {
                Err(Stop) => self.budget = 1,
                Ok(n) => match self.single(&bytes[..n], self.rip) {
                    Some(op) => self.execute(op),
                    None => {
                        self.budget = 1;
                        self.stop = Some(StopReason::Exit(Exit::Unimplemented { bytes, len: n as u8 }));
                    }
                },
            }
        }
        let finished = self.budget == 0;
        let stopped = self.stop.is_some();
        if finished {
            self.forget_answers();
            if !self.keep_rf {
                self.rflags &= !Rflags::RF.bits();
            }
        }
        let exit = self.end();
        if traced && finished && !stopped && !std::mem::take(&mut self.suppress_step) {
            self.debug_pending |= Dr6::BS.bits();
        }
        exit
    }

    /// #DB for an instruction breakpoint at RIP (SDM Vol. 3 "Instruction-Breakpoint Exception Condition").
    fn instruction_breakpoint(&mut self) -> Option<Exit> {
        let held = self.in_shadow() && self.events.shadow_mov_ss;
        if !self.has_breakpoints() || self.rflags & Rflags::RF.bits() != 0 || held {
            return None;
        }
        let la = self.wrap_linear(self.seg_base[Seg::Cs as usize].wrapping_add(self.rip));
        let Breakpoints { db, dr7 } = self.breakpoints();
        let hit = (0..4)
            .filter(|i| dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 == 0 && db[*i as usize] == la)
            .fold(0, |bits, i| bits | 1 << i);
        if hit != 0 {
            self.budget = 1;
            self.stop = Some(StopReason::Fault(Fault::db(hit, Origin::Fault)));
        }
        None
    }

    /// Fetches the instruction at RIP: up to 15 bytes, fewer where the segment or memory ends before them.
    /// Faults only if the instruction itself reaches what cannot be fetched.
    fn fetch(&mut self, bytes: &mut [u8; MAX_INSTRUCTION_BYTES]) -> Result<usize, Stop> {
        let ip = self.rip;
        let long = self.is_64bit();
        if long && !self.is_canonical(ip) {
            return Err(self.fault(Fault::gp(0)));
        }
        let limit = if long { u64::MAX } else { u64::from(self.seg[Seg::Cs as usize].limit) };
        let base = self.seg_base[Seg::Cs as usize];
        let mut got = 0;
        let mut stop = None;
        while got < bytes.len() {
            let offset = ip.wrapping_add(got as u64);
            let la = self.wrap_linear(base.wrapping_add(offset));
            if offset > limit {
                stop = Some(StopReason::Fault(Fault::gp(0)));
                break;
            }
            match self.fetch_page(la) {
                Ok(Some(gpa)) => {
                    let n = ((PAGE - (la & (PAGE - 1))) as usize).min(bytes.len() - got);
                    let n = n.min(limit.saturating_sub(offset).saturating_add(1).min(15) as usize);
                    if self.view.read(GuestPhysAddr(gpa), &mut bytes[got..got + n]).is_err() {
                        stop = Some(StopReason::Exit(Exit::Unimplemented { bytes: *bytes, len: got as u8 }));
                        break;
                    }
                    got += n;
                }
                Ok(None) => {
                    stop = Some(StopReason::Exit(Exit::Unimplemented { bytes: *bytes, len: got as u8 }));
                    break;
                }
                Err(fault) => {
                    stop = Some(StopReason::Fault(Fault::pf(fault.error_code.bits(), la)));
                    break;
                }
            }
        }
        let complete = got == bytes.len() || self.single(&bytes[..got], ip).is_some();
        if complete {
            return Ok(got);
        }
        self.stop = stop;
        Err(Stop)
    }

    /// Guest-physical address that a fetch at `la` reads, `None` where there is no RAM.
    fn fetch_page(&mut self, la: u64) -> Result<Option<u64>, PageFault> {
        let gpa = match self.tlb.fetch(la) {
            Some(gpa) => gpa,
            None => self.translate_fetch(la)?,
        };
        let ram = matches!(self.view.page(GuestPhysAddr(gpa & !(PAGE - 1)), false), Lookup::Ram { .. });
        Ok(ram.then_some(gpa))
    }

    /// Delivers a fault of the guest's own making, or hands it to a debugger that wants it.
    fn raise(&mut self, fault: Fault) -> Option<Exit> {
        if self.intercepts >> fault.vector & 1 != 0 {
            return Some(Exit::Exception { vector: fault.vector, dr6: fault.dr6 });
        }
        self.deliver(Delivery::Exception(fault))
    }

    fn deliver(&mut self, what: Delivery) -> Option<Exit> {
        self.stop = None;
        self.leave = false;
        let exit = event::deliver(self, what);
        self.stop = None;
        exit
    }

    /// Queues an external interrupt; it is delivered when IF and shadows allow.
    pub fn queue_interrupt(&mut self, vector: u8) {
        self.events.interrupt = Some(vector);
        self.events.soft = false;
    }

    /// Queues an exception, as KVM's `kvm_queue_exception` for errors of user space's making does.
    pub fn queue_exception(&mut self, vector: u8, error: Option<u32>) {
        self.events.exception = Some(crate::state::PendingException::new(vector, error));
    }

    /// Queues an NMI.
    pub fn queue_nmi(&mut self) {
        self.events.nmi_pending = true;
    }

    /// Answers the read of [`Exit::Mmio`]; the next run starts the instruction again and finds the value.
    pub fn complete_mmio_read(&mut self, value: u64) {
        if let Some((gpa, len)) = self.mmio.waiting.take() {
            let value = if len < 8 { value & ((1 << (8 * len)) - 1) } else { value };
            self.mmio.answered.push((gpa, len, value));
        }
    }

    /// The next queued part of a device write that took several, to be reported before the guest goes on.
    pub fn next_mmio_write(&mut self) -> Option<Mmio> {
        self.mmio.writes.pop_front()
    }

    /// Answers the IN or INS of [`Exit::Io`]. IN is finished by this; INS stores when the CPU runs next.
    /// `data`: `size` × `count` bytes.
    pub fn complete_io_in(&mut self, data: &[u8]) {
        let Some(io) = self.io_pending.take() else { return };
        let element = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        if io.string {
            self.io_elements.clear();
            self.io_elements.extend(data.chunks(io.size.into()).take(io.count as usize).rev().map(element));
            return;
        }
        let value = element(&data[..data.len().min(4)]);
        match io.size {
            1 => self.put_gpr(crate::state::Gpr::Rax, value as u8),
            2 => self.put_gpr(crate::state::Gpr::Rax, value as u16),
            _ => self.put_gpr(crate::state::Gpr::Rax, value),
        }
        self.skip_io();
    }

    /// The VMM has taken the value of OUT, or the elements of OUTS: they are done.
    pub fn complete_io_out(&mut self) {
        let Some(io) = self.io_pending.take() else { return };
        if io.string {
            self.io_elements.resize(io.count as usize, 0);
            return;
        }
        self.skip_io();
    }

    /// The elements of the OUTS that exited, `size` × `count` bytes, if they are several.
    pub fn outs_data(&self) -> &[u8] {
        &self.outs_data
    }

    /// RIP behind the port access that waits to be completed, if what it waits for is its last.
    pub fn rip_behind_io(&self) -> Option<u64> {
        let io = self.io_pending?;
        (!io.string || io.last).then(|| self.behind_io())
    }

    fn behind_io(&self) -> u64 {
        self.behind(self.io_len)
    }

    fn behind(&self, len: u8) -> u64 {
        self.rip.wrapping_add(u64::from(len)) & self.ip_mask()
    }

    /// RIP moves behind the IN or OUT that exited.
    fn skip_io(&mut self) {
        self.skip_instruction(self.io_len);
    }

    /// RIP moves behind the instruction of `len` bytes that exited: somebody else has done what it does.
    pub fn skip_instruction(&mut self, len: u8) {
        self.rip = self.behind(len);
        self.instructions += 1;
        self.rflags &= !Rflags::RF.bits();
        if self.rflags & Rflags::TF.bits() != 0 {
            self.debug_pending |= Dr6::BS.bits();
        }
    }

    /// Drops what an earlier exit waits for: user space has loaded other registers.
    pub fn abandon_exit(&mut self) {
        self.forget_answers();
        self.mmio.waiting = None;
        self.io_pending = None;
    }

    /// The port access that waits to be completed.
    pub fn pending_io(&self) -> Option<Io> {
        self.io_pending
    }

    /// Guest-physical address that a supervisor's read of `la` would reach; `None` if it is not mapped. The walk sets
    /// accessed bits, as KVM's does (`kvm_mmu_gva_to_gpa_system`).
    pub fn translate(&mut self, la: u64) -> Option<u64> {
        self.refresh_memory();
        let access = mmu::Access { kind: mmu::AccessKind::Read, user: false, implicit: false };
        mmu::walk(&self.view, &self.paging(), x86_defs::LinearAddr(la), access).ok().map(|found| found.gpa.0)
    }

    /// #UD, for rows that find their operands invalid only when run.
    pub(crate) fn undefined(&mut self) -> Stop {
        self.fault(Fault::UD)
    }
}
#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;
    use x86_defs::GuestPhysAddr;

    use crate::state::Gpr;
    use crate::testing::{CODE, Machine, RAM};
    use crate::vmx::{Exit, Mmio};

    /// An instruction that no core will ever have ends the tests: UD-like but reported (SDM Vol. 3 "GETSEC").
    const END: [u8; 2] = [0x0f, 0x37];

    fn end(a: &mut CodeAssembler) {
        a.db(&END).expect("two bytes");
    }

    fn run_to_end(machine: &mut Machine) {
        let exit = machine.cpu.run();
        assert!(matches!(exit, Exit::Unimplemented { bytes, .. } if bytes[..2] == END), "{exit:?}");
    }

    #[test]
    fn loop_with_memory_and_calls() {
        let mut machine = Machine::new_64bit(|a| {
            let (mut top, mut square) = (a.create_label(), a.create_label());
            let mut done = a.create_label();
            a.mov(ecx, 1000).unwrap();
            a.xor(ebx, ebx).unwrap();
            a.mov(rsi, 0x20_0000u64).unwrap();
            a.set_label(&mut top).unwrap();
            a.mov(eax, ecx).unwrap();
            a.call(square).unwrap();
            a.add(qword_ptr(rsi), rax).unwrap();
            a.dec(ecx).unwrap();
            a.jne(top).unwrap();
            a.mov(rbx, qword_ptr(rsi)).unwrap();
            a.jmp(done).unwrap();
            a.set_label(&mut square).unwrap();
            a.push(rdx).unwrap();
            a.lea(rdx, qword_ptr(rax + rax * 2 + 5)).unwrap();
            a.add(rax, rdx).unwrap();
            a.pop(rdx).unwrap();
            a.ret().unwrap();
            a.set_label(&mut done).unwrap();
            end(a);
        });
        run_to_end(&mut machine);
        let sum: u64 = (1..=1000u64).map(|n| 4 * n + 5).sum();
        assert_eq!(machine.cpu.reg(Gpr::Rbx), sum);
        assert_eq!(machine.cpu.reg(Gpr::Rsp), 0x7_0000);
        assert_eq!(machine.cpu.instructions(), 3 + 1000 * 10 + 2);
    }

    /// Both run by themselves, for they lie across page ends, and the second in the ops of the first.
    #[test]
    fn a_call_returns_behind_another_single_instruction() {
        const CALL: u64 = 0x3_0ffd;
        const FUNCTION: u64 = 0x3_1ffd;
        let mut machine = Machine::new_64bit(|a| {
            a.mov(rax, CALL).unwrap();
            a.jmp(rax).unwrap();
        });
        let distance = (FUNCTION - (CALL + 5)) as u32;
        machine.write(CALL, &[&[0xe8][..], &distance.to_le_bytes()].concat());
        machine.write(CALL + 5, &[&[0xbb, 42, 0, 0, 0][..], &END].concat()); // mov ebx, 42
        machine.write(FUNCTION, &[0x0f, 0x85, 1, 0, 0, 0, 0x90, 0xc3]); // jne over a nop, with more ops than a call; ret
        machine.write(0, &END); // where a lost return address leads
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rbx), 42);
        assert_eq!(machine.cpu.reg(Gpr::Rsp), 0x7_0000);
    }

    #[test]
    fn store_into_the_next_instruction_is_seen() {
        let mut machine = Machine::new_64bit(|a| {
            // Turns `mov eax, 1` into `mov eax, 7` just before it runs.
            let mut target = a.create_label();
            a.lea(rsi, ptr(target)).unwrap();
            a.mov(byte_ptr(rsi + 1), 7).unwrap();
            a.set_label(&mut target).unwrap();
            a.mov(eax, 1).unwrap();
            end(a);
        });
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rax), 7);
    }

    #[test]
    fn code_that_the_vmm_rewrites_between_runs_is_decoded_again() {
        let mut machine = Machine::new_64bit(|a| {
            a.mov(eax, 1).unwrap();
            end(a);
        });
        run_to_end(&mut machine);
        machine.write(CODE + 1, &[9]);
        machine.cpu.rip = CODE;
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rax), 9);
    }

    #[test]
    fn device_read_starts_again_with_the_answer_and_device_write_is_reported_behind_the_instruction() {
        let gpa = RAM + 0x10;
        let mut machine = Machine::new_64bit(|a| {
            a.mov(rsi, gpa).unwrap();
            a.add(dword_ptr(rsi), 5).unwrap();
            a.mov(ebx, 1).unwrap();
            end(a);
        });
        assert_eq!(machine.cpu.run(), Exit::Mmio(Mmio { gpa, len: 4, write: None }));
        machine.cpu.complete_mmio_read(0x1_0000_0010);
        assert_eq!(machine.cpu.run(), Exit::Mmio(Mmio { gpa, len: 4, write: Some(0x15) }));
        assert_eq!(machine.cpu.reg(Gpr::Rbx), 0);
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rbx), 1);
    }

    #[test]
    fn instruction_over_a_page_end_runs_and_is_seen_to_change() {
        let mut machine = Machine::new_64bit(|a| {
            a.mov(eax, 1).unwrap();
            end(a);
        });
        machine.write(0x2ffd, &[0xb8, 1, 2, 3, 4, END[0], END[1]]);
        machine.cpu.rip = 0x2ffd;
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rax), 0x0403_0201);
        machine.write(0x3000, &[0x55]);
        machine.cpu.rip = 0x2ffd;
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rax), 0x0455_0201);
    }

    #[test]
    fn real_mode_arithmetic_and_stack() {
        let mut machine = Machine::new_real(|a| {
            a.mov(ax, 0x1234).unwrap();
            a.push(ax).unwrap();
            a.mov(word_ptr(0x500), ax).unwrap();
            a.pop(bx).unwrap();
            a.add(bh, al).unwrap();
            end(a);
        });
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rbx), 0x4634);
        assert_eq!(machine.read::<2>(0x500), [0x34, 0x12]);
    }

    #[test]
    fn kick_ends_an_endless_loop() {
        let mut machine = Machine::new_64bit(|a| {
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.inc(rax).unwrap();
            a.jmp(top).unwrap();
        });
        // More than once, for on a loaded machine the kick may come before the first instruction does.
        for _ in 0..100 {
            let kick = machine.cpu.kicker();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(30));
                kick.kick();
            });
            assert_eq!(machine.cpu.run(), Exit::ExternalInterrupt);
            thread.join().expect("no panic");
            if machine.cpu.reg(Gpr::Rax) > 1000 {
                return;
            }
        }
        panic!("the loop does not go on: {}", machine.cpu.reg(Gpr::Rax));
    }

    #[test]
    fn clts_lets_sse_instructions_through() {
        let mut machine = Machine::new_64bit(|a| {
            a.clts().unwrap();
            a.pxor(xmm0, xmm0).unwrap();
            end(a);
        });
        machine.cpu.cr0 |= x86_defs::Cr0::TS;
        machine.cpu.derive();
        run_to_end(&mut machine);
    }

    /// A VMM may make the slot that holds the page tables after the vCPU, and load PAE state before the first run.
    #[test]
    fn control_registers_are_loaded_from_the_memory_of_now() {
        let memory = std::sync::Arc::new(mmu::Memory::new());
        let platform = Box::new(crate::platform::HostPlatform::default());
        let mut cpu = crate::Cpu::new(memory.clone(), platform, 40);
        let mapping = mmu::Mapping::create("test", 0x4000).unwrap();
        mapping.store_u64(0x1000, 0x2001).unwrap();
        mapping.store_u64(0x2000, 0x87).unwrap();
        let spec = mmu::SlotSpec {
            id: 0,
            gpa: GuestPhysAddr(0),
            len: 0x4000,
            flags: mmu::SlotFlags::default(),
            userspace_addr: 0,
            backing: mmu::Backing::new(mapping, 0),
        };
        memory.set_slot(spec).unwrap();
        let mut sregs = cpu.sregs();
        sregs.cr0 = x86_defs::Cr0::PE | x86_defs::Cr0::PG;
        sregs.cr4 = x86_defs::Cr4::PAE;
        sregs.cr3 = 0x1000;
        cpu.set_sregs(&sregs);
        assert_eq!(cpu.translate(0x1234), Some(0x1234));
        memory.delete_slot(0).unwrap();
        assert_eq!(cpu.translate(0x1234), None);
    }

    /// SeaBIOS makes its ROM area RAM, and back, while it runs there: QEMU deletes the slot and adds it again.
    #[test]
    fn a_slot_that_is_replaced_under_running_code() {
        let mut machine = Machine::new_64bit(|a| {
            a.mov(eax, 1).unwrap();
            a.out(0x80, al).unwrap();
            a.mov(ebx, 2).unwrap();
            end(a);
        });
        let exit = machine.cpu.run();
        assert!(matches!(exit, Exit::Io(_)), "{exit:?}");
        machine.cpu.complete_io_out();
        let memory = machine.memory.clone();
        let mapping = mmu::Mapping::create("other", RAM).unwrap();
        let mut bytes = vec![0; RAM as usize];
        machine.cpu.view.read(GuestPhysAddr(0), &mut bytes).unwrap();
        mapping.write(0, &bytes).unwrap();
        // The new RAM has another instruction where the guest goes on: mov ebx, 5.
        mapping.store_u8(CODE + 8, 5).unwrap();
        let backing = mmu::Backing::new(mapping, 0);
        let flags = mmu::SlotFlags::default();
        memory.delete_slot(0).unwrap();
        let spec = mmu::SlotSpec { id: 7, gpa: GuestPhysAddr(0), len: RAM, flags, userspace_addr: 0, backing };
        memory.set_slot(spec).unwrap();
        memory.wait_until_seen(memory.generation());
        run_to_end(&mut machine);
        assert_eq!(machine.cpu.reg(Gpr::Rbx), 5);
    }
}
