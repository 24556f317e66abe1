//! Packed caches of all tokens, by name.

use kv_quant::{
    Axis, Bits, Float8, Flush, Format, KeyBasis, Order, QuantCache, Scheme, TurboQuant,
};
use longctx_core::{LayerSpec, Result};

/// Creates a layer's cache.
pub type NewCache = fn(LayerSpec) -> Result<QuantCache>;

/// Packed caches by name. The suffixes mean: `rolling`, KIVI with a rolling flush; `sinks`, the
/// first 4 tokens in f16; `attend-first`, full precision in attention among the tokens of a call;
/// `residual`, the newest 128 tokens in f16; `edges-f16`, the first and last two layers in f16, as
/// vLLM serves TurboQuant; `rotated`, a Hadamard rotation of keys and values; `keys-rotated`, one
/// of keys only. KVarN keeps the first 128 tokens in f16, as its published code does.
pub const PACKED: [(&str, NewCache); 47] = [
    ("kivi-8", |spec| cache(spec, kivi(Bits::Eight, Bits::Eight))),
    ("kivi-4", |spec| cache(spec, kivi(Bits::Four, Bits::Four))),
    ("kivi-3", |spec| cache(spec, kivi(Bits::Three, Bits::Three))),
    ("kivi-2", |spec| cache(spec, kivi(Bits::Two, Bits::Two))),
    ("kivi-keys-4-values-2", |spec| cache(spec, kivi(Bits::Four, Bits::Two))),
    ("kivi-keys-2-values-4", |spec| cache(spec, kivi(Bits::Two, Bits::Four))),
    ("kivi-edges-4-middle-2", |spec| {
        let edge = spec.index < 2 || spec.index + 2 >= spec.num_layers;
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
    ("fp8", |spec| cache(spec, Ok(Format::float8(Float8::E4m3)))),
    ("fp8-e5m2", |spec| cache(spec, Ok(Format::float8(Float8::E5m2)))),
    ("int4-rotated", |spec| cache(spec, rotated(Bits::Four))),
    ("int3-rotated", |spec| cache(spec, rotated(Bits::Three))),
    ("int4-rotated-asymmetric", |spec| cache(spec, asymmetric(Bits::Four))),
    ("int3-rotated-asymmetric", |spec| cache(spec, asymmetric(Bits::Three))),
    ("int4-keys-rotated", |spec| {
        let (keys, values) =
            (Scheme::symmetric(Bits::Four, 256)?, Scheme::symmetric(Bits::Four, 256)?);
        cache(spec, Format::new(keys.rotated(), values, Flush::Immediate))
    }),
    ("int4-rotated-residual", |spec| cache(spec, newest(rotated(Bits::Four)))),
    ("int4-rotated-sinks", |spec| cache(spec, newest(rotated(Bits::Four)))?.with_sinks(4)),
    ("int3-rotated-sinks", |spec| cache(spec, newest(rotated(Bits::Three)))?.with_sinks(4)),
    ("turboquant-k8v4", |spec| cache(spec, turboquant(TurboQuant::K8V4))),
    ("turboquant-4bit-nc", |spec| cache(spec, turboquant(TurboQuant::FourBitNc))),
    ("turboquant-k3v4-nc", |spec| cache(spec, turboquant(TurboQuant::K3V4Nc))),
    ("turboquant-3bit-nc", |spec| cache(spec, turboquant(TurboQuant::ThreeBitNc))),
    ("turboquant-4bit-nc-edges-f16", |spec| edges_f16(spec, TurboQuant::FourBitNc)),
    ("turboquant-3bit-nc-edges-f16", |spec| edges_f16(spec, TurboQuant::ThreeBitNc)),
    ("kvarn-k4v4", |spec| kvarn(spec, Bits::Four, Bits::Four, 128)),
    ("kvarn-k4v2", |spec| kvarn(spec, Bits::Four, Bits::Two, 128)),
    ("kvarn-k3v3", |spec| kvarn(spec, Bits::Three, Bits::Three, 128)),
    ("kvarn-k2v2", |spec| kvarn(spec, Bits::Two, Bits::Two, 128)),
    ("kvarn-k4v4-64", |spec| kvarn(spec, Bits::Four, Bits::Four, 64)),
    ("kvarn-k4v2-64", |spec| kvarn(spec, Bits::Four, Bits::Two, 64)),
];

type Packed = kv_quant::Result<Format>;

/// Returns KIVI's defaults: groups of 32, the newest 128 tokens in full precision.
fn kivi(keys: Bits, values: Bits) -> Packed {
    Format::kivi(keys, values, 32, 128)
}

fn rolling(bits: Bits) -> Packed {
    Format::kivi_rolling(bits, bits, 32, 128)
}

fn before_rope(bits: Bits) -> Packed {
    Ok(kivi(bits, bits)?.with_key_basis(KeyBasis::BeforeRope))
}

/// Returns FlexGen's format with groups of 64.
fn flexgen(bits: Bits) -> Packed {
    Format::flexgen(bits, bits, 64)
}

/// Returns FlexGen's format with KIVI's residual.
fn with_residual(bits: Bits) -> Packed {
    let scheme = Scheme::new(bits, Axis::Channels, 64)?;
    Format::new(scheme, scheme, Flush::Staggered(128))
}

fn hadamard(format: Packed) -> Packed {
    Ok(format?.with_rotated_keys())
}

fn rotated(bits: Bits) -> Packed {
    Ok(Format::rotated_symmetric(bits, bits))
}

fn asymmetric(bits: Bits) -> Packed {
    Ok(Format::rotated_asymmetric(bits, bits))
}

fn turboquant(preset: TurboQuant) -> Packed {
    Ok(Format::turboquant(preset))
}

/// Returns the same format with the newest 128 tokens in f16.
fn newest(format: Packed) -> Packed {
    let format = format?;
    Format::new(format.keys(), format.values(), Flush::Rolling(128))
}

fn edges_f16(spec: LayerSpec, preset: TurboQuant) -> Result<QuantCache> {
    let edge = spec.index < 2 || spec.index + 2 >= spec.num_layers;
    cache(spec, Ok(if edge { Format::f16() } else { Format::turboquant(preset) }))
}

fn kvarn(spec: LayerSpec, keys: Bits, values: Bits, tile: usize) -> Result<QuantCache> {
    cache(spec, Format::kvarn(keys, values, tile))?.with_sinks(128)
}

fn cache(spec: LayerSpec, format: Packed) -> Result<QuantCache> {
    QuantCache::new(spec, format?)
}

/// Creates a cache that quantizes before attention, like FlexGen in arXiv 2407.01527.
fn quantize_first(spec: LayerSpec, format: Packed) -> Result<QuantCache> {
    Ok(cache(spec, format)?.with_order(Order::QuantizeFirst))
}
