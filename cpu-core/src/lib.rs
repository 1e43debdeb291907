//! The interpreter: an x86-64 CPU that decodes once, keeps traces of decoded operations, and reports what VMX would.
//!
//! [`Cpu::run`] is the whole of it: it comes back with an [`Exit`], the caller deals with that and calls again.

mod access;
mod api;
mod cpu;
mod decode;
mod entry;
mod event;
mod fault;
mod flags;
mod host;
mod host_evex;
mod host_simd;
mod host_vex;
mod host_x87;
mod isa;
mod op;
mod platform;
mod profile;
mod protect;
mod run;
mod state;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vmx;
mod word;

pub use cpu::{Cpu, Kick};
pub use host_evex::host_has_avx512;
pub use isa::{FEATURES, families, is_implemented};
pub use op::STACK_BYTES;
pub use platform::{HostPlatform, Hypercall, Platform};
pub use profile::{Counts, Line, Place, Profile, Sampled, Samples, disassemble, executed};
pub use run::Poll;
pub use state::{
    Breakpoints, CpuidEntry, DebugRegs, DescriptorTable, Events, Fpu, Gpr, Msrs, PendingException, Regs, Seg, Segment,
    Sregs, Variant, VectorRegister, XSAVE_LEGACY_BYTES,
};
pub use vmx::{Exit, Io, Mmio, MsrAccess, MsrRefusal};
