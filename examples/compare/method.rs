//! The caches that are compared.

use candle_core::DType;
use half::f16;
use kv_quant::{Bits, Format, QuantCache, QuantStore};
use longctx_core::{DenseCache, DenseStore, KvCache, LayerShape, Result};
use token_drop::{Budget, H2o, InfLlm, PolicyCache, SnapKv, StreamingLlm};

/// A way to remember, by name.
pub struct Method {
    pub name: &'static str,
    pub cache: fn(&LayerShape) -> Result<Box<dyn KvCache>>,
}

/// Every method, the reference for ratios (dense f16) among them: a few minutes on two cores.
pub const METHODS: [Method; 9] = [
    Method { name: "dense-f32", cache: |l| boxed(DenseCache::new(l.attention, DType::F32)) },
    Method { name: REFERENCE, cache: |l| boxed(DenseCache::new(l.attention, DType::F16)) },
    Method { name: "kivi-4", cache: |l| boxed(QuantCache::new(l.attention, kivi(Bits::Four)?)) },
    Method { name: "kivi-2", cache: |l| boxed(QuantCache::new(l.attention, kivi(Bits::Two)?)) },
    Method { name: "streaming-4x", cache: |l| boxed(StreamingLlm::with_ratio(0.25, dense(l)?)) },
    Method {
        name: "streaming-4x-kivi-4",
        cache: |l| {
            let store = QuantStore::new(l.attention, kivi(Bits::Four)?)?;
            boxed(StreamingLlm::with_ratio(0.25, store)?.with_step(32))
        },
    },
    Method {
        name: "h2o-4x",
        cache: |l| boxed(PolicyCache::new(dense(l)?, H2o::default(), Budget::Ratio(0.25))),
    },
    Method {
        name: "snapkv-4x",
        cache: |l| boxed(PolicyCache::new(dense(l)?, SnapKv::new(32)?, Budget::Ratio(0.25))),
    },
    // A quarter is seen; what is not fetched is still held, and counted.
    Method { name: "infllm-4x", cache: |l| boxed(InfLlm::<f16>::with_ratio(0.25, l.attention)) },
];

/// What a model without attention layers is run with: no cache is ever built.
pub const STATE: Method =
    Method { name: "state", cache: |l| boxed(DenseCache::new(l.attention, DType::F16)) };

/// Compression ratios are against this method's bytes.
pub const REFERENCE: &str = "dense-f16";

fn dense(layer: &LayerShape) -> Result<DenseStore> {
    DenseStore::new(layer.attention, DType::F16)
}

/// KIVI's defaults: groups of 32, the newest 128 tokens in full precision.
fn kivi(bits: Bits) -> Result<Format> {
    Ok(Format::kivi(bits, bits, 32, 128)?)
}

fn boxed<C: KvCache + 'static>(cache: Result<C>) -> Result<Box<dyn KvCache>> {
    Ok(Box::new(cache?))
}
