//! StreamingLLM against the published semantics, computed the slow way: keys kept unrotated, and all of them rotated by their
//! position within the cache at every step (mit-han-lab/streaming-llm, `StartRecentKVCache` with `pos_shift` attention).

use candle_core::{D, DType, Device, Tensor};
use longctx_core::{AttentionShape, DenseStore, KvCache, Rope, RopeScaling, Step};
use token_drop::StreamingLlm;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;

fn shape() -> AttentionShape {
    AttentionShape::new(HEADS, KV_HEADS, DIM).unwrap()
}

fn rope() -> Rope {
    Rope::new(DIM, DIM, 10_000.0, RopeScaling::None).unwrap()
}

fn random(heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0f32, 1., (1, heads, tokens, DIM), &Device::Cpu).unwrap()
}

fn store(dtype: DType) -> DenseStore {
    DenseStore::new(shape(), dtype).unwrap()
}

/// Unrotated keys and values of the sinks and the window.
struct Published {
    sinks: usize,
    window: usize,
    held: Option<(Tensor, Tensor)>,
}

impl Published {
    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> candle_core::Result<Tensor> {
        let (k, v) = match &self.held {
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, k], 2)?, Tensor::cat(&[old_v, v], 2)?),
            None => (k.clone(), v.clone()),
        };
        let (tokens, len) = (q.dim(2)?, k.dim(2)?);
        let (q, keys) = (rope().apply(q, len - tokens).unwrap(), rope().apply(&k, 0).unwrap());
        let repeat = |x: &Tensor| {
            let heads: Vec<_> =
                (0..HEADS).map(|h| x.narrow(1, h * KV_HEADS / HEADS, 1).unwrap()).collect();
            Tensor::cat(&heads, 1)
        };
        let scores = (q.matmul(&repeat(&keys)?.t()?)? * (DIM as f64).powf(-0.5))?;
        let mask: Vec<f32> = (0..tokens)
            .flat_map(|i| (0..len).map(move |j| if j <= len - tokens + i { 0. } else { f32::MIN }))
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (tokens, len), &Device::Cpu)?)?;
        let out = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&repeat(&v)?)?;
        self.held = Some(if len > self.sinks + self.window {
            let cut = |x: &Tensor| {
                let newest = x.narrow(2, len - self.window, self.window)?;
                Tensor::cat(&[x.narrow(2, 0, self.sinks)?, newest], 2)
            };
            (cut(&k)?, cut(&v)?)
        } else {
            (k, v)
        });
        Ok(out)
    }
}

fn compare(sinks: usize, window: usize, calls: &[usize]) {
    let mut published = Published { sinks, window, held: None };
    let mut cache = StreamingLlm::new(sinks, window, store(DType::F32)).unwrap();
    for (call, &tokens) in calls.iter().enumerate() {
        let (q, k, v) = (random(HEADS, tokens), random(KV_HEADS, tokens), random(KV_HEADS, tokens));
        let expected = published.attend(&q, &k, &v).unwrap();
        let step = Step { q: &q, k: &k, v: &v, shape: &shape(), rope: &rope() };
        let out = cache.attend(&step).unwrap();
        let error = (out - expected).unwrap().abs().unwrap().max_all().unwrap();
        let error: f32 = error.to_scalar().unwrap();
        assert!(error < 2e-5, "call {call} of {tokens} tokens: off by {error}");
        assert!(cache.held() <= sinks + window);
        assert_eq!(cache.held(), published.held.as_ref().unwrap().0.dim(2).unwrap());
    }
    assert_eq!(cache.seen(), calls.iter().sum::<usize>());
}

#[test]
fn equals_the_published_semantics() {
    let decode = [1; 40];
    compare(4, 12, &[&[50], &decode[..]].concat());
    compare(4, 12, &decode);
    compare(0, 8, &[&[3], &decode[..]].concat());
    compare(3, 5, &[2, 2, 30, 1, 1, 4, 1, 9, 1, 1]);
}

#[test]
fn a_step_drops_groups_and_keeps_within_the_window() {
    let mut cache = StreamingLlm::new(2, 16, store(DType::F32)).unwrap().with_step(4).unwrap();
    let mut helds = Vec::new();
    for tokens in [40].into_iter().chain([1; 12]) {
        let (q, k) = (random(HEADS, tokens), random(KV_HEADS, tokens));
        cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape(), rope: &rope() }).unwrap();
        helds.push(cache.held());
    }
    assert_eq!(helds, [16, 17, 18, 15, 16, 17, 18, 15, 16, 17, 18, 15, 16]);
}

/// A quarter of 40 tokens is a window of 10, smaller than the step: the newest token stays all the same.
#[test]
fn a_step_larger_than_the_window_of_a_short_prompt_leaves_the_newest() {
    let mut cache = StreamingLlm::with_ratio(0.25, store(DType::F32)).unwrap();
    cache = cache.with_step(32).unwrap();
    let mut helds = Vec::new();
    for tokens in [40].into_iter().chain([1; 12]) {
        let (q, k) = (random(HEADS, tokens), random(KV_HEADS, tokens));
        cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape(), rope: &rope() }).unwrap();
        helds.push(cache.held());
    }
    assert_eq!(helds, [10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2]);
}

#[test]
fn memory_stays_constant_over_100_000_tokens() {
    let shape = AttentionShape::new(1, 1, 8).unwrap();
    let rope = Rope::new(8, 8, 10_000.0, RopeScaling::None).unwrap();
    let store = DenseStore::new(shape, DType::F16).unwrap();
    let mut cache = StreamingLlm::new(4, 28, store).unwrap();
    let x = Tensor::randn(0f32, 1., (1, 1, 1, 8), &Device::Cpu).unwrap();
    let mut most = 0;
    for token in 0..100_000 {
        let out = cache.attend(&Step { q: &x, k: &x, v: &x, shape: &shape, rope: &rope }).unwrap();
        if token == 999 {
            most = cache.footprint().total();
        }
        if token % 9_999 == 0 {
            assert!(token < 999 || cache.footprint().total() == most);
            // All values are the same: so is their average, at any position.
            let error = (out - &x).unwrap().abs().unwrap().max_all().unwrap();
            assert!(error.to_scalar::<f32>().unwrap() < 1e-2);
        }
    }
    assert_eq!((cache.seen(), cache.held()), (100_000, 32));
}

#[test]
fn a_ratio_is_split_as_in_the_paper() {
    let mut cache = StreamingLlm::with_ratio(0.25, store(DType::F16)).unwrap();
    let (q, k) = (random(HEADS, 1000), random(KV_HEADS, 1000));
    for _ in 0..2 {
        cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape(), rope: &rope() }).unwrap();
        assert_eq!(cache.held(), 250);
        // 5 sinks in f32, 245 window tokens in f16.
        assert_eq!(cache.footprint().payload, (5 * 4 + 245 * 2) * 2 * KV_HEADS * DIM);
    }
    cache.reset();
    assert_eq!((cache.seen(), cache.held(), cache.footprint().total()), (0, 0, 0));
}

#[test]
fn bad_settings_are_named() {
    let message = |made: longctx_core::Result<StreamingLlm<DenseStore>>| {
        made.expect_err("an error").to_string()
    };
    assert!(message(StreamingLlm::new(4, 0, store(DType::F32))).contains("window"));
    assert!(message(StreamingLlm::with_ratio(1.0, store(DType::F32))).contains("ratio"));
    assert!(message(StreamingLlm::with_ratio(f64::NAN, store(DType::F32))).contains("ratio"));
    let cache = StreamingLlm::new(4, 8, store(DType::F32)).unwrap();
    assert!(message(cache.with_step(9)).contains("step"));
    let windowed = AttentionShape { window: Some(8), ..shape() };
    let store = DenseStore::new(windowed, DType::F32).unwrap();
    assert!(message(StreamingLlm::new(4, 8, store)).contains("sliding"));
}
