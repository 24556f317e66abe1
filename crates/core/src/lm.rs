//! Language models, seen from outside.

use crate::{Batch, Footprint, Result, SeqId};
use candle_core::{Device, Tensor};

/// For which of the tokens given the logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Each sequence's last token's: what generation needs. Shape `[sequences, vocab]`.
    Last,
    /// Every token's: what perplexity needs. Shape `[tokens, vocab]`.
    All,
}

/// A causal language model with its memory of many sequences: a transformer with its caches, or a
/// recurrent model with its states.
///
/// A sequence begins with the first call that names it and ends with [`remove`](Self::remove).
pub trait CausalLm {
    /// Feeds each sequence of the batch its tokens, after those that it was fed before; gives
    /// logits in f32. Weights are read once for the whole batch.
    ///
    /// # Errors
    /// If there is not one id for each token of the batch, or one is outside the vocabulary; and
    /// the layers' errors. A sequence of the batch is then as it was before, or
    /// [poisoned](crate::Error::Poisoned) where its layers can't go back; others are untouched.
    fn forward(&mut self, batch: &Batch, ids: &[u32], logits: Logits) -> Result<Tensor>;

    /// Makes `to` a copy of `from`, sharing memory where it can.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`](crate::Error::UnknownSequence) for `from`;
    /// [`Error::Mismatch`](crate::Error::Mismatch) if `to` exists.
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()>;

    /// Whether [`truncate`](Self::truncate) can do this; an error says why not.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`](crate::Error::UnknownSequence);
    /// [`Error::Mismatch`](crate::Error::Mismatch) if fewer tokens were fed;
    /// [`Error::Unsupported`](crate::Error::Unsupported) from memories that can't go back.
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()>;

    /// Forgets a sequence's tokens after its first `len`, so that others can follow them.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and no others.
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()>;

    /// Ends a sequence and gives its memory back. Returns whether it existed.
    fn remove(&mut self, seq: SeqId) -> bool;

    /// The sequences, in increasing order.
    fn seqs(&self) -> Vec<SeqId>;

    /// Tokens that a sequence was fed; 0 for one that is not known.
    fn seen(&self, seq: SeqId) -> usize;

    /// Whether there is memory for a batch.
    fn can_take(&self, batch: &Batch) -> bool;

    /// Bytes of memory of all sequences: caches or states, not weights.
    fn footprint(&self) -> Footprint;

    /// Bytes of memory of one sequence. Memory that it shares with others counts in full.
    fn seq_footprint(&self, seq: SeqId) -> Footprint;

    /// Ends all sequences and gives their memory back.
    fn clear(&mut self);

    /// Entries of the vocabulary, the last dimension of the logits.
    fn vocab_size(&self) -> usize;

    /// The longest context that the model was made for, in tokens; `None` if it has no bound.
    fn context_length(&self) -> Option<usize>;

    /// The model family's name, as its tokenizer and chat template are known by: "llama",
    /// "mistral", "qwen2", "mamba", …
    fn family(&self) -> &str;

    /// Where the model computes; logits lie there.
    fn device(&self) -> &Device;
}
