//! Key bases, sinks and orders of the packed cache against slower implementations.
#![cfg(feature = "candle")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{Axis, Bits, DequantCache, Flush, Format, KeyBasis, Order, QuantCache, Scheme};
use longctx_core::{
    AttentionShape, Batch, DenseCache, DenseStore, KvCache, KvStore, LayerSpec, Mask, Rope,
    RopeScaling, SeqId, Step,
};

fn random(tokens: usize, heads: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, d), &Device::Cpu).unwrap()
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let scalar = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    scalar((a - b).unwrap()) / scalar(b.clone())
}

fn spec(d: usize) -> LayerSpec {
    let rope = Rope::new(d, d / 2, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(AttentionShape::new(6, 2, d).unwrap()).with_rope(Arc::new(rope))
}

/// Makes the same calls on both and returns the largest difference relative to the second's
/// outputs.
fn compare(a: &mut dyn KvCache, b: &mut dyn KvCache, d: usize, calls: &[&[(SeqId, usize)]]) -> f32 {
    let mut worst = 0f32;
    for call in calls {
        let batch = Batch::new(call).unwrap();
        let tokens = batch.tokens();
        let (q, k, v) = (random(tokens, 6, d), random(tokens, 2, d), random(tokens, 2, d));
        let step = Step { batch: &batch, q: &q, k: &k, v: &v };
        worst = worst.max(relative(&a.attend(&step).unwrap(), &b.attend(&step).unwrap()));
    }
    worst
}

/// Checks that attention over the codes equals attention over the dequantized keys and values.
fn check_fused(cache: &QuantCache, seq: SeqId, d: usize) {
    let (q, batch) = (random(1, 6, d), Batch::single(seq, 1).unwrap());
    let got = cache.store().attend(&batch, &q, Mask::Full).unwrap();
    let read = |head| cache.store().read(seq, head).unwrap();
    let ((k0, v0), (k1, v1)) = (read(0), read(1));
    let join = |a: &Tensor, b: &Tensor| Tensor::stack(&[a, b], 1).unwrap();
    let mut dense = DenseStore::new(spec(d).shape, DType::F32).unwrap();
    let all = Batch::single(seq, k0.dim(0).unwrap()).unwrap();
    dense.append(&all, &join(&k0, &k1), &join(&v0, &v1)).unwrap();
    let want = dense.attend(&batch, &q, Mask::Full).unwrap();
    assert!(relative(&got.out, &want.out) < 1e-3);
}

#[test]
fn every_key_basis_is_close_to_dense_and_equals_attention_over_its_dequantized_keys() {
    for d in [64, 80] {
        for basis in [KeyBasis::Given, KeyBasis::BeforeRope] {
            let per_token = Scheme::new(Bits::Eight, Axis::Channels, 64).unwrap();
            for format in [
                Format::kivi(Bits::Eight, Bits::Eight, 64, 128).unwrap(),
                Format::new(per_token, per_token, Flush::Immediate).unwrap(),
                Format::new(per_token, per_token, Flush::Rolling(64)).unwrap(),
            ] {
                let mut packed = QuantCache::new(spec(d), format.with_key_basis(basis)).unwrap();
                let mut dense = DenseCache::new(spec(d), DType::F32).unwrap();
                let calls: [&[_]; 5] =
                    [&[(0, 300)], &[(0, 1), (4, 70)], &[(4, 1)], &[(0, 50), (4, 3)], &[(0, 7)]];
                let worst = compare(&mut packed, &mut dense, d, &calls);
                assert!(worst < 0.03, "{d} {format:?} {basis:?}: {worst}");
                check_fused(&packed, 0, d);
                check_fused(&packed, 4, d);
            }
        }
    }
}

#[test]
fn sinks_are_unchanged() {
    for order in [Order::AttendFirst, Order::QuantizeFirst] {
        for basis in [KeyBasis::Given, KeyBasis::BeforeRope] {
            let format =
                Format::kivi(Bits::Eight, Bits::Eight, 32, 128).unwrap().with_key_basis(basis);
            let make = || {
                let cache = QuantCache::new(spec(64), format).unwrap();
                cache.with_order(order).with_sinks(5).unwrap()
            };
            // Sequences that have all of their sinks, beside others with none or some.
            let calls: [&[_]; 5] = [
                &[(0, 300), (1, 3)],
                &[(1, 1)],
                &[(0, 1), (2, 2), (1, 200)],
                &[(2, 40)],
                &[(1, 1)],
            ];
            let (mut packed, mut dense) = (make(), DenseCache::new(spec(64), DType::F32).unwrap());
            let worst = compare(&mut packed, &mut dense, 64, &calls);
            assert!(worst < 0.03, "{order:?} {basis:?}: {worst}");
            for seq in 0..3 {
                assert_eq!(packed.sinks().lens(seq), [5; 2]);
                assert_eq!(packed.sinks().seq_footprint(seq).payload, 0);
                assert_eq!(packed.held(seq), dense.seen(seq));
            }
        }
    }
}

#[test]
fn quantizing_first_changes_the_prompts_attention() {
    let format = Format::flexgen(Bits::Four, Bits::Four, 64).unwrap();
    let dense = || DenseCache::new(spec(64), DType::F32).unwrap();
    let mut after = QuantCache::new(spec(64), format).unwrap();
    assert!(compare(&mut after, &mut dense(), 64, &[&[(0, 100)]]) < 1e-5);
    let first = || QuantCache::new(spec(64), format).unwrap().with_order(Order::QuantizeFirst);
    let worst = compare(&mut first(), &mut dense(), 64, &[&[(0, 100)]]);
    assert!((1e-3..0.3).contains(&worst), "{worst}");
    // One by one or at once, tokens see the same packed past.
    let (mut once, mut steps) = (first(), first());
    let (q, k, v) = (random(40, 6, 64), random(40, 2, 64), random(40, 2, 64));
    let batch = Batch::single(0, 40).unwrap();
    let all = once.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
    let mut outputs = Vec::new();
    for i in 0..40 {
        let at = |x: &Tensor| x.narrow(0, i, 1).unwrap();
        let (batch, q, k, v) = (Batch::single(0, 1).unwrap(), at(&q), at(&k), at(&v));
        outputs.push(steps.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap());
    }
    assert!(relative(&Tensor::cat(&outputs, 0).unwrap(), &all) < 1e-4);
}

#[test]
fn keys_before_rope_need_a_rotary_embedding() {
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let format = format.with_key_basis(KeyBasis::BeforeRope);
    let rotated = LayerSpec { rope: None, ..spec(64) };
    let message = QuantCache::new(rotated, format).unwrap_err().to_string();
    assert!(message.contains("keys before RoPE"), "{message}");
}

#[test]
fn the_adapter_returns_the_appended_tensors() {
    let format = Format::kivi(Bits::Eight, Bits::Eight, 32, 32).unwrap();
    let mut ours = DequantCache::new(2, 64, format).unwrap();
    let mut candles = candle_nn::kv_cache::KvCache::new(2, 512);
    for tokens in [100, 1, 33] {
        let of = || Tensor::randn(0f32, 1., (1, 2, tokens, 64), &Device::Cpu).unwrap();
        let (k, v) = (of(), of());
        let (ours, candles) = (ours.append(&k, &v).unwrap(), candles.append(&k, &v).unwrap());
        assert!(relative(&ours.0, &candles.0) < 0.01);
        assert!(relative(&ours.1, &candles.1) < 0.01);
    }
    assert_eq!(ours.current_seq_len(), candles.current_seq_len());
    ours.reset();
    assert!(ours.k().unwrap().is_none() && ours.v().unwrap().is_none());
}
