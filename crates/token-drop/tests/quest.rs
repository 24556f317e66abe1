//! Quest against a plain implementation: bounds from the text's own keys, and attention over the
//! tokens of the best pages.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use longctx_core::{AttentionShape, DenseCache, DenseStore, KvCache, LayerSpec};
use token_drop::Quest;

const PAGE: usize = 8;

fn quest(pages: usize) -> Quest<DenseStore> {
    Quest::with_page_size(spec(), store(DType::F32), pages * PAGE, PAGE).unwrap()
}

/// Returns the positions that the newest token of a text reads, for each kv head. Bounds are
/// rounded to f16.
fn plain_choice(text: &Input, pages: usize) -> Vec<Vec<u32>> {
    let len = text.tokens();
    let rotated = text.rotated(0);
    let head = |x: &Tensor, head| x.narrow(1, head, 1).unwrap().squeeze(1).unwrap();
    let q = |h| head(&rotated.q, h).to_vec2::<f32>().unwrap().remove(len - 1);
    let choose = |kv_head: usize| {
        let keys = head(&rotated.k, kv_head).to_dtype(DType::F16).unwrap();
        let keys = keys.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        let group: Vec<_> =
            (0..HEADS / KV_HEADS).map(|g| q(kv_head * HEADS / KV_HEADS + g)).collect();
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
    let text = Input::random(130);
    let mut cache = quest(4);
    text.narrow(0, 99).feed(&mut cache, 1).unwrap();
    for token in 99..130 {
        let so_far = text.narrow(0, token + 1);
        let expected = attention_over(&so_far, &plain_choice(&so_far, 4), false);
        let out = text.narrow(token, 1).feed(&mut cache, 1).unwrap();
        assert!(distance(&out, &expected) < 1e-5, "token {token}");
    }
    let held = cache.footprint();
    assert_eq!(held.payload, 130 * KV_HEADS * DIM * 2 * 4);
    // 17 pages of two keys in f16.
    assert!(held.bookkeeping >= 17 * KV_HEADS * 2 * DIM * 2);
}

#[test]
fn a_budget_for_everything_changes_no_bit() {
    let text = Input::random(60);
    let calls = [20, 7, 1, 1, 30, 1];
    let mut dense = DenseCache::new(spec(), DType::F32).unwrap();
    let mut cache = quest(8);
    let (expected, outs) =
        (feed_all(&mut dense, 0, &text, &calls), feed_all(&mut cache, 0, &text, &calls));
    for (out, expected) in outs.iter().zip(&expected) {
        assert_eq!(bits(out), bits(expected));
    }
    cache.clear();
    assert_eq!((cache.seen(0), cache.footprint().total()), (0, 0));
}

#[test]
fn bad_settings_are_named() {
    let message =
        |made: longctx_core::Result<Quest<DenseStore>>| made.expect_err("an error").to_string();
    assert!(message(Quest::new(spec(), store(DType::F32), 15)).contains("budget"));
    assert!(message(Quest::with_page_size(spec(), store(DType::F32), 8, 0)).contains("page"));
    let shape = AttentionShape { window: Some(8), ..shape() };
    let windowed = DenseStore::new(shape, DType::F32).unwrap();
    let made = Quest::new(LayerSpec { shape, ..spec() }, windowed, 16);
    assert!(message(made).contains("sliding window"));
    let other = DenseStore::new(AttentionShape::new(4, 4, DIM).unwrap(), DType::F32).unwrap();
    assert!(message(Quest::new(spec(), other, 16)).contains("the store's shape"));
}
