//! Bases, sinks and orders of the packed cache against slower paths.
#![cfg(feature = "candle")]

use candle_core::{DType, Device, Tensor};
use kv_quant::{Axis, Bits, DequantCache, Flush, Format, KeyBasis, Order, QuantCache, Scheme};
use longctx_core::{
    AttentionShape, DenseCache, KvCache, KvStore, Rope, RopeScaling, Step, Visible, attention,
};

fn random(heads: usize, tokens: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1., (1, heads, tokens, d), &Device::Cpu).unwrap()
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let scalar = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    scalar((a - b).unwrap()) / scalar(b.clone())
}

fn shape(d: usize) -> AttentionShape {
    AttentionShape::new(6, 2, d).unwrap()
}

fn rope(d: usize) -> Rope {
    Rope::new(d, d / 2, 10_000.0, RopeScaling::None).unwrap()
}

/// Feeds the same steps to both and gives the largest difference relative to the second's outputs.
fn compare(a: &mut dyn KvCache, b: &mut dyn KvCache, d: usize, tokens: &[usize]) -> f32 {
    let (shape, rope) = (shape(d), rope(d));
    let mut worst = 0f32;
    for &tokens in tokens {
        let (q, k, v) = (random(6, tokens, d), random(2, tokens, d), random(2, tokens, d));
        let step = Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope };
        worst = worst.max(relative(&a.attend(&step).unwrap(), &b.attend(&step).unwrap()));
    }
    worst
}

/// What the cache holds must give what its dequantized contents give.
fn check_fused(cache: &QuantCache, d: usize) {
    let q = random(6, 1, d);
    let got = cache.store().attend(&q, Visible::All).unwrap();
    for head in 0..2 {
        let (k, v) = cache.store().read(0, head).unwrap();
        let one = AttentionShape { heads: 3, kv_heads: 1, ..shape(d) };
        let kv = |x: Tensor| x.unsqueeze(0).unwrap().unsqueeze(0).unwrap();
        let q = q.narrow(1, 3 * head, 3).unwrap();
        let want = attention::attend(&q, &kv(k), &kv(v), &one, Visible::All).unwrap();
        assert!(relative(&got.out.narrow(1, 3 * head, 3).unwrap(), &want.out) < 1e-3);
    }
}

#[test]
fn every_basis_is_close_to_dense_and_equals_its_dequantized_self() {
    for d in [64, 80] {
        for basis in [KeyBasis::Given, KeyBasis::Hadamard, KeyBasis::BeforeRope] {
            let per_token = Scheme::new(Bits::Eight, Axis::Channels, 64).unwrap();
            for format in [
                Format::kivi(Bits::Eight, Bits::Eight, 64, 128).unwrap(),
                Format::new(per_token, per_token, Flush::Immediate).unwrap(),
                Format::new(per_token, per_token, Flush::Together).unwrap(),
            ] {
                let mut packed = QuantCache::new(shape(d), format.with_basis(basis)).unwrap();
                let mut dense = DenseCache::new(shape(d), DType::F32).unwrap();
                let worst = compare(&mut packed, &mut dense, d, &[300, 1, 1, 50, 7]);
                assert!(worst < 0.03, "{d} {format:?} {basis:?}: {worst}");
                check_fused(&packed, d);
            }
        }
    }
}

#[test]
fn sinks_are_kept_as_they_are() {
    for order in [Order::AttendFirst, Order::QuantizeFirst] {
        for basis in [KeyBasis::Given, KeyBasis::BeforeRope] {
            let format = Format::kivi(Bits::Eight, Bits::Eight, 32, 128).unwrap().with_basis(basis);
            let make = || {
                let cache = QuantCache::new(shape(64), format).unwrap();
                cache.with_order(order).with_sinks(5).unwrap()
            };
            for tokens in [&[300, 1, 1, 40][..], &[3, 1, 200, 1]] {
                let (mut packed, mut dense) =
                    (make(), DenseCache::new(shape(64), DType::F32).unwrap());
                let worst = compare(&mut packed, &mut dense, 64, tokens);
                assert!(worst < 0.03, "{order:?} {basis:?} {tokens:?}: {worst}");
                assert_eq!(packed.sinks().len(), 5);
                assert_eq!(packed.sinks().footprint().payload, 0);
                assert_eq!(packed.held(), packed.seen());
            }
        }
    }
}

#[test]
fn quantizing_first_shows_in_the_prompt() {
    let format = Format::flexgen(Bits::Four, Bits::Four, 64).unwrap();
    let dense = || DenseCache::new(shape(64), DType::F32).unwrap();
    let mut after = QuantCache::new(shape(64), format).unwrap();
    assert!(compare(&mut after, &mut dense(), 64, &[100]) < 1e-5);
    let mut before = QuantCache::new(shape(64), format).unwrap().with_order(Order::QuantizeFirst);
    let worst = compare(&mut before, &mut dense(), 64, &[100]);
    assert!((1e-3..0.3).contains(&worst), "{worst}");
    // One by one or at once, tokens see the same packed past.
    let (mut once, mut steps) = (before.clone(), before);
    once.reset();
    steps.reset();
    let (shape, rope) = (shape(64), rope(64));
    let (q, k, v) = (random(6, 40, 64), random(2, 40, 64), random(2, 40, 64));
    let all = once.attend(&Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope }).unwrap();
    let mut outputs = Vec::new();
    for i in 0..40 {
        let at = |x: &Tensor| x.narrow(2, i, 1).unwrap();
        let (q, k, v) = (at(&q), at(&k), at(&v));
        let step = Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope };
        outputs.push(steps.attend(&step).unwrap());
    }
    assert!(relative(&Tensor::cat(&outputs, 2).unwrap(), &all) < 1e-4);
}

#[test]
fn keys_before_rope_stay_whole() {
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut cache = QuantCache::new(shape(64), format.with_basis(KeyBasis::BeforeRope)).unwrap();
    compare(&mut cache, &mut DenseCache::new(shape(64), DType::F32).unwrap(), 64, &[100]);
    let mut head = cache.store().heads()[0].clone();
    let message = head.retain(&[1, 2]).unwrap_err().to_string();
    assert!(message.contains("before RoPE"), "{message}");
    assert!(kv_quant::Head::new(64, cache.format()).is_err());
}

#[test]
fn the_adapter_gives_back_what_was_put_in() {
    let format = Format::kivi(Bits::Eight, Bits::Eight, 32, 32).unwrap();
    let mut ours = DequantCache::new(2, 64, format).unwrap();
    let mut candles = candle_nn::kv_cache::KvCache::new(2, 512);
    for tokens in [100, 1, 33] {
        let (k, v) = (random(2, tokens, 64), random(2, tokens, 64));
        let (ours, candles) = (ours.append(&k, &v).unwrap(), candles.append(&k, &v).unwrap());
        assert!(relative(&ours.0, &candles.0) < 0.01);
        assert!(relative(&ours.1, &candles.1) < 0.01);
    }
    assert_eq!(ours.current_seq_len(), candles.current_seq_len());
    ours.reset();
    assert!(ours.k().unwrap().is_none() && ours.v().unwrap().is_none());
}
