//! The cache of one attention layer for many sequences, as a model sees it.

use crate::{Batch, Error, Footprint, LayerSpec, Result, SeqId, finite};
use candle_core::Tensor;

/// The tensors of one call for an attention layer. The tokens of all sequences are concatenated.
///
/// Queries and keys are the outputs of the projections, *before* the rotary embedding. If the
/// cache's [`LayerSpec`] has no rotary embedding, they are already rotated.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The sequences and their tokens.
    pub batch: &'a Batch,
    /// Queries, `[tokens, heads, head_dim]`.
    pub q: &'a Tensor,
    /// Keys, `[tokens, kv_heads, head_dim]`.
    pub k: &'a Tensor,
    /// Values, `[tokens, kv_heads, value_dim]`.
    pub v: &'a Tensor,
}

impl Step<'_> {
    /// Checks the tensors against the layer. Every cache calls it before it changes anything.
    ///
    /// On the CPU all elements must be finite. On other devices this is not checked, as the check
    /// would synchronize with the device: a NaN or infinity there gives NaN in the output of its
    /// own sequence.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the tensor whose shape does not fit; [`Error::NotFinite`] naming
    /// the tensor, token, head and channel.
    pub fn check(&self, spec: &LayerSpec) -> Result<()> {
        let shape = &spec.shape;
        let tokens = shape.check_q(self.q)?;
        if tokens != self.batch.tokens() {
            return Err(Error::mismatch("tokens of q", self.batch.tokens(), tokens));
        }
        let of_kv = shape.check_kv(self.k, self.v)?;
        if of_kv != tokens {
            return Err(Error::mismatch("tokens of k and v", tokens, of_kv));
        }
        [("q", self.q), ("k", self.k), ("v", self.v)]
            .into_iter()
            .try_for_each(|(name, x)| finite::check(name, x))
    }

    /// Returns queries and keys rotated to their positions, or unchanged if the layer has no rotary
    /// embedding. `seen` returns the number of earlier tokens of a sequence.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn rotate(
        &self,
        spec: &LayerSpec,
        seen: impl Fn(SeqId) -> usize,
    ) -> Result<(Tensor, Tensor)> {
        let positions = self.batch.positions(seen);
        Ok((spec.rotate(self.q, &positions)?, spec.rotate(self.k, &positions)?))
    }
}

/// The cache of one attention layer for many sequences: dense, quantized, with eviction or with
/// retrieval.
///
/// An engine makes one per layer and runs every attention through it. A sequence starts with the
/// first call that names it and ends with [`remove`](Self::remove). A prompt fed in one call has
/// *exact* attention and is compressed afterwards. A prompt fed in chunks sees the compressed cache
/// of the earlier chunks.
///
/// After an error every sequence is as it was before the call.
pub trait KvCache: Send {
    /// Returns the layer that the cache was made for.
    fn spec(&self) -> &LayerSpec;

    /// Appends the tokens of this call and returns their attention output, `[tokens, heads,
    /// value_dim]`, in the dtype of `q`.
    ///
    /// Attention is causal. It is exact among the tokens of this call and runs over them and the
    /// entries that the sequence holds from earlier calls.
    ///
    /// # Errors
    /// As [`Step::check`]; [`Error::PoolFull`] if there is not enough memory.
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor>;

    /// Appends whole prompts whose exact, causal attention the engine has computed with its own
    /// kernel. `lse` is its natural log-sum-exp, `[tokens, heads]`, f32. It is required only if
    /// [`needs_lse`](Self::needs_lse).
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and [`Error::Mismatch`] if a sequence has tokens already, or
    /// `lse` is missing where it is needed.
    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()>;

    /// Returns whether [`append_prompt`](Self::append_prompt) needs the log-sum-exp.
    fn needs_lse(&self) -> bool;

    /// Makes `to` a copy of `from`. They share memory until one of them changes it (copy on write).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] for `from`; [`Error::Mismatch`] if `to` exists.
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()>;

    /// Checks whether [`truncate`](Self::truncate) is possible. The error gives the reason if it is
    /// not.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if fewer than `len` tokens were seen;
    /// [`Error::Unsupported`] if entries dropped or changed since then cannot be restored.
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()>;

    /// Removes a sequence's tokens after the first `len`, as speculative decoding does with
    /// rejected tokens.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and no others.
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()>;

    /// Removes a sequence and frees its memory. Returns whether it existed.
    fn remove(&mut self, seq: SeqId) -> bool;

    /// Returns the sequences, in increasing order.
    fn seqs(&self) -> Vec<SeqId>;

    /// Returns the number of tokens that a sequence has seen; 0 for an unknown sequence.
    fn seen(&self, seq: SeqId) -> usize;

    /// Returns the number of entries of a sequence that the fullest kv head holds.
    fn held(&self, seq: SeqId) -> usize;

    /// Returns whether there is memory for a batch. An engine asks before it admits a request.
    fn can_append(&self, batch: &Batch) -> bool;

    /// Returns the bytes held for all sequences, including memory that is allocated and free.
    fn footprint(&self) -> Footprint;

    /// Returns the bytes held for one sequence. Memory that it shares with others counts in full.
    fn seq_footprint(&self, seq: SeqId) -> Footprint;

    /// Removes all sequences and frees the memory.
    fn clear(&mut self);
}

/// Checks that every sequence of a batch is new to a cache, as prompts must be.
///
/// # Errors
/// [`Error::Mismatch`] naming a sequence that has tokens.
pub fn check_unseen(cache: &(impl KvCache + ?Sized), batch: &Batch) -> Result<()> {
    match batch.seqs().iter().find(|&&seq| cache.seen(seq) > 0) {
        Some(&seq) => {
            let what = format!("tokens that sequence {seq} saw before its prompt");
            Err(Error::mismatch(what, 0, cache.seen(seq)))
        }
        None => Ok(()),
    }
}

/// Forwards every method of [`KvCache`] to an expression. Wrappers and boxes use it so that they
/// cannot miss a method.
macro_rules! forward_cache {
    () => {
        fn spec(&self) -> &LayerSpec {
            (**self).spec()
        }
        fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
            (**self).attend(step)
        }
        fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
            (**self).append_prompt(step, lse)
        }
        fn needs_lse(&self) -> bool {
            (**self).needs_lse()
        }
        fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
            (**self).fork(from, to)
        }
        fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
            (**self).check_truncate(seq, len)
        }
        fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
            (**self).truncate(seq, len)
        }
        fn remove(&mut self, seq: SeqId) -> bool {
            (**self).remove(seq)
        }
        fn seqs(&self) -> Vec<SeqId> {
            (**self).seqs()
        }
        fn seen(&self, seq: SeqId) -> usize {
            (**self).seen(seq)
        }
        fn held(&self, seq: SeqId) -> usize {
            (**self).held(seq)
        }
        fn can_append(&self, batch: &Batch) -> bool {
            (**self).can_append(batch)
        }
        fn footprint(&self) -> Footprint {
            (**self).footprint()
        }
        fn seq_footprint(&self, seq: SeqId) -> Footprint {
            (**self).seq_footprint(seq)
        }
        fn clear(&mut self) {
            (**self).clear();
        }
    };
}

impl<C: KvCache + ?Sized> KvCache for Box<C> {
    forward_cache!();
}

impl<C: KvCache + ?Sized> KvCache for &mut C {
    forward_cache!();
}
