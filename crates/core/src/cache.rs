//! One attention layer's memory for many sequences, as a model sees it.

use crate::{Batch, Error, Footprint, LayerSpec, Result, SeqId, finite};
use candle_core::Tensor;

/// One call's tensors for an attention layer. Tokens of all sequences lie one after the other.
///
/// Queries and keys come as they leave the projections, *before* the rotary embedding, unless the
/// cache's [`LayerSpec`] has no rotary embedding: then they come rotated.
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
    /// On the CPU all numbers must be finite. On other devices a check would wait for the device;
    /// NaN and infinity there lead to NaN in the output of the sequence that holds them.
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

    /// Queries and keys rotated to their positions. `seen` gives the tokens before each sequence's
    /// own. As they are if the layer has no rotary embedding.
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

/// One attention layer's memory for many sequences: dense, quantized, evicting, retrieving.
///
/// An engine makes one per layer and runs every attention through it. A sequence begins with the
/// first call that names it and ends with [`remove`](Self::remove). A whole prompt in one call has
/// *exact* attention and is compressed afterwards; a prompt in chunks sees, from its second chunk
/// on, the compressed memory of the chunks before.
///
/// After an error every sequence is as it was before the call.
pub trait KvCache: Send {
    /// The layer that it was made for.
    fn spec(&self) -> &LayerSpec;

    /// Takes in this call's tokens and returns their attention output,
    /// `[tokens, heads, value_dim]`, in the dtype of `q`.
    ///
    /// Attention is causal. It is exact among a sequence's tokens of this call, over them and over
    /// what the sequence holds from earlier calls.
    ///
    /// # Errors
    /// As [`Step::check`]; [`Error::PoolFull`] if the memory does not suffice.
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor>;

    /// Takes in whole prompts whose exact, causal attention the engine has computed with a kernel
    /// of its own. `lse`: its natural log-sum-exp, `[tokens, heads]`, f32; needed only if
    /// [`needs_lse`](Self::needs_lse).
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and [`Error::Mismatch`] if a sequence has tokens already, or
    /// `lse` is missing where it is needed.
    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()>;

    /// Whether [`append_prompt`](Self::append_prompt) needs the log-sum-exp.
    fn needs_lse(&self) -> bool;

    /// Makes `to` a copy of `from` that shares its memory until one of them changes it.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] for `from`; [`Error::Mismatch`] if `to` exists.
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()>;

    /// Whether [`truncate`](Self::truncate) can do this; an error says why not.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if fewer than `len` tokens were seen;
    /// [`Error::Unsupported`] if what was dropped or changed since can't be restored.
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()>;

    /// Forgets a sequence's tokens after its first `len`, as speculative decoding does with
    /// rejected ones.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and no others.
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()>;

    /// Ends a sequence and gives its memory back. Returns whether it existed.
    fn remove(&mut self, seq: SeqId) -> bool;

    /// The sequences, in increasing order.
    fn seqs(&self) -> Vec<SeqId>;

    /// Tokens that a sequence has seen; 0 for one that is not known.
    fn seen(&self, seq: SeqId) -> usize;

    /// Tokens that the kv head that holds the most holds of a sequence.
    fn held(&self, seq: SeqId) -> usize;

    /// Whether there is memory for a batch: what an engine asks before it admits a request.
    fn can_take(&self, batch: &Batch) -> bool;

    /// Bytes held for all sequences, with what is allocated and free.
    fn footprint(&self) -> Footprint;

    /// Bytes held for one sequence. Memory that it shares with others counts in full.
    fn seq_footprint(&self, seq: SeqId) -> Footprint;

    /// Ends all sequences and gives the memory back.
    fn clear(&mut self);
}

/// Whether a sequence of `seen` tokens, of which the newest `held` are left, can go back to its first
/// `len`: the rest must still fill the window of the token to come.
///
/// # Errors
/// [`Error::Mismatch`] if fewer tokens were fed; [`Error::Unsupported`] if too many have slid out.
pub(crate) fn check_window_truncate(
    seq: SeqId,
    seen: usize,
    held: usize,
    window: Option<usize>,
    len: usize,
) -> Result<()> {
    if len > seen {
        let what = format!("tokens of sequence {seq} to keep");
        return Err(Error::mismatch(what, format!("at most {seen}"), len));
    }
    let reach = window.map_or(len, |window| window - 1);
    if len < seen && seen - held > len.saturating_sub(reach) {
        let what = "truncating a sequence beyond what its sliding window still holds";
        return Err(Error::Unsupported(what.into()));
    }
    Ok(())
}

/// Checks that every sequence of a batch is new to a cache, as prompts must be.
///
/// # Errors
/// [`Error::Mismatch`] naming a sequence that has tokens.
pub fn check_new(cache: &(impl KvCache + ?Sized), batch: &Batch) -> Result<()> {
    match batch.seqs().iter().find(|&&seq| cache.seen(seq) > 0) {
        Some(&seq) => {
            let what = format!("tokens that sequence {seq} saw before its prompt");
            Err(Error::mismatch(what, 0, cache.seen(seq)))
        }
        None => Ok(()),
    }
}

/// Forwards every method of [`KvCache`] to a place: for wrappers and boxes, which then can't
/// forget one.
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
        fn can_take(&self, batch: &Batch) -> bool {
            (**self).can_take(batch)
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
