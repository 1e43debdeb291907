//! Foreign bytes in every ioctl: whatever a client passes, the answer is a number or an errno, and the VM goes on.

mod common;

use common::{BASE, FakeClient, Random, SCRATCH};
use kvm::ioctl::ROWS;
use kvm_abi::consts::kvm_device_type_KVM_DEV_TYPE_VFIO;
use kvm_abi::request::*;
use kvm_abi::{Plain, kvm_create_device, kvm_userspace_memory_region};

#[test]
fn no_argument_panics_or_hangs() {
    for seed in 1..=6u64 {
        let mut random = Random(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed));
        let client = FakeClient::new();
        let vm = client.ioctl(0, KVM_CREATE_VM, 0).unwrap();
        // Odd seeds: a VM of 2007, if the first ioctls that decide it are of that kind.
        if seed % 2 == 1 {
            client.ioctl_bytes(vm, KVM_SET_MEMORY_REGION, [0u64, 0, 0x1_0000].map(u64::to_le_bytes).concat()).unwrap();
        } else {
            let region = kvm_userspace_memory_region { memory_size: 0x1_0000, userspace_addr: BASE, ..Plain::zeroed() };
            client.set(vm, KVM_SET_USER_MEMORY_REGION, &region).unwrap();
        }
        let vcpu = client.ioctl(vm, KVM_CREATE_VCPU, 0).unwrap();
        let mut vfio = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Plain::zeroed() };
        let device = client.ioctl_with(vm, KVM_CREATE_DEVICE, &mut vfio).map_or(vcpu, |_| vfio.fd as i32);
        // A signal that never goes away bounds every KVM_RUN.
        client.raise();
        for _ in 0..500 {
            let row = ROWS[random.next() as usize % ROWS.len()];
            let fd = match (random.next() % 16, row.file) {
                (0, _) => (random.next() % 3) as i32,
                (_, "System") => 0,
                (_, "Vm") => vm,
                (_, "Device") => device,
                _ => vcpu,
            };
            if direction(row.request) == NONE {
                let arg = if random.next().is_multiple_of(2) { 0 } else { random.number() };
                let _ = client.ioctl(fd, row.request, arg);
            } else if random.next().is_multiple_of(16) {
                let arg = random.number();
                let _ = client.ioctl(fd, row.request, arg);
            } else {
                // What lies behind the header is client memory that earlier rounds filled.
                let words = size(row.request).div_ceil(8) + 4;
                let bytes: Vec<u8> = (0..words).flat_map(|_| random.number().to_le_bytes()).collect();
                client.memory.write(SCRATCH - BASE, &bytes).unwrap();
                let _ = client.ioctl(fd, row.request, SCRATCH);
            }
        }
        // Files of the fuzzing's own making go with the client.
        assert!(client.files.lock().len() >= 3);
        assert!(client.ioctl(vcpu, KVM_GET_REGS, SCRATCH).is_ok());
    }
}
