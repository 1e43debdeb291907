//! Copy plans: how an argument travels between the client and a handler, and hence the request's number.
//!
//! A plan's `run` decodes the argument, calls the handler and encodes its answer. `F` is what the handler works on:
//! `&Caller<System>`, `&Caller<Vm>` or `&mut Vcpu`.

use std::cell::Cell;
use std::marker::PhantomData;

use kvm_abi::Plain;
use kvm_abi::request::{NONE, READ, WRITE, ioc};
use nix::errno::Errno;

use crate::client::{Client, Output, Reply};

/// One ioctl on its way to a handler.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    /// The thread that asks.
    pub(crate) client: &'a dyn Client,
    /// Number of the request.
    pub(crate) request: u32,
    /// Third argument of ioctl(2).
    pub(crate) arg: u64,
    /// The bytes at `arg` of a `WRITE` request.
    pub(crate) input: &'a [u8],
}

impl Call<'_> {
    /// The structure at `arg`. The front end fetched it by the request's size, so a mismatch is a front end's mistake,
    /// answered as an unreadable argument.
    fn fetch<T: Plain>(&self) -> Result<T, Errno> {
        T::from_bytes(self.input).ok_or(Errno::EFAULT)
    }
}

/// What a handler returns for ioctl(2) to return.
pub(crate) trait Ret {
    /// The number.
    fn ret(self) -> i32;
}

impl Ret for () {
    fn ret(self) -> i32 {
        0
    }
}

impl Ret for i32 {
    fn ret(self) -> i32 {
        self
    }
}

/// `_IO`: no argument, or one passed by value. The handler also sees the client, for `KVM_RUN` and the creators of files.
pub(crate) struct Value;

impl Value {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(NONE, nr, 0)
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &dyn Client, u64) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        handler(file, call.client, call.arg).map(|r| Reply::ret(r.ret()))
    }
}

/// `_IOW`: a structure in.
pub(crate) struct In<T>(PhantomData<T>);

impl<T: Plain> In<T> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(WRITE, nr, size_of::<T>())
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &T) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        handler(file, &call.fetch()?).map(|r| Reply::ret(r.ret()))
    }
}

/// As [`In`], for a handler that also looks where the structure points to.
pub(crate) struct InAt<T>(PhantomData<T>);

impl<T: Plain> InAt<T> {
    pub(crate) const fn request(nr: u8) -> u32 {
        In::<T>::request(nr)
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &dyn Client, &T) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        handler(file, call.client, &call.fetch()?).map(|r| Reply::ret(r.ret()))
    }
}

/// `_IOR`: a structure out.
pub(crate) struct Out<T>(PhantomData<T>);

impl<T: Plain> Out<T> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(READ, nr, size_of::<T>())
    }

    pub(crate) fn run<F>(file: F, _: &Call<'_>, handler: impl FnOnce(F) -> Result<T, Errno>) -> Result<Reply, Errno> {
        Ok(Reply { ret: 0, output: Output::from_slice(handler(file)?.as_bytes()) })
    }
}

/// A structure in, whose number says `_IOR`: fetched by hand, and handed back as it was.
pub(crate) struct InNumberedOut<T>(PhantomData<T>);

impl<T: Plain> InNumberedOut<T> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(READ, nr, size_of::<T>())
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &T) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        let mut bytes = vec![0; size_of::<T>()];
        call.client.read(call.arg, &mut bytes)?;
        let value = T::from_bytes(&bytes).ok_or(Errno::EFAULT)?;
        let ret = handler(file, &value)?.ret();
        Ok(Reply { ret, output: Output::from_slice(&bytes) })
    }
}

/// `_IOWR`: a structure in and out.
pub(crate) struct InOut<T>(PhantomData<T>);

impl<T: Plain> InOut<T> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(READ | WRITE, nr, size_of::<T>())
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &mut T) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        let mut value = call.fetch()?;
        let ret = handler(file, &mut value)?.ret();
        Ok(Reply { ret, output: Output::from_slice(value.as_bytes()) })
    }
}

/// `_IOW`: a header that starts with a count, and behind it so many entries. `H` gives the header's size.
pub(crate) struct InFam<H, E>(PhantomData<(H, E)>);

impl<H, E: Plain> InFam<H, E> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(WRITE, nr, size_of::<H>())
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &Fam<'_, E>) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        handler(file, &Fam::new::<H>(call)?).map(|r| Reply::ret(r.ret()))
    }
}

/// `_IOWR`: as [`InFam`], and the handler may store entries and the count.
pub(crate) struct InOutFam<H, E>(PhantomData<(H, E)>);

impl<H, E: Plain> InOutFam<H, E> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(READ | WRITE, nr, size_of::<H>())
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, &Fam<'_, E>) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        let fam = Fam::new::<H>(call)?;
        let ret = handler(file, &fam)?.ret();
        let mut output = Output::from_slice(call.input);
        output[..4].copy_from_slice(&fam.count.get().to_le_bytes());
        Ok(Reply { ret, output })
    }
}

/// `_IOW` whose argument may be a null pointer, which means something (`KVM_SET_SIGNAL_MASK`). Fetched by hand.
pub(crate) struct OptionalFam<H, E>(PhantomData<(H, E)>);

impl<H, E: Plain> OptionalFam<H, E> {
    pub(crate) const fn request(nr: u8) -> u32 {
        ioc(WRITE, nr, size_of::<H>())
    }

    pub(crate) fn run<F, R: Ret>(
        file: F,
        call: &Call<'_>,
        handler: impl FnOnce(F, Option<&Fam<'_, E>>) -> Result<R, Errno>,
    ) -> Result<Reply, Errno> {
        let ret = match call.arg {
            0 => handler(file, None),
            _ => handler(file, Some(&Fam::new::<H>(call)?)),
        };
        ret.map(|r| Reply::ret(r.ret()))
    }
}

/// The entries behind a counted header, in client memory.
pub(crate) struct Fam<'a, E> {
    client: &'a dyn Client,
    header: u64,
    entries: u64,
    count: Cell<u32>,
    entry: PhantomData<E>,
}

impl<'a, E: Plain> Fam<'a, E> {
    fn new<H>(call: &Call<'a>) -> Result<Self, Errno> {
        let (Some(count), true) = (call.input.first_chunk(), call.input.len() == size_of::<H>()) else {
            return Err(Errno::EFAULT);
        };
        Ok(Self {
            client: call.client,
            header: call.arg,
            entries: call.arg.wrapping_add(size_of::<H>() as u64),
            count: Cell::new(u32::from_le_bytes(*count)),
            entry: PhantomData,
        })
    }

    /// Whose memory they are in.
    pub(crate) fn client(&self) -> &'a dyn Client {
        self.client
    }

    /// The count as the client gave it, or as [`Self::set_count`] left it.
    pub(crate) fn count(&self) -> u32 {
        self.count.get()
    }

    /// A word of the header behind the count.
    pub(crate) fn header_word(&self, index: u64) -> Result<u32, Errno> {
        let mut word = [0; 4];
        self.client.read(self.header.wrapping_add(4 * index), &mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Stores another count, at once: the client sees it even if the ioctl then fails.
    pub(crate) fn set_count(&self, count: u32) -> Result<(), Errno> {
        self.count.set(count);
        self.client.write(self.header, &count.to_le_bytes())
    }

    /// The entries. The handler has bounded the count.
    pub(crate) fn read(&self) -> Result<Vec<E>, Errno> {
        let mut bytes = vec![0; self.count() as usize * size_of::<E>()];
        if !bytes.is_empty() {
            self.client.read(self.entries, &mut bytes)?;
        }
        Ok(bytes.chunks_exact(size_of::<E>()).filter_map(E::from_bytes).collect())
    }

    /// Stores entries from the first on.
    pub(crate) fn write(&self, entries: &[E]) -> Result<(), Errno> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.as_bytes()).copied().collect();
        if bytes.is_empty() { Ok(()) } else { self.client.write(self.entries, &bytes) }
    }
}
