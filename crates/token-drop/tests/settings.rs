//! Settings that no cache can work with are errors at construction, each naming the setting.

mod common;

use candle_core::DType;
use common::*;
use longctx_core::{AttentionShape, DenseStore, Protected, Result};
use token_drop::*;

fn message<T>(made: Result<T>) -> String {
    made.err().expect("an error").to_string()
}

#[test]
fn budgets() {
    let make = |budget| PolicyCache::new(store(DType::F32), KNorm, budget);
    assert!(message(make(Budget::Tokens(0))).contains("budget"));
    for ratio in [0.0, 1.0, -0.5, f64::NAN] {
        assert!(message(make(Budget::Ratio(ratio))).contains("ratio"));
    }
    let sinks = PolicyCache::new(store(DType::F32), Recent::with_sinks(9), Budget::Tokens(8));
    assert!(message(sinks).contains("at least the 9 protected tokens"));
    let extra = make(Budget::Tokens(8)).unwrap().with_protected(Protected { sinks: 4, recent: 5 });
    assert!(message(extra).contains("at least the 9 protected tokens"));
    let window = PolicyCache::new(store(DType::F32), SnapKv::new(32).unwrap(), Budget::Tokens(16));
    assert!(message(window).contains("at least the 32 protected tokens"));
    assert!(message(make(Budget::Tokens(8)).unwrap().with_decode_step(Some(0))).contains("step"));
}

#[test]
fn policies_of_their_own() {
    assert!(message(SnapKv::new(0)).contains("window"));
    assert!(message(SnapKv::new(8).unwrap().with_kernel(4)).contains("kernel"));
    assert!(message(H2o::default().with_heavy_share(f64::NAN)).contains("heavy share"));
}

#[test]
fn layers_and_inputs() {
    let mut windowed = shape();
    windowed.window = Some(8);
    let store_of = |shape| DenseStore::new(shape, DType::F32).unwrap();
    let cache = PolicyCache::new(store_of(windowed), KNorm, Budget::Tokens(8));
    assert!(message(cache).contains("sliding window"));
    let mut cache = PolicyCache::new(store(DType::F32), KNorm, Budget::Tokens(8)).unwrap();
    Input::random(1, 20).feed(&mut cache).unwrap();
    assert!(message(Input::random(2, 1).feed(&mut cache)).contains("batch"));
    let mut other = PolicyCache::new(
        store_of(AttentionShape::new(HEADS, KV_HEADS, 64).unwrap()),
        KNorm,
        Budget::Tokens(8),
    )
    .unwrap();
    assert!(message(Input::random(1, 4).feed(&mut other)).contains("64"));
}
