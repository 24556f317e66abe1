//! Finch: Corallo and Papotti, "FINCH: Prompt-guided Key-Value Cache Compression for Large Language
//! Models", TACL 2024.

use super::window::{check_window, equal_scores, protect_newest};
use crate::{
    Budget, EvictionPolicy, GroupReduction, LayerView, Needs, ObservedQueries, PolicyCache,
    Protected, Settings,
};
use candle_core::Tensor;
use longctx_core::{KvStore, LayerSpec, Result};

/// Keeps the entries that the question at the prompt's end attends to.
///
/// Each query of the question is weighted by the number of tokens before it. Scores are not
/// smoothed.
#[derive(Debug, Clone, Copy)]
pub struct Finch {
    question: usize,
    group: GroupReduction,
}

impl Finch {
    /// Creates the policy for a question of `question` tokens at the prompt's end.
    ///
    /// # Errors
    /// [`Error::Setting`](longctx_core::Error::Setting) if `question` is 0.
    pub fn new(question: usize) -> Result<Self> {
        check_window(question)?;
        Ok(Self { question, group: GroupReduction::Mean })
    }

    /// Sets how the scores of a group's query heads are reduced; the mean by default.
    #[must_use]
    pub fn with_group_reduction(mut self, group: GroupReduction) -> Self {
        self.group = group;
        self
    }
}

impl EvictionPolicy for Finch {
    fn needs(&self) -> Needs {
        let newest = ObservedQueries::Newest { queries: self.question, by_position: true };
        Needs { attention: Some(newest), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let before = view.entries.saturating_sub(self.question);
        let sums = view.attention_sums()?;
        if before == 0 {
            return equal_scores(view, sums);
        }
        protect_newest(&self.group.reduce(&sums.narrow(2, 0, before)?)?, view)
    }
}

impl<S: KvStore> PolicyCache<S, Finch> {
    /// Finch as published: the question and decoded tokens are kept, and kept keys are rotated to
    /// contiguous positions.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn finch(spec: LayerSpec, store: S, policy: Finch, budget: Budget) -> Result<Self> {
        let settings = Settings {
            protected: Protected::newest(policy.question),
            decode_step: None,
            rerotate: true,
            ..Settings::new(budget)
        };
        Self::with_settings(spec, store, policy, settings)
    }
}
