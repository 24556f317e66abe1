//! Kept positions against kvpress 0.5.5, per layer and kv head, for the same projections (fixtures/make_kvpress.py).

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use common::distance;
use longctx_core::{
    AttentionShape, DenseStore, EvictionPolicy, KvCache, KvStore, Rope, RopeScaling, Step,
};
use token_drop::*;

const LAYERS: usize = 3;
const TOKENS: usize = 320;

struct Fixture {
    tensors: HashMap<String, Tensor>,
    shape: AttentionShape,
    rope: Rope,
}

impl Fixture {
    fn load() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kvpress.safetensors");
        let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let shape = AttentionShape::new(4, 2, 16).unwrap();
        let rope = Rope::new(16, 16, 10_000.0, RopeScaling::None).unwrap();
        Self { tensors, shape, rope }
    }

    fn kept(&self, name: &str, layer: usize) -> Vec<Vec<u32>> {
        let head = |head| {
            let kept = self.tensors[&format!("{name}.{layer}.{head}")].to_vec1::<i64>().unwrap();
            kept.into_iter().map(|p| p as u32).collect()
        };
        (0..2).map(head).collect()
    }

    fn prefill(&self, cache: &mut impl KvCache, layer: usize) {
        let tensor = |x| &self.tensors[&format!("{x}.{layer}")];
        let (q, k, v) = (tensor("q"), tensor("k"), tensor("v"));
        cache.attend(&Step { q, k, v, shape: &self.shape, rope: &self.rope }).unwrap();
    }

    fn store(&self) -> DenseStore {
        DenseStore::new(self.shape, DType::F32).unwrap()
    }

    fn compare<P: EvictionPolicy>(&self, name: &str, policy: impl Fn(usize) -> P) {
        for layer in 0..LAYERS {
            let mut cache =
                PolicyCache::new(self.store(), policy(layer), Budget::Ratio(0.5)).unwrap();
            self.prefill(&mut cache, layer);
            assert_eq!(cache.positions(), self.kept(name, layer), "{name}, layer {layer}");
        }
    }
}

fn snap_kv() -> SnapKv {
    SnapKv::new(16).unwrap()
}

#[test]
fn policies_keep_the_positions_that_kvpress_keeps() {
    let fixture = Fixture::load();
    fixture.compare("snap_kv", |_| snap_kv());
    fixture.compare("tova", |_| Tova::default());
    fixture.compare("k_norm", |_| KNorm);
    fixture.compare("key_diff", |_| KeyDiff);
    fixture.compare("expected_attention", |_| ExpectedAttention::default());
    fixture.compare("lag_kv", |_| LagKv::new(4, 32).unwrap());
    fixture.compare("streaming_llm", |_| Recent::with_sinks(4));
    fixture.compare("finch", |_| Finch::new(16).unwrap());
}

#[test]
fn wrappers_keep_the_positions_that_kvpress_keeps() {
    let fixture = Fixture::load();
    let pyramid = |layer| PyramidKv::new(snap_kv(), layer, LAYERS, 3.0).unwrap();
    fixture.compare("pyramid_kv", pyramid);
    fixture.compare("ada_kv", |_| AdaKv::new(snap_kv()));
    fixture.compare("chunk_kv", |_| ChunkKv::new(KNorm, 20).unwrap());
    fixture.compare("rerotated", |_| Rerotated::new(snap_kv()));
}

/// The cache that places tokens anew keeps the same ones: its values are those at kvpress's positions.
#[test]
fn streaming_llm_keeps_the_positions_that_kvpress_keeps() {
    let fixture = Fixture::load();
    for layer in 0..LAYERS {
        let mut cache = StreamingLlm::new(4, TOKENS / 2 - 4, fixture.store()).unwrap();
        fixture.prefill(&mut cache, layer);
        for (head, kept) in fixture.kept("streaming_llm", layer).into_iter().enumerate() {
            let kept = Tensor::new(kept, &Device::Cpu).unwrap();
            let all = fixture.tensors[&format!("v.{layer}")].get(0).unwrap().get(head).unwrap();
            let expected = all.index_select(&kept, 0).unwrap();
            let (sinks, window) = (cache.sinks().read(0, head), cache.window().read(0, head));
            let values = Tensor::cat(&[sinks.unwrap().1, window.unwrap().1], 0).unwrap();
            assert_eq!(distance(&values, &expected), 0.0);
        }
    }
}

#[test]
fn keys_are_rerotated_as_in_kvpress() {
    let fixture = Fixture::load();
    let check = |name: &str, policy: Box<dyn EvictionPolicy>| {
        let mut cache = PolicyCache::new(fixture.store(), policy, Budget::Ratio(0.5)).unwrap();
        fixture.prefill(&mut cache, 0);
        for head in 0..2 {
            let expected = &fixture.tensors[&format!("{name}.keys")];
            let expected = expected.get(0).unwrap().get(head).unwrap();
            let (keys, _) = cache.store().read(0, head).unwrap();
            assert!(distance(&keys, &expected) < 1e-4, "{name}, head {head}");
        }
    };
    check("finch", Box::new(Finch::new(16).unwrap()));
    check("rerotated", Box::new(Rerotated::new(snap_kv())));
}
