//! Formats: bits, groups, and when tokens are packed.

use crate::pool::memory::BlockLayout;
use crate::{Error, Result};

/// Bits per code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

/// An axis of a matrix of tokens (rows) and channels (columns).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Along a column, from token to token.
    Tokens,
    /// Along a row, from channel to channel.
    Channels,
}

/// How a matrix is quantized: the codes, and the groups that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// Bits per code.
    pub bits: Bits,
    /// The axis along which the numbers of a group are adjacent. [`Axis::Tokens`] is KIVI's "per
    /// channel", [`Axis::Channels`] "per token".
    pub axis: Axis,
    /// Numbers per group: 32, 64 or 128; along channels also 256. The last group of a row or column
    /// may be shorter.
    pub group: usize,
    /// The meaning of a code.
    pub codes: Codes,
    /// Whether each row is multiplied by the orthonormal Walsh-Hadamard matrix before quantization,
    /// in blocks of the largest power of two that divides its length. The rotation spreads the
    /// outliers of a channel over all channels (QuaRot, arXiv 2404.00456).
    pub rotated: bool,
}

impl Scheme {
    /// The group size with which a head of up to 256 channels has one scale per token.
    pub const PER_TOKEN: usize = 256;

    /// Asymmetric integers, as in KIVI.
    ///
    /// # Errors
    /// [`Error::Setting`] unless the group is 32, 64, 128, or, along channels, 256.
    pub fn new(bits: Bits, axis: Axis, group: usize) -> Result<Self> {
        let scheme = Self { bits, axis, group, codes: Codes::Asymmetric, rotated: false };
        scheme.checked()
    }

    /// Symmetric integers along channels.
    ///
    /// # Errors
    /// [`Error::Setting`] unless the group is 32, 64, 128 or 256.
    pub fn symmetric(bits: Bits, group: usize) -> Result<Self> {
        Self::along_channels(bits, Codes::Symmetric, group).checked()
    }

    /// 8-bit floating-point numbers with a scale per token or, if given, one static scale.
    pub fn float8(kind: Float8, scale: Option<StaticScale>) -> Self {
        Self::along_channels(Bits::Eight, Codes::Float8 { kind, scale }, Self::PER_TOKEN)
    }

    /// TurboQuant's keys (arXiv 2504.19874, vLLM): rotated, with a norm per token and Lloyd-Max
    /// levels.
    ///
    /// # Errors
    /// [`Error::Setting`] for 8 bits.
    pub fn lloyd_max(bits: Bits, norm_correction: bool) -> Result<Self> {
        let codes = Codes::LloydMax { norm_correction };
        Self::along_channels(bits, codes, Self::PER_TOKEN).rotated().checked()
    }

    /// The values of vLLM's TurboQuant: asymmetric integers with a scale and a zero point per
    /// token, in f32 arithmetic.
    pub fn uniform(bits: Bits) -> Self {
        Self::along_channels(bits, Codes::Uniform, Self::PER_TOKEN)
    }

    /// KVarN's codes (arXiv 2606.03458): rotated, with variance normalisation over tiles of `tile`
    /// tokens. Keys are quantized along tokens, values along channels.
    ///
    /// # Errors
    /// [`Error::Setting`] unless the tile is 32, 64 or 128.
    pub fn variance_normalized(bits: Bits, axis: Axis, tile: usize) -> Result<Self> {
        let group = match axis {
            Axis::Tokens => tile,
            Axis::Channels => Self::PER_TOKEN,
        };
        let codes = Codes::VarianceNormalized { tile };
        Self { bits, axis, group, codes, rotated: true }.checked()
    }

    fn along_channels(bits: Bits, codes: Codes, group: usize) -> Self {
        Self { bits, axis: Axis::Channels, group, codes, rotated: false }
    }

    /// Returns the scheme with rows [rotated](Self::rotated) before quantization.
    #[must_use]
    pub fn rotated(self) -> Self {
        Self { rotated: true, ..self }
    }

    /// Checks that the fields are consistent.
    pub(crate) fn checked(self) -> Result<Self> {
        let (tokens, group) = (self.axis == Axis::Tokens, self.group);
        if !matches!(group, 32 | 64 | 128) && (group != Self::PER_TOKEN || tokens) {
            return Err(Error::setting("group", "32, 64, 128, or 256 along channels", group));
        }
        let eight = self.bits == Bits::Eight;
        match self.codes {
            Codes::Asymmetric | Codes::Uniform => {}
            Codes::Symmetric | Codes::Float8 { .. } | Codes::LloydMax { .. } if tokens => {
                return Err(Error::setting("axis", "channels for these codes", "tokens"));
            }
            Codes::Symmetric => {}
            Codes::Float8 { .. } if !eight => {
                return Err(Error::setting(
                    "bits",
                    "8 for floating-point codes",
                    self.bits.count(),
                ));
            }
            Codes::Float8 { .. } => {}
            Codes::LloydMax { .. } if eight => {
                return Err(Error::setting("bits", "2, 3 or 4 for Lloyd-Max levels", 8));
            }
            Codes::LloydMax { .. } => {}
            Codes::VarianceNormalized { tile } => {
                if !matches!(tile, 32 | 64 | 128) || tokens && group != tile {
                    let expected = "32, 64 or 128, which keys have as their group";
                    return Err(Error::setting("tile", expected, tile));
                }
            }
        }
        Ok(self)
    }

    /// Returns the number of tokens that are quantized together.
    pub(crate) fn tokens_together(self) -> usize {
        match (self.codes, self.axis) {
            (Codes::VarianceNormalized { tile }, _) => tile,
            (_, Axis::Tokens) => self.group,
            (_, Axis::Channels) => 1,
        }
    }

    /// Returns whether groups have their own scales.
    pub(crate) fn has_scales(self) -> bool {
        !matches!(self.codes, Codes::Float8 { scale: Some(_), .. })
    }

    /// Returns whether groups have zero points.
    pub(crate) fn has_zero_points(self) -> bool {
        matches!(self.codes, Codes::Asymmetric | Codes::Uniform | Codes::VarianceNormalized { .. })
    }
}

/// The meaning of a code: x' = level * scale + zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Integers from the group's minimum, its zero point, to its maximum. The arithmetic is that of
    /// KIVI's published functions on f16 tensors.
    Asymmetric,
    /// The same in f32 arithmetic, rounding half up: the values of vLLM's TurboQuant.
    Uniform,
    /// Integers from -2^(bits - 1) to 2^(bits - 1) - 1, without a zero point. The number with the
    /// largest magnitude is mapped to the lowest integer, as in GGML's `q4_0`, so the scale may be
    /// negative.
    Symmetric,
    /// 8-bit floating-point numbers.
    Float8 {
        /// Their format.
        kind: Float8,
        /// The scale of all numbers. `None`: a scale per group, its largest magnitude divided by
        /// the format's.
        scale: Option<StaticScale>,
    },
    /// The levels that quantize a normal distribution with the least mean squared error
    /// (Lloyd-Max), scaled by the group's norm.
    LloydMax {
        /// Whether the scale is corrected for the difference between the norms of the group and of
        /// its levels.
        norm_correction: bool,
    },
    /// Asymmetric integers of a tile whose rows and columns have been divided by factors that
    /// equalize their variances. The factors of one axis are part of the scales and zero points;
    /// those of the other axis are stored separately.
    VarianceNormalized {
        /// Tokens per tile.
        tile: usize,
    },
}

/// A format of 8-bit floating-point numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Float8 {
    /// 4 bits of exponent, 3 of mantissa, up to ±448, no infinity: PyTorch's `float8_e4m3fn`.
    E4m3,
    /// 5 bits of exponent, 2 of mantissa, up to ±57344: PyTorch's `float8_e5m2`.
    E5m2,
}

impl Float8 {
    /// Returns the largest finite number.
    pub const fn max(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::E5m2 => 57344.0,
        }
    }
}

/// A scale for all numbers, such as `k_scale` of a checkpoint: positive and finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StaticScale(u32);

impl StaticScale {
    /// The scale 1, for numbers that are stored unchanged.
    pub const ONE: Self = Self(1f32.to_bits());

    /// Creates a scale.
    ///
    /// # Errors
    /// [`Error::Setting`] unless it is between 2^-24 and 2^16.
    pub fn new(scale: f32) -> Result<Self> {
        match (2f32.powi(-24)..=65536.0).contains(&scale) {
            true => Ok(Self(scale.to_bits())),
            false => Err(Error::setting("scale", "one between 2^-24 and 2^16", scale)),
        }
    }

    /// Returns the scale as a number.
    pub const fn get(self) -> f32 {
        f32::from_bits(self.0)
    }
}

/// vLLM's presets of TurboQuant. They keep the first and last two layers in full precision; the
/// caller has to do this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TurboQuant {
    /// Keys in fp8 e4m3 with scale 1, values at 4 bits.
    K8V4,
    /// Keys with 16 Lloyd-Max levels and norm correction, values at 4 bits.
    FourBitNc,
    /// Keys with 8 levels and norm correction, values at 4 bits.
    K3V4Nc,
    /// Keys with 8 levels and norm correction, values at 3 bits.
    ThreeBitNc,
}

/// When tokens are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
            return Err(Error::setting("flush", expected, "an immediate one"));
        }
        let format = Self { keys, values, flush, basis: KeyBasis::Given };
        let together = values.tokens_together();
        if together > 1
            && (together != format.block_tokens() || !matches!(flush, Flush::Rolling(_)))
        {
            let expected = "a rolling flush with keys along tokens in groups of the values' tile";
            return Err(Error::setting("flush", expected, "another"));
        }
        if let Flush::Staggered(residual) = flush
            && (residual == 0 || !residual.is_multiple_of(format.block_tokens()))
        {
            let expected = format!("a positive multiple of {}", format.block_tokens());
            return Err(Error::setting("residual", expected, residual));
        }
        Ok(format)
    }

    /// Returns the format with the lowest measured loss among those with at most `bits` bits per
    /// packed number, for heads of `head_dim` channels.
    ///
    /// The loss is the increase of perplexity over f16, the larger of SmolLM2-135M-Instruct's and
    /// Gemma 3 270M's, because formats rank differently on the two. The table is from
    /// `docs/kv-quality.md` in the repository.
    ///
    /// | format | bits, 128 channels | SmolLM2 | Gemma 3 |
    /// |---|---|---|---|
    /// | KIVI, 8 bits | 9 | -0.01 % | +0.08 % |
    /// | fp8 e4m3 | 8.13 | +0.20 % | +0.19 % |
    /// | KIVI, 4 bits | 5 | +0.30 % | +0.06 % |
    /// | rotated, 4 bits, 128 newest tokens in f16 | 4.13 | +0.12 % | +1.97 % |
    /// | KIVI, 2 bits | 3 | +24.4 % | +10.4 % |
    ///
    /// Keeping 4 attention sinks in f16 (`QuantCache::with_sinks`) lowers the loss further, at 2
    /// bits to 9.6 % and 9.5 %.
    ///
    /// ```
    /// use kv_quant::{Bits, Format};
    ///
    /// let format = Format::for_bits_per_number(5.5, 128)?;
    /// assert_eq!(format, Format::kivi(Bits::Four, Bits::Four, 32, 128)?);
    /// # Ok::<(), kv_quant::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Setting`] if no measured format has so few bits, or `head_dim` is 0.
    pub fn for_bits_per_number(bits: f64, head_dim: usize) -> Result<Self> {
        let rotated = Self::rotated_symmetric(Bits::Four, Bits::Four);
        let by_loss = [
            Self::kivi(Bits::Eight, Bits::Eight, 32, 128)?,
            Self::float8(Float8::E4m3),
            Self::kivi(Bits::Four, Bits::Four, 32, 128)?,
            Self::new(rotated.keys, rotated.values, Flush::Rolling(128))?,
            Self::kivi(Bits::Two, Bits::Two, 32, 128)?,
        ];
        let mut min_bits = f64::INFINITY;
        for format in by_loss {
            let own = format.bits_per_number(head_dim, head_dim)?;
            if own <= bits {
                return Ok(format);
            }
            min_bits = min_bits.min(own);
        }
        Err(Error::setting("bits per number", format!("at least {min_bits}"), bits))
    }

    /// KIVI (arXiv 2402.02750): keys along tokens, values along channels, the newest `residual`
    /// tokens in full precision.
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
    /// keys are also in full precision, and tokens can be rolled back.
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

    /// FlexGen (arXiv 2303.06865) as in the paper's benchmark: keys and values along channels,
    /// nothing kept in full precision.
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

    /// fp8 with a scale per token and head. No tokens are kept in full precision.
    pub fn float8(kind: Float8) -> Self {
        let scheme = Scheme::float8(kind, None);
        Self::immediate(scheme, scheme)
    }

    /// fp8 with one scale for all keys and one for all values: the `k_scale` and `v_scale` of
    /// checkpoints. Numbers beyond the format's range times the scale saturate.
    pub fn float8_static(kind: Float8, keys: StaticScale, values: StaticScale) -> Self {
        let of = |scale| Scheme::float8(kind, Some(scale));
        Self::immediate(of(keys), of(values))
    }

    /// [Symmetric](Codes::Symmetric) integers with a scale per token, after a Hadamard rotation of
    /// keys and values. No tokens are kept in full precision.
    pub fn rotated_symmetric(key_bits: Bits, value_bits: Bits) -> Self {
        let of = |bits| {
            let codes = Codes::Symmetric;
            Scheme::along_channels(bits, codes, Scheme::PER_TOKEN).rotated()
        };
        Self::immediate(of(key_bits), of(value_bits))
    }

    /// [Asymmetric](Codes::Asymmetric) integers with a scale and a zero point per token, after a
    /// Hadamard rotation of keys and values. No tokens are kept in full precision.
    pub fn rotated_asymmetric(key_bits: Bits, value_bits: Bits) -> Self {
        let of = |bits| {
            let codes = Codes::Asymmetric;
            Scheme::along_channels(bits, codes, Scheme::PER_TOKEN).rotated()
        };
        Self::immediate(of(key_bits), of(value_bits))
    }

    /// TurboQuant (arXiv 2504.19874) as in vLLM. No tokens are kept in full precision.
    pub fn turboquant(preset: TurboQuant) -> Self {
        let levels = |bits| {
            let codes = Codes::LloydMax { norm_correction: true };
            Scheme::along_channels(bits, codes, Scheme::PER_TOKEN).rotated()
        };
        let (keys, value_bits) = match preset {
            TurboQuant::K8V4 => (Scheme::float8(Float8::E4m3, Some(StaticScale::ONE)), Bits::Four),
            TurboQuant::FourBitNc => (levels(Bits::Four), Bits::Four),
            TurboQuant::K3V4Nc => (levels(Bits::Three), Bits::Four),
            TurboQuant::ThreeBitNc => (levels(Bits::Three), Bits::Three),
        };
        Self::immediate(keys, Scheme::uniform(value_bits))
    }

    /// KVarN (arXiv 2606.03458): variance-normalized tiles of `tile` tokens, with the newest
    /// tokens, up to a tile, in full precision. The published code also keeps each sequence's first
    /// 128 tokens in f16, as sinks.
    ///
    /// # Errors
    /// [`Error::Setting`] unless the tile is 32, 64 or 128.
    pub fn kvarn(key_bits: Bits, value_bits: Bits, tile: usize) -> Result<Self> {
        let keys = Scheme::variance_normalized(key_bits, Axis::Tokens, tile)?;
        let values = Scheme::variance_normalized(value_bits, Axis::Channels, tile)?;
        Self::new(keys, values, Flush::Rolling(0))
    }

    /// Returns a format that packs immediately, for schemes along channels.
    fn immediate(keys: Scheme, values: Scheme) -> Self {
        Self { keys, values, flush: Flush::Immediate, basis: KeyBasis::Given }
    }

    /// Everything in f16: the format of sinks, and the reference of comparisons.
    pub fn f16() -> Self {
        let scheme = Scheme::along_channels(Bits::Eight, Codes::Asymmetric, 32);
        Self { flush: Flush::Never, ..Self::immediate(scheme, scheme) }
    }

    /// Returns the format with another flush.
    #[cfg(feature = "cuda")]
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
