//! The lists of an append. They depend on lengths only, so the layers of a model share them.

use std::sync::Arc;

use super::{BlockTable, CudaPool};
use crate::cuda::SharedList;
use crate::{Batch, Result, SeqId};
use longctx_kernels::paged::AppendRow;

/// The lengths of a kv head before an append.
#[derive(Debug, Clone, Copy, PartialEq)]
struct TableLens {
    entries: usize,
    blocks: usize,
    /// Whether other tables share the last block, which has room for entries.
    shared: bool,
}

/// The blocks that a head takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Take {
    pub seq: SeqId,
    pub kv_head: usize,
    /// Block table index of the first of them.
    pub first: usize,
    pub count: usize,
    /// Whether the first is a copy of the head's shared last block.
    pub copies: bool,
}

/// An append's lists.
#[derive(Debug)]
pub(super) struct AppendStep {
    /// Address of the stream, whose order protects the rows on the device.
    stream: usize,
    lens: Vec<TableLens>,
    /// A row for each kv head of the batch's sequences.
    pub rows: SharedList<AppendRow>,
    pub takes: Vec<Take>,
    /// The number of blocks that all heads take.
    pub blocks: usize,
    /// The largest number of tokens of a head.
    pub longest: usize,
}

impl CudaPool {
    /// Returns the lists of an append of all tokens, which layers with equal lengths share. All
    /// sequences exist.
    pub(super) fn step(&self, batch: &Batch) -> Result<Arc<AppendStep>> {
        let stream = self.stream().cu_stream() as usize;
        let equal = |step: &AppendStep| step.stream == stream && self.has_lens(batch, &step.lens);
        batch.shared(equal, || {
            let count = |(_, own): (SeqId, std::ops::Range<usize>)| {
                std::iter::repeat_n(own.len(), self.shape.kv_heads)
            };
            self.new_step(batch, &batch.iter().flat_map(count).collect::<Vec<_>>())
        })
    }

    /// Returns the lists of an append of `counts` tokens per head, `[sequences * kv_heads]`.
    pub(super) fn new_step(&self, batch: &Batch, counts: &[usize]) -> Result<AppendStep> {
        let (mut rows, mut takes, mut blocks) = (Vec::with_capacity(counts.len()), Vec::new(), 0);
        let mut lens = Vec::with_capacity(counts.len());
        for (seq, own) in batch.iter() {
            for (kv_head, table) in self.known(seq)?.heads.iter().enumerate() {
                lens.push(self.lens_of(table));
                let count = counts[rows.len()];
                let copies = self.copies_last(table, count);
                let take = Take {
                    seq,
                    kv_head,
                    first: table.blocks.len() - usize::from(copies),
                    count: self.blocks_needed(table, count),
                    copies,
                };
                rows.push(AppendRow {
                    tokens: 0,
                    table: rows.len() as i32,
                    kv_head: kv_head as i32,
                    first_token: own.start as i32,
                    seqlen: own.len() as i32,
                    first: table.len as i32,
                    count: count as i32,
                    first_new_block: take.first as i32,
                    new_block_count: take.count as i32,
                    new_blocks: blocks as i32,
                    unused: 0,
                });
                blocks += take.count;
                takes.extend((take.count > 0).then_some(take));
            }
        }
        Ok(AppendStep {
            stream: self.stream().cu_stream() as usize,
            lens,
            rows: SharedList::new(rows),
            takes,
            blocks,
            longest: counts.iter().copied().max().unwrap_or(0),
        })
    }

    /// Returns whether the kv heads of a batch's sequences have these lengths.
    fn has_lens(&self, batch: &Batch, lens: &[TableLens]) -> bool {
        let same = |heads: &[BlockTable], lens: &[TableLens]| {
            heads.iter().zip(lens).all(|(table, lens)| self.lens_of(table) == *lens)
        };
        let kv_heads = self.shape.kv_heads;
        let mut all = batch.seqs().iter().zip(lens.chunks(kv_heads));
        // A layer with another number of kv heads has another number of lengths.
        lens.len() == batch.seqs().len() * kv_heads
            && all.all(|(seq, lens)| self.seqs.get(seq).is_some_and(|of| same(&of.heads, lens)))
    }

    fn lens_of(&self, table: &BlockTable) -> TableLens {
        let (entries, blocks) = (table.len, table.blocks.len());
        TableLens { entries, blocks, shared: self.copies_last(table, 1) }
    }
}
