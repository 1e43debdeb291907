//! MSR numbers. SDM Vol. 4 "Architectural MSRs"; AMD's from the APM Vol. 2 "MSR Cross-Reference"; KVM's from
//! Documentation/virt/kvm/x86/msr.rst.

macro_rules! msrs {
    ($($(#[$doc:meta])* $name:ident = $number:expr;)*) => {
        $($(#[$doc])* pub const $name: u32 = $number;)*

        /// Every single MSR that has a name here; ranges have their first.
        pub const ALL: &[(u32, &str)] = &[$(($name, stringify!($name))),*];
    };
}

msrs! {
    /// Machine-check exception address (Pentium).
    IA32_P5_MC_ADDR = 0x0;
    /// Machine-check exception type (Pentium).
    IA32_P5_MC_TYPE = 0x1;
    /// Time-stamp counter.
    IA32_TIME_STAMP_COUNTER = 0x10;
    /// Platform ID.
    IA32_PLATFORM_ID = 0x17;
    /// Local APIC base and enables.
    IA32_APIC_BASE = 0x1b;
    /// Hard power-on configuration (P6).
    EBL_CR_POWERON = 0x2a;
    /// SMIs that the processor took.
    MSR_SMI_COUNT = 0x34;
    /// Enables VMX and SMX.
    IA32_FEATURE_CONTROL = 0x3a;
    /// Per-processor addend of the TSC.
    IA32_TSC_ADJUST = 0x3b;
    /// Speculation control.
    IA32_SPEC_CTRL = 0x48;
    /// Prediction command, write only.
    IA32_PRED_CMD = 0x49;
    /// Microcode update trigger.
    IA32_BIOS_UPDT_TRIG = 0x79;
    /// Microcode revision.
    IA32_BIOS_SIGN_ID = 0x8b;
    /// SMM monitor configuration.
    IA32_SMM_MONITOR_CTL = 0x9b;
    /// Base of SMRAM.
    IA32_SMBASE = 0x9e;
    /// First general performance counter.
    IA32_PMC0 = 0xc1;
    /// Scalable bus speed.
    MSR_FSB_FREQ = 0xcd;
    /// Platform information.
    MSR_PLATFORM_INFO = 0xce;
    /// UMWAIT control.
    IA32_UMWAIT_CONTROL = 0xe1;
    /// Maximum performance frequency clock count.
    IA32_MPERF = 0xe7;
    /// Actual performance frequency clock count.
    IA32_APERF = 0xe8;
    /// MTRR capability.
    IA32_MTRRCAP = 0xfe;
    /// Architectural capabilities.
    IA32_ARCH_CAPABILITIES = 0x10a;
    /// Cache-line flush command, write only.
    IA32_FLUSH_CMD = 0x10b;
    /// L2 control (P6).
    BBL_CR_CTL3 = 0x11e;
    /// TSX control.
    IA32_TSX_CTRL = 0x122;
    /// Enables of miscellaneous features; bit 0 is CPUID faulting.
    MISC_FEATURES_ENABLES = 0x140;
    /// CS of SYSENTER.
    IA32_SYSENTER_CS = 0x174;
    /// ESP of SYSENTER.
    IA32_SYSENTER_ESP = 0x175;
    /// EIP of SYSENTER.
    IA32_SYSENTER_EIP = 0x176;
    /// Machine-check capability.
    IA32_MCG_CAP = 0x179;
    /// Machine-check status.
    IA32_MCG_STATUS = 0x17a;
    /// Machine-check control.
    IA32_MCG_CTL = 0x17b;
    /// First performance event select.
    IA32_PERFEVTSEL0 = 0x186;
    /// Performance status.
    IA32_PERF_STATUS = 0x198;
    /// Performance control.
    IA32_PERF_CTL = 0x199;
    /// Clock modulation.
    IA32_CLOCK_MODULATION = 0x19a;
    /// Thermal status.
    IA32_THERM_STATUS = 0x19c;
    /// Enables of miscellaneous processor features.
    IA32_MISC_ENABLE = 0x1a0;
    /// Offcore response 0.
    MSR_OFFCORE_RSP_0 = 0x1a6;
    /// Offcore response 1.
    MSR_OFFCORE_RSP_1 = 0x1a7;
    /// Last-branch-record selection.
    MSR_LBR_SELECT = 0x1c8;
    /// Top of the last-branch-record stack.
    MSR_LASTBRANCH_TOS = 0x1c9;
    /// Debug control.
    IA32_DEBUGCTL = 0x1d9;
    /// Last branch, from.
    MSR_LASTBRANCH_FROM_IP = 0x1db;
    /// Last branch, to.
    MSR_LASTBRANCH_TO_IP = 0x1dc;
    /// Last interrupt, from.
    MSR_LASTINT_FROM_IP = 0x1dd;
    /// Last interrupt, to.
    MSR_LASTINT_TO_IP = 0x1de;
    /// Power control.
    MSR_POWER_CTL = 0x1fc;
    /// First variable-range MTRR; base and mask alternate.
    IA32_MTRR_PHYSBASE0 = 0x200;
    /// Mask of the first variable-range MTRR.
    IA32_MTRR_PHYSMASK0 = 0x201;
    /// Fixed-range MTRR: 0 to 512 KBytes.
    IA32_MTRR_FIX64K_00000 = 0x250;
    /// Fixed-range MTRR: 512 to 640 KBytes.
    IA32_MTRR_FIX16K_80000 = 0x258;
    /// Fixed-range MTRR: 640 to 768 KBytes.
    IA32_MTRR_FIX16K_A0000 = 0x259;
    /// First of eight fixed-range MTRRs of 32 KBytes each, 768 KBytes to 1 MByte.
    IA32_MTRR_FIX4K_C0000 = 0x268;
    /// Page attribute table.
    IA32_PAT = 0x277;
    /// First corrected-machine-check control.
    IA32_MC0_CTL2 = 0x280;
    /// Default memory type and MTRR enables.
    IA32_MTRR_DEF_TYPE = 0x2ff;
    /// First fixed-function counter.
    IA32_FIXED_CTR0 = 0x309;
    /// Performance capabilities.
    IA32_PERF_CAPABILITIES = 0x345;
    /// Control of the fixed-function counters.
    IA32_FIXED_CTR_CTRL = 0x38d;
    /// Status of all counters.
    IA32_PERF_GLOBAL_STATUS = 0x38e;
    /// Enables of all counters.
    IA32_PERF_GLOBAL_CTRL = 0x38f;
    /// Overflow control of all counters.
    IA32_PERF_GLOBAL_OVF_CTRL = 0x390;
    /// Processor event based sampling.
    IA32_PEBS_ENABLE = 0x3f1;
    /// Data of processor event based sampling.
    MSR_PEBS_DATA_CFG = 0x3f2;
    /// First machine-check bank: CTL, STATUS, ADDR, MISC, then the next bank.
    IA32_MC0_CTL = 0x400;
    /// Status of the first machine-check bank.
    IA32_MC0_STATUS = 0x401;
    /// Address of the first machine-check bank.
    IA32_MC0_ADDR = 0x402;
    /// Miscellaneous information of the first machine-check bank.
    IA32_MC0_MISC = 0x403;
    /// Basic VMX information.
    IA32_VMX_BASIC = 0x480;
    /// VMX pin-based controls.
    IA32_VMX_PINBASED_CTLS = 0x481;
    /// VMX processor-based controls.
    IA32_VMX_PROCBASED_CTLS = 0x482;
    /// VMX exit controls.
    IA32_VMX_EXIT_CTLS = 0x483;
    /// VMX entry controls.
    IA32_VMX_ENTRY_CTLS = 0x484;
    /// Miscellaneous VMX data.
    IA32_VMX_MISC = 0x485;
    /// Bits of CR0 fixed to 0 in VMX operation.
    IA32_VMX_CR0_FIXED0 = 0x486;
    /// Bits of CR0 fixed to 1 in VMX operation.
    IA32_VMX_CR0_FIXED1 = 0x487;
    /// Bits of CR4 fixed to 0 in VMX operation.
    IA32_VMX_CR4_FIXED0 = 0x488;
    /// Bits of CR4 fixed to 1 in VMX operation.
    IA32_VMX_CR4_FIXED1 = 0x489;
    /// VMCS enumeration.
    IA32_VMX_VMCS_ENUM = 0x48a;
    /// VMX secondary processor-based controls.
    IA32_VMX_PROCBASED_CTLS2 = 0x48b;
    /// EPT and VPID capabilities.
    IA32_VMX_EPT_VPID_CAP = 0x48c;
    /// True VMX pin-based controls.
    IA32_VMX_TRUE_PINBASED_CTLS = 0x48d;
    /// True VMX processor-based controls.
    IA32_VMX_TRUE_PROCBASED_CTLS = 0x48e;
    /// True VMX exit controls.
    IA32_VMX_TRUE_EXIT_CTLS = 0x48f;
    /// True VMX entry controls.
    IA32_VMX_TRUE_ENTRY_CTLS = 0x490;
    /// VM functions.
    IA32_VMX_VMFUNC = 0x491;
    /// Extended machine-check control.
    IA32_MCG_EXT_CTL = 0x4d0;
    /// Processor-trace control.
    IA32_RTIT_CTL = 0x570;
    /// Debug store area.
    IA32_DS_AREA = 0x600;
    /// User-mode control-flow enforcement.
    IA32_U_CET = 0x6a0;
    /// Supervisor-mode control-flow enforcement.
    IA32_S_CET = 0x6a2;
    /// Shadow-stack pointer of ring 0; rings 1 to 3 follow.
    IA32_PL0_SSP = 0x6a4;
    /// Shadow-stack pointer of ring 3.
    IA32_PL3_SSP = 0x6a7;
    /// Interrupt shadow-stack table.
    IA32_INTERRUPT_SSP_TABLE_ADDR = 0x6a8;
    /// Deadline of the local APIC timer.
    IA32_TSC_DEADLINE = 0x6e0;
    /// First of the x2APIC range, which ends at 0x8ff.
    IA32_X2APIC_BASE = 0x800;
    /// MPX supervisor configuration.
    IA32_BNDCFGS = 0xd90;
    /// Supervisor state components of XSAVES.
    IA32_XSS = 0xda0;
    /// First last-branch-record source.
    MSR_LBR_NHM_FROM = 0x680;
    /// First last-branch-record target.
    MSR_LBR_NHM_TO = 0x6c0;
    /// Extended feature disable.
    IA32_XFD = 0x1c4;
    /// Extended feature disable: cause.
    IA32_XFD_ERR = 0x1c5;

    /// Extended feature enables.
    IA32_EFER = 0xc000_0080;
    /// CS and SS of SYSCALL and SYSRET, and EIP of SYSCALL in legacy mode.
    IA32_STAR = 0xc000_0081;
    /// RIP of SYSCALL in 64-bit mode.
    IA32_LSTAR = 0xc000_0082;
    /// RIP of SYSCALL in compatibility mode (AMD).
    IA32_CSTAR = 0xc000_0083;
    /// RFLAGS bits that SYSCALL clears.
    IA32_FMASK = 0xc000_0084;
    /// MPERF, read only (AMD).
    MPERF_READONLY = 0xc000_00e7;
    /// APERF, read only (AMD).
    APERF_READONLY = 0xc000_00e8;
    /// Base of FS.
    IA32_FS_BASE = 0xc000_0100;
    /// Base of GS.
    IA32_GS_BASE = 0xc000_0101;
    /// Base that SWAPGS puts into GS.
    IA32_KERNEL_GS_BASE = 0xc000_0102;
    /// What RDTSCP and RDPID report.
    IA32_TSC_AUX = 0xc000_0103;
    /// TSC ratio (AMD).
    TSC_RATIO = 0xc000_0104;

    /// First performance event select (AMD).
    PERF_EVT_SEL0 = 0xc001_0000;
    /// First performance counter (AMD).
    PERF_CTR0 = 0xc001_0004;
    /// System configuration (AMD).
    SYSCFG = 0xc001_0010;
    /// Hardware configuration (AMD).
    HWCR = 0xc001_0015;
    /// First I/O range register (AMD).
    IORR_BASE0 = 0xc001_0016;
    /// Top of memory (AMD).
    TOP_MEM = 0xc001_001a;
    /// Top of memory above 4 GBytes (AMD).
    TOP_MEM2 = 0xc001_001d;
    /// Northbridge configuration (AMD).
    NB_CFG = 0xc001_001f;
    /// Microcode patch loader (AMD).
    PATCH_LOADER = 0xc001_0020;
    /// Interrupt-pending message (AMD).
    INT_PENDING_MSG = 0xc001_0055;
    /// Base of the memory-mapped configuration space (AMD).
    MMIO_CONF_BASE_ADDR = 0xc001_0058;
    /// P-state limit (AMD).
    PSTATE_CUR_LIMIT = 0xc001_0061;
    /// P-state status (AMD).
    PSTATE_STATUS = 0xc001_0063;
    /// First P-state definition (AMD).
    PSTATE_DEF0 = 0xc001_0064;
    /// SVM: enables (AMD).
    VM_CR = 0xc001_0114;
    /// SVM: INTR and SMI control (AMD).
    IGNNE = 0xc001_0115;
    /// SVM: host save area (AMD).
    VM_HSAVE_PA = 0xc001_0117;
    /// Speculation control as a hypervisor shows it (AMD).
    VIRT_SPEC_CTRL = 0xc001_011f;
    /// OS-visible workarounds: count (AMD).
    OSVW_ID_LENGTH = 0xc001_0140;
    /// OS-visible workarounds: status (AMD).
    OSVW_STATUS = 0xc001_0141;
    /// First core performance event select (AMD).
    PERF_CTL0 = 0xc001_0200;
    /// First core performance counter (AMD).
    CORE_PERF_CTR0 = 0xc001_0201;
    /// Load-store configuration (AMD).
    LS_CFG = 0xc001_1020;
    /// Instruction-cache configuration (AMD).
    IC_CFG = 0xc001_1021;
    /// Data-cache configuration (AMD).
    DC_CFG = 0xc001_1022;
    /// Bus-unit configuration (AMD).
    BU_CFG2 = 0xc001_102a;
    /// Decode configuration: LFENCE serialises (AMD).
    DE_CFG = 0xc001_1029;

    /// Wall clock, first number (KVM).
    MSR_KVM_WALL_CLOCK = 0x11;
    /// System time, first number (KVM).
    MSR_KVM_SYSTEM_TIME = 0x12;
    /// Wall clock (KVM).
    MSR_KVM_WALL_CLOCK_NEW = 0x4b56_4d00;
    /// System time (KVM).
    MSR_KVM_SYSTEM_TIME_NEW = 0x4b56_4d01;
    /// Asynchronous page faults (KVM).
    MSR_KVM_ASYNC_PF_EN = 0x4b56_4d02;
    /// Steal time (KVM).
    MSR_KVM_STEAL_TIME = 0x4b56_4d03;
    /// End of interrupt in memory (KVM).
    MSR_KVM_PV_EOI_EN = 0x4b56_4d04;
    /// Halt polling (KVM).
    MSR_KVM_POLL_CONTROL = 0x4b56_4d05;
    /// Asynchronous page faults, vector (KVM).
    MSR_KVM_ASYNC_PF_INT = 0x4b56_4d06;
    /// Asynchronous page faults, acknowledge (KVM).
    MSR_KVM_ASYNC_PF_ACK = 0x4b56_4d07;
    /// Live migration (KVM).
    MSR_KVM_MIGRATION_CONTROL = 0x4b56_4d08;
}

/// Number of fixed-range MTRRs of 4-KByte granularity.
pub const MTRR_FIX4K_COUNT: u32 = 8;
/// MSRs of one machine-check bank.
pub const MC_BANK_STRIDE: u32 = 4;
/// Last of the x2APIC range.
pub const IA32_X2APIC_LAST: u32 = 0x8ff;

/// Bits of IA32_APIC_BASE.
pub mod apic_base {
    /// Bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const EXTD: u64 = 1 << 10;
    /// Local APIC enabled.
    pub const EN: u64 = 1 << 11;
    /// Address at reset.
    pub const DEFAULT: u64 = 0xfee0_0000;
}

/// Bits of IA32_MISC_ENABLE.
pub mod misc_enable {
    /// Fast string operations.
    pub const FAST_STRING: u64 = 1 << 0;
    /// Automatic thermal control.
    pub const TCC: u64 = 1 << 3;
    /// Performance monitoring available.
    pub const EMON: u64 = 1 << 7;
    /// Branch trace storage unavailable.
    pub const BTS_UNAVAIL: u64 = 1 << 11;
    /// Processor event based sampling unavailable.
    pub const PEBS_UNAVAIL: u64 = 1 << 12;
    /// Enhanced SpeedStep.
    pub const ENHANCED_SPEEDSTEP: u64 = 1 << 16;
    /// MONITOR/MWAIT enabled: CPUID.1:ECX\[3\] follows it.
    pub const MWAIT: u64 = 1 << 18;
    /// CPUID reports no leaf above 2.
    pub const LIMIT_CPUID: u64 = 1 << 22;
    /// xTPR messages disabled.
    pub const XTPR_DISABLE: u64 = 1 << 23;
    /// Execute disable not available: CPUID.80000001H:EDX\[20\] follows it.
    pub const XD_DISABLE: u64 = 1 << 34;
}

/// Power-up value of IA32_PAT: WB WT UC- UC, twice. SDM Vol. 3 "Programming the PAT".
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// The name of an MSR, for messages. Linear search: not for a hot path.
pub fn name(number: u32) -> Option<&'static str> {
    ALL.iter().find(|row| row.0 == number).map(|row| row.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_one_name() {
        let mut numbers: Vec<u32> = ALL.iter().map(|row| row.0).collect();
        numbers.sort_unstable();
        let all = numbers.len();
        numbers.dedup();
        assert_eq!(numbers.len(), all);
        assert_eq!(name(0xc000_0082), Some("IA32_LSTAR"));
        assert_eq!(name(0x474f_4f00), None);
    }
}
