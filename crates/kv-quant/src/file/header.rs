//! What a file says of its heads beside their tensors, as JSON in the safetensors metadata.

use crate::format::Flush;
use crate::{Axis, Bits, Error, Format, Head, KeyBasis, Result, Rotary, Scheme};
use serde::{Deserialize, Serialize};

/// One list of heads that are held alike.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    pub head_dim: usize,
    keys: Matrix,
    values: Matrix,
    /// `immediate`, `together`, `never`, or `staggered`.
    flush: String,
    /// Tokens of a staggered flush.
    residual: usize,
    /// `given`, `hadamard` or `before-rope`.
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
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Embedding {
    frequencies: Vec<f64>,
    first: usize,
}

/// A head's counts of tokens.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    pub len: usize,
    pub packed_keys: usize,
    pub packed_values: usize,
}

impl Layer {
    /// What heads have in common; `None` if there are none.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if they are of several formats.
    pub fn of(heads: &[Head]) -> Result<Option<Self>> {
        let Some(first) = heads.first() else { return Ok(None) };
        let format = first.format();
        let alike = |head: &Head| {
            head.format() == format
                && head.head_dim() == first.head_dim()
                && head.rotary() == first.rotary()
        };
        if !heads.iter().all(alike) {
            return Err(Error::mismatch("heads of a layer", "one format and head_dim", "several"));
        }
        let (flush, residual) = match format.flush() {
            Flush::Immediate => ("immediate", 0),
            Flush::Together => ("together", 0),
            Flush::Never => ("never", 0),
            Flush::Staggered(residual) => ("staggered", residual),
        };
        let basis = match format.basis() {
            KeyBasis::Given => "given",
            KeyBasis::Hadamard => "hadamard",
            KeyBasis::BeforeRope => "before-rope",
        };
        let rotary = first.rotary().map(|rotary| Embedding {
            frequencies: rotary.frequencies().into(),
            first: rotary.first(),
        });
        Ok(Some(Self {
            head_dim: first.head_dim(),
            keys: Matrix::of(format.keys()),
            values: Matrix::of(format.values()),
            flush: flush.into(),
            residual,
            basis: basis.into(),
            rotary,
            heads: heads.iter().map(Head::counts).collect(),
        }))
    }

    /// An empty head of this layer.
    pub fn head(&self) -> Result<Head> {
        const MOST_CHANNELS: usize = 1 << 16;
        if self.head_dim > MOST_CHANNELS {
            let expected = format!("at most {MOST_CHANNELS}");
            return Err(Error::setting("head_dim", expected, self.head_dim));
        }
        let flush = match self.flush.as_str() {
            "immediate" => Flush::Immediate,
            "together" => Flush::Together,
            "never" => Flush::Never,
            "staggered" => Flush::Staggered(self.residual),
            other => return Err(Error::setting("flush", "a known one", other)),
        };
        let format = Format::new(self.keys.scheme()?, self.values.scheme()?, flush)?;
        match (self.basis.as_str(), &self.rotary) {
            ("given", None) => Head::new(self.head_dim, format),
            ("hadamard", None) => Head::new(self.head_dim, format.with_basis(KeyBasis::Hadamard)),
            ("before-rope", Some(Embedding { frequencies, first })) => {
                Head::before_rope(self.head_dim, format, Rotary::new(frequencies, *first)?.into())
            }
            (other, _) => Err(Error::setting("basis of keys", "a known one", other)),
        }
    }
}

impl Matrix {
    fn of(scheme: Scheme) -> Self {
        Self {
            bits: scheme.bits.count(),
            along_tokens: scheme.along == Axis::Tokens,
            group: scheme.group,
        }
    }

    fn scheme(&self) -> Result<Scheme> {
        let along = if self.along_tokens { Axis::Tokens } else { Axis::Channels };
        Scheme::new(Bits::try_from(self.bits)?, along, self.group)
    }
}
