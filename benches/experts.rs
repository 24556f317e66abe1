//! Compares a mixture of experts of Qwen3-30B-A3B's shape (random weights) with two loops over its
//! experts, on the CPU in f32, or with feature `cuda` on a GPU in bf16.
//!
//!     cargo bench -p longctx-benches --bench experts
//!
//! One loop runs every expert over all tokens and weighs the outputs, mostly by 0. The other
//! gathers each expert's tokens and adds the expert's outputs to the result. Both use the same
//! matrix products as ours, and also route on the host.

use std::time::Instant;

use anyhow::Result;
use base_models::{Config, Experts, LoadOptions, RopeSettings, Transformer};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use longctx_core::{RopeScaling, linear, silu_mul};

const HIDDEN: usize = 2048;
const INNER: usize = 768;
const EXPERTS: usize = 128;
const PER_TOKEN: usize = 8;

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let options = LoadOptions { device: device.clone(), dtype, ..Default::default() };
    let ours = Transformer::random(config(), &options)?;
    let theirs = Loop::random(&device, dtype)?;
    let expert_bytes = 3 * HIDDEN * INNER * dtype.size_in_bytes();
    println!("| tokens | way | seconds | over ours | experts read | their bytes, MB | GB/s |");
    println!("|---:|---|---:|---:|---:|---:|---:|");
    for tokens in [1, 2048] {
        let x = Tensor::randn(0f32, 1., (tokens, HIDDEN), &device)?.to_dtype(dtype)?;
        let runs = if tokens == 1 { 50 } else { 5 };
        let (ours, gathered) =
            in_turn(runs, || Ok(ours.feed_forward(0, &x)?), || theirs.gathered(&x))?;
        let all = seconds(&|| theirs.masked(&x))?;
        let chosen = theirs.choose(&x)?.iter().filter(|share| !share.0.is_empty()).count();
        let row = |way: &str, seconds: f64, experts: usize| {
            let bytes = (experts * expert_bytes) as f64;
            println!(
                "| {tokens} | {way} | {seconds:.4} | {:.2} | {experts} | {:.0} | {:.1} |",
                seconds / ours,
                bytes / 1e6,
                bytes / seconds / 1e9,
            );
        };
        row("ours", ours, chosen);
        row("loop, gathered rows", gathered, chosen);
        row("loop, all tokens", all, EXPERTS);
    }
    Ok(())
}

/// One layer of Qwen3-30B-A3B, with a small vocabulary.
fn config() -> Config {
    Config {
        family: "qwen3_moe".into(),
        vocab_size: 16,
        hidden_size: HIDDEN,
        intermediate_size: INNER,
        layers: 1,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        rope: RopeSettings { theta: 1e6, rotary_dims: 128, scaling: RopeScaling::None },
        context_length: 4096,
        experts: Some(Experts {
            count: EXPERTS,
            per_token: PER_TOKEN,
            intermediate_size: INNER,
            normalize: true,
            ..Experts::default()
        }),
        ..Config::default()
    }
}

/// Returns the best time in seconds of each of two functions, which run alternately.
fn in_turn(
    runs: usize,
    a: impl Fn() -> Result<Tensor>,
    b: impl Fn() -> Result<Tensor>,
) -> Result<(f64, f64)> {
    let mut best = (f64::INFINITY, f64::INFINITY);
    for _ in 0..runs {
        best = (best.0.min(seconds(&a)?), best.1.min(seconds(&b)?));
    }
    Ok(best)
}

/// Returns the seconds of one run. Reading a number waits for the device.
fn seconds(f: &impl Fn() -> Result<Tensor>) -> Result<f64> {
    let start = Instant::now();
    f()?.narrow(0, 0, 1)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    Ok(start.elapsed().as_secs_f64())
}

/// A mixture that runs its experts one after the other.
struct Loop {
    router: Tensor,
    /// The fused gate and up projections, and the down projection.
    experts: Vec<(Tensor, Tensor)>,
}

/// An expert's tokens and their weights.
type Share = (Vec<u32>, Vec<f32>);

impl Loop {
    fn random(device: &Device, dtype: DType) -> Result<Self> {
        let matrix = |out: usize, inner: usize| -> Result<Tensor> {
            Ok(Tensor::randn(0f32, 0.02, (out, inner), device)?.to_dtype(dtype)?)
        };
        let expert = |_| Ok((matrix(2 * INNER, HIDDEN)?, matrix(HIDDEN, INNER)?));
        let experts = (0..EXPERTS).map(expert).collect::<Result<_>>()?;
        Ok(Self { router: matrix(EXPERTS, HIDDEN)?, experts })
    }

    fn choose(&self, x: &Tensor) -> Result<Vec<Share>> {
        let logits = linear(x, &self.router)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let mut shares = vec![Share::default(); EXPERTS];
        for (token, p) in softmax_last_dim(&logits)?.to_vec2::<f32>()?.iter().enumerate() {
            let mut order: Vec<_> = (0..EXPERTS).collect();
            order.select_nth_unstable_by(PER_TOKEN - 1, |&a, &b| p[b].total_cmp(&p[a]));
            let sum: f32 = order[..PER_TOKEN].iter().map(|&expert| p[expert]).sum();
            for &expert in &order[..PER_TOKEN] {
                shares[expert].0.push(token as u32);
                shares[expert].1.push(p[expert] / sum);
            }
        }
        Ok(shares)
    }

    fn expert(&self, expert: usize, x: &Tensor) -> Result<Tensor> {
        let (gate_up, down) = &self.experts[expert];
        let both = linear(x, gate_up)?;
        let inner = silu_mul(&both.narrow(1, 0, INNER)?, &both.narrow(1, INNER, INNER)?)?;
        Ok(linear(&inner, down)?)
    }

    fn gathered(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.zeros_like()?;
        for (expert, (tokens, weights)) in self.choose(x)?.into_iter().enumerate() {
            if tokens.is_empty() {
                continue;
            }
            let tokens = Tensor::new(tokens, x.device())?;
            let weights = Tensor::new(weights, x.device())?.to_dtype(x.dtype())?.unsqueeze(1)?;
            let out = self.expert(expert, &x.index_select(&tokens, 0)?)?;
            y = y.index_add(&tokens, &out.broadcast_mul(&weights)?, 0)?;
        }
        Ok(y)
    }

    fn masked(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.zeros_like()?;
        for (expert, (tokens, weights)) in self.choose(x)?.into_iter().enumerate() {
            let mut all = vec![0f32; x.dim(0)?];
            tokens.iter().zip(weights).for_each(|(&token, weight)| all[token as usize] = weight);
            let all = Tensor::new(all, x.device())?.to_dtype(x.dtype())?.unsqueeze(1)?;
            y = (y + self.expert(expert, x)?.broadcast_mul(&all)?)?;
        }
        Ok(y)
    }
}
