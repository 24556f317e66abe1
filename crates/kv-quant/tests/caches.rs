//! Caches in files, caches of several formats, forks and rollbacks, and refused calls.
#![cfg(all(feature = "candle", feature = "save"))]

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{
    Bits, DequantCache, Flush, Format, KeyBasis, Order, QuantCache, QuantStore, load_caches,
    save_caches,
};
use longctx_core::{
    AttentionShape, Batch, Error, KvCache, KvStore, LayerSpec, Rope, RopeScaling, SeqId, Step,
};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

fn spec() -> LayerSpec {
    let rope = Rope::new(DIM, DIM, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(AttentionShape::new(HEADS, KV_HEADS, DIM).unwrap()).with_rope(Arc::new(rope))
}

thread_local! {
    /// Each test runs in a thread of its own, so its numbers are the same in every run.
    static SEED: Cell<u64> = const { Cell::new(1) };
}

/// Returns sums of 12 uniform numbers, which are nearly normal.
fn random(tokens: usize, heads: usize) -> Tensor {
    let uniform = || {
        let next = SEED.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        SEED.set(next);
        (next >> 40) as f32 / (1 << 24) as f32
    };
    let normal = |_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
    let x: Vec<f32> = (0..tokens * heads * DIM).map(normal).collect();
    Tensor::from_vec(x, (tokens, heads, DIM), &Device::Cpu).unwrap()
}

fn kivi(bits: Bits) -> Format {
    Format::kivi(bits, bits, 32, 64).unwrap()
}

fn flexgen() -> Format {
    Format::flexgen(Bits::Four, Bits::Two, 64).unwrap()
}

/// Returns one cache per layer, each with its own bits and options.
fn layers() -> Vec<QuantCache> {
    let cache = |format| QuantCache::new(spec(), format).unwrap();
    vec![
        cache(kivi(Bits::Four)),
        cache(kivi(Bits::Two)).with_sinks(4).unwrap(),
        cache(kivi(Bits::Three).with_key_basis(KeyBasis::BeforeRope)).with_sinks(2).unwrap(),
        cache(flexgen().with_rotated_keys()).with_order(Order::QuantizeFirst),
        cache(Format::kivi_rolling(Bits::Four, Bits::Four, 32, 64).unwrap()),
    ]
}

fn attend(cache: &mut QuantCache, batch: &Batch, q: &Tensor, kv: &Tensor) -> Vec<f32> {
    let out = cache.attend(&Step { batch, q, k: kv, v: kv }).unwrap();
    out.flatten_all().unwrap().to_vec1().unwrap()
}

fn feed(caches: &mut [QuantCache], batch: &Batch, q: &Tensor, kv: &Tensor) -> Vec<Vec<f32>> {
    caches.iter_mut().map(|cache| attend(cache, batch, q, kv)).collect()
}

#[test]
fn a_loaded_sequence_continues_like_the_saved_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.safetensors");
    let mut caches = layers();
    let prompts = Batch::new(&[(7, 200), (3, 90)]).unwrap();
    feed(&mut caches, &prompts, &random(290, HEADS), &random(290, KV_HEADS));
    save_caches(&path, 7, &caches).unwrap();
    let mut opened = layers();
    load_caches(&path, 5, &mut opened).unwrap();
    for tokens in [1, 100, 1] {
        for (saved, opened) in caches.iter().zip(&opened) {
            assert_eq!((saved.seen(7), saved.held(7)), (opened.seen(5), opened.held(5)));
            assert_eq!(saved.seq_footprint(7).payload, opened.seq_footprint(5).payload);
        }
        let (q, kv) = (random(tokens, HEADS), random(tokens, KV_HEADS));
        let of = |seq| Batch::single(seq, tokens).unwrap();
        assert!(feed(&mut caches, &of(7), &q, &kv) == feed(&mut opened, &of(5), &q, &kv));
    }
    // Layers with fewer bits need less memory.
    let payload = |layer: usize| caches[layer].seq_footprint(7).payload;
    assert!(payload(1) < payload(2) && payload(2) < payload(0));
}

#[test]
fn a_file_of_other_caches_is_refused_and_changes_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.safetensors");
    assert!(matches!(save_caches(&path, 0, &layers()), Err(Error::UnknownSequence(0))));
    assert!(!path.exists());
    let mut caches = layers();
    let batch = Batch::single(0, 100).unwrap();
    feed(&mut caches, &batch, &random(100, HEADS), &random(100, KV_HEADS));
    save_caches(&path, 0, &caches).unwrap();
    let (mut fewer, mut more, mut other) = (layers(), layers(), layers());
    fewer.pop();
    more.push(layers().remove(0));
    other.swap(1, 2);
    for mut wrong in [fewer, more, other, Vec::new()] {
        let error = load_caches(&path, 1, &mut wrong).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert!(wrong.iter().all(|cache| cache.seqs().is_empty() && cache.held(1) == 0));
    }
    assert!(load_caches(&path, 0, &mut caches).unwrap_err().to_string().contains("a new one"));
    let error = load_caches(dir.path().join("none"), 0, &mut layers()).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error}");
}

#[test]
fn forks_are_independent_and_rollbacks_within_the_residual_are_exact() {
    for (i, mut cache) in layers().into_iter().enumerate() {
        let mut plain = cache.clone();
        let (q, kv) = (random(300, HEADS), random(300, KV_HEADS));
        let call = |cache: &mut QuantCache, seq: SeqId, from: usize, count: usize| {
            let batch = Batch::single(seq, count).unwrap();
            let part = |x: &Tensor| x.narrow(0, from, count).unwrap();
            attend(cache, &batch, &part(&q), &part(&kv))
        };
        call(&mut cache, 1, 0, 150);
        cache.fork(1, 2).unwrap();
        let shared = cache.footprint().total();
        // Three tokens too many, which are truncated again.
        call(&mut cache, 2, 290, 3);
        cache.truncate(2, 150).unwrap();
        assert_eq!((cache.seen(1), cache.seen(2)), (150, 150));
        let (one, two) = (call(&mut cache, 1, 150, 40), call(&mut cache, 2, 200, 40));
        // The same calls on a separate cache for each.
        call(&mut plain, 1, 0, 150);
        let mut other = plain.clone();
        assert!(call(&mut plain, 1, 150, 40) == one, "layer {i}");
        let want = call(&mut other, 1, 200, 40);
        // A staggered flush has packed three values because of the truncated tokens.
        let exact = !matches!(cache.format().flush(), Flush::Staggered(_));
        let worst = want.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(if exact { worst == 0.0 } else { worst < 0.15 }, "layer {i}: {worst}");
        assert!(cache.remove(1) && cache.remove(2) && !cache.remove(1));
        assert_eq!(cache.footprint().payload + cache.footprint().residual, 0);
        assert!(shared > 0);
    }
}

#[test]
fn refusals_name_their_reason() {
    let windowed = AttentionShape { window: Some(128), ..spec().shape };
    let error = QuantCache::new(LayerSpec::new(windowed), kivi(Bits::Four)).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    let mut caches = [QuantCache::new(spec(), kivi(Bits::Four)).unwrap()];
    let batch = Batch::single(0, 3).unwrap();
    feed(&mut caches, &batch, &random(3, HEADS), &random(3, KV_HEADS));
    let [cache] = caches;
    let message = cache.with_sinks(4).unwrap_err().to_string();
    assert!(message.contains("an empty cache, got 1 sequences"), "{message}");
}

#[test]
fn a_call_that_fails_changes_nothing() {
    for mut cache in layers() {
        let batch = Batch::new(&[(0, 3), (1, 80)]).unwrap();
        let (q, kv) = (random(83, HEADS), random(83, KV_HEADS));
        attend(&mut cache, &batch, &q, &kv);
        let mut before = cache.clone();
        // The last token of a new sequence has a number too large for a packed group.
        let next = Batch::new(&[(0, 2), (2, 9)]).unwrap();
        let (q, kv) = (random(11, HEADS), random(11, KV_HEADS));
        let mut numbers: Vec<f32> = kv.flatten_all().unwrap().to_vec1().unwrap();
        *numbers.last_mut().unwrap() = 4e4;
        let bad = Tensor::from_vec(numbers, kv.shape(), &Device::Cpu).unwrap();
        let error = cache.attend(&Step { batch: &next, q: &q, k: &kv, v: &bad }).unwrap_err();
        assert!(error.to_string().contains("sequence 2"), "{error}");
        let nan = (&kv * f64::NAN).unwrap();
        assert!(cache.attend(&Step { batch: &next, q: &q, k: &nan, v: &kv }).is_err());
        // The rotary embedding makes these queries infinite.
        let huge = (q.ones_like().unwrap() * 3e38).unwrap();
        let error = cache.attend(&Step { batch: &next, q: &huge, k: &kv, v: &kv }).unwrap_err();
        assert!(error.to_string().starts_with("rotated q: "), "{error}");
        assert_eq!(cache.seqs(), before.seqs());
        let sizes = |cache: &QuantCache| {
            let footprint = cache.footprint();
            (footprint.payload, footprint.scales, footprint.residual)
        };
        assert_eq!(sizes(&cache), sizes(&before));
        assert_eq!(attend(&mut cache, &next, &q, &kv), attend(&mut before, &next, &q, &kv));
    }
}

/// Sink logits of a wrong number fail after attention.
#[test]
fn a_call_that_fails_after_its_attention_changes_nothing_or_poisons() {
    let failing = LayerSpec { sink_logits: Some(vec![0.0].into()), ..spec() };
    let prompts = Batch::new(&[(0, 3), (1, 80)]).unwrap();
    let (q, kv) = (random(83, HEADS), random(83, KV_HEADS));
    let step = Step { batch: &prompts, q: &q, k: &kv, v: &kv };
    let next = Batch::new(&[(0, 2), (1, 7), (2, 9)]).unwrap();
    let (q, kv) = (random(18, HEADS), random(18, KV_HEADS));
    let more = Step { batch: &next, q: &q, k: &kv, v: &kv };
    for (format, poisons) in [(flexgen(), false), (kivi(Bits::Four), true)] {
        for (order, sinks) in [Order::AttendFirst, Order::QuantizeFirst]
            .into_iter()
            .flat_map(|order| [0, 4].map(|sinks| (order, sinks)))
        {
            let cache = QuantCache::new(failing.clone(), format).unwrap();
            let mut cache = cache.with_order(order).with_sinks(sinks).unwrap();
            cache.append_prompt(&step, None).unwrap();
            let mut before = cache.clone();
            let error = cache.attend(&more).unwrap_err().to_string();
            assert!(error.starts_with("sink logits"), "{error}");
            assert_eq!((cache.seqs(), cache.held(2)), (vec![0, 1], 0));
            assert_eq!((cache.seen(0), cache.held(0)), (3, 3));
            let poisons = poisons && order == Order::QuantizeFirst;
            for seq in [0, 1] {
                let is_poisoned = matches!(cache.fork(seq, 9), Err(Error::Poisoned { .. }));
                // The seven tokens pack a value of sequence 1 that was in full precision.
                assert_eq!(
                    is_poisoned,
                    poisons && seq == 1,
                    "{format:?}, {order:?}, {sinks} sinks"
                );
                cache.remove(9);
                if is_poisoned {
                    assert!(matches!(cache.check_truncate(seq, 1), Err(Error::Poisoned { .. })));
                    assert!(matches!(cache.attend(&more), Err(Error::Poisoned { .. })));
                    assert!(cache.remove(seq) && before.remove(seq));
                }
            }
            let payload = |cache: &QuantCache| {
                let bytes = cache.footprint();
                (bytes.payload, bytes.scales, bytes.residual)
            };
            assert_eq!(payload(&cache), payload(&before), "{format:?}, {order:?}, {sinks} sinks");
        }
    }
}

#[test]
fn a_full_pool_is_an_error_that_names_bytes() {
    let mut cache = QuantCache::new(spec(), kivi(Bits::Four)).unwrap().with_capacity(200_000);
    let prompt = Batch::single(0, 200).unwrap();
    attend(&mut cache, &prompt, &random(200, HEADS), &random(200, KV_HEADS));
    let long = Batch::single(1, 4000).unwrap();
    assert!(!cache.can_append(&long) && cache.can_append(&Batch::single(1, 100).unwrap()));
    let (q, kv) = (random(4000, HEADS), random(4000, KV_HEADS));
    // The room is checked before attention is computed and before numbers are packed.
    let large = (&kv * 1e6).unwrap();
    for kv in [kv, large] {
        let error = cache.attend(&Step { batch: &long, q: &q, k: &kv, v: &kv }).unwrap_err();
        assert!(matches!(error, Error::PoolFull { .. }), "{error}");
    }
    assert_eq!((cache.seqs(), cache.held(1)), (vec![0], 0));
}

#[test]
fn errors_convert_to_those_of_candle() {
    fn make(residual: usize, tokens: usize) -> candle_core::Result<QuantCache> {
        let format = Format::kivi(Bits::Four, Bits::Four, 32, residual)?;
        let mut cache = QuantCache::new(spec(), format)?;
        let (q, kv) = (random(1, HEADS), random(1, KV_HEADS));
        cache.attend(&Step { batch: &Batch::single(0, tokens)?, q: &q, k: &kv, v: &kv })?;
        Ok(cache)
    }
    let message = |residual, tokens| make(residual, tokens).unwrap_err().to_string();
    assert!(message(33, 1).contains("a positive multiple of 32, got 33"), "{}", message(33, 1));
    assert!(message(32, 2).contains("tokens of q: expected 2, got 1"), "{}", message(32, 2));
}

#[test]
fn an_append_changes_all_heads_or_none() {
    let mut store = QuantStore::new(spec().shape, flexgen()).unwrap();
    let good = random(5, KV_HEADS);
    let batch = Batch::single(9, 5).unwrap();
    store.append(&batch, &good, &good).unwrap();
    assert!(store.append(&Batch::single(9, 4).unwrap(), &good, &good).is_err());
    assert!(store.append(&batch, &good, &random(5, HEADS)).is_err());
    assert!(store.read(2, 0).is_err() && store.read(9, KV_HEADS).is_err());
    assert_eq!(store.lens(9), [5; 2]);
}

#[test]
fn the_adapter_keeps_dtype_and_batch_and_refuses_other_shapes() {
    let mut ours = DequantCache::new(KV_HEADS, DIM, kivi(Bits::Eight)).unwrap();
    let mut candles = candle_nn::kv_cache::KvCache::new(2, 512);
    let random = |batch: usize, heads: usize, tokens: usize| {
        Tensor::randn(0f32, 1., (batch, heads, tokens, DIM), &Device::Cpu).unwrap()
    };
    let half = |x: Tensor| x.to_dtype(DType::F16).unwrap();
    for tokens in [100, 1, 33] {
        let (k, v) = (half(random(2, KV_HEADS, tokens)), half(random(2, KV_HEADS, tokens)));
        let (got, want) = (ours.append(&k, &v).unwrap(), candles.append(&k, &v).unwrap());
        for (got, want) in [(got.0, want.0), (got.1, want.1)] {
            assert_eq!((got.dtype(), got.dims()), (DType::F16, want.dims()));
            let error = (got - want).unwrap().abs().unwrap().to_dtype(DType::F32).unwrap();
            let error = error.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 0.03, "{error}");
        }
    }
    let flat = |cache: &DequantCache| -> Vec<f32> {
        cache.k().unwrap().unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let before = flat(&ours);
    let nan = Tensor::full(f32::NAN, (2, KV_HEADS, 1, DIM), &Device::Cpu).unwrap();
    assert!(ours.append(&nan, &nan).is_err());
    assert!(ours.append(&random(1, KV_HEADS, 1), &random(1, KV_HEADS, 1)).is_err());
    assert!(ours.append(&random(2, HEADS, 1), &random(2, HEADS, 1)).is_err());
    assert!(ours.truncate(135).is_err());
    assert_eq!((ours.current_seq_len(), flat(&ours)), (134, before.clone()));
    assert!(DequantCache::new(KV_HEADS, 0, kivi(Bits::Four)).is_err());

    // A clone that continues and is truncated, and a batch that is split and joined.
    let mut draft = ours.clone();
    draft.append(&random(2, KV_HEADS, 5), &random(2, KV_HEADS, 5)).unwrap();
    draft.truncate(134).unwrap();
    assert_eq!((flat(&draft), flat(&ours)), (before.clone(), before.clone()));
    let other = DequantCache::new(KV_HEADS, DIM, kivi(Bits::Eight)).unwrap();
    let mut parts = draft.split();
    assert_eq!(parts.len(), 2);
    parts.swap(0, 1);
    let swapped = flat(&DequantCache::join(parts).unwrap());
    assert_eq!([&swapped[before.len() / 2..], &swapped[..before.len() / 2]].concat(), before);
    assert!(DequantCache::join(vec![ours.clone(), other]).is_err());
    assert!(DequantCache::join(vec![ours.clone(), ours.sibling()]).is_err());
}
