//! How a cache applies a policy.

use crate::{
    Budget, Granularity, HeadBudgets, LayerBudgets, Needs, ObservedQueries, Protected, select::Ends,
};
use longctx_core::{Error, LayerSpec, Result};

/// Which calls of a prompt are followed by eviction.
///
/// Calls of several tokens bring a prompt, unless its length was
/// [told](crate::PolicyCache::expect_prompt) and is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Prefill {
    /// Each: a prompt in chunks never holds more than the budget and one chunk, and a chunk sees
    /// what earlier eviction left.
    #[default]
    EveryCall,
    /// The first alone, as kvpress does it; what comes later stays, unless the cache evicts while
    /// decoding.
    FirstCall,
}

/// How a [`PolicyCache`](crate::PolicyCache) applies a policy: how much stays, how layers and heads
/// share it, and when eviction happens.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// How much of a sequence stays.
    pub budget: Budget,
    /// How the model's layers share the budget.
    pub layer_budgets: LayerBudgets,
    /// How the layer's kv heads share the budget.
    pub head_budgets: HeadBudgets,
    /// What is kept or dropped as one.
    pub granularity: Granularity,
    /// Entries that stay whatever their scores.
    pub protected: Protected,
    /// Which calls of a prompt are followed by eviction.
    pub prefill: Prefill,
    /// How many entries a head gives up at a time while decoding, once it is over its budget;
    /// `None`: decoded tokens all stay. Larger steps share the cost of scoring among as many tokens.
    pub decode_step: Option<usize>,
    /// Whether kept keys are rotated to contiguous positions, as in Finch and transformers'
    /// `SinkCache`. The next token then comes right after the kept ones, so that a text longer than
    /// the model was trained for stays within known positions. A packed store packs all kept keys
    /// anew each time.
    pub rerotate: bool,
}

impl Settings {
    /// Uniform budgets, single tokens, nothing protected, eviction after every call of a prompt and
    /// by 64 entries at a time while decoding.
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
        }
    }

    /// Checks the settings with each other, with the layer and with what the policy reads.
    pub(crate) fn check(&self, spec: &LayerSpec, needs: &Needs) -> Result<()> {
        let share = self.protected.recent_share;
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("recent share", "a number from 0 to 1", share));
        }
        let protected = |budget: usize| self.protected.within(budget as f64).0.total();
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
        if self.rerotate {
            spec.rope_for("re-rotation")?;
        }
        if needs.queries.is_some() {
            spec.rope_for("a policy that reads queries before the rotary embedding")?;
        }
        self.check_observed(needs)
    }

    /// What needs heads that hold equally many entries is not combined with heads that don't.
    fn check_heads(&self) -> Result<()> {
        let own = matches!(self.budget, Budget::Heads(_));
        let adaptive = matches!(self.head_budgets, HeadBudgets::Adaptive { .. });
        if own && (adaptive || self.layer_budgets != LayerBudgets::Uniform) {
            let expected = "tokens or a ratio, which layers or heads can share";
            return Err(Error::setting("budget", expected, "one for each head"));
        }
        let uneven = own || adaptive;
        if uneven && self.rerotate {
            let expected =
                "uniform ones, since re-rotation moves the same tokens' keys in all heads";
            return Err(Error::setting("head budgets", expected, "others"));
        }
        if uneven && self.granularity != Granularity::Token {
            let expected = "uniform ones, since a chunk is the same in all heads";
            return Err(Error::setting("head budgets", expected, "others"));
        }
        Ok(())
    }

    /// While decoding, queries of earlier calls look at the entries again: the tokens that they
    /// came with must be the newest ones held.
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

    /// Each head's budget and the ends protected within it, for a prompt of `prompt` tokens when
    /// `seen` have come.
    pub(crate) fn limits(
        &self,
        spec: &LayerSpec,
        prompt: usize,
        seen: usize,
    ) -> (Vec<usize>, Ends) {
        let kv_heads = spec.shape.kv_heads;
        let mean = match &self.budget {
            Budget::Tokens(tokens) => *tokens as f64,
            Budget::Ratio(ratio) => ratio * prompt as f64,
            Budget::Heads(heads) => {
                let budgets = heads.iter().map(|tokens| tokens.unwrap_or(usize::MAX));
                let Protected { sinks, recent, .. } = self.protected;
                return (budgets.collect(), Ends { sinks, recent });
            }
        };
        let window = self.protected.within(mean).0.recent;
        let own = self.layer_budgets.of_layer(spec, mean, seen.max(prompt), window);
        let (ends, tokens) = self.protected.within(own);
        (vec![tokens.max(ends.total()); kv_heads], ends)
    }
}
