//! Where interrupts go: the table of `KVM_SET_GSI_ROUTING`, and how a device raises its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::locked;

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    pub address: u64,
    pub data: u32,
}

/// How a device interrupts.
#[derive(Debug)]
pub enum Interrupt {
    /// An irqfd.
    Event(EventFd),
    /// `KVM_IRQ_LINE`, up and down.
    Line(Arc<VmFd>, u32),
}

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        match self {
            Interrupt::Event(event) => event.write(1),
            Interrupt::Line(vm, gsi) => {
                let set = |up| vm.set_irq_line(*gsi, up).map_err(|err| std::io::Error::from_raw_os_error(err.errno()));
                set(true).and_then(|()| set(false))
            }
        }
    }
}

/// The table, for all who change it.
#[derive(Clone)]
pub struct Routes(Arc<Mutex<Table>>);

struct Table {
    vm: Arc<VmFd>,
    /// Interrupt controllers of the kernel's have routes too.
    chip: bool,
    messages: BTreeMap<u32, Msi>,
    /// GSIs whose irqfd is added with their route, as Cloud Hypervisor does it.
    events: BTreeMap<u32, EventFd>,
}

impl Routes {
    /// The table of a VM with all its interrupt controllers in the kernel (`chip`), or its local APICs only.
    pub fn new(vm: &Arc<VmFd>, chip: bool, events: BTreeMap<u32, EventFd>) -> Self {
        Self(Arc::new(Mutex::new(Table { vm: Arc::clone(vm), chip, messages: BTreeMap::new(), events })))
    }

    /// Leads `gsi` to a message, or nowhere.
    pub fn set(&self, gsi: u32, to: Option<Msi>) -> Result<()> {
        let mut table = locked(&self.0);
        let before = match to {
            Some(msi) => table.messages.insert(gsi, msi),
            None => table.messages.remove(&gsi),
        };
        if before == to {
            return Ok(());
        }
        table.apply()?;
        let Some(event) = table.events.get(&gsi) else { return Ok(()) };
        match (before.is_some(), to.is_some()) {
            (false, true) => table.vm.register_irqfd(event, gsi).context("KVM_IRQFD"),
            (true, false) => table.vm.unregister_irqfd(event, gsi).context("KVM_IRQFD, without"),
            _ => Ok(()),
        }
    }

    /// Sets the table as it is.
    pub fn apply(&self) -> Result<()> {
        locked(&self.0).apply()
    }
}

impl Table {
    fn apply(&self) -> Result<()> {
        let mut entries: Vec<kvm_irq_routing_entry> = Vec::new();
        if self.chip {
            // As KVM_CREATE_IRQCHIP has it: n to pin n of the I/O APIC, and of the pair of PICs below 16.
            for gsi in 0..24 {
                if gsi < 16 {
                    let chip = if gsi < 8 { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
                    entries.push(to_chip(gsi, chip, gsi % 8));
                }
                entries.push(to_chip(gsi, KVM_IRQCHIP_IOAPIC, gsi));
            }
        }
        for (gsi, msi) in &self.messages {
            let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let (address_lo, address_hi) = (msi.address as u32, (msi.address >> 32) as u32);
            entry.u.msi = kvm_irq_routing_msi { address_lo, address_hi, data: msi.data, ..Default::default() };
            entries.push(entry);
        }
        let table = KvmIrqRouting::from_entries(&entries).context("routes")?;
        self.vm.set_gsi_routing(&table).context("KVM_SET_GSI_ROUTING")
    }
}

fn to_chip(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}
