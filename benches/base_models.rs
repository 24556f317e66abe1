//! SmolLM2's prefill and decode beside candle-transformers' `quantized_llama` on the same file.
//!
//! candle's model has positions for 4,096 tokens and takes a longer prompt not at all. Its decode step after 7,900 tokens is reached by
//! single steps at its last position, which does the same work: set `LONGCTX_SLOW=1` for this quarter of an hour.

use std::fs::File;
use std::hint::black_box;
use std::time::Duration;

use anyhow::Result;
use base_models::{LoadOptions, Pretrained, Transformer};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::quantized_llama::{MAX_SEQ_LEN, ModelWeights};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use longctx_benches::tokens;
use longctx_core::{CausalLm, DenseCache, Logits};
use longctx_examples::model::smollm2;

const LENGTHS: [usize; 4] = [512, 2048, 4000, 7900];

fn ours() -> Result<Transformer> {
    let path = smollm2()?.display().to_string();
    Ok(Pretrained::open(&path, &LoadOptions::default())?.model)
}

fn candles() -> Result<ModelWeights> {
    let mut file = File::open(smollm2()?)?;
    let content = gguf_file::Content::read(&mut file)?;
    Ok(ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)
}

fn step(model: &mut impl CausalLm, tokens: &Tensor) -> Result<()> {
    black_box(model.forward(tokens, Logits::Last)?);
    Ok(())
}

/// Feeds `length` tokens as candle's model allows: at most 4,096 at once, then one by one at the last position.
fn fill(model: &mut ModelWeights, length: usize, vocab: u32) -> Result<()> {
    let whole = length.min(MAX_SEQ_LEN - 1);
    model.forward(&tokens(whole, vocab)?, 0)?;
    for _ in whole..length {
        model.forward(&tokens(1, vocab)?, MAX_SEQ_LEN - 1)?;
    }
    Ok(())
}

fn prefill(c: &mut Criterion) {
    let model = ours().expect("the model");
    let vocab = model.config().vocab_size as u32;
    let mut theirs = candles().expect("the model");
    let mut group = c.benchmark_group("prefill");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).warm_up_time(Duration::from_millis(1));
    for length in LENGTHS {
        let prompt = tokens(length, vocab).expect("tokens");
        group.throughput(Throughput::Elements(length as u64));
        for dtype in [DType::F32, DType::F16] {
            let id = BenchmarkId::new(format!("ours, {} cache", dtype.as_str()), length);
            group.bench_function(id, |b| {
                let mut session = model.session(|l| DenseCache::new(l.attention, dtype)).unwrap();
                b.iter(|| {
                    session.reset();
                    step(&mut session, &prompt).unwrap();
                });
            });
        }
        if length < MAX_SEQ_LEN {
            group.bench_function(BenchmarkId::new("candle-transformers", length), |b| {
                b.iter(|| black_box(theirs.forward(&prompt, 0).unwrap()));
            });
        }
    }
    group.finish();
}

fn decode(c: &mut Criterion) {
    let model = ours().expect("the model");
    let vocab = model.config().vocab_size as u32;
    let one = tokens(1, vocab).expect("tokens");
    let mut group = c.benchmark_group("decode");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(200)).throughput(Throughput::Elements(1));
    for length in LENGTHS {
        for dtype in [DType::F32, DType::F16] {
            let id = BenchmarkId::new(format!("ours, {} cache", dtype.as_str()), length);
            // Filled by the first round of the measurement, if this case is chosen at all.
            let mut filled = None;
            group.bench_function(id, |b| {
                let session = filled.get_or_insert_with(|| {
                    let mut new = model.session(|l| DenseCache::new(l.attention, dtype)).unwrap();
                    step(&mut new, &tokens(length, vocab).unwrap()).unwrap();
                    new
                });
                b.iter(|| step(session, &one).unwrap());
            });
        }
        if length < MAX_SEQ_LEN || std::env::var_os("LONGCTX_SLOW").is_some() {
            let position = length.min(MAX_SEQ_LEN - 1);
            let mut filled = None;
            group.bench_function(BenchmarkId::new("candle-transformers", length), |b| {
                let theirs = filled.get_or_insert_with(|| {
                    let mut new = candles().expect("the model");
                    fill(&mut new, length, vocab).expect("a prompt");
                    new
                });
                b.iter(|| black_box(theirs.forward(&one, position).unwrap()));
            });
        }
    }
    group.finish();
}

criterion_group!(base_models, prefill, decode);
criterion_main!(base_models);
