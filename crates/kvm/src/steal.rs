//! Steal time: a page that tells the guest how long its vCPU wanted to run and could not, and whether it runs at all.
//!
//! Documentation/virt/kvm/x86/msr.rst `MSR_KVM_STEAL_TIME`; `record_steal_time` of x86.c. What the scheduler lets a thread wait
//! for a CPU is in its `schedstat` file (Documentation/scheduler/sched-stats.rst). A vCPU has two threads: the client's, outside
//! of `KVM_RUN` and on the way there, and the one of ours that runs the guest.
//!
//! While the vCPU is not in the guest, `preempted` says so: other vCPUs then need not wait for it, and instead of an IPI leave a
//! mark there when it is to drop its translations. That is done before its next instruction. Nothing translated is used behind
//! an exit: an access that waits for its answer is begun anew.

use std::cell::OnceCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;
use std::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst, fence};
use std::time::Duration;

use mmu::View;
use x86_defs::GuestPhysAddr;

use crate::client::Client;
use crate::clock;
use crate::paravirt::ENABLE;
use crate::vcpu::Vcpu;

/// Bits of the MSR that are none: `KVM_STEAL_RESERVED_MASK`. Below the address is [`ENABLE`].
pub(crate) const RESERVED: u64 = 0x3e;

/// `struct kvm_steal_time`: steal (ns), version, flags, preempted.
const VERSION_AT: u64 = 8;
const PREEMPTED_AT: u64 = 16;
/// `KVM_VCPU_PREEMPTED` and `KVM_VCPU_FLUSH_TLB`.
const PREEMPTED: u8 = 1 << 0;
const FLUSH_TLB: u8 = 1 << 1;

/// The files are read this often: a read takes about as long as ten thousand guest instructions.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// A thread's `schedstat`: ns on a CPU, ns waiting for one, how often on one.
fn read_schedstat(file: &File) -> Option<[u64; 3]> {
    let mut text = [0; 80];
    let len = file.read_at(&mut text, 0).ok()?;
    let mut words = std::str::from_utf8(&text[..len]).ok()?.split_ascii_whitespace().map(str::parse);
    Some([words.next()?.ok()?, words.next()?.ok()?, words.next()?.ok()?])
}

fn open_own() -> Option<File> {
    File::open("/proc/thread-self/schedstat").ok()
}

/// The kernel measures (`sched_info_on`): a thread that reads this has come to a CPU. What it ran there may not have been counted yet.
pub(crate) fn is_measured() -> bool {
    static MEASURED: LazyLock<bool> = LazyLock::new(|| {
        let own = open_own().and_then(|file| read_schedstat(&file));
        own.is_some_and(|[.., arrivals]| arrivals != 0)
    });
    *MEASURED
}

/// How long this thread has waited for a CPU.
fn own_delay() -> u64 {
    thread_local! {
        static OWN: OnceCell<Option<File>> = const { OnceCell::new() };
    }
    OWN.with(|own| own.get_or_init(open_own).as_ref().and_then(read_schedstat).map_or(0, |[_, waited, _]| waited))
}

/// The client's thread that was seen last, and what it had waited then.
struct ClientThread {
    id: u32,
    schedstat: File,
    waited: u64,
    /// How often it had come to a CPU.
    arrivals: u64,
    /// See [`StealTime::forgive`].
    forgiven: bool,
}

/// So often a thread comes to a CPU for an ioctl that another answers: into its sleep, where the other was faster, and out of it.
const OF_AN_IOCTL: u64 = 2;

/// What the owner of a vCPU keeps of it.
pub(crate) struct StealTime {
    view: View,
    /// The MSR when the page was written last.
    msr: u64,
    /// The page says that the vCPU does not run.
    marked: bool,
    looked: Option<u64>,
    client: Option<ClientThread>,
    /// What this thread had waited at the last look since `KVM_RUN` began.
    own: Option<u64>,
}

impl StealTime {
    /// `view`: guest memory, as the vCPU writes it.
    pub(crate) fn new(view: View) -> Self {
        Self { view, msr: 0, marked: false, looked: None, client: None, own: None }
    }

    /// Guest memory now, as the vCPU writes it.
    pub(crate) fn view(&mut self) -> &View {
        // Nothing here holds a pointer into memory.
        let _ = self.view.refresh();
        &self.view
    }

    /// It is time to look again, which is done now.
    pub(crate) fn is_due(&mut self, now: u64) -> bool {
        let is_due = self.looked.is_none_or(|then| now.saturating_sub(then) >= clock::counts(LOOK_EVERY));
        if is_due {
            self.looked = Some(now);
        }
        is_due
    }

    /// Waiting since the last look, ns.
    pub(crate) fn waited(&mut self, client: &dyn Client) -> u64 {
        let own = own_delay();
        let ours = self.own.replace(own).map_or(0, |before| own.saturating_sub(before));
        let id = client.thread();
        if let Some(thread) = &mut self.client
            && thread.id == id
            && let Some([_, waited, arrivals]) = read_schedstat(&thread.schedstat)
        {
            let forgiven =
                std::mem::take(&mut thread.forgiven) && arrivals.saturating_sub(thread.arrivals) <= OF_AN_IOCTL;
            thread.arrivals = arrivals;
            let before = std::mem::replace(&mut thread.waited, waited);
            return ours + if forgiven { 0 } else { waited.saturating_sub(before) };
        }
        self.client = client.schedstat().and_then(|schedstat| {
            let [_, waited, arrivals] = read_schedstat(&schedstat)?;
            Some(ClientThread { id, schedstat, waited, arrivals, forgiven: false })
        });
        ours
    }

    /// Now an ioctl is under way that begins to count: what its thread waits for this one is none of the guest's, for it would not with
    /// Linux's KVM. Called behind [`Self::waited`].
    pub(crate) fn forgive(&mut self) {
        if let Some(thread) = &mut self.client {
            thread.forgiven = true;
        }
    }

    /// Adds to the page. Nothing is there: nothing happens, as in Linux.
    fn add(&mut self, at: GuestPhysAddr, ns: u64) -> Option<()> {
        let view = self.view();
        let version_at = at.wrapping_add(VERSION_AT);
        let version = view.load_u32(version_at)?;
        // Odd while the time is written.
        let odd = version | 1;
        let odd = if version & 1 != 0 { odd.wrapping_add(2) } else { odd };
        view.write(version_at, &odd.to_le_bytes()).ok()?;
        fence(SeqCst);
        let steal = view.load_u64(at)?.wrapping_add(ns);
        view.write(at, &steal.to_le_bytes()).ok()?;
        fence(SeqCst);
        view.write(version_at, &odd.wrapping_add(1).to_le_bytes()).ok()
    }
}

impl Vcpu {
    /// `KVM_RUN` begins: what this thread did before is nothing to the guest. Each begins the run state of Xen's anew.
    pub(crate) fn begin_steal(&mut self) {
        self.steal.own = None;
        if self.vm.options.xen.is_on() {
            self.steal.looked = None;
        }
    }

    /// Called before each entry: the vCPU runs now.
    pub(crate) fn take_steal(&mut self, client: &dyn Client, now: u64) {
        if self.vm.options.xen.is_on() {
            return self.take_runstate(client, now);
        }
        let msr = self.machine.pv.steal_time.load(Relaxed);
        if msr & ENABLE != 0 {
            self.take_steal_now(client, now, msr);
        }
    }

    fn take_steal_now(&mut self, client: &dyn Client, now: u64, msr: u64) {
        let steal = &mut self.steal;
        let at = GuestPhysAddr(msr & !ENABLE);
        let new = steal.msr != msr;
        let due = steal.is_due(now);
        if new || steal.marked {
            steal.msr = msr;
            steal.marked = false;
            if steal.view().swap_u8(at.wrapping_add(PREEMPTED_AT), 0).is_some_and(|old| old & FLUSH_TLB != 0) {
                self.cpu.flush_tlb();
            }
        }
        if new || due {
            let waited = steal.waited(client);
            let _ = steal.add(at, waited);
        }
    }

    /// The vCPU does not run from now on (`kvm_steal_time_set_preempted`).
    pub(crate) fn mark_preempted(&mut self) {
        let msr = self.machine.pv.steal_time.load(Relaxed);
        let steal = &mut self.steal;
        // A page that the vCPU has not run with yet is left alone.
        if msr & ENABLE != 0 && msr == steal.msr && !steal.marked && !self.vm.options.xen.is_on() {
            let at = GuestPhysAddr(msr & !ENABLE).wrapping_add(PREEMPTED_AT);
            steal.marked = steal.view().write(at, &[PREEMPTED]).is_ok();
        }
    }
}
