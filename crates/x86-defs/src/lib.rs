//! Names that the SDM gives: control bits, MSR numbers, vectors, descriptor and page-entry formats.
