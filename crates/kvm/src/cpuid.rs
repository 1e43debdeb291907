//! What `KVM_GET_SUPPORTED_CPUID` offers, and the guest's table as the core takes it.
//!
//! Feature bits are rows of [`OFFERED`]: what the core executes, nothing else. Identity (vendor, family, model, caches,
//! address width) is the host's, because VMMs copy the host's vendor into the guest and look for that vendor's leaves.

use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};
use std::sync::LazyLock;

use kvm_abi::consts::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
use kvm_abi::{Plain, kvm_cpuid_entry, kvm_cpuid_entry2};
use x86_defs::cpuid::{self as bit, Feature, Register};

use crate::{steal, xsave};

/// `KVM_MAX_CPUID_ENTRIES`
pub(crate) const MAX_ENTRIES: u32 = 256;

/// `KVM_CPUID_SIGNATURE` and what it spells in EBX, ECX, EDX. Documentation/virt/kvm/x86/cpuid.rst.
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
const KVM_SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;

/// Highest leaf of each range.
const MAX_BASIC: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// Bytes of an XSAVE area with x87 and SSE: the legacy region and the header.
const XSAVE_LEAST: u32 = 512 + 64;

/// Shown in leaves 8000_0002H to 8000_0004H.
const BRAND: &[u8; 48] = b"softkvm virtual processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Feature bits that the core implements.
pub const OFFERED: &[Feature] = &[
    bit::FPU,
    bit::VME,
    bit::DE,
    bit::PSE,
    bit::TSC,
    bit::MSR,
    bit::PAE,
    bit::MCE,
    bit::CX8,
    bit::APIC,
    bit::SEP,
    bit::MTRR,
    bit::PGE,
    bit::MCA,
    bit::CMOV,
    bit::PAT,
    bit::PSE_36,
    bit::CLFSH,
    bit::MMX,
    bit::FXSR,
    bit::SSE,
    bit::SSE2,
    bit::SSE3,
    bit::PCLMULQDQ,
    bit::SSSE3,
    bit::CMPXCHG16B,
    bit::PCID,
    bit::SSE4_1,
    bit::SSE4_2,
    bit::X2APIC,
    bit::MOVBE,
    bit::POPCNT,
    bit::AESNI,
    bit::XSAVE,
    bit::RDRAND,
    bit::ARAT,
    bit::FSGSBASE,
    bit::IA32_TSC_ADJUST,
    bit::BMI1,
    bit::SMEP,
    bit::BMI2,
    bit::ERMS,
    bit::INVPCID,
    bit::RDSEED,
    bit::ADX,
    bit::SMAP,
    bit::CLFLUSHOPT,
    bit::CLWB,
    bit::UMIP,
    bit::PKU,
    bit::LA57,
    bit::RDPID,
    bit::CLDEMOTE,
    bit::MOVDIRI,
    bit::MOVDIR64B,
    bit::FSRM,
    bit::SERIALIZE,
    bit::IA32_ARCH_CAPABILITIES,
    bit::XSAVEOPT,
    bit::XSAVEC,
    bit::XGETBV_ECX_1,
    bit::XSAVES,
    bit::LAHF_SAHF,
    bit::LZCNT,
    bit::PREFETCHW,
    bit::SYSCALL,
    bit::NX,
    bit::PAGE_1GB,
    bit::RDTSCP,
    bit::LM,
    bit::WBNOINVD,
    bit::KVM_CLOCKSOURCE,
    bit::KVM_NOP_IO_DELAY,
    bit::KVM_CLOCKSOURCE2,
    bit::KVM_STEAL_TIME,
    bit::KVM_PV_EOI,
    bit::KVM_PV_UNHALT,
    bit::KVM_PV_TLB_FLUSH,
    bit::KVM_PV_SEND_IPI,
    bit::KVM_POLL_CONTROL,
    bit::KVM_PV_SCHED_YIELD,
    bit::KVM_CLOCKSOURCE_STABLE,
    bit::AVX,
    bit::F16C,
    bit::FMA,
    bit::AVX2,
    bit::SHA,
    bit::VAES,
    bit::VPCLMULQDQ,
    bit::GFNI,
    bit::AVX512F,
    bit::AVX512DQ,
    bit::AVX512_IFMA,
    bit::AVX512CD,
    bit::AVX512BW,
    bit::AVX512VL,
    bit::AVX512_VBMI,
    bit::AVX512_VBMI2,
    bit::AVX512_VNNI,
    bit::AVX512_BITALG,
    bit::AVX512_VPOPCNTDQ,
    bit::AVX512_BF16,
    bit::AVX512_FP16,
    bit::AVX_VNNI,
];

/// Registers that a feature's instructions have.
#[derive(Clone, Copy)]
enum Registers {
    Xmm,
    Ymm,
    Zmm,
}

/// Of those, what runs on the host's own instructions beyond what every 64-bit processor of ten years has.
const BY_HOST: &[(Feature, Registers)] = &[
    (bit::AESNI, Registers::Xmm),
    (bit::PCLMULQDQ, Registers::Xmm),
    (bit::SHA, Registers::Xmm),
    (bit::AVX, Registers::Ymm),
    (bit::F16C, Registers::Ymm),
    (bit::FMA, Registers::Ymm),
    (bit::AVX2, Registers::Ymm),
    (bit::VAES, Registers::Ymm),
    (bit::VPCLMULQDQ, Registers::Ymm),
    (bit::AVX_VNNI, Registers::Ymm),
    (bit::AVX512F, Registers::Zmm),
    (bit::AVX512DQ, Registers::Zmm),
    (bit::AVX512_IFMA, Registers::Zmm),
    (bit::AVX512CD, Registers::Zmm),
    (bit::AVX512BW, Registers::Zmm),
    (bit::AVX512VL, Registers::Zmm),
    (bit::AVX512_VBMI, Registers::Zmm),
    (bit::AVX512_VBMI2, Registers::Zmm),
    (bit::AVX512_VNNI, Registers::Zmm),
    (bit::AVX512_BITALG, Registers::Zmm),
    (bit::AVX512_VPOPCNTDQ, Registers::Zmm),
    (bit::AVX512_BF16, Registers::Zmm),
    (bit::AVX512_FP16, Registers::Zmm),
];

/// Whether guests on this host are told of a feature of [`OFFERED`].
fn is_offered_here(feature: &Feature) -> bool {
    if let Some((_, registers)) = BY_HOST.iter().find(|(by_host, _)| by_host == feature) {
        let state = match registers {
            Registers::Xmm => true,
            Registers::Ymm => xsave::has_avx(),
            Registers::Zmm => xsave::avx512_at().is_some(),
        };
        return state && feature.is_in(host(feature.leaf, feature.subleaf));
    }
    match *feature {
        bit::PKU => xsave::pkru_at().is_some(),
        // Computed here, but for its EVEX forms.
        bit::GFNI => xsave::avx512_at().is_none() || feature.is_in(host(feature.leaf, feature.subleaf)),
        bit::KVM_STEAL_TIME => steal::is_measured(),
        _ => true,
    }
}

/// AMD repeats these bits of 1.EDX in 8000_0001H.EDX; Intel leaves them 0 there.
const AMD_REPEATS: &[(Feature, Feature)] = &[
    (bit::FPU, bit::AMD_FPU),
    (bit::VME, bit::AMD_VME),
    (bit::DE, bit::AMD_DE),
    (bit::PSE, bit::AMD_PSE),
    (bit::TSC, bit::AMD_TSC),
    (bit::MSR, bit::AMD_MSR),
    (bit::PAE, bit::AMD_PAE),
    (bit::MCE, bit::AMD_MCE),
    (bit::CX8, bit::AMD_CX8),
    (bit::APIC, bit::AMD_APIC),
    (bit::MTRR, bit::AMD_MTRR),
    (bit::PGE, bit::AMD_PGE),
    (bit::MCA, bit::AMD_MCA),
    (bit::CMOV, bit::AMD_CMOV),
    (bit::PAT, bit::AMD_PAT),
    (bit::PSE_36, bit::AMD_PSE_36),
    (bit::MMX, bit::AMD_MMX),
    (bit::FXSR, bit::AMD_FXSR),
];

/// The host's vendor string, as EBX, ECX, EDX of leaf 0.
fn host_vendor() -> [u32; 3] {
    let CpuidResult { ebx, ecx, edx, .. } = __cpuid(0);
    [ebx, ecx, edx]
}

/// The host's processor, and so the guest's, is AMD's or Hygon's.
pub(crate) fn host_is_amd() -> bool {
    static AMD: LazyLock<bool> = LazyLock::new(|| is_amd(host_vendor()));
    *AMD
}

fn is_amd([ebx, ecx, edx]: [u32; 3]) -> bool {
    matches!([ebx, edx, ecx].map(u32::to_le_bytes).concat().as_slice(), b"AuthenticAMD" | b"HygonGenuine")
}

/// MAXPHYADDR that we offer: the host's, so that a VMM which asks the host finds the same.
pub(crate) fn supported_phys_bits() -> u8 {
    if __cpuid(0x8000_0000).eax >= 0x8000_0008 { (__cpuid(0x8000_0008).eax & 0xff).clamp(36, 52) as u8 } else { 36 }
}

/// The table under construction.
struct Table {
    entries: Vec<kvm_cpuid_entry2>,
    amd: bool,
}

impl Table {
    /// Adds a leaf without sub-leaves, and the feature bits it has.
    fn leaf(&mut self, function: u32, regs: [u32; 4]) {
        self.push(function, 0, 0, regs);
    }

    /// Adds a sub-leaf, and the feature bits it has.
    fn subleaf(&mut self, function: u32, index: u32, regs: [u32; 4]) {
        self.push(function, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, regs);
    }

    fn push(&mut self, function: u32, index: u32, flags: u32, mut regs: [u32; 4]) {
        let repeats =
            AMD_REPEATS.iter().filter(|(basic, _)| self.amd && OFFERED.contains(basic)).map(|(_, extended)| extended);
        for feature in OFFERED.iter().filter(|feature| is_offered_here(feature)).chain(repeats) {
            if (feature.leaf, feature.subleaf) == (function, index) {
                regs[feature.register as usize] |= feature.mask();
            }
        }
        let [eax, ebx, ecx, edx] = regs;
        self.entries.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Plain::zeroed() });
    }
}

/// Answers of the host's CPUID instruction.
fn host(function: u32, index: u32) -> [u32; 4] {
    let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(function, index);
    [eax, ebx, ecx, edx]
}

/// `KVM_GET_SUPPORTED_CPUID`, in the order Linux reports: basic, extended, KVM's own leaves.
pub(crate) fn supported() -> &'static [kvm_cpuid_entry2] {
    // Made once: on a host that is itself a guest each CPUID instruction is an exit.
    static TABLE: LazyLock<Vec<kvm_cpuid_entry2>> = LazyLock::new(make_supported);
    &TABLE
}

fn make_supported() -> Vec<kvm_cpuid_entry2> {
    let vendor = host_vendor();
    let mut table = Table { entries: Vec::with_capacity(40), amd: is_amd(vendor) };
    let [ebx, ecx, edx] = vendor;
    table.leaf(0, [MAX_BASIC, ebx, ecx, edx]);
    // EBX: CLFLUSH line of 8 × 8 bytes, one logical processor; the initial APIC id is the VMM's to fill in.
    table.leaf(1, [host(1, 0)[0], 0x0001_0800, 0, 0]);
    let intel = !table.amd;
    table.leaf(2, if intel { host(2, 0) } else { [0; 4] });
    if intel {
        for index in 0..8 {
            let regs = host(4, index);
            table.subleaf(4, index, regs);
            if regs[0] & 0x1f == 0 {
                break;
            }
        }
    } else {
        table.subleaf(4, 0, [0; 4]);
    }
    table.leaf(5, [0; 4]);
    table.leaf(6, [0; 4]);
    table.subleaf(7, 0, [1, 0, 0, 0]);
    table.subleaf(7, 1, [0; 4]);
    table.leaf(0xa, [0; 4]);
    table.subleaf(0xb, 0, [0; 4]);
    if OFFERED.contains(&bit::XSAVE) {
        let all = xsave::places().map(|(_, bytes, at)| at + bytes).fold(XSAVE_LEAST, u32::max);
        table.subleaf(0xd, 0, [xsave::components() as u32, XSAVE_LEAST, all, 0]);
        table.subleaf(0xd, 1, [0, XSAVE_LEAST, 0, 0]);
        for (component, bytes, at) in xsave::places() {
            table.subleaf(0xd, component, [bytes, at, 0, 0]);
        }
    } else {
        table.subleaf(0xd, 0, [0; 4]);
    }
    table.leaf(0x8000_0000, [MAX_EXTENDED, ebx, ecx, edx]);
    table.leaf(0x8000_0001, [if intel { 0 } else { host(1, 0)[0] }, 0, 0, 0]);
    for (leaf, text) in (0x8000_0002..).zip(BRAND.chunks_exact(16)) {
        let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
        table.leaf(leaf, [word(0), word(4), word(8), word(12)]);
    }
    table.leaf(0x8000_0005, host(0x8000_0005, 0));
    table.leaf(0x8000_0006, host(0x8000_0006, 0));
    table.leaf(0x8000_0007, [0, 0, 0, host(0x8000_0007, 0)[3] & bit::INVARIANT_TSC.mask()]);
    table.leaf(0x8000_0008, [u32::from(supported_phys_bits()) | 57 << 8, 0, 0, 0]);
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| KVM_SIGNATURE[at + i]));
    table.leaf(KVM_SIGNATURE_LEAF, [KVM_FEATURES_LEAF, word(0), word(4), word(8)]);
    table.leaf(KVM_FEATURES_LEAF, [0; 4]);
    table.entries
}

/// `KVM_GET_EMULATED_CPUID`: features that work although `supported` leaves them out. None do; Linux lists the leaves.
pub(crate) fn emulated() -> Vec<kvm_cpuid_entry2> {
    let entry = |function, eax, flags| kvm_cpuid_entry2 { function, eax, flags, ..Plain::zeroed() };
    vec![entry(0, 7, 0), entry(1, 0, 0), entry(7, 0, KVM_CPUID_FLAG_SIGNIFCANT_INDEX)]
}

/// An entry of 2007's `KVM_SET_CPUID`: no sub-leaves.
pub(crate) fn of_legacy(entry: &kvm_cpuid_entry) -> kvm_cpuid_entry2 {
    let &kvm_cpuid_entry { function, eax, ebx, ecx, edx, .. } = entry;
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Plain::zeroed() }
}

/// The entry of a guest's table that answers a leaf.
pub(crate) fn find(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    let significant = |entry: &kvm_cpuid_entry2| entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    table.iter().find(|entry| entry.function == function && (!significant(entry) || entry.index == index))
}

/// Whether the guest's table has a feature.
pub(crate) fn has(table: &[kvm_cpuid_entry2], feature: Feature) -> bool {
    find(table, feature.leaf, feature.subleaf)
        .is_some_and(|entry| feature.is_in([entry.eax, entry.ebx, entry.ecx, entry.edx]))
}

/// EAX of KVM's leaf of features, which follows its signature: leaf 4000_0000H or, where another hypervisor's are there, one
/// further up (`kvm_find_kvm_cpuid_features`).
pub(crate) fn kvm_features(table: &[kvm_cpuid_entry2]) -> u32 {
    let is_signature = |entry: &kvm_cpuid_entry2| {
        [entry.ebx, entry.ecx, entry.edx].map(u32::to_le_bytes).as_flattened() == KVM_SIGNATURE
    };
    let mut bases = (KVM_SIGNATURE_LEAF..KVM_SIGNATURE_LEAF + 0x1_0000).step_by(0x100);
    let base = bases.find(|&base| find(table, base, 0).is_some_and(is_signature));
    base.and_then(|base| find(table, base | 1, 0)).map_or(0, |entry| entry.eax)
}

/// The guest's MAXPHYADDR: leaf 8000_0008H if the table has it, else 36 (SDM Vol. 3 "Enumeration of Paging Features").
pub(crate) fn phys_bits(table: &[kvm_cpuid_entry2]) -> u8 {
    let extended = find(table, 0x8000_0000, 0).is_some_and(|entry| entry.eax >= 0x8000_0008);
    match find(table, 0x8000_0008, 0) {
        // A width below 32 bits is none that a processor has: as if nothing were said.
        Some(entry) if extended && entry.eax & 0xff >= 32 => (entry.eax & 0xff).min(52) as u8,
        _ => 36,
    }
}

/// Sets or clears a feature bit wherever the table has its leaf.
pub(crate) fn change(table: &mut [kvm_cpuid_entry2], feature: Feature, set: bool) {
    for entry in table.iter_mut().filter(|entry| (entry.function, entry.index) == (feature.leaf, feature.subleaf)) {
        let register = match feature.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        };
        *register = if set { *register | feature.mask() } else { *register & !feature.mask() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offered_bit_is_in_the_table_and_no_other() {
        let table = supported();
        for feature in OFFERED {
            assert_eq!(has(table, *feature), is_offered_here(feature), "{feature:?}");
        }
        for feature in bit::ALL {
            let repeat = AMD_REPEATS.iter().any(|(_, extended)| extended == feature);
            if !OFFERED.contains(feature) && !repeat && *feature != bit::INVARIANT_TSC {
                assert!(!has(table, *feature), "{feature:?}");
            }
        }
    }

    #[test]
    fn a_64_bit_linux_finds_what_it_requires() {
        let required = [
            bit::FPU,
            bit::PSE,
            bit::MSR,
            bit::PAE,
            bit::CX8,
            bit::PGE,
            bit::CMOV,
            bit::FXSR,
            bit::SSE,
            bit::SSE2,
            bit::LM,
        ];
        for feature in required {
            assert!(OFFERED.contains(&feature), "{feature:?}");
        }
    }

    #[test]
    fn vendor_is_the_hosts_and_leaves_are_unique() {
        let table = supported();
        assert_eq!([table[0].ebx, table[0].ecx, table[0].edx], host_vendor());
        for (i, a) in table.iter().enumerate() {
            assert!(table[i + 1..].iter().all(|b| (a.function, a.index) != (b.function, b.index)), "{a:?}");
        }
    }

    #[test]
    fn phys_bits_come_from_the_guests_table() {
        assert_eq!(phys_bits(&[]), 36);
        assert_eq!(phys_bits(supported()), supported_phys_bits());
    }
}
