//! The eviction of one entry of each kv head after a decoded token.

use crate::Ranking;
use candle_core::Tensor;

/// Evicts one entry of each kv head of a sequence after a decoded token: the one with the lowest
/// score, the newest of equal ones. The newest entry takes its place.
///
/// The score of an entry is the token's attention probability, reduced over query heads, plus the
/// entry's previous score. Tensors are on a CUDA device. See
/// [`KvStore::attend_and_evict`](crate::KvStore::attend_and_evict).
#[derive(Debug, Clone)]
pub struct EvictOne {
    /// Whether scores are reduced over all query heads of the layer, instead of those of each kv
    /// head.
    pub of_layer: bool,
    /// How the entries are ranked. Its tensors are contiguous.
    pub ranking: Ranking,
    /// Whether the scores are needed for the next token.
    pub carries_scores: bool,
    /// Memory to reuse for the kept entries, which nothing else may use. If it does not have their
    /// shape and dtypes, or is not contiguous on the store's device, new memory is allocated.
    pub outputs: Option<KeptEntries>,
}

/// The entries of a sequence that [`EvictOne`] leaves, on the device.
#[derive(Debug, Clone)]
pub struct KeptEntries {
    /// Their positions, `[kv_heads, entries]` in u32.
    pub positions: Tensor,
    /// Their scores, `[kv_heads, entries]` in f32, if they are carried.
    pub scores: Option<Tensor>,
}
