//! One attention layer's memory, as a model sees it.

use crate::{AttentionShape, Footprint, Partial, Result, Rope};
use candle_core::Tensor;

/// What an attention layer hands its cache in one forward call.
///
/// All three tensors are as they come out of the projections: *before* the rotary embedding.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Queries, `[batch, heads, tokens, head_dim]`.
    pub q: &'a Tensor,
    /// Keys, `[batch, kv_heads, tokens, head_dim]`.
    pub k: &'a Tensor,
    /// Values, `[batch, kv_heads, tokens, head_dim]`.
    pub v: &'a Tensor,
    /// The layer's numbers.
    pub shape: &'a AttentionShape,
    /// The layer's rotary embedding. The cache alone decides at which positions keys are rotated.
    pub rope: &'a Rope,
}

/// One attention layer's memory: dense, quantized, evicting, retrieving.
///
/// An engine makes one per layer and runs every attention through it. The whole prompt in one call gets *exact* attention, and
/// is compressed afterwards; a prompt in chunks sees, from its second chunk on, what the compression left.
pub trait KvCache: Send {
    /// Takes this call's tokens in and returns their attention output, `[batch, heads, tokens, head_dim]`, in the dtype of `q`.
    ///
    /// Causal attention, exact among the tokens of this call, over them and whatever is kept from earlier calls.
    ///
    /// # Errors
    /// [`Error::Mismatch`](crate::Error::Mismatch) if a tensor does not fit the layer's shape, or the batch differs from earlier calls'.
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor>;

    /// Takes in a prompt, as the first call, whose attention the caller has computed: `whole`, exact and causal. For engines with a prefill of
    /// their own. The default computes it once more.
    ///
    /// # Errors
    /// As [`attend`](KvCache::attend).
    fn take_prompt(&mut self, step: &Step<'_>, whole: &Partial) -> Result<()> {
        let _ = whole;
        self.attend(step).map(drop)
    }

    /// Forgets what was taken in after the first `seen` tokens; says whether it could. `false` changes nothing: a cache that has
    /// dropped or changed what it holds can't go back.
    ///
    /// # Errors
    /// If fewer than `seen` tokens were taken in.
    fn rewind(&mut self, seen: usize) -> Result<bool> {
        crate::lm::check_rewind(self.seen(), seen)?;
        Ok(seen == self.seen())
    }

    /// Tokens taken in since the last reset.
    fn seen(&self) -> usize;

    /// Tokens still held, by the head that holds the most.
    fn held(&self) -> usize;

    /// Bytes held.
    fn footprint(&self) -> Footprint;

    /// Forgets everything and gives the memory back.
    fn reset(&mut self);
}

impl<C: KvCache + ?Sized> KvCache for Box<C> {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        (**self).attend(step)
    }
    fn take_prompt(&mut self, step: &Step<'_>, whole: &Partial) -> Result<()> {
        (**self).take_prompt(step, whole)
    }
    fn rewind(&mut self, seen: usize) -> Result<bool> {
        (**self).rewind(seen)
    }
    fn seen(&self) -> usize {
        (**self).seen()
    }
    fn held(&self) -> usize {
        (**self).held()
    }
    fn footprint(&self) -> Footprint {
        (**self).footprint()
    }
    fn reset(&mut self) {
        (**self).reset();
    }
}
