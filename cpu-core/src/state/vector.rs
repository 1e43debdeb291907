//! x87, MMX, SSE and wider vector state.

/// Size of the legacy region of an XSAVE image, which is an FXSAVE image.
pub const XSAVE_LEGACY_BYTES: usize = 512;

/// One vector register, wide enough for ZMM; XMM is bytes 0 to 15, YMM bytes 0 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct VectorRegister(pub [u8; 64]);

impl Default for VectorRegister {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// x87 and vector registers. `st` is indexed by physical register, not by distance from TOP.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Fpu {
    /// XMM/YMM/ZMM0 to 31; what lies above 15 is EVEX's alone.
    pub vector: [VectorRegister; 32],
    /// R0 to R7: 80-bit values in the low 10 bytes, the rest zero; MMn is the low 8 bytes of Rn.
    pub st: [[u8; 16]; 8],
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word, TOP in bits 13:11.
    pub fsw: u16,
    /// Abridged tag word: bit n set when Rn is not empty (FXSAVE's FTW).
    pub ftw: u8,
    /// Last x87 opcode, 11 bits.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 operand pointer.
    pub fdp: u64,
    /// Selector of `fip`, for the 16- and 32-bit save forms.
    pub fcs: u16,
    /// Selector of `fdp`.
    pub fds: u16,
    /// SSE control and status.
    pub mxcsr: u32,
    /// XCR0.
    pub xcr0: u64,
    /// PKRU: two bits a protection key, access disable and write disable.
    pub pkru: u32,
    /// Opmask registers k0 to k7.
    pub k: [u64; 8],
}

impl Default for Fpu {
    /// SDM Vol. 3 "Processor State After Reset", as FNINIT leaves the x87 part.
    fn default() -> Self {
        Self {
            vector: [VectorRegister::default(); 32],
            st: [[0; 16]; 8],
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            fcs: 0,
            fds: 0,
            mxcsr: 0x1f80,
            xcr0: 1,
            pkru: 0,
            k: [0; 8],
        }
    }
}

impl Fpu {
    /// Physical register behind ST(i).
    pub fn physical(&self, i: u8) -> usize {
        usize::from((self.top() + i) & 7)
    }

    /// TOP of stack, 0 to 7.
    pub fn top(&self) -> u8 {
        (self.fsw >> 11) as u8 & 7
    }

    /// The 512 bytes that FXSAVE64 stores (SDM Vol. 1 "Layout of the 64-bit mode FXSAVE map, REX.W=1"); MXCSR_MASK is `mask`.
    pub fn to_fxsave(&self, mask: u32) -> [u8; XSAVE_LEGACY_BYTES] {
        let mut image = [0; XSAVE_LEGACY_BYTES];
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4] = self.ftw;
        image[6..8].copy_from_slice(&self.fop.to_le_bytes());
        image[8..16].copy_from_slice(&self.fip.to_le_bytes());
        image[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&mask.to_le_bytes());
        for i in 0..8 {
            image[32 + 16 * i..][..10].copy_from_slice(&self.st[self.physical(i as u8)][..10]);
        }
        for (i, register) in self.vector[..16].iter().enumerate() {
            image[160 + 16 * i..][..16].copy_from_slice(&register.0[..16]);
        }
        image
    }

    /// Loads what [`Self::to_fxsave`] stored; the caller has checked MXCSR's reserved bits.
    pub fn load_fxsave(&mut self, image: &[u8; XSAVE_LEGACY_BYTES]) {
        let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let qword = |at: usize| u64::from(dword(at)) | u64::from(dword(at + 4)) << 32;
        self.fcw = word(0);
        self.fsw = word(2);
        self.ftw = image[4];
        self.fop = word(6) & 0x7ff;
        self.fip = qword(8);
        self.fdp = qword(16);
        self.mxcsr = dword(24);
        for i in 0..8 {
            let register = self.physical(i as u8);
            self.st[register] = [0; 16];
            self.st[register][..10].copy_from_slice(&image[32 + 16 * i..][..10]);
        }
        for (i, register) in self.vector[..16].iter_mut().enumerate() {
            register.0[..16].copy_from_slice(&image[160 + 16 * i..][..16]);
        }
    }
}
