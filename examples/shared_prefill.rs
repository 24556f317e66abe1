//! One exact prefill for the caches of several methods.

use candle_core::Tensor;
use longctx_core::{
    Batch, Footprint, KvCache, LayerSpec, Result, SeqId, Step, attention, check_unseen,
};

/// A layer's caches for several methods, with one prefill.
///
/// With `n` caches, a sequence whose id is `i` modulo `n + 1` belongs to cache `i`. A sequence with
/// remainder `n` is a prompt: its only call attends exactly, and all caches append it. A fork of a
/// prompt belongs to one cache, which decodes it. A batch can have sequences of different caches.
///
/// If a cache fails, the caches of the batch's earlier sequences have already advanced.
pub struct SharedPrefill {
    spec: LayerSpec,
    caches: Vec<Box<dyn KvCache>>,
}

impl SharedPrefill {
    /// Creates it from at least one cache.
    pub fn new(spec: LayerSpec, caches: Vec<Box<dyn KvCache>>) -> Self {
        Self { spec, caches }
    }

    /// Returns the caches that hold a sequence.
    fn of(&self, seq: SeqId) -> &[Box<dyn KvCache>] {
        match self.route(seq) {
            Some(i) => &self.caches[i..=i],
            None => &self.caches,
        }
    }

    fn of_mut(&mut self, seq: SeqId) -> &mut [Box<dyn KvCache>] {
        match self.route(seq) {
            Some(i) => &mut self.caches[i..=i],
            None => &mut self.caches,
        }
    }

    /// Returns the index of a sequence's cache; `None` for a prompt.
    fn route(&self, seq: SeqId) -> Option<usize> {
        let i = seq as usize % (self.caches.len() + 1);
        (i < self.caches.len()).then_some(i)
    }

    /// Splits a batch into runs of sequences with the same route. Returns each run as a batch, with
    /// the index of its first token.
    fn runs(&self, batch: &Batch) -> Result<Vec<(Batch, usize)>> {
        let seqs: Vec<_> = batch.iter().collect();
        let runs = seqs.chunk_by(|a, b| self.route(a.0) == self.route(b.0));
        let run = |run: &[(SeqId, std::ops::Range<usize>)]| {
            let tokens: Vec<_> = run.iter().map(|(seq, tokens)| (*seq, tokens.len())).collect();
            Ok((Batch::new(&tokens)?, run[0].1.start))
        };
        runs.map(run).collect()
    }

    /// Computes attention of sequences with the same route.
    fn attend_run(&mut self, step: &Step<'_>) -> Result<Tensor> {
        if let Some(i) = self.route(step.batch.seqs()[0]) {
            return self.caches[i].attend(step);
        }
        let (q, k) = step.rotate(&self.spec, |_| 0)?;
        let state = attention::attend(step.batch, &q, &k, step.v, &self.spec.shape)?;
        self.append_run(step, Some(&state.lse))?;
        self.spec.output(state, step.q.dtype())
    }

    fn append_run(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        check_unseen(self, step.batch)?;
        let caches = self.of_mut(step.batch.seqs()[0]);
        let done = caches.iter_mut().try_for_each(|cache| cache.append_prompt(step, lse));
        if done.is_err() {
            for &seq in step.batch.seqs() {
                self.remove(seq);
            }
        }
        done
    }
}

/// Returns the tokens of a run in a step's tensor.
fn rows(x: &Tensor, (batch, start): &(Batch, usize)) -> Result<Tensor> {
    Ok(x.narrow(0, *start, batch.tokens())?)
}

impl KvCache for SharedPrefill {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        let runs = self.runs(step.batch)?;
        if runs.len() == 1 {
            return self.attend_run(step);
        }
        let mut outputs = Vec::new();
        for run in &runs {
            let (q, k, v) = (rows(step.q, run)?, rows(step.k, run)?, rows(step.v, run)?);
            outputs.push(self.attend_run(&Step { batch: &run.0, q: &q, k: &k, v: &v })?);
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }

    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        for run in self.runs(step.batch)? {
            let (q, k, v) = (rows(step.q, &run)?, rows(step.k, &run)?, rows(step.v, &run)?);
            let lse = lse.map(|lse| rows(lse, &run)).transpose()?;
            self.append_run(&Step { batch: &run.0, q: &q, k: &k, v: &v }, lse.as_ref())?;
        }
        Ok(())
    }

    fn needs_lse(&self) -> bool {
        self.caches.iter().any(|cache| cache.needs_lse())
    }

    /// A fork of a prompt belongs to the cache of `to`; other sequences are forked within their
    /// cache.
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let caches = self.of_mut(to);
        for done in 0..caches.len() {
            if let Err(error) = caches[done].fork(from, to) {
                for cache in &mut caches[..done] {
                    cache.remove(to);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.of(seq).iter().try_for_each(|cache| cache.check_truncate(seq, len))
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        self.of_mut(seq).iter_mut().try_for_each(|cache| cache.truncate(seq, len))
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        let removed = self.of_mut(seq).iter_mut().map(|cache| cache.remove(seq));
        removed.fold(false, |any, removed| any | removed)
    }

    fn seqs(&self) -> Vec<SeqId> {
        let mut all: Vec<_> = self.caches.iter().flat_map(|cache| cache.seqs()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.of(seq)[0].seen(seq)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.of(seq).iter().map(|cache| cache.held(seq)).max().unwrap_or(0)
    }

    /// Each cache is asked once, with all its tokens. Those of prompts are every cache's.
    fn can_append(&self, batch: &Batch) -> bool {
        let fits = |i: usize| {
            let tokens = batch.iter().map(|(seq, tokens)| (seq, tokens.len()));
            let own: Vec<_> =
                tokens.filter(|(seq, _)| self.route(*seq).is_none_or(|of| of == i)).collect();
            own.is_empty() || Batch::new(&own).is_ok_and(|own| self.caches[i].can_append(&own))
        };
        (0..self.caches.len()).all(fits)
    }

    fn footprint(&self) -> Footprint {
        self.caches.iter().map(|cache| cache.footprint()).sum()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.of(seq).iter().map(|cache| cache.seq_footprint(seq)).sum()
    }

    fn clear(&mut self) {
        self.caches.iter_mut().for_each(|cache| cache.clear());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::listed;
    use candle_core::{DType, Device};
    use longctx_core::{AttentionShape, DenseCache, Rope, RopeScaling};
    use std::sync::Arc;

    fn outputs(cache: &mut dyn KvCache, batch: &Batch, seed: u32) -> Vec<Vec<Vec<f32>>> {
        let x = |heads: usize, shift: f32| {
            let count = batch.tokens() * heads * 64;
            let wave = |i: usize| ((i as f32 + seed as f32 * 97.0) * 0.37 + shift).sin();
            let values: Vec<f32> = (0..count).map(wave).collect();
            Tensor::from_vec(values, (batch.tokens(), heads, 64), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (x(4, 0.0), x(2, 1.0), x(2, 2.0));
        let out = cache.attend(&Step { batch, q: &q, k: &k, v: &v }).unwrap();
        out.to_vec3().unwrap()
    }

    /// Compares every method that can share a prefill with a separate cache, in a batch with
    /// another method.
    #[test]
    fn forks_of_a_prompt_decode_as_separate_caches() {
        let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap());
        let spec = LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap()).with_rope(rope).at(1, 3);
        for method in listed().filter(|method| method.has_exact_prefill()) {
            let name = method.name();
            let mut own = method.cache(&spec).unwrap();
            let other = || listed().next().unwrap().cache(&spec).unwrap();
            let both = vec![other(), method.cache(&spec).unwrap()];
            let mut shared = SharedPrefill::new(spec.clone(), both);
            let prompt = outputs(&mut *own, &Batch::single(1, 300).unwrap(), 0);
            // Sequences with remainder 2 modulo 3 are prompts.
            let of_all = outputs(&mut shared, &Batch::single(2, 300).unwrap(), 0);
            assert!(of_all == prompt, "{name}");
            shared.fork(2, 0).unwrap();
            shared.fork(2, 4).unwrap();
            assert!(shared.remove(2));
            for step in 1..4 {
                let expected = outputs(&mut *own, &Batch::single(1, 1).unwrap(), step);
                let batch = Batch::decode(&[4, 0]).unwrap();
                let forked = outputs(&mut shared, &batch, step);
                assert!(forked[..1] == expected, "{name}, step {step}");
            }
            assert_eq!(shared.seq_footprint(4).payload, own.seq_footprint(1).payload, "{name}");
            assert_eq!((shared.seqs(), shared.seen(4), shared.seen(2)), (vec![0, 4], 303, 0));
        }
    }

    #[test]
    fn all_tokens_of_a_cache_need_room_together() {
        let spec = LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap());
        // A block of 32 keys and values in f32 for each of two heads.
        let bytes = 2 * 32 * 2 * 64 * 4;
        let cache = || -> Box<dyn KvCache> {
            Box::new(DenseCache::with_capacity(spec.clone(), DType::F32, bytes).unwrap())
        };
        let shared = SharedPrefill::new(spec.clone(), vec![cache(), cache()]);
        let fits = |seqs: &[(SeqId, usize)]| shared.can_append(&Batch::new(seqs).unwrap());
        assert!(fits(&[(2, 32)]) && fits(&[(0, 32), (1, 32)]));
        // Sequences 0 and 3 belong to one cache, and sequence 2 is a prompt.
        assert!(!fits(&[(0, 32), (1, 32), (3, 1)]) && !fits(&[(2, 32), (1, 1)]));
    }
}
