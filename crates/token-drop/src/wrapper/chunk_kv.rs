//! ChunkKV: Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", arXiv 2502.00299.

use longctx_core::{AttentionShape, Error, EvictionPolicy, Protected, Selection};

/// Keeps whole chunks of neighbouring tokens, the same in every head of a layer, around any policy.
///
/// A chunk's score is the mean of its tokens', summed over the heads. The best chunks stay, as many as fit into the budget beside what is protected; of the next
/// one its first tokens stay, as far as there is room. kvpress counts chunks and not tokens, so that it can keep
/// more than the budget, and takes the first batch entry's chunks for all; here each batch entry has its own.
#[derive(Debug, Clone, Copy)]
pub struct ChunkKv<P> {
    policy: P,
    chunk: usize,
}

impl<P: EvictionPolicy> ChunkKv<P> {
    /// With chunks of so many tokens (20 in kvpress, 10 in the paper).
    ///
    /// # Errors
    /// [`Error::Setting`] if that is 0.
    pub fn new(policy: P, chunk: usize) -> longctx_core::Result<Self> {
        if chunk == 0 {
            return Err(Error::setting("chunk", "at least 1 token", 0));
        }
        Ok(Self { policy, chunk })
    }
}

impl<P: EvictionPolicy> EvictionPolicy for ChunkKv<P> {
    forward!(needs, score, protects, budgets, bounds_heads, is_over, rerotates, decode_step);

    fn select(
        &self,
        scores: &[Vec<f32>],
        budgets: &[usize],
        shape: &AttentionShape,
        protected: Protected,
    ) -> Selection {
        let entries = scores.chunks(shape.kv_heads).zip(budgets.chunks(shape.kv_heads));
        let ranked = entries.flat_map(|(scores, _)| vec![rank(scores, self.chunk); scores.len()]);
        Selection::top(&ranked.collect::<Vec<_>>(), budgets, protected)
    }
}

/// Scores that order tokens by their chunk's rank first: the best chunk's have the highest number.
fn rank(heads: &[Vec<f32>], chunk: usize) -> Vec<f32> {
    let len = heads.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |start: usize| {
        let end = (start + chunk).min(len);
        let sum: f32 = heads.iter().flat_map(|head| &head[start..end]).sum();
        sum / (end - start) as f32
    };
    let means: Vec<_> = (0..len).step_by(chunk).map(mean).collect();
    let mut order: Vec<_> = (0..means.len()).collect();
    order.sort_by(|&a, &b| means[a].total_cmp(&means[b]).then(b.cmp(&a)));
    let mut ranks = vec![0.0; len];
    for (rank, i) in order.into_iter().enumerate() {
        ranks[i * chunk..((i + 1) * chunk).min(len)].fill(rank as f32);
    }
    ranks
}
