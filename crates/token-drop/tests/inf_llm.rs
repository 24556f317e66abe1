//! InfLLM against its published code on the CPU (fixtures/make_inf_llm.py).

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use common::distance;
use longctx_core::{AttentionShape, KvCache, Rope, RopeScaling, Step};
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

fn fixture() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/inf_llm.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// Feeds tokens from `start` on.
fn feed(
    cache: &mut InfLlm<f32>,
    fixture: &HashMap<String, Tensor>,
    start: usize,
    tokens: usize,
) -> Tensor {
    let rope = Rope::new(16, 16, 10_000.0, RopeScaling::None).unwrap();
    let of = |name| fixture[name].narrow(2, start, tokens).unwrap().contiguous().unwrap();
    let (q, k, v) = (of("q"), of("k"), of("v"));
    cache.attend(&Step { q: &q, k: &k, v: &v, shape: &shape(), rope: &rope }).unwrap()
}

/// The fixture's lists, each padded with -1.
fn lists(x: &Tensor) -> Vec<Vec<usize>> {
    let rows = x.to_vec2::<i64>().unwrap();
    rows.into_iter()
        .map(|row| row.into_iter().filter_map(|i| i.try_into().ok()).collect())
        .collect()
}

fn compare(name: &str, cache: impl Fn() -> InfLlm<f32>) {
    let fixture = fixture();
    let (out, chosen) = (&fixture[&format!("{name}.out")], &fixture[&format!("{name}.chosen")]);
    let calls = fixture["calls"].to_vec1::<i64>().unwrap();
    let residents = lists(&fixture[&format!("{name}.resident")]);
    let mut whole = cache();
    let mut start = 0;
    for (call, (&tokens, resident)) in calls.iter().zip(residents).enumerate() {
        let tokens = tokens as usize;
        let own = feed(&mut whole, &fixture, start, tokens);
        let error = distance(&own, &out.narrow(2, start, tokens).unwrap());
        assert!(error < 1e-4, "{name}, call {call}: off by {error}");
        assert_eq!(whole.resident(0), resident, "{name}, call {call}");
        start += tokens;
    }
    let blocks = fixture[&format!("{name}.blocks")].to_vec1::<i64>().unwrap();
    assert_eq!(whole.blocks(0) as i64, blocks[0]);
    // Chunk by chunk, to see what each one fetched.
    let mut by_chunk = cache();
    let mut start = 0;
    let chunks = calls.iter().flat_map(|&tokens| {
        let tokens = tokens as usize;
        (0..tokens).step_by(SIZES.chunk).map(move |at| SIZES.chunk.min(tokens - at))
    });
    let chosen = lists(chosen);
    for (chunk, tokens) in chunks.enumerate() {
        feed(&mut by_chunk, &fixture, start, tokens);
        assert_eq!(by_chunk.fetched(0), chosen[chunk], "{name}, chunk {chunk}");
        start += tokens;
    }
    assert_eq!(start, out.dim(2).unwrap());
}

#[test]
fn blocks_and_outputs_equal_the_published_code() {
    compare("published", || InfLlm::new(SIZES, shape()).unwrap().with_published_remainder());
}

#[test]
fn blocks_and_outputs_equal_the_published_code_with_its_mask_mended() {
    compare("masked", || InfLlm::new(SIZES, shape()).unwrap());
}

#[test]
fn footprints_add_up() {
    let fixture = fixture();
    let mut cache = InfLlm::<f32>::new(SIZES, shape()).unwrap();
    feed(&mut cache, &fixture, 0, 200);
    let all = cache.footprint();
    // 200 tokens of 2 kv heads.
    let token = 2 * 2 * 16 * 4;
    assert_eq!(all.payload, 200 * token);
    let blocks = cache.blocks(0) - cache.resident(0).len();
    assert_eq!(all.total() - cache.resident_footprint().total(), blocks * 8 * token);
    cache.reset();
    assert_eq!((cache.seen(), cache.footprint().total()), (0, 0));
}

#[test]
fn an_exact_prompt_is_exact_and_remembers_the_same_length() {
    let fixture = fixture();
    let mut exact = InfLlm::<f32>::new(SIZES, shape()).unwrap().with_exact_prompt();
    let mut dense = longctx_core::DenseCache::new(shape(), candle_core::DType::F32).unwrap();
    let rope = Rope::new(16, 16, 10_000.0, RopeScaling::None).unwrap();
    let of = |name: &str| fixture[name].narrow(2, 0, 150).unwrap().contiguous().unwrap();
    let (q, k, v) = (of("q"), of("k"), of("v"));
    let step = Step { q: &q, k: &k, v: &v, shape: &shape(), rope: &rope };
    let (a, b) = (exact.attend(&step).unwrap(), dense.attend(&step).unwrap());
    assert!(distance(&a, &b) < 1e-6);
    // 150 - 4 - 32 tokens in blocks of 8.
    assert_eq!(exact.blocks(0), 14);
}

#[test]
fn bad_settings_are_named() {
    let sizes = InfLlmSettings { chunk: 33, ..SIZES };
    assert!(InfLlm::<f32>::new(sizes, shape()).unwrap_err().to_string().contains("chunk"));
    assert!(InfLlm::<f32>::with_ratio(1.0, shape()).unwrap_err().to_string().contains("ratio"));
    let windowed = AttentionShape { window: Some(8), ..shape() };
    assert!(InfLlm::<f32>::new(SIZES, windowed).unwrap_err().to_string().contains("window"));
}
