//! Real client processes against a daemon with fake KVM objects. Needs root and `/dev/fuse`; skips without.

mod client;
mod fake;
mod guard;
mod legacy;

use std::time::Duration;

use nix::sys::wait::WaitStatus;

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

/// Where the daemon is itself under a filter, it may suspend nobody's: the client is told, and lives on.
#[test]
fn a_seccomp_filter_that_stays_is_an_error() {
    client::filter_this_thread(&[], libc::SECCOMP_RET_ALLOW);
    let Some(daemon) = Daemon::start(true) else { return };
    daemon.run("seccomp-stays");
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
fn clients_may_be_in_other_namespaces() {
    let Some(daemon) = Daemon::start(true) else { return };
    let pids = ["unshare", "--pid", "--fork", "--mount", "--mount-proc"];
    let users = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"];
    for launcher in [&pids[..], &users[..]] {
        for case in ["descriptors", "pages", "share", "signals"] {
            daemon.run_by(launcher, case);
        }
    }
    daemon.run_by(&pids, "namespaces");
}

/// Huge pages of 2 MiB, for as long as it lives; `None`, with the reason printed, where the kernel gives none.
struct HugePages(String);

impl HugePages {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(count: u64) -> Option<Self> {
        let before = std::fs::read_to_string(Self::COUNT).ok()?;
        let wanted = before.trim().parse::<u64>().ok()? + count;
        let own = Self(before);
        let reserved =
            std::fs::write(Self::COUNT, wanted.to_string()).and_then(|()| std::fs::read_to_string(Self::COUNT));
        if reserved.is_ok_and(|now| now.trim() == wanted.to_string()) {
            return Some(own);
        }
        eprintln!("skipped: the kernel has no {count} huge pages to spare");
        None
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::COUNT, &self.0);
    }
}

#[test]
fn huge_pages_become_shared() {
    let Some(daemon) = Daemon::start(true) else { return };
    let Some(_pages) = HugePages::reserve(4) else { return };
    daemon.run("share-huge");
}

/// At any moment, injections included: its clients get errors and go on by themselves, with their signals as they were.
#[test]
fn clients_of_a_killed_daemon_go_on() {
    let Some(daemon) = Daemon::start(true) else { return };
    let place = std::env::temp_dir().join(format!("softkvm-killed-{}", std::process::id()));
    for round in 0..20 {
        let _ = std::fs::remove_file(&place);
        let mut server = daemon.client("serve").env(client::DEVICE, &place).spawn().unwrap();
        let told = || std::fs::read_to_string(&place).unwrap_or_default();
        eventually("the daemon serves", || told().ends_with("/mnt\n"));
        let told = told();
        let (device, namespace) = told.trim_end().split_once('\n').unwrap();
        let enter = format!("--mount={namespace}");
        let mut churn = daemon.client("churn-alone");
        churn.env(client::DEVICE, device);
        let mut churn = fake::launched(&["nsenter", &enter], churn).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(80_000 + round * 4_321));
        server.kill().unwrap();
        wait(&mut server, Duration::from_secs(5));
        let status = wait(&mut churn, Duration::from_secs(5));
        assert!(matches!(status, WaitStatus::Exited(_, 0)), "round {round}: {status:?}");
    }
    std::fs::remove_file(&place).unwrap();
}

/// The kernel alone would not end it: the thread that waits keeps /dev/fuse open.
#[test]
fn a_killed_daemon_that_waits_for_itself_ends() {
    let Some(daemon) = Daemon::start(true) else { return };
    let place = std::env::temp_dir().join(format!("softkvm-asking-{}", std::process::id()));
    let mut asking = daemon.client("asks-itself").env(client::DEVICE, &place).spawn().unwrap();
    eventually("it asks itself", || place.exists());
    asking.kill().unwrap();
    let status = wait(&mut asking, Duration::from_secs(5));
    assert!(matches!(status, WaitStatus::Signaled(..)), "{status:?}");
    std::fs::remove_file(&place).unwrap();
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
