//! Applies random operations to sessions of all models and to plain lists of token ids. The logits
//! must equal those of a new session that is fed a list in one call.
//!
//!     LONGCTX_SLOW=1 cargo test -p longctx-examples --test model_operations
//!
//! runs 5,000 operations per model instead of 200.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base_models::{Config, Transformer};
use candle_core::{DType, Tensor};
use hybrid_models::Model;
use longctx_core::{Batch, CausalLm, DenseCache, Error, LayerSpec, Logits, SeqId};
use longctx_examples::methods::Method;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// The longest sequence: beyond the windows of the models, and several blocks of a pool.
const LONGEST: usize = 150;
const SEQS: std::ops::Range<SeqId> = 0..5;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates").join(path)
}

type Sessions<'a> = Box<dyn Fn() -> Box<dyn CausalLm> + 'a>;

struct Trial<'a> {
    name: String,
    /// Creates the session to which operations are applied.
    session: Sessions<'a>,
    /// Creates a session that is fed one list of ids.
    plain: Sessions<'a>,
    /// The largest difference, relative to the largest logit.
    tolerance: f32,
}

impl Trial<'_> {
    fn run(&self, operations: usize) {
        let mut rng = StdRng::seed_from_u64(3);
        let mut session = (self.session)();
        let vocab = session.vocab_size() as u32;
        let mut lists: BTreeMap<SeqId, Vec<u32>> = BTreeMap::new();
        let (mut errors, mut rollbacks) = (0, 0);
        for step in 0..operations {
            let at = format!("{}, operation {step}", self.name);
            match rng.random_range(0..10) {
                0..5 => self.feed(&mut rng, &mut *session, &mut lists, &mut errors, &at),
                5 => fork(&mut rng, &mut *session, &mut lists, &at),
                6..8 => rollbacks += truncate(&mut rng, &mut *session, &mut lists, &at),
                8 => wrong(&mut rng, &mut *session, &lists, vocab, &at),
                _ => {
                    let seq = rng.random_range(SEQS);
                    assert_eq!(session.remove(seq), lists.remove(&seq).is_some(), "{at}");
                }
            }
            assert_eq!(session.seqs(), lists.keys().copied().collect::<Vec<_>>(), "{at}");
            for (&seq, list) in &lists {
                assert_eq!(session.seen(seq), list.len(), "{at}, sequence {seq}");
            }
        }
        println!("{}: {errors} full pools, {rollbacks} rollbacks", self.name);
    }

    fn feed(
        &self,
        rng: &mut StdRng,
        session: &mut dyn CausalLm,
        lists: &mut BTreeMap<SeqId, Vec<u32>>,
        errors: &mut usize,
        at: &str,
    ) {
        let vocab = session.vocab_size() as u32;
        let mut parts: BTreeMap<SeqId, Vec<u32>> = BTreeMap::new();
        for _ in 0..rng.random_range(1..4) {
            let seq = rng.random_range(SEQS);
            let room = LONGEST - lists.get(&seq).map_or(0, Vec::len);
            let count = *[1, 1, 3, 20, 70].choose(rng).unwrap();
            if room > 0 {
                let ids = (0..count.min(room)).map(|_| rng.random_range(0..vocab)).collect();
                parts.insert(seq, ids);
            }
        }
        let lengths: Vec<_> = parts.iter().map(|(&seq, ids)| (seq, ids.len())).collect();
        let Ok(batch) = Batch::new(&lengths) else { return };
        let fits = session.can_append(&batch);
        let logits = match session.forward(
            &batch,
            &parts.values().flatten().copied().collect::<Vec<_>>(),
            Logits::Last,
        ) {
            Ok(logits) => logits,
            Err(Error::PoolFull { .. }) => {
                *errors += 1;
                for (seq, ids) in parts {
                    self.after_failure(session, lists, seq, ids[0], at);
                }
                return;
            }
            Err(error) => panic!("{at}: {error}, room for it: {fits}"),
        };
        for (row, (seq, ids)) in parts.into_iter().enumerate() {
            let list = lists.entry(seq).or_default();
            list.extend(ids);
            let got = logits.narrow(0, row, 1).unwrap();
            let mut plain = (self.plain)();
            let batch = Batch::single(0, list.len()).unwrap();
            let want = plain.forward(&batch, list, Logits::Last).unwrap();
            let error = relative_distance(&got, &want);
            assert!(error <= self.tolerance, "{at}, sequence {seq}: off by {error}");
        }
    }

    /// After a failed call a sequence is unchanged, or poisoned; poisoned ones are removed.
    fn after_failure(
        &self,
        session: &mut dyn CausalLm,
        lists: &mut BTreeMap<SeqId, Vec<u32>>,
        seq: SeqId,
        id: u32,
        at: &str,
    ) {
        let before = lists.get(&seq).map_or(0, Vec::len);
        if !session.seqs().contains(&seq) {
            assert_eq!(before, 0, "{at}: sequence {seq} is lost");
            return;
        }
        match session.check_truncate(seq, before) {
            Ok(()) => assert_eq!(session.seen(seq), before, "{at}, sequence {seq}"),
            Err(Error::Poisoned { .. }) => {
                let again = session.forward(&Batch::single(seq, 1).unwrap(), &[id], Logits::Last);
                assert!(matches!(again, Err(Error::Poisoned { .. })), "{at}: {again:?}");
                assert!(session.remove(seq));
                lists.remove(&seq);
            }
            Err(error) => panic!("{at}: {error}"),
        }
    }
}

fn relative_distance(a: &Tensor, b: &Tensor) -> f32 {
    let max = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    max((a - b).unwrap()) / max(b.clone())
}

fn fork(
    rng: &mut StdRng,
    session: &mut dyn CausalLm,
    lists: &mut BTreeMap<SeqId, Vec<u32>>,
    at: &str,
) {
    let (from, to) = (rng.random_range(SEQS), rng.random_range(SEQS));
    let possible = lists.contains_key(&from) && !lists.contains_key(&to);
    match session.fork(from, to) {
        Ok(()) => {
            assert!(possible, "{at}: fork of {from} into {to}");
            lists.insert(to, lists[&from].clone());
        }
        Err(Error::PoolFull { .. }) => {}
        Err(error) => assert!(!possible, "{at}: {error}"),
    }
}

/// Returns 1 if the sequence was truncated.
fn truncate(
    rng: &mut StdRng,
    session: &mut dyn CausalLm,
    lists: &mut BTreeMap<SeqId, Vec<u32>>,
    at: &str,
) -> usize {
    let seq = rng.random_range(SEQS);
    let seen = lists.get(&seq).map_or(0, Vec::len);
    // Often by a few tokens, as in speculative decoding; sometimes to more tokens than exist.
    let len = match rng.random_bool(0.6) {
        true => seen.saturating_sub(rng.random_range(0..6)),
        false => rng.random_range(0..=seen + 2),
    };
    let allowed = session.check_truncate(seq, len);
    let done = session.truncate(seq, len);
    assert_eq!(allowed.is_ok(), done.is_ok(), "{at}: {allowed:?}, {done:?}");
    if done.is_err() {
        return 0;
    }
    let list = lists.get_mut(&seq).unwrap_or_else(|| panic!("{at}: no sequence {seq}"));
    assert!(len <= list.len(), "{at}");
    list.truncate(len);
    1
}

/// Makes invalid calls, which must fail and change nothing.
fn wrong(
    rng: &mut StdRng,
    session: &mut dyn CausalLm,
    lists: &BTreeMap<SeqId, Vec<u32>>,
    vocab: u32,
    at: &str,
) {
    let seq = rng.random_range(SEQS);
    let batch = Batch::single(seq, 2).unwrap();
    for ids in [vec![0], vec![0, vocab], vec![0, 1, 2]] {
        assert!(session.forward(&batch, &ids, Logits::Last).is_err(), "{at}");
    }
    let absent = SEQS.end + 1;
    assert!(session.fork(absent, absent + 1).is_err() && session.truncate(absent, 0).is_err());
    assert_eq!(session.seen(seq), lists.get(&seq).map_or(0, Vec::len), "{at}");
}

fn operations() -> usize {
    if std::env::var_os("LONGCTX_SLOW").is_some() { 5_000 } else { 200 }
}

fn dense(layer: &LayerSpec) -> longctx_core::Result<DenseCache> {
    DenseCache::new(layer.clone(), DType::F32)
}

#[test]
fn transformers_equal_a_new_session_after_any_operations() {
    for name in ["llama", "qwen3"] {
        let config =
            Config::from_file(&fixture(&format!("base-models/tests/fixtures/{name}/config.json")))
                .unwrap();
        let model = Transformer::random(config, &Default::default()).unwrap();
        let plain = || -> Box<dyn CausalLm> { Box::new(model.session(dense).unwrap()) };
        let bounded = |layer: &LayerSpec| -> longctx_core::Result<DenseCache> {
            // Room for about 250 tokens.
            let token = 4 * layer.shape.kv_heads * 2 * layer.shape.head_dim;
            DenseCache::with_capacity(layer.clone(), DType::F32, 250 * token)
        };
        let sessions: [(&str, Sessions<'_>); 2] = [
            ("growing", Box::new(plain)),
            ("bounded", Box::new(|| Box::new(model.session(bounded).unwrap()))),
        ];
        for (pool, session) in sessions {
            let name = format!("{name}, {pool} pool");
            Trial { name, session, plain: Box::new(plain), tolerance: 1e-4 }.run(operations());
        }
        // A packed cache that holds short sequences entirely in full precision.
        let kivi = |layer: &LayerSpec| Method::named("kivi-4-rolling").unwrap().cache(layer);
        let session: Sessions<'_> = Box::new(|| Box::new(model.session(kivi).unwrap()));
        let name = format!("{name}, kivi-4");
        Trial { name, session, plain: Box::new(plain), tolerance: 0.1 }.run(operations());
    }
}

#[test]
fn recurrent_models_equal_a_new_session_after_any_operations() {
    for name in ["mamba", "mamba2_groups", "rwkv4", "rwkv5", "rwkv6", "rwkv7", "recurrent_gemma"] {
        let folder = fixture(&format!("hybrid-models/tests/fixtures/{name}"));
        let model = Model::from_folder(&folder, &Default::default()).unwrap();
        let make = || -> Box<dyn CausalLm> { Box::new(model.session(dense).unwrap()) };
        Trial {
            name: name.into(),
            session: Box::new(make),
            plain: Box::new(make),
            tolerance: 1e-3,
        }
        .run(operations());
    }
}
