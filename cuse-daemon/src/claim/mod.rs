//! Programs that ask the CPU for VMX or SVM before they ever open /dev/kvm: kvmtool refuses to go on without. For them the
//! instruction CPUID is made to say that it is there.
//!
//! Where and when: in the program that `softkvm run` starts and in nothing else, between exec and its first instruction.
//! Each CPUID instruction of the program file itself (not of its libraries, which the dynamic loader brings later) becomes
//! a jump to a page of ours in the program, where the same instruction runs and one bit is added to its answer. So
//! the program goes on without anybody who traces it, and whoever wants to may: the daemon, a debugger.
//!
//! CPUID faulting (`ARCH_SET_CPUID`) would do it without changing code, but not on every CPU, and only with a tracer, which
//! keeps the daemon from tracing the same threads.

mod patch;

use std::arch::x86_64::__cpuid;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::client::maps::{self, Area};
use crate::client::memory;

/// For which commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Claim {
    /// For programs that are known to refuse otherwise: lkvm, lkvm-static, kvmtool
    #[default]
    Auto,
    /// For the command, whatever it is
    Always,
    /// For none
    Never,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Claim::Auto => "auto",
            Claim::Always => "always",
            Claim::Never => "never",
        })
    }
}

/// File names of programs that look for themselves. kvmtool, x86/kvm.c `kvm__arch_cpu_supports_vm`.
const KNOWN: &[&str] = &["lkvm", "lkvm-static", "kvmtool"];

/// A bit of CPUID's answer in ECX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bit {
    name: &'static str,
    leaf: u32,
    ecx: u32,
}

/// SDM Vol. 2 "CPUID", leaf 1.
const VMX: Bit = Bit { name: "VMX", leaf: 1, ecx: 1 << 5 };
/// APM Vol. 3, "CPUID Fn8000_0001_ECX".
const SVM: Bit = Bit { name: "SVM", leaf: 0x8000_0001, ecx: 1 << 2 };

impl Bit {
    /// What programs look for on this CPU; `None`: they find it.
    fn missing() -> Option<Self> {
        let bit = if __cpuid(0).ecx == u32::from_le_bytes(*b"ntel") { VMX } else { SVM };
        (__cpuid(bit.leaf).ecx & bit.ecx == 0).then_some(bit)
    }
}

impl Claim {
    /// Does `program` need it, and lack it?
    pub fn applies_to(self, program: &OsStr) -> bool {
        let known = || Path::new(program).file_name().is_some_and(|name| KNOWN.iter().any(|known| name == *known));
        let wanted = match self {
            Claim::Auto => known(),
            Claim::Always => true,
            Claim::Never => false,
        };
        wanted && Bit::missing().is_some()
    }
}

/// Changes the program that `child` is about to begin, and lets it begin. The child asked to be traced by this thread, and is
/// in exec. A program that cannot be changed begins as it is.
pub fn make(child: Pid) -> Result<()> {
    match waitpid(child, None).context("cannot wait for the command")? {
        WaitStatus::Stopped(..) => {}
        // Whoever waits for it next learns of it.
        status => bail!("the command has ended already: {status:?}"),
    }
    let made = change(child);
    ptrace::detach(child, None).context("cannot let the command begin")?;
    let (bit, places) = made.context("the command's CPUID cannot be changed; it goes on without")?;
    match places {
        0 => tracing::warn!(%child, "the command itself has no CPUID instruction; nothing is changed"),
        _ => tracing::warn!(
            %child,
            places,
            "the command's CPUID says that the CPU has {}, which it has not: /dev/kvm is softkvm's", bit.name
        ),
    }
    Ok(())
}

/// A program at its first instruction.
struct Stopped {
    pid: Pid,
    memory: File,
}

impl Stopped {
    fn read(&self, range: &Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.memory.read_exact_at(&mut bytes, range.start).context("cannot read the program")?;
        Ok(bytes)
    }

    /// Also where the program itself may not write: it gets a page of its own then.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.memory.write_all_at(bytes, at).context("cannot write to the program")
    }

    /// Runs one system call, at the instruction that is next.
    fn syscall(&self, number: i64, arguments: [u64; 6]) -> Result<i64> {
        const SYSCALL: [u8; 2] = [0x0f, 0x05];
        let registers = ptrace::getregs(self.pid)?;
        let code = self.read(&(registers.rip..registers.rip + 2))?;
        self.write(registers.rip, &SYSCALL)?;
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        // orig_rax −1: in no system call, so the kernel has nothing to restart.
        let rax = number.cast_unsigned();
        ptrace::setregs(self.pid, user_regs_struct { rax, rdi, rsi, rdx, r10, r8, r9, orig_rax: !0, ..registers })?;
        ptrace::step(self.pid, None)?;
        let status = waitpid(self.pid, None)?;
        if !matches!(status, WaitStatus::Stopped(..)) {
            bail!("the command is gone: {status:?}");
        }
        let result = ptrace::getregs(self.pid)?.rax.cast_signed();
        self.write(registers.rip, &code)?;
        ptrace::setregs(self.pid, user_regs_struct { orig_rax: !0, ..registers })?;
        Ok(result)
    }

    /// Code of the program file.
    fn code(&self) -> Result<Vec<Area>> {
        let file = File::open(format!("/proc/{}/exe", self.pid)).context("cannot open the program file")?;
        let id = memory::file_id(&file)?;
        let all = maps::areas(self.pid, &(0..u64::MAX))?;
        let is_code = |area: &Area| (area.device, area.inode) == id && area.prot & libc::PROT_EXEC != 0;
        Ok(all.into_iter().filter(is_code).collect())
    }

    /// A page for code, near enough below `address` for a jump.
    fn page(&self, address: u64, len: u64) -> Result<u64> {
        const STEP: u64 = 1 << 20;
        const TRIES: u64 = 512;
        let prot = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let len = len.next_multiple_of(4096);
        for at in (1..TRIES).map_while(|step| (address & !(STEP - 1)).checked_sub(step * STEP)) {
            let got = self.syscall(libc::SYS_mmap, [at, len, prot, flags, !0, 0])?;
            if got == at.cast_signed() {
                return Ok(at);
            }
            if got >= 0 {
                // A kernel that takes the address as a hint.
                self.syscall(libc::SYS_munmap, [got.cast_unsigned(), len, 0, 0, 0, 0])?;
            }
        }
        bail!("there is no room for code within reach of {address:#x}")
    }
}

/// Which bit was added, and in how many places.
fn change(pid: Pid) -> Result<(Bit, usize)> {
    let bit = Bit::missing().context("the CPU has it")?;
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
    let program = Stopped { pid, memory: memory.context("cannot open the program's memory")? };
    let mut places = 0;
    for area in program.code()? {
        let code = program.read(&area.range)?;
        let found = patch::windows(&code, area.range.start);
        if found.skipped > 0 {
            tracing::warn!(places = found.skipped, "CPUID instructions in the midst of jumps stay as they are");
        }
        if found.windows.is_empty() {
            continue;
        }
        let stubs = |at| patch::stubs(&found.windows, at, bit.leaf, bit.ecx).context("cannot make code");
        let size: usize = stubs(area.range.start)?.iter().map(|stub| stub.code.len()).sum();
        let page = program.page(area.range.start, size as u64 + patch::SLACK)?;
        for stub in stubs(page)? {
            program.write(stub.at, &stub.code)?;
            program.write(stub.window.start, &stub.jump)?;
            places += 1;
        }
    }
    Ok((bit, places))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_name() {
        let known = |name: &str| Claim::Auto.applies_to(OsStr::new(name)) || Bit::missing().is_none();
        assert!(known("lkvm") && known("/usr/bin/lkvm-static") && known("./kvmtool"));
        for other in ["lkvm.sh", "qemu-system-x86_64", "/lkvm/sh", "/"] {
            assert!(!Claim::Auto.applies_to(OsStr::new(other)), "{other}");
        }
        assert!(!Claim::Never.applies_to(OsStr::new("lkvm")));
    }
}
