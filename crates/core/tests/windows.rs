//! A window over any store against the exact cache, whose attention is computed differently.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use longctx_core::*;
use proptest::prelude::*;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const D: usize = 8;

fn spec(window: usize) -> LayerSpec {
    let shape = AttentionShape {
        window: Some(window),
        soft_cap: Some(5.0),
        ..AttentionShape::new(HEADS, KV_HEADS, D).unwrap()
    };
    let rope = Rope::new(D, D, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(shape).with_rope(Arc::new(rope))
}

/// Returns numbers that depend only on the sequence, the token and the channel.
fn rows(parts: &[(SeqId, usize, usize)], heads: usize, salt: u64) -> Tensor {
    let number = |seq: SeqId, i: usize| {
        let x = (seq * 7919 + salt * 104_729 + i as u64).wrapping_mul(2_654_435_761);
        (x % 2003) as f32 / 1001.0 - 1.0
    };
    let of = |&(seq, from, count): &(SeqId, usize, usize)| {
        (from * heads * D..(from + count) * heads * D).map(move |i| number(seq, i))
    };
    let data: Vec<f32> = parts.iter().flat_map(of).collect();
    Tensor::from_vec(data.clone(), (data.len() / heads / D, heads, D), &Device::Cpu).unwrap()
}

/// Feeds the next tokens of each sequence.
fn feed(cache: &mut dyn KvCache, parts: &[(SeqId, usize)]) -> Tensor {
    let at: Vec<_> = parts.iter().map(|&(seq, n)| (seq, cache.seen(seq), n)).collect();
    let batch = Batch::new(parts).unwrap();
    let (q, k, v) = (rows(&at, HEADS, 1), rows(&at, KV_HEADS, 2), rows(&at, KV_HEADS, 3));
    cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn windowed(window: usize, step: usize) -> WindowCache<DenseStore> {
    let store = DenseStore::new(spec(window).shape, DType::F32).unwrap();
    WindowCache::new(spec(window), store, step).unwrap()
}

/// A call feeds tokens to each of three sequences; a rollback truncates a few.
#[derive(Debug, Clone)]
enum Operation {
    Feed([usize; 3]),
    RollBack(SeqId, usize),
    Fork(SeqId, SeqId),
    Remove(SeqId),
}

fn operation() -> impl Strategy<Value = Operation> {
    let tokens = || prop_oneof![3 => Just(1usize), 2 => Just(0), 1 => 2..40usize];
    prop_oneof![
        6 => (tokens(), tokens(), tokens()).prop_map(|(a, b, c)| Operation::Feed([a, b, c])),
        1 => (0..3u64, 1..6usize).prop_map(|(seq, n)| Operation::RollBack(seq, n)),
        1 => (0..3u64, 0..3u64).prop_map(|(from, to)| Operation::Fork(from, to)),
        1 => (0..3u64).prop_map(Operation::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_window_over_a_store_attends_as_the_exact_cache(
        window in 1..24usize,
        step in 1..9usize,
        operations in proptest::collection::vec(operation(), 1..40),
    ) {
        let mut cache = windowed(window, step);
        let mut exact = DenseCache::new(spec(window), DType::F32).unwrap();
        for operation in operations {
            match operation {
                Operation::Feed(tokens) => {
                    let parts: Vec<_> = (0..).zip(tokens).filter(|part| part.1 > 0).collect();
                    if parts.is_empty() {
                        continue;
                    }
                    let error = distance(&feed(&mut cache, &parts), &feed(&mut exact, &parts));
                    prop_assert!(error < 1e-5, "{error}");
                }
                Operation::RollBack(seq, n) => {
                    let len = cache.seen(seq).saturating_sub(n);
                    // The exact cache holds more entries beyond its window.
                    if cache.truncate(seq, len).is_ok() {
                        exact.truncate(seq, len).unwrap();
                    }
                }
                Operation::Fork(from, to) => {
                    prop_assert_eq!(cache.fork(from, to).is_ok(), exact.fork(from, to).is_ok());
                }
                Operation::Remove(seq) => {
                    prop_assert_eq!(cache.remove(seq), exact.remove(seq));
                }
            }
            prop_assert_eq!(cache.seqs(), exact.seqs());
            for seq in cache.seqs() {
                prop_assert!(cache.held(seq) < window + step);
            }
        }
    }
}

#[test]
fn a_window_holds_the_entries_that_later_tokens_see() {
    let mut cache = windowed(16, 4);
    feed(&mut cache, &[(3, 500)]);
    assert_eq!((cache.seen(3), cache.held(3)), (500, 16));
    // Rolled back as far as the window of the next token stays full, and no further.
    for _ in 0..3 {
        feed(&mut cache, &[(3, 1)]);
    }
    cache.truncate(3, 500).unwrap();
    let message = cache.truncate(3, 498).unwrap_err().to_string();
    assert!(message.contains("484 were dropped"), "{message}");
    assert_eq!((cache.seen(3), cache.held(3)), (500, 16));
}

#[test]
fn layers_and_stores_that_do_not_fit_are_refused() {
    let store = || DenseStore::new(spec(16).shape, DType::F32).unwrap();
    let message = |spec, step| WindowCache::new(spec, store(), step).unwrap_err().to_string();
    let shape = AttentionShape { window: None, ..spec(16).shape };
    assert!(message(LayerSpec::new(shape), 1).contains("window of the layer"));
    assert!(message(spec(17), 1).contains("the store's shape"));
    assert!(message(spec(16), 0).contains("step"));
}
