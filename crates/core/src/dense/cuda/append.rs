//! Append: new tokens' keys and values are written to blocks.

use super::{CudaSeqs, Sequence};
use crate::cuda::{address, paged};
use crate::{Batch, Result, Selection, SeqId};
use candle_core::Tensor;
use longctx_cuda::cudarc::driver::DevicePtr;

/// The growth of one kv head by the tokens of a call.
struct Growth {
    /// Block table index of the first block that the head takes.
    first: usize,
    /// The blocks taken. The first may be a copy of the head's shared last block.
    blocks: Vec<u32>,
    copies: bool,
    count: usize,
}

impl CudaSeqs {
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.take(batch, k, v, None)
    }

    pub fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        self.take(batch, k, v, Some(tokens))
    }

    /// Appends all tokens or the selected ones. After an error nothing has changed.
    fn take(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: Option<&[Selection]>,
    ) -> Result<()> {
        let (k, v) = (self.fit(k)?, self.fit(v)?);
        let new: Vec<SeqId> =
            batch.seqs().iter().copied().filter(|seq| !self.contains(*seq)).collect();
        for &seq in &new {
            let sequence = Sequence::new(&self.stream(), self.shape.kv_heads)?;
            self.seqs.insert(seq, sequence);
        }
        let growths = self.grow(batch, tokens);
        let done =
            growths.and_then(|growths| match self.write(batch, (&k, &v), tokens, &growths) {
                Ok(()) => Ok(growths),
                Err(error) => {
                    let taken = growths.iter().flat_map(|growth| &growth.blocks);
                    taken.for_each(|&block| self.blocks.release(block));
                    Err(error)
                }
            });
        let growths = done.inspect_err(|_| {
            new.iter().for_each(|seq| drop(self.seqs.remove(seq)));
        })?;
        let mut growths = growths.into_iter();
        for seq in batch.seqs() {
            let tables = self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads);
            for (table, growth) in tables.zip(&mut growths) {
                table.blocks.drain(growth.first..).for_each(|block| self.blocks.release(block));
                table.blocks.extend(growth.blocks);
                table.len += growth.count;
            }
        }
        Ok(())
    }

    /// Takes the blocks that each kv head of the batch's sequences needs, `[sequences * kv_heads]`.
    fn grow(&mut self, batch: &Batch, tokens: Option<&[Selection]>) -> Result<Vec<Growth>> {
        let mut growths = Vec::new();
        for (i, (seq, own)) in batch.iter().enumerate() {
            let counts = tokens.map(|tokens| tokens[i].lens());
            for (head, table) in self.known(seq)?.heads.iter().enumerate() {
                let count = counts.as_ref().map_or(own.len(), |counts| counts[head]);
                let copies = self.copies_last(table, count);
                let first = table.blocks.len() - usize::from(copies);
                let wanted = self.wanted(table, count);
                growths.push((wanted, Growth { first, blocks: Vec::new(), copies, count }));
            }
        }
        let mut taken = self.blocks.take(growths.iter().map(|(wanted, _)| wanted).sum())?;
        let give = |(wanted, growth): (usize, Growth)| Growth {
            blocks: taken.split_off(taken.len() - wanted),
            ..growth
        };
        Ok(growths.into_iter().map(give).collect())
    }

    /// Writes keys, values and block tables to the device.
    fn write(
        &mut self,
        batch: &Batch,
        (k, v): (&Tensor, &Tensor),
        tokens: Option<&[Selection]>,
        growths: &[Growth],
    ) -> Result<()> {
        let (stream, kv_heads) = (self.stream(), self.shape.kv_heads);
        for (seq, growths) in batch.seqs().iter().zip(growths.chunks(kv_heads)) {
            let blocks = growths.iter().map(|growth| growth.first + growth.blocks.len()).max();
            if let Some(sequence) = self.seqs.get_mut(seq) {
                sequence.reserve(&stream, blocks.unwrap_or(0))?;
            }
        }
        let addresses = growths.iter().flat_map(|growth| &growth.blocks);
        let addresses: Vec<u64> = addresses.map(|&block| self.blocks.address(block)).collect();
        // The concatenated selections of the host.
        let mut uploaded: Vec<u32> = Vec::new();
        for selection in tokens.into_iter().flatten().filter(|of| of.entries().is_none()) {
            uploaded.extend(selection.heads()?.iter().flatten());
        }
        let upload = |x: &[u64]| stream.clone_htod(if x.is_empty() { &[0][..] } else { x });
        let fresh = upload(&addresses)?;
        let uploaded = match uploaded.is_empty() {
            true => None,
            false => Some(stream.clone_htod(&uploaded)?),
        };
        let (mut fresh_at, mut uploaded_at) = (
            fresh.device_ptr(&stream).0,
            uploaded.as_ref().map_or(0, |tokens| tokens.device_ptr(&stream).0),
        );
        let (mut rows, mut longest) = (Vec::new(), 0);
        for (i, ((seq, own), growths)) in batch.iter().zip(growths.chunks(kv_heads)).enumerate() {
            let sequence = self.known(seq)?;
            let (mut selected, on_host) = match tokens.map(|tokens| tokens[i].entries()) {
                None => (0, false),
                Some(None) => (uploaded_at, true),
                Some(Some(entries)) => (address(entries)?, false),
            };
            for (head, (growth, table)) in growths.iter().zip(&sequence.heads).enumerate() {
                if growth.copies {
                    self.blocks.copy(table.blocks[growth.first], growth.blocks[0])?;
                }
                rows.push(paged::AppendRow {
                    table: sequence.address(&stream, head),
                    fresh: fresh_at,
                    tokens: selected,
                    first_row: (own.start * kv_heads + head) as i64,
                    first_fresh: growth.first as i32,
                    fresh_count: growth.blocks.len() as i32,
                    first: table.len as i32,
                    count: growth.count as i32,
                    own: own.len() as i32,
                    unused: 0,
                });
                fresh_at += 8 * growth.blocks.len() as u64;
                if selected != 0 {
                    selected += 4 * growth.count as u64;
                }
                longest = longest.max(growth.count);
            }
            if on_host {
                uploaded_at = selected;
            }
        }
        let on_device = stream.clone_htod(&rows)?;
        let args = paged::AppendArgs {
            k: address(k)?,
            v: address(v)?,
            rows: on_device.device_ptr(&stream).0,
            stride: kv_heads as i64,
            pieces: (self.shape.head_dim / 8) as i32,
            unused: 0,
        };
        // SAFETY: the tables have room for the blocks, the blocks have room for the entries, the
        // tensors have the rows, and the stream frees no memory before this launch has used it.
        unsafe { paged::append(&stream, &args, (rows.len(), longest)) }
    }
}
