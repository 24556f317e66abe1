//! Selections of entries in the form that the kernels read: tables of records with selected
//! entries, and bits.

use super::CudaPool;
use super::head::{Head, words};
use super::memory::Heads;
use longctx_core::{Batch, EntryRanges, Result};
use longctx_cuda::{Uploaded, upload};
use std::ops::Range;

/// A bitmap of slots.
#[derive(Default)]
struct Bits(Vec<u32>);

impl Bits {
    fn set(&mut self, slot: usize) {
        let words = (slot / 32 + 1).max(self.0.len());
        self.0.resize(words, 0);
        self.0[slot / 32] |= 1 << (slot % 32);
    }

    fn count(&self) -> i32 {
        self.0.iter().map(|bits| bits.count_ones() as i32).sum()
    }
}

/// Returns a head's records that contain selected entries, and the selected slots, numbered as if
/// there were no other records.
fn selected(head: &Head, ranges: &[Range<usize>], group: usize) -> (Vec<usize>, usize, Bits) {
    let packed = head.packed.values;
    let (mut records, mut bits) = (Vec::<usize>::new(), Bits::default());
    let mut of_ring = Vec::new();
    for slot in head.valid.slots_of(ranges.iter().cloned().flatten()) {
        if slot >= packed {
            of_ring.push(slot - packed);
            continue;
        }
        if records.last() != Some(&(slot / group)) {
            records.push(slot / group);
        }
        bits.set((records.len() - 1) * group + slot % group);
    }
    // The last record may have values that are not packed yet.
    let last = records.last().map_or(0, |last| (packed - last * group).min(group));
    let slots = records.len().saturating_sub(1) * group + last;
    of_ring.into_iter().for_each(|place| bits.set(slots + place));
    (records, slots, bits)
}

impl CudaPool {
    /// Limits each head's work item to the selected entries and to the records that contain them.
    /// Returns the memory that the work items point to.
    pub(super) fn select(
        &self,
        batch: &Batch,
        ranges: &EntryRanges,
        heads: &mut Heads,
    ) -> Result<Uploaded> {
        let group = self.layout.group();
        let mut all = vec![0u64];
        let mut places = Vec::new();
        for (i, (own, ranges)) in heads.work.iter_mut().zip(ranges.heads()).enumerate() {
            let place = all.len();
            let seq = batch.seqs()[i / self.shape.kv_heads];
            if let Some(sequence) = self.seqs.get(&seq) {
                let head = &sequence.heads[i % self.shape.kv_heads];
                let (records, slots, mut bits) = selected(head, ranges, group);
                bits.0.resize((slots + head.residual()).div_ceil(32), 0);
                all.extend(head.table.addresses_of(&records));
                own.packed = slots as i32;
                own.valid_slots = (32 * bits.0.len()) as i32;
                own.holes = own.packed + own.residual - bits.count();
                places.push((place, all.len()));
                all.extend(words(&bits.0));
            } else {
                places.push((place, place));
            }
        }
        let stream = self.stream();
        let on_device = upload(&stream, &all)?;
        let start = on_device.address();
        for (own, (table, valid)) in heads.memory.iter_mut().zip(places) {
            (own.table, own.valid) = (start + 8 * table as u64, start + 8 * valid as u64);
        }
        Ok(on_device)
    }

    /// Marks the selected entries in each head's work item, which still contains all slots.
    pub(super) fn mark(
        &self,
        batch: &Batch,
        ranges: &EntryRanges,
        heads: &mut Heads,
    ) -> Result<Uploaded> {
        let mut all = vec![0u64];
        let mut places = Vec::new();
        for (i, (own, ranges)) in heads.work.iter_mut().zip(ranges.heads()).enumerate() {
            places.push(all.len());
            let seq = batch.seqs()[i / self.shape.kv_heads];
            if let Some(sequence) = self.seqs.get(&seq) {
                let head = &sequence.heads[i % self.shape.kv_heads];
                let mut bits = Bits::default();
                let slots = head.valid.slots_of(ranges.iter().cloned().flatten());
                slots.for_each(|slot| bits.set(slot));
                bits.0.resize(head.slots.div_ceil(32), 0);
                own.valid_slots = (32 * bits.0.len()) as i32;
                own.holes = own.packed + own.residual - bits.count();
                all.extend(words(&bits.0));
            }
        }
        let stream = self.stream();
        let on_device = upload(&stream, &all)?;
        let start = on_device.address();
        for (own, place) in heads.memory.iter_mut().zip(places) {
            own.valid = start + 8 * place as u64;
        }
        Ok(on_device)
    }
}
