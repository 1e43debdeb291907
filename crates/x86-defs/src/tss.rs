//! Field offsets of task-state segments, in bytes. SDM Vol. 3, chapter "Task Management".

/// The 16-bit TSS, "16-Bit Task-State Segment (TSS)".
pub mod tss16 {
    /// Previous task link.
    pub const LINK: u64 = 0;
    /// SP of level 0; levels 1 and 2 follow, 4 bytes apart.
    pub const SP0: u64 = 2;
    /// SS of level 0; levels 1 and 2 follow, 4 bytes apart.
    pub const SS0: u64 = 4;
    /// IP.
    pub const IP: u64 = 14;
    /// FLAGS.
    pub const FLAGS: u64 = 16;
    /// AX; CX DX BX SP BP SI DI follow, 2 bytes apart.
    pub const AX: u64 = 18;
    /// ES; CS SS DS follow, 2 bytes apart.
    pub const ES: u64 = 34;
    /// LDT selector.
    pub const LDT: u64 = 42;
    /// Bytes of the whole.
    pub const BYTES: u64 = 44;
    /// Smallest limit that a task switch accepts.
    pub const MIN_LIMIT: u32 = 0x2b;
}

/// The 32-bit TSS, "Task-State Segment (TSS)".
pub mod tss32 {
    /// Previous task link.
    pub const LINK: u64 = 0;
    /// ESP of level 0; levels 1 and 2 follow, 8 bytes apart.
    pub const ESP0: u64 = 4;
    /// SS of level 0; levels 1 and 2 follow, 8 bytes apart.
    pub const SS0: u64 = 8;
    /// CR3.
    pub const CR3: u64 = 28;
    /// EIP.
    pub const EIP: u64 = 32;
    /// EFLAGS.
    pub const EFLAGS: u64 = 36;
    /// EAX; ECX EDX EBX ESP EBP ESI EDI follow, 4 bytes apart.
    pub const EAX: u64 = 40;
    /// ES; CS SS DS FS GS follow, 4 bytes apart.
    pub const ES: u64 = 72;
    /// LDT selector.
    pub const LDT: u64 = 96;
    /// Bit 0: raise #DB on a switch to this task.
    pub const T: u64 = 100;
    /// Offset of the I/O permission bitmap.
    pub const IO_MAP_BASE: u64 = 102;
    /// Bytes of the whole, without bitmaps.
    pub const BYTES: u64 = 104;
    /// Smallest limit that a task switch accepts.
    pub const MIN_LIMIT: u32 = 0x67;
}

/// The 64-bit TSS, "TSS and 64-Bit mode: Task Management in 64-bit Mode".
pub mod tss64 {
    /// RSP of level 0; levels 1 and 2 follow, 8 bytes apart.
    pub const RSP0: u64 = 4;
    /// IST 1; 2 to 7 follow, 8 bytes apart.
    pub const IST1: u64 = 36;
    /// Offset of the I/O permission bitmap.
    pub const IO_MAP_BASE: u64 = 102;
    /// Bytes of the whole, without bitmaps.
    pub const BYTES: u64 = 104;
    /// Limit of a TSS without I/O permission bitmap.
    pub const MIN_LIMIT: u32 = 0x67;
}
