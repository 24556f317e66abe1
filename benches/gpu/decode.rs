//! Measures decoding on a GPU with a model of Llama-3-8B's shape (random weights) and a random
//! past, for one sequence, for batches and for sequences of unequal length. With a GGUF file,
//! compares packed attention over that model's keys and values with the host's. `launched` is the
//! time of steps whose kernels are launched one by one, `replayed` of steps in CUDA graphs.
//!
//!     cargo bench -p longctx-benches --features cuda --bench cuda_decode -- [model.gguf] [method …] \
//!         [sequences x tokens, as 8x4096 …]

mod real_keys;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use base_models::{Config, LoadOptions, Session, Transformer};
use candle_core::cuda::cudarc::driver::result::mem_get_info;
use candle_core::{DType, Device, Tensor};
use longctx_core::{Batch, CausalLm, Greedy, KvCache, SeqId, Step};
use longctx_examples::methods::Method;
use longctx_examples::shapes::llama_3_8b;

const STEPS: usize = 32;
const GIB: f64 = (1u64 << 30) as f64;
/// Device memory reserved for activations.
const ACTIVATIONS: usize = 3 << 30;

fn main() -> Result<()> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return Ok(());
    };
    longctx_core::cuda::keep_freed_memory(&device)?;
    // `cargo bench` passes `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let (files, args): (Vec<_>, Vec<_>) = args.into_iter().partition(|a| a.ends_with(".gguf"));
    let (batches, names): (Vec<_>, Vec<_>) =
        args.into_iter().partition(|a| equal_batch(a).is_some());
    for gguf in files {
        real_keys::check(Path::new(&gguf), &device)?;
    }
    let formats = ["dense-f16", "kivi-4", "kivi-2"].map(String::from);
    let names = if names.is_empty() { formats.to_vec() } else { names };
    let options = LoadOptions { device: device.clone(), dtype: DType::F16, ..Default::default() };
    let model = Transformer::random(llama_3_8b(), &options)?;
    let bandwidth = copy_bandwidth(&device)?;
    println!("copying: {:.0} GB/s, read and written", bandwidth / 1e9);
    println!(
        "\n| sequences x tokens | cache | launched, ms | replayed, ms | floor, ms | share, launched | \
         share, replayed | tokens/s | KV cache, GiB |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|---:|");
    let unequal = [vec![131_072], vec![2_048; 31]].concat();
    let usual =
        vec![vec![4_096], vec![32_768], vec![131_072], vec![16_384; 16], vec![16_384; 32], unequal];
    let given: Vec<_> = batches.iter().filter_map(|of| equal_batch(of)).collect();
    for lens in if given.is_empty() { usual } else { given } {
        for name in &names {
            decode(&model, &lens, &Method::named(name)?, bandwidth)?;
        }
    }
    Ok(())
}

/// Returns the lengths of a batch that is given as `sequences x tokens`, without spaces.
fn equal_batch(text: &str) -> Option<Vec<usize>> {
    let (seqs, tokens) = text.split_once('x')?;
    Some(vec![tokens.parse().ok()?; seqs.parse().ok()?])
}

/// Prints the median time of steps after a random past. The floor is the time of copying as many
/// bytes as a step must read: the weights and the cache.
fn decode(model: &Transformer, lens: &[usize], method: &Method, bandwidth: f64) -> Result<()> {
    let what = match lens {
        [first, second, ..] if first != second => {
            format!("1 x {first}, {} x {second}", lens.len() - 1)
        }
        _ => format!("{} x {}", lens.len(), lens[0]),
    };
    let dense = lens.iter().sum::<usize>() * token_bytes(model.config());
    // Freed memory is kept in the pool, so the free memory would not be a useful limit.
    let (_, total) = mem_get_info()?;
    let needed = dense + weight_bytes(model.config()) + ACTIVATIONS;
    if method.name().starts_with("dense") && needed > total {
        println!(
            "| {what} | {} | needs {:.1} GiB | | | | | | |",
            method.name(),
            dense as f64 / GIB
        );
        return Ok(());
    }
    let mut session = model.session(|spec| filled(method.cache(spec)?, lens, model.device()))?;
    let launched = median_step(&mut session, lens.len())?;
    let mut session = session.with_cuda_graphs(64)?;
    let replayed = median_step(&mut session, lens.len())?;
    if session.replayed_steps() < STEPS as u64 - 4 {
        println!("{} steps of {} were replayed", session.replayed_steps(), method.name());
    }
    let held = session.footprint();
    let floor = (weight_bytes(model.config()) + held.payload + held.scales + held.residual) as f64
        / bandwidth;
    println!(
        "| {what} | {} | {:.2} | {:.2} | {:.2} | {:.0}% | {:.0}% | {:.0} | {:.2} |",
        method.name(),
        1e3 * launched,
        1e3 * replayed,
        1e3 * floor,
        100. * floor / launched,
        100. * floor / replayed,
        lens.len() as f64 / replayed,
        held.total() as f64 / GIB,
    );
    Ok(())
}

/// Returns the median time of a step, in seconds.
fn median_step(session: &mut Session, seqs: usize) -> Result<f64> {
    let batch = Batch::decode(&(0..seqs as SeqId).collect::<Vec<_>>())?;
    let (mut greedy, mut times) = (Greedy::default(), Vec::new());
    for _ in 0..STEPS {
        let start = Instant::now();
        // Choosing the next tokens waits for the device.
        session.forward_greedy(&batch, &vec![42; seqs], &mut greedy)?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[STEPS / 2].as_secs_f64())
}

/// Returns the cache with a random past of each sequence.
fn filled(
    mut cache: Box<dyn KvCache>,
    lens: &[usize],
    device: &Device,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let shape = cache.spec().shape;
    for (seq, &tokens) in lens.iter().enumerate() {
        let random = || -> longctx_core::Result<Tensor> {
            let x = Tensor::randn(0f32, 1., (tokens, shape.kv_heads, shape.head_dim), device)?;
            Ok(x.to_dtype(DType::F16)?)
        };
        let (k, v) = (random()?, random()?);
        // The prompt is only appended, without computing attention among its random tokens.
        let q = Tensor::zeros((tokens, shape.heads, shape.head_dim), DType::F16, device)?;
        let batch = Batch::single(seq as SeqId, tokens)?;
        cache.append_prompt(&Step { batch: &batch, q: &q, k: &k, v: &v }, None)?;
    }
    Ok(cache)
}

/// Returns the bandwidth of a large copy in bytes per second, read and written.
fn copy_bandwidth(device: &Device) -> Result<f64> {
    const COPIES: usize = 10;
    let stream = device.as_cuda_device()?.cuda_stream();
    let from = stream.alloc_zeros::<u8>(2 << 30)?;
    let mut to = stream.alloc_zeros::<u8>(2 << 30)?;
    stream.memcpy_dtod(&from, &mut to)?;
    stream.synchronize()?;
    let start = Instant::now();
    for _ in 0..COPIES {
        stream.memcpy_dtod(&from, &mut to)?;
    }
    stream.synchronize()?;
    Ok((2 * from.len() * COPIES) as f64 / start.elapsed().as_secs_f64())
}

/// Returns the bytes of a token's keys and values in f16, in all layers.
fn token_bytes(c: &Config) -> usize {
    2 * 2 * c.layers * c.kv_heads * c.head_dim
}

/// Returns the bytes of the weights that a step reads: all but the embedding.
fn weight_bytes(c: &Config) -> usize {
    let attention = c.hidden_size * c.head_dim * 2 * (c.heads + c.kv_heads);
    let layer = attention + 3 * c.hidden_size * c.intermediate_size;
    2 * (c.layers * layer + c.vocab_size * c.hidden_size)
}
