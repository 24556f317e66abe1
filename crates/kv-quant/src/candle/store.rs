mod host;

use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use super::cuda::{CudaBeforeRope, CudaHalf, CudaPool};
use crate::{Format, Pool, PoolBytes, PoolShape, Rotary};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use host::{lists, prepare};
use longctx_core::attention::with_slice;
use longctx_core::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, Footprint, KvStore, Mark, Result,
    Selection, SeqId, StepLists, check_range, check_selections,
};

/// Packed keys and values of one layer for many sequences: a [`Pool`] with longctx-core's
/// [`KvStore`] trait. Attention reads the packed codes.
///
/// The first tensors determine the device. Tensors from another device are refused as long as the
/// store holds a sequence. With the feature `cuda`, a store on a CUDA device supports the formats
/// with kernels (listed in `docs/cuda.md`) and refuses others.
#[derive(Debug, Clone)]
pub struct QuantStore {
    shape: AttentionShape,
    storage: Storage,
}

#[derive(Debug, Clone)]
enum Storage {
    Host(Box<Pool>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaPool>),
    #[cfg(feature = "cuda")]
    CudaBeforeRope(Box<CudaBeforeRope>),
    /// Entries in f16 that are never packed.
    #[cfg(feature = "cuda")]
    CudaHalf(Box<CudaHalf>),
}

/// Evaluates an expression on the pool of any variant.
macro_rules! on_pool {
    ($storage:expr, $pool:ident => $run:expr) => {
        on_pool!($storage, $pool => $run, $pool => $run)
    };
    ($storage:expr, $host:ident => $on_host:expr, $cuda:ident => $on_cuda:expr) => {
        match $storage {
            Storage::Host($host) => $on_host,
            #[cfg(feature = "cuda")]
            Storage::Cuda($cuda) => $on_cuda,
            #[cfg(feature = "cuda")]
            Storage::CudaBeforeRope($cuda) => $on_cuda,
            #[cfg(feature = "cuda")]
            Storage::CudaHalf($cuda) => $on_cuda,
        }
    };
}

/// Evaluates an expression on the elements of a contiguous tensor of any float dtype.
macro_rules! with_numbers {
    ($tensor:expr, $numbers:ident => $run:expr) => {
        match $tensor.dtype() {
            DType::F16 => with_slice::<f16, _>($tensor, |$numbers| $run),
            DType::BF16 => with_slice::<bf16, _>($tensor, |$numbers| $run),
            _ => with_slice::<f32, _>($tensor, |$numbers| $run),
        }
    };
}

impl QuantStore {
    /// Creates an empty store.
    ///
    /// # Errors
    /// [`Error::Setting`] if the format does not fit the heads, or has keys
    /// [before RoPE](crate::KeyBasis::BeforeRope).
    pub fn new(shape: AttentionShape, format: Format) -> Result<Self> {
        shape.check()?;
        let pool = Pool::new(pool_shape(&shape), format)?;
        Ok(Self { shape, storage: Storage::Host(Box::new(pool)) })
    }

    /// Creates an empty store whose keys are given before the rotary embedding and whose queries
    /// are given after it.
    ///
    /// # Errors
    /// [`Error::Setting`] if the shape is invalid, or if the format or the embedding does not fit
    /// the heads.
    pub fn before_rope(shape: AttentionShape, format: Format, rotary: Arc<Rotary>) -> Result<Self> {
        shape.check()?;
        let pool = Pool::before_rope(pool_shape(&shape), format, rotary)?;
        Ok(Self { shape, storage: Storage::Host(Box::new(pool)) })
    }

    /// Limits the memory in use to `bytes` bytes: that of blocks and pages or, on a CUDA device, of
    /// records and rings.
    #[must_use]
    pub fn with_capacity(self, bytes: usize) -> Self {
        let storage = match self.storage {
            Storage::Host(pool) => Storage::Host(Box::new(pool.with_capacity(bytes))),
            #[cfg(feature = "cuda")]
            Storage::Cuda(pool) => Storage::Cuda(Box::new(pool.with_capacity(bytes))),
            #[cfg(feature = "cuda")]
            Storage::CudaBeforeRope(pool) => {
                Storage::CudaBeforeRope(Box::new(pool.with_capacity(bytes)))
            }
            #[cfg(feature = "cuda")]
            Storage::CudaHalf(half) => Storage::CudaHalf(Box::new(half.with_capacity(bytes))),
        };
        Self { storage, ..self }
    }

    /// Returns the largest number of bytes in use; `None` for a store that grows.
    pub fn capacity(&self) -> Option<usize> {
        on_pool!(&self.storage, pool => pool.capacity())
    }

    /// Returns the format of keys and values.
    pub fn format(&self) -> Format {
        on_pool!(&self.storage, pool => pool.format())
    }

    /// Returns the rotary embedding of keys given before RoPE.
    fn rotary(&self) -> Option<Arc<Rotary>> {
        match &self.storage {
            Storage::Host(pool) => pool.rotary().cloned(),
            #[cfg(feature = "cuda")]
            Storage::CudaBeforeRope(pool) => Some(pool.rotary().clone()),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) | Storage::CudaHalf(_) => None,
        }
    }

    /// Returns the pool of packed keys and values on the CPU; `None` if they are on another device.
    pub fn pool(&self) -> Option<&Pool> {
        on_pool!(&self.storage, pool => Some(pool), _pool => None)
    }

    /// Returns the pool for loading sequences into it.
    #[cfg(feature = "save")]
    pub(super) fn pool_mut(&mut self) -> Option<&mut Pool> {
        on_pool!(&mut self.storage, pool => Some(pool), _pool => None)
    }

    /// Checks that there is room for a batch's tokens on `device`.
    pub(super) fn check_append(&mut self, batch: &Batch, device: &Device) -> Result<()> {
        self.move_to_device(device)?;
        on_pool!(&self.storage,
            pool => Ok(pool.check_append(batch.seqs(), batch.cu_seqlens())?),
            pool => pool.check_append(batch))
    }

    /// Moves an empty store to a device.
    fn move_to_device(&mut self, device: &Device) -> Result<()> {
        if on_pool!(&self.storage, _pool => device.is_cpu(), pool => pool.is_on(device)) {
            return Ok(());
        }
        if !self.seqs().is_empty() {
            let got = format!("{:?}", device.location());
            return Err(Error::mismatch("device of k and v", "that of the entries held", got));
        }
        let (format, capacity, rotary) = (self.format(), self.capacity(), self.rotary());
        self.storage = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => match rotary {
                _ if format == Format::f16() => {
                    Storage::CudaHalf(Box::new(CudaHalf::new(self.shape, device, capacity)?))
                }
                Some(rotary) => {
                    let pool = CudaBeforeRope::new(self.shape, format, &rotary, device, capacity);
                    Storage::CudaBeforeRope(Box::new(pool?))
                }
                None => {
                    Storage::Cuda(Box::new(CudaPool::new(self.shape, format, device, capacity)?))
                }
            },
            Device::Cpu => {
                let shape = pool_shape(&self.shape);
                let pool = match rotary {
                    Some(rotary) => Pool::before_rope(shape, format, rotary)?,
                    None => Pool::new(shape, format)?,
                };
                Storage::Host(Box::new(match capacity {
                    Some(bytes) => pool.with_capacity(bytes),
                    None => pool,
                }))
            }
            _ => {
                let what = format!("a packed store on {:?} in this build", device.location());
                return Err(Error::Unsupported(what));
            }
        };
        Ok(())
    }

    /// Appends a batch's tokens and computes their causal attention, in full precision among them
    /// and over the held entries; they are packed afterwards. The output has dtype `dtype`: f32, f16
    /// or bf16. Returns `None` and changes nothing if the store cannot compute the attention among
    /// the tokens: on the CPU, or for many tokens.
    pub(super) fn append_after_attention(
        &mut self,
        batch: &Batch,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        dtype: DType,
    ) -> Result<Option<AttentionState>> {
        self.move_to_device(k.device())?;
        match &mut self.storage {
            Storage::Host(_) => {
                _ = (batch, q, v, dtype);
                Ok(None)
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda(pool) => pool.append_after_attention(batch, (q, k, v), dtype),
            #[cfg(feature = "cuda")]
            Storage::CudaBeforeRope(_) | Storage::CudaHalf(_) => Ok(None),
        }
    }

    /// Returns whether [`prepare_append_after_attention`](Self::prepare_append_after_attention) is
    /// possible: for packed formats on a CUDA device, unless a sequence of the batch is poisoned.
    pub(super) fn prepares_append_after_attention(&self, batch: &Batch) -> bool {
        match &self.storage {
            #[cfg(feature = "cuda")]
            Storage::Cuda(pool) => pool.check_all(batch).is_ok(),
            _ => {
                _ = batch;
                false
            }
        }
    }

    /// Takes memory for a token of each sequence, and adds the lists that the kernels of
    /// [`append_after_attention`](Self::append_after_attention) read.
    pub(super) fn prepare_append_after_attention(
        &mut self,
        batch: &Batch,
        lists: &mut StepLists,
    ) -> Result<()> {
        match &mut self.storage {
            #[cfg(feature = "cuda")]
            Storage::Cuda(pool) => pool.prepare_decode(batch, lists),
            _ => {
                _ = (batch, lists);
                Err(Error::Unsupported("a prepared decode step of this store".into()))
            }
        }
    }

    /// Returns whether [`prepare_attend`](Self::prepare_attend) is possible: for f16 on a CUDA
    /// device.
    pub(super) fn prepares_attend(&self) -> bool {
        match &self.storage {
            #[cfg(feature = "cuda")]
            Storage::CudaHalf(half) => half.prepares_decode(),
            _ => false,
        }
    }

    /// Adds the lists of attention of one query per sequence over all its entries.
    pub(super) fn prepare_attend(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        match &mut self.storage {
            #[cfg(feature = "cuda")]
            Storage::CudaHalf(half) => half.prepare_attend(batch, lists),
            _ => {
                _ = (batch, lists);
                Err(Error::Unsupported("prepared attention of this store".into()))
            }
        }
    }
}

fn pool_shape(shape: &AttentionShape) -> PoolShape {
    let AttentionShape { kv_heads, head_dim, value_dim, .. } = *shape;
    PoolShape { kv_heads, head_dim, value_dim }
}

impl KvStore for QuantStore {
    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.move_to_device(k.device())?;
        let (seqs, ends) = (batch.seqs(), batch.cu_seqlens());
        on_pool!(&mut self.storage,
            pool => {
                let (k, v) = prepare(&self.shape, batch, k, v)?;
                with_numbers!(&k, k => with_slice(&v, |v| Ok(pool.append(seqs, ends, k, v)?)))
            },
            pool => pool.append(batch, k, v))
    }

    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        check_selections(batch, tokens, self.shape.kv_heads)?;
        self.move_to_device(k.device())?;
        let (seqs, ends) = (batch.seqs(), batch.cu_seqlens());
        on_pool!(&mut self.storage,
            pool => {
                let (k, v) = prepare(&self.shape, batch, k, v)?;
                let lists = lists(batch, tokens, self.shape.kv_heads)?;
                with_numbers!(&k, k => with_slice(&v, |v| {
                    Ok(pool.append_selected(seqs, ends, k, v, &lists)?)
                }))
            },
            pool => pool.append_selected(batch, k, v, tokens))
    }

    fn attend(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: longctx_core::Mask<'_>,
    ) -> Result<AttentionState> {
        on_pool!(&self.storage,
            pool => self.attend_on_host(pool, batch, q, mask),
            pool => pool.attend(batch, q, mask))
    }

    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: longctx_core::Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        on_pool!(&self.storage,
            pool => self.sums_on_host(pool, batch, q, lse, mask),
            pool => pool.attention_sums(batch, q, lse, mask))
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        on_pool!(&mut self.storage,
            pool => Ok(pool.retain(seq, keep.heads()?)?),
            pool => pool.retain(seq, keep))
    }

    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        on_pool!(&self.storage,
            pool => self.rows(pool.read(seq, kv_head)?),
            pool => pool.read(seq, kv_head))
    }

    fn read_range(
        &self,
        seq: SeqId,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        if let Some(&len) = self.lens(seq).get(kv_head) {
            check_range(&entries, len)?;
        }
        on_pool!(&self.storage,
        pool => self.rows(pool.read_range(seq, kv_head, entries)?),
        pool => {
            let (k, v) = pool.read(seq, kv_head)?;
            let part = |x: Tensor| x.narrow(0, entries.start, entries.len());
            Ok((part(k)?, part(v)?))
        })
    }

    fn lens(&self, seq: SeqId) -> Vec<usize> {
        on_pool!(&self.storage, pool => pool.lens(seq).unwrap_or_default(), pool => pool.lens(seq))
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        on_pool!(&mut self.storage, pool => Ok(pool.fork(from, to)?), pool => pool.fork(from, to))
    }

    fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()> {
        on_pool!(&self.storage,
            pool => Ok(pool.check_truncate_heads(seq, lens)?),
            pool => pool.check_truncate_heads(seq, lens))
    }

    fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()> {
        on_pool!(&mut self.storage,
            pool => Ok(pool.truncate_heads(seq, lens)?),
            pool => pool.truncate_heads(seq, lens))
    }

    fn mark(&self, seq: SeqId) -> Mark {
        Mark { lens: self.lens(seq), packed: on_pool!(&self.storage, pool => pool.packed(seq)) }
    }

    fn restore(&mut self, seq: SeqId, mark: &Mark) -> Result<()> {
        if mark.lens.is_empty() {
            self.remove(seq);
            return Ok(());
        }
        // `packed_after` needs lengths that have been checked.
        self.check_truncate_heads(seq, &mark.lens)?;
        let packed = on_pool!(&self.storage, pool => pool.packed_after(seq, &mark.lens));
        if packed.as_ref() != Some(&mark.packed) {
            let what = format!("restoring sequence {seq}, of which more is packed since");
            return Err(Error::Unsupported(what));
        }
        self.truncate_heads(seq, &mark.lens)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        on_pool!(&mut self.storage, pool => pool.remove(seq))
    }

    fn seqs(&self) -> Vec<SeqId> {
        on_pool!(&self.storage, pool => pool.seqs().collect(), pool => pool.seqs())
    }

    fn can_append(&self, batch: &Batch) -> bool {
        on_pool!(&self.storage,
            pool => pool.can_append(batch.seqs(), batch.cu_seqlens()),
            pool => pool.can_append(batch))
    }

    fn footprint(&self) -> Footprint {
        on_pool!(&self.storage, pool => as_footprint(pool.footprint()), pool => pool.footprint())
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        on_pool!(&self.storage,
            pool => as_footprint(pool.seq_footprint(seq)),
            pool => pool.seq_footprint(seq))
    }

    fn clear(&mut self) {
        on_pool!(&mut self.storage, pool => pool.clear());
    }
}

fn as_footprint(bytes: PoolBytes) -> Footprint {
    let PoolBytes { codes, scales, residual, bookkeeping, slack } = bytes;
    Footprint { payload: codes, scales, residual, bookkeeping, slack }
}
