//! Eviction of entries, without quantizing the others again.

use super::head::Head;
use super::memory::{BlockDelta, PAGE, PoolMemory};
use super::residual::Residual;
use super::slabs::Slabs;
use super::{Pool, batch};
use crate::packed::PackedRow;
use crate::{Axis, Error, Format, Result};

/// The slots of a head that are kept.
struct KeptSlots {
    /// Slots of the kept entries.
    slots: Vec<usize>,
    /// How many of these are packed.
    packed: usize,
    /// Whether an entry in full precision is evicted.
    residual_changes: bool,
}

impl Pool {
    /// Keeps the listed entries of each kv head and frees the others. The kept entries are
    /// renumbered from 0 in order. Nothing is quantized again.
    ///
    /// A block is freed when all its entries are evicted. Further memory is freed as follows:
    ///
    /// - Keys quantized along channels are packed token by token. Once half of the packed slots are
    ///   holes, the kept keys and values are moved together; the cost of the moves is amortized
    ///   over the evicted entries.
    /// - Keys quantized along tokens share scales with their block and cannot leave it. Evict runs
    ///   of entries to free memory.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] for a wrong number of lists, for a list that
    /// is not strictly increasing or exceeds its head's entries, or, for keys [before
    /// RoPE](crate::KeyBasis::BeforeRope), a list that does not keep all; [`Error::PoolFull`] if
    /// entries in full precision are shared with another sequence and there is no room for a copy
    /// of the kept ones. On an error nothing has changed.
    pub fn retain(&mut self, seq: u64, keep: &[Vec<u32>]) -> Result<()> {
        let heads = &self.sequence(seq)?.heads;
        if keep.len() != heads.len() {
            return Err(Error::mismatch("lists of entries to keep", heads.len(), keep.len()));
        }
        let (mut kept, mut delta) = (Vec::new(), BlockDelta::default());
        for (head, keep) in heads.iter().zip(keep) {
            batch::check_list("entries to keep", keep, head.len)?;
            if self.rotary.is_some() && keep.len() < head.len {
                let expected = format!("all {}, for keys packed before RoPE", head.len);
                return Err(Error::mismatch("entries to keep", expected, keep.len()));
            }
            let of_head = head.kept(keep);
            delta += of_head.delta(head, &self.memory);
            kept.push(of_head);
        }
        self.check_room(self.memory.bytes(delta).max(0) as usize)?;
        let free = self.free_bytes();
        let Self { seqs, memory, format, .. } = self;
        let heads = seqs.get_mut(&seq).into_iter().flat_map(|sequence| &mut sequence.heads);
        for (head, kept) in heads.zip(kept) {
            head.retain(kept, memory);
            head.compact(format, memory, free);
        }
        memory.shrink();
        Ok(())
    }
}

impl Head {
    fn kept(&self, keep: &[u32]) -> KeptSlots {
        let slots: Vec<_> = self.slots_of(keep.iter().map(|&entry| entry as usize)).collect();
        let packed = slots.partition_point(|&slot| slot < self.packed_keys);
        let residual_changes = slots.len() - packed < self.slots() - self.packed_keys;
        KeptSlots { slots, packed, residual_changes }
    }

    fn retain(
        &mut self,
        KeptSlots { slots, packed, residual_changes }: KeptSlots,
        memory: &mut PoolMemory,
    ) {
        if slots.len() == self.len {
            return;
        }
        self.len = slots.len();
        self.keys.advance(&mut memory.key_pages, self.packed_keys.max(self.keys.start));
        self.values.advance(&mut memory.value_pages, self.packed_values.max(self.values.start));
        if residual_changes {
            let (layout, waiting) = (memory.layout, self.packed_values..self.packed_keys);
            keep_rows(
                &mut self.keys,
                self.packed_keys,
                slots[packed..].iter().copied(),
                &mut memory.key_pages,
                layout.keys.columns,
            );
            // Values whose keys are packed stay in the residual until they are packed too.
            keep_rows(
                &mut self.values,
                self.packed_values,
                waiting.chain(slots[packed..].iter().copied()),
                &mut memory.value_pages,
                layout.values.columns,
            );
        }
        self.set_validity(slots[..packed].iter().copied());
        self.free_blocks(memory);
        self.drop_full_mask();
    }

    /// Frees the blocks that hold only holes. The slots after them are renumbered.
    fn free_blocks(&mut self, memory: &mut PoolMemory) {
        if self.validity.is_empty() {
            return;
        }
        let chunk = memory.layout.keys.capacity;
        let words = chunk / 32;
        let whole = self.packed_keys.min(self.packed_values) / chunk;
        let empty = |mask: &[u32], i: usize| mask[i * words..][..words].iter().all(|&w| w == 0);
        let freed: Vec<_> = (0..whole).filter(|&i| empty(&self.validity, i)).collect();
        for &i in &freed {
            memory.blocks.release(self.blocks[i]);
        }
        let stays = |i: usize| freed.binary_search(&i).is_err();
        let mut i = 0..;
        self.blocks.retain(|_| i.next().is_some_and(stays));
        let mut i = 0..;
        self.validity.retain(|_| i.next().is_some_and(|word: usize| stays(word / words)));
        self.renumber(freed.len() * chunk);
    }

    /// Renumbers the slots after `by` removed ones.
    fn renumber(&mut self, by: usize) {
        self.packed_keys -= by;
        self.packed_values -= by;
        for residual in [&mut self.keys, &mut self.values] {
            residual.start -= by;
            residual.end -= by;
        }
    }

    /// Moves entries with token-wise packed keys and values together, if half of their slots are
    /// holes and there is room.
    fn compact(&mut self, format: &Format, memory: &mut PoolMemory, free: usize) {
        if !self.has_holes() || format.keys().axis == Axis::Tokens {
            return;
        }
        let whole = self.packed_keys.min(self.packed_values);
        let held: Vec<_> = (0..whole).filter(|&slot| self.is_valid(slot)).collect();
        if whole == 0 || 2 * held.len() > whole {
            return;
        }
        let (chunk, removed) = (format.block_tokens(), whole - held.len());
        let count = (self.packed_keys.max(self.packed_values) - removed).div_ceil(chunk);
        let freed = self.blocks.iter().filter(|&&block| !memory.blocks.is_shared(block)).count();
        if count.saturating_sub(freed) * memory.blocks.block_bytes() > free {
            return;
        }
        let valid_slots: Vec<_> = (0..held.len())
            .chain(
                (whole..self.packed_keys).filter(|&slot| self.is_valid(slot)).map(|s| s - removed),
            )
            .collect();
        let blocks = self.gather(&held, whole, count, memory);
        self.truncate_blocks(memory, 0);
        self.blocks = blocks;
        self.renumber_residuals(removed, memory);
        self.set_validity(valid_slots.into_iter());
    }

    /// Renumbers the slots after removed ones, whose number may not be a multiple of a page.
    fn renumber_residuals(&mut self, by: usize, memory: &mut PoolMemory) {
        if by.is_multiple_of(PAGE) {
            return self.renumber(by);
        }
        self.packed_keys -= by;
        self.packed_values -= by;
        let layout = memory.layout;
        let move_rows = |residual: &mut Residual, slabs: &mut Slabs, columns| {
            let slots = residual.start..residual.end;
            keep_rows(residual, slots.start - by, slots, slabs, columns);
        };
        move_rows(&mut self.keys, &mut memory.key_pages, layout.keys.columns);
        move_rows(&mut self.values, &mut memory.value_pages, layout.values.columns);
    }

    /// Returns new blocks with the rows of the held slots and of all packed ones from `whole` on.
    fn gather(
        &self,
        held: &[usize],
        whole: usize,
        count: usize,
        memory: &mut PoolMemory,
    ) -> Vec<u32> {
        let chunk = memory.layout.keys.capacity;
        let blocks: Vec<u32> = (0..count).map(|_| memory.blocks.alloc()).collect();
        let row = &mut PackedRow::default();
        let all = |packed: usize| held.iter().copied().chain(whole..packed).enumerate();
        for (to, slot) in all(self.packed_keys) {
            self.block(memory, slot / chunk).keys().copy_row(slot % chunk, row);
            let lines = memory.blocks.get_mut(blocks[to / chunk]);
            memory.layout.parts_mut(lines, to % chunk, 0).0.push_row(row);
        }
        for (to, slot) in all(self.packed_values) {
            self.block(memory, slot / chunk).values().copy_row(slot % chunk, row);
            let lines = memory.blocks.get_mut(blocks[to / chunk]);
            memory.layout.parts_mut(lines, 0, to % chunk).1.push_row(row);
        }
        blocks
    }
}

impl KeptSlots {
    fn delta(&self, head: &Head, memory: &PoolMemory) -> BlockDelta {
        if !self.residual_changes {
            return BlockDelta::default();
        }
        let rows = self.slots.len() - self.packed;
        let value_rows = rows + head.packed_keys - head.packed_values;
        BlockDelta {
            blocks: 0,
            key_pages: head.keys.pages_to_replace(&memory.key_pages, head.packed_keys, rows),
            value_pages: head.values.pages_to_replace(
                &memory.value_pages,
                head.packed_values,
                value_rows,
            ),
        }
    }
}

/// Keeps the rows of some slots of a residual, renumbered from `start` on.
fn keep_rows(
    residual: &mut Residual,
    start: usize,
    slots: impl Iterator<Item = usize>,
    slabs: &mut Slabs,
    columns: usize,
) {
    let mut rows = Vec::new();
    slots.for_each(|slot| rows.extend_from_slice(residual.row(slabs, slot, columns)));
    residual.replace(slabs, start, &rows, columns);
}
