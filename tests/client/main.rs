//! Clients as the kernel's KVM has them: a foreign test suite, and processes that die at the wrong moment.

mod kill;
mod kvm_ioctls;
