//! Compares SmolLM2's prefill and decode with candle-transformers' `quantized_llama` on the same
//! file, and decoding of eight sequences as one batch with decoding them one after the other.
//!
//! candle's model has 4,096 positions and cannot read a longer prompt. For its decode step after
//! 7,900 tokens, the other tokens are fed one by one at the last position, which is the same work.
//! This takes 15 minutes and runs only with `LONGCTX_SLOW=1`.

use std::fs::File;
use std::hint::black_box;
use std::time::Duration;

use anyhow::Result;
use base_models::{LoadOptions, Pretrained, Transformer};
use candle_core::quantized::gguf_file;
use candle_core::{DType, Device};
use candle_transformers::models::quantized_llama::{MAX_SEQ_LEN, ModelWeights};
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use longctx_benches::{ids, tokens};
use longctx_core::{Batch, CausalLm, DenseCache, Logits, SeqId};
use longctx_examples::methods::Method;
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

fn step(model: &mut impl CausalLm, seq: SeqId, ids: &[u32]) -> Result<()> {
    black_box(model.forward(&Batch::single(seq, ids.len())?, ids, Logits::Last)?);
    Ok(())
}

/// Feeds `length` tokens to candle's model: 4,096 in one call, the others one by one at the last
/// position.
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
        let prompt = ids(length, vocab);
        group.throughput(Throughput::Elements(length as u64));
        for dtype in [DType::F32, DType::F16] {
            let id = BenchmarkId::new(format!("ours, {} cache", dtype.as_str()), length);
            group.bench_function(id, |b| {
                let mut session =
                    model.session(|spec| DenseCache::new(spec.clone(), dtype)).unwrap();
                b.iter(|| {
                    session.remove(0);
                    step(&mut session, 0, &prompt).unwrap();
                });
            });
        }
        if length < MAX_SEQ_LEN {
            let prompt = tokens(length, vocab).expect("tokens");
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
            // Filled by the first iteration, if this case is selected.
            let mut filled = None;
            group.bench_function(id, |b| {
                let session = filled.get_or_insert_with(|| {
                    let mut new =
                        model.session(|spec| DenseCache::new(spec.clone(), dtype)).unwrap();
                    step(&mut new, 0, &ids(length, vocab)).unwrap();
                    new
                });
                b.iter(|| step(session, 0, &[42]).unwrap());
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

/// Decodes one token of each of eight sequences of 500 to 4,000 tokens.
fn batched_decode(c: &mut Criterion) {
    const SEQS: SeqId = 8;
    let model = ours().expect("the model");
    let vocab = model.config().vocab_size as u32;
    let mut group = c.benchmark_group("decode of 8 sequences");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(200)).throughput(Throughput::Elements(SEQS));
    for name in ["dense-f16", "kivi-4"] {
        let method = Method::named(name).expect("a method");
        let batch = Batch::decode(&(0..SEQS).collect::<Vec<_>>()).expect("a batch");
        let tokens = ids(SEQS as usize, vocab);
        // Filled by the first measurement that is selected.
        let mut filled = None;
        let fill = || {
            let mut new = model.session(|spec| method.cache(spec)).unwrap();
            for seq in 0..SEQS {
                step(&mut new, seq, &ids(500 * (seq as usize + 1), vocab)).unwrap();
            }
            new
        };
        group.bench_function(BenchmarkId::new("in one batch", name), |b| {
            let session = filled.get_or_insert_with(fill);
            b.iter(|| black_box(session.forward(&batch, &tokens, Logits::Last).unwrap()));
        });
        group.bench_function(BenchmarkId::new("one after the other", name), |b| {
            let session = filled.get_or_insert_with(fill);
            b.iter(|| (0..SEQS).for_each(|seq| step(session, seq, &[42]).unwrap()));
        });
    }
    group.finish();
}

criterion_group!(base_models, prefill, decode, batched_decode);
criterion_main!(base_models);
