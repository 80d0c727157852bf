//! Where a scenario's decisions come from: a seed, or bytes that a fuzzer thought of.

/// An endless series of decisions.
#[derive(Clone, Debug)]
pub enum Choices {
    /// By chance, the same ones for the same state.
    Seed(u64),
    /// As the bytes say, and 0 when they are used up.
    Bytes {
        /// What is left, last first.
        rest: Vec<u8>,
    },
}

impl Choices {
    /// Returns the decisions that the bytes say.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self::Bytes {
            rest: bytes.iter().rev().copied().collect(),
        }
    }

    /// Returns whether there are no more decisions to take.
    pub fn is_over(&self) -> bool {
        match self {
            Self::Seed(_) => false,
            Self::Bytes { rest } => rest.is_empty(),
        }
    }

    /// Returns any byte.
    pub fn byte(&mut self) -> u8 {
        match self {
            Self::Seed(state) => next(state).to_le_bytes()[7],
            Self::Bytes { rest } => rest.pop().unwrap_or(0),
        }
    }

    /// Returns any 16-bit number.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Returns any 32-bit number.
    pub fn long(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// Returns a number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        let number = if end <= 0x100 {
            self.byte().into()
        } else {
            self.long() as usize
        };
        number % end
    }

    /// Returns whether something happens that happens once in `count` times, and not by default.
    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == count - 1
    }
}

/// SplitMix64.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
