//! What the guest sees when an instruction cannot complete.

use x86_defs::vector;

/// An exception with the state it reports. Ordinary control flow: see `event`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for vectors that push one outside real-address mode.
    pub error: Option<u32>,
    /// New CR2, for #PF.
    pub cr2: Option<u64>,
    /// Bits to be set in DR6, for #DB.
    pub dr6: u64,
    /// How the event came about.
    pub origin: Origin,
}

/// Distinguishes what pushes which RIP, and what checks gate privilege (SDM Vol. 3 "Exception Classifications").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Reported before the instruction: RIP is at it.
    Fault,
    /// Reported behind the instruction.
    Trap,
}

impl Fault {
    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, cr2: None, dr6: 0, origin: Origin::Fault }
    }

    /// An exception with an error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), cr2: None, dr6: 0, origin: Origin::Fault }
    }

    /// #UD.
    pub const UD: Self = Self::plain(vector::UD);
    /// #DE.
    pub const DE: Self = Self::plain(vector::DE);
    /// #NM.
    pub const NM: Self = Self::plain(vector::NM);
    /// #MF.
    pub const MF: Self = Self::plain(vector::MF);
    /// #XM.
    pub const XM: Self = Self::plain(vector::XM);

    /// #GP(error).
    pub const fn gp(error: u32) -> Self {
        Self::with_error(vector::GP, error)
    }

    /// #SS(error).
    pub const fn ss(error: u32) -> Self {
        Self::with_error(vector::SS, error)
    }

    /// #TS(error).
    pub const fn ts(error: u32) -> Self {
        Self::with_error(vector::TS, error)
    }

    /// #NP(error).
    pub const fn np(error: u32) -> Self {
        Self::with_error(vector::NP, error)
    }

    /// #AC(0).
    pub const AC: Self = Self::with_error(vector::AC, 0);

    /// #PF(error) at linear address `cr2`.
    pub const fn pf(error: u32, cr2: u64) -> Self {
        Self { cr2: Some(cr2), ..Self::with_error(vector::PF, error) }
    }

    /// #DB with the causes `dr6`, before or behind the instruction.
    pub const fn db(dr6: u64, origin: Origin) -> Self {
        Self { dr6, origin, ..Self::plain(vector::DB) }
    }
}
