//! Whether an access may use a translation. SDM Vol. 3, chapter "Paging": "Determination of Access Rights" and
//! "Protection Keys".

use x86_defs::{Cr0, Cr4, Efer, PfError, pte};

use crate::walk::{Mode, Paging};

/// What an access does to memory. One that reads and writes (a locked or read-modify-write instruction) is a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// One access to a linear address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What it does.
    pub kind: AccessKind,
    /// Made with CPL = 3.
    pub user: bool,
    /// An implicit supervisor-mode access, whatever the CPL: to the GDT, LDT, IDT or TSS by the processor itself.
    pub implicit: bool,
}

impl Access {
    /// An access that an instruction makes at `cpl`.
    #[inline]
    pub const fn explicit(kind: AccessKind, cpl: u8) -> Self {
        Self { kind, user: cpl == 3, implicit: false }
    }

    /// An access of the processor to a system table.
    #[inline]
    pub const fn implicit(kind: AccessKind) -> Self {
        Self { kind, user: false, implicit: true }
    }

    /// Whether it is a user-mode access: made with CPL = 3 and not implicit.
    #[inline]
    pub const fn is_user_mode(self) -> bool {
        self.user && !self.implicit
    }
}

/// What all entries of one translation allow together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// R/W is 1 in every entry.
    pub rw: bool,
    /// U/S is 1 in every entry: a user-mode address.
    pub us: bool,
    /// XD is 1 in some entry (and IA32_EFER.NXE = 1, or the bit would have been reserved).
    pub nx: bool,
    /// Protection key of the entry that maps the page.
    pub key: u8,
}

impl Rights {
    /// From the AND of all entries, the OR of all entries, and the one that maps the page.
    #[inline(always)]
    pub(crate) fn new(all: u64, any: u64, leaf: u64) -> Self {
        Self {
            rw: all & pte::RW != 0,
            us: all & pte::US != 0,
            nx: any & pte::NX != 0,
            key: (leaf >> pte::PKEY_SHIFT & 15) as u8,
        }
    }

    /// Whether `access` is allowed, apart from protection keys.
    #[inline(always)]
    pub(crate) fn allow(self, paging: &Paging, access: Access) -> bool {
        if access.is_user_mode() {
            return self.us
                && match access.kind {
                    AccessKind::Read => true,
                    AccessKind::Write => self.rw,
                    AccessKind::Fetch => !self.nx,
                };
        }
        let smap = || paging.cr4.contains(Cr4::SMAP) && (access.implicit || !paging.rflags_ac);
        match access.kind {
            AccessKind::Read => !self.us || !smap(),
            AccessKind::Write => (self.rw || !paging.cr0.contains(Cr0::WP)) && (!self.us || !smap()),
            AccessKind::Fetch => !(self.nx || self.us && paging.cr4.contains(Cr4::SMEP)),
        }
    }

    /// Whether PKRU forbids `access`. Only data accesses to user-mode addresses have a key.
    #[inline(always)]
    pub(crate) fn key_forbids(self, paging: &Paging, access: Access) -> bool {
        if !paging.cr4.contains(Cr4::PKE) || !self.us || !matches!(paging.mode(), Mode::FourLevel | Mode::FiveLevel) {
            return false;
        }
        let rights = paging.pkru >> (2 * self.key);
        let (access_disable, write_disable) = (rights & 1 != 0, rights & 2 != 0);
        match access.kind {
            AccessKind::Fetch => false,
            AccessKind::Read => access_disable,
            AccessKind::Write => {
                access_disable || write_disable && (access.is_user_mode() || paging.cr0.contains(Cr0::WP))
            }
        }
    }
}

/// The bits of a #PF error code that describe the access. "Page-Fault Exceptions".
#[inline]
pub(crate) fn access_bits(paging: &Paging, access: Access) -> PfError {
    let mut code = PfError::empty();
    code.set(PfError::WR, access.kind == AccessKind::Write);
    code.set(PfError::US, access.is_user_mode());
    let fetches_reported =
        paging.cr4.contains(Cr4::SMEP) || paging.cr4.contains(Cr4::PAE) && paging.efer.contains(Efer::NXE);
    code.set(PfError::ID, access.kind == AccessKind::Fetch && fetches_reported);
    code
}
