//! A display that is redrawn from the dirty log, as QEMU of 2007 did: the frame buffer in slot 1 with logging, two windows
//! into it as aliases at A0000 and A8000, all of it taken away and put back while the guest runs.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;

use super::same;
use crate::abi::MEM_LOG_DIRTY_PAGES;
use crate::guest::{self, mailbox};
use crate::kvmctl::{HOLE, Machine, RAM_END};
use crate::vmm::{Kvm, Ram, Vm};

const PAGE: u64 = 4096;
const SLOT: u32 = 1;
const FRAME_BUFFER: u64 = RAM_END;
const PAGES: u64 = 2048;
/// Pages of each window.
const WINDOW: u64 = 8;
/// Addresses of an order at most.
const MOST: u64 = 64;
/// For an order to be done.
const WITHIN: Duration = Duration::from_secs(60);

pub(crate) fn redrawn(time: Duration) -> Result<()> {
    let mut machine = Machine::new(&Kvm::open()?, &guest::display())?;
    machine.has_bus = true;
    let machine = &machine;
    let lines = machine.run(1, || {
        same!(machine.vm.dirty_log(SLOT, PAGES as usize), Err(Errno::ENOENT), "log of a slot that is not there");
        let mut client = Client::new(machine)?;
        let start = Instant::now();
        let (mut orders, mut polls) = (0, 0);
        while start.elapsed() < time || orders == 0 {
            client.told(20)?;
            orders += 20;
            polls += client.free(Duration::from_millis(100))?;
        }
        println!("display: {orders} orders, and {polls} polls while the guest drew");
        client.order(&[], 1);
        Ok(())
    })?;
    same!(lines, Vec::<String>::new(), "lines");
    Ok(())
}

struct Client<'a> {
    vm: &'a Vm,
    ram: &'a Ram,
    screen: Ram,
    /// First page of the frame buffer that each window shows; `None`: no window.
    windows: [Option<u64>; 2],
    /// What the client has drawn: the counter of each page.
    drawn: Vec<u64>,
    random: u64,
    orders: u32,
}

impl<'a> Client<'a> {
    fn new(machine: &'a Machine) -> Result<Self> {
        let (vm, ram) = (&machine.vm, &machine.ram);
        let screen = create(vm)?;
        let drawn = vec![0; PAGES as usize];
        Ok(Self { vm, ram, screen, windows: [None; 2], drawn, random: 0x9e37_79b9_7f4a_7c15, orders: 0 })
    }

    /// xorshift64: the same run each time.
    fn below(&mut self, end: u64) -> u64 {
        for (left, by) in [(true, 13), (false, 7), (true, 17)] {
            self.random ^= if left { self.random << by } else { self.random >> by };
        }
        (self.random >> 16) % end
    }

    /// Deletes the frame buffer and makes a new one, of zeros.
    fn create_again(&mut self) -> Result<()> {
        self.vm.set_memory_region(SLOT, 0, FRAME_BUFFER, 0).context("deleting the frame buffer")?;
        self.screen = create(self.vm)?;
        self.drawn.fill(0);
        Ok(())
    }

    /// Moves a window, or takes it away.
    fn set_window(&mut self) -> Result<()> {
        let n = self.below(2);
        let to = if self.below(4) == 0 { None } else { Some(self.below(PAGES - WINDOW)) };
        let bytes = if to.is_some() { WINDOW * PAGE } else { 0 };
        let target = FRAME_BUFFER + to.unwrap_or(0) * PAGE;
        self.vm.set_memory_alias(n as u32, window(n), bytes, target).context("KVM_SET_MEMORY_ALIAS")?;
        self.windows[n as usize] = to;
        Ok(())
    }

    /// Pages, and an address for each that leads there now: its own, or one in a window. No page twice.
    fn pages(&mut self) -> Vec<(u64, u64)> {
        let mut taken = BTreeSet::new();
        let mut pages = Vec::new();
        for _ in 0..1 + self.below(MOST) {
            let (n, offset) = (self.below(2), self.below(WINDOW));
            let (through_window, own) = (self.below(2) == 0, self.below(PAGES));
            let (page, address) = match self.windows[n as usize] {
                Some(first) if through_window => (first + offset, window(n) + offset * PAGE),
                _ => (own, FRAME_BUFFER + own * PAGE),
            };
            if taken.insert(page) {
                pages.push((page, address + 8 * self.below(PAGE / 8)));
            }
        }
        pages
    }

    /// Has the guest go through `addresses`, `times` times.
    fn order(&mut self, addresses: &[u64], times: u32) {
        for (n, address) in addresses.iter().enumerate() {
            self.ram.u64(mailbox::LIST + 8 * n as u64).store(*address, Release);
        }
        self.ram.u32(mailbox::COUNT).store(addresses.len() as u32, Release);
        self.ram.u32(mailbox::TIMES).store(times, Release);
        self.ram.u32(mailbox::STOP).store(0, Release);
        self.orders += 1;
        self.ram.u32(mailbox::ORDER).store(self.orders, Release);
    }

    fn done(&self) -> Result<()> {
        let start = Instant::now();
        while self.ram.u32(mailbox::DONE).load(Acquire) != self.orders {
            ensure!(start.elapsed() < WITHIN, "the guest does not follow order {}", self.orders);
            std::thread::yield_now();
        }
        Ok(())
    }

    fn poll(&self) -> Result<Vec<u64>> {
        self.vm.dirty_log(SLOT, PAGES as usize).context("KVM_GET_DIRTY_LOG")
    }

    /// The guest writes, and then the log is looked at: just these pages, and just once.
    fn told(&mut self, orders: u32) -> Result<()> {
        for n in 0..orders {
            match n % 4 {
                0 => self.create_again()?,
                _ => self.set_window()?,
            }
            same!(self.poll()?, [0; 0], "pages dirty before order {}", self.orders + 1);
            let pages = self.pages();
            self.order(&pages.iter().map(|(_, address)| *address).collect::<Vec<_>>(), 1);
            self.done()?;
            let mut expected: Vec<u64> = pages.iter().map(|(page, _)| *page).collect();
            expected.sort_unstable();
            same!(self.poll()?, expected, "pages dirty after order {}", self.orders);
            same!(self.poll()?, [0; 0], "pages dirty still after order {}", self.orders);
            for (page, address) in pages {
                let at = FRAME_BUFFER + page * PAGE + address % PAGE;
                ensure!(self.screen.u64(at).load(Acquire) != 0, "page {page} does not show what was written");
            }
        }
        // Where the guest has written is of no interest any more.
        self.create_again()
    }

    /// The guest draws all the time, while its frame buffer and its windows come and go. What is drawn again after each
    /// poll, and once more at the end, is what is there. How many polls.
    fn free(&mut self, time: Duration) -> Result<u32> {
        let words = |client: &mut Self| {
            let pages = client.pages();
            pages.into_iter().map(|(_, address)| address & !(PAGE - 1)).collect::<Vec<_>>()
        };
        let mut addresses = words(self);
        addresses.extend((0..2).flat_map(|n| (0..WINDOW).map(move |page| window(n) + page * PAGE)));
        addresses.truncate(MOST as usize);
        self.order(&addresses, u32::MAX);
        let start = Instant::now();
        let mut polls = 0;
        while start.elapsed() < time {
            match polls % 8 {
                0 => self.create_again()?,
                3 | 6 => self.set_window()?,
                _ => {}
            }
            self.redraw()?;
            polls += 1;
        }
        self.ram.u32(mailbox::STOP).store(1, Release);
        self.done()?;
        self.redraw()?;
        for page in 0..PAGES {
            let (found, drawn) = (self.screen.u64(FRAME_BUFFER + page * PAGE).load(Acquire), self.drawn[page as usize]);
            if found != drawn {
                bail!("page {page} was written and not reported: {found:#x}, and drawn was {drawn:#x}");
            }
        }
        self.create_again()?;
        Ok(polls)
    }

    fn redraw(&mut self) -> Result<()> {
        for page in self.poll()? {
            self.drawn[page as usize] = self.screen.u64(FRAME_BUFFER + page * PAGE).load(Acquire);
        }
        Ok(())
    }
}

fn window(n: u64) -> u64 {
    HOLE.start + n * WINDOW * PAGE
}

fn create(vm: &Vm) -> Result<Ram> {
    vm.set_memory_region(SLOT, MEM_LOG_DIRTY_PAGES, FRAME_BUFFER, PAGES * PAGE).context("making the frame buffer")?;
    vm.map(FRAME_BUFFER, PAGES * PAGE)
}
