use longctx_core::{Error, Result};

/// The number of entries that a cache may keep of a sequence.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// This many tokens for each kv head.
    Tokens(usize),
    /// This share of the prompt's tokens, between 0 and 1, but at least the protected tokens.
    /// [`expect_prompt`](crate::PolicyCache::expect_prompt) sets the prompt's length in advance;
    /// otherwise the budget grows with the prompt. Decoded tokens do not raise it.
    Ratio(f64),
    /// A number of tokens for each kv head of the layer; `None`: all tokens. DuoAttention uses it.
    Heads(Vec<Option<usize>>),
}

impl Budget {
    /// Checks that `kv_heads` heads can meet the budget. `protected` returns the number of
    /// protected entries for a budget of the given number of tokens.
    pub(crate) fn check(&self, kv_heads: usize, protected: impl Fn(usize) -> usize) -> Result<()> {
        match self {
            Budget::Tokens(tokens) => check_tokens(*tokens, protected),
            Budget::Ratio(ratio) => check_ratio(*ratio),
            Budget::Heads(heads) if heads.len() != kv_heads => {
                let expected = format!("one for each of {kv_heads} kv heads");
                Err(Error::setting("budgets of heads", expected, heads.len()))
            }
            Budget::Heads(heads) => {
                heads.iter().flatten().try_for_each(|&tokens| check_tokens(tokens, &protected))
            }
        }
    }
}

fn check_tokens(tokens: usize, protected: impl Fn(usize) -> usize) -> Result<()> {
    match protected(tokens) {
        _ if tokens == 0 => Err(Error::setting("budget", "at least 1 token", 0)),
        protected if protected > tokens => Err(Error::setting(
            "budget",
            format!("at least the {protected} protected tokens"),
            tokens,
        )),
        _ => Ok(()),
    }
}

/// Checks a ratio of a prompt.
pub(crate) fn check_ratio(ratio: f64) -> Result<()> {
    match ratio > 0.0 && ratio < 1.0 {
        true => Ok(()),
        false => Err(Error::setting("ratio", "a number between 0 and 1", ratio)),
    }
}
