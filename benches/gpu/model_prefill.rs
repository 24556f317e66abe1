//! Measures prefill on a GPU with a model of Llama-3-8B's shape (random weights, f16), with the
//! dense cache and with compressing caches. `benches/gpu/model_prefill.py` measures the same model
//! in PyTorch.
//!
//!     cargo bench -p longctx-benches --features cuda --bench cuda_model_prefill -- [method | tokens …]
//!
//! A step of a policy that keeps a quarter compares with that of `dense-f16` after a quarter of the
//! tokens.

use std::time::Instant;

use anyhow::Result;
use base_models::{LoadOptions, Session, Transformer};
use candle_core::{DType, Device};
use longctx_benches::ids;
use longctx_core::{Batch, CausalLm, Greedy, SeqId};
use longctx_examples::methods::Method;
use longctx_examples::shapes::llama_3_8b;

const SEQ: SeqId = 0;
const RUNS: usize = 5;
const STEPS: usize = 24;

fn main() -> Result<()> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return Ok(());
    };
    longctx_core::cuda::keep_freed_memory(&device)?;
    let options = LoadOptions { device, dtype: DType::F16, ..Default::default() };
    let model = Transformer::random(llama_3_8b(), &options)?;
    // `cargo bench` passes `--bench`.
    let args = std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    let (lens, mut methods): (Vec<_>, Vec<_>) = args.partition(|arg| arg.parse::<usize>().is_ok());
    let mut lens = lens.iter().map(|len| len.parse()).collect::<Result<Vec<usize>, _>>()?;
    if lens.is_empty() {
        lens = vec![8_192, 32_768, 131_072];
    }
    if methods.is_empty() {
        methods = vec!["dense-f16".into(), "kivi-4".into()];
    }
    println!("| tokens | cache | prefill, s | a step after it, ms | replayed, ms |");
    println!("|---:|---|---:|---:|---:|");
    for tokens in lens {
        for name in &methods {
            prefill(&model, tokens, &Method::named(name)?)?;
        }
    }
    Ok(())
}

/// Prints the median times of a prompt and of the steps after it, launched and replayed; at the
/// longest length, the time of one prompt.
fn prefill(model: &Transformer, tokens: usize, method: &Method) -> Result<()> {
    let mut session = model.session(|spec| method.cache(spec))?;
    let prompt = ids(tokens, 128_000);
    let mut prompts = Vec::new();
    // The first run is a warm-up.
    for run in 0..if tokens > 100_000 { 2 } else { RUNS + 1 } {
        session.remove(SEQ);
        let seconds = forward(&mut session, &prompt)?;
        if run > 0 {
            prompts.push(seconds);
        }
    }
    let launched = steps(&mut session)?;
    let mut session = session.with_cuda_graphs(1)?;
    let replayed = steps(&mut session)?;
    let replayed = match session.replayed_steps() {
        0 => String::new(),
        _ => format!("{replayed:.2}"),
    };
    let (prompt, name) = (median(prompts), method.name());
    println!("| {tokens} | {name} | {prompt:.4} | {launched:.2} | {replayed} |");
    Ok(())
}

/// Returns the median time of a decode step, in ms.
fn steps(session: &mut Session) -> Result<f64> {
    let steps = (0..STEPS).map(|_| forward(session, &[42])).collect::<Result<Vec<_>>>()?;
    Ok(1e3 * median(steps))
}

/// Returns the seconds of a call, including the choice of the next token, which waits for the
/// device.
fn forward(session: &mut impl CausalLm, ids: &[u32]) -> Result<f64> {
    let start = Instant::now();
    let batch = Batch::single(SEQ, ids.len())?;
    session.forward_greedy(&batch, ids, &mut Greedy::default())?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
