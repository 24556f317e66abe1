//! Appends tokens to blocks and pages. Everything is checked before anything changes.

use std::borrow::Cow;
use std::ops::Range;

use super::head::{Growth, Head};
use super::memory::{BlockDelta, PAGE, PoolMemory};
use super::residual::{self, Residual};
use super::slabs::Slabs;
use super::{Pool, Sequence, batch};
use crate::hadamard::rotated_out_of_range;
use crate::layout::Line;
use crate::number::{MAX_GROUPED, Number, to_f16};
use crate::quantize::Quantizer;
use crate::{Error, Flush, Result, Scheme};
use half::f16;
use rayon::prelude::*;

/// Keys or values of a call, `[tokens, kv_heads, columns]`.
struct Incoming<'a> {
    data: Cow<'a, [f16]>,
    kv_heads: usize,
    columns: usize,
}

/// The tokens that one kv head of a sequence appends.
struct HeadAppend<'a> {
    seq: u64,
    head: usize,
    /// The sequence's first token in the call.
    first: usize,
    /// The appended tokens, relative to `first`; `None`: all.
    selected: Option<&'a [u32]>,
    /// Number of slots before the append.
    slots: usize,
    to: Growth,
}

/// A block to write to: its item, its index in the head's table, and the slots of its new keys and
/// values.
struct BlockFill {
    item: usize,
    block: usize,
    keys: Range<usize>,
    values: Range<usize>,
}

#[derive(Default)]
struct Scratch {
    rows: Vec<f16>,
    quantizer: Quantizer,
}

impl Pool {
    /// Appends keys `[tokens, kv_heads, head_dim]` and values `[tokens, kv_heads, value_dim]` of
    /// some sequences. The tokens are concatenated: those of the i-th sequence are
    /// `cu_seqlens[i]..cu_seqlens[i + 1]`. A sequence that does not exist yet is created.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if `cu_seqlens` does not fit the sequences, a sequence is listed twice,
    /// or a slice has a wrong length; [`Error::NotFinite`]; [`Error::OutOfRange`] for numbers
    /// beyond ±32752 (±65504 if nothing is packed); [`Error::PoolFull`]. On an error nothing has
    /// changed.
    pub fn append<T: Number>(
        &mut self,
        seqs: &[u64],
        cu_seqlens: &[usize],
        keys: &[T],
        values: &[T],
    ) -> Result<()> {
        batch::check(seqs, cu_seqlens)?;
        self.append_tokens(seqs, cu_seqlens, keys, values, None)
    }

    /// Appends to each kv head the tokens selected for it. `selected` has a list for each sequence
    /// and kv head, `[sequences * kv_heads]`, of indices relative to the sequence's first token of
    /// the call.
    ///
    /// # Errors
    /// As [`append`](Self::append), and [`Error::Mismatch`] for a wrong number of lists, or a list
    /// that is not strictly increasing or exceeds the sequence's tokens.
    pub fn append_selected<T: Number>(
        &mut self,
        seqs: &[u64],
        cu_seqlens: &[usize],
        keys: &[T],
        values: &[T],
        selected: &[Vec<u32>],
    ) -> Result<()> {
        batch::check(seqs, cu_seqlens)?;
        let lists = seqs.len() * self.shape.kv_heads;
        if selected.len() != lists {
            return Err(Error::mismatch("selections of tokens", lists, selected.len()));
        }
        for (list, selected) in selected.iter().enumerate() {
            let i = list / self.shape.kv_heads;
            batch::check_list("selected tokens", selected, cu_seqlens[i + 1] - cu_seqlens[i])?;
        }
        self.append_tokens(seqs, cu_seqlens, keys, values, Some(selected))
    }

    /// Returns the bytes of blocks and pages that [`append`](Self::append) would take minus those
    /// that it frees. If several sequences of the call share a block, each is counted as copying
    /// it.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn bytes_needed(&self, seqs: &[u64], cu_seqlens: &[usize]) -> Result<usize> {
        batch::check(seqs, cu_seqlens)?;
        Ok(self.bytes_to_append(&self.items(seqs, cu_seqlens, None)))
    }

    /// Checks that there is room to append the tokens to the sequences.
    #[cfg(feature = "candle")]
    pub(crate) fn check_append(&self, seqs: &[u64], cu_seqlens: &[usize]) -> Result<()> {
        self.check_room(self.bytes_needed(seqs, cu_seqlens)?)
    }

    /// Returns whether there is room to append the tokens to the sequences, in one call or divided
    /// among several.
    ///
    /// Several calls can need more memory than [`bytes_needed`](Self::bytes_needed): tokens stay in
    /// full precision until their group is complete, and only its packing frees that memory.
    pub fn can_append(&self, seqs: &[u64], cu_seqlens: &[usize]) -> bool {
        if batch::check(seqs, cu_seqlens).is_err() {
            return false;
        }
        let items = self.items(seqs, cu_seqlens, None);
        // A call of one token each cannot be divided.
        let divisible = items.iter().any(|item| item.to.slots > item.slots + 1);
        let needed = if divisible { self.peak_bytes(&items) } else { self.bytes_to_append(&items) };
        self.check_room(needed).is_ok()
    }

    /// Returns the largest magnitude of a number that can be appended.
    pub(crate) fn largest(&self) -> f16 {
        match self.format.flush() {
            Flush::Never => f16::MAX,
            _ => MAX_GROUPED,
        }
    }

    fn append_tokens<T: Number>(
        &mut self,
        seqs: &[u64],
        cu_seqlens: &[usize],
        keys: &[T],
        values: &[T],
        selected: Option<&[Vec<u32>]>,
    ) -> Result<()> {
        let tokens = cu_seqlens.last().copied().unwrap_or(0);
        let (head_dim, value_dim) = (self.shape.head_dim, self.shape.value_dim);
        let (of_keys, of_values) = (self.format.keys(), self.format.values());
        let batch = (seqs, cu_seqlens);
        let keys = self.incoming(("keys", of_keys), batch, keys, tokens, head_dim)?;
        let values = self.incoming(("values", of_values), batch, values, tokens, value_dim)?;
        let items = self.items(seqs, cu_seqlens, selected);
        self.check_room(self.bytes_to_append(&items))?;
        for &seq in seqs {
            let heads = self.shape.kv_heads;
            self.seqs.entry(seq).or_insert_with(|| Sequence::new(heads));
        }
        self.pack(&items, &keys, &values)?;
        self.push_residuals(&items, &keys, &values);
        self.memory.shrink();
        Ok(())
    }

    /// Returns the numbers in f16, if they can be packed.
    fn incoming<'a, T: Number>(
        &self,
        (of, scheme): (&'static str, Scheme),
        batch: (&[u64], &[usize]),
        data: &'a [T],
        tokens: usize,
        columns: usize,
    ) -> Result<Incoming<'a>> {
        let kv_heads = self.shape.kv_heads;
        if data.len() != tokens.saturating_mul(kv_heads).saturating_mul(columns) {
            let expected = format!("{tokens} tokens x {kv_heads} kv heads x {columns}");
            return Err(Error::mismatch(of, expected, format!("{} numbers", data.len())));
        }
        let refused = |(at, value): (usize, f32)| {
            Error::number(value, batch::position(of, batch, kv_heads, columns, at))
        };
        let data = to_f16(data, self.largest()).map_err(|at| refused((at, data[at].widen())))?;
        if scheme.rotated
            && let Some(beyond) = rotated_out_of_range(&data, columns)
        {
            return Err(refused(beyond));
        }
        Ok(Incoming { data, kv_heads, columns })
    }

    fn items<'a>(
        &self,
        seqs: &[u64],
        cu_seqlens: &[usize],
        selected: Option<&'a [Vec<u32>]>,
    ) -> Vec<HeadAppend<'a>> {
        let new = Head::default();
        let mut items = Vec::with_capacity(seqs.len() * self.shape.kv_heads);
        for (i, &seq) in seqs.iter().enumerate() {
            let (first, end) = (cu_seqlens[i], cu_seqlens[i + 1]);
            for head in 0..self.shape.kv_heads {
                let selected = selected.map(|lists| &*lists[i * self.shape.kv_heads + head]);
                let tokens = selected.map_or(end - first, <[u32]>::len);
                let held = self.seqs.get(&seq).map_or(&new, |sequence| &sequence.heads[head]);
                let (slots, to) = (held.slots(), held.grown(&self.format, tokens));
                items.push(HeadAppend { seq, head, first, selected, slots, to });
            }
        }
        items
    }

    /// Returns the bytes that the items take.
    fn bytes_to_append(&self, items: &[HeadAppend<'_>]) -> usize {
        let (new, chunk) = (Head::default(), self.format.block_tokens());
        let mut delta = BlockDelta::default();
        for item in items {
            let held = self.seqs.get(&item.seq).map_or(&new, |seq| &seq.heads[item.head]);
            delta += held.delta_to_grow(&self.memory, chunk, &item.to);
        }
        self.memory.bytes(delta).max(0) as usize
    }

    /// Returns the most bytes that the items take at a time if each is appended in several calls.
    fn peak_bytes(&self, items: &[HeadAppend<'_>]) -> usize {
        let (new, mut delta) = (Head::default(), BlockDelta::default());
        for item in items {
            let held = self.seqs.get(&item.seq).map_or(&new, |seq| &seq.heads[item.head]);
            delta += held.peak_to_grow(&self.memory, &self.format, item.to.slots - item.slots);
        }
        self.memory.bytes(delta).max(0) as usize
    }

    /// Packs the tokens that are ready, from the residual and the new tokens.
    fn pack(
        &mut self,
        items: &[HeadAppend<'_>],
        keys: &Incoming<'_>,
        values: &Incoming<'_>,
    ) -> Result<()> {
        let chunk = self.format.block_tokens();
        let Self { seqs, memory, .. } = self;
        let mut fills = Vec::new();
        for (number, item) in items.iter().enumerate() {
            let Some(head) = head_mut(seqs, item) else { continue };
            let written: Vec<_> = head.written_blocks(chunk, &item.to).collect();
            for (i, [keys, values]) in written {
                match head.blocks.get_mut(i) {
                    Some(block) => *block = memory.blocks.make_unique(*block),
                    None => head.blocks.push(memory.blocks.alloc()),
                }
                fills.push(BlockFill { item: number, block: i, keys, values });
            }
        }
        let rows: usize = fills.iter().map(|fill| fill.keys.len().max(fill.values.len())).sum();
        let heads: Vec<&Head> =
            items.iter().filter_map(|item| Some(&seqs.get(&item.seq)?.heads[item.head])).collect();
        let PoolMemory { layout, blocks, key_pages, value_pages } = memory;
        let blocks = blocks.many_mut(fills.iter().map(|fill| heads[fill.item].blocks[fill.block]));
        let pack = |scratch: &mut Scratch, (number, lines): (usize, &mut [Line])| {
            let fill = &fills[number];
            let (item, head) = (&items[fill.item], heads[fill.item]);
            let held = |packed: usize| packed.saturating_sub(fill.block * chunk).min(chunk);
            let (mut key_part, mut value_part) =
                layout.parts_mut(lines, held(head.packed_keys), held(head.packed_values));
            let Scratch { rows, quantizer } = scratch;
            keys.gather(item, &head.keys, key_pages, fill.keys.clone(), rows);
            key_part.push(rows, quantizer)?;
            values.gather(item, &head.values, value_pages, fill.values.clone(), rows);
            value_part.push(rows, quantizer)
        };
        let at_once = min_parts_per_thread(blocks.len(), rows);
        blocks.into_par_iter().with_min_len(at_once).map_init(Scratch::default, pack).collect()
    }

    /// Advances the residuals, and writes the tokens that stay in full precision to their pages.
    fn push_residuals(
        &mut self,
        items: &[HeadAppend<'_>],
        keys: &Incoming<'_>,
        values: &Incoming<'_>,
    ) {
        let Self { seqs, memory, .. } = self;
        for item in items {
            let Some(head) = head_mut(seqs, item) else { continue };
            head.set_packed_keys(item.to.packed_keys);
            head.packed_values = item.to.packed_values;
            head.len += item.to.slots - item.slots;
            head.keys.advance(&mut memory.key_pages, item.to.key_start);
            head.keys.grow(&mut memory.key_pages, item.to.slots);
            head.values.advance(&mut memory.value_pages, item.to.value_start);
            head.values.grow(&mut memory.value_pages, item.to.slots);
        }
        let heads = items.iter().filter_map(|item| Some(&seqs.get(&item.seq)?.heads[item.head]));
        let heads: Vec<&Head> = heads.collect();
        keys.write(items, &heads, |head| &head.keys, &mut memory.key_pages);
        values.write(items, &heads, |head| &head.values, &mut memory.value_pages);
    }
}

impl Incoming<'_> {
    /// Returns an item's row of a slot.
    fn row(&self, item: &HeadAppend<'_>, slot: usize) -> &[f16] {
        let i = slot - item.slots;
        let token = item.first + item.selected.map_or(i, |selected| selected[i] as usize);
        &self.data[(token * self.kv_heads + item.head) * self.columns..][..self.columns]
    }

    /// Returns the rows of some slots, from the residual or the new tokens.
    fn gather(
        &self,
        item: &HeadAppend<'_>,
        residual: &Residual,
        slabs: &Slabs,
        slots: Range<usize>,
        rows: &mut Vec<f16>,
    ) {
        rows.clear();
        for slot in slots {
            rows.extend_from_slice(if slot < item.slots {
                residual.row(slabs, slot, self.columns)
            } else {
                self.row(item, slot)
            });
        }
    }

    /// Writes new tokens to the pages of the heads' residuals, which have room for them.
    fn write(
        &self,
        items: &[HeadAppend<'_>],
        heads: &[&Head],
        residual: impl Fn(&Head) -> &Residual,
        slabs: &mut Slabs,
    ) {
        let mut parts = Vec::new();
        let mut rows = 0;
        for (item, head) in items.iter().zip(heads) {
            let residual = residual(head);
            let mut slot = item.slots.max(residual.start);
            while slot < residual.end {
                let end = residual.end.min((slot / PAGE + 1) * PAGE);
                parts.push((item, residual.page(slot), slot..end));
                rows += end - slot;
                slot = end;
            }
        }
        let pages = slabs.many_mut(parts.iter().map(|(_, page, _)| *page));
        let at_once = min_parts_per_thread(pages.len(), rows / 8);
        pages.into_par_iter().with_min_len(at_once).for_each(|(number, lines)| {
            let (item, _, slots) = &parts[number];
            let page = residual::rows_mut(lines);
            for slot in slots.clone() {
                let at = slot % PAGE * self.columns;
                page[at..at + self.columns].copy_from_slice(self.row(item, slot));
            }
        });
    }
}

fn head_mut<'a>(
    seqs: &'a mut std::collections::BTreeMap<u64, Sequence>,
    item: &HeadAppend<'_>,
) -> Option<&'a mut Head> {
    Some(&mut seqs.get_mut(&item.seq)?.heads[item.head])
}

/// Returns the number of parts that have 64 rows in total. For fewer rows, waking a thread does not
/// pay.
fn min_parts_per_thread(parts: usize, rows: usize) -> usize {
    (64 * parts).div_ceil(rows.max(1)).max(1)
}
