use super::DenseStore;
use crate::{AttentionShape, Footprint, KvCache, KvStore, Result, Selection, Step, Visible};
use candle_core::{DType, Tensor};

/// Entries by which a sliding-window cache may outgrow its window before it is cut.
const OVERHANG: usize = 256;

/// The exact cache: everything kept, or, with a sliding window, everything that a later token can see.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{AttentionShape, DenseCache, KvCache, Rope, RopeScaling, Step};
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let mut cache = DenseCache::new(shape, DType::F16)?;
/// for tokens in [100, 1, 1] {
///     let q = Tensor::randn(0f32, 1., (1, 8, tokens, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (1, 2, tokens, 64), &Device::Cpu)?;
///     let out = cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
///     assert_eq!(out.dims(), [1, 8, tokens, 64]);
/// }
/// assert_eq!(cache.seen(), 102);
/// assert_eq!(cache.footprint().payload, 102 * 2 * 64 * 2 * 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DenseCache {
    store: DenseStore,
    seen: usize,
}

impl DenseCache {
    /// An empty cache that will hold `dtype`: f32, f16 or bf16.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for another dtype.
    pub fn new(shape: AttentionShape, dtype: DType) -> Result<Self> {
        Ok(Self { store: DenseStore::new(shape, dtype)?, seen: 0 })
    }

    fn drop_out_of_window(&mut self) -> Result<()> {
        let Some(window) = self.store.shape().window else { return Ok(()) };
        let lens = self.store.lens();
        let len = self.store.len();
        if len > window + OVERHANG {
            let newest = (len - window) as u32..len as u32;
            self.store.retain(&Selection::uniform(lens.len(), newest.collect()))?;
        }
        Ok(())
    }
}

impl KvCache for DenseCache {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (_, tokens) = step.shape.check_q(step.q)?;
        let q = step.rope.apply(step.q, self.seen)?;
        let k = step.rope.apply(step.k, self.seen)?;
        self.store.append(&k, step.v)?;
        let out = self.store.attend(&q, Visible::Causal)?;
        self.seen += tokens;
        self.drop_out_of_window()?;
        out.into_output(step.q.dtype())
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        self.store.len()
    }

    fn footprint(&self) -> Footprint {
        self.store.footprint()
    }

    fn reset(&mut self) {
        self.store.reset();
        self.seen = 0;
    }
}
