//! What holds for every policy, every store and every text.

mod common;

use candle_core::DType;
use common::*;
use longctx_core::{
    DenseCache, EvictionPolicy, KvCache, KvStore, Protected, Step, Visible, attention,
};
use proptest::prelude::*;
use token_drop::*;

/// Calls that make up a text: a prompt, perhaps in chunks, and decoded tokens.
fn calls() -> impl Strategy<Value = Vec<usize>> {
    (prop::collection::vec(2usize..40, 1..4), 0usize..24)
        .prop_map(|(prompt, decoded)| [prompt, vec![1; decoded]].concat())
}

/// The most that the heads may hold together: heads may share unevenly what is theirs.
fn check_held(name: &str, cache: &impl KvCache, positions: &[Vec<u32>], budget: usize) {
    let total: usize = positions.iter().map(Vec::len).sum();
    let most = budget.min(cache.seen()) * positions.len();
    assert!(total <= most, "{name}: {total} held, allowed {most}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..Default::default() })]

    #[test]
    fn budgets_and_protection_hold(
        calls in calls(), budget in 12usize..40, sinks in 0usize..3, recent in 0usize..3, step in 1usize..9,
    ) {
        let text = Input::random(1, calls.iter().sum());
        for (name, policy) in policies() {
            let allowed = common::budget(&policy, budget);
            let mut cache = PolicyCache::new(store(DType::F16), policy, allowed).unwrap()
                .with_protected(Protected { sinks, recent }).unwrap()
                .with_decode_step(Some(step)).unwrap();
            let mut start = 0;
            for &count in &calls {
                text.narrow(2, start, count).feed(&mut cache).unwrap();
                start += count;
                check_held(name, &cache, cache.positions(), budget);
                let stored: Vec<_> = cache.store().lens();
                for (head, positions) in cache.positions().iter().enumerate() {
                    prop_assert_eq!(positions.len(), stored[head]);
                    prop_assert!(positions.windows(2).all(|w| w[0] < w[1]));
                    let first = 0..sinks.min(start) as u32;
                    let last = start.saturating_sub(recent) as u32..start as u32;
                    for protected in first.chain(last) {
                        prop_assert!(positions.contains(&protected), "{}: {} gone", name, protected);
                    }
                }
            }
            prop_assert_eq!(cache.seen(), start);
            // 2 x 32 channels of f16 per entry.
            let entries: usize = cache.positions().iter().map(Vec::len).sum();
            prop_assert_eq!(cache.footprint().payload, entries * 2 * DIM * 2);
            prop_assert!(cache.footprint().bookkeeping >= entries * 4);
        }
    }

    #[test]
    fn a_budget_for_everything_changes_no_bit(prompt in 2usize..90, decoded in 0usize..12) {
        let calls = [vec![prompt], vec![1; decoded]].concat();
        let text = Input::random(1, prompt + decoded);
        let mut dense = DenseCache::new(shape(), DType::F32).unwrap();
        let expected = feed_all(&mut dense, &text, &calls);
        for (name, policy) in policies() {
            // DuoAttention bounds its heads itself: without streaming heads it keeps everything.
            let policy = match name {
                "duo" => Box::new(DuoAttention::new(vec![false; KV_HEADS], 4, 8).unwrap()),
                _ => policy,
            };
            let budget = budget(&policy, (prompt + decoded).max(20));
            let mut cache = PolicyCache::new(store(DType::F32), policy, budget).unwrap();
            for (out, expected) in feed_all(&mut cache, &text, &calls).iter().zip(&expected) {
                prop_assert_eq!(bits(out), bits(expected), "{}", name);
            }
        }
    }

    #[test]
    fn batch_entries_do_not_mix(calls in calls(), budget in 12usize..40) {
        let text = Input::random(2, calls.iter().sum());
        for (name, policy) in policies() {
            let allowed = common::budget(&policy, budget);
            let mut both = PolicyCache::new(store(DType::F32), policy, allowed).unwrap();
            let together = feed_all(&mut both, &text, &calls);
            for entry in 0..2 {
                let policy = policies().into_iter().find(|(n, _)| *n == name).unwrap().1;
                // Chance deals differently to every head of a batch.
                if name == "random" && entry == 1 {
                    continue;
                }
                let mut alone = PolicyCache::new(store(DType::F32), policy, allowed).unwrap();
                let outs = feed_all(&mut alone, &text.batch(entry), &calls);
                let of_entry = entry * KV_HEADS..(entry + 1) * KV_HEADS;
                prop_assert_eq!(&both.positions()[of_entry], alone.positions(), "{}", name);
                for (a, b) in together.iter().zip(&outs) {
                    prop_assert!(distance(&a.narrow(0, entry, 1).unwrap(), b) < 1e-5);
                }
            }
        }
    }

    /// A prompt whose attention was computed elsewhere leaves every cache in the same state.
    #[test]
    fn a_prompt_taken_in_equals_one_that_attends(prompt in 30usize..70) {
        let text = Input::random(1, prompt + 3);
        let caches = || -> Vec<(&str, Box<dyn KvCache>)> {
            let framed = policies().into_iter().map(|(name, policy)| {
                let budget = budget(&policy, 20);
                let cache = PolicyCache::new(store(DType::F32), policy, budget);
                (name, Box::new(cache.unwrap()) as Box<dyn KvCache>)
            });
            let sizes = InfLlmSettings {
                init: 2, local: 12, block: 4, top_blocks: 2, resident_blocks: 2, representatives: 2, chunk: 8,
            };
            let streaming = StreamingLlm::new(2, 18, store(DType::F32)).unwrap();
            let inf_llm = InfLlm::<f32>::new(sizes, shape()).unwrap().with_exact_prompt();
            framed.chain([
                ("streaming-llm", Box::new(streaming) as Box<dyn KvCache>),
                ("inf-llm", Box::new(inf_llm)),
            ]).collect()
        };
        let first = text.narrow(2, 0, prompt);
        let (q, k) = (rope().apply(&first.q, 0).unwrap(), rope().apply(&first.k, 0).unwrap());
        let whole = attention::attend(&q, &k, &first.v, &shape(), Visible::Causal).unwrap();
        for ((name, mut attends), (_, mut takes)) in caches().into_iter().zip(caches()) {
            first.feed(&mut attends).unwrap();
            let (shape, rope) = (shape(), rope());
            let step = Step { q: &first.q, k: &first.k, v: &first.v, shape: &shape, rope: &rope };
            takes.take_prompt(&step, &whole).unwrap();
            prop_assert!(takes.take_prompt(&step, &whole).is_err());
            for token in prompt..prompt + 3 {
                let next = text.narrow(2, token, 1);
                let (a, b) = (next.feed(&mut attends).unwrap(), next.feed(&mut takes).unwrap());
                prop_assert_eq!(bits(&a), bits(&b), "{}", name);
            }
        }
    }

    /// Each decoded token's output equals attention computed from the text over the positions that the cache says it held, and over itself.
    #[test]
    fn what_is_evicted_is_never_seen_again(prompt in 16usize..60, budget in 12usize..30) {
        let text = Input::random(1, prompt + 12);
        for (name, policy) in policies() {
            let allowed = common::budget(&policy, budget);
            let mut cache = PolicyCache::new(store(DType::F32), policy, allowed).unwrap()
                .with_decode_step(Some(3)).unwrap();
            text.narrow(2, 0, prompt).feed(&mut cache).unwrap();
            for token in prompt..prompt + 12 {
                let mut seen = cache.positions().to_vec();
                seen.iter_mut().for_each(|head| head.push(token as u32));
                let contiguous = cache.policy().rerotates();
                let expected = attention_over(&text.narrow(2, 0, token + 1), &seen, contiguous);
                let out = text.narrow(2, token, 1).feed(&mut cache).unwrap();
                prop_assert!(distance(&out, &expected) < 2e-5, "{}", name);
            }
        }
    }
}
