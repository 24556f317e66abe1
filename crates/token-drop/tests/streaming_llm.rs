//! StreamingLLM against the published algorithm, computed directly: keys are stored unrotated, and
//! all of them are rotated by their position within the cache at every step
//! (mit-han-lab/streaming-llm, `StartRecentKVCache` with `pos_shift` attention).

mod common;

use candle_core::{D, DType, Device, Tensor};
use common::{HEADS, Input, KV_HEADS, rope, shape, spec, store};
use longctx_core::{AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Result, Step};
use token_drop::StreamingLlm;

/// Unrotated keys and values of the sinks and the window.
struct Published {
    sinks: usize,
    window: usize,
    held: Option<(Tensor, Tensor)>,
}

impl Published {
    fn attend(&mut self, input: &Input) -> candle_core::Result<Tensor> {
        let Input { q, k, v } = input;
        let (k, v) = match &self.held {
            Some((old_k, old_v)) => (Tensor::cat(&[old_k, k], 0)?, Tensor::cat(&[old_v, v], 0)?),
            None => (k.clone(), v.clone()),
        };
        let (tokens, len) = (q.dim(0)?, k.dim(0)?);
        let rotate = |x: &Tensor, first: usize| {
            let positions: Vec<i64> = (first as i64..len as i64).collect();
            rope(shape().head_dim).apply(x, &positions).unwrap()
        };
        let (q, keys) = (rotate(q, len - tokens), rotate(&k, 0));
        let repeat = |x: &Tensor| {
            let heads: Vec<_> =
                (0..HEADS).map(|h| x.narrow(1, h * KV_HEADS / HEADS, 1).unwrap()).collect();
            Tensor::cat(&heads, 1)?.transpose(0, 1)?.contiguous()
        };
        let scores = q.transpose(0, 1)?.contiguous()?.matmul(&repeat(&keys)?.t()?)?;
        let scores = (scores * f64::from(shape().scale))?;
        let mask: Vec<f32> = (0..tokens)
            .flat_map(|i| (0..len).map(move |j| if j <= len - tokens + i { 0. } else { f32::MIN }))
            .collect();
        let scores = scores.broadcast_add(&Tensor::from_vec(mask, (tokens, len), &Device::Cpu)?)?;
        let out = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&repeat(&v)?)?;
        self.held = Some(if len > self.sinks + self.window {
            let cut = |x: &Tensor| {
                let newest = x.narrow(0, len - self.window, self.window)?;
                Tensor::cat(&[x.narrow(0, 0, self.sinks)?, newest], 0)
            };
            (cut(&k)?, cut(&v)?)
        } else {
            (k, v)
        });
        out.transpose(0, 1)
    }
}

fn compare(sinks: usize, window: usize, calls: &[usize]) {
    let mut published = Published { sinks, window, held: None };
    let mut cache = StreamingLlm::new(spec(), store(DType::F32), sinks, window).unwrap();
    for (call, &tokens) in calls.iter().enumerate() {
        let input = Input::random(tokens);
        let expected = published.attend(&input).unwrap();
        let error = common::distance(&input.feed(&mut cache, 0).unwrap(), &expected);
        assert!(error < 2e-5, "call {call} of {tokens} tokens: off by {error}");
        assert!(cache.held(0) <= sinks + window);
        assert_eq!(cache.held(0), published.held.as_ref().unwrap().0.dim(0).unwrap());
    }
    assert_eq!(cache.seen(0), calls.iter().sum::<usize>());
}

#[test]
fn equals_the_published_semantics() {
    let decode = [1; 40];
    compare(4, 12, &[&[50], &decode[..]].concat());
    compare(4, 12, &decode);
    compare(0, 8, &[&[3], &decode[..]].concat());
    compare(3, 5, &[2, 2, 30, 1, 1, 4, 1, 9, 1, 1]);
}

/// Returns the number of entries held after each call.
fn held_after_each(cache: &mut impl KvCache, calls: impl Iterator<Item = usize>) -> Vec<usize> {
    calls
        .map(|tokens| {
            Input::random(tokens).feed(cache, 0).unwrap();
            cache.held(0)
        })
        .collect()
}

#[test]
fn a_step_drops_groups_and_keeps_within_the_window() {
    let cache = StreamingLlm::new(spec(), store(DType::F32), 2, 16).unwrap();
    let held = held_after_each(&mut cache.with_step(4).unwrap(), [40].into_iter().chain([1; 12]));
    assert_eq!(held, [16, 17, 18, 15, 16, 17, 18, 15, 16, 17, 18, 15, 16]);
}

/// A quarter of 40 tokens is 4 sinks and a window of 6, smaller than the step: the newest token is
/// kept.
#[test]
fn a_step_larger_than_the_window_of_a_short_prompt_keeps_the_newest_token() {
    let cache = StreamingLlm::with_ratio(spec(), store(DType::F32), 0.25).unwrap();
    let held = held_after_each(&mut cache.with_step(32).unwrap(), [40].into_iter().chain([1; 12]));
    assert_eq!(held, [10, 5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10]);
}

#[test]
fn memory_stays_constant_over_100_000_tokens() {
    let shape = AttentionShape::new(1, 1, 8).unwrap();
    let spec = LayerSpec::new(shape).with_rope(rope(8));
    let store = DenseStore::new(shape, DType::F16).unwrap();
    let mut cache = StreamingLlm::new(spec, store, 4, 28).unwrap();
    let x = Tensor::randn(0f32, 1., (1, 1, 8), &Device::Cpu).unwrap();
    let batch = Batch::single(0, 1).unwrap();
    let mut max = 0;
    for token in 0..100_000 {
        let out = cache.attend(&Step { batch: &batch, q: &x, k: &x, v: &x }).unwrap();
        if token == 999 {
            max = cache.footprint().total();
        }
        if token % 9_999 == 0 {
            assert!(token < 999 || cache.footprint().total() == max);
            // All values are the same, so their average is too, at any position.
            assert!(common::distance(&out, &x) < 1e-2);
        }
    }
    assert_eq!((cache.seen(0), cache.held(0)), (100_000, 32));
}

#[test]
fn a_ratio_is_split_as_in_the_paper() {
    let mut cache = StreamingLlm::with_ratio(spec(), store(DType::F16), 0.25).unwrap();
    let token = 2 * KV_HEADS * shape().head_dim;
    Input::random(1000).feed(&mut cache, 0).unwrap();
    // 5 sinks in f32, 245 window tokens in f16.
    assert_eq!((cache.sinks().len(0), cache.window().len(0)), (5, 245));
    assert_eq!(cache.footprint().payload, (5 * 4 + 245 * 2) * token);
    // The prompt continues: the window grows with it, and the sinks are those of its first call.
    Input::random(1000).feed(&mut cache, 0).unwrap();
    assert_eq!((cache.sinks().len(0), cache.window().len(0)), (5, 495));
    // A decoded token does not raise the budget.
    Input::random(1).feed(&mut cache, 0).unwrap();
    assert_eq!(cache.held(0), 500);
    cache.clear();
    assert_eq!((cache.seen(0), cache.held(0), cache.footprint().total()), (0, 0, 0));
}

#[test]
fn bad_settings_are_named() {
    let message = |made: Result<StreamingLlm<DenseStore>>| made.expect_err("an error").to_string();
    let of_ratio = |ratio| StreamingLlm::with_ratio(spec(), store(DType::F32), ratio);
    assert!(message(StreamingLlm::new(spec(), store(DType::F32), 4, 0)).contains("window"));
    assert!(message(of_ratio(1.0)).contains("ratio"));
    assert!(message(of_ratio(f64::NAN)).contains("ratio"));
    let cache = StreamingLlm::new(spec(), store(DType::F32), 4, 8).unwrap();
    assert!(message(cache.with_step(9)).contains("step"));
    let shape = AttentionShape { window: Some(8), ..shape() };
    let windowed = DenseStore::new(shape, DType::F32).unwrap();
    let made = StreamingLlm::new(LayerSpec { shape, ..spec() }, windowed, 4, 8);
    assert!(message(made).contains("sliding"));
    let rotated = LayerSpec::new(common::shape());
    let made = StreamingLlm::new(rotated, store(DType::F32), 4, 8);
    assert!(message(made).contains("StreamingLLM rotates"));
}
