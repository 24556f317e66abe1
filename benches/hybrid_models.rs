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
use longctx_benches::tokens;
use longctx_core::{CausalLm, DenseCache, Logits};
use serde_json::json;

const PROMPT: usize = 2048;
/// Tokens by which models that go token by token are measured.
const FEW: usize = 64;

/// Random weights, made as they are named.
#[derive(Default)]
struct Weights(HashMap<String, Tensor>);

impl Weights {
    fn add(&mut self, name: &str, mean: f32, shape: &[usize]) -> Result<()> {
        let spread = if shape.len() > 1 { 0.02 } else { 0.1 };
        self.0.insert(name.into(), Tensor::randn(mean, spread, shape, &Device::Cpu)?);
        Ok(())
    }

    fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.0.clone(), DType::F32, &Device::Cpu)
    }

    fn session(&self, config: &serde_json::Value, dtype: DType) -> Result<Session> {
        let options = LoadOptions { dtype };
        let model = Model::from_tensors(Some(&config.to_string()), self.0.clone(), &options)?;
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

/// Times both sides; `vocab` bounds the ids.
fn compare(
    c: &mut Criterion,
    name: &str,
    (weights, config): (&Weights, &serde_json::Value),
    mut theirs: impl Theirs,
    vocab: u32,
) -> Result<()> {
    let prompt = tokens(PROMPT, vocab)?;
    let one = tokens(1, vocab)?;
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_secs(1));

    for dtype in [DType::F32, DType::BF16] {
        let mut ours = weights.session(config, dtype)?;
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

/// mamba-130m.
fn mamba_130m(c: &mut Criterion) -> Result<()> {
    let (hidden, inner, layers, vocab) = (768, 1536, 24, 50280);
    let mut w = Weights::default();
    w.add("backbone.embedding.weight", 0.0, &[vocab, hidden])?;
    w.add("backbone.norm_f.weight", 1.0, &[hidden])?;
    for layer in 0..layers {
        let name = |part: &str| format!("backbone.layers.{layer}.{part}");
        w.add(&name("norm.weight"), 1.0, &[hidden])?;
        for (part, mean, shape) in [
            ("in_proj.weight", 0.0, vec![2 * inner, hidden]),
            ("conv1d.weight", 0.0, vec![inner, 1, 4]),
            ("conv1d.bias", 0.0, vec![inner]),
            ("x_proj.weight", 0.0, vec![48 + 32, inner]),
            ("dt_proj.weight", 0.0, vec![inner, 48]),
            ("dt_proj.bias", -3.0, vec![inner]),
            ("A_log", 1.0, vec![inner, 16]),
            ("D", 1.0, vec![inner]),
            ("out_proj.weight", 0.0, vec![hidden, inner]),
        ] {
            w.add(&name(&format!("mixer.{part}")), mean, &shape)?;
        }
    }
    let config = json!({ "d_model": hidden, "n_layer": layers, "vocab_size": vocab, "pad_vocab_size_multiple": 8 });
    let theirs: mamba::Config = serde_json::from_value(config.clone())?;
    let state = mamba::State::new(1, &theirs, DType::F32, &Device::Cpu)?;
    let model = mamba::Model::new(&theirs, w.builder().pp("backbone"))?;
    compare(c, "mamba-130m", (&w, &config), Mamba { model, config: theirs, state }, vocab as u32)
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

/// mamba2-130m.
fn mamba2_130m(c: &mut Criterion) -> Result<()> {
    let (hidden, inner, heads, states, layers, vocab) = (768, 1536, 24, 128, 24, 50288);
    let mut w = Weights::default();
    w.add("backbone.embeddings.weight", 0.0, &[vocab, hidden])?;
    w.add("backbone.norm_f.weight", 1.0, &[hidden])?;
    let convolved = inner + 2 * states;
    for layer in 0..layers {
        let name = |part: &str| format!("backbone.layers.{layer}.{part}");
        w.add(&name("norm.weight"), 1.0, &[hidden])?;
        for (part, mean, shape) in [
            ("in_proj.weight", 0.0, vec![inner + convolved + heads, hidden]),
            ("conv1d.weight", 0.0, vec![convolved, 1, 4]),
            ("conv1d.bias", 0.0, vec![convolved]),
            ("dt_bias", -3.0, vec![heads]),
            ("A_log", 1.0, vec![heads]),
            ("D", 1.0, vec![heads]),
            ("norm.weight", 1.0, vec![inner]),
            ("out_proj.weight", 0.0, vec![hidden, inner]),
        ] {
            w.add(&name(&format!("mixer.{part}")), mean, &shape)?;
        }
    }
    let config = json!({
        "model_type": "mamba2", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab,
        "state_size": states, "head_dim": 64, "n_groups": 1, "expand": 2,
    });
    let theirs: mamba2::Config = serde_json::from_value(config.clone())?;
    let state = mamba2::State::new(1, &theirs, DType::F32, &Device::Cpu)?;
    let model = mamba2::Model::new(&theirs, w.builder().pp("backbone"))?;
    compare(c, "mamba2-130m", (&w, &config), Mamba2 { model, config: theirs, state }, vocab as u32)
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

/// The shape of the 169M models in RWKV-5's form.
fn rwkv5_169m(c: &mut Criterion) -> Result<()> {
    let (hidden, inner, layers, vocab) = (768, 2688, 12, 65536);
    let mut w = Weights::default();
    w.add("rwkv.embeddings.weight", 0.0, &[vocab, hidden])?;
    w.add("head.weight", 0.0, &[vocab, hidden])?;
    let mut norms = vec!["rwkv.ln_out".to_owned(), "rwkv.blocks.0.pre_ln".into()];
    for layer in 0..layers {
        let block = format!("rwkv.blocks.{layer}");
        norms.extend(["ln1", "ln2", "attention.ln_x"].map(|norm| format!("{block}.{norm}")));
        for part in ["receptance", "key", "value", "gate", "output"] {
            w.add(&format!("{block}.attention.{part}.weight"), 0.0, &[hidden, hidden])?;
        }
        for part in ["key", "value", "receptance", "gate"] {
            w.add(&format!("{block}.attention.time_mix_{part}"), 0.5, &[1, 1, hidden])?;
        }
        for (part, mean) in [("time_decay", -1.0), ("time_faaaa", 0.1)] {
            w.add(&format!("{block}.attention.{part}"), mean, &[hidden / 64, 64])?;
        }
        let feed_forward = format!("{block}.feed_forward");
        for part in ["key", "receptance"] {
            w.add(&format!("{feed_forward}.time_mix_{part}"), 0.5, &[1, 1, hidden])?;
        }
        w.add(&format!("{feed_forward}.key.weight"), 0.0, &[inner, hidden])?;
        w.add(&format!("{feed_forward}.value.weight"), 0.0, &[hidden, inner])?;
        w.add(&format!("{feed_forward}.receptance.weight"), 0.0, &[hidden, hidden])?;
    }
    for norm in norms {
        w.add(&format!("{norm}.weight"), 1.0, &[hidden])?;
        w.add(&format!("{norm}.bias"), 0.0, &[hidden])?;
    }
    let config = json!({
        "model_type": "rwkv5", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "attention_hidden_size": hidden, "num_attention_heads": 64, "head_size": 64, "intermediate_size": inner,
        "layer_norm_epsilon": 1e-5, "rescale_every": 6,
    });
    let theirs: rwkv_v5::Config = serde_json::from_value(config.clone())?;
    let state = rwkv_v5::State::new(1, &theirs, &Device::Cpu)?;
    let model = rwkv_v5::Model::new(&theirs, w.builder())?;
    compare(c, "rwkv5-169m", (&w, &config), Rwkv5 { model, config: theirs, state }, vocab as u32)
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

/// Two recurrent layers of RecurrentGemma-2B, with 8,192 of its 256,000 tokens: the vocabulary's matrix would hide the layers.
fn recurrent_gemma_slice(c: &mut Criterion) -> Result<()> {
    let (hidden, inner, heads, layers, vocab) = (2560, 7680, 10, 2, 8192);
    let mut w = Weights::default();
    w.add("model.embed_tokens.weight", 0.0, &[vocab, hidden])?;
    w.add("model.final_norm.weight", 0.0, &[hidden])?;
    for layer in 0..layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for norm in ["temporal_pre_norm", "channel_pre_norm"] {
            w.add(&name(&format!("{norm}.weight")), 0.0, &[hidden])?;
        }
        for (part, out, from) in [
            ("temporal_block.linear_y", hidden, hidden),
            ("temporal_block.linear_x", hidden, hidden),
            ("temporal_block.linear_out", hidden, hidden),
            ("mlp_block.gate_proj", inner, hidden),
            ("mlp_block.up_proj", inner, hidden),
            ("mlp_block.down_proj", hidden, inner),
        ] {
            w.add(&name(&format!("{part}.weight")), 0.0, &[out, from])?;
            w.add(&name(&format!("{part}.bias")), 0.0, &[out])?;
        }
        w.add(&name("temporal_block.conv_1d.weight"), 0.0, &[hidden, 1, 4])?;
        w.add(&name("temporal_block.conv_1d.bias"), 0.0, &[hidden])?;
        let block = hidden / heads;
        w.add(&name("temporal_block.rg_lru.recurrent_param"), 0.5, &[hidden])?;
        for gate in ["input_gate", "recurrent_gate"] {
            let gate = name(&format!("temporal_block.rg_lru.{gate}"));
            w.add(&format!("{gate}_weight"), 0.0, &[heads, block, block])?;
            w.add(&format!("{gate}_bias"), 0.0, &[heads, block])?;
        }
    }
    let config = json!({
        "model_type": "recurrent_gemma", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": 2 * inner, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 256,
        "lru_width": hidden, "attention_window_size": 2048, "conv1d_width": 4, "logits_soft_cap": 30.0,
        "hidden_activation": "gelu_pytorch_tanh", "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "block_types": ["recurrent", "recurrent", "attention"], "attention_bias": false,
    });
    let theirs: recurrent_gemma::Config = serde_json::from_value(config.clone())?;
    let weights = w.builder().pp("model");
    let model = recurrent_gemma::Model::new(&theirs, weights.clone())?;
    let theirs = RecurrentGemma { weights, config: theirs, model, seen: 0 };
    compare(c, "recurrent-gemma-2b, 2 layers", (&w, &config), theirs, vocab as u32)
}

fn all(c: &mut Criterion) {
    mamba_130m(c).expect("mamba");
    mamba2_130m(c).expect("mamba2");
    rwkv5_169m(c).expect("rwkv5");
    recurrent_gemma_slice(c).expect("recurrent gemma");
}

criterion_group!(hybrid_models, all);
criterion_main!(hybrid_models);
