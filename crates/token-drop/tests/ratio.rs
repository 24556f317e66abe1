//! A ratio applies to the whole prompt, in however many calls it is fed.

mod common;

use candle_core::DType;
use common::*;
use longctx_core::{DenseStore, KvCache};
use token_drop::*;

const PROMPT: usize = 413;
const RATIO: f64 = 0.25;

/// A prompt in chunks, the last of which may be a single token.
fn chunks(size: usize) -> Vec<usize> {
    (0..PROMPT).step_by(size).map(|start| size.min(PROMPT - start)).collect()
}

/// Returns the entries held at the end of the prompt.
fn held(mut cache: impl KvCache, calls: &[usize]) -> usize {
    feed_all(&mut cache, 0, &Input::random(PROMPT), calls);
    cache.held(0)
}

#[test]
fn in_chunks_as_whole_within_one_chunk() {
    for (name, make) in methods::<DenseStore>() {
        let cache = || make(spec(), store(DType::F32), Budget::Ratio(RATIO)).unwrap();
        let whole = held(cache(), &[PROMPT]);
        assert!(whole <= PROMPT / 2, "{name}");
        for size in [128, 32, 103] {
            let chunked = held(cache(), &chunks(size));
            assert!(chunked.abs_diff(whole) <= size, "{name}: {chunked} in {size}s, {whole} whole");
        }
        // With a declared length, they are equal, and so is the budget of each chunk.
        let mut declared = cache();
        declared.expect_prompt(0, PROMPT).unwrap();
        let even = name != "ada snap-kv" && name != "ada h2o";
        let declared = held(declared, &chunks(64));
        assert!(!even || declared == whole, "{name}: {declared}, {whole}");
    }
}

#[test]
fn one_token_at_a_time_as_whole() {
    let budget = || Budget::Ratio(RATIO);
    let h2o = || PolicyCache::h2o(spec(), store(DType::F32), H2o::default(), budget()).unwrap();
    let tova = || PolicyCache::tova(spec(), store(DType::F32), Tova::default(), budget()).unwrap();
    let ones = [1; PROMPT];
    assert!(held(h2o(), &ones).abs_diff(held(h2o(), &[PROMPT])) <= 1);
    assert!(held(tova(), &ones).abs_diff(held(tova(), &[PROMPT])) <= 1);
    // A method that keeps decoded tokens must know that these are the prompt's.
    let snap_kv = || {
        PolicyCache::snap_kv(spec(), store(DType::F32), SnapKv::new(8).unwrap(), budget()).unwrap()
    };
    let mut declared = snap_kv();
    declared.expect_prompt(0, PROMPT).unwrap();
    assert_eq!(held(declared, &ones), held(snap_kv(), &[PROMPT]));
    assert_eq!(held(snap_kv(), &ones), PROMPT);
}

#[test]
fn decoded_tokens_do_not_raise_the_budget() {
    let budget = Budget::Ratio(RATIO);
    let mut cache = PolicyCache::tova(spec(), store(DType::F32), Tova::default(), budget).unwrap();
    feed_all(&mut cache, 0, &Input::random(300), &[&[100, 100][..], &[1; 100]].concat());
    assert_eq!((cache.seen(0), cache.held(0)), (300, 50));
}

#[test]
fn streaming_llm_in_chunks_as_whole() {
    let cache = || StreamingLlm::with_ratio(spec(), store(DType::F32), RATIO).unwrap();
    let whole = held(cache(), &[PROMPT]);
    for size in [128, 32, 103, 1] {
        let mut chunked = cache();
        feed_all(&mut chunked, 0, &Input::random(PROMPT), &chunks(size));
        assert!(chunked.held(0).abs_diff(whole) <= size.max(2), "{} in {size}s", chunked.held(0));
        assert!(longctx_core::KvStore::len(chunked.sinks(), 0) >= 4);
        let mut declared = cache();
        declared.expect_prompt(0, PROMPT).unwrap();
        assert_eq!(held(declared, &chunks(size)), whole, "declared, in {size}s");
    }
}

#[test]
fn inf_llm_in_chunks_as_whole() {
    let prompt = 3000;
    let text = Input::random(prompt);
    let read = |calls: &[usize], declared: bool| {
        let (past, window) = (store(DType::F16), store(DType::F16));
        let mut cache = InfLlm::with_ratio(spec(), past, window, 0.5).unwrap();
        if declared {
            cache.expect_prompt(0, prompt).unwrap();
        }
        feed_all(&mut cache, 0, &text, calls);
        let sizes = cache.sizes(0).unwrap();
        (sizes, sizes.init + sizes.top_blocks * sizes.block + sizes.local)
    };
    let (whole, tokens) = read(&[prompt], false);
    assert_eq!((tokens, whole.top_blocks), (1500, 3));
    let in_chunks = [&[512; 5][..], &[440]].concat();
    let (chunked, same) = read(&in_chunks, false);
    assert_eq!((same, chunked.top_blocks), (tokens, whole.top_blocks));
    assert_eq!(read(&in_chunks, true).0, whole);
    // More blocks give a window smaller by more than the tokens of a short call.
    let (short, same) = read(&[50; 60], false);
    assert_eq!((same, short.top_blocks), (tokens, whole.top_blocks));
}

#[test]
fn a_prompt_length_is_declared_per_sequence() {
    let budget = Budget::Ratio(RATIO);
    let mut cache = PolicyCache::new(spec(), store(DType::F32), KNorm, budget).unwrap();
    Input::random(20).feed(&mut cache, 0).unwrap();
    let error = cache.expect_prompt(0, 20).unwrap_err().to_string();
    assert!(error.contains("more than the 20 seen"), "{error}");
    assert!(cache.expect_prompt(1, 0).is_err());
    // The declared prompt length of a sequence does not affect others and is removed with the
    // sequence.
    cache.expect_prompt(1, 400).unwrap();
    Input::random(20).feed(&mut cache, 1).unwrap();
    Input::random(20).feed(&mut cache, 2).unwrap();
    assert_eq!([0, 1, 2].map(|seq| cache.held(seq)), [5, 20, 5]);
    // A second turn.
    cache.expect_prompt(0, 120).unwrap();
    Input::random(100).feed(&mut cache, 0).unwrap();
    assert_eq!(cache.held(0), 30);
    cache.remove(1);
    Input::random(20).feed(&mut cache, 1).unwrap();
    assert_eq!(cache.held(1), 5);
}
