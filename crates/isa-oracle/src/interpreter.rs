//! The other side of the comparison: the same case on cpu-core, in a guest that looks like the child's process.
//!
//! A small kernel of tables only: 4-level paging with the case's pages for user mode, Linux's selectors, and an IDT whose
//! every handler is a HLT. So exceptions are delivered as to any guest, and the handler's frame shows the state.

use std::sync::Arc;

use cpu_core::{Cpu, DescriptorTable, Exit, HostPlatform, Regs, Segment, Sregs, VectorRegister};
use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec, View};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr};

use crate::layout::{CODE_BASE, CODE_BYTES, DATA_BASE, DATA_BYTES, PAGE, READONLY_BASE, readonly_page};
use crate::segments;
use crate::state::{Avx512, CS, Case, End, Exception, Outcome, State, flag};
use crate::stop::{self, Stop};

/// Where the kernel's pages appear: the canonical upper half, as supervisor.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// Guest-physical pages.
mod gpa {
    pub(super) const PML4: u64 = 0x1000;
    pub(super) const PDPT: u64 = 0x2000;
    pub(super) const PD: u64 = 0x3000;
    pub(super) const PT_CODE: u64 = 0x4000;
    pub(super) const PT_DATA: u64 = 0x5000;
    pub(super) const PDPT_KERNEL: u64 = 0x6000;
    pub(super) const PD_KERNEL: u64 = 0x7000;
    pub(super) const PT_KERNEL: u64 = 0x8000;
    pub(super) const GDT: u64 = 0x9000;
    pub(super) const IDT: u64 = 0xa000;
    pub(super) const TSS: u64 = 0xb000;
    pub(super) const LDT: u64 = 0xb800;
    pub(super) const HANDLERS: u64 = 0xc000;
    pub(super) const STACK_END: u64 = 0xe000;
    pub(super) const CODE: u64 = 0x10000;
    pub(super) const DATA: u64 = 0x12000;
    pub(super) const READONLY: u64 = 0x14000;
    pub(super) const END: u64 = 0x15000;
}

const KERNEL_CS: u16 = 0x10;
const LDT_LIMIT: u32 = 8 * segments::LDT.len() as u32 - 1;
/// Bytes between the handlers of two vectors.
const HANDLER_STRIDE: u64 = 16;
const INT3: u8 = 0xcc;
const HLT: u8 = 0xf4;

impl crate::fuzz::Subject for Interpreter {
    fn run(&mut self, case: &Case) -> Outcome {
        self.run(case)
    }
}

/// A guest on cpu-core.
pub struct Interpreter {
    view: View,
    cpu: Box<Cpu>,
    kernel: Sregs,
    /// Where the last case's code lay.
    dirty_code: (u64, usize),
}

impl Default for Interpreter {
    fn default() -> Self {
        Self::new()
    }
}

impl Interpreter {
    /// Makes the guest.
    pub fn new() -> Self {
        let memory = Arc::new(Memory::new());
        let mapping = Mapping::create("isa-oracle", gpa::END).expect("a small memfd");
        let slot = SlotSpec {
            id: 0,
            gpa: GuestPhysAddr(0),
            len: gpa::END,
            flags: SlotFlags::default(),
            userspace_addr: 0,
            backing: Backing::new(mapping, 0),
        };
        memory.set_slot(slot).expect("the first slot of a VM");
        let mut view = View::new(&memory);
        let _ = view.refresh(); // nothing of an older picture is held
        write_kernel(&view);
        let mut cpu = Cpu::new(memory, Box::new(HostPlatform::default()), 46);
        // x87, SSE and AVX state, and AVX-512's where the host executes it.
        cpu.set_xcr0(if cpu_core::host_has_avx512() { 0xe7 } else { 7 });
        let kernel = kernel_sregs(cpu.sregs());
        Self { view, cpu, kernel, dirty_code: (0, 0) }
    }

    /// Runs `case`.
    pub fn run(&mut self, case: &Case) -> Outcome {
        self.load(case);
        let exit = self.cpu.run();
        self.outcome(case, exit)
    }

    fn load(&mut self, case: &Case) {
        let state = &case.state;
        let (at, length) = self.dirty_code;
        self.write(gpa::CODE + at, &vec![INT3; length]);
        let offset = state.rip.wrapping_sub(case.mode.start()).min(CODE_BYTES as u64);
        let length = case.bytes.len().min(CODE_BYTES - offset as usize);
        self.write(gpa::CODE + offset, &case.bytes[..length]);
        self.dirty_code = (offset, length);
        self.write(gpa::DATA, &state.memory[..]);

        let mut sregs = self.kernel;
        for (register, selector) in sregs.segments.iter_mut().zip(state.seg) {
            *register = user_segment(selector);
        }
        sregs.segments[4].base = state.fs_base;
        sregs.segments[5].base = state.gs_base;
        self.cpu.set_sregs(&sregs);
        let step = if stop::of(case) == Stop::Step { flag::TF } else { 0 };
        let rflags = state.rflags & flag::SETTABLE | step | flag::IF | 2;
        self.cpu.set_regs(&Regs { gpr: state.gpr, rip: state.rip, rflags });
        self.cpu.set_events(Default::default());
        self.cpu.abandon_exit();
        let fpu = self.cpu.fpu_mut();
        let top = usize::from(state.x87.fsw >> 11 & 7);
        for (i, st) in state.x87.st.iter().enumerate() {
            fpu.st[(top + i) & 7] = st.to_le_bytes();
        }
        fpu.fcw = state.x87.fcw;
        fpu.fsw = state.x87.fsw;
        fpu.ftw = state.x87.ftw;
        fpu.fop = state.x87.fop;
        fpu.fip = state.x87.fip;
        fpu.fdp = state.x87.fdp;
        fpu.mxcsr = state.mxcsr;
        for (register, [low, high]) in fpu.vector.iter_mut().zip(&state.ymm) {
            let mut bytes = VectorRegister::default();
            bytes.0[..16].copy_from_slice(&low.to_le_bytes());
            bytes.0[16..32].copy_from_slice(&high.to_le_bytes());
            *register = bytes;
        }
        for (register, lanes) in fpu.vector.iter_mut().zip(&state.avx512.upper) {
            put_lanes(&mut register.0[32..], lanes);
        }
        for (register, lanes) in fpu.vector[16..].iter_mut().zip(&state.avx512.high) {
            put_lanes(&mut register.0, lanes);
        }
        fpu.k = state.avx512.k;
    }

    fn outcome(&mut self, case: &Case, exit: Exit) -> Outcome {
        let regs = self.cpu.regs();
        let sregs = self.cpu.sregs();
        let fpu = self.cpu.fpu();
        let mut state = State {
            gpr: regs.gpr,
            rip: regs.rip,
            rflags: regs.rflags & !(flag::TF | flag::RF),
            seg: std::array::from_fn(|i| sregs.segments[i].selector),
            fs_base: sregs.segments[4].base,
            gs_base: sregs.segments[5].base,
            mxcsr: fpu.mxcsr,
            ..State::default()
        };
        let half = |bytes: &[u8]| u128::from_le_bytes(bytes.try_into().expect("sixteen bytes were taken"));
        state.ymm = std::array::from_fn(|i| [half(&fpu.vector[i].0[..16]), half(&fpu.vector[i].0[16..32])]);
        state.avx512 = Avx512 {
            upper: std::array::from_fn(|i| [half(&fpu.vector[i].0[32..48]), half(&fpu.vector[i].0[48..])]),
            high: std::array::from_fn(|i| std::array::from_fn(|j| half(&fpu.vector[16 + i].0[16 * j..][..16]))),
            k: fpu.k,
        };
        let top = usize::from(fpu.fsw >> 11 & 7);
        state.x87.st = std::array::from_fn(|i| half(&fpu.st[(top + i) & 7]));
        state.x87.fcw = fpu.fcw;
        state.x87.fsw = fpu.fsw;
        state.x87.ftw = fpu.ftw;
        state.x87.fop = fpu.fop;
        state.x87.fip = fpu.fip;
        state.x87.fdp = fpu.fdp;
        self.read(gpa::DATA, &mut state.memory[..]);
        let end = match exit {
            Exit::Unimplemented { .. } => End::Lost("not implemented"),
            Exit::Hlt if sregs.segments[CS].selector & 3 == 0 => self.unwind(case, &mut state, sregs.cr2),
            _ => End::Lost("left the guest"),
        };
        Outcome { end, state }
    }

    /// Behind the HLT of an exception handler: takes the interrupted state from its frame.
    fn unwind(&self, case: &Case, state: &mut State, cr2: u64) -> End {
        let handler = state.rip.wrapping_sub(KERNEL + gpa::HANDLERS + 1);
        let vector = (handler / HANDLER_STRIDE) as u8;
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let words = if has_error { 6 } else { 5 };
        let mut bytes = [0; 48];
        let frame = &mut bytes[..8 * words];
        self.read(state.gpr[4].wrapping_sub(KERNEL), frame);
        let word = |at: usize| {
            let at = 8 * (at + words - 5);
            u64::from_le_bytes(frame[at..at + 8].try_into().expect("eight bytes were taken"))
        };
        let error = if has_error { u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) } else { 0 };
        state.rip = word(0);
        state.seg[CS] = word(1) as u16;
        state.rflags = word(2) & !(flag::TF | flag::RF);
        state.gpr[4] = word(3);
        state.seg[2] = word(4) as u16;
        if vector == 1 && stop::of(case) == Stop::Step {
            return End::Done;
        }
        if vector == 3 && stop::behind(case, state.rip.wrapping_sub(1)) {
            state.rip -= 1;
            return End::Done;
        }
        End::Exception(Exception { vector, error, cr2: if vector == 14 { cr2 } else { 0 } })
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.view.write(GuestPhysAddr(gpa), bytes).expect("inside the slot");
    }

    fn read(&self, gpa: u64, bytes: &mut [u8]) {
        self.view.read(GuestPhysAddr(gpa), bytes).expect("kernel stack and data are inside the slot");
    }
}

fn put_lanes(to: &mut [u8], lanes: &[u128]) {
    for (to, lane) in to.chunks_exact_mut(16).zip(lanes) {
        to.copy_from_slice(&lane.to_le_bytes());
    }
}

/// What loading `selector` leaves in a segment register.
fn user_segment(selector: u16) -> Segment {
    let descriptor = segments::descriptor(selector);
    let bit = |at: u32| descriptor >> at & 1 != 0;
    if descriptor == 0 || !bit(47) {
        return Segment::null(selector);
    }
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    Segment {
        selector,
        base: descriptor >> 16 & 0xff_ffff | (descriptor >> 56) << 24,
        limit: if bit(55) { limit << 12 | 0xfff } else { limit },
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (descriptor >> 45 & 3) as u8,
        present: true,
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: false,
    }
}

fn kernel_sregs(reset: Sregs) -> Sregs {
    let tr = Segment {
        selector: segments::GDT_TSS << 3,
        base: KERNEL + gpa::TSS,
        limit: 0x67,
        type_: 0xb,
        present: true,
        ..Segment::default()
    };
    let ldt = Segment {
        selector: segments::GDT_LDT << 3,
        base: KERNEL + gpa::LDT,
        limit: LDT_LIMIT,
        type_: 2,
        present: true,
        ..Segment::default()
    };
    Sregs {
        tr,
        ldt,
        gdt: DescriptorTable { base: KERNEL + gpa::GDT, limit: segments::GDT_LIMIT },
        idt: DescriptorTable { base: KERNEL + gpa::IDT, limit: 0xfff },
        // As Linux sets them.
        cr0: Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG,
        cr2: 0,
        cr3: gpa::PML4,
        cr4: Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::FSGSBASE | Cr4::OSXSAVE,
        efer: Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE,
        ..reset
    }
}

fn write_kernel(view: &View) {
    let put = |gpa: u64, value: u64| {
        view.write(GuestPhysAddr(gpa), &value.to_le_bytes()).expect("inside the slot");
    };
    // P RW US A D; rights of the case's pages are narrowed in the last level.
    const TABLE: u64 = 0x27;
    const NX: u64 = 1 << 63;
    put(gpa::PML4, gpa::PDPT | TABLE);
    put(gpa::PML4 + 8 * 256, gpa::PDPT_KERNEL | TABLE);
    put(gpa::PDPT, gpa::PD | TABLE);
    put(gpa::PD + 8 * (CODE_BASE >> 21), gpa::PT_CODE | TABLE);
    put(gpa::PD + 8 * (DATA_BASE >> 21), gpa::PT_DATA | TABLE);
    for page in 0..(CODE_BYTES as u64 / PAGE) {
        put(gpa::PT_CODE + 8 * page, (gpa::CODE + page * PAGE) | 0x25);
    }
    for page in 0..(DATA_BYTES as u64 / PAGE) {
        put(gpa::PT_DATA + 8 * page, (gpa::DATA + page * PAGE) | 0x67 | NX);
    }
    put(gpa::PT_DATA + 8 * ((READONLY_BASE - DATA_BASE) / PAGE), gpa::READONLY | 0x25 | NX);
    put(gpa::PDPT_KERNEL, gpa::PD_KERNEL | TABLE);
    put(gpa::PD_KERNEL, gpa::PT_KERNEL | TABLE);
    for page in 0..gpa::CODE / PAGE {
        put(gpa::PT_KERNEL + 8 * page, (page * PAGE) | 0x63);
    }
    for (entry, descriptor) in segments::GDT.iter().enumerate() {
        put(gpa::GDT + 8 * entry as u64, *descriptor);
    }
    for (entry, segment) in segments::LDT.iter().enumerate() {
        put(gpa::LDT + 8 * entry as u64, segment.descriptor());
    }
    let system = |entry: u16, kind: u64, base: u64, limit: u32| {
        let at = gpa::GDT + 8 * u64::from(entry);
        put(at, u64::from(limit) | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56);
        put(at + 8, base >> 32);
    };
    system(segments::GDT_TSS, 0x8b, KERNEL + gpa::TSS, 0x67);
    system(segments::GDT_LDT, 0x82, KERNEL + gpa::LDT, LDT_LIMIT);
    // RSP0 of the TSS.
    put(gpa::TSS + 4, KERNEL + gpa::STACK_END);
    for vector in 0..32 {
        let handler = KERNEL + gpa::HANDLERS + vector * HANDLER_STRIDE;
        // Interrupt gate, present; DPL 3 where user mode may execute INT3 and INTO, as Linux has it.
        let rights = if matches!(vector, 3 | 4) { 0xee00 } else { 0x8e00 };
        let low = handler & 0xffff | u64::from(KERNEL_CS) << 16 | rights << 32 | (handler >> 16 & 0xffff) << 48;
        put(gpa::IDT + 16 * vector, low);
        put(gpa::IDT + 16 * vector + 8, handler >> 32);
    }
    let page = |gpa: u64, bytes: &[u8]| view.write(GuestPhysAddr(gpa), bytes).expect("inside the slot");
    page(gpa::HANDLERS, &[HLT; PAGE as usize]);
    page(gpa::CODE, &[INT3; CODE_BYTES]);
    page(gpa::READONLY, &readonly_page());
}
