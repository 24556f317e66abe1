#[cfg(feature = "cuda")]
use super::cuda::CudaPool;
use super::device::DeviceTensors;
use super::pages::{masked, pages, read, scatter, slice_pages};
use super::pool::Pool;
use crate::attention::{self, Element};
use crate::finite::convert;
use crate::selection::check_selections;
#[cfg(feature = "cuda")]
use crate::store::had_room;
use crate::store::{check_lens, check_range, retain_in_turn};
use crate::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, Footprint, KvStore, Mark, Mask,
    Result, Selection, SeqId,
};
#[cfg(feature = "cuda")]
use crate::{EvictOne, KeptEntries};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// Keys and values in f32, f16 or bf16, without compression.
///
/// - On the CPU, entries are in blocks of 32 entries of one kv head, in a pool shared by all
///   sequences.
/// - On a CUDA device the blocks have 64 entries. This needs feature `cuda`, f16 or bf16, and a
///   head size with kernels.
/// - On other devices, and for other dtypes and shapes, each sequence has one tensor for all heads.
///   The heads then keep the same number of entries, and the memory has no limit.
///
/// The first tensors determine the device. Tensors from another device are refused.
#[derive(Debug)]
pub struct DenseStore {
    shape: AttentionShape,
    dtype: DType,
    capacity: usize,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    F32(Pool<f32>),
    F16(Pool<f16>),
    BF16(Pool<bf16>),
    OnDevice(DeviceTensors),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaPool>),
}

/// Evaluates one expression if the store has a pool on the CPU, of any dtype, or another if it has
/// sequences on a device.
macro_rules! on_pool {
    ($storage:expr, $pool:ident => $host:expr, $seqs:ident => $device:expr) => {
        match $storage {
            Storage::F32($pool) => $host,
            Storage::F16($pool) => $host,
            Storage::BF16($pool) => $host,
            Storage::OnDevice($seqs) => $device,
            #[cfg(feature = "cuda")]
            Storage::Cuda($seqs) => $device,
        }
    };
}

impl DenseStore {
    /// Creates an empty store of `dtype` that grows as needed.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `dtype` is f32, f16 or bf16, and for an invalid shape.
    pub fn new(shape: AttentionShape, dtype: DType) -> Result<Self> {
        Self::with_capacity(shape, dtype, usize::MAX)
    }

    /// Creates a store whose pool has at most `bytes` bytes of blocks. An append that does not fit
    /// returns [`Error::PoolFull`].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_capacity(shape: AttentionShape, dtype: DType, bytes: usize) -> Result<Self> {
        shape.check()?;
        let storage = empty(&shape, dtype, bytes)?;
        Ok(Self { shape, dtype, capacity: bytes, storage })
    }

    /// Returns the dtype of keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Adds the lists that attention of one query per sequence over all its entries reads. Then
    /// [`attend`](KvStore::attend) of the batch [with the prepared lists](Batch::with_prepared) only
    /// launches kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless the store [prepares decode
    /// steps](KvStore::prepares_decode); errors of the driver.
    #[cfg(feature = "cuda")]
    pub fn prepare_attend(&mut self, batch: &Batch, lists: &mut crate::StepLists) -> Result<()> {
        match &mut self.storage {
            Storage::Cuda(pool) if pool.prepares_decode() => pool.prepare_attend(batch, lists),
            _ => Err(Error::Unsupported("prepared attention of this store".into())),
        }
    }

    /// Returns whether there is room for copies of a sequence's shared blocks, and then for a token
    /// of each sequence of a batch. Always true without a pool on a CUDA device.
    pub(super) fn can_copy_and_append(&self, seq: SeqId, batch: &Batch) -> bool {
        match &self.storage {
            #[cfg(feature = "cuda")]
            Storage::Cuda(pool) => pool.can_copy_and_append(seq, batch),
            _ => {
                _ = (seq, batch);
                true
            }
        }
    }

    fn known(&self, seq: SeqId) -> bool {
        on_pool!(&self.storage, pool => !pool.lens(seq).is_empty(), seqs => seqs.contains(seq))
    }

    fn check_head(&self, seq: SeqId, kv_head: usize) -> Result<()> {
        self.check_known(seq)?;
        if kv_head >= self.shape.kv_heads {
            let expected = format!("one of {}", self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, kv_head));
        }
        Ok(())
    }

    fn check_known(&self, seq: SeqId) -> Result<()> {
        if self.known(seq) { Ok(()) } else { Err(Error::UnknownSequence(seq)) }
    }

    /// Checks an append before anything changes. An empty store moves to the tensors' device.
    fn check_append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = self.shape.check_kv(k, v)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
        }
        let on_cpu = matches!(self.storage, Storage::F32(_) | Storage::F16(_) | Storage::BF16(_));
        if on_cpu == k.device().is_cpu() {
            return Ok(());
        }
        if !self.seqs().is_empty() {
            let expected = if on_cpu { "the CPU" } else { "that of the entries held" };
            let got = format!("{:?}", k.device().location());
            return Err(Error::mismatch("device of k and v", expected, got));
        }
        self.storage = match on_cpu {
            true => self.on_device(k.device())?,
            false => empty(&self.shape, self.dtype, self.capacity)?,
        };
        Ok(())
    }

    /// Returns empty sequences for a device other than the CPU.
    fn on_device(&self, device: &Device) -> Result<Storage> {
        #[cfg(feature = "cuda")]
        if let Some(seqs) = CudaPool::new(&self.shape, self.dtype, device, self.capacity)? {
            return Ok(Storage::Cuda(Box::new(seqs)));
        }
        Ok(Storage::OnDevice(DeviceTensors::new(device, &self.shape, self.dtype)))
    }
}

fn empty(shape: &AttentionShape, dtype: DType, capacity: usize) -> Result<Storage> {
    let AttentionShape { kv_heads, head_dim, value_dim, .. } = *shape;
    Ok(match dtype {
        DType::F32 => Storage::F32(Pool::new(kv_heads, head_dim, value_dim, capacity)),
        DType::F16 => Storage::F16(Pool::new(kv_heads, head_dim, value_dim, capacity)),
        DType::BF16 => Storage::BF16(Pool::new(kv_heads, head_dim, value_dim, capacity)),
        other => return Err(Error::setting("dtype", "f32, f16 or bf16", other.as_str())),
    })
}

impl KvStore for DenseStore {
    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.check_append(batch, k, v)?;
        let (k, v) = (convert("k", k, self.dtype)?, convert("v", v, self.dtype)?);
        let all = |tokens: Range<usize>, _: usize, _: usize| tokens;
        on_pool!(&mut self.storage,
            pool => {
                pool.check_room(batch)?;
                append_pool(pool, batch, &k, &v, all)
            },
            seqs => seqs.append(batch, &k, &v))
    }

    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        check_selections(batch, tokens, self.shape.kv_heads)?;
        self.check_append(batch, k, v)?;
        let (k, v) = (convert("k", k, self.dtype)?, convert("v", v, self.dtype)?);
        on_pool!(&mut self.storage,
            pool => {
                let lists = lists(batch, tokens, self.shape.kv_heads)?;
                let selected = |own: Range<usize>, seq: usize, head: usize| {
                    lists[seq][head].iter().map(move |&token| own.start + token as usize)
                };
                pool.check_room_for(batch, &lists)?;
                append_pool(pool, batch, &k, &v, selected)
            },
            seqs => seqs.append_selected(batch, &k, &v, tokens))
    }

    fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        on_pool!(&self.storage,
            pool => {
                let pages = masked(&pages(pool, batch, &self.shape), &self.shape, mask)?;
                attention::attend_pages(batch, q, &pages, &self.shape, mask)
            },
            seqs => seqs.attend(batch, q, mask))
    }

    /// On a CUDA device the kernel of decode steps writes `dtype` directly.
    #[cfg(feature = "cuda")]
    fn attend_output(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        dtype: DType,
    ) -> Result<Tensor> {
        match &self.storage {
            Storage::Cuda(pool) => pool.attend_output(batch, q, mask, dtype),
            _ => Ok(self.attend(batch, q, mask)?.out.to_dtype(dtype)?),
        }
    }

    /// Possible on a CUDA device with kernels, for at most 16 query heads per kv head.
    #[cfg(feature = "cuda")]
    fn prepares_decode(&self) -> bool {
        matches!(&self.storage, Storage::Cuda(pool) if pool.prepares_decode())
    }

    /// After an error nothing has changed.
    #[cfg(feature = "cuda")]
    fn prepare_decode(&mut self, batch: &Batch, lists: &mut crate::StepLists) -> Result<()> {
        match &mut self.storage {
            Storage::Cuda(pool) if pool.prepares_decode() => pool.prepare_decode(batch, lists),
            _ => Err(Error::Unsupported("a prepared decode step of this store".into())),
        }
    }

    /// Possible on a CUDA device, without a sliding window.
    #[cfg(feature = "cuda")]
    fn evicts_one(&self, seqs: &[SeqId]) -> bool {
        matches!(&self.storage, Storage::Cuda(pool) if pool.evicts_one(seqs))
    }

    #[cfg(feature = "cuda")]
    fn attend_and_evict(
        &mut self,
        batch: &Batch,
        q: &Tensor,
        dtype: DType,
        evictions: &[EvictOne],
    ) -> Result<(Tensor, Vec<KeptEntries>)> {
        match &mut self.storage {
            Storage::Cuda(pool) => pool.attend_and_evict(batch, q, dtype, evictions),
            _ => Err(Error::Unsupported("attention and eviction in one call".into())),
        }
    }

    #[cfg(feature = "cuda")]
    fn prepare_evict(
        &mut self,
        batch: &Batch,
        evictions: &[EvictOne],
        lists: &mut crate::StepLists,
    ) -> Result<Vec<KeptEntries>> {
        match &mut self.storage {
            Storage::Cuda(pool) => pool.prepare_evict(batch, evictions, lists),
            _ => Err(Error::Unsupported("a prepared eviction of this store".into())),
        }
    }

    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        on_pool!(&self.storage,
            pool => {
                let all = pages(pool, batch, &self.shape);
                let pages = masked(&all, &self.shape, mask)?;
                let sums =
                    attention::attention_sums_pages(batch, q, lse, &pages, &self.shape, mask)?;
                let sums = match mask {
                    Mask::Entries(ranges) => scatter(sums, ranges, &all, &self.shape),
                    _ => sums,
                };
                attention::by_sequence(&sums, &self.shape, &Device::Cpu)
            },
            seqs => seqs.attention_sums(batch, q, lse, mask))
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        self.check_known(seq)?;
        let lens = self.lens(seq);
        keep.check_unread(&lens)?;
        on_pool!(&mut self.storage,
            pool => pool.retain(seq, keep.check(&lens)?),
            seqs => seqs.retain(seq, keep))
    }

    fn retain_each(&mut self, keep: &[(SeqId, Selection)]) -> Result<Vec<bool>> {
        #[cfg(feature = "cuda")]
        if matches!(self.storage, Storage::Cuda(_)) && are_distinct(keep) {
            for (seq, keep) in keep {
                self.check_known(*seq)?;
                keep.check_unread(&self.lens(*seq))?;
            }
            if let Storage::Cuda(pool) = &mut self.storage
                && had_room(pool.retain_each(keep))?
            {
                return Ok(vec![true; keep.len()]);
            }
        }
        retain_in_turn(self, keep)
    }

    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        self.check_head(seq, kv_head)?;
        on_pool!(&self.storage,
            pool => read(&pool.pages(seq, kv_head), &self.shape),
            seqs => seqs.read(seq, kv_head))
    }

    fn read_range(
        &self,
        seq: SeqId,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        self.check_head(seq, kv_head)?;
        check_range(&entries, self.lens(seq)[kv_head])?;
        on_pool!(&self.storage,
        pool => read(&slice_pages(&pool.pages(seq, kv_head), &entries, &self.shape), &self.shape),
        seqs => {
            let (k, v) = seqs.read(seq, kv_head)?;
            let part = |x: Tensor| x.narrow(0, entries.start, entries.len());
            Ok((part(k)?, part(v)?))
        })
    }

    fn lens(&self, seq: SeqId) -> Vec<usize> {
        on_pool!(&self.storage, pool => pool.lens(seq), seqs => seqs.lens(seq))
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.check_known(from)?;
        if self.known(to) {
            return Err(Error::mismatch("sequence to fork to", "a new one", to));
        }
        on_pool!(&mut self.storage, pool => pool.fork(from, to), seqs => seqs.fork(from, to)?);
        Ok(())
    }

    fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()> {
        check_lens(seq, lens, &self.lens(seq))?;
        let unequal = lens.iter().any(|len| *len != lens[0]);
        if unequal && matches!(self.storage, Storage::OnDevice(_)) {
            let what = "different numbers of entries in the heads of one tensor";
            return Err(Error::Unsupported(what.into()));
        }
        Ok(())
    }

    fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.check_truncate_heads(seq, lens)?;
        on_pool!(&mut self.storage, pool => pool.truncate(seq, lens), seqs => seqs.truncate(seq, lens));
        Ok(())
    }

    fn mark(&self, seq: SeqId) -> Mark {
        Mark { lens: self.lens(seq), packed: Vec::new() }
    }

    fn restore(&mut self, seq: SeqId, mark: &Mark) -> Result<()> {
        if mark.lens.is_empty() {
            self.remove(seq);
            return Ok(());
        }
        self.truncate_heads(seq, &mark.lens)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        on_pool!(&mut self.storage, pool => pool.remove(seq), seqs => seqs.remove(seq))
    }

    fn seqs(&self) -> Vec<SeqId> {
        on_pool!(&self.storage, pool => pool.seqs(), seqs => seqs.seqs())
    }

    fn can_append(&self, batch: &Batch) -> bool {
        on_pool!(&self.storage, pool => pool.check_room(batch).is_ok(), seqs => seqs.can_append(batch))
    }

    fn footprint(&self) -> Footprint {
        on_pool!(&self.storage, pool => pool.footprint(), seqs => seqs.footprint())
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        on_pool!(&self.storage, pool => pool.seq_footprint(seq), seqs => seqs.seq_footprint(seq))
    }

    fn clear(&mut self) {
        on_pool!(&mut self.storage, pool => pool.clear(), seqs => seqs.clear());
    }
}

/// Returns whether no sequence is listed twice. The second selection of a sequence is one of the
/// entries that the first one leaves.
#[cfg(feature = "cuda")]
fn are_distinct(keep: &[(SeqId, Selection)]) -> bool {
    let mut seqs: Vec<_> = keep.iter().map(|(seq, _)| *seq).collect();
    seqs.sort_unstable();
    seqs.windows(2).all(|pair| pair[0] != pair[1])
}

/// Returns the lists of each sequence's selection of tokens of the call.
fn lists<'a>(
    batch: &Batch,
    tokens: &'a [Selection],
    kv_heads: usize,
) -> Result<Vec<&'a [Vec<u32>]>> {
    let of_seq = |((_, own), of): ((SeqId, Range<usize>), &'a Selection)| {
        of.check(&vec![own.len(); kv_heads])
    };
    batch.iter().zip(tokens).map(of_seq).collect()
}

/// Appends to each head the rows that `rows` returns. Its arguments are a sequence's token range,
/// its index in the batch, and the head.
fn append_pool<T: Element, R: IntoIterator<Item = usize>>(
    pool: &mut Pool<T>,
    batch: &Batch,
    k: &Tensor,
    v: &Tensor,
    rows: impl Fn(Range<usize>, usize, usize) -> R,
) -> Result<()> {
    let (kv_heads, d, dv) = (k.dim(1)?, k.dim(2)?, v.dim(2)?);
    attention::with_slice::<T, _>(&k.contiguous()?, |k| {
        attention::with_slice::<T, _>(&v.contiguous()?, |v| {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (i, (seq, tokens)) in batch.iter().enumerate() {
                for head in 0..kv_heads {
                    keys.clear();
                    values.clear();
                    for token in rows(tokens.clone(), i, head) {
                        let row = token * kv_heads + head;
                        keys.extend_from_slice(&k[row * d..(row + 1) * d]);
                        values.extend_from_slice(&v[row * dv..(row + 1) * dv]);
                    }
                    pool.append(seq, head, &keys, &values);
                }
            }
            Ok(())
        })
    })
}
