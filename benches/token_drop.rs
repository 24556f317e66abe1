//! Compares one attention layer under each policy with the dense cache: a decode step after a
//! prompt of 8,192 tokens of which a quarter is kept, the prefill, and the peak memory of a prefill
//! of up to 32,768 tokens.
//!
//!     cargo bench -p longctx-benches --bench token_drop -- decode
//!     cargo bench -p longctx-benches --bench token_drop -- prefill
//!     cargo bench -p longctx-benches --bench token_drop -- memory
//!
//! The layer has SmolLM2's shape: 9 heads, 3 kv heads of 64 channels.

use std::hint::black_box;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, SamplingMode, criterion_group};
use longctx_core::{
    AttentionShape, Batch, DenseStore, KvCache, LayerSpec, Rope, RopeScaling, Step,
};
use longctx_examples::methods::{Method, duo_attention};
use longctx_examples::peak_memory;

const PROMPT: usize = 8192;

const METHODS: [&str; 18] = [
    "dense-f16",
    "random-4x",
    "recent-4x",
    "k-norm-4x",
    "key-diff-4x",
    "lag-kv-4x",
    "expected-attention-4x",
    "snap-kv-4x",
    "tova-4x",
    "h2o-4x",
    "ada-snap-kv-4x",
    "chunk-snap-kv-4x",
    "pyramid-snap-kv-4x",
    "finch-4x",
    DUO_ATTENTION,
    "streaming-llm-4x",
    "quest-2048",
    "infllm-4x",
];

/// One of three heads keeps everything, so a third of the cache is kept, not a quarter.
const DUO_ATTENTION: &str = "duo-attention";

/// The middle layer of three. Under PyramidKV its budget is the mean of all layers.
fn spec() -> LayerSpec {
    let shape = AttentionShape::new(9, 3, 64).expect("a shape");
    let rope = Rope::new(64, 64, 100_000.0, RopeScaling::None).expect("a rotary embedding");
    LayerSpec::new(shape).with_rope(Arc::new(rope)).at(1, 3)
}

fn cache(name: &str) -> Box<dyn KvCache> {
    if name == DUO_ATTENTION {
        let store = DenseStore::new(spec().shape, DType::F16).expect("a store");
        let streaming = vec![vec![false, true, true]; 3];
        return Box::new(duo_attention(spec(), store, &streaming).expect("a cache"));
    }
    Method::named(name).expect("a method").cache(&spec()).expect("a cache")
}

struct Text {
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Text {
    fn random(tokens: usize) -> Self {
        let batch = Batch::single(0, tokens).expect("a batch");
        let x = |heads| Tensor::randn(0f32, 1., (tokens, heads, 64), &Device::Cpu).expect("data");
        Self { batch, q: x(9), k: x(3), v: x(3) }
    }

    fn feed(&self, cache: &mut dyn KvCache) {
        let Self { batch, q, k, v } = self;
        black_box(cache.attend(&Step { batch, q, k, v }).expect("attention"));
    }
}

fn decode(c: &mut Criterion) {
    let (prompt, token) = (Text::random(PROMPT), Text::random(1));
    let mut group = c.benchmark_group("decode");
    // The measurement is short, so caches that keep decoded tokens grow by a few hundred tokens at
    // most.
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.warm_up_time(Duration::from_millis(20)).measurement_time(Duration::from_millis(200));
    for name in METHODS {
        let mut filled = None;
        group.bench_function(name, |b| {
            let cache = filled.get_or_insert_with(|| {
                let mut cache = cache(name);
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
    for name in METHODS {
        group.bench_function(name, |b| {
            let mut cache = cache(name);
            b.iter(|| {
                cache.remove(0);
                prompt.feed(&mut *cache);
            });
        });
    }
    group.finish();
}

/// Prints the growth of peak memory during a prefill, without the prompt's tensors. Each prefill
/// runs in a separate process, so earlier allocations do not count.
fn peak_memory() {
    println!("peak memory of a prefill, MB beside q, k and v themselves");
    let program = std::env::current_exe().expect("the path of this program");
    for name in METHODS {
        let grown = [8192, 16_384, 32_768].map(|tokens: usize| {
            let child = Command::new(&program).args(["grown", name, &tokens.to_string()]).output();
            String::from_utf8_lossy(&child.expect("a child process").stdout).trim().to_owned()
        });
        println!("{name:24} {}", grown.map(|g| format!("{g:>9}")).join(" "));
    }
}

fn grown(name: &str, tokens: usize) {
    let prompt = Text::random(tokens);
    peak_memory::reset();
    let before = peak_memory::peak();
    let mut cache = cache(name);
    prompt.feed(&mut *cache);
    match (before, peak_memory::peak()) {
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
