//! Settings that no cache can work with are errors at construction, each naming the setting.

mod common;

use candle_core::DType;
use common::*;
use longctx_core::{AttentionShape, DenseStore, EvictionPolicy, KvCache, Protected, Result, Step};
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

/// A budget that would be ignored is an error, and so is none where there must be one.
#[test]
fn a_policy_that_bounds_its_heads_takes_no_other_budget() {
    let duo = || DuoAttention::new(vec![true, false], 4, 8).unwrap();
    let make = |budget| PolicyCache::new(store(DType::F32), duo(), budget);
    for budget in [Budget::Tokens(100), Budget::Ratio(0.5)] {
        assert!(message(make(budget)).contains("bounds its heads itself"));
    }
    let mut cache = make(Budget::Policy).unwrap();
    Input::random(1, 50).feed(&mut cache).unwrap();
    assert_eq!(cache.positions().iter().map(Vec::len).collect::<Vec<_>>(), [12, 50]);
    let wrapped = |budget| PolicyCache::new(store(DType::F32), AdaKv::new(duo()), budget);
    assert!(message(wrapped(Budget::Tokens(100))).contains("bounds its heads itself"));
    let boxed: Box<dyn EvictionPolicy> = Box::new(duo());
    assert!(PolicyCache::new(store(DType::F32), boxed, Budget::Policy).is_ok());
    let others: [Box<dyn EvictionPolicy>; 3] =
        [Box::new(KNorm), Box::new(AdaKv::new(KNorm)), Box::new(H2o::default())];
    for policy in others {
        let made = PolicyCache::new(store(DType::F32), policy, Budget::Policy);
        assert!(message(made).contains("tokens or a ratio"));
    }
}

#[test]
fn policies_of_their_own() {
    assert!(message(SnapKv::new(0)).contains("window"));
    assert!(message(SnapKv::new(8).unwrap().with_kernel(4)).contains("kernel"));
    assert!(message(H2o::default().with_heavy_share(f64::NAN)).contains("heavy share"));
    assert!(message(Finch::new(0)).contains("window"));
    assert!(message(LagKv::new(4, 0)).contains("lag"));
    assert!(message(ChunkKv::new(KNorm, 0)).contains("chunk"));
    assert!(message(DuoAttention::new(vec![true], 4, 0)).contains("recent"));
    assert!(message(DuoAttention::new(Vec::new(), 4, 8)).contains("streaming"));
}

#[test]
fn layers() {
    let mut windowed = shape();
    windowed.window = Some(8);
    let store_of = |shape| DenseStore::new(shape, DType::F32).unwrap();
    let cache = PolicyCache::new(store_of(windowed), KNorm, Budget::Tokens(8));
    assert!(message(cache).contains("sliding window"));
}

/// Calls that fit no cache are named, and change nothing.
#[test]
fn calls() {
    let sizes = InfLlmSettings {
        init: 2,
        local: 12,
        block: 4,
        top_blocks: 2,
        resident_blocks: 2,
        representatives: 2,
        chunk: 8,
    };
    let policy = PolicyCache::new(store(DType::F32), Tova::default(), Budget::Tokens(8)).unwrap();
    let caches: [Box<dyn KvCache>; 4] = [
        Box::new(policy),
        Box::new(StreamingLlm::new(2, 6, store(DType::F32)).unwrap()),
        Box::new(InfLlm::<f32>::new(sizes, shape()).unwrap()),
        Box::new(Quest::<f32>::new(16, shape()).unwrap()),
    ];
    let one = Input::random(1, 1);
    let bad = [
        (Input { k: Input::random(1, 2).k, v: Input::random(1, 2).v, ..one.clone() }, "k and v"),
        (Input { v: Input::random(1, 2).v, ..one.clone() }, "v: expected"),
        (Input { q: one.k.clone(), ..one.clone() }, "q: expected"),
        (one.narrow(2, 0, 0), "at least 1"),
        (Input::random(2, 1), "batch"),
    ];
    for (i, mut cache) in caches.into_iter().enumerate() {
        Input::random(1, 20).feed(&mut cache).unwrap();
        let before = (cache.seen(), cache.held(), cache.footprint());
        for (call, name) in &bad {
            let got = message(call.feed(&mut cache));
            assert!(got.contains(name), "cache {i}: {got:?} does not name {name:?}");
        }
        let other = AttentionShape { scale: 1.0, ..shape() };
        let rope = rope();
        let step = Step { q: &one.q, k: &one.k, v: &one.v, shape: &other, rope: &rope };
        assert!(message(cache.attend(&step)).contains("shape"), "cache {i}");
        assert_eq!((cache.seen(), cache.held(), cache.footprint()), before, "cache {i}");
        one.feed(&mut cache).unwrap();
        assert_eq!(cache.seen(), 21, "cache {i}");
    }
}
