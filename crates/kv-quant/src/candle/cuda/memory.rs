//! The work items and the memory of a batch's kv heads.

use std::sync::{Arc, Mutex, PoisonError};

use super::CudaPool;
use super::lens::HeadLens;
use crate::cuda::{KvHead, Work};
use longctx_core::{Batch, Result};
use longctx_cuda::{Uploaded, upload};

/// The kv heads of a batch's sequences, `[sequences * kv_heads]`.
pub struct Heads {
    /// A work item over all entries of each head.
    pub work: Vec<Work>,
    pub memory: Vec<KvHead>,
}

/// The last list of heads on the device. A decode step usually has the same as the one before.
#[derive(Debug, Default)]
pub struct LastHeads(Mutex<Option<(Vec<KvHead>, Arc<Uploaded>)>>);

impl Clone for LastHeads {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl CudaPool {
    /// Returns the heads of a batch's sequences. An unknown sequence has empty ones.
    pub(super) fn heads_of(&self, batch: &Batch) -> Result<Heads> {
        self.check_all(batch)?;
        let (kv_heads, ring, ends) = (self.shape.kv_heads, self.ring_places(), batch.cu_seqlens());
        let work = |(index, head): (usize, HeadLens)| {
            let seq = index / kv_heads;
            head.work(index, index % kv_heads, &(ends[seq]..ends[seq + 1]), ring)
        };
        let work = self.lens_of(batch).into_iter().enumerate().map(work).collect();
        Ok(Heads { work, memory: self.memory_of(batch) })
    }

    /// Returns the memory of the heads of a batch's sequences.
    pub(super) fn memory_of(&self, batch: &Batch) -> Vec<KvHead> {
        let (stream, ring, kv_heads) = (self.stream(), self.ring_numbers(), self.shape.kv_heads);
        let mut memory = Vec::with_capacity(batch.seqs().len() * kv_heads);
        for seq in batch.seqs() {
            let Some(sequence) = self.seqs.get(seq) else {
                memory.resize(memory.len() + kv_heads, KvHead::default());
                continue;
            };
            let all = sequence.addresses(&stream, ring);
            let of_head = |(i, head): (usize, &super::head::Head)| KvHead {
                valid: head.valid.address(),
                ..all.of_head(i)
            };
            memory.extend(sequence.heads.iter().enumerate().map(of_head));
        }
        memory
    }

    /// Copies the heads' memory to the device, unless it is that of the last call.
    pub(super) fn memory_on_device(&self, memory: &[KvHead]) -> Result<Arc<Uploaded>> {
        let mut last = self.last_heads.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, uploaded)) = last.as_ref().filter(|(last, _)| last == memory) {
            return Ok(uploaded.clone());
        }
        let uploaded = Arc::new(upload(&self.stream(), memory)?);
        *last = Some((memory.to_vec(), uploaded.clone()));
        Ok(uploaded)
    }
}
