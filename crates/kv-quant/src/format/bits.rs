//! Bits per code, and how codes are stored in words.

use crate::{Error, Result};

/// Bits per code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Bits {
    /// Codes 0 to 3, 16 per word.
    Two = 2,
    /// Codes 0 to 7: the two lower bits 16 per word, the upper bit 32 per word.
    Three = 3,
    /// Codes 0 to 15, 8 per word.
    Four = 4,
    /// Codes 0 to 255, 4 per word.
    Eight = 8,
}

/// Bits of codes that are stored together in separate words (a bit plane).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plane {
    /// Number of bits.
    pub bits: usize,
    /// Position of the lowest bit in the code.
    pub shift: usize,
}

impl Plane {
    /// Returns the number of codes per 32-bit word.
    pub const fn per_word(self) -> usize {
        32 / self.bits
    }

    /// Returns a mask of the lowest `bits` bits.
    pub const fn mask(self) -> u32 {
        (1 << self.bits) - 1
    }
}

impl Bits {
    /// Returns the number of bits.
    pub const fn count(self) -> usize {
        self as usize
    }

    /// Returns the largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u32 {
        (1 << self as u32) - 1
    }

    /// Returns the bit planes of a code: a single one, unless 32 is not a multiple of the bits.
    pub(crate) const fn planes(self) -> &'static [Plane] {
        match self {
            Self::Two => &[Plane { bits: 2, shift: 0 }],
            Self::Three => &[Plane { bits: 2, shift: 0 }, Plane { bits: 1, shift: 2 }],
            Self::Four => &[Plane { bits: 4, shift: 0 }],
            Self::Eight => &[Plane { bits: 8, shift: 0 }],
        }
    }
}

impl TryFrom<usize> for Bits {
    type Error = Error;

    fn try_from(bits: usize) -> Result<Self> {
        match bits {
            2 => Ok(Self::Two),
            3 => Ok(Self::Three),
            4 => Ok(Self::Four),
            8 => Ok(Self::Eight),
            _ => Err(Error::setting("bits", "2, 3, 4 or 8", bits)),
        }
    }
}
