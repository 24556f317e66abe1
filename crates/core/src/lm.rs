//! Language models, seen from outside.

use crate::{Error, Footprint, Result};
use candle_core::{Device, Tensor};

/// For which of the tokens given the logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// The last token's: what generation needs. Shape `[batch, 1, vocab]`.
    Last,
    /// Every token's: what perplexity needs. Shape `[batch, tokens, vocab]`.
    All,
}

/// A causal language model with its memory: a transformer with its caches, or a recurrent model with its state.
pub trait CausalLm {
    /// Feeds `tokens` (u32, `[batch, tokens]`) after everything fed since the last reset; gives logits in f32.
    ///
    /// # Errors
    /// If the tokens have another shape or dtype, or one is outside the vocabulary; and whatever the layers report.
    fn forward(&mut self, tokens: &Tensor, logits: Logits) -> Result<Tensor>;

    /// Forgets all tokens fed.
    fn reset(&mut self);

    /// Forgets what was fed after the first `seen` tokens, so that others can follow them; says whether it could. `false` changes
    /// nothing: a recurrent state or a compressed cache can't be taken back, and the tokens have to be fed again after a reset.
    ///
    /// # Errors
    /// If fewer than `seen` tokens were fed; whatever the layers report.
    fn rewind(&mut self, seen: usize) -> Result<bool> {
        check_rewind(self.seen(), seen)?;
        Ok(seen == self.seen())
    }

    /// Tokens fed since the last reset.
    fn seen(&self) -> usize;

    /// Bytes of memory that the tokens fed occupy: caches or state, not weights.
    fn footprint(&self) -> Footprint;

    /// Entries of the vocabulary, the last dimension of the logits.
    fn vocab_size(&self) -> usize;

    /// The longest context that the model was made for, in tokens; `None` if it has no bound.
    fn context_length(&self) -> Option<usize>;

    /// The model family's name, as its tokenizer and chat template are known by: "llama", "mistral", "qwen2", "mamba", …
    fn family(&self) -> &str;

    /// Where the model computes; tokens are expected there.
    fn device(&self) -> &Device;
}

/// Checks that a memory of `held` tokens can go back to `seen`.
pub(crate) fn check_rewind(held: usize, seen: usize) -> Result<()> {
    if seen > held {
        return Err(Error::mismatch("tokens to rewind to", format!("at most {held}"), seen));
    }
    Ok(())
}
