//! AVX-512: what the EVEX-encoded families share. SDM Vol. 1 "Programming with Intel AVX-512"; Vol. 2 "Intel AVX-512
//! Encoding", "Exception Classifications of EVEX-Encoded instructions" and the page of each mnemonic.
//!
//! A row is an [`Insn`]: the host's instructions for three vector lengths, and what the encoding does not tell. All of
//! them go through [`run`]: operands are collected, the host executes, the result is committed. What broadcasts,
//! embedded rounding and masks of memory operands mean is done here; so the host only ever sees registers.

pub(in crate::isa) mod compare;
pub(in crate::isa) mod convert;
pub(in crate::isa) mod element;
pub(in crate::isa) mod float;
pub(in crate::isa) mod gather;
pub(in crate::isa) mod half;
pub(in crate::isa) mod integer;
pub(in crate::isa) mod mask;
pub(in crate::isa) mod moves;
pub(in crate::isa) mod permute;
mod unbounded;

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, Mnemonic, OpCodeOperandKind, OpKind, Register, RoundingControl};

use self::unbounded::Inexact;
use super::float::{FZ, settle, under};
use super::{keeps, lacking};
use crate::access::By;
use crate::cpu::{Cpu, Done, Stop, Then, fp_gate};
use crate::decode::digest::{Digest, FlagsOut, Lowered, slot};
use crate::fault::Fault;
use crate::flags::Flags;
use crate::host_evex::{self, Frame, Stub, host_has_avx512};
use crate::host_simd::{CONTROL, DEFAULT, FLAGS};
use crate::isa::{Key, Row, plain_handler};
use crate::op::Op;
use crate::state::VectorRegister;

/// How much of a memory operand is accessed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// Lanes that the mask chooses; each has its part of the operand. "Fault suppression" in the SDM's terms.
    Lanes,
    /// All of it, whatever the mask.
    Whole,
    /// As many lanes from its start as the mask chooses.
    Packed,
    /// Its lanes that are copied to a lane that the mask chooses.
    Repeated,
}

/// What a float instruction makes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Float {
    /// Singles, which may be denormal.
    Single,
    /// Doubles, which may be denormal.
    Double,
    /// Halves, which may be denormal.
    Half,
    /// Nothing that is denormal because of a computation.
    Other,
    /// The same, but FZ makes zeros of denormal results. It does so even where underflow, which is never raised here, is
    /// unmasked: measured on Intel's CPUs.
    Flushed,
    /// Exceptions set their flags and are never raised, masked or not.
    Told,
}

/// The instructions for vectors of 128, 256 and 512 bits.
type Stubs = [Stub; 3];

/// One instruction.
pub(super) struct Insn {
    key: Key,
    stubs: Stubs,
    has_imm: bool,
    /// Bytes of the vector that a mask bit stands for. 0: a scalar, which has one mask bit.
    lane: u8,
    /// Bytes of the vector that is masked, where that is not the longest operand; of a scalar that is not a float result.
    span: u8,
    memory: Memory,
    /// The destination is a source too.
    reads_destination: bool,
    /// A memory operand must be aligned to its size.
    aligned: bool,
    /// It copies a vector.
    copies: bool,
    /// A lone source is where the second of two would be.
    second: bool,
    /// The result is in RFLAGS.
    flags: bool,
    /// It computes under MXCSR.
    float: Option<Float>,
    inexact: Inexact,
}

/// An instruction whose lanes have `lane` bytes; 0 for scalars.
const fn insn(mnemonic: Mnemonic, lane: u8, stubs: Stubs) -> Insn {
    Insn {
        key: Key::Evex(mnemonic, None),
        stubs,
        has_imm: false,
        lane,
        span: 0,
        memory: Memory::Lanes,
        reads_destination: false,
        aligned: false,
        copies: false,
        second: false,
        flags: false,
        float: None,
        inexact: Inexact::Unknown,
    }
}

impl Insn {
    /// Only the encodings with an operand of this kind. Such a row comes before that of the others.
    const fn with(self, kind: OpCodeOperandKind) -> Self {
        let Key::Evex(mnemonic, _) = self.key else { panic!("EVEX rows are by mnemonic") };
        Self { key: Key::Evex(mnemonic, Some(kind)), ..self }
    }

    /// The stubs are those of all immediates.
    const fn imm(self) -> Self {
        Self { has_imm: true, ..self }
    }

    /// These encodings alone.
    const fn codes(self, codes: &'static [Code]) -> Self {
        Self { key: Key::Codes(codes), ..self }
    }

    const fn memory(self, memory: Memory) -> Self {
        Self { memory, ..self }
    }

    const fn whole(self) -> Self {
        self.memory(Memory::Whole)
    }

    const fn reads_destination(self) -> Self {
        Self { reads_destination: true, ..self }
    }

    const fn aligned(self) -> Self {
        Self { aligned: true, ..self }
    }

    const fn copies(self) -> Self {
        Self { copies: true, ..self }
    }

    const fn second(self) -> Self {
        Self { second: true, ..self }
    }

    const fn flags(self) -> Self {
        Self { flags: true, ..self }
    }

    const fn span(self, span: u8) -> Self {
        Self { span, ..self }
    }

    const fn float(self, float: Float, inexact: Inexact) -> Self {
        Self { float: Some(float), inexact, ..self }
    }

    /// A product and a sum; as for [`Inexact::Fused`].
    const fn fused(self, order: u16, subtracts: [bool; 2], float: Float) -> Self {
        let lane = match float {
            Float::Half => 2,
            Float::Single => 4,
            _ => 8,
        };
        self.reads_destination().float(float, Inexact::Fused { order, subtracts, lane })
    }

    /// Lanes that mask bits stand for, where the longest operand has `bytes`.
    fn lanes(&self, bytes: u32) -> u32 {
        let bytes = if self.span != 0 { self.span.into() } else { bytes };
        if self.lane == 0 { 1 } else { bytes / u32::from(self.lane) }
    }
}

/// The rows of a table.
const fn rows<const N: usize>(insns: &[Insn; N]) -> [Row; N] {
    const EMPTY: Row = Row { key: Key::Codes(&[]), select };
    let mut rows = [EMPTY; N];
    let mut i = 0;
    while i < N {
        rows[i] = Row { key: insns[i].key, select };
        i += 1;
    }
    rows
}

/// All instructions, and which of them each of iced's codes is.
struct Table {
    insns: Vec<&'static Insn>,
    by_code: Vec<Option<u16>>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let families: [&'static [Insn]; 8] = [
        &compare::INSNS,
        &convert::INSNS,
        &element::INSNS,
        &float::INSNS,
        &half::INSNS,
        &integer::INSNS,
        &moves::INSNS,
        &permute::INSNS,
    ];
    let insns: Vec<&'static Insn> = families.into_iter().flatten().collect();
    let mut by_code = vec![None; Code::values().len()];
    for (at, insn) in insns.iter().enumerate() {
        for code in insn.key.codes() {
            by_code[code as usize].get_or_insert(at as u16);
        }
    }
    Table { insns, by_code }
});

/// Whether the host executes an encoding's features.
fn host_has(d: &Digest<'_>) -> bool {
    host_has_avx512()
        && d.ins.cpuid_features().iter().all(|feature| match feature {
            CpuidFeature::AVX512_IFMA => is_x86_feature_detected!("avx512ifma"),
            CpuidFeature::AVX512_VBMI => is_x86_feature_detected!("avx512vbmi"),
            CpuidFeature::AVX512_VBMI2 => is_x86_feature_detected!("avx512vbmi2"),
            CpuidFeature::AVX512_VNNI => is_x86_feature_detected!("avx512vnni"),
            CpuidFeature::AVX512_BITALG => is_x86_feature_detected!("avx512bitalg"),
            CpuidFeature::AVX512_VPOPCNTDQ => is_x86_feature_detected!("avx512vpopcntdq"),
            CpuidFeature::AVX512_BF16 => is_x86_feature_detected!("avx512bf16"),
            CpuidFeature::AVX512_FP16 => is_x86_feature_detected!("avx512fp16"),
            CpuidFeature::GFNI => is_x86_feature_detected!("gfni"),
            CpuidFeature::VAES => is_x86_feature_detected!("vaes"),
            CpuidFeature::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
            _ => true,
        })
}

/// What an operand is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    None,
    Vector,
    Mask,
    General,
    /// Memory that is part of a vector.
    Memory,
    /// Memory in place of a general register.
    Number,
}

impl Operand {
    fn of(d: &Digest<'_>, i: u32) -> Self {
        match (d.ins.op_kind(i), d.ins.code().op_code().op_kind(i)) {
            (OpKind::Register, _) if d.reg(i).is_k() => Self::Mask,
            (OpKind::Register, _) if d.reg(i).is_gpr() => Self::General,
            (OpKind::Register, _) => Self::Vector,
            (OpKind::Memory, OpCodeOperandKind::r32_or_mem | OpCodeOperandKind::r64_or_mem) => Self::Number,
            (OpKind::Memory, _) => Self::Memory,
            _ => Self::None,
        }
    }

    const fn from_bits(bits: u64) -> Self {
        match bits & 7 {
            1 => Self::Vector,
            2 => Self::Mask,
            3 => Self::General,
            4 => Self::Memory,
            5 => Self::Number,
            _ => Self::None,
        }
    }
}

/// Rounding of one instruction in place of MXCSR's; both suppress all exceptions.
const SUPPRESSED: u64 = 5;

/// What fits no other field of an op, in [`Op::imm`].
#[derive(Clone, Copy)]
struct Fields(u64);

/// Places of the fields.
mod at {
    pub(super) const IMM: u32 = 0;
    pub(super) const INSN: u32 = 8;
    /// Number of the mask register; 0 for none.
    pub(super) const MASK: u32 = 24;
    pub(super) const ZEROING: u32 = 27;
    pub(super) const BROADCAST: u32 = 28;
    /// log2 of the vector length, 16 bytes counted as 0.
    pub(super) const LENGTH: u32 = 29;
    /// RC + 1, [`super::SUPPRESSED`], or 0.
    pub(super) const ROUNDING: u32 = 31;
    /// Kinds of the destination and of the two sources, three bits each.
    pub(super) const OPERANDS: u32 = 34;
    /// Bytes of the memory operand.
    pub(super) const BYTES: u32 = 43;
}

impl Fields {
    fn get(self, at: u32, bits: u32) -> u64 {
        self.0 >> at & ((1 << bits) - 1)
    }
    fn insn(self) -> &'static Insn {
        TABLE.insns[self.get(at::INSN, 16) as usize]
    }
    fn operand(self, i: u32) -> Operand {
        Operand::from_bits(self.0 >> (at::OPERANDS + 3 * i))
    }
    fn length(self) -> usize {
        self.get(at::LENGTH, 2) as usize
    }
    fn bytes(self) -> u32 {
        self.get(at::BYTES, 7) as u32
    }
    /// The mask register, all ones where there is none.
    fn mask(self, cpu: &Cpu) -> u64 {
        cpu.mask(self.get(at::MASK, 3) as u8)
    }
}

/// Which of the three lengths an encoding has, by its longest operand.
fn length(code: Code) -> u64 {
    use OpCodeOperandKind as K;
    let any = |wanted: &[K]| code.op_code().op_kinds().iter().any(|kind| wanted.contains(kind));
    if any(&[K::zmm_reg, K::zmm_rm, K::zmm_vvvv, K::zmm_or_mem, K::mem_vsib32z, K::mem_vsib64z]) {
        2
    } else if any(&[K::ymm_reg, K::ymm_rm, K::ymm_vvvv, K::ymm_or_mem, K::mem_vsib32y, K::mem_vsib64y]) {
        1
    } else if any(&[K::mem]) && code.op_code().memory_size().size() > 16 {
        // A store or load whose other operand told its length already.
        code.op_code().memory_size().size() as u64 / 32
    } else {
        0
    }
}

/// Mask, zeroing, length, rounding.
fn prefix_fields(d: &Digest<'_>) -> u64 {
    let ins = d.ins;
    let mask = if ins.op_mask() == Register::None { 0 } else { u64::from(slot(ins.op_mask())) };
    let rounding = match ins.rounding_control() {
        RoundingControl::None if ins.suppress_all_exceptions() => SUPPRESSED,
        RoundingControl::None => 0,
        RoundingControl::RoundToNearest => 1,
        RoundingControl::RoundDown => 2,
        RoundingControl::RoundUp => 3,
        RoundingControl::RoundTowardZero => 4,
    };
    mask << at::MASK
        | u64::from(ins.zeroing_masking()) << at::ZEROING
        | u64::from(ins.is_broadcast()) << at::BROADCAST
        | length(ins.code()) << at::LENGTH
        | rounding << at::ROUNDING
}

/// The selector of every row that is an [`Insn`].
fn select(d: &Digest<'_>) -> Option<Lowered> {
    if !host_has(d) {
        return lacking(d);
    }
    let index = TABLE.by_code[d.ins.code() as usize]?;
    let insn = TABLE.insns[usize::from(index)];
    let whole = insn.copies && d.ins.op_mask() == Register::None;
    let mut lowered = keeps(d, if whole { plain_handler(copy) } else { plain_handler(run) })?;
    if insn.flags {
        lowered.flags = FlagsOut::Unknown;
    }
    let op = &mut lowered.op;
    let mut fields = u64::from(index) << at::INSN | prefix_fields(d);
    let mut place = u32::from(insn.flags);
    for i in 0..d.ins.op_count() {
        if d.is_imm(i) {
            fields |= u64::from(d.ins.immediate8()) << at::IMM;
            continue;
        }
        let kind = Operand::of(d, i);
        fields |= (kind as u64) << (at::OPERANDS + 3 * place);
        let number = if d.is_reg(i) { slot(d.reg(i)) } else { 0 };
        match place {
            0 => op.dst = number,
            1 => op.src = number,
            _ => op.aux = number,
        }
        if d.is_mem(i) {
            fields |= (d.ins.memory_size().size() as u64) << at::BYTES;
        }
        place += 1;
    }
    if insn.second && place == 2 {
        let kind = fields >> (at::OPERANDS + 3) & 7;
        fields = fields & !(7 << (at::OPERANDS + 3)) | kind << (at::OPERANDS + 6);
        op.aux = std::mem::take(&mut op.src);
    }
    op.imm = fields;
    Some(lowered)
}

const AVX512_BLOCKED: u8 = fp_gate::TS | fp_gate::NO_AVX512;

impl Cpu {
    /// #UD or #NM where CR4, XCR0, CR0 or the mode do not let AVX-512 run.
    fn require_avx512(&mut self) -> Result<(), Stop> {
        if self.fp_gate & AVX512_BLOCKED == 0 {
            return Ok(());
        }
        let fault = if self.fp_gate & fp_gate::NO_AVX512 != 0 { Fault::UD } else { Fault::NM };
        Err(self.fault(fault))
    }

    /// The mask that `{kn}` stands for: k0 stands for none, all ones.
    fn mask(&self, n: u8) -> u64 {
        if n & 7 == 0 { u64::MAX } else { self.fpu.k[usize::from(n & 7)] }
    }

    /// ZMMn.
    fn zmm(&self, n: u8) -> VectorRegister {
        self.fpu.vector[usize::from(n & 31)]
    }

    /// Loads `bytes` of the op's operand, 1 to 8 of them, `behind` its start.
    fn load_lane(&mut self, op: &Op, behind: u32, bytes: u32) -> Result<u64, Stop> {
        let (la, seg) = (self.part_address(op, behind, bytes, false)?, op.segment());
        match bytes {
            1 => self.load::<u8>(la, seg).map(u64::from),
            2 => self.load::<u16>(la, seg).map(u64::from),
            4 => self.load::<u32>(la, seg).map(u64::from),
            _ => self.load::<u64>(la, seg),
        }
    }

    /// Stores what [`Self::load_lane`] loads.
    fn store_lane(&mut self, op: &Op, behind: u32, bytes: u32, value: u64) -> Result<(), Stop> {
        let (la, seg) = (self.part_address(op, behind, bytes, true)?, op.segment());
        match bytes {
            1 => self.store(la, value as u8, seg),
            2 => self.store(la, value as u16, seg),
            4 => self.store(la, value as u32, seg),
            _ => self.store(la, value, seg),
        }
    }

    /// The segment has room for the lanes that `mask` chooses: looked at before any page is.
    fn check_lanes(&mut self, op: &Op, bytes: u32, lanes: u32, mask: u64, write: bool) -> Result<(), Stop> {
        if self.is_64bit() {
            return Ok(());
        }
        if mask & ones(lanes) == ones(lanes) {
            return self.part_address(op, 0, bytes, write).map(|_| ());
        }
        let bytes = bytes / lanes;
        for i in (0..lanes).filter(|i| mask >> i & 1 != 0) {
            self.part_address(op, i * bytes, bytes, write)?;
        }
        Ok(())
    }

    /// Where a lane is accessed, operands of up to 8 bytes are aligned as a whole; longer ones may lie anywhere. Measured on
    /// Intel's CPUs.
    fn check_short(&mut self, op: &Op, bytes: u32, lanes: u32, mask: u64) -> Result<(), Stop> {
        if bytes > 8 || mask & ones(lanes) == 0 {
            return Ok(());
        }
        let la = self.seg_base[op.segment() as usize].wrapping_add(self.ea(op));
        self.check_alignment(la, bytes, By::Code)
    }

    /// Loads the lanes of the op's operand that `mask` chooses; the others are left alone.
    fn load_lanes(&mut self, op: &Op, out: &mut [u8], lanes: u32, mask: u64) -> Result<(), Stop> {
        self.check_lanes(op, out.len() as u32, lanes, mask, false)?;
        let whole = mask & ones(lanes) == ones(lanes);
        if whole && out.len() <= 8 {
            let value = self.load_lane(op, 0, out.len() as u32)?;
            out.copy_from_slice(&value.to_le_bytes()[..out.len()]);
            return Ok(());
        }
        if whole && !self.alignment_checked() {
            return self.read_bytes(op.segment(), self.ea(op), out);
        }
        self.check_short(op, out.len() as u32, lanes, mask)?;
        if whole {
            let la = self.part_address(op, 0, out.len() as u32, false)?;
            self.check_span(la, out.len() as u32, op.segment())?;
        }
        let bytes = out.len() / lanes as usize;
        for i in (0..lanes as usize).filter(|i| mask >> i & 1 != 0) {
            for (at, part) in out[i * bytes..][..bytes].chunks_mut(8).enumerate() {
                let la = self.part_address(op, (i * bytes + 8 * at) as u32, part.len() as u32, false)?;
                self.load_bytes(la, part, op.segment())?;
            }
        }
        Ok(())
    }

    /// Faults as [`Self::store_lanes`] would.
    fn probe_lanes(&mut self, op: &Op, bytes: u32, lanes: u32, mask: u64) -> Result<(), Stop> {
        self.check_lanes(op, bytes, lanes, mask, true)?;
        if mask & ones(lanes) == ones(lanes) {
            let la = self.part_address(op, 0, bytes, true)?;
            return self.probe_write(la, bytes, op.segment());
        }
        let bytes = bytes / lanes;
        for i in (0..lanes).filter(|i| mask >> i & 1 != 0) {
            let la = self.part_address(op, i * bytes, bytes, true)?;
            self.probe_write(la, bytes, op.segment())?;
        }
        Ok(())
    }

    /// Stores the lanes that `mask` chooses, which have been probed.
    fn store_lanes(&mut self, op: &Op, value: &[u8], lanes: u32, mask: u64) -> Result<(), Stop> {
        let whole = mask & ones(lanes) == ones(lanes);
        if whole && value.len() <= 8 {
            let mut number = [0; 8];
            number[..value.len()].copy_from_slice(value);
            return self.store_lane(op, 0, value.len() as u32, u64::from_le_bytes(number));
        }
        if whole && !self.alignment_checked() {
            return self.write_bytes(op.segment(), self.ea(op), value);
        }
        self.check_short(op, value.len() as u32, lanes, mask)?;
        let bytes = value.len() / lanes as usize;
        for i in (0..lanes as usize).filter(|i| mask >> i & 1 != 0) {
            for (at, part) in value[i * bytes..][..bytes].chunks(8).enumerate() {
                let la = self.part_address(op, (i * bytes + 8 * at) as u32, part.len() as u32, true)?;
                self.store_bytes(la, part, op.segment())?;
            }
        }
        Ok(())
    }
}

/// The lowest `lanes` bits.
const fn ones(lanes: u32) -> u64 {
    if lanes == 0 { 0 } else { u64::MAX >> (64 - lanes) }
}

/// Which lanes of the memory operand are accessed for `mask`, and how many it has.
fn accessed(insn: &Insn, fields: Fields, lanes: u32, mask: u64) -> (u32, u64) {
    let memory = match insn.memory {
        Memory::Lanes if fields.get(at::BROADCAST, 1) != 0 => Memory::Repeated,
        memory => memory,
    };
    match memory {
        Memory::Whole => (1, 1),
        Memory::Lanes => (lanes, mask),
        Memory::Packed => (lanes, ones((mask & ones(lanes)).count_ones())),
        Memory::Repeated => {
            let count = (fields.bytes() / u32::from(insn.lane.max(1))).max(1);
            let mask = (0..lanes).filter(|i| mask >> i & 1 != 0).fold(0, |all, i| all | 1 << (i % count));
            (count, mask)
        }
    }
}

/// Whether the mask chooses any lane: without, not even alignment matters.
fn is_any(fields: Fields, mask: u64) -> bool {
    mask & ones(fields.insn().lanes(16 << fields.length())) != 0
}

/// Loads the memory operand into a vector register's place.
fn load(cpu: &mut Cpu, op: &Op, fields: Fields, mask: u64) -> Result<VectorRegister, Stop> {
    let insn = fields.insn();
    let bytes = fields.bytes() as usize;
    let mut value = VectorRegister::default();
    if insn.aligned && is_any(fields, mask) {
        let offset = cpu.ea(op);
        let la = cpu.linear(op.segment(), offset, bytes as u32, false)?;
        cpu.require_aligned(la, bytes as u64)?;
    }
    let (lanes, chosen) = accessed(insn, fields, insn.lanes(16 << fields.length()), mask);
    cpu.load_lanes(op, &mut value.0[..bytes], lanes, chosen)?;
    if fields.get(at::BROADCAST, 1) != 0 || insn.memory == Memory::Repeated {
        for at in (bytes..64).step_by(bytes) {
            value.0.copy_within(0..bytes, at);
        }
    }
    Ok(value)
}

/// Stores what of a result the mask chooses. MXCSR shows its exceptions even where this faults, as on Intel's CPUs.
fn store(cpu: &mut Cpu, op: &Op, fields: Fields, mask: u64, value: &VectorRegister) -> Result<(), Stop> {
    let insn = fields.insn();
    let bytes = fields.bytes();
    if insn.aligned && is_any(fields, mask) {
        let offset = cpu.ea(op);
        let la = cpu.linear(op.segment(), offset, bytes, true)?;
        cpu.require_aligned(la, bytes.into())?;
    }
    let (probed, chosen) = accessed(insn, fields, insn.lanes(16 << fields.length()), mask);
    cpu.probe_lanes(op, bytes, probed, chosen)?;
    let (lanes, chosen) = match insn.memory {
        Memory::Whole => (insn.lanes(16 << fields.length()), mask),
        _ => (probed, chosen),
    };
    cpu.store_lanes(op, &value.0[..bytes as usize], lanes, chosen)
}

/// Collects the operands, executes, commits.
fn run(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_avx512()?;
    let fields = Fields(op.imm);
    let insn = fields.insn();
    let mask = fields.mask(cpu);
    let lanes = insn.lanes(16 << fields.length());
    let zeroing = fields.get(at::ZEROING, 1) != 0;
    let mut frame = Frame { vector: [VectorRegister::default(); 3], mask, k: 0, general: 0, under: under(cpu) };
    if fields.operand(0) == Operand::Vector && (!zeroing || insn.reads_destination) {
        frame.vector[0] = cpu.zmm(op.dst);
    }
    for (i, number) in [(1, op.src), (2, op.aux)] {
        match fields.operand(i as u32) {
            Operand::None => {}
            Operand::Vector => frame.vector[i] = cpu.zmm(number),
            Operand::Mask => frame.k = cpu.fpu.k[usize::from(number & 7)],
            Operand::General => frame.general = cpu.get(number),
            Operand::Memory => frame.vector[i] = load(cpu, op, fields, mask)?,
            Operand::Number => frame.general = cpu.load_lane(op, 0, fields.bytes())?,
        }
    }
    compute(cpu, fields, &mut frame, ones(lanes) & mask)?;
    match fields.operand(0) {
        Operand::Vector => {
            if zeroing && insn.reads_destination {
                zero_lanes(&mut frame.vector[0], insn, lanes, mask);
            }
            cpu.fpu.vector[usize::from(op.dst & 31)] = frame.vector[0];
        }
        Operand::Mask => cpu.fpu.k[usize::from(op.dst & 7)] = frame.k,
        Operand::General => cpu.put(op.dst, frame.general),
        Operand::Memory => store(cpu, op, fields, mask, &frame.vector[0])?,
        Operand::Number => cpu.store_lane(op, 0, fields.bytes(), frame.general)?,
        Operand::None => cpu.set_flags(Flags::explicit(frame.general & STATUS)),
    }
    Ok(Then::Next)
}

/// A vector's copy without a mask: nothing is asked of the host.
fn copy(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.alignment_checked() {
        return run(cpu, op);
    }
    cpu.require_avx512()?;
    let fields = Fields(op.imm);
    let mut value = VectorRegister::default();
    match (fields.operand(0), fields.operand(1)) {
        (Operand::Vector, Operand::Memory) => {
            let bytes = fields.bytes();
            copy_place(cpu, op, fields, false)?;
            cpu.read_bytes(op.segment(), cpu.ea(op), &mut value.0[..bytes as usize])?;
            cpu.fpu.vector[usize::from(op.dst & 31)] = value;
        }
        (Operand::Memory, _) => {
            copy_place(cpu, op, fields, true)?;
            let value = cpu.zmm(op.src);
            cpu.write_bytes(op.segment(), cpu.ea(op), &value.0[..fields.bytes() as usize])?;
        }
        _ => {
            let bytes = 16 << fields.length();
            value.0[..bytes].copy_from_slice(&cpu.fpu.vector[usize::from(op.src & 31)].0[..bytes]);
            cpu.fpu.vector[usize::from(op.dst & 31)] = value;
        }
    }
    Ok(Then::Next)
}

/// Checks the alignment of a copy's memory operand, where it must have one.
fn copy_place(cpu: &mut Cpu, op: &Op, fields: Fields, write: bool) -> Result<(), Stop> {
    if !fields.insn().aligned {
        return Ok(());
    }
    let (offset, bytes) = (cpu.ea(op), fields.bytes());
    let la = cpu.linear(op.segment(), offset, bytes, write)?;
    cpu.require_aligned(la, bytes.into())
}

/// The flags that comparisons replace.
const STATUS: u64 = crate::flags::STATUS;

/// Zeros in the lanes that the mask leaves out. Where the destination is a source it cannot start as zeros.
fn zero_lanes(vector: &mut VectorRegister, insn: &Insn, lanes: u32, mask: u64) {
    let bytes = match (insn.lane, insn.float) {
        (0, _) if insn.span != 0 => insn.span.into(),
        (0, Some(Float::Half)) => 2,
        (0, Some(Float::Double)) => 8,
        (0, _) => 4,
        (lane, _) => usize::from(lane),
    };
    for i in (0..lanes as usize).filter(|i| mask >> i & 1 == 0) {
        vector.0[i * bytes..][..bytes].fill(0);
    }
}

/// Executes the host's instruction. `live`: the lanes that count.
fn compute(cpu: &mut Cpu, fields: Fields, frame: &mut Frame, live: u64) -> Result<(), Stop> {
    let insn = fields.insn();
    let at = host_evex::address(insn.stubs[fields.length()], insn.has_imm.then_some(fields.0 as u8));
    let Some(float) = insn.float else {
        execute(at, frame, false);
        return Ok(());
    };
    let rounding = fields.get(at::ROUNDING, 3);
    if rounding != 0 {
        // With all exceptions suppressed underflow counts as masked, so FZ holds.
        frame.under.run = cpu.fpu.mxcsr & CONTROL | DEFAULT;
        if rounding != SUPPRESSED {
            frame.under.run = frame.under.run & !(3 << 13) | (rounding as u32 - 1) << 13;
        }
        execute(at, frame, true);
        // The host's MXCSR is the guest's again.
        cpu.set_mxcsr(cpu.fpu.mxcsr);
        return Ok(());
    }
    if float == Float::Flushed {
        frame.under.run |= cpu.fpu.mxcsr & FZ;
    }
    let operands = frame.vector;
    execute(at, frame, true);
    if float == Float::Told {
        cpu.set_mxcsr(cpu.fpu.mxcsr | frame.under.found & FLAGS);
        return Ok(());
    }
    let out = frame.vector[0];
    let tiny = || unbounded::is_any_tiny(&out, float, live);
    settle(cpu, frame.under.found, tiny, |mxcsr| insn.inexact.of(&operands, live, mxcsr))
}

#[expect(unsafe_code, reason = "the host's instruction")]
fn execute(at: usize, frame: &mut Frame, float: bool) {
    if float {
        // SAFETY: an address of a row's stub; its selector has asked the host.
        unsafe { host_evex::run_float(at, frame) }
    } else {
        // SAFETY: as above.
        unsafe { host_evex::run(at, frame) }
    }
}

/// Stubs of three lengths: the mnemonic, and the operands of each.
macro_rules! stubs {
    ($stub:ident, $name:literal, $x:literal, $y:literal, $z:literal) => {
        [
            $crate::host_evex::$stub!(concat!($name, " ", $x)),
            $crate::host_evex::$stub!(concat!($name, " ", $y)),
            $crate::host_evex::$stub!(concat!($name, " ", $z)),
        ]
    };
}
/// Stubs where there is one form: of a scalar, an XMM register, or for a single length.
macro_rules! one {
    ($text:expr) => {{
        const ONE: $crate::host_evex::Stub = $crate::host_evex::stub!($text);
        [ONE; 3]
    }};
}
/// As [`one`], with all immediates.
macro_rules! one_imm {
    ($text:expr) => {{
        const ONE: $crate::host_evex::Stub = $crate::host_evex::stub_imm!($text);
        [ONE; 3]
    }};
}
use {one, one_imm, stubs};

/// Makes macros of what most rows need: by operands `d`, `k` (destination: vector, mask), `a`, `b` (sources), `i` (all
/// immediates). With a mask, but for `_bare`; `_wide`: not for 128 bits, whose place repeats that of 256.
macro_rules! shapes {
    ($($shape:ident $stub:ident $x:literal $y:literal $z:literal)*) => {
        shapes!(@ ($) $($shape $stub $x $y $z)*);
    };
    (@ ($d:tt) $($shape:ident $stub:ident $x:literal $y:literal $z:literal)*) => {
        $(
            macro_rules! $shape {
                ($d name:literal) => {
                    $crate::isa::simd::evex::stubs!($stub, $d name, $x, $y, $z)
                };
            }
            use $shape;
        )*
    };
}
shapes! {
    dab stub "xmm0 {{k1}}, xmm1, xmm2" "ymm0 {{k1}}, ymm1, ymm2" "zmm0 {{k1}}, zmm1, zmm2"
    dab_wide stub "ymm0 {{k1}}, ymm1, ymm2" "ymm0 {{k1}}, ymm1, ymm2" "zmm0 {{k1}}, zmm1, zmm2"
    dab_bare stub "xmm0, xmm1, xmm2" "ymm0, ymm1, ymm2" "zmm0, zmm1, zmm2"
    dabi stub_imm "xmm0 {{k1}}, xmm1, xmm2" "ymm0 {{k1}}, ymm1, ymm2" "zmm0 {{k1}}, zmm1, zmm2"
    dabi_wide stub_imm "ymm0 {{k1}}, ymm1, ymm2" "ymm0 {{k1}}, ymm1, ymm2" "zmm0 {{k1}}, zmm1, zmm2"
    dabi_bare stub_imm "xmm0, xmm1, xmm2" "ymm0, ymm1, ymm2" "zmm0, zmm1, zmm2"
    da stub "xmm0 {{k1}}, xmm1" "ymm0 {{k1}}, ymm1" "zmm0 {{k1}}, zmm1"
    dai stub_imm "xmm0 {{k1}}, xmm1" "ymm0 {{k1}}, ymm1" "zmm0 {{k1}}, zmm1"
    dai_wide stub_imm "ymm0 {{k1}}, ymm1" "ymm0 {{k1}}, ymm1" "zmm0 {{k1}}, zmm1"
    dai_bare stub_imm "xmm0, xmm1" "ymm0, ymm1" "zmm0, zmm1"
    kab stub "k2 {{k1}}, xmm1, xmm2" "k2 {{k1}}, ymm1, ymm2" "k2 {{k1}}, zmm1, zmm2"
    kabi stub_imm "k2 {{k1}}, xmm1, xmm2" "k2 {{k1}}, ymm1, ymm2" "k2 {{k1}}, zmm1, zmm2"
    kai stub_imm "k2 {{k1}}, xmm1" "k2 {{k1}}, ymm1" "k2 {{k1}}, zmm1"
    by_xmm stub "xmm0 {{k1}}, xmm1, xmm2" "ymm0 {{k1}}, ymm1, xmm2" "zmm0 {{k1}}, zmm1, xmm2"
    from_xmm stub "xmm0 {{k1}}, xmm1" "ymm0 {{k1}}, xmm1" "zmm0 {{k1}}, xmm1"
    from_xmm_wide stub "ymm0 {{k1}}, xmm1" "ymm0 {{k1}}, xmm1" "zmm0 {{k1}}, xmm1"
    to_xmm stub "xmm0 {{k1}}, xmm1" "xmm0 {{k1}}, ymm1" "xmm0 {{k1}}, zmm1"
    widened stub "xmm0 {{k1}}, xmm1" "ymm0 {{k1}}, xmm1" "zmm0 {{k1}}, ymm1"
    narrowed stub "xmm0 {{k1}}, xmm1" "xmm0 {{k1}}, ymm1" "ymm0 {{k1}}, zmm1"
    narrowed_imm stub_imm "xmm0 {{k1}}, xmm1" "xmm0 {{k1}}, ymm1" "ymm0 {{k1}}, zmm1"
    from_mask stub "xmm0, k2" "ymm0, k2" "zmm0, k2"
    to_mask stub "k2, xmm1" "k2, ymm1" "k2, zmm1"
    from_eax stub "xmm0 {{k1}}, eax" "ymm0 {{k1}}, eax" "zmm0 {{k1}}, eax"
    from_rax stub "xmm0 {{k1}}, rax" "ymm0 {{k1}}, rax" "zmm0 {{k1}}, rax"
}

/// Scalars: `xmm, xmm, xmm` under a mask.
macro_rules! scalar {
    ($name:literal) => {
        $crate::isa::simd::evex::one!(concat!($name, " xmm0 {{k1}}, xmm1, xmm2"))
    };
}
macro_rules! scalar_imm {
    ($name:literal) => {
        $crate::isa::simd::evex::one_imm!(concat!($name, " xmm0 {{k1}}, xmm1, xmm2"))
    };
}
use {scalar, scalar_imm};
