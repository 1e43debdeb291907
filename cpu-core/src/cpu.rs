//! One CPU: architectural state and the caches that hang on it.
//!
//! The hot part comes first, so that handlers reach it with short displacements. Everything derived (bounds, contexts)
//! is recomputed by [`Cpu::derive`] whenever what it hangs on changes.

#![expect(unsafe_code, reason = "one `unsafe impl Send`, with its proof")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu::tlb::Tlb;
use mmu::{Memory, View};
use x86_defs::{Cr0, Cr4, Dr7, Efer, Rflags, cpuid};

use crate::decode::trace::{Links, Traces};
use crate::event::smm::SMBASE_RESET;
use crate::fault::Fault;
use crate::flags::{Flags, STATUS};
use crate::isa::PauseLoop;
use crate::op::{Op, RasEntry};
use crate::platform::Platform;
use crate::profile::{Counts, Profile, Ran};
use crate::state::{
    Breakpoints, CpuidEntry, DebugRegs, DescriptorTable, Events, Fpu, Gpr, Msrs, Regs, Seg, Segment, Sregs, Variant,
    VectorRegister,
};
use crate::vmx::{Exit, Io, Mmio};
use crate::word::Word;

/// Byte offset of a slot of `gpr` that always holds 0: absent base or index.
pub(crate) const SLOT_ZERO: u8 = 16 * 8;
/// Holds the offset in CS at which the running trace starts; an op's own is that plus [`Op::off`].
pub(crate) const SLOT_TRACE_IP: u8 = 17 * 8;
/// Holds a 64-bit displacement that does not fit an op.
pub(crate) const SLOT_WIDE: u8 = 18 * 8;

/// Bits of [`Cpu::fp_gate`], derived from CR0 and CR4.
pub(crate) mod fp_gate {
    /// CR0.TS: #NM.
    pub(crate) const TS: u8 = 1;
    /// CR0.EM: #NM for x87, #UD for MMX and SSE.
    pub(crate) const EM: u8 = 2;
    /// CR4.OSFXSR is clear: #UD for SSE.
    pub(crate) const NO_OSFXSR: u8 = 4;
    /// CR0.MP: TS holds for WAIT too.
    pub(crate) const MP: u8 = 8;
    /// CR4.OSXSAVE or XCR0 is not set up for AVX, or the mode has no VEX prefix: #UD.
    pub(crate) const NO_AVX: u8 = 16;
    /// The same for AVX-512.
    pub(crate) const NO_AVX512: u8 = 32;
}

const RAS_ENTRIES: usize = 32;
const JUMP_ENTRIES: usize = 4096;

/// Fault or exit is recorded in [`Cpu::stop`]; nothing of the instruction has been committed.
#[derive(Clone, Copy, Debug)]
pub struct Stop;

/// What an instruction that ran to its end wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The next instruction of the trace.
    Next,
    /// The next instruction in memory order, looked up anew: mode, rights, interrupts or code may have changed.
    Leave,
    /// The instruction loaded RIP itself, and changed nothing that decoding, translation or interrupts hang on.
    Branch,
    /// The instruction loaded RIP itself.
    Jump,
    /// The instruction is not finished (REP): RIP stays at it, state so far is committed.
    Again,
}

/// Result of a handler written as a plain function.
pub type Done = Result<Then, Stop>;

/// Why [`Stop`] was returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Deliver this to the guest.
    Fault(Fault),
    /// Tell the KVM layer.
    Exit(Exit),
}

/// Direct-mapped cache of trace heads by offset in CS and context.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct JumpEntry {
    pub(crate) ip: u64,
    pub(crate) context: u64,
    pub(crate) op: *const Op,
}

/// A CPU. Created by [`Cpu::new`], driven by [`Cpu::run`].
#[repr(C, align(64))]
pub struct Cpu {
    pub(crate) gpr: [u64; 20],
    /// Kind of the lazy flags; `fa` and `fb` are current only while no handler runs.
    pub(crate) fk: u64,
    pub(crate) fa: u64,
    pub(crate) fb: u64,
    /// Instructions left in this quantum; current only while no handler runs.
    pub(crate) budget: i64,
    /// Epoch that trace heads compare; anything else than theirs sends them to `enter_again`. Points into `kick`.
    pub(crate) stamp: *const AtomicU64,
    /// Address-space generation and mode that jump cache and return stack entries carry.
    pub(crate) code_context: u64,
    /// Linear address of offset 0, as addressing uses it: 0 in 64-bit mode but for FS and GS.
    pub(crate) seg_base: [u64; 6],
    /// First offset past what may be read through the segment; 0 where a full check is due.
    pub(crate) read_bound: [u64; 6],
    /// First offset past what may be written through the segment; 0 where a full check is due.
    pub(crate) write_bound: [u64; 6],
    /// The current op asked to leave the trace once it is done.
    pub(crate) leave: bool,
    /// The loop must run the next instruction by itself.
    pub(crate) alone: bool,
    /// The access that missed the TLB: linear address; bytes, and whether it writes.
    pub(crate) miss: (u64, u32),
    /// What holds back x87, MMX and SSE instructions; 0 where nothing does. See [`fp_gate`].
    pub(crate) fp_gate: u8,
    pub(crate) ras_top: u64,
    pub(crate) ras: [RasEntry; RAS_ENTRIES],
    pub(crate) tlb: Tlb,
    pub(crate) jumps: [JumpEntry; JUMP_ENTRIES],

    /// Offset in CS of the next instruction; current only while no trace runs.
    pub rip: u64,
    /// RFLAGS but the status flags, which [`Cpu::rflags`] adds.
    pub(crate) rflags: u64,
    /// Segment registers in encoding order.
    pub(crate) seg: [Segment; 6],
    /// Task register.
    pub(crate) tr: Segment,
    /// Local descriptor table.
    pub(crate) ldt: Segment,
    pub(crate) gdt: DescriptorTable,
    pub(crate) idt: DescriptorTable,
    pub(crate) cr0: Cr0,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: Cr4,
    pub(crate) cr8: u64,
    pub(crate) efer: Efer,
    /// PAE's page-directory pointers, as loaded by the last MOV CR3.
    pub(crate) pdpte: [u64; 4],
    pub(crate) debug: DebugRegs,
    /// A debugger's, which hide the guest's own.
    pub(crate) debugger: Option<Breakpoints>,
    pub(crate) msrs: Msrs,
    pub(crate) fpu: Fpu,
    /// The memory operand of the VEX-encoded instruction that runs.
    pub(crate) memory_vector: VectorRegister,
    pub(crate) events: Events,
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) offered: Offered,
    /// Current privilege level.
    pub(crate) cpl: u8,
    /// Address width of MAXPHYADDR, bits.
    pub(crate) phys_bits: u8,
    /// 1-GByte pages exist.
    pub(crate) page_1gb: bool,

    /// User space has loaded state that no VM entry has checked yet.
    pub(crate) unchecked: bool,
    pub(crate) stop: Option<StopReason>,
    /// Instruction count at which an STI or MOV SS shadow was set up; it holds back events while the count is the same.
    /// Which of the two: [`Events::shadow_sti`], [`Events::shadow_mov_ss`].
    pub(crate) shadow_at: u64,
    /// The running instruction sets up a shadow over the next one.
    pub(crate) shadow_wanted: bool,
    /// The running instruction loaded RF on purpose (IRET, task switch): it stays for the next one.
    pub(crate) keep_rf: bool,
    /// The running instruction takes no single-step trap (MOV SS, or it was delivered as an exception).
    pub(crate) suppress_step: bool,
    pub(crate) pause_loop: PauseLoop,
    /// Length of the IN, OUT, INS or OUTS that exited.
    pub(crate) io_len: u8,
    /// #DB causes to be reported once the current instruction is done.
    pub(crate) debug_pending: u64,
    /// Instructions completed since the CPU was created, as of the last return to the loop.
    pub(crate) instructions: u64,
    /// Budget when the quantum began.
    pub(crate) quantum: i64,
    /// Report [`Exit::InterruptWindow`] when it opens.
    pub(crate) interrupt_window: bool,
    /// Vectors that exit instead of being delivered (bit n: vector n): the debugger's.
    pub(crate) intercepts: u32,
    /// The debugger holds NMIs and SMIs back.
    pub(crate) holds_nmi: bool,
    pub(crate) mmio: MmioLog,
    pub(crate) io_pending: Option<Io>,
    /// Elements that a device gave for INS, the next one last; for OUTS as many as it took, whose values say nothing.
    pub(crate) io_elements: Vec<u32>,
    /// What an exit of OUTS with several elements hands over.
    pub(crate) outs_data: Vec<u8>,
    pub(crate) variant: Variant,
    pub(crate) traces: Traces,
    /// The memory generation that host pointers in `tlb` and `traces` belong to.
    pub(crate) view: View,
    pub(crate) platform: Box<dyn Platform>,
    pub(crate) kick: Arc<Kick>,
    /// What `code_context` stands for, of supervisor and of user code.
    pub(crate) links: [Links; 2],
    /// What is slow anyway, counted.
    pub(crate) counts: Counts,
    /// What the loop entered last.
    pub(crate) ran: Option<Ran>,
    pub(crate) profile: Arc<Profile>,
}

/// Features that frequent instructions ask for, looked up once in the CPUID table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offered {
    pub(crate) smap: bool,
    pub(crate) rdtscp: bool,
    pub(crate) rdpid: bool,
    /// Places of components in an XSAVE area of the standard format, bytes.
    pub(crate) opmask_at: u32,
    pub(crate) zmm_hi256_at: u32,
    pub(crate) hi16_zmm_at: u32,
    pub(crate) pkru_at: u32,
}

/// Where the extended region of an XSAVE area begins, bytes.
const XSAVE_HEADER_END: u32 = 576;
/// The last place of a component: all of them end in one page.
const XSAVE_LAST: u32 = 4096 - 1024;
/// Places of AVX-512's components where CPUID leaf 0DH does not say: as on Intel's CPUs.
const OPMASK_AT: u32 = 1088;
const ZMM_HI256_AT: u32 = 1152;
const HI16_ZMM_AT: u32 = 1664;
/// Place of PKRU where CPUID leaf 0DH does not say: behind AVX, as on AMD's CPUs.
const PKRU_AT: u32 = XSAVE_HEADER_END + 256;

/// Accesses of the current instruction to memory that the VMM backs.
///
/// A read stops the instruction; when the VMM has answered, the instruction starts again and finds the answer here. A
/// write is queued, the instruction finishes, and the queue is reported before the next one.
#[derive(Debug, Default)]
pub(crate) struct MmioLog {
    /// Reads that were answered, in order.
    pub(crate) answered: Vec<(u64, u8, u64)>,
    /// How many of them the current attempt has used.
    pub(crate) used: usize,
    /// The read that waits.
    pub(crate) waiting: Option<(u64, u8)>,
    /// Writes to be reported, in order.
    pub(crate) writes: std::collections::VecDeque<Mmio>,
    /// RIP of the instruction that was run by itself last, as whatever accesses a device is.
    pub(crate) rip: u64,
}

/// Makes a running CPU come back. Any thread may hold one.
#[derive(Debug)]
pub struct Kick {
    stamp: AtomicU64,
    asked: AtomicU64,
}

/// Set in the stamp while somebody wants the CPU's attention: no trace head ever carries it.
const ATTENTION: u64 = 1 << 63;

impl Kick {
    fn new() -> Arc<Self> {
        Arc::new(Self { stamp: AtomicU64::new(1), asked: AtomicU64::new(0) })
    }

    /// [`Cpu::run`] returns [`Exit::ExternalInterrupt`] at the next instruction boundary, or at once when next called.
    pub fn kick(&self) {
        self.asked.fetch_or(1, Ordering::SeqCst);
        self.stamp.fetch_or(ATTENTION, Ordering::SeqCst);
    }

    /// The CPU looks at its view of memory at the next instruction boundary, and does not return.
    pub fn refresh(&self) {
        self.asked.fetch_or(2, Ordering::SeqCst);
        self.stamp.fetch_or(ATTENTION, Ordering::SeqCst);
    }

    /// The CPU notes what it runs now, and does not return. Without effect while it is outside the guest.
    pub fn sample(&self) {
        self.asked.fetch_or(ASKED_SAMPLE, Ordering::SeqCst);
        self.stamp.fetch_or(ATTENTION, Ordering::SeqCst);
    }

    /// True: [`Self::sample`] was called and is not answered. It is now.
    pub(crate) fn take_sample(&self) -> bool {
        self.asked() && self.asked.fetch_and(!ASKED_SAMPLE, Ordering::SeqCst) & ASKED_SAMPLE != 0
    }

    /// Whoever called [`Self::sample`] has no answer yet.
    pub fn owes_sample(&self) -> bool {
        self.asked.load(Ordering::SeqCst) & ASKED_SAMPLE != 0
    }

    /// Forgets a kick that has not been answered.
    pub fn clear(&self) {
        self.asked.fetch_and(!1, Ordering::SeqCst);
    }

    /// Current epoch, and nothing asked any more. The caller looks at what was asked.
    pub(crate) fn take(&self) -> u64 {
        // The bit goes first: whoever asks later sets it again.
        self.stamp.fetch_and(!ATTENTION, Ordering::SeqCst);
        self.asked.swap(0, Ordering::SeqCst)
    }

    /// Somebody wants the CPU's attention.
    pub(crate) fn asked(&self) -> bool {
        self.stamp.load(Ordering::Relaxed) & ATTENTION != 0
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed) & !ATTENTION
    }

    pub(crate) fn next_epoch(&self) {
        self.stamp.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn stamp(&self) -> *const AtomicU64 {
        &self.stamp
    }
}

/// Kick asked for a return from `run`.
pub(crate) const ASKED_RETURN: u64 = 1;
/// Kick asked for a sample.
pub(crate) const ASKED_SAMPLE: u64 = 4;

impl Cpu {
    /// A CPU in the state after power-up (SDM Vol. 3 "Processor State After Reset"). `phys_bits`: MAXPHYADDR.
    pub fn new(memory: Arc<Memory>, platform: Box<dyn Platform>, phys_bits: u8) -> Box<Self> {
        let kick = Kick::new();
        let view = View::new(&memory);
        let mut cpu = Box::new(Self {
            gpr: [0; 20],
            fk: 0,
            fa: 0,
            fb: 0,
            budget: 0,
            stamp: kick.stamp(),
            code_context: 0,
            seg_base: [0; 6],
            read_bound: [0; 6],
            write_bound: [0; 6],
            leave: false,
            alone: false,
            miss: (0, 0),
            fp_gate: 0,
            ras_top: 0,
            ras: [RasEntry::EMPTY; RAS_ENTRIES],
            tlb: Tlb::new(),
            jumps: [JumpEntry { ip: 0, context: 0, op: std::ptr::null() }; JUMP_ENTRIES],
            rip: 0,
            rflags: 0,
            seg: [Segment::default(); 6],
            tr: Segment::default(),
            ldt: Segment::default(),
            gdt: DescriptorTable::default(),
            idt: DescriptorTable::default(),
            cr0: Cr0::empty(),
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            cr8: 0,
            efer: Efer::empty(),
            pdpte: [0; 4],
            debug: DebugRegs::default(),
            debugger: None,
            msrs: Msrs::default(),
            fpu: Fpu::default(),
            memory_vector: VectorRegister::default(),
            events: Events::default(),
            cpuid: Vec::new(),
            offered: Offered {
                smap: true,
                rdtscp: true,
                rdpid: true,
                opmask_at: OPMASK_AT,
                zmm_hi256_at: ZMM_HI256_AT,
                hi16_zmm_at: HI16_ZMM_AT,
                pkru_at: PKRU_AT,
            },
            cpl: 0,
            phys_bits,
            page_1gb: true,
            unchecked: false,
            stop: None,
            shadow_at: u64::MAX,
            shadow_wanted: false,
            keep_rf: false,
            suppress_step: false,
            pause_loop: PauseLoop::default(),
            io_len: 0,
            debug_pending: 0,
            instructions: 0,
            quantum: 0,
            interrupt_window: false,
            intercepts: 0,
            holds_nmi: false,
            mmio: MmioLog::default(),
            io_pending: None,
            io_elements: Vec::new(),
            outs_data: Vec::new(),
            variant: Variant::default(),
            traces: Traces::new(),
            view,
            platform,
            kick,
            links: Default::default(),
            counts: Counts::default(),
            ran: None,
            profile: Arc::default(),
        });
        cpu.reset();
        cpu
    }

    /// State after power-up.
    pub fn reset(&mut self) {
        self.set_smm(false);
        self.gpr = [0; 20];
        // Family 6: EDX holds the processor signature.
        self.gpr[Gpr::Rdx as usize] = 0x600;
        self.rip = 0xfff0;
        self.set_rflags(2);
        self.seg = [Segment::real_mode(0); 6];
        self.seg[Seg::Cs as usize] =
            Segment { selector: 0xf000, base: 0xffff_0000, type_: 0xb, ..Segment::real_mode(0xf000) };
        self.ldt = Segment { limit: 0xffff, type_: 2, present: true, ..Segment::default() };
        self.tr = Segment { limit: 0xffff, type_: 0xb, present: true, ..Segment::default() };
        self.gdt = DescriptorTable { base: 0, limit: 0xffff };
        self.idt = DescriptorTable { base: 0, limit: 0xffff };
        self.cr0 = Cr0::RESET;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = Cr4::empty();
        self.cr8 = 0;
        self.efer = Efer::empty();
        self.debug = DebugRegs::default();
        self.msrs = Msrs { smbase: SMBASE_RESET, ..Msrs::default() };
        self.fpu = Fpu::default();
        self.events = Events::default();
        self.flush_tlb();
        self.derive();
    }

    /// The handle that other threads use to call this CPU back.
    pub fn kicker(&self) -> Arc<Kick> {
        self.kick.clone()
    }

    // Registers

    /// A general register, 64 bits.
    #[inline(always)]
    pub fn reg(&self, register: Gpr) -> u64 {
        self.gpr[register as usize]
    }

    /// Sets all 64 bits of a general register.
    #[inline(always)]
    pub fn set_reg(&mut self, register: Gpr, value: u64) {
        self.gpr[register as usize] = value;
    }

    /// The register that a register operand (`Op::dst`, `src`) names, AH to BH included.
    #[inline(always)]
    pub(crate) fn get<W: Word>(&self, slot: u8) -> W {
        // An odd slot is AH to BH: the second byte of the register below it.
        W::of(self.gpr[usize::from(slot >> 3)] >> ((slot & 7) * 8))
    }

    /// Writes a register operand as its width demands: 32 bits clear the upper half, 8 and 16 keep the rest.
    #[inline(always)]
    pub(crate) fn put<W: Word>(&mut self, slot: u8, value: W) {
        let register = &mut self.gpr[usize::from(slot >> 3)];
        if W::BYTES >= 4 {
            *register = value.zext();
        } else {
            let shift = (slot & 7) * 8;
            let mask = (u64::MAX >> (64 - W::BITS)) << shift;
            *register = *register & !mask | value.zext() << shift;
        }
    }

    /// Writes RAX, RCX, … by width: as [`Self::put`].
    pub(crate) fn put_gpr<W: Word>(&mut self, register: Gpr, value: W) {
        self.put(register as u8 * 8, value);
    }

    /// The status flags, lazy.
    #[inline(always)]
    pub(crate) fn flags(&self) -> Flags {
        Flags { kind: self.fk, a: self.fa, b: self.fb }
    }

    /// Replaces the status flags.
    #[inline(always)]
    pub(crate) fn set_flags(&mut self, flags: Flags) {
        self.fk = flags.kind;
        self.fa = flags.a;
        self.fb = flags.b;
    }

    /// All of RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.rflags | self.flags().bits()
    }

    /// Loads all of RFLAGS without privilege checks. The caller leaves the trace if IF, TF, VM, RF or AC may have moved.
    pub fn set_rflags(&mut self, value: u64) {
        let value = value & RFLAGS_MASK | 2;
        self.set_flags(Flags::explicit(value));
        let old = std::mem::replace(&mut self.rflags, value & !STATUS);
        if (old ^ value) & (Rflags::VM | Rflags::AC).bits() != 0 {
            self.derive();
        }
    }

    // Modes

    /// EFER.LMA and CS.L: 64-bit mode.
    #[inline(always)]
    pub fn is_64bit(&self) -> bool {
        self.efer.contains(Efer::LMA) && self.seg[Seg::Cs as usize].l
    }

    /// IA-32e mode: 64-bit or compatibility.
    pub(crate) fn is_long(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// CR0.PE set and RFLAGS.VM clear.
    pub(crate) fn is_protected(&self) -> bool {
        self.cr0.contains(Cr0::PE) && self.rflags & Rflags::VM.bits() == 0
    }

    /// Virtual-8086 mode.
    pub(crate) fn is_v86(&self) -> bool {
        self.rflags & Rflags::VM.bits() != 0
    }

    /// Real-address mode.
    pub(crate) fn is_real(&self) -> bool {
        !self.cr0.contains(Cr0::PE)
    }

    /// I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        (self.rflags >> Rflags::IOPL_SHIFT) as u8 & 3
    }

    /// Bytes of code operand default: 2, 4 or 8 (64-bit mode).
    pub(crate) fn code_bytes(&self) -> u32 {
        match (self.is_64bit(), self.seg[Seg::Cs as usize].db) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        }
    }

    /// Mask of the stack pointer: SP, ESP or RSP.
    pub(crate) fn stack_mask(&self) -> u64 {
        match (self.is_64bit(), self.seg[Seg::Ss as usize].db) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        }
    }

    /// Mask of the instruction pointer in the current mode.
    pub(crate) fn ip_mask(&self) -> u64 {
        if self.is_64bit() { u64::MAX } else { 0xffff_ffff }
    }

    /// Recomputes what hangs on one segment register alone: all there is behind a load of DS, ES, FS or GS.
    pub(crate) fn derive_segment(&mut self, seg: Seg) {
        let i = seg as usize;
        let (segment, long) = (&self.seg[i], self.is_64bit());
        let real = self.is_real() || self.is_v86();
        let flat = long && !matches!(seg, Seg::Fs | Seg::Gs);
        let bound = if long {
            u64::MAX
        } else if segment.unusable || !segment.present || segment.is_expand_down() {
            0
        } else {
            u64::from(segment.limit) + 1
        };
        let (base, readable, writable) = (segment.base, segment.is_readable(), segment.is_writable());
        self.seg_base[i] = if flat { 0 } else { base };
        self.read_bound[i] = if long || real || readable { bound } else { 0 };
        self.write_bound[i] = if long || real || writable { bound } else { 0 };
    }

    /// Vector instructions with a prefix, which need `state`, exist (SDM Vol. 1 "Detection of Intel AVX Instructions",
    /// "Detection of AVX-512 Foundation Instructions").
    fn prefix_enabled(&self, state: x86_defs::XCr0) -> bool {
        self.cr4.contains(Cr4::OSXSAVE)
            && x86_defs::XCr0::from_bits_retain(self.fpu.xcr0).contains(state)
            && !self.is_real()
            && !self.is_v86()
    }

    /// Loads XCR0; the caller has checked it.
    pub fn set_xcr0(&mut self, value: u64) {
        self.fpu.xcr0 = value;
        self.derive();
    }

    /// Recomputes what hangs on segments, CR0, CR4, XCR0, EFER, CPL and RFLAGS. Call it after changing any of them.
    pub fn derive(&mut self) {
        for seg in Seg::ALL {
            self.derive_segment(seg);
        }
        let avx = x86_defs::XCr0::SSE | x86_defs::XCr0::AVX;
        let avx512 = avx | x86_defs::XCr0::OPMASK | x86_defs::XCr0::ZMM_HI256 | x86_defs::XCr0::HI16_ZMM;
        self.fp_gate = [
            (self.cr0.contains(Cr0::TS), fp_gate::TS),
            (self.cr0.contains(Cr0::EM), fp_gate::EM),
            (!self.cr4.contains(Cr4::OSFXSR), fp_gate::NO_OSFXSR),
            (self.cr0.contains(Cr0::MP), fp_gate::MP),
            (!self.prefix_enabled(avx), fp_gate::NO_AVX),
            (!self.prefix_enabled(avx512), fp_gate::NO_AVX512),
        ]
        .iter()
        .fold(0, |gate, (holds, bit)| if *holds { gate | bit } else { gate });
        let user = self.cpl == 3;
        let ac = if user {
            self.alignment_checked()
        } else {
            self.cr4.contains(Cr4::SMAP) && self.rflags & Rflags::AC.bits() != 0
        };
        self.tlb.set_context(user, ac);
        self.enter_links();
    }

    /// What traces are keyed by besides their address.
    pub(crate) fn mode(&self) -> crate::decode::Mode {
        crate::decode::Mode::new(self.code_bytes(), self.stack_mask(), self.cpl == 3)
    }

    /// Drops all translations and what was found through them.
    pub fn flush_tlb(&mut self) {
        self.counts.tlb_flushes += 1;
        self.tlb.flush();
        self.forget_jumps();
    }

    /// MOV CR3: the same for what is not global.
    pub(crate) fn flush_local(&mut self) {
        self.counts.tlb_flushes += 1;
        self.tlb.flush_local();
        self.forget_local_jumps();
    }

    /// INVLPG: drops the page of `la`, and what was found through it.
    pub(crate) fn flush_page(&mut self, la: u64) {
        self.counts.page_flushes += 1;
        if self.tlb.flush_page(la) || self.is_linked(la) {
            self.forget_jumps();
        }
    }

    /// The instruction was serialising: what others wrote to code is seen from here on.
    pub(crate) fn serialize(&mut self) {
        self.kick.next_epoch();
    }

    // Stops

    /// Records a fault of the current instruction.
    #[cold]
    pub(crate) fn fault(&mut self, fault: Fault) -> Stop {
        self.stop = Some(StopReason::Fault(fault));
        Stop
    }

    /// Records an exit of the current instruction.
    #[cold]
    pub(crate) fn exit(&mut self, exit: Exit) -> Stop {
        self.stop = Some(StopReason::Exit(exit));
        Stop
    }

    /// #GP(0) unless CPL is 0.
    pub(crate) fn require_cpl0(&mut self) -> Result<(), Stop> {
        if self.cpl == 0 { Ok(()) } else { Err(self.fault(Fault::gp(0))) }
    }

    /// Any of DR7's breakpoints is enabled.
    pub(crate) fn has_breakpoints(&self) -> bool {
        let enabled = Dr7::L0 | Dr7::G0 | Dr7::L1 | Dr7::G1 | Dr7::L2 | Dr7::G2 | Dr7::L3 | Dr7::G3;
        self.breakpoints().dr7 & enabled.bits() != 0
    }

    /// The breakpoints in force: the debugger's, or else the guest's own (Linux: `vcpu->arch.eff_db`).
    pub fn breakpoints(&self) -> Breakpoints {
        self.debugger.unwrap_or(Breakpoints { db: self.debug.db, dr7: self.debug.dr7 })
    }

    /// Loads the PDPTE registers where PAE paging uses them, without the checks of MOV CR3.
    fn load_pdptes_quietly(&mut self) {
        if self.cr0.contains(Cr0::PG) && self.cr4.contains(Cr4::PAE) && !self.is_long() {
            // Slots may have changed since the guest last ran.
            self.refresh_memory();
            self.pdpte = mmu::load_pdptes(&self.view, self.cr3, self.phys_bits).unwrap_or_default();
        }
    }

    // State in and out

    /// General registers, RIP, RFLAGS.
    pub fn regs(&self) -> Regs {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.gpr[..16]);
        Regs { gpr, rip: self.rip, rflags: self.rflags() }
    }

    /// Loads general registers, RIP and RFLAGS. A pending exception is the caller's to drop.
    pub fn set_regs(&mut self, regs: &Regs) {
        self.gpr[..16].copy_from_slice(&regs.gpr);
        self.rip = regs.rip;
        self.set_rflags(regs.rflags);
        // What does not exist stays until it is looked at: VM entry refuses it.
        self.rflags |= regs.rflags & !RFLAGS_MASK;
        self.unchecked = true;
    }

    /// Segments, tables and control registers.
    pub fn sregs(&self) -> Sregs {
        Sregs {
            segments: self.seg,
            tr: self.tr,
            ldt: self.ldt,
            gdt: self.gdt,
            idt: self.idt,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.cr8,
            efer: self.efer,
        }
    }

    /// Loads segments, tables and control registers as given; the caller has checked them as KVM does.
    pub fn set_sregs(&mut self, sregs: &Sregs) {
        self.seg = sregs.segments;
        self.tr = sregs.tr;
        self.ldt = sregs.ldt;
        self.gdt = sregs.gdt;
        self.idt = sregs.idt;
        self.cr0 = sregs.cr0;
        self.cr2 = sregs.cr2;
        self.cr3 = sregs.cr3;
        self.cr4 = sregs.cr4;
        self.cr8 = sregs.cr8;
        self.efer = sregs.efer;
        self.unchecked = true;
        // VMMs leave the accessed bit out; KVM sets it (`vmx_set_segment`, with unrestricted guest).
        for segment in self.seg.iter_mut().filter(|segment| segment.s) {
            segment.type_ |= 1;
        }
        // VMX keeps the CPL in SS's access rights (SDM Vol. 3 "Guest Register State").
        self.cpl = if self.is_real() { 0 } else { self.seg[Seg::Ss as usize].dpl };
        self.load_pdptes_quietly();
        self.flush_tlb();
        self.derive();
    }

    /// PAE's page-directory pointers, where PAE paging uses them.
    pub fn pdptes(&self) -> Option<[u64; 4]> {
        let used = self.cr0.contains(Cr0::PG) && self.cr4.contains(Cr4::PAE) && !self.is_long();
        used.then_some(self.pdpte)
    }

    /// Loads these pointers in the place of those in memory, until the guest loads CR3.
    pub fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        self.pdpte = pdptes;
        self.flush_tlb();
    }

    /// x87 and vector state.
    pub fn fpu(&self) -> &Fpu {
        &self.fpu
    }

    /// x87 and vector state, to be loaded.
    pub fn fpu_mut(&mut self) -> &mut Fpu {
        if self.cr4.contains(Cr4::PKE) {
            // The TLB holds what the old PKRU allowed.
            self.flush_tlb();
        }
        &mut self.fpu
    }

    /// Loads PKRU: what the TLB holds was allowed by the old one.
    pub(crate) fn set_pkru(&mut self, value: u32) {
        if self.fpu.pkru != value && self.cr4.contains(Cr4::PKE) {
            self.flush_tlb();
        }
        self.fpu.pkru = value;
    }

    /// Debug registers.
    pub fn debug_regs(&self) -> DebugRegs {
        self.debug
    }

    /// Loads the debug registers.
    pub fn set_debug_regs(&mut self, debug: DebugRegs) {
        self.debug = debug;
        self.unchecked = true;
        self.flush_tlb();
    }

    /// Puts a debugger's breakpoints in the place of the guest's, whose registers stay as they are; `None` takes them away.
    /// Their #DB exits only if [`Self::set_exception_bitmap`] says so.
    pub fn set_debugger(&mut self, breakpoints: Option<Breakpoints>) {
        self.debugger = breakpoints;
        self.flush_tlb();
    }

    /// Events between instructions.
    pub fn events(&self) -> Events {
        let (shadow, events) = (self.in_shadow(), self.events);
        Events { shadow_sti: shadow && events.shadow_sti, shadow_mov_ss: shadow && events.shadow_mov_ss, ..events }
    }

    /// Loads the events.
    pub fn set_events(&mut self, events: Events) {
        self.set_smm(events.smm);
        self.events = events;
        self.shadow_at = if events.shadow_sti || events.shadow_mov_ss { self.instructions } else { u64::MAX };
        self.unchecked = true;
    }

    /// An STI or MOV SS shadow holds back events before the next instruction.
    pub(crate) fn in_shadow(&self) -> bool {
        self.shadow_at == self.instructions
    }

    /// Replaces the CPUID table.
    pub fn set_cpuid(&mut self, entries: &[CpuidEntry]) {
        self.cpuid = entries.to_vec();
        let place = |component: u32, otherwise: u32| {
            let found = entries.iter().find(|entry| (entry.function, entry.index) == (0xd, Some(component)));
            found
                .map(|entry| entry.regs[1])
                .filter(|at| (XSAVE_HEADER_END..=XSAVE_LAST).contains(at) && at.is_multiple_of(8))
                .unwrap_or(otherwise)
        };
        self.offered = Offered {
            smap: self.offers(&cpuid::SMAP),
            rdtscp: self.offers(&cpuid::RDTSCP),
            rdpid: self.offers(&cpuid::RDPID),
            opmask_at: place(5, OPMASK_AT),
            zmm_hi256_at: place(6, ZMM_HI256_AT),
            hi16_zmm_at: place(7, HI16_ZMM_AT),
            pkru_at: place(9, PKRU_AT),
        };
    }

    /// Makes [`Exit::InterruptWindow`] wanted or not.
    pub fn set_interrupt_window_exiting(&mut self, wanted: bool) {
        self.interrupt_window = wanted;
    }

    /// The guest would take an external interrupt now: IF set, no shadow, no exception or interrupt waiting.
    pub fn interrupt_window_open(&self) -> bool {
        self.rflags & Rflags::IF.bits() != 0 && !self.in_shadow() && self.events.interrupt.is_none()
    }

    /// Instructions that this CPU has run since it was created.
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// Vectors that exit with [`Exit::Exception`] instead of being delivered; bit n is vector n.
    pub fn set_exception_bitmap(&mut self, vectors: u32) {
        self.intercepts = vectors;
    }

    /// Makes NMIs and SMIs wait, as if another were being handled, or lets them in.
    pub fn hold_nmi(&mut self, hold: bool) {
        self.holds_nmi = hold;
    }
}

// SAFETY: the raw pointers lead into the CPU's own arena and into its `Kick`; both move with it, and one thread at a time
// has `&mut Cpu`.
unsafe impl Send for Cpu {}

/// RFLAGS bits that exist.
pub(crate) const RFLAGS_MASK: u64 = 0x003f_7fd5;
