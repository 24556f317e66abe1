//! TOVA's published code can evict the newest token; kvpress and this crate's default never do.

mod common;

use candle_core::{D, DType, Tensor};
use common::*;
use longctx_core::KvCache;
use token_drop::*;

/// Returns the tokens that the last query of a text attends to the most, averaged over all heads,
/// computed by a softmax over all scores.
fn max_attended(text: &Input, count: usize) -> Vec<u32> {
    let rotated = text.rotated(0);
    let by_head = |x: &Tensor| x.transpose(0, 1).unwrap().contiguous().unwrap();
    let q = by_head(&rotated.q.narrow(0, text.tokens() - 1, 1).unwrap());
    let (k, group) = (by_head(&rotated.k), HEADS / KV_HEADS);
    let repeated: Vec<_> = (0..HEADS).map(|h| k.narrow(0, h / group, 1).unwrap()).collect();
    let k = Tensor::cat(&repeated, 0).unwrap();
    let scores = (q.matmul(&k.t().unwrap()).unwrap() * f64::from(shape().scale)).unwrap();
    let weights = candle_nn::ops::softmax(&scores, D::Minus1).unwrap().mean(0).unwrap();
    let weights: Vec<f32> = weights.flatten_all().unwrap().to_vec1().unwrap();
    let mut order: Vec<_> = (0..text.tokens() as u32).collect();
    order.sort_by(|&a, &b| weights[b as usize].total_cmp(&weights[a as usize]));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// A text whose newest key has a negative product with every query.
fn text_that_ignores_its_end() -> Input {
    let mut text = Input::random(60);
    let (last, group) = (text.tokens() - 1, HEADS / KV_HEADS);
    let q = text.q.narrow(0, last, 1).unwrap();
    let away: Vec<_> = (0..KV_HEADS)
        .map(|h| {
            let queries = q.narrow(1, h * group, group).unwrap();
            (queries.sum_keepdim(1).unwrap() * -2.0).unwrap()
        })
        .collect();
    let away = Tensor::cat(&away, 1).unwrap();
    text.k = Tensor::cat(&[text.k.narrow(0, 0, last).unwrap(), away], 0).unwrap();
    text
}

#[test]
fn the_newest_token_can_be_evicted_as_in_the_published_code() {
    let text = text_that_ignores_its_end();
    let kept = |policy: Tova| {
        let (store, budget) = (store(DType::F32), Budget::Tokens(20));
        let mut cache = PolicyCache::tova(spec(), store, policy, budget).unwrap();
        text.feed(&mut cache, 0).unwrap();
        assert_eq!(cache.held(0), 20);
        cache.positions(0).unwrap()
    };
    let published = max_attended(&text, 20);
    assert!(!published.contains(&59));
    assert_eq!(kept(Tova::default().with_published_newest()), [published.clone(), published]);
    let own = [max_attended(&text, 19), vec![59]].concat();
    assert_eq!(kept(Tova::default()), [own.clone(), own]);
}
