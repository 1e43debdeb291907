//! HLT, CPUID, RDTSC RDTSCP RDPMC RDPID, RDMSR WRMSR, MONITOR MWAIT, PAUSE, VMCALL, RSM and the opcodes that are #UD on purpose. SDM Vol. 2,
//! the page of each mnemonic.

use iced_x86::Mnemonic as M;
use x86_defs::{Cr0, Cr4, Rflags, cpuid};

use super::segment::calm;
use super::{Row, row};
use crate::cpu::{Cpu, Done, Stop, Then};
use crate::decode::digest::{function, function_ends};
use crate::event::smm::{self, Resumed};
use crate::fault::Fault;
use crate::op::Op;
use crate::platform::Hypercall;
use crate::state::{Gpr, Seg};
use crate::vmx::{Exit, MsrAccess, MsrRefusal};

pub(super) const ROWS: &[Row] = &[
    row(M::Hlt, function_ends(hlt)),
    row(M::Cpuid, function_ends(cpuid)),
    row(M::Rdtsc, function(rdtsc)),
    row(M::Rdtscp, function(rdtscp)),
    row(M::Rdpid, function(rdpid)),
    row(M::Rdpmc, function(rdpmc)),
    row(M::Rdmsr, function_ends(rdmsr)),
    row(M::Wrmsr, function_ends(wrmsr)),
    row(M::Monitor, function_ends(monitor)),
    row(M::Mwait, function_ends(monitor)),
    row(M::Serialize, function_ends(serialize)),
    row(M::Vmcall, function_ends(vmcall)),
    row(M::Vmmcall, function_ends(vmmcall)),
    row(M::Rsm, function_ends(rsm)),
    row(M::Pause, |d| calm(d, pause)),
    // Without shadow stacks, MPX and the hints these are the no-ops of 0F 0D, 0F 18 to 0F 1F: no operand is touched.
    row(M::Rdsspd, |d| calm(d, nothing)),
    row(M::Rdsspq, |d| calm(d, nothing)),
    row(M::Bndcl, |d| calm(d, nothing)),
    row(M::Bndcn, |d| calm(d, nothing)),
    row(M::Bndcu, |d| calm(d, nothing)),
    row(M::Bndldx, |d| calm(d, nothing)),
    row(M::Bndmk, |d| calm(d, nothing)),
    row(M::Bndmov, |d| calm(d, nothing)),
    row(M::Bndstx, |d| calm(d, nothing)),
    row(M::Cldemote, |d| calm(d, nothing)),
    row(M::Prefetchwt1, |d| calm(d, nothing)),
    row(M::Prefetchit0, |d| calm(d, nothing)),
    row(M::Prefetchit1, |d| calm(d, nothing)),
    row(M::Ud0, function_ends(undefined)),
    row(M::Ud1, function_ends(undefined)),
    row(M::Ud2, function_ends(undefined)),
];

fn nothing(_: &mut Cpu, _: &Op) -> Done {
    Ok(Then::Next)
}

/// UD0, UD1 and UD2.
fn undefined(cpu: &mut Cpu, _: &Op) -> Done {
    Err(cpu.undefined())
}

/// SDM Vol. 2 "RSM": #UD outside of SMM, whatever CPL is. Where no state-save area is there is nothing to be done, as Linux's
/// emulator finds.
fn rsm(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.is_in_smm() {
        return Err(cpu.undefined());
    }
    match smm::rsm(cpu) {
        Resumed::NoArea => return super::missing(cpu, op),
        Resumed::Guest => {}
        Resumed::Refused => {
            let Stop = cpu.exit(Exit::EntryFailure);
        }
        Resumed::Shutdown => {
            let Stop = cpu.exit(Exit::TripleFault);
        }
    }
    // RF and TF are the interrupted program's.
    cpu.keep_rf = true;
    cpu.suppress_step = true;
    Ok(Then::Jump)
}

/// SDM Vol. 2 "HLT". Under TF the single-step trap ends the halt at once.
fn hlt(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.require_cpl0()?;
    if cpu.rflags & Rflags::TF.bits() == 0 {
        // The exit comes with the instruction complete: RIP is behind it.
        let Stop = cpu.exit(Exit::Hlt);
    }
    Ok(Then::Leave)
}

/// MONITOR and MWAIT: #UD above CPL 0, before any exit (SDM Vol. 3 "Relative Priority of Faults and VM Exits"). Else a no-op
/// that looks at no operand, whatever CPUID says: as KVM's with its quirks on (`kvm_emulate_monitor_mwait`).
fn monitor(cpu: &mut Cpu, _: &Op) -> Done {
    let lacks = !cpu.offers(&cpuid::MONITOR) && cpu.platform.mwait_needs_cpuid();
    if cpu.cpl == 0 && !lacks { Ok(Then::Leave) } else { Err(cpu.undefined()) }
}

/// So many times as long as a processor an interpreter takes for what a guest does between two PAUSEs.
const SLOWER: u64 = if cfg!(debug_assertions) { 128 } else { 8 };
/// A loop of PAUSE is one while less host time passes between two of them: PLE_Gap, which KVM sets to 128 counts of the TSC.
const PLE_GAP: u64 = SLOWER * 128;
/// Host time in a loop of PAUSE until it exits: PLE_Window, 4096 with KVM.
const PLE_WINDOW: u64 = SLOWER * 4096;

/// When PAUSE was executed, by the host's counter.
#[derive(Debug, Default)]
pub(crate) struct PauseLoop {
    first: u64,
    last: u64,
}

impl PauseLoop {
    /// SDM Vol. 3 "Instructions That Cause VM Exits Conditionally", PAUSE with PAUSE-loop exiting: one is executed, and exits. After
    /// an exit the next one begins a loop.
    fn exits(&mut self, now: u64) -> bool {
        if now.wrapping_sub(self.last) > PLE_GAP {
            self.first = now;
        }
        self.last = now;
        now.wrapping_sub(self.first) > PLE_WINDOW
    }
}

/// SDM Vol. 2 "PAUSE". Above CPL 0 no loop of it exits; nor does one that is single-stepped.
fn pause(cpu: &mut Cpu, _: &Op) -> Done {
    if cpu.cpl == 0
        && cpu.rflags & Rflags::TF.bits() == 0
        && let Some(now) = cpu.platform.watches_pauses()
        && cpu.pause_loop.exits(now)
    {
        // As HLT does: RIP is behind it.
        let Stop = cpu.exit(Exit::Pause);
        return Ok(Then::Leave);
    }
    Ok(Then::Next)
}

fn serialize(cpu: &mut Cpu, _: &Op) -> Done {
    if !cpu.offers(&cpuid::SERIALIZE) {
        return Err(cpu.undefined());
    }
    cpu.serialize();
    Ok(Then::Leave)
}

fn vmcall(cpu: &mut Cpu, op: &Op) -> Done {
    hypercall(cpu, op, false)
}

fn vmmcall(cpu: &mut Cpu, op: &Op) -> Done {
    hypercall(cpu, op, true)
}

/// The KVM layer answers; RIP is behind it. The other vendor's instruction becomes the processor's own, if the guest could write
/// there itself (`emulator_fix_hypercall` of Linux's x86.c).
fn hypercall(cpu: &mut Cpu, op: &Op, amd: bool) -> Done {
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
    match cpu.platform.hypercall(amd) {
        Hypercall::Native => {
            let Stop = cpu.exit(Exit::Vmcall);
            Ok(Then::Leave)
        }
        Hypercall::Patched => {
            // Behind prefixes.
            let at = cpu.next_ip(op).wrapping_sub(3);
            let la = cpu.wrap_linear(cpu.seg_base[Seg::Cs as usize].wrapping_add(at));
            cpu.store_bytes(la, if amd { &VMCALL } else { &VMMCALL }, Seg::Cs)?;
            cpu.serialize();
            Ok(Then::Again)
        }
        Hypercall::Undefined => Err(cpu.undefined()),
    }
}

/// SDM Vol. 2 "CPUID". CPUID faulting: Intel, "Intel Virtualization Technology FlexMigration Assist".
fn cpuid(cpu: &mut Cpu, _: &Op) -> Done {
    if cpu.cpl != 0 && cpu.platform.cpuid_faults() {
        return Err(cpu.fault(Fault::gp(0)));
    }
    let (leaf, index) = (cpu.reg(Gpr::Rax) as u32, cpu.reg(Gpr::Rcx) as u32);
    let [eax, ebx, ecx, edx] = cpu.cpuid_answer(leaf, index);
    cpu.put_gpr(Gpr::Rax, eax);
    cpu.put_gpr(Gpr::Rbx, ebx);
    cpu.put_gpr(Gpr::Rcx, ecx);
    cpu.put_gpr(Gpr::Rdx, edx);
    cpu.serialize();
    Ok(Then::Leave)
}

impl Cpu {
    fn cpuid_row(&self, leaf: u32, index: u32) -> Option<[u32; 4]> {
        self.cpuid
            .iter()
            .find(|entry| entry.function == leaf && entry.index.is_none_or(|known| known == index))
            .map(|entry| entry.regs)
    }

    /// The guest's processor is AMD's or Hygon's.
    pub(crate) fn is_amd(&self) -> bool {
        let name = |text: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
            // EBX, EDX, ECX spell the vendor.
            [word(0), word(8), word(4)]
        };
        self.cpuid_row(0, 0).is_some_and(|[_, ebx, ecx, edx]| {
            [ebx, ecx, edx] == name(b"AuthenticAMD") || [ebx, ecx, edx] == name(b"HygonGenuine")
        })
    }

    /// What CPUID answers, the bits that follow other state included. SDM Vol. 2 "CPUID": a leaf above the highest basic one
    /// shows that one; AMD's shows zeros. As KVM's `kvm_cpuid`.
    pub fn cpuid_answer(&mut self, leaf: u32, index: u32) -> [u32; 4] {
        if self.variant.plain_cpuid {
            return self.plain_cpuid(leaf);
        }
        let mut leaf = leaf;
        let mut found = self.cpuid_row(leaf, index);
        if found.is_none()
            && let Some(highest) = self.redirected_leaf(leaf)
        {
            leaf = highest;
            found = self.cpuid_row(leaf, index);
        }
        let Some(mut regs) = found else {
            // Sub-leaves past the end of the topology leaves keep CL and the x2APIC ID.
            if matches!(leaf, 0xb | 0x1f)
                && let Some(first) = self.cpuid_row(leaf, 1)
            {
                return [0, 0, index & 0xff, first[3]];
            }
            return [0; 4];
        };
        let set = |register: &mut u32, bit: u32, on: bool| {
            *register = *register & !(1 << bit) | u32::from(on) << bit;
        };
        match (leaf, index) {
            (1, _) => set(&mut regs[2], cpuid::OSXSAVE.bit, self.cr4.contains(Cr4::OSXSAVE)),
            (7, 0) => set(&mut regs[2], cpuid::OSPKE.bit, self.cr4.contains(Cr4::PKE)),
            (0xd, 0) => regs[1] = self.xsave_bytes(self.fpu.xcr0, false),
            (0xd, 1) if regs[0] & (cpuid::XSAVEC.mask() | cpuid::XSAVES.mask()) != 0 => {
                regs[1] = self.xsave_bytes(self.fpu.xcr0, true);
            }
            _ => {}
        }
        if leaf == 1
            && let Some(base) = self.platform.read_msr(x86_defs::msr::IA32_APIC_BASE)
        {
            set(&mut regs[3], cpuid::APIC.bit, base & x86_defs::msr::apic_base::EN != 0);
        }
        regs
    }

    /// See [`crate::Variant::plain_cpuid`].
    fn plain_cpuid(&self, leaf: u32) -> [u32; 4] {
        let half = self.cpuid.iter().filter(|entry| (entry.function ^ leaf) >> 31 == 0);
        let exact = half.clone().find(|entry| entry.function == leaf);
        exact.or_else(|| half.max_by_key(|entry| entry.function)).map_or([0; 4], |entry| entry.regs)
    }

    /// The highest basic leaf, for a leaf that lies above all of its range.
    fn redirected_leaf(&self, leaf: u32) -> Option<u32> {
        let highest = self.cpuid_row(0, 0)?[0];
        if self.is_amd() {
            return None;
        }
        let range = match leaf {
            0x4000_0000..=0x4fff_ffff => leaf & 0xffff_ff00,
            0x8000_0000.. if leaf < 0xc000_0000 => 0x8000_0000,
            0xc000_0000.. => 0xc000_0000,
            _ => 0,
        };
        let inside = self.cpuid_row(range, 0).is_some_and(|regs| leaf <= regs[0]);
        (!inside).then_some(highest)
    }

    /// Size of an XSAVE area with the components of `features`. SDM Vol. 1 "XSAVE Area".
    fn xsave_bytes(&self, features: u64, compacted: bool) -> u32 {
        let mut bytes = 512 + 64;
        for component in (2..63).filter(|component| features >> component & 1 != 0) {
            let Some([size, offset, flags, _]) = self.cpuid_row(0xd, component) else { continue };
            let at = match (compacted, flags & 2 != 0) {
                (false, _) => offset,
                (true, true) => (bytes + 63) & !63,
                (true, false) => bytes,
            };
            bytes = bytes.max(at.saturating_add(size));
        }
        bytes
    }

    /// #GP(0) where CR4 keeps an instruction from all levels but 0.
    fn check_disabled(&mut self, bit: Cr4, when: bool) -> Result<(), Stop> {
        let denied = self.cr4.contains(bit) == when && self.cr0.contains(Cr0::PE) && self.cpl != 0;
        if denied { Err(self.fault(Fault::gp(0))) } else { Ok(()) }
    }
}

/// SDM Vol. 2 "RDTSC".
fn rdtsc(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.check_disabled(Cr4::TSD, true)?;
    let tsc = cpu.platform.tsc();
    cpu.put_pair(tsc);
    Ok(Then::Next)
}

/// SDM Vol. 2 "RDTSCP".
fn rdtscp(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.offered.rdtscp {
        return Err(cpu.undefined());
    }
    rdtsc(cpu, op)?;
    cpu.put_gpr(Gpr::Rcx, cpu.msrs.tsc_aux as u32);
    Ok(Then::Next)
}

/// SDM Vol. 2 "RDPID".
fn rdpid(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.offered.rdpid {
        return Err(cpu.undefined());
    }
    cpu.put(op.dst, u64::from(cpu.msrs.tsc_aux as u32));
    Ok(Then::Next)
}

/// SDM Vol. 2 "RDPMC". There are no counters: every index is out of range.
fn rdpmc(cpu: &mut Cpu, _: &Op) -> Done {
    cpu.check_disabled(Cr4::PCE, false)?;
    Err(cpu.fault(Fault::gp(0)))
}

/// SDM Vol. 2 "RDMSR".
fn rdmsr(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    let index = cpu.reg(Gpr::Rcx) as u32;
    if !cpu.platform.allows_msr(index, false) {
        return refuse_msr(cpu, op, index, None, MsrRefusal::Filtered);
    }
    match cpu.read_msr(index) {
        Some(value) => cpu.put_pair(value),
        None => {
            let refusal = cpu.msr_refusal(index);
            return refuse_msr(cpu, op, index, None, refusal);
        }
    }
    Ok(Then::Leave)
}

/// #GP(0), or an exit where the platform wants one.
#[cold]
fn refuse_msr(cpu: &mut Cpu, op: &Op, index: u32, write: Option<u64>, refusal: MsrRefusal) -> Done {
    if cpu.platform.wants_msr_exit(index, write.is_some(), refusal) {
        Err(cpu.exit(Exit::Msr(MsrAccess { index, write, refusal, len: op.len })))
    } else {
        Err(cpu.fault(Fault::gp(0)))
    }
}

/// SDM Vol. 2 "WRMSR".
fn wrmsr(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    let index = cpu.reg(Gpr::Rcx) as u32;
    let value = cpu.pair();
    if !cpu.platform.allows_msr(index, true) {
        return refuse_msr(cpu, op, index, Some(value), MsrRefusal::Filtered);
    }
    if cpu.write_msr(index, value).is_none() {
        let refusal = cpu.msr_refusal(index);
        return refuse_msr(cpu, op, index, Some(value), refusal);
    }
    cpu.serialize();
    Ok(Then::Leave)
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::*;
    use crate::platform::Platform;
    use crate::testing::Machine;

    /// SDM Vol. 3 "Instructions That Cause VM Exits Conditionally", PAUSE, its list of two steps.
    #[test]
    fn a_loop_is_pauses_close_together_for_longer_than_the_window() {
        let exits = |times: &[u64]| {
            let mut pauses = PauseLoop::default();
            times.iter().map(|&now| pauses.exits(now)).collect::<Vec<_>>()
        };
        let start = 1 << 40;
        // The first one begins a loop, however long ago the counter was 0.
        assert_eq!(exits(&[start]), [false]);
        let close: Vec<u64> = (0..).map(|i| start + i * PLE_GAP).take_while(|at| at - start <= PLE_WINDOW).collect();
        assert!(close.len() > 2 && exits(&close).iter().all(|exits| !exits));
        let beyond = [&close[..], &[start + PLE_WINDOW + 1]].concat();
        assert_eq!(exits(&beyond).iter().position(|&exits| exits), Some(close.len()));
        // A gap begins another one.
        let broken = [&close[..], &[start + PLE_WINDOW + PLE_GAP + 1, start + PLE_WINDOW + PLE_GAP + 2]].concat();
        assert!(exits(&broken).iter().all(|exits| !exits));
    }

    /// Wants exits on loops of PAUSE. Counts of time from one to the next.
    #[derive(Debug)]
    struct Crowded(u64);

    const STEP: u64 = PLE_GAP / 2;

    impl Platform for Crowded {
        fn tsc(&mut self) -> u64 {
            0
        }

        fn set_tsc(&mut self, _: u64) {}

        fn random(&mut self) -> u64 {
            0
        }

        fn watches_pauses(&mut self) -> Option<u64> {
            self.0 += STEP;
            Some(self.0)
        }
    }

    /// PAUSE as often as ECX says; EBX counts those that the guest has behind it.
    fn spinning(crowded: bool, count: u32) -> Machine {
        let mut machine = Machine::new_64bit(|a| {
            let mut again = a.create_label();
            a.mov(ecx, count).unwrap();
            a.set_label(&mut again).unwrap();
            a.pause().unwrap();
            a.inc(ebx).unwrap();
            a.dec(ecx).unwrap();
            a.jne(again).unwrap();
            a.hlt().unwrap();
        });
        if crowded {
            machine.cpu.platform = Box::new(Crowded(1 << 40));
        }
        machine
    }

    #[test]
    fn a_loop_of_pause_exits_behind_one_and_goes_on() {
        const COUNT: u32 = 20_000;
        let mut machine = spinning(true, COUNT);
        let mut exits = 0u32;
        loop {
            match machine.cpu.run() {
                Exit::Pause => exits += 1,
                exit => break assert_eq!(exit, Exit::Hlt),
            }
            let behind = machine.cpu.rip - crate::testing::CODE;
            assert_eq!(behind, 5 + 2, "behind MOV and PAUSE");
        }
        // The first of a loop, and as many as are in the window; behind an exit another loop begins.
        assert_eq!(u64::from(exits), u64::from(COUNT) / (2 + PLE_WINDOW / STEP));
        assert_eq!(machine.cpu.reg(Gpr::Rbx), u64::from(COUNT));
        assert_eq!(machine.cpu.instructions(), 1 + 4 * u64::from(COUNT) + 1);
    }

    #[test]
    fn no_pause_exits_where_nobody_wants_it_or_above_cpl_0_or_single_stepped() {
        assert_eq!(spinning(false, 200_000).cpu.run(), Exit::Hlt);
        let mut user = spinning(true, 200_000);
        user.cpu.cpl = 3;
        user.cpu.derive();
        user.cpu.set_exception_bitmap(!0);
        // HLT is the kernel's.
        assert!(matches!(user.cpu.run(), Exit::Exception { vector: 13, .. } | Exit::TripleFault));
        assert_eq!(user.cpu.reg(Gpr::Rbx), 200_000);
        let mut stepped = spinning(true, u32::MAX);
        stepped.cpu.rflags |= Rflags::TF.bits();
        stepped.cpu.set_exception_bitmap(!0);
        for _ in 0..4000 {
            let exit = stepped.cpu.run();
            assert!(matches!(exit, Exit::Exception { vector: 1, .. }), "{exit:?}");
        }
    }
}
