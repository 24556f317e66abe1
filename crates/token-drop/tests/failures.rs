//! After a failed call every sequence is as before, or poisoned until it is removed.

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Tensor};
use common::*;
use longctx_core::{
    AttentionShape, AttentionState, AttentionSums, Batch, DenseStore, Error, Footprint, KvCache,
    KvStore, Mark, Mask, Result, Selection, SeqId,
};
use proptest::prelude::*;
use token_drop::{Budget, H2o, PolicyCache};

/// A store of which one operation fails.
struct Failing {
    store: DenseStore,
    /// Number of operations until the failure; 0: none fails.
    left: Arc<AtomicUsize>,
}

impl Failing {
    fn count(&self) -> Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        self.left.store(left.saturating_sub(1), Ordering::Relaxed);
        if left == 1 { Err(Error::mismatch("store", "an operation", "a failure")) } else { Ok(()) }
    }
}

impl KvStore for Failing {
    fn shape(&self) -> &AttentionShape {
        self.store.shape()
    }
    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.count()?;
        self.store.append(batch, k, v)
    }
    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        self.count()?;
        self.store.append_selected(batch, k, v, tokens)
    }
    fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        self.count()?;
        self.store.attend(batch, q, mask)
    }
    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        self.count()?;
        self.store.attention_sums(batch, q, lse, mask)
    }
    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        self.count()?;
        self.store.retain(seq, keep)
    }
    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        self.count()?;
        self.store.read(seq, kv_head)
    }
    fn read_range(
        &self,
        seq: SeqId,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        self.count()?;
        self.store.read_range(seq, kv_head, entries)
    }
    fn lens(&self, seq: SeqId) -> Vec<usize> {
        self.store.lens(seq)
    }
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.count()?;
        self.store.fork(from, to)
    }
    fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.store.check_truncate_heads(seq, lens)
    }
    fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.store.truncate_heads(seq, lens)
    }
    fn mark(&self, seq: SeqId) -> Mark {
        self.store.mark(seq)
    }
    fn restore(&mut self, seq: SeqId, mark: &Mark) -> Result<()> {
        self.store.restore(seq, mark)
    }
    fn remove(&mut self, seq: SeqId) -> bool {
        self.store.remove(seq)
    }
    fn seqs(&self) -> Vec<SeqId> {
        self.store.seqs()
    }
    fn can_append(&self, batch: &Batch) -> bool {
        self.store.can_append(batch)
    }
    fn footprint(&self) -> Footprint {
        self.store.footprint()
    }
    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.store.seq_footprint(seq)
    }
    fn clear(&mut self) {
        self.store.clear();
    }
}

/// Returns what the sequences hold.
fn held(cache: &dyn KvCache) -> Vec<(SeqId, usize, usize, Footprint)> {
    let of = |seq| {
        // Capacity of lists that have grown is not freed.
        let footprint = Footprint { slack: 0, bookkeeping: 0, ..cache.seq_footprint(seq) };
        (seq, cache.seen(seq), cache.held(seq), footprint)
    };
    cache.seqs().into_iter().map(of).collect()
}

/// In one call, one sequence decodes, one is fed a chunk and one is new. Every store operation of
/// the call fails once.
#[test]
fn every_operation_of_a_store_may_fail() {
    let before = [(0, Input::random(50)), (1, Input::random(11))];
    let call = [(0, Input::random(1)), (1, Input::random(9)), (2, Input::random(30))];
    let left = Arc::new(AtomicUsize::new(0));
    let make = |kind: usize| {
        left.store(0, Ordering::Relaxed);
        let store = || Failing { store: store(DType::F32), left: left.clone() };
        let mut cache = caches(store).swap_remove(kind).1;
        feed_batch(&mut cache, &before).unwrap();
        cache
    };
    let plain = caches(|| store(DType::F32)).into_iter().enumerate();
    for (kind, (name, mut plain)) in plain {
        feed_batch(&mut plain, &before).unwrap();
        let expected = feed_batch(&mut plain, &call).unwrap();
        let mut cache = make(kind);
        let (mut failures, mut poisoned) = (0, 0);
        let outs = loop {
            let was = held(&*cache);
            left.store(failures + 1, Ordering::Relaxed);
            match feed_batch(&mut cache, &call) {
                Ok(outs) => break outs,
                Err(error) => assert!(error.to_string().contains("a failure"), "{name}: {error}"),
            }
            failures += 1;
            left.store(0, Ordering::Relaxed);
            let end = cache.check_truncate(0, cache.seen(0));
            if !matches!(end, Err(Error::Poisoned { .. })) {
                assert_eq!(held(&*cache), was, "{name}");
                continue;
            }
            // A failure midway: no sequence of the call can continue, and all can be removed.
            poisoned += 1;
            for (seq, _) in &call {
                let error = Input::random(1).feed(&mut cache, *seq).unwrap_err();
                assert!(matches!(error, Error::Poisoned { .. }), "{name}: {error}");
                assert!(cache.fork(*seq, 9).is_err() && cache.truncate(*seq, 0).is_err());
                assert!(cache.remove(*seq), "{name}");
            }
            assert_eq!(cache.footprint().payload, 0, "{name}");
            cache = make(kind);
        };
        assert!(failures > 0, "{name}");
        // A failed attention, score or append changes nothing. A failed eviction poisons, and so
        // does a failure in a later chunk of InfLLM.
        let max = if name.starts_with("inf-llm") { failures } else { 3 };
        assert!(poisoned <= max, "{name}: {poisoned} of {failures}");
        for (out, expected) in outs.iter().zip(&expected) {
            assert!(distance(out, expected) < 1e-5, "{name}");
        }
    }
}

/// Blocks of 32 entries of one kv head in f32.
const BLOCK: usize = 32 * 2 * DIM * 4;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(24, 1000), failure_persistence: None, ..Default::default()
    })]

    /// A full pool is an error that changes nothing, and it occurs only where `can_append` returned
    /// false.
    #[test]
    fn a_full_pool_changes_nothing(
        blocks in 4usize..16,
        calls in prop::collection::vec((0u64..3, prop_oneof![Just(1usize), 2usize..90]), 1..14),
    ) {
        let store = || DenseStore::with_capacity(shape(), DType::F32, blocks * BLOCK).unwrap();
        for (name, mut cache) in caches(store) {
            for &(seq, tokens) in &calls {
                let was = held(&*cache);
                let fits = cache.can_append(&Batch::single(seq, tokens).unwrap());
                match Input::random(tokens).feed(&mut cache, seq) {
                    Ok(_) => {}
                    Err(Error::PoolFull { .. }) => {
                        prop_assert!(!fits, "{}: {} tokens were to fit", name, tokens);
                        if name.starts_with("inf-llm") && held(&*cache) != was {
                            prop_assert!(cache.remove(seq));
                            continue;
                        }
                        prop_assert_eq!(held(&*cache), was, "{}", name);
                    }
                    Err(error) => prop_assert!(false, "{}: {}", name, error),
                }
            }
            // There is room again once sequences are removed.
            for seq in cache.seqs() {
                prop_assert!(cache.remove(seq));
            }
            prop_assert!(Input::random(20).feed(&mut cache, 0).is_ok(), "{}", name);
        }
    }
}

/// Forks share blocks. If a full pool has no room for copies of the blocks that an eviction
/// changes, the eviction is postponed.
#[test]
fn an_eviction_without_room_for_copies_is_deferred() {
    // 100 tokens of two heads take 4 blocks each.
    let full = |blocks: usize| {
        let store = DenseStore::with_capacity(shape(), DType::F32, blocks * BLOCK).unwrap();
        let budget = Budget::Tokens(100);
        let mut cache = PolicyCache::h2o(spec(), store, H2o::default(), budget).unwrap();
        Input::random(100).feed(&mut cache, 0).unwrap();
        cache.fork(0, 1).unwrap();
        cache
    };
    let held = |cache: &PolicyCache<DenseStore, H2o>| {
        (cache.seen(1), cache.held(1), cache.positions(1).unwrap()[0].len())
    };
    let token = Input::random(1);
    // Each head needs a block for the copy of its last block; only one is free.
    let mut cache = full(9);
    assert!(!cache.can_append(&Batch::single(1, 1).unwrap()));
    let error = token.feed(&mut cache, 1).unwrap_err();
    assert!(matches!(error, Error::PoolFull { .. }));
    assert_eq!(held(&cache), (100, 100, 100));
    // With ten blocks the token is appended, and nothing can be evicted until the fork is removed.
    let mut cache = full(10);
    token.feed(&mut cache, 1).unwrap();
    assert_eq!(held(&cache), (101, 101, 101));
    assert!(cache.remove(0));
    token.feed(&mut cache, 1).unwrap();
    assert_eq!(held(&cache), (102, 100, 100));
}
