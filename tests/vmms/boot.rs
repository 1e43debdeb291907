//! Puts a kernel into guest RAM, and a vCPU at its entry.

use std::fs::{self, File};

use anyhow::{Context, Result, bail};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use softkvm_tests::acpi;
use softkvm_tests::linux::{
    self, COMMAND_LINE, HIGH, MEMORY_MAP, MODULES, Memory, SETUP, START_INFO, Start, put, usable,
};
use vm_memory::{Bytes, GuestAddress};

use crate::style::{Entry, Style, Transport};
use crate::{Files, devices};

/// Interrupt handlers of our own.
const BIOS: u64 = 0xf_0000;

/// Fills RAM.
pub fn load(style: &Style, files: &Files, memory: &Memory) -> Result<Start> {
    let initrd = fs::read(&files.initrd).with_context(|| format!("cannot read {}", files.initrd.display()))?;
    let initrd = linux::put_initrd(memory, &initrd)?;
    linux::put_command_line(memory, &command_line(style))?;
    if style.entry == Entry::RealMode {
        return real_mode(files, memory, initrd);
    }
    let rsdp = acpi::write(memory, style.cpus, devices::of(style.transport))?;
    // Where the kernel is in place already, the same is written over it.
    let mut kernel = File::open(&files.vmlinux).with_context(|| format!("cannot read {}", files.vmlinux.display()))?;
    let loaded = Elf::load(memory, None, &mut kernel, Some(GuestAddress(HIGH))).context("the ELF file")?;
    match style.entry {
        Entry::Linux64 => {
            linux::zero_page(memory, linux::header_of_elf(), initrd, rsdp)?;
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

fn start_info(memory: &Memory, (paddr, size): (u64, u64), rsdp: u64) -> Result<()> {
    let map: Vec<_> =
        usable(memory).map(|(addr, size)| hvm_memmap_table_entry { addr, size, type_: 1, reserved: 0 }).to_vec();
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
    for (at, (addr, size)) in (BIOS + u64::from(MAP)..).step_by(20).zip(usable(memory)) {
        put(memory, at, &[addr, size])?;
        put(memory, at + 16, &[1_u32])?;
    }
    Ok(())
}
