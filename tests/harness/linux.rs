//! Linux started without firmware: what a VMM puts into guest RAM, and into a vCPU.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{XLF_KERNEL_64, boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// RAM, from guest-physical 0 and without a hole.
pub type Memory = GuestMemoryMmap<()>;

// Where things lie in the first MiB. Firecracker's and Cloud Hypervisor's places.
const GDT: u64 = 0x500;
/// PVH's `hvm_start_info`.
pub const START_INFO: u64 = 0x6000;
/// Its list of modules.
pub const MODULES: u64 = 0x6040;
/// Its memory map.
pub const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
/// The command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
const LOW_END: u64 = 0x9_fc00;
/// Where RAM goes on behind the hole of a PC.
pub const HIGH: u64 = 0x10_0000;

/// The real-mode part of a bzImage: setup at 0x1000:0, so its code at 0x1020:0. kvmtool's places.
pub const SETUP: u64 = 0x1_0000;
const SETUP_STACK: u64 = 0x8000;

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

/// Usable memory: start and length.
pub fn usable(memory: &Memory) -> [(u64, u64); 2] {
    [(0, LOW_END), (HIGH, size(memory) - HIGH)]
}

fn size(memory: &Memory) -> u64 {
    memory.last_addr().0 + 1
}

/// The archive with the first user space, at the end of RAM: where, and its length.
pub fn put_initrd(memory: &Memory, initrd: &[u8]) -> Result<(u64, u64)> {
    let len = initrd.len() as u64;
    let at = size(memory).checked_sub(len).context("the initramfs is larger than RAM")? & !0xfff;
    memory.write_slice(initrd, GuestAddress(at)).context("the initramfs")?;
    Ok((at, len))
}

/// What Linux is told, at [`COMMAND_LINE`].
pub fn put_command_line(memory: &Memory, line: &str) -> Result<()> {
    memory.write_slice(&[line.as_bytes(), b"\0"].concat(), GuestAddress(COMMAND_LINE)).context("the command line")
}

/// A bzImage, and all that it is told; it unpacks itself, as behind a boot loader. `rsdp`: the first of the ACPI tables.
pub fn put_bzimage(memory: &Memory, image: &Path, initrd: (u64, u64), rsdp: u64) -> Result<Start> {
    /// From the begin of the protected-mode code to its 64-bit entry. boot.rst "64-bit Boot Protocol".
    const ENTRY_64: u64 = 0x200;
    let mut file = File::open(image).with_context(|| format!("cannot read {}", image.display()))?;
    let loaded = BzImage::load(memory, None, &mut file, Some(GuestAddress(HIGH))).context("the bzImage")?;
    let header = loaded.setup_header.context("the bzImage has no header")?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        bail!("{} has no 64-bit entry", image.display());
    }
    zero_page(memory, header, initrd, rsdp)?;
    Ok(Start::Long(loaded.kernel_load.0 + ENTRY_64))
}

/// The header of a kernel that comes without its setup's code.
pub fn header_of_elf() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        cmdline_size: 2048,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

/// The zero page of a kernel with this header. boot.rst "The Real-Mode Kernel Header": what a loader fills in.
pub fn zero_page(memory: &Memory, header: setup_header, (initrd, initrd_len): (u64, u64), rsdp: u64) -> Result<()> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.ramdisk_image = initrd as u32;
    params.hdr.ramdisk_size = initrd_len as u32;
    for (at, (addr, size)) in usable(memory).into_iter().enumerate() {
        params.e820_table[at] = boot_e820_entry { addr, size, r#type: 1 };
        params.e820_entries += 1;
    }
    memory.write_obj(params, GuestAddress(ZERO_PAGE)).context("the zero page")
}

/// Writes values one behind the other.
pub fn put<T: ByteValued>(memory: &Memory, at: u64, values: &[T]) -> Result<()> {
    for (index, value) in values.iter().enumerate() {
        memory.write_obj(*value, GuestAddress(at + (index * size_of::<T>()) as u64)).context("a structure")?;
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

/// What Firecracker and Cloud Hypervisor write at boot.
pub fn boot_msrs() -> [kvm_msr_entry; 11] {
    let entry = |index, data| kvm_msr_entry { index, data, reserved: 0 };
    const MTRR_DEFAULT: u64 = 0xc06;
    [
        entry(0x174, 0),
        entry(0x175, 0),
        entry(0x176, 0),
        entry(0xc000_0081, 0),
        entry(0xc000_0083, 0),
        entry(0xc000_0102, 0),
        entry(0xc000_0084, 0),
        entry(0xc000_0082, 0),
        entry(0x10, 0),
        entry(0x1a0, 1),
        entry(0x2ff, MTRR_DEFAULT),
    ]
}

/// Writes them in one call: all must be taken.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<()> {
    let msrs = boot_msrs();
    let set = vcpu.set_msrs(&Msrs::from_entries(&msrs).context("MSRs")?).context("KVM_SET_MSRS")?;
    if set != msrs.len() {
        bail!("KVM_SET_MSRS took {set} of {}", msrs.len());
    }
    Ok(())
}

/// LINT0 is the PIC's, LINT1 is NMI: what every VMM makes of the local APIC's reset state.
pub fn set_lint(vcpu: &VcpuFd) -> Result<()> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    for (register, mode) in [(LVT_LINT0, 7_u32), (LVT_LINT1, 4)] {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(&lapic.regs[register..]).for_each(|(to, from)| *to = from.cast_unsigned());
        let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
        lapic.regs[register..].iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte.cast_signed());
    }
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}
