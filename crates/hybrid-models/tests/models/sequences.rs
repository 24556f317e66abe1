//! Many sequences in one session: batches of unequal length, fork, truncation to snapshots,
//! removal, and errors during a call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::common::{Fixture, SAME, advance, feed, relative_distance, session};
use crate::mixed::mixed;
use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model, Session};
use longctx_core::{CausalLm, DenseCache, Error, KvCache, LayerSpec, Logits, Result, SeqId, Step};

const FAMILIES: [&str; 8] =
    ["mamba", "mamba2", "mamba2_groups", "rwkv4", "rwkv5", "rwkv6", "rwkv7", "recurrent_gemma"];

/// Returns every family, and a stack of all mixers with attention.
fn models() -> Vec<(&'static str, Model)> {
    let of_family = |name| (name, Fixture::open(name).model(DType::F32));
    FAMILIES.into_iter().map(of_family).chain([("mixed", stack())]).collect()
}

fn stack() -> Model {
    let (config, tensors) = mixed(32, 16);
    Model::from_tensors(Some(&config.to_string()), tensors, &LoadOptions::default()).unwrap()
}

fn ids(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (seed * 31 + i * i * 7 + i) % 50).collect()
}

/// Returns all logits of one sequence, fed token by token to its own session.
fn alone(model: &Model, ids: &[u32]) -> Tensor {
    let tokens = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    feed(model, &tokens, &[1]).squeeze(0).unwrap()
}

fn last(model: &Model, ids: &[u32]) -> Tensor {
    alone(model, ids).narrow(0, ids.len() - 1, 1).unwrap()
}

fn assert_same(name: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims(), "{name}");
    let error = relative_distance(a, b);
    assert!(error <= SAME, "{name}: off by {error} of the largest logit");
}

fn bits(x: &Tensor) -> Vec<u32> {
    let numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    numbers.into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_batch_of_unequal_sequences_equals_them_one_by_one() {
    let mut largest = 0f32;
    for (name, model) in models() {
        // The second one is longer than a block of the prefill.
        let (a, b, c) = (ids(1, 41), ids(2, 700), ids(3, 9));
        let mut session = session(&model);
        let first = [(7, &a[..40]), (2, &b[..1])];
        let first = advance(&mut session, &first, Logits::All).unwrap();
        let second = [(2, &b[1..699]), (9, &c[..8]), (7, &a[40..])];
        let second = advance(&mut session, &second, Logits::All).unwrap();
        let third = [(9, &c[8..]), (2, &b[699..])];
        let third = advance(&mut session, &third, Logits::Last).unwrap();
        let row = |x: &Tensor, start, len| x.narrow(0, start, len).unwrap();
        let whole = |parts: &[Tensor]| Tensor::cat(parts, 0).unwrap();
        for (got, ids) in [
            (whole(&[row(&first, 0, 40), row(&second, 706, 1)]), &a),
            (whole(&[row(&first, 40, 1), row(&second, 0, 698), row(&third, 1, 1)]), &b),
            (whole(&[row(&second, 698, 8), row(&third, 0, 1)]), &c),
        ] {
            let want = alone(&model, ids);
            assert_same(name, &got, &want);
            largest = largest.max(relative_distance(&got, &want));
        }
        assert_eq!([2, 7, 9, 5].map(|seq| session.seen(seq)), [700, 41, 9, 0], "{name}");
    }
    println!("off by at most {largest:.1e} of the largest logit");
}

#[test]
fn forks_are_independent() {
    for (name, model) in models() {
        let prefix = ids(6, 50);
        let mut session = session(&model);
        advance(&mut session, &[(0, &prefix)], Logits::Last).unwrap();
        session.fork(0, 1).unwrap();
        // Feeding one sequence does not change the other.
        let a = advance(&mut session, &[(0, &[5, 6])], Logits::Last).unwrap();
        let b = advance(&mut session, &[(1, &[8])], Logits::Last).unwrap();
        assert_same(name, &a, &last(&model, &[&prefix[..], &[5, 6]].concat()));
        assert_same(name, &b, &last(&model, &[&prefix[..], &[8]].concat()));
        assert!(matches!(session.fork(9, 2), Err(Error::UnknownSequence(9))));
        assert!(session.fork(0, 1).unwrap_err().to_string().contains("sequence 1"));
    }
}

#[test]
fn a_removed_sequence_frees_its_memory_and_can_start_again() {
    for (name, model) in models() {
        let mut session = session(&model);
        advance(&mut session, &[(0, &ids(7, 30)), (1, &ids(8, 10))], Logits::Last).unwrap();
        let (all, one) = (session.footprint().payload, session.seq_footprint(0).payload);
        assert!(session.remove(0) && !session.remove(0));
        assert_eq!(session.footprint().payload, all - one, "{name}");
        let again = advance(&mut session, &[(0, &[3, 4])], Logits::Last).unwrap();
        assert_same(name, &again, &last(&model, &[3, 4]));
        session.clear();
        assert_eq!((session.seqs().len(), session.footprint().payload), (0, 0), "{name}");
    }
}

#[test]
fn without_snapshots_a_sequence_can_only_be_truncated_to_length_0() {
    for (name, model) in models() {
        let mut session = session(&model);
        advance(&mut session, &[(0, &[1, 2, 3])], Logits::Last).unwrap();
        session.truncate(0, 3).unwrap();
        let refused = session.truncate(0, 2).unwrap_err();
        assert!(matches!(refused, Error::Unsupported(_)), "{name}: {refused}");
        assert!(session.truncate(0, 4).unwrap_err().to_string().contains("at most 3, got 4"));
        assert!(matches!(session.truncate(5, 0), Err(Error::UnknownSequence(5))));
        assert_eq!(session.seen(0), 3);
        session.truncate(0, 0).unwrap();
        let again = advance(&mut session, &[(0, &[7, 8])], Logits::Last).unwrap();
        assert_same(name, &again, &last(&model, &[7, 8]));
    }
}

#[test]
fn a_sequence_is_truncated_to_its_snapshots() {
    for (name, model) in models() {
        let (tokens, other) = (ids(9, 75), ids(10, 3));
        let mut session = session(&model).with_snapshots(16, 3).unwrap();
        // Snapshots within a prompt, beside a sequence without snapshots.
        advance(&mut session, &[(1, &other), (0, &tokens[..70])], Logits::Last).unwrap();
        assert_eq!((session.last_snapshot(0), session.last_snapshot(1)), (Some(64), None));
        let states = 5 * session.seq_footprint(1).payload;
        if !model.has_attention() {
            assert_eq!(session.footprint().payload, states, "{name}: two states, three snapshots");
        }
        // Three snapshots are kept: at 32, 48 and 64.
        assert!(session.check_truncate(0, 16).is_err() && session.check_truncate(0, 40).is_err());
        session.fork(0, 2).unwrap();
        for (seq, len) in [(0, 64), (0, 32), (2, 48)] {
            session.truncate(seq, len).unwrap();
            assert_eq!((session.seen(seq), session.last_snapshot(seq)), (len, Some(len)));
            let next =
                advance(&mut session, &[(seq, &tokens[len..len + 2])], Logits::Last).unwrap();
            assert_same(name, &next, &last(&model, &tokens[..len + 2]));
        }
        // Single tokens leave snapshots too.
        for token in &tokens[34..50] {
            advance(&mut session, &[(0, &[*token]), (1, &[1])], Logits::Last).unwrap();
        }
        assert_eq!((session.last_snapshot(0), session.last_snapshot(1)), (Some(48), Some(16)));
        session.truncate(0, 48).unwrap();
        let next = advance(&mut session, &[(0, &tokens[48..])], Logits::Last).unwrap();
        assert_same(name, &next, &last(&model, &tokens));
    }
}

/// A state does not depend on whether snapshots were taken on the way to it, and a copy does not
/// depend on later tokens.
#[test]
fn a_truncated_sequence_has_the_snapshots_state() {
    for (name, model) in models().into_iter().filter(|(_, model)| !model.has_attention()) {
        let tokens = ids(11, 40);
        let start = || session(&model).with_snapshots(20, 1).unwrap();
        let (mut whole, mut half) = (start(), start());
        advance(&mut half, &[(0, &tokens[..20])], Logits::Last).unwrap();
        advance(&mut whole, &[(0, &tokens[..39])], Logits::Last).unwrap();
        whole.truncate(0, 20).unwrap();
        assert_eq!(whole.state(0).unwrap(), half.state(0).unwrap(), "{name}");
        let [a, b] = [&mut whole, &mut half]
            .map(|s| advance(s, &[(0, &tokens[20..])], Logits::Last).unwrap());
        assert_eq!(bits(&a), bits(&b), "{name}");
    }
}

/// A dense cache whose `attend` can be made to fail and whose `truncate` can be disabled.
struct Faulty {
    inner: DenseCache,
    attend: Arc<AtomicBool>,
    truncate: Arc<AtomicBool>,
}

fn fault(on: &AtomicBool, what: &str) -> Result<()> {
    if on.load(Relaxed) { Err(Error::Unsupported(what.into())) } else { Ok(()) }
}

impl KvCache for Faulty {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        fault(&self.attend, "a fault")?;
        self.inner.attend(step)
    }
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        fault(&self.truncate, "going back")?;
        self.inner.check_truncate(seq, len)
    }
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        self.inner.truncate(seq, len)
    }

    longctx_core::forward_kv_cache!(self => self.inner;
        spec, append_prompt, needs_lse, fork, remove, seqs, seen, held, can_append, footprint,
        seq_footprint, clear);
}

/// A stack of all mixers whose second attention layer (the last layer) can be made to fail.
fn faulty() -> (Model, Session, Arc<AtomicBool>, Arc<AtomicBool>) {
    let (attend, truncate) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
    let model = stack();
    let make = |layer: &LayerSpec| {
        let inner = DenseCache::new(layer.clone(), DType::F32)?;
        let attend = if layer.index == 5 { attend.clone() } else { Arc::default() };
        Ok(Faulty { inner, attend, truncate: truncate.clone() })
    };
    let session = model.session(make).unwrap();
    (model, session, attend, truncate)
}

#[test]
fn after_an_error_in_a_layer_the_sequences_are_unchanged() {
    let (model, mut session, attend, _) = faulty();
    advance(&mut session, &[(0, &[1, 2, 3]), (1, &[4])], Logits::Last).unwrap();
    let before = session.footprint();
    attend.store(true, Relaxed);
    let error = advance(&mut session, &[(0, &[9, 9]), (5, &[9])], Logits::Last).unwrap_err();
    assert!(error.to_string().contains("a fault"));
    assert_eq!(session.footprint().payload, before.payload);
    assert_eq!((session.seqs(), session.seen(0)), (vec![0, 1], 3));
    attend.store(false, Relaxed);
    let again = advance(&mut session, &[(0, &[7]), (5, &[8])], Logits::Last).unwrap();
    let want = [last(&model, &[1, 2, 3, 7]), last(&model, &[8])];
    assert_same("mixed", &again, &Tensor::cat(&want, 0).unwrap());
}

#[test]
fn a_sequence_whose_caches_cannot_be_truncated_is_poisoned_until_removed() {
    let (model, mut session, attend, truncate) = faulty();
    advance(&mut session, &[(0, &[1, 2, 3]), (1, &[4])], Logits::Last).unwrap();
    attend.store(true, Relaxed);
    truncate.store(true, Relaxed);
    advance(&mut session, &[(0, &[9])], Logits::Last).unwrap_err();
    attend.store(false, Relaxed);
    truncate.store(false, Relaxed);
    for error in [
        advance(&mut session, &[(1, &[5]), (0, &[9])], Logits::Last).unwrap_err(),
        session.fork(0, 2).unwrap_err(),
        session.truncate(0, 0).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Poisoned { seq: 0, .. }), "{error}");
        assert!(error.to_string().contains("a fault"), "{error}");
    }
    let other = advance(&mut session, &[(1, &[5])], Logits::Last).unwrap();
    assert_same("mixed", &other, &last(&model, &[4, 5]));
    assert!(session.remove(0));
    let again = advance(&mut session, &[(0, &[6])], Logits::Last).unwrap();
    assert_same("mixed", &again, &last(&model, &[6]));
}
