//! The layout of a format in records on the device: its kernels, and sizes in bytes.

use super::{Error, Result, TILE};
use crate::{Axis, Bits, Codes, Float8, Format, KeyBasis, Scheme, StaticScale};

/// The memory layout of a format's records.
///
/// A record holds the keys and values of [`group`](Self::group) tokens of a kv head, in contiguous
/// memory: a header, then a tile for each 32 tokens. With D channels per head and G groups of
/// channels per token's values:
///
/// | part | contents | elements |
/// |---|---|---|
/// | header | scales of the keys, a channel each | f16 `[D]` |
/// | | minima of the keys | f16 `[D]` |
/// | | factors of the values, a channel each | f16 `[D]` |
/// | tile | scales, or factors, of the keys, a token each | f16 `[32]` |
/// | | minima of the keys | f16 `[32]` |
/// | | codes of the keys | 32 tokens x D channels |
/// | | codes of the values | D channels x 32 tokens |
/// | | scales of the values | f16 `[32, G]` |
/// | | minima of the values | f16 `[32, G]` |
///
/// A format has some of these parameters: KIVI the keys' scales and minima per channel, KVarN also
/// the factors, formats with parameters per token those in the tile, static fp8 none. The order of
/// the elements within a part is that of the tensor cores' fragments; `kernels/layout.cuh` in this
/// crate and the repository's `docs/formats.md` define it, and [`Kernels::unpack`](super::Kernels::unpack)
/// reads it.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub(super) family: Family,
    group: usize,
    head_dim: usize,
    keys: Scheme,
    values: Scheme,
}

/// Kernels with the same layout.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Family {
    /// KIVI: keys have a scale per channel; with the name of the kernels, without the group.
    Kivi(&'static str),
    /// A scale per token, or one for all numbers; with the name of the kernels.
    Tokens(&'static str),
    /// KVarN; with the name of the kernels, without the tile.
    Balanced(&'static str),
}

impl Layout {
    /// Returns the layout of a format for heads of `head_dim` channels. The format's flush has no
    /// effect: the caller decides when to pack.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there are no kernels for the format or the heads, with the
    /// requirements of the kernels.
    pub fn new(format: Format, head_dim: usize) -> Result<Self> {
        Self::of(format, head_dim).map_err(needs)
    }

    fn of(format: Format, head_dim: usize) -> Result<Self, &'static str> {
        let (keys, values) = (format.keys(), format.values());
        if format.key_basis() != KeyBasis::Given {
            return Err("keys packed as they come");
        }
        if !matches!(head_dim, 64 | 128 | 256) {
            return Err("heads of 64, 128 or 256 channels");
        }
        let family = match (keys.axis, keys.codes) {
            (Axis::Tokens, Codes::Asymmetric) => kivi(keys, values)?,
            (Axis::Tokens, Codes::VarianceNormalized { tile }) => balanced(tile, keys, values)?,
            (Axis::Channels, _) => Family::Tokens(tokens(keys, values, head_dim)?),
            _ => return Err("asymmetric or variance-normalized codes for keys along tokens"),
        };
        Ok(Self { family, group: format.block_tokens(), head_dim, keys, values })
    }

    /// Returns the tokens of a record.
    pub fn group(self) -> usize {
        self.group
    }

    /// Returns the channels of a head.
    pub fn head_dim(self) -> usize {
        self.head_dim
    }

    /// Returns the number of groups of a token's values.
    pub fn value_groups(self) -> usize {
        self.head_dim.div_ceil(self.values.group)
    }

    /// Returns the bits of a key's code.
    pub(super) fn key_bits(self) -> usize {
        self.keys.bits.count()
    }

    /// Returns the bits of a value's code.
    pub(super) fn value_bits(self) -> usize {
        self.values.bits.count()
    }

    /// Returns the bytes of the codes of 32 tokens' keys.
    pub fn key_codes(self) -> usize {
        TILE * self.head_dim * self.key_bits() / 8
    }

    /// Returns the bytes of the codes of 32 tokens' values.
    pub fn value_codes(self) -> usize {
        TILE * self.head_dim * self.value_bits() / 8
    }

    /// Returns the bytes of scales, minima and factors of a record's channels.
    pub fn header(self) -> usize {
        match self.family {
            Family::Kivi(_) => 4 * self.head_dim,
            Family::Tokens(_) => 0,
            Family::Balanced(_) => 6 * self.head_dim,
        }
    }

    /// Returns the bytes of scales, minima or factors of 32 tokens' keys.
    pub fn key_params(self) -> usize {
        match self.family {
            Family::Kivi(_) => 0,
            Family::Tokens(_) => 2 * TILE * numbers(self.keys),
            Family::Balanced(_) => 2 * TILE,
        }
    }

    /// Returns the bytes of scales and minima of 32 tokens' values.
    pub fn value_params(self) -> usize {
        2 * TILE * self.value_groups() * numbers(self.values)
    }

    /// Returns the bytes of 32 tokens' keys and values.
    pub fn tile(self) -> usize {
        self.key_params() + self.key_codes() + self.value_codes() + self.value_params()
    }

    /// Returns the bytes of a record: `group` tokens' keys and values.
    pub fn record(self) -> usize {
        self.header() + self.group / TILE * self.tile()
    }

    /// Returns bit 0 for rotated keys and bit 1 for rotated values, as in kernels/args.cuh.
    pub(super) fn rotated(self) -> i32 {
        i32::from(self.keys.rotated) + 2 * i32::from(self.values.rotated)
    }

    /// Returns whether integers are quantized in f16 arithmetic.
    pub(super) fn f16_steps(self) -> bool {
        [self.keys, self.values].iter().any(|scheme| scheme.codes == Codes::Asymmetric)
    }

    /// Returns the static scales of keys and of values, for schemes without stored scales.
    pub(super) fn fixed_scales(self) -> (f32, f32) {
        let of = |scheme: Scheme| match scheme.codes {
            Codes::Float8 { scale: Some(scale), .. } => scale.get(),
            _ => StaticScale::ONE.get(),
        };
        (of(self.keys), of(self.values))
    }

    /// Returns the warps of an attention block and the stages of a warp's ring, for `n` blocks of 8
    /// columns, as in kernels/attend*.cu and kernels/formats.cuh.
    pub(super) fn warps_and_stages(self, n: usize) -> (usize, usize) {
        match (self.family, self.head_dim) {
            (_, 256) | (Family::Kivi("kivi88"), _) => (4, 3),
            (Family::Kivi(_), 128) if n == 2 => (4, 4),
            (Family::Kivi(_), 64) => (8, 3),
            (_, 64) => (8, 2),
            (Family::Tokens(_), _) if self.keys.bits == Bits::Eight => (8, 2),
            _ => (4, 3),
        }
    }
}

/// Returns the error for a format, head size or device without kernels.
pub(crate) fn needs(what: &str) -> Error {
    Error::Unsupported(format!("this format on a CUDA device: its kernels need {what}"))
}

/// Returns the number of scales and minima of a token, or of a group of its channels.
fn numbers(scheme: Scheme) -> usize {
    usize::from(scheme.has_scales()) + usize::from(scheme.has_zero_points())
}

fn kivi(keys: Scheme, values: Scheme) -> Result<Family, &'static str> {
    if values.codes != Codes::Asymmetric || keys.group != values.group {
        return Err("keys quantized along tokens in groups as large as the values'");
    }
    if keys.rotated || values.rotated {
        return Err("keys along tokens and their values not rotated");
    }
    match (keys.bits, values.bits) {
        (Bits::Two, Bits::Two) => Ok(Family::Kivi("kivi22")),
        (Bits::Three, Bits::Three) => Ok(Family::Kivi("kivi33")),
        (Bits::Four, Bits::Four) => Ok(Family::Kivi("kivi44")),
        (Bits::Eight, Bits::Eight) => Ok(Family::Kivi("kivi88")),
        (Bits::Four, Bits::Two) => Ok(Family::Kivi("kivi42")),
        (Bits::Two, Bits::Four) => Ok(Family::Kivi("kivi24")),
        _ => Err("keys along tokens and values of the same bits, or of 4 and 2, or 2 and 4 bits"),
    }
}

fn balanced(tile: usize, keys: Scheme, values: Scheme) -> Result<Family, &'static str> {
    if !matches!(tile, 64 | 128) || !matches!(values.codes, Codes::VarianceNormalized { .. }) {
        return Err("variance-normalized keys and values in tiles of 64 or 128 tokens");
    }
    match (keys.bits, values.bits) {
        (Bits::Four, Bits::Four) => Ok(Family::Balanced("kvarn44")),
        (Bits::Four, Bits::Two) => Ok(Family::Balanced("kvarn42")),
        (Bits::Three, Bits::Three) => Ok(Family::Balanced("kvarn33")),
        (Bits::Two, Bits::Two) => Ok(Family::Balanced("kvarn22")),
        _ => {
            Err("variance-normalized keys and values of 4 and 4, 4 and 2, 3 and 3, or 2 and 2 bits")
        }
    }
}

fn tokens(keys: Scheme, values: Scheme, head_dim: usize) -> Result<&'static str, &'static str> {
    use Float8::{E4m3, E5m2};
    if keys.group.min(values.group) < head_dim {
        return Err("one group for all channels of a token");
    }
    if keys.codes == Codes::Asymmetric && values.codes != Codes::Asymmetric {
        return Err("asymmetric keys with asymmetric values");
    }
    let fixed = |scheme: Scheme| match scheme.codes {
        Codes::Float8 { kind, scale } => Some((kind, scale.is_some())),
        _ => None,
    };
    let whole = matches!(values.codes, Codes::Uniform | Codes::Asymmetric);
    Ok(match (keys.codes, keys.bits, values.bits) {
        (Codes::Float8 { .. }, ..) if fixed(values).is_some() => match (fixed(keys), fixed(values))
        {
            (Some((E4m3, false)), Some((E4m3, false))) => "e4m3",
            (Some((E5m2, false)), Some((E5m2, false))) => "e5m2",
            (Some((E4m3, true)), Some((E4m3, true))) => "e4m3_fixed",
            (Some((E5m2, true)), Some((E5m2, true))) => "e5m2_fixed",
            _ => {
                return Err(
                    "fp8 keys and values of one kind, all with scales of their own or none",
                );
            }
        },
        (Codes::Float8 { kind: E4m3, scale: Some(_) }, _, Bits::Four) if whole => "k8v4",
        (Codes::LloydMax { norm_correction: true }, Bits::Four, Bits::Four) if whole => {
            "levels4_whole4"
        }
        (Codes::LloydMax { norm_correction: true }, Bits::Three, Bits::Four) if whole => {
            "levels3_whole4"
        }
        (Codes::LloydMax { norm_correction: true }, Bits::Three, Bits::Three) if whole => {
            "levels3_whole3"
        }
        (Codes::Asymmetric, Bits::Four, Bits::Four) => "whole4",
        (Codes::Asymmetric, Bits::Three, Bits::Three) => "whole3",
        (Codes::Symmetric, Bits::Four, Bits::Four) if values.codes == Codes::Symmetric => "signed4",
        (Codes::Symmetric, Bits::Three, Bits::Three) if values.codes == Codes::Symmetric => {
            "signed3"
        }
        _ => {
            return Err(
                "fp8, symmetric or asymmetric integers of 3 or 4 bits, or TurboQuant's presets \
                 with norm correction",
            );
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TurboQuant;

    /// The CPU computes the same number from its own layout.
    #[test]
    fn records_have_the_bits_of_the_format() {
        use Bits::{Eight, Four, Three, Two};
        let static_scale = StaticScale::new(0.5).unwrap();
        let mut formats = vec![
            Format::float8(Float8::E5m2),
            Format::float8_static(Float8::E4m3, static_scale, static_scale),
            Format::rotated_symmetric(Four, Four),
            Format::rotated_asymmetric(Three, Three),
            Format::turboquant(TurboQuant::FourBitNc),
            Format::kvarn(Four, Two, 128).unwrap(),
            Format::kvarn(Three, Three, 64).unwrap(),
        ];
        for (keys, values) in [(Four, Two), (Two, Four)]
            .into_iter()
            .chain([Two, Three, Four, Eight].map(|bits| (bits, bits)))
        {
            for group in [32, 64, 128] {
                formats.push(Format::kivi(keys, values, group, 128).unwrap());
            }
        }
        for format in formats {
            for head_dim in [64, 128, 256] {
                let layout = Layout::new(format, head_dim).unwrap();
                let numbers = 2 * layout.group() * head_dim;
                let bits = format.bits_per_number(head_dim, head_dim).unwrap() * numbers as f64;
                assert_eq!(8 * layout.record(), bits.round() as usize, "{format:?}, {head_dim}");
                assert_eq!(layout.record() % 16, 0, "{format:?}, {head_dim}");
            }
        }
    }

    #[test]
    fn formats_without_kernels_are_refused() {
        let kivi = Format::kivi(Bits::Four, Bits::Four, 32, 128).unwrap();
        let other_bits = Format::kivi(Bits::Eight, Bits::Four, 32, 128).unwrap();
        let kvarn = Format::kvarn(Bits::Four, Bits::Four, 32).unwrap();
        for (format, head_dim, wanted) in [
            (kivi, 80, "64, 128 or 256"),
            (kivi.with_rotated_keys(), 128, "not rotated"),
            (other_bits, 128, "of 4 and 2, or 2 and 4 bits"),
            (kvarn, 128, "tiles of 64 or 128"),
        ] {
            let error = Layout::new(format, head_dim).unwrap_err();
            assert!(matches!(&error, Error::Unsupported(what) if what.contains(wanted)), "{error}");
        }
    }
}
