//! Clients that were never written for softkvm.

mod kvm_ioctls;
