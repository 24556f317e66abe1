//! Prefill and decode of recurrent models on a GPU, random weights in f16, beside candle-transformers' on the same weights where it has the model.
//!
//!     cargo bench -p longctx-benches --features cuda --bench cuda_hybrid
//!
//! candle's models take one token at a time: what a token costs them does not depend on how many came before, so that a few tell their speed.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{mamba, mamba2, rwkv_v5};
use hybrid_models::{LoadOptions, Model};
use longctx_benches::recurrent::{self, Outline};
use longctx_benches::tokens;
use longctx_core::{CausalLm, DenseCache, Logits};

const PROMPT: usize = 8192;
const STEPS: usize = 64;
const DTYPE: DType = DType::F16;

fn main() -> Result<()> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return Ok(());
    };
    println!("| model | prefill of 8,192 tokens, tokens/s | decode, tokens/s | candle, tokens/s |");
    println!("|---|---:|---:|---:|");
    let random = Random::new()?;
    let run = |name: &str, outline: Outline, theirs: Option<&Make<'_>>| -> Result<()> {
        let weights = random.weights(&outline)?;
        let (prefill, decode) = ours(&outline, weights.clone(), &device)?;
        let theirs = match theirs {
            Some(make) => few(make(&outline, weights, &device)?, &device)?,
            None => String::new(),
        };
        println!("| {name} | {prefill:.0} | {decode:.1} | {theirs} |");
        Ok(())
    };
    run("mamba-2.8b", recurrent::mamba(2560, 64), Some(&candle_mamba))?;
    run("RWKV-5 7B", recurrent::rwkv5(4096, 14336, 32), Some(&candle_rwkv5))?;
    run("mamba2-2.7b", recurrent::mamba2(2560, 64), Some(&candle_mamba2))?;
    run("RecurrentGemma-2B", recurrent::recurrent_gemma(26, 256_000), None)
}

/// Random numbers that all weights are cut out of: to draw billions would take minutes.
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

/// Tokens per second: of a prompt, the best of three, and of steps, the median.
fn ours(
    outline: &Outline,
    weights: HashMap<String, Tensor>,
    device: &Device,
) -> Result<(f64, f64)> {
    let options = LoadOptions { device: device.clone(), dtype: DTYPE };
    let model = Model::from_tensors(Some(&outline.config.to_string()), weights, &options)?;
    let mut session = model.session(|layer| DenseCache::new(layer.attention, DTYPE))?;
    let prompt = tokens(PROMPT, outline.vocab as u32)?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        session.reset();
        best = best.min(seconds(|| session.forward(&prompt, Logits::Last).map_err(Into::into))?);
    }
    let one = tokens(1, outline.vocab as u32)?;
    let step = |_| seconds(|| session.forward(&one, Logits::Last).map_err(Into::into));
    let mut times = (0..STEPS).map(step).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok((PROMPT as f64 / best, 1.0 / times[STEPS / 2]))
}

/// Until the next token is chosen, as a generation waits for it.
fn seconds(run: impl FnOnce() -> Result<Tensor>) -> Result<f64> {
    let start = Instant::now();
    run()?.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
    Ok(start.elapsed().as_secs_f64())
}

type Step = Box<dyn FnMut(&Tensor) -> Result<Tensor>>;
type Make<'a> = dyn Fn(&Outline, HashMap<String, Tensor>, &Device) -> Result<Step> + 'a;

/// candle's tokens per second, one token after another.
fn few(mut step: Step, device: &Device) -> Result<String> {
    let token = Tensor::new(&[[42u32]], device)?;
    let mut times = (0..STEPS).map(|_| seconds(|| step(&token))).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(format!("{:.1}", 1.0 / times[STEPS / 2]))
}

fn builder(weights: HashMap<String, Tensor>, device: &Device) -> Result<VarBuilder<'static>> {
    let put = |(name, x): (String, Tensor)| -> Result<(String, Tensor)> {
        // Of a cut, the device would be sent all that it was cut out of.
        Ok((name, x.force_contiguous()?.to_device(device)?))
    };
    let weights = weights.into_iter().map(put).collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(weights, DTYPE, device))
}

fn candle_mamba(
    outline: &Outline,
    weights: HashMap<String, Tensor>,
    device: &Device,
) -> Result<Step> {
    let config: mamba::Config = serde_json::from_value(outline.config.clone())?;
    let model = mamba::Model::new(&config, builder(weights, device)?.pp("backbone"))?;
    let mut state = mamba::State::new(1, &config, DTYPE, device)?;
    Ok(Box::new(move |token| Ok(model.forward(&token.i(0)?, &mut state)?)))
}

fn candle_mamba2(
    outline: &Outline,
    weights: HashMap<String, Tensor>,
    device: &Device,
) -> Result<Step> {
    let config: mamba2::Config = serde_json::from_value(outline.config.clone())?;
    let model = mamba2::Model::new(&config, builder(weights, device)?.pp("backbone"))?;
    let mut state = mamba2::State::new(1, &config, DTYPE, device)?;
    Ok(Box::new(move |token| Ok(model.forward(&token.i(0)?, &mut state)?)))
}

fn candle_rwkv5(
    outline: &Outline,
    weights: HashMap<String, Tensor>,
    device: &Device,
) -> Result<Step> {
    let config: rwkv_v5::Config = serde_json::from_value(outline.config.clone())?;
    let model = rwkv_v5::Model::new(&config, builder(weights, device)?)?;
    let mut state = rwkv_v5::State::new(1, &config, device)?;
    for layer in &mut state.per_layer {
        for part in
            [&mut layer.extract_key_value, &mut layer.linear_attention, &mut layer.feed_forward]
        {
            *part = part.to_dtype(DTYPE)?;
        }
    }
    Ok(Box::new(move |token| Ok(model.forward(token, &mut state)?)))
}
