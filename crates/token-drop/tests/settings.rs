//! Invalid settings are errors at construction that name the setting. Invalid calls are errors that
//! name the argument and change nothing.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use longctx_core::{AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Result};
use token_drop::*;

fn message<T>(made: Result<T>) -> String {
    made.err().expect("an error").to_string()
}

fn k_norm(budget: Budget) -> Result<PolicyCache<DenseStore, KNorm>> {
    PolicyCache::new(spec(), store(DType::F32), KNorm, budget)
}

#[test]
fn budgets() {
    assert!(message(k_norm(Budget::Tokens(0))).contains("budget"));
    for ratio in [0.0, 1.0, -0.5, f64::NAN] {
        assert!(message(k_norm(Budget::Ratio(ratio))).contains("ratio"));
    }
    let sinks = PolicyCache::recent(spec(), store(DType::F32), 9, Budget::Tokens(8));
    assert!(message(sinks).contains("at least the 9 protected tokens"));
    let cache = || k_norm(Budget::Tokens(8)).unwrap();
    let extra = Protected { sinks: 4, recent: 5, recent_share: 0.0 };
    assert!(message(cache().with_protected(extra)).contains("at least the 9 protected tokens"));
    let share = Protected { recent_share: 1.5, ..Default::default() };
    assert!(message(cache().with_protected(share)).contains("recent share"));
    let window = SnapKv::new(32).unwrap();
    let window = PolicyCache::snap_kv(spec(), store(DType::F32), window, Budget::Tokens(16));
    assert!(message(window).contains("at least the 32 protected tokens"));
    assert!(message(cache().with_decode_step(Some(0))).contains("step"));
    assert!(message(cache().with_granularity(Granularity::Chunk(0))).contains("chunk"));
    let safeguard = HeadBudgets::Adaptive { safeguard: 1.1 };
    assert!(message(cache().with_head_budgets(safeguard)).contains("safeguard"));
    let beta = LayerBudgets::Pyramid { beta: 0.5 };
    assert!(message(cache().with_layer_budgets(beta)).contains("beta"));
    let layer = PolicyCache::new(spec().at(4, 4), store(DType::F32), KNorm, Budget::Tokens(8));
    let pyramid = LayerBudgets::Pyramid { beta: 20.0 };
    assert!(message(layer.unwrap().with_layer_budgets(pyramid)).contains("layer"));
}

#[test]
fn budgets_of_heads() {
    let heads = |streaming: &[bool]| DuoAttention::new(streaming.to_vec(), 4, 8).unwrap();
    let make = |streaming: &[bool]| {
        PolicyCache::duo_attention(spec(), store(DType::F32), &heads(streaming))
    };
    assert!(message(make(&[true])).contains("one for each of 2 kv heads"));
    let mut cache = make(&[true, false]).unwrap();
    Input::random(50).feed(&mut cache, 0).unwrap();
    assert_eq!(cache.positions(0).unwrap().iter().map(Vec::len).collect::<Vec<_>>(), [12, 50]);
    let of_heads = |heads: Vec<Option<usize>>| k_norm(Budget::Heads(heads));
    assert!(message(of_heads(vec![Some(0), None])).contains("at least 1 token"));
    let cache = || of_heads(vec![Some(9), None]).unwrap();
    assert!(message(cache().with_head_budgets(HeadBudgets::ADA_KV)).contains("heads can share"));
    let pyramid = LayerBudgets::Pyramid { beta: 20.0 };
    assert!(message(cache().with_layer_budgets(pyramid)).contains("layers or heads can share"));
    assert!(message(cache().with_rerotation()).contains("head budgets"));
    assert!(message(cache().with_granularity(Granularity::Chunk(4))).contains("head budgets"));
    let adaptive = k_norm(Budget::Tokens(8)).unwrap().with_head_budgets(HeadBudgets::ADA_KV);
    assert!(message(adaptive.unwrap().with_rerotation()).contains("head budgets"));
}

#[test]
fn policies_of_their_own() {
    assert!(message(SnapKv::new(0)).contains("window"));
    assert!(message(SnapKv::new(8).unwrap().with_kernel(4)).contains("kernel"));
    assert!(message(Finch::new(0)).contains("window"));
    assert!(message(LagKv::new(4, 0)).contains("lag"));
    assert!(message(DuoAttention::new(vec![true], 4, 0)).contains("recent"));
    assert!(message(DuoAttention::new(Vec::new(), 4, 8)).contains("streaming"));
}

#[test]
fn layers_and_stores() {
    let shape = AttentionShape { window: Some(8), ..shape() };
    let windowed = DenseStore::new(shape, DType::F32).unwrap();
    let spec_of = |shape| LayerSpec { shape, ..spec() };
    let cache = PolicyCache::new(spec_of(shape), windowed, KNorm, Budget::Tokens(8));
    assert!(message(cache).contains("sliding window"));
    let other = AttentionShape::new(4, 4, DIM).unwrap();
    let cache = PolicyCache::new(spec_of(other), store(DType::F32), KNorm, Budget::Tokens(8));
    assert!(message(cache).contains("the store's shape"));
    let mut filled = store(DType::F32);
    let input = Input::random(3);
    let batch = Batch::single(0, 3).unwrap();
    longctx_core::KvStore::append(&mut filled, &batch, &input.k, &input.v).unwrap();
    let cache = PolicyCache::new(spec(), filled, KNorm, Budget::Tokens(8));
    assert!(message(cache).contains("an empty store"));
}

/// An engine that rotates queries and keys itself has the same outputs and keeps the same tokens.
/// Methods that rotate keys or read queries before the rotary embedding are refused.
#[test]
fn keys_that_come_rotated() {
    let text = Input::random(70);
    let calls = [40, 20, 1, 1, 1, 1, 1, 5];
    let rotated = LayerSpec::new(shape());
    for (name, make) in methods::<DenseStore>() {
        let cache = |spec: LayerSpec| make(spec, store(DType::F32), Budget::Tokens(20));
        let mut own = cache(spec()).unwrap();
        let refused = own.settings().rerotate || own.policy().needs().queries.is_some();
        let mut given = match cache(rotated.clone()) {
            Ok(given) => given,
            Err(error) => {
                assert!(refused && error.to_string().contains("rope"), "{name}: {error}");
                continue;
            }
        };
        assert!(!refused, "{name}");
        let a = feed_all(&mut own, 0, &text, &calls);
        let b = feed_all(&mut given, 0, &text.rotated(0), &calls);
        assert_eq!(own.positions(0).unwrap(), given.positions(0).unwrap(), "{name}");
        a.iter().zip(&b).for_each(|(a, b)| assert!(distance(a, b) < 1e-5, "{name}"));
    }
}

/// Invalid calls are errors and change no sequence.
#[test]
fn calls() {
    let one = Input::random(1);
    let mut not_finite = one.clone();
    not_finite.k = (not_finite.k * f64::NAN).unwrap();
    let wide = Tensor::zeros((1, KV_HEADS, DIM + 1), DType::F32, &Device::Cpu).unwrap();
    let bad = [
        (Input { k: Input::random(2).k, v: Input::random(2).v, ..one.clone() }, "k and v"),
        (Input { v: Input::random(2).v, ..one.clone() }, "tokens of v"),
        (Input { q: one.k.clone(), ..one.clone() }, "q: expected"),
        (Input { v: wide, ..one.clone() }, "v: expected"),
        (not_finite, "k: NaN at token 0, head 0"),
        (Input::random(2), "tokens of q"),
    ];
    for (name, mut cache) in caches(|| store(DType::F32)) {
        feed_batch(&mut cache, &[(0, Input::random(30)), (1, Input::random(7))]).unwrap();
        let held = |cache: &dyn KvCache| {
            let of = |seq| (cache.seen(seq), cache.held(seq), cache.seq_footprint(seq));
            (of(0), of(1), cache.footprint(), cache.seqs())
        };
        let before = held(&*cache);
        for seq in [0, 5] {
            let batch = Batch::single(seq, 1).unwrap();
            for (call, wrong) in &bad {
                let got = message(call.step(&batch, |step| cache.attend(step)));
                assert!(got.contains(wrong), "{name}: {got:?} does not name {wrong:?}");
                let got = message(call.step(&batch, |step| cache.append_prompt(step, None)));
                assert!(got.contains(wrong), "{name}: {got:?} does not name {wrong:?}");
            }
        }
        assert!(message(cache.fork(9, 10)).contains("9 is not known"), "{name}");
        assert!(message(cache.fork(0, 1)).contains("fork to"), "{name}");
        assert!(message(cache.truncate(9, 0)).contains("9 is not known"), "{name}");
        assert!(message(cache.truncate(1, 8)).contains("at most 7"), "{name}");
        assert!(!cache.remove(9));
        assert_eq!(held(&*cache), before, "{name}");
        one.feed(&mut cache, 0).unwrap();
        assert_eq!((cache.seen(0), cache.seen(1)), (31, 7), "{name}");
    }
}

/// An engine may ask for a request without a limit of tokens.
#[test]
fn a_request_of_any_length_can_be_asked_for() {
    let store = || DenseStore::with_capacity(shape(), DType::F32, 1 << 20).unwrap();
    for (name, mut cache) in caches(store) {
        Input::random(40).feed(&mut cache, 0).unwrap();
        for seq in [0, 1] {
            let fits = |tokens| cache.can_append(&Batch::single(seq, tokens).unwrap());
            assert_eq!(fits(u32::MAX as usize), fits(1 << 30), "{name}, sequence {seq}");
        }
    }
}

#[test]
fn streaming_heads_may_keep_any_number_of_sinks() {
    let heads = DuoAttention::new(vec![true, false], usize::MAX, 1).unwrap();
    let mut cache = PolicyCache::duo_attention(spec(), store(DType::F32), &heads).unwrap();
    Input::random(40).feed(&mut cache, 0).unwrap();
    assert_eq!(cache.store().lens(0), [40, 40]);
}
