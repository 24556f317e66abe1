//! The addresses of the block tables of a batch, on the device.

use std::sync::{Arc, Mutex, PoisonError};

use super::CudaPool;
use crate::{Batch, Result};
use longctx_cuda::{Uploaded, upload};

/// The addresses of the block tables of a batch's kv heads, `[sequences * kv_heads]`; 0 for an
/// unknown sequence.
#[derive(Debug)]
pub struct Tables {
    /// For each sequence, the address of its first head's table and the bytes of a table.
    of_seqs: Vec<(u64, u64)>,
    uploaded: Uploaded,
}

impl Tables {
    pub fn address(&self) -> u64 {
        self.uploaded.address()
    }
}

/// The tables of the last batch. A decode step usually has the same as the one before.
#[derive(Debug, Default)]
pub struct LastTables(Mutex<Option<Arc<Tables>>>);

impl CudaPool {
    /// Returns the tables of a batch. Copies them to the device if they are not those of the last
    /// call.
    pub(super) fn tables(&self, batch: &Batch) -> Result<Arc<Tables>> {
        let of_seqs = self.seq_tables(batch);
        let mut last = self.last_tables.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|last| last.of_seqs == of_seqs) {
            return Ok(last.clone());
        }
        let uploaded = upload(&self.stream(), &self.head_tables(&of_seqs))?;
        Ok(last.insert(Arc::new(Tables { of_seqs, uploaded })).clone())
    }

    /// Returns the address of each sequence's first table and the bytes of a table.
    pub(super) fn seq_tables(&self, batch: &Batch) -> Vec<(u64, u64)> {
        let stream = self.stream();
        let of_seq = |seq| match self.seqs.get(seq) {
            Some(sequence) => (sequence.address(&stream, 0), 8 * sequence.max_blocks as u64),
            None => (0, 0),
        };
        batch.seqs().iter().map(of_seq).collect()
    }

    /// Returns the address of each kv head's table.
    pub(super) fn head_tables(&self, of_seqs: &[(u64, u64)]) -> Vec<u64> {
        let heads = 0..self.shape.kv_heads as u64;
        let of_heads = |&(first, bytes): &(u64, u64)| heads.clone().map(move |i| first + i * bytes);
        of_seqs.iter().flat_map(of_heads).collect()
    }
}
