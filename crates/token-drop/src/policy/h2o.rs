//! H2O: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048.

use crate::Group;
use longctx_core::{Error, EvictionPolicy, Held, Mass, Needs, Protected, Result};

/// Keeps the tokens that received the most attention since they came ("heavy hitters") and the newest ones, half and half.
///
/// Attention is summed over every query, prompt and decoded ones alike, and at every decoded token one entry goes: after each step the
/// heavy and recent tokens are held, and the next query sees these and itself. That is the mask of the published code in
/// henryzhongsc/longctx_bench. In FMInference/H2O the mask is copied before the last of the recent tokens is put into it, so that one
/// token is hidden for a step and may come back; a cache that frees what it evicts can't do so.
///
/// ```
/// use token_drop::H2o;
///
/// assert!(H2o::default().with_heavy_share(0.7).is_ok());
/// assert!(H2o::default().with_heavy_share(1.5).is_err());
/// ```
#[derive(Debug, Clone, Copy)]
pub struct H2o {
    heavy_share: f64,
    group: Group,
}

impl Default for H2o {
    fn default() -> Self {
        Self { heavy_share: 0.5, group: Group::Mean }
    }
}

impl H2o {
    /// The share of the budget that goes to heavy hitters; the rest to recent tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] unless it lies in 0..=1.
    pub fn with_heavy_share(mut self, share: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("heavy share", "a number from 0 to 1", share));
        }
        self.heavy_share = share;
        Ok(self)
    }

    /// How the attention of a group's query heads is joined; by default by its mean.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.group = group;
        self
    }

    /// Heavy and recent tokens, each share rounded down as the published code does.
    fn split(&self, budget: f64) -> (usize, usize) {
        ((self.heavy_share * budget) as usize, ((1.0 - self.heavy_share) * budget) as usize)
    }
}

impl EvictionPolicy for H2o {
    fn needs(&self) -> Needs {
        Needs { mass: Some(Mass::Call), previous: true, ..Default::default() }
    }

    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        let of_head = |head: &longctx_core::HeldHead<'_>| {
            let mut scores = self.group.join(head.mass);
            scores.iter_mut().zip(head.previous).for_each(|(score, previous)| *score += previous);
            scores
        };
        Ok(held.heads.iter().map(of_head).collect())
    }

    fn budgets(&self, budget: f64, _: usize, heads: usize) -> Vec<usize> {
        let (heavy, recent) = self.split(budget);
        vec![heavy.saturating_add(recent).max(1); heads]
    }

    fn protects(&self, budget: usize) -> Protected {
        Protected { sinks: 0, recent: self.split(budget as f64).1 }
    }

    fn decode_step(&self) -> Option<usize> {
        Some(1)
    }
}
