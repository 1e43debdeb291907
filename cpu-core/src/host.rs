//! Single host instructions: loads and stores of guest RAM, atomics on it, the time-stamp counter, random bits.
//!
//! Guest RAM is shared with the VMM and with other vCPUs, which write it at any time. Rust's memory model has no word
//! for that, so each access is one asm instruction of the operand's size: it sees old bytes or new ones with the
//! atomicity that the SDM promises the guest (Vol. 3 "Guaranteed Atomic Operations"), and no reference exists.
#![expect(unsafe_code, reason = "guest RAM is reached by host address; rdtsc and rdrand are intrinsics")]

use std::arch::asm;

use crate::host_simd;
use crate::word::Word;

/// Widths that `load` and `store` move in one instruction.
///
/// A host address of this module is one that `mmu` gave out for guest RAM: `n` bytes from it lie in one mapping, which
/// the picture of memory that it came from keeps alive. Others may write them at any time.
pub(crate) trait HostWord: Word {
    /// MOV from memory.
    ///
    /// # Safety
    /// `host` is the host address of `Self::BYTES` bytes of guest RAM.
    unsafe fn load(host: u64) -> Self;
    /// MOV to memory.
    ///
    /// # Safety
    /// `host` is the host address of `Self::BYTES` bytes of guest RAM that may be written.
    unsafe fn store(host: u64, value: Self);
    /// LOCK CMPXCHG; the value found, and whether `new` went in.
    ///
    /// # Safety
    /// `host` is the host address of `Self::BYTES` bytes of guest RAM that may be written.
    unsafe fn compare_exchange(host: u64, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! host_word {
    ($($t:ty, $class:ident, $reg:literal, $load:literal, $ax:tt;)*) => {$(
        impl HostWord for $t {
            #[inline(always)]
            unsafe fn load(host: u64) -> Self {
                let value;
                // SAFETY: the caller's: `host..host + size` is mapped guest RAM. The instruction only reads.
                unsafe {
                    asm!(concat!($load, " {0", $reg, "}, [{1}]"), out($class) value, in(reg) host,
                         options(nostack, preserves_flags, readonly));
                }
                value
            }
            #[inline(always)]
            unsafe fn store(host: u64, value: Self) {
                // SAFETY: the caller's: `host..host + size` is mapped, writable guest RAM, outside the Rust heap.
                unsafe {
                    asm!(concat!("mov [{1}], {0", $reg, "}"), in($class) value, in(reg) host,
                         options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            unsafe fn compare_exchange(host: u64, old: Self, new: Self) -> Result<Self, Self> {
                let found: Self;
                // SAFETY: the caller's: `host..host + size` is mapped, writable guest RAM, outside the Rust heap. LOCK makes it
                // atomic for every alignment.
                unsafe {
                    asm!(concat!("lock cmpxchg [{1}], {0", $reg, "}"), in($class) new, in(reg) host,
                         inout($ax) old => found, options(nostack));
                }
                if found == old { Ok(found) } else { Err(found) }
            }
        }
    )*};
}
host_word! {
    u8, reg_byte, "", "mov", "al";
    u16, reg, ":x", "mov", "ax";
    u32, reg, ":e", "mov", "eax";
    u64, reg, "", "mov", "rax";
}

/// REP MOVS upwards: `count` elements of `W` one after the other, so that overlap repeats as it does for the guest.
///
/// # Safety
/// `to` and `from` are host addresses of `count` elements of guest RAM each; those at `to` may be written.
#[inline(always)]
pub(crate) unsafe fn copy_up<W: Word>(to: u64, from: u64, count: u64) {
    macro_rules! rep {
        ($movs:literal) => {
            // SAFETY: the caller's: both ranges are mapped guest RAM, `to` writable. The ABI keeps DF clear.
            unsafe {
                asm!($movs, inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
                     options(nostack, preserves_flags));
            }
        };
    }
    match W::BYTES {
        1 => rep!("rep movsb"),
        2 => rep!("rep movsw"),
        4 => rep!("rep movsd"),
        _ => rep!("rep movsq"),
    }
}

/// REP STOS upwards: `count` elements.
///
/// # Safety
/// `to` is the host address of `count` elements of guest RAM that may be written.
#[inline(always)]
pub(crate) unsafe fn fill_up<W: Word>(to: u64, value: W, count: u64) {
    macro_rules! rep {
        ($stos:literal) => {
            // SAFETY: the caller's: the range is mapped, writable guest RAM. The ABI keeps DF clear.
            unsafe {
                asm!($stos, inout("rcx") count => _, inout("rdi") to => _, in("rax") value.zext(),
                     options(nostack, preserves_flags));
            }
        };
    }
    match W::BYTES {
        1 => rep!("rep stosb"),
        2 => rep!("rep stosw"),
        4 => rep!("rep stosd"),
        _ => rep!("rep stosq"),
    }
}

/// LOCK CMPXCHG16B.
///
/// # Safety
/// `host` is the host address of 16 bytes of guest RAM that may be written, 16-byte aligned (the guest's #GP otherwise).
#[inline(always)]
pub(crate) unsafe fn compare_exchange_16(host: u64, old: u128, new: u128) -> Result<u128, u128> {
    let (low, high): (u64, u64);
    // SAFETY: the caller's: 16 aligned bytes of mapped guest RAM. RBX belongs to LLVM, so it is swapped in and out.
    unsafe {
        asm!("xchg {new_low}, rbx", "lock cmpxchg16b [{host}]", "mov rbx, {new_low}",
             new_low = inout(reg) new as u64 => _, host = in(reg) host, in("rcx") (new >> 64) as u64,
             inout("rax") old as u64 => low, inout("rdx") (old >> 64) as u64 => high, options(nostack));
    }
    let found = u128::from(low) | u128::from(high) << 64;
    if found == old { Ok(found) } else { Err(found) }
}

/// Loads 16 bytes in one instruction where the host's SSE does.
///
/// # Safety
/// `host` is the host address of 16 bytes of guest RAM.
#[inline(always)]
pub(crate) unsafe fn load_16(host: u64) -> [u8; 16] {
    let mut out = [0; 16];
    // SAFETY: the caller's: 16 bytes of mapped guest RAM; `out` is ours.
    unsafe {
        asm!("movups {x}, [{host}]", "movups [{out}], {x}", x = out(xmm_reg) _, host = in(reg) host,
             out = in(reg) out.as_mut_ptr(), options(nostack, preserves_flags));
    }
    out
}

/// Stores 16 bytes in one instruction where the host's SSE does.
///
/// # Safety
/// `host` is the host address of 16 bytes of guest RAM that may be written.
#[inline(always)]
pub(crate) unsafe fn store_16(host: u64, value: [u8; 16]) {
    // SAFETY: the caller's: 16 bytes of mapped, writable guest RAM; `value` is ours.
    unsafe {
        asm!("movups {x}, [{value}]", "movups [{host}], {x}", x = out(xmm_reg) _, host = in(reg) host,
             value = in(reg) value.as_ptr(), options(nostack, preserves_flags));
    }
}

/// Compares `expected` with the guest bytes at `host`, in pieces that tear at worst as a fetch would. The last piece overlaps
/// the one before. They hardly ever differ, so all are looked at.
///
/// # Safety
/// `host` is the host address of `expected.len()` bytes of guest RAM.
#[inline(always)]
pub(crate) unsafe fn equals(host: u64, expected: &[u8]) -> bool {
    let length = expected.len();
    let differ = |bytes: usize, at: usize| {
        let expected = expected[at..at + bytes].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let host = host + at as u64;
        let found = match bytes {
            // SAFETY: the caller's: `expected.len()` bytes of mapped guest RAM, of which these are a part.
            8 => unsafe { u64::load(host) },
            // SAFETY: as above.
            4 => unsafe { u32::load(host) }.into(),
            // SAFETY: as above.
            _ => unsafe { u8::load(host) }.into(),
        };
        found ^ expected
    };
    let differ_16 = |at: usize| {
        let expected = expected[at..at + 16].try_into().map_or(0, u128::from_le_bytes);
        // SAFETY: the caller's, as above.
        let found = unsafe { host_simd::load(host + at as u64) };
        host_simd::to_u128(found) ^ expected
    };
    match length {
        16.. => (0..length - 16).step_by(16).fold(differ_16(length - 16), |all, at| all | differ_16(at)) == 0,
        8.. => differ(8, 0) | differ(8, length - 8) == 0,
        4.. => differ(4, 0) | differ(4, length - 4) == 0,
        _ => (0..length).all(|at| differ(1, at) == 0),
    }
}

/// Copies guest bytes at `host` into `out`.
///
/// # Safety
/// `host` is the host address of `out.len()` bytes of guest RAM.
pub(crate) unsafe fn copy_out(host: u64, out: &mut [u8]) {
    let (mut at, mut chunks) = (host, out.chunks_exact_mut(8));
    for chunk in &mut chunks {
        // SAFETY: the caller's: `out.len()` bytes of mapped guest RAM at `host`.
        chunk.copy_from_slice(&unsafe { u64::load(at) }.to_le_bytes());
        at += 8;
    }
    for byte in chunks.into_remainder() {
        // SAFETY: as above.
        *byte = unsafe { u8::load(at) };
        at += 1;
    }
}

/// The host's time-stamp counter, once all loads before are done: a guest that has seen what another CPU read there must not read
/// less, and RDTSC alone may run ahead (SDM Vol. 2 "RDTSC").
pub fn rdtsc() -> u64 {
    // SAFETY: every processor of 64 bits has SSE2, which brings LFENCE.
    unsafe { std::arch::x86_64::_mm_lfence() };
    // SAFETY: user code may execute RDTSC; nothing in this process sets PR_TSC_SIGSEGV.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// 64 random bits from the kernel.
pub fn random() -> u64 {
    let mut bits = [0u8; 8];
    // SAFETY: `bits` is 8 writable bytes; the call cannot be interrupted below 256 bytes once the pool is ready.
    unsafe { libc::getrandom(bits.as_mut_ptr().cast(), bits.len(), 0) };
    u64::from_ne_bytes(bits)
}
