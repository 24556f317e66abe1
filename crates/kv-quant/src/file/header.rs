//! The description of a file's sequences, as JSON in the safetensors metadata.

use crate::pool::Sequence;
use crate::pool::head::Head;
use crate::{
    Axis, Bits, Codes, Error, Float8, Flush, Format, KeyBasis, Pool, PoolShape, Result, Rotary,
    Scheme, StaticScale,
};
use serde::{Deserialize, Serialize};

/// A sequence of one pool.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    head_dim: usize,
    /// If different from head_dim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_dim: Option<usize>,
    keys: Matrix,
    values: Matrix,
    /// `immediate`, `together` (rolling without a residual), `rolling`, `staggered` or `never`.
    flush: String,
    /// Tokens of a rolling or staggered flush.
    residual: usize,
    /// `given` or `before-rope`; in version 1 also `hadamard`, for rotated keys.
    basis: String,
    rotary: Option<Embedding>,
    pub heads: Vec<Counts>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Matrix {
    bits: usize,
    along_tokens: bool,
    group: usize,
    #[serde(default)]
    codes: Kind,
    #[serde(default)]
    rotated: bool,
}

/// [`Codes`] by name.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Kind {
    #[default]
    Asymmetric,
    Uniform,
    Symmetric,
    /// With the static scale, if any.
    E4m3(Option<f32>),
    E5m2(Option<f32>),
    LloydMax {
        norm_correction: bool,
    },
    VarianceNormalized {
        tile: usize,
    },
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Embedding {
    frequencies: Vec<f64>,
    first: usize,
}

/// The token counts of a head.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    pub len: usize,
    pub packed_keys: usize,
    pub packed_values: usize,
}

impl Layer {
    pub fn of(pool: &Pool, sequence: &Sequence) -> Self {
        let (format, shape) = (pool.format(), pool.shape());
        let (flush, residual) = match format.flush() {
            Flush::Immediate => ("immediate", 0),
            Flush::Rolling(0) => ("together", 0),
            Flush::Rolling(residual) => ("rolling", residual),
            Flush::Never => ("never", 0),
            Flush::Staggered(residual) => ("staggered", residual),
        };
        let basis = match format.key_basis() {
            KeyBasis::Given => "given",
            KeyBasis::BeforeRope => "before-rope",
        };
        let rotary = pool.rotary().map(|rotary| Embedding {
            frequencies: rotary.frequencies().into(),
            first: rotary.first(),
        });
        Self {
            head_dim: shape.head_dim,
            value_dim: (shape.value_dim != shape.head_dim).then_some(shape.value_dim),
            keys: Matrix::of(format.keys()),
            values: Matrix::of(format.values()),
            flush: flush.into(),
            residual,
            basis: basis.into(),
            rotary,
            heads: sequence.heads.iter().map(Counts::of).collect(),
        }
    }

    /// Creates an empty pool with the same settings.
    ///
    /// # Errors
    /// [`Error::Setting`] for a description that no pool supports.
    pub fn pool(&self) -> Result<Pool> {
        const MAX_CHANNELS: usize = 1 << 16;
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        for (name, size) in [("head_dim", self.head_dim), ("value_dim", value_dim)] {
            if size > MAX_CHANNELS {
                return Err(Error::setting(name, format!("at most {MAX_CHANNELS}"), size));
            }
        }
        let flush = match self.flush.as_str() {
            "immediate" => Flush::Immediate,
            "together" => Flush::Rolling(0),
            "rolling" => Flush::Rolling(self.residual),
            "never" => Flush::Never,
            "staggered" => Flush::Staggered(self.residual),
            other => return Err(Error::setting("flush", "a known one", other)),
        };
        let format = Format::new(self.keys.scheme()?, self.values.scheme()?, flush)?;
        let (kv_heads, head_dim) = (self.heads.len(), self.head_dim);
        let shape = PoolShape { kv_heads, head_dim, value_dim };
        match (self.basis.as_str(), &self.rotary) {
            ("given", None) => Pool::new(shape, format),
            ("hadamard", None) => Pool::new(shape, format.with_rotated_keys()),
            ("before-rope", Some(Embedding { frequencies, first })) => {
                Pool::before_rope(shape, format, Rotary::new(frequencies, *first)?.into())
            }
            (other, _) => Err(Error::setting("basis of keys", "a known one", other)),
        }
    }
}

impl Layer {
    /// Returns whether the unpacked keys are rotated too, as in version 1.
    pub fn has_rotated_tail(&self) -> bool {
        self.basis == "hadamard"
    }
}

impl Counts {
    fn of(head: &Head) -> Self {
        let Head { len, packed_keys, packed_values, .. } = *head;
        Self { len, packed_keys, packed_values }
    }
}

impl Matrix {
    fn of(scheme: Scheme) -> Self {
        Self {
            bits: scheme.bits.count(),
            along_tokens: scheme.axis == Axis::Tokens,
            group: scheme.group,
            codes: Kind::of(scheme.codes),
            rotated: scheme.rotated,
        }
    }

    fn scheme(&self) -> Result<Scheme> {
        let axis = if self.along_tokens { Axis::Tokens } else { Axis::Channels };
        let (bits, codes) = (Bits::try_from(self.bits)?, self.codes.codes()?);
        Scheme { bits, axis, group: self.group, codes, rotated: self.rotated }.checked()
    }
}

impl Kind {
    fn of(codes: Codes) -> Self {
        match codes {
            Codes::Asymmetric => Self::Asymmetric,
            Codes::Uniform => Self::Uniform,
            Codes::Symmetric => Self::Symmetric,
            Codes::Float8 { kind: Float8::E4m3, scale } => Self::E4m3(scale.map(StaticScale::get)),
            Codes::Float8 { kind: Float8::E5m2, scale } => Self::E5m2(scale.map(StaticScale::get)),
            Codes::LloydMax { norm_correction } => Self::LloydMax { norm_correction },
            Codes::VarianceNormalized { tile } => Self::VarianceNormalized { tile },
        }
    }

    fn codes(self) -> Result<Codes> {
        let float8 = |kind, scale: Option<f32>| -> Result<Codes> {
            Ok(Codes::Float8 { kind, scale: scale.map(StaticScale::new).transpose()? })
        };
        match self {
            Self::Asymmetric => Ok(Codes::Asymmetric),
            Self::Uniform => Ok(Codes::Uniform),
            Self::Symmetric => Ok(Codes::Symmetric),
            Self::E4m3(scale) => float8(Float8::E4m3, scale),
            Self::E5m2(scale) => float8(Float8::E5m2, scale),
            Self::LloydMax { norm_correction } => Ok(Codes::LloydMax { norm_correction }),
            Self::VarianceNormalized { tile } => Ok(Codes::VarianceNormalized { tile }),
        }
    }
}
