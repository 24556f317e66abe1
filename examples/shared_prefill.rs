//! One exact prefill that several caches take in.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;
use longctx_core::{
    Batch, Error, Footprint, KvCache, LayerSpec, Result, SeqId, Step, attention, check_new,
};

/// A layer's caches for several methods, behind one prefill: a sequence's first call attends
/// exactly, and all caches take it in. Later calls, and questions about a sequence, go to the
/// active cache alone. Sequences end in all caches.
pub struct SharedPrefill {
    spec: LayerSpec,
    caches: Vec<Box<dyn KvCache>>,
    active: Arc<AtomicUsize>,
}

impl SharedPrefill {
    /// `active`: the number of the cache that decodes. All layers share it.
    pub fn new(spec: LayerSpec, caches: Vec<Box<dyn KvCache>>, active: Arc<AtomicUsize>) -> Self {
        Self { spec, caches, active }
    }

    fn active(&self) -> &dyn KvCache {
        &*self.caches[self.active.load(Ordering::Relaxed)]
    }

    fn active_mut(&mut self) -> &mut dyn KvCache {
        &mut *self.caches[self.active.load(Ordering::Relaxed)]
    }
}

impl KvCache for SharedPrefill {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let begun = step.batch.seqs().iter().filter(|&&seq| self.seen(seq) > 0).count();
        if begun == step.batch.seqs().len() {
            return self.active_mut().attend(step);
        }
        if begun > 0 {
            let what = "prompts and begun sequences in one call of a shared prefill";
            return Err(Error::Unsupported(what.into()));
        }
        step.check(&self.spec)?;
        let (q, k) = step.rotate(&self.spec, |_| 0)?;
        let state = attention::attend(step.batch, &q, &k, step.v, &self.spec.shape)?;
        self.append_prompt(step, Some(&state.lse))?;
        self.spec.output(state, step.q.dtype())
    }

    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        check_new(self, step.batch)?;
        let done = self.caches.iter_mut().try_for_each(|cache| cache.append_prompt(step, lse));
        if done.is_err() {
            for &seq in step.batch.seqs() {
                self.remove(seq);
            }
        }
        done
    }

    fn needs_lse(&self) -> bool {
        self.caches.iter().any(|cache| cache.needs_lse())
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        for done in 0..self.caches.len() {
            if let Err(error) = self.caches[done].fork(from, to) {
                for cache in &mut self.caches[..done] {
                    cache.remove(to);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.active().check_truncate(seq, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.active_mut().truncate(seq, len)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        let removed = self.caches.iter_mut().map(|cache| cache.remove(seq));
        removed.fold(false, |any, removed| any | removed)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.active().seqs()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.active().seen(seq)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.active().held(seq)
    }

    fn can_take(&self, batch: &Batch) -> bool {
        self.caches.iter().all(|cache| cache.can_take(batch))
    }

    fn footprint(&self) -> Footprint {
        self.active().footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.active().seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.caches.iter_mut().for_each(|cache| cache.clear());
    }
}
