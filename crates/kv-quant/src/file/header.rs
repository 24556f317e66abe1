//! What a file says of its sequences beside their tensors, as JSON in the safetensors metadata.

use crate::pool::Sequence;
use crate::pool::head::Head;
use crate::{Axis, Bits, Error, Flush, Format, KeyBasis, Pool, PoolShape, Result, Rotary, Scheme};
use serde::{Deserialize, Serialize};

/// A sequence of one pool.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    head_dim: usize,
    /// Where it is not head_dim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_dim: Option<usize>,
    keys: Matrix,
    values: Matrix,
    /// `immediate`, `together` (rolling without a residual), `rolling`, `staggered` or `never`.
    flush: String,
    /// Tokens of a rolling or staggered flush.
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
    pub fn of(pool: &Pool, sequence: &Sequence) -> Self {
        let (format, shape) = (pool.format(), pool.shape());
        let (flush, residual) = match format.flush() {
            Flush::Immediate => ("immediate", 0),
            Flush::Rolling(0) => ("together", 0),
            Flush::Rolling(residual) => ("rolling", residual),
            Flush::Never => ("never", 0),
            Flush::Staggered(residual) => ("staggered", residual),
        };
        let basis = match format.basis() {
            KeyBasis::Given => "given",
            KeyBasis::Hadamard => "hadamard",
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

    /// An empty pool like the one that held it.
    ///
    /// # Errors
    /// [`Error::Setting`] for a description that no pool has.
    pub fn pool(&self) -> Result<Pool> {
        const MOST_CHANNELS: usize = 1 << 16;
        let value_dim = self.value_dim.unwrap_or(self.head_dim);
        for (name, size) in [("head_dim", self.head_dim), ("value_dim", value_dim)] {
            if size > MOST_CHANNELS {
                return Err(Error::setting(name, format!("at most {MOST_CHANNELS}"), size));
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
            ("hadamard", None) => Pool::new(shape, format.with_basis(KeyBasis::Hadamard)),
            ("before-rope", Some(Embedding { frequencies, first })) => {
                Pool::before_rope(shape, format, Rotary::new(frequencies, *first)?.into())
            }
            (other, _) => Err(Error::setting("basis of keys", "a known one", other)),
        }
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
            along_tokens: scheme.along == Axis::Tokens,
            group: scheme.group,
        }
    }

    fn scheme(&self) -> Result<Scheme> {
        let along = if self.along_tokens { Axis::Tokens } else { Axis::Channels };
        Scheme::new(Bits::try_from(self.bits)?, along, self.group)
    }
}
