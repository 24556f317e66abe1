//! What is packed how: bits, groups, and when tokens leave full precision.

use crate::{Error, Result};

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Codes 0 to 3, 16 in a word.
    Two = 2,
    /// Codes 0 to 7: the two lower bits 16 in a word, the upper bit 32 in a word.
    Three = 3,
    /// Codes 0 to 15, 8 in a word.
    Four = 4,
    /// Codes 0 to 255, 4 in a word.
    Eight = 8,
}

/// Bits of codes that lie together in words of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plane {
    /// How many.
    pub bits: usize,
    /// The lowest one's place in the code.
    pub shift: usize,
}

impl Plane {
    /// Codes in a 32-bit word.
    pub const fn per_word(self) -> usize {
        32 / self.bits
    }

    /// The bits set, at the bottom.
    pub const fn mask(self) -> u32 {
        (1 << self.bits) - 1
    }
}

impl Bits {
    /// The number.
    pub const fn count(self) -> usize {
        self as usize
    }

    /// The largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u32 {
        (1 << self as u32) - 1
    }

    /// The planes that codes are split into: one, unless 32 is no multiple of the bits.
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

/// A direction in a matrix of tokens (rows) and channels (columns).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// From token to token: down a column.
    Tokens,
    /// From channel to channel: along a row.
    Channels,
}

/// How a matrix is quantized: groups of `group` numbers along an axis share a scale and a zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// Bits of a code.
    pub bits: Bits,
    /// Where a group's numbers follow each other. [`Axis::Tokens`] is KIVI's "per channel", [`Axis::Channels`] "per token".
    pub along: Axis,
    /// Numbers of a group: 32, 64 or 128. The last group of a line may be shorter.
    pub group: usize,
}

impl Scheme {
    /// Checks the group.
    ///
    /// # Errors
    /// [`Error::Setting`] unless it is 32, 64 or 128.
    pub fn new(bits: Bits, along: Axis, group: usize) -> Result<Self> {
        match group {
            32 | 64 | 128 => Ok(Self { bits, along, group }),
            _ => Err(Error::setting("group", "32, 64 or 128", group)),
        }
    }
}

/// When tokens leave full precision and are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flush {
    /// At once: nothing is kept in full precision. Needs keys quantized along channels.
    Immediate,
    /// Keys and values together, in whole groups of tokens, as soon as at least so many newer tokens
    /// remain in full precision. With 0, a group leaves once it is complete.
    ///
    /// The newest packed group stays in full precision, too, until the next one is packed, so that
    /// a sequence can be truncated by up to a group of tokens and be as if it had never had them.
    Rolling(usize),
    /// As KIVI's published code does: keys all at once, whenever there are so many in full
    /// precision; values one by one, the newest so many staying.
    Staggered(usize),
    /// Never: everything stays in f16.
    Never,
}

/// What keys are turned into before they are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KeyBasis {
    /// Nothing: they are packed as they come.
    #[default]
    Given,
    /// Their Walsh-Hadamard transform, which spreads a channel's outliers over all channels (QuaRot, arXiv 2404.00456). Queries are transformed
    /// too, so that scores stay the same.
    Hadamard,
    /// They come as they are before the rotary embedding, and are rotated while they are scored (KVQuant, arXiv 2401.18079).
    BeforeRope,
}

/// How a kv head is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    keys: Scheme,
    values: Scheme,
    flush: Flush,
    basis: KeyBasis,
}

impl Format {
    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// [`Error::Setting`] if values are not quantized along channels, if keys along tokens should be
    /// flushed at once, or if a staggered flush is not of a positive multiple of the keys' group.
    pub fn new(keys: Scheme, values: Scheme, flush: Flush) -> Result<Self> {
        let keys = Scheme::new(keys.bits, keys.along, keys.group)?;
        let values = Scheme::new(values.bits, values.along, values.group)?;
        if values.along != Axis::Channels {
            return Err(Error::setting("values.along", "channels", "tokens"));
        }
        if flush == Flush::Immediate && keys.along == Axis::Tokens {
            let expected = "a flush in whole groups for keys that are quantized along tokens";
            return Err(Error::setting("flush", expected, "an immediate one"));
        }
        let format = Self { keys, values, flush, basis: KeyBasis::Given };
        if let Flush::Staggered(residual) = flush
            && (residual == 0 || !residual.is_multiple_of(format.chunk()))
        {
            let expected = format!("a positive multiple of {}", format.chunk());
            return Err(Error::setting("residual", expected, residual));
        }
        Ok(format)
    }

    /// KIVI (arXiv 2402.02750): keys along tokens, values along channels, the newest `residual` tokens in full precision.
    ///
    /// # Errors
    /// As [`Format::new`].
    pub fn kivi(key_bits: Bits, value_bits: Bits, group: usize, residual: usize) -> Result<Self> {
        Self::new(
            Scheme::new(key_bits, Axis::Tokens, group)?,
            Scheme::new(value_bits, Axis::Channels, group)?,
            Flush::Staggered(residual),
        )
    }

    /// [`kivi`](Self::kivi) with a [rolling](Flush::Rolling) flush: at least the newest `residual`
    /// keys, too, are in full precision, and tokens can be rolled back.
    ///
    /// # Errors
    /// As [`Format::new`].
    pub fn kivi_rolling(
        key_bits: Bits,
        value_bits: Bits,
        group: usize,
        residual: usize,
    ) -> Result<Self> {
        Self::new(
            Scheme::new(key_bits, Axis::Tokens, group)?,
            Scheme::new(value_bits, Axis::Channels, group)?,
            Flush::Rolling(residual),
        )
    }

    /// FlexGen's (arXiv 2303.06865), as the paper's benchmark has it: keys and values along channels, nothing kept in full precision.
    ///
    /// # Errors
    /// As [`Format::new`].
    pub fn flexgen(key_bits: Bits, value_bits: Bits, group: usize) -> Result<Self> {
        Self::new(
            Scheme::new(key_bits, Axis::Channels, group)?,
            Scheme::new(value_bits, Axis::Channels, group)?,
            Flush::Immediate,
        )
    }

    /// Everything in f16: what sinks lie in, and what others are compared with.
    pub fn f16() -> Self {
        let scheme = Scheme { bits: Bits::Eight, along: Axis::Channels, group: 32 };
        Self { keys: scheme, values: scheme, flush: Flush::Never, basis: KeyBasis::Given }
    }

    /// The same with keys packed in another basis.
    pub fn with_basis(self, basis: KeyBasis) -> Self {
        Self { basis, ..self }
    }

    /// What keys are turned into before they are packed.
    pub fn basis(&self) -> KeyBasis {
        self.basis
    }

    /// The keys' scheme.
    pub fn keys(&self) -> Scheme {
        self.keys
    }

    /// The values' scheme.
    pub fn values(&self) -> Scheme {
        self.values
    }

    /// When tokens are packed.
    pub fn flush(&self) -> Flush {
        self.flush
    }

    /// Tokens of a block: they are packed, shared and freed together.
    pub(crate) fn chunk(&self) -> usize {
        match self.keys.along {
            Axis::Tokens => self.keys.group,
            Axis::Channels => 32,
        }
    }

    /// Packed tokens that stay in full precision, too.
    pub(crate) fn overlap(&self) -> usize {
        match self.flush {
            Flush::Rolling(_) => self.chunk(),
            _ => 0,
        }
    }

    /// Of so many keys and values in full precision, how many are to be packed now.
    pub(crate) fn ready(&self, keys: usize, values: usize) -> (usize, usize) {
        let whole = |n: usize, size: usize| n - n % size;
        match self.flush {
            Flush::Immediate => (keys, values),
            Flush::Never => (0, 0),
            Flush::Rolling(r) => {
                let ready = |n: usize| whole(n.saturating_sub(r), self.chunk());
                (ready(keys), ready(values))
            }
            Flush::Staggered(r) => (whole(keys, r), values.saturating_sub(r)),
        }
    }
}
