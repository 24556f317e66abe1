use super::DenseStore;
use crate::{
    AttentionShape, Footprint, KvCache, KvStore, Partial, Result, Selection, Step, Visible,
};
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

    fn take_prompt(&mut self, step: &Step<'_>, _: &Partial) -> Result<()> {
        let (_, tokens) = step.shape.check_q(step.q)?;
        let k = step.rope.apply(step.k, self.seen)?;
        self.store.append(&k, step.v)?;
        self.seen += tokens;
        self.drop_out_of_window()
    }

    fn rewind(&mut self, seen: usize) -> Result<bool> {
        crate::lm::check_rewind(self.seen, seen)?;
        if self.store.len() != self.seen {
            return Ok(seen == self.seen);
        }
        let first = (0..seen as u32).collect();
        self.store.retain(&Selection::uniform(self.store.lens().len(), first))?;
        self.seen = seen;
        Ok(true)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rope, RopeScaling};
    use candle_core::Device;

    #[test]
    fn a_rewound_cache_goes_on_as_if_the_rest_had_never_come() {
        let mut shape = AttentionShape::new(4, 2, 64).unwrap();
        let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap();
        let all = |heads| Tensor::randn(0f32, 1., (1, heads, 340, 64), &Device::Cpu).unwrap();
        let (q, kv) = (all(4), all(2));
        let feed = |cache: &mut DenseCache, from: usize, len: usize| {
            let (q, kv) = (q.narrow(2, from, len).unwrap(), kv.narrow(2, from, len).unwrap());
            let (shape, rope) = (&cache.store.shape().clone(), &rope);
            cache.attend(&Step { q: &q, k: &kv, v: &kv, shape, rope }).unwrap()
        };
        for first in [0, 1, 256, 300] {
            let mut cache = DenseCache::new(shape, DType::F32).unwrap();
            feed(&mut cache, 0, first + 10);
            assert!(cache.rewind(first).unwrap());
            assert_eq!((cache.seen(), cache.held()), (first, first));
            let again = feed(&mut cache, 320, 20);
            let mut plain = DenseCache::new(shape, DType::F32).unwrap();
            if first > 0 {
                feed(&mut plain, 0, first);
            }
            let expected = feed(&mut plain, 320, 20);
            let difference = (again - expected).unwrap().abs().unwrap().flatten_all().unwrap();
            assert!(difference.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-6);
            assert!(cache.rewind(first + 21).unwrap_err().to_string().contains("at most"));
        }
        // What slid out of a window is gone.
        shape.window = Some(8);
        let mut cache = DenseCache::new(shape, DType::F32).unwrap();
        feed(&mut cache, 0, 340);
        assert!(!cache.rewind(100).unwrap());
        assert_eq!(cache.seen(), 340);
    }
}
