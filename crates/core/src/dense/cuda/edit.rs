//! Fork, truncate, retain, remove and read.

use super::{CudaPool, Sequence};
use crate::{Result, Selection, SeqId};
use candle_core::{DType, Device, Tensor};
use longctx_cuda::{Upload, upload};
use longctx_kernels::{PAGE, paged};

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
    /// As [`retain_each`](Self::retain_each), of one sequence.
    pub fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        self.retain_each(&[(seq, keep.clone())])
    }

    /// Keeps the selected entries of each sequence. The selections have been checked, and the
    /// sequences are distinct. Blocks before the first entry that is dropped stay unchanged; later
    /// entries move forward. If a selection is on the device, all its entries count as moved. After
    /// an error nothing has changed.
    pub fn retain_each(&mut self, keep: &[(SeqId, Selection)]) -> Result<()> {
        keep.iter().try_for_each(|(_, selection)| self.check_selection(selection))?;
        let moves = self.plan_moves(keep)?;
        if let Err(error) = self.move_heads(keep, &moves) {
            moves.iter().flat_map(|of| &of.taken).for_each(|&block| self.blocks.release(block));
            return Err(error);
        }
        let mut moves = moves.into_iter();
        for (seq, _) in keep {
            let heads = moves.by_ref().take(self.shape.kv_heads).collect();
            self.replace_tables(*seq, heads)?;
        }
        Ok(())
    }

    /// Takes the blocks that the moves need: copies of shared blocks that entries are moved to.
    /// Returns the moves of all heads, `[sequences * kv_heads]`.
    fn plan_moves(&mut self, keep: &[(SeqId, Selection)]) -> Result<Vec<Moves>> {
        let mut moves = Vec::new();
        for (seq, keep) in keep {
            let host = keep.entries().is_none().then(|| keep.heads()).transpose()?;
            for (i, (table, count)) in self.known(*seq)?.heads.iter().zip(keep.lens()).enumerate() {
                let first = match host {
                    Some(lists) => first_moved(&lists[i]),
                    None if count < table.len => 0,
                    None => count,
                };
                let blocks = table.blocks[..count.div_ceil(PAGE)].to_vec();
                moves.push(Moves { blocks, first, count, taken: Vec::new() });
            }
        }
        let shared: Vec<_> = moves.iter().map(|of| self.shared_among(of)).collect();
        let mut free = self.blocks.take(shared.iter().map(Vec::len).sum())?;
        for (of, shared) in moves.iter_mut().zip(shared) {
            of.taken = free.split_off(free.len() - shared.len());
            for (&place, &block) in shared.iter().zip(&of.taken) {
                of.blocks[place] = block;
                of.first = of.first.min(place * PAGE);
            }
        }
        Ok(moves)
    }

    /// Returns the indices of the blocks that moved entries are written to and that other sequences
    /// share.
    fn shared_among(&self, of: &Moves) -> Vec<usize> {
        if of.first >= of.count {
            return Vec::new();
        }
        let written = of.first / PAGE..of.count.div_ceil(PAGE);
        written.filter(|&place| self.blocks.shared(of.blocks[place])).collect()
    }

    /// Replaces the block tables of a sequence's heads after a move.
    fn replace_tables(&mut self, seq: SeqId, moves: Vec<Moves>) -> Result<()> {
        let stream = self.stream();
        let Some(sequence) = self.seqs.get_mut(&seq) else { return Ok(()) };
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

    fn move_heads(&self, keep: &[(SeqId, Selection)], moves: &[Moves]) -> Result<()> {
        if moves.iter().all(|of| of.first >= of.count) {
            return Ok(());
        }
        let (stream, kv_heads) = (self.stream(), self.shape.kv_heads);
        // The entries of the host's selections that move, and the tables of heads with new blocks.
        let (mut entries, mut tables) = (Vec::new(), Vec::new());
        for ((_, keep), moves) in keep.iter().zip(moves.chunks(kv_heads)) {
            if keep.entries().is_none() {
                let moved = moves.iter().zip(keep.heads()?).map(|(of, keep)| &keep[of.first..]);
                moved.for_each(|moved| entries.extend_from_slice(moved));
            }
            let replaced = moves.iter().filter(|of| !of.taken.is_empty());
            let blocks = replaced.flat_map(|of| &of.blocks);
            tables.extend(blocks.map(|&block| self.blocks.address(block)));
        }
        let mut lists = Upload::default();
        let (entries, tables) = (lists.push(&entries), lists.push(&tables));
        let lists = lists.copy(&stream)?;
        let (mut entries_at, mut table_at) = (lists.address() + entries, lists.address() + tables);
        let mut rows = Vec::new();
        for ((seq, keep), moves) in keep.iter().zip(moves.chunks(kv_heads)) {
            let sequence = self.known(*seq)?;
            let mut on_device = keep.entries().map(crate::cuda::address).transpose()?;
            for (head, of) in moves.iter().enumerate() {
                let from = sequence.address(&stream, head);
                let count = of.count - of.first;
                // A list on the device also has the entries before the first that moves.
                let entries = on_device.map_or(entries_at, |list| list + 4 * of.first as u64);
                let to = if of.taken.is_empty() { from } else { table_at };
                rows.push(paged::MoveRow {
                    from,
                    to,
                    entries,
                    first: of.first as i32,
                    count: count as i32,
                    len: sequence.heads[head].len as i32,
                    unused: 0,
                });
                match &mut on_device {
                    Some(list) => *list += 4 * of.count as u64,
                    None => entries_at += 4 * count as u64,
                }
                if !of.taken.is_empty() {
                    table_at += 8 * of.blocks.len() as u64;
                }
            }
        }
        let on_device = upload(&stream, &rows)?;
        let (address, d) = (on_device.address(), self.shape.head_dim);
        // SAFETY: the tables name blocks of the pool, the entries exist, and none moves to a later
        // index.
        Ok(unsafe { paged::move_entries(&stream, d, address, rows.len()) }?)
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
        let (entries, addresses) = (upload(&stream, &entries)?, upload(&stream, &addresses)?);
        let (mut entries_at, mut to) = (entries.address(), addresses.address());
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
        let on_device = upload(&stream, &rows)?;
        let (address, d) = (on_device.address(), self.shape.head_dim);
        // SAFETY: the entries exist, and the tensor has room for them.
        unsafe { paged::move_entries(&stream, d, address, rows.len()) }?;
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

    pub fn truncate(&mut self, seq: SeqId, lens: &[usize]) {
        let heads = self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads);
        for (table, &len) in heads.zip(lens) {
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
