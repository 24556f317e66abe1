//! A cache with the prompt in one store and decoded tokens in another.

use candle_core::Tensor;
use longctx_core::{
    AttentionState, Batch, Footprint, KvCache, KvStore, LayerSpec, Mask, Result, SeenTokens, SeqId,
    Step, attention, check_unseen,
};

/// Keeps the keys and values of the prompt in `P` and those of later tokens in `D`.
///
/// Calls belong to the prompt until a call of a single token follows another call. Attention is
/// exact among the tokens of a call, and uses the stored keys and values for earlier tokens.
///
/// If a store fails, earlier sequences of the batch have advanced.
pub struct SplitCache<P, D> {
    spec: LayerSpec,
    prompts: P,
    decoded: D,
    seen: SeenTokens,
}

impl<P: KvStore, D: KvStore> SplitCache<P, D> {
    /// Creates an empty cache over two empty stores of the layer's shape.
    pub fn new(spec: LayerSpec, prompts: P, decoded: D) -> Self {
        Self { spec, prompts, decoded, seen: SeenTokens::default() }
    }

    /// Returns whether a call of `tokens` tokens follows the prompt.
    fn is_decoded(&self, seq: SeqId, tokens: usize) -> bool {
        self.decoded.len(seq) > 0 || (tokens == 1 && self.seen(seq) > 0)
    }

    fn attention(&self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<AttentionState> {
        let mut parts = vec![attention::attend(step.batch, q, k, step.v, &self.spec.shape)?];
        let seqs = step.batch.seqs();
        if seqs.iter().any(|&seq| self.prompts.len(seq) > 0) {
            parts.push(self.prompts.attend(step.batch, q, Mask::Full)?);
        }
        if seqs.iter().any(|&seq| self.decoded.len(seq) > 0) {
            parts.push(self.decoded.attend(step.batch, q, Mask::Full)?);
        }
        AttentionState::merge(&parts)
    }

    fn append(&mut self, step: &Step<'_>, k: &Tensor) -> Result<()> {
        for (seq, tokens) in step.batch.iter() {
            let batch = Batch::single(seq, tokens.len())?;
            let rows = |x: &Tensor| x.narrow(0, tokens.start, tokens.len());
            let (k, v) = (rows(k)?, rows(step.v)?);
            match self.is_decoded(seq, tokens.len()) {
                true => self.decoded.append(&batch, &k, &v)?,
                false => self.prompts.append(&batch, &k, &v)?,
            }
            self.seen.advance(&batch);
        }
        Ok(())
    }
}

impl<P: KvStore, D: KvStore> KvCache for SplitCache<P, D> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        let state = self.attention(step, &q, &k)?;
        let out = self.spec.output(state, step.q.dtype())?;
        self.append(step, &k)?;
        Ok(out)
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        self.append(step, &k)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let seen = self.seen.check_fork(from, to)?;
        self.prompts.fork(from, to)?;
        if self.decoded.len(from) > 0
            && let Err(error) = self.decoded.fork(from, to)
        {
            self.prompts.remove(to);
            return Err(error);
        }
        self.seen.set(to, seen);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.seen.check_truncate(seq, len)?;
        match len.checked_sub(self.prompts.len(seq)) {
            Some(0) => Ok(()),
            Some(rest) if self.decoded.len(seq) > 0 => self.decoded.check_truncate(seq, rest),
            _ => self.prompts.check_truncate(seq, len),
        }
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        match len.checked_sub(self.prompts.len(seq)) {
            Some(0) => drop(self.decoded.remove(seq)),
            Some(rest) => self.decoded.truncate(seq, rest)?,
            None => {
                self.prompts.truncate(seq, len)?;
                self.decoded.remove(seq);
            }
        }
        self.seen.set(seq, len);
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.prompts.remove(seq);
        self.decoded.remove(seq);
        self.seen.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.seen.seqs()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(seq).unwrap_or(0)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.seen(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        let part = |decoded: bool| {
            let tokens = batch.iter().map(|(seq, tokens)| (seq, tokens.len()));
            let part: Vec<_> =
                tokens.filter(|&(seq, tokens)| self.is_decoded(seq, tokens) == decoded).collect();
            (!part.is_empty()).then(|| Batch::new(&part)).transpose()
        };
        let fits = |batch: Result<Option<Batch>>, store: &dyn KvStore| {
            batch.is_ok_and(|batch| batch.is_none_or(|batch| store.can_append(&batch)))
        };
        fits(part(false), &self.prompts) && fits(part(true), &self.decoded)
    }

    fn footprint(&self) -> Footprint {
        [self.prompts.footprint(), self.decoded.footprint()].into_iter().sum()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        [self.prompts.seq_footprint(seq), self.decoded.seq_footprint(seq)].into_iter().sum()
    }

    fn clear(&mut self) {
        self.prompts.clear();
        self.decoded.clear();
        self.seen.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use longctx_core::{AttentionShape, DenseCache, DenseStore, Rope, RopeScaling};
    use std::sync::Arc;

    fn spec() -> LayerSpec {
        let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap());
        LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap()).with_rope(rope)
    }

    /// Over two dense stores the cache equals a dense one: with chunks of a prompt, single tokens,
    /// a later question, forks and truncation.
    #[test]
    fn two_dense_stores_equal_a_dense_cache() {
        let store = || DenseStore::new(spec().shape, DType::F32).unwrap();
        let mut split = SplitCache::new(spec(), store(), store());
        let mut dense = DenseCache::new(spec(), DType::F32).unwrap();
        let feed = |split: &mut dyn KvCache, dense: &mut dyn KvCache, calls: &[(SeqId, usize)]| {
            let batch = Batch::new(calls).unwrap();
            let x = |heads| Tensor::randn(0f32, 1., (batch.tokens(), heads, 64), &Device::Cpu);
            let (q, k, v) = (x(4).unwrap(), x(2).unwrap(), x(2).unwrap());
            let step = Step { batch: &batch, q: &q, k: &k, v: &v };
            let (a, b) = (split.attend(&step).unwrap(), dense.attend(&step).unwrap());
            let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
            assert!(difference.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-5, "{calls:?}");
        };
        for calls in [&[(1, 40), (2, 7)][..], &[(2, 9), (1, 1)], &[(1, 1), (2, 1)], &[(1, 5)]] {
            feed(&mut split, &mut dense, calls);
        }
        assert_eq!((split.prompts.len(1), split.decoded.len(1)), (40, 7));
        assert_eq!((split.prompts.len(2), split.decoded.len(2)), (16, 1));
        for len in [44, 40] {
            for cache in [&mut split as &mut dyn KvCache, &mut dense] {
                cache.fork(1, len as SeqId).unwrap();
                cache.truncate(len as SeqId, len).unwrap();
            }
            feed(&mut split, &mut dense, &[(len as SeqId, 1), (1, 1)]);
        }
        assert!(split.remove(1) && !split.remove(1));
        assert_eq!(
            split.seqs(),
            dense.seqs().into_iter().filter(|&seq| seq != 1).collect::<Vec<_>>()
        );
    }
}
