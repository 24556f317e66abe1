//! Append: new tokens' keys and values are written to blocks.

use std::sync::Arc;

use super::append_step::AppendStep;
use super::{CudaPool, Sequence};
use crate::cuda::address;
use crate::{Batch, Error, Result, Selection, SeqId};
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

impl CudaPool {
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = (self.fit_rows(k)?, self.fit_rows(v)?);
        if let Some(prepared) = self.prepared_for(batch)? {
            let attends_only =
                || Error::Unsupported("an append in a step that attends only".into());
            let lists = prepared.append.ok_or_else(attends_only)?;
            return self.launch_append((&k, &v), lists, (prepared.heads, 1));
        }
        self.append_tokens(batch, (&k, &v), None)
    }

    pub fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        tokens.iter().try_for_each(|selection| self.check_selection(selection))?;
        let (k, v) = (self.fit_rows(k)?, self.fit_rows(v)?);
        self.append_tokens(batch, (&k, &v), Some(tokens))
    }

    /// Appends all tokens or the selected ones, also to unknown sequences. After an error nothing
    /// has changed.
    fn append_tokens(
        &mut self,
        batch: &Batch,
        kv: (&Tensor, &Tensor),
        tokens: Option<&[Selection]>,
    ) -> Result<()> {
        let created: Vec<SeqId> =
            batch.seqs().iter().copied().filter(|seq| !self.contains(*seq)).collect();
        let mut blocks = Vec::new();
        let done = self
            .create(&created)
            .and_then(|()| self.take_and_write(batch, kv, tokens, &mut blocks));
        match done {
            Ok(step) => {
                self.advance(batch, &step, &blocks);
                Ok(())
            }
            Err(error) => {
                blocks.into_iter().for_each(|block| self.blocks.release(block));
                created.iter().for_each(|seq| drop(self.seqs.remove(seq)));
                Err(error)
            }
        }
    }

    fn create(&mut self, seqs: &[SeqId]) -> Result<()> {
        for &seq in seqs {
            let sequence = Sequence::new(&self.stream(), self.shape.kv_heads)?;
            self.seqs.insert(seq, sequence);
        }
        Ok(())
    }

    /// Takes the blocks of an append and launches it.
    fn take_and_write(
        &mut self,
        batch: &Batch,
        kv: (&Tensor, &Tensor),
        tokens: Option<&[Selection]>,
        blocks: &mut Vec<u32>,
    ) -> Result<Arc<AppendStep>> {
        let step = match tokens {
            None => self.step(batch)?,
            Some(tokens) => {
                let counts: Vec<_> = tokens.iter().flat_map(Selection::lens).collect();
                Arc::new(self.new_step(batch, &counts)?)
            }
        };
        self.reserve_tables(&step)?;
        blocks.extend(self.blocks.take(step.blocks)?);
        self.write(batch, kv, &step, blocks, tokens)?;
        Ok(step)
    }

    /// Adds the blocks of a step to the tables of the host, and counts its tokens.
    pub(super) fn advance(&mut self, batch: &Batch, step: &AppendStep, mut blocks: &[u32]) {
        for take in &step.takes {
            let (own, rest) = blocks.split_at(take.count);
            blocks = rest;
            if let Some(sequence) = self.seqs.get_mut(&take.seq) {
                let table = &mut sequence.heads[take.kv_head];
                table.blocks.drain(take.first..).for_each(|block| self.blocks.release(block));
                table.blocks.extend(own);
            }
        }
        let mut rows = step.rows.list().iter();
        for seq in batch.seqs() {
            let heads = self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads);
            heads.zip(&mut rows).for_each(|(table, row)| table.len += row.count as usize);
        }
    }

    /// Makes room in the device's tables for new blocks.
    pub(super) fn reserve_tables(&mut self, step: &AppendStep) -> Result<()> {
        let stream = self.stream();
        for take in &step.takes {
            if let Some(sequence) = self.seqs.get_mut(&take.seq) {
                sequence.reserve(&stream, take.first + take.count)?;
            }
        }
        Ok(())
    }

    /// Returns the addresses of blocks.
    pub(super) fn addresses(&self, blocks: &[u32]) -> Vec<u64> {
        blocks.iter().map(|&block| self.blocks.address(block)).collect()
    }

    /// Copies the shared last blocks to the new blocks that replace them.
    pub(super) fn copy_shared(&self, step: &AppendStep, mut blocks: &[u32]) -> Result<()> {
        for take in &step.takes {
            let (own, rest) = blocks.split_at(take.count);
            blocks = rest;
            if take.copies {
                let table = &self.known(take.seq)?.heads[take.kv_head];
                self.blocks.copy(table.blocks[take.first], own[0])?;
            }
        }
        Ok(())
    }

    /// Writes keys, values and block tables to the device. `tokens`: the selected ones; `None`: all.
    fn write(
        &self,
        batch: &Batch,
        kv: (&Tensor, &Tensor),
        step: &AppendStep,
        blocks: &[u32],
        tokens: Option<&[Selection]>,
    ) -> Result<()> {
        let stream = self.stream();
        self.copy_shared(step, blocks)?;
        let mut lists = Upload::default();
        let new_blocks = lists.push(&self.addresses(blocks));
        // The concatenated selections of the host.
        let mut selected: Vec<u32> = Vec::new();
        for selection in tokens.into_iter().flatten().filter(|of| of.entries().is_none()) {
            selected.extend(selection.heads()?.iter().flatten());
        }
        let selected = lists.push(&selected);
        let lists = lists.copy(&stream)?;
        let selected = lists.address() + selected;
        let rows =
            tokens.map(|tokens| selected_rows(step.rows.list(), tokens, selected)).transpose()?;
        let rows = rows.map(|rows| longctx_cuda::upload(&stream, &rows)).transpose()?;
        let of = AppendLists {
            rows: rows
                .as_ref()
                .map_or_else(|| step.rows.address(&stream), |rows| Ok(rows.address()))?,
            tables: self.tables(batch)?.address(),
            new_blocks: lists.address() + new_blocks,
        };
        self.launch_append(kv, of, (step.rows.list().len(), step.longest))
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
}

/// Returns the rows of a call, with the addresses of the tokens selected for each head. `on_host`:
/// address of the copied selections of the host.
fn selected_rows(
    rows: &[paged::AppendRow],
    tokens: &[Selection],
    mut on_host: u64,
) -> Result<Vec<paged::AppendRow>> {
    let mut selected = Vec::with_capacity(rows.len());
    let kv_heads = rows.len() / tokens.len().max(1);
    for (selection, rows) in tokens.iter().zip(rows.chunks(kv_heads.max(1))) {
        let mut on_device = selection.entries().map(address).transpose()?;
        for row in rows {
            let list = on_device.as_mut().unwrap_or(&mut on_host);
            selected.push(paged::AppendRow { tokens: *list, ..*row });
            *list += 4 * row.count as u64;
        }
    }
    Ok(selected)
}
