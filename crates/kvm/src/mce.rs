//! Machine-check banks: state that guests and VMMs read and write, and errors that a VMM injects. SDM Vol. 3
//! "Machine-Check Architecture"; limits and refusals are those of `set_msr_mce` and `kvm_vcpu_ioctl_x86_set_mce`.

use kvm_abi::kvm_x86_mce;
use nix::errno::Errno;
use x86_defs::msr::{self, MC_BANK_STRIDE};

/// `KVM_MAX_MCE_BANKS`
pub(crate) const MAX_BANKS: u32 = 32;
/// IA32_MCG_CAP: a control register, an interrupt for corrected errors, and recovery by software.
const MCG_CTL_P: u64 = 1 << 8;
const MCG_CMCI_P: u64 = 1 << 10;
const MCG_SER_P: u64 = 1 << 24;
/// Bits of IA32_MCG_CAP that a VMM may set, bank and extended-register counts aside.
pub(crate) const SUPPORTED_CAP: u64 = MCG_CTL_P | MCG_CMCI_P | MCG_SER_P;
const COUNTS: u64 = 0xff | 0xff_0000;
/// A machine check is being handled.
const MCG_STATUS_MCIP: u64 = 1 << 2;
/// IA32_MCi_STATUS: valid, overwritten, uncorrected.
const STATUS_VAL: u64 = 1 << 63;
const STATUS_OVER: u64 = 1 << 62;
const STATUS_UC: u64 = 1 << 61;
/// Of an uncorrected error, what makes it more than one that needs no action: context corrupt, signalled, action required.
const STATUS_ACTION: u64 = 1 << 57 | 1 << 56 | 1 << 55;
/// IA32_MCi_CTL2: the interrupt is on; how many errors it waits for.
const CTL2_CMCI_EN: u64 = 1 << 30;
const CTL2_THRESHOLD: u64 = 0x7fff;
/// IA32_MCi_CTL is all or nothing, but for bits that guests clear for old errata.
const CTL_EXEMPT: u64 = 1 << 10 | 1;

/// Machine-check state of a vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Mce {
    cap: u64,
    ctl: u64,
    status: u64,
    /// IA32_MCi_CTL, STATUS, ADDR, MISC.
    banks: [[u64; 4]; MAX_BANKS as usize],
    /// IA32_MCi_CTL2
    ctl2: [u64; MAX_BANKS as usize],
}

/// What injecting an error leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Injected {
    /// Logged, or reporting is off.
    Nothing,
    /// The interrupt of an error that needs no action.
    Interrupt,
    /// #MC.
    Exception,
    /// A second error, or the guest does not take #MC.
    TripleFault,
}

impl Mce {
    /// Before `KVM_X86_SETUP_MCE`: all banks, no control register.
    pub(crate) fn new() -> Self {
        Self {
            cap: MAX_BANKS.into(),
            ctl: 0,
            status: 0,
            banks: [[0; 4]; MAX_BANKS as usize],
            ctl2: [0; MAX_BANKS as usize],
        }
    }

    /// IA32_MCG_CAP tells of the interrupt for errors that need no action.
    pub(crate) fn has_cmci(&self) -> bool {
        self.cap & MCG_CMCI_P != 0
    }

    /// Whether an MSR is one of these, on any CPU.
    pub(crate) fn has(index: u32) -> bool {
        matches!(index, msr::IA32_MCG_CAP | msr::IA32_MCG_STATUS | msr::IA32_MCG_CTL)
            || index.checked_sub(msr::IA32_MC0_CTL2).is_some_and(|at| at < MAX_BANKS)
            || index.checked_sub(msr::IA32_MC0_CTL).is_some_and(|at| at < MC_BANK_STRIDE * MAX_BANKS)
    }

    /// `KVM_X86_SETUP_MCE`. EINVAL: no bank, too many, or an unknown capability.
    pub(crate) fn setup(&mut self, cap: u64) -> Result<(), Errno> {
        let count = cap & 0xff;
        if count == 0 || count > MAX_BANKS.into() || cap & !(SUPPORTED_CAP | COUNTS) != 0 {
            return Err(Errno::EINVAL);
        }
        self.cap = cap;
        if cap & MCG_CTL_P != 0 {
            self.ctl = u64::MAX;
        }
        for bank in &mut self.banks[..count as usize] {
            bank[0] = u64::MAX;
        }
        if self.has_cmci() {
            self.ctl2[..count as usize].fill(0);
        }
        Ok(())
    }

    fn bank(&mut self, index: u32) -> Option<(&mut u64, usize)> {
        let at = index.checked_sub(msr::IA32_MC0_CTL)?;
        let (bank, register) = (at / MC_BANK_STRIDE, (at % MC_BANK_STRIDE) as usize);
        let exists = u64::from(bank) < self.cap & 0xff;
        exists.then(|| (&mut self.banks[bank as usize][register], register))
    }

    fn ctl2(&mut self, index: u32) -> Option<&mut u64> {
        let bank = index.checked_sub(msr::IA32_MC0_CTL2).filter(|&bank| u64::from(bank) < self.cap & 0xff)?;
        Some(&mut self.ctl2[bank as usize])
    }

    /// `None`: no such MSR, or one that only user space may read.
    pub(crate) fn read(&mut self, index: u32, by_guest: bool) -> Option<u64> {
        match index {
            msr::IA32_MCG_CAP => Some(self.cap),
            msr::IA32_MCG_STATUS => Some(self.status),
            msr::IA32_MCG_CTL if self.cap & MCG_CTL_P == 0 && by_guest => None,
            msr::IA32_MCG_CTL => Some(self.ctl),
            ..msr::IA32_MC0_CTL if by_guest && !self.has_cmci() => None,
            ..msr::IA32_MC0_CTL => self.ctl2(index).map(|value| *value),
            _ => self.bank(index).map(|(value, _)| *value),
        }
    }

    /// `None`: no such MSR, or a value that it does not take.
    pub(crate) fn write(&mut self, index: u32, value: u64, by_guest: bool) -> Option<()> {
        match index {
            msr::IA32_MCG_CAP => return None,
            msr::IA32_MCG_STATUS => self.status = value,
            msr::IA32_MCG_CTL => {
                let absent = self.cap & MCG_CTL_P == 0 && (value != 0 || by_guest);
                if absent || value != 0 && value != u64::MAX {
                    return None;
                }
                self.ctl = value;
            }
            ..msr::IA32_MC0_CTL => {
                let absent = !self.has_cmci() && (value != 0 || by_guest);
                if absent || value & !(CTL2_CMCI_EN | CTL2_THRESHOLD) != 0 {
                    return None;
                }
                *self.ctl2(index)? = value;
            }
            _ => {
                let (register, number) = self.bank(index)?;
                match number {
                    0 if value != 0 && value | CTL_EXEMPT != u64::MAX => return None,
                    1 if value != 0 && by_guest => return None,
                    _ => *register = value,
                }
            }
        }
        Some(())
    }

    /// `KVM_X86_SET_MCE`. `enabled`: CR4.MCE. EINVAL: no such bank, or the status is not valid.
    pub(crate) fn inject(&mut self, mce: &kvm_x86_mce, enabled: bool) -> Result<Injected, Errno> {
        if u64::from(mce.bank) >= self.cap & 0xff || mce.status & STATUS_VAL == 0 {
            return Err(Errno::EINVAL);
        }
        if mce.mcg_status == 0 && mce.status & (STATUS_UC | STATUS_ACTION) == STATUS_UC {
            let [_, status, addr, misc] = &mut self.banks[usize::from(mce.bank)];
            (*status, *addr, *misc, self.status) = (mce.status, mce.addr, mce.misc, 0);
            let signals = self.has_cmci() && self.ctl2[usize::from(mce.bank)] & CTL2_CMCI_EN != 0;
            return Ok(if signals { Injected::Interrupt } else { Injected::Nothing });
        }
        let [ctl, status, addr, misc] = &mut self.banks[usize::from(mce.bank)];
        let uncorrected = mce.status & STATUS_UC != 0;
        let reported = (self.cap & MCG_CTL_P == 0 || self.ctl == u64::MAX) && *ctl == u64::MAX;
        if uncorrected && !reported {
            return Ok(Injected::Nothing);
        }
        if uncorrected && (self.status & MCG_STATUS_MCIP != 0 || !enabled) {
            return Ok(Injected::TripleFault);
        }
        if !uncorrected && *status & (STATUS_VAL | STATUS_UC) == STATUS_VAL | STATUS_UC {
            *status |= STATUS_OVER;
            return Ok(Injected::Nothing);
        }
        let over = if *status & STATUS_VAL != 0 { STATUS_OVER } else { 0 };
        (*status, *addr, *misc) = (mce.status | over, mce.addr, mce.misc);
        if !uncorrected {
            return Ok(Injected::Nothing);
        }
        self.status = mce.mcg_status;
        Ok(Injected::Exception)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_abi::Plain;

    fn error(status: u64) -> kvm_x86_mce {
        kvm_x86_mce { status: status | STATUS_VAL, addr: 0x1000, mcg_status: MCG_STATUS_MCIP, ..Plain::zeroed() }
    }

    #[test]
    fn setup_wants_banks_and_known_capabilities() {
        for cap in [0, 33, 10 | 1 << 11, 10 | 1 << 27] {
            assert_eq!(Mce::new().setup(cap), Err(Errno::EINVAL), "{cap:#x}");
        }
        let mut mce = Mce::new();
        mce.setup(10 | SUPPORTED_CAP).unwrap();
        assert_eq!(mce.read(msr::IA32_MCG_CTL, true), Some(u64::MAX));
        assert_eq!(mce.read(msr::IA32_MC0_CTL + 36, true), Some(u64::MAX));
        assert_eq!(mce.read(msr::IA32_MC0_CTL + 40, true), None, "the eleventh bank");
    }

    #[test]
    fn control_is_all_or_nothing_and_status_is_cleared() {
        let mut mce = Mce::new();
        mce.setup(10 | SUPPORTED_CAP).unwrap();
        assert_eq!(mce.write(msr::IA32_MC0_CTL, 1, true), None);
        assert_eq!(mce.write(msr::IA32_MC0_CTL, !CTL_EXEMPT, true), Some(()));
        assert_eq!(mce.write(msr::IA32_MC0_STATUS, 1, true), None);
        assert_eq!(mce.write(msr::IA32_MC0_STATUS, 0, true), Some(()));
        assert_eq!(mce.write(msr::IA32_MCG_CTL, 7, true), None);
    }

    #[test]
    fn uncorrected_errors_raise_or_end() {
        let mut mce = Mce::new();
        mce.setup(10 | SUPPORTED_CAP).unwrap();
        assert_eq!(mce.inject(&error(0), true), Ok(Injected::Nothing));
        assert_eq!(mce.read(msr::IA32_MC0_STATUS, true), Some(STATUS_VAL));
        assert_eq!(mce.inject(&error(STATUS_UC), true), Ok(Injected::Exception));
        assert_eq!(mce.read(msr::IA32_MC0_STATUS, true), Some(STATUS_VAL | STATUS_UC | STATUS_OVER));
        assert_eq!(mce.inject(&error(STATUS_UC), true), Ok(Injected::TripleFault), "one is being handled");
        mce.write(msr::IA32_MCG_STATUS, 0, true).unwrap();
        assert_eq!(mce.inject(&error(STATUS_UC), false), Ok(Injected::TripleFault), "CR4.MCE is clear");
        assert_eq!(mce.inject(&kvm_x86_mce { bank: 10, ..error(0) }, true), Err(Errno::EINVAL));
        assert_eq!(mce.inject(&Plain::zeroed(), true), Err(Errno::EINVAL));
    }

    /// `is_ucna`, `kvm_vcpu_x86_set_ucna`.
    #[test]
    fn errors_that_need_no_action_interrupt_where_their_bank_says_so() {
        let needs_none = kvm_x86_mce { mcg_status: 0, ..error(STATUS_UC) };
        let mut mce = Mce::new();
        mce.setup(10 | MCG_CTL_P).unwrap();
        assert_eq!(mce.inject(&needs_none, true), Ok(Injected::Nothing));
        assert_eq!(mce.read(msr::IA32_MC0_ADDR, true), Some(0x1000));
        assert_eq!(mce.read(msr::IA32_MC0_CTL2, true), None);
        assert_eq!((mce.read(msr::IA32_MC0_CTL2, false), mce.write(msr::IA32_MC0_CTL2, 0, false)), (Some(0), Some(())));
        assert_eq!(mce.write(msr::IA32_MC0_CTL2, CTL2_CMCI_EN, false), None);
        mce.setup(10 | SUPPORTED_CAP).unwrap();
        assert_eq!(mce.write(msr::IA32_MC0_CTL2, 1 << 31, true), None);
        assert_eq!(mce.write(msr::IA32_MC0_CTL2 + 10, 0, true), None, "the eleventh bank");
        assert_eq!(mce.inject(&needs_none, true), Ok(Injected::Nothing));
        assert_eq!(mce.write(msr::IA32_MC0_CTL2, CTL2_CMCI_EN | 1, true), Some(()));
        assert_eq!(mce.inject(&needs_none, true), Ok(Injected::Interrupt));
        let action = kvm_x86_mce { status: needs_none.status | 1 << 55, ..needs_none };
        assert_eq!(mce.inject(&action, true), Ok(Injected::Exception));
    }
}
