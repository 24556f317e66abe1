use std::sync::Arc;

use super::QuantStore;
use crate::{Format, KeyBasis, Rotary};
use candle_core::Tensor;
use longctx_core::{
    AttentionShape, Error, Footprint, KvCache, KvStore, Partial, Result, Rope, Step, Visible,
    attention,
};

/// When a call's own tokens are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Order {
    /// After they have attended to each other in full precision: a whole prompt is exact. KIVI's way.
    #[default]
    AttendFirst,
    /// Before: they see each other as later tokens will see them. FlexGen's way in the benchmark of arXiv 2407.01527.
    QuantizeFirst,
}

/// A cache that packs what it is given: KIVI's with [`Format::kivi`], FlexGen's with [`Format::flexgen`] and [`Order::QuantizeFirst`].
///
/// Keys are packed rotated, unless the format says [`KeyBasis::BeforeRope`]. Layers may differ in bits: each has a cache of its own.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use kv_quant::{Bits, Format, Order, QuantCache};
/// use longctx_core::{AttentionShape, KvCache, Rope, RopeScaling, Step};
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let kivi = QuantCache::new(shape, Format::kivi(Bits::Four, Bits::Two, 32, 128)?)?;
/// let flexgen = QuantCache::new(shape, Format::flexgen(Bits::Four, Bits::Four, 64)?)?
///     .with_order(Order::QuantizeFirst)
///     .with_sinks(4)?;
/// for mut cache in [kivi, flexgen] {
///     for tokens in [1000, 1] {
///         let q = Tensor::randn(0f32, 1., (1, 8, tokens, 64), &Device::Cpu)?;
///         let k = Tensor::randn(0f32, 1., (1, 2, tokens, 64), &Device::Cpu)?;
///         cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
///     }
///     assert_eq!(cache.held(), 1001);
///     assert!(cache.footprint().payload < 1001 * 2 * 64);
/// }
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantCache {
    pub(super) format: Format,
    pub(super) order: Order,
    /// The first tokens, in f16.
    sinks: QuantStore,
    pub(super) sink_tokens: usize,
    store: QuantStore,
    /// In place of both, where a CUDA device has kernels for the format.
    #[cfg(feature = "cuda")]
    pub(super) device: Option<crate::CudaStore>,
    seen: usize,
}

impl QuantCache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a layer with a sliding window; the rest as [`QuantStore::new`].
    pub fn new(shape: AttentionShape, format: Format) -> Result<Self> {
        if shape.window.is_some() {
            return Err(Error::Unsupported(
                "a packed cache in a layer with a sliding window".into(),
            ));
        }
        // Keys before RoPE need the rope, which comes with the first call.
        let store = QuantStore::new(
            shape,
            format.with_basis(match format.basis() {
                KeyBasis::BeforeRope => KeyBasis::Given,
                other => other,
            }),
        )?;
        let sinks = QuantStore::new(shape, Format::f16())?;
        let order = Order::default();
        Ok(Self {
            format,
            order,
            sinks,
            sink_tokens: 0,
            store,
            #[cfg(feature = "cuda")]
            device: None,
            seen: 0,
        })
    }

    /// The same with a call's tokens quantized at another time.
    pub fn with_order(self, order: Order) -> Self {
        Self { order, ..self }
    }

    /// The same with the first `tokens` tokens kept in f16: models attend to them out of all proportion (arXiv 2309.17453), and their keys are
    /// outliers.
    ///
    /// # Errors
    /// [`Error::Setting`] if the cache holds something already.
    pub fn with_sinks(self, tokens: usize) -> Result<Self> {
        if self.seen > 0 {
            return Err(Error::setting("sinks", "an empty cache", format!("{} tokens", self.seen)));
        }
        Ok(Self { sink_tokens: tokens, ..self })
    }

    /// The packed keys and values.
    pub fn store(&self) -> &QuantStore {
        &self.store
    }

    /// The first tokens, in f16.
    pub fn sinks(&self) -> &QuantStore {
        &self.sinks
    }

    /// How keys and values are held.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The same cache with what another, made alike, held.
    ///
    /// # Errors
    /// As [`QuantStore::with_heads`].
    #[cfg(feature = "save")]
    pub(crate) fn with_stores(
        self,
        sinks: Vec<crate::Head>,
        mut heads: Vec<crate::Head>,
    ) -> Result<Self> {
        let Self { sinks: no_sinks, store, .. } = self;
        let sinks = no_sinks.with_heads(sinks)?;
        let store = match heads.first().and_then(|head| head.rotary().cloned()) {
            Some(rotary) => QuantStore::before_rope(*store.shape(), self.format, rotary)?,
            None => store,
        };
        let store = store.with_heads(std::mem::take(&mut heads))?;
        Ok(Self { seen: sinks.len() + store.len(), sinks, store, ..self })
    }

    /// One call's attention over what is held, its own tokens included, which are taken in before or after.
    fn attend_step(&mut self, step: &Step<'_>) -> Result<Partial> {
        let (_, tokens) = step.shape.check_q(step.q)?;
        self.settle_rope(step.rope)?;
        let q = step.rope.apply(step.q, self.seen)?;
        let k = step.rope.apply(step.k, self.seen)?;
        #[cfg(feature = "cuda")]
        if let Some(done) = self.attend_on_device(&q, &k, step.v)? {
            self.seen += tokens;
            return Ok(done);
        }
        let mut parts = Vec::new();
        let held = [&self.sinks, &self.store].map(|store| !store.is_empty());
        if self.order == Order::QuantizeFirst {
            self.append(step, &k)?;
            let to_sinks = self.sinks.len() > self.seen;
            let own = if to_sinks { &self.sinks } else { &self.store };
            parts.push(own.attend(&q, Visible::Causal)?);
            if held[0] && !to_sinks {
                parts.push(self.sinks.attend(&q, Visible::All)?);
            }
        } else {
            parts.push(attention::attend(&q, &k, step.v, step.shape, Visible::Causal)?);
            for (store, _) in [&self.sinks, &self.store].into_iter().zip(held).filter(|(_, h)| *h) {
                parts.push(store.attend(&q, Visible::All)?);
            }
            self.append(step, &k)?;
        }
        self.seen += tokens;
        Partial::merge(&parts)
    }

    fn settle_rope(&mut self, rope: &Rope) -> Result<()> {
        if self.format.basis() == KeyBasis::BeforeRope && self.store.is_empty() {
            let rotary = Arc::new(Rotary::new(rope.frequencies(), self.sink_tokens)?);
            self.store = QuantStore::before_rope(*self.store.shape(), self.format, rotary)?;
        }
        Ok(())
    }

    fn append(&mut self, step: &Step<'_>, rotated: &Tensor) -> Result<()> {
        let tokens = rotated.dim(2)?;
        let first = self.sink_tokens.saturating_sub(self.seen).min(tokens);
        if first > 0 {
            self.sinks.append(&rotated.narrow(2, 0, first)?, &step.v.narrow(2, 0, first)?)?;
        }
        if first < tokens {
            let keys = if self.format.basis() == KeyBasis::BeforeRope { step.k } else { rotated };
            let rest = |x: &Tensor| x.narrow(2, first, tokens - first);
            self.store.append(&rest(keys)?, &rest(step.v)?)?;
        }
        Ok(())
    }
}

impl KvCache for QuantCache {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let (_, tokens) = step.shape.check_q(step.q)?;
        let first = self.sink_tokens.saturating_sub(self.seen);
        if self.order == Order::AttendFirst || first == 0 || first >= tokens {
            return self.attend_step(step)?.into_output(step.q.dtype());
        }
        // Sinks and packed tokens in one call: causal attention within each needs calls of their own.
        let mut outputs = Vec::new();
        for (start, len) in [(0, first), (first, tokens - first)] {
            let part = |x: &Tensor| x.narrow(2, start, len);
            let (q, k, v) = (part(step.q)?, part(step.k)?, part(step.v)?);
            let done = self.attend_step(&Step { q: &q, k: &k, v: &v, ..*step })?;
            outputs.push(done.into_output(step.q.dtype())?);
        }
        Ok(Tensor::cat(&outputs, 2)?)
    }

    /// Its tokens are packed the same in either [`Order`]; what they saw of each other is the caller's matter.
    fn take_prompt(&mut self, step: &Step<'_>, _: &Partial) -> Result<()> {
        let (_, tokens) = step.shape.check_q(step.q)?;
        self.settle_rope(step.rope)?;
        let k = step.rope.apply(step.k, self.seen)?;
        #[cfg(feature = "cuda")]
        if let Some(store) = self.settle_device(&k)? {
            store.append(&k, step.v)?;
            self.seen += tokens;
            return Ok(());
        }
        self.append(step, &k)?;
        self.seen += tokens;
        Ok(())
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        #[cfg(feature = "cuda")]
        if let Some(store) = &self.device {
            return store.len();
        }
        self.sinks.len() + self.store.len()
    }

    fn footprint(&self) -> Footprint {
        #[cfg(feature = "cuda")]
        if let Some(store) = &self.device {
            return store.footprint();
        }
        self.sinks.footprint() + self.store.footprint()
    }

    fn reset(&mut self) {
        self.sinks.reset();
        self.store.reset();
        #[cfg(feature = "cuda")]
        {
            self.device = None;
        }
        self.seen = 0;
    }
}
