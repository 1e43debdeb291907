//! Guests that are noise: random bytes everywhere, in every mode, under random control registers. Whatever happens, the CPU
//! comes back when it is called, nothing panics, and no byte outside of the VM's slot changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cpu_core::{Cpu, DescriptorTable, HostPlatform, Regs, Segment, Sregs};
use mmu::{Backing, Mapping, Memory, SlotFlags, SlotSpec};
use x86_defs::{Cr0, Cr4, Efer, GuestPhysAddr};

/// Bytes of RAM, and of what must stay as it is on both sides of it.
const RAM: u64 = 1 << 18;
const CANARY: u64 = 1 << 16;
/// RFLAGS bits that a guest may start with: all but RF, VM, VIF and VIP.
const RFLAGS: u64 = 0x24_7fd5;
/// Where the tables of most guests lie.
const GDT: u64 = 0xf000;
const IDT: u64 = 0xe000;
const TSS: u64 = 0xd000;
/// How long a CPU may take to come back once it has been kicked; far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// SplitMix64, from a seed that a failure can be repeated with.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Openings of instructions that plain noise rarely hits: 0F, VEX and FPU maps, strings, segment loads, far transfers.
const OPENINGS: &[&[u8]] = &[
    &[0x0f],
    &[0x0f, 0x38],
    &[0x0f, 0x3a],
    &[0x66, 0x0f],
    &[0xf3, 0x0f],
    &[0xf2, 0x0f],
    &[0x48, 0x0f],
    &[0xc4, 0xe2],
    &[0xc5],
    &[0xd9],
    &[0xdb],
    &[0xdd],
    &[0xf3, 0xa4],
    &[0xf3, 0x48, 0xab],
    &[0x8e],
    &[0xff],
    &[0x9a],
    &[0xcf],
    &[0xcd],
    &[0xf0],
    &[0x0f, 0x01],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x67],
];

fn memory_of(noise: &mut Noise) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(RAM as usize);
    while bytes.len() < RAM as usize {
        match noise.below(8) {
            0..=3 => bytes.extend_from_slice(OPENINGS[noise.below(OPENINGS.len() as u64) as usize]),
            4 => bytes.push(noise.next() as u8),
            // Entries of tables that are present and lead into RAM.
            5 => {
                bytes.extend_from_slice(&(noise.next() & (RAM - 0x1000) & !0xfff | noise.below(256) | 1).to_le_bytes())
            }
            // Descriptors of code and data.
            6 => bytes.extend_from_slice(
                &(0x00cf_9a00_0000_ffffu64 ^ noise.below(32) << 41 ^ noise.below(4) << 53).to_le_bytes(),
            ),
            _ => bytes.extend_from_slice(&noise.next().to_le_bytes()[..1 + noise.below(8) as usize]),
        }
    }
    bytes.truncate(RAM as usize);
    bytes
}

/// A mode that real guests are in, and now and then anything at all.
fn sregs_of(noise: &mut Noise, reset: Sregs) -> Sregs {
    let mut sregs = reset;
    let (mut cr0, mut cr4, mut efer) = (Cr0::ET | Cr0::NE, Cr4::empty(), Efer::empty());
    let mode = noise.below(5);
    if mode >= 1 {
        cr0 |= Cr0::PE;
    }
    if mode >= 2 {
        cr0 |= Cr0::PG;
        cr4 |= Cr4::PSE;
    }
    if mode >= 3 {
        cr4 |= Cr4::PAE;
    }
    if mode == 4 {
        efer |= Efer::LME | Efer::LMA | Efer::SCE;
    }
    if noise.one_in(2) {
        // Not those that VM entry refuses.
        let absent = Cr4::SMXE | Cr4::KL | Cr4::CET | Cr4::PKS | Cr4::UINTR | Cr4::LASS | Cr4::LAM_SUP;
        cr4 |= Cr4::from_bits_truncate(noise.next()) & !(absent | Cr4::VMXE | Cr4::PAE | Cr4::PCIDE);
    }
    cr4 |= Cr4::OSFXSR;
    if !noise.one_in(4) {
        // All pages are the user's.
        cr4 &= !(Cr4::SMEP | Cr4::SMAP);
    }
    if noise.one_in(4) {
        efer |= Efer::NXE;
    }
    let (wide, long) = (noise.one_in(2), mode == 4 && !noise.one_in(4));
    let cpl = if mode == 0 { 0 } else { [0, 0, 3][noise.below(3) as usize] };
    for (i, segment) in sregs.segments.iter_mut().enumerate() {
        let code = i == 1;
        *segment = Segment {
            selector: (noise.below(64) << 3) as u16 | u16::from(cpl),
            base: if mode == 0 || noise.one_in(12) { noise.below(RAM) & !0xf } else { 0 },
            limit: if mode == 0 { 0xffff } else { 0xffff_ffff },
            type_: if code { 0xb } else { 3 },
            s: true,
            dpl: cpl,
            present: true,
            l: code && long,
            db: wide && !(code && long) && mode != 0,
            g: mode != 0,
            ..*segment
        };
        if mode == 0 {
            segment.selector = (segment.base >> 4) as u16;
        }
    }
    sregs.gdt = DescriptorTable { base: noise.below(RAM), limit: 0xffff };
    sregs.idt = DescriptorTable { base: noise.below(RAM), limit: if noise.one_in(4) { 0 } else { 0xffff } };
    sregs.cr0 = cr0;
    sregs.cr3 = noise.below(RAM) & !0xfff;
    sregs.cr4 = cr4;
    sregs.efer = efer;
    sregs
}

/// Identity-mapping tables at the root that CR3 names, so that most guests get to run at all.
fn map(noise: &mut Noise, bytes: &mut [u8], sregs: &mut Sregs) {
    if !sregs.cr0.contains(Cr0::PG) || noise.one_in(5) {
        return;
    }
    let mut put = |at: u64, value: u64| bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    sregs.cr3 = 0x8000;
    let long = sregs.efer.contains(Efer::LMA);
    if !sregs.cr4.contains(Cr4::PAE) {
        return put(0x8000, 0x87);
    }
    if long {
        for (i, table) in
            [0x8000u64, 0x9000, 0xa000].into_iter().take(2 + usize::from(sregs.cr4.contains(Cr4::LA57))).enumerate()
        {
            put(table, 0x9007 + 0x1000 * i as u64);
        }
        put(0x9000 + 0x1000 * u64::from(sregs.cr4.contains(Cr4::LA57)), 0xb007);
    } else {
        put(0x8000, 0xb001);
    }
    put(0xb000, 0x87);
}

/// A GDT of flat segments, and an IDT whose gates lead anywhere in RAM, so that most faults have handlers: more noise.
fn tables(noise: &mut Noise, bytes: &mut [u8], sregs: &mut Sregs) {
    if noise.one_in(5) {
        return;
    }
    let long = sregs.efer.contains(Efer::LMA);
    let mut put = |at: u64, value: u64| bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    for i in 1..32u64 {
        let rights = if i % 2 == 1 { 0x9b } else { 0x93 } | noise.below(2) * 0x60;
        let flags = if long && i % 2 == 1 { 0xa } else { 0xc };
        put(GDT + 8 * i, 0x000f_0000_0000_ffff | rights << 40 | flags << 52);
    }
    let step = if long { 16 } else { 8 };
    for vector in 0..64 {
        let offset = noise.below(RAM);
        put(IDT + step * vector, offset & 0xffff | 8 << 16 | (0xee | vector & 1) << 40 | (offset & 0xffff_0000) << 32);
        if long {
            put(IDT + step * vector + 8, 0);
        }
    }
    if sregs.cr0.contains(Cr0::PE) {
        sregs.gdt = DescriptorTable { base: GDT, limit: 0xff };
        sregs.idt = DescriptorTable { base: IDT, limit: 0x3ff };
        sregs.tr.base = TSS;
        // Stacks for level 0; of a 32-bit TSS, SS0 as well.
        let stack = RAM - 0x1000;
        put(TSS + 4, if long { stack } else { stack | 0x10 << 32 });
    } else {
        sregs.idt = DescriptorTable { base: 0, limit: 0x3ff };
    }
}

/// One guest: made from `seed`, run for some of its exits. How many instructions that were.
fn run(seed: u64) -> u64 {
    let mut noise = Noise(seed);
    let mapping = Mapping::create("noise", RAM + 2 * CANARY).expect("a memfd");
    let canary = vec![0xa5; CANARY as usize];
    mapping.write(0, &canary).expect("inside");
    mapping.write(CANARY + RAM, &canary).expect("inside");
    let mut bytes = memory_of(&mut noise);
    let memory = Arc::new(Memory::new());
    let mut cpu = Cpu::new(memory.clone(), Box::new(HostPlatform::default()), 40);
    let mut sregs = sregs_of(&mut noise, cpu.sregs());
    map(&mut noise, &mut bytes, &mut sregs);
    tables(&mut noise, &mut bytes, &mut sregs);
    mapping.write(CANARY, &bytes).expect("inside");
    let backing = Backing::new(mapping.clone(), CANARY);
    let spec =
        SlotSpec { id: 0, gpa: GuestPhysAddr(0), len: RAM, flags: SlotFlags::default(), userspace_addr: 0, backing };
    memory.set_slot(spec).expect("an empty VM takes a slot");
    cpu.set_sregs(&sregs);
    let gpr = std::array::from_fn(|i| if i == 4 || noise.one_in(2) { noise.below(RAM) } else { noise.next() });
    let window = if sregs.cr0.contains(Cr0::PE) { RAM } else { 0x1_0000 };
    cpu.set_regs(&Regs { gpr, rip: noise.below(window), rflags: noise.next() & RFLAGS | 2 });

    let kick = cpu.kicker();
    let back = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            while !back.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_micros(500));
                kick.kick();
                if start.elapsed() > PATIENCE {
                    // The thread that hangs cannot be made to unwind.
                    eprintln!("SOFTKVM_FUZZ_SEED={seed:#x}: the CPU does not come back");
                    std::process::exit(101);
                }
            }
        });
        let start = Instant::now();
        for _ in 0..200 {
            let exit = cpu.run();
            use cpu_core::Exit;
            match exit {
                Exit::Io(io) if io.input => {
                    let data: Vec<u8> = (0..io.count * u32::from(io.size)).map(|_| noise.next() as u8).collect();
                    cpu.complete_io_in(&data);
                }
                Exit::Io(_) => cpu.complete_io_out(),
                Exit::Mmio(mmio) if mmio.write.is_none() => cpu.complete_mmio_read(noise.next()),
                Exit::Hlt | Exit::Vmcall | Exit::ExternalInterrupt | Exit::Mmio(_) => {}
                Exit::Unimplemented { len, .. } => {
                    let mut regs = cpu.regs();
                    regs.rip = regs.rip.wrapping_add(u64::from(len.max(1)));
                    cpu.set_regs(&regs);
                }
                _ => break,
            }
            if start.elapsed() > Duration::from_millis(20) {
                break;
            }
        }
        back.store(true, Ordering::Release);
    });
    let mut side = vec![0; CANARY as usize];
    for at in [0, CANARY + RAM] {
        mapping.read(at, &mut side).expect("inside");
        assert!(side == canary, "seed {seed:#x}: a byte outside of the slot has changed");
    }
    cpu.instructions()
}

/// `SOFTKVM_TEST_LONG`: minutes instead of seconds. `SOFTKVM_FUZZ_SEED`: one guest only.
#[test]
fn noise_comes_back_and_stays_inside() {
    if let Ok(seed) = std::env::var("SOFTKVM_FUZZ_SEED") {
        run(u64::from_str_radix(seed.trim_start_matches("0x"), 16).expect("a hexadecimal seed"));
        return;
    }
    let long = std::env::var_os("SOFTKVM_TEST_LONG").is_some();
    let until = Instant::now() + Duration::from_secs(if long { 600 } else { 10 });
    let mut seed = if long { u64::from(std::process::id()) << 32 } else { 0 };
    let (mut guests, mut live) = (0u64, 0u64);
    while Instant::now() < until && (long || seed < 2000) {
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(instructions) => (guests, live) = (guests + 1, live + u64::from(instructions >= 3)),
            Err(_) => panic!("SOFTKVM_FUZZ_SEED={seed:#x}"),
        }
        seed += 1;
    }
    assert!(live * 4 >= guests, "{live} of {guests} guests got to run");
}
