//! token-drop's caches over packed stores: after an error a sequence is as before, or poisoned.
#![cfg(feature = "candle")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use kv_quant::{Bits, Float8, Format, QuantStore};
use longctx_core::{
    AttentionShape, Batch, Error, KvCache, KvStore, LayerSpec, Result, Rope, RopeScaling, SeqId,
    Step,
};
use token_drop::*;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const D: usize = 32;
/// Tokens of the first sequence's prompt, and decoded ones.
const PROMPT: usize = 100;
const DECODED: usize = 70;

fn spec() -> LayerSpec {
    let rope = Rope::new(D, D, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(AttentionShape::new(HEADS, KV_HEADS, D).unwrap()).with_rope(Arc::new(rope))
}

fn kivi() -> Format {
    Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap()
}

fn formats() -> [Format; 4] {
    let rolling = Format::kivi_rolling(Bits::Two, Bits::Two, 32, 32).unwrap();
    [kivi(), rolling, Format::float8(Float8::E4m3), Format::f16()]
}

/// A store of `format`, of `capacity` bytes or without a limit.
fn store(format: Format, capacity: Option<usize>) -> QuantStore {
    let store = QuantStore::new(spec().shape, format).unwrap();
    capacity.into_iter().fold(store, QuantStore::with_capacity)
}

/// Queries, keys and values of some tokens.
#[derive(Clone)]
struct Input([Tensor; 3]);

impl Input {
    /// Numbers that depend only on the seed. Keys of the second head are small, so that the heads
    /// get unequal budgets.
    fn new(seed: u64, tokens: usize) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 22) as f32 - 2.0
        };
        let mut x = |heads: usize| {
            let data: Vec<f32> = (0..tokens * heads * D).map(|_| number()).collect();
            Tensor::from_vec(data, (tokens, heads, D), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (x(HEADS), x(KV_HEADS), x(KV_HEADS));
        let scale = Tensor::new(&[1f32, 0.1], &Device::Cpu).unwrap();
        let k = k.broadcast_mul(&scale.reshape((1, KV_HEADS, 1)).unwrap()).unwrap();
        Self([q, k, v])
    }

    /// The tokens with values that cannot be packed.
    fn out_of_range(self) -> Self {
        let [q, k, v] = self.0;
        Self([q, k, (v * 1e9).unwrap()])
    }
}

fn feed(cache: &mut impl KvCache, parts: &[(SeqId, &Input)]) -> Result<Vec<u32>> {
    let seqs: Vec<_> = parts.iter().map(|(seq, x)| (*seq, x.0[0].dim(0).unwrap())).collect();
    let all =
        |i: usize| Tensor::cat(&parts.iter().map(|(_, x)| &x.0[i]).collect::<Vec<_>>(), 0).unwrap();
    let (batch, q, k, v) = (Batch::new(&seqs)?, all(0), all(1), all(2));
    let out = cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v })?;
    Ok(out.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

fn ada_snap_kv(store: QuantStore) -> PolicyCache<QuantStore, SnapKv> {
    let budget = Budget::Ratio(0.5);
    let cache = PolicyCache::snap_kv(spec(), store, SnapKv::new(8).unwrap(), budget).unwrap();
    cache.with_head_budgets(HeadBudgets::ADA_KV).unwrap()
}

fn ada_h2o(store: QuantStore) -> PolicyCache<QuantStore, H2o> {
    let cache = PolicyCache::h2o(spec(), store, H2o::default(), Budget::Ratio(0.5)).unwrap();
    cache.with_head_budgets(HeadBudgets::ADA_KV).unwrap()
}

fn rerotated(store: QuantStore) -> PolicyCache<QuantStore, KNorm> {
    let cache = PolicyCache::new(spec(), store, KNorm, Budget::Ratio(0.5)).unwrap();
    cache.with_rerotation().unwrap()
}

fn streaming_llm(store: QuantStore) -> StreamingLlm<QuantStore> {
    StreamingLlm::new(spec(), store, 4, 60).unwrap()
}

/// Feeds the first sequence, and `fail`s before each decoded token with that token.
fn decode<C: KvCache>(
    cache: &mut C,
    mut fail: impl FnMut(&mut C, &Input),
) -> Result<Vec<Vec<u32>>> {
    feed(cache, &[(0, &Input::new(1, PROMPT))])?;
    let tokens = (0..DECODED).map(|i| Input::new(100 + i as u64, 1));
    tokens
        .map(|token| {
            fail(cache, &token);
            feed(cache, &[(0, &token)])
        })
        .collect()
}

/// A capacity in which the first sequence can be decoded, and no more than 1 KiB less.
fn capacity<C: KvCache>(make: impl Fn(QuantStore) -> C, format: Format) -> usize {
    let (mut small, mut large) = (0, 1 << 20);
    while small + 1024 < large {
        let middle = (small + large) / 2;
        match decode(&mut make(store(format, Some(middle))), |_, _| ()) {
            Ok(_) => large = middle,
            Err(Error::PoolFull { .. }) => small = middle,
            Err(error) => panic!("{error}"),
        }
    }
    large
}

/// One sequence decodes, and another one's prompt cannot be appended in the same call.
fn a_prompt_that_is_refused_changes_nothing<C: KvCache>(make: impl Fn(QuantStore) -> C + Copy) {
    let (long, wrong) = (Input::new(2, 400), Input::new(2, 20).out_of_range());
    for format in formats() {
        let expected = decode(&mut make(store(format, None)), |_, _| ()).unwrap();
        let mut cache = make(store(format, Some(capacity(make, format))));
        let got = decode(&mut cache, |cache, token| {
            let held = cache.held(0);
            let full = feed(cache, &[(0, token), (1, &long)]);
            assert!(matches!(full, Err(Error::PoolFull { .. })));
            assert!(feed(cache, &[(0, token), (1, &wrong)]).is_err());
            assert_eq!((cache.seqs(), cache.held(0)), (vec![0], held));
        });
        assert!(got.unwrap() == expected, "{format:?}");
    }
}

#[test]
fn snap_kv_with_unequal_heads_keeps_its_state_if_a_prompt_is_refused() {
    a_prompt_that_is_refused_changes_nothing(ada_snap_kv);
}

#[test]
fn h2o_with_unequal_heads_keeps_its_state_if_a_prompt_is_refused() {
    a_prompt_that_is_refused_changes_nothing(ada_h2o);
}

#[test]
fn rerotated_keys_keep_their_state_if_a_prompt_is_refused() {
    a_prompt_that_is_refused_changes_nothing(rerotated);
}

/// Its window is always of the same length, and a prompt longer than it takes no more memory.
#[test]
fn streaming_llm_keeps_its_state_if_a_prompt_is_refused() {
    for format in formats() {
        let expected = decode(&mut streaming_llm(store(format, None)), |_, _| ()).unwrap();
        let wrong = Input::new(2, 20).out_of_range();
        let got = decode(&mut streaming_llm(store(format, None)), |cache, token| {
            assert!(feed(cache, &[(0, token), (1, &wrong)]).is_err());
            assert_eq!(cache.seqs(), [0]);
        });
        assert!(got.unwrap() == expected, "{format:?}");
    }
}

/// Keeps the newest entries, and fails when told to.
struct Failing(Arc<AtomicBool>);

impl EvictionPolicy for Failing {
    fn needs(&self) -> Needs {
        Needs { positions: true, previous_scores: true, ..Needs::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::mismatch("a policy", "scores", "a failure"));
        }
        Ok(view.positions()?.to_dtype(candle_core::DType::F32)?)
    }
}

/// A token is in the store when its scores fail. The store takes it back if nothing was packed for
/// it, or if it can unpack without a loss.
#[test]
fn a_failure_after_the_append_restores_or_poisons() {
    for (format, always_restores) in formats().into_iter().zip([false, true, true, true]) {
        let fails = Arc::new(AtomicBool::new(false));
        let make = || {
            let policy = Failing(fails.clone());
            PolicyCache::new(spec(), store(format, None), policy, Budget::Tokens(500)).unwrap()
        };
        let expected = decode(&mut make(), |_, _| ()).unwrap();
        let mut restored = 0;
        let got = decode(&mut make(), |cache, token| {
            fails.store(true, Ordering::Relaxed);
            let failed = feed(cache, &[(0, token)]);
            fails.store(false, Ordering::Relaxed);
            assert!(failed.unwrap_err().to_string().contains("a failure"));
            restored += usize::from(cache.check_truncate(0, cache.seen(0)).is_ok());
        });
        match got {
            Ok(got) => assert!(restored == DECODED && got == expected, "{format:?}"),
            Err(error) => assert!(!always_restores && matches!(error, Error::Poisoned { .. })),
        }
    }
}

/// If a truncation is said to be possible, it is; otherwise it changes nothing. In a full pool, a
/// block that it divides may have no room in full precision.
#[test]
fn the_check_of_a_truncation_is_its_outcome() {
    let (mut refused, mut done) = (0, 0);
    let full = capacity(ada_snap_kv, kivi());
    for forked in [false, true] {
        for len in PROMPT..PROMPT + DECODED {
            let mut cache = ada_snap_kv(store(kivi(), Some(full)));
            decode(&mut cache, |_, _| ()).unwrap();
            let lens = cache.store().lens(0);
            assert_ne!(lens[0], lens[1]);
            if forked {
                cache.fork(0, 1).unwrap();
            }
            let checked = cache.check_truncate(0, len).map_err(|error| error.to_string());
            let truncated = cache.truncate(0, len).map_err(|error| error.to_string());
            assert_eq!(checked, truncated);
            let dropped = if truncated.is_ok() { PROMPT + DECODED - len } else { 0 };
            assert_eq!(cache.seen(0), PROMPT + DECODED - dropped);
            assert_eq!(cache.store().lens(0), [lens[0] - dropped, lens[1] - dropped]);
            *if truncated.is_ok() { &mut done } else { &mut refused } += 1;
        }
    }
    assert!(refused > 0 && done > 0, "{refused} and {done}");
}
