//! Processes that die at the wrong moment: nothing may stay behind, nobody may hang.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use assets::qemu::{Accel, Board, Irqchip, Machine};
use assets::{Quiet, initramfs, kernel, packages};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use softkvm_tests::console::Console;
use softkvm_tests::service::{Resources, Service};
use softkvm_tests::{eventually, long, softkvm};

const BOOT: Duration = Duration::from_secs(120);
/// The whole boot of the demo, roughly: moments are chosen in it.
const BOOT_MS: u64 = 5000;
/// For the daemon to notice that a client is gone. Generous: what leaks stays for good.
const NOTICE: Duration = Duration::from_secs(30);
/// A VMM whose daemon was killed has so long to end.
const LIMIT: Duration = Duration::from_secs(2);
/// How often [`LIMIT`] may be missed on a machine that others keep busy.
const ATTEMPTS: u32 = 3;

/// Machines that differ in what they ask the daemon for.
const MACHINES: [(Board, Irqchip, u32); 4] = [
    (Board::Q35, Irqchip::On, 2),
    (Board::Pc, Irqchip::Off, 1),
    (Board::Microvm, Irqchip::Split, 2),
    (Board::Pc, Irqchip::On, 1),
];
/// What the daemon's allocator may keep of hundreds of machines with 256 MiB each.
const KEPT_KIB: usize = 32 * 1024;

fn machine() -> Machine {
    machine_of(Board::Pc, Irqchip::Off, 1)
}

fn machine_of(board: Board, irqchip: Irqchip, cpus: u32) -> Machine {
    packages::ensure(&[packages::QEMU], &Quiet).expect("QEMU");
    let kernel = kernel::ensure(&Quiet).expect("the kernel");
    let initrd = initramfs::ensure(&Quiet).expect("the initramfs");
    Machine::new(Accel::Kvm, 256).board(board, irqchip).cpus(cpus).linux(&kernel.image(), &initrd, "")
}

/// Waits until the daemon holds no more than `base` for its clients.
fn settles(service: &Service, base: Resources) -> Result<(), Resources> {
    let mut now = Resources::default();
    let settled = eventually(NOTICE, || {
        now = service.resources().expect("the daemon still answers");
        let same = |of: &Resources| (of.vms, of.memfds, of.mappings, of.mounts);
        let small = now.threads <= base.threads && now.fds <= base.fds && now.processes <= base.processes;
        same(&now) == same(&base) && small && now.memory_kib <= base.memory_kib + KEPT_KIB
    });
    if settled { Ok(()) } else { Err(now) }
}

#[test]
fn qemu_killed_at_random_moments_leaves_nothing_in_the_daemon() {
    let machines = MACHINES.map(|(board, irqchip, cpus)| machine_of(board, irqchip, cpus).command_line());
    let service = Service::start().expect("the daemon starts");
    let empty = service.resources().expect("the daemon answers");
    assert_eq!(empty.vms, 0);
    let seed = match std::env::var("SOFTKVM_TEST_SEED") {
        Ok(given) => given.parse().expect("SOFTKVM_TEST_SEED is a number"),
        Err(_) => u64::from(SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").subsec_nanos()),
    };
    println!("SOFTKVM_TEST_SEED={seed} repeats this run");
    // Each boots to user space first: the daemon's pool of workers grows to what a QEMU needs, and stays.
    for machine in &machines {
        let mut first = Console::start(&mut service.client(machine)).expect("QEMU starts");
        first.expect(initramfs::BOOTED, BOOT).expect("user space");
    }
    let mut grown = Resources::default();
    let settled = eventually(NOTICE, || {
        grown = service.resources().expect("the daemon answers");
        (grown.vms, grown.memfds, grown.mappings) == (0, empty.memfds, empty.mappings)
    });
    assert!(settled, "{grown:?}, not {empty:?}");
    // A worker may keep one descriptor, that of its thread's statistics.
    let base =
        Resources { fds: empty.fds + grown.threads, threads: grown.threads, memory_kib: grown.memory_kib, ..empty };
    println!("at the beginning {empty:?}\nafter a boot of each {grown:?}");
    let mut x = seed | 1;
    for round in 0..if long() { 200 } else { 12 } {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let moment = Duration::from_millis((x >> 33) % BOOT_MS);
        let machine = &machines[round % machines.len()];
        let mut qemu = Console::start(&mut service.client(machine)).expect("QEMU starts");
        std::thread::sleep(moment);
        qemu.kill();
        qemu.wait(NOTICE).expect("a killed QEMU is gone at once");
        if let Err(now) = settles(&service, base) {
            panic!("round {round}, killed after {moment:?}: {now:?} stays, not {base:?}\n{}", service.tail());
        }
        if round % 10 == 9 {
            println!("after {} rounds {:?}", round + 1, service.resources().expect("the daemon answers"));
        }
    }
}

/// `attempt` tells how long it took, and ends within [`NOTICE`] in any case. It must once be within [`LIMIT`]: one that is
/// slow by itself is so every time, one that waited for a CPU is not.
fn within_limit(attempt: impl Fn() -> Duration) {
    let mut took = Vec::new();
    for _ in 0..ATTEMPTS {
        took.push(attempt());
        if took.last().is_some_and(|last| *last <= LIMIT) {
            println!("took {took:?}");
            return;
        }
    }
    panic!("not once within {LIMIT:?}: {took:?}");
}

/// Nothing of QEMU's ends it then: it would stop the machine and wait at its monitor. `softkvm run` does.
#[test]
fn qemu_ends_when_the_daemon_of_softkvm_run_is_killed() {
    within_limit(kill_the_daemon_of_softkvm_run);
}

fn kill_the_daemon_of_softkvm_run() -> Duration {
    let mut machine = machine();
    let name = format!("softkvm-test-{}", std::process::id());
    machine.push(["-name", &name]);
    let mut run = Console::start(&mut softkvm::run::<&str, _>(&[], &machine.command_line()).expect("softkvm"))
        .expect("softkvm starts");
    run.expect("Linux version", BOOT).expect("the boot is under way");
    let qemu = with_argument(run.pid(), &name);
    let [daemon] = with_argument(run.pid(), "daemon")[..] else { panic!("softkvm run has one daemon") };
    assert_eq!(qemu.len(), 1, "softkvm run has one QEMU");
    let killed = Instant::now();
    kill(daemon, Signal::SIGKILL).expect("the daemon is there");
    let status = run.wait(NOTICE).expect("softkvm run ends");
    let took = killed.elapsed();
    assert!(!status.success(), "{status}");
    assert!(with_argument(run.pid(), &name).is_empty());
    assert!(!PathBuf::from(format!("/proc/{}", qemu[0])).exists(), "QEMU is gone");
    took
}

#[test]
fn qemu_says_so_and_does_not_hang_when_the_hosts_daemon_is_killed() {
    within_limit(kill_the_hosts_daemon);
}

fn kill_the_hosts_daemon() -> Duration {
    let machine = machine();
    let service = Service::start().expect("the daemon starts");
    let mut qemu = Console::start(&mut service.client(&machine.command_line())).expect("QEMU starts");
    qemu.expect("Linux version", BOOT).expect("the boot is under way");
    let killed = Instant::now();
    service.kill();
    // QEMU's way to fail: it names the error and stops the machine, its monitor still answers.
    assert!(eventually(NOTICE, || qemu.errors().contains("kvm run failed")), "{}", qemu.tail());
    let said = killed.elapsed();
    let told = Instant::now();
    kill(qemu.pid(), Signal::SIGTERM).expect("QEMU is there");
    qemu.wait(NOTICE).expect("QEMU ends when it is told to");
    said.max(told.elapsed())
}

/// The children of `parent` that have this argument.
fn with_argument(parent: Pid, argument: &str) -> Vec<Pid> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    let has = |pid: &Pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|arg| arg == argument.as_bytes())
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).filter(has).collect()
}
