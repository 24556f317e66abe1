//! A cache that keeps the half of each prompt whose values are longest.

use std::collections::BTreeMap;

use candle_core::{D, DType, Tensor};
use longctx_core::{
    Batch, DenseStore, Error, Footprint, KvCache, KvStore, LayerSpec, Mask, Result, Selection,
    SeqId, Step, check_unseen,
};

/// Keys and values in a dense store, and the tokens that each sequence has seen.
pub struct LongValues {
    spec: LayerSpec,
    store: DenseStore,
    seen: BTreeMap<SeqId, usize>,
}

impl LongValues {
    /// An empty cache.
    pub fn new(spec: LayerSpec) -> Result<Self> {
        let store = DenseStore::new(spec.shape, DType::F16)?;
        Ok(Self { spec, store, seen: BTreeMap::new() })
    }

    /// Counts the batch's tokens, and keeps half of each prompt among them.
    fn advance(&mut self, batch: &Batch) -> Result<()> {
        for (seq, tokens) in batch.iter() {
            *self.seen.entry(seq).or_default() += tokens.len();
            if tokens.len() > 1 {
                let heads = 0..self.spec.shape.kv_heads;
                let keep = heads.map(|head| self.longest(seq, head)).collect::<Result<_>>()?;
                self.store.retain(seq, &Selection::new(keep))?;
            }
        }
        Ok(())
    }

    /// The half of a head's entries whose values are longest, in order.
    fn longest(&self, seq: SeqId, head: usize) -> Result<Vec<u32>> {
        let (_, values) = self.store.read(seq, head)?;
        let lengths = values.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?;
        let mut entries: Vec<_> = (0..lengths.len() as u32).collect();
        entries.sort_by(|&a, &b| lengths[b as usize].total_cmp(&lengths[a as usize]));
        entries.truncate(lengths.len().div_ceil(2));
        entries.sort();
        Ok(entries)
    }
}

impl KvCache for LongValues {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        self.store.append(step.batch, &k, step.v)?;
        let state = self.store.attend(step.batch, &q, Mask::Causal)?;
        self.advance(step.batch)?;
        self.spec.output(state, step.q.dtype())
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        self.store.append(step.batch, &k, step.v)?;
        self.advance(step.batch)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.store.fork(from, to)?;
        self.seen.insert(to, self.seen(from));
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        match self.seen.get(&seq) {
            None => Err(Error::UnknownSequence(seq)),
            Some(&seen) if len == seen => Ok(()),
            Some(&seen) if len > seen => Err(Error::mismatch("tokens to keep", seen, len)),
            Some(_) => Err(Error::Unsupported("truncating a sequence that was cut by half".into())),
        }
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.store.remove(seq);
        self.seen.remove(&seq).is_some()
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.seen.keys().copied().collect()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(&seq).copied().unwrap_or(0)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.store.len(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.store.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        self.store.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.store.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.store.clear();
        self.seen.clear();
    }
}
