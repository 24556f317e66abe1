//! Many sequences in one session: batches, fork, truncate, remove, and errors during a call.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use base_models::{Config, LoadOptions, Session, Transformer};
use candle_core::{DType, Tensor};
use longctx_core::{
    Batch, CausalLm, DenseCache, Error, KvCache, LayerSpec, Logits, Result, SeqId, Step,
};

const TOLERANCE: f32 = 1e-5;

/// Returns a Llama of three layers with random weights.
fn model() -> Transformer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/config.json");
    let config = Config::from_file(&path).unwrap();
    let config = Config { layers: 3, windows: vec![None; 3], ..config };
    Transformer::random(config, &LoadOptions::default()).unwrap()
}

fn dense(layer: &LayerSpec) -> Result<DenseCache> {
    DenseCache::new(layer.clone(), DType::F32)
}

fn feed(session: &mut Session, parts: &[(SeqId, &[u32])], logits: Logits) -> Result<Tensor> {
    let batch = Batch::new(&parts.iter().map(|(seq, ids)| (*seq, ids.len())).collect::<Vec<_>>())?;
    let ids: Vec<u32> = parts.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
    session.forward(&batch, &ids, logits)
}

/// Returns the logits of all tokens of one sequence, fed in one call to its own session.
fn alone(model: &Transformer, ids: &[u32]) -> Tensor {
    feed(&mut model.session(dense).unwrap(), &[(0, ids)], Logits::All).unwrap()
}

fn last(model: &Transformer, ids: &[u32]) -> Tensor {
    alone(model, ids).narrow(0, ids.len() - 1, 1).unwrap()
}

fn ids(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (seed * 31 + i * i * 7 + i) % 96).collect()
}

fn assert_close(a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims());
    let error = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(error <= TOLERANCE, "{error}");
}

#[test]
fn a_batch_of_unequal_sequences_equals_them_one_by_one() {
    let model = model();
    let (a, b, c) = (ids(1, 41), ids(2, 7), ids(3, 90));
    let mut session = model.session(dense).unwrap();
    // Prompts and single tokens in one batch; c starts later, and b is not in every batch.
    let first = feed(&mut session, &[(7, &a[..40]), (2, &b[..6])], Logits::All).unwrap();
    assert_eq!(first.dims(), [46, 96]);
    let second = feed(&mut session, &[(9, &c[..89]), (7, &a[40..])], Logits::All).unwrap();
    let third = feed(&mut session, &[(2, &b[6..]), (9, &c[89..])], Logits::Last).unwrap();
    assert_eq!(third.dims(), [2, 96]);
    let row = |x: &Tensor, start, len| x.narrow(0, start, len).unwrap();
    let whole = |parts: &[Tensor]| Tensor::cat(parts, 0).unwrap();
    assert_close(&whole(&[row(&first, 0, 40), row(&second, 89, 1)]), &alone(&model, &a));
    assert_close(&whole(&[row(&first, 40, 6), row(&third, 0, 1)]), &alone(&model, &b));
    assert_close(&whole(&[row(&second, 0, 89), row(&third, 1, 1)]), &alone(&model, &c));
    assert_eq!(session.seqs(), [2, 7, 9]);
    assert_eq!([2, 7, 9, 5].map(|seq| session.seen(seq)), [7, 41, 90, 0]);
}

#[test]
fn logits_of_last_tokens_are_rows_of_all_logits() {
    let model = model();
    let (a, b) = (ids(4, 5), ids(5, 12));
    let parts: [(SeqId, &[u32]); 2] = [(0, &a), (1, &b)];
    let all = feed(&mut model.session(dense).unwrap(), &parts, Logits::All).unwrap();
    let last = feed(&mut model.session(dense).unwrap(), &parts, Logits::Last).unwrap();
    let want = [all.narrow(0, 4, 1).unwrap(), all.narrow(0, 16, 1).unwrap()];
    assert_close(&last, &Tensor::cat(&want, 0).unwrap());
}

#[test]
fn forks_are_independent() {
    let model = model();
    let prefix = ids(6, 50);
    let mut session = model.session(dense).unwrap();
    feed(&mut session, &[(0, &prefix)], Logits::Last).unwrap();
    session.fork(0, 1).unwrap();
    assert_eq!(session.seen(1), 50);
    let both = feed(&mut session, &[(0, &[5, 6]), (1, &[8])], Logits::Last).unwrap();
    let want = [
        last(&model, &[&prefix[..], &[5, 6]].concat()),
        last(&model, &[&prefix[..], &[8]].concat()),
    ];
    assert_close(&both, &Tensor::cat(&want, 0).unwrap());
    assert!(matches!(session.fork(9, 2), Err(Error::UnknownSequence(9))));
    assert!(session.fork(0, 1).unwrap_err().to_string().contains("sequence 1"));
    assert_eq!(session.seqs(), [0, 1]);
}

#[test]
fn a_truncated_sequence_continues_from_its_new_end() {
    let model = model();
    let mut session = model.session(dense).unwrap();
    feed(&mut session, &[(3, &[1, 2, 3, 4, 5])], Logits::Last).unwrap();
    session.truncate(3, 2).unwrap();
    assert_eq!(session.seen(3), 2);
    let again = feed(&mut session, &[(3, &[7, 8])], Logits::Last).unwrap();
    assert_close(&again, &last(&model, &[1, 2, 7, 8]));
    assert!(session.truncate(3, 9).unwrap_err().to_string().contains("at most 4, got 9"));
    assert!(matches!(session.truncate(4, 0), Err(Error::UnknownSequence(4))));
}

#[test]
fn a_removed_sequence_frees_its_memory_and_can_start_again() {
    let model = model();
    let mut session = model.session(dense).unwrap();
    feed(&mut session, &[(0, &ids(7, 30)), (1, &ids(8, 10))], Logits::Last).unwrap();
    let (all, one) = (session.footprint().payload, session.seq_footprint(0).payload);
    assert!(session.remove(0) && !session.remove(0));
    assert_eq!(session.footprint().payload, all - one);
    let again = feed(&mut session, &[(0, &[3, 4])], Logits::Last).unwrap();
    assert_close(&again, &last(&model, &[3, 4]));
    session.clear();
    assert_eq!((session.seqs().len(), session.footprint().payload), (0, 0));
}

/// The faults of the middle layer.
#[derive(Default)]
struct Faults {
    attend: AtomicBool,
    fork: AtomicBool,
    truncate: AtomicBool,
}

/// A dense cache whose `attend` can be made to fail and whose `truncate` can be disabled.
struct Faulty {
    inner: DenseCache,
    faults: Arc<Faults>,
}

/// Returns a session whose middle layer has the faults `middle`; the other layers have `others`.
fn faulty(model: &Transformer, middle: &Arc<Faults>, others: &Arc<Faults>) -> Session {
    let make = |layer: &LayerSpec| {
        let faults = if layer.index == 1 { middle } else { others };
        Ok(Faulty { inner: dense(layer)?, faults: faults.clone() })
    };
    model.session(make).unwrap()
}

fn fault(on: &AtomicBool, what: &str) -> Result<()> {
    if on.load(Relaxed) { Err(Error::Unsupported(what.into())) } else { Ok(()) }
}

impl KvCache for Faulty {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        fault(&self.faults.attend, "a fault")?;
        self.inner.attend(step)
    }
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        fault(&self.faults.fork, "a fork")?;
        self.inner.fork(from, to)
    }
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        fault(&self.faults.truncate, "going back")?;
        self.inner.check_truncate(seq, len)
    }
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        fault(&self.faults.truncate, "going back")?;
        self.inner.truncate(seq, len)
    }
    fn can_append(&self, batch: &Batch) -> bool {
        !self.faults.attend.load(Relaxed) && self.inner.can_append(batch)
    }

    longctx_core::forward_kv_cache!(self => self.inner;
        spec, append_prompt, needs_lse, remove, seqs, seen, held, footprint, seq_footprint, clear);
}

#[test]
fn after_an_error_in_a_layer_the_sequences_are_unchanged() {
    let model = model();
    let (middle, others) = (Arc::default(), Arc::default());
    let mut session = faulty(&model, &middle, &others);
    feed(&mut session, &[(0, &[1, 2, 3]), (1, &[4])], Logits::Last).unwrap();
    let before = session.footprint().payload;
    middle.attend.store(true, Relaxed);
    assert!(!session.can_append(&Batch::decode(&[0]).unwrap()));
    // Sequence 0 is known, 5 is new.
    let error = feed(&mut session, &[(0, &[9, 9]), (5, &[9])], Logits::Last).unwrap_err();
    assert!(error.to_string().contains("a fault"));
    assert_eq!(session.footprint().payload, before);
    assert_eq!((session.seqs(), session.seen(0)), (vec![0, 1], 3));
    assert!(session.caches().iter().all(|cache| cache.seqs() == [0, 1]));
    middle.attend.store(false, Relaxed);
    let again = feed(&mut session, &[(0, &[7]), (5, &[8])], Logits::Last).unwrap();
    let want = [last(&model, &[1, 2, 3, 7]), last(&model, &[8])];
    assert_close(&again, &Tensor::cat(&want, 0).unwrap());
}

#[test]
fn a_sequence_whose_layers_cannot_be_truncated_is_poisoned_until_removed() {
    let model = model();
    let (middle, others) = (Arc::<Faults>::default(), Arc::<Faults>::default());
    let mut session = faulty(&model, &middle, &others);
    feed(&mut session, &[(0, &[1, 2, 3]), (1, &[4])], Logits::Last).unwrap();
    middle.attend.store(true, Relaxed);
    others.truncate.store(true, Relaxed);
    feed(&mut session, &[(0, &[9])], Logits::Last).unwrap_err();
    middle.attend.store(false, Relaxed);
    others.truncate.store(false, Relaxed);

    let poisoned = |result: Result<()>| match result.unwrap_err() {
        Error::Poisoned { seq: 0, reason } => {
            assert!(reason.contains("a fault") && reason.contains("going back"), "{reason}")
        }
        other => panic!("{other}"),
    };
    // With sequence 1 in the same batch, nothing is computed.
    poisoned(feed(&mut session, &[(1, &[5]), (0, &[9])], Logits::Last).map(drop));
    poisoned(session.fork(0, 2));
    poisoned(session.truncate(0, 3));
    assert_eq!((session.seqs(), session.seen(0)), (vec![0, 1], 3));
    let other = feed(&mut session, &[(1, &[5])], Logits::Last).unwrap();
    assert_close(&other, &last(&model, &[4, 5]));
    assert!(session.remove(0));
    let again = feed(&mut session, &[(0, &[6])], Logits::Last).unwrap();
    assert_close(&again, &last(&model, &[6]));
}

#[test]
fn a_fork_or_truncation_that_one_layer_refuses_changes_no_layer() {
    let model = model();
    let (middle, others) = (Arc::<Faults>::default(), Arc::default());
    let mut session = faulty(&model, &middle, &others);
    feed(&mut session, &[(0, &[1, 2, 3])], Logits::Last).unwrap();
    middle.fork.store(true, Relaxed);
    assert!(session.fork(0, 1).unwrap_err().to_string().contains("a fork"));
    middle.truncate.store(true, Relaxed);
    assert!(session.truncate(0, 1).unwrap_err().to_string().contains("going back"));
    assert_eq!((session.seqs(), session.seen(0)), (vec![0], 3));
    assert!(session.caches().iter().all(|cache| cache.seqs() == [0] && cache.seen(0) == 3));
    let next = feed(&mut session, &[(0, &[4])], Logits::Last).unwrap();
    assert_close(&next, &last(&model, &[1, 2, 3, 4]));
}
