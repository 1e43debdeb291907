//! Exception and interrupt vectors. SDM Vol. 3 "Exception and Interrupt Vectors" and "Interrupt 8—Double Fault
//! Exception (#DF)".

/// How an exception combines with a second one during its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Never leads to a double fault.
    Benign,
    /// A second contributory exception makes #DF.
    Contributory,
    /// A second contributory exception or page fault makes #DF.
    PageFault,
    /// Any further contributory exception or page fault is a triple fault.
    DoubleFault,
}

/// Divide error, #DE.
pub const DE: u8 = 0;
/// Debug exception, #DB.
pub const DB: u8 = 1;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// Breakpoint, #BP.
pub const BP: u8 = 3;
/// Overflow, #OF.
pub const OF: u8 = 4;
/// BOUND range exceeded, #BR.
pub const BR: u8 = 5;
/// Invalid opcode, #UD.
pub const UD: u8 = 6;
/// Device not available, #NM.
pub const NM: u8 = 7;
/// Double fault, #DF.
pub const DF: u8 = 8;
/// Coprocessor segment overrun; no processor since the 386 raises it.
pub const COPROCESSOR_SEGMENT_OVERRUN: u8 = 9;
/// Invalid TSS, #TS.
pub const TS: u8 = 10;
/// Segment not present, #NP.
pub const NP: u8 = 11;
/// Stack fault, #SS.
pub const SS: u8 = 12;
/// General protection, #GP.
pub const GP: u8 = 13;
/// Page fault, #PF.
pub const PF: u8 = 14;
/// x87 floating-point error, #MF.
pub const MF: u8 = 16;
/// Alignment check, #AC.
pub const AC: u8 = 17;
/// Machine check, #MC.
pub const MC: u8 = 18;
/// SIMD floating-point exception, #XM.
pub const XM: u8 = 19;
/// Virtualization exception, #VE.
pub const VE: u8 = 20;
/// Control protection exception, #CP.
pub const CP: u8 = 21;
/// First vector that is not reserved for exceptions.
pub const FIRST_EXTERNAL: u8 = 32;

/// Whether delivery of exception `vector` pushes an error code in protected and IA-32e mode. Real mode never does.
#[inline]
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, DF | TS | NP | SS | GP | PF | AC | CP)
}

/// The row of the SDM's table "Interrupt and Exception Classes".
#[inline]
pub const fn class(vector: u8) -> Class {
    match vector {
        DE | TS | NP | SS | GP | CP => Class::Contributory,
        PF | VE => Class::PageFault,
        DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What follows when `second` is raised while `first` is being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Combined {
    /// `second` is delivered (`first` is a fault and comes again).
    Second,
    /// #DF with error code 0 is delivered.
    DoubleFault,
    /// The processor enters the shutdown state.
    Shutdown,
}

/// The SDM's table "Conditions for Generating a Double Fault".
#[inline]
pub const fn combine(first: u8, second: u8) -> Combined {
    match (class(first), class(second)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => Combined::Shutdown,
        (Class::Contributory, Class::Contributory) => Combined::DoubleFault,
        (Class::PageFault, Class::Contributory | Class::PageFault) => Combined::DoubleFault,
        _ => Combined::Second,
    }
}

/// `#GP` and so on, for messages; `""` where the SDM has no mnemonic.
pub const fn mnemonic(vector: u8) -> &'static str {
    match vector {
        DE => "#DE",
        DB => "#DB",
        NMI => "NMI",
        BP => "#BP",
        OF => "#OF",
        BR => "#BR",
        UD => "#UD",
        NM => "#NM",
        DF => "#DF",
        TS => "#TS",
        NP => "#NP",
        SS => "#SS",
        GP => "#GP",
        PF => "#PF",
        MF => "#MF",
        AC => "#AC",
        MC => "#MC",
        XM => "#XM",
        VE => "#VE",
        CP => "#CP",
        _ => "",
    }
}

/// Bits of the error code of #DF, #TS, #NP, #SS and #GP, SDM Vol. 3 "Error Code".
pub mod selector_error {
    /// External event: the event being delivered was not an instruction's own.
    pub const EXT: u32 = 1 << 0;
    /// The index is one into the IDT.
    pub const IDT: u32 = 1 << 1;
    /// The index is one into the LDT, not the GDT.
    pub const TI: u32 = 1 << 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_fault_table() {
        assert_eq!(combine(PF, PF), Combined::DoubleFault);
        assert_eq!(combine(GP, PF), Combined::Second);
        assert_eq!(combine(PF, GP), Combined::DoubleFault);
        assert_eq!(combine(GP, NP), Combined::DoubleFault);
        assert_eq!(combine(UD, GP), Combined::Second);
        assert_eq!(combine(DF, PF), Combined::Shutdown);
        assert_eq!(combine(DF, DB), Combined::Second);
    }

    #[test]
    fn error_codes() {
        let with: Vec<u8> = (0..=255).filter(|&v| has_error_code(v)).collect();
        assert_eq!(with, [8, 10, 11, 12, 13, 14, 17, 21]);
    }
}
