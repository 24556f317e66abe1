//! The work items and the memory of a batch's kv heads.

use std::sync::{Arc, Mutex, PoisonError};

use super::CudaPool;
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
        let ring = self.ring_places();
        let mut work = Vec::with_capacity(batch.seqs().len() * self.shape.kv_heads);
        for (seq, tokens) in batch.iter() {
            self.check(seq)?;
            let sequence = self.seqs.get(&seq);
            for kv_head in 0..self.shape.kv_heads {
                let mut own = Work {
                    head: work.len() as i32,
                    kv_head: kv_head as i32,
                    queries: tokens.len() as i32,
                    first_token: tokens.start as i32,
                    ..Work::default()
                };
                if let Some(sequence) = sequence {
                    let head = &sequence.heads[kv_head];
                    own.packed = head.packed.values as i32;
                    own.residual = head.residual() as i32;
                    own.valid_slots = head.valid.slots() as i32;
                    own.holes = head.valid.holes() as i32;
                    own.ring_start = ((head.packed.values + head.shift) % ring) as i32;
                }
                work.push(own);
            }
        }
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
