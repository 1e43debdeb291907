//! State of nested guests, of which there are none: `struct kvm_nested_state` is its header. api.rst `KVM_GET_NESTED_STATE`.

use kvm_abi::consts::{KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE};
use nix::errno::Errno;

/// The header: flags and format, size, then for VMX the addresses of VMXON region and VMCS, SMM flags, flags, a deadline.
pub(crate) type State = [u32; 32];
/// Bytes of it, and of all there ever is.
pub(crate) const BYTES: u32 = 128;
const _: () = assert!(size_of::<State>() == BYTES as usize);

const FLAGS_AND_FORMAT: usize = 0;
const SIZE: usize = 1;
/// Both addresses are all ones: VMX is off.
const ADDRESSES: std::ops::Range<usize> = 2..6;
const SMM_FLAGS: usize = 6;
const VMX_FLAGS: usize = 7;

/// Replaces what came in. E2BIG: there is no room for the header.
pub(crate) fn get(state: &mut State) -> Result<(), Errno> {
    if state[SIZE] < BYTES {
        return Err(Errno::E2BIG);
    }
    *state = [0; 32];
    state[FLAGS_AND_FORMAT] = KVM_STATE_NESTED_FORMAT_VMX << 16;
    state[SIZE] = BYTES;
    state[ADDRESSES].fill(u32::MAX);
    Ok(())
}

/// What [`get`] gives may come back. EINVAL: anything that says that VMX is on (`vmx_set_nested_state`).
pub(crate) fn check(state: &State) -> Result<(), Errno> {
    let off = state[FLAGS_AND_FORMAT] == KVM_STATE_NESTED_FORMAT_VMX << 16
        && state[SIZE] >= BYTES
        && state[ADDRESSES].iter().all(|&word| word == u32::MAX)
        && state[SMM_FLAGS] as u16 == 0
        && state[VMX_FLAGS] & !KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE == 0;
    if off { Ok(()) } else { Err(Errno::EINVAL) }
}
