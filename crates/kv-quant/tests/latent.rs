//! Packed latents of multi-head latent attention.
#![cfg(feature = "candle")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Float8, Format, QuantStore};
use longctx_core::{
    AttentionShape, Batch, DenseCache, DenseStore, KvCache, KvStore, LatentCache, LatentStore,
    LayerSpec, Mask, Rope, RopeScaling, Step,
};

const HEADS: usize = 4;
const ROTATED: usize = 64;
const LATENT: usize = 512;

fn spec() -> LayerSpec {
    let d = ROTATED + LATENT;
    let shape = AttentionShape { value_dim: LATENT, ..AttentionShape::new(HEADS, 1, d).unwrap() };
    let rope = Rope::new(d, ROTATED, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(shape).with_rope(Arc::new(rope)).with_latent().unwrap()
}

fn latents(format: Format) -> LatentStore<QuantStore> {
    LatentStore::new(spec().shape, |parts| QuantStore::new(parts, format)).unwrap()
}

fn random(tokens: usize, heads: usize) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, ROTATED + LATENT), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn formats() -> [Format; 4] {
    let kivi = |bits| Format::kivi(bits, bits, 32, 128).unwrap();
    [kivi(Bits::Four), kivi(Bits::Two), Format::float8(Float8::E4m3), Format::f16()]
}

/// Attention over packed latents equals attention over the dequantized latents.
#[test]
fn packed_latents_attend_as_their_dequantized_numbers() {
    for format in formats() {
        let mut packed = latents(format);
        let k = random(700, 1);
        let v = k.narrow(2, ROTATED, LATENT).unwrap();
        packed.append(&Batch::single(3, 700).unwrap(), &k, &v).unwrap();
        let (keys, values) = packed.read(3, 0).unwrap();
        assert_eq!(distance(&keys.narrow(1, ROTATED, LATENT).unwrap(), &values), 0.0);
        let mut dense = DenseStore::new(spec().shape, DType::F32).unwrap();
        let of = |x: &Tensor| x.unsqueeze(1).unwrap();
        dense.append(&Batch::single(3, 700).unwrap(), &of(&keys), &of(&values)).unwrap();
        let batch = Batch::single(3, 5).unwrap();
        let q = random(5, HEADS);
        for mask in [Mask::Full, Mask::Causal] {
            let of = |store: &dyn KvStore| store.attend(&batch, &q, mask).unwrap().out;
            assert!(distance(&of(&packed), &of(&dense)) < 1e-5, "{format:?}");
        }
        let (part, _) = packed.read_range(3, 0, 550..600).unwrap();
        assert_eq!(distance(&part, &keys.narrow(0, 550, 50).unwrap()), 0.0);
        assert!(packed.read_range(3, 0, 600..701).is_err());
    }
}

#[test]
fn packed_latents_are_counted_once() {
    let tokens = 1024 + 128;
    let bytes: Vec<_> = formats()
        .into_iter()
        .map(|format| {
            let mut exact = DenseCache::new(spec(), DType::F32).unwrap();
            let mut packed = LatentCache::new(spec(), latents(format)).unwrap();
            let mut largest = 0f32;
            for batch in [Batch::single(0, tokens - 1).unwrap(), Batch::decode(&[0]).unwrap()] {
                let (q, k) = (random(batch.tokens(), HEADS), random(batch.tokens(), 1));
                let v = k.narrow(2, ROTATED, LATENT).unwrap();
                let step = Step { batch: &batch, q: &q, k: &k, v: &v };
                let (a, b) = (exact.attend(&step).unwrap(), packed.attend(&step).unwrap());
                largest = largest.max(distance(&a, &b));
            }
            // The error of two bits is large for random numbers; that of other formats is small.
            assert!(largest < 0.6, "{format:?}: {largest}");
            packed.footprint().total() - packed.footprint().slack
        })
        .collect();
    let f16 = tokens * (ROTATED + LATENT) * 2;
    assert!((f16..f16 * 11 / 10).contains(&bytes[3]), "{bytes:?}");
    assert!(bytes[2] < f16 * 6 / 10 && bytes[0] < f16 * 4 / 10 && bytes[1] < bytes[0], "{bytes:?}");
}
