//! Names that the SDM gives: control bits, MSR numbers, vectors, descriptor and page-entry formats.
//!
//! Facts only: nothing here knows how an instruction, a page walk or an ioctl behaves. Spelling follows the Intel SDM;
//! AMD-only names follow the APM. Linear, guest-physical and host addresses are never one type.

pub mod addr;
pub mod control;
pub mod cpuid;
pub mod descriptor;
pub mod msr;
pub mod pf;
pub mod pte;
pub mod tss;
pub mod vector;

pub use addr::{GuestPhysAddr, LinearAddr, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT};
pub use control::{Cr0, Cr3, Cr4, Dr6, Dr7, Efer, Rflags, XCr0};
pub use descriptor::{AccessRights, Descriptor, Gate, Selector};
pub use pf::PfError;
