//! Settings of a cache that applies a policy.

use crate::{
    Budget, Granularity, HeadBudgets, LayerBudgets, Needs, ObservedQueries, Protected,
    select::ProtectedCounts,
};
use longctx_core::{Error, LayerSpec, Result};

/// Which calls of a prompt are followed by eviction.
///
/// Calls of several tokens belong to the prompt, unless its length was
/// [declared](crate::PolicyCache::expect_prompt) and has been reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefill {
    /// Every call: a prompt in chunks never holds more than the budget and one chunk, and each
    /// chunk sees only the entries kept so far.
    #[default]
    EveryCall,
    /// Only the first call, as in kvpress. Later tokens are kept, unless the cache evicts during
    /// decoding.
    FirstCall,
}

/// How a [`PolicyCache`](crate::PolicyCache) applies a policy: the budget, how layers and heads
/// share it, and when entries are evicted.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How much of a sequence is kept.
    pub budget: Budget,
    /// How the model's layers share the budget.
    pub layer_budgets: LayerBudgets,
    /// How the layer's kv heads share the budget.
    pub head_budgets: HeadBudgets,
    /// The unit of selection.
    pub granularity: Granularity,
    /// Entries that are kept regardless of their scores.
    pub protected: Protected,
    /// Which calls of a prompt are followed by eviction.
    pub prefill: Prefill,
    /// How many entries a head evicts at a time during decoding, once it is over its budget;
    /// `None`: all decoded tokens are kept. A larger step spreads the cost of scoring over more
    /// tokens.
    pub decode_step: Option<usize>,
    /// Whether kept keys are rotated to contiguous positions, as in Finch and transformers'
    /// `SinkCache`. The next token then follows the kept ones directly, so that a text longer than
    /// the model's context stays within known positions. A packed store repacks all kept keys each
    /// time.
    pub rerotate: bool,
    /// Whether all entries of the prompt are kept. The budget then applies to the tokens after the
    /// prompt, and a ratio is a share of them.
    pub keep_prompt: bool,
}

impl Settings {
    /// Creates default settings: uniform budgets, single tokens, nothing protected, eviction after
    /// every call of a prompt and by 64 entries at a time during decoding.
    pub fn new(budget: Budget) -> Self {
        Self {
            budget,
            layer_budgets: LayerBudgets::default(),
            head_budgets: HeadBudgets::default(),
            granularity: Granularity::default(),
            protected: Protected::default(),
            prefill: Prefill::default(),
            decode_step: Some(64),
            rerotate: false,
            keep_prompt: false,
        }
    }

    /// Checks the settings against each other, the layer and the policy's inputs.
    pub(crate) fn check(&self, spec: &LayerSpec, needs: &Needs) -> Result<()> {
        let share = self.protected.recent_share;
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("recent share", "a number from 0 to 1", share));
        }
        let protected = |budget: usize| self.protected.counts(budget as f64).0.total();
        self.budget.check(spec.shape.kv_heads, protected)?;
        self.layer_budgets.check(spec)?;
        self.head_budgets.check()?;
        self.check_heads()?;
        match (self.granularity, self.decode_step) {
            (Granularity::Chunk(0), _) => {
                return Err(Error::setting("chunk", "at least 1 token", 0));
            }
            (_, Some(0)) => return Err(Error::setting("decode step", "at least 1 token", 0)),
            _ => {}
        }
        if self.keep_prompt && self.decode_step.is_none() {
            let expected = "a number of entries, since only decoded tokens are evicted";
            return Err(Error::setting("decode step", expected, "none"));
        }
        if self.rerotate {
            spec.require_rope("re-rotation")?;
        }
        if needs.queries.is_some() {
            spec.require_rope("a policy that reads queries before the rotary embedding")?;
        }
        self.check_observed(needs)
    }

    /// Refuses settings that need heads of equal length in combination with settings that make
    /// their lengths unequal.
    fn check_heads(&self) -> Result<()> {
        let own = matches!(self.budget, Budget::Heads(_));
        let adaptive = matches!(self.head_budgets, HeadBudgets::Adaptive { .. });
        if own && (adaptive || self.layer_budgets != LayerBudgets::Uniform) {
            let expected = "tokens or a ratio, which layers or heads can share";
            return Err(Error::setting("budget", expected, "one for each head"));
        }
        let uneven = match (own, adaptive) {
            (true, _) => format!("{:?}", self.budget),
            (_, true) => format!("{:?}", self.head_budgets),
            _ => return Ok(()),
        };
        if self.rerotate {
            let expected =
                "uniform ones, since re-rotation moves the same tokens' keys in all heads";
            return Err(Error::setting("head budgets", expected, uneven));
        }
        if self.granularity != Granularity::Token {
            let expected = "uniform ones, since a chunk is the same in all heads";
            return Err(Error::setting("head budgets", expected, uneven));
        }
        Ok(())
    }

    /// Checks that observed queries of earlier calls are protected. During decoding, they attend to
    /// the entries again, so their tokens must be the newest ones held.
    fn check_observed(&self, needs: &Needs) -> Result<()> {
        match needs.attention {
            Some(ObservedQueries::Newest { queries, .. })
                if queries > 1 && self.decode_step.is_some() && self.protected.recent < queries =>
            {
                let expected = format!("at least the {queries} tokens whose queries are observed");
                Err(Error::setting("protected recent tokens", expected, self.protected.recent))
            }
            _ => Ok(()),
        }
    }

    /// Returns each head's budget and its protected entries, for a prompt of `prompt` tokens when
    /// `seen` tokens have been fed.
    pub(crate) fn limits(
        &self,
        spec: &LayerSpec,
        prompt: usize,
        seen: usize,
    ) -> (Vec<usize>, ProtectedCounts) {
        if !self.keep_prompt {
            return self.limits_of(spec, prompt, seen);
        }
        let decoded = seen.saturating_sub(prompt);
        let (budgets, protected) = self.limits_of(spec, decoded, decoded);
        let budgets = budgets.into_iter().map(|budget| budget.saturating_add(prompt)).collect();
        (budgets, ProtectedCounts { sinks: protected.sinks.saturating_add(prompt), ..protected })
    }

    /// Returns the limits of `budgeted` tokens, of which the budget may be a ratio.
    fn limits_of(
        &self,
        spec: &LayerSpec,
        budgeted: usize,
        seen: usize,
    ) -> (Vec<usize>, ProtectedCounts) {
        let kv_heads = spec.shape.kv_heads;
        let mean = match &self.budget {
            Budget::Tokens(tokens) => *tokens as f64,
            Budget::Ratio(ratio) => ratio * budgeted as f64,
            Budget::Heads(heads) => {
                let budgets = heads.iter().map(|tokens| tokens.unwrap_or(usize::MAX));
                let Protected { sinks, recent, .. } = self.protected;
                return (budgets.collect(), ProtectedCounts { sinks, recent });
            }
        };
        let window = self.protected.counts(mean).0.recent;
        let own = self.layer_budgets.of_layer(spec, mean, seen.max(budgeted), window);
        let (protected, tokens) = self.protected.counts(own);
        (vec![tokens.max(protected.total()); kv_heads], protected)
    }
}
