//! H2O against its mask formulation in PyTorch (fixtures/make_h2o.py): kept positions and outputs
//! over a prefill and 64 decoded tokens.

mod common;

use candle_core::DType;
use common::{distance, fixture, rope, rows};
use longctx_core::{AttentionShape, Batch, DenseStore, KvCache, LayerSpec, Step};
use token_drop::*;

#[test]
fn equals_the_mask_formulation_over_a_prefill_and_64_decoded_tokens() {
    let tensors = fixture("h2o.safetensors");
    for heads in [2, 4] {
        let shape = AttentionShape::new(heads, 2, 16).unwrap();
        let tensor = |name: &str| &tensors[&format!("{heads}x2.{name}")];
        let kept = tensor("kept").to_vec3::<i64>().unwrap();
        let store = DenseStore::new(shape, DType::F32).unwrap();
        let spec = LayerSpec::new(shape).with_rope(rope(16));
        let budget = Budget::Ratio(0.25);
        let mut cache = PolicyCache::h2o(spec, store, H2o::default(), budget).unwrap();
        let mut start = 0;
        for (step, kept) in kept.iter().enumerate() {
            let tokens = if step == 0 { 96 } else { 1 };
            let of = |name| rows(tensor(name)).narrow(0, start, tokens).unwrap();
            let (q, k, v) = (of("q"), of("k"), of("v"));
            let batch = Batch::single(3, tokens).unwrap();
            let out = cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v });
            assert!(distance(&out.unwrap(), &of("out")) < 1e-5, "{heads} heads, step {step}");
            for (positions, kept) in cache.positions(3).unwrap().iter().zip(kept) {
                let positions: Vec<i64> = positions.iter().map(|&p| p.into()).collect();
                assert_eq!(&positions, kept, "{heads} heads, step {step}");
            }
            start += tokens;
        }
        assert_eq!(start, 160);
    }
}
