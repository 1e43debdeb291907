//! Puts a kernel into guest RAM, and a vCPU at its entry.

use std::fs::{self, File};

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use crate::style::{Entry, Style, Transport};
use crate::{Files, acpi, ram};

type Memory = GuestMemoryMmap<()>;

// Where things lie in the first MiB. Firecracker's and Cloud Hypervisor's places.
const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
const LOW_END: u64 = 0x9_fc00;
const HIGH: u64 = 0x10_0000;

/// kvmtool's places for the real-mode part of a bzImage: setup at 0x1000:0, so its code at 0x1020:0.
const SETUP: u64 = 0x1_0000;
const SETUP_STACK: u64 = 0x8000;
/// Interrupt handlers of our own.
const BIOS: u64 = 0xf_0000;

/// Where the first vCPU begins.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    /// In 64-bit mode, RSI → zero page.
    Long(u64),
    /// In protected mode, EBX → start info.
    Protected(u64),
    /// In real mode, all segments at the setup.
    Real,
}

/// Fills RAM.
pub fn load(style: &Style, files: &Files, memory: &Memory) -> Result<Start> {
    let initrd = fs::read(&files.initrd).with_context(|| format!("cannot read {}", files.initrd.display()))?;
    let initrd_at = (ram::SIZE as u64 - initrd.len() as u64) & !0xfff;
    memory.write_slice(&initrd, GuestAddress(initrd_at)).context("the initramfs")?;
    let initrd = (initrd_at, initrd.len() as u64);
    let mut line = command_line(style).into_bytes();
    line.push(0);
    memory.write_slice(&line, GuestAddress(COMMAND_LINE)).context("the command line")?;
    if style.entry == Entry::RealMode {
        return real_mode(files, memory, initrd);
    }
    let rsdp = acpi::write(style, memory)?;
    // Where the kernel is in place already, the same is written over it.
    let mut kernel = File::open(&files.vmlinux).with_context(|| format!("cannot read {}", files.vmlinux.display()))?;
    let loaded = Elf::load(memory, None, &mut kernel, Some(GuestAddress(HIGH))).context("the ELF file")?;
    match style.entry {
        Entry::Linux64 => {
            zero_page(memory, initrd, rsdp)?;
            Ok(Start::Long(loaded.kernel_load.0))
        }
        _ => {
            let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else { bail!("no PVH entry") };
            start_info(memory, initrd, rsdp)?;
            Ok(Start::Protected(entry.0))
        }
    }
}

fn command_line(style: &Style) -> String {
    let common = "console=ttyS0 reboot=k panic=-1 quiet";
    match (style.entry, style.transport) {
        // As kvmtool adds it.
        (Entry::RealMode, _) => format!("{common} noapic noacpi pci=conf1 i8042.noaux"),
        (_, Transport::Mmio) => format!("{common} pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"),
        (_, Transport::Pci) => format!("{common} i8042.noaux"),
    }
}

/// Usable memory: start and length.
fn usable() -> [(u64, u64); 2] {
    [(0, LOW_END), (HIGH, ram::SIZE as u64 - HIGH)]
}

fn zero_page(memory: &Memory, (initrd, initrd_len): (u64, u64), rsdp: u64) -> Result<()> {
    let mut params = boot_params::default();
    // boot.rst "The Real-Mode Kernel Header": what a loader without the setup's code fills in.
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = 2048;
    params.hdr.kernel_alignment = 0x0100_0000;
    params.hdr.ramdisk_image = initrd as u32;
    params.hdr.ramdisk_size = initrd_len as u32;
    params.acpi_rsdp_addr = rsdp;
    for (at, (addr, size)) in usable().into_iter().enumerate() {
        params.e820_table[at] = boot_e820_entry { addr, size, r#type: 1 };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE)).context("the zero page")
}

fn start_info(memory: &Memory, (paddr, size): (u64, u64), rsdp: u64) -> Result<()> {
    let map: Vec<_> =
        usable().map(|(addr, size)| hvm_memmap_table_entry { addr, size, type_: 1, reserved: 0 }).to_vec();
    let info = hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        flags: 0,
        nr_modules: 1,
        modlist_paddr: MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    put(memory, START_INFO, &[info.magic, info.version, info.flags, info.nr_modules])?;
    put(memory, START_INFO + 16, &[info.modlist_paddr, info.cmdline_paddr, info.rsdp_paddr, info.memmap_paddr])?;
    put(memory, START_INFO + 48, &[info.memmap_entries, info.reserved])?;
    let module = hvm_modlist_entry { paddr, size, ..Default::default() };
    put(memory, MODULES, &[module.paddr, module.size, module.cmdline_paddr, module.reserved])?;
    for (at, entry) in (MEMORY_MAP..).step_by(24).zip(&map) {
        put(memory, at, &[entry.addr, entry.size])?;
        put(memory, at + 16, &[entry.type_, entry.reserved])?;
    }
    Ok(())
}

fn put<T: ByteValued>(memory: &Memory, at: u64, values: &[T]) -> Result<()> {
    for (index, value) in values.iter().enumerate() {
        memory.write_obj(*value, GuestAddress(at + (index * size_of::<T>()) as u64)).context("the start info")?;
    }
    Ok(())
}

/// Loads a bzImage as a boot loader of the first days does, behind which there is a BIOS.
fn real_mode(files: &Files, memory: &Memory, (initrd, initrd_len): (u64, u64)) -> Result<Start> {
    let image = fs::read(&files.bzimage).with_context(|| format!("cannot read {}", files.bzimage.display()))?;
    // boot.rst "Details of Header Fields".
    const SETUP_SECTS: usize = 0x1f1;
    let setup_len = (usize::from(image[SETUP_SECTS].max(4)) + 1) * 512;
    let (setup, kernel) = image.split_at(setup_len);
    let mut setup = setup.to_vec();
    let mut set = |at: usize, bytes: &[u8]| setup[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x210, &[0xff]);
    // CAN_USE_HEAP besides what is there.
    set(0x211, &[image[0x211] | 0x80]);
    set(0x218, &(initrd as u32).to_le_bytes());
    set(0x21c, &(initrd_len as u32).to_le_bytes());
    set(0x224, &0xfe00_u16.to_le_bytes());
    set(0x228, &(COMMAND_LINE as u32).to_le_bytes());
    memory.write_slice(&setup, GuestAddress(SETUP)).context("the setup")?;
    memory.write_slice(kernel, GuestAddress(HIGH)).context("the kernel")?;
    bios(memory)?;
    Ok(Start::Real)
}

/// The least of a BIOS: every interrupt returns with CF set, INT 15h, AX = E820h tells of RAM.
fn bios(memory: &Memory) -> Result<()> {
    const NOTHING: u16 = 0;
    const INT15: u16 = 0x10;
    const MAP: u16 = 0x80;
    #[rustfmt::skip]
    let nothing: &[u8] = &[
        0x55,                   // push bp
        0x89, 0xe5,             // mov bp, sp
        0x83, 0x4e, 0x06, 0x01, // or word [bp+6], 1    CF of the FLAGS that IRET takes back
        0x5d,                   // pop bp
        0xcf,                   // iret
    ];
    #[rustfmt::skip]
    let int15: &[u8] = &[
        0x3d, 0x20, 0xe8,                   // cmp ax, 0xe820
        0x75, 0xeb,                         // jne NOTHING
        0x55,                               // push bp
        0x89, 0xe5,                         // mov bp, sp
        0x83, 0x66, 0x06, 0xfe,             // and word [bp+6], ~1
        0x5d,                               // pop bp
        0x1e, 0x56, 0x57,                   // push ds; push si; push di
        0x0e, 0x1f,                         // push cs; pop ds
        0x66, 0x69, 0xf3, 20, 0, 0, 0,      // imul esi, ebx, 20
        0x81, 0xc6, MAP as u8, 0,           // add si, MAP
        0xb9, 10, 0,                        // mov cx, 10
        0xfc,                               // cld
        0xf3, 0xa5,                         // rep movsw
        0x5f, 0x5e, 0x1f,                   // pop di; pop si; pop ds
        0x66, 0x43,                         // inc ebx
        0x66, 0x83, 0xfb, 2,                // cmp ebx, 2
        0x72, 3,                            // jb +3
        0x66, 0x31, 0xdb,                   // xor ebx, ebx
        0x66, 0xb8, 0x50, 0x41, 0x4d, 0x53, // mov eax, 'SMAP'
        0x66, 0xb9, 20, 0, 0, 0,            // mov ecx, 20
        0xcf,                               // iret
    ];
    assert!(usize::from(INT15) + int15.len() <= usize::from(MAP), "the code ends before the map");
    let segment = (BIOS >> 4) as u16;
    for vector in 0..256_u64 {
        let offset = if vector == 0x15 { INT15 } else { NOTHING };
        put(memory, vector * 4, &[offset, segment])?;
    }
    memory.write_slice(nothing, GuestAddress(BIOS + u64::from(NOTHING))).context("the BIOS")?;
    memory.write_slice(int15, GuestAddress(BIOS + u64::from(INT15))).context("the BIOS")?;
    for (at, (addr, size)) in (BIOS + u64::from(MAP)..).step_by(20).zip(usable()) {
        put(memory, at, &[addr, size])?;
        put(memory, at + 16, &[1_u32])?;
    }
    Ok(())
}

impl Start {
    /// `KVM_SET_REGS`.
    pub fn regs(self) -> kvm_regs {
        // RFLAGS bit 1 is always set.
        let regs = kvm_regs { rflags: 2, ..Default::default() };
        match self {
            Start::Long(rip) => kvm_regs { rip, rsp: STACK, rbp: STACK, rsi: ZERO_PAGE, ..regs },
            Start::Protected(rip) => kvm_regs { rip, rbx: START_INFO, ..regs },
            Start::Real => kvm_regs { rip: 0x200, rsp: SETUP_STACK, rbp: SETUP_STACK, ..regs },
        }
    }

    /// `KVM_SET_SREGS`, from what `KVM_GET_SREGS` gave; and what the registers point to.
    pub fn sregs(self, memory: &Memory, mut sregs: kvm_sregs) -> Result<kvm_sregs> {
        if let Start::Real = self {
            let selector = (SETUP >> 4) as u16;
            for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
                (segment.selector, segment.base) = (selector, SETUP);
            }
            return Ok(sregs);
        }
        let long = matches!(self, Start::Long(_));
        let flat = |selector, type_| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        let code = kvm_segment { l: long.into(), db: (!long).into(), ..flat(8, 0xb) };
        let data = flat(16, 3);
        // SDM Vol. 3 "Segment Descriptors".
        let gdt = [0, if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff }, 0x00cf_9300_0000_ffff_u64];
        put(memory, GDT, &gdt)?;
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, (size_of_val(&gdt) - 1) as u16);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, selector: 24, type_: 0xb, present: 1, ..Default::default() };
        // CR0.PE; SDM Vol. 3 "Control Registers".
        sregs.cr0 |= 1;
        if long {
            // The first GiB, by pages of 2 MiB, present and writable.
            put(memory, PML4, &[PML4 + 0x1003])?;
            put(memory, PML4 + 0x1000, &[PML4 + 0x2003])?;
            let pages: Vec<u64> = (0..512).map(|page| page << 21 | 0x83).collect();
            put(memory, PML4 + 0x2000, &pages)?;
            sregs.cr3 = PML4;
            // CR4.PAE, CR0.PG, EFER.LME and LMA.
            sregs.cr4 |= 1 << 5;
            sregs.cr0 |= 1 << 31;
            sregs.efer |= 1 << 8 | 1 << 10;
        }
        Ok(sregs)
    }
}
