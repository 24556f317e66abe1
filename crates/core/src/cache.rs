//! The cache of one attention layer for many sequences, as a model sees it.

use crate::{Batch, Error, Footprint, LayerSpec, PreparedDecode, Result, SeqId, finite};
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
    /// would synchronize with the device: a NaN or infinity there makes only the output of its own
    /// sequence NaN.
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
    /// [`Error::NotFinite`] if a rotated number overflows, on the CPU; if a tensor operation fails.
    pub fn rotate(
        &self,
        spec: &LayerSpec,
        seen: impl Fn(SeqId) -> usize,
    ) -> Result<(Tensor, Tensor)> {
        let Some(rope) = &spec.rope else { return Ok((self.q.clone(), self.k.clone())) };
        let (q, k) = rope.apply_both(self.q, self.k, &self.batch.positions(seen))?;
        [("rotated q", &q), ("rotated k", &k)]
            .into_iter()
            .try_for_each(|(name, x)| finite::check(name, x))?;
        Ok((q, k))
    }

    /// As [`rotate`](Self::rotate) in a prepared step, with positions (i64, one per token) at a
    /// device address.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if no CUDA kernel rotates these tensors; errors of the driver.
    ///
    /// # Safety
    /// The address is that of a position for each token, on the device of the tensors. The memory
    /// lives until the launch has run.
    #[cfg(feature = "cuda")]
    #[allow(unsafe_code)]
    pub unsafe fn rotate_at(&self, spec: &LayerSpec, positions: u64) -> Result<(Tensor, Tensor)> {
        match &spec.rope {
            Some(rope) => rope.apply_both_at(self.q, self.k, positions),
            None => Ok((self.q.clone(), self.k.clone())),
        }
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
/// After an error every sequence is as it was before the call, or, if a cache that evicts cannot
/// restore it, [poisoned](Error::Poisoned).
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
    /// As [`Step::check`] and [`Step::rotate`]; [`Error::Mismatch`] for a number that the cache
    /// cannot represent; [`Error::PoolFull`] if there is not enough memory.
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor>;

    /// Appends whole prompts whose exact, causal attention the engine has computed with its own
    /// kernel. `lse` is the natural log-sum-exp of that attention, `[tokens, heads]`, f32. It is
    /// required only if [`needs_lse`](Self::needs_lse).
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and [`Error::Mismatch`] if a sequence has tokens already, or
    /// `lse` is missing where it is needed.
    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()>;

    /// Returns the interface for decode steps in CUDA graphs; `None` if such a step is not possible
    /// for this batch.
    fn prepared_decode(&mut self, _: &Batch) -> Option<&mut dyn PreparedDecode> {
        None
    }

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

    /// Returns the bytes held for all sequences, including allocated memory that is not in use.
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

/// Implements methods of [`KvCache`] by delegation to another cache, for wrappers that change only
/// some methods.
///
/// ```
/// use candle_core::Tensor;
/// use longctx_core::{DenseCache, KvCache, Result, Step, forward_kv_cache};
///
/// /// Counts the calls of a cache.
/// struct Counted {
///     inner: DenseCache,
///     calls: usize,
/// }
///
/// impl KvCache for Counted {
///     fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
///         self.calls += 1;
///         self.inner.attend(step)
///     }
///
///     forward_kv_cache!(self => self.inner;
///         spec, append_prompt, needs_lse, fork, check_truncate, truncate, remove, seqs, seen,
///         held, can_append, footprint, seq_footprint, clear);
/// }
/// ```
#[macro_export]
macro_rules! forward_kv_cache {
    ($self:ident => $to:expr; $($method:ident),+ $(,)?) => {
        $($crate::forward_kv_cache!(@$method $self, $to);)+
    };
    (@spec $self:ident, $to:expr) => {
        fn spec(&$self) -> &$crate::LayerSpec {
            $to.spec()
        }
    };
    (@attend $self:ident, $to:expr) => {
        fn attend(
            &mut $self,
            step: &$crate::Step<'_>,
        ) -> $crate::Result<$crate::candle_core::Tensor> {
            $to.attend(step)
        }
    };
    (@append_prompt $self:ident, $to:expr) => {
        fn append_prompt(
            &mut $self,
            step: &$crate::Step<'_>,
            lse: Option<&$crate::candle_core::Tensor>,
        ) -> $crate::Result<()> {
            $to.append_prompt(step, lse)
        }
    };
    (@prepared_decode $self:ident, $to:expr) => {
        fn prepared_decode(
            &mut $self,
            batch: &$crate::Batch,
        ) -> Option<&mut dyn $crate::PreparedDecode> {
            $to.prepared_decode(batch)
        }
    };
    (@needs_lse $self:ident, $to:expr) => {
        fn needs_lse(&$self) -> bool {
            $to.needs_lse()
        }
    };
    (@fork $self:ident, $to:expr) => {
        fn fork(&mut $self, from: $crate::SeqId, to: $crate::SeqId) -> $crate::Result<()> {
            $to.fork(from, to)
        }
    };
    (@check_truncate $self:ident, $to:expr) => {
        fn check_truncate(&$self, seq: $crate::SeqId, len: usize) -> $crate::Result<()> {
            $to.check_truncate(seq, len)
        }
    };
    (@truncate $self:ident, $to:expr) => {
        fn truncate(&mut $self, seq: $crate::SeqId, len: usize) -> $crate::Result<()> {
            $to.truncate(seq, len)
        }
    };
    (@remove $self:ident, $to:expr) => {
        fn remove(&mut $self, seq: $crate::SeqId) -> bool {
            $to.remove(seq)
        }
    };
    (@seqs $self:ident, $to:expr) => {
        fn seqs(&$self) -> Vec<$crate::SeqId> {
            $to.seqs()
        }
    };
    (@seen $self:ident, $to:expr) => {
        fn seen(&$self, seq: $crate::SeqId) -> usize {
            $to.seen(seq)
        }
    };
    (@held $self:ident, $to:expr) => {
        fn held(&$self, seq: $crate::SeqId) -> usize {
            $to.held(seq)
        }
    };
    (@can_append $self:ident, $to:expr) => {
        fn can_append(&$self, batch: &$crate::Batch) -> bool {
            $to.can_append(batch)
        }
    };
    (@footprint $self:ident, $to:expr) => {
        fn footprint(&$self) -> $crate::Footprint {
            $to.footprint()
        }
    };
    (@seq_footprint $self:ident, $to:expr) => {
        fn seq_footprint(&$self, seq: $crate::SeqId) -> $crate::Footprint {
            $to.seq_footprint(seq)
        }
    };
    (@clear $self:ident, $to:expr) => {
        fn clear(&mut $self) {
            $to.clear()
        }
    };
}

impl<C: KvCache + ?Sized> KvCache for Box<C> {
    forward_kv_cache!(self => (**self);
        spec, attend, append_prompt, prepared_decode, needs_lse, fork, check_truncate, truncate,
        remove, seqs, seen, held, can_append, footprint, seq_footprint, clear);
}

impl<C: KvCache + ?Sized> KvCache for &mut C {
    forward_kv_cache!(self => (**self);
        spec, attend, append_prompt, prepared_decode, needs_lse, fork, check_truncate, truncate,
        remove, seqs, seen, held, can_append, footprint, seq_footprint, clear);
}
