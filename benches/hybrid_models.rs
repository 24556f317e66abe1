//! Prefill and decode of recurrent models beside candle-transformers' on the same random weights.
//!
//! candle's Mamba and RWKV-5 take one token at a time: what a token costs them does not depend on how many came before, so that a
//! few tokens tell their speed, and both sides are given in tokens per second.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Duration;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{mamba, mamba2, recurrent_gemma, rwkv_v5};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use hybrid_models::{LoadOptions, Model, Session};
use longctx_benches::recurrent::{self, Outline};
use longctx_benches::tokens;
use longctx_core::{CausalLm, DenseCache, Logits};
use serde::de::DeserializeOwned;

const PROMPT: usize = 2048;
/// Tokens by which models that go token by token are measured.
const FEW: usize = 64;

/// An outline with random weights.
struct Weights {
    outline: Outline,
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    fn random(outline: Outline) -> Result<Self> {
        let random = |(name, mean, shape): &(String, f32, Vec<usize>)| -> Result<(String, Tensor)> {
            let spread = if shape.len() > 1 { 0.02 } else { 0.1 };
            Ok((name.clone(), Tensor::randn(*mean, spread, shape.as_slice(), &Device::Cpu)?))
        };
        let tensors = outline.tensors.iter().map(random).collect::<Result<_>>()?;
        Ok(Self { outline, tensors })
    }

    fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.tensors.clone(), DType::F32, &Device::Cpu)
    }

    /// candle's configuration.
    fn config<T: DeserializeOwned>(&self) -> Result<T> {
        Ok(serde_json::from_value(self.outline.config.clone())?)
    }

    fn session(&self, dtype: DType) -> Result<Session> {
        let options = LoadOptions { dtype, ..Default::default() };
        let config = self.outline.config.to_string();
        let model = Model::from_tensors(Some(&config), self.tensors.clone(), &options)?;
        Ok(model.session(|l| DenseCache::new(l.attention, DType::F32))?)
    }
}

/// The other side: feeds a prompt `[1, tokens]` to a fresh model, or one more token.
trait Theirs {
    /// Tokens that it can be given at once.
    const AT_ONCE: bool;
    fn reset(&mut self) -> Result<()>;
    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor>;
}

/// Times both sides.
fn compare(
    c: &mut Criterion,
    name: &str,
    weights: &Weights,
    mut theirs: impl Theirs,
) -> Result<()> {
    let vocab = weights.outline.vocab as u32;
    let prompt = tokens(PROMPT, vocab)?;
    let one = tokens(1, vocab)?;
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));

    for dtype in [DType::F32, DType::BF16] {
        let mut ours = weights.session(dtype)?;
        group.throughput(Throughput::Elements(PROMPT as u64));
        group.bench_function(format!("prefill, ours, {}", dtype.as_str()), |b| {
            b.iter(|| {
                ours.reset();
                black_box(ours.forward(&prompt, Logits::Last).unwrap())
            });
        });
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("decode, ours, {}", dtype.as_str()), |b| {
            b.iter(|| black_box(ours.forward(&one, Logits::Last).unwrap()));
        });
    }

    theirs.reset()?;
    group.throughput(Throughput::Elements(1));
    group.bench_function("decode, candle-transformers", |b| {
        b.iter(|| black_box(theirs.feed(&one).unwrap()));
    });
    let count = if theirs_at_once(&theirs) { PROMPT } else { FEW };
    let prompt = prompt.narrow(1, 0, count)?;
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("prefill, candle-transformers", |b| {
        b.iter(|| {
            theirs.reset().unwrap();
            if theirs_at_once(&theirs) {
                black_box(theirs.feed(&prompt).unwrap());
            } else {
                for i in 0..count {
                    black_box(theirs.feed(&prompt.narrow(1, i, 1).unwrap()).unwrap());
                }
            }
        });
    });
    group.finish();
    Ok(())
}

fn theirs_at_once<T: Theirs>(_: &T) -> bool {
    T::AT_ONCE
}

struct Mamba {
    model: mamba::Model,
    config: mamba::Config,
    state: mamba::State,
}

impl Theirs for Mamba {
    const AT_ONCE: bool = false;

    fn reset(&mut self) -> Result<()> {
        self.state = mamba::State::new(1, &self.config, DType::F32, &Device::Cpu)?;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.model.forward(&tokens.squeeze(0)?, &mut self.state)?)
    }
}

fn mamba_130m(c: &mut Criterion) -> Result<()> {
    let w = Weights::random(recurrent::mamba(768, 24))?;
    let config: mamba::Config = w.config()?;
    let state = mamba::State::new(1, &config, DType::F32, &Device::Cpu)?;
    let model = mamba::Model::new(&config, w.builder().pp("backbone"))?;
    compare(c, "mamba-130m", &w, Mamba { model, config, state })
}

struct Mamba2 {
    model: mamba2::Model,
    config: mamba2::Config,
    state: mamba2::State,
}

impl Theirs for Mamba2 {
    const AT_ONCE: bool = true;

    fn reset(&mut self) -> Result<()> {
        self.state = mamba2::State::new(1, &self.config, DType::F32, &Device::Cpu)?;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        match tokens.dim(1)? {
            1 => Ok(self.model.forward(&tokens.squeeze(0)?, &mut self.state)?),
            _ => Ok(self.model.forward_prefill(tokens, &mut self.state, 256)?),
        }
    }
}

fn mamba2_130m(c: &mut Criterion) -> Result<()> {
    let w = Weights::random(recurrent::mamba2(768, 24))?;
    let config: mamba2::Config = w.config()?;
    let state = mamba2::State::new(1, &config, DType::F32, &Device::Cpu)?;
    let model = mamba2::Model::new(&config, w.builder().pp("backbone"))?;
    compare(c, "mamba2-130m", &w, Mamba2 { model, config, state })
}

struct Rwkv5 {
    model: rwkv_v5::Model,
    config: rwkv_v5::Config,
    state: rwkv_v5::State,
}

impl Theirs for Rwkv5 {
    const AT_ONCE: bool = false;

    fn reset(&mut self) -> Result<()> {
        self.state = rwkv_v5::State::new(1, &self.config, &Device::Cpu)?;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.model.forward(tokens, &mut self.state)?)
    }
}

fn rwkv5_169m(c: &mut Criterion) -> Result<()> {
    let w = Weights::random(recurrent::rwkv5(768, 2688, 12))?;
    let config: rwkv_v5::Config = w.config()?;
    let state = rwkv_v5::State::new(1, &config, &Device::Cpu)?;
    let model = rwkv_v5::Model::new(&config, w.builder())?;
    compare(c, "rwkv5-169m", &w, Rwkv5 { model, config, state })
}

struct RecurrentGemma {
    weights: VarBuilder<'static>,
    config: recurrent_gemma::Config,
    model: recurrent_gemma::Model,
    seen: usize,
}

impl Theirs for RecurrentGemma {
    const AT_ONCE: bool = true;

    /// It has no other way to forget.
    fn reset(&mut self) -> Result<()> {
        self.model = recurrent_gemma::Model::new(&self.config, self.weights.clone())?;
        self.seen = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &Tensor) -> Result<Tensor> {
        let logits = self.model.forward(tokens, self.seen)?;
        self.seen += tokens.dim(1)?;
        Ok(logits)
    }
}

/// Two recurrent layers, with 8,192 tokens: the vocabulary's matrix would hide the layers.
fn recurrent_gemma_slice(c: &mut Criterion) -> Result<()> {
    let w = Weights::random(recurrent::recurrent_gemma(2, 8192))?;
    let config: recurrent_gemma::Config = w.config()?;
    let weights = w.builder().pp("model");
    let model = recurrent_gemma::Model::new(&config, weights.clone())?;
    let theirs = RecurrentGemma { weights, config, model, seen: 0 };
    compare(c, "recurrent-gemma-2b, 2 layers", &w, theirs)
}

fn all(c: &mut Criterion) {
    mamba_130m(c).expect("mamba");
    mamba2_130m(c).expect("mamba2");
    rwkv5_169m(c).expect("rwkv5");
    recurrent_gemma_slice(c).expect("recurrent gemma");
}

criterion_group!(hybrid_models, all);
criterion_main!(hybrid_models);
