//! When the frame compresses, and by how much.

mod common;

use candle_core::DType;
use common::*;
use longctx_core::{EvictionPolicy, Held, KvCache, KvStore, Mass, Needs};
use token_drop::*;

fn cache(budget: usize) -> PolicyCache<longctx_core::DenseStore, KNorm> {
    PolicyCache::new(store(DType::F32), KNorm, Budget::Tokens(budget)).unwrap()
}

/// What is held after each call.
fn helds(cache: &mut impl KvCache, calls: &[usize]) -> Vec<usize> {
    let text = Input::random(1, calls.iter().sum());
    let mut start = 0;
    calls
        .iter()
        .map(|&count| {
            text.narrow(2, start, count).feed(cache).unwrap();
            start += count;
            cache.held()
        })
        .collect()
}

#[test]
fn decoding_gives_up_a_step_of_tokens_at_a_time() {
    let calls = [&[50][..], &[1; 9]].concat();
    let of_step = |step| helds(&mut cache(20).with_decode_step(step).unwrap(), &calls);
    assert_eq!(of_step(Some(1)), [20; 10]);
    assert_eq!(of_step(Some(4)), [20, 17, 18, 19, 20, 17, 18, 19, 20, 17]);
    assert_eq!(of_step(None), [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]);
}

#[test]
fn each_chunk_of_a_prompt_is_compressed_or_the_first_alone() {
    let calls = [40, 30, 30];
    assert_eq!(helds(&mut cache(20), &calls), [20, 20, 20]);
    let mut first = cache(20).with_prefill(Prefill::FirstCall);
    assert_eq!(helds(&mut first, &calls), [20, 50, 80]);
}

/// A ratio is of the prompt so far; decoded tokens do not raise it.
#[test]
fn a_ratio_grows_with_the_prompt_alone() {
    let ratio = Budget::Ratio(0.25);
    let mut cache = PolicyCache::new(store(DType::F32), KNorm, ratio).unwrap();
    cache = cache.with_decode_step(Some(1)).unwrap();
    assert_eq!(helds(&mut cache, &[40, 60, 1, 1, 1]), [10, 25, 25, 25, 25]);
}

#[test]
fn layers_hold_what_the_pyramid_gives_them() {
    let held = |layer| {
        let policy = PyramidKv::new(KNorm, layer, 3, 4.0).unwrap();
        let budget = Budget::Tokens(40);
        helds(&mut PolicyCache::new(store(DType::F32), policy, budget).unwrap(), &[200])
    };
    // From 2 x 40 - 10 down to a quarter of 40.
    assert_eq!([held(0), held(1), held(2)], [[70], [40], [10]]);
}

/// Keys of a tenth of the length are the best by their norm: one head takes all but the other's safeguard, a fifth of its budget.
#[test]
fn a_head_frees_what_it_loses_to_another() {
    let mut text = Input::random(1, 200);
    let (winner, loser) = (text.k.narrow(1, 0, 1).unwrap(), text.k.narrow(1, 1, 1).unwrap());
    text.k = candle_core::Tensor::cat(&[(winner * 0.1).unwrap(), loser], 1).unwrap();
    let policy = AdaKv::new(KNorm);
    let mut cache = PolicyCache::new(store(DType::F16), policy, Budget::Tokens(50)).unwrap();
    text.feed(&mut cache).unwrap();
    assert_eq!(cache.store().lens(), [90, 10]);
    let held = cache.store().footprint();
    let entry = 2 * DIM * 2;
    assert_eq!(held.payload, 100 * entry);
    // A head has room for fewer than 16 entries more than it holds.
    assert!(held.total() < (100 + 2 * 16) * entry, "{held:?}");
}

/// A policy that looks at several queries, whose tokens it does not keep.
#[derive(Debug)]
struct Forgetful;

impl EvictionPolicy for Forgetful {
    fn needs(&self) -> Needs {
        let mass = Mass::Newest { queries: 4, by_position: false };
        Needs { mass: Some(mass), ..Default::default() }
    }

    fn score(&self, held: &Held<'_>) -> longctx_core::Result<Vec<Vec<f32>>> {
        Ok(held.heads.iter().map(|head| vec![0.0; head.positions.len()]).collect())
    }
}

/// A policy that gives one score too few.
#[derive(Debug)]
struct Miscounting;

impl EvictionPolicy for Miscounting {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn score(&self, held: &Held<'_>) -> longctx_core::Result<Vec<Vec<f32>>> {
        Ok(held.heads.iter().map(|head| vec![0.0; head.positions.len() - 1]).collect())
    }
}

#[test]
fn what_is_wrong_with_a_policy_is_named() {
    let error = PolicyCache::new(store(DType::F32), Forgetful, Budget::Tokens(8)).unwrap_err();
    assert!(error.to_string().contains("at least the 4 tokens whose queries are observed"));
    let mut cache = PolicyCache::new(store(DType::F32), Miscounting, Budget::Tokens(8)).unwrap();
    let error = Input::random(1, 20).feed(&mut cache).unwrap_err().to_string();
    assert!(error.contains("a policy's scores") && error.contains("[20, 20]"), "{error}");
}
