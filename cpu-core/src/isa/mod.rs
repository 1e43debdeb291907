//! The instruction set: one file a family, rows on top, semantics below. SDM Vol. 2, the page of each mnemonic.

mod alu;
mod bit;
mod branch;
mod call;
mod control;
mod decimal;
mod exchange;
mod far;
mod feature;
mod flag;
mod io;
mod mov;
mod muldiv;
mod pair;
mod segment;
mod shift;
mod simd;
mod stack;
mod string;
mod system;
mod table;
mod x87;

pub use feature::FEATURES;

pub(crate) use control::{DR6_WRITABLE, DR7_WRITABLE, cr4_exists};
pub(crate) use far::has_room;
pub(crate) use pair::pair;

pub(crate) use simd::state::MXCSR_MASK;

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

use crate::cpu::{Cpu, Done};
use crate::decode::digest::{Digest, Lowered, Select};
use crate::decode::trace::MAX_INSTRUCTION_BYTES;
use crate::fault::Fault;
use crate::op::{Op, plain};
use crate::vmx::Exit;

pub(crate) use self::system::PauseLoop;

/// What a row stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Key {
    /// Every encoding of a mnemonic.
    Mnemonic(Mnemonic),
    /// The VEX encodings of a mnemonic.
    Vex(Mnemonic),
    /// The EVEX encodings of a mnemonic, or those with an operand of a kind.
    Evex(Mnemonic, Option<OpCodeOperandKind>),
    /// Single encodings, where a mnemonic names more than one instruction.
    Codes(&'static [Code]),
}

/// One instruction: what it is called, and who makes an op of it.
pub(crate) struct Row {
    pub(crate) key: Key,
    pub(crate) select: Select,
}

/// A row for every encoding of a mnemonic.
pub(crate) const fn row(mnemonic: Mnemonic, select: Select) -> Row {
    Row { key: Key::Mnemonic(mnemonic), select }
}

/// A row for single encodings; it comes before that of their mnemonic.
pub(crate) const fn codes(codes: &'static [Code], select: Select) -> Row {
    Row { key: Key::Codes(codes), select }
}

/// Pairs each family's name with its rows.
macro_rules! families {
    ($($first:ident $(:: $more:ident)*,)*) => {
        &[$((concat!(stringify!($first) $(, "::", stringify!($more))*), $first $(::$more)* ::ROWS),)*]
    };
}

/// Every family: the module it is in, and its rows.
const FAMILIES: &[(&str, &[Row])] = families![
    alu,
    bit,
    branch,
    call,
    control,
    far,
    flag,
    io,
    decimal,
    exchange,
    mov,
    muldiv,
    segment,
    shift,
    stack,
    system,
    table,
    simd::convert,
    simd::evex::compare,
    simd::evex::convert,
    simd::evex::element,
    simd::evex::float,
    simd::evex::gather,
    simd::evex::half,
    simd::evex::integer,
    simd::evex::mask,
    simd::evex::moves,
    simd::evex::permute,
    simd::float,
    simd::gfni,
    simd::integer,
    simd::moves,
    simd::sha,
    simd::shuffle,
    simd::sse4,
    simd::state,
    simd::vex::convert,
    simd::vex::float,
    simd::vex::fma,
    simd::vex::gather,
    simd::vex::integer,
    simd::vex::moves,
    simd::vex::shuffle,
    simd::xsave,
    x87::arith,
    x87::control,
    x87::moves,
    string,
];

/// The selector of each of iced's codes.
static BY_CODE: LazyLock<Vec<Option<Select>>> = LazyLock::new(|| {
    let mut selectors = vec![None; Code::values().len()];
    for row in FAMILIES.iter().flat_map(|family| family.1) {
        for code in row.key.codes() {
            let selector = &mut selectors[code as usize];
            // Single encodings may come behind their mnemonic.
            match row.key {
                Key::Codes(_) => *selector = Some(row.select),
                _ => _ = selector.get_or_insert(row.select),
            }
        }
    }
    selectors
});

/// iced's codes by mnemonic.
static CODES: LazyLock<Vec<Vec<Code>>> = LazyLock::new(|| {
    let mut codes = vec![Vec::new(); Mnemonic::values().len()];
    Code::values().for_each(|code| codes[code.mnemonic() as usize].push(code));
    codes
});

impl Key {
    /// The encodings that it stands for.
    fn codes(self) -> Vec<Code> {
        let of = |mnemonic: Mnemonic, keep: &dyn Fn(Code) -> bool| {
            CODES[mnemonic as usize].iter().copied().filter(|code| keep(*code)).collect()
        };
        match self {
            Self::Mnemonic(mnemonic) => of(mnemonic, &|_| true),
            Self::Vex(mnemonic) => of(mnemonic, &|code| code.op_code().encoding() == EncodingKind::VEX),
            Self::Evex(mnemonic, kind) => of(mnemonic, &|code| {
                let info = code.op_code();
                info.encoding() == EncodingKind::EVEX && kind.is_none_or(|kind| info.op_kinds().contains(&kind))
            }),
            Self::Codes(codes) => codes.to_vec(),
        }
    }
}

/// Whether the core executes instructions of this encoding.
pub fn is_implemented(code: Code) -> bool {
    BY_CODE[code as usize].is_some()
}

/// The families of the core, and which encodings each has rows for.
pub fn families() -> impl Iterator<Item = (&'static str, Vec<Code>)> {
    FAMILIES.iter().map(|(name, rows)| {
        let encodings = rows.iter().flat_map(|row| row.key.codes());
        (*name, encodings.collect())
    })
}

/// Features that no guest is told of: their opcodes do not exist for it, as on a CPU without them.
const NEVER_OFFERED: &[CpuidFeature] = &[
    CpuidFeature::AESKLE,
    CpuidFeature::AMX_TILE,
    CpuidFeature::CET_SS,
    CpuidFeature::CLZERO,
    CpuidFeature::D3NOW,
    CpuidFeature::D3NOWEXT,
    CpuidFeature::ENQCMD,
    CpuidFeature::FMA4,
    CpuidFeature::HLE_or_RTM,
    CpuidFeature::HRESET,
    CpuidFeature::INVEPT,
    CpuidFeature::INVLPGB,
    CpuidFeature::INVVPID,
    CpuidFeature::KL,
    CpuidFeature::LWP,
    CpuidFeature::MCOMMIT,
    CpuidFeature::MONITORX,
    CpuidFeature::PCONFIG,
    CpuidFeature::PTWRITE,
    CpuidFeature::RDPRU,
    CpuidFeature::RTM,
    CpuidFeature::SEV_ES,
    CpuidFeature::SEV_SNP,
    CpuidFeature::SGX1,
    CpuidFeature::SKINIT,
    CpuidFeature::SKINIT_or_SVM,
    CpuidFeature::SSE4A,
    CpuidFeature::SVM,
    CpuidFeature::TBM,
    CpuidFeature::TDX,
    CpuidFeature::TSXLDTRK,
    CpuidFeature::UINTR,
    CpuidFeature::VMX,
    CpuidFeature::WAITPKG,
    CpuidFeature::WIDE_KL,
    CpuidFeature::XOP,
];

/// The op of an instruction. `no_more`: 15 bytes were not enough for iced.
pub(crate) fn lower(digest: &Digest<'_>, no_more: bool) -> Lowered {
    if no_more {
        return digest.lower(plain_handler(too_long)).ends();
    }
    if digest.ins.is_invalid() {
        return digest.lower(plain_handler(invalid)).ends();
    }
    let code = digest.ins.code();
    BY_CODE[code as usize].and_then(|select| select(digest)).unwrap_or_else(|| {
        let foreign = code.op_code().encoding() == EncodingKind::EVEX
            || code.cpuid_features().iter().any(|feature| NEVER_OFFERED.contains(feature));
        digest.lower(if foreign { plain_handler(invalid) } else { plain_handler(missing) }).ends()
    })
}

/// The handler that calls a plain function.
pub(crate) const fn plain_handler<F: Fn(&mut Cpu, &Op) -> Done + Copy + 'static>(_: F) -> crate::op::Handler {
    plain::<F>
}

/// An opcode that does not exist, or a LOCK where none may be: #UD.
fn invalid(cpu: &mut Cpu, _: &Op) -> Done {
    Err(cpu.fault(Fault::UD))
}

/// More than 15 bytes: #GP(0) (SDM Vol. 3 "Interrupt 13").
fn too_long(cpu: &mut Cpu, _: &Op) -> Done {
    Err(cpu.fault(Fault::gp(0)))
}

/// An instruction that exists and that the core lacks: the KVM layer is told, with its bytes.
fn missing(cpu: &mut Cpu, op: &Op) -> Done {
    let mut bytes = [0; MAX_INSTRUCTION_BYTES];
    let len = usize::from(op.len).min(bytes.len());
    let ip = cpu.ip_of(op);
    for (i, byte) in bytes[..len].iter_mut().enumerate() {
        *byte = cpu.read(crate::state::Seg::Cs, ip.wrapping_add(i as u64)).unwrap_or(0);
    }
    Err(cpu.exit(Exit::Unimplemented { bytes, len: len as u8 }))
}

/// Picks the monomorphised handler for an operand width of 1, 2, 4 or 8 bytes.
macro_rules! by_width {
    ($bytes:expr, $W:ident => $handler:expr) => {
        match $bytes {
            1 => {
                type $W = u8;
                $handler
            }
            2 => {
                type $W = u16;
                $handler
            }
            4 => {
                type $W = u32;
                $handler
            }
            8 => {
                type $W = u64;
                $handler
            }
            _ => return None,
        }
    };
}
pub(crate) use by_width;

/// Picks the monomorphised handler for the form of the memory operand.
macro_rules! by_form {
    ($digest:expr, $F:ident => $handler:expr) => {
        match $crate::isa::form_of($digest) {
            $crate::isa::FormOf::BaseDisp => {
                type $F = $crate::op::BaseDisp;
                $handler
            }
            $crate::isa::FormOf::BaseIndex => {
                type $F = $crate::op::BaseIndex;
                $handler
            }
            $crate::isa::FormOf::Exact => {
                type $F = $crate::op::Exact;
                $handler
            }
            $crate::isa::FormOf::General => {
                type $F = $crate::op::General;
                $handler
            }
        }
    };
}
pub(crate) use by_form;

/// Picks the monomorphised handler for the stack of 64-bit mode: hot, or exact.
macro_rules! by_stack {
    ($digest:expr, $F:ident => $handler:expr) => {
        if $digest.exact {
            type $F = $crate::op::Exact;
            $handler as $crate::op::Handler
        } else {
            type $F = $crate::op::BaseDisp;
            $handler
        }
    };
}
pub(crate) use by_stack;

/// The forms of a memory operand that have handlers of their own.
pub(crate) enum FormOf {
    /// See [`crate::op::BaseDisp`].
    BaseDisp,
    /// See [`crate::op::BaseIndex`].
    BaseIndex,
    /// See [`crate::op::General`].
    General,
    /// See [`crate::op::Exact`].
    Exact,
}

/// Form of the memory operand: the flat forms need 64-bit addresses in a segment whose base is 0 there.
pub(crate) fn form_of(digest: &Digest<'_>) -> FormOf {
    use iced_x86::Register;
    if digest.exact {
        return FormOf::Exact;
    }
    let ins = digest.ins;
    let based = matches!(ins.memory_segment(), Register::FS | Register::GS);
    let narrow = |r: Register| r != Register::None && r.size() != 8;
    if !digest.mode.is_64bit() || based || narrow(ins.memory_base()) || narrow(ins.memory_index()) {
        return FormOf::General;
    }
    if ins.memory_base() == Register::None && ins.memory_index() == Register::None && ins.memory_displ_size() < 8 {
        // A bare 32-bit address under an address-size prefix is cut to 32 bits.
        return FormOf::General;
    }
    if ins.memory_index() == Register::None { FormOf::BaseDisp } else { FormOf::BaseIndex }
}
