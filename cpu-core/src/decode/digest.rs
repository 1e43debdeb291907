//! An instruction as iced sees it, turned into the fields of an op.

use iced_x86::{Instruction, OpKind, Register};

use super::Mode;
use crate::cpu::{Cpu, Done, SLOT_TRACE_IP, SLOT_ZERO};
use crate::op::{Handler, Op, plain};
use crate::state::Seg;

/// An instruction and the mode it was decoded in: what a row's selector looks at.
pub(crate) struct Digest<'a> {
    /// As decoded.
    pub(crate) ins: &'a Instruction,
    /// The bytes it was decoded from.
    pub(crate) bytes: &'a [u8],
    /// Widths.
    pub(crate) mode: Mode,
    /// Offset in CS of the trace's first instruction.
    pub(crate) trace_ip: u64,
    /// The instruction runs by itself, on the exact path: wherever its memory operand may lead.
    pub(crate) exact: bool,
    /// Kind of the lazy flags where an instruction of this trace made them.
    pub(crate) known_flags: Option<u64>,
}

/// What an instruction does to the status flags, as far as the trace cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlagsOut {
    /// Leaves them alone.
    Kept,
    /// Replaces all six, leaving this kind.
    Kind(u64),
    /// Replaces all six, kind unknown until it runs; or may change some.
    Unknown,
}

/// Where a direct branch goes; the trace builder makes the links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Branch {
    /// `imm` links to the target; not taken goes on behind the op.
    Conditional(u64),
    /// `imm` links to the target.
    Always(u64),
    /// `imm` links to the target, the data slot's `imm` to the return address.
    Call(u64),
    /// The data slot's `imm` links to the return address.
    CallIndirect,
}

/// A row's answer: the op and what the trace builder has to know of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lowered {
    /// The op; `off`, `left` and links are the builder's.
    pub(crate) op: Op,
    /// Handler that need not make flags.
    pub(crate) quiet: Option<Handler>,
    /// Effect on the status flags.
    pub(crate) flags: FlagsOut,
    /// Looks at the status flags.
    pub(crate) reads_flags: bool,
    /// May stop or leave the trace: flags must be right before it.
    pub(crate) barrier: bool,
    /// Does nothing but take its place: counted, not dispatched to.
    pub(crate) idle: bool,
    /// Nothing behind it belongs to the trace.
    pub(crate) ends: bool,
    /// Direct branch.
    pub(crate) branch: Option<Branch>,
    /// Condition of a conditional branch that an op in front can take over.
    pub(crate) condition: Option<u8>,
    /// Handler that does this op and a conditional branch behind it, by its condition.
    pub(crate) fused: Fuse,
    /// A second slot belongs to the op.
    pub(crate) data: bool,
    /// Displacement of 64 bits.
    pub(crate) wide: Option<u64>,
}

/// By the condition of a branch behind: the handler of both, if there is one.
pub(crate) type Fuse = fn(u8) -> Option<Handler>;

/// Of ops that take over no branch.
pub(crate) fn not_fused(_: u8) -> Option<Handler> {
    None
}

impl Lowered {
    /// With a variant for when nobody looks at the flags that it makes, which are of `kind`.
    pub(crate) fn makes_flags(mut self, kind: u64, quiet: Handler) -> Self {
        self.flags = FlagsOut::Kind(kind);
        self.quiet = Some(quiet);
        self
    }

    /// Cannot stop or leave: neither memory nor faults.
    pub(crate) fn cannot_stop(mut self) -> Self {
        self.barrier = false;
        self
    }

    /// Leaves the flags alone.
    pub(crate) fn keeps_flags(mut self) -> Self {
        self.flags = FlagsOut::Kept;
        self
    }

    /// Looks at the flags.
    pub(crate) fn reads_flags(mut self) -> Self {
        self.reads_flags = true;
        self
    }

    /// Ends the trace.
    pub(crate) fn ends(mut self) -> Self {
        self.ends = true;
        self
    }
}

/// A row's selector: the handler and fields for one digested instruction; `None` where the row has no such form.
pub(crate) type Select = fn(&Digest<'_>) -> Option<Lowered>;

/// Selector of an instruction written as one plain function.
pub(crate) const fn function<F: Fn(&mut Cpu, &Op) -> Done + Copy + 'static>(_: F) -> Select {
    |d| Some(d.lower(plain::<F>))
}

/// As [`function`], for an instruction behind which the trace ends: it may change mode, rights or RIP.
pub(crate) const fn function_ends<F: Fn(&mut Cpu, &Op) -> Done + Copy + 'static>(_: F) -> Select {
    |d| Some(d.lower(plain::<F>).ends())
}

/// Byte offset in `Cpu::gpr`, or the number within its own file, of a register.
pub(crate) fn slot(register: Register) -> u8 {
    if register.is_gpr8() {
        // AH, CH, DH, BH are the second bytes of RAX, RCX, RDX, RBX.
        if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
            return (register.number() as u8 - 4) * 8 + 1;
        }
        return register.full_register().number() as u8 * 8;
    }
    if register.is_gpr() {
        return register.number() as u8 * 8;
    }
    register.number() as u8
}

/// Segment registers as the core numbers them.
pub(crate) fn segment(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

impl Digest<'_> {
    /// Kind of operand `i`, `None` where there is none.
    pub(crate) fn kind(&self, i: u32) -> Option<OpKind> {
        (i < self.ins.op_count()).then(|| self.ins.op_kind(i))
    }

    /// Operand `i` is a register.
    pub(crate) fn is_reg(&self, i: u32) -> bool {
        self.kind(i) == Some(OpKind::Register)
    }

    /// Operand `i` is an explicit memory operand.
    pub(crate) fn is_mem(&self, i: u32) -> bool {
        self.kind(i) == Some(OpKind::Memory)
    }

    /// Operand `i` is an immediate.
    pub(crate) fn is_imm(&self, i: u32) -> bool {
        matches!(
            self.kind(i),
            Some(
                OpKind::Immediate8
                    | OpKind::Immediate8_2nd
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
            )
        )
    }

    /// Register of operand `i`.
    pub(crate) fn reg(&self, i: u32) -> Register {
        self.ins.op_register(i)
    }

    /// Bytes of operand `i`: of the register, or of the memory operand.
    pub(crate) fn bytes(&self, i: u32) -> u32 {
        match self.kind(i) {
            Some(OpKind::Register) => self.reg(i).size() as u32,
            _ => self.ins.memory_size().size() as u32,
        }
    }

    /// The op of this instruction for `handler`, with every field that the operands determine.
    ///
    /// `dst`: operand 0 if a register; else operand 1's. `src`: the next register operand. `aux`: the third, if any.
    /// `imm`: the first immediate, sign-extended as encoded; the target of a near branch.
    pub(crate) fn op(&self, handler: Handler) -> Op {
        let ins = self.ins;
        let mut op = Op {
            handler,
            imm: 0,
            disp: 0,
            dst: SLOT_ZERO,
            src: SLOT_ZERO,
            base: SLOT_ZERO,
            index: SLOT_ZERO,
            scale: 1,
            seg: Seg::Ds as u8 | 3 << 4,
            len: ins.len() as u8,
            aux: 0,
            off: 0,
            left: 0,
        };
        let mut registers = 0;
        for i in 0..ins.op_count() {
            match ins.op_kind(i) {
                OpKind::Register => {
                    let number = slot(ins.op_register(i));
                    match (i, registers) {
                        (0, _) => op.dst = number,
                        (_, 0) => op.src = number,
                        _ => op.aux = number,
                    }
                    registers += u32::from(i > 0);
                }
                OpKind::Memory => self.memory(&mut op),
                OpKind::MemorySegSI | OpKind::MemorySegDI => self.implicit_memory(&mut op, 1),
                OpKind::MemorySegESI | OpKind::MemorySegEDI => self.implicit_memory(&mut op, 2),
                OpKind::MemorySegRSI | OpKind::MemorySegRDI => self.implicit_memory(&mut op, 3),
                OpKind::MemoryESDI => op.seg = op.seg & 7 | 1 << 4,
                OpKind::MemoryESEDI => op.seg = op.seg & 7 | 2 << 4,
                OpKind::MemoryESRDI => op.seg = op.seg & 7 | 3 << 4,
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => op.imm = ins.near_branch_target(),
                OpKind::FarBranch16 => {
                    op.imm = u64::from(ins.far_branch16()) | u64::from(ins.far_branch_selector()) << 32;
                }
                OpKind::FarBranch32 => {
                    op.imm = u64::from(ins.far_branch32()) | u64::from(ins.far_branch_selector()) << 32;
                }
                OpKind::Immediate8_2nd => op.aux = ins.immediate8_2nd(),
                _ => op.imm = ins.immediate(i),
            }
        }
        op
    }

    fn implicit_memory(&self, op: &mut Op, log2: u8) {
        op.seg = self.data_segment() as u8 | log2 << 4;
    }

    /// Segment of the memory operand. In 64-bit mode ES, CS, SS and DS prefixes are ignored, so the base register alone
    /// decides between #SS and #GP (SDM Vol. 2 "Instruction Prefixes").
    fn data_segment(&self) -> Seg {
        let named = segment(self.ins.memory_segment());
        if !self.mode.is_64bit() || matches!(named, Seg::Fs | Seg::Gs) {
            return named;
        }
        let stack = matches!(self.ins.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        if stack { Seg::Ss } else { Seg::Ds }
    }

    /// Bytes of the explicit memory operand's address. Without registers the displacement takes the address size.
    fn address_bytes(&self) -> usize {
        match (self.ins.memory_base(), self.ins.memory_index()) {
            (Register::None, Register::None) => self.ins.memory_displ_size() as usize,
            // A gather's index is a vector.
            (Register::None, index) if !index.is_gpr() => self.ins.memory_displ_size() as usize,
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        }
    }

    fn memory(&self, op: &mut Op) {
        let ins = self.ins;
        let base = ins.memory_base();
        let index = ins.memory_index();
        let log2 = match self.address_bytes() {
            2 => 1,
            4 => 2,
            _ => 3,
        };
        op.seg = self.data_segment() as u8 | log2 << 4;
        op.scale = ins.memory_index_scale() as u8;
        if matches!(base, Register::RIP | Register::EIP) {
            op.base = SLOT_TRACE_IP;
            op.disp = ins.memory_displacement64().wrapping_sub(self.trace_ip) as i32;
            return;
        }
        if base != Register::None {
            op.base = slot(base);
        }
        if index != Register::None {
            op.index = slot(index);
        }
        op.disp = ins.memory_displacement64() as i32;
    }

    /// The whole 64-bit displacement fits an op (a MOV with a 64-bit offset, or RIP-relative at the edge, does not).
    pub(crate) fn displacement_fits(&self) -> bool {
        if !(0..self.ins.op_count()).any(|i| self.ins.op_kind(i) == OpKind::Memory) {
            return true;
        }
        let displacement = self.ins.memory_displacement64();
        if self.ins.is_ip_rel_memory_operand() {
            let distance = displacement.wrapping_sub(self.trace_ip);
            return distance as i32 as u64 == distance;
        }
        // A shorter address is masked afterwards, so the upper bits do not matter.
        self.address_bytes() != 8 || displacement as i32 as u64 == displacement
    }

    /// Lowers to `handler` with nothing known of its effect: flags change, the trace may be left.
    pub(crate) fn lower(&self, handler: Handler) -> Lowered {
        Lowered {
            op: self.op(handler),
            quiet: None,
            flags: FlagsOut::Unknown,
            reads_flags: true,
            barrier: true,
            idle: false,
            ends: false,
            branch: None,
            condition: None,
            fused: not_fused,
            data: false,
            wide: None,
        }
    }
}
