//! Quantization of a matrix: codes, and groups that share a scale.

use crate::{Bits, Error, Result};

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
#[non_exhaustive]
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

    pub(super) fn along_channels(bits: Bits, codes: Codes, group: usize) -> Self {
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
#[non_exhaustive]
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
#[non_exhaustive]
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
