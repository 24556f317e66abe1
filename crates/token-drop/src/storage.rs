//! Store operations that several caches share.

use candle_core::Tensor;
use longctx_core::{
    AttentionShape, AttentionState, Batch, Error, KvStore, LayerSpec, Mark, Result, SeqId, Step,
};

/// Checks that a store is new and made for the layer, and that the layer has no sliding window.
pub fn check_store(spec: &LayerSpec, store: &impl KvStore, method: &str) -> Result<()> {
    if spec.shape.window.is_some() {
        let what = format!("{method} in a layer that has a sliding window of its own");
        return Err(Error::Unsupported(what));
    }
    check_shape(&spec.shape, store)?;
    match store.seqs().len() {
        0 => Ok(()),
        held => Err(Error::setting("store", "an empty store", format!("{held} sequences"))),
    }
}

fn check_shape(shape: &AttentionShape, store: &impl KvStore) -> Result<()> {
    if store.shape() != shape {
        let (expected, got) = (format!("{shape:?}"), format!("{:?}", store.shape()));
        return Err(Error::mismatch("the store's shape", expected, got));
    }
    Ok(())
}

/// Truncates a sequence that may have no entries in the store.
pub fn truncate(store: &mut impl KvStore, seq: SeqId, len: usize) -> Result<()> {
    match store.lens(seq).is_empty() {
        true => Ok(()),
        false => store.truncate(seq, len),
    }
}

/// Returns marks of a batch's sequences.
pub fn marks(store: &impl KvStore, batch: &Batch) -> Vec<Mark> {
    batch.seqs().iter().map(|&seq| store.mark(seq)).collect()
}

/// Restores the sequences of a failed call to their marks. Returns those that cannot be restored.
pub fn restore(store: &mut impl KvStore, batch: &Batch, marks: &[Mark]) -> Vec<SeqId> {
    let is_lost = |(seq, mark): &(&SeqId, &Mark)| store.restore(**seq, mark).is_err();
    batch.seqs().iter().zip(marks).filter(is_lost).map(|(&seq, _)| seq).collect()
}

/// Checks the log-sum-exp of an engine's own prefill attention.
pub fn check_lse(step: &Step<'_>, lse: Option<&Tensor>, spec: &LayerSpec) -> Result<()> {
    let expected = [step.batch.tokens(), spec.shape.heads];
    match lse {
        Some(lse) if lse.dims() == expected => Ok(()),
        Some(lse) => {
            Err(Error::mismatch("lse", format!("{expected:?}"), format!("{:?}", lse.dims())))
        }
        None => Err(Error::mismatch("lse", format!("{expected:?}"), "none")),
    }
}

/// Returns the log-sum-exp over everything that the queries see, including learned sink logits.
pub fn lse_with_sink_logits(state: &AttentionState, spec: &LayerSpec) -> Result<Tensor> {
    match &spec.sink_logits {
        Some(logits) => Ok(state.clone().with_sink_logits(logits)?.lse),
        None => Ok(state.lse.clone()),
    }
}

/// Forks a sequence that may have no entries in the store.
pub fn fork(store: &mut impl KvStore, from: SeqId, to: SeqId) -> Result<()> {
    match store.lens(from).is_empty() {
        true => Ok(()),
        false => store.fork(from, to),
    }
}
