//! Two neighbours in one dispatch.
//!
//! A dispatch costs more than most of what it leads to, and in code without a small working set each is mispredicted, so what
//! counts is how few there are. Every first below has a handler with every second; the trace builder gives it to the first
//! where the two are neighbours. Both stay ops of their own: whatever stops, misses or leaves does so at its own.
//!
//! The rows are those that run most in a boot of Debian's kernel, gcc, Python and sorting; rotations and 32-bit sums are of hash functions.

use std::sync::LazyLock;

use super::alu::{self, Add, And, Cmp, Or, Sub, Test, Xor};
use super::branch::{Call, Fused, Jump, Ret64};
use super::mov::{ExtendMem, ExtendReg, Lea, Load, RegImm, RegReg, Sign, Store, StoreImm, Zero};
use super::shift::{self, Ror, Shl, Shr};
use super::stack::{PopReg64, PushReg64};
use crate::decode::trace::Map;
use crate::op::{BaseDisp, BaseIndex, Enter, General, Handler, Semantics, handler, pair as both};

/// What a branch behind it is fused with: comparisons with an immediate, with a register, of memory with an immediate.
type CmpImm<W> = alu::RegImm<Cmp, W, true>;
type CmpReg<W> = alu::RegReg<Cmp, W, true>;
type CmpMem<W> = alu::MemImm<Cmp, W, BaseDisp, true>;
type TestReg<W> = alu::RegReg<Test, W, true>;
type TestImm<W> = alu::RegImm<Test, W, true>;
type TestMem<W> = alu::MemImm<Test, W, BaseDisp, true>;
/// Arithmetic whose flags nobody looks at.
type QuietImm<A, W> = alu::RegImm<A, W, false>;
type QuietReg<A, W> = alu::RegReg<A, W, false>;
type QuietMem<A, W> = alu::RegMem<A, W, BaseDisp, false>;
/// Arithmetic whose flags somebody may look at, if only because what is behind it may fault.
type LoudImm<A, W> = alu::RegImm<A, W, true>;
type LoudReg<A, W> = alu::RegReg<A, W, true>;
/// A shift by an immediate.
type Shift<S, W> = shift::Reg<S, W, false, false>;

macro_rules! table {
    (firsts: $($first:ty,)* ; seconds: $($second:ty,)* ;) => {
        const FIRSTS: &[Handler] = &[$(handler::<$first>),*];
        const SECONDS: &[Handler] = &[$(handler::<$second>),*];
        const fn row<A: Semantics>() -> [Handler; SECONDS.len()] {
            [$(both::<A, $second>),*]
        }
        static BOTH: [[Handler; SECONDS.len()]; FIRSTS.len()] = [$(row::<$first>()),*];
    };
}

table! {
    firsts:
        Enter,
        RegReg<u64>, RegReg<u32>, RegImm<u32>, RegImm<u64>,
        Load<u64, BaseDisp>, Load<u32, BaseDisp>, Load<u64, BaseIndex>, Load<u64, General>,
        Store<u64, BaseDisp>, Store<u32, BaseDisp>, Store<u64, BaseIndex>,
        StoreImm<u32, BaseDisp>, StoreImm<u64, BaseDisp>,
        ExtendMem<Zero, u8, u32, BaseDisp>, ExtendMem<Zero, u16, u32, BaseDisp>, ExtendMem<Sign, u32, u64, BaseDisp>,
        ExtendReg<Zero, u8, u32>, ExtendReg<Sign, u32, u64>,
        Lea<u64, false>, Lea<u64, true>, Lea<u32, false>,
        PushReg64<BaseDisp>, PopReg64<BaseDisp>,
        QuietImm<Add, u64>, QuietImm<Sub, u64>, QuietImm<And, u32>, QuietReg<Add, u64>, QuietReg<Sub, u64>,
        QuietReg<Xor, u32>, QuietReg<Or, u64>, QuietReg<And, u64>,
        LoudImm<Add, u64>, LoudImm<Sub, u64>, LoudReg<Xor, u32>,
        Shift<Shl, u64>, Shift<Shr, u64>,
        QuietReg<Add, u32>, QuietReg<And, u32>, QuietMem<Add, u32>, Shift<Ror, u32>,
    ;
    seconds:
        RegReg<u64>, RegReg<u32>, RegImm<u32>,
        Load<u64, BaseDisp>, Load<u32, BaseDisp>, Load<u64, BaseIndex>, Load<u64, General>,
        Store<u64, BaseDisp>, Store<u32, BaseDisp>, Store<u64, BaseIndex>, StoreImm<u32, BaseDisp>,
        ExtendMem<Zero, u8, u32, BaseDisp>, ExtendReg<Zero, u8, u32>,
        Lea<u64, false>, Lea<u64, true>,
        PushReg64<BaseDisp>, PopReg64<BaseDisp>,
        QuietImm<Add, u64>, QuietImm<And, u32>, QuietReg<Add, u64>, QuietReg<Sub, u64>, QuietReg<Xor, u32>,
        LoudImm<Add, u64>, LoudImm<Sub, u64>, LoudReg<Xor, u32>, LoudReg<Sub, u64>,
        Shift<Shl, u64>, Shift<Shr, u64>,
        QuietReg<Add, u32>, QuietReg<And, u32>, QuietMem<Add, u32>, Shift<Ror, u32>,
        Jump, Call<BaseDisp>, Ret64<BaseDisp>,
        Fused<TestReg<u64>, 4>, Fused<TestReg<u64>, 5>, Fused<TestReg<u32>, 4>, Fused<TestReg<u32>, 5>,
        Fused<TestReg<u8>, 4>, Fused<TestReg<u8>, 5>, Fused<TestImm<u8>, 4>, Fused<TestImm<u8>, 5>,
        Fused<TestMem<u8>, 4>, Fused<TestMem<u8>, 5>,
        Fused<CmpReg<u64>, 2>, Fused<CmpReg<u64>, 3>, Fused<CmpReg<u64>, 4>, Fused<CmpReg<u64>, 5>,
        Fused<CmpImm<u32>, 4>, Fused<CmpImm<u32>, 5>, Fused<CmpImm<u32>, 7>, Fused<CmpImm<u8>, 4>, Fused<CmpImm<u8>, 5>,
        Fused<CmpMem<u32>, 4>, Fused<CmpMem<u8>, 4>, Fused<CmpMem<u8>, 5>,
    ;
}

/// Where a handler is in the two lists.
#[derive(Clone, Copy, Default)]
struct Place {
    first: Option<usize>,
    second: Option<usize>,
}

/// By address.
static PLACES: LazyLock<Map<u64, Place>> = LazyLock::new(|| {
    let mut places = Map::<u64, Place>::default();
    let address = |handler: &Handler| *handler as usize as u64;
    for (i, handler) in FIRSTS.iter().enumerate() {
        places.entry(address(handler)).or_default().first = Some(i);
    }
    for (i, handler) in SECONDS.iter().enumerate() {
        places.entry(address(handler)).or_default().second = Some(i);
    }
    places
});

/// The handler that does an op of `first` and its neighbour of `second`, if there is one.
pub(crate) fn pair(first: Handler, second: Handler) -> Option<Handler> {
    let place = |of: Handler| PLACES.get(&(of as usize as u64));
    Some(BOTH[place(first)?.first?][place(second)?.second?])
}
