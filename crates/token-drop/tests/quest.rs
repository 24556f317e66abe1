//! Quest against its rule computed plainly: bounds from the text's own keys, and attention over the tokens of the best pages.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use longctx_core::{AttentionShape, DenseCache, KvCache};
use token_drop::Quest;

const PAGE: usize = 8;

/// The positions that the newest token of a text reads, for each kv head.
fn plain_choice(text: &Input, pages: usize) -> Vec<Vec<u32>> {
    let len = text.tokens();
    let q = rope().apply(&text.q.narrow(2, len - 1, 1).unwrap(), len - 1).unwrap();
    let k = rope().apply(&text.k, 0).unwrap();
    let rows = |x: &Tensor, head| x.get(0).unwrap().get(head).unwrap().to_vec2::<f32>().unwrap();
    let choose = |head: usize| {
        let keys = rows(&k, head);
        let group = (0..HEADS / KV_HEADS).map(|g| rows(&q, head * HEADS / KV_HEADS + g).remove(0));
        let group: Vec<_> = group.collect();
        let bound = |page: &[Vec<f32>], q: &Vec<f32>| -> f32 {
            let best = |c: usize| page.iter().map(|key| key[c] * q[c]).fold(f32::MIN, f32::max);
            (0..DIM).map(best).sum()
        };
        let score = |page| group.iter().map(|q| bound(page, q)).fold(f32::MIN, f32::max);
        let scores: Vec<_> = keys.chunks(PAGE).map(score).collect();
        let newest = scores.len() - 1;
        let mut order: Vec<usize> = (0..newest).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(pages - 1);
        order.push(newest);
        order.sort_unstable();
        let tokens = |page: usize| (page * PAGE..((page + 1) * PAGE).min(len)).map(|p| p as u32);
        order.into_iter().flat_map(tokens).collect()
    };
    (0..KV_HEADS).map(choose).collect()
}

#[test]
fn a_token_reads_the_pages_of_the_highest_bounds() {
    let text = Input::random(1, 130);
    let mut cache = Quest::<f32>::with_page(4 * PAGE, PAGE, shape()).unwrap();
    text.narrow(2, 0, 99).feed(&mut cache).unwrap();
    for token in 99..130 {
        let so_far = text.narrow(2, 0, token + 1);
        let expected = attention_over(&so_far, &plain_choice(&so_far, 4), false);
        let out = text.narrow(2, token, 1).feed(&mut cache).unwrap();
        assert!(distance(&out, &expected) < 1e-5, "token {token}");
    }
    assert_eq!(cache.footprint().payload, 130 * KV_HEADS * DIM * 2 * 4);
}

#[test]
fn a_budget_for_everything_changes_no_bit() {
    let text = Input::random(2, 60);
    let calls = [20, 7, 1, 1, 30, 1];
    let mut dense = DenseCache::new(shape(), DType::F32).unwrap();
    let mut cache = Quest::<f32>::with_page(64, PAGE, shape()).unwrap();
    let (expected, outs) =
        (feed_all(&mut dense, &text, &calls), feed_all(&mut cache, &text, &calls));
    for (out, expected) in outs.iter().zip(&expected) {
        assert_eq!(bits(out), bits(expected));
    }
    cache.reset();
    assert_eq!((cache.seen(), cache.footprint().total()), (0, 0));
}

#[test]
fn bad_settings_and_inputs_are_named() {
    let message = |made: longctx_core::Result<Quest<f32>>| made.expect_err("an error").to_string();
    assert!(message(Quest::new(15, shape())).contains("budget"));
    assert!(message(Quest::with_page(8, 0, shape())).contains("page"));
    let windowed = AttentionShape { window: Some(8), ..shape() };
    assert!(message(Quest::new(16, windowed)).contains("sliding window"));
    let mut cache = Quest::<f32>::new(16, shape()).unwrap();
    Input::random(1, 20).feed(&mut cache).unwrap();
    assert!(Input::random(2, 1).feed(&mut cache).unwrap_err().to_string().contains("batch"));
    assert_eq!(cache.held(), 20);
}
