//! Properties that hold for every method, store and text.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use longctx_core::{AttentionState, Batch, DenseCache, DenseStore, Error, KvCache, KvStore, Mask};
use proptest::prelude::*;
use token_drop::*;

/// Calls that make up a text: a prompt, possibly in chunks, and decoded tokens.
fn calls() -> impl Strategy<Value = Vec<usize>> {
    (prop::collection::vec(2usize..40, 1..4), 0usize..24)
        .prop_map(|(prompt, decoded)| [prompt, vec![1; decoded]].concat())
}

/// Checks the total number of entries: heads may share the sum of their budgets unevenly.
fn check_held(name: &str, seen: usize, positions: &[Vec<u32>], budget: usize) {
    let total: usize = positions.iter().map(Vec::len).sum();
    let max = budget.min(seen) * positions.len();
    assert!(total <= max, "{name}: {total} held, allowed {max}");
}

fn some_cases() -> ProptestConfig {
    ProptestConfig { cases: cases(12, 500), failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(some_cases())]

    #[test]
    fn budgets_and_protection_hold(
        calls in calls(), budget in 12usize..40, sinks in 0usize..3, recent in 0usize..3,
        step in 1usize..9,
    ) {
        let text = Input::random(calls.iter().sum());
        for (name, make) in methods::<DenseStore>() {
            let cache = make(spec(), store(DType::F16), Budget::Tokens(budget)).unwrap();
            let own = cache.settings().protected;
            let protected = Protected {
                sinks: own.sinks.max(sinks), recent: own.recent.max(recent), ..own
            };
            let mut cache = cache.with_protected(protected).unwrap()
                .with_decode_step(Some(step)).unwrap();
            let mut start = 0;
            for &count in &calls {
                text.narrow(start, count).feed(&mut cache, 4).unwrap();
                start += count;
                let positions = cache.positions(4).unwrap();
                check_held(name, start, &positions, budget);
                let stored = cache.store().lens(4);
                for (head, positions) in positions.iter().enumerate() {
                    prop_assert_eq!(positions.len(), stored[head]);
                    prop_assert!(positions.windows(2).all(|w| w[0] < w[1]));
                    let first = 0..protected.sinks.min(start) as u32;
                    let last = start.saturating_sub(protected.recent) as u32..start as u32;
                    for protected in first.chain(last) {
                        prop_assert!(positions.contains(&protected), "{}: {} dropped", name, protected);
                    }
                }
            }
            prop_assert_eq!(cache.seen(4), start);
            // 2 x 32 channels of f16 per entry.
            let positions = cache.positions(4).unwrap();
            let entries: usize = positions.iter().map(Vec::len).sum();
            prop_assert_eq!(cache.footprint().payload, entries * 2 * DIM * 2);
            // Consecutive positions up to the last one need no memory.
            let apart = |positions: &Vec<u32>| {
                positions.windows(2).rposition(|w| w[0] + 1 < w[1]).map_or(0, |last| last + 1)
            };
            let listed: usize = positions.iter().map(apart).sum();
            prop_assert!(cache.footprint().bookkeeping >= listed * 4);
        }
    }

    /// The output of a decoded token equals that of the dense cache bit for bit. A prompt attends
    /// to its own tensors, while the dense cache reads blocks, so sums are rounded in another
    /// order.
    #[test]
    fn a_budget_for_everything_changes_nothing(prompt in 2usize..90, decoded in 0usize..12) {
        let calls = [vec![prompt], vec![1; decoded]].concat();
        let text = Input::random(prompt + decoded);
        let mut dense = DenseCache::new(spec(), DType::F32).unwrap();
        let expected = feed_all(&mut dense, 0, &text, &calls);
        for (name, make) in methods() {
            let budget = Budget::Tokens((prompt + decoded).max(20));
            // DuoAttention has its own budgets: without streaming heads it keeps everything.
            let mut cache = match name {
                "duo" => {
                    let heads = DuoAttention::new(vec![false; KV_HEADS], 4, 8).unwrap();
                    PolicyCache::duo_attention(spec(), store(DType::F32), &heads).unwrap().boxed()
                }
                _ => make(spec(), store(DType::F32), budget).unwrap(),
            };
            if name == "pyramid k-norm" {
                cache = cache.with_layer_budgets(LayerBudgets::Uniform).unwrap();
            }
            for (out, expected) in feed_all(&mut cache, 0, &text, &calls).iter().zip(&expected) {
                prop_assert!(distance(out, expected) < 1e-5, "{}", name);
                if out.dim(0).unwrap() == 1 {
                    prop_assert!(bits(out) == bits(expected), "{}", name);
                }
            }
        }
        let mut streaming = StreamingLlm::new(spec(), store(DType::F32), 4, 200).unwrap();
        for (out, expected) in feed_all(&mut streaming, 0, &text, &calls).iter().zip(&expected) {
            prop_assert!(distance(out, expected) < 1e-5);
        }
    }

    /// Sequences of unequal length, some decoding while others are fed prompts.
    #[test]
    fn a_batch_equals_its_sequences_one_by_one(
        rounds in prop::collection::vec(
            prop::collection::vec(prop::option::of(prop_oneof![Just(1usize), 2usize..30]), 3), 1..7,
        ),
    ) {
        let alone = || caches(|| store(DType::F32)).into_iter();
        let singles = alone().zip(alone()).zip(alone());
        let together = caches(|| store(DType::F32));
        for ((name, mut all), (((_, a), (_, b)), (_, c))) in together.into_iter().zip(singles) {
            let mut singles = [a, b, c];
            for round in &rounds {
                let parts: Vec<_> = (0..).zip(round)
                    .filter_map(|(seq, tokens)| Some((seq, Input::random((*tokens)?))))
                    .collect();
                if parts.is_empty() {
                    continue;
                }
                let outs = feed_batch(&mut all, &parts).unwrap();
                for ((seq, input), out) in parts.iter().zip(outs) {
                    let expected = input.feed(&mut singles[*seq as usize], 0).unwrap();
                    prop_assert!(distance(&out, &expected) < 1e-5, "{}, sequence {}", name, seq);
                    let single = &singles[*seq as usize];
                    prop_assert_eq!(all.held(*seq), single.held(0));
                    prop_assert_eq!(all.seq_footprint(*seq).payload, single.footprint().payload);
                }
            }
        }
    }

    /// Two continuations of one prefix, by a fork and by feeding each from the start.
    #[test]
    fn a_fork_equals_a_copy(calls in calls(), more in calls()) {
        let (prefix, others) = (Input::random(calls.iter().sum()), more.iter().sum());
        let ends = [Input::random(others), Input::random(others)];
        let all = caches(|| store(DType::F32)).into_iter();
        let fresh = caches(|| store(DType::F32)).into_iter().zip(caches(|| store(DType::F32)));
        for ((name, mut cache), ((_, first), (_, second))) in all.zip(fresh) {
            feed_all(&mut cache, 7, &prefix, &calls);
            cache.fork(7, 8).unwrap();
            prop_assert_eq!(cache.seen(8), prefix.tokens());
            let forked = [7, 8].map(|seq| feed_all(&mut cache, seq, &ends[seq as usize - 7], &more));
            for ((mut plain, end), forked) in [first, second].into_iter().zip(&ends).zip(forked) {
                feed_all(&mut plain, 0, &prefix, &calls);
                for (a, b) in feed_all(&mut plain, 0, end, &more).iter().zip(&forked) {
                    prop_assert!(distance(a, b) < 1e-6, "{}", name);
                }
            }
            // All memory is freed: sequences fed again reuse it.
            prop_assert!(cache.remove(7) && cache.remove(8));
            prop_assert_eq!(cache.footprint().payload + cache.footprint().bookkeeping, blocks(&*cache));
            let held = cache.footprint().total();
            feed_all(&mut cache, 9, &prefix, &calls);
            prop_assert!(cache.footprint().payload + cache.footprint().slack <= held, "{}", name);
        }
    }

    /// Where truncation is allowed, the sequence continues as if it had never seen the rest.
    #[test]
    fn truncation_equals_never_feeding(
        calls in calls(), rejected in prop::collection::vec(1usize..4, 1..4), more in calls(),
    ) {
        let kept: usize = calls.iter().sum();
        let text = Input::random(kept);
        let dropped: usize = rejected.iter().sum();
        let (draft, end) = (Input::random(dropped), Input::random(more.iter().sum()));
        let all = caches(|| store(DType::F32)).into_iter().zip(caches(|| store(DType::F32)));
        for ((name, mut cache), (_, mut plain)) in all {
            feed_all(&mut cache, 0, &text, &calls);
            feed_all(&mut plain, 0, &text, &calls);
            feed_all(&mut cache, 0, &draft, &rejected);
            let held = (cache.seen(0), cache.held(0), cache.footprint());
            if let Err(error) = cache.check_truncate(0, kept) {
                prop_assert!(matches!(error, Error::Unsupported(_)), "{}: {}", name, error);
                prop_assert!(cache.truncate(0, kept).is_err());
                prop_assert_eq!((cache.seen(0), cache.held(0), cache.footprint()), held);
                continue;
            }
            cache.truncate(0, kept).unwrap();
            prop_assert_eq!((cache.seen(0), cache.held(0)), (kept, plain.held(0)), "{}", name);
            let (a, b) = (feed_all(&mut cache, 0, &end, &more), feed_all(&mut plain, 0, &end, &more));
            for (a, b) in a.iter().zip(&b) {
                prop_assert!(distance(a, b) < 1e-6, "{}", name);
            }
            cache.truncate(0, 0).unwrap();
            let mut new = caches(|| store(DType::F32)).into_iter().find(|(n, _)| *n == name).unwrap().1;
            let (a, b) = (feed_all(&mut cache, 0, &text, &calls), feed_all(&mut new, 0, &text, &calls));
            a.iter().zip(&b).for_each(|(a, b)| assert!(distance(a, b) < 1e-6, "{name}"));
        }
    }

    /// Prompts whose attention the engine computed leave every cache in the same state.
    #[test]
    fn an_appended_prompt_equals_an_attended_one(prompt in 30usize..70, other in 1usize..40) {
        let text = Input::random(prompt + other + 3);
        let batch = Batch::new(&[(0, prompt), (1, other)]).unwrap();
        let first = text.narrow(0, prompt + other);
        let lse = exact(&batch, &first).lse;
        let all = caches(|| store(DType::F32)).into_iter().zip(caches(|| store(DType::F32)));
        // InfLLM attends to a prompt in chunks, unless it is set to exact.
        for ((name, mut attends), (_, mut takes)) in all.filter(|((n, _), _)| *n != "inf-llm") {
            first.step(&batch, |step| attends.attend(step)).unwrap();
            let take = |cache: &mut Box<dyn KvCache>, lse: Option<&Tensor>| {
                first.step(&batch, |step| cache.append_prompt(step, lse))
            };
            if takes.needs_lse() {
                let wrong = lse.narrow(0, 0, 1).unwrap();
                prop_assert!(take(&mut takes, None).unwrap_err().to_string().contains("lse"));
                prop_assert!(take(&mut takes, Some(&wrong)).unwrap_err().to_string().contains("lse"));
                take(&mut takes, Some(&lse)).unwrap();
            } else {
                take(&mut takes, None).unwrap();
            }
            prop_assert!(take(&mut takes, Some(&lse)).unwrap_err().to_string().contains("before its prompt"));
            for token in 0..3 {
                let next = text.narrow(prompt + other + token, 1);
                for seq in [0, 1] {
                    let (a, b) =
                        (next.feed(&mut attends, seq).unwrap(), next.feed(&mut takes, seq).unwrap());
                    prop_assert!(distance(&a, &b) < 1e-6, "{}", name);
                }
            }
        }
    }

    /// The output of each decoded token equals attention computed from the text over the positions
    /// that the cache reports, and over the token itself.
    #[test]
    fn evicted_entries_are_never_attended_again(prompt in 16usize..60, budget in 12usize..30) {
        let text = Input::random(prompt + 12);
        for (name, make) in methods::<DenseStore>() {
            let cache = make(spec(), store(DType::F32), Budget::Tokens(budget)).unwrap();
            let mut cache = cache.with_decode_step(Some(3)).unwrap();
            text.narrow(0, prompt).feed(&mut cache, 0).unwrap();
            for token in prompt..prompt + 12 {
                let mut seen = cache.positions(0).unwrap();
                seen.iter_mut().for_each(|head| head.push(token as u32));
                let contiguous = cache.settings().rerotate;
                let expected = attention_over(&text.narrow(0, token + 1), &seen, contiguous);
                let out = text.narrow(token, 1).feed(&mut cache, 0).unwrap();
                prop_assert!(distance(&out, &expected) < 2e-5, "{}", name);
            }
        }
    }
}

/// Returns the bytes of the tables of an empty pool.
fn blocks(cache: &dyn KvCache) -> usize {
    let held = cache.footprint();
    // A reference count of four bytes for each block of 32 keys and values in f32.
    held.slack / (32 * 2 * DIM * 4) * 4
}

/// Exact attention of a batch's rows.
fn exact(batch: &Batch, input: &Input) -> AttentionState {
    let mut plain = store(DType::F32);
    let positions = batch.positions(|_| 0);
    let turn = |x| rope(DIM).apply(x, &positions).unwrap();
    plain.append(batch, &turn(&input.k), &input.v).unwrap();
    plain.attend(batch, &turn(&input.q), Mask::Causal).unwrap()
}

/// A store may be chosen at run time.
#[test]
fn a_boxed_store_gives_what_the_store_gives() {
    let store = || DenseStore::with_capacity(shape(), DType::F16, 70_000).unwrap();
    let boxed = || -> Box<dyn KvStore> { Box::new(store()) };
    let text = Input::random(100);
    for ((name, plain), (_, boxed)) in caches(store).into_iter().zip(caches(boxed)) {
        let run = |mut cache: Box<dyn KvCache>| {
            let mut outs = feed_all(&mut cache, 0, &text, &[50, 1, 1, 9, 1]);
            let truncated = cache.truncate(0, 61).is_ok();
            cache.fork(0, 1).unwrap();
            for seq in [0, 1] {
                outs.extend(feed_all(&mut cache, seq, &text.narrow(40, 30), &[1, 1]));
            }
            let fits = [1, 40, 900].map(|n| cache.can_append(&Batch::single(2, n).unwrap()));
            let outs: Vec<_> = outs.iter().map(bits).collect();
            let held = [0, 1].map(|seq| (cache.held(seq), cache.seq_footprint(seq)));
            let footprint = cache.footprint();
            (outs, truncated, fits, held, footprint, cache.remove(0), cache.seqs())
        };
        assert_eq!(run(plain), run(boxed), "{name}");
    }
}

/// Which truncations are allowed: the law above would also hold if none were.
#[test]
fn drafts_are_rolled_back() {
    let allowed = |name: &str, calls: &[usize], len: usize| {
        let all = caches(|| store(DType::F32)).into_iter();
        let mut cache = all.into_iter().find(|(n, _)| *n == name).unwrap().1;
        feed_all(&mut cache, 0, &Input::random(calls.iter().sum()), calls);
        cache.check_truncate(0, len).is_ok()
    };
    // After eviction from the prompt, as long as decoding evicts nothing.
    for name in ["snap-kv", "ada snap-kv", "finch", "expected attention"] {
        assert!(allowed(name, &[100, 1, 1, 1], 101), "{name}");
        assert!(!allowed(name, &[100, 1], 99), "{name}");
    }
    // Allowed before anything is dropped, and after a step of drops.
    assert!(allowed("k-norm", &[15, 4], 9) && !allowed("k-norm", &[15, 6], 9));
    assert!(allowed("streaming-llm", &[15, 4], 1) && !allowed("streaming-llm", &[15, 6], 20));
    assert!(allowed("streaming-llm by steps", &[21, 1, 1], 21));
    assert!(allowed("quest", &[50, 1, 1], 3));
    // Sums over all queries cannot be reverted.
    assert!(!allowed("h2o", &[15, 1], 15) && !allowed("inf-llm", &[5, 1], 5));
    assert!(allowed("h2o", &[15, 1], 16) && allowed("inf-llm", &[5, 1], 0));
    // The queries that are observed during decoding are the newest of those left.
    assert!(allowed("snap-kv while decoding", &[6, 1], 6));
    assert!(!allowed("snap-kv while decoding", &[16, 1], 16));
}

/// A draft of several tokens after a prompt of declared length is not a chunk of it.
#[test]
fn drafts_of_several_tokens_are_rolled_back() {
    let make = || {
        let snap_kv = SnapKv::new(8).unwrap();
        PolicyCache::snap_kv(spec(), store(DType::F32), snap_kv, Budget::Ratio(0.25)).unwrap()
    };
    let text = Input::random(110);
    let run = |cache: &mut PolicyCache<DenseStore, SnapKv>| {
        feed_all(cache, 0, &text.narrow(0, 105), &[100, 1, 4]);
        (cache.held(0), cache.truncate(0, 102).is_ok())
    };
    let (mut declared, mut first, mut undeclared) =
        (make(), make().with_prefill(Prefill::FirstCall), make());
    declared.expect_prompt(0, 100).unwrap();
    assert_eq!(run(&mut declared), (30, true));
    assert_eq!(run(&mut first), (30, true));
    assert_eq!(run(&mut undeclared), (26, false));
    let mut plain = make();
    feed_all(&mut plain, 0, &text.narrow(0, 102), &[100, 1, 1]);
    let next = text.narrow(105, 1);
    let (a, b) = (next.feed(&mut declared, 0).unwrap(), next.feed(&mut plain, 0).unwrap());
    assert!(distance(&a, &b) < 1e-6);
}
