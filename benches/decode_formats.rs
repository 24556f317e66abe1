//! Compares decode attention over packed formats with dense f16, by turns.
//!
//!     cargo bench -p longctx-benches --bench decode_formats
//!
//! One new token, 32 query heads of 128 channels, 32,768 tokens, all cores; 8 or 32 kv heads. Every
//! round runs each format once, so that all have the same share of the machine's changes. The row
//! `read` reads as many bytes as f16 takes: no attention over f16 can be faster.
//!
//! Arguments select formats: `-- fp8 kivi-8`. Sizes count codes, scales, minima, residual and
//! tables.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Float8, Format, Mask, Pool, PoolShape, Queries, TurboQuant};
use longctx_core::{AttentionShape, Batch, DenseStore, KvStore, Mask as Sees};
use memmap2::{Advice, MmapMut};
use rayon::prelude::*;

const HEADS: usize = 32;
const DIM: usize = 128;
const TOKENS: usize = 32_768;
const ROUNDS: usize = 40;

/// A format: its name, its size in bytes, and one attention call.
struct Case {
    name: &'static str,
    bytes: usize,
    attend: Box<dyn FnMut() -> Result<()>>,
}

fn main() -> Result<()> {
    let selected: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| selected.is_empty() || selected.iter().any(|s| s == name);
    for kv_heads in [8, 32] {
        println!("\n{HEADS} query heads, {kv_heads} kv heads\n");
        println!("| format | MiB | minimum ms | median ms | GiB/s |");
        println!("|---|---:|---:|---:|---:|");
        let mut cases = Vec::new();
        for (name, format) in formats()?.into_iter().filter(|(name, _)| wanted(name)) {
            cases.push(packed(name, format, kv_heads)?);
        }
        cases.push(dense(kv_heads)?);
        cases.push(read(kv_heads)?);
        measure(cases)?;
    }
    Ok(())
}

fn formats() -> Result<Vec<(&'static str, Format)>> {
    let kivi = |bits| Format::kivi(bits, bits, 32, 128);
    Ok(vec![
        ("kivi-8", kivi(Bits::Eight)?),
        ("fp8", Format::float8(Float8::E4m3)),
        ("fp8-e5m2", Format::float8(Float8::E5m2)),
        ("turboquant-k8v4", Format::turboquant(TurboQuant::K8V4)),
        ("kivi-4", kivi(Bits::Four)?),
        ("int4-rotated", Format::rotated_symmetric(Bits::Four, Bits::Four)),
        ("turboquant-4bit-nc", Format::turboquant(TurboQuant::FourBitNc)),
        ("turboquant-k3v4-nc", Format::turboquant(TurboQuant::K3V4Nc)),
        ("kvarn-k4v4", Format::kvarn(Bits::Four, Bits::Four, 128)?),
        ("kivi-3", kivi(Bits::Three)?),
        ("int3-rotated", Format::rotated_symmetric(Bits::Three, Bits::Three)),
        ("turboquant-3bit-nc", Format::turboquant(TurboQuant::ThreeBitNc)),
        ("kvarn-k4v2", Format::kvarn(Bits::Four, Bits::Two, 128)?),
        ("kivi-2", kivi(Bits::Two)?),
        ("kvarn-k2v2", Format::kvarn(Bits::Two, Bits::Two, 128)?),
    ])
}

fn packed(name: &'static str, format: Format, kv_heads: usize) -> Result<Case> {
    let mut pool = Pool::new(PoolShape { kv_heads, head_dim: DIM, value_dim: DIM }, format)?;
    let (k, v) = (numbers(1, TOKENS * kv_heads * DIM), numbers(2, TOKENS * kv_heads * DIM));
    pool.append(&[0], &[0, TOKENS], &k, &v)?;
    let footprint = pool.footprint();
    let q = numbers(3, HEADS * DIM);
    let (mut out, mut lse) = (vec![0f32; HEADS * DIM], vec![0f32; HEADS]);
    let attend = move || {
        let scale = (DIM as f32).sqrt().recip();
        let queries = Queries { data: &q, heads: HEADS, scale, soft_cap: None, window: None };
        pool.attend_into(&queries, &[0], &[0, 1], Mask::Full, &mut out, &mut lse)?;
        black_box(&out);
        Ok(())
    };
    Ok(Case { name, bytes: footprint.total() - footprint.slack, attend: Box::new(attend) })
}

/// longctx-core's paged attention over f16.
fn dense(kv_heads: usize) -> Result<Case> {
    let tensor = |seed, tokens, heads| {
        let x = numbers(seed, tokens * heads * DIM);
        Tensor::from_vec(x, (tokens, heads, DIM), &Device::Cpu)
    };
    let mut store = DenseStore::new(AttentionShape::new(HEADS, kv_heads, DIM)?, DType::F16)?;
    let (k, v) = (tensor(1, TOKENS, kv_heads)?, tensor(2, TOKENS, kv_heads)?);
    store.append(&Batch::single(0, TOKENS)?, &k, &v)?;
    let (q, one) = (tensor(3, 1, HEADS)?, Batch::single(0, 1)?);
    let attend = move || {
        black_box(store.attend(&one, &q, Sees::Full)?);
        Ok(())
    };
    Ok(Case { name: "dense f16", bytes: f16_bytes(kv_heads), attend: Box::new(attend) })
}

/// Reads f16's bytes in huge pages, as the pools' memory is.
fn read(kv_heads: usize) -> Result<Case> {
    let bytes = f16_bytes(kv_heads);
    let mut memory = MmapMut::map_anon(bytes)?;
    if cfg!(target_os = "linux") {
        memory.advise(Advice::HugePage)?;
    }
    memory.fill(1);
    let attend = move || {
        let sum: u64 = memory.par_chunks(1 << 20).map(sum).sum();
        black_box(sum);
        Ok(())
    };
    Ok(Case { name: "read", bytes, attend: Box::new(attend) })
}

longctx_simd::wide! {
    /// Sums the words of bytes.
    fn sum(bytes: &'a [u8]) -> u64 {
        let words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        words.fold(0, u64::wrapping_add)
    }
}

fn f16_bytes(kv_heads: usize) -> usize {
    2 * 2 * TOKENS * kv_heads * DIM
}

/// Runs the cases by turns and prints a row for each.
fn measure(mut cases: Vec<Case>) -> Result<()> {
    let mut times = vec![Vec::with_capacity(ROUNDS); cases.len()];
    for _ in 0..ROUNDS {
        for (case, times) in cases.iter_mut().zip(&mut times) {
            let start = Instant::now();
            (case.attend)()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (case, times) in cases.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let least = times.first().context("a round")?;
        let (mib, median) = (case.bytes as f64 / f64::from(1 << 20), times[ROUNDS / 2]);
        let rate = mib / 1024.0 / (median / 1e3);
        println!("| {} | {mib:.0} | {least:.2} | {median:.2} | {rate:.1} |", case.name);
    }
    Ok(())
}

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
