//! Packed keys and values of one layer for many sequences on a CUDA device.

use super::head::{Head, Sequence, ring_places};
use super::memory::LastHeads;
use super::prepared::Prepared;
use super::records::{Records, Shared, lock};
use super::status::Status;
use crate::cuda::{Kernels, Layout, TILE, needs};
use crate::{Axis, Codes, Flush, Format};
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_core::{AttentionShape, Batch, Error, Footprint, Result, SeqId};
use longctx_cuda::cudarc::driver::CudaStream;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Packed keys and values of one layer for many sequences on a CUDA device.
///
/// A record holds a block of entries of one kv head. All sequences take records from one pool. New
/// entries are written to a ring of the sequence, in the dtype of the first entries (f16 or bf16;
/// f32 becomes f16). They are packed from there when the [`Format`] requires it; formats that pack
/// immediately pack when a block is complete. Attention reads records and rings of all sequences in
/// one launch.
///
/// Appending never waits for the device. So NaN or infinity among the entries is reported by a
/// later call, after they have been packed, and the sequence is then poisoned.
/// [`fork`](Self::fork) waits for the device, so it reports all numbers appended before.
///
/// A clone shares the records. If one of the two poisons a shared sequence, it is poisoned in both.
#[derive(Debug, Clone)]
pub struct CudaPool {
    pub(super) shape: AttentionShape,
    /// The requested format.
    format: Format,
    /// The format in which entries are held.
    pub(super) device_format: Format,
    pub(super) layout: Layout,
    pub(super) device: CudaDevice,
    pub(super) kernels: Kernels,
    status: Arc<Status>,
    /// The dtype of the rings, determined by the first entries.
    pub(super) dtype: Option<DType>,
    capacity: Option<usize>,
    pub(super) records: Shared,
    pub(super) seqs: BTreeMap<SeqId, Sequence>,
    pub(super) last_heads: LastHeads,
    /// The last prepared decode step.
    pub(super) prepared: Option<Prepared>,
}

/// Returns the format that a device uses instead of `format`. Tokens that the CPU packs immediately
/// stay in full precision on a device until their block is complete.
fn on_device(format: Format) -> Result<Format> {
    let keys = format.keys();
    let kivi = keys.axis == Axis::Tokens && keys.codes == Codes::Asymmetric;
    match format.flush() {
        Flush::Immediate => Ok(format.with_flush(Flush::Rolling(0))),
        Flush::Rolling(_) => Ok(format),
        Flush::Staggered(_) if kivi => Ok(format),
        _ => Err(needs("a rolling flush, or KIVI's").into()),
    }
}

impl CudaPool {
    /// Creates an empty pool with at most `capacity` bytes of records and rings in use.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there are no kernels for the format, the heads or the device, with
    /// the requirements of the kernels.
    pub fn new(
        shape: AttentionShape,
        format: Format,
        device: &CudaDevice,
        capacity: Option<usize>,
    ) -> Result<Self> {
        if shape.value_dim != shape.head_dim {
            return Err(needs("keys and values of the same width").into());
        }
        let layout = Layout::new(format, shape.head_dim)?;
        let device_format = on_device(format)?;
        let kernels = Kernels::load(device.cuda_stream().context(), layout)?;
        let status = Arc::new(Status::new(device.cuda_stream().context())?);
        let records = Records::new(device.cuda_stream(), layout.record());
        Ok(Self {
            shape,
            format,
            device_format,
            layout,
            device: device.clone(),
            kernels,
            status,
            dtype: None,
            capacity,
            records,
            seqs: BTreeMap::new(),
            last_heads: LastHeads::default(),
            prepared: None,
        })
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn with_capacity(self, bytes: usize) -> Self {
        Self { capacity: Some(bytes), ..self }
    }

    pub fn capacity(&self) -> Option<usize> {
        self.capacity
    }

    pub(super) fn stream(&self) -> Arc<CudaStream> {
        self.device.cuda_stream()
    }

    pub(super) fn ring_places(&self) -> usize {
        ring_places(self.device_format, self.layout)
    }

    /// Returns the number of elements of a kv head's ring.
    pub(super) fn ring_numbers(&self) -> usize {
        self.ring_places() * self.shape.head_dim
    }

    fn ring_bytes(&self) -> usize {
        4 * self.shape.kv_heads * self.ring_numbers()
    }

    pub(super) fn sequence(&self, seq: SeqId) -> Result<&Sequence> {
        self.seqs.get(&seq).ok_or(Error::UnknownSequence(seq))
    }

    pub(super) fn status(&self) -> &Status {
        &self.status
    }

    /// Checks that a sequence is not poisoned: all its numbers could be packed, and no call has
    /// failed midway.
    pub(super) fn check(&self, seq: SeqId) -> Result<()> {
        let Some(sequence) = self.seqs.get(&seq) else { return Ok(()) };
        match &sequence.poisoned {
            Some(reason) => Err(Error::Poisoned { seq, reason: reason.clone() }),
            None => self.status.check(sequence.number, seq),
        }
    }

    pub fn is_on(&self, device: &Device) -> bool {
        device.same_device(&Device::Cuda(self.device.clone()))
    }

    /// Returns a tensor in `dtype`; an error if it is not on the pool's device.
    pub(super) fn fit(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if self.is_on(x.device()) {
            return Ok(x.to_dtype(dtype)?.contiguous()?);
        }
        let got = format!("one on {:?}", x.device().location());
        Err(Error::mismatch("tensor", "one on the store's device", got))
    }

    /// Returns a tensor `[tokens, heads, channels]` in `dtype` with contiguous rows: a view into a
    /// projection stays a view. An error if it is not on the pool's device.
    pub(super) fn fit_rows(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let starts = [x.layout().start_offset(), x.stride()[0], x.stride()[1]];
        let in_pieces = starts.iter().all(|start| start.is_multiple_of(8));
        match in_pieces && x.stride()[2] == 1 && x.dtype() == dtype && self.is_on(x.device()) {
            true => Ok(x.clone()),
            false => self.fit(x, dtype),
        }
    }

    /// Returns the number of tokens of the batch for each kv head of its sequences.
    pub(super) fn counts(&self, batch: &Batch) -> Vec<usize> {
        batch.iter().flat_map(|(_, own)| vec![own.len(); self.shape.kv_heads]).collect()
    }

    /// Returns the numbers of records and sequences that `counts` tokens per head add.
    fn need(&self, batch: &Batch, counts: &[usize]) -> (usize, usize) {
        let (format, group) = (self.device_format, self.layout.group());
        let mut need = (0, 0);
        for (seq, counts) in batch.seqs().iter().zip(counts.chunks(self.shape.kv_heads)) {
            match self.seqs.get(seq) {
                Some(sequence) => {
                    // Without evictions, all heads need the same.
                    let mut last: Option<(&Head, usize, usize)> = None;
                    for (head, &count) in sequence.heads.iter().zip(counts) {
                        let records = match last {
                            Some((other, same, records))
                                if same == count && head.is_like(other) =>
                            {
                                records
                            }
                            _ => head.need(format, group, count),
                        };
                        last = Some((head, count, records));
                        need.0 += records;
                    }
                }
                None => {
                    let of = |&count: &usize| format.ready(count, count).0 / group;
                    need.0 += counts.iter().map(of).sum::<usize>();
                    need.1 += 1;
                }
            }
        }
        need
    }

    fn free_bytes(&self) -> usize {
        let used = lock(&self.records).used() * self.layout.record();
        let used = used + self.seqs.len() * self.ring_bytes();
        self.capacity.map_or(usize::MAX, |capacity| capacity.saturating_sub(used))
    }

    /// Checks that `needed` bytes are free, and returns the number of free bytes.
    pub(super) fn check_room(&self, needed: usize) -> Result<usize> {
        let free = self.free_bytes();
        if needed > free {
            return Err(Error::PoolFull { what: "pool of packed records".into(), needed, free });
        }
        Ok(free)
    }

    /// Checks that there is room for the batch's tokens. Returns the number of records that they
    /// take, and of free bytes.
    fn room_for(&self, batch: &Batch, counts: &[usize]) -> Result<(usize, usize)> {
        let (records, seqs) = self.need(batch, counts);
        let free = self.check_room(records * self.layout.record() + seqs * self.ring_bytes())?;
        Ok((records, free))
    }

    pub fn check_append(&self, batch: &Batch) -> Result<()> {
        self.room_for(batch, &self.counts(batch)).map(|_| ())
    }

    pub fn can_append(&self, batch: &Batch) -> bool {
        self.room_for(batch, &self.counts(batch)).is_ok()
    }

    /// Makes room for `counts` tokens per head, and creates unknown sequences. Returns these.
    pub(super) fn make_room(&mut self, batch: &Batch, counts: &[usize]) -> Result<Vec<SeqId>> {
        let (count, free) = self.room_for(batch, counts)?;
        lock(&self.records).reserve(count, free / self.layout.record())?;
        let mut new = Vec::new();
        for (&seq, counts) in batch.seqs().iter().zip(counts.chunks(self.shape.kv_heads)) {
            let done = self.make_room_for(seq, counts, &mut new);
            if let Err(error) = done {
                self.forget(&new);
                return Err(error);
            }
        }
        Ok(new)
    }

    fn make_room_for(&mut self, seq: SeqId, counts: &[usize], new: &mut Vec<SeqId>) -> Result<()> {
        let (stream, format, group) = (self.stream(), self.device_format, self.layout.group());
        if !self.seqs.contains_key(&seq) {
            let (heads, number) = (self.shape.kv_heads, self.status.begin());
            let sizes = (heads, self.ring_numbers());
            let sequence = Sequence::new(&stream, &self.records, sizes, number)?;
            self.seqs.insert(seq, sequence);
            new.push(seq);
        }
        let Some(sequence) = self.seqs.get_mut(&seq) else { return Ok(()) };
        let records = |(head, count): (&Head, &usize)| {
            head.packed_at(format, head.slots + count).keys / group
        };
        let records = sequence.heads.iter().zip(counts).map(records).max().unwrap_or(0);
        sequence.reserve(&stream, records)
    }

    /// Removes the sequences that a failed call created.
    pub(super) fn forget(&mut self, new: &[SeqId]) {
        new.iter().for_each(|seq| _ = self.seqs.remove(seq));
    }

    /// Removes the sequences that a failed call created and poisons its other sequences, which may
    /// have appended some tokens.
    pub(super) fn poison(&mut self, batch: &Batch, new: &[SeqId], error: &Error) {
        self.forget(new);
        for seq in batch.seqs() {
            if let Some(sequence) = self.seqs.get_mut(seq) {
                sequence.poisoned = Some(error.to_string());
            }
        }
    }

    pub fn contains(&self, seq: SeqId) -> bool {
        self.seqs.contains_key(&seq)
    }

    pub fn lens(&self, seq: SeqId) -> Vec<usize> {
        let lens = |sequence: &Sequence| sequence.heads.iter().map(Head::len).collect();
        self.seqs.get(&seq).map_or(Vec::new(), lens)
    }

    pub fn seqs(&self) -> Vec<SeqId> {
        self.seqs.keys().copied().collect()
    }

    pub fn clear(&mut self) {
        self.seqs.clear();
        lock(&self.records).shrink();
        (self.dtype, self.last_heads) = (None, LastHeads::default());
    }

    /// Returns the bytes of the codes and of the scales in a head's records.
    fn record_bytes(&self, head: &Head) -> (usize, usize) {
        let (layout, keys, tiles) = (self.layout, head.packed.keys / TILE, head.packed.tiles);
        let headers = head.packed.keys / layout.group() * layout.header();
        let scales = keys * layout.key_params() + tiles * layout.value_params();
        (keys * layout.key_codes() + tiles * layout.value_codes(), headers + scales)
    }

    /// Records shared by several sequences count once here, and in full for each sequence in
    /// `seq_footprint`.
    pub fn footprint(&self) -> Footprint {
        let mut whole = self.seqs.keys().map(|&seq| self.seq_footprint(seq)).sum::<Footprint>();
        let held: usize = self.seqs.values().flat_map(|of| &of.heads).map(Self::records_of).sum();
        let (size, records) = (self.layout.record(), lock(&self.records));
        let shared = held - records.used().min(held);
        // Shared records are full, except for a few that are being filled.
        let codes = self.layout.key_codes() + self.layout.value_codes();
        let codes = (shared * self.layout.group() / TILE * codes).min(whole.payload);
        let scales = (shared * size).saturating_sub(codes).min(whole.scales);
        (whole.payload, whole.scales) = (whole.payload - codes, whole.scales - scales);
        whole.slack += records.bytes() - records.used() * size;
        whole
    }

    fn records_of(head: &Head) -> usize {
        head.table.numbers().len()
    }

    pub fn seq_footprint(&self, seq: SeqId) -> Footprint {
        let Some(sequence) = self.seqs.get(&seq) else { return Footprint::default() };
        let mut bytes = Footprint { bookkeeping: sequence.table_bytes(), ..Footprint::default() };
        for head in &sequence.heads {
            let (codes, scales) = self.record_bytes(head);
            bytes.payload += codes;
            bytes.scales += scales;
            bytes.residual += head.residual() * self.shape.head_dim * 4;
            bytes.slack += Self::records_of(head) * self.layout.record() - codes - scales;
        }
        bytes.slack += sequence.ring_bytes() - bytes.residual;
        bytes
    }

    /// Waits for the device.
    pub(super) fn synchronize(&self) -> Result<()> {
        Ok(self.stream().synchronize()?)
    }
}
