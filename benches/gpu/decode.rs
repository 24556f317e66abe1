//! Decoding on a GPU with a model of Llama-3-8B's shape (random weights) over long caches in f16, 4
//! and 2 bits; and, given a GGUF file, the packed attention over that model's own keys and values
//! beside the host's.
//!
//!     cargo bench -p longctx-benches --features cuda --bench cuda_decode -- [model.gguf]

use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use anyhow::{Result, ensure};
use base_models::{LoadOptions, Pretrained, Transformer};
use candle_core::cuda::cudarc::driver::result::mem_get_info;
use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Format, QuantStore};
use longctx_benches::llama_3_8b;
use longctx_core::{
    Batch, CausalLm, DenseCache, Footprint, KvCache, KvStore, LayerSpec, Logits, Mask, SeqId, Step,
};
use longctx_examples::methods::Method;

const STEPS: usize = 64;
/// The sequence that decodes.
const SEQ: SeqId = 0;
const GIB: f64 = (1u64 << 30) as f64;

fn main() -> Result<()> {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return Ok(());
    };
    // `cargo bench` adds an argument of its own.
    if let Some(gguf) = std::env::args().skip(1).find(|arg| arg.ends_with(".gguf")) {
        check_real(Path::new(&gguf), &device)?;
    }
    let options = LoadOptions { device: device.clone(), dtype: DType::F16, ..Default::default() };
    let model = Transformer::random(llama_3_8b(), &options)?;
    println!(
        "\n| tokens | cache | ms a token | tokens/s | KV cache, GiB | device memory in use, GiB |"
    );
    println!("|---:|---|---:|---:|---:|---:|");
    for tokens in [4_096, 32_768, 131_072] {
        for name in ["dense-f16", "kivi-4", "kivi-2"] {
            decode(&model, &device, tokens, &Method::named(name)?)?;
        }
    }
    Ok(())
}

/// Median of steps after a random past.
fn decode(model: &Transformer, device: &Device, tokens: usize, method: &Method) -> Result<()> {
    let mut session = model.session(|spec| filled(method.cache(spec)?, tokens, device))?;
    let one = Batch::single(SEQ, 1)?;
    let mut times = Vec::new();
    for _ in 0..STEPS {
        let start = Instant::now();
        let logits = session.forward(&one, &[42], Logits::Last)?;
        // The choice of the next token waits for the device, as a generation does.
        logits.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
        times.push(start.elapsed());
    }
    times.sort();
    let seconds = times[STEPS / 2].as_secs_f64();
    let (free, total) = mem_get_info()?;
    let (cache, used) = (session.footprint().total() as f64 / GIB, (total - free) as f64 / GIB);
    let (ms, rate) = (seconds * 1e3, 1.0 / seconds);
    println!("| {tokens} | {} | {ms:.2} | {rate:.1} | {cache:.2} | {used:.1} |", method.name());
    Ok(())
}

/// The cache with a random sequence.
fn filled(
    mut cache: Box<dyn KvCache>,
    tokens: usize,
    device: &Device,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let shape = cache.spec().shape;
    let random = || -> longctx_core::Result<Tensor> {
        let x = Tensor::randn(0f32, 1., (tokens, shape.kv_heads, shape.head_dim), device)?;
        Ok(x.to_dtype(DType::F16)?)
    };
    let (k, v) = (random()?, random()?);
    // Attention among random tokens is not worth computing: the cache is only filled.
    let q = Tensor::zeros((tokens, shape.heads, shape.head_dim), DType::F16, device)?;
    let batch = Batch::single(SEQ, tokens)?;
    cache.append_prompt(&Step { batch: &batch, q: &q, k: &k, v: &v }, None)?;
    Ok(cache)
}

/// A dense cache that sends on what it is handed: rotated queries and keys, and values.
struct Recording {
    inner: DenseCache,
    sender: Sender<[Tensor; 3]>,
}

impl KvCache for Recording {
    fn spec(&self) -> &LayerSpec {
        self.inner.spec()
    }
    fn attend(&mut self, step: &Step<'_>) -> longctx_core::Result<Tensor> {
        let f16 = |x: &Tensor| x.to_dtype(DType::F16);
        let (q, k) = step.rotate(self.spec(), |seq| self.seen(seq))?;
        // The receiver is gone only if the program ends.
        let _ = self.sender.send([f16(&q)?, f16(&k)?, f16(step.v)?]);
        self.inner.attend(step)
    }
    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> longctx_core::Result<()> {
        self.inner.append_prompt(step, lse)
    }
    fn needs_lse(&self) -> bool {
        self.inner.needs_lse()
    }
    fn fork(&mut self, from: SeqId, to: SeqId) -> longctx_core::Result<()> {
        self.inner.fork(from, to)
    }
    fn check_truncate(&self, seq: SeqId, len: usize) -> longctx_core::Result<()> {
        self.inner.check_truncate(seq, len)
    }
    fn truncate(&mut self, seq: SeqId, len: usize) -> longctx_core::Result<()> {
        self.inner.truncate(seq, len)
    }
    fn remove(&mut self, seq: SeqId) -> bool {
        self.inner.remove(seq)
    }
    fn seqs(&self) -> Vec<SeqId> {
        self.inner.seqs()
    }
    fn seen(&self, seq: SeqId) -> usize {
        self.inner.seen(seq)
    }
    fn held(&self, seq: SeqId) -> usize {
        self.inner.held(seq)
    }
    fn can_take(&self, batch: &Batch) -> bool {
        self.inner.can_take(batch)
    }
    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }
    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.inner.seq_footprint(seq)
    }
    fn clear(&mut self) {
        self.inner.clear();
    }
}

/// The packed attention on the device beside the host's, over what a real model's layers hold of a real text.
fn check_real(gguf: &Path, device: &Device) -> Result<()> {
    let text = include_str!("../../docs/attention.md").repeat(3);
    let llm = Pretrained::open(gguf.to_string_lossy().as_ref(), &LoadOptions::default())?;
    let tokens = llm.tokenizer.encode(&text, true)?;
    let (sender, layers) = channel();
    let mut session = llm.model.session(|spec| {
        let inner = DenseCache::new(spec.clone(), DType::F32)?;
        Ok(Recording { inner, sender: sender.clone() })
    })?;
    drop(sender);
    let batch = Batch::single(SEQ, tokens.len())?;
    session.forward(&batch, &tokens, Logits::Last)?;
    drop(session);
    let shape = llm.model.config().attention(0)?;
    let (mut cases, mut worst) = (0, 0f32);
    for [q, k, v] in layers {
        for bits in [Bits::Two, Bits::Four, Bits::Eight] {
            for format in [Format::kivi(bits, bits, 32, 128)?, Format::kivi(bits, bits, 64, 64)?] {
                let mut host = QuantStore::new(shape, format)?;
                let mut packed = QuantStore::new(shape, format)?;
                host.append(&batch, &k, &v)?;
                packed.append(&batch, &k.to_device(device)?, &v.to_device(device)?)?;
                let queries = Batch::single(SEQ, 4)?;
                let last = q.narrow(0, tokens.len() - 4, 4)?.contiguous()?;
                let want = host.attend(&queries, &last, Mask::Causal)?.out;
                let got = packed.attend(&queries, &last.to_device(device)?, Mask::Causal)?.out;
                let error = relative(&got.to_device(&Device::Cpu)?, &want)?;
                ensure!(error <= 2e-3, "{format:?}: off by {error}");
                (cases, worst) = (cases + 1, worst.max(error));
            }
        }
    }
    println!(
        "{} tokens through {}: {cases} packed caches, the worst relative error beside the host {worst:.1e}",
        tokens.len(),
        gguf.display()
    );
    Ok(())
}

fn relative(got: &Tensor, want: &Tensor) -> Result<f32> {
    let norm = |x: Tensor| -> Result<f32> { Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()) };
    Ok(norm((got - want)?)? / norm(want.clone())?)
}
