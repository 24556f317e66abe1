//! The lengths of kv heads. The lists of a call's launches are made from them alone, so layers with
//! equal lengths share their lists.

use super::CudaPool;
use super::head::{Head, Packed, Sequence};
use super::status::Status;
use crate::Format;
use crate::cuda::{FillRow, Work};
use longctx_core::Batch;

/// An index that no slot and no record has.
const NONE: i32 = i32::MAX;

/// The lengths of a kv head of a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadLens {
    /// Number of the sequence.
    pub number: u64,
    pub slots: usize,
    pub packed: Packed,
    /// See [`Head::shift`].
    pub shift: usize,
    /// Records of its block table.
    pub records: usize,
    /// Slots that the validity mask covers.
    pub valid_slots: usize,
    pub holes: usize,
}

impl HeadLens {
    pub fn new(head: &Head, number: u64) -> Self {
        Self {
            number,
            slots: head.slots,
            packed: head.packed,
            shift: head.shift,
            records: head.table.numbers().len(),
            valid_slots: head.valid.slots(),
            holes: head.valid.holes(),
        }
    }

    /// Returns the lengths after `count` more tokens, before packing.
    pub fn after(self, count: usize) -> Self {
        Self { slots: self.slots + count, ..self }
    }

    /// Returns how far the head is to be packed.
    pub fn goal(&self, format: Format) -> Packed {
        let Packed { keys, values, tiles } = self.packed;
        let ready = format.ready(self.slots - keys, self.slots - values);
        let (keys, values) = (keys + ready.0, values + ready.1);
        Packed { keys, values, tiles: tiles.max(values.div_ceil(crate::cuda::TILE)) }
    }

    /// Returns the number of records that the head takes for `more` tokens. A head of a poisoned
    /// sequence may have taken more records than it has packed.
    pub fn need(self, format: Format, group: usize, more: usize) -> usize {
        (self.after(more).goal(format).keys / group).saturating_sub(self.records)
    }

    /// Returns the number of slots that are read from the ring.
    pub fn residual(&self) -> usize {
        self.slots - self.packed.values
    }

    /// Returns the work item of attention over all entries. `index`: that of the head in the batch.
    pub fn work(
        &self,
        index: usize,
        kv_head: usize,
        tokens: &std::ops::Range<usize>,
        ring: usize,
    ) -> Work {
        Work {
            head: index as i32,
            kv_head: kv_head as i32,
            queries: tokens.len() as i32,
            first_token: tokens.start as i32,
            packed: self.packed.values as i32,
            residual: self.residual() as i32,
            valid_slots: self.valid_slots as i32,
            holes: self.holes as i32,
            ring_start: ((self.packed.values + self.shift) % ring) as i32,
            ..Work::default()
        }
    }

    /// Returns a row without entries.
    pub fn row(&self, index: usize, kv_head: usize) -> FillRow {
        FillRow {
            tag: Status::tag(self.number, kv_head),
            head: index as i32,
            status: Status::index(self.number) as i32,
            first_new: NONE,
            shift: self.shift as i32,
            first_new_record: NONE,
            ..FillRow::default()
        }
    }
}

impl CudaPool {
    /// Returns the lengths of the kv heads of a batch's sequences; zeros for unknown ones.
    pub(super) fn lens_of(&self, batch: &Batch) -> Vec<HeadLens> {
        let kv_heads = self.shape.kv_heads;
        let mut lens = Vec::with_capacity(batch.seqs().len() * kv_heads);
        for seq in batch.seqs() {
            match self.seqs.get(seq) {
                Some(of) => {
                    lens.extend(of.heads.iter().map(|head| HeadLens::new(head, of.number)));
                }
                None => lens.resize(lens.len() + kv_heads, HeadLens::default()),
            }
        }
        lens
    }

    /// Returns whether the kv heads of a batch's sequences have these lengths.
    pub(super) fn has_lens(&self, batch: &Batch, lens: &[HeadLens]) -> bool {
        let same = |of: &Sequence, lens: &[HeadLens]| {
            of.heads.iter().zip(lens).all(|(head, lens)| HeadLens::new(head, of.number) == *lens)
        };
        let mut all = batch.seqs().iter().zip(lens.chunks(self.shape.kv_heads));
        all.all(|(seq, lens)| self.seqs.get(seq).is_some_and(|of| same(of, lens)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bits;

    #[test]
    fn a_head_with_unused_records_needs_none() {
        let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
        let lens = HeadLens { records: 2, ..HeadLens::default() };
        assert_eq!([0, 1, 32].map(|more| lens.need(format, 32, more)), [0; 3]);
    }
}
