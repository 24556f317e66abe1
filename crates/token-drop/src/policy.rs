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
use longctx_core::{Error, LayerSpec, Result};

/// Scores the entries that one layer holds of a sequence: the highest stay.
///
/// How much stays, how layers and heads share it, and when eviction happens are
/// [`Settings`](crate::Settings) of the [`PolicyCache`](crate::PolicyCache) that applies the policy.
///
/// ```
/// use candle_core::Tensor;
/// use token_drop::{EvictionPolicy, HeadView, LayerView, Needs};
///
/// /// Keeps the tokens with the longest values.
/// struct LongValues;
///
/// impl EvictionPolicy for LongValues {
///     fn needs(&self) -> Needs {
///         Needs { values: true, ..Needs::default() }
///     }
///
///     fn score(&self, view: &LayerView<'_>) -> longctx_core::Result<Vec<Tensor>> {
///         let of_head = |head: &HeadView<'_>| Ok(head.values()?.sqr()?.sum(1)?);
///         view.heads.iter().map(of_head).collect()
///     }
/// }
/// ```
pub trait EvictionPolicy: Send {
    /// What [`score`](Self::score) reads. The rest of the [`LayerView`] is left empty.
    fn needs(&self) -> Needs;

    /// One score for each entry of each kv head: `[kv_heads]` tensors `[entries]` in f32, on the
    /// store's device or on the CPU.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Tensor>>;
}

impl<P: EvictionPolicy + ?Sized> EvictionPolicy for Box<P> {
    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Tensor>> {
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
/// [needs](EvictionPolicy::needs) it. Tensors lie on the store's device.
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
    /// Rotated keys, `[entries, head_dim]`, f32.
    pub keys: Option<Tensor>,
    /// Values, `[entries, value_dim]`, f32.
    pub values: Option<Tensor>,
    /// The attention probability that each query head of the group gave to each entry, summed over
    /// the observed queries: `[group, entries]`, f32.
    pub attention_sums: Option<Tensor>,
    /// How many queries were observed.
    pub observed: usize,
    /// The scores that the policy gave last time. 0 for entries that came since, and empty before
    /// the first time.
    pub previous: &'a [f32],
}

impl HeadView<'_> {
    /// The keys.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the policy did not ask for them.
    pub fn keys(&self) -> Result<&Tensor> {
        asked(&self.keys, "keys")
    }

    /// The values.
    ///
    /// # Errors
    /// As [`keys`](Self::keys).
    pub fn values(&self) -> Result<&Tensor> {
        asked(&self.values, "values")
    }

    /// The attention that was received.
    ///
    /// # Errors
    /// As [`keys`](Self::keys).
    pub fn attention_sums(&self) -> Result<&Tensor> {
        asked(&self.attention_sums, "attention")
    }
}

fn asked<'a>(tensor: &'a Option<Tensor>, what: &str) -> Result<&'a Tensor> {
    tensor.as_ref().ok_or_else(|| Error::mismatch("needs of a policy", what, "others"))
}
