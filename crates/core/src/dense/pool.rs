//! Keys and values of many sequences on the CPU: a pool of blocks, and a block table for each
//! sequence and kv head.

use std::collections::BTreeMap;

use super::slab::Slab;
use crate::attention::{Element, Page};
use crate::{Batch, Error, Footprint, Result, SeqId};

/// Entries per block.
pub const BLOCK: usize = 32;
/// Blocks of the first slab. A later slab has an eighth of the existing blocks, and at least this
/// many.
const SLAB: usize = 8;

/// A pool of blocks. A block holds keys `[BLOCK, head_dim]` and values `[BLOCK, value_dim]` of one
/// kv head.
///
/// Blocks are reference-counted and shared by forks. An append or a retain copies a shared block
/// before it writes to it.
#[derive(Debug)]
pub struct Pool<T> {
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    blocks: Blocks<T>,
    seqs: BTreeMap<SeqId, Vec<BlockTable>>,
}

/// One kv head's entries: blocks in order, all full except the last.
#[derive(Debug, Clone, Default)]
struct BlockTable {
    blocks: Vec<u32>,
    len: usize,
}

impl<T: Element> Pool<T> {
    /// Creates an empty pool of at most `capacity` bytes of blocks.
    pub fn new(kv_heads: usize, head_dim: usize, value_dim: usize, capacity: usize) -> Self {
        let blocks = Blocks::new(BLOCK * (head_dim + value_dim), capacity);
        Self { kv_heads, head_dim, value_dim, blocks, seqs: BTreeMap::new() }
    }

    /// Checks that there is room to append a batch's tokens to every head.
    pub fn check_room(&self, batch: &Batch) -> Result<()> {
        let of_seq = |(seq, tokens): (SeqId, std::ops::Range<usize>)| match self.seqs.get(&seq) {
            Some(tables) => {
                let needed = tables.iter().map(|table| self.blocks_needed(table, tokens.len()));
                needed.fold(0, usize::saturating_add)
            }
            None => self.kv_heads.saturating_mul(tokens.len().div_ceil(BLOCK)),
        };
        self.blocks.check(batch.iter().map(of_seq).fold(0, usize::saturating_add))
    }

    /// Checks that there is room for the selected tokens.
    pub fn check_room_for(&self, batch: &Batch, tokens: &[&[Vec<u32>]]) -> Result<()> {
        let empty = BlockTable::default();
        let mut needed = 0;
        for ((seq, _), lists) in batch.iter().zip(tokens) {
            for (head, list) in lists.iter().enumerate() {
                let table = self.seqs.get(&seq).map_or(&empty, |tables| &tables[head]);
                needed += self.blocks_needed(table, list.len());
            }
        }
        self.blocks.check(needed)
    }

    /// Returns the number of blocks that an append to a head takes: new blocks, and a copy of a
    /// shared last block.
    fn blocks_needed(&self, table: &BlockTable, tokens: usize) -> usize {
        let new = table.len.saturating_add(tokens).div_ceil(BLOCK) - table.blocks.len();
        let shared = |&last: &u32| {
            tokens > 0 && !table.len.is_multiple_of(BLOCK) && self.blocks.shared(last)
        };
        new + usize::from(table.blocks.last().is_some_and(shared))
    }

    /// Appends rows to a head. The room has been checked.
    pub fn append(&mut self, seq: SeqId, head: usize, keys: &[T], values: &[T]) {
        let (d, dv) = (self.head_dim, self.value_dim);
        let tables =
            self.seqs.entry(seq).or_insert_with(|| vec![BlockTable::default(); self.kv_heads]);
        let table = &mut tables[head];
        let (mut done, count) = (0, keys.len() / d);
        while done < count {
            let at = table.len % BLOCK;
            match table.blocks.last_mut() {
                Some(last) if at > 0 => *last = self.blocks.make_unique(*last),
                _ => table.blocks.push(self.blocks.take()),
            }
            let now = (BLOCK - at).min(count - done);
            let block = self.blocks.get_mut(table.blocks[table.blocks.len() - 1]);
            let (k, v) = block.split_at_mut(BLOCK * d);
            k[at * d..(at + now) * d].copy_from_slice(&keys[done * d..(done + now) * d]);
            v[at * dv..(at + now) * dv].copy_from_slice(&values[done * dv..(done + now) * dv]);
            (done, table.len) = (done + now, table.len + now);
        }
    }

    /// Keeps the selected entries. The selection has been checked. Blocks before the first dropped
    /// entry stay unchanged; entries after it move forward.
    pub fn retain(&mut self, seq: SeqId, keep: &[Vec<u32>]) -> Result<()> {
        let tables = self.seqs.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?;
        let mut copies = 0;
        for (table, keep) in tables.iter().zip(keep) {
            let written = table.first_written(keep) / BLOCK..keep.len().div_ceil(BLOCK);
            if keep.len() < table.len && table.first_written(keep) < keep.len() {
                let shared = written.filter(|&b| self.blocks.shared(table.blocks[b]));
                copies += shared.count();
            }
        }
        self.blocks.check(copies)?;
        let (d, dv) = (self.head_dim, self.value_dim);
        for (table, keep) in tables.iter_mut().zip(keep) {
            let first = table.first_written(keep);
            // Reads from the old table: a shared block is copied before it is written.
            let old = table.blocks.clone();
            for (to, &from) in keep.iter().enumerate().skip(first) {
                let (block, at) = (to / BLOCK, to % BLOCK);
                if table.blocks[block] == old[block] && self.blocks.shared(old[block]) {
                    table.blocks[block] = self.blocks.copy(old[block]);
                }
                let from = from as usize;
                let source = (old[from / BLOCK], from % BLOCK);
                self.blocks.move_row(source, (table.blocks[block], at), d, dv);
            }
            for (&old, &new) in old.iter().zip(&table.blocks) {
                if old != new {
                    self.blocks.release(old);
                }
            }
            self.blocks.shorten(table, keep.len());
        }
        Ok(())
    }

    /// Drops the entries of each head after its first `lens[head]`.
    pub fn truncate(&mut self, seq: SeqId, lens: &[usize]) {
        for (table, &len) in self.seqs.get_mut(&seq).into_iter().flatten().zip(lens) {
            self.blocks.shorten(table, len);
        }
    }

    pub fn fork(&mut self, from: SeqId, to: SeqId) {
        let Some(tables) = self.seqs.get(&from) else { return };
        tables.iter().flat_map(|table| &table.blocks).for_each(|&block| self.blocks.share(block));
        self.seqs.insert(to, tables.clone());
    }

    pub fn remove(&mut self, seq: SeqId) -> bool {
        let Some(tables) = self.seqs.remove(&seq) else { return false };
        tables.iter().flat_map(|table| &table.blocks).for_each(|&block| self.blocks.release(block));
        true
    }

    pub fn seqs(&self) -> Vec<SeqId> {
        self.seqs.keys().copied().collect()
    }

    pub fn lens(&self, seq: SeqId) -> Vec<usize> {
        let tables = self.seqs.get(&seq).into_iter().flatten();
        tables.map(|table| table.len).collect()
    }

    /// Returns a head's blocks as runs of rows; empty for an unknown sequence.
    pub fn pages(&self, seq: SeqId, head: usize) -> Vec<Page<'_, T>> {
        let Some(tables) = self.seqs.get(&seq) else { return Vec::new() };
        let table = &tables[head];
        let page = |(i, &block): (usize, &u32)| {
            let rows = BLOCK.min(table.len - i * BLOCK);
            let (keys, values) = self.blocks.get(block).split_at(BLOCK * self.head_dim);
            Page { keys: &keys[..rows * self.head_dim], values: &values[..rows * self.value_dim] }
        };
        table.blocks.iter().enumerate().map(page).collect()
    }

    /// Returns the bytes of everything. A used block counts once, by the entries in use.
    pub fn footprint(&self) -> Footprint {
        let mut rows = vec![0u8; self.blocks.count()];
        for table in self.seqs.values().flatten() {
            for (i, &block) in table.blocks.iter().enumerate() {
                let held = BLOCK.min(table.len - i * BLOCK) as u8;
                rows[block as usize] = rows[block as usize].max(held);
            }
        }
        let held: usize = rows.into_iter().map(usize::from).sum();
        let payload = held * self.row_bytes();
        let tables = self.seqs.values().map(|tables| table_bytes(tables)).sum::<usize>();
        Footprint {
            payload,
            slack: self.blocks.bytes() - payload,
            bookkeeping: tables + self.blocks.count() * size_of::<u32>(),
            ..Default::default()
        }
    }

    /// Returns the bytes of one sequence. Shared blocks count in full.
    pub fn seq_footprint(&self, seq: SeqId) -> Footprint {
        let Some(tables) = self.seqs.get(&seq) else { return Footprint::default() };
        let rows: usize = tables.iter().map(|table| table.len).sum();
        let room: usize = tables.iter().map(|table| table.blocks.len() * BLOCK).sum();
        Footprint {
            payload: rows * self.row_bytes(),
            slack: (room - rows) * self.row_bytes(),
            bookkeeping: table_bytes(tables),
            ..Default::default()
        }
    }

    fn row_bytes(&self) -> usize {
        (self.head_dim + self.value_dim) * size_of::<T>()
    }

    /// Frees all memory.
    pub fn clear(&mut self) {
        self.seqs.clear();
        self.blocks = Blocks::new(self.blocks.size, self.blocks.capacity);
    }

    /// Returns the number of blocks to which no table refers.
    #[cfg(test)]
    pub fn free_blocks(&self) -> usize {
        self.blocks.free.len()
    }

    /// Returns the number of allocated blocks.
    #[cfg(test)]
    pub fn block_count(&self) -> usize {
        self.blocks.count()
    }
}

fn table_bytes(tables: &[BlockTable]) -> usize {
    let of =
        |table: &BlockTable| size_of::<BlockTable>() + table.blocks.capacity() * size_of::<u32>();
    tables.iter().map(of).sum()
}

impl BlockTable {
    /// Returns the first index that a retain of these entries writes to.
    fn first_written(&self, keep: &[u32]) -> usize {
        keep.iter().enumerate().take_while(|(place, entry)| *place == **entry as usize).count()
    }
}

/// Blocks of equal size in slabs that never move.
#[derive(Debug)]
struct Blocks<T> {
    /// Elements per block.
    size: usize,
    /// The largest number of bytes of all slabs.
    capacity: usize,
    slabs: Vec<Slab<T>>,
    /// The slab and offset of each block.
    slab_offsets: Vec<(u32, u32)>,
    references: Vec<u32>,
    free: Vec<u32>,
}

impl<T: Element> Blocks<T> {
    fn new(size: usize, capacity: usize) -> Self {
        let (slabs, slab_offsets) = (Vec::new(), Vec::new());
        Self { size, capacity, slabs, slab_offsets, references: Vec::new(), free: Vec::new() }
    }

    fn count(&self) -> usize {
        self.slab_offsets.len()
    }

    fn bytes(&self) -> usize {
        self.count() * self.size * size_of::<T>()
    }

    /// Returns the number of blocks that can still be allocated.
    fn unallocated(&self) -> usize {
        self.capacity / (self.size * size_of::<T>()) - self.count()
    }

    /// Checks that `needed` blocks can be taken.
    fn check(&self, needed: usize) -> Result<()> {
        let free = self.free.len().saturating_add(self.unallocated());
        if needed > free {
            let bytes = |blocks: usize| blocks.saturating_mul(self.size * size_of::<T>());
            let (needed, free) = (bytes(needed), bytes(free));
            return Err(Error::PoolFull { what: "pool of dense blocks".into(), needed, free });
        }
        Ok(())
    }

    /// Takes a block with one reference. [`check`](Self::check) has been called before.
    fn take(&mut self) -> u32 {
        if self.free.is_empty() {
            self.grow();
        }
        let block = self.free.pop().expect("the room was checked");
        self.references[block as usize] = 1;
        block
    }

    fn grow(&mut self) {
        let blocks = (self.count() / 8).max(SLAB).min(self.unallocated());
        let slab = self.slabs.len() as u32;
        self.slabs.push(Slab::zeroed(blocks * self.size));
        let first = self.count() as u32;
        self.slab_offsets.extend((0..blocks as u32).map(|i| (slab, i)));
        self.references.resize(self.count(), 0);
        // The lowest number is taken first.
        self.free.extend((first..first + blocks as u32).rev());
    }

    fn share(&mut self, block: u32) {
        self.references[block as usize] += 1;
    }

    fn shared(&self, block: u32) -> bool {
        self.references[block as usize] > 1
    }

    fn release(&mut self, block: u32) {
        self.references[block as usize] -= 1;
        if self.references[block as usize] == 0 {
            self.free.push(block);
        }
    }

    /// Returns a copy of a block.
    fn copy(&mut self, block: u32) -> u32 {
        let copy = self.take();
        let numbers = self.get(block).to_vec();
        self.get_mut(copy).copy_from_slice(&numbers);
        copy
    }

    /// Returns the block itself if it has one reference, otherwise a copy that replaces it.
    fn make_unique(&mut self, block: u32) -> u32 {
        if !self.shared(block) {
            return block;
        }
        let copy = self.copy(block);
        self.release(block);
        copy
    }

    fn get(&self, block: u32) -> &[T] {
        let (slab, i) = self.slab_offsets[block as usize];
        &self.slabs[slab as usize][i as usize * self.size..][..self.size]
    }

    fn get_mut(&mut self, block: u32) -> &mut [T] {
        let (slab, i) = self.slab_offsets[block as usize];
        &mut self.slabs[slab as usize][i as usize * self.size..][..self.size]
    }

    /// Copies one entry's key and value from a row of one block to a row of another.
    fn move_row(&mut self, from: (u32, usize), to: (u32, usize), d: usize, dv: usize) {
        let place = |(block, row): (u32, usize)| {
            let (slab, i) = self.slab_offsets[block as usize];
            let start = i as usize * self.size;
            (slab as usize, start + row * d, start + BLOCK * d + row * dv)
        };
        let ((from_slab, from_k, from_v), (to_slab, to_k, to_v)) = (place(from), place(to));
        if from_slab == to_slab {
            let slab = &mut self.slabs[to_slab];
            slab.copy_within(from_k..from_k + d, to_k);
            slab.copy_within(from_v..from_v + dv, to_v);
        } else if let Ok([source, target]) = self.slabs.get_disjoint_mut([from_slab, to_slab]) {
            target[to_k..to_k + d].copy_from_slice(&source[from_k..from_k + d]);
            target[to_v..to_v + dv].copy_from_slice(&source[from_v..from_v + dv]);
        }
    }

    /// Shortens a table to `len` entries and frees the blocks after them.
    fn shorten(&mut self, table: &mut BlockTable, len: usize) {
        let len = len.min(table.len);
        table.blocks.drain(len.div_ceil(BLOCK)..).for_each(|block| self.release(block));
        table.len = len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(from: usize, count: usize) -> Vec<f32> {
        (from * 2..(from + count) * 2).map(|i| i as f32).collect()
    }

    fn read(pool: &Pool<f32>, seq: SeqId, head: usize) -> Vec<f32> {
        pool.pages(seq, head).iter().flat_map(|page| page.keys.to_vec()).collect()
    }

    fn append(pool: &mut Pool<f32>, seq: SeqId, from: usize, count: usize) -> Result<()> {
        pool.check_room(&Batch::single(seq, count)?)?;
        (0..2).for_each(|head| pool.append(seq, head, &rows(from, count), &rows(from, count)));
        Ok(())
    }

    #[test]
    fn forks_share_blocks_until_they_write() {
        let mut pool = Pool::<f32>::new(2, 2, 2, usize::MAX);
        append(&mut pool, 1, 0, 100).unwrap();
        let blocks = || 2 * 100usize.div_ceil(BLOCK);
        let used = |pool: &Pool<f32>| pool.block_count() - pool.free_blocks();
        assert_eq!(used(&pool), blocks());
        pool.fork(1, 2);
        assert_eq!(used(&pool), blocks());
        append(&mut pool, 2, 500, 1).unwrap();
        // The last block of each head was shared and not full.
        assert_eq!(used(&pool), blocks() + 2);
        assert_eq!(read(&pool, 1, 0), rows(0, 100));
        assert_eq!(read(&pool, 2, 1), [rows(0, 100), rows(500, 1)].concat());
        // Entries that move are also written to copies.
        let keep: Vec<u32> = (0..100).filter(|entry| entry % 3 > 0).collect();
        pool.retain(1, &[keep.clone(), keep.clone()]).unwrap();
        let kept: Vec<f32> = keep.iter().flat_map(|&entry| rows(entry as usize, 1)).collect();
        assert_eq!(read(&pool, 1, 1), kept);
        assert_eq!(read(&pool, 2, 1), [rows(0, 100), rows(500, 1)].concat());
        assert!(pool.remove(1) && pool.remove(2) && !pool.remove(2));
        assert_eq!(used(&pool), 0);
    }

    #[test]
    fn a_full_pool_names_bytes_and_changes_nothing() {
        let block = BLOCK * 4 * size_of::<f32>();
        let mut pool = Pool::<f32>::new(2, 2, 2, 5 * block + 3);
        append(&mut pool, 1, 0, BLOCK + 1).unwrap();
        pool.fork(1, 2);
        let error = append(&mut pool, 2, 0, 1).unwrap_err();
        let Error::PoolFull { needed, free, .. } = error else { panic!("{error}") };
        assert_eq!((needed, free), (2 * block, block));
        assert_eq!(read(&pool, 2, 0), rows(0, BLOCK + 1));
        pool.remove(1);
        append(&mut pool, 2, BLOCK + 1, 1).unwrap();
        assert_eq!(read(&pool, 2, 0), rows(0, BLOCK + 2));
        assert!(append(&mut pool, 3, 0, 1).is_err());
    }
}
