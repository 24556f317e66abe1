//! Compares prefill and decode of recurrent models with candle-transformers' on the same random
//! weights.
//!
//! candle's Mamba and RWKV-5 process one token at a time. The cost of a token does not depend on
//! the number of earlier tokens, so a few tokens are enough to measure it. Results are in tokens
//! per second.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Duration;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use hybrid_models::{LoadOptions, Model, Session};
use longctx_benches::candle;
use longctx_benches::recurrent::{self, Outline};
use longctx_benches::{ids, tokens};
use longctx_core::{Batch, CausalLm, DenseCache, Logits};

const PROMPT: usize = 2048;
/// Number of tokens for models that process one token at a time.
const FEW: usize = 64;

/// A model outline with random weights.
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

    fn session(&self, dtype: DType) -> Result<Session> {
        let options = LoadOptions { dtype, ..Default::default() };
        let config = self.outline.config.to_string();
        let model = Model::from_tensors(Some(&config), self.tensors.clone(), &options)?;
        Ok(model.session(|spec| DenseCache::new(spec.clone(), DType::F32))?)
    }
}

/// Measures our model and candle's.
fn compare(c: &mut Criterion, name: &str, outline: Outline, theirs: candle::Make) -> Result<()> {
    let weights = Weights::random(outline)?;
    let mut theirs = theirs(&weights.outline, weights.builder())?;
    let vocab = weights.outline.vocab as u32;
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));

    let prompt = (Batch::single(0, PROMPT)?, ids(PROMPT, vocab));
    let one = (Batch::single(0, 1)?, ids(1, vocab));
    for dtype in [DType::F32, DType::BF16] {
        let mut ours = weights.session(dtype)?;
        group.throughput(Throughput::Elements(PROMPT as u64));
        group.bench_function(format!("prefill, ours, {}", dtype.as_str()), |b| {
            b.iter(|| {
                ours.remove(0);
                black_box(ours.forward(&prompt.0, &prompt.1, Logits::Last).unwrap())
            });
        });
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("decode, ours, {}", dtype.as_str()), |b| {
            b.iter(|| black_box(ours.forward(&one.0, &one.1, Logits::Last).unwrap()));
        });
    }

    theirs.reset()?;
    let one = tokens(1, vocab)?;
    group.throughput(Throughput::Elements(1));
    group.bench_function("decode, candle-transformers", |b| {
        b.iter(|| black_box(theirs.feed(&one).unwrap()));
    });
    let count = if theirs.whole_prompts() { PROMPT } else { FEW };
    let prompt = tokens(count, vocab)?;
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("prefill, candle-transformers", |b| {
        b.iter(|| {
            theirs.reset().unwrap();
            if theirs.whole_prompts() {
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

fn all(c: &mut Criterion) {
    let mut run = |name: &str, outline, theirs| compare(c, name, outline, theirs).expect(name);
    run("mamba-130m", recurrent::mamba(768, 24), candle::mamba);
    run("mamba2-130m", recurrent::mamba2(768, 24), candle::mamba2);
    run("rwkv5-169m", recurrent::rwkv5(768, 2688, 12), candle::rwkv5);
    // Two recurrent layers and a vocabulary of 8,192 tokens: with the whole vocabulary, its matrix
    // would dominate the time.
    let slice = recurrent::recurrent_gemma(2, 8192);
    run("recurrent-gemma-2b, 2 layers", slice, candle::recurrent_gemma);
}

criterion_group!(hybrid_models, all);
criterion_main!(hybrid_models);
