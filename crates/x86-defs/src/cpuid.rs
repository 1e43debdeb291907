//! CPUID feature bits: leaf, sub-leaf, register, bit. SDM Vol. 2 "CPUID—CPU Identification"; AMD's from the APM Vol. 3
//! "Obtaining Processor Information Via the CPUID Instruction"; KVM's from Documentation/virt/kvm/x86/cpuid.rst.

use std::fmt;

/// The register that CPUID reports a bit in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// One feature bit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Feature {
    /// The manual's name.
    pub name: &'static str,
    /// EAX going in.
    pub leaf: u32,
    /// ECX going in; 0 where the leaf has no sub-leaves.
    pub subleaf: u32,
    /// The register coming out.
    pub register: Register,
    /// Bit number, 0 to 31.
    pub bit: u32,
}

impl Feature {
    /// The bit as a mask.
    #[inline]
    pub const fn mask(&self) -> u32 {
        1 << self.bit
    }

    /// Whether the answer `[eax, ebx, ecx, edx]` to this leaf has the bit.
    #[inline]
    pub const fn is_in(&self, answer: [u32; 4]) -> bool {
        answer[self.register as usize] & self.mask() != 0
    }
}

impl fmt::Debug for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (CPUID.{:#x}.{}:{:?}[{}])", self.name, self.leaf, self.subleaf, self.register, self.bit)
    }
}

macro_rules! features {
    ($($leaf:literal . $subleaf:literal $register:ident { $($name:ident $bit:literal)* })*) => {
        $($(
            #[doc = concat!("CPUID.", $leaf, ".", $subleaf, ":", stringify!($register), "\\[", $bit, "\\]")]
            pub const $name: Feature = Feature {
                name: stringify!($name), leaf: $leaf, subleaf: $subleaf, register: Register::$register, bit: $bit,
            };
        )*)*

        /// Every bit named here.
        pub const ALL: &[Feature] = &[$($($name),*),*];
    };
}

features! {
    0x1 . 0 Ecx {
        SSE3 0  PCLMULQDQ 1  DTES64 2  MONITOR 3  DS_CPL 4  VMX 5  SMX 6  EIST 7  TM2 8  SSSE3 9  CNXT_ID 10  SDBG 11
        FMA 12  CMPXCHG16B 13  XTPR_UPDATE_CONTROL 14  PDCM 15  PCID 17  DCA 18  SSE4_1 19  SSE4_2 20  X2APIC 21
        MOVBE 22  POPCNT 23  TSC_DEADLINE 24  AESNI 25  XSAVE 26  OSXSAVE 27  AVX 28  F16C 29  RDRAND 30
        HYPERVISOR 31
    }
    0x1 . 0 Edx {
        FPU 0  VME 1  DE 2  PSE 3  TSC 4  MSR 5  PAE 6  MCE 7  CX8 8  APIC 9  SEP 11  MTRR 12  PGE 13  MCA 14  CMOV 15
        PAT 16  PSE_36 17  PSN 18  CLFSH 19  DS 21  ACPI 22  MMX 23  FXSR 24  SSE 25  SSE2 26  SS 27  HTT 28  TM 29
        PBE 31
    }
    0x5 . 0 Ecx { MONITOR_EXTENSIONS 0  MWAIT_INTERRUPT_BREAK 1 }
    0x6 . 0 Eax { DTHERM 0  IDA 1  ARAT 2  PLN 4  PTS 6 }
    0x6 . 0 Ecx { APERFMPERF 0 }
    0x7 . 0 Ebx {
        FSGSBASE 0  IA32_TSC_ADJUST 1  SGX 2  BMI1 3  HLE 4  AVX2 5  FDP_EXCPTN_ONLY 6  SMEP 7  BMI2 8  ERMS 9
        INVPCID 10  RTM 11  RDT_M 12  FPU_CSDS_DEPRECATED 13  MPX 14  RDT_A 15  AVX512F 16  AVX512DQ 17  RDSEED 18
        ADX 19  SMAP 20  AVX512_IFMA 21  CLFLUSHOPT 23  CLWB 24  INTEL_PT 25  AVX512PF 26  AVX512ER 27  AVX512CD 28
        SHA 29  AVX512BW 30  AVX512VL 31
    }
    0x7 . 0 Ecx {
        PREFETCHWT1 0  AVX512_VBMI 1  UMIP 2  PKU 3  OSPKE 4  WAITPKG 5  AVX512_VBMI2 6  CET_SS 7  GFNI 8  VAES 9
        VPCLMULQDQ 10  AVX512_VNNI 11  AVX512_BITALG 12  AVX512_VPOPCNTDQ 14  LA57 16  RDPID 22  KL 23
        BUS_LOCK_DETECT 24  CLDEMOTE 25  MOVDIRI 27  MOVDIR64B 28  ENQCMD 29  PKS 31
    }
    0x7 . 0 Edx {
        AVX512_4VNNIW 2  AVX512_4FMAPS 3  FSRM 4  UINTR 5  AVX512_VP2INTERSECT 8  MD_CLEAR 10  SERIALIZE 14  HYBRID 15
        TSXLDTRK 16  PCONFIG 18  CET_IBT 20  AMX_BF16 22  AVX512_FP16 23  AMX_TILE 24  AMX_INT8 25  IBRS_IBPB 26
        STIBP 27  L1D_FLUSH 28  IA32_ARCH_CAPABILITIES 29  IA32_CORE_CAPABILITIES 30  SSBD 31
    }
    0x7 . 1 Eax {
        SHA512 0  SM3 1  SM4 2  AVX_VNNI 4  AVX512_BF16 5  LASS 6  CMPCCXADD 7  FZLRM 10  FSRS 11  FSRCS 12  AMX_FP16 21
        HRESET 22  AVX_IFMA 23  LAM 26
    }
    0x7 . 1 Edx { AVX_VNNI_INT8 4  AVX_NE_CONVERT 5  AVX_VNNI_INT16 10  PREFETCHI 14  CET_SSS 18 }
    0xd . 1 Eax { XSAVEOPT 0  XSAVEC 1  XGETBV_ECX_1 2  XSAVES 3  XFD 4 }
    0x80000001 . 0 Ecx {
        LAHF_SAHF 0  CMP_LEGACY 1  SVM 2  EXT_APIC_SPACE 3  ALT_MOV_CR8 4  LZCNT 5  SSE4A 6  MISALIGN_SSE 7
        PREFETCHW 8  OSVW 9  IBS 10  XOP 11  SKINIT 12  WDT 13  LWP 15  FMA4 16  TCE 17  TBM 21  TOPOLOGY_EXTENSIONS 22
        PERF_CTR_EXT_CORE 23  PERF_CTR_EXT_NB 24  DATA_BREAKPOINT_EXTENSION 26  PERF_TSC 27  PERF_CTR_EXT_LLC 28
        MWAITX 29
    }
    0x80000001 . 0 Edx {
        AMD_FPU 0  AMD_VME 1  AMD_DE 2  AMD_PSE 3  AMD_TSC 4  AMD_MSR 5  AMD_PAE 6  AMD_MCE 7  AMD_CX8 8  AMD_APIC 9
        SYSCALL 11  AMD_MTRR 12  AMD_PGE 13  AMD_MCA 14  AMD_CMOV 15  AMD_PAT 16  AMD_PSE_36 17  NX 20  MMX_EXT 22
        AMD_MMX 23  AMD_FXSR 24  FFXSR 25  PAGE_1GB 26  RDTSCP 27  LM 29  THREEDNOW_EXT 30  THREEDNOW 31
    }
    0x80000007 . 0 Edx { INVARIANT_TSC 8 }
    0x80000008 . 0 Ebx {
        CLZERO 0  INST_RET_CNT_MSR 1  RSTR_FP_ERR_PTRS 2  INVLPGB 3  RDPRU 4  MCOMMIT 8  WBNOINVD 9  AMD_IBPB 12
        AMD_IBRS 14  AMD_STIBP 15  STIBP_ALWAYS_ON 17  AMD_SSBD 24  VIRT_SSBD 25  AMD_SSB_NO 26
    }
    0x80000021 . 0 Eax {
        NO_NESTED_DATA_BREAKPOINT 0  LFENCE_ALWAYS_SERIALIZING 2  NULL_SELECTOR_CLEARS_BASE 6  AUTOMATIC_IBRS 8
    }
    0x40000001 . 0 Eax {
        KVM_CLOCKSOURCE 0  KVM_NOP_IO_DELAY 1  KVM_CLOCKSOURCE2 3  KVM_ASYNC_PF 4  KVM_STEAL_TIME 5  KVM_PV_EOI 6
        KVM_PV_UNHALT 7  KVM_PV_TLB_FLUSH 9  KVM_ASYNC_PF_VMEXIT 10  KVM_PV_SEND_IPI 11  KVM_POLL_CONTROL 12
        KVM_PV_SCHED_YIELD 13  KVM_ASYNC_PF_INT 14  KVM_MSI_EXT_DEST_ID 15  KVM_HC_MAP_GPA_RANGE 16
        KVM_MIGRATION_CONTROL 17  KVM_CLOCKSOURCE_STABLE 24
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_names_share_a_bit() {
        for (i, a) in ALL.iter().enumerate() {
            for b in &ALL[i + 1..] {
                assert!(
                    (a.leaf, a.subleaf, a.register, a.bit) != (b.leaf, b.subleaf, b.register, b.bit),
                    "{a:?} {b:?}"
                );
            }
        }
    }

    #[test]
    fn a_bit_is_found_in_its_register() {
        assert!(SSE4_2.is_in([0, 0, 1 << 20, 0]) && !SSE4_2.is_in([0, 0, 0, 1 << 20]));
        assert_eq!(format!("{NX:?}"), "NX (CPUID.0x80000001.0:Edx[20])");
    }
}
