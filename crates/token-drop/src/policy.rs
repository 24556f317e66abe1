//! The eviction policy interface. Each policy is one small file with its score.

pub mod duo_attention;
pub mod expected_attention;
pub mod finch;
pub mod h2o;
pub mod k_norm;
pub mod key_diff;
pub mod lag_kv;
pub mod random;
pub mod recent;
mod reduced_attention;
pub mod snap_kv;
pub mod tova;
mod window;

use candle_core::Tensor;
use longctx_core::{Error, LayerSpec, Result};
use std::ops::Range;

pub use reduced_attention::{ReducedAttention, ReducedHeads};

/// Scores the entries of a sequence in one layer. The entries with the highest scores are kept.
///
/// The number of kept entries, the budgets of layers and heads, and the time of eviction are
/// [`Settings`](crate::Settings) of the [`PolicyCache`](crate::PolicyCache) that applies the
/// policy.
///
/// ```
/// use candle_core::Tensor;
/// use token_drop::{EvictionPolicy, LayerView, Needs};
///
/// /// Keeps the tokens with the longest values.
/// struct LongValues;
///
/// impl EvictionPolicy for LongValues {
///     fn needs(&self) -> Needs {
///         Needs { values: true, ..Needs::default() }
///     }
///
///     fn score(&self, view: &LayerView<'_>) -> longctx_core::Result<Tensor> {
///         Ok(view.values()?.sqr()?.sum(2)?)
///     }
/// }
/// ```
pub trait EvictionPolicy: Send {
    /// Returns the inputs of [`score`](Self::score). The other fields of the [`LayerView`] are
    /// empty.
    fn needs(&self) -> Needs;

    /// Returns one score for each entry of each kv head, `[kv_heads, entries]` in f32, on the
    /// store's device.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn score(&self, view: &LayerView<'_>) -> Result<Tensor>;

    /// Describes the scores if they are just reduced attention sums, plus the previous scores if
    /// the policy [needs](Self::needs) them. On a CUDA device one kernel then scores the entries of
    /// all decoding sequences, and [`score`](Self::score) is not called. `score` must return the
    /// same scores, those of [`ReducedAttention::score`]. `None` by default.
    fn reduced_attention(&self) -> Option<ReducedAttention> {
        None
    }
}

impl<P: EvictionPolicy + ?Sized> EvictionPolicy for Box<P> {
    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        (**self).score(view)
    }

    fn reduced_attention(&self) -> Option<ReducedAttention> {
        (**self).reduced_attention()
    }
}

/// The inputs that a policy needs to score.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Original positions of the entries.
    pub positions: bool,
    /// Keys.
    pub keys: bool,
    /// Values.
    pub values: bool,
    /// Number of newest queries, before the rotary embedding. They are queries of the call and,
    /// during decoding, also of earlier calls. The layer must have a rotary embedding.
    pub queries: Option<usize>,
    /// The attention that entries receive from these queries.
    pub attention: Option<ObservedQueries>,
    /// The policy's previous scores. The policy then scores after every call.
    pub previous_scores: bool,
}

/// The queries whose attention is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ObservedQueries {
    /// All queries of the call.
    Call,
    /// The newest queries of the call. During decoding, the cache keeps queries of earlier calls
    /// for this purpose.
    Newest {
        /// Number of queries.
        queries: usize,
        /// Whether each query is weighted by the number of tokens before it. This compensates for
        /// early queries, whose attention is divided among fewer tokens.
        by_position: bool,
    },
}

/// One layer's entries of a sequence, including the tokens of the call. Fields that the policy does
/// not [need](EvictionPolicy::needs) are empty. Tensors are on the store's device.
///
/// A view has all kv heads of the layer, unless they hold different numbers of entries. Then the
/// policy is called once for each range of heads with equal numbers.
#[derive(Debug)]
pub struct LayerView<'a> {
    /// The layer.
    pub spec: &'a LayerSpec,
    /// Number of tokens seen: the position of the next token.
    pub seen: usize,
    /// Queries before the rotary embedding, `[queries, heads, head_dim]`, of all heads of the
    /// layer. The last one belongs to the newest token.
    pub queries: Option<&'a Tensor>,
    /// Range of the kv heads in this view.
    pub kv_heads: Range<usize>,
    /// Number of entries of each of them. Entries are ordered from oldest to newest.
    pub entries: usize,
    /// Original positions of the entries, `[kv_heads, entries]`, u32.
    pub positions: Option<Tensor>,
    /// Rotated keys, `[kv_heads, entries, head_dim]`, f32.
    pub keys: Option<Tensor>,
    /// Values, `[kv_heads, entries, value_dim]`, f32.
    pub values: Option<Tensor>,
    /// The attention probability that each query head of the group gave to each entry, summed over
    /// the observed queries: `[kv_heads, group, entries]`, f32.
    pub attention_sums: Option<Tensor>,
    /// Number of observed queries.
    pub observed_queries: usize,
    /// The policy's previous scores, `[kv_heads, entries]`, f32. 0 for newer entries; `None` before
    /// the first scoring.
    pub previous_scores: Option<Tensor>,
}

impl LayerView<'_> {
    /// Returns the positions.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the policy does not list them in its needs.
    pub fn positions(&self) -> Result<&Tensor> {
        required(&self.positions, "positions")
    }

    /// Returns the keys.
    ///
    /// # Errors
    /// As [`positions`](Self::positions).
    pub fn keys(&self) -> Result<&Tensor> {
        required(&self.keys, "keys")
    }

    /// Returns the values.
    ///
    /// # Errors
    /// As [`positions`](Self::positions).
    pub fn values(&self) -> Result<&Tensor> {
        required(&self.values, "values")
    }

    /// Returns the accumulated attention.
    ///
    /// # Errors
    /// As [`positions`](Self::positions).
    pub fn attention_sums(&self) -> Result<&Tensor> {
        required(&self.attention_sums, "attention")
    }
}

fn required<'a>(tensor: &'a Option<Tensor>, what: &str) -> Result<&'a Tensor> {
    tensor.as_ref().ok_or_else(|| Error::mismatch("needs of a policy", what, "no such input"))
}
