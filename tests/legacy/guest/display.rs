//! A guest that writes pages as it is told, without ever leaving guest mode by itself.

use iced_x86::code_asm::*;

use super::*;

/// The mailbox between it and the VMM.
pub(crate) mod mailbox {
    use super::at::MAILBOX;
    /// u32: number of the order, written last.
    pub(crate) const ORDER: u64 = MAILBOX;
    /// u32: number of the last order that is done.
    pub(crate) const DONE: u64 = MAILBOX + 4;
    /// u32: addresses in the list; with none the guest ends.
    pub(crate) const COUNT: u64 = MAILBOX + 8;
    /// u32: how often to go through the list, at most.
    pub(crate) const TIMES: u64 = MAILBOX + 12;
    /// u32: 1 to stop before.
    pub(crate) const STOP: u64 = MAILBOX + 16;
    /// u64 each.
    pub(crate) const LIST: u64 = MAILBOX + 0x100;
}

/// Increments the u64 at every address of the list.
pub(crate) fn display() -> Image {
    long(
        |a| {
            let (mut wait, mut round, mut next) = (a.create_label(), a.create_label(), a.create_label());
            let (mut done, mut over) = (a.create_label(), a.create_label());
            a.xor(ebx, ebx)?;
            a.set_label(&mut wait)?;
            a.cmp(dword_ptr(mailbox::ORDER), ebx)?;
            a.je(wait)?;
            a.mov(ebx, dword_ptr(mailbox::ORDER))?;
            a.mov(ebp, dword_ptr(mailbox::TIMES))?;
            a.set_label(&mut round)?;
            a.mov(esi, mailbox::LIST as u32)?;
            a.mov(ecx, dword_ptr(mailbox::COUNT))?;
            a.test(ecx, ecx)?;
            a.jz(over)?;
            a.set_label(&mut next)?;
            a.mov(rdi, qword_ptr(rsi))?;
            a.inc(qword_ptr(rdi))?;
            a.add(rsi, 8)?;
            a.dec(ecx)?;
            a.jnz(next)?;
            a.cmp(dword_ptr(mailbox::STOP), 0)?;
            a.jne(done)?;
            a.dec(ebp)?;
            a.jnz(round)?;
            a.set_label(&mut done)?;
            a.mov(dword_ptr(mailbox::DONE), ebx)?;
            a.jmp(wait)?;
            a.set_label(&mut over)?;
            end(a)
        },
        |_| Ok(()),
    )
}
