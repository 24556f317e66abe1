//! Properties of the dense store and cache. A batch equals its sequences alone, a fork equals a
//! copy, and a truncated sequence equals one that never saw the rest. Random sequences of
//! operations are compared with plain lists.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use longctx_core::*;
use proptest::prelude::*;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const D: usize = 8;
const DV: usize = 4;

fn shape() -> AttentionShape {
    AttentionShape { value_dim: DV, ..AttentionShape::new(HEADS, KV_HEADS, D).unwrap() }
}

fn spec() -> LayerSpec {
    let rope = Rope::new(D, D, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(shape()).with_rope(Arc::new(rope))
}

/// Returns numbers that depend only on the sequence, the token and the channel.
fn rows(seq: SeqId, from: usize, count: usize, heads: usize, d: usize, salt: u64) -> Tensor {
    let number = |i: usize| {
        let x = (seq * 7919 + salt * 104_729 + (from * heads * d + i) as u64)
            .wrapping_mul(2_654_435_761);
        (x % 2003) as f32 / 1001.0 - 1.0
    };
    let data: Vec<f32> = (0..count * heads * d).map(number).collect();
    Tensor::from_vec(data, (count, heads, d), &Device::Cpu).unwrap()
}

/// Returns q, k and v of a batch whose sequences continue at the given tokens.
fn tensors(parts: &[(SeqId, usize, usize)]) -> [Tensor; 3] {
    [(HEADS, D, 1), (KV_HEADS, D, 2), (KV_HEADS, DV, 3)].map(|(heads, d, salt)| {
        let of =
            |&(seq, from, count): &(SeqId, usize, usize)| rows(seq, from, count, heads, d, salt);
        Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0).unwrap()
    })
}

fn feed(cache: &mut DenseCache, parts: &[(SeqId, usize)]) -> Result<Vec<Vec<f32>>> {
    let at: Vec<_> = parts.iter().map(|&(seq, n)| (seq, cache.seen(seq), n)).collect();
    feed_at(cache, &at)
}

/// Feeds tokens `from..from + n` of each sequence and returns the rows of each sequence's output.
fn feed_at(cache: &mut DenseCache, parts: &[(SeqId, usize, usize)]) -> Result<Vec<Vec<f32>>> {
    let batch = Batch::new(&parts.iter().map(|&(s, _, n)| (s, n)).collect::<Vec<_>>())?;
    let [q, k, v] = tensors(parts);
    let out = cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v })?;
    let part = |tokens: std::ops::Range<usize>| {
        let part = out.narrow(0, tokens.start, tokens.len()).unwrap();
        part.flatten_all().unwrap().to_vec1().unwrap()
    };
    Ok(batch.iter().map(|(_, tokens)| part(tokens)).collect())
}

fn near(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_batch_equals_its_sequences_one_by_one(
        lens in prop::collection::vec(1usize..90, 1..5),
        more in 1usize..3,
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::BF16]),
    ) {
        let mut all = DenseCache::new(spec(), dtype).unwrap();
        let parts: Vec<_> = (0..).zip(lens.iter().copied()).collect();
        let prompt = feed(&mut all, &parts).unwrap();
        let next: Vec<_> = parts.iter().map(|&(seq, _)| (seq, more)).collect();
        let after = feed(&mut all, &next).unwrap();
        for (i, &(seq, len)) in parts.iter().enumerate() {
            let mut alone = DenseCache::new(spec(), dtype).unwrap();
            prop_assert!(near(&feed(&mut alone, &[(seq, len)]).unwrap()[0], &prompt[i]));
            prop_assert!(near(&feed(&mut alone, &[(seq, more)]).unwrap()[0], &after[i]));
        }
    }

    #[test]
    fn a_fork_equals_a_copy_and_truncation_equals_never_feeding_the_rest(
        len in 1usize..100, cut in 0usize..100, more in 1usize..70,
    ) {
        let cut = cut.min(len);
        let mut cache = DenseCache::new(spec(), DType::F32).unwrap();
        feed(&mut cache, &[(1, len)]).unwrap();
        cache.fork(1, 2).unwrap();
        cache.truncate(2, cut).unwrap();
        let got = feed_at(&mut cache, &[(2, 500, more)]).unwrap();
        let mut plain = DenseCache::new(spec(), DType::F32).unwrap();
        if cut > 0 {
            feed_at(&mut plain, &[(1, 0, cut)]).unwrap();
            plain.fork(1, 2).unwrap();
        }
        prop_assert_eq!(feed_at(&mut plain, &[(2, 500, more)]).unwrap(), got);
        // The source of the fork is unchanged.
        let mut whole = DenseCache::new(spec(), DType::F32).unwrap();
        feed(&mut whole, &[(1, len)]).unwrap();
        let next = feed(&mut whole, &[(1, 3)]).unwrap();
        prop_assert_eq!(feed(&mut cache, &[(1, 3)]).unwrap(), next);
        prop_assert!(cache.remove(1) && cache.remove(2));
        prop_assert_eq!(cache.footprint().payload, 0);
    }
}

#[test]
fn a_range_that_is_read_equals_the_part_of_all() {
    let mut store = DenseStore::new(shape(), DType::F16).unwrap();
    let [_, k, v] = tensors(&[(4, 0, 100)]);
    store.append(&Batch::single(4, 100).unwrap(), &k, &v).unwrap();
    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for range in [0..100, 0..0, 100..100, 31..33, 64..96, 5..6] {
        let (all_k, all_v) = store.read(4, 1).unwrap();
        let (k, v) = store.read_range(4, 1, range.clone()).unwrap();
        let part = |x: &Tensor| numbers(&x.narrow(0, range.start, range.len()).unwrap());
        assert_eq!((numbers(&k), numbers(&v)), (part(&all_k), part(&all_v)), "{range:?}");
    }
    assert!(store.read_range(4, 1, 90..101).unwrap_err().to_string().contains("within 100"));
    assert!(store.read_range(4, 2, 0..1).unwrap_err().to_string().contains("kv head"));
    assert!(matches!(store.read_range(5, 0, 0..1), Err(Error::UnknownSequence(5))));
}

#[test]
fn a_sliding_window_can_be_truncated_within_its_window() {
    let windowed = LayerSpec { shape: AttentionShape { window: Some(8), ..shape() }, ..spec() };
    let mut cache = DenseCache::new(windowed.clone(), DType::F32).unwrap();
    feed(&mut cache, &[(0, 340)]).unwrap();
    assert_eq!((cache.seen(0), cache.held(0)), (340, 8));
    assert!(cache.check_truncate(0, 339).is_ok());
    let error = cache.truncate(0, 338).unwrap_err().to_string();
    assert!(error.contains("332 were dropped"), "{error}");
    feed(&mut cache, &[(0, 20)]).unwrap();
    cache.truncate(0, 341).unwrap();
    let got = feed_at(&mut cache, &[(0, 700, 2)]).unwrap();
    let mut plain = DenseCache::new(windowed, DType::F32).unwrap();
    feed(&mut plain, &[(0, 341)]).unwrap();
    assert!(near(&feed_at(&mut plain, &[(0, 700, 2)]).unwrap()[0], &got[0]));
}

#[test]
fn attention_of_prompts_can_be_computed_elsewhere() {
    let mut cache = DenseCache::new(spec(), DType::F32).unwrap();
    let parts = [(0, 0, 40), (1, 0, 3)];
    let batch = Batch::new(&[(0, 40), (1, 3)]).unwrap();
    let [q, k, v] = tensors(&parts);
    let step = Step { batch: &batch, q: &q, k: &k, v: &v };
    cache.append_prompt(&step, None).unwrap();
    let mut plain = DenseCache::new(spec(), DType::F32).unwrap();
    feed(&mut plain, &[(0, 40), (1, 3)]).unwrap();
    assert_eq!(feed(&mut plain, &[(1, 2)]).unwrap(), feed(&mut cache, &[(1, 2)]).unwrap());
    let error = cache.append_prompt(&step, None).unwrap_err().to_string();
    assert!(error.contains("before its prompt"), "{error}");
}

#[test]
fn rotated_keys_are_not_rotated_again() {
    let positions: Vec<i64> = (0..50).collect();
    let [q, k, v] = tensors(&[(0, 0, 50)]);
    let batch = Batch::single(0, 50).unwrap();
    let mut rotates = DenseCache::new(spec(), DType::F32).unwrap();
    let want = rotates.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
    let rope = spec().rope.unwrap();
    let (q, k) = (rope.apply(&q, &positions).unwrap(), rope.apply(&k, &positions).unwrap());
    let mut given = DenseCache::new(LayerSpec::new(shape()), DType::F32).unwrap();
    let got = given.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
    let numbers = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(numbers(want), numbers(got));
}

#[test]
fn a_call_that_fails_changes_nothing() {
    let bytes = 6 * 32 * (D + DV) * 4;
    let mut cache = DenseCache::with_capacity(spec(), DType::F32, bytes).unwrap();
    feed(&mut cache, &[(0, 33)]).unwrap();
    assert!(cache.can_append(&Batch::single(1, 32).unwrap()));
    assert!(!cache.can_append(&Batch::single(1, 33).unwrap()));
    // A request without a limit of tokens.
    assert!(!cache.can_append(&Batch::single(0, u32::MAX as usize).unwrap()));
    assert!(!cache.can_append(&Batch::new(&[(0, 1), (1, u32::MAX as usize - 1)]).unwrap()));
    let before = cache.footprint();
    let error = feed(&mut cache, &[(0, 1), (1, 33)]).unwrap_err();
    assert!(matches!(error, Error::PoolFull { .. }), "{error}");
    let batch = Batch::single(0, 1).unwrap();
    let [q, k, v] = tensors(&[(0, 33, 1)]);
    let nan = (&k * f64::NAN).unwrap();
    let error = cache.attend(&Step { batch: &batch, q: &q, k: &nan, v: &v }).unwrap_err();
    assert_eq!(error.to_string(), "k: NaN at token 0, head 0, channel 0");
    let wide = Tensor::cat(&[&q, &q], 0).unwrap();
    assert!(cache.attend(&Step { batch: &batch, q: &wide, k: &k, v: &v }).is_err());
    assert_eq!((cache.seen(0), cache.seqs(), cache.footprint()), (33, vec![0], before));
    assert!(matches!(cache.fork(7, 8), Err(Error::UnknownSequence(7))));
    assert!(cache.fork(0, 0).is_err());
    assert!(cache.truncate(0, 34).unwrap_err().to_string().contains("at most 33"));
}

/// The plain model of a store: each head's rows of keys and values, by sequence.
type Lists = BTreeMap<SeqId, Heads>;

/// The heads of a sequence: their rows of keys and values.
type Heads = Vec<Vec<(Vec<f32>, Vec<f32>)>>;

/// In f16, 100,000 would be infinite, and every later output of the sequence NaN.
#[test]
fn a_number_beyond_the_dtype_is_refused() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut cache = DenseCache::new(spec(), dtype).unwrap();
        feed(&mut cache, &[(0, 40)]).unwrap();
        let [q, k, v] = tensors(&[(0, 40, 1)]);
        let batch = Batch::single(0, 1).unwrap();
        let large = (v.ones_like().unwrap() * 1e5).unwrap();
        match cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &large }) {
            Ok(_) => assert_ne!(dtype, DType::F16),
            Err(error) => {
                let message = error.to_string();
                assert!(dtype == DType::F16 && message.contains("got 100000"), "{message}");
                assert!(message.starts_with("v at token 0, head 0, channel 0"), "{message}");
                assert_eq!((cache.seen(0), cache.held(0)), (40, 40));
            }
        }
        let out = cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
        let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
        assert!(out.iter().all(|x| x.is_finite()), "{dtype:?}");
    }
}

fn row(x: &Tensor, token: usize, head: usize) -> Vec<f32> {
    x.get(token).unwrap().get(head).unwrap().to_vec1().unwrap()
}

/// Returns the attention of one query head over plain lists.
fn attend_list(q: &[f32], entries: &[&(Vec<f32>, Vec<f32>)]) -> Vec<f32> {
    let dot = |k: &[f32]| q.iter().zip(k).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let scores: Vec<f64> = entries.iter().map(|(k, _)| dot(k) * f64::from(shape().scale)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let value = |c: usize| {
        let weighted = weights.iter().zip(entries).map(|(w, (_, v))| w * f64::from(v[c]));
        (weighted.sum::<f64>() / sum.max(1e-300)) as f32
    };
    (0..DV).map(value).collect()
}

#[derive(Debug, Clone)]
enum Op {
    Append(Vec<(SeqId, usize)>),
    AppendSelected(SeqId, usize, usize),
    Retain(SeqId, usize, usize),
    Truncate(SeqId, usize),
    Fork(SeqId, SeqId),
    Remove(SeqId),
    Attend(Vec<SeqId>),
    Ranges(SeqId, usize),
}

fn ops() -> impl Strategy<Value = Op> {
    let seq = || 0u64..4;
    prop_oneof![
        4 => prop::collection::btree_map(seq(), 1usize..50, 1..4)
            .prop_map(|seqs| Op::Append(seqs.into_iter().collect())),
        2 => (seq(), 1usize..40, 1usize..5).prop_map(|(s, n, m)| Op::AppendSelected(s, n, m)),
        2 => (seq(), 1usize..5, 1usize..5).prop_map(|(s, a, b)| Op::Retain(s, a, b)),
        1 => (seq(), 0usize..120).prop_map(|(s, n)| Op::Truncate(s, n)),
        2 => (seq(), seq()).prop_map(|(a, b)| Op::Fork(a, b)),
        1 => seq().prop_map(Op::Remove),
        2 => prop::collection::btree_set(seq(), 1..4)
            .prop_map(|seqs| Op::Attend(seqs.into_iter().collect())),
        1 => (seq(), 1usize..40).prop_map(|(s, n)| Op::Ranges(s, n)),
    ]
}

/// Applies an operation to the store and to the lists, and compares contents and attention.
fn apply(store: &mut DenseStore, lists: &mut Lists, op: &Op, salt: u64) {
    match op {
        Op::Append(seqs) => {
            let parts: Vec<_> = seqs.iter().map(|&(s, n)| (s, salt as usize * 50, n)).collect();
            let [_, k, v] = tensors(&parts);
            let batch = Batch::new(seqs).unwrap();
            let room = store.can_append(&batch);
            assert_eq!(store.append(&batch, &k, &v).is_ok(), room);
            if room {
                for (seq, tokens) in batch.iter() {
                    let heads = lists.entry(seq).or_insert_with(|| vec![Vec::new(); KV_HEADS]);
                    for (h, head) in heads.iter_mut().enumerate() {
                        head.extend(tokens.clone().map(|t| (row(&k, t, h), row(&v, t, h))));
                    }
                }
            }
        }
        Op::AppendSelected(seq, n, modulus) => {
            let [_, k, v] = tensors(&[(*seq, salt as usize * 50, *n)]);
            let list = |h: usize| {
                (0..*n as u32).filter(move |t| (*t as usize + h).is_multiple_of(*modulus))
            };
            let selection = Selection::new((0..KV_HEADS).map(|h| list(h).collect()).collect());
            let batch = Batch::single(*seq, *n).unwrap();
            if store.append_selected(&batch, &k, &v, &[selection]).is_ok() {
                let heads = lists.entry(*seq).or_insert_with(|| vec![Vec::new(); KV_HEADS]);
                for (h, head) in heads.iter_mut().enumerate() {
                    head.extend(list(h).map(|t| (row(&k, t as usize, h), row(&v, t as usize, h))));
                }
            }
        }
        Op::Retain(seq, modulus, offset) => {
            let lens = store.lens(*seq);
            let keeps = |h: usize, e: usize| {
                !(e + h + offset).is_multiple_of(modulus + 1) || e.is_multiple_of(7)
            };
            let list = |(h, len): (usize, &usize)| {
                (0..*len as u32).filter(|&e| keeps(h, e as usize)).collect::<Vec<_>>()
            };
            let keep = Selection::new(lens.iter().enumerate().map(list).collect());
            if store.retain(*seq, &keep).is_ok() {
                let heads = lists.get_mut(seq).unwrap();
                for (head, keep) in heads.iter_mut().zip(keep.heads().unwrap()) {
                    *head = keep.iter().map(|&e| head[e as usize].clone()).collect();
                }
            }
        }
        Op::Truncate(seq, len) => {
            let fits = lists.get(seq).is_some_and(|heads| heads.iter().all(|h| h.len() >= *len));
            assert_eq!(store.check_truncate(*seq, *len).is_ok(), fits);
            assert_eq!(store.truncate(*seq, *len).is_ok(), fits);
            if fits {
                lists.get_mut(seq).unwrap().iter_mut().for_each(|head| head.truncate(*len));
            }
        }
        Op::Fork(from, to) => {
            let fits = lists.contains_key(from) && !lists.contains_key(to);
            assert_eq!(store.fork(*from, *to).is_ok(), fits);
            if fits {
                lists.insert(*to, lists[from].clone());
            }
        }
        Op::Remove(seq) => assert_eq!(store.remove(*seq), lists.remove(seq).is_some()),
        Op::Attend(seqs) => {
            let batch = Batch::decode(seqs).unwrap();
            let parts: Vec<_> = seqs.iter().map(|&s| (s, salt as usize, 1)).collect();
            let [q, _, _] = tensors(&parts);
            let out = store.attend(&batch, &q, Mask::Full).unwrap().out;
            for (i, seq) in seqs.iter().enumerate() {
                compare(&out, &q, i, lists.get(seq), |_, _| true);
            }
        }
        Op::Ranges(seq, size) => {
            let batch = Batch::single(*seq, 1).unwrap();
            let [q, _, _] = tensors(&[(*seq, salt as usize, 1)]);
            // Every second range of `size` entries.
            let keeps = |_: usize, entry: usize| (entry / size).is_multiple_of(2);
            let of_head = |&len: &usize| {
                let starts = (0..len).step_by(2 * size);
                starts.map(|start| start..(start + size).min(len)).collect()
            };
            let mut lens = store.lens(*seq);
            lens.resize(KV_HEADS, 0);
            let ranges = EntryRanges::new(lens.iter().map(of_head).collect()).unwrap();
            let out = store.attend(&batch, &q, Mask::Entries(&ranges)).unwrap();
            compare(&out.out, &q, 0, lists.get(seq), keeps);
            let sums = store.attention_sums(&batch, &q, &out.lse, Mask::Entries(&ranges)).unwrap();
            let rows = sums.iter().flat_map(|sums| sums.split().unwrap());
            let rows = rows.flat_map(|sums| sums.to_vec2::<f32>().unwrap());
            for (h, sums) in rows.enumerate() {
                let len = lens[h / (HEADS / KV_HEADS)];
                assert_eq!(sums.len(), len);
                let total: f32 = sums.iter().sum();
                assert!((total - if len > 0 { 1.0 } else { 0.0 }).abs() < 1e-4, "{total}");
            }
        }
    }
    let seqs: Vec<_> = lists.keys().copied().collect();
    assert_eq!(store.seqs(), seqs);
    for (&seq, heads) in lists.iter() {
        assert_eq!(store.lens(seq), heads.iter().map(Vec::len).collect::<Vec<_>>());
        for (h, head) in heads.iter().enumerate() {
            let (k, v) = store.read(seq, h).unwrap();
            let flat = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(flat(k).into_iter().eq(head.iter().flat_map(|(k, _)| k.iter().copied())));
            assert!(flat(v).into_iter().eq(head.iter().flat_map(|(_, v)| v.iter().copied())));
        }
    }
}

fn compare(
    out: &Tensor,
    q: &Tensor,
    token: usize,
    heads: Option<&Heads>,
    keeps: impl Fn(usize, usize) -> bool,
) {
    for h in 0..HEADS {
        let none = Vec::new();
        let head = heads.map_or(&none, |heads| &heads[h / (HEADS / KV_HEADS)]);
        let entries: Vec<_> =
            head.iter().enumerate().filter(|(e, _)| keeps(h, *e)).map(|(_, row)| row).collect();
        let want = attend_list(&row(q, token, h), &entries);
        assert!(near(&row(out, token, h), &want), "head {h} over {} entries", entries.len());
    }
}

/// Random sequences of operations: 200, or 10,000 if `LONGCTX_SLOW` is set.
#[test]
fn any_sequence_of_operations_gives_the_answers_of_plain_lists() {
    let cases = if std::env::var_os("LONGCTX_SLOW").is_some() { 10_000 } else { 200 };
    let config = ProptestConfig { cases, max_shrink_iters: 200, ..ProptestConfig::default() };
    // In every second store the pool is so small that it fills up.
    proptest!(config, |(all in prop::collection::vec(ops(), 1..25), small: bool)| {
        let bytes = if small { 12 * 32 * (D + DV) * 4 } else { usize::MAX };
        let mut store = DenseStore::with_capacity(shape(), DType::F32, bytes).unwrap();
        let mut lists = Lists::new();
        for (salt, op) in (0..).zip(&all) {
            apply(&mut store, &mut lists, op, salt);
        }
        for seq in store.seqs() {
            store.remove(seq);
        }
        assert_eq!(store.footprint().payload, 0);
    });
}
