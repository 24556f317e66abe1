//! Eviction over packed stores: the policies of token-drop on the stores of kv-quant.

use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{
    AttentionShape, DenseStore, EvictionPolicy, KvCache, KvStore, Rope, RopeScaling, Step,
};
use token_drop::*;

const TOKENS: usize = 400;

fn shape() -> AttentionShape {
    AttentionShape::new(4, 2, 64).unwrap()
}

fn packed(bits: Bits) -> QuantStore {
    QuantStore::new(shape(), Format::kivi(bits, bits, 32, 32).unwrap()).unwrap()
}

fn policies() -> Vec<Box<dyn EvictionPolicy>> {
    vec![
        Box::new(KNorm),
        Box::new(Recent::with_sinks(4)),
        Box::new(H2o::default()),
        Box::new(Tova::default()),
        Box::new(SnapKv::new(16).unwrap()),
        Box::new(AdaKv::new(SnapKv::new(16).unwrap())),
        Box::new(Rerotated::new(KeyDiff)),
    ]
}

fn x(heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0f32, 1., (1, heads, tokens, 64), &Device::Cpu).unwrap()
}

fn feed(cache: &mut impl KvCache, (q, k, v): &(Tensor, Tensor, Tensor)) -> Tensor {
    let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap();
    cache.attend(&Step { q, k, v, shape: &shape(), rope: &rope }).unwrap()
}

/// The prompt attends exactly and scores come from its own keys and queries, so that a packed store is left with the same tokens as a
/// dense one; decoded tokens then see nearly the same.
#[test]
fn packed_stores_keep_the_same_tokens_of_a_prompt() {
    let prompt = (x(4, TOKENS), x(2, TOKENS), x(2, TOKENS));
    let token = (x(4, 1), x(2, 1), x(2, 1));
    for (i, (a, b)) in policies().into_iter().zip(policies()).enumerate() {
        let mut small = PolicyCache::new(packed(Bits::Four), a, Budget::Ratio(0.5)).unwrap();
        let dense = DenseStore::new(shape(), DType::F32).unwrap();
        let mut large = PolicyCache::new(dense, b, Budget::Ratio(0.5)).unwrap();
        feed(&mut small, &prompt);
        feed(&mut large, &prompt);
        assert_eq!(small.positions(), large.positions(), "policy {i}");
        assert!(small.footprint().total() * 3 < large.footprint().total(), "policy {i}");
        let (a, b) = (feed(&mut small, &token), feed(&mut large, &token));
        let error = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        let error = error.to_scalar::<f32>().unwrap();
        assert!(error > 0.0 && error < 0.1, "policy {i}: off by {error}");
    }
}

#[test]
fn budgets_hold_over_packed_stores_while_decoding() {
    for policy in policies() {
        let mut cache = PolicyCache::new(packed(Bits::Two), policy, Budget::Tokens(100)).unwrap();
        cache = cache.with_decode_step(Some(10)).unwrap();
        feed(&mut cache, &(x(4, TOKENS), x(2, TOKENS), x(2, TOKENS)));
        for _ in 0..40 {
            feed(&mut cache, &(x(4, 1), x(2, 1), x(2, 1)));
            let held: usize = cache.store().lens().iter().sum();
            assert!(held <= 2 * 100);
            assert_eq!(held, cache.positions().iter().map(Vec::len).sum::<usize>());
        }
    }
}
