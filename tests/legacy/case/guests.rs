//! kvmctl's test guests and what kvmctl printed for them; where Linux 2.6.22 had a bug, what a correct CPU does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{same, smp};
use crate::guest::{self, Image, pte};
use crate::kvmctl::{HOLE, Machine};
use crate::vmm::Kvm;

/// What kvmctl prints on `image`, with one CPU.
fn lines(image: &Image) -> Result<Vec<String>> {
    Machine::new(&Kvm::open()?, image)?.run(1, || Ok(()))
}

pub(crate) fn all(time: Duration) -> Result<()> {
    let guests: [(&str, &dyn Fn() -> Result<()>); 8] = [
        ("smp", &|| smp::once(1)),
        ("vmexit", &vmexit),
        ("sieve", &|| sieve(time)),
        ("access", &access),
        ("stringio", &stringio),
        ("irq", &irq),
        ("simple", &simple),
        ("memtest1", &memtest1),
    ];
    guests.into_iter().try_for_each(|(name, guest)| {
        println!("guest {name}");
        guest().with_context(|| format!("guest {name}"))
    })
}

fn vmexit() -> Result<()> {
    let found = lines(&guest::vmexit())?;
    let latency = found.first().and_then(|line| line.strip_prefix("GUEST: vmexit latency: "));
    let latency: u64 = latency.with_context(|| format!("{found:?}"))?.parse()?;
    ensure!(latency > 0, "{} CPUIDs take no time", guest::VMEXITS);
    println!("CPUID takes {latency} ticks of the guest's counter");
    same!(found[1..], ["GUEST: cpuid: 0".to_owned()], "nobody called KVM_SET_CPUID");
    Ok(())
}

/// Prime counts are mathematics.
fn sieve(time: Duration) -> Result<()> {
    let (numbers, primes) = guest::LAST_SIEVE[usize::from(time >= Duration::from_secs(60))];
    let found = lines(&guest::sieve(numbers))?;
    let few = guest::SIEVE.1;
    let expected = [
        "starting sieve".to_owned(),
        format!("static: {few}"),
        "paging enabled".to_owned(),
        format!("mapped: {few}"),
        format!("mapped: {few}"),
        format!("virtual: {primes}"),
    ];
    same!(found, expected.map(|line| format!("GUEST: {line}")), "lines");
    Ok(())
}

/// SDM Vol. 3 "Access Rights" and "Page-Fault Exceptions": the error code of a data access, if it faults.
fn page_fault(access: u64) -> Option<u64> {
    let bit = |n: u64| access >> n & 1 != 0;
    let (present, writable, user_page, write, user, wp) = (bit(0), bit(1), bit(2), bit(5), bit(6), bit(7));
    let refused = user && !user_page || write && !writable && (user || wp);
    (!present || refused).then_some(u64::from(present) | u64::from(write) << 1 | u64::from(user) << 2)
}

fn access() -> Result<()> {
    let machine = Machine::new(&Kvm::open()?, &guest::access())?;
    let found = machine.run(1, || Ok(()))?;
    same!(found, ["starting test", "", "run"].map(|line| format!("GUEST: {line}")), "lines");
    let word = |gpa| u64::from_le_bytes(machine.ram.read(gpa));
    for access in 0..guest::ACCESSES {
        let at = guest::ACCESS_RESULTS + 32 * access;
        let fault = page_fault(access);
        same!(word(at), fault.unwrap_or(u64::MAX), "error code of access {access:#04x}");
        if fault.is_some() {
            same!(word(at + 8), guest::MAPPED, "CR2 of access {access:#04x}");
        }
        // Of a page that is not to be used A and D stay as they were; D follows a write alone.
        let before = guest::ACCESS_FRAME | access & 7 | (access & 0x18) << 2;
        let set = if fault.is_some() { 0 } else { pte::A | if access & 1 << 5 != 0 { pte::D } else { 0 } };
        // What becomes of A when an access is refused the SDM leaves open.
        let open = if fault.is_some() && access & 1 != 0 { pte::A } else { 0 };
        same!(word(at + 16) & !open, (before | set) & !open, "page entry after access {access:#04x}");
    }
    Ok(())
}

fn stringio() -> Result<()> {
    let line = |port: u16| move |byte: u8| format!("outb {byte:#x}, {port:#x}");
    // Linux 2.6.22 had #GP for DF=1.
    let expected: Vec<_> =
        b"forward".iter().copied().map(line(1)).chain(b"drawkcab".iter().copied().map(line(2))).collect();
    same!(lines(&guest::stringio())?, expected, "lines");
    Ok(())
}

fn irq() -> Result<()> {
    let expected = [
        "GUEST: irq test",
        "GUEST: software interrupt",
        "injecting interrupt 0x22",
        "GUEST: interrupt with IF set",
        "injecting interrupt 0x22",
        "GUEST: interrupt behind the instruction that follows STI",
    ];
    same!(lines(&guest::irq())?, expected.map(str::to_owned), "lines");
    Ok(())
}

fn simple() -> Result<()> {
    let expected: Vec<_> = (0..guest::SIMPLE).map(|n| format!("outb {:#x}, 0x80", 0xff - n)).collect();
    same!(lines(&guest::simple())?, expected, "lines");
    Ok(())
}

fn memtest1() -> Result<()> {
    // Pages 4, 8, … 0x9c.
    let mut expected = vec!["outb 0x0, 0x80".to_owned(); (HOLE.start >> 14) as usize - 1];
    expected.push(format!("Mmio {{ gpa: {:x}, data: 12345678, len: 4, write: true }}", HOLE.start));
    let mut found = lines(&guest::memtest1())?;
    // A write has 4 bytes of data; what is behind them nobody says.
    if let Some((head, tail)) = found.last().and_then(|line| line.split_once(", len")) {
        let (head, data) = head.split_once("data: ").context("an MMIO exit")?;
        let data = u64::from_str_radix(data, 16)? & 0xffff_ffff;
        let last = format!("{head}data: {data:x}, len{tail}");
        found.pop();
        found.push(last);
    }
    same!(found, expected, "lines");
    Ok(())
}
