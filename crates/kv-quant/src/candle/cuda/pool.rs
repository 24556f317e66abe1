//! Packed keys and values of one layer for many sequences on a CUDA device.

use super::append_step::AppendStep;
use super::head::{Head, Sequence, ring_places};
use super::lens::HeadLens;
use super::memory::LastHeads;
use super::prepared::Prepared;
use super::records::{Records, Shared, lock};
use super::status::Status;
use crate::cuda::{Kernels, Layout, TILE, needs};
use crate::{Axis, Codes, Flush, Format};
use candle_core::backend::BackendDevice;
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

    /// Checks that no sequence of a batch is poisoned.
    pub fn check_all(&self, batch: &Batch) -> Result<()> {
        batch.seqs().iter().try_for_each(|&seq| self.check(seq))
    }

    pub fn is_on(&self, device: &Device) -> bool {
        matches!(device, Device::Cuda(device) if device.same_device(&self.device))
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

    /// Returns the numbers of records and sequences that a batch adds.
    fn need(&self, batch: &Batch) -> (usize, usize) {
        let (format, group) = (self.device_format, self.layout.group());
        let mut need = (0, 0);
        for (seq, tokens) in batch.iter() {
            let Some(sequence) = self.seqs.get(&seq) else {
                need.0 +=
                    self.shape.kv_heads * (format.ready(tokens.len(), tokens.len()).0 / group);
                need.1 += 1;
                continue;
            };
            let mut last: Option<(HeadLens, usize)> = None;
            for head in &sequence.heads {
                let lens = HeadLens::new(head, sequence.number);
                // Without evictions, all heads need the same.
                let records = match last {
                    Some((other, records)) if other == lens => records,
                    _ => lens.need(format, group, tokens.len()),
                };
                last = Some((lens, records));
                need.0 += records;
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

    pub fn check_append(&self, batch: &Batch) -> Result<()> {
        let (records, seqs) = self.need(batch);
        self.check_room(records * self.layout.record() + seqs * self.ring_bytes()).map(drop)
    }

    pub fn can_append(&self, batch: &Batch) -> bool {
        self.check_append(batch).is_ok()
    }

    /// Creates the unknown sequences of a batch, and returns them. After an error there are none.
    pub(super) fn create(&mut self, batch: &Batch) -> Result<Vec<SeqId>> {
        let unknown: Vec<_> =
            batch.seqs().iter().copied().filter(|seq| !self.contains(*seq)).collect();
        if unknown.is_empty() {
            return Ok(unknown);
        }
        self.check_room(unknown.len() * self.ring_bytes())?;
        let sizes = (self.shape.kv_heads, self.ring_numbers());
        for &seq in &unknown {
            let number = self.status.begin();
            match Sequence::new(&self.stream(), &self.records, sizes, number) {
                Ok(sequence) => drop(self.seqs.insert(seq, sequence)),
                Err(error) => {
                    self.forget(&unknown);
                    return Err(error);
                }
            }
        }
        Ok(unknown)
    }

    /// Makes room for the records of a step and for their addresses.
    pub(super) fn make_room(&mut self, step: &AppendStep) -> Result<()> {
        let count = step.takes.iter().map(|take| take.count).sum::<usize>();
        if count == 0 {
            return Ok(());
        }
        let free = self.check_room(count * self.layout.record())?;
        lock(&self.records).reserve(count, free / self.layout.record())?;
        let stream = self.stream();
        for take in &step.takes {
            if let Some(sequence) = self.seqs.get_mut(&take.seq) {
                sequence.reserve(&stream, take.held + take.count)?;
            }
        }
        Ok(())
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
