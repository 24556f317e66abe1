//! Tensor parallelism: each rank has a cache for its own heads. If a policy scores each kv head by
//! its own group of query heads, the ranks together hold and return the same as one cache of all
//! heads.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use longctx_core::{AttentionShape, DenseStore, LayerSpec};
use token_drop::*;

/// Methods that compare the heads of a layer, or whose random numbers depend on the head's index.
const ACROSS_HEADS: [&str; 5] = ["random", "tova", "ada snap-kv", "ada h2o", "chunk h2o"];
const CALLS: [usize; 8] = [40, 9, 1, 1, 1, 1, 1, 1];

fn local_shape() -> AttentionShape {
    AttentionShape::new(HEADS / KV_HEADS, 1, DIM).unwrap()
}

/// The same layer of the model, with one kv head.
fn local_spec() -> LayerSpec {
    LayerSpec::new(local_shape()).with_rope(rope(DIM))
}

fn local_store() -> DenseStore {
    DenseStore::new(local_shape(), DType::F32).unwrap()
}

/// Returns the input of one kv head.
fn local(text: &Input, kv_head: usize) -> Input {
    let group = HEADS / KV_HEADS;
    let of = |x: &Tensor, first, count| x.narrow(1, first, count).unwrap().contiguous().unwrap();
    Input {
        q: of(&text.q, kv_head * group, group),
        k: of(&text.k, kv_head, 1),
        v: of(&text.v, kv_head, 1),
    }
}

fn check(name: &str, mut whole: Any<DenseStore>, ranks: Vec<Any<DenseStore>>) {
    let text = Input::seeded(5, CALLS.iter().sum());
    let wanted = feed_all(&mut whole, 0, &text, &CALLS);
    let mut outs = Vec::new();
    for (kv_head, mut rank) in ranks.into_iter().enumerate() {
        outs.push(feed_all(&mut rank, 0, &local(&text, kv_head), &CALLS));
        assert_eq!(
            rank.positions(0).unwrap()[0],
            whole.positions(0).unwrap()[kv_head],
            "{name}, kv head {kv_head}"
        );
    }
    for (call, wanted) in wanted.iter().enumerate() {
        let parts: Vec<_> = outs.iter().map(|outs| &outs[call]).collect();
        let got = Tensor::cat(&parts, 1).unwrap();
        assert!(distance(&got, wanted) < 1e-5, "{name}, call {call}");
    }
}

#[test]
fn caches_of_ranks_equal_one_cache_of_all_heads() {
    let mut checked = 0;
    for (name, make) in methods::<DenseStore>() {
        // DuoAttention's heads are set for each rank.
        if ACROSS_HEADS.contains(&name) || name == "duo" {
            continue;
        }
        let place = |spec: LayerSpec| spec.at(3, 4);
        let whole = make(place(spec()), store(DType::F32), Budget::Tokens(20)).unwrap();
        let rank = |_| make(place(local_spec()), local_store(), Budget::Tokens(20)).unwrap();
        check(name, whole, (0..KV_HEADS).map(rank).collect());
        checked += 1;
    }
    assert!(checked >= 11, "{checked} methods");
}

#[test]
fn each_rank_sets_the_streaming_heads_of_its_own_heads() {
    let streaming = [true, false];
    let duo = |heads: &[bool]| DuoAttention::new(heads.to_vec(), 4, 8).unwrap();
    let whole = PolicyCache::duo_attention(spec(), store(DType::F32), &duo(&streaming));
    let rank = |&head: &bool| {
        PolicyCache::duo_attention(local_spec(), local_store(), &duo(&[head])).unwrap().boxed()
    };
    check("duo", whole.unwrap().boxed(), streaming.iter().map(rank).collect());
}
