//! Architectural state as plain data: what the KVM layer reads and loads, in the SDM's names and units.

mod events;
mod msr;
mod segment;
mod variant;
mod vector;

pub use events::{Events, PendingException};
pub use msr::Msrs;
pub use segment::{DescriptorTable, Segment};
pub use variant::Variant;
pub use vector::{Fpu, VectorRegister, XSAVE_LEGACY_BYTES};

use x86_defs::{Cr0, Cr4, Efer};

/// General registers in encoding order, as ModRM numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs, reason = "the SDM's register names")]
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

/// Segment registers in encoding order (SDM Vol. 2 "sreg").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the SDM's register names")]
pub enum Seg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl Seg {
    /// All six, in encoding order.
    pub const ALL: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];
}

/// What KVM_GET_REGS and KVM_SET_REGS move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Regs {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: encoding order.
    pub gpr: [u64; 16],
    /// Offset in CS of the next instruction.
    pub rip: u64,
    /// All of RFLAGS; bit 1 reads as 1.
    pub rflags: u64,
}

/// What KVM_GET_SREGS and KVM_SET_SREGS move, bar the APIC's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sregs {
    /// ES, CS, SS, DS, FS, GS: encoding order.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldt: Segment,
    /// Global descriptor table register.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idt: DescriptorTable,
    /// Control registers.
    pub cr0: Cr0,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Root of the paging structures, PWT, PCD or PCID in the low bits.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: Cr4,
    /// Task priority, bits 3:0.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: Efer,
}

/// DR0–DR3, DR6 and DR7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugRegs {
    /// DR0 to DR3: breakpoint linear addresses.
    pub db: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
}

impl Default for DebugRegs {
    /// SDM Vol. 3 "Processor State After Reset": DR6 FFFF0FF0H, DR7 00000400H.
    fn default() -> Self {
        Self { db: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400 }
    }
}

/// DR0–DR3 and DR7 as breakpoints are looked for: the guest's own, or those of a debugger of the guest in their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoints {
    /// Breakpoint linear addresses.
    pub db: [u64; 4],
    /// Debug control.
    pub dr7: u64,
}

/// One row of the guest's CPUID table. A row whose `index` is `None` answers any ECX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, where the leaf has sub-leaves.
    pub index: Option<u32>,
    /// EAX, EBX, ECX, EDX on output.
    pub regs: [u32; 4],
}
