//! Machines that are stopped, saved, loaded and moved to another QEMU while they work: what they compute goes on as if nothing
//! had happened.
//!
//! The guest prints two chains of hashes, one on each processor. Each line depends on all before it, through registers, memory
//! and the disk. The same script, run by the same busybox on this machine's CPU, tells what the lines are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use assets::kernel::Kernel;
use assets::packages::{self, BUSYBOX, QEMU_IMG};
use assets::qemu::{Board, Irqchip, Machine};
use assets::{Quiet, initramfs, kernel};
use serde_json::json;
use softkvm_tests::console::Console;
use softkvm_tests::qmp::Qmp;
use softkvm_tests::{eventually, long, qemu};

const MEMORY_MIB: u32 = 256;
/// Generous: a loaded machine must not fail a test.
const BOOT: Duration = Duration::from_secs(300);
const LINES: Duration = Duration::from_secs(300);
const MOVE: Duration = Duration::from_secs(300);
/// What the guest prints between two interruptions.
const BETWEEN: usize = 12;

const CHAIN: &str = include_str!("chain.sh");
/// Name, first block on the disk, pause. One keeps its processor busy, the other needs its timer.
const CHAINS: [(&str, u32, u32); 2] = [("one", 0, 0), ("two", 16, 100_000)];

/// Behind it stand lines of the chains and nothing else.
const BEGIN: &str = "CHAINS BEGIN\r\n";

/// Machine, its interrupt controllers, QEMU's name of its processors, and how it learns what the guest writes.
type Kind = (Board, Irqchip, &'static str, Log);

/// Which pages are to be moved once more.
#[derive(Clone, Copy, Debug)]
enum Log {
    /// A bitmap of each slot.
    Bitmaps,
    /// A ring for each processor, of that many entries.
    Rings(u32),
}

/// One at a time: each takes all CPUs.
static ONE: Mutex<()> = Mutex::new(());

fn init() -> String {
    let [(one, at, short), (two, next, long)] = CHAINS;
    format!(
        "$b cat >/chain.sh <<'END'\n{CHAIN}END\n\
         export b tmp=/tmp\n\
         echo 'CHAINS BEGIN'\n\
         pause={short} $b taskset 1 $b sh /chain.sh {one} /dev/vda {at} -1 iflag=direct oflag=direct &\n\
         pause={long} $b taskset 2 $b sh /chain.sh {two} /dev/vda {next} -1 iflag=direct oflag=direct\n"
    )
}

/// The first lines of a chain, by this machine's CPU.
fn expected(folder: &Path, name: &str, first: u32, lines: usize) -> Vec<String> {
    let disk = folder.join("expected");
    fs::write(&disk, vec![0; 4096 * 32]).expect("a file");
    let busybox = packages::find(BUSYBOX).expect("busybox");
    let output = Command::new(&busybox)
        .args(["sh", "-c", CHAIN, "chain.sh", name])
        .arg(&disk)
        .args([first.to_string(), lines.to_string()])
        .env("b", &busybox)
        .env("tmp", folder)
        .env("pause", "0")
        .output()
        .expect("busybox starts");
    String::from_utf8(output.stdout).expect("it is text").lines().map(str::to_owned).collect()
}

/// What a guest computes on, and the folder of its sockets; gone when dropped.
struct Place {
    folder: PathBuf,
    kernel: Kernel,
    initrd: PathBuf,
}

impl Place {
    fn new() -> Self {
        packages::ensure(&[BUSYBOX, QEMU_IMG], &Quiet).expect("busybox and qemu-img");
        let folder = std::env::temp_dir().join(format!("softkvm-moving-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let kernel = kernel::ensure(&Quiet).expect("the kernel");
        let initrd = initramfs::with_disk(&kernel, &init(), &Quiet).expect("the initramfs");
        Self { folder, kernel, initrd }
    }

    /// A disk of zeros.
    fn new_disk(&self) {
        let program = packages::find(QEMU_IMG).expect("qemu-img");
        let output = Command::new(program).args(["create", "-q", "-f", "qcow2"]).arg(self.disk()).arg("1M").output();
        assert!(output.as_ref().is_ok_and(|output| output.status.success()), "{output:?}");
    }

    fn disk(&self) -> PathBuf {
        self.folder.join("disk.qcow2")
    }

    fn migration(&self) -> String {
        format!("unix:{}", self.folder.join("migration").display())
    }

    fn start(&self, (board, irqchip, cpu, log): Kind, name: &str, options: &[&str]) -> Running {
        let socket = self.folder.join(name);
        let console = qemu::start(|accel| {
            let machine = Machine::new(accel, MEMORY_MIB).board(board, irqchip).cpus(2);
            let machine = match log {
                Log::Bitmaps => machine,
                Log::Rings(entries) => machine.dirty_rings(entries),
            };
            let mut machine = machine.linux(&self.kernel.image(), &self.initrd, "quiet").qcow2_disk(&self.disk());
            machine.push(["-cpu", cpu, "-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
            machine.push(options);
            machine
        })
        .expect("QEMU starts");
        let qmp = Qmp::connect(&socket, BOOT);
        let qmp = qmp.unwrap_or_else(|error| panic!("{error:?}\n{}", console.tail()));
        Running { console, qmp }
    }

    /// All that the guest has said, from one QEMU or several: the chains, without a gap.
    fn check(&self, said: &str) {
        let chains = said.split_once(BEGIN).expect("the guest has begun").1;
        // The last line may be under way.
        let chains = chains.rsplit_once('\n').expect("lines").0;
        let lines: Vec<&str> = chains.lines().map(str::trim_end).collect();
        let mut sum = 0;
        for (name, first, _) in CHAINS {
            let of_chain = |line: &&&str| line.split(' ').next() == Some(name);
            let found: Vec<&str> = lines.iter().filter(of_chain).copied().collect();
            let expected = expected(&self.folder, name, first, found.len());
            for (expected, found) in expected.iter().zip(&found) {
                assert_eq!(expected, found, "left: on this machine's CPU, right: in the guest, which said\n{chains}");
            }
            assert_eq!(expected.len(), found.len());
            println!("chain {name}: {} lines as on this CPU", found.len());
            sum += found.len();
        }
        assert_eq!(sum, lines.len(), "lines of no chain among\n{chains}");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

struct Running {
    console: Console,
    qmp: Qmp,
}

impl Running {
    /// Waits for that many more lines of each chain.
    fn works(&self, lines: usize) {
        let count = |name: &str| self.console.text().lines().filter(|line| line.starts_with(name)).count();
        let before = CHAINS.map(|(name, ..)| count(name));
        let done = || CHAINS.iter().zip(before).all(|((name, ..), before)| count(name) >= before + lines);
        assert!(eventually(LINES, done), "the guest stands still: {}", self.console.tail());
    }

    fn status(&mut self) -> String {
        self.qmp.execute("query-status", &json!({})).expect("its state")["status"].to_string()
    }

    /// Stops the machine, and says where its output has come to.
    fn stop(&mut self) -> usize {
        self.qmp.execute("stop", &json!({})).expect("it stops");
        let mut length = self.console.text().len();
        // What QEMU has written is ours a moment later.
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let now = self.console.text().len();
            if now == length {
                return length;
            }
            length = now;
        }
    }

    fn go_on(&mut self) {
        self.qmp.execute("cont", &json!({})).expect("it goes on");
    }

    /// Ends QEMU. All that the guest said.
    fn end(mut self) -> String {
        self.qmp.execute("quit", &json!({})).expect("it quits");
        assert!(self.console.finish(MOVE).expect("QEMU ends").success(), "{}", self.console.tail());
        self.console.text()
    }
}

/// The machine goes back to its snapshot, disk and all, and does the same again.
fn goes_back(kind: Kind, rounds: usize) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{kind:?}");
    let place = Place::new();
    place.new_disk();
    let mut machine = place.start(kind, "qmp", &[]);
    machine.console.expect(BEGIN, BOOT).expect("user space");
    machine.works(BETWEEN);
    // What counts of the console's text: `kept`, then all from `from`.
    let (mut kept, mut from) = (String::new(), 0);
    for _ in 0..rounds {
        let saved = machine.stop();
        machine.qmp.human("savevm moment").expect("the snapshot is taken");
        machine.go_on();
        machine.works(BETWEEN);
        let left = machine.stop();
        machine.qmp.human("loadvm moment").expect("the snapshot is loaded");
        machine.go_on();
        machine.works(BETWEEN);
        let said = machine.console.text();
        place.check(&format!("{kept}{}", &said[from..left]));
        kept += &said[from..saved];
        from = left;
        place.check(&format!("{kept}{}", &said[from..]));
    }
    machine.end();
}

/// The machine moves to a new QEMU, with its disk, while it works.
fn moves(kind: Kind, rounds: usize) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{kind:?}");
    let place = Place::new();
    place.new_disk();
    let mut machine = place.start(kind, "qmp", &[]);
    machine.console.expect(BEGIN, BOOT).expect("user space");
    let mut said = String::new();
    for round in 0..rounds {
        machine.works(BETWEEN);
        let to = place.start(kind, &format!("qmp-{round}"), &["-incoming", &place.migration()]);
        machine.qmp.execute("migrate", &json!({ "uri": place.migration() })).expect("migration begins");
        let mut state = json!({});
        let over = eventually(MOVE, || {
            state = machine.qmp.execute("query-migrate", &json!({})).expect("its state");
            state["status"] == "completed" || state["status"] == "failed"
        });
        assert!(over && state["status"] == "completed", "{state}\n{}\n{}", machine.console.tail(), to.console.tail());
        println!("round {round}: {} ms, the guest stood {} ms", state["total-time"], state["downtime"]);
        said += &std::mem::replace(&mut machine, to).end();
    }
    machine.works(BETWEEN);
    assert_eq!(machine.status(), "\"running\"");
    said += &machine.end();
    assert!(!said.contains("dirty ring"), "QEMU warns of what it has not got: {said}");
    place.check(&said);
}

/// QEMU's default processor counts its timer down.
const SHORT: Kind = (Board::Q35, Irqchip::On, "qemu64", Log::Bitmaps);
/// With more state in a processor: the deadline of its timer is in an MSR, and it has all that KVM offers to guests.
const LONG: [Kind; 5] = [
    SHORT,
    (Board::Q35, Irqchip::On, "max", Log::Bitmaps),
    (Board::Q35, Irqchip::Split, "max", Log::Bitmaps),
    (Board::Pc, Irqchip::On, "qemu64", Log::Bitmaps),
    (Board::Pc, Irqchip::Split, "qemu64", Log::Bitmaps),
];
/// As many entries as api.rst advises, and rings that are full again and again.
const RINGS: [Kind; 2] =
    [(Board::Pc, Irqchip::On, "qemu64", Log::Rings(4096)), (Board::Q35, Irqchip::Split, "max", Log::Rings(1024))];

#[test]
fn a_snapshot_is_gone_back_to() {
    if long() { LONG.iter().for_each(|kind| goes_back(*kind, 5)) } else { goes_back(SHORT, 1) }
}

#[test]
fn a_machine_moves_while_it_works() {
    if long() { LONG.iter().for_each(|kind| moves(*kind, 12)) } else { moves(SHORT, 1) }
}

#[test]
fn a_machine_with_dirty_rings_moves_while_it_works() {
    if long() { RINGS.iter().for_each(|kind| moves(*kind, 12)) } else { moves(RINGS[0], 1) }
}
