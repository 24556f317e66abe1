//! The formats and options that are measured.

use candle_core::DType;
use kv_quant::{Axis, Bits, Flush, Format, KeyBasis, Order, QuantCache, Scheme};
use longctx_core::{DenseCache, KvCache, LayerShape, Result};

/// A way to hold keys and values, by name.
pub struct Method {
    pub name: &'static str,
    pub cache: fn(&LayerShape) -> Result<Box<dyn KvCache>>,
}

/// What the others are compared with.
pub const REFERENCE: &str = "f16";

/// All methods, the reference first.
pub const METHODS: &[Method] = &[
    Method { name: REFERENCE, cache: |l| Ok(Box::new(DenseCache::new(l.attention, DType::F16)?)) },
    Method { name: "KIVI-8", cache: |l| boxed(cache(l, kivi(Bits::Eight, Bits::Eight))) },
    Method { name: "KIVI-4", cache: |l| boxed(cache(l, kivi(Bits::Four, Bits::Four))) },
    Method { name: "KIVI-2", cache: |l| boxed(cache(l, kivi(Bits::Two, Bits::Two))) },
    Method { name: "FlexGen-4", cache: |l| boxed(first(l, flexgen(Bits::Four))) },
    Method { name: "FlexGen-4, Hadamard", cache: |l| boxed(first(l, hadamard(Bits::Four))) },
    Method { name: "KIVI-4, before RoPE", cache: |l| boxed(cache(l, before_rope(Bits::Four))) },
    Method { name: "KIVI-2, before RoPE", cache: |l| boxed(cache(l, before_rope(Bits::Two))) },
    Method {
        name: "KIVI-4, 4 sinks",
        cache: |l| boxed(sinks(cache(l, kivi(Bits::Four, Bits::Four)))),
    },
    Method {
        name: "KIVI-2, 4 sinks",
        cache: |l| boxed(sinks(cache(l, kivi(Bits::Two, Bits::Two)))),
    },
    Method {
        name: "KIVI-2, before RoPE, 4 sinks",
        cache: |l| boxed(sinks(cache(l, before_rope(Bits::Two)))),
    },
    Method { name: "FlexGen-4, 4 sinks", cache: |l| boxed(sinks(first(l, flexgen(Bits::Four)))) },
    Method { name: "FlexGen-3", cache: |l| boxed(first(l, flexgen(Bits::Three))) },
    Method { name: "FlexGen-3, Hadamard", cache: |l| boxed(first(l, hadamard(Bits::Three))) },
    Method { name: "FlexGen-2", cache: |l| boxed(first(l, flexgen(Bits::Two))) },
    Method { name: "FlexGen-2, Hadamard", cache: |l| boxed(first(l, hadamard(Bits::Two))) },
    Method { name: "KIVI-3", cache: |l| boxed(cache(l, kivi(Bits::Three, Bits::Three))) },
    Method {
        name: "KIVI, keys 4, values 2",
        cache: |l| boxed(cache(l, kivi(Bits::Four, Bits::Two))),
    },
    Method {
        name: "KIVI, keys 2, values 4",
        cache: |l| boxed(cache(l, kivi(Bits::Two, Bits::Four))),
    },
    Method {
        name: "KIVI, 4 in the first and last 2 layers, else 2",
        cache: |l| {
            let edge = l.layer < 2 || l.layer + 2 >= l.layers;
            let bits = if edge { Bits::Four } else { Bits::Two };
            boxed(cache(l, kivi(bits, bits)))
        },
    },
    Method { name: "FlexGen-4, after attention", cache: |l| boxed(cache(l, flexgen(Bits::Four))) },
    Method {
        name: "FlexGen-4, newest 128 in f16",
        cache: |l| boxed(cache(l, with_newest(Bits::Four))),
    },
    Method {
        name: "FlexGen-3, Hadamard, newest 128 in f16",
        cache: |l| boxed(cache(l, Ok(with_newest(Bits::Three)?.with_basis(KeyBasis::Hadamard)))),
    },
];

/// KIVI's defaults: groups of 32, the newest 128 tokens in full precision.
fn kivi(keys: Bits, values: Bits) -> kv_quant::Result<Format> {
    Format::kivi(keys, values, 32, 128)
}

fn before_rope(bits: Bits) -> kv_quant::Result<Format> {
    Ok(kivi(bits, bits)?.with_basis(KeyBasis::BeforeRope))
}

/// FlexGen's groups of 64.
fn flexgen(bits: Bits) -> kv_quant::Result<Format> {
    Format::flexgen(bits, bits, 64)
}

fn hadamard(bits: Bits) -> kv_quant::Result<Format> {
    Ok(flexgen(bits)?.with_basis(KeyBasis::Hadamard))
}

/// FlexGen's groups with KIVI's residual.
fn with_newest(bits: Bits) -> kv_quant::Result<Format> {
    let scheme = Scheme::new(bits, Axis::Channels, 64)?;
    Format::new(scheme, scheme, Flush::Staggered(128))
}

fn boxed(cache: Result<QuantCache>) -> Result<Box<dyn KvCache>> {
    Ok(Box::new(cache?))
}

fn cache(layer: &LayerShape, format: kv_quant::Result<Format>) -> Result<QuantCache> {
    QuantCache::new(layer.attention, format?)
}

/// Quantized before the attention, as the paper's FlexGen does.
fn first(layer: &LayerShape, format: kv_quant::Result<Format>) -> Result<QuantCache> {
    Ok(cache(layer, format)?.with_order(Order::QuantizeFirst))
}

fn sinks(cache: Result<QuantCache>) -> Result<QuantCache> {
    cache?.with_sinks(4)
}
