//! Packed keys and values within a sliding window.
#![cfg(feature = "candle")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{
    AttentionShape, Batch, DenseCache, KvCache, KvStore, LayerSpec, Rope, RopeScaling, Step,
    WindowCache,
};

const D: usize = 64;
const WINDOW: usize = 256;
const GROUP: usize = 32;

fn spec() -> LayerSpec {
    let shape = AttentionShape { window: Some(WINDOW), ..AttentionShape::new(4, 2, D).unwrap() };
    let rope = Rope::new(D, D, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(shape).with_rope(Arc::new(rope))
}

/// Returns a pseudo-random walk over tokens: adjacent tokens are similar, as in texts.
fn numbers(from: usize, tokens: usize, heads: usize, salt: usize) -> Tensor {
    let number = |token: usize, i: usize| {
        ((token as f64 * 0.07 + (i * 37 + salt * 11) as f64).sin() * 1.5) as f32
    };
    let data: Vec<f32> = (from..from + tokens)
        .flat_map(|token| (0..heads * D).map(move |i| number(token, i)))
        .collect();
    Tensor::from_vec(data, (tokens, heads, D), &Device::Cpu).unwrap()
}

fn feed(cache: &mut dyn KvCache, tokens: usize) -> Tensor {
    let at = cache.seen(0);
    let (q, k, v) =
        (numbers(at, tokens, 4, 1), numbers(at, tokens, 2, 2), numbers(at, tokens, 2, 3));
    let batch = Batch::single(0, tokens).unwrap();
    cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap()
}

fn packed(format: Format) -> WindowCache<QuantStore> {
    WindowCache::new(spec(), QuantStore::new(spec().shape, format).unwrap(), GROUP).unwrap()
}

fn kivi(bits: Bits) -> Format {
    Format::kivi(bits, bits, GROUP, 128).unwrap()
}

/// Prompts, chunks and single tokens across several windows: the error of each format is within its
/// quantization error.
#[test]
fn packed_windows_attend_as_the_exact_cache() {
    for (format, tolerance) in [
        (Format::f16(), 2e-3),
        (kivi(Bits::Eight), 2e-2),
        (kivi(Bits::Four), 0.2),
        (Format::flexgen(Bits::Eight, Bits::Eight, 64).unwrap(), 2e-2),
    ] {
        let mut exact = DenseCache::new(spec(), DType::F32).unwrap();
        let mut cache = packed(format);
        for tokens in [700, 1, 1, 300, 90].into_iter().chain([1; 80]) {
            let difference = (feed(&mut cache, tokens) - feed(&mut exact, tokens)).unwrap();
            let error: f32 = difference.abs().unwrap().max_all().unwrap().to_scalar().unwrap();
            assert!(error < tolerance, "{format:?}: {error}");
            assert!(cache.held(0) < WINDOW + GROUP);
        }
    }
}

/// Whole groups leave the window: the others keep their codes, and the memory does not grow.
#[test]
fn a_window_drops_blocks_and_packs_no_entry_twice() {
    let mut cache = packed(kivi(Bits::Four));
    feed(&mut cache, 1000);
    let dense = WINDOW * 2 * 2 * D * 2;
    assert!(cache.seq_footprint(0).payload < dense * 3 / 4, "{}", cache.seq_footprint(0).payload);
    let keys = |cache: &WindowCache<QuantStore>| {
        cache.store().read(0, 0).unwrap().0.to_vec2::<f32>().unwrap()
    };
    let before = keys(&cache);
    // Tokens of the residual are packed as more tokens are appended; the oldest are already packed.
    for _ in 0..GROUP {
        feed(&mut cache, 1);
    }
    assert_eq!((before.len(), cache.held(0)), (WINDOW, WINDOW));
    assert_eq!(keys(&cache)[..64], before[GROUP..GROUP + 64]);
    // After eight more residuals of 128 tokens the bytes are the same.
    let bytes = cache.seq_footprint(0).payload;
    for _ in 0..1024 {
        feed(&mut cache, 1);
    }
    assert_eq!(cache.seq_footprint(0).payload, bytes);
}
