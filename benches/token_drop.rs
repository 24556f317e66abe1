//! One attention layer under each policy beside the dense cache: a decode step after 8,192 tokens of prompt at a quarter of it, the prefill,
//! and the peak memory of a prefill up to 32,768 tokens.
//!
//!     cargo bench -p longctx-benches --bench token_drop -- decode
//!     cargo bench -p longctx-benches --bench token_drop -- prefill
//!     cargo bench -p longctx-benches --bench token_drop -- memory
//!
//! The layer has SmolLM2's shape: 9 heads, 3 kv heads of 64 channels.

use std::hint::black_box;
use std::process::Command;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, SamplingMode, criterion_group};
use half::f16;
use longctx_core::{
    AttentionShape, DenseCache, DenseStore, EvictionPolicy, KvCache, Result, Rope, RopeScaling,
    Step,
};
use longctx_examples::memory;
use token_drop::*;

const PROMPT: usize = 8192;
const RATIO: f64 = 0.25;

type Make = fn(AttentionShape) -> Result<Box<dyn KvCache>>;

const METHODS: [(&str, Make); 18] = [
    ("dense", |s| Ok(Box::new(DenseCache::new(s, DType::F16)?))),
    ("random", |s| policy(s, Random::new(0))),
    ("recent", |s| policy(s, Recent::default())),
    ("k-norm", |s| policy(s, KNorm)),
    ("key-diff", |s| policy(s, KeyDiff)),
    ("lag-kv", |s| policy(s, LagKv::new(4, 128)?)),
    ("expected-attention", |s| policy(s, ExpectedAttention::default())),
    ("snap-kv", |s| policy(s, SnapKv::new(32)?)),
    ("tova", |s| policy(s, Tova::default())),
    ("h2o", |s| policy(s, H2o::default())),
    ("ada-snap-kv", |s| policy(s, AdaKv::new(SnapKv::new(32)?))),
    ("chunk-snap-kv", |s| policy(s, ChunkKv::new(SnapKv::new(32)?, 20)?)),
    // The middle layer, which keeps as much as all do in the mean.
    ("pyramid-snap-kv", |s| policy(s, PyramidKv::new(SnapKv::new(32)?, 1, 3, 20.0)?)),
    ("finch", |s| policy(s, Finch::new(32)?)),
    // One head of three keeps everything: a third rather than a quarter.
    ("duo-attention", |s| {
        let duo = DuoAttention::new(vec![false, true, true], 16, 64)?;
        Ok(Box::new(PolicyCache::new(store(s)?, duo, Budget::Policy)?))
    }),
    ("streaming-llm", |s| Ok(Box::new(StreamingLlm::with_ratio(RATIO, store(s)?)?))),
    ("quest", |s| Ok(Box::new(Quest::<f16>::new(PROMPT / 4, s)?))),
    ("infllm", |s| Ok(Box::new(InfLlm::<f16>::with_ratio(RATIO, s)?))),
];

fn store(shape: AttentionShape) -> Result<DenseStore> {
    DenseStore::new(shape, DType::F16)
}

fn policy(shape: AttentionShape, p: impl EvictionPolicy + 'static) -> Result<Box<dyn KvCache>> {
    Ok(Box::new(PolicyCache::new(store(shape)?, p, Budget::Ratio(RATIO))?))
}

struct Text {
    shape: AttentionShape,
    rope: Rope,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Text {
    fn random(tokens: usize) -> Self {
        let shape = AttentionShape::new(9, 3, 64).expect("a shape");
        let rope = Rope::new(64, 64, 100_000.0, RopeScaling::None).expect("a rotary embedding");
        let x =
            |heads| Tensor::randn(0f32, 1., (1, heads, tokens, 64), &Device::Cpu).expect("data");
        Self { shape, rope, q: x(shape.heads), k: x(shape.kv_heads), v: x(shape.kv_heads) }
    }

    fn feed(&self, cache: &mut dyn KvCache) {
        let Self { shape, rope, q, k, v } = self;
        black_box(cache.attend(&Step { q, k, v, shape, rope }).expect("attention"));
    }
}

fn decode(c: &mut Criterion) {
    let (prompt, token) = (Text::random(PROMPT), Text::random(1));
    let mut group = c.benchmark_group("decode");
    // Short, so that caches which keep decoded tokens do not grow by much: a few hundred tokens at most.
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.warm_up_time(Duration::from_millis(20)).measurement_time(Duration::from_millis(200));
    for (name, make) in METHODS {
        let mut filled = None;
        group.bench_function(name, |b| {
            let cache = filled.get_or_insert_with(|| {
                let mut cache = make(prompt.shape).expect("a cache");
                prompt.feed(&mut *cache);
                cache
            });
            b.iter(|| token.feed(&mut **cache));
        });
    }
    group.finish();
}

fn prefill(c: &mut Criterion) {
    let prompt = Text::random(PROMPT);
    let mut group = c.benchmark_group("prefill");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(1)).measurement_time(Duration::from_secs(1));
    for (name, make) in METHODS {
        group.bench_function(name, |b| {
            let mut cache = make(prompt.shape).expect("a cache");
            b.iter(|| {
                cache.reset();
                prompt.feed(&mut *cache);
            });
        });
    }
    group.finish();
}

/// Prints what the peak grows by during a prefill, the prompt's own tensors not counted; each in a process of its own, so that no memory
/// is there from before.
fn peak_memory() {
    println!("peak memory of a prefill, MB beside q, k and v themselves");
    let program = std::env::current_exe().expect("the path of this program");
    for (name, _) in METHODS {
        let grown = [8192, 16_384, 32_768].map(|tokens: usize| {
            let child = Command::new(&program).args(["grown", name, &tokens.to_string()]).output();
            String::from_utf8_lossy(&child.expect("a child process").stdout).trim().to_owned()
        });
        println!("{name:20} {}", grown.map(|g| format!("{g:>9}")).join(" "));
    }
}

fn grown(name: &str, tokens: usize) {
    let prompt = Text::random(tokens);
    let (_, make) = METHODS.into_iter().find(|(known, _)| *known == name).expect("a method");
    memory::restart_peak();
    let before = memory::peak();
    let mut cache = make(prompt.shape).expect("a cache");
    prompt.feed(&mut *cache);
    match (before, memory::peak()) {
        (Some(before), Some(after)) => println!("{:.1}", (after - before) as f64 / 1e6),
        _ => println!("unknown"),
    }
}

criterion_group!(speed, decode, prefill);

fn main() {
    let args: Vec<_> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [_, "grown", name, tokens] => return grown(name, tokens.parse().expect("a number")),
        args if args.contains(&"memory") => return peak_memory(),
        _ => {}
    }
    speed();
    Criterion::default().configure_from_args().final_summary();
}
