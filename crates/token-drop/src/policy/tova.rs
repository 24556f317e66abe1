//! TOVA: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104.

use crate::{
    Budget, EvictionPolicy, GroupReduction, LayerView, Needs, ObservedQueries, PolicyCache,
    Protected, ReducedAttention, ReducedHeads, Settings,
};
use candle_core::Tensor;
use longctx_core::{KvStore, LayerSpec, Result};

/// Keeps the entries that the newest query attends to, averaged over all heads of the layer.
///
/// As in kvpress, the newest token itself is kept, and all heads keep the same tokens. There is no
/// `with_group_reduction`, because the average is over all heads of the layer, not over those of
/// one kv head.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tova {
    published_newest: bool,
}

impl Tova {
    /// Lets the newest token be evicted like any other if its own query attends to it the least, as
    /// the published code does (schwartz-lab-NLP/TOVA, `TOVACache.reduce`).
    #[must_use]
    pub fn with_published_newest(mut self) -> Self {
        self.published_newest = true;
        self
    }

    fn num_protected(self) -> usize {
        usize::from(!self.published_newest)
    }

    fn reduced_sums(self) -> ReducedAttention {
        ReducedAttention {
            heads: ReducedHeads::Layer,
            reduction: GroupReduction::Mean,
            newest: self.num_protected(),
        }
    }
}

impl EvictionPolicy for Tova {
    fn needs(&self) -> Needs {
        let newest = ObservedQueries::Newest { queries: 1, by_position: false };
        Needs { attention: Some(newest), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        self.reduced_sums().score(view)
    }

    fn reduced_attention(&self) -> Option<ReducedAttention> {
        Some(self.reduced_sums())
    }
}

impl<S: KvStore> PolicyCache<S, Tova> {
    /// TOVA as published: one entry is evicted at every decoded token.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn tova(spec: LayerSpec, store: S, policy: Tova, budget: Budget) -> Result<Self> {
        let settings = Settings {
            protected: Protected::newest(policy.num_protected()),
            decode_step: Some(1),
            ..Settings::new(budget)
        };
        Self::with_settings(spec, store, policy, settings)
    }
}
