//! Kept positions against kvpress 0.5.5, per layer and kv head, for the same projections
//! (fixtures/make_kvpress.py).

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use common::{distance, fixture, rope, rows};
use longctx_core::{AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Result, Step};
use token_drop::*;

const LAYERS: usize = 3;
const TOKENS: usize = 320;

type Any = PolicyCache<DenseStore, Box<dyn EvictionPolicy>>;

struct Fixture {
    tensors: HashMap<String, Tensor>,
    shape: AttentionShape,
}

impl Fixture {
    fn load() -> Self {
        let shape = AttentionShape::new(4, 2, 16).unwrap();
        Self { tensors: fixture("kvpress.safetensors"), shape }
    }

    fn kept(&self, name: &str, layer: usize) -> Vec<Vec<u32>> {
        let head = |head| {
            let kept = self.tensors[&format!("{name}.{layer}.{head}")].to_vec1::<i64>().unwrap();
            kept.into_iter().map(|p| p as u32).collect()
        };
        (0..2).map(head).collect()
    }

    fn prefill(&self, cache: &mut impl KvCache, layer: usize) {
        let tensor = |x| rows(&self.tensors[&format!("{x}.{layer}")]);
        let (q, k, v) = (tensor("q"), tensor("k"), tensor("v"));
        let batch = Batch::single(0, TOKENS).unwrap();
        cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
    }

    fn spec(&self, layer: usize) -> LayerSpec {
        LayerSpec::new(self.shape).with_rope(rope(16)).at(layer, LAYERS)
    }

    fn store(&self) -> DenseStore {
        DenseStore::new(self.shape, DType::F32).unwrap()
    }

    fn compare(&self, name: &str, make: impl Fn(LayerSpec, DenseStore, Budget) -> Result<Any>) {
        for layer in 0..LAYERS {
            let mut cache = make(self.spec(layer), self.store(), Budget::Ratio(0.5)).unwrap();
            self.prefill(&mut cache, layer);
            assert_eq!(
                cache.positions(0).unwrap(),
                self.kept(name, layer),
                "{name}, layer {layer}"
            );
        }
    }
}

fn snap_kv(spec: LayerSpec, s: DenseStore, b: Budget) -> Result<PolicyCache<DenseStore, SnapKv>> {
    PolicyCache::snap_kv(spec, s, SnapKv::new(16)?, b)
}

fn finch(spec: LayerSpec, s: DenseStore, b: Budget) -> Result<Any> {
    Ok(PolicyCache::finch(spec, s, Finch::new(16)?, b)?.boxed())
}

fn rerotated(spec: LayerSpec, s: DenseStore, b: Budget) -> Result<Any> {
    Ok(snap_kv(spec, s, b)?.with_rerotation()?.boxed())
}

#[test]
fn policies_keep_the_positions_that_kvpress_keeps() {
    let fixture = Fixture::load();
    fixture.compare("snap_kv", |spec, s, b| Ok(snap_kv(spec, s, b)?.boxed()));
    fixture
        .compare("tova", |spec, s, b| Ok(PolicyCache::tova(spec, s, Tova::default(), b)?.boxed()));
    fixture.compare("k_norm", |spec, s, b| Ok(PolicyCache::new(spec, s, KNorm, b)?.boxed()));
    fixture.compare("key_diff", |spec, s, b| Ok(PolicyCache::new(spec, s, KeyDiff, b)?.boxed()));
    fixture.compare("expected_attention", |spec, s, b| {
        let policy = ExpectedAttention::default();
        Ok(PolicyCache::expected_attention(spec, s, policy, b)?.boxed())
    });
    fixture.compare("lag_kv", |spec, s, b| {
        Ok(PolicyCache::lag_kv(spec, s, LagKv::new(4, 32)?, b)?.boxed())
    });
    fixture.compare("streaming_llm", |spec, s, b| Ok(PolicyCache::recent(spec, s, 4, b)?.boxed()));
    fixture.compare("finch", finch);
}

#[test]
fn settings_keep_the_positions_that_kvpress_keeps() {
    let fixture = Fixture::load();
    fixture.compare("pyramid_kv", |spec, s, b| {
        let pyramid = LayerBudgets::Pyramid { beta: 3.0 };
        Ok(snap_kv(spec, s, b)?.with_layer_budgets(pyramid)?.boxed())
    });
    fixture.compare("ada_kv", |spec, s, b| {
        Ok(snap_kv(spec, s, b)?.with_head_budgets(HeadBudgets::ADA_KV)?.boxed())
    });
    fixture.compare("chunk_kv", |spec, s, b| {
        let k_norm = PolicyCache::new(spec, s, KNorm, b)?;
        Ok(k_norm.with_granularity(Granularity::Chunk(20))?.boxed())
    });
    fixture.compare("rerotated", rerotated);
}

/// StreamingLlm, which re-positions tokens, keeps the same tokens: its values are those at
/// kvpress's positions.
#[test]
fn streaming_llm_keeps_the_positions_that_kvpress_keeps() {
    let fixture = Fixture::load();
    for layer in 0..LAYERS {
        let (spec, store) = (fixture.spec(layer), fixture.store());
        let mut cache = StreamingLlm::new(spec, store, 4, TOKENS / 2 - 4).unwrap();
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
    let check = |name: &str, make: fn(LayerSpec, DenseStore, Budget) -> Result<Any>| {
        let mut cache = make(fixture.spec(0), fixture.store(), Budget::Ratio(0.5)).unwrap();
        fixture.prefill(&mut cache, 0);
        for head in 0..2 {
            let expected = &fixture.tensors[&format!("{name}.keys")];
            let expected = expected.get(0).unwrap().get(head).unwrap();
            let (keys, _) = cache.store().read(0, head).unwrap();
            assert!(distance(&keys, &expected) < 1e-4, "{name}, head {head}");
        }
    };
    check("finch", finch);
    check("rerotated", rerotated);
}
