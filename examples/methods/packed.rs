//! Caches that pack every token.

use kv_quant::{Axis, Bits, Flush, Format, KeyBasis, Order, QuantCache, Scheme};
use longctx_core::{LayerSpec, Result};

/// Makes a layer's cache.
pub type Make = fn(LayerSpec) -> Result<QuantCache>;

/// By name. `rolling`: KIVI with a rolling flush; `sinks`: the first 4 tokens in f16; `attend-first`:
/// a call's own tokens see each other in full precision; `residual`: the newest 128 tokens in f16.
pub const PACKED: [(&str, Make); 25] = [
    ("kivi-8", |spec| cache(spec, kivi(Bits::Eight, Bits::Eight))),
    ("kivi-4", |spec| cache(spec, kivi(Bits::Four, Bits::Four))),
    ("kivi-3", |spec| cache(spec, kivi(Bits::Three, Bits::Three))),
    ("kivi-2", |spec| cache(spec, kivi(Bits::Two, Bits::Two))),
    ("kivi-keys-4-values-2", |spec| cache(spec, kivi(Bits::Four, Bits::Two))),
    ("kivi-keys-2-values-4", |spec| cache(spec, kivi(Bits::Two, Bits::Four))),
    ("kivi-edges-4-middle-2", |spec| {
        let edge = spec.index < 2 || spec.index + 2 >= spec.count;
        let bits = if edge { Bits::Four } else { Bits::Two };
        cache(spec, kivi(bits, bits))
    }),
    ("kivi-4-rolling", |spec| cache(spec, rolling(Bits::Four))),
    ("kivi-2-rolling", |spec| cache(spec, rolling(Bits::Two))),
    ("kivi-before-rope-4", |spec| cache(spec, before_rope(Bits::Four))),
    ("kivi-before-rope-2", |spec| cache(spec, before_rope(Bits::Two))),
    ("kivi-4-sinks", |spec| cache(spec, kivi(Bits::Four, Bits::Four))?.with_sinks(4)),
    ("kivi-2-sinks", |spec| cache(spec, kivi(Bits::Two, Bits::Two))?.with_sinks(4)),
    ("kivi-before-rope-2-sinks", |spec| cache(spec, before_rope(Bits::Two))?.with_sinks(4)),
    ("flexgen-4", |spec| quantize_first(spec, flexgen(Bits::Four))),
    ("flexgen-3", |spec| quantize_first(spec, flexgen(Bits::Three))),
    ("flexgen-2", |spec| quantize_first(spec, flexgen(Bits::Two))),
    ("flexgen-hadamard-4", |spec| quantize_first(spec, hadamard(flexgen(Bits::Four)))),
    ("flexgen-hadamard-3", |spec| quantize_first(spec, hadamard(flexgen(Bits::Three)))),
    ("flexgen-hadamard-2", |spec| quantize_first(spec, hadamard(flexgen(Bits::Two)))),
    ("flexgen-4-sinks", |spec| quantize_first(spec, flexgen(Bits::Four))?.with_sinks(4)),
    ("flexgen-4-attend-first", |spec| cache(spec, flexgen(Bits::Four))),
    ("flexgen-4-residual", |spec| cache(spec, with_residual(Bits::Four))),
    ("flexgen-hadamard-3-residual", |spec| cache(spec, hadamard(with_residual(Bits::Three)))),
    ("packed-f16", |spec| cache(spec, Ok(Format::f16()))),
];

type Packed = kv_quant::Result<Format>;

/// KIVI's defaults: groups of 32, the newest 128 tokens in full precision.
fn kivi(keys: Bits, values: Bits) -> Packed {
    Format::kivi(keys, values, 32, 128)
}

fn rolling(bits: Bits) -> Packed {
    Format::kivi_rolling(bits, bits, 32, 128)
}

fn before_rope(bits: Bits) -> Packed {
    Ok(kivi(bits, bits)?.with_basis(KeyBasis::BeforeRope))
}

/// FlexGen's groups of 64.
fn flexgen(bits: Bits) -> Packed {
    Format::flexgen(bits, bits, 64)
}

/// FlexGen's groups with KIVI's residual.
fn with_residual(bits: Bits) -> Packed {
    let scheme = Scheme::new(bits, Axis::Channels, 64)?;
    Format::new(scheme, scheme, Flush::Staggered(128))
}

fn hadamard(format: Packed) -> Packed {
    Ok(format?.with_basis(KeyBasis::Hadamard))
}

fn cache(spec: LayerSpec, format: Packed) -> Result<QuantCache> {
    QuantCache::new(spec, format?)
}

/// Quantized before the attention, as FlexGen is in arXiv 2407.01527.
fn quantize_first(spec: LayerSpec, format: Packed) -> Result<QuantCache> {
    Ok(cache(spec, format)?.with_order(Order::QuantizeFirst))
}
