//! Fork, truncation, eviction and removal of sequences, as edits of block tables.

use super::CudaPool;
use super::head::{Head, Truncation, ValidityMask};
use crate::cuda::{CompactRow, TILE};
use longctx_core::{Error, Result, Selection, SeqId, check_lens};
use longctx_cuda::upload;

impl CudaPool {
    /// Copies the tables and the ring; records are shared.
    ///
    /// Records whose values are not packed yet are shared too. Their keys are packed, so their
    /// entries belong to the past of both sequences, and both will pack the same values.
    pub fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequence(from)?;
        self.synchronize()?;
        self.check(from)?;
        if self.contains(to) {
            return Err(Error::mismatch("sequence to fork to", "a new one", to));
        }
        let bytes = self.sequence(from)?.ring_bytes();
        self.check_room(bytes)?;
        let number = self.status().begin();
        let copy = self.sequence(from)?.fork(&self.stream(), number)?;
        self.seqs.insert(to, copy);
        Ok(())
    }

    pub fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.check(seq)?;
        check_lens(seq, lens, &self.lens(seq))
    }

    /// Returns the numbers of packed keys and values of each kv head; none for an unknown sequence.
    pub fn packed(&self, seq: SeqId) -> Vec<[usize; 2]> {
        let heads = self.seqs.get(&seq).into_iter().flat_map(|sequence| &sequence.heads);
        heads.map(|head| [head.packed.keys, head.packed.values]).collect()
    }

    /// Returns the numbers of packed keys and values after a truncation to `lens`, which has been
    /// checked; `None` if it unpacks entries, whose full precision is lost.
    pub fn packed_after(&self, seq: SeqId, lens: &[usize]) -> Option<Vec<[usize; 2]>> {
        let heads = self.seqs.get(&seq).into_iter().flat_map(|sequence| &sequence.heads);
        let after = |(head, &len): (&Head, &usize)| {
            let (_, cut) = self.truncation(head, len);
            cut.unpacked.is_empty().then_some([cut.packed.keys, cut.packed.values])
        };
        heads.zip(lens).map(after).collect()
    }

    /// Returns the number of slots that the first `len` entries of a head leave, with the holes
    /// before the first dropped entry, and the effect.
    fn truncation(&self, head: &Head, len: usize) -> (usize, Truncation) {
        if len == head.len() {
            return (head.slots, head.unchanged());
        }
        let slots = match len {
            0 => 0,
            _ => head.valid.slots_of(std::iter::once(len)).next().unwrap_or(head.slots),
        };
        (slots, head.truncated(self.device_format, self.layout.group(), slots))
    }

    /// As [`Pool::truncate_heads`](crate::Pool::truncate_heads). If a record of keys along tokens is
    /// divided, its entries return to the ring with their quantized values, in the ring's dtype. A
    /// record of tokens that are packed one by one keeps its codes and gets holes.
    pub fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.check_truncate_heads(seq, lens)?;
        let group = self.layout.group();
        let heads = self.sequence(seq)?.heads.iter().zip(lens);
        let truncations: Vec<_> = heads.map(|(head, &len)| self.truncation(head, len)).collect();
        let unpack = |(kv_head, (_, truncation)): (usize, &(usize, Truncation))| {
            self.unpack_to_ring(seq, kv_head, truncation)
        };
        let done = truncations.iter().enumerate().try_for_each(unpack);
        let done = done.and_then(|()| {
            let kept = |(head, (slots, truncation)): (&Head, &(usize, Truncation))| {
                let valid = |slot: &usize| head.valid.contains(*slot);
                KeptSlots::new(
                    truncation.packed.keys,
                    *slots,
                    (truncation.packed.keys..*slots).filter(valid),
                )
            };
            let kept =
                self.sequence(seq)?.heads.iter().zip(&truncations).map(kept).collect::<Vec<_>>();
            self.close_rings(seq, &kept)?;
            Ok(kept)
        });
        let stream = self.stream();
        let Some(sequence) = self.seqs.get_mut(&seq) else { return Ok(()) };
        let done = done.and_then(|kept| {
            for ((head, (slots, truncation)), kept) in
                sequence.heads.iter_mut().zip(truncations).zip(&kept)
            {
                let keys = truncation.packed.keys;
                head.valid = head.valid.truncated(&stream, keys, slots)?;
                (head.slots, head.packed, head.ring_from) =
                    (kept.end(), truncation.packed, truncation.ring_from);
                head.table.retain(|place| place < keys / group);
            }
            Ok(())
        });
        if let Err(error) = &done {
            sequence.poisoned = Some(error.to_string());
        }
        done
    }

    /// As [`Pool::retain`](crate::Pool::retain): an entry evicted from a record leaves a hole, a
    /// record that contains only holes is freed, and entries in full precision are compacted.
    /// Nothing is quantized again.
    pub fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        let sequence = self.sequence(seq)?;
        self.check(seq)?;
        let slots_of = |(head, keep): (&Head, &Vec<u32>)| {
            head.valid.slots_of(keep.iter().map(|&entry| entry as usize)).collect::<Vec<_>>()
        };
        let slots: Vec<_> =
            sequence.heads.iter().zip(keep.check(&self.lens(seq))?).map(slots_of).collect();
        let kept = |(head, slots): (&Head, &Vec<usize>)| {
            let packed = slots.partition_point(|&slot| slot < head.packed.keys);
            KeptSlots::new(head.packed.keys, head.slots, slots[packed..].iter().copied())
        };
        let kept: Vec<_> = sequence.heads.iter().zip(&slots).map(kept).collect();
        let done = self.close_rings(seq, &kept).and_then(|()| {
            let changed = (0..slots.len())
                .filter(|&i| self.seqs[&seq].heads[i].len() != slots[i].len())
                .collect::<Vec<_>>();
            changed.into_iter().try_for_each(|i| self.drop_slots(seq, i, &slots[i], &kept[i]))
        });
        if let (Err(error), Some(sequence)) = (&done, self.seqs.get_mut(&seq)) {
            sequence.poisoned = Some(error.to_string());
        }
        done
    }

    /// Updates a head after the eviction: its kept slots, and its ring, which has been compacted.
    fn drop_slots(
        &mut self,
        seq: SeqId,
        i: usize,
        slots: &[usize],
        kept: &KeptSlots,
    ) -> Result<()> {
        let (stream, ring, group) = (self.stream(), self.ring_places(), self.layout.group());
        let Some(sequence) = self.seqs.get_mut(&seq) else { return Ok(()) };
        let head = &mut sequence.heads[i];
        let packed = slots.partition_point(|&slot| slot < head.packed.keys);
        let whole = head.packed.values / group;
        let mut used = vec![false; whole];
        for &slot in &slots[..packed] {
            if let Some(used) = used.get_mut(slot / group) {
                *used = true;
            }
        }
        // Slots are renumbered by the slots of freed records before them.
        let mut before = 0;
        let moved: Vec<usize> = (0..=whole)
            .map(|record| {
                let moved = before;
                before += group * usize::from(used.get(record) == Some(&false));
                moved
            })
            .collect();
        let gone = moved[whole];
        head.table.retain(|place| used.get(place).copied().unwrap_or(true));
        head.slots = kept.end() - gone;
        head.packed.keys -= gone;
        head.packed.values -= gone;
        head.packed.tiles -= gone / TILE;
        // Packed entries may no longer be in the ring as well.
        head.ring_from = head.packed.values;
        head.shift = (head.shift + gone) % ring;
        let valid = slots[..packed].iter().map(|&slot| slot - moved[(slot / group).min(whole)]);
        head.valid = ValidityMask::new(&stream, head.packed.keys, valid)?;
        if gone > 0 {
            sequence.upload(&stream, i)?;
        }
        Ok(())
    }

    /// Compacts the kept slots of a sequence's rings.
    fn close_rings(&self, seq: SeqId, kept: &[KeptSlots]) -> Result<()> {
        let (stream, sequence) = (self.stream(), self.sequence(seq)?);
        let slots: Vec<u32> = kept.iter().flat_map(|kept| kept.moved.iter().copied()).collect();
        if slots.is_empty() {
            return Ok(());
        }
        let slots = upload(&stream, &slots)?;
        let mut address = slots.address();
        let mut rows = Vec::new();
        for (kv_head, (kept, head)) in kept.iter().zip(&sequence.heads).enumerate() {
            let at = sequence.addresses(&stream, self.ring_numbers()).of_head(kv_head);
            let count = kept.moved.len();
            rows.push(CompactRow {
                ring_k: at.ring_k,
                ring_v: at.ring_v,
                slots: address,
                count: count as i32,
                first: kept.first as i32,
                shift: head.shift as i32,
                ring: self.ring_places() as i32,
                pieces: (self.shape.head_dim / 8) as i32,
                unused: 0,
            });
            address += 4 * count as u64;
        }
        let on_device = upload(&stream, &rows)?;
        // SAFETY: the slots are in the rings, and none moves to a later position.
        unsafe {
            self.kernels.compact_rings(&stream, on_device.address(), rows.len())?;
        }
        Ok(())
    }

    pub fn remove(&mut self, seq: SeqId) -> bool {
        self.seqs.remove(&seq).is_some()
    }
}

/// The kept slots of a range, which are compacted.
struct KeptSlots {
    first: usize,
    count: usize,
    /// The slots, in order; empty if none moves.
    moved: Vec<u32>,
}

impl KeptSlots {
    /// Keeps those of `first..end` that are in `slots`.
    fn new(first: usize, end: usize, slots: impl Iterator<Item = usize>) -> Self {
        let moved: Vec<u32> = slots.map(|slot| slot as u32).collect();
        let count = moved.len();
        Self { first, count, moved: if first + count == end { Vec::new() } else { moved } }
    }

    /// Returns the end of the range after compaction.
    fn end(&self) -> usize {
        self.first + self.count
    }
}
