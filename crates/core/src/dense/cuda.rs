//! Keys and values of many sequences on a CUDA device, in f16 or bf16: a pool of blocks, and a
//! block table on the device for each sequence and kv head.
#![allow(unsafe_code)]

mod append;
mod append_step;
mod attend;
mod blocks;
mod decode;
mod edit;
mod evict;
mod prepared;
mod sums;
mod tables;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use crate::{AttentionShape, Batch, Error, Footprint, Result, Selection, SeqId};
use blocks::Blocks;
use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use longctx_kernels::{Half, PAGE};
use prepared::Prepared;
use tables::LastTables;

/// Keys and values of all sequences.
#[derive(Debug)]
pub struct CudaPool {
    shape: AttentionShape,
    dtype: DType,
    device: CudaDevice,
    blocks: Blocks,
    seqs: BTreeMap<SeqId, Sequence>,
    last_tables: LastTables,
    /// The last prepared decode step, and its sequences.
    prepared: Option<Prepared>,
    prepared_seqs: Vec<SeqId>,
    /// Thread blocks of attention that the device runs concurrently, for 8 and for 16 columns.
    slots: [OnceLock<usize>; 2],
}

/// The block tables of a sequence.
#[derive(Debug)]
struct Sequence {
    heads: Vec<BlockTable>,
    /// Block addresses of all heads, `[kv_heads, max_blocks]`.
    table: CudaSlice<u64>,
    max_blocks: usize,
}

/// One kv head's entries: blocks in order, all full except the last.
#[derive(Debug, Clone, Default)]
struct BlockTable {
    blocks: Vec<u32>,
    len: usize,
}

/// Blocks per head that the table of a new sequence has room for.
const INITIAL_BLOCKS: usize = 8;

impl CudaPool {
    /// Creates an empty pool of at most `capacity` bytes of blocks; `None` if there are no kernels.
    pub fn new(
        shape: &AttentionShape,
        dtype: DType,
        device: &Device,
        capacity: usize,
    ) -> Result<Option<Self>> {
        let Device::Cuda(device) = device else { return Ok(None) };
        if !crate::attention::has_kernels(device, dtype, shape)? {
            return Ok(None);
        }
        let (size, stream) = (2 * 2 * PAGE * shape.head_dim, device.cuda_stream());
        Ok(Some(Self {
            shape: *shape,
            dtype,
            device: device.clone(),
            blocks: Blocks::new(stream, size, capacity),
            seqs: BTreeMap::new(),
            last_tables: LastTables::default(),
            prepared: None,
            prepared_seqs: Vec::new(),
            slots: Default::default(),
        }))
    }

    fn stream(&self) -> Arc<CudaStream> {
        self.device.cuda_stream()
    }

    fn half(&self) -> Half {
        if self.dtype == DType::BF16 { Half::BF16 } else { Half::F16 }
    }

    fn known(&self, seq: SeqId) -> Result<&Sequence> {
        self.seqs.get(&seq).ok_or(Error::UnknownSequence(seq))
    }

    /// Returns `x` as a contiguous tensor of the store's dtype.
    fn fit(&self, x: &Tensor) -> Result<Tensor> {
        self.check_device(x)?;
        Ok(x.to_dtype(self.dtype)?.contiguous()?)
    }

    fn check_device(&self, x: &Tensor) -> Result<()> {
        if matches!(x.device(), Device::Cuda(device) if device.same_device(&self.device)) {
            return Ok(());
        }
        let got = format!("one on {:?}", x.device().location());
        Err(Error::mismatch("tensor", "one on the store's device", got))
    }

    /// Checks that indices that are on a device are on this one.
    fn check_selection(&self, selection: &Selection) -> Result<()> {
        selection.entries().map_or(Ok(()), |entries| self.check_device(entries))
    }

    /// Returns `x` `[tokens, heads, channels]` in the store's dtype with contiguous rows: a view
    /// into a projection stays a view.
    fn fit_rows(&self, x: &Tensor) -> Result<Tensor> {
        self.check_device(x)?;
        let x = x.to_dtype(self.dtype)?;
        let starts = [x.layout().start_offset(), x.stride()[0], x.stride()[1]];
        let in_pieces = starts.iter().all(|start| start.is_multiple_of(8));
        if in_pieces && x.stride()[2] == 1 { Ok(x) } else { Ok(x.contiguous()?) }
    }

    pub fn contains(&self, seq: SeqId) -> bool {
        self.seqs.contains_key(&seq)
    }

    pub fn lens(&self, seq: SeqId) -> Vec<usize> {
        let lens = |sequence: &Sequence| sequence.heads.iter().map(|table| table.len).collect();
        self.seqs.get(&seq).map_or(Vec::new(), lens)
    }

    pub fn seqs(&self) -> Vec<SeqId> {
        self.seqs.keys().copied().collect()
    }

    pub fn can_append(&self, batch: &Batch) -> bool {
        let needed = |(seq, tokens): (SeqId, std::ops::Range<usize>)| match self.seqs.get(&seq) {
            Some(sequence) => {
                sequence.heads.iter().map(|table| self.blocks_needed(table, tokens.len())).sum()
            }
            None => self.shape.kv_heads * tokens.len().div_ceil(PAGE),
        };
        self.blocks.check(batch.iter().map(needed).sum()).is_ok()
    }

    /// Returns whether there is room for copies of a sequence's shared blocks, and then for a token
    /// of each sequence of a batch, which takes at most one block per head.
    pub fn can_copy_and_append(&self, seq: SeqId, batch: &Batch) -> bool {
        if !self.blocks.any_shared() {
            return true;
        }
        let heads = self.seqs.get(&seq).into_iter().flat_map(|of| &of.heads);
        let blocks = heads.flat_map(|table| &table.blocks);
        let shared = blocks.filter(|&&block| self.blocks.shared(block)).count();
        let appended = batch.seqs().len() * self.shape.kv_heads;
        shared == 0 || self.blocks.check(shared + appended).is_ok()
    }

    /// Returns the number of blocks that an append to a head takes: new blocks, and a copy of a
    /// shared last block.
    fn blocks_needed(&self, table: &BlockTable, tokens: usize) -> usize {
        let new = (table.len + tokens).div_ceil(PAGE) - table.blocks.len();
        new + usize::from(self.copies_last(table, tokens))
    }

    /// Returns whether an append to a head first copies its last block because other tables share
    /// it.
    fn copies_last(&self, table: &BlockTable, tokens: usize) -> bool {
        let open = tokens > 0 && !table.len.is_multiple_of(PAGE);
        open && table.blocks.last().is_some_and(|&last| self.blocks.shared(last))
    }

    /// Blocks shared by several sequences count once.
    pub fn footprint(&self) -> Footprint {
        let mut counted = vec![false; self.blocks.count()];
        let mut bytes = Footprint::default();
        for sequence in self.seqs.values() {
            bytes.bookkeeping += sequence.bytes();
            for table in &sequence.heads {
                for (i, &block) in table.blocks.iter().enumerate() {
                    if !std::mem::replace(&mut counted[block as usize], true) {
                        bytes.payload += (table.len - i * PAGE).min(PAGE) * self.entry_bytes();
                    }
                }
            }
        }
        bytes.slack = self.blocks.bytes() - bytes.payload;
        bytes
    }

    pub fn seq_footprint(&self, seq: SeqId) -> Footprint {
        let Some(sequence) = self.seqs.get(&seq) else { return Footprint::default() };
        let entries: usize = sequence.heads.iter().map(|table| table.len).sum();
        let blocks: usize = sequence.heads.iter().map(|table| table.blocks.len()).sum();
        let payload = entries * self.entry_bytes();
        let slack = blocks * self.blocks.size() - payload;
        Footprint { payload, slack, bookkeeping: sequence.bytes(), ..Default::default() }
    }

    /// Returns the bytes of one entry: a key and a value.
    fn entry_bytes(&self) -> usize {
        self.blocks.size() / PAGE
    }

    pub fn clear(&mut self) {
        self.seqs.clear();
        self.blocks.clear();
        self.last_tables = LastTables::default();
    }
}

impl Sequence {
    fn new(stream: &Arc<CudaStream>, kv_heads: usize) -> Result<Self> {
        let table = stream.alloc_zeros(kv_heads * INITIAL_BLOCKS)?;
        Ok(Self { heads: vec![BlockTable::default(); kv_heads], table, max_blocks: INITIAL_BLOCKS })
    }

    /// Makes room in the device's block table for `blocks` blocks per head.
    fn reserve(&mut self, stream: &Arc<CudaStream>, blocks: usize) -> Result<()> {
        if blocks <= self.max_blocks {
            return Ok(());
        }
        let (old, heads) = (self.max_blocks, self.heads.len());
        let max_blocks = blocks.max(old + old / 4);
        let mut grown = stream.alloc_zeros::<u64>(heads * max_blocks)?;
        for head in 0..heads {
            let from = self.table.slice(head * old..(head + 1) * old);
            let mut to = grown.slice_mut(head * max_blocks..head * max_blocks + old);
            stream.memcpy_dtod(&from, &mut to)?;
        }
        (self.table, self.max_blocks) = (grown, max_blocks);
        Ok(())
    }

    /// Returns the device address of a head's block table.
    fn address(&self, stream: &CudaStream, head: usize) -> u64 {
        self.table.device_ptr(stream).0 + 8 * (head * self.max_blocks) as u64
    }

    /// Returns the bytes of the tables, on the device and on the host.
    fn bytes(&self) -> usize {
        let numbers: usize = self.heads.iter().map(|table| table.blocks.len()).sum();
        8 * self.table.len() + 4 * numbers + size_of::<Self>()
    }
}
