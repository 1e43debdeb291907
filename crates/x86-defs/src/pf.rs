//! The page-fault error code. SDM Vol. 3 "Page-Fault Exceptions".

use bitflags::bitflags;

bitflags! {
    /// Error code of #PF.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PfError: u32 {
        /// The fault was a page-level protection violation, not a clear P flag.
        const P = 1 << 0;
        /// The access was a write (the SDM's W/R).
        const WR = 1 << 1;
        /// The access was a user-mode access.
        const US = 1 << 2;
        /// A reserved bit was set in a paging-structure entry.
        const RSVD = 1 << 3;
        /// The access was an instruction fetch, and NXE with PAE, or SMEP, was on.
        const ID = 1 << 4;
        /// A protection key forbade the access.
        const PK = 1 << 5;
        /// The access was to a shadow stack.
        const SS = 1 << 6;
        /// HLAT paging failed.
        const HLAT = 1 << 7;
        /// SGX access-control violation.
        const SGX = 1 << 15;
    }
}
