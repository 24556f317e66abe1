use longctx_core::{Error, Result};

/// How much a cache may keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// So many tokens per kv head.
    Tokens(usize),
    /// This share of the tokens of the prompt, between 0 and 1, though never less than what is protected. It is settled anew by each call of
    /// several tokens; decoded tokens do not raise it.
    Ratio(f64),
    /// No bound of the cache's own: for policies that [bound each head themselves](longctx_core::EvictionPolicy::bounds_heads), as
    /// `DuoAttention` does, and for no others.
    Policy,
}

impl Budget {
    /// Checks that the budget suits a policy that does or does not bound its heads itself, and can be met with `protected` entries in it.
    pub(crate) fn check(
        self,
        bounds_heads: bool,
        protected: impl Fn(usize) -> usize,
    ) -> Result<()> {
        match self {
            Budget::Policy if !bounds_heads => {
                let expected = "tokens or a ratio, as this policy does not bound its heads itself";
                Err(Error::setting("budget", expected, "Policy"))
            }
            Budget::Tokens(_) | Budget::Ratio(_) if bounds_heads => {
                let expected = "Policy, as this policy bounds its heads itself";
                Err(Error::setting("budget", expected, format!("{self:?}")))
            }
            Budget::Tokens(0) => Err(Error::setting("budget", "at least 1 token", 0)),
            Budget::Tokens(tokens) if protected(tokens) > tokens => {
                let expected = format!("at least the {} protected tokens", protected(tokens));
                Err(Error::setting("budget", expected, tokens))
            }
            Budget::Ratio(ratio) if !(ratio > 0.0 && ratio < 1.0) => {
                Err(Error::setting("ratio", "a number between 0 and 1", ratio))
            }
            _ => Ok(()),
        }
    }

    /// Tokens, not rounded yet, for a prompt of `seen` tokens.
    pub(crate) fn of(self, seen: usize) -> f64 {
        match self {
            Budget::Tokens(tokens) => tokens as f64,
            Budget::Ratio(ratio) => ratio * seen as f64,
            Budget::Policy => f64::INFINITY,
        }
    }
}
