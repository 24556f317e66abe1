//! TOVA: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104.

use super::window::{equal_scores, protect_newest};
use crate::{
    Budget, EvictionPolicy, GroupReduction, LayerView, Needs, ObservedQueries, PolicyCache,
    Protected, ReducedAttention, ReducedHeads, Settings,
};
use candle_core::Tensor;
use longctx_core::{Error, KvStore, LayerSpec, Result};

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
}

impl EvictionPolicy for Tova {
    fn needs(&self) -> Needs {
        let newest = ObservedQueries::Newest { queries: 1, by_position: false };
        Needs { attention: Some(newest), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let kv_heads = view.spec.shape.kv_heads;
        if view.kv_heads.len() != kv_heads {
            let what = "TOVA over kv heads that hold different numbers of entries";
            return Err(Error::Unsupported(what.into()));
        }
        let sums = view.attention_sums()?;
        let older = view.entries - usize::from(!self.published_newest);
        if older == 0 {
            return equal_scores(view, sums);
        }
        let mean = sums.flatten(0, 1)?.mean_keepdim(0)?.narrow(1, 0, older)?;
        protect_newest(&mean.broadcast_as((kv_heads, mean.dim(1)?))?, view)
    }

    fn reduced_attention(&self) -> Option<ReducedAttention> {
        Some(ReducedAttention {
            heads: ReducedHeads::Layer,
            reduction: GroupReduction::Mean,
            newest: usize::from(!self.published_newest),
        })
    }
}

impl<S: KvStore> PolicyCache<S, Tova> {
    /// TOVA as published: one entry is evicted at every decoded token.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn tova(spec: LayerSpec, store: S, policy: Tova, budget: Budget) -> Result<Self> {
        let settings = Settings {
            protected: Protected::newest(usize::from(!policy.published_newest)),
            decode_step: Some(1),
            ..Settings::new(budget)
        };
        Self::with_settings(spec, store, policy, settings)
    }
}
