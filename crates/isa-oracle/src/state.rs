//! The machine state that a case starts from and ends in: everything an instruction can touch in user mode.

use crate::layout::{CODE_BASE, DATA_BASE, DATA_BYTES};

/// RFLAGS bits by their SDM names.
pub mod flag {
    #![expect(missing_docs, reason = "the SDM's names")]
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const AC: u64 = 1 << 18;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
    /// Flags that a case may start with. The rest is the kernel's: IF is always set, RF and TF are the harness's.
    pub const SETTABLE: u64 = STATUS | DF | NT | AC | ID;

    /// Names in the order in which vectors print them.
    pub const NAMES: [(&str, u64); 10] = [
        ("of", OF),
        ("sf", SF),
        ("zf", ZF),
        ("af", AF),
        ("pf", PF),
        ("cf", CF),
        ("df", DF),
        ("nt", NT),
        ("ac", AC),
        ("id", ID),
    ];
}

/// General-purpose registers in encoding order, as `State::gpr` is indexed.
pub const GPR_NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Segment registers in encoding order, as `State::seg` is indexed.
pub const SEG_NAMES: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Index of CS in `State::seg`.
pub const CS: usize = 1;

/// Selector of Linux's flat 64-bit user code segment.
pub const USER_CS: u16 = 0x33;
/// Selector of Linux's flat 32-bit user code segment.
pub const USER32_CS: u16 = 0x23;
/// Selector of Linux's flat user data segment.
pub const USER_DS: u16 = 0x2b;
/// Selector of the 16-bit code segment that the harness puts into the LDT: base `CODE_BASE`, limit FFFF.
pub const CODE16: u16 = 0x07;
/// Selector of the 16-bit data segment beside it: base `DATA_BASE`, limit FFFF.
pub const DATA16: u16 = 0x0f;

/// x87 and MMX state as FXSAVE64 shows it: registers by stack position, tag word abridged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the SDM's names")]
pub struct X87 {
    pub fcw: u16,
    pub fsw: u16,
    /// One bit per physical register: 1 = not empty.
    pub ftw: u8,
    pub fop: u16,
    pub fip: u64,
    pub fdp: u64,
    /// `st[i]` is ST(i): 80 bits, sign and exponent in bits 79:64.
    pub st: [u128; 8],
}

impl Default for X87 {
    /// As FNINIT leaves it, registers zero.
    fn default() -> Self {
        Self { fcw: 0x37f, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0, st: [0; 8] }
    }
}

/// AVX-512 state beyond AVX's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Avx512 {
    /// Bits 511:256 of ZMM0 to 15, 128 bits at a time.
    pub upper: [[u128; 2]; 16],
    /// ZMM16 to 31, 128 bits at a time.
    pub high: [[u128; 4]; 16],
    /// k0 to k7.
    pub k: [u64; 8],
}

/// Registers and the two writable data pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// RAX to R15 in encoding order.
    pub gpr: [u64; 16],
    /// Offset in the code segment.
    pub rip: u64,
    /// Without TF and RF, which belong to the harness.
    pub rflags: u64,
    /// ES CS SS DS FS GS selectors.
    pub seg: [u16; 6],
    /// FS.base.
    pub fs_base: u64,
    /// GS.base.
    pub gs_base: u64,
    /// x87 and MMX.
    pub x87: X87,
    /// SSE control and status.
    pub mxcsr: u32,
    /// YMM registers: `[low half (XMM), high half]`.
    pub ymm: [[u128; 2]; 16],
    /// AVX-512; all zero where the CPU has none.
    pub avx512: Avx512,
    /// What lies at `DATA_BASE..DATA_BASE + DATA_BYTES`.
    pub memory: Box<[u8; DATA_BYTES]>,
}

impl Default for State {
    /// What a vector leaves unsaid: zeros, FNINIT, MXCSR 1F80, RSP in the middle of the data pages.
    fn default() -> Self {
        let mut gpr = [0; 16];
        gpr[4] = DATA_BASE + 0x800;
        Self {
            gpr,
            rip: CODE_BASE,
            rflags: flag::IF | 2,
            seg: [0, USER_CS, USER_DS, 0, 0, 0],
            fs_base: 0,
            gs_base: 0,
            x87: X87::default(),
            mxcsr: 0x1f80,
            ymm: [[0; 2]; 16],
            avx512: Avx512::default(),
            memory: Box::new([0; DATA_BYTES]),
        }
    }
}

/// Operating mode of the case, by its code segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// 64-bit mode.
    Bits64,
    /// Compatibility mode with a flat 32-bit code segment.
    Bits32,
    /// Compatibility mode with 16-bit segments that begin at the code and at the data pages.
    Bits16,
}

impl Mode {
    /// The decoder's name for it: 64, 32 or 16.
    pub fn bitness(self) -> u32 {
        match self {
            Self::Bits64 => 64,
            Self::Bits32 => 32,
            Self::Bits16 => 16,
        }
    }

    /// Linear address of offset 0 in CS.
    pub fn code_base(self) -> u64 {
        if self == Self::Bits16 { CODE_BASE } else { 0 }
    }

    /// Offset in CS of the code pages: where a case starts unless it says otherwise.
    pub fn start(self) -> u64 {
        CODE_BASE - self.code_base()
    }

    /// Linear address of offset 0 in ES, SS and DS.
    pub fn data_base(self) -> u64 {
        if self == Self::Bits16 { DATA_BASE } else { 0 }
    }
}

/// One instruction to run.
#[derive(Clone, Debug)]
pub struct Case {
    /// Instruction bytes, 1 to 15, at `state.rip`.
    pub bytes: Vec<u8>,
    /// State before it.
    pub state: State,
    /// Operating mode; `state.seg[CS]` agrees.
    pub mode: Mode,
}

impl Case {
    /// A case in 64-bit mode with the default state.
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), state: State::default(), mode: Mode::Bits64 }
    }

    /// A case in `mode` with its default state.
    pub fn in_mode(mode: Mode, bytes: &[u8]) -> Self {
        let mut case = Self { mode, ..Self::new(bytes) };
        let state = &mut case.state;
        state.rip = mode.start();
        match mode {
            Mode::Bits64 => {}
            Mode::Bits32 => state.seg = [USER_DS, USER32_CS, USER_DS, USER_DS, 0, 0],
            Mode::Bits16 => {
                state.seg = [DATA16, CODE16, DATA16, DATA16, DATA16, DATA16];
                state.fs_base = DATA_BASE;
                state.gs_base = DATA_BASE;
            }
        }
        case
    }
}

/// How an instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It completed.
    Done,
    /// It raised an exception (faults: state is as before, except where the SDM says otherwise).
    Exception(Exception),
    /// It took the sandbox with it: killed, hung, or made a system call. Never comparable.
    Lost(&'static str),
}

/// An exception as its handler sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Vector number.
    pub vector: u8,
    /// Error code, 0 for vectors that push none.
    pub error: u32,
    /// CR2, for #PF only (else 0).
    pub cr2: u64,
}

/// What one instruction did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// Complete state after it.
    pub state: State,
}
