//! When the cache evicts, and how many entries are kept.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use longctx_core::{DenseStore, KvCache, KvStore};
use token_drop::*;

fn cache(budget: usize) -> PolicyCache<DenseStore, KNorm> {
    PolicyCache::new(spec(), store(DType::F32), KNorm, Budget::Tokens(budget)).unwrap()
}

/// Returns the number of entries held after each call.
fn held_after_each(cache: &mut impl KvCache, calls: &[usize]) -> Vec<usize> {
    let text = Input::random(calls.iter().sum());
    let mut start = 0;
    calls
        .iter()
        .map(|&count| {
            text.narrow(start, count).feed(cache, 5).unwrap();
            start += count;
            cache.held(5)
        })
        .collect()
}

#[test]
fn decoding_evicts_a_step_of_tokens_at_a_time() {
    let calls = [&[50][..], &[1; 9]].concat();
    let of_step = |step| held_after_each(&mut cache(20).with_decode_step(step).unwrap(), &calls);
    assert_eq!(of_step(Some(1)), [20; 10]);
    assert_eq!(of_step(Some(4)), [20, 17, 18, 19, 20, 17, 18, 19, 20, 17]);
    assert_eq!(of_step(None), [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]);
}

#[test]
fn a_prefill_evicts_after_each_chunk_or_after_the_first_only() {
    let calls = [40, 30, 30];
    assert_eq!(held_after_each(&mut cache(20), &calls), [20, 20, 20]);
    let mut first = cache(20).with_prefill(Prefill::FirstCall);
    assert_eq!(held_after_each(&mut first, &calls), [20, 50, 80]);
}

#[test]
fn a_kept_prompt_stays_whole_and_the_budget_limits_later_tokens() {
    let kept = |budget| {
        PolicyCache::new(spec(), store(DType::F32), KNorm, budget)
            .and_then(|cache| cache.with_decode_step(Some(1))?.with_kept_prompt())
            .unwrap()
    };
    let calls = [&[30, 20][..], &[1; 12]].concat();
    let mut tokens = kept(Budget::Tokens(4));
    assert_eq!(held_after_each(&mut tokens, &calls)[..6], [30, 50, 51, 52, 53, 54]);
    let positions = tokens.positions(5).unwrap();
    for head in positions {
        assert_eq!((head.len(), &head[..50]), (54, &(0..50).collect::<Vec<u32>>()[..]));
    }
    let halves = held_after_each(&mut kept(Budget::Ratio(0.5)), &calls);
    assert_eq!(halves[1..], [50, 51, 51, 51, 52, 52, 53, 53, 54, 54, 55, 55, 56]);
    let cache = PolicyCache::new(spec(), store(DType::F32), KNorm, Budget::Tokens(4)).unwrap();
    let never = cache.with_decode_step(None).unwrap().with_kept_prompt();
    assert!(never.unwrap_err().to_string().contains("decode step"));
}

#[test]
fn layers_hold_their_budgets_of_the_pyramid() {
    let held = |layer| {
        let spec = spec().at(layer, 3);
        let cache = PolicyCache::new(spec, store(DType::F32), KNorm, Budget::Tokens(40)).unwrap();
        let pyramid = LayerBudgets::Pyramid { beta: 4.0 };
        held_after_each(&mut cache.with_layer_budgets(pyramid).unwrap(), &[200])
    };
    // From 2 x 40 - 10 down to a quarter of 40.
    assert_eq!([held(0), held(1), held(2)], [[70], [40], [10]]);
}

/// The first head's keys are a tenth as long, so all of them have higher scores by norm. It
/// receives the whole budget except the second head's safeguard, a fifth of that head's equal
/// share.
#[test]
fn a_head_with_a_smaller_budget_frees_memory() {
    let mut text = Input::random(200);
    let (winner, loser) = (text.k.narrow(1, 0, 1).unwrap(), text.k.narrow(1, 1, 1).unwrap());
    text.k = candle_core::Tensor::cat(&[(winner * 0.1).unwrap(), loser], 1).unwrap();
    let cache = PolicyCache::new(spec(), store(DType::F16), KNorm, Budget::Tokens(50)).unwrap();
    let mut cache = cache.with_head_budgets(HeadBudgets::ADA_KV).unwrap();
    text.feed(&mut cache, 0).unwrap();
    assert_eq!(cache.store().lens(0), [90, 10]);
    let held = cache.store().seq_footprint(0);
    let entry = 2 * DIM * 2;
    assert_eq!(held.payload, 100 * entry);
    // Blocks of 32 entries: three for the one head, one for the other.
    assert_eq!(held.payload + held.slack, 4 * 32 * entry);
}

fn zeros(heads: usize, len: usize) -> Tensor {
    Tensor::zeros((heads, len), DType::F32, &Device::Cpu).unwrap()
}

/// A policy that observes several queries whose tokens are not kept.
#[derive(Debug)]
struct Forgetful;

impl EvictionPolicy for Forgetful {
    fn needs(&self) -> Needs {
        let newest = ObservedQueries::Newest { queries: 4, by_position: false };
        Needs { attention: Some(newest), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> longctx_core::Result<Tensor> {
        Ok(zeros(view.kv_heads.len(), view.entries))
    }
}

/// A policy that returns one score too few.
#[derive(Debug)]
struct Miscounting;

impl EvictionPolicy for Miscounting {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn score(&self, view: &LayerView<'_>) -> longctx_core::Result<Tensor> {
        Ok(zeros(view.kv_heads.len(), view.entries - 1))
    }
}

#[test]
fn errors_of_a_policy_are_named_and_change_nothing() {
    let made = PolicyCache::new(spec(), store(DType::F32), Forgetful, Budget::Tokens(8));
    let error = made.unwrap_err().to_string();
    assert!(error.contains("at least the 4 tokens whose queries are observed"));
    let made = PolicyCache::new(spec(), store(DType::F32), Miscounting, Budget::Tokens(8));
    let mut cache = made.unwrap().with_decode_step(Some(1)).unwrap();
    let error = Input::random(20).feed(&mut cache, 0).unwrap_err().to_string();
    assert!(error.contains("a policy's scores") && error.contains("[2, 20]"), "{error}");
    assert!(cache.seqs().is_empty() && cache.store().seqs().is_empty());
    // Also during decoding, when the token is already in the store.
    Input::random(8).feed(&mut cache, 0).unwrap();
    assert!(Input::random(1).feed(&mut cache, 0).is_err());
    assert_eq!((cache.seen(0), cache.store().lens(0)), (8, vec![8, 8]));
    assert_eq!(cache.positions(0).unwrap(), [(0..8).collect::<Vec<_>>(), (0..8).collect()]);
}
