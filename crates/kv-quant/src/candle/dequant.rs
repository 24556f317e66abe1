use std::sync::{Arc, Mutex, MutexGuard};

use super::QuantStore;
use crate::Format;
use candle_core::{DType, Device, Result, Tensor};
use longctx_core::{AttentionShape, Batch, Error, KvStore, SeqId};

/// A packed cache with the methods of candle-nn's `KvCache`, for engines that attend over plain
/// tensors: a drop-in replacement with a fraction of the memory. Each call dequantizes the whole
/// cache. Attention on the packed codes, with [`QuantCache`](super::QuantCache), is many times
/// faster.
///
/// A clone shares the packed blocks until one of the two changes them (copy on write).
/// [`split`](Self::split) and [`join`](Self::join) divide and merge batches without copying packed
/// blocks.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kv_quant::{Bits, DequantCache, Format};
///
/// // 2 kv heads of 64 channels.
/// let mut cache = DequantCache::new(2, 64, Format::kivi(Bits::Four, Bits::Four, 32, 128)?)?;
/// let prompt = Tensor::randn(0f32, 1., (1, 2, 500, 64), &Device::Cpu)?;
/// let (k, v) = cache.append(&prompt, &prompt)?;
/// assert_eq!(k.dims(), [1, 2, 500, 64]);
/// let token = Tensor::randn(0f32, 1., (1, 2, 1, 64), &Device::Cpu)?;
/// let mut draft = cache.clone();
/// draft.append(&token, &token)?;
/// draft.truncate(500)?;
/// let (k, v) = cache.append(&token, &token)?;
/// assert_eq!(v.dims(), [1, 2, 501, 64]);
/// assert_eq!((cache.current_seq_len(), draft.current_seq_len()), (501, 500));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DequantCache {
    shared: Arc<Mutex<Shared>>,
    /// One sequence per batch entry; empty before the first append.
    seqs: Vec<SeqId>,
}

/// The store shared by a cache and its clones.
#[derive(Debug)]
struct Shared {
    store: QuantStore,
    next: SeqId,
}

impl Shared {
    fn take_id(&mut self) -> SeqId {
        self.next += 1;
        self.next - 1
    }
}

impl DequantCache {
    /// Creates an empty cache for `kv_heads` heads of `head_dim` channels.
    ///
    /// # Errors
    /// As [`QuantStore::new`].
    pub fn new(kv_heads: usize, head_dim: usize, format: Format) -> Result<Self> {
        let store = QuantStore::new(AttentionShape::new(kv_heads, kv_heads, head_dim)?, format)?;
        let shared = Arc::new(Mutex::new(Shared { store, next: 0 }));
        Ok(Self { shared, seqs: Vec::new() })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Every change is complete or undone when a lock is released.
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Appends keys and values `[batch, kv_heads, tokens, head_dim]`. Returns all keys and values
    /// in the dtype of the arguments: earlier tokens dequantized, this call's unchanged.
    ///
    /// # Errors
    /// If the tensors do not fit the cache, or contain NaN, infinity or numbers that
    /// [`Pool::append`](crate::Pool::append) refuses as too large. The cache is then unchanged.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, kv_heads, tokens, d) = k.dims4()?;
        let begins = self.seqs.is_empty();
        if k.dims() != v.dims() || (!begins && batch != self.seqs.len()) {
            let entries = if begins { batch } else { self.seqs.len() };
            let expected = format!("k and v of [{entries}, {kv_heads}, {tokens}, {d}]");
            let got = format!("{:?} and {:?}", k.dims(), v.dims());
            return Err(Error::mismatch("keys and values", expected, got).into());
        }
        let before = if begins { None } else { Some(self.read(k.dtype(), k.device())?) };
        let mut shared = self.shared();
        let seqs = match begins {
            true => (0..batch).map(|_| shared.take_id()).collect(),
            false => self.seqs.clone(),
        };
        let parts: Vec<_> = seqs.iter().map(|&seq| (seq, tokens)).collect();
        let rows = |x: &Tensor| x.transpose(1, 2)?.reshape((batch * tokens, kv_heads, d));
        shared.store.append(&Batch::new(&parts)?, &rows(k)?, &rows(v)?)?;
        drop(shared);
        self.seqs = seqs;
        match before {
            Some((keys, values)) => {
                Ok((Tensor::cat(&[&keys, k], 2)?, Tensor::cat(&[&values, v], 2)?))
            }
            None => Ok((k.clone(), v.clone())),
        }
    }

    /// Returns the number of tokens held.
    pub fn current_seq_len(&self) -> usize {
        self.seqs.first().map_or(0, |&seq| self.shared().store.len(seq))
    }

    /// Removes the tokens after the first `len`, as speculative decoding does with rejected tokens.
    /// [`Pool::truncate`](crate::Pool::truncate) describes which truncations are exact.
    ///
    /// # Errors
    /// If fewer than `len` tokens are held. The cache is then unchanged.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let mut shared = self.shared();
        for &seq in &self.seqs {
            shared.store.check_truncate(seq, len)?;
        }
        for &seq in &self.seqs {
            shared.store.truncate(seq, len)?;
        }
        Ok(())
    }

    /// Splits a batch into one cache per batch entry, in order.
    pub fn split(mut self) -> Vec<Self> {
        let seqs = std::mem::take(&mut self.seqs);
        let one = |seq| Self { shared: self.shared.clone(), seqs: vec![seq] };
        seqs.into_iter().map(one).collect()
    }

    /// Joins the batch entries of several caches into one batch. The caches must be derived from
    /// one cache, by [`split`](Self::split), [`clone`](Self::clone) or [`sibling`](Self::sibling),
    /// and hold the same number of tokens.
    ///
    /// # Errors
    /// If there are no caches, they share no memory, or their lengths differ.
    pub fn join(mut caches: Vec<Self>) -> Result<Self> {
        let Some(first) = caches.first() else {
            return Err(Error::mismatch("caches to join", "at least one", 0).into());
        };
        let (shared, len) = (first.shared.clone(), first.current_seq_len());
        for cache in &caches {
            if !Arc::ptr_eq(&cache.shared, &shared) {
                let (expected, got) = ("clones, siblings or parts of one cache", "others");
                return Err(Error::mismatch("caches to join", expected, got).into());
            }
            if cache.current_seq_len() != len {
                let got = cache.current_seq_len();
                return Err(Error::mismatch("tokens of the caches to join", len, got).into());
            }
        }
        let seqs = caches.iter_mut().flat_map(|cache| std::mem::take(&mut cache.seqs)).collect();
        Ok(Self { shared, seqs })
    }

    /// Returns an empty cache in the same memory, which can be [joined](Self::join) with this one.
    #[must_use]
    pub fn sibling(&self) -> Self {
        Self { shared: self.shared.clone(), seqs: Vec::new() }
    }

    /// Returns all keys, dequantized to f32 on the CPU; `None` if there are none.
    ///
    /// # Errors
    /// If candle cannot create the tensors.
    pub fn k(&self) -> Result<Option<Tensor>> {
        Ok(if self.seqs.is_empty() { None } else { Some(self.read(DType::F32, &Device::Cpu)?.0) })
    }

    /// Returns all values, dequantized to f32 on the CPU; `None` if there are none.
    ///
    /// # Errors
    /// If candle cannot create the tensors.
    pub fn v(&self) -> Result<Option<Tensor>> {
        Ok(if self.seqs.is_empty() { None } else { Some(self.read(DType::F32, &Device::Cpu)?.1) })
    }

    /// Removes all tokens and frees the memory.
    pub fn reset(&mut self) {
        let seqs = std::mem::take(&mut self.seqs);
        let mut shared = self.shared();
        for seq in seqs {
            shared.store.remove(seq);
        }
    }

    /// Returns the bytes of this cache. Memory shared with others counts in full.
    pub fn footprint(&self) -> longctx_core::Footprint {
        let shared = self.shared();
        self.seqs.iter().map(|&seq| shared.store.seq_footprint(seq)).sum()
    }

    fn read(&self, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let shared = self.shared();
        let AttentionShape { kv_heads, head_dim, .. } = *shared.store.shape();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for &seq in &self.seqs {
            for head in 0..kv_heads {
                let (k, v) = shared.store.read(seq, head)?;
                keys.push(k);
                values.push(v);
            }
        }
        let tensor = |heads: Vec<Tensor>| -> Result<Tensor> {
            let shape = (self.seqs.len(), kv_heads, (), head_dim);
            Tensor::cat(&heads, 0)?.reshape(shape)?.to_dtype(dtype)?.to_device(device)
        };
        Ok((tensor(keys)?, tensor(values)?))
    }
}

impl Clone for DequantCache {
    fn clone(&self) -> Self {
        let mut shared = self.shared();
        let fork = |&seq: &SeqId| {
            let copy = shared.take_id();
            // The fork of a known sequence to a new one cannot fail.
            shared.store.fork(seq, copy).map(|()| copy).ok()
        };
        let seqs = self.seqs.iter().filter_map(fork).collect();
        drop(shared);
        Self { shared: self.shared.clone(), seqs }
    }
}

impl Drop for DequantCache {
    fn drop(&mut self) {
        self.reset();
    }
}
