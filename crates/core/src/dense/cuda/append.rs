//! Append: new tokens' keys and values are written to blocks.

use super::{CudaPool, Sequence};
use crate::cuda::{SharedList, address};
use crate::{Batch, Result, Selection, SeqId};
use candle_core::Tensor;
use longctx_cuda::Upload;
use longctx_kernels::paged;

/// The device addresses of an append's lists.
#[derive(Debug, Clone, Copy)]
pub(super) struct AppendLists {
    pub rows: u64,
    pub tables: u64,
    pub new_blocks: u64,
}

/// The blocks that one kv head takes for the tokens of a call.
pub(super) struct NewBlocks {
    /// Block table index of the first block that the head takes.
    first: usize,
    /// The blocks taken. The first may be a copy of the head's shared last block.
    blocks: Vec<u32>,
    copies: bool,
    count: usize,
}

impl CudaPool {
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        match self.prepared_for(batch)? {
            Some(prepared) => {
                let (k, v) = (self.fit_rows(k)?, self.fit_rows(v)?);
                self.launch_append((&k, &v), prepared.append, (prepared.heads, 1))
            }
            None => self.append_rows(batch, k, v, None),
        }
    }

    pub fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        self.append_rows(batch, k, v, Some(tokens))
    }

    /// Appends all tokens or the selected ones. After an error nothing has changed.
    fn append_rows(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: Option<&[Selection]>,
    ) -> Result<()> {
        let (k, v) = (self.fit_rows(k)?, self.fit_rows(v)?);
        let created: Vec<SeqId> =
            batch.seqs().iter().copied().filter(|seq| !self.contains(*seq)).collect();
        for &seq in &created {
            let sequence = Sequence::new(&self.stream(), self.shape.kv_heads)?;
            self.seqs.insert(seq, sequence);
        }
        let new_blocks = self.grow(batch, tokens);
        let done = new_blocks.and_then(|new_blocks| {
            match self.write(batch, (&k, &v), tokens, &new_blocks) {
                Ok(()) => Ok(new_blocks),
                Err(error) => {
                    self.give_back(&new_blocks);
                    Err(error)
                }
            }
        });
        let new_blocks = done.inspect_err(|_| {
            created.iter().for_each(|seq| drop(self.seqs.remove(seq)));
        })?;
        self.add_blocks(batch, new_blocks);
        Ok(())
    }

    /// Releases blocks that no table names.
    pub(super) fn give_back(&mut self, new_blocks: &[NewBlocks]) {
        let taken = new_blocks.iter().flat_map(|new| &new.blocks);
        taken.for_each(|&block| self.blocks.release(block));
    }

    /// Adds blocks to the tables of the host, and counts the tokens.
    pub(super) fn add_blocks(&mut self, batch: &Batch, new_blocks: Vec<NewBlocks>) {
        let mut new_blocks = new_blocks.into_iter();
        for seq in batch.seqs() {
            let tables = self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads);
            for (table, new) in tables.zip(&mut new_blocks) {
                table.blocks.drain(new.first..).for_each(|block| self.blocks.release(block));
                table.blocks.extend(new.blocks);
                table.len += new.count;
            }
        }
    }

    /// Takes the blocks that each kv head of the batch's sequences needs, `[sequences * kv_heads]`.
    pub(super) fn grow(
        &mut self,
        batch: &Batch,
        tokens: Option<&[Selection]>,
    ) -> Result<Vec<NewBlocks>> {
        let mut new_blocks = Vec::new();
        for (i, (seq, own)) in batch.iter().enumerate() {
            let counts = tokens.map(|tokens| tokens[i].lens());
            for (head, table) in self.known(seq)?.heads.iter().enumerate() {
                let count = counts.as_ref().map_or(own.len(), |counts| counts[head]);
                let copies = self.copies_last(table, count);
                let first = table.blocks.len() - usize::from(copies);
                let needed = self.blocks_needed(table, count);
                new_blocks.push((needed, NewBlocks { first, blocks: Vec::new(), copies, count }));
            }
        }
        let mut taken = self.blocks.take(new_blocks.iter().map(|(needed, _)| needed).sum())?;
        let give = |(needed, new): (usize, NewBlocks)| NewBlocks {
            blocks: taken.split_off(taken.len() - needed),
            ..new
        };
        Ok(new_blocks.into_iter().map(give).collect())
    }

    /// Writes keys, values and block tables to the device.
    fn write(
        &mut self,
        batch: &Batch,
        (k, v): (&Tensor, &Tensor),
        tokens: Option<&[Selection]>,
        new_blocks: &[NewBlocks],
    ) -> Result<()> {
        let stream = self.stream();
        self.reserve_tables(batch, new_blocks)?;
        let addresses = self.new_addresses(new_blocks);
        // The concatenated selections of the host.
        let mut selected: Vec<u32> = Vec::new();
        for selection in tokens.into_iter().flatten().filter(|of| of.entries().is_none()) {
            selected.extend(selection.heads()?.iter().flatten());
        }
        let mut lists = Upload::default();
        let (first_block, first_token) = (lists.push(&addresses), lists.push(&selected));
        let lists = lists.copy(&stream)?;
        let rows = self.rows(batch, tokens, new_blocks, lists.address() + first_token)?;
        let rows = SharedList::new(batch, &stream, rows)?;
        let longest = new_blocks.iter().map(|new| new.count).max().unwrap_or(0);
        let tables = self.tables(batch)?;
        let of = AppendLists {
            rows: rows.address(),
            tables: tables.address(),
            new_blocks: lists.address() + first_block,
        };
        self.launch_append((k, v), of, (rows.list().len(), longest))
    }

    /// Makes room in the device's tables for new blocks.
    pub(super) fn reserve_tables(&mut self, batch: &Batch, new_blocks: &[NewBlocks]) -> Result<()> {
        let (stream, kv_heads) = (self.stream(), self.shape.kv_heads);
        for (seq, new_blocks) in batch.seqs().iter().zip(new_blocks.chunks(kv_heads)) {
            let blocks = new_blocks.iter().map(|new| new.first + new.blocks.len()).max();
            if let Some(sequence) = self.seqs.get_mut(seq) {
                sequence.reserve(&stream, blocks.unwrap_or(0))?;
            }
        }
        Ok(())
    }

    /// Returns the addresses of all new blocks.
    pub(super) fn new_addresses(&self, new_blocks: &[NewBlocks]) -> Vec<u64> {
        let blocks = new_blocks.iter().flat_map(|new| &new.blocks);
        blocks.map(|&block| self.blocks.address(block)).collect()
    }

    /// Launches the append of rows of `k` and `v`. `rows`: their number; `longest`: the largest
    /// number of tokens of one.
    fn launch_append(
        &self,
        (k, v): (&Tensor, &Tensor),
        lists: AppendLists,
        (rows, longest): (usize, usize),
    ) -> Result<()> {
        let stride = |x: &Tensor, dim: usize| (x.stride()[dim] / 8) as i64;
        let args = paged::AppendArgs {
            k: address(k)?,
            v: address(v)?,
            rows: lists.rows,
            tables: lists.tables,
            new_blocks: lists.new_blocks,
            k_token: stride(k, 0),
            k_head: stride(k, 1),
            v_token: stride(v, 0),
            v_head: stride(v, 1),
            pieces: (self.shape.head_dim / 8) as i32,
            unused: 0,
        };
        // SAFETY: the tables have room for the blocks, the blocks have room for the entries, the
        // tensors have the rows, and the stream frees no memory before this launch has used it.
        Ok(unsafe { paged::append(&self.stream(), &args, (rows, longest)) }?)
    }

    /// Returns a row for each kv head of the batch's sequences, and copies shared last blocks.
    /// `selected`: device address of the selections of the host.
    pub(super) fn rows(
        &self,
        batch: &Batch,
        tokens: Option<&[Selection]>,
        new_blocks: &[NewBlocks],
        mut selected: u64,
    ) -> Result<Vec<paged::AppendRow>> {
        let (kv_heads, mut taken) = (self.shape.kv_heads, 0);
        let mut rows = Vec::with_capacity(new_blocks.len());
        for (i, ((seq, own), new_blocks)) in
            batch.iter().zip(new_blocks.chunks(kv_heads)).enumerate()
        {
            let (mut list, on_host) = match tokens.map(|tokens| tokens[i].entries()) {
                None => (0, false),
                Some(None) => (selected, true),
                Some(Some(entries)) => (address(entries)?, false),
            };
            let tables = &self.known(seq)?.heads;
            for (kv_head, (new, table)) in new_blocks.iter().zip(tables).enumerate() {
                if new.copies {
                    self.blocks.copy(table.blocks[new.first], new.blocks[0])?;
                }
                rows.push(paged::AppendRow {
                    tokens: list,
                    table: rows.len() as i32,
                    kv_head: kv_head as i32,
                    first_token: own.start as i32,
                    seqlen: own.len() as i32,
                    first: table.len as i32,
                    count: new.count as i32,
                    first_new_block: new.first as i32,
                    new_block_count: new.blocks.len() as i32,
                    new_blocks: taken,
                    unused: 0,
                });
                taken += new.blocks.len() as i32;
                if list != 0 {
                    list += 4 * new.count as u64;
                }
            }
            if on_host {
                selected = list;
            }
        }
        Ok(rows)
    }
}
