//! The attention that tokens receive. The tokens that represent a block are selected on the host.

use std::ops::Range;

use super::InfLlm;
use super::chunk::{Chunk, Reversed};
use crate::sub_batch::{SubBatch, select_rows};
use candle_core::Tensor;
use longctx_core::{AttentionSums, Batch, EntryRanges, KvStore, Mask, Result, SeqId, attention};

/// Attention that tokens received: a sequence, the first of these tokens, and a list per query head
/// that starts at it.
pub type Received = (SeqId, usize, Vec<Vec<f32>>);

impl<S: KvStore, W: KvStore> InfLlm<S, W> {
    /// Returns the attention that the window's tokens and the chunk's own tokens received. Copies
    /// once from the device.
    pub(super) fn received(
        &self,
        chunk: &Chunk<'_>,
        reversed: Option<&Reversed>,
        lse: &Tensor,
    ) -> Result<Vec<Received>> {
        let (batch, shape) = (&chunk.rows.batch, &self.spec.shape);
        let mut parts = Parts::default();
        let sums = attention::attention_sums(batch, &chunk.k, batch, &chunk.q, lse, shape)?;
        parts.add(batch, sums, |seq, _| {
            let s = chunk.seq(seq);
            (s.start, 0..s.count)
        });
        for (part, ranges) in self.window_parts(chunk)? {
            self.add_window(&mut parts, chunk, lse, (&part, &ranges))?;
        }
        let in_order = parts.seqs.len();
        if let Some(Reversed { part, order, q, k, .. }) = reversed {
            let lse = select_rows(&part.rows(lse)?, order)?;
            let sums = attention::attention_sums(&part.batch, k, &part.batch, q, &lse, shape)?;
            parts.add(&part.batch, sums, |seq, _| {
                let leaving = &chunk.seq(seq).leaving;
                (leaving.start + 1, 0..leaving.len() - 1)
            });
        }
        let mut received = parts.received(shape.heads)?;
        for (.., heads) in &mut received[in_order..] {
            heads.iter_mut().for_each(|sums| sums.reverse());
        }
        Ok(received)
    }

    /// Adds the sums of the window's entries that a part's queries see: at most one range of each
    /// sequence, the same in all heads.
    fn add_window(
        &self,
        parts: &mut Parts,
        chunk: &Chunk<'_>,
        lse: &Tensor,
        (part, ranges): (&SubBatch, &EntryRanges),
    ) -> Result<()> {
        let (q, lse) = (part.rows(&chunk.q)?, part.rows(lse)?);
        let visible = |i: usize| {
            let ranges = &ranges.heads()[i * self.spec.shape.kv_heads];
            ranges.first().map_or(0..0, Range::clone)
        };
        // If most entries are visible, the sums of all are faster than a copy of these.
        let most = |(i, &seq): (usize, &SeqId)| 2 * visible(i).len() >= self.window.len(seq);
        let mask = match part.batch.seqs().iter().enumerate().all(most) {
            true => Mask::Full,
            false => Mask::Entries(ranges),
        };
        let sums = self.window.attention_sums(&part.batch, &q, &lse, mask)?;
        parts.add(&part.batch, sums, |seq, i| {
            (chunk.seq(seq).window_start + visible(i).start, visible(i))
        });
        Ok(())
    }
}

/// Attention sums of parts of a chunk.
#[derive(Default)]
struct Parts {
    /// Each sequence, the range of its sums that count, and the token of the first of them.
    seqs: Vec<(SeqId, Range<usize>, usize)>,
    sums: Vec<AttentionSums>,
}

impl Parts {
    /// Adds the sums of a batch. `tokens` returns the first token and the range of sums of a
    /// sequence, given its index in the batch.
    fn add(
        &mut self,
        batch: &Batch,
        sums: Vec<AttentionSums>,
        tokens: impl Fn(SeqId, usize) -> (usize, Range<usize>),
    ) {
        for (i, &seq) in batch.seqs().iter().enumerate() {
            let (first, range) = tokens(seq, i);
            self.seqs.push((seq, range, first));
        }
        self.sums.extend(sums);
    }

    fn received(self, heads: usize) -> Result<Vec<Received>> {
        let lists = AttentionSums::to_lists(&self.sums)?;
        let of_seq = self.seqs.into_iter().zip(lists.chunks(heads));
        let received = |((seq, range, first), lists): ((_, Range<usize>, _), &[Vec<f32>])| {
            (seq, first, lists.iter().map(|sums| sums[range.clone()].to_vec()).collect())
        };
        Ok(of_seq.map(received).collect())
    }
}
