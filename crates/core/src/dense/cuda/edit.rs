//! Fork, truncate, retain, remove and read.

use super::{BlockTable, CudaPool, Sequence};
use crate::{Result, Selection, SeqId};
use candle_core::{DType, Device, Tensor};
use longctx_cuda::cudarc::driver::DevicePtr;
use longctx_kernels::{PAGE, paged};
use std::ops::Range;

/// The moves within a head when some of its entries are dropped.
struct Moves {
    /// The head's blocks after the move.
    blocks: Vec<u32>,
    /// First entry that is written.
    first: usize,
    /// Number of entries that are kept.
    count: usize,
    /// Blocks that were newly taken.
    taken: Vec<u32>,
}

impl CudaPool {
    /// Keeps the selected entries; the selection has been checked. Blocks before the first entry
    /// that is dropped stay unchanged; later entries move forward. If the selection is on the
    /// device, all entries count as moved.
    pub fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        let stream = self.stream();
        let known = self.known(seq)?;
        let counts = keep.lens();
        let firsts: Vec<_> = match keep.entries() {
            None => keep.heads()?.iter().map(|keep| first_moved(keep)).collect(),
            Some(_) => {
                let first = |(table, &count): (&BlockTable, &usize)| {
                    if count < table.len { 0 } else { count }
                };
                known.heads.iter().zip(&counts).map(first).collect()
            }
        };
        let shared: Vec<Vec<usize>> = {
            let heads = known.heads.iter().zip(firsts.iter().zip(&counts));
            heads.map(|(table, (&first, &count))| self.shared_among(table, first..count)).collect()
        };
        let mut free = self.blocks.take(shared.iter().map(Vec::len).sum())?;
        let mut moves = Vec::new();
        for (i, table) in self.known(seq)?.heads.iter().enumerate() {
            let blocks = table.blocks[..counts[i].div_ceil(PAGE)].to_vec();
            let mut of = Moves { blocks, first: firsts[i], count: counts[i], taken: Vec::new() };
            for &place in &shared[i] {
                let block = free.split_off(free.len() - 1)[0];
                of.blocks[place] = block;
                of.taken.push(block);
                of.first = of.first.min(place * PAGE);
            }
            moves.push(of);
        }
        let done = self.move_heads(seq, keep, &moves);
        let Some(sequence) = self.seqs.get_mut(&seq) else { return done };
        if let Err(error) = done {
            moves.iter().flat_map(|of| &of.taken).for_each(|&block| self.blocks.release(block));
            return Err(error);
        }
        for (head, of) in moves.into_iter().enumerate() {
            let table = &mut sequence.heads[head];
            let old = std::mem::replace(&mut table.blocks, of.blocks);
            table.len = of.count;
            for (place, block) in old.into_iter().enumerate() {
                if table.blocks.get(place) != Some(&block) {
                    self.blocks.release(block);
                }
            }
            if !of.taken.is_empty() {
                let addresses = table.blocks.iter().map(|&block| self.blocks.address(block));
                let addresses: Vec<u64> = addresses.collect();
                let first = head * sequence.max_blocks;
                let mut to = sequence.table.slice_mut(first..first + addresses.len());
                stream.memcpy_htod(&addresses, &mut to)?;
            }
        }
        Ok(())
    }

    /// Returns the indices of the blocks that moved entries are written to and that other sequences
    /// share.
    fn shared_among(&self, table: &BlockTable, moved: Range<usize>) -> Vec<usize> {
        if moved.is_empty() {
            return Vec::new();
        }
        let written = moved.start / PAGE..moved.end.div_ceil(PAGE);
        written.filter(|&place| self.blocks.shared(table.blocks[place])).collect()
    }

    fn move_heads(&self, seq: SeqId, keep: &Selection, moves: &[Moves]) -> Result<()> {
        let (stream, sequence) = (self.stream(), self.known(seq)?);
        if moves.iter().all(|of| of.first == of.count) {
            return Ok(());
        }
        let (uploaded, mut entries_at) = match keep.entries() {
            Some(entries) => (None, crate::cuda::address(entries)?),
            None => {
                let moved = moves.iter().zip(keep.heads()?).map(|(of, keep)| &keep[of.first..]);
                let moved = stream.clone_htod(&moved.collect::<Vec<_>>().concat())?;
                let address = moved.device_ptr(&stream).0;
                (Some(moved), address)
            }
        };
        let new = |of: &Moves| if of.taken.is_empty() { Vec::new() } else { of.blocks.clone() };
        let tables: Vec<u32> = moves.iter().flat_map(new).collect();
        let mut addresses: Vec<u64> =
            tables.iter().map(|&block| self.blocks.address(block)).collect();
        addresses.push(0);
        let tables = stream.clone_htod(&addresses)?;
        let mut table_at = tables.device_ptr(&stream).0;
        let mut rows = Vec::new();
        for (head, of) in moves.iter().enumerate() {
            let from = sequence.address(&stream, head);
            let to = if of.taken.is_empty() { from } else { table_at };
            // A selection on the device also lists the entries before the first that moves.
            entries_at += if uploaded.is_none() { 4 * of.first as u64 } else { 0 };
            rows.push(paged::MoveRow {
                from,
                to,
                entries: entries_at,
                first: of.first as i32,
                count: (of.count - of.first) as i32,
                len: sequence.heads[head].len as i32,
                unused: 0,
            });
            entries_at += 4 * (of.count - of.first) as u64;
            if !of.taken.is_empty() {
                table_at += 8 * of.blocks.len() as u64;
            }
        }
        let on_device = stream.clone_htod(&rows)?;
        let address = on_device.device_ptr(&stream).0;
        // SAFETY: the tables name blocks of the pool, the entries exist, and none moves to a later
        // index.
        unsafe { paged::move_entries(&stream, self.shape.head_dim, address, rows.len()) }
    }

    /// Returns one head's keys and values in f32.
    pub fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let len = self.known(seq)?.heads[kv_head].len;
        let all = (0..len as u32).collect();
        let rows = self.gather(&[(seq, kv_head, all)])?;
        let (blocks, d) = (len.div_ceil(PAGE), self.shape.head_dim);
        let rows = rows.reshape((blocks.max(1), 2, PAGE, d))?;
        let part = |i: usize| -> Result<Tensor> {
            let x = rows.narrow(1, i, 1)?.reshape(((), d))?.narrow(0, 0, len)?;
            Ok(x.to_dtype(DType::F32)?)
        };
        Ok((part(0)?, part(1)?))
    }

    /// Copies entries of some kv heads to contiguous blocks, with separate blocks for each head:
    /// `[blocks, 2, PAGE, head_dim]`. Elements after a head's last entry are undefined.
    pub(super) fn gather(&self, lists: &[(SeqId, usize, Vec<u32>)]) -> Result<Tensor> {
        let stream = self.stream();
        let blocks = |(_, _, list): &(SeqId, usize, Vec<u32>)| list.len().div_ceil(PAGE);
        let total: usize = lists.iter().map(blocks).sum();
        let dims = (total.max(1), 2, PAGE, self.shape.head_dim);
        let device = Device::Cuda(self.device.clone());
        // SAFETY: entries are written before they are read.
        let out = unsafe { Tensor::empty(dims, self.dtype, &device) }?;
        let entries: Vec<u32> = lists.iter().flat_map(|(_, _, list)| list).copied().collect();
        if entries.is_empty() {
            return Ok(out);
        }
        let start = crate::cuda::address(&out)?;
        let size = self.blocks.size() as u64;
        let addresses: Vec<u64> = (0..total as u64).map(|i| start + i * size).collect();
        let (entries, addresses) = (stream.clone_htod(&entries)?, stream.clone_htod(&addresses)?);
        let (mut entries_at, mut to) =
            (entries.device_ptr(&stream).0, addresses.device_ptr(&stream).0);
        let mut rows = Vec::new();
        for of @ (seq, head, list) in lists {
            let from = match self.seqs.get(seq) {
                Some(sequence) => sequence.address(&stream, *head),
                None => 0,
            };
            let count = list.len() as i32;
            let held = self.seqs.get(seq).map_or(0, |sequence| sequence.heads[*head].len);
            rows.push(paged::MoveRow {
                from,
                to,
                entries: entries_at,
                first: 0,
                count,
                len: held as i32,
                unused: 0,
            });
            entries_at += 4 * list.len() as u64;
            to += 8 * blocks(of) as u64;
        }
        let rows_on = stream.clone_htod(&rows)?;
        let address = rows_on.device_ptr(&stream).0;
        // SAFETY: the entries exist, and the tensor has room for them.
        unsafe { paged::move_entries(&stream, self.shape.head_dim, address, rows.len()) }?;
        Ok(out)
    }

    pub fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let stream = self.stream();
        let sequence = self.known(from)?;
        let table = stream.clone_dtod(&sequence.table)?;
        let copy =
            Sequence { heads: sequence.heads.clone(), table, max_blocks: sequence.max_blocks };
        let blocks = copy.heads.iter().flat_map(|table| &table.blocks);
        blocks.for_each(|&block| self.blocks.share(block));
        self.seqs.insert(to, copy);
        Ok(())
    }

    pub fn truncate(&mut self, seq: SeqId, len: usize) {
        for table in self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads) {
            table.len = table.len.min(len);
            let rest = table.blocks.drain(table.len.div_ceil(PAGE)..);
            rest.for_each(|block| self.blocks.release(block));
        }
    }

    pub fn remove(&mut self, seq: SeqId) -> bool {
        let Some(sequence) = self.seqs.remove(&seq) else { return false };
        let blocks = sequence.heads.iter().flat_map(|table| &table.blocks);
        blocks.for_each(|&block| self.blocks.release(block));
        true
    }
}

/// Returns the first index to which another entry moves.
fn first_moved(keep: &[u32]) -> usize {
    keep.iter().enumerate().take_while(|(place, entry)| *place == **entry as usize).count()
}
