//! Published formats.

use super::{Axis, Bits, Codes, Float8, Flush, Format, KeyBasis, Scheme, StaticScale};
use crate::{Error, Result};

/// vLLM's presets of TurboQuant. They keep the first and last two layers in full precision; the
/// caller has to do this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
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

impl Format {
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
    /// tokens, less than a tile, in full precision. The newest packed tile also stays in f16 until
    /// the next one is packed. The published code also keeps each sequence's first 128 tokens in
    /// f16, as sinks.
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
}
