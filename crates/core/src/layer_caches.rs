//! The caches of all layers of a model.

use std::ops::{Deref, DerefMut};

use crate::{Batch, Footprint, KvCache, Result, SeqId};

/// The caches of a model, one per attention layer. An operation applies to all layers or to none.
///
/// It dereferences to the slice of caches.
#[derive(Default)]
pub struct LayerCaches(Vec<Box<dyn KvCache>>);

impl LayerCaches {
    /// Creates the caches of a model's layers, in order.
    pub fn new(caches: Vec<Box<dyn KvCache>>) -> Self {
        Self(caches)
    }

    /// See [`KvCache::fork`]. After an error no layer has `to`.
    ///
    /// # Errors
    /// That of the first layer that fails.
    pub fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        for done in 0..self.len() {
            if let Err(error) = self[done].fork(from, to) {
                for cache in &mut self[..done] {
                    cache.remove(to);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// See [`KvCache::check_truncate`].
    ///
    /// # Errors
    /// That of the first layer that refuses.
    pub fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.iter().try_for_each(|cache| cache.check_truncate(seq, len))
    }

    /// See [`KvCache::truncate`]. All layers are checked before the first one changes.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and no others.
    pub fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        self.iter_mut().try_for_each(|cache| cache.truncate(seq, len))
    }

    /// Truncates the layers that a failed call has advanced to the `len` tokens before it.
    ///
    /// # Errors
    /// That of the first layer that refuses. No layer has changed then.
    pub fn roll_back(&mut self, seq: SeqId, len: usize) -> Result<()> {
        let mut advanced: Vec<_> = self.iter_mut().filter(|cache| cache.seen(seq) != len).collect();
        advanced.iter().try_for_each(|cache| cache.check_truncate(seq, len))?;
        advanced.iter_mut().try_for_each(|cache| cache.truncate(seq, len))
    }

    /// Removes a sequence from all layers.
    pub fn remove(&mut self, seq: SeqId) {
        for cache in self.iter_mut() {
            cache.remove(seq);
        }
    }

    /// Returns whether every layer has memory for a batch.
    pub fn can_append(&self, batch: &Batch) -> bool {
        self.iter().all(|cache| cache.can_append(batch))
    }

    /// Returns the bytes of all layers.
    pub fn footprint(&self) -> Footprint {
        self.iter().map(|cache| cache.footprint()).sum()
    }

    /// Returns the bytes of one sequence in all layers.
    pub fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.iter().map(|cache| cache.seq_footprint(seq)).sum()
    }

    /// Removes all sequences from all layers.
    pub fn clear(&mut self) {
        self.iter_mut().for_each(|cache| cache.clear());
    }
}

impl Deref for LayerCaches {
    type Target = [Box<dyn KvCache>];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for LayerCaches {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
