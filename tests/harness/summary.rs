//! What the daemon tells about the VMs that it ran: `softkvm run --summary FILE.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The file's content, summed over all vCPUs of all VMs of the run.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Summary {
    /// Guest instructions retired.
    pub instructions: u64,
    /// Nanoseconds inside `KVM_RUN`, halted time not included.
    pub run_ns: u64,
    /// How often the guest left guest mode, and why.
    pub exits: Exits,
}

/// Counts by name.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Exits {
    /// By VMX basic exit reason (SDM Vol. 3, App. C): what the CPU reported.
    #[serde(default)]
    pub vmx: BTreeMap<String, u64>,
    /// By `kvm_run` exit reason: what the VMM saw.
    #[serde(default)]
    pub kvm_run: BTreeMap<String, u64>,
}

impl Summary {
    /// Reads what `softkvm run --summary` wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read the summary {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no summary of softkvm's", path.display()))
    }

    /// Millions of guest instructions per second of `KVM_RUN`.
    pub fn mips(&self) -> f64 {
        if self.run_ns == 0 { 0.0 } else { self.instructions as f64 * 1e3 / self.run_ns as f64 }
    }

    /// The time inside `KVM_RUN`.
    pub fn run(&self) -> Duration {
        Duration::from_nanos(self.run_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mips_are_instructions_per_microsecond() {
        let text = r#"{"instructions":1000,"run_ns":2000,"exits":{"vmx":{"HLT":3},"kvm_run":{}}}"#;
        let summary: Summary = serde_json::from_str(text).expect("valid JSON");
        assert_eq!(summary.mips(), 500.0);
        assert_eq!(summary.exits.vmx["HLT"], 3);
    }
}
