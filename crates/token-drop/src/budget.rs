use longctx_core::{Error, Result};

/// How much a cache may keep of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Budget {
    /// So many tokens for each kv head.
    Tokens(usize),
    /// This share of the tokens of the prompt, between 0 and 1, though never less than what is
    /// protected. [`expect_prompt`](crate::PolicyCache::expect_prompt) tells a prompt's length
    /// beforehand; otherwise the budget grows as the prompt comes. Decoded tokens do not raise it.
    Ratio(f64),
    /// So many tokens for each of the layer's kv heads; `None`: all. As DuoAttention has it.
    Heads(Vec<Option<usize>>),
}

impl Budget {
    /// Checks that the budget can be met by `kv_heads` heads. `protected`: the entries protected
    /// within a budget of so many tokens.
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

/// Checks a share of a prompt.
pub(crate) fn check_ratio(ratio: f64) -> Result<()> {
    match ratio > 0.0 && ratio < 1.0 {
        true => Ok(()),
        false => Err(Error::setting("ratio", "a number between 0 and 1", ratio)),
    }
}
