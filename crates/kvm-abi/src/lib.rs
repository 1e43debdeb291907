//! Numbers and layouts of the KVM API of 2007 and of today, no behaviour.
