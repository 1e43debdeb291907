//! The interpreter: state, decode to traces, handlers, exceptions, VMX exits.
