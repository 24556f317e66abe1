//! Many caches on the cost of one prefill.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;
use longctx_core::{Footprint, KvCache, Result, Step, Visible, attention};

/// Several caches behind one prompt: the first call attends exactly and is taken in by all; later calls go to the active one.
pub struct Fan {
    caches: Vec<Box<dyn KvCache>>,
    active: Arc<AtomicUsize>,
    prompted: bool,
}

impl Fan {
    /// `active` is the number of the cache that decodes; all layers share it.
    pub fn new(caches: Vec<Box<dyn KvCache>>, active: Arc<AtomicUsize>) -> Self {
        Self { caches, active, prompted: false }
    }

    fn active(&self) -> &dyn KvCache {
        &*self.caches[self.active.load(Ordering::Relaxed)]
    }
}

impl KvCache for Fan {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        if self.prompted {
            return self.caches[self.active.load(Ordering::Relaxed)].attend(step);
        }
        let (q, k) = (step.rope.apply(step.q, 0)?, step.rope.apply(step.k, 0)?);
        let whole = attention::attend(&q, &k, step.v, step.shape, Visible::Causal)?;
        self.caches.iter_mut().try_for_each(|cache| cache.take_prompt(step, &whole))?;
        self.prompted = true;
        whole.into_output(step.q.dtype())
    }

    fn seen(&self) -> usize {
        self.active().seen()
    }

    fn held(&self) -> usize {
        self.active().held()
    }

    fn footprint(&self) -> Footprint {
        self.active().footprint()
    }

    fn reset(&mut self) {
        self.caches.iter_mut().for_each(|cache| cache.reset());
        self.prompted = false;
    }
}
