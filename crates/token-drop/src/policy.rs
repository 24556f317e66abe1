//! What an eviction policy is: one small file per policy says how it scores.

pub mod duo_attention;
pub mod expected_attention;
pub mod finch;
pub mod h2o;
pub mod k_norm;
pub mod key_diff;
pub mod lag_kv;
pub mod random;
pub mod recent;
pub mod snap_kv;
pub mod tova;
mod window;

use candle_core::Tensor;
use longctx_core::{LayerSpec, Result};

/// Scores the entries that one layer holds of a sequence: the highest stay.
///
/// How much stays, how layers and heads share it, and when eviction happens are
/// [`Settings`](crate::Settings) of the [`PolicyCache`](crate::PolicyCache) that applies the policy.
///
/// ```
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
///     fn score(&self, view: &LayerView<'_>) -> longctx_core::Result<Vec<Vec<f32>>> {
///         let length = |value: &[f32]| value.iter().map(|x| x * x).sum();
///         let d = view.spec.shape.value_dim;
///         let of_head = |values: &[f32]| values.chunks(d).map(length).collect();
///         Ok(view.heads.iter().map(|head| of_head(&head.values)).collect())
///     }
/// }
/// ```
pub trait EvictionPolicy: Send {
    /// What [`score`](Self::score) reads. The rest of the [`LayerView`] is left empty.
    fn needs(&self) -> Needs;

    /// One score for each entry of each kv head: `[kv_heads]` lists as long as the heads.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Vec<f32>>>;
}

impl<P: EvictionPolicy + ?Sized> EvictionPolicy for Box<P> {
    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Vec<f32>>> {
        (**self).score(view)
    }
}

/// What a policy reads in order to score.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// The keys.
    pub keys: bool,
    /// The values.
    pub values: bool,
    /// The queries of the call, or as many of the newest ones while decoding, before the rotary
    /// embedding. The layer must have one.
    pub queries: Option<usize>,
    /// The attention that entries receive from these queries.
    pub attention: Option<ObservedQueries>,
    /// The scores that the policy gave last time. The policy then scores after every call.
    pub previous: bool,
}

/// The queries whose attention is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObservedQueries {
    /// All queries of the call.
    Call,
    /// The newest queries of the call. While decoding, earlier ones are remembered.
    Newest {
        /// How many of them.
        queries: usize,
        /// Whether each query counts as often as there are tokens before it, which evens out that
        /// early queries share their attention among fewer.
        by_position: bool,
    },
}

/// What one layer holds of a sequence, the call's tokens included, as far as the policy
/// [needs](EvictionPolicy::needs) it.
#[derive(Debug)]
pub struct LayerView<'a> {
    /// The layer.
    pub spec: &'a LayerSpec,
    /// Tokens that have come: the position of the next one.
    pub seen: usize,
    /// Queries before the rotary embedding, `[queries, heads, head_dim]`. The last is that of the
    /// newest token.
    pub queries: Option<&'a Tensor>,
    /// The kv heads, `[kv_heads]`.
    pub heads: Vec<HeadView<'a>>,
}

/// One kv head's entries, oldest first.
#[derive(Debug)]
pub struct HeadView<'a> {
    /// The positions in the text at which the entries came.
    pub positions: &'a [u32],
    /// Rotated keys, `[entries, head_dim]`, row-major.
    pub keys: Vec<f32>,
    /// Values, `[entries, value_dim]`, row-major.
    pub values: Vec<f32>,
    /// The attention probability that each query head of the group gave to each entry, summed over
    /// the observed queries: `[group]` lists as long as the head.
    pub attention_sums: &'a [Vec<f32>],
    /// How many queries were observed.
    pub observed: usize,
    /// The scores that the policy gave last time. 0 for entries that came since, and empty before
    /// the first time.
    pub previous: &'a [f32],
}
