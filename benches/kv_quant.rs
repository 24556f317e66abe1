//! Compares decode attention over packed pools with candle-nn's CPU `flash_attn`, the machine's
//! read bandwidth, and the crates `turboquant-rs` and `tq-kv`. Also measures the speed of packing.
//!
//! 32 query heads, 8 kv heads of 128 channels, 32,768 tokens, one new token, all cores. Throughput
//! of packed pools counts all bytes that they hold: codes, scales, minima, residual and tables.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use half::f16;
use kv_quant::{Axis, Bits, Format, Mask, Packed, Pool, PoolShape, Quantizer, Queries, Scheme};
use rayon::prelude::*;
use tq_kv::{CompressedKeys, CompressedValues4Bit, TurboQuantConfig};
use turboquant::QuantizedKVCache;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const GROUP: usize = HEADS / KV_HEADS;
const DIM: usize = 128;
const TOKENS: usize = 32_768;
const SCALE: f32 = 0.088_388_35; // 128^-0.5

/// Returns roughly normal numbers, the same for the same seed.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| 2.0 * (uniform() + uniform() + uniform())).collect()
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    group
}

/// Returns a pool with one sequence.
fn packed(format: Format) -> Pool {
    let shape = PoolShape { kv_heads: KV_HEADS, head_dim: DIM, value_dim: DIM };
    let mut pool = Pool::new(shape, format).expect("a pool");
    let (k, v) = (numbers(1, TOKENS * KV_HEADS * DIM), numbers(2, TOKENS * KV_HEADS * DIM));
    pool.append(&[0], &[0, TOKENS], &k, &v).expect("numbers");
    pool
}

fn decode(c: &mut Criterion) {
    let mut group = group(c, "decode");
    let q = numbers(99, HEADS * DIM);
    let kivi = |bits| Format::kivi(bits, bits, 32, 128).expect("KIVI");
    let formats = [
        ("kivi-2", kivi(Bits::Two)),
        ("kivi-3", kivi(Bits::Three)),
        ("kivi-4", kivi(Bits::Four)),
        ("kivi-8", kivi(Bits::Eight)),
        ("flexgen-4", Format::flexgen(Bits::Four, Bits::Four, 64).expect("FlexGen")),
    ];
    for (name, format) in formats {
        let pool = packed(format);
        let bytes = pool.footprint();
        group.throughput(Throughput::Bytes((bytes.total() - bytes.slack) as u64));
        let queries =
            Queries { data: &q, heads: HEADS, scale: SCALE, soft_cap: None, window: None };
        let (mut out, mut lse) = (vec![0f32; HEADS * DIM], vec![0f32; HEADS]);
        group.bench_function(name, |b| {
            b.iter(|| {
                let done =
                    pool.attend_into(&queries, &[0], &[0, 1], Mask::Full, &mut out, &mut lse);
                done.expect("attention");
                black_box(&out);
            });
        });
    }
    let q = Tensor::from_vec(q, (1, 1, HEADS, DIM), &Device::Cpu).expect("q");
    for dtype in [DType::F32, DType::F16] {
        let tensor = |seed| {
            let x = numbers(seed, TOKENS * KV_HEADS * DIM);
            let x = Tensor::from_vec(x, (1, TOKENS, KV_HEADS, DIM), &Device::Cpu).expect("kv");
            x.to_dtype(dtype).expect("a dtype")
        };
        let (q, k, v) = (q.to_dtype(dtype).expect("a dtype"), tensor(1), tensor(2));
        let size = 2 * TOKENS * KV_HEADS * DIM * dtype.size_in_bytes();
        group.throughput(Throughput::Bytes(size as u64));
        for (name, mask) in
            [("causal", AttnMask::causal_with_offset(TOKENS - 1)), ("no mask", AttnMask::None)]
        {
            group.bench_function(format!("flash_attn {} {name}", dtype.as_str()), |b| {
                b.iter(|| match dtype {
                    DType::F32 => flash_attn::<f32>(&q, &k, &v, SCALE, mask.clone(), None, None),
                    _ => flash_attn::<f16>(&q, &k, &v, SCALE, mask.clone(), None, None),
                });
            });
        }
    }
}

/// Measures the sum of 512 MiB on all cores, an upper bound of the throughput of attention.
fn bandwidth(c: &mut Criterion) {
    let data = vec![1u64; 64 << 20];
    let mut group = group(c, "read");
    group.throughput(Throughput::Bytes(size_of_val(&*data) as u64));
    group.bench_function("512 MiB", |b| {
        b.iter(|| -> u64 {
            data.par_chunks(1 << 18)
                .map(|part| part.iter().fold(0, |a: u64, x| a.wrapping_add(*x)))
                .sum()
        });
    });
}

fn quantize(c: &mut Criterion) {
    let mut group = group(c, "quantize and pack, one core");
    let x: Vec<f16> = numbers(3, 4096 * DIM).into_iter().map(f16::from_f32).collect();
    group.throughput(Throughput::Bytes(size_of_val(&*x) as u64));
    for bits in [Bits::Two, Bits::Three, Bits::Four, Bits::Eight] {
        // As in a pool: the SIMD lanes are tokens for keys and channels for values.
        for (name, along, lanes) in
            [("keys", Axis::Tokens, Axis::Tokens), ("values", Axis::Channels, Axis::Channels)]
        {
            let scheme = Scheme::new(bits, along, 32).expect("a scheme");
            let mut quantizer = Quantizer::default();
            group.bench_function(format!("{name}, {} bits", bits.count()), |b| {
                b.iter(|| {
                    for rows in x.chunks_exact(32 * DIM) {
                        let mut packed = Packed::new(32, DIM, scheme, lanes).expect("a matrix");
                        packed.push(rows, &mut quantizer).expect("numbers");
                        black_box(packed);
                    }
                });
            });
        }
    }
}

fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - max).exp());
    let sum: f32 = scores.iter().sum();
    scores.iter_mut().for_each(|s| *s /= sum);
}

/// Measures other crates at the same shape. Their functions process one query head; here the heads
/// are distributed over the cores.
fn peers(c: &mut Criterion) {
    let mut group = group(c, "peers");
    let q = numbers(99, HEADS * DIM);
    for (name, config) in [
        ("tq-kv, 4 bits", TurboQuantConfig::balanced()),
        ("tq-kv, 2-bit keys, 4-bit values", TurboQuantConfig::extreme()),
    ] {
        let config = TurboQuantConfig { group_size: DIM, ..config };
        let heads: Vec<(CompressedKeys, CompressedValues4Bit)> = (0..KV_HEADS as u64)
            .into_par_iter()
            .map(|h| {
                let mut values = CompressedValues4Bit::new_empty(DIM, 32);
                values.append_batch(&numbers(2 * h + 1, TOKENS * DIM), DIM);
                (tq_kv::compress_keys(&numbers(2 * h, TOKENS * DIM), DIM, &config), values)
            })
            .collect();
        let centroids = tq_kv::codebook::get_centroids(config.bits);
        group.bench_function(name, |b| {
            b.iter(|| -> Vec<Vec<f32>> {
                q.par_chunks_exact(DIM)
                    .enumerate()
                    .map(|(h, q)| {
                        let (keys, values) = &heads[h / GROUP];
                        let q = tq_kv::pre_rotate_query(q, config.rotation_seed);
                        let mut scores = tq_kv::fused_attention_scores(&q, keys, centroids, SCALE);
                        softmax(&mut scores);
                        tq_kv::sparse_attn_v_mul_compressed_4bit(&scores, values, 1e-6)
                    })
                    .collect()
            });
        });
    }
    // A sixteenth of the tokens and one kv head: packing all tokens would take minutes.
    let few = 2048;
    for bits in [4, 3] {
        let config = turboquant::TurboQuantConfig::new(bits, DIM).expect("bits");
        let mut cache = QuantizedKVCache::new(config, 1, 7);
        let (k, v) = (numbers(0, few * DIM), numbers(1, few * DIM));
        for (k, v) in k.chunks_exact(DIM).zip(v.chunks_exact(DIM)) {
            cache.push(0, k, v).expect("a token");
        }
        group.bench_function(format!("turboquant-rs, {bits} bits, 1/16 of the tokens"), |b| {
            b.iter(|| -> Vec<Vec<f32>> {
                q.par_chunks_exact(DIM)
                    .map(|q| {
                        let mut scores = cache.attention_scores(0, q).expect("scores");
                        scores.iter_mut().for_each(|s| *s *= SCALE);
                        softmax(&mut scores);
                        cache.weighted_values(0, &scores).expect("values")
                    })
                    .collect()
            });
        });
    }
}

criterion_group!(benches, decode, bandwidth, quantize, peers);
criterion_main!(benches);
