//! Records what the host's `/dev/kvm` returns: `cargo run -p kvm --example record_returns > crates/kvm/tests/returns.txt`,
//! then put back the lines' reasons. Needs a Linux KVM; the file says which.
#![expect(unsafe_code, reason = "ioctl(2) and a page-aligned allocation")]

#[path = "../tests/common/cases.rs"]
mod cases;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};

use mmu::Mapping;
use nix::errno::Errno;
use nix::libc;

struct Host {
    system: File,
    memory: std::sync::Arc<Mapping>,
}

fn result(ret: libc::c_int, request: u32) -> Result<i32, String> {
    let makes_file = matches!(request, kvm_abi::request::KVM_CREATE_VM | kvm_abi::request::KVM_CREATE_VCPU);
    match Errno::result(ret) {
        Ok(fd) if makes_file => Ok(fd),
        Ok(value) => Ok(value),
        Err(errno) => Err(format!("{errno:?}")),
    }
}

impl cases::Backend for Host {
    fn memory(&self) -> u64 {
        self.memory.host(0, cases::MEMORY).expect("all of it").as_ptr() as u64
    }

    fn value(&mut self, fd: i32, request: u32, arg: u64) -> Result<i32, String> {
        // SAFETY: no request of the cases takes a number that the kernel would write through.
        result(unsafe { libc::ioctl(fd, request.into(), arg) }, request)
    }

    fn bytes(&mut self, fd: i32, request: u32, bytes: &mut Vec<u8>) -> Result<i32, String> {
        // SAFETY: the cases pass as many bytes as the request and its counts say.
        result(unsafe { libc::ioctl(fd, request.into(), bytes.as_mut_ptr()) }, request)
    }

    fn system(&self) -> i32 {
        self.system.as_raw_fd()
    }
}

fn main() -> io::Result<()> {
    let system = File::options().read(true).write(true).open("/dev/kvm")?;
    let mut host = Host { system, memory: Mapping::create("record", cases::MEMORY)? };
    for line in cases::run(&mut host) {
        println!("{line}");
    }
    let _ = host.system.into_raw_fd();
    Ok(())
}
