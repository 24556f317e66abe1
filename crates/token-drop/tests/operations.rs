//! Random sequences of operations on many sequences, with errors in between, compared with a
//! separate cache for each sequence that sees no other sequences and no errors.

mod common;

use std::collections::BTreeMap;

use candle_core::DType;
use common::*;
use longctx_core::{Batch, Error, KvCache, SeqId};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Operation {
    /// Feeds tokens to some sequences.
    Attend(Vec<(SeqId, usize)>),
    /// The same with a NaN in a key.
    NotFinite(Vec<(SeqId, usize)>),
    /// The same with a wrong number of values.
    Misfit(Vec<(SeqId, usize)>),
    Fork(SeqId, SeqId),
    /// Removes this many tokens.
    Truncate(SeqId, usize),
    Remove(SeqId),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let tokens = || prop_oneof![3 => Just(1usize), 2 => 2usize..14];
    let batch = move || {
        prop::collection::btree_map(0u64..3, tokens(), 1..4)
            .prop_map(|seqs| seqs.into_iter().collect::<Vec<_>>())
    };
    let one = prop_oneof![
        12 => batch().prop_map(Operation::Attend),
        1 => batch().prop_map(Operation::NotFinite),
        1 => batch().prop_map(Operation::Misfit),
        2 => (0u64..3, 0u64..3).prop_map(|(from, to)| Operation::Fork(from, to)),
        2 => (0u64..3, 0usize..6).prop_map(|(seq, back)| Operation::Truncate(seq, back)),
        1 => (0u64..3).prop_map(Operation::Remove),
    ];
    prop::collection::vec(one, 1..14)
}

type Cache = Box<dyn KvCache>;

/// A sequence alone: its cache and its history.
struct Alone {
    cache: Cache,
    history: Vec<Event>,
}

#[derive(Clone)]
enum Event {
    Fed(Input),
    Truncated(usize),
}

fn new(kind: usize) -> Cache {
    caches(|| store(DType::F32)).swap_remove(kind).1
}

impl Alone {
    fn replay(kind: usize, history: Vec<Event>) -> Self {
        let mut cache = new(kind);
        for event in &history {
            match event {
                Event::Fed(input) => drop(input.feed(&mut cache, 0).unwrap()),
                Event::Truncated(len) => cache.truncate(0, *len).unwrap(),
            }
        }
        Self { cache, history }
    }
}

fn run(name: &str, kind: usize, operations: &[Operation]) {
    let mut cache = new(kind);
    let mut alone: BTreeMap<SeqId, Alone> = BTreeMap::new();
    for (i, operation) in operations.iter().enumerate() {
        let inputs = |seqs: &[(SeqId, usize)]| -> Vec<_> {
            let input = |&(seq, tokens): &(SeqId, usize)| {
                (seq, Input::seeded(1000 * i as u64 + seq, tokens))
            };
            seqs.iter().map(input).collect()
        };
        match operation {
            Operation::Attend(seqs) => {
                let parts = inputs(seqs);
                let outs = feed_batch(&mut cache, &parts).unwrap();
                for ((seq, input), out) in parts.into_iter().zip(outs) {
                    let own = alone.entry(seq).or_insert_with(|| Alone::replay(kind, Vec::new()));
                    let expected = input.feed(&mut own.cache, 0).unwrap();
                    let error = distance(&out, &expected);
                    assert!(error < 1e-5, "{name}, operation {i}: off by {error}");
                    own.history.push(Event::Fed(input));
                }
            }
            Operation::NotFinite(seqs) => {
                let mut parts = inputs(seqs);
                let last = &mut parts.last_mut().unwrap().1;
                last.k = (&last.k / 0.0).unwrap();
                let error = feed_batch(&mut cache, &parts).unwrap_err();
                assert!(matches!(error, Error::NotFinite { .. }), "{name}: {error}");
            }
            Operation::Misfit(seqs) => {
                let all: Vec<_> = inputs(seqs).into_iter().map(|(_, input)| input).collect();
                let mut all = Input::cat(&all);
                all.v = Input::seeded(0, all.tokens() + 1).v;
                let batch = Batch::new(seqs).unwrap();
                assert!(all.step(&batch, |step| cache.attend(step)).is_err());
            }
            Operation::Fork(from, to) => {
                let works = alone.contains_key(from) && !alone.contains_key(to);
                assert_eq!(cache.fork(*from, *to).is_ok(), works, "{name}, operation {i}");
                if works {
                    let copy = Alone::replay(kind, alone[from].history.clone());
                    alone.insert(*to, copy);
                }
            }
            Operation::Truncate(seq, back) => {
                let len = cache.seen(*seq).saturating_sub(*back);
                let Some(own) = alone.get_mut(seq) else {
                    assert!(cache.truncate(*seq, len).is_err());
                    continue;
                };
                let allowed = own.cache.truncate(0, len).is_ok();
                assert_eq!(cache.check_truncate(*seq, len).is_ok(), allowed, "{name}");
                assert_eq!(cache.truncate(*seq, len).is_ok(), allowed, "{name}, operation {i}");
                if allowed {
                    own.history.push(Event::Truncated(len));
                }
            }
            Operation::Remove(seq) => {
                assert_eq!(cache.remove(*seq), alone.remove(seq).is_some(), "{name}");
            }
        }
        assert_eq!(cache.seqs(), alone.keys().copied().collect::<Vec<_>>(), "{name}");
        for (&seq, own) in &alone {
            let held = |cache: &dyn KvCache, seq| (cache.seen(seq), cache.held(seq));
            assert_eq!(held(&*cache, seq), held(&*own.cache, 0), "{name}, operation {i}");
        }
    }
    cache.clear();
    assert_eq!(cache.footprint().total(), 0, "{name}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(200, 10_000), failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn random_operations_give_the_results_of_separate_sequences(operations in operations()) {
        let names: Vec<_> = caches(|| store(DType::F32)).into_iter().map(|(name, _)| name).collect();
        for (kind, name) in names.into_iter().enumerate() {
            run(name, kind, &operations);
        }
    }
}
