//! Caches in files, caches of several formats, and what caches and stores refuse.
#![cfg(all(feature = "candle", feature = "save"))]

use candle_core::{DType, Device, Tensor};
use kv_quant::{
    Bits, DequantCache, Format, KeyBasis, Order, QuantCache, QuantStore, load_caches, save_caches,
};
use longctx_core::{AttentionShape, Error, KvCache, KvStore, Rope, RopeScaling, Step};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

fn shape() -> AttentionShape {
    AttentionShape::new(HEADS, KV_HEADS, DIM).unwrap()
}

fn random(batch: usize, heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0f32, 1., (batch, heads, tokens, DIM), &Device::Cpu).unwrap()
}

fn kivi(bits: Bits) -> Format {
    Format::kivi(bits, bits, 32, 64).unwrap()
}

fn flexgen() -> Format {
    Format::flexgen(Bits::Four, Bits::Two, 64).unwrap()
}

/// One cache per layer, each of its own bits and options.
fn layers() -> Vec<QuantCache> {
    let cache = |format| QuantCache::new(shape(), format).unwrap();
    vec![
        cache(kivi(Bits::Four)),
        cache(kivi(Bits::Two)).with_sinks(4).unwrap(),
        cache(kivi(Bits::Three).with_basis(KeyBasis::BeforeRope)).with_sinks(2).unwrap(),
        cache(flexgen().with_basis(KeyBasis::Hadamard)).with_order(Order::QuantizeFirst),
    ]
}

fn feed(caches: &mut [QuantCache], q: &Tensor, kv: &Tensor) -> Vec<Vec<f32>> {
    let (shape, rope) = (shape(), Rope::new(DIM, DIM, 10_000.0, RopeScaling::None).unwrap());
    let step = Step { q, k: kv, v: kv, shape: &shape, rope: &rope };
    let run = |cache: &mut QuantCache| cache.attend(&step).unwrap().flatten_all().unwrap();
    caches.iter_mut().map(|cache| run(cache).to_vec1().unwrap()).collect()
}

#[test]
fn what_was_saved_goes_on_as_if_it_had_not_been() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.safetensors");
    let mut caches = layers();
    feed(&mut caches, &random(2, HEADS, 200), &random(2, KV_HEADS, 200));
    save_caches(&path, &caches).unwrap();
    let mut opened = load_caches(&path, layers()).unwrap();
    for tokens in [1, 100, 1] {
        for (saved, opened) in caches.iter().zip(&opened) {
            assert_eq!((saved.seen(), saved.held()), (opened.seen(), opened.held()));
            assert_eq!(saved.footprint().payload, opened.footprint().payload);
            assert_eq!(saved.footprint().residual, opened.footprint().residual);
        }
        let (q, kv) = (random(2, HEADS, tokens), random(2, KV_HEADS, tokens));
        assert_eq!(feed(&mut caches, &q, &kv), feed(&mut opened, &q, &kv));
    }
    // Layers of fewer bits take less memory.
    let payload = |layer: usize| caches[layer].footprint().payload;
    assert!(payload(1) < payload(2) && payload(2) < payload(0));
}

#[test]
fn a_file_of_other_caches_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.safetensors");
    let message = save_caches(&path, &layers()).unwrap_err().to_string();
    assert!(message.contains("layer 0") && !path.exists(), "{message}");
    let mut caches = layers();
    feed(&mut caches, &random(1, HEADS, 100), &random(1, KV_HEADS, 100));
    save_caches(&path, &caches).unwrap();
    let (mut fewer, mut more, mut other) = (layers(), layers(), layers());
    fewer.pop();
    more.push(layers().remove(0));
    other.swap(0, 1);
    for wrong in [fewer, more, other, Vec::new()] {
        let error = load_caches(&path, wrong).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    }
    let error = load_caches(dir.path().join("none"), layers()).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error}");
}

#[test]
fn what_a_cache_cannot_do_is_said() {
    let windowed = AttentionShape { window: Some(128), ..shape() };
    let error = QuantCache::new(windowed, kivi(Bits::Four)).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    let mut caches = [QuantCache::new(shape(), kivi(Bits::Four)).unwrap()];
    feed(&mut caches, &random(1, HEADS, 3), &random(1, KV_HEADS, 3));
    let [cache] = caches;
    let message = cache.with_sinks(4).unwrap_err().to_string();
    assert!(message.contains("an empty cache, got 3 tokens"), "{message}");
}

#[test]
fn a_store_takes_in_all_heads_or_none() {
    let mut store = QuantStore::new(shape(), flexgen()).unwrap();
    let good = random(2, KV_HEADS, 5);
    store.append(&good, &good).unwrap();
    // A number too large for the last head's last token.
    let mut numbers: Vec<f32> = good.flatten_all().unwrap().to_vec1().unwrap();
    *numbers.last_mut().unwrap() = 4e4;
    let bad = Tensor::from_vec(numbers, good.shape(), &Device::Cpu).unwrap();
    let message = store.append(&good, &bad).unwrap_err().to_string();
    assert!(message.contains("token 4, channel 63"), "{message}");
    assert_eq!(store.lens(), [5; 4]);
    assert!(store.append(&random(1, KV_HEADS, 5), &random(1, KV_HEADS, 5)).is_err());
    assert!(store.read(2, 0).is_err() && store.read(0, KV_HEADS).is_err());
    assert_eq!(store.lens(), [5; 4]);
}

#[test]
fn the_adapter_keeps_dtype_and_batch_and_refuses_what_does_not_fit() {
    let mut ours = DequantCache::new(KV_HEADS, DIM, kivi(Bits::Eight)).unwrap();
    let mut candles = candle_nn::kv_cache::KvCache::new(2, 512);
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
    assert_eq!((ours.current_seq_len(), flat(&ours)), (134, before));
    assert!(DequantCache::new(KV_HEADS, 0, kivi(Bits::Four)).is_err());
}
