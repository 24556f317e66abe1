//! Truncation: rolls back the newest entries.

use super::Pool;
use super::head::Head;
use super::memory::{BlockDelta, PoolMemory};
use crate::{Axis, Error, Flush, Format, Result};
use half::f16;

/// The truncation of a head.
struct Cut {
    len: usize,
    /// Number of kept slots.
    slots: usize,
    /// Numbers of keys and values that stay packed.
    packed_keys: usize,
    packed_values: usize,
    /// The first slot of the block that the cut divides. Its entries before the cut return to full
    /// precision.
    unpacked: Option<usize>,
}

impl Pool {
    /// Checks whether [`truncate`](Self::truncate) is possible.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if a head holds fewer entries;
    /// [`Error::PoolFull`] if a block has to be unpacked and there is no room.
    pub fn check_truncate(&self, seq: u64, len: usize) -> Result<()> {
        self.check_truncate_heads(seq, &vec![len; self.shape.kv_heads])
    }

    /// Checks whether [`truncate_heads`](Self::truncate_heads) is possible.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and [`Error::Mismatch`] for a wrong number of
    /// lengths.
    pub fn check_truncate_heads(&self, seq: u64, lens: &[usize]) -> Result<()> {
        let heads = &self.sequence(seq)?.heads;
        if lens.len() != heads.len() {
            return Err(Error::mismatch("numbers of entries to leave", heads.len(), lens.len()));
        }
        let mut delta = BlockDelta::default();
        for (i, (head, &len)) in heads.iter().zip(lens).enumerate() {
            if len > head.len {
                let expected = format!("at most the {} of kv head {i}", head.len);
                return Err(Error::mismatch("entries to leave", expected, len));
            }
            delta += head.cut(&self.format, len).delta(head, &self.memory);
        }
        self.check_room(self.memory.bytes(delta).max(0) as usize)
    }

    /// Drops the entries of every head after its first `len`.
    ///
    /// The effect on the kept entries depends on the position of the cut and the format:
    ///
    /// - With a [rolling](Flush::Rolling) flush and no evictions, the sequence equals, bit for bit,
    ///   one that never had the dropped tokens, if at least `residual` entries remain after the
    ///   second to last packed group. This always holds for a cut of up to a group of tokens. A
    ///   deeper cut among entries in full precision changes none of the kept ones.
    /// - A cut within a block of keys along tokens unpacks the block: its entries before the cut go
    ///   back to full precision with their quantized values, and are quantized again once their
    ///   group is full.
    /// - Blocks of tokens that are packed one by one are shortened, and nothing else changes.
    /// - With a [staggered](Flush::Staggered) flush, values that were packed because of the dropped
    ///   tokens stay packed.
    ///
    /// # Errors
    /// As [`check_truncate`](Self::check_truncate), and no others. On an error nothing has changed.
    pub fn truncate(&mut self, seq: u64, len: usize) -> Result<()> {
        self.truncate_heads(seq, &vec![len; self.shape.kv_heads])
    }

    /// Drops the entries of each head after its first `lens[head]`, as
    /// [`truncate`](Self::truncate) does. A head that drops nothing does not change.
    ///
    /// # Errors
    /// As [`check_truncate_heads`](Self::check_truncate_heads), and no others. On an error nothing
    /// has changed.
    pub fn truncate_heads(&mut self, seq: u64, lens: &[usize]) -> Result<()> {
        self.check_truncate_heads(seq, lens)?;
        let largest = self.largest();
        let Self { seqs, memory, format, .. } = self;
        let heads = seqs.get_mut(&seq).into_iter().flat_map(|sequence| &mut sequence.heads);
        for (head, &len) in heads.zip(lens).filter(|(head, len)| **len < head.len) {
            head.apply(head.cut(format, len), memory, largest);
        }
        memory.shrink();
        Ok(())
    }

    /// Returns the numbers of packed keys and values of each kv head; none for an unknown sequence.
    #[cfg(feature = "candle")]
    pub(crate) fn packed(&self, seq: u64) -> Vec<[usize; 2]> {
        let heads = self.seqs.get(&seq).into_iter().flat_map(|sequence| &sequence.heads);
        heads.map(|head| [head.packed_keys, head.packed_values]).collect()
    }

    /// Returns the numbers of packed keys and values after a truncation to `lens`, which has been
    /// checked; `None` if it unpacks entries, whose full precision is lost.
    #[cfg(feature = "candle")]
    pub(crate) fn packed_after(&self, seq: u64, lens: &[usize]) -> Option<Vec<[usize; 2]>> {
        let heads = self.seqs.get(&seq).into_iter().flat_map(|sequence| &sequence.heads);
        let after = |(head, &len): (&Head, &usize)| {
            let cut = head.cut(&self.format, len);
            cut.unpacked.is_none().then_some([cut.packed_keys, cut.packed_values])
        };
        heads.zip(lens).map(after).collect()
    }
}

impl Head {
    fn cut(&self, format: &Format, len: usize) -> Cut {
        // The cut is before the first dropped entry and keeps the holes before it. Dropping them could
        // divide a packed block, which would then be unpacked.
        let slots = match len {
            _ if len == self.len => self.slots(),
            0 => 0,
            _ => self.slots_of([len].into_iter()).next().unwrap_or(self.slots()),
        };
        let cut = |packed_keys: usize, packed_values: usize, unpacked| {
            let packed_values = packed_values.min(slots);
            Cut { len, slots, packed_keys, packed_values, unpacked }
        };
        if len == self.len {
            return cut(self.packed_keys, self.packed_values, None);
        }
        let packed = self.still_packed(format, slots);
        if packed <= slots {
            return cut(packed, self.packed_values.min(packed), None);
        }
        if format.keys().axis == Axis::Channels {
            return cut(slots, self.packed_values, None);
        }
        let first = slots - slots % format.block_tokens();
        let unpacked = (first < slots).then_some(first);
        cut(first, self.packed_values.min(first), unpacked)
    }

    /// Returns the number of keys that stay packed after a truncation to `slots` slots. Groups that
    /// a sequence of this length would not have packed are unpacked, if they are still in full
    /// precision too.
    fn still_packed(&self, format: &Format, slots: usize) -> usize {
        let Flush::Rolling(residual) = format.flush() else { return self.packed_keys };
        let chunk = format.block_tokens();
        let missing = (self.packed_keys + residual).saturating_sub(slots);
        let start = self.keys.start.max(self.values.start);
        let there = self.packed_keys.saturating_sub(start) / chunk * chunk;
        self.packed_keys - missing.next_multiple_of(chunk).min(there)
    }

    fn apply(&mut self, cut: Cut, memory: &mut PoolMemory, largest: f16) {
        let PoolMemory { layout, .. } = memory;
        let (chunk, head_dim, value_dim) =
            (layout.keys.capacity, layout.keys.columns, layout.values.columns);
        if let Some(first) = cut.unpacked {
            let (keys, values) = self.unpack(&cut, first, memory, largest);
            self.keys.replace(&mut memory.key_pages, first, &keys, head_dim);
            self.values.replace(&mut memory.value_pages, cut.packed_values, &values, value_dim);
        } else {
            self.keys.truncate(&mut memory.key_pages, cut.slots);
            self.values.truncate(&mut memory.value_pages, cut.slots);
        }
        self.set_packed_keys(cut.packed_keys);
        self.packed_values = cut.packed_values;
        self.len = cut.len;
        self.truncate_blocks(memory, cut.packed_keys.max(cut.packed_values).div_ceil(chunk));
        self.drop_full_mask();
    }

    /// Returns the rows of the entries that leave the block, and of the values before them that are
    /// not packed.
    fn unpack(
        &self,
        cut: &Cut,
        first: usize,
        memory: &PoolMemory,
        largest: f16,
    ) -> (Vec<f16>, Vec<f16>) {
        let layout = &memory.layout;
        let (mut key, mut value) =
            (vec![0.0; layout.keys.columns], vec![0.0; layout.values.columns]);
        let (mut keys, mut values, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        // A scale that was rounded up may dequantize to numbers slightly too large to be packed.
        let half = |&x: &f32| f16::from_f32(x).clamp(-largest, largest);
        for slot in cut.packed_values..cut.slots {
            if slot >= first && self.is_valid(slot) {
                self.read_key(memory, slot, &mut codes, &mut key);
                keys.extend(key.iter().map(half));
            }
            if slot < first || self.is_valid(slot) {
                self.read_value(memory, slot, &mut codes, &mut value);
                values.extend(value.iter().map(half));
            }
        }
        (keys, values)
    }
}

impl Cut {
    fn delta(&self, head: &Head, memory: &PoolMemory) -> BlockDelta {
        let Some(first) = self.unpacked else { return BlockDelta::default() };
        let rows = (first..self.slots).filter(|&slot| head.is_valid(slot)).count();
        let blocks = head.blocks[first / memory.layout.keys.capacity..].iter();
        let freed = blocks.filter(|&&block| !memory.blocks.is_shared(block)).count();
        let value_rows = rows + first - self.packed_values;
        BlockDelta {
            blocks: -(freed as isize),
            key_pages: head.keys.pages_to_replace(&memory.key_pages, first, rows),
            value_pages: head.values.pages_to_replace(
                &memory.value_pages,
                self.packed_values,
                value_rows,
            ),
        }
    }
}
