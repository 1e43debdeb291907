//! Real client processes against a daemon with fake KVM objects. Needs root and `/dev/fuse`; skips without.

mod client;
mod fake;
mod legacy;

use std::time::Duration;

use fake::{Daemon, eventually, wait};

/// Runs a case with passthrough and without.
fn both(case: &str) {
    for passthrough in [true, false] {
        let Some(daemon) = Daemon::start(passthrough) else { continue };
        daemon.run(case);
    }
}

#[test]
fn descriptors_are_as_the_kernels() {
    both("descriptors");
}

#[test]
fn vcpu_pages_are_shared() {
    both("pages");
}

#[test]
fn descriptors_pass_to_others() {
    both("inherit");
}

#[test]
fn private_memory_becomes_shared() {
    both("share");
}

#[test]
fn files_are_shared_as_they_are() {
    both("share-files");
}

#[test]
fn no_write_is_lost_while_memory_becomes_shared() {
    both("share-writers");
}

#[test]
fn a_signal_ends_a_run() {
    both("signals");
}

#[test]
fn a_signal_mask_governs_a_run() {
    both("masked");
}

#[test]
fn a_vm_that_turns_out_legacy_can_be_mapped() {
    both("window");
}

/// As the kernel governs a run by a mask: real objects, real signals.
#[test]
fn signal_masks_are_as_the_kernels() {
    let Some(daemon) = Daemon::start_kvm(true) else { return };
    // The client inherits it: its other threads must not take what is sent to the process.
    legacy::mask(libc::SIG_BLOCK, legacy::REALTIME);
    daemon.run("signal-mask");
}

#[test]
fn ram_of_2007_is_what_the_guest_sees_and_holes_are_sigbus() {
    for passthrough in [true, false] {
        let Some(daemon) = Daemon::start_kvm(passthrough) else { continue };
        daemon.run("ram-window");
        daemon.run("ram-threads");
    }
}

#[test]
fn a_bug_in_an_ioctl_is_an_error_of_that_ioctl() {
    both("panic");
}

#[test]
fn a_32_bit_caller_is_refused() {
    both("compat");
}

#[test]
fn a_seccomp_filter_does_not_matter() {
    both("seccomp");
}

#[test]
fn address_spaces_are_told_apart() {
    both("spaces");
}

#[test]
fn no_path_is_needed() {
    both("namespaces");
}

#[test]
fn killed_clients_leave_nothing() {
    for passthrough in [true, false] {
        let Some(daemon) = Daemon::start(passthrough) else { continue };
        for round in 0..15 {
            let mut child = daemon.client("churn").spawn().unwrap();
            std::thread::sleep(Duration::from_micros(20_000 + round * 3_137));
            child.kill().unwrap();
            wait(&mut child, Duration::from_secs(20));
        }
        daemon.settles();
        // And the daemon still works.
        daemon.run("descriptors");
    }
}

#[test]
fn a_run_ends_when_its_thread_is_killed() {
    let Some(daemon) = Daemon::start(true) else { return };
    let mut child = daemon.client("wait").spawn().unwrap();
    eventually("the client runs", || daemon.stats.running.load(std::sync::atomic::Ordering::SeqCst) == 1);
    child.kill().unwrap();
    wait(&mut child, Duration::from_secs(20));
    daemon.settles();
}
