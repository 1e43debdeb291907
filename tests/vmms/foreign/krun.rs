//! A program of libkrun's: `krun VMLINUX INITRAMFS` boots them, with the guest's serial port on stdin and stdout.
//!
//! libkrun has a kernel of its own, libkrunfw, a shared object that is not on crates.io; an ELF file does as well.

use std::env::args;
use std::ffi::CString;

fn main() {
    let mut args = args().skip(1).map(|argument| CString::new(argument).expect("no NUL"));
    let mut next = || args.next().expect("krun VMLINUX INITRAMFS");
    let (vmlinux, initramfs) = (next(), next());
    let ok = |result: i32| assert!(result >= 0, "libkrun: {}", std::io::Error::from_raw_os_error(-result));
    // What Debian's kernel does not know is how libkrun names its devices: interrupts come by the PICs.
    let line = c"console=ttyS0 reboot=k panic=-1 quiet noapic noacpi pci=off i8042.noaux";
    let context = krun::krun_create_ctx();
    ok(context);
    let context = context.cast_unsigned();
    ok(krun::krun_set_vm_config(context, 1, 256));
    const ELF: u32 = 1;
    // SAFETY: strings that outlive the call.
    ok(unsafe { krun::krun_set_kernel(context, vmlinux.as_ptr(), ELF, initramfs.as_ptr(), line.as_ptr()) });
    ok(krun::krun_disable_implicit_console(context));
    ok(krun::krun_disable_implicit_vsock(context));
    // SAFETY: takes integers only.
    ok(unsafe { krun::krun_add_serial_console_default(context, 0, 1) });
    // It ends the process with the guest.
    ok(krun::krun_start_enter(context));
}
