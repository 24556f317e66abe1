//! The interface of language models.

use crate::{Batch, Footprint, Greedy, Result, SeqId};
use candle_core::{Device, Tensor};

/// Which tokens' logits to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// The last token of each sequence, as generation needs. Shape `[sequences, vocab]`.
    Last,
    /// Every token, as perplexity needs. Shape `[tokens, vocab]`.
    All,
}

/// A causal language model and its memory of many sequences: a transformer with its KV caches, or a
/// recurrent model with its states.
///
/// A sequence starts with the first call that names it and ends with [`remove`](Self::remove).
pub trait CausalLm {
    /// Feeds each sequence of the batch its next tokens and returns logits in f32. Weights are read
    /// once for the whole batch.
    ///
    /// # Errors
    /// If the number of ids is not the number of tokens of the batch, or an id is outside the
    /// vocabulary; errors of the layers. After an error a sequence of the batch is as it was
    /// before, or [poisoned](crate::Error::Poisoned) if its layers cannot be rolled back. Other
    /// sequences are unchanged.
    fn forward(&mut self, batch: &Batch, ids: &[u32], logits: Logits) -> Result<Tensor>;

    /// Runs [`forward`](Self::forward) and returns each sequence's most probable next token, chosen
    /// by [`Greedy::choose`]. On a GPU a model may do work of the step that only the next one
    /// needs, such as evictions, while the tokens are chosen.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward); an error of [`Greedy::choose`], after which the tokens have
    /// been fed.
    fn forward_greedy(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        greedy: &mut Greedy,
    ) -> Result<Vec<Result<u32>>> {
        greedy.choose(&self.forward(batch, ids, Logits::Last)?)
    }

    /// Makes `to` a copy of `from`. They share memory where possible.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`](crate::Error::UnknownSequence) for `from`;
    /// [`Error::Mismatch`](crate::Error::Mismatch) if `to` exists.
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()>;

    /// Checks whether [`truncate`](Self::truncate) is possible. The error gives the reason if it is
    /// not.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`](crate::Error::UnknownSequence);
    /// [`Error::Mismatch`](crate::Error::Mismatch) if fewer tokens were fed;
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the memory cannot be rolled back.
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()>;

    /// Removes a sequence's tokens after the first `len`, so that others can follow.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and no others.
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()>;

    /// Removes a sequence and frees its memory. Returns whether it existed.
    fn remove(&mut self, seq: SeqId) -> bool;

    /// Returns the sequences, in increasing order.
    fn seqs(&self) -> Vec<SeqId>;

    /// Returns the number of tokens fed to a sequence; 0 for an unknown sequence.
    fn seen(&self, seq: SeqId) -> usize;

    /// Returns whether there is memory for a batch.
    fn can_append(&self, batch: &Batch) -> bool;

    /// Returns the memory of all sequences in bytes: caches or states, without weights.
    fn footprint(&self) -> Footprint;

    /// Returns the memory of one sequence in bytes. Memory that it shares with others counts in
    /// full.
    fn seq_footprint(&self, seq: SeqId) -> Footprint;

    /// Removes all sequences and frees their memory.
    fn clear(&mut self);

    /// Returns the size of the vocabulary, the last dimension of the logits.
    fn vocab_size(&self) -> usize;

    /// Returns the longest context that the model supports, in tokens; `None` if unlimited.
    fn context_length(&self) -> Option<usize>;

    /// Returns the name of the model family, which selects its tokenizer and chat template:
    /// "llama", "mistral", "qwen2", "mamba", …
    fn model_type(&self) -> &str;

    /// Returns the device of the computation and the logits.
    fn device(&self) -> &Device;
}
