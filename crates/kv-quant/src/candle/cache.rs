use super::QuantStore;
use crate::Format;
use candle_core::Tensor;
use longctx_core::{
    AttentionShape, Error, Footprint, KvCache, KvStore, Partial, Result, Step, Visible, attention,
};

/// A cache that packs what it is given: KIVI's with [`Format::kivi`], FlexGen's with [`Format::flexgen`].
///
/// Tokens of one call attend to each other in full precision, so that a whole prompt is exact, and to earlier calls' packed tokens as
/// these lie. Keys are packed rotated.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kv_quant::{Bits, Format, QuantCache};
/// use longctx_core::{AttentionShape, KvCache, Rope, RopeScaling, Step};
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let mut cache = QuantCache::new(shape, Format::kivi(Bits::Four, Bits::Four, 32, 128)?)?;
/// for tokens in [1000, 1] {
///     let q = Tensor::randn(0f32, 1., (1, 8, tokens, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (1, 2, tokens, 64), &Device::Cpu)?;
///     cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
/// }
/// assert_eq!(cache.held(), 1001);
/// assert!(cache.footprint().payload < 1001 * 2 * 64);
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantCache {
    store: QuantStore,
    seen: usize,
}

impl QuantCache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a layer with a sliding window: the rest as [`QuantStore::new`].
    pub fn new(shape: AttentionShape, format: Format) -> Result<Self> {
        if shape.window.is_some() {
            return Err(Error::Unsupported(
                "a packed cache in a layer with a sliding window".into(),
            ));
        }
        Ok(Self { store: QuantStore::new(shape, format)?, seen: 0 })
    }

    /// The packed keys and values.
    pub fn store(&self) -> &QuantStore {
        &self.store
    }
}

impl KvCache for QuantCache {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (_, tokens) = step.shape.check_q(step.q)?;
        let q = step.rope.apply(step.q, self.seen)?;
        let k = step.rope.apply(step.k, self.seen)?;
        let mut parts = vec![attention::attend(&q, &k, step.v, step.shape, Visible::Causal)?];
        if !self.store.is_empty() {
            parts.push(self.store.attend(&q, Visible::All)?);
        }
        let out = Partial::merge(&parts)?;
        self.store.append(&k, step.v)?;
        self.seen += tokens;
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
