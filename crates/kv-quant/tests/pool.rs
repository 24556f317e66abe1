//! Laws of pools: sharing between sequences has no visible effect.

mod reference_impl;

use std::time::{Duration, Instant};

use half::{bf16, f16};
use kv_quant::{Bits, Error, Flush, Format, Mask, Pool, Queries, Rotary};
use reference_impl::{Random, all, formats, numbers, shape};

const D: usize = 24;
const V: usize = 16;
const KV: usize = 2;
const HEADS: usize = 6;

fn pool(format: Format) -> Pool {
    Pool::new(shape(KV, D, V), format).unwrap()
}

/// Returns a sequence's own keys and values for a range of tokens.
fn tokens(seq: u64, from: usize, to: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = |seed, size: usize| numbers(seed, to * KV * size)[from * KV * size..].to_vec();
    (rows(2 * seq, D), rows(2 * seq + 1, V))
}

fn feed(pool: &mut Pool, seq: u64, from: usize, to: usize) {
    let (k, v) = tokens(seq, from, to);
    pool.append(&[seq], &[0, to - from], &k, &v).unwrap();
}

fn queries(data: &[f32]) -> Queries<'_> {
    Queries { data, heads: HEADS, scale: 0.2, soft_cap: None, window: None }
}

fn with_bases() -> Vec<Pool> {
    let mut pools: Vec<_> = formats().into_iter().map(pool).collect();
    let format = Format::kivi_rolling(Bits::Four, Bits::Four, 32, 32).unwrap();
    pools.push(pool(format.with_rotated_keys()));
    let rotary = Rotary::new(&[1.0, 0.3, 0.01, 1e-4], 3).unwrap();
    pools.push(Pool::before_rope(shape(KV, D, V), format, rotary.into()).unwrap());
    pools
}

#[test]
fn a_sequence_among_many_equals_a_single_one() {
    for empty in with_bases() {
        let (mut alone, mut among) = (empty.clone(), empty);
        feed(&mut alone, 7, 0, 301);
        let mut random = Random::new(3);
        let mut fed = [0; 9];
        // Interleaved, each with its own step.
        while fed[7] < 301 {
            let (mut seqs, mut cu, mut k, mut v) = (vec![], vec![0], vec![], vec![]);
            for seq in 0..9 {
                let step = [random.below(40), 301 - fed[7]][usize::from(seq == 7)]
                    .min(1 + random.below(70));
                let (keys, values) = tokens(seq as u64, fed[seq], fed[seq] + step);
                seqs.push(seq as u64);
                cu.push(cu[seq] + step);
                k.extend(keys);
                v.extend(values);
                fed[seq] += step;
            }
            among.append(&seqs, &cu, &k, &v).unwrap();
            if random.below(3) == 0 {
                among.remove(random.below(7) as u64);
                fed.iter_mut().zip(0..).for_each(|(fed, seq)| {
                    *fed = among.lens(seq).map_or(0, |lens| lens[0]);
                });
            }
        }
        assert_eq!(all(&alone, 7), all(&among, 7));
        let q = numbers(5, 3 * HEADS * D);
        let of = |pool: &Pool| pool.attend(&queries(&q), &[7], &[0, 3], Mask::Causal).unwrap();
        assert_eq!(of(&alone), of(&among));
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long for an interpreter")]
fn a_batch_equals_its_sequences_one_by_one_on_any_number_of_threads() {
    for mut pool in with_bases() {
        let lens = [1, 3000, 40, 700, 129];
        let counts = [1, 3, 40, 0, 100];
        for (seq, len) in lens.into_iter().enumerate() {
            feed(&mut pool, seq as u64, 0, len);
        }
        if pool.rotary().is_none() {
            let keep: Vec<u32> = (0..3000).filter(|e| e % 7 > 2 || *e > 2900).collect();
            pool.retain(1, &vec![keep; KV]).unwrap();
        }
        let cu: Vec<usize> = (0..=5).map(|i| counts[..i].iter().sum()).collect();
        let q = numbers(9, cu[5] * HEADS * D);
        for mask in [Mask::Full, Mask::Causal] {
            let run = |threads| {
                let threads = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let all = Queries { window: Some(50), soft_cap: Some(9.0), ..queries(&q) };
                threads.install(|| pool.attend(&all, &[0, 1, 2, 3, 4], &cu, mask).unwrap())
            };
            let together = run(1);
            assert_eq!(together, run(5));
            for i in 0..5 {
                let own = &q[cu[i] * HEADS * D..cu[i + 1] * HEADS * D];
                let own = Queries { window: Some(50), soft_cap: Some(9.0), ..queries(own) };
                let alone = pool.attend(&own, &[i as u64], &[0, counts[i]], mask).unwrap();
                assert_eq!(alone.out, together.out[cu[i] * HEADS * V..cu[i + 1] * HEADS * V]);
                assert_eq!(alone.lse, together.lse[cu[i] * HEADS..cu[i + 1] * HEADS]);
            }
        }
    }
}

#[test]
fn a_fork_of_a_long_prefix_adds_less_than_a_fiftieth_of_it() {
    let shape = shape(1, 128, 128);
    let rows = numbers(1, 4_096 * 128);
    for format in [Bits::Two, Bits::Four].map(|bits| Format::kivi(bits, bits, 32, 128).unwrap()) {
        let mut pool = Pool::new(shape, format).unwrap();
        pool.append(&[0], &[0, 4_096], &rows, &rows).unwrap();
        let before = pool.footprint().total();
        for fork in 1..=16 {
            pool.fork(0, fork).unwrap();
            let added = pool.footprint().total() - before;
            assert!(added * 50 < before * fork as usize, "{added} bytes of {before}, {fork} forks");
        }
    }
}

#[test]
fn a_fork_equals_a_copy() {
    for mut pool in with_bases() {
        feed(&mut pool, 1, 0, 200);
        let copy = pool.clone();
        let before = pool.footprint();
        pool.fork(1, 2).unwrap();
        let after = pool.footprint();
        assert_eq!((before.codes, before.residual), (after.codes, after.residual));
        assert_eq!(all(&pool, 1), all(&pool, 2));
        // Each continues independently and does not see the other's tokens.
        let (k, v) = tokens(5, 0, 150);
        pool.append(&[2], &[0, 150], &k, &v).unwrap();
        assert_eq!(all(&pool, 1), all(&copy, 1));
        feed(&mut pool, 1, 200, 333);
        let (mut one, mut two) = (copy.clone(), copy);
        feed(&mut one, 1, 200, 333);
        two.append(&[1], &[0, 150], &k, &v).unwrap();
        assert_eq!(all(&pool, 1), all(&one, 1));
        assert_eq!(all(&pool, 2), all(&two, 1));
        if pool.rotary().is_none() {
            let keep: Vec<u32> = (0..333).filter(|e| e % 3 == 0).collect();
            pool.fork(1, 3).unwrap();
            pool.retain(3, &vec![keep.clone(); KV]).unwrap();
            one.retain(1, &vec![keep; KV]).unwrap();
            assert_eq!(all(&pool, 3), all(&one, 1));
            feed(&mut pool, 1, 333, 400);
        }
        assert!(matches!(pool.fork(9, 10), Err(Error::UnknownSequence(9))));
        assert!(pool.fork(1, 2).unwrap_err().to_string().contains("2, which exists"));
    }
}

/// With a rolling flush, a truncation by up to a group of tokens has no effect on the rest.
#[test]
fn truncation_equals_never_feeding() {
    let kivi = |bits, residual| Format::kivi_rolling(bits, bits, 32, residual).unwrap();
    let hadamard = kivi(Bits::Two, 32).with_rotated_keys();
    for format in [kivi(Bits::Four, 64), kivi(Bits::Two, 0), hadamard, Format::f16()] {
        for len in [40, 64, 96, 127, 128, 129, 160, 191, 200] {
            for cut in [0, 1, 3, 31, 32] {
                let (mut cut_back, mut never) = (pool(format), pool(format));
                feed(&mut cut_back, 1, 0, len);
                cut_back.fork(1, 2).unwrap();
                cut_back.check_truncate(1, len - cut).unwrap();
                cut_back.truncate(1, len - cut).unwrap();
                feed(&mut never, 1, 0, len - cut);
                for later in [0, 1, 5, 60] {
                    let (k, v) = tokens(4, 0, later);
                    cut_back.append(&[1], &[0, later], &k, &v).unwrap();
                    never.append(&[1], &[0, later], &k, &v).unwrap();
                    assert_eq!(all(&cut_back, 1), all(&never, 1), "{format:?} {len} - {cut}");
                    let bytes = |pool: &Pool| pool.seq_footprint(1).codes;
                    assert_eq!(bytes(&cut_back), bytes(&never));
                }
                // The fork has not changed.
                let mut whole = pool(format);
                feed(&mut whole, 1, 0, len);
                assert_eq!(all(&cut_back, 2), all(&whole, 1));
            }
        }
    }
}

/// With any flush: packed entries that are kept do not change, and no entry gets farther from its
/// original.
#[test]
fn truncating_changes_no_more_than_a_group() {
    for mut pool in with_bases() {
        feed(&mut pool, 1, 0, 300);
        let before = all(&pool, 1);
        let group = pool.format().keys().group;
        let packed = match pool.format().flush() {
            Flush::Rolling(residual) => (300 - residual) / group * group - group,
            _ => 300,
        };
        let came = tokens(1, 0, 300);
        for len in [299, 290, 250, 232, 201, 128, 77, 64, 3, 0] {
            pool.fork(1, 2).unwrap();
            pool.truncate(2, len).unwrap();
            assert_eq!(pool.lens(2).unwrap(), [len; KV]);
            let same = packed.min(len - len % group);
            for (head, ((keys, values), before)) in all(&pool, 2).iter().zip(&before).enumerate() {
                assert!(keys[..same * D] == before.0[..same * D], "{:?} {len}", pool.format());
                assert!(values[..same * V] == before.1[..same * V], "{:?} {len}", pool.format());
                let near = |x: &[f32], before: &[f32], came: &[f32], size: usize| {
                    let came = came.chunks(size).skip(head).step_by(KV).flatten();
                    let mut all = x.iter().zip(before).zip(came);
                    all.all(|((x, before), came)| (x - came).abs() < (before - came).abs() + 0.01)
                };
                assert!(pool.rotary().is_some() || near(keys, &before.0, &came.0, D));
                assert!(near(values, &before.1, &came.1, V));
            }
            // The sequence continues.
            let (k, v) = tokens(1, len, 310);
            pool.append(&[2], &[0, 310 - len], &k, &v).unwrap();
            assert_eq!(pool.lens(2).unwrap(), [310; KV]);
            pool.remove(2);
        }
        let message = pool.check_truncate(1, 301).unwrap_err().to_string();
        assert!(message.contains("at most the 300 of kv head 0, got 301"), "{message}");
    }
}

#[test]
fn removed_sequences_free_every_block() {
    for empty in with_bases() {
        let mut pool = empty.with_capacity(1 << 20);
        for seq in 0..6 {
            feed(&mut pool, seq, 0, 50 * seq as usize + 7);
            pool.fork(seq, 10 + seq).unwrap();
            feed(&mut pool, 10 + seq, 50 * seq as usize + 7, 400);
            pool.truncate(10 + seq, 3).unwrap();
        }
        assert_eq!(pool.seqs().len(), 12);
        for seq in pool.seqs().collect::<Vec<_>>() {
            assert!(pool.remove(seq));
            assert!(!pool.remove(seq));
        }
        assert_eq!(pool.free_bytes(), 1 << 20);
        assert_eq!(pool.footprint().total(), 0);
        feed(&mut pool, 1, 0, 100);
        pool.clear();
        assert_eq!((pool.free_bytes(), pool.seqs().len()), (1 << 20, 0));
    }
}

#[test]
fn a_full_pool_changes_nothing() {
    for empty in with_bases() {
        let mut pool = empty.with_capacity(100_000);
        feed(&mut pool, 1, 0, 150);
        pool.fork(1, 2).unwrap();
        let mut len = 150;
        while pool.bytes_needed(&[1], &[0, 37]).unwrap() <= pool.free_bytes() {
            feed(&mut pool, 1, len, len + 37);
            len += 37;
        }
        assert!(!pool.can_append(&[1], &[0, 37]));
        let before = (all(&pool, 1), all(&pool, 2), pool.footprint(), pool.free_bytes());
        let (k, v) = tokens(1, 0, 37);
        let Err(Error::PoolFull { needed, free }) = pool.append(&[1], &[0, 37], &k, &v) else {
            panic!("there was room")
        };
        assert_eq!((needed, free), (pool.bytes_needed(&[1], &[0, 37]).unwrap(), pool.free_bytes()));
        assert!(needed > free);
        let (k, v) = tokens(3, 0, 400);
        assert!(pool.append(&[3], &[0, 400], &k, &v).is_err());
        let after = (all(&pool, 1), all(&pool, 2), pool.footprint(), pool.free_bytes());
        assert_eq!(before, after);
        assert_eq!(pool.lens(3), None);
        // Blocks that another sequence frees can be taken.
        pool.truncate(1, 10).unwrap();
        assert!(pool.can_append(&[1], &[0, 37]));
    }
}

/// An engine may ask for a request without a limit of tokens. The answer does not visit the blocks
/// that the request would take.
#[test]
fn a_request_of_any_length_can_be_asked_for() {
    for empty in with_bases() {
        for held in [0, 150] {
            let mut pool = empty.clone();
            if held > 0 {
                feed(&mut pool, 1, 0, held);
            }
            let started = Instant::now();
            for tokens in [1 << 31, u32::MAX as usize] {
                assert!(pool.can_append(&[1], &[0, tokens]));
                assert!(pool.bytes_needed(&[1], &[0, tokens]).unwrap() > 1 << 30);
                assert!(!pool.clone().with_capacity(1 << 30).can_append(&[1], &[0, tokens]));
                let error = pool.append::<f32>(&[1], &[0, tokens], &[], &[]).unwrap_err();
                assert!(matches!(error, Error::Mismatch { what: "keys", .. }), "{error}");
            }
            assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        }
    }
}

/// An engine asks once, for all tokens of a request, and then appends them in any parts.
#[test]
fn tokens_for_which_there_is_room_can_be_appended_in_parts() {
    const PLENTY: usize = 1 << 30;
    let kivi = |residual| Format::kivi(Bits::Four, Bits::Four, 32, residual).unwrap();
    let rolling = |residual| Format::kivi_rolling(Bits::Eight, Bits::Eight, 32, residual).unwrap();
    let flexgen = Format::flexgen(Bits::Four, Bits::Four, 32).unwrap();
    let (k, v) = tokens(1, 0, 700);
    let part = |from, to| (&k[from * KV * D..to * KV * D], &v[from * KV * V..to * KV * V]);
    for format in [kivi(32), kivi(128), rolling(0), rolling(40), rolling(128), flexgen] {
        for (first, total) in [(1, 39), (1, 300), (40, 7), (130, 35), (150, 120), (300, 400)] {
            let mut whole = pool(format);
            let (keys, values) = part(0, first);
            whole.append(&[1], &[0, first], keys, values).unwrap();
            whole.fork(1, 2).unwrap();
            let used = PLENTY - whole.clone().with_capacity(PLENTY).free_bytes();
            // The least room for which the answer is yes.
            let within = |bytes: usize| whole.clone().with_capacity(used + bytes);
            let fits = |&bytes: &usize| within(bytes).can_append(&[1, 2], &[0, total, 2 * total]);
            let bytes = (0..).step_by(256).find(fits).unwrap();
            for step in [1, 13, total] {
                let mut pool = within(bytes);
                for from in (first..first + total).step_by(step) {
                    let to = (from + step).min(first + total);
                    let (keys, values) = part(from, to);
                    for seq in [1, 2] {
                        let done = pool.append(&[seq], &[0, to - from], keys, values);
                        assert!(done.is_ok(), "{format:?}, {first} + {total}, {to}: {done:?}");
                    }
                }
            }
        }
    }
}

/// Each head appends its own tokens only: with lists of unequal length, the newest tokens of every
/// head are in full precision.
#[test]
fn newest_selected_tokens_of_every_head_stay_in_full_precision() {
    const RESIDUAL: usize = 64;
    let keep =
        |head: u32| (0..400u32).filter(move |t| t % (head + 2) == 0 || *t >= 336 && head == 0);
    let selected: Vec<Vec<u32>> = (0..KV as u32).map(|h| keep(h).collect()).collect();
    let rolling = Format::kivi_rolling(Bits::Two, Bits::Two, 32, RESIDUAL).unwrap();
    for format in [rolling, Format::kivi(Bits::Two, Bits::Two, 32, RESIDUAL).unwrap()] {
        let mut pool = pool(format);
        let (k, v) = tokens(1, 0, 400);
        pool.append_selected(&[1], &[0, 400], &k, &v, &selected).unwrap();
        assert_ne!(selected[0].len(), selected[1].len());
        for (head, selected) in selected.iter().enumerate() {
            assert_eq!(pool.lens(1).unwrap()[head], selected.len());
            let (keys, values) = pool.read(1, head).unwrap();
            let newest = selected.iter().enumerate().skip(selected.len() - RESIDUAL);
            for (entry, &token) in newest {
                let row = |x: &[f32], size: usize| -> Vec<f32> {
                    let row = &x[(token as usize * KV + head) * size..][..size];
                    row.iter().map(|&x| f16::from_f32(x).to_f32()).collect()
                };
                if format == rolling {
                    assert_eq!(keys[entry * D..][..D], row(&k, D));
                }
                assert_eq!(values[entry * V..][..V], row(&v, V));
            }
        }
    }
}

/// Attention over listed entries equals attention over a sequence that holds only these.
#[test]
fn listed_entries_equal_retained_ones() {
    for mut pool in with_bases().into_iter().filter(|pool| pool.rotary().is_none()) {
        feed(&mut pool, 1, 0, 700);
        let holes: Vec<u32> = (0..700).filter(|e| e % 5 > 0).collect();
        pool.retain(1, &vec![holes; KV]).unwrap();
        pool.fork(1, 2).unwrap();
        let lists = [vec![3..17, 20..21, 90..300, 500..560], vec![0..40, 559..560]];
        let keep: Vec<Vec<u32>> =
            lists.iter().map(|l| reference_impl::entries(l).map(|e| e as u32).collect()).collect();
        pool.retain(2, &keep).unwrap();
        let q = numbers(3, 2 * HEADS * D);
        let q = queries(&q);
        let got = pool.attend(&q, &[1], &[0, 2], Mask::Entries(&lists)).unwrap();
        let want = pool.attend(&q, &[2], &[0, 2], Mask::Full).unwrap();
        let wide: Vec<f64> = want.out.iter().map(|&x| x.into()).collect();
        assert!(reference_impl::close(&got.out, &wide), "{:?}", pool.format());
        let sums = pool.attention_sums(&q, &got.lse, &[1], &[0, 2], Mask::Entries(&lists)).unwrap();
        for (head, sums) in sums.iter().enumerate() {
            let listed: f32 =
                reference_impl::entries(&lists[head / (HEADS / KV)]).map(|e| sums[e]).sum();
            assert!((listed - 2.0).abs() < 1e-2);
            assert!((sums.iter().sum::<f32>() - listed).abs() < 1e-6);
        }
    }
}

#[test]
fn every_number_format_is_accepted_and_returned() {
    let mut pool = pool(Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap());
    let narrow = |x: &[f32]| -> Vec<bf16> { x.iter().map(|&x| bf16::from_f32(x)).collect() };
    let (k, v) = tokens(1, 0, 100);
    let (k, v) = (narrow(&k), narrow(&v));
    pool.append(&[1], &[0, 100], &k, &v).unwrap();
    let half = |x: &[bf16]| -> Vec<f16> { x.iter().map(|x| f16::from_f32(x.to_f32())).collect() };
    pool.append(&[2], &[0, 100], &half(&k), &half(&v)).unwrap();
    assert_eq!(all(&pool, 1), all(&pool, 2));
    let q16 = half(&narrow(&numbers(7, HEADS * D)));
    let q32: Vec<f32> = q16.iter().map(|x| x.to_f32()).collect();
    let want = pool.attend(&queries(&q32), &[1], &[0, 1], Mask::Full).unwrap();
    let q = Queries { data: &q16[..], heads: HEADS, scale: 0.2, soft_cap: None, window: None };
    assert_eq!(pool.attend(&q, &[1], &[0, 1], Mask::Full).unwrap(), want);
    let (mut out, mut lse) = (vec![bf16::NAN; HEADS * V], vec![0.0; HEADS]);
    pool.attend_into(&q, &[1], &[0, 1], Mask::Full, &mut out, &mut lse).unwrap();
    assert_eq!((out, lse), (narrow(&want.out), want.lse));
}

#[test]
fn an_empty_sequence_has_no_output() {
    let mut pool = pool(Format::f16());
    pool.append::<f32>(&[1], &[0, 0], &[], &[]).unwrap();
    assert_eq!(pool.lens(1).unwrap(), [0; KV]);
    let q = numbers(1, HEADS * D);
    let got = pool.attend(&queries(&q), &[1], &[0, 1], Mask::Full).unwrap();
    assert_eq!((got.out, got.lse), (vec![0.0; HEADS * V], vec![f32::NEG_INFINITY; HEADS]));
    let unknown = pool.attend(&queries(&q), &[2], &[0, 1], Mask::Full);
    assert_eq!(unknown, Err(Error::UnknownSequence(2)));
}

/// Blocks of a head are freed by evicting its own entries only.
#[test]
fn budgets_of_heads_free_blocks() {
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 128).unwrap();
    let mut pool = Pool::new(shape(4, 128, 128), format).unwrap();
    let x = numbers(1, 4096 * 4 * 128);
    pool.append(&[1], &[0, 4096], &x, &x).unwrap();
    let whole = pool.footprint();
    // From a head with all entries to one with an eighth.
    let keep: Vec<Vec<u32>> = (0..4).map(|h| (4096 - (4096 >> h)..4096).collect()).collect();
    pool.retain(1, &keep).unwrap();
    let after = pool.footprint();
    let share = (1.0 + 0.5 + 0.25 + 0.125) / 4.0;
    let block = 32 * 128 + 32 * 4 * 4 * 2;
    assert!(
        after.codes + after.scales
            <= (share * (whole.codes + whole.scales) as f64) as usize + 4 * block
    );
    assert!(after.total() as f64 <= 1.2 * share * whole.total() as f64, "{whole:?} {after:?}");
    let bytes = |x: kv_quant::PoolBytes| x.codes + x.scales + x.residual;
    assert_eq!(bytes(pool.seq_footprint(1)), bytes(after));
}

#[test]
fn pools_are_shared_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<Pool>();
    check::<Error>();
}
