//! H2O against the mask formulation in plain PyTorch (fixtures/make_h2o.py): kept positions and outputs over a prefill and 64
//! decoded tokens.

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use common::distance;
use longctx_core::{AttentionShape, DenseStore, KvCache, Rope, RopeScaling, Step};
use token_drop::*;

#[test]
fn equals_the_mask_formulation_over_a_prefill_and_64_decoded_tokens() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/h2o.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let rope = Rope::new(16, 16, 10_000.0, RopeScaling::None).unwrap();
    for heads in [2, 4] {
        let shape = AttentionShape::new(heads, 2, 16).unwrap();
        let tensor = |name: &str| &tensors[&format!("{heads}x2.{name}")];
        let kept = tensor("kept").to_vec3::<i64>().unwrap();
        let store = DenseStore::new(shape, DType::F32).unwrap();
        let mut cache = PolicyCache::new(store, H2o::default(), Budget::Ratio(0.25)).unwrap();
        let mut start = 0;
        for (step, kept) in kept.iter().enumerate() {
            let tokens = if step == 0 { 96 } else { 1 };
            let of = |name| tensor(name).narrow(2, start, tokens).unwrap().contiguous().unwrap();
            let (q, k, v) = (of("q"), of("k"), of("v"));
            let out = cache.attend(&Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope });
            assert!(distance(&out.unwrap(), &of("out")) < 1e-5, "{heads} heads, step {step}");
            for (positions, kept) in cache.positions().iter().zip(kept) {
                let positions: Vec<i64> = positions.iter().map(|&p| p.into()).collect();
                assert_eq!(&positions, kept, "{heads} heads, step {step}");
            }
            start += tokens;
        }
        assert_eq!(start, 160);
    }
}
