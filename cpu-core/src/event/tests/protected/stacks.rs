//! Segments that grow downwards, and gates of the 80286. SDM Vol. 3 "Limit Checking" and "Stack Switching".

use super::*;

/// Offsets inside an expand-down segment are those above the limit, up to FFFFH or FFFFFFFFH as D/B says.
#[test]
fn expand_down_segments_end_at_their_limit() {
    const LIMIT: u32 = 0xfff;
    // Big, first offset, bytes, inside.
    let table: &[(bool, u32, u8, bool)] = &[
        (true, 0xfff, 1, false),
        (true, 0x1000, 1, true),
        (true, 0xffd, 4, false),
        (true, 0x1000, 4, true),
        (true, 0xf_ffff, 4, true),
        (false, 0xffff, 1, true),
        (false, 0xffff, 2, false),
        (false, 0xfffe, 2, true),
        (false, 0xfffd, 4, false),
        (false, 0x1_0000, 1, false),
        (false, 0xfff, 2, false),
    ];
    for &(big, offset, bytes, inside) in table {
        for (segment, vector) in [(Seg::Ds, GP), (Seg::Ss, SS)] {
            let mut guest = Guest::new(0, |a| {
                let (byte, word, long) = match segment {
                    Seg::Ds => (byte_ptr(ebx), word_ptr(ebx), dword_ptr(ebx)),
                    _ => (byte_ptr(ebp), word_ptr(ebp), dword_ptr(ebp)),
                };
                match bytes {
                    1 => a.mov(al, byte),
                    2 => a.mov(ax, word),
                    _ => a.mov(eax, long),
                }
                .unwrap();
            });
            let cpu = &mut guest.0.cpu;
            let down = Segment { type_: 7, limit: LIMIT, g: false, db: big, ..cpu.seg[segment as usize] };
            cpu.seg[segment as usize] = down;
            // Frames of 32-bit gates below FFFFH, where both sizes of stack have room.
            cpu.set_reg(Gpr::Rsp, 0x8000);
            cpu.set_reg(Gpr::Rbx, offset.into());
            cpu.set_reg(Gpr::Rbp, offset.into());
            cpu.derive();
            let expected = if inside { Done } else { Event(vector, Some(0), 0) };
            assert_eq!(guest.run(), expected, "{segment:?}, big {big}: {bytes} bytes at {offset:#x}");
        }
    }
}

#[test]
fn a_stack_that_grows_down_has_its_end_below() {
    // PUSH of 4 bytes: to 9000H it fits, to 8FFCH it does not. The frame of #SS needs another stack: level 3.
    for (top, expected) in [(0x9004u64, Done), (0x9000, Event(SS, Some(0), 0))] {
        let mut guest = Guest::new(3, |a| a.push(eax).unwrap());
        let cpu = &mut guest.0.cpu;
        cpu.seg[Seg::Ss as usize] = Segment { type_: 7, limit: 0x8fff, g: false, ..cpu.seg[Seg::Ss as usize] };
        cpu.set_reg(Gpr::Rsp, top);
        cpu.derive();
        assert_eq!(guest.run(), expected);
    }
}

#[test]
fn a_16_bit_call_gate_pushes_words() {
    const TARGET: u64 = 0x1800;
    let mut guest = Guest::new(3, |a| {
        // The gate copies its two parameters as words.
        a.push(0x2222_1111).unwrap();
        a.db(&[0x9a, 0, 0, 0, 0, sel::CALL_GATE as u8, 0]).unwrap();
    });
    let entry = gate(sel::CODE0, TARGET, P | 3 << 5 | u32::from(system::CALL_GATE16), 2);
    guest.0.write(GDT + u64::from(sel::CALL_GATE), &entry.to_le_bytes());
    guest.0.write(TARGET, &[0xcd, DONE]);
    assert_eq!(guest.run(), Done);
    // Above the frame of INT 80H.
    let at = guest.0.cpu.reg(Gpr::Rsp) + 12;
    let words: Vec<u16> = (0..6).map(|i| u16::from_le_bytes(guest.0.read(at + 2 * i))).collect();
    let back = (crate::testing::CODE + 12) as u16;
    assert_eq!(words, [back, sel::CODE3, 0x1111, 0x2222, (STACK - 4) as u16, sel::DATA3]);
    assert_eq!(at, u64::from(INNER_STACK) - 12);
}

#[test]
fn a_16_bit_interrupt_gate_pushes_words() {
    let mut guest = Guest::new(0, |a| a.ud2().unwrap());
    let entry = gate(sel::CODE0, 0x1800, P | u32::from(system::INTERRUPT_GATE16), 0);
    guest.0.write(IDT + 8 * u64::from(UD), &entry.to_le_bytes());
    guest.0.write(0x1800, &[0xcd, DONE]);
    assert_eq!(guest.run(), Done);
    let at = guest.0.cpu.reg(Gpr::Rsp) + 12;
    let words: Vec<u16> = (0..3).map(|i| u16::from_le_bytes(guest.0.read(at + 2 * i))).collect();
    assert_eq!(words, [crate::testing::CODE as u16, sel::CODE0, 2]);
    assert_eq!(at, STACK - 6);
}
