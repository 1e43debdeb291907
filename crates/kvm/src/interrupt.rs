//! Vectors that user space queued with `KVM_INTERRUPT`.

/// A set of vectors, the lowest of which is delivered first: the queue of 2007. Today's single slot is the core's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct InterruptQueue([u64; 4]);

impl InterruptQueue {
    /// Adds a vector; twice is once.
    pub(crate) fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    /// Takes the lowest vector out.
    pub(crate) fn pop(&mut self) -> Option<u8> {
        let word = self.0.iter().position(|&word| word != 0)?;
        let bit = self.0[word].trailing_zeros();
        self.0[word] &= self.0[word] - 1;
        Some((word as u32 * 64 + bit) as u8)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// `kvm_sregs.interrupt_bitmap`
    pub(crate) fn bitmap(&self) -> [u64; 4] {
        self.0
    }

    pub(crate) fn of_bitmap(bitmap: [u64; 4]) -> Self {
        Self(bitmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_vector_comes_first_and_once() {
        let mut queue = InterruptQueue::default();
        for vector in [255, 32, 64, 32, 63] {
            queue.insert(vector);
        }
        assert_eq!(std::iter::from_fn(|| queue.pop()).collect::<Vec<_>>(), [32, 63, 64, 255]);
        assert!(queue.is_empty());
    }
}
