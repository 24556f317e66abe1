//! Formats: bits, groups, and when tokens are packed.

mod bits;
mod presets;
mod scheme;

pub use bits::Bits;
pub(crate) use bits::Plane;
pub use presets::TurboQuant;
pub use scheme::{Axis, Codes, Float8, Scheme, StaticScale};

use crate::pool::memory::BlockLayout;
use crate::{Error, Result};

/// When tokens are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Flush {
    /// Immediately: no tokens are kept in full precision. Requires keys quantized along
    /// channels.
    Immediate,
    /// Keys and values together, in whole groups of tokens, as soon as at least this many newer
    /// tokens remain in full precision (the residual). With 0, a group is packed when it is
    /// complete.
    ///
    /// The newest packed group also stays in full precision until the next one is packed, so that a
    /// truncation by up to a group of tokens restores the earlier state exactly.
    Rolling(usize),
    /// As in KIVI's published code. Keys are packed all at once, whenever this many are in full
    /// precision. Values are packed one by one; the newest this many stay in full precision.
    Staggered(usize),
    /// Never: everything stays in f16.
    Never,
}

/// The basis in which keys are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum KeyBasis {
    /// Keys are packed as given.
    #[default]
    Given,
    /// Keys are given before the rotary embedding and rotated when they are scored (KVQuant, arXiv
    /// 2401.18079).
    BeforeRope,
}

/// The format of a kv head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    keys: Scheme,
    values: Scheme,
    flush: Flush,
    basis: KeyBasis,
}

impl Format {
    /// Creates a format.
    ///
    /// # Errors
    /// [`Error::Setting`] in these cases:
    ///
    /// - a scheme is inconsistent;
    /// - values are not quantized along channels;
    /// - keys along tokens, or variance-normalized values, have an immediate flush;
    /// - variance-normalized values are not flushed together with keys of the same tile;
    /// - a staggered flush is not a positive multiple of the keys' group.
    pub fn new(keys: Scheme, values: Scheme, flush: Flush) -> Result<Self> {
        let (keys, values) = (keys.checked()?, values.checked()?);
        if values.axis != Axis::Channels {
            return Err(Error::setting("values.axis", "channels", "tokens"));
        }
        if flush == Flush::Immediate && keys.axis == Axis::Tokens {
            let expected = "a flush in whole groups for keys that are quantized along tokens";
            return Err(Error::setting("flush", expected, format!("{flush:?}")));
        }
        let format = Self { keys, values, flush, basis: KeyBasis::Given };
        let together = values.tokens_together();
        if together > 1
            && (together != format.block_tokens() || !matches!(flush, Flush::Rolling(_)))
        {
            let expected = "a rolling flush with keys along tokens in groups of the values' tile";
            return Err(Error::setting("flush", expected, format!("{flush:?}")));
        }
        if let Flush::Staggered(residual) = flush
            && (residual == 0 || !residual.is_multiple_of(format.block_tokens()))
        {
            let expected = format!("a positive multiple of {}", format.block_tokens());
            return Err(Error::setting("residual", expected, residual));
        }
        Ok(format)
    }

    /// Returns the format with another flush.
    #[cfg(all(feature = "candle", feature = "cuda"))]
    pub(crate) fn with_flush(self, flush: Flush) -> Self {
        Self { flush, ..self }
    }

    /// Sets the basis in which keys are given.
    #[must_use]
    pub fn with_key_basis(self, basis: KeyBasis) -> Self {
        Self { basis, ..self }
    }

    /// Returns the format with keys [rotated](Scheme::rotated) before quantization.
    #[must_use]
    pub fn with_rotated_keys(self) -> Self {
        Self { keys: self.keys.rotated(), ..self }
    }

    /// Returns the format with values [rotated](Scheme::rotated) before quantization.
    #[must_use]
    pub fn with_rotated_values(self) -> Self {
        Self { values: self.values.rotated(), ..self }
    }

    /// Returns the basis in which keys are given.
    pub fn key_basis(&self) -> KeyBasis {
        self.basis
    }

    /// Returns the keys' scheme.
    pub fn keys(&self) -> Scheme {
        self.keys
    }

    /// Returns the values' scheme.
    pub fn values(&self) -> Scheme {
        self.values
    }

    /// Returns when tokens are packed.
    pub fn flush(&self) -> Flush {
        self.flush
    }

    /// Returns the number of tokens per block. They are packed, shared and freed together.
    pub fn block_tokens(&self) -> usize {
        match (self.keys.axis, self.keys.codes) {
            (Axis::Tokens, _) => self.keys.group,
            (Axis::Channels, Codes::Asymmetric) => 32,
            // Larger blocks need fewer kernel calls.
            (Axis::Channels, _) => 64,
        }
    }

    /// Returns the number of packed tokens that also stay in full precision.
    pub(crate) fn residual_overlap(&self) -> usize {
        match self.flush {
            Flush::Rolling(_) => self.block_tokens(),
            _ => 0,
        }
    }

    /// Returns the bits per packed number including scales, zero points and factors, over keys of
    /// `head_dim` and values of `value_dim` channels. Tokens in full precision and block tables are
    /// not included.
    ///
    /// # Errors
    /// [`Error::Setting`] if a dimension is 0.
    pub fn bits_per_number(&self, head_dim: usize, value_dim: usize) -> Result<f64> {
        if self.flush == Flush::Never {
            return Ok(16.0);
        }
        let block = BlockLayout::new(self, head_dim, value_dim)?;
        Ok(block.bits() as f64 / (self.block_tokens() * (head_dim + value_dim)) as f64)
    }

    /// Returns how many of the keys and values in full precision are to be packed now.
    pub(crate) fn ready(&self, keys: usize, values: usize) -> (usize, usize) {
        let whole = |n: usize, size: usize| n - n % size;
        match self.flush {
            Flush::Immediate => (keys, values),
            Flush::Never => (0, 0),
            Flush::Rolling(r) => {
                let ready = |n: usize| whole(n.saturating_sub(r), self.block_tokens());
                (ready(keys), ready(values))
            }
            Flush::Staggered(r) => (whole(keys, r), values.saturating_sub(r)),
        }
    }
}
