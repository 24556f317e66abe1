//! Measures the cost of block pools: decode attention through a block table and over contiguous
//! memory; forks of a long prefix; rollbacks.
//!
//!     cargo bench -p longctx-benches --bench paged
//!
//! 32 query heads, 8 kv heads of 128 channels, 32,768 tokens. Forks and rollbacks apply to the 8 kv
//! heads of one layer.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use half::f16;
use longctx_core::attention::{Element, Page, attend_pages};
use longctx_core::{
    AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Mask, SeqId, Step,
};
use longctx_examples::methods::Method;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const TOKENS: usize = 32_768;

fn shape() -> AttentionShape {
    AttentionShape::new(HEADS, KV_HEADS, DIM).expect("a shape")
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group
}

fn random(tokens: usize, heads: usize, dtype: DType) -> Tensor {
    let x = Tensor::randn(0f32, 1., (tokens, heads, DIM), &Device::Cpu).expect("numbers");
    x.to_dtype(dtype).expect("a dtype")
}

fn decode(c: &mut Criterion) {
    decode_in::<f32>(c, DType::F32);
    decode_in::<f16>(c, DType::F16);
}

fn decode_in<T: Element>(c: &mut Criterion, dtype: DType) {
    let mut group = group(c, &format!("decode, {}", dtype.as_str()));
    let (k, v) = (random(TOKENS, KV_HEADS, dtype), random(TOKENS, KV_HEADS, dtype));
    let (batch, q) = (Batch::single(0, 1).expect("a batch"), random(1, HEADS, DType::F32));
    let bytes = 2 * TOKENS * KV_HEADS * DIM * dtype.size_in_bytes();
    group.throughput(Throughput::Bytes(bytes as u64));

    let numbers = |x: &Tensor| -> Vec<T> {
        let by_head = x.transpose(0, 1).and_then(|x| x.flatten_all());
        by_head.and_then(|x| x.to_vec1()).expect("numbers")
    };
    let (keys, values) = (numbers(&k), numbers(&v));
    let heads = keys.chunks_exact(TOKENS * DIM).zip(values.chunks_exact(TOKENS * DIM));
    let heads: Vec<_> = heads.map(|(keys, values)| vec![Page { keys, values }]).collect();
    group.bench_function("contiguous", |b| {
        b.iter(|| black_box(attend_pages(&batch, &q, &heads, &shape(), Mask::Full).expect("out")));
    });

    let store = interleaved(&k, &v, dtype);
    group.bench_function("blocks of two sequences by turns", |b| {
        b.iter(|| black_box(store.attend(&batch, &q, Mask::Full).expect("attention")));
    });
}

/// Returns a store with two sequences that grow alternately, so adjacent blocks belong to different
/// sequences.
fn interleaved(k: &Tensor, v: &Tensor, dtype: DType) -> DenseStore {
    const TURN: usize = 32;
    let mut store = DenseStore::new(shape(), dtype).expect("a store");
    for start in (0..TOKENS).step_by(TURN) {
        for seq in 0..2 {
            let batch = Batch::single(seq, TURN).expect("a batch");
            let part = |x: &Tensor| x.narrow(0, start, TURN).expect("a part");
            store.append(&batch, &part(k), &part(v)).expect("room");
        }
    }
    store
}

/// Returns a cache of one layer after the prompt of sequence 0.
fn filled(name: &str) -> Box<dyn KvCache> {
    let spec = LayerSpec::new(shape());
    let mut cache = Method::named(name).and_then(|m| Ok(m.cache(&spec)?)).expect("a cache");
    let batch = Batch::single(0, TOKENS).expect("a batch");
    // None of these methods reads the queries of a prompt.
    let q = Tensor::zeros((TOKENS, HEADS, DIM), DType::F16, &Device::Cpu).expect("zeros");
    let (k, v) = (random(TOKENS, KV_HEADS, DType::F16), random(TOKENS, KV_HEADS, DType::F16));
    let step = Step { batch: &batch, q: &q, k: &k, v: &v };
    cache.append_prompt(&step, None).expect("room");
    cache
}

/// Appends tokens to a sequence, as a step of speculative decoding does.
fn draft(cache: &mut dyn KvCache, seq: SeqId, tokens: usize) {
    let batch = Batch::single(seq, tokens).expect("a batch");
    let x = |heads| random(tokens, heads, DType::F32);
    let (q, k, v) = (x(HEADS), x(KV_HEADS), x(KV_HEADS));
    cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).expect("attention");
}

fn fork_and_roll_back(c: &mut Criterion) {
    let mut group = group(c, "32768 tokens, 8 kv heads");
    for name in ["dense-f16", "kivi-4", "kivi-4-rolling"] {
        let mut filled = filled(name);
        let cache = &mut *filled;
        group.bench_function(format!("fork, {name}"), |b| {
            b.iter_custom(|rounds| {
                let remove = |cache: &mut dyn KvCache| {
                    cache.remove(1);
                };
                timed(rounds, cache, |_| {}, |cache| cache.fork(0, 1), remove)
            });
        });
        group.bench_function(format!("roll 3 tokens back, {name}"), |b| {
            b.iter_custom(|rounds| {
                let draft = |cache: &mut dyn KvCache| draft(cache, 0, 3);
                timed(rounds, cache, draft, |cache| cache.truncate(0, TOKENS), |_| {})
            });
        });
    }
}

/// Measures the time of `run`, without the time of `setup`.
fn timed(
    rounds: u64,
    cache: &mut dyn KvCache,
    before: impl Fn(&mut dyn KvCache),
    run: impl Fn(&mut dyn KvCache) -> longctx_core::Result<()>,
    after: impl Fn(&mut dyn KvCache),
) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..rounds {
        before(cache);
        let start = Instant::now();
        run(cache).expect("a cache that can");
        spent += start.elapsed();
        after(cache);
    }
    spent
}

criterion_group!(benches, decode, fork_and_roll_back);
criterion_main!(benches);
