//! InfLLM against its published code on the CPU (fixtures/make_inf_llm.py).

mod common;

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use common::{distance, fixture, rope, rows};
use longctx_core::{
    AttentionShape, Batch, DenseCache, DenseStore, KvCache, KvStore, LayerSpec, Step,
};
use token_drop::*;

const SIZES: InfLlmSettings = InfLlmSettings {
    init: 4,
    local: 32,
    block: 8,
    top_blocks: 2,
    resident_blocks: 3,
    representatives: 2,
    chunk: 16,
};

fn shape() -> AttentionShape {
    AttentionShape::new(4, 2, 16).unwrap()
}

fn spec() -> LayerSpec {
    LayerSpec::new(shape()).with_rope(rope(16))
}

fn store() -> DenseStore {
    DenseStore::new(shape(), DType::F32).unwrap()
}

fn inf_llm() -> InfLlm<DenseStore> {
    InfLlm::new(spec(), store(), store(), SIZES).unwrap()
}

/// Feeds sequence 9 the tokens from `start` on.
fn feed(
    cache: &mut impl KvCache,
    fixture: &HashMap<String, Tensor>,
    start: usize,
    tokens: usize,
) -> Tensor {
    let of = |name| rows(&fixture[name]).narrow(0, start, tokens).unwrap();
    let (q, k, v) = (of("q"), of("k"), of("v"));
    let batch = Batch::single(9, tokens).unwrap();
    cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap()
}

/// The fixture's lists, each padded with -1.
fn lists(x: &Tensor) -> Vec<Vec<usize>> {
    let rows = x.to_vec2::<i64>().unwrap();
    rows.into_iter()
        .map(|row| row.into_iter().filter_map(|i| i.try_into().ok()).collect())
        .collect()
}

fn compare(name: &str, cache: impl Fn() -> InfLlm<DenseStore>) {
    let fixture = fixture("inf_llm.safetensors");
    let out = rows(&fixture[&format!("{name}.out")]);
    let calls = fixture["calls"].to_vec1::<i64>().unwrap();
    let residents = lists(&fixture[&format!("{name}.resident")]);
    let mut whole = cache();
    let mut start = 0;
    for (call, (&tokens, resident)) in calls.iter().zip(residents).enumerate() {
        let tokens = tokens as usize;
        let own = feed(&mut whole, &fixture, start, tokens);
        let error = distance(&own, &out.narrow(0, start, tokens).unwrap());
        assert!(error < 1e-4, "{name}, call {call}: off by {error}");
        assert_eq!(whole.resident(9), resident, "{name}, call {call}");
        start += tokens;
    }
    let blocks = fixture[&format!("{name}.blocks")].to_vec1::<i64>().unwrap();
    assert_eq!(whole.blocks(9) as i64, blocks[0]);
    // Feeds chunk by chunk, to compare the blocks that each chunk retrieved.
    let mut by_chunk = cache();
    let mut start = 0;
    let chunks = calls.iter().flat_map(|&tokens| {
        let tokens = tokens as usize;
        (0..tokens).step_by(SIZES.chunk).map(move |at| SIZES.chunk.min(tokens - at))
    });
    let chosen = lists(&fixture[&format!("{name}.chosen")]);
    for (chunk, tokens) in chunks.enumerate() {
        feed(&mut by_chunk, &fixture, start, tokens);
        assert_eq!(by_chunk.retrieved(9), chosen[chunk], "{name}, chunk {chunk}");
        start += tokens;
    }
    assert_eq!(start, out.dim(0).unwrap());
}

#[test]
fn blocks_and_outputs_equal_the_published_code() {
    compare("published", || inf_llm().with_published_remainder());
}

#[test]
fn blocks_and_outputs_equal_the_published_code_with_its_mask_mended() {
    compare("masked", inf_llm);
}

#[test]
fn footprints_add_up() {
    let fixture = fixture("inf_llm.safetensors");
    let mut cache = inf_llm();
    feed(&mut cache, &fixture, 0, 200);
    let all = cache.footprint();
    // 200 tokens of 2 kv heads, and the tokens of the window a second time.
    let token = 2 * 2 * 16 * 4;
    assert_eq!(all.payload, (200 + 32) * token);
    assert_eq!((cache.past().len(9), cache.window().len(9)), (200, 32));
    let away = (cache.blocks(9) - cache.resident(9).len()) * 8 + 32;
    assert_eq!(all.total() - cache.resident_footprint().total(), away * token);
    assert!(cache.remove(9));
    assert_eq!((cache.seen(9), cache.footprint().payload), (0, 0));
    cache.clear();
    assert_eq!(cache.footprint().total(), 0);
}

#[test]
fn an_exact_prompt_is_exact_and_has_the_same_length() {
    let fixture = fixture("inf_llm.safetensors");
    let mut exact = inf_llm().with_exact_prompt();
    let mut dense = DenseCache::new(spec(), DType::F32).unwrap();
    let (a, b) = (feed(&mut exact, &fixture, 0, 150), feed(&mut dense, &fixture, 0, 150));
    assert!(distance(&a, &b) < 1e-6);
    // 150 - 4 - 32 tokens in blocks of 8.
    assert_eq!(exact.blocks(9), 14);
}

#[test]
fn a_window_for_everything_is_exact() {
    let fixture = fixture("inf_llm.safetensors");
    let sizes = InfLlmSettings { local: 300, ..SIZES };
    let mut cache = InfLlm::new(spec(), store(), store(), sizes).unwrap();
    let mut dense = DenseCache::new(spec(), DType::F32).unwrap();
    let mut start = 0;
    for tokens in [50, 1, 1, 23, 1] {
        let (a, b) =
            (feed(&mut cache, &fixture, start, tokens), feed(&mut dense, &fixture, start, tokens));
        assert!(distance(&a, &b) < 1e-5);
        start += tokens;
    }
}

#[test]
fn bad_settings_are_named() {
    let message =
        |made: longctx_core::Result<InfLlm<DenseStore>>| made.expect_err("an error").to_string();
    let sizes = InfLlmSettings { chunk: 33, ..SIZES };
    assert!(message(InfLlm::new(spec(), store(), store(), sizes)).contains("chunk"));
    assert!(message(InfLlm::with_ratio(spec(), store(), store(), 1.0)).contains("ratio"));
    let windowed = AttentionShape { window: Some(8), ..shape() };
    let windowed_store = || DenseStore::new(windowed, DType::F32).unwrap();
    let layer = LayerSpec { shape: windowed, ..spec() };
    let made = InfLlm::new(layer, windowed_store(), windowed_store(), SIZES);
    assert!(message(made).contains("window"));
    let rotated = LayerSpec::new(shape());
    assert!(message(InfLlm::new(rotated, store(), store(), SIZES)).contains("InfLLM rotates"));
}
