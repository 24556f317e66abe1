//! H2O: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
//! Language Models", arXiv 2306.14048.

use crate::{
    Budget, EvictionPolicy, GroupReduction, LayerView, Needs, ObservedQueries, PolicyCache,
    Protected, ReducedAttention, ReducedHeads, Settings,
};
use candle_core::Tensor;
use longctx_core::{KvStore, LayerSpec, Result};

/// Keeps the tokens with the most accumulated attention: heavy hitters.
///
/// Attention is summed over all queries, of the prompt and of decoded tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct H2o {
    group: GroupReduction,
}

impl H2o {
    /// Sets how the attention of a group's query heads is reduced; the mean by default.
    #[must_use]
    pub fn with_group_reduction(mut self, group: GroupReduction) -> Self {
        self.group = group;
        self
    }

    fn reduced_sums(self) -> ReducedAttention {
        ReducedAttention { heads: ReducedHeads::Group, reduction: self.group, newest: 0 }
    }
}

impl EvictionPolicy for H2o {
    fn needs(&self) -> Needs {
        Needs {
            attention: Some(ObservedQueries::Call),
            previous_scores: true,
            ..Default::default()
        }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        self.reduced_sums().score(view)
    }

    fn reduced_attention(&self) -> Option<ReducedAttention> {
        Some(self.reduced_sums())
    }
}

impl<S: KvStore> PolicyCache<S, H2o> {
    /// H2O as published: half of the budget for heavy hitters and half for the newest tokens, each
    /// rounded down. One entry is evicted at every decoded token.
    ///
    /// After each step the heavy and recent tokens are held, and the next query sees these and
    /// itself. That is the mask of the published code in henryzhongsc/longctx_bench.
    /// FMInference/H2O copies the mask before it adds the last recent token. That token is hidden
    /// for one step and may come back, which is impossible for a cache that frees evicted entries.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn h2o(spec: LayerSpec, store: S, policy: H2o, budget: Budget) -> Result<Self> {
        let settings = Settings {
            protected: Protected { recent_share: 0.5, ..Default::default() },
            decode_step: Some(1),
            ..Settings::new(budget)
        };
        Self::with_settings(spec, store, policy, settings)
    }
}
