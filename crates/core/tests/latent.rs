//! `LatentStore` and `LatentCache` compared with stores and caches of separate keys and values.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use longctx_core::*;
use proptest::prelude::*;

const HEADS: usize = 3;
const ROTATED: usize = 4;
const LATENT: usize = 12;

fn shape() -> AttentionShape {
    let shape = AttentionShape::new(HEADS, 1, ROTATED + LATENT).unwrap();
    AttentionShape { value_dim: LATENT, soft_cap: Some(4.0), ..shape }
}

fn spec() -> LayerSpec {
    let rope = Rope::new(ROTATED + LATENT, ROTATED, 100.0, RopeScaling::None).unwrap();
    LayerSpec::new(shape()).with_rope(Arc::new(rope)).with_latent().unwrap()
}

fn latent_store() -> LatentStore<DenseStore> {
    LatentStore::new(shape(), |parts| DenseStore::new(parts, DType::F32)).unwrap()
}

fn random(tokens: usize, heads: usize) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, ROTATED + LATENT), &Device::Cpu).unwrap()
}

fn values(k: &Tensor) -> Tensor {
    k.narrow(2, ROTATED, LATENT).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    if a.elem_count() == 0 {
        return 0.0;
    }
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Operations on three sequences; a call feeds some tokens to each.
#[derive(Debug, Clone)]
enum Operation {
    Append([usize; 3]),
    Drop(SeqId, u32),
    Truncate(SeqId, usize),
    Fork(SeqId, SeqId),
    Remove(SeqId),
}

fn operation() -> impl Strategy<Value = Operation> {
    let tokens = || prop_oneof![Just(1usize), 0..40usize];
    prop_oneof![
        4 => (tokens(), tokens(), tokens()).prop_map(|(a, b, c)| Operation::Append([a, b, c])),
        1 => (0..3u64, 2..5u32).prop_map(|(seq, n)| Operation::Drop(seq, n)),
        1 => (0..3u64, 0..50usize).prop_map(|(seq, len)| Operation::Truncate(seq, len)),
        1 => (0..3u64, 0..3u64).prop_map(|(from, to)| Operation::Fork(from, to)),
        1 => (0..3u64).prop_map(Operation::Remove),
    ]
}

fn both(
    a: &mut dyn KvStore,
    b: &mut dyn KvStore,
    f: impl Fn(&mut dyn KvStore) -> Result<()>,
) -> Result<()> {
    let (a, b) = (f(a), f(b));
    assert_eq!(a.is_ok(), b.is_ok(), "{a:?} and {b:?}");
    a
}

/// Compares attention and its sums under a mask.
fn compare(a: &dyn KvStore, b: &dyn KvStore, batch: &Batch, mask: Mask<'_>) {
    let q = random(batch.tokens(), HEADS);
    let (x, y) = (a.attend(batch, &q, mask).unwrap(), b.attend(batch, &q, mask).unwrap());
    assert!(distance(&x.out, &y.out) < 1e-5);
    // Where a query attends to nothing, both are -inf.
    let finite = |lse: &Tensor| lse.maximum(-1e9).unwrap();
    assert!(distance(&finite(&x.lse), &finite(&y.lse)) < 1e-4);
    let of = |store: &dyn KvStore| store.attention_sums(batch, &q, &y.lse, mask).unwrap();
    for (x, y) in of(a).iter().zip(of(b)) {
        assert!(distance(&x.head(0).unwrap(), &y.head(0).unwrap()) < 1e-5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_latent_store_attends_as_keys_and_values(
        operations in proptest::collection::vec(operation(), 1..20),
    ) {
        let mut once = latent_store();
        let mut twice = DenseStore::new(shape(), DType::F32).unwrap();
        for operation in operations {
            let mut last = None;
            match operation {
                Operation::Append(counts) => {
                    let parts: Vec<_> = (0u64..).zip(counts).filter(|part| part.1 > 0).collect();
                    let Ok(batch) = Batch::new(&parts) else { continue };
                    let k = random(batch.tokens(), 1);
                    both(&mut once, &mut twice, |s| s.append(&batch, &k, &values(&k))).unwrap();
                    last = Some(batch);
                }
                Operation::Drop(seq, n) => {
                    let len = twice.len(seq) as u32;
                    let keep = Selection::uniform(1, (0..len).filter(|i| i % n > 0).collect());
                    _ = both(&mut once, &mut twice, |s| s.retain(seq, &keep));
                }
                Operation::Truncate(seq, len) => {
                    _ = both(&mut once, &mut twice, |s| s.truncate(seq, len));
                }
                Operation::Fork(from, to) => {
                    _ = both(&mut once, &mut twice, |s| s.fork(from, to));
                }
                Operation::Remove(seq) => prop_assert_eq!(once.remove(seq), twice.remove(seq)),
            }
            if let Some(batch) = last {
                compare(&once, &twice, &batch, Mask::Causal);
            }
            let batch = Batch::new(&[(0, 2), (1, 1), (2, 3)]).unwrap();
            compare(&once, &twice, &batch, Mask::Full);
            let some = |seq| match twice.len(seq) {
                len @ 5.. => vec![1..3, 4..len],
                _ => Vec::new(),
            };
            let ranges = EntryRanges::new((0..3).map(some).collect()).unwrap();
            compare(&once, &twice, &batch, Mask::Entries(&ranges));
        }
    }
}

#[test]
fn long_sequences_are_read_in_chunks() {
    let mut once = latent_store();
    let mut twice = DenseStore::new(shape(), DType::F32).unwrap();
    let batch = Batch::new(&[(4, 5000), (5, 3)]).unwrap();
    let k = random(5003, 1);
    both(&mut once, &mut twice, |store| store.append(&batch, &k, &values(&k))).unwrap();
    let newest = Batch::new(&[(4, 7), (5, 2)]).unwrap();
    let ranges = EntryRanges::new(vec![vec![0..1, 90..4900], vec![1..3]]).unwrap();
    for mask in [Mask::Full, Mask::Causal, Mask::Entries(&ranges)] {
        compare(&once, &twice, &newest, mask);
    }
    for store in [&once as &dyn KvStore, &twice] {
        let (keys, latents) = store.read_range(4, 0, 3000..3002).unwrap();
        assert_eq!(distance(&keys, &k.narrow(0, 3000, 2).unwrap().squeeze(1).unwrap()), 0.0);
        assert_eq!(distance(&latents, &keys.narrow(1, ROTATED, LATENT).unwrap()), 0.0);
    }
    assert_eq!(once.footprint().payload, 5003 * (ROTATED + LATENT) * 4);
    assert_eq!(twice.footprint().payload, 5003 * (ROTATED + 2 * LATENT) * 4);
}

#[test]
fn a_cache_of_latents_is_exact() {
    let mut once = LatentCache::new(spec(), latent_store()).unwrap();
    let mut twice = DenseCache::new(spec(), DType::F32).unwrap();
    let calls: [&[(SeqId, usize)]; 4] =
        [&[(0, 50), (1, 7)], &[(1, 20), (0, 1)], &[(0, 1), (1, 1)], &[(2, 9), (1, 4), (0, 2)]];
    for (i, call) in calls.into_iter().enumerate() {
        let batch = Batch::new(call).unwrap();
        let (q, k) = (random(batch.tokens(), HEADS), random(batch.tokens(), 1));
        let step = Step { batch: &batch, q: &q, k: &k, v: &values(&k) };
        let (a, b) = (once.attend(&step).unwrap(), twice.attend(&step).unwrap());
        assert!(distance(&a, &b) < 1e-5);
        if i == 1 {
            for cache in [&mut once as &mut dyn KvCache, &mut twice] {
                cache.truncate(1, 22).unwrap();
                cache.fork(0, 9).unwrap();
                assert_eq!((cache.seen(1), cache.seen(9), cache.held(9)), (22, 51, 51));
            }
        }
    }
    assert!(once.remove(9) && !once.remove(9));
    assert_eq!(once.footprint().payload, (54 + 27 + 9) * (ROTATED + LATENT) * 4);
}

#[test]
fn other_shapes_than_latents_are_refused() {
    let own = AttentionShape::new(4, 2, 8).unwrap();
    let message = |e: Error| e.to_string();
    let error = LayerSpec::new(own).with_latent().unwrap_err();
    assert!(message(error).contains("kv heads of latent attention"));
    let wide = AttentionShape::new(4, 1, 8).unwrap();
    let error = LatentStore::new(wide, |parts| DenseStore::new(parts, DType::F32)).unwrap_err();
    assert!(message(error).contains("value_dim"));
    let rope = Rope::new(ROTATED + LATENT, ROTATED + 2, 100.0, RopeScaling::None).unwrap();
    let error = LayerSpec::new(shape()).with_rope(Arc::new(rope)).with_latent().unwrap_err();
    assert!(message(error).contains("rotary_dims"));
    let plain = LayerSpec { latent: false, ..spec() };
    assert!(message(LatentCache::new(plain, latent_store()).unwrap_err()).contains("latent"));
    let mut store = latent_store();
    let k = random(2, 1);
    let error = store.append(&Batch::single(0, 2).unwrap(), &k, &(values(&k) * 2.0).unwrap());
    assert!(message(error.unwrap_err()).contains("last 12 channels of k"));
    assert!(store.seqs().is_empty());
}
