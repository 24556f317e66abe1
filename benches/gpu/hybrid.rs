//! Measures prefill and decode of recurrent models on a GPU, with random weights in f16, and
//! candle-transformers' on the same weights if it has the model.
//!
//!     cargo bench -p longctx-benches --features cuda --bench cuda_hybrid
//!     cargo bench -p longctx-benches --features cuda --bench cuda_hybrid -- rwkv gemma
//!
//! The second command runs only models whose names contain one of the words.
//!
//! candle's Mamba and RWKV-5 process one token at a time. The cost of a token does not depend on
//! the number of earlier tokens, so a few tokens are enough to measure the speed, of a prompt too.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use hybrid_models::{LoadOptions, Model, Session};
use longctx_benches::candle::{self, Theirs};
use longctx_benches::recurrent::{self, Outline};
use longctx_benches::{ids, tokens};
use longctx_core::{Batch, CausalLm, DenseCache, Logits};

const PROMPT: usize = 8192;
const STEPS: usize = 64;
const DTYPE: DType = DType::F16;

fn main() -> Result<()> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return Ok(());
    };
    println!("Tokens per second, a prompt of {PROMPT} tokens:");
    println!(
        "| model | prefill, candle | prefill, ours | decode, candle | decode, ours | decode, ours, in \
         a CUDA graph |"
    );
    println!("|---|---:|---:|---:|---:|---:|");
    let random = Random::new()?;
    // `cargo bench` passes `--bench`.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let run = |name: &str, outline: Outline, make: candle::Make| -> Result<()> {
        let lower = name.to_lowercase();
        if !wanted.is_empty() && !wanted.iter().any(|word| lower.contains(&word.to_lowercase())) {
            return Ok(());
        }
        let weights = random.weights(&outline)?;
        let (prefill, decode, replayed) = ours(&outline, weights.clone(), &device)?;
        let model = make(&outline, builder(weights, &device)?)?;
        let (their_prefill, their_decode) = theirs(model, outline.vocab, &device)?;
        let their_prefill = their_prefill.map_or("fails".into(), |speed| format!("{speed:.1}"));
        println!(
            "| {name} | {their_prefill} | {prefill:.0} | {their_decode:.1} | {decode:.1} | \
             {replayed:.1} |"
        );
        Ok(())
    };
    run("mamba-2.8b", recurrent::mamba(2560, 64), candle::mamba)?;
    run("RWKV-5 7B", recurrent::rwkv5(4096, 14336, 32), candle::rwkv5)?;
    run("mamba2-2.7b", recurrent::mamba2(2560, 64), candle::mamba2)?;
    let mut gemma = recurrent::recurrent_gemma(26, 256_000);
    // candle computes its rotary embedding for this number of tokens.
    gemma.config["max_seq_len"] = (PROMPT + STEPS).into();
    run("RecurrentGemma-2B", gemma, candle::recurrent_gemma)
}

/// Random numbers of which all weights are slices: drawing billions would take minutes.
struct Random(Tensor);

impl Random {
    fn new() -> Result<Self> {
        let some = Tensor::randn(0f32, 1.0, 1 << 24, &Device::Cpu)?.to_dtype(DTYPE)?;
        Ok(Self((Tensor::cat(&vec![&some; 41], 0)? * 0.02)?))
    }

    fn weights(&self, outline: &Outline) -> Result<HashMap<String, Tensor>> {
        let mut start = 0;
        let mut cut = |(name, mean, shape): &(String, f32, Vec<usize>)| {
            let count: usize = shape.iter().product();
            let numbers = self.0.narrow(0, start, count)?.reshape(shape.as_slice())?;
            start = (start + count) % (1 << 24);
            let numbers = if *mean == 0.0 { numbers } else { (numbers + f64::from(*mean))? };
            Ok((name.clone(), numbers))
        };
        outline.tensors.iter().map(&mut cut).collect()
    }
}

/// Returns tokens per second of a prompt (the best of three), of steps (the median), and of steps in
/// a CUDA graph.
fn ours(
    outline: &Outline,
    weights: HashMap<String, Tensor>,
    device: &Device,
) -> Result<(f64, f64, f64)> {
    let options = LoadOptions { device: device.clone(), dtype: DTYPE };
    let model = Model::from_tensors(Some(&outline.config.to_string()), weights, &options)?;
    let mut session = model.session(|spec| DenseCache::new(spec.clone(), DTYPE))?;
    let prompt = ids(PROMPT, outline.vocab as u32);
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        session.remove(0);
        best = best.min(feed(&mut session, &prompt)?);
    }
    let decode = median(|| feed(&mut session, &prompt[..1]))?;
    let mut session = session.with_cuda_graphs(64)?;
    let replayed = median(|| feed(&mut session, &prompt[..1]))?;
    if session.replayed_steps() + 4 < STEPS as u64 {
        eprintln!("{} steps of {STEPS} were replayed", session.replayed_steps());
    }
    Ok((PROMPT as f64 / best, 1.0 / decode, 1.0 / replayed))
}

/// Returns the seconds of feeding tokens.
fn feed(session: &mut Session, ids: &[u32]) -> Result<f64> {
    let batch = Batch::single(0, ids.len())?;
    seconds(|| Ok(session.forward(&batch, ids, Logits::Last)?))
}

fn median(mut time: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut times = (0..STEPS).map(|_| time()).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[STEPS / 2])
}

/// Returns the seconds until the next token is chosen, as in generation.
fn seconds(run: impl FnOnce() -> Result<Tensor>) -> Result<f64> {
    let start = Instant::now();
    run()?.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Returns candle's tokens per second of a prompt (measured once, if the model reads one in one
/// call; `None` if that fails) and of steps (the median).
fn theirs(mut model: Box<dyn Theirs>, vocab: usize, device: &Device) -> Result<(Option<f64>, f64)> {
    let prompt = tokens(PROMPT, vocab as u32)?.to_device(device)?;
    let whole = model.whole_prompts().then(|| seconds(|| model.feed(&prompt)));
    if let Some(Err(error)) = &whole {
        eprintln!("candle, {PROMPT} tokens in one call: {error}");
        model.reset()?;
    }
    let one = tokens(1, vocab as u32)?.to_device(device)?;
    let decode = 1.0 / median(|| seconds(|| model.feed(&one)))?;
    let prefill = match whole {
        Some(whole) => whole.ok().map(|seconds| PROMPT as f64 / seconds),
        None => Some(decode),
    };
    Ok((prefill, decode))
}

fn builder(weights: HashMap<String, Tensor>, device: &Device) -> Result<VarBuilder<'static>> {
    let put = |(name, x): (String, Tensor)| -> Result<(String, Tensor)> {
        // A slice is copied first: otherwise the whole storage would be sent to the device.
        Ok((name, x.force_contiguous()?.to_device(device)?))
    };
    let weights = weights.into_iter().map(put).collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(weights, DTYPE, device))
}
