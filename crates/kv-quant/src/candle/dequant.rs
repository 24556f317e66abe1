use super::QuantStore;
use crate::Format;
use candle_core::{DType, Result, Tensor};
use longctx_core::{AttentionShape, KvStore};

/// A packed cache with the methods of candle-nn's `KvCache`, for engines that attend over plain tensors: swap the type, and the cache
/// takes a fraction of the memory. Each call dequantizes all of it; attention on the packed codes, as
/// [`QuantCache`](super::QuantCache) does it, is many times faster.
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
/// let (k, v) = cache.append(&token, &token)?;
/// assert_eq!(v.dims(), [1, 2, 501, 64]);
/// assert!(cache.store().heads()[0].bytes().codes < 500 * 64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DequantCache {
    store: QuantStore,
}

impl DequantCache {
    /// An empty cache for so many kv heads of `head_dim` channels.
    ///
    /// # Errors
    /// As [`QuantStore::new`].
    pub fn new(kv_heads: usize, head_dim: usize, format: Format) -> Result<Self> {
        let shape = AttentionShape::new(kv_heads, kv_heads, head_dim).map_err(to_candle)?;
        Ok(Self { store: QuantStore::new(shape, format).map_err(to_candle)? })
    }

    /// Appends keys and values `[batch, kv_heads, tokens, head_dim]`; gives all keys and values, in the dtype of those given: earlier
    /// calls' as they come back from their codes, this call's untouched.
    ///
    /// # Errors
    /// If the tensors do not fit the cache, or hold NaN, infinity or numbers beyond f16's range.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let before = match self.current_seq_len() {
            0 => None,
            _ => Some(self.read(k.dtype())?),
        };
        self.store.append(k, v).map_err(to_candle)?;
        match before {
            Some((keys, values)) => {
                Ok((Tensor::cat(&[&keys, k], 2)?, Tensor::cat(&[&values, v], 2)?))
            }
            None => Ok((k.clone(), v.clone())),
        }
    }

    /// Tokens held.
    pub fn current_seq_len(&self) -> usize {
        self.store.len()
    }

    /// All keys, dequantized to f32; `None` if there are none.
    ///
    /// # Errors
    /// If the tensors can't be made.
    pub fn k(&self) -> Result<Option<Tensor>> {
        Ok(if self.store.is_empty() { None } else { Some(self.read(DType::F32)?.0) })
    }

    /// All values, dequantized to f32; `None` if there are none.
    ///
    /// # Errors
    /// If the tensors can't be made.
    pub fn v(&self) -> Result<Option<Tensor>> {
        Ok(if self.store.is_empty() { None } else { Some(self.read(DType::F32)?.1) })
    }

    /// Forgets everything and gives the memory back.
    pub fn reset(&mut self) {
        self.store.reset();
    }

    /// The packed keys and values.
    pub fn store(&self) -> &QuantStore {
        &self.store
    }

    fn read(&self, dtype: DType) -> Result<(Tensor, Tensor)> {
        let kv_heads = self.store.shape().kv_heads;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for batch in 0..self.store.heads().len() / kv_heads {
            let (mut k_heads, mut v_heads) = (Vec::new(), Vec::new());
            for head in 0..kv_heads {
                let (k, v) = self.store.read(batch, head).map_err(to_candle)?;
                k_heads.push(k);
                v_heads.push(v);
            }
            keys.push(Tensor::stack(&k_heads, 0)?);
            values.push(Tensor::stack(&v_heads, 0)?);
        }
        Ok((Tensor::stack(&keys, 0)?.to_dtype(dtype)?, Tensor::stack(&values, 0)?.to_dtype(dtype)?))
    }
}

fn to_candle(error: longctx_core::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}
